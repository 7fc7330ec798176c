"""HellaSwag items, read from the Hub or from a file of the same format and validated field by field."""

import codecs
import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..core.errors import UserError
from ..core.file_kinds import ARROW, EMPTY, PARQUET, TEXT, check_encoding, describe_content
from ..core.files import compute_checksum

DATASET_NAME = "Rowan/hellaswag"
# Head of the Hub repository since its conversion to parquet. The validation split has 10,042 rows.
DATASET_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"

# Numbers of items with label 0, 1, 2 and 3 in the validation split, which identify it.
VALIDATION_LABEL_COUNTS = (2515, 2485, 2584, 2458)

# 48 items written for this package in HellaSwag's two styles. They illustrate the format and let the demo run offline;
# scores on them are not comparable with scores on HellaSwag. Each ending is right in one item and wrong in three, and
# the endings of an item have nearly one length, so that a model which ignores the context scores 0.25.
SAMPLE_FILE = Path(__file__).with_name("hellaswag_sample.jsonl")

N_ENDINGS = 4
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
CODEC_BY_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # no text begins with these


@dataclass(frozen=True)
class HellaSwagItem:
    """A multiple-choice question, with the dataset's field names."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


def load_hellaswag(data_file: str | Path | None = None, limit: int | None = None) -> list[HellaSwagItem]:
    """Load HellaSwag's validation split from the Hub, or items from a file with the same fields.

    Args:
        data_file: JSON Lines or a JSON array, plain or compressed with gzip or zstd, or the dataset's own parquet or
            Arrow file. `label` may be a number or a string of digits. `None` loads from the Hub.
        limit: keep only the first `limit` items.

    Raises:
        UserError: the data cannot be read, or an item is malformed; the message gives file, line and field.
    """
    numbered_rows = _read_hub_rows() if data_file is None else _read_file_rows(data_file)
    items = [parse_item(row, where) for where, row in numbered_rows[:limit]]
    if not items:
        raise UserError(f"{data_file or DATASET_NAME} contains no HellaSwag items")
    return items


def name_items(data_file: str | Path | None, limit: int | None) -> str:
    """Return the name of the items for display: HellaSwag only for the Hub's split, otherwise the file name."""
    name = Path(data_file).name if data_file else "HellaSwag validation"
    return f"first {limit} items of {name}" if limit else name


def identify_items(data_file: str | Path | None) -> str:
    """Return an identifier of the items' content. Two scores are comparable only if their identifiers are equal.

    Raises:
        OSError: the file cannot be read.
    """
    return compute_checksum(data_file) if data_file else f"{DATASET_NAME}@{DATASET_REVISION}"


def _read_hub_rows() -> list[tuple[str, Any]]:
    import datasets.exceptions  # takes a second to import, and local files do not need it

    try:
        dataset = datasets.load_dataset(DATASET_NAME, split="validation", revision=DATASET_REVISION)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {DATASET_NAME} from the Hub ({error}): pass a copy of hellaswag_val.jsonl with --data_file "
            "(train.py: --hellaswag_file)"
        ) from error
    return [(f"{DATASET_NAME}, row {index}", row) for index, row in enumerate(dataset)]


def _read_file_rows(data_file: str | Path) -> list[tuple[str, Any]]:
    try:
        content = _decompress(Path(data_file).read_bytes())
        kind = describe_content(content)
        if kind in (PARQUET, ARROW):
            return [(f"{data_file}, row {index}", row) for index, row in enumerate(_read_table(content, kind))]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the HellaSwag file {data_file}: {error}") from error
    check_encoding(content[:4], data_file)
    if kind not in (None, TEXT, EMPTY):
        raise UserError(f"{data_file} contains no HellaSwag items: it is {kind}")
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):  # parsing by line gives better errors
            return [(f"{data_file}, item {number}", row) for number, row in enumerate(json.loads(content), start=1)]
    lines = ((f"{data_file}, line {number}", line) for number, line in enumerate(content.splitlines(), start=1))
    return [(where, _parse_line(line, where)) for where, line in lines if line.strip()]


def _decompress(content: bytes) -> bytes:
    codec = next((codec for magic, codec in CODEC_BY_MAGIC.items() if content.startswith(magic)), None)
    return pa.CompressedInputStream(pa.BufferReader(content), codec).read() if codec else content


def _read_table(content: bytes, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a table in the Hub's format (parquet) or that of `datasets` (Arrow)."""
    if kind == PARQUET:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(pa.BufferReader(content)).to_pylist()
    open_table = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    return open_table(pa.BufferReader(content)).read_all().to_pylist()


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not a JSON object ({getattr(error, 'msg', error)}): expected one HellaSwag item per line, or a "
            ".parquet file; CSV is not supported because it cannot represent the list of endings"
        ) from error


def parse_item(row: Any, where: str) -> HellaSwagItem:
    """Validate a row of the dataset and convert it to an item.

    Raises:
        UserError: the row is malformed; the message starts with `where`.
    """
    try:
        return _build_item(_unwrap_row(row))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _unwrap_row(row: Any) -> dict[str, Any]:
    """Return the fields of a row; samples logged by lm-evaluation-harness nest them under `doc`."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object with HellaSwag's fields, not a {type(row).__name__}")
    if isinstance(row.get("doc"), dict):
        row = row["doc"]
    if "query" in row and "ctx" not in row:
        raise ValueError(
            "lm-evaluation-harness rewrote this item, and the missing `ctx` cannot be restored from its `query`: use "
            "the dataset's own file"
        )
    return row


def _build_item(row: dict[str, Any]) -> HellaSwagItem:
    for field in ("ind", *TEXT_FIELDS, "endings"):
        if field not in row:
            raise ValueError(f"the field `{field}` is missing")
    if row.get("label") in (None, "", -1, "-1"):
        raise ValueError("the field `label` is missing, as in HellaSwag's test split: use the validation split")
    for field in TEXT_FIELDS:
        if not isinstance(row[field], str):
            raise ValueError(f"the field `{field}` must be a string, not {row[field]!r}")
    if not row["ctx"].strip():
        raise ValueError("the field `ctx` is empty")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != N_ENDINGS:
        found = len(endings) if isinstance(endings, list) else repr(endings)
        raise ValueError(f"the field `endings` must be a list of {N_ENDINGS} strings, not {found}")
    if not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise ValueError("the field `endings` contains an ending that is empty or not a string")
    texts = {field: row[field] for field in TEXT_FIELDS}
    "".join([*texts.values(), *endings]).encode()  # raises ValueError for an unpaired surrogate
    for field in ("ind", "label"):
        if not re.fullmatch(r"-?\d+", str(row[field])):
            raise ValueError(f"the field `{field}` must be an integer, not {row[field]!r}")
    if not 0 <= int(row["label"]) < N_ENDINGS:
        raise ValueError(f"the field `label` must be between 0 and {N_ENDINGS - 1}, not {row['label']}")
    return HellaSwagItem(ind=int(row["ind"]), **texts, endings=tuple(endings), label=int(row["label"]))


def is_full_validation_split(items: Sequence[HellaSwagItem]) -> bool:
    """Return whether these items are HellaSwag's full validation split, judging by the number of each label."""
    return tuple(sum(item.label == label for item in items) for label in range(N_ENDINGS)) == VALIDATION_LABEL_COUNTS
