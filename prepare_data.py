"""Tokenize a text corpus into shards: corpus -> token ids -> global shuffle -> `.npy` shards and a manifest."""

import contextlib
import gc
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import modeling_gpt2_repro  # noqa: F401  first: it explains imports that fail because of the environment

# isort: split
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.core.errors import SYSTEM_ERRORS, UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_writable, follow_links
from modeling_gpt2_repro.core.stop_signals import handled_stop_signals, raise_terminated
from modeling_gpt2_repro.core.system_errors import describe_system_error, find_system_error
from modeling_gpt2_repro.core.terminal import fit_lines
from modeling_gpt2_repro.data.inspection import inspect_folder
from modeling_gpt2_repro.data.prepare.config import FOREIGN_FLAGS, PrepareConfig
from modeling_gpt2_repro.data.prepare.pipeline import Request, build_shards, run_stage
from modeling_gpt2_repro.data.prepare.work_folder import (
    count_finished_pieces,
    finish_publishing,
    get_work_path,
    list_changes,
    load_begun_revision,
)
from modeling_gpt2_repro.data.shards import Manifest, find_foreign_file, load_manifest
from modeling_gpt2_repro.data.sources.corpus import build_corpus
from modeling_gpt2_repro.data.sources.local_files import TEXT_SUFFIXES
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer, load_tokenizer, load_tokenizer_for
from modeling_gpt2_repro.data.verification import verify_folder
from modeling_gpt2_repro.plots.corpus_text import PREVIEW_IDS, describe_inspection


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    # Exempt imported modules from garbage collection, which would double the startup time while a tokenizer loads.
    gc.freeze()
    config = parse_arguments(PrepareConfig, argv, description=__doc__, foreign_flags=FOREIGN_FLAGS)
    folder = Path(config.output_dir)
    if config.verify:
        manifest = verify_folder(folder)
        print(f"{folder}: all {len(manifest.shards)} shards match the manifest")
    if config.inspect is not None:
        inspect(folder, config.inspect, config.seed)
    if not config.verify and config.inspect is None:
        prepare(folder, config)
    return 0


