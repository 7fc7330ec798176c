"""Turn a text corpus into shards of token ids: corpus -> tokens -> global shuffle -> `.npy` shards and a manifest."""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import modeling_gpt2_repro  # noqa: F401  before the libraries, to explain what they do not take

# isort: split
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.core.devices import count_cores
from modeling_gpt2_repro.core.errors import SYSTEM_REFUSALS, UserError, reports_user_errors
from modeling_gpt2_repro.core.files import check_place, follow_links
from modeling_gpt2_repro.core.refusals import describe_refusal, find_refusal
from modeling_gpt2_repro.core.stop_signals import handled_stop_signals, raise_terminated
from modeling_gpt2_repro.data.dataset import load_data_tokenizer
from modeling_gpt2_repro.data.inspection import inspect_folder
from modeling_gpt2_repro.data.prepare.config import FOREIGN_FLAGS, PrepareConfig
from modeling_gpt2_repro.data.prepare.pipeline import Request, ShardOptions, build_shards, run_stage
from modeling_gpt2_repro.data.prepare.work_folder import (
    count_finished_pieces,
    finish_publishing,
    get_work_path,
    load_begun_source,
)
from modeling_gpt2_repro.data.shards import TOKENIZER_FOLDER, Manifest, find_foreign_file, load_manifest
from modeling_gpt2_repro.data.sources.corpus import (
    DOCSTRINGS,
    Corpus,
    build_docstring_corpus,
    build_file_corpus,
    build_hub_corpus,
)
from modeling_gpt2_repro.data.sources.local_files import TEXT_SUFFIXES
from modeling_gpt2_repro.data.tokenizer import fingerprint_tokenizer, load_tokenizer
from modeling_gpt2_repro.data.verification import verify_folder
from modeling_gpt2_repro.plots.corpus_text import PREVIEW_IDS, describe_inspection

# How a shell can be given what separates documents.
SPELLED = {"\\r": "\r", "\\n": "\n", "\\t": "\t", "\\f": "\f"}


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    # What is imported stays. The collector, walking it whenever a tokenizer's tables are read, doubles the start-up.
    gc.freeze()
    settings = parse_arguments(PrepareConfig, argv, description=__doc__, foreign_flags=FOREIGN_FLAGS)
    folder = Path(settings.output_dir)
    if settings.verify:
        manifest = verify_folder(folder)
        print(f"{folder}: {len(manifest.shards)} shards are as the manifest says")
    if settings.inspect is not None:
        inspect(folder, settings.inspect, settings.seed)
    if settings.verify or settings.inspect is not None:
        return 0
    tokenizer = load_asked_tokenizer(folder, settings)
    finish_publishing(folder)
    if is_already_there(folder, settings, tokenizer):
        print(f"{folder} is already there, made with the same settings (--overwrite makes it again)")
        return 0
    options = ShardOptions(
        shard_size=settings.shard_size,
        val_tokens=settings.val_tokens,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
        shuffle=not settings.no_shuffle,
        num_workers=settings.num_workers or count_cores(),
    )
    recorded = settings.experiment
    begun = None if settings.overwrite else load_begun_source(folder, recorded)
    request = Request(build_corpus(settings, begun), tokenizer, name_tokenizer(settings.tokenizer), options, recorded)
    with explained_errors(folder):
        if settings.stage != "all":
            pieces = run_stage(folder, request, settings.stage, settings.share)
            print(f"--stage {settings.stage} --task {settings.task}: {pieces} pieces are finished")
            return 0
        if not settings.overwrite and (finished := count_finished_pieces(folder)):
            print(f"going on in {get_work_path(folder)}, where {finished} pieces are finished")
        started = time.perf_counter()
        with tqdm(total=settings.max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
            manifest = build_shards(
                folder,
                request,
                overwrite=settings.overwrite,
                report_progress=lambda tokens: bar.update(tokens - bar.n),
            )
    report(manifest, folder, time.perf_counter() - started)
    return 0


@contextlib.contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into a `UserError`, and tell with any of these what is finished already."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if finished := count_finished_pieces(folder):
            print(f"stopped: {finished} finished pieces are kept, and the same command goes on", file=sys.stderr)
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, UserError):
            refusal = find_refusal(error)
            if refusal is None:
                raise
            is_of_output = refusal.errno in SYSTEM_REFUSALS and (
                refusal.filename is None or follow_links(refusal.filename).is_relative_to(get_work_path(folder).parent)
            )
            message = describe_refusal(refusal)
            if is_of_output:
                message = f"cannot write {folder}: {refusal.strerror} (about 4 bytes a token are needed)"
        if finished := count_finished_pieces(folder):
            message += f". {finished} finished pieces are kept: the same command goes on from there"
        raise UserError(message) from error


def load_asked_tokenizer(folder: Path, settings: PrepareConfig) -> PreTrainedTokenizerFast:
    """Load `--tokenizer`; where that is out of reach, it is what `folder` carries if it was made with the same."""
    try:
        return load_tokenizer(settings.tokenizer)
    except UserError:
        manifest = load_manifest(folder) if folder.is_dir() and not settings.overwrite else None
        is_same = manifest is not None and manifest.settings.get("tokenizer") == settings.tokenizer
        if not is_same or not (folder / TOKENIZER_FOLDER).is_dir():
            raise
    return load_data_tokenizer(str(folder))


def name_tokenizer(name_or_path: str) -> str:
    """Return a Hub id as it is, and a folder's path so that it does not look like one."""
    is_relative = Path(name_or_path).is_dir() and not name_or_path.startswith((".", "/", "~"))
    return f"./{name_or_path}" if is_relative else name_or_path


def is_already_there(folder: Path, settings: PrepareConfig, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether `folder` was made with the same settings.

    Raises:
        UserError: it was made with others and may not be overwritten, or it is not a folder of ours.
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
    wanted = settings.experiment
    is_same_tokenizer = fingerprint_tokenizer(tokenizer) == manifest.tokenizer_fingerprint
    different = [name for name in wanted if wanted[name] != manifest.settings.get(name)]
    if is_same_tokenizer and "tokenizer" in different:  # it has moved, or is seen from another folder
        different.remove("tokenizer")
    if settings.files and not different and build_corpus(settings).source != manifest.source:
        raise UserError(f"{folder} was made when the --files were others; give another --output_dir or --overwrite")
    if different:
        changes = ", ".join(f"{name} ({manifest.settings.get(name)} there)" for name in different)
        raise UserError(f"{folder} was made with other settings: {changes}; give another --output_dir or --overwrite")
    if not is_same_tokenizer:
        raise UserError(f"{folder} was made when {settings.tokenizer} was another one: --overwrite makes it anew")
    return True


def build_corpus(settings: PrepareConfig, begun: dict[str, Any] | None = None) -> Corpus:
    """Build the corpus that the settings name.

    Args:
        begun: the source of an unfinished run with the same settings: a dataset's branch may have moved since, and
            what is finished belongs to the commit that it was at.
    """
    if settings.files:
        separator = settings.document_separator
        for spelled, meant in (SPELLED if separator is not None else {}).items():
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
        shards = sum(shard.split == split for shard in manifest.shards)
        print(f"{split}: {totals.tokens:,} tokens, {totals.documents:,} documents, {shards} shards")
    order = f"shuffled with seed {manifest.seed}" if manifest.shuffled else "in source order"
    print(f"training documents {order}; everything is in {folder}")


def doubt_separator(manifest: Manifest) -> str | None:
    """Say that `--document_separator` has cut nothing, where that is certain."""
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
    """Print what lies in `folder`, and draw it."""
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
