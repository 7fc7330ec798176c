"""A data folder as text: its statistics in tables, and documents in a form that is safe to print to a terminal."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from modeling_gpt2_repro.data.inspection import Document, Inspection, SplitStatistics
from modeling_gpt2_repro.data.shards import Manifest
from modeling_gpt2_repro.data.tokenizer import spell_tokens

PREVIEW_CHARACTERS = 600
# A character is at most four tokens, one for each byte of its UTF-8.
PREVIEW_IDS = 4 * PREVIEW_CHARACTERS
MOST_COMMON = 20
BAR_CHARACTERS = 24
FILES_NAMED = 3
PERCENTILES = (("shortest", 0), ("10 %", 10), ("median", 50), ("90 %", 90), ("longest", 100))


def describe_inspection(inspection: Inspection, encoding: str) -> str:
    """Return the source of a folder's text, its statistics, and the documents that were read.

    The text has no control characters, and can be printed in `encoding`.
    """
    splits, tokenizer = inspection.splits, inspection.tokenizer
    blocks = [
        [str(inspection.folder), *_describe_origin(inspection)],
        _tabulate_counts(splits, len(tokenizer)),
        _tabulate_lengths([split for split in splits if split.documents]),
        _tabulate_most_common(splits, tokenizer),
        _describe_oddities(inspection),
    ]
    if inspection.documents:
        n_documents = sum(split.documents for split in splits)
        blocks.append([f"{len(inspection.documents):,} of {n_documents:,} documents:"])
    blocks += [_describe_document(document, tokenizer) for document in inspection.documents]
    text = escape_controls("\n\n".join("\n".join(block) for block in blocks if block))
    return text.encode(encoding, "backslashreplace").decode(encoding)


def escape_controls(text: str) -> str:
    """Replace all that a terminal would interpret or not show by Python escapes, except spaces and line breaks."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )


def quote_tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> list[str]:
    """Return each id's text in quotes, or its bytes if they are only a part of a character."""

    def quote(spelling: bytes) -> str:
        try:
            return repr(spelling.decode())
        except UnicodeDecodeError:
            return repr(spelling)[1:]

    return [quote(spelling) for spelling in spell_tokens(tokenizer, ids)]


def _describe_origin(inspection: Inspection) -> list[str]:
    manifest, tokenizer = inspection.manifest, inspection.tokenizer
    described = f"{inspection.tokenizer_name}, {len(tokenizer):,} ids, end-of-text id {tokenizer.eos_token_id}"
    if manifest is None:
        return [f"  no manifest: taken for ids of {described}"]
    order = f"shuffled with seed {manifest.seed}" if manifest.shuffled else "in source order"
    read, copies = manifest.read, manifest.validation_copies
    return [
        f"  source     {_describe_source(manifest)}",
        f"  tokenizer  {described}",
        f"  order      training documents {order}",
        f"  read       {read.documents:,} documents, {read.tokens:,} tokens; {manifest.empty_documents:,} empty "
        "documents skipped",
        f"  repeats    {manifest.duplicates:,} training documents repeat an earlier one; {copies.documents:,} that "
        "copy a validation document left out",
    ]


def _describe_source(manifest: Manifest) -> str:
    source = {name: value for name, value in manifest.source.items() if value is not None}
    name, files = source.pop("id", "not known"), source.pop("files", None)
    if files is None:
        return ", ".join([str(name), *(f"{key} {value}" for key, value in source.items())])
    more = f" and {len(files) - FILES_NAMED:,} more" if len(files) > FILES_NAMED else ""
    return f"{len(files):,} files: {', '.join(file['path'] for file in files[:FILES_NAMED])}{more}"


def _tabulate_counts(splits: Sequence[SplitStatistics], vocab_size: int) -> list[str]:
    cells = {
        "": lambda split: split.split,
        "shards": lambda split: f"{len(split.index.files):,}",
        "tokens": lambda split: f"{split.tokens:,}",
        "documents": lambda split: f"{split.documents:,}",
        "bytes of text": lambda split: f"{split.text_bytes:,}",
        "bytes a token": lambda split: _divide(split.text_bytes, split.tokens),
        "tokens a byte": lambda split: _divide(split.tokens, split.text_bytes),
        "ids in use": lambda split: f"{split.ids_in_use:,}",
        f"  of {vocab_size:,}": lambda split: f"{split.ids_in_use / vocab_size:.1%}",
        "tokens a document": lambda split: "",
        "  mean": lambda split: f"{split.mean_length:,.1f}" if split.documents else "-",
    }
    rows = [[name, *map(cell, splits)] for name, cell in cells.items()]
    for name, percent in PERCENTILES:
        lengths = (f"{split.find_length(percent):,}" if split.documents else "-" for split in splits)
        rows.append([f"  {name}", *lengths])
    return _align(rows)


