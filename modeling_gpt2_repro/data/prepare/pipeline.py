"""From a corpus to a folder of shards.

Stage 1 tokenises each task into a file of its own (data/tokenized.py). Then everything about the result is known
without touching a token: which documents are validation, and how many tokens each bucket of keys has. Stage 2
therefore writes the buckets, in any order and by any worker, straight to their places in the final shards.

The pieces of both stages lie in a work folder (data/work_folder.py), where a run that was interrupted finds those that
are finished. `run_stage` makes a share of one stage's pieces, for engines that schedule many processes; `build_shards`
makes all that are left, and the folder.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import compute_checksum, sync_file, sync_folder, sync_tree
from modeling_gpt2_repro.data.prepare.encoder import DocumentEncoder, build_encoder
from modeling_gpt2_repro.data.prepare.shuffle import Selection
from modeling_gpt2_repro.data.prepare.tokenize_stage import (
    Run,
    TaskSummary,
    list_runs,
    load_summary,
    sync_pieces,
    tokenize_task,
)
from modeling_gpt2_repro.data.prepare.work_folder import WorkFolder, open_work_folder
from modeling_gpt2_repro.data.prepare.workers import START_METHOD, WorkerPool, has_shared_memory, is_over
from modeling_gpt2_repro.data.prepare.write_stage import (
    Part,
    PartOutcome,
    SplitPlan,
    choose_splits,
    count_documents,
    list_validation_bytes,
    load_outcome,
    plan_splits,
    write_part,
)
from modeling_gpt2_repro.data.shards import (
    TEXT_BYTES_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Shard,
    Totals,
    load_manifest,
    save_manifest,
)
from modeling_gpt2_repro.data.sources.corpus import Corpus, Task
from modeling_gpt2_repro.data.text_bytes import save_text_bytes
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer, token_byte_lengths

Stage = Literal["tokenize", "write"]


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """How documents become shards.

    Attributes:
        shard_size: tokens in each shard but the last of a split.
        val_tokens: tokens of the validation split; None for one shard, at most a tenth of the corpus.
        max_tokens: read the shortest prefix of the corpus that has so many tokens; None for all.
        seed: key of the shuffle.
        shuffle: False keeps the source order.
        num_workers: processes; changes nothing but the time.
    """

    shard_size: int
    val_tokens: int | None
    max_tokens: int | None
    seed: int
    shuffle: bool
    num_workers: int


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be made, and by what means.

    Attributes:
        corpus: the documents.
        tokenizer_name: where `tokenizer` came from.
        settings: what the manifest records as asked for.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    tokenizer_name: str
    options: ShardOptions
    settings: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what two runs have to agree on to work on the same shards."""
        return {
            "settings": self.settings,
            "source": self.corpus.source,
            "corpus_state": self.corpus.state,
            "tokenizer_fingerprint": fingerprint_tokenizer(self.tokenizer),
        }


def build_shards(
    folder: Path,
    request: Request,
    *,
    overwrite: bool = False,
    report_progress: Callable[[int], None] = lambda tokens: None,
) -> Manifest:
    """Make what is left to make of `folder`, which appears, or is replaced, once it is complete.

    Args:
        overwrite: begin afresh.
        report_progress: called in this process now and then with the number of tokens read so far.

    Raises:
        UserError: a tokenizer or a corpus that cannot be used, a corpus too small for both splits, or another process
            or another request that the work folder belongs to. Finished pieces are kept.
    """
    encoder = build_encoder(request.tokenizer, request.tokenizer_name)
    plan = request.describe()
    with (
        open_work_folder(folder, plan, alone=True, overwrite=overwrite) as work,
        _open_pool(work, encoder, request.options, report_progress) as pool,
    ):
        if work.is_complete():  # an earlier run was killed while it published them
            manifest = load_manifest(work.path)
            work.publish()
            return manifest
        summaries = _tokenize(pool, request.options, request.corpus.tasks)
        read, selection, splits = _plan(work, request, summaries)
        outcomes = _write(pool, splits, selection, range(len(splits.parts)))
        manifest = Manifest(
            source=request.corpus.source,
            tokenizer=request.tokenizer_name,
            tokenizer_fingerprint=plan["tokenizer_fingerprint"],
            vocab_size=len(request.tokenizer),
            eot_id=request.tokenizer.eos_token_id,
            seed=request.options.seed,
            shuffled=request.options.shuffle,
            settings=request.settings,
            read=read,
            train=splits.train,
            val=splits.val,
            validation_copies=splits.copies,
            duplicates=splits.duplicates + sum(outcome.duplicates for outcome in outcomes),
            empty_documents=sum(summary.empty for summary in summaries),
            validation_ends_inside_document=selection.cut_tokens > 0,
            shards=_list_shards(pool, splits, outcomes),
            other_files=_write_other_files(work, request, list_runs(summaries), selection),
        )
        save_manifest(manifest, work.path)
        work.publish()
    return manifest


