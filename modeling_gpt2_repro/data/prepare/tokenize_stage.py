"""Stage 1: one task's documents, tokenised into one temporary file that stage 2 can read from anywhere.

    task-000000.tokens.bin      the documents' ids, uint16, each with the end-of-text id in front
    task-000000.documents.npy   one row a document (shuffle.DOCUMENT_DTYPE), in the order of the tokens
    task-000000.json            the summary, written last: a task with it is finished

The tokens lie in runs: what fitted in memory together, a stretch of source order, sorted by key inside. A bucket's
documents are then one contiguous piece of each run.
"""

import contextlib
import dataclasses
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from modeling_gpt2_repro.core.errors import raise_if_refused
from modeling_gpt2_repro.core.files import sync_file, sync_folder
from modeling_gpt2_repro.data.prepare.encoder import DocumentEncoder, get_text_buffers
from modeling_gpt2_repro.data.prepare.shuffle import DOCUMENT_DTYPE, hash_documents, order_by_key
from modeling_gpt2_repro.data.sources.corpus import Task

# 32 MB of ids; the most that a worker holds beside one batch.
TOKENS_PER_RUN = 2**24


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """What a finished task holds.

    Attributes:
        task: its number in source order.
        empty: documents that are null, empty, or nothing to the tokenizer (as spaces are to some); they are skipped.
        run_ends: the row after the last document of each run.
        digest: XXH3-128 of the tokens and the rows, by which a later process knows that they are whole.
    """

    task: int
    documents: int
    tokens: int
    bytes: int
    empty: int
    run_ends: list[int]
    digest: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A stretch of source order within one task's file: rows `[start, end)`, the first at position `first_position`
    of the whole corpus."""

    task: int
    start: int
    end: int
    first_position: int


def tokenize_task(
    number: int,
    task: Task,
    folder: Path,
    encoder: DocumentEncoder,
    *,
    seed: int,
    shuffle: bool,
    max_tokens: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report_tokens: Callable[[int], None] = lambda tokens: None,
) -> TaskSummary | None:
    """Tokenise task `number` into `folder`; return `None`, and finish nothing, where `should_stop()` after a batch.

    Reading ends at the first batch with which the task has `max_tokens` tokens.
    """
    run = _Run(encoder.spec.eot_id)
    rows: list[np.ndarray] = []
    run_ends: list[int] = []
    documents = tokens = text_bytes = empty = 0
    digest = xxhash.xxh3_128()

    def finish_run() -> None:
        nonlocal run
        run_rows, run_tokens = run.arrange(shuffle, first_offset=tokens - run.tokens)
        stream.write(run_tokens.data)  # not `tofile`, whose error on a full disk does not say so
        digest.update(run_tokens.data)
        rows.append(run_rows)
        run_ends.append(documents)
        run = _Run(encoder.spec.eot_id)

    with create_piece(folder / f"{_name(number)}.tokens.bin") as stream:
        for batch in task.read_batches():
            texts, ids, offsets = encode_documents(encoder, batch)
            empty += len(batch) - len(texts)
            if len(texts) == 0:
                continue
            text_offsets, text = get_text_buffers(texts)
            keys = hash_documents(text_offsets, text, seed)
            run.append(ids, offsets, keys, np.diff(text_offsets), first_position=documents)
            documents += len(texts)
            tokens += len(ids) + len(texts)
            text_bytes += int(text_offsets[-1] - text_offsets[0])
            report_tokens(len(ids) + len(texts))
            if run.tokens >= TOKENS_PER_RUN:
                finish_run()
            if max_tokens is not None and tokens >= max_tokens:
                break
            if should_stop():
                return None
        if run.tokens:
            finish_run()
    all_rows = np.concatenate(rows) if rows else np.empty(0, DOCUMENT_DTYPE)
    digest.update(all_rows.tobytes())
    with create_piece(folder / f"{_name(number)}.documents.npy") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(all_rows))
        stream.write(all_rows.tobytes())
    summary = TaskSummary(number, documents, tokens, text_bytes, empty, run_ends, digest.hexdigest())
    with create_piece(folder / f"{_name(number)}.json") as stream:
        stream.write(json.dumps(dataclasses.asdict(summary)).encode())
    return summary


def load_summary(folder: Path, number: int, *, check: bool) -> TaskSummary | None:
    """Return a finished task's summary, `None` for one that is not finished, or is damaged and has to be done again.

    Args:
        check: read all that the task wrote and compare its digest.
    """
    try:
        content = json.loads((folder / f"{_name(number)}.json").read_text(encoding="utf-8"))
        summary = TaskSummary(**content)
        if check:
            digest = xxhash.xxh3_128()
            with open(folder / f"{_name(number)}.tokens.bin", "rb") as stream:
                while block := stream.read(2**24):
                    digest.update(block)
            digest.update(np.load(folder / f"{_name(number)}.documents.npy").tobytes())
            if digest.hexdigest() != summary.digest:
                return None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise_if_refused(error, folder / f"{_name(number)}.json")
        return None
    return summary


def list_runs(summaries: list[TaskSummary]) -> list[Run]:
    """Return the runs of all tasks in source order."""
    runs = []
    position = 0
    for summary in summaries:
        starts = [0, *summary.run_ends][:-1]
        for start, end in zip(starts, summary.run_ends, strict=True):
            runs.append(Run(summary.task, start, end, position + start))
        position += summary.documents
    return runs


def read_documents(folder: Path, run: Run, key_range: tuple[int, int] | None = None) -> np.ndarray:
    """Return a run's rows, positions counted from the start of the corpus; only those with a key in `key_range`
    (first and last, of a run that is sorted by key), where given."""
    rows = np.load(folder / f"{_name(run.task)}.documents.npy", mmap_mode="r")[run.start : run.end]
    if key_range is not None:
        low, high = (np.uint64(key) for key in key_range)
        rows = rows[np.searchsorted(rows["key"], low) : np.searchsorted(rows["key"], high, side="right")]
    rows = np.array(rows)
    # Within the task positions begin at zero; those of a run at its first row, because runs follow source order.
    rows["position"] += run.first_position - run.start
    return rows


def copy_tokens(folder: Path, run: Run, rows: np.ndarray, destination: np.ndarray, starts: np.ndarray) -> None:
    """Copy the ids of the documents in `rows`, which belong to `run`'s task, into `destination`, uint16 of shape
    `(tokens,)`, where each has its place in `starts`."""
    if len(rows) == 0:
        return
    # Mapped for this call alone: a large corpus has more runs than a process may have files open. And as a plain array
    # over the mapping: slicing numpy's memmap class costs several times as much.
    tokens = np.asarray(np.memmap(folder / f"{_name(run.task)}.tokens.bin", dtype="<u2", mode="r"))
    for source, length, start in zip(rows["offset"].tolist(), rows["tokens"].tolist(), starts.tolist(), strict=True):
        destination[start : start + length] = tokens[source : source + length]


@contextlib.contextmanager
def create_piece(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when it is complete.

    Its temporary name is its own, because the same task may run twice at once. Nothing waits for the disk: what was
    lost with the power shows in a digest.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_pieces(folder: Path, numbers: Iterable[int]) -> None:
    """Make the finished pieces of some tasks durable."""
    for number in numbers:
        for suffix in (".tokens.bin", ".documents.npy", ".json"):
            sync_file(folder / f"{_name(number)}{suffix}")
    sync_folder(folder)


def encode_documents(
    encoder: DocumentEncoder, batch: pa.LargeStringArray
) -> tuple[pa.LargeStringArray, np.ndarray, np.ndarray]:
    """Return the texts of a batch that have any tokens, and what `encoder.encode` gives for them."""
    texts = drop_empty(batch)
    if len(texts) == 0:
        return texts, np.empty(0, np.uint16), np.zeros(1, np.int64)
    ids, offsets = encoder.encode(texts)
    has_tokens = np.diff(offsets) > 0
    if not has_tokens.all():
        texts, offsets = texts.filter(pa.array(has_tokens)), np.append(0, offsets[1:][has_tokens])
    return texts, ids, offsets


def drop_empty(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """Return the texts that are neither null nor empty."""
    keep = pc.greater(pc.binary_length(texts), 0)
    if texts.null_count == 0 and pc.all(keep, min_count=0).as_py():
        return texts
    return texts.filter(keep)


class _Run:
    """Documents on their way to one run of a task's file."""

    def __init__(self, eot_id: int):
        self.tokens = 0
        self._eot = np.array([eot_id], dtype="<u2")
        self._batches: list[np.ndarray] = []
        self._pieces: list[np.ndarray] = []

    def append(self, ids, offsets, keys, text_bytes, *, first_position: int) -> None:
        rows = np.empty(len(keys), DOCUMENT_DTYPE)
        rows["key"] = keys
        rows["position"] = np.arange(first_position, first_position + len(keys))
        rows["tokens"] = np.diff(offsets) + 1
        rows["bytes"] = text_bytes
        self._batches.append(rows)
        bounds = offsets.tolist()
        self._pieces += [ids[start:end] for start, end in itertools.pairwise(bounds)]
        self.tokens += len(ids) + len(keys)

    def arrange(self, shuffle: bool, first_offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows in the order in which they lie in the file, and their tokens."""
        rows = np.concatenate(self._batches)
        order = order_by_key(rows) if shuffle else np.arange(len(rows))
        rows = rows[order]
        ends = np.cumsum(rows["tokens"], dtype=np.uint64)
        rows["offset"] = first_offset + ends - rows["tokens"]
        pieces = [piece for index in order.tolist() for piece in (self._eot, self._pieces[index])]
        return rows, np.concatenate(pieces)


def _name(number: int) -> str:
    return f"task-{number:06d}"