def _divide(numerator: int, denominator: int) -> str:
    return f"{numerator / denominator:.3f}" if denominator else "-"


def _tabulate_lengths(splits: Sequence[SplitStatistics]) -> list[str]:
    """Return a histogram whose bins double: a line each for lengths of 2**n to 2**(n + 1) - 1 tokens."""
    if not splits:
        return ["no end-of-text id, and so no documents"]
    edges = [2**n for n in range(max(split.find_length(100) for split in splits).bit_length() + 1)]
    shortest = min(split.find_length(0) for split in splits)
    counts = [split.count_lengths(edges).tolist() for split in splits]
    rows = [["tokens a document", *(cell for split in splits for cell in (split.split, "", ""))]]
    for i in range(shortest.bit_length() - 1, len(edges) - 1):
        row = [f"  {edges[i]:,} to {edges[i + 1] - 1:,}" if i else "  1"]
        for of_split in counts:
            bar = "#" * round(BAR_CHARACTERS * of_split[i] / max(of_split))
            row += [f"{of_split[i]:,}", f"{of_split[i] / sum(of_split):.1%}", bar.ljust(BAR_CHARACTERS)]
        rows.append(row)
    return _align(rows)


def _tabulate_most_common(splits: Sequence[SplitStatistics], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    columns = []
    for split in splits:
        ids = split.list_most_common(MOST_COMMON)
        quoted, counts = quote_tokens(tokenizer, ids), split.token_counts[ids]
        width = max(map(len, quoted), default=0)
        columns += [
            [split.split, *(f"{count:,}" for count in counts)],
            ["", *(f"{count / split.tokens:.2%}" for count in counts)],
            [token.ljust(width) for token in ("", *quoted)],
        ]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return _align([f"  {rank}" if rank else "most common tokens", *row] for rank, row in enumerate(rows))


def _describe_oddities(inspection: Inspection) -> list[str]:
    """Return a line for each reason why the counts are not what they seem."""
    lines, manifest = [], inspection.manifest
    for split in inspection.splits:
        if split.tokens_before_first:
            lines.append(
                f"{split.split} begins inside a document: its {split.tokens_before_first:,} tokens before the first "
                "end-of-text id count as tokens, but not as a document"
            )
        if split.documents_without_text:
            lines.append(f"{split.split} has {split.documents_without_text:,} documents without text")
        expected = getattr(manifest, split.split) if manifest is not None else None
        if expected is not None and expected.documents != split.documents:
            lines.append(
                f"{split.split} has {expected.documents:,} documents by the manifest: --verify says where it differs"
            )
        elif expected is not None and expected.bytes != split.text_bytes:
            lines.append(f"{split.split} has {expected.bytes:,} bytes of text by the manifest, before tokenisation")
    if manifest is not None and manifest.validation_ends_inside_document:
        lines.append(
            "the last validation document goes on in the training split: its length here is that of its part in val, "
            "and its rest, which has no end-of-text id, counts to the training document in front of it"
        )
    return lines


def _describe_document(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    text, shown = _decode_front(document, tokenizer)
    lines = [
        f"--- {document.split}, {document.file}, position {document.position:,}, {document.tokens:,} tokens ---",
        text,
    ]
    left_out = document.tokens - 1 - shown
    return [*lines, f"[... {left_out:,} more tokens]"] if left_out else lines


def _decode_front(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[str, int]:
    """Return the front of a document's text that fits a preview, and the number of its tokens."""

    def decode(count: int) -> str:
        return tokenizer.decode(document.ids[:count], clean_up_tokenization_spaces=False)

    shown = bisect.bisect_right(range(len(document.ids) + 1), PREVIEW_CHARACTERS, key=lambda n: len(decode(n))) - 1
    # Do not cut within a character.
    while shown < document.tokens - 1 and decode(shown).endswith("\ufffd"):
        shown -= 1
    return decode(shown), shown


def _align(rows: Iterable[Sequence[str]]) -> list[str]:
    """Join cells to lines, the first column aligned to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
