"""The preparation pipeline: from a corpus to a data folder, in two parallel stages.

Stage 1 tokenizes each task into its own files (`tokenize_stage.py`). The layout of the result then follows without
reading a token: which documents are validation, and how many tokens each bucket has. Stage 2 can therefore write the
parts in any order, by any worker, directly to their final positions in the shards (`write_stage.py`).

    task            a contiguous range of the corpus that stage 1 reads and tokenizes as a unit: some files, or part of
                    a file
    sorted chunk    as many documents of a task as fit in memory, sorted by key
    bucket          a range of keys that stage 2 sorts as a unit
    part            the unit of work of stage 2: a bucket or, in source order, a sorted chunk
    piece           a finished task or part, as files in the work folder (`work_folder.py`) from which an interrupted
                    preparation resumes
    share           the tasks or parts i, i + N, i + 2N, ... of one process of a `--stage` (`--task i/N`)
"""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ...core.devices import count_cores
from ...core.errors import UserError
from ...core.files import compute_checksum, sync_file, sync_folder, sync_tree
from ...core.optional import not_none
from ..shards import TEXT_BYTES_NAME, TOKENIZER_FOLDER, Manifest, Shard, load_manifest, save_manifest
from ..sources.corpus import Corpus, Task
from ..text_bytes import save_text_bytes
from ..tokenizer import fingerprint_tokenizer, token_byte_lengths
from .config import PrepareConfig
from .encoder import DocumentEncoder, build_encoder
from .tokenize_stage import TaskSummary, WorkerContext, list_sorted_chunks, load_summary, sync_tasks, tokenize_task
from .work_folder import WorkFolder, open_work_folder
from .workers import WorkerPool
from .write_stage import PartOutcome, WritePlan, list_validation_bytes, plan_shards, write_part


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for shards: the corpus, the tokenizer and the settings."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    config: PrepareConfig

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's Hub id, or the path of its folder, spelled so that it cannot be mistaken for an id."""
        name = self.config.tokenizer
        is_relative = Path(name).is_dir() and not name.startswith((".", "/", "~"))
        return f"./{name}" if is_relative else name

    def describe(self) -> dict[str, Any]:
        """Return a JSON-compatible record of everything that runs working on the same shards must agree on."""
        return {
            "settings": self.config.experiment,
            "source": self.corpus.source,
            "corpus_state": self.corpus.state,
            "tokenizer_fingerprint": fingerprint_tokenizer(self.tokenizer),
        }


def build_shards(folder: Path, request: Request, report_progress: Callable[[int], object]) -> Manifest:
    """Do all remaining work on `folder`, which is created or replaced once it is complete.

    Args:
        report_progress: called in this process at intervals with the number of tokens read so far.

    Raises:
        UserError: the tokenizer or the corpus is unusable, the corpus is too small for two splits, or the work folder
            belongs to another process or request. Finished pieces are kept.
    """
    encoder = build_encoder(request.tokenizer, request.tokenizer_name)
    with (
        open_work_folder(folder, request.describe(), alone=True, overwrite=request.config.overwrite) as work,
        _open_pool(work, encoder, request.config, report_progress) as pool,
    ):
        if not work.is_complete():  # complete if an earlier run was killed while publishing
            save_manifest(_make_shards(work, request, pool), work.path)
        manifest = not_none(load_manifest(work.path))
        work.publish()
    return manifest


def run_stage(folder: Path, request: Request) -> int:
    """Run one share (`--task`) of one stage (`--stage`), and return the number of its pieces.

    Other shares may run concurrently, in any order, on any machine that shares the file system. `build_shards`
    completes the folder, whether or not all shares have run.

    Raises:
        UserError: as `build_shards`, or the second stage was started before the first was complete.
    """
    first, count = request.config.share
    with open_work_folder(folder, request.describe(), alone=False) as work:
        if request.config.stage == "tokenize":
            encoder = build_encoder(request.tokenizer, request.tokenizer_name)
            with _open_pool(work, encoder, request.config) as pool:
                tasks = itertools.islice(enumerate(request.corpus.tasks), first, None, count)
                n_tasks = sum(1 for _ in pool.map_in_order(tokenize_task, tasks))
            # Durable, because stage 2 reads these files without checking their digests.
            sync_tasks(work.pieces, range(first, first + n_tasks * count, count))
            return n_tasks
        plan = _plan(work, request, _collect_summaries(work, request))
        with _open_pool(work, None, request.config) as pool:
            return len(_write(pool, plan, range(first, len(plan.parts), count)))


@contextlib.contextmanager
def _open_pool(
    work: WorkFolder,
    encoder: DocumentEncoder | None,
    config: PrepareConfig,
    report_progress: Callable[[int], object] = lambda tokens: None,
) -> Generator[WorkerPool]:
    def on_wait(progress: int) -> None:
        work.lock.beat()
        report_progress(progress)

    pool = WorkerPool(config.num_workers or count_cores(), WorkerContext(work.pieces, encoder, config), on_wait)
    try:
        yield pool
    finally:
        pool.shut_down()


