"""Stage 2: from tokenised documents to the shards of both splits.

The documents' rows alone say which split each belongs to and how many tokens every bucket of keys has. So the place of
each bucket in the final shards is known before a token is touched, and any worker can write any bucket.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modeling_gpt2_repro.core.errors import UserError, raise_if_refused
from modeling_gpt2_repro.data.prepare.shuffle import (
    Selection,
    choose_validation_end,
    count_repeated,
    divide_key_space,
    order_by_key,
    select_training,
    select_validation,
)
from modeling_gpt2_repro.data.prepare.tokenize_stage import Run, copy_tokens, create_piece, read_documents
from modeling_gpt2_repro.data.shards import SplitWriter, Totals

# What a worker holds of a bucket while it sorts it: 32 MB of ids.
TOKENS_PER_BUCKET = 2**24
# The default validation split is one shard, but of a small corpus not more than a tenth.
MIN_TOKENS_PER_VALIDATION_TOKEN = 10


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker writes at once: the documents of `runs` (of one bucket, with keys in `key_range`, where given),
    to `position`, in tokens from the start of the split."""

    writer: SplitWriter
    runs: list[Run]
    key_range: tuple[int, int] | None
    position: int


@dataclasses.dataclass(frozen=True)
class PartOutcome:
    """What a finished part holds.

    Attributes:
        documents: those that begin in each shard of the split.
        duplicates: among the documents of a bucket; 0 for a part in source order.
    """

    documents: list[int]
    duplicates: int


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """Both splits: what they hold, and the parts in which they are written.

    `duplicates` is known here for the source order only; of shuffled documents it is counted bucket by bucket.
    """

    val: Totals
    train: Totals
    copies: Totals
    parts: list[Part]
    writers: list[SplitWriter]
    duplicates: int


def count_documents(folder: Path, runs: list[Run], max_tokens: int | None) -> Totals:
    """Return the documents to be used: all, or the shortest prefix of source order that has `max_tokens` tokens."""
    documents = tokens = text_bytes = 0
    for run in runs:
        rows = _in_source_order(read_documents(folder, run))
        if max_tokens is not None:
            ends = tokens + np.cumsum(rows["tokens"], dtype=np.int64)
            rows = rows[: np.searchsorted(ends, max_tokens) + 1]
        documents += len(rows)
        tokens += int(rows["tokens"].sum())
        text_bytes += int(rows["bytes"].sum())
        if max_tokens is not None and tokens >= max_tokens:
            break
    return Totals(documents, tokens, text_bytes)