def run_stage(folder: Path, request: Request, stage: Stage, share: tuple[int, int]) -> int:
    """Make the pieces i, i + n, i + 2n, ... of one stage, where `share` is (i, n); return how many these are.

    Processes with other shares may run at the same time, in any order, on any machine that sees the folder.
    `build_shards` completes the folder after them, or at any time before.

    Raises:
        UserError: as `build_shards`, or a second stage before the first one is complete.
    """
    first, count = share
    plan = request.describe()
    with open_work_folder(folder, plan, alone=False) as work:
        if stage == "tokenize":
            encoder = build_encoder(request.tokenizer, request.tokenizer_name)
            with _open_pool(work, encoder, request.options) as pool:
                jobs = itertools.islice(enumerate(request.corpus.tasks), first, None, count)
                n_pieces = sum(1 for _ in pool.map_in_order(_run_task, jobs))
            # The other stage reads them without a look at their digests.
            sync_pieces(work.pieces, range(first, first + n_pieces * count, count))
            return n_pieces
        summaries = _collect_summaries(work, request)
        _, selection, splits = _plan(work, request, summaries)
        with _open_pool(work, None, request.options) as pool:
            return len(_write(pool, splits, selection, range(first, len(splits.parts), count)))


class _SharedState:
    """What this process and its workers share: where the pieces are, how to make them, and how far they are."""

    def __init__(self, work: WorkFolder, encoder: DocumentEncoder | None, options: ShardOptions, num_workers: int):
        self.pieces = work.pieces
        self.encoder = encoder
        self.options = options
        # Nothing is shared where a single process does it all.
        self.tokens_read: Any = SimpleNamespace(value=0, get_lock=contextlib.nullcontext)
        if num_workers > 1:
            self.tokens_read = multiprocessing.get_context(START_METHOD).Value("q", 0)


_state: _SharedState