def _make_shards(work: WorkFolder, request: Request, pool: WorkerPool) -> Manifest:
    """Run the rest of both stages, write all files but the manifest, and return the manifest."""
    # Closed immediately, to make workers abandon tasks beyond the last one needed.
    with contextlib.closing(pool.map_in_order(tokenize_task, enumerate(request.corpus.tasks))) as tasks:
        summaries = _take_enough(tasks, request.config)
    plan = _plan(work, request, summaries)
    outcomes = _write(pool, plan, range(len(plan.parts)))
    return Manifest(
        source=request.corpus.source,
        tokenizer=request.tokenizer_name,
        tokenizer_fingerprint=fingerprint_tokenizer(request.tokenizer),
        vocab_size=len(request.tokenizer),
        eot_id=request.tokenizer.eos_token_id,
        seed=request.config.seed,
        shuffled=not request.config.no_shuffle,
        settings=request.config.experiment,
        read=plan.read,
        train=plan.train,
        val=plan.val,
        validation_copies=plan.copies,
        duplicates=plan.duplicates + sum(outcome.duplicates for outcome in outcomes),
        empty_documents=sum(summary.empty for summary in summaries),
        validation_ends_inside_document=plan.selection.cut_tokens > 0,
        shards=_list_shards(pool, plan, outcomes),
        other_files=_write_other_files(work, request, plan),
    )


def _take_enough(summaries: Iterable[TaskSummary], config: PrepareConfig) -> list[TaskSummary]:
    """Return the shortest prefix of the summaries that has `max_tokens` tokens, or all."""
    taken: list[TaskSummary] = []
    tokens = 0
    for summary in summaries:
        taken.append(summary)
        tokens += summary.tokens
        if config.max_tokens is not None and tokens >= config.max_tokens:
            break
    return taken


def _collect_summaries(work: WorkFolder, request: Request) -> list[TaskSummary]:
    def load(number: int, task: Task) -> TaskSummary:
        summary = load_summary(work.pieces, number, check=False)
        if summary is None:
            raise UserError(f"task {number} ({task.name}) has not been tokenized: run --stage tokenize first")
        return summary

    return _take_enough(itertools.starmap(load, enumerate(request.corpus.tasks)), request.config)


def _plan(work: WorkFolder, request: Request, summaries: list[TaskSummary]) -> WritePlan:
    chunks, byte_lengths = list_sorted_chunks(work.pieces, summaries), token_byte_lengths(request.tokenizer)
    try:
        return plan_shards(chunks, request.config, work.path, request.corpus.prefix, byte_lengths)
    except UserError:
        work.reopen_planning()
        raise


def _write(pool: WorkerPool, plan: WritePlan, numbers: Iterable[int]) -> list[PartOutcome]:
    """Run stage 2 for the given parts."""
    for writer in plan.writers:
        writer.create_files()
    calls = ((number, plan.parts[number], plan.selection) for number in numbers)
    return list(pool.map_in_order(write_part, calls))


def _compute_checksum(context: WorkerContext, path: Path) -> str:
    return compute_checksum(path)


def _list_shards(pool: WorkerPool, plan: WritePlan, outcomes: list[PartOutcome]) -> list[Shard]:
    shards = []
    for writer in plan.writers:
        by_part = [
            outcome.documents for part, outcome in zip(plan.parts, outcomes, strict=True) if part.writer is writer
        ]
        documents = np.sum(by_part, axis=0).tolist()
        checksums = pool.map_in_order(_compute_checksum, [(writer.folder / name,) for name in writer.names])
        for name, tokens, begun, checksum in zip(writer.names, writer.sizes, documents, checksums, strict=True):
            shards.append(Shard(name, writer.split, begun, tokens, checksum))
    return shards


def _write_other_files(work: WorkFolder, request: Request, plan: WritePlan) -> dict[str, str]:
    """Write the tokenizer and the validation bytes, and return checksums by path relative to the folder."""
    save_text_bytes(work.path, list_validation_bytes(plan))
    tokenizer_folder = work.path / TOKENIZER_FOLDER
    shutil.rmtree(tokenizer_folder, ignore_errors=True)  # left by a killed run
    request.tokenizer.save_pretrained(tokenizer_folder)
    carried = sorted(path for path in tokenizer_folder.rglob("*") if path.is_file())
    paths = [*carried, work.path / TEXT_BYTES_NAME]
    # Otherwise the manifest could survive a power loss without the files that it lists.
    sync_tree(tokenizer_folder)
    sync_file(work.path / TEXT_BYTES_NAME)
    sync_folder(work.path)
    return {path.relative_to(work.path).as_posix(): compute_checksum(path) for path in paths}
