"""HellaSwag's items: from the Hub or a file of the same format, checked field by field."""

import codecs
import contextlib
import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.file_kinds import ARROW, EMPTY, PARQUET, TEXT, check_encoding, describe_content
from modeling_gpt2_repro.core.files import compute_checksum

DATASET_NAME = "Rowan/hellaswag"
# The Hub repository's head since its conversion to parquet; the validation split has 10,042 rows there.
DATASET_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"

# Items by label 0..3 in the validation split: tells it from other data in the same format.
VALIDATION_LABEL_COUNTS = (2515, 2485, 2584, 2458)

# 48 items written for this package in HellaSwag's two styles. They show the format and let a demo run without a
# network; a score on them says nothing about HellaSwag and is never to be compared with one.
SAMPLE_FILE = Path(__file__).with_name("hellaswag_sample.jsonl")

N_ENDINGS = 4
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # no text begins with them
NO_LABEL = ", as in HellaSwag's test split: use the validation split"


@dataclass(frozen=True)
class HellaSwagItem:
    """One question, in the dataset's own field names."""

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


def load_hellaswag(data_file: str | Path | None = None, limit: int | None = None) -> list[HellaSwagItem]:
    """Load HellaSwag's validation split from the Hub, or a file with its field names.

    Args:
        data_file: one JSON object a line, or an array of them, compressed by gzip or zstd or not; or the dataset's own
            parquet or Arrow file. `label` may be a number or a string of digits. `None` means the Hub.
        limit: keep only the first `limit` items.

    Raises:
        UserError: the data cannot be reached or an item is malformed; the message names the file, line and field.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of HellaSwag items has to be at least 1, not {limit}")
    numbered_rows = _read_hub_rows() if data_file is None else _read_file_rows(data_file)
    items = [parse_item(row, where) for where, row in numbered_rows[:limit]]
    if not items:
        raise UserError(f"{data_file or DATASET_NAME} holds no HellaSwag items")
    return items


def name_items(data_file: str | Path | None, limit: int | None) -> str:
    """Say what is scored: only the Hub's validation set is HellaSwag, a file goes by its own name."""
    name = Path(data_file).name if data_file else "HellaSwag validation"
    return f"first {limit} items of {name}" if limit else name


def identify_items(data_file: str | Path | None) -> str:
    """Return what tells these items from others, whatever their file is called: two scores compare only where it is
    the same.

    Raises:
        OSError: the file cannot be read.
    """
    return compute_checksum(data_file) if data_file else f"{DATASET_NAME}@{DATASET_REVISION}"


def _read_hub_rows() -> list[tuple[str, Any]]:
    import datasets  # takes a second to import, and a local file does without it

    try:
        dataset = datasets.load_dataset(DATASET_NAME, split="validation", revision=DATASET_REVISION)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {DATASET_NAME} from the Hub ({error}): give its hellaswag_val.jsonl by --data_file, or to "
            "train.py by --hellaswag_file"
        ) from error
    return [(f"{DATASET_NAME}, row {index}", row) for index, row in enumerate(dataset)]


def _read_file_rows(data_file: str | Path) -> list[tuple[str, Any]]:
    try:
        content = _decompress(Path(data_file).read_bytes())
        kind = describe_content(content)
        if kind in (PARQUET, ARROW):
            return [(f"{data_file}, row {index}", row) for index, row in enumerate(_read_table(content, kind))]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read the HellaSwag file {data_file}: {error}") from error
    check_encoding(content[:4], data_file)
    if kind not in (None, TEXT, EMPTY):
        raise UserError(f"{data_file} holds no HellaSwag items: it is {kind}")
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):  # of what is none, a line below tells more
            return [(f"{data_file}, item {number}", row) for number, row in enumerate(json.loads(content), start=1)]
    return _read_jsonl_rows(content, data_file)


def _decompress(content: bytes) -> bytes:
    if content.startswith(GZIP_MAGIC):
        return gzip.decompress(content)
    if content.startswith(ZSTD_MAGIC):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    return content


def _read_table(content: bytes, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a file as the Hub, or the datasets library in a folder of its own, has them."""
    import pyarrow as pa  # takes its time, and most files are text
    import pyarrow.parquet

    if kind == PARQUET:
        return pyarrow.parquet.read_table(pa.BufferReader(content)).to_pylist()
    open_table = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    return open_table(pa.BufferReader(content)).read_all().to_pylist()


def _read_jsonl_rows(content: bytes, data_file: str | Path) -> list[tuple[str, Any]]:
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{data_file}, line {number}"
        try:
            rows.append((where, json.loads(line.decode())))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(
                f"{where}: not a JSON object ({reason}): expected one HellaSwag item a line, or a .parquet file; a "
                "table of text such as CSV has no place for the list of endings"
            ) from error
    return rows


def parse_item(row: Any, where: str) -> HellaSwagItem:
    """Check one row of the dataset and give it types. `where` begins the message of a `UserError`."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with HellaSwag's fields, not a {type(row).__name__}")
    if isinstance(row.get("doc"), dict):  # a sample that lm-evaluation-harness has logged
        row = row["doc"]
    if "query" in row and "ctx" not in row:
        raise UserError(
            f"{where}: the item is one that lm-evaluation-harness has made its query of, and not the dataset's: it "
            "lacks `ctx`, which a query does not give back"
        )
    for field in ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"):
        if field not in row:
            raise UserError(f"{where}: the field `{field}` is missing{NO_LABEL if field == 'label' else ''}")
    for field in ("activity_label", "ctx_a", "ctx_b", "ctx"):
        if not isinstance(row[field], str):
            raise UserError(f"{where}: the field `{field}` has to be a text, not {row[field]!r}")
    if not row["ctx"].strip():
        raise UserError(f"{where}: the field `ctx` is empty")
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != N_ENDINGS:
        found = f"{len(endings)} of them" if isinstance(endings, list) else repr(endings)
        raise UserError(f"{where}: the field `endings` has to be a list of {N_ENDINGS} texts, not {found}")
    if not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise UserError(f"{where}: the field `endings` holds an empty ending")
    for text in (row["activity_label"], row["ctx_a"], row["ctx_b"], row["ctx"], *endings):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{where}: it holds half of a surrogate pair, which is no character")
    return HellaSwagItem(
        ind=_parse_integer(row, "ind", where),
        activity_label=row["activity_label"],
        ctx_a=row["ctx_a"],
        ctx_b=row["ctx_b"],
        ctx=row["ctx"],
        endings=tuple(endings),
        label=_parse_label(row, where),
    )


def _parse_integer(row: dict, field: str, where: str) -> int:
    try:
        if isinstance(row[field], bool | float):
            raise TypeError
        return int(row[field])
    except (TypeError, ValueError):
        raise UserError(f"{where}: the field `{field}` has to be a whole number, not {row[field]!r}") from None


def _parse_label(row: dict, where: str) -> int:
    if row["label"] in ("", None, -1, "-1"):
        raise UserError(f"{where}: the field `label` is {row['label']!r}, none{NO_LABEL}")
    label = _parse_integer(row, "label", where)
    if not 0 <= label < N_ENDINGS:
        raise UserError(f"{where}: the field `label` has to be 0 to {N_ENDINGS - 1}, not {label}")
    return label


def is_full_validation_split(items: Sequence[HellaSwagItem]) -> bool:
    """Tell HellaSwag's whole validation split by its number of items of each label."""
    return tuple(sum(item.label == label for item in items) for label in range(N_ENDINGS)) == VALIDATION_LABEL_COUNTS
