"""Turn a text corpus into shards of token ids: corpus -> tokens -> global shuffle -> `.npy` shards and a manifest."""

import contextlib
import dataclasses
import gc
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import modeling_gpt2_repro  # noqa: F401  before the libraries, to explain what they do not take

# isort: split
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.arguments import parse_arguments, setting
from modeling_gpt2_repro.core.devices import count_cores
from modeling_gpt2_repro.core.errors import SYSTEM_REFUSALS, UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_place, follow_links
from modeling_gpt2_repro.core.refusals import describe_refusal, find_refusal
from modeling_gpt2_repro.core.stop_signals import handled_stop_signals, raise_terminated
from modeling_gpt2_repro.data.inspection import inspect_folder
from modeling_gpt2_repro.data.prepare.pipeline import build_shards, run_stage
from modeling_gpt2_repro.data.prepare.request import Request, ShardOptions
from modeling_gpt2_repro.data.prepare.work_folder import (
    count_finished_pieces,
    finish_publishing,
    get_work_path,
    list_changes,
    load_begun_source,
)
from modeling_gpt2_repro.data.shards import Manifest, find_foreign_file, load_manifest
from modeling_gpt2_repro.data.sources.corpus import (
    DEFAULT_CONFIGS,
    DOCSTRINGS,
    FINEWEB_EDU,
    Corpus,
    build_docstring_corpus,
    build_file_corpus,
    build_hub_corpus,
)
from modeling_gpt2_repro.data.sources.local_files import TEXT_SUFFIXES
from modeling_gpt2_repro.data.tokenizer import (
    GPT2_TOKENIZER,
    fingerprint_tokenizer,
    load_tokenizer,
    load_tokenizer_for,
)
from modeling_gpt2_repro.data.verification import verify_folder
from modeling_gpt2_repro.plots.corpus_text import PREVIEW_IDS, describe_inspection


@dataclasses.dataclass
class PrepareSettings:
    """What `prepare_data.py` is told."""

    dataset_name: str = setting(
        FINEWEB_EDU,
        f"a dataset on the Hub, a folder that `datasets` can load, or {DOCSTRINGS}: the built-in offline corpus, the "
        "documentation of the Python packages installed here",
        aliases=["--dataset"],
        path=True,
    )
    dataset_config_name: str | None = setting(
        None, f"the dataset's configuration; none means {DEFAULT_CONFIGS[FINEWEB_EDU]} for {FINEWEB_EDU}"
    )
    split: str = setting("train", "the dataset's split")
    revision: str | None = setting(None, "the dataset's branch, tag or commit; none means main")
    files: list[str] = setting(
        [],
        "local files, globs or folders instead of a dataset: .parquet, .jsonl[.gz|.zst], .txt[.gz] (one document a "
        "file, or see --document_separator)",
        path=True,
    )
    document_separator: str | None = setting(
        None,
        "cut .txt files into documents at this text (\\n is a line end of any system, \\t a tab, \\f a form feed)",
    )
    text_column: str = setting("text", "the column, or JSON key, that holds a document's text")
    output_dir: str = setting("data/edu_fineweb10B", "the folder for the shards", path=True)
    tokenizer: str = setting(
        GPT2_TOKENIZER, "Hub id or local folder of a tokenizer with at most 65,536 ids", path=True
    )
    shard_size: int = setting(100_000_000, "tokens a shard")
    val_tokens: int | None = setting(
        None,
        "tokens of the validation split: the front of the source order, up to the next end of a document; none means "
        "one shard, at most a tenth of the corpus",
    )
    max_tokens: int | None = setting(None, "read no more documents than reach this many tokens; none means all")
    seed: int = setting(1337, "order of the training documents")
    no_shuffle: bool = setting(False, "keep the training documents in source order")
    num_workers: int | None = setting(None, "processes; none means all cores")
    overwrite: bool = setting(False, "replace an existing folder of shards")
    stage: Literal["all", "tokenize", "write"] = setting(
        "all",
        "what to do of the work, for engines that schedule many processes: tokenize the corpus's files, or write the "
        "shuffled documents to shards, either with --task; a last call with all completes the folder",
    )
    task: str = setting("0/1", "the share i/N of a --stage that this process does, i from 0 to N-1")
    verify: bool = setting(False, "check the shards in --output_dir against their manifest and exit")
    inspect: int | None = setting(
        None,
        "show this many documents of the shards in --output_dir, chosen by --seed, and statistics of all of them, as "
        "text and as inspection.png beside them, and exit",
    )


