"""Stage 2: writing tokenized documents to the shards of both splits.

The documents' entries alone determine the split of each document and the number of tokens in each bucket. The position
of each bucket in the final shards is therefore known before any token is read, and any worker can write any bucket.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...core.errors import UserError
from ..shards import SplitWriter, Totals
from .config import PrepareConfig
from .shuffle import (
    Selection,
    choose_validation_end,
    count_duplicates,
    divide_key_space,
    order_by_key,
    select_training,
    select_validation,
)
from .tokenize_stage import SortedChunk, WorkerContext
from .work_folder import load_record, save_record

# A worker sorts one bucket in memory: 32 MB of ids.
TOKENS_PER_BUCKET = 2**24
# The default validation split is one shard, but at most a tenth of the corpus.
MIN_TOKENS_PER_VALIDATION_TOKEN = 10


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work of this stage.

    Attributes:
        writer: writer of its split.
        chunks: chunks with its documents.
        key_range: first and last key of its bucket; `None` for all documents of its chunks, in source order.
        position: its start in the split, in tokens.
    """

    writer: SplitWriter
    chunks: list[SortedChunk]
    key_range: tuple[int, int] | None
    position: int

    def select_documents(self, chunk: SortedChunk, selection: Selection) -> np.ndarray:
        """Return the documents of a chunk that belong to this part."""
        documents = chunk.read_documents(self.key_range)
        if self.writer.split == "val":
            return select_validation(documents, selection)
        return select_training(documents, selection)[0]


@dataclasses.dataclass(frozen=True)
class PartOutcome:
    """Summary of a finished part.

    Attributes:
        documents: number of its documents that start in each shard of the split.
        duplicates: number of duplicate documents in a bucket; 0 for a part in source order.
    """

    documents: list[int]
    duplicates: int


@dataclasses.dataclass(frozen=True)
class WritePlan:
    """The layout of the shards: everything that stage 2 needs to know.

    Attributes:
        chunks: the sorted chunks of all tasks, in source order.
        read: totals of the documents to use.
        copies: totals of training documents dropped as copies of validation documents.
        parts: the parts of both splits.
        writers: the writers of the validation and the training split.
        duplicates: number of duplicates if nothing is shuffled; otherwise 0, because each bucket counts its own.
    """

    chunks: list[SortedChunk]
    read: Totals
    selection: Selection
    val: Totals
    train: Totals
    copies: Totals
    parts: list[Part]
    writers: list[SplitWriter]
    duplicates: int


