"""Text report of a data folder: a table of statistics, and documents in a form that is safe for a terminal."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from ..core.errors import escape_controls
from ..data.inspection import Document, Inspection, SplitStatistics
from ..data.shards import Manifest
from ..data.tokenizer import GPT2_TOKENIZER

PREVIEW_CHARACTERS = 600
# A character has at most four tokens, one per UTF-8 byte. One more token shows that the text continues.
PREVIEW_IDS = 4 * PREVIEW_CHARACTERS + 1
FILES_NAMED = 3
PERCENTILES = (("shortest", 0), ("10 %", 10), ("median", 50), ("90 %", 90), ("longest", 100))


def describe_inspection(inspection: Inspection, encoding: str) -> str:
    """Return a report of the folder's source, its statistics, and the documents that were read.

    The report contains no control characters and is printable in `encoding`.
    """
    splits, tokenizer = inspection.splits, inspection.tokenizer
    blocks = [
        [str(inspection.folder), *_describe_origin(inspection)],
        _tabulate_counts(splits, len(tokenizer)),
        _describe_oddities(inspection),
    ]
    if inspection.documents:
        n_documents = sum(split.documents for split in splits)
        blocks.append([f"{len(inspection.documents):,} of {n_documents:,} documents:"])
    blocks += [_describe_document(document, tokenizer) for document in inspection.documents]
    text = escape_controls("\n\n".join("\n".join(block) for block in blocks if block))
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _describe_origin(inspection: Inspection) -> list[str]:
    manifest, tokenizer = inspection.manifest, inspection.tokenizer
    name = manifest.tokenizer if manifest is not None else GPT2_TOKENIZER
    described = f"{name}, {len(tokenizer):,} ids, end-of-text id {tokenizer.eos_token_id}"
    if manifest is None:
        return [f"  no manifest: assuming ids of {described}"]
    order = f"shuffled with seed {manifest.seed}" if manifest.shuffled else "in source order"
    read, copies = manifest.read, manifest.validation_copies
    return [
        f"  source     {_describe_source(manifest)}",
        f"  tokenizer  {described}",
        f"  order      training documents {order}",
        f"  read       {read.documents:,} documents, {read.tokens:,} tokens; {manifest.empty_documents:,} empty "
        "documents skipped",
        f"  repeats    {manifest.duplicates:,} training documents repeat an earlier one; {copies.documents:,} copies "
        "of validation documents removed",
    ]


def _describe_source(manifest: Manifest) -> str:
    source = {name: value for name, value in manifest.source.items() if value is not None}
    name, files = source.pop("id", "unknown"), source.pop("files", None)
    if files is None:
        return ", ".join([str(name), *(f"{key} {value}" for key, value in source.items())])
    more = f" and {len(files) - FILES_NAMED:,} more" if len(files) > FILES_NAMED else ""
    return f"{len(files):,} files: {', '.join(file['path'] for file in files[:FILES_NAMED])}{more}"


def _tabulate_counts(splits: Sequence[SplitStatistics], vocab_size: int) -> list[str]:
    columns = [_count(split, vocab_size) for split in splits]
    return _align([name, *(column[name] for column in columns)] for name in columns[0])


def _count(split: SplitStatistics, vocab_size: int) -> dict[str, str]:
    def describe_length(percent: int) -> str:
        return f"{split.find_length(percent):,}" if split.documents else "-"

    return {
        "": split.split,
        "shards": f"{len(split.files):,}",
        "tokens": f"{split.tokens:,}",
        "documents": f"{split.documents:,}",
        "bytes of text": f"{split.text_bytes:,}",
        "bytes per token": f"{split.text_bytes / max(1, split.tokens):.3f}",
        "ids in use": f"{split.ids_in_use:,}",
        f"  of {vocab_size:,}": f"{split.ids_in_use / vocab_size:.1%}",
        "tokens per document": "",
        "  mean": f"{split.mean_length:,.1f}" if split.documents else "-",
        **{f"  {name}": describe_length(percent) for name, percent in PERCENTILES},
    }


def _describe_oddities(inspection: Inspection) -> list[str]:
    """Return a line for each peculiarity that affects how to read the counts."""
    lines: list[str] = []
    manifest = inspection.manifest
    for split in inspection.splits:
        if not split.documents:
            lines.append(f"{split.split} has no end-of-text id, and hence no documents")
        if split.tokens_before_first:
            lines.append(
                f"{split.split} begins inside a document: its {split.tokens_before_first:,} tokens before the first "
                "end-of-text id count as tokens, but not as a document"
            )
        without_text = int(split.length_counts[split.lengths == 1].sum())
        if without_text:
            lines.append(f"{split.split} has {without_text:,} documents without text")
        expected = getattr(manifest, split.split).documents if manifest is not None else split.documents
        if expected != split.documents:
            lines.append(f"{split.split} has {expected:,} documents according to the manifest: check with --verify")
    if manifest is not None and manifest.validation_ends_inside_document:
        lines.append(
            "the last validation document continues in the training split: its length here is that of its part in "
            "val, and the rest, which has no end-of-text id, counts toward the training document before it"
        )
    return lines


def _describe_document(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    header = f"--- {document.split}, {document.file}, position {document.position:,}, {document.tokens:,} tokens ---"
    text = str(tokenizer.decode(document.ids, clean_up_tokenization_spaces=False))
    is_whole = len(text) <= PREVIEW_CHARACTERS and len(document.ids) == document.tokens - 1
    return [header, text[:PREVIEW_CHARACTERS], *([] if is_whole else ["[...]"])]


def _align(rows: Iterable[Sequence[str]]) -> list[str]:
    """Join the cells of each row, the first column left-aligned and the others right-aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