FOREIGN_FLAGS = {
    "dataset_path": "the dataset is --dataset_name",
    "data_dir": "the folder for the shards is --output_dir",
    "local_dir": "the folder for the shards is --output_dir",
    "out_dir": "the folder for the shards is --output_dir",
    "version": "the size of FineWeb-Edu's sample is --dataset_config_name (sample-10BT, sample-100BT, ...)",
    "type": "the dataset is --dataset_name",
    "model_desc": "the tokenizer is --tokenizer",
    "num_proc": "the number of processes is --num_workers",
    "preprocessing_num_workers": "the number of processes is --num_workers",
    "train_file": "local files are --files; the validation split is taken from their front (--val_tokens)",
    "validation_file": "the validation split is taken from the front of the corpus (--val_tokens)",
    "validation_split_percentage": "the size of the validation split is --val_tokens, in tokens",
    "tokenizer_name": "the tokenizer is --tokenizer",
    "overwrite_cache": "to start afresh is --overwrite",
}

# How a shell can be given what separates documents.
SPELLED = {"\\r": "\r", "\\n": "\n", "\\t": "\t", "\\f": "\f"}

# All workers are started at once: more than any machine has use for would bring it down.
MOST_WORKERS = 1024

# What a run may change and still make the same folder.
NOT_RECORDED = ("output_dir", "num_workers", "overwrite", "stage", "task", "verify", "inspect")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    # What is imported stays. The collector, walking it whenever a tokenizer's tables are read, doubles the start-up.
    gc.freeze()
    settings = parse_arguments(PrepareSettings, argv, description=__doc__, foreign_flags=FOREIGN_FLAGS)
    check_settings(settings)
    folder = Path(settings.output_dir)
    if settings.verify:
        manifest = verify_folder(folder)
        print(f"{folder}: {len(manifest.shards)} shards are as the manifest says")
    if settings.inspect is not None:
        inspect(folder, settings.inspect, settings.seed)
    if not settings.verify and settings.inspect is None:
        prepare(folder, settings)
    return 0