def plan_shards(
    chunks: list[SortedChunk], config: PrepareConfig, folder: Path, prefix: str, byte_lengths: np.ndarray
) -> WritePlan:
    """Plan the layout of the shards. A pure function of the finished tasks: every process computes the same plan.

    Args:
        folder: the folder for the shards.
        prefix: the beginning of the shards' names.
        byte_lengths: UTF-8 bytes of each id, of shape `(vocab_size,)`, for dividing the bytes of a document that is
            cut between the splits.

    Raises:
        UserError: the corpus is too small for two splits.
    """
    read = _count_documents(chunks, config.max_tokens)
    selection = _choose_splits(chunks, read, config, byte_lengths)
    buckets = divide_key_space(max(1, read.tokens // TOKENS_PER_BUCKET))
    counts = [_count_chunk(chunk, selection, buckets) for chunk in chunks]
    vals, trains, all_copies, bucket_tokens = zip(*counts, strict=True)
    val, train, copies = (sum(totals, Totals()) for totals in (vals, trains, all_copies))
    if train.tokens == 0:
        raise UserError(
            "no training documents are left: every other document is a copy of a validation document; add other text"
        )
    val_writer = SplitWriter(folder, prefix, "val", 0, val.tokens, config.shard_size)
    train_writer = SplitWriter(folder, prefix, "train", len(val_writer.names), train.tokens, config.shard_size)
    if selection.cut_tokens:  # the cut document counts once, in the split in which it starts
        train = dataclasses.replace(train, documents=train.documents - 1)
    parts = _plan_source_order(val_writer, chunks, [totals.tokens for totals in vals])
    duplicates = 0
    if config.no_shuffle:
        parts += _plan_source_order(train_writer, chunks, [totals.tokens for totals in trains])
        keys = [select_training(chunk.read_documents(), selection)[0]["key"] for chunk in chunks]
        duplicates = count_duplicates(np.sort(np.concatenate(keys)))
    else:
        starts = _list_starts(np.sum(bucket_tokens, axis=0)).tolist()
        parts += [Part(train_writer, chunks, bucket, start) for bucket, start in zip(buckets, starts, strict=True)]
    return WritePlan(chunks, read, selection, val, train, copies, parts, [val_writer, train_writer], duplicates)


def list_validation_bytes(plan: WritePlan) -> np.ndarray:
    """Return the number of UTF-8 bytes of each validation document, in split order, uint64 of shape `(documents,)`."""
    front = [chunk for chunk in plan.chunks if chunk.first_position <= plan.selection.validation_documents]
    return np.concatenate([select_validation(chunk.read_documents(), plan.selection)["bytes"] for chunk in front])


def write_part(context: WorkerContext, number: int, part: Part, selection: Selection) -> PartOutcome:
    """Write part `number` to its shards and save its outcome, unless it is finished; return the outcome."""
    outcome_path = context.pieces / f"part-{number:06d}.json"
    if (finished := load_record(outcome_path, PartOutcome)) is not None:
        return finished
    by_chunk = [part.select_documents(chunk, selection) for chunk in part.chunks]
    documents = np.concatenate(by_chunk)
    is_bucket = part.key_range is not None
    order = order_by_key(documents) if is_bucket else np.arange(len(documents))
    starts = np.empty(len(documents), dtype=np.int64)
    starts[order] = _list_starts(documents["tokens"][order])
    tokens = np.empty(documents["tokens"].sum(), dtype="<u2")
    first = 0
    for chunk, of_chunk in zip(part.chunks, by_chunk, strict=True):
        chunk.copy_tokens(of_chunk, tokens, starts[first : first + len(of_chunk)])
        first += len(of_chunk)
    part.writer.write(part.position, tokens)
    begins = part.position + starts
    if selection.cut_tokens and part.writer.split == "train":  # the remainder of the cut document is not a start
        begins = begins[documents["position"] != selection.validation_documents]
    by_shard = np.bincount(begins // part.writer.shard_size, minlength=len(part.writer.names))
    outcome = PartOutcome(by_shard.tolist(), count_duplicates(documents["key"][order]) if is_bucket else 0)
    save_record(outcome_path, outcome)
    return outcome


def _count_documents(chunks: list[SortedChunk], max_tokens: int | None) -> Totals:
    """Return totals of the documents to use: all, or the shortest prefix in source order with `max_tokens` tokens."""
    totals = Totals()
    for _, documents in _read_front(chunks, max_tokens):
        if max_tokens is not None:
            ends = totals.tokens + np.cumsum(documents["tokens"], dtype=np.int64)
            documents = documents[: np.searchsorted(ends, max_tokens) + 1]
        totals += _sum_up(documents)
    return totals


def _choose_splits(
    chunks: list[SortedChunk], read: Totals, config: PrepareConfig, byte_lengths: np.ndarray
) -> Selection:
    """Choose which of the `read` documents are validation."""
    val_tokens = _choose_val_tokens(read, config)
    front = list(_read_front(chunks, val_tokens))
    documents = np.concatenate([documents for _, documents in front])
    ends = np.cumsum(documents["tokens"], dtype=np.int64)
    n_documents, cut_tokens = choose_validation_end(ends, val_tokens, read.tokens)
    cut_bytes = 0
    if cut_tokens:
        last_chunk, _ = front[-1]
        cut = documents[n_documents : n_documents + 1]
        cut_bytes = _count_cut_bytes(last_chunk, cut, cut_tokens, byte_lengths)
    keys = np.unique(documents["key"][: n_documents + (cut_tokens > 0)])
    return Selection(read.documents, n_documents, cut_tokens, cut_bytes, keys)


def _count_chunk(
    chunk: SortedChunk, selection: Selection, buckets: list[tuple[int, int]]
) -> tuple[Totals, Totals, Totals, np.ndarray]:
    """Return totals of a chunk's validation documents, training documents and dropped copies, and its number of
    training tokens in each bucket, int64."""
    documents = chunk.read_documents()
    training, copies = select_training(documents, selection)
    last_keys = np.array([last for _, last in buckets], dtype=np.uint64)
    bucket_of = np.searchsorted(last_keys, training["key"])
    bucket_tokens = np.bincount(bucket_of, training["tokens"], len(buckets)).astype(np.int64)
    return _sum_up(select_validation(documents, selection)), _sum_up(training), _sum_up(copies), bucket_tokens


def _plan_source_order(writer: SplitWriter, chunks: list[SortedChunk], chunk_tokens: list[int]) -> list[Part]:
    """Return the parts of a split in source order, one per chunk with any of its tokens."""
    starts = _list_starts(np.array(chunk_tokens)).tolist()
    places = zip(chunks, starts, chunk_tokens, strict=True)
    return [Part(writer, [chunk], None, start) for chunk, start, tokens in places if tokens]


def _list_starts(lengths: np.ndarray) -> np.ndarray:
    """Return the start of each of several consecutive ranges, int64."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _read_front(chunks: list[SortedChunk], n_tokens: int | None) -> Iterator[tuple[SortedChunk, np.ndarray]]:
    """Yield chunks and their documents in source order until they have `n_tokens` tokens; `None` for all chunks."""
    tokens = 0
    for chunk in chunks:
        documents = chunk.read_documents()
        documents = documents[np.argsort(documents["position"])]
        yield chunk, documents
        tokens += int(documents["tokens"].sum())
        if n_tokens is not None and tokens >= n_tokens:
            return


def _sum_up(documents: np.ndarray) -> Totals:
    return Totals(len(documents), int(documents["tokens"].sum()), int(documents["bytes"].sum()))


def _choose_val_tokens(read: Totals, config: PrepareConfig) -> int:
    if read.documents == 0:
        raise UserError("the corpus is empty: no document contains text")
    val_tokens = config.val_tokens
    if val_tokens is None:
        val_tokens = min(config.shard_size, read.tokens // MIN_TOKENS_PER_VALIDATION_TOKEN)
    if not 0 < val_tokens < read.tokens:
        requested = f" of --val_tokens {val_tokens:,}" if config.val_tokens is not None else ""
        raise UserError(
            f"the corpus has {read.tokens:,} tokens, too few for a training split and a validation split{requested}"
        )
    return val_tokens


def _count_cut_bytes(chunk: SortedChunk, document: np.ndarray, cut_tokens: int, byte_lengths: np.ndarray) -> int:
    """Return the number of a document's UTF-8 bytes attributed to its first `cut_tokens` tokens."""
    ids = np.empty(document["tokens"][0], dtype="<u2")
    chunk.copy_tokens(document, ids, np.zeros(1, dtype=np.int64))
    front, whole = int(byte_lengths[ids[:cut_tokens]].sum()), int(byte_lengths[ids].sum())
    return int(document["bytes"][0]) * front // whole if whole else 0