def prepare(folder: Path, config: PrepareConfig) -> None:
    """Build the shards, or run one `--task` of a `--stage`, unless the folder is already complete."""
    tokenizer = load_tokenizer(config.tokenizer) if config.overwrite else load_tokenizer_for(folder, config.tokenizer)
    finish_publishing(folder)
    if is_already_there(folder, config, tokenizer):
        print("\n".join(fit_lines([f"{folder} already exists with the same settings (--overwrite rebuilds it)"])))
        return
    revision = None if config.overwrite else load_begun_revision(folder, config.experiment)
    request = Request(build_corpus(config, revision), tokenizer, config)
    with explained_errors(folder):
        if config.stage != "all":
            pieces = run_stage(folder, request)
            print(f"--stage {config.stage} --task {config.task}: {pieces} pieces finished")
            return
        if not config.overwrite and (finished := count_finished_pieces(folder)):
            print(f"resuming from {get_work_path(folder)}: {finished} pieces finished")
        started = time.perf_counter()
        with tqdm(total=config.max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
            manifest = build_shards(folder, request, lambda tokens: bar.update(tokens - bar.n))
    print("\n".join(fit_lines(describe_outcome(manifest, folder, time.perf_counter() - started))))


@contextlib.contextmanager
def explained_errors(folder: Path) -> Generator[None]:
    """Turn system errors such as a full disk into a `UserError`; add the number of finished pieces to every error."""
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
            message += f". {finished} finished pieces are kept: the same command resumes from them"
        raise UserError(message) from error


def describe_machine_error(error: BaseException, folder: Path) -> str | None:
    """Describe an error of the system or of the output disk; return `None` for a bug."""
    system_error = find_system_error(error)
    if system_error is None:
        return None
    output = get_work_path(folder).parent
    is_of_output = system_error.filename is None or follow_links(system_error.filename).is_relative_to(output)
    if system_error.errno in SYSTEM_ERRORS and is_of_output:
        return f"cannot write {folder}: {system_error.strerror} (preparation needs about 4 bytes per token)"
    return describe_system_error(system_error)


def is_already_there(folder: Path, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether `folder` is complete and was built with the same settings.

    Raises:
        UserError: the folder was built with different settings and `--overwrite` is not set, or is not a data folder.
    """
    check_writable(folder, is_folder=True)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is not a folder: choose another path")
    if foreign := find_foreign_file(folder):
        raise UserError(f"--output_dir {folder} contains {foreign}, which is not a shard: choose another folder")
    if config.overwrite:
        return False
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has shards but no manifest: choose another --output_dir, or --overwrite them")
    is_same_tokenizer = fingerprint_tokenizer(tokenizer) == manifest.tokenizer_fingerprint
    requested = dict(config.experiment)
    if is_same_tokenizer:  # possibly under another path or name
        del requested["tokenizer"]
    remedy = "choose another --output_dir or --overwrite"
    if changes := ", ".join(list_changes(manifest.settings, requested)):
        raise UserError(f"{folder} was built with different settings: {changes}; {remedy}")
    if config.files and build_corpus(config).source != manifest.source:
        raise UserError(f"the --files changed since {folder} was built: {remedy}")
    if not is_same_tokenizer:
        raise UserError(f"the tokenizer {config.tokenizer} changed since {folder} was built: {remedy}")
    return True


def describe_outcome(manifest: Manifest, folder: Path, seconds: float) -> Iterator[str]:
    """Yield lines on what was read, skipped and written, and where."""
    read, copies, duplicates = manifest.read, manifest.validation_copies.documents, manifest.duplicates
    yield (
        f"read {count(read.documents, 'document')}: {read.tokens:,} tokens, {read.bytes / read.tokens:.2f} bytes per "
        f"token, in {seconds:.1f} s ({read.tokens / seconds:,.0f} tokens/s)"
    )
    if warning := warn_of_unused_separator(manifest):
        yield warning
    if manifest.empty_documents:
        yield f"skipped {count(manifest.empty_documents, 'empty document')}"
    if copies:
        yield f"dropped {count(copies, 'training copy', 'training copies')} of validation documents"
    if duplicates:
        yield f"kept {count(duplicates, 'training document')} with the text of an earlier one"
    if manifest.validation_ends_inside_document:
        yield "the validation split ends inside a document (no boundary is suitable); the rest of it is training text"
    for split, totals in (("train", manifest.train), ("val", manifest.val)):
        n_shards = count(len(manifest.list_shards(split)), "shard")
        yield f"{split}: {totals.tokens:,} tokens, {count(totals.documents, 'document')}, {n_shards}"
    order = f"shuffled with seed {manifest.seed}" if manifest.shuffled else "in source order"
    yield f"training documents {order}; written to {folder}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Format a number with its noun, e.g. `1 shard`, `2,000 shards`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def warn_of_unused_separator(manifest: Manifest) -> str | None:
    """Return a warning if `--document_separator` split no file, as far as the manifest shows."""
    separator = manifest.settings["document_separator"]
    files = [file["path"].lower().endswith(TEXT_SUFFIXES) for file in manifest.source.get("files", [])]
    if separator is None:
        return None
    if not any(files):
        return f"--document_separator {separator!r} has no effect: it splits .txt files, and there are none"
    is_read_whole = manifest.settings["max_tokens"] is None and all(files)
    if is_read_whole and manifest.read.documents + manifest.empty_documents == len(files):
        return f"--document_separator {separator!r} was not found: each file is one document"
    return None


def inspect(folder: Path, n_documents: int, seed: int) -> None:
    """Print statistics and sample documents of `folder`, and draw them."""
    # Imported here because Matplotlib takes half a second to load.
    from modeling_gpt2_repro.plots.corpus_figure import draw_inspection

    inspection = inspect_folder(folder, n_documents, seed, PREVIEW_IDS)
    print(describe_inspection(inspection, sys.stdout.encoding or "utf-8"), end="\n\n", flush=True)
    print(f"figure saved as {draw_inspection(inspection)}")


if __name__ == "__main__":
    # A signal unwinds the stack as Ctrl-C does: workers are shut down and finished pieces are kept.
    with handled_stop_signals(raise_terminated):
        sys.exit(main())