def prepare(folder: Path, settings: PrepareSettings) -> None:
    """Make the shards, or a share of one stage of that, unless they are already there."""
    if settings.overwrite:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        tokenizer = load_tokenizer_for(folder, settings.tokenizer)
    finish_publishing(folder)
    if is_already_there(folder, settings, tokenizer):
        print(f"{folder} is already there, made with the same settings (--overwrite makes it again)")
        return
    request = build_request(folder, settings, tokenizer)
    with explained_errors(folder):
        if settings.stage != "all":
            pieces = run_stage(folder, request, settings.stage, parse_share(settings.task))
            print(f"--stage {settings.stage} --task {settings.task}: {pieces} pieces are finished")
            return
        if not settings.overwrite and (finished := count_finished_pieces(folder)):
            print(f"resuming in {get_work_path(folder)}, where {finished} pieces are finished")
        started = time.perf_counter()
        with tqdm(total=settings.max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
            manifest = build_shards(
                folder,
                request,
                overwrite=settings.overwrite,
                report_progress=lambda tokens: bar.update(tokens - bar.n),
            )
    report(manifest, folder, time.perf_counter() - started)


def build_request(folder: Path, settings: PrepareSettings, tokenizer: PreTrainedTokenizerFast) -> Request:
    """Return what the settings ask for."""
    recorded = list_recorded(settings)
    begun = None if settings.overwrite else load_begun_source(folder, recorded)
    options = ShardOptions(
        shard_size=settings.shard_size,
        val_tokens=settings.val_tokens,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        shuffle=not settings.no_shuffle,
        num_workers=settings.num_workers or count_cores(),
    )
    return Request(build_corpus(settings, begun), tokenizer, name_tokenizer(settings.tokenizer), options, recorded)


@contextlib.contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into a `UserError`, and add to any error how much is finished already."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if finished := count_finished_pieces(folder):
            print(f"stopped: {finished} finished pieces are kept, and the same command resumes", file=sys.stderr)
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = str(error) if isinstance(error, UserError) else describe_machine_error(error, folder)
        if message is None:
            raise
        if finished := count_finished_pieces(folder):
            message += f". {finished} finished pieces are kept: the same command goes on from there"
        raise UserError(message) from error


def describe_machine_error(error: BaseException, folder: Path) -> str | None:
    """Describe what the machine refused, or the disk of the output; `None` for a bug."""
    refusal = find_refusal(error)
    if refusal is None:
        return None
    output = get_work_path(folder).parent
    is_of_output = refusal.filename is None or follow_links(refusal.filename).is_relative_to(output)
    if refusal.errno in SYSTEM_REFUSALS and is_of_output:
        return f"cannot write {folder}: {refusal.strerror} (about 4 bytes a token are needed)"
    return describe_refusal(refusal)


def check_settings(settings: PrepareSettings) -> None:
    """Raise a `UserError` for values that no run can use."""
    for name in ("shard_size", "val_tokens", "max_tokens", "num_workers", "inspect"):
        value, least = getattr(settings, name), 0 if name == "inspect" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: has to be at least {least}")
    for name in ("shard_size", "val_tokens", "max_tokens"):
        if (getattr(settings, name) or 0) >= 2**63:
            raise UserError(f"--{name} {getattr(settings, name)}: has to be below 2**63")
    if settings.num_workers is not None and settings.num_workers > max(MOST_WORKERS, count_cores()):
        raise UserError(f"--num_workers {settings.num_workers}: has to be at most {max(MOST_WORKERS, count_cores())}")
    if parse_share(settings.task) != (0, 1) and settings.stage == "all":
        raise UserError("--task is a share of a --stage: add --stage tokenize or --stage write")
    if settings.stage != "all" and settings.overwrite:
        raise UserError("--overwrite cannot be given with --stage, whose processes would remove each other's work")
    if not 0 <= settings.seed < 2**64:
        raise UserError(f"--seed {settings.seed}: has to be from 0 to 2**64 - 1")
    if settings.document_separator == "":
        raise UserError("--document_separator is empty: leave it out to take each file as one document")


def parse_share(task: str) -> tuple[int, int]:
    """Return (i, N) of `--task i/N`."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", task)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--task {task}: has to be i/N with i from 0 to N-1, such as 0/8")
    return int(match[1]), int(match[2])


def name_tokenizer(name_or_path: str) -> str:
    """Return a Hub id as it is, and a folder's path so that it does not look like one."""
    is_relative = Path(name_or_path).is_dir() and not name_or_path.startswith((".", "/", "~"))
    return f"./{name_or_path}" if is_relative else name_or_path


def is_already_there(folder: Path, settings: PrepareSettings, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether `folder` was made with the same settings.

    Raises:
        UserError: it was made with others and may not be overwritten, or is not a folder of shards.
    """
    check_place(folder, is_folder=True)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is no folder: give another name")
    if foreign := find_foreign_file(folder):
        raise UserError(f"--output_dir {folder} holds {foreign}, which is no shard: give another folder")
    if settings.overwrite:
        return False
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds shards without a manifest: give another --output_dir, or --overwrite them")
    is_same_tokenizer = fingerprint_tokenizer(tokenizer) == manifest.tokenizer_fingerprint
    recorded = list_recorded(settings)
    if is_same_tokenizer:  # it may have moved, or have another name here
        del recorded["tokenizer"]
    if changes := ", ".join(list_changes(manifest.settings, recorded)):
        raise UserError(f"{folder} was made with other settings: {changes}; give another --output_dir or --overwrite")
    if settings.files and build_corpus(settings).source != manifest.source:
        raise UserError(f"{folder} was made when the --files were others; give another --output_dir or --overwrite")
    if not is_same_tokenizer:
        raise UserError(f"{folder} was made when {settings.tokenizer} was another one: --overwrite makes it anew")
    return True


def list_recorded(settings: PrepareSettings) -> dict[str, Any]:
    """Return the settings on which the shards depend."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_RECORDED}


def build_corpus(settings: PrepareSettings, begun: dict[str, Any] | None = None) -> Corpus:
    """Build the corpus that the settings name.

    Args:
        begun: the source of an unfinished run with the same settings, whose commit is kept: the dataset's branch may
            have moved since.
    """
    if settings.files:
        separator = settings.document_separator
        if separator is not None:
            for spelled, meant in SPELLED.items():
                separator = separator.replace(spelled, meant)
        return build_file_corpus(settings.files, settings.text_column, separator)
    if settings.dataset_name == DOCSTRINGS:
        return build_docstring_corpus()
    return build_hub_corpus(
        settings.dataset_name,
        settings.dataset_config_name,
        settings.split,
        (begun or {}).get("revision") or settings.revision,
        settings.text_column,
    )


def report(manifest: Manifest, folder: Path, seconds: float) -> None:
    """Print what was made and where."""
    read = manifest.read
    print(
        f"read {read.documents:,} documents: {read.tokens:,} tokens, {read.bytes / read.tokens:.2f} bytes a token, in "
        f"{seconds:.1f} s ({read.tokens / seconds:,.0f} tokens/s)"
    )
    if doubt := doubt_separator(manifest):
        print(doubt)
    if manifest.empty_documents:
        print(f"skipped {manifest.empty_documents:,} empty documents")
    if manifest.validation_copies.documents:
        print(f"left out {manifest.validation_copies.documents:,} training copies of validation documents")
    if manifest.duplicates:
        print(f"kept {manifest.duplicates:,} training documents that repeat an earlier one")
    if manifest.validation_ends_inside_document:
        print("the validation split ends inside a document, whose rest is training text: there was no boundary to use")
    for split, totals in (("train", manifest.train), ("val", manifest.val)):
        shards = manifest.list_shards(split)
        print(f"{split}: {totals.tokens:,} tokens, {totals.documents:,} documents, {len(shards)} shards")
    order = f"shuffled with seed {manifest.seed}" if manifest.shuffled else "in source order"
    print(f"training documents {order}; everything is in {folder}")


def doubt_separator(manifest: Manifest) -> str | None:
    """Return a note if `--document_separator` has certainly cut nothing."""
    separator = manifest.settings["document_separator"]
    files = [file["path"].lower().endswith(TEXT_SUFFIXES) for file in manifest.source.get("files", [])]
    if separator is None:
        return None
    if not any(files):
        return f"--document_separator {separator!r} cuts .txt files, and there are none"
    is_read_whole = manifest.settings["max_tokens"] is None and all(files)
    if is_read_whole and manifest.read.documents + manifest.empty_documents == len(files):
        return f"--document_separator {separator!r} occurs nowhere: each file is one document"
    return None


def inspect(folder: Path, n_documents: int, seed: int) -> None:
    """Print and draw statistics and documents of `folder`."""
    # Matplotlib takes half a second to load, and nothing else here needs it.
    from modeling_gpt2_repro.plots.corpus_figure import draw_inspection

    with tqdm(unit=" tokens", unit_scale=True, disable=None, delay=1) as bar:

        def report_progress(tokens: int, total: int) -> None:
            bar.total = total
            bar.update(tokens)

        inspection = inspect_folder(folder, n_documents, seed, PREVIEW_IDS, report_progress)
    print(describe_inspection(inspection, sys.stdout.encoding or "utf-8"), end="\n\n", flush=True)
    print(f"drawn as {draw_inspection(inspection)}")


if __name__ == "__main__":
    # A run that is ended by a signal ends its workers like an interrupted one; what is finished stays.
    with handled_stop_signals(raise_terminated):
        sys.exit(main())