@contextlib.contextmanager
def _open_pool(
    work: WorkFolder,
    encoder: DocumentEncoder | None,
    options: ShardOptions,
    report_progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[WorkerPool]:
    num_workers = options.num_workers
    if num_workers > 1 and not has_shared_memory():
        print("no shared memory (/dev/shm) can be had for more processes: a single one does the work", flush=True)
        num_workers = 1
    state = _SharedState(work, encoder, options, num_workers)

    def on_wait() -> None:
        work.lock.beat()
        report_progress(state.tokens_read.value)

    pool = WorkerPool(num_workers, _start_worker, (state,), on_wait=on_wait)
    try:
        yield pool
    finally:
        pool.shut_down()


def _start_worker(state: _SharedState) -> None:
    global _state
    _state = state


def _tokenize(pool: WorkerPool, options: ShardOptions, tasks: Iterable[Task]) -> list[TaskSummary]:
    """Run stage 1 until the tasks, or `max_tokens`, are reached; later tasks that were begun are given up."""
    summaries: list[TaskSummary] = []
    for summary in pool.map_in_order(_run_task, enumerate(tasks)):
        summaries.append(summary)
        if _has_enough(summaries, options):
            break
    return summaries


def _collect_summaries(work: WorkFolder, request: Request) -> list[TaskSummary]:
    summaries: list[TaskSummary] = []
    for number, task in enumerate(request.corpus.tasks):
        summary = load_summary(work.pieces, number, check=False)
        if summary is None:
            raise UserError(f"task {number} ({task.name}) is not tokenized yet: run --stage tokenize first")
        summaries.append(summary)
        if _has_enough(summaries, request.options):
            break
    return summaries


def _has_enough(summaries: list[TaskSummary], options: ShardOptions) -> bool:
    return options.max_tokens is not None and sum(summary.tokens for summary in summaries) >= options.max_tokens


def _run_task(number: int, task: Task) -> TaskSummary | None:
    def report_tokens(tokens: int) -> None:
        with _state.tokens_read.get_lock():
            _state.tokens_read.value += tokens

    finished = load_summary(_state.pieces, number, check=True)
    if finished is not None:
        report_tokens(finished.tokens)
        return finished
    return tokenize_task(
        number,
        task,
        _state.pieces,
        _state.encoder,
        seed=_state.options.seed,
        shuffle=_state.options.shuffle,
        max_tokens=_state.options.max_tokens,
        should_stop=is_over,
        report_tokens=report_tokens,
    )


def _plan(work: WorkFolder, request: Request, summaries: list[TaskSummary]) -> tuple[Totals, Selection, SplitPlan]:
    """Decide what goes where: a function of the finished tasks, and so the same in every process."""

    def count_bytes(ids: np.ndarray) -> int:
        return int(token_byte_lengths(request.tokenizer)[ids].sum())

    options = request.options
    runs = list_runs(summaries)
    try:
        read = count_documents(work.pieces, runs, options.max_tokens)
        selection = choose_splits(work.pieces, runs, read, options.val_tokens, options.shard_size, count_bytes)
        splits = plan_splits(
            work.pieces,
            work.path,
            request.corpus.prefix,
            runs,
            selection,
            read,
            shard_size=options.shard_size,
            shuffle=options.shuffle,
        )
    except UserError:
        work.reopen_planning()
        raise
    return read, selection, splits


def _write(pool: WorkerPool, splits: SplitPlan, selection: Selection, numbers: Iterable[int]) -> list[PartOutcome]:
    """Run stage 2 for the parts with these numbers."""
    for writer in splits.writers:
        writer.create_files()
    jobs = ((number, splits.parts[number], selection) for number in numbers)
    return list(pool.map_in_order(_run_part, jobs))


def _run_part(number: int, part: Part, selection: Selection) -> PartOutcome:
    return load_outcome(_state.pieces, number) or write_part(_state.pieces, number, part, selection)


def _write_other_files(work: WorkFolder, request: Request, runs: list[Run], selection: Selection) -> dict[str, str]:
    """Write what belongs to the shards, and return its checksums by path in the folder."""
    save_text_bytes(work.path, list_validation_bytes(work.pieces, runs, selection))
    tokenizer_folder = work.path / TOKENIZER_FOLDER
    shutil.rmtree(tokenizer_folder, ignore_errors=True)  # of a run that was killed
    request.tokenizer.save_pretrained(tokenizer_folder)
    carried = sorted(path for path in tokenizer_folder.rglob("*") if path.is_file())
    paths = [*carried, work.path / TEXT_BYTES_NAME]
    # Or the manifest, which says that all of it is there, could be all that survives a loss of power.
    sync_tree(tokenizer_folder)
    sync_file(work.path / TEXT_BYTES_NAME)
    sync_folder(work.path)
    return {path.relative_to(work.path).as_posix(): compute_checksum(path) for path in paths}


def _list_shards(pool: WorkerPool, splits: SplitPlan, outcomes: list[PartOutcome]) -> list[Shard]:
    documents = {writer.split: np.zeros(len(writer.names), dtype=np.int64) for writer in splits.writers}
    for part, outcome in zip(splits.parts, outcomes, strict=True):
        documents[part.writer.split] += np.array(outcome.documents)
    names = [(writer.folder / name,) for writer in splits.writers for name in writer.names]
    checksums = pool.map_in_order(compute_checksum, names)
    return [
        Shard(name, writer.split, begun, tokens, next(checksums))
        for writer in splits.writers
        for name, tokens, begun in zip(writer.names, writer.sizes, documents[writer.split].tolist(), strict=True)
    ]
