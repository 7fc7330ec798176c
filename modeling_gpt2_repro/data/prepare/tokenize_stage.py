"""Stage 1: tokenizing one task's documents into files that stage 2 can read at random.

    task-000000.tokens.bin      the documents' ids, uint16, each document preceded by the end-of-text id
    task-000000.documents.npy   one entry per document (shuffle.DOCUMENT_DTYPE), in the order of the tokens
    task-000000.json            the summary, written last: its existence marks the task as finished

Tokens are stored in sorted chunks: each is a range of the source order that fits in memory, sorted by key. A bucket is
therefore one contiguous slice of each chunk.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ...core.errors import raise_if_unreadable
from ...core.files import sync_file, sync_folder
from ...core.optional import not_none
from ..sources.corpus import Task
from .config import PrepareConfig
from .encoder import DocumentEncoder, get_text_buffers
from .shuffle import DOCUMENT_DTYPE, hash_documents, order_by_key
from .work_folder import create_file, load_record, save_record
from .workers import add_progress, is_over

# 32 MB of ids, which a worker keeps in memory in addition to one batch.
TOKENS_PER_SORTED_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class WorkerContext:
    """State shared by all workers.

    Attributes:
        pieces: the folder of finished pieces.
        encoder: `None` if only stage 2 is run.
    """

    pieces: Path
    encoder: DocumentEncoder | None
    config: PrepareConfig


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """Summary of a finished task.

    Attributes:
        task: its number in source order.
        empty: documents skipped because they are null, empty, or have no tokens (as spaces in some tokenizers).
        run_ends: exclusive end of each sorted chunk, in documents; named after the key in existing JSON files.
        digest: XXH3-128 of the tokens and the documents' entries, to detect incomplete files.
    """

    task: int
    documents: int
    tokens: int
    bytes: int
    empty: int
    run_ends: list[int]
    digest: str


@dataclasses.dataclass(frozen=True)
class SortedChunk:
    """Entries `[start, end)` of a task: a range of the source order, sorted by key unless shuffling is off.

    Attributes:
        folder: the folder of the task's files.
        first_position: position in the corpus of the chunk's first document in source order.
    """

    folder: Path
    task: int
    start: int
    end: int
    first_position: int

    def read_documents(self, key_range: tuple[int, int] | None = None) -> np.ndarray:
        """Return its documents, of `DOCUMENT_DTYPE`, with positions relative to the corpus.

        Args:
            key_range: first and last key to read, which requires a chunk sorted by key; `None` for all documents.
        """
        documents = np.load(_get_path(self.folder, self.task, "documents.npy"), mmap_mode="r")[self.start : self.end]
        if key_range is not None:
            low, high = (np.uint64(key) for key in key_range)
            keys = documents["key"]
            documents = documents[np.searchsorted(keys, low) : np.searchsorted(keys, high, side="right")]
        documents = np.array(documents)
        # Positions in the file are relative to the task, and so is `start`, because chunks are in source order.
        documents["position"] += self.first_position - self.start
        return documents

    def copy_tokens(self, documents: np.ndarray, destination: np.ndarray, starts: np.ndarray) -> None:
        """Copy the ids of some of its documents into `destination`, uint16, at the positions `starts`, int64."""
        if len(documents) == 0:
            return
        # Mapped for this call only: a large corpus has more chunks than the open-file limit. Converted to a plain
        # array, because slicing numpy's memmap class takes several times as long.
        tokens = np.asarray(np.memmap(_get_path(self.folder, self.task, "tokens.bin"), dtype="<u2", mode="r"))
        places = zip(documents["offset"].tolist(), documents["tokens"].tolist(), starts.tolist(), strict=True)
        for source, length, start in places:
            destination[start : start + length] = tokens[source : source + length]


def tokenize_task(context: WorkerContext, number: int, task: Task) -> TaskSummary | None:
    """Tokenize task `number` unless it is finished; return `None` if its result is no longer needed.

    Reading stops after the first batch with which the task reaches `max_tokens`.
    """
    folder, encoder, config = context.pieces, not_none(context.encoder), context.config
    finished = load_summary(folder, number, check=True)
    if finished is not None:
        add_progress(finished.tokens)
        return finished
    empty = 0
    with create_file(_get_path(folder, number, "tokens.bin")) as stream:
        writer = _ChunkWriter(stream, encoder.eot_id, not config.no_shuffle)
        for batch in task.read_batches():
            documents, ids = encode_documents(encoder, batch, config.seed)
            empty += len(batch) - len(documents)
            writer.add(documents, ids)
            add_progress(int(documents["tokens"].sum()))
            if config.max_tokens is not None and writer.tokens >= config.max_tokens:
                break
            if is_over():
                return None
        documents = writer.finish()
    writer.digest.update(documents.tobytes())
    with create_file(_get_path(folder, number, "documents.npy")) as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(documents))
        stream.write(documents.tobytes())
    text_bytes = int(documents["bytes"].sum())
    digest = writer.digest.hexdigest()
    summary = TaskSummary(number, len(documents), writer.tokens, text_bytes, empty, writer.chunk_ends, digest)
    save_record(_get_path(folder, number, "json"), summary)
    return summary


def load_summary(folder: Path, number: int, *, check: bool) -> TaskSummary | None:
    """Return a task's summary; `None` if it is unfinished, or damaged and must be repeated.

    Args:
        check: verify the digest of the task's files.
    """
    summary = load_record(_get_path(folder, number, "json"), TaskSummary)
    if summary is None or not check:
        return summary
    try:
        with open(_get_path(folder, number, "tokens.bin"), "rb") as stream:
            digest = hashlib.file_digest(stream, xxhash.xxh3_128)
        digest.update(np.load(_get_path(folder, number, "documents.npy")).tobytes())
    except (OSError, ValueError, EOFError) as error:
        raise_if_unreadable(error, _get_path(folder, number, "json"))
        return None
    return summary if digest.hexdigest() == summary.digest else None


def list_sorted_chunks(folder: Path, summaries: list[TaskSummary]) -> list[SortedChunk]:
    """Return the sorted chunks of all tasks, in source order."""
    chunks = []
    position = 0
    for summary in summaries:
        for start, end in itertools.pairwise([0, *summary.run_ends]):
            chunks.append(SortedChunk(folder, summary.task, start, end, position + start))
        position += summary.documents
    return chunks


def sync_tasks(folder: Path, numbers: Iterable[int]) -> None:
    """Make the files of finished tasks durable."""
    for number in numbers:
        for suffix in ("tokens.bin", "documents.npy", "json"):
            sync_file(_get_path(folder, number, suffix))
    sync_folder(folder)


def encode_documents(
    encoder: DocumentEncoder, batch: pa.LargeStringArray, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Encode a batch, dropping texts without tokens.

    Returns:
        The documents, of `DOCUMENT_DTYPE`, with `offset` and `position` unset, and each one's ids.
    """
    texts = drop_empty(batch)
    if len(texts) == 0:
        return np.empty(0, DOCUMENT_DTYPE), []
    ids, offsets = encoder.encode(texts)
    has_tokens = np.diff(offsets) > 0
    if not has_tokens.all():
        texts, offsets = texts.filter(pa.array(has_tokens)), np.append(0, offsets[1:][has_tokens])
    text_offsets, text = get_text_buffers(texts)
    documents = np.empty(len(texts), DOCUMENT_DTYPE)
    documents["key"] = hash_documents(text_offsets, text, seed)
    documents["tokens"] = np.diff(offsets) + 1  # the end-of-text id
    documents["bytes"] = np.diff(text_offsets)
    return documents, [ids[start:end] for start, end in itertools.pairwise(offsets.tolist())]