def choose_splits(
    folder: Path,
    runs: list[Run],
    read: Totals,
    val_tokens: int | None,
    shard_size: int,
    count_bytes: Callable[[np.ndarray], int],
) -> Selection:
    """Decide which of the `read` documents are validation; `val_tokens=None` is one shard, at most a tenth.

    Args:
        count_bytes: returns how many UTF-8 bytes token ids are spelled with; called only where a document is cut, to
            divide its bytes.

    Raises:
        UserError: a corpus too small for both splits.
    """
    if read.documents == 0:
        raise UserError("the corpus is empty: no document has any text")
    wanted = val_tokens if val_tokens is not None else min(shard_size, read.tokens // MIN_TOKENS_PER_VALIDATION_TOKEN)
    if not 0 < wanted < read.tokens:
        raise UserError(
            f"the corpus has {read.tokens:,} tokens, too few for a training split and a validation split"
            + (f" of --val_tokens {val_tokens:,}" if val_tokens is not None else "")
        )
    front: list[np.ndarray] = []
    tokens = 0
    for run in runs:
        front.append(_in_source_order(read_documents(folder, run)))
        tokens += int(front[-1]["tokens"].sum())
        if tokens >= wanted:
            break
    rows = np.concatenate(front)
    ends = np.cumsum(rows["tokens"], dtype=np.int64)
    documents, cut_tokens = choose_validation_end(ends, wanted, read.tokens)
    cut_bytes = 0
    if cut_tokens:
        cut = rows[documents : documents + 1]
        ids = np.empty(cut["tokens"][0], dtype="<u2")
        copy_tokens(folder, run, cut, ids, np.zeros(1, dtype=np.int64))
        front, whole = count_bytes(ids[:cut_tokens]), count_bytes(ids)
        cut_bytes = int(cut["bytes"][0]) * front // whole if whole else 0
    keys = np.unique(rows["key"][: documents + (cut_tokens > 0)])
    return Selection(read.documents, documents, cut_tokens, cut_bytes, keys)


def list_validation_bytes(folder: Path, runs: list[Run], selection: Selection) -> np.ndarray:
    """Return the UTF-8 bytes of each validation document in the order of the split, uint64 of shape `(documents,)`."""
    counts = [np.empty(0, np.uint64)]
    for run in runs:
        if run.first_position <= selection.validation_documents:
            counts.append(select_validation(read_documents(folder, run), selection)["bytes"])
    return np.concatenate(counts)


def plan_splits(
    folder: Path,
    shard_folder: Path,
    prefix: str,
    runs: list[Run],
    selection: Selection,
    read: Totals,
    *,
    shard_size: int,
    shuffle: bool,
) -> SplitPlan:
    """Count what goes where, from the rows in `folder`, for shards in `shard_folder`.

    Raises:
        UserError: nothing is left for training.
    """
    key_ranges = divide_key_space(max(1, read.tokens // TOKENS_PER_BUCKET))
    last_keys = np.array([last for _, last in key_ranges], dtype=np.uint64)
    bucket_tokens = np.zeros(len(key_ranges), dtype=np.int64)
    train_run_tokens: list[int] = []
    val_run_tokens: list[int] = []
    val = train = copies = Totals()
    keys: list[np.ndarray] = []
    for run in runs:
        rows = read_documents(folder, run)
        front = select_validation(rows, selection)
        training, left_out = select_training(rows, selection)
        val, train, copies = _add(val, front), _add(train, training), _add(copies, left_out)
        val_run_tokens.append(int(front["tokens"].sum()))
        train_run_tokens.append(int(training["tokens"].sum()))
        if shuffle:
            buckets = np.searchsorted(last_keys, training["key"])
            bucket_tokens += np.bincount(buckets, training["tokens"], len(key_ranges)).astype(np.int64)
        else:
            keys.append(training["key"])
    if train.tokens == 0:
        raise UserError("nothing is left for training: every other document is a copy of a validation document")
    if selection.cut_tokens:  # it counts as one document, where it begins
        train = dataclasses.replace(train, documents=train.documents - 1)
    val_writer = SplitWriter(shard_folder, prefix, "val", 0, val.tokens, shard_size)
    train_writer = SplitWriter(shard_folder, prefix, "train", len(val_writer.names), train.tokens, shard_size)
    parts = _place_runs(val_writer, runs, val_run_tokens)
    if shuffle:
        starts = np.cumsum(bucket_tokens) - bucket_tokens
        parts += [
            Part(train_writer, runs, key_range, start)
            for key_range, start in zip(key_ranges, starts.tolist(), strict=True)
        ]
    else:
        parts += _place_runs(train_writer, runs, train_run_tokens)
    duplicates = count_repeated(np.sort(np.concatenate(keys))) if keys else 0
    return SplitPlan(val, train, copies, parts, [val_writer, train_writer], duplicates)


def write_part(folder: Path, number: int, part: Part, selection: Selection) -> PartOutcome:
    """Write part `number` from the tasks' files in `folder` to its shards, and then its outcome to `folder`."""
    is_validation = part.writer.split == "val"
    selected = []
    for run in part.runs:
        rows = read_documents(folder, run, part.key_range)
        selected.append(select_validation(rows, selection) if is_validation else select_training(rows, selection)[0])
    documents = np.concatenate(selected)
    in_bucket = part.key_range is not None
    order = order_by_key(documents) if in_bucket else np.arange(len(documents))
    ends = np.cumsum(documents["tokens"][order], dtype=np.int64)
    starts = np.empty(len(documents), dtype=np.int64)
    starts[order] = ends - documents["tokens"][order]
    tokens = np.empty(ends[-1] if len(ends) else 0, dtype="<u2")
    places = np.split(starts, np.cumsum([len(rows) for rows in selected])[:-1])
    for run, rows, place in zip(part.runs, selected, places, strict=True):
        copy_tokens(folder, run, rows, tokens, place)
    part.writer.write(part.position, tokens)
    starts += part.position
    if selection.cut_tokens and not is_validation:
        starts = starts[documents["position"] != selection.validation_documents]
    begun = np.bincount(starts // part.writer.shard_size, minlength=len(part.writer.names))
    outcome = PartOutcome(begun.tolist(), count_repeated(documents["key"][order]) if in_bucket else 0)
    with create_piece(_get_outcome_path(folder, number)) as stream:
        stream.write(json.dumps(dataclasses.asdict(outcome)).encode())
    return outcome


def load_outcome(folder: Path, number: int) -> PartOutcome | None:
    """Return what `write_part` returned, in whichever process; `None` for a part that is not finished."""
    path = _get_outcome_path(folder, number)
    try:
        return PartOutcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise_if_refused(error, path)
        return None


def _get_outcome_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


def _place_runs(writer: SplitWriter, runs: list[Run], run_tokens: list[int]) -> list[Part]:
    """Return the parts of a split in source order: a run after the other."""
    starts = np.cumsum([0, *run_tokens]).tolist()
    return [
        Part(writer, [run], None, start)
        for run, start, tokens in zip(runs, starts, run_tokens, strict=False)
        if tokens
    ]


def _in_source_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows["position"])]


def _add(totals: Totals, rows: np.ndarray) -> Totals:
    return Totals(
        totals.documents + len(rows),
        totals.tokens + int(rows["tokens"].sum()),
        totals.bytes + int(rows["bytes"].sum()),
    )
