"""Turn a text corpus into shards of token ids: corpus -> tokens -> global shuffle -> `.npy` shards and a manifest."""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import modeling_gpt2_repro  # noqa: F401  before the libraries, to explain what they do not take

# isort: split
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.core.errors import SYSTEM_REFUSALS, UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_place, follow_links
from modeling_gpt2_repro.core.refusals import describe_refusal, find_refusal
from modeling_gpt2_repro.core.stop_signals import handled_stop_signals, raise_terminated
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
    # What is imported stays. The collector, walking it whenever a tokenizer's tables are read, doubles the start-up.
    gc.freeze()
    config = parse_arguments(PrepareConfig, argv, description=__doc__, foreign_flags=FOREIGN_FLAGS)
    folder = Path(config.output_dir)
    if config.verify:
        manifest = verify_folder(folder)
        print(f"{folder}: {len(manifest.shards)} shards are as the manifest says")
    if config.inspect is not None:
        inspect(folder, config.inspect, config.seed)
    if not config.verify and config.inspect is None:
        prepare(folder, config)
    return 0


def prepare(folder: Path, config: PrepareConfig) -> None:
    """Make the shards, or a share of one stage of that, unless they are already there."""
    tokenizer = load_tokenizer(config.tokenizer) if config.overwrite else load_tokenizer_for(folder, config.tokenizer)
    finish_publishing(folder)
    if is_already_there(folder, config, tokenizer):
        print(f"{folder} is already there, made with the same settings (--overwrite makes it again)")
        return
    revision = None if config.overwrite else load_begun_revision(folder, config.experiment)
    request = Request(build_corpus(config, revision), tokenizer, config)
    with explained_errors(folder):
        if config.stage != "all":
            pieces = run_stage(folder, request)
            print(f"--stage {config.stage} --task {config.task}: {pieces} pieces are finished")
            return
        if not config.overwrite and (finished := count_finished_pieces(folder)):
            print(f"resuming in {get_work_path(folder)}, where {finished} pieces are finished")
        started = time.perf_counter()
        with tqdm(total=config.max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
            manifest = build_shards(folder, request, lambda tokens: bar.update(tokens - bar.n))
    print_outcome(manifest, folder, time.perf_counter() - started)


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


def is_already_there(folder: Path, config: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> bool:
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
    if config.overwrite:
        return False
    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds shards without a manifest: give another --output_dir, or --overwrite them")
    is_same_tokenizer = fingerprint_tokenizer(tokenizer) == manifest.tokenizer_fingerprint
    recorded = dict(config.experiment)
    if is_same_tokenizer:  # it may have moved, or have another name here
        del recorded["tokenizer"]
    if changes := ", ".join(list_changes(manifest.settings, recorded)):
        raise UserError(f"{folder} was made with other settings: {changes}; give another --output_dir or --overwrite")
    if config.files and build_corpus(config).source != manifest.source:
        raise UserError(f"{folder} was made when the --files were others; give another --output_dir or --overwrite")
    if not is_same_tokenizer:
        raise UserError(f"{folder} was made when {config.tokenizer} was another one: --overwrite makes it anew")
    return True


def print_outcome(manifest: Manifest, folder: Path, seconds: float) -> None:
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

    inspection = inspect_folder(folder, n_documents, seed, PREVIEW_IDS)
    print(describe_inspection(inspection, sys.stdout.encoding or "utf-8"), end="\n\n", flush=True)
    print(f"drawn as {draw_inspection(inspection)}")


if __name__ == "__main__":
    # A run that is ended by a signal ends its workers like an interrupted one; what is finished stays.
    with handled_stop_signals(raise_terminated):
        sys.exit(main())