def drop_empty(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the texts that are neither null nor empty."""
    keep = pc.greater(pc.binary_length(texts), 0)
    if texts.null_count == 0 and pc.all(keep, min_count=0).as_py():
        return texts
    return texts.filter(keep)


class _ChunkWriter:
    """Collects a task's documents, and writes the tokens of each sorted chunk once it is full.

    Attributes:
        tokens: number of tokens of all documents so far.
        chunk_ends: number of documents up to the end of each written chunk.
        digest: digest of the tokens written.
    """

    def __init__(self, stream: IO[bytes], eot_id: int, shuffle: bool):
        self.tokens = 0
        self.chunk_ends: list[int] = []
        self.digest = xxhash.xxh3_128()
        self._stream = stream
        self._eot = np.array([eot_id], dtype="<u2")
        self._shuffle = shuffle
        self._chunks: list[np.ndarray] = []
        self._begin_chunk()

    def add(self, documents: np.ndarray, ids: list[np.ndarray]) -> None:
        """Add documents and their ids, as returned by `encode_documents`."""
        first = sum(map(len, self._chunks)) + len(self._ids)
        documents["position"] = np.arange(first, first + len(documents))
        self._documents.append(documents)
        self._ids += ids
        self.tokens += int(documents["tokens"].sum())
        if self.tokens - self._chunk_start >= TOKENS_PER_SORTED_CHUNK:
            self._write_chunk()

    def finish(self) -> np.ndarray:
        """Write the last chunk, and return all documents in the order of their tokens in the file."""
        if self._ids:
            self._write_chunk()
        return np.concatenate([np.empty(0, DOCUMENT_DTYPE), *self._chunks])

    def _begin_chunk(self) -> None:
        self._chunk_start = self.tokens
        self._documents: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def _write_chunk(self) -> None:
        documents = np.concatenate(self._documents)
        order = order_by_key(documents) if self._shuffle else np.arange(len(documents))
        documents = documents[order]
        ends = np.cumsum(documents["tokens"], dtype=np.uint64)
        documents["offset"] = self._chunk_start + ends - documents["tokens"]
        tokens = np.concatenate([part for index in order.tolist() for part in (self._eot, self._ids[index])])
        self._stream.write(tokens.data)  # not `tofile`, which does not report a full disk
        self.digest.update(tokens.data)
        self._chunks.append(documents)
        self.chunk_ends.append(sum(map(len, self._chunks)))
        self._begin_chunk()


def _get_path(folder: Path, task: int, suffix: str) -> Path:
    return folder / f"task-{task:06d}.{suffix}"
