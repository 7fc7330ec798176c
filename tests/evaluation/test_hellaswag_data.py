"""Reading HellaSwag's items, and the errors for malformed files."""

import codecs
import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import (
    DATASET_NAME,
    DATASET_REVISION,
    SAMPLE_FILE,
    is_full_validation_split,
    load_hellaswag,
)

REAL_FILE = Path(__file__).parents[3] / "shared" / "data" / "hellaswag_val.jsonl"
GOOD_ROW = {
    "ind": 7,
    "activity_label": "Rowing",
    "ctx_a": "A boat is on a lake.",
    "ctx_b": "the rower",
    "ctx": "A boat is on a lake. the rower",
    "endings": ["pulls.", "sings.", "melts.", "folds."],
    "label": 2,
}


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_items_with_number_or_text_labels(tmp_path):
    path = write_rows(tmp_path / "items.jsonl", GOOD_ROW, "", {**GOOD_ROW, "ind": 8, "label": "3", "split": "val"})
    first, second = load_hellaswag(path)
    assert (first.ind, first.label, first.endings[2]) == (7, 2, "melts.")
    assert (second.ind, second.label) == (8, 3)
    assert load_hellaswag(path, limit=1) == [first]


@pytest.mark.parametrize("end", ["\r\n", "\r", "\r\n\r\n"])
def test_files_from_windows_and_old_macs_are_read(tmp_path, end):
    path = tmp_path / "items.jsonl"
    lines = [json.dumps({**GOOD_ROW, "ind": ind}) for ind in range(3)]
    path.write_bytes(codecs.BOM_UTF8 + end.join([*lines, ""]).encode())
    assert [item.ind for item in load_hellaswag(path)] == [0, 1, 2]
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(end.join(lines).encode(encoding))
        with pytest.raises(UserError, match=f"is {encoding[:6].upper()}, not UTF-8"):
            load_hellaswag(path)


def without(field):
    return {name: value for name, value in GOOD_ROW.items() if name != field}


@pytest.mark.parametrize(
    ("bad_row", "complaint"),
    [
        *((without(field), f"`{field}` is missing") for field in GOOD_ROW),
        ({**GOOD_ROW, "endings": ["one", "two", "three"]}, "`endings` must be a list of 4"),
        ({**GOOD_ROW, "endings": "four"}, "`endings` must be a list of 4"),
        ({**GOOD_ROW, "endings": ["a", " ", "c", "d"]}, "`endings` contains an ending that is empty"),
        ({**GOOD_ROW, "endings": ["a", 1, "c", "d"]}, "`endings` contains an ending that is empty"),
        ({**GOOD_ROW, "ctx": "  "}, "`ctx` is empty"),
        ({**GOOD_ROW, "ctx_b": None}, "`ctx_b` must be a string"),
        ({**GOOD_ROW, "label": 4}, "`label` must be between 0 and 3"),
        ({**GOOD_ROW, "label": -1}, "use the validation split"),
        ({**GOOD_ROW, "label": None}, "use the validation split"),
        (without("label"), "use the validation split"),
        ({**GOOD_ROW, "endings": GOOD_ROW["endings"] * 2}, "not 8"),
        ({"query": "Rowing: A boat", "choices": GOOD_ROW["endings"], "gold": 2}, "lm-evaluation-harness"),
        (",ind,activity_label,ctx_a", "CSV is not supported"),
        ({**GOOD_ROW, "label": "two"}, "`label` must be an integer"),
        ({**GOOD_ROW, "label": ""}, "use the validation split"),
        ({**GOOD_ROW, "ind": None}, "`ind` must be an integer"),
        ([GOOD_ROW], "expected a JSON object"),
        ("{'ind': 7}", "not a JSON object"),
    ],
)
def test_a_malformed_row_is_reported_with_file_line_and_field(tmp_path, bad_row, complaint):
    path = write_rows(tmp_path / "items.jsonl", GOOD_ROW, bad_row)
    with pytest.raises(UserError) as error:
        load_hellaswag(path)
    assert f"{path}, line 2: " in str(error.value)
    assert complaint in str(error.value)


def test_bytes_that_are_not_text_are_reported_with_their_line(tmp_path):
    path = write_rows(tmp_path / "items.jsonl", GOOD_ROW)
    path.write_bytes(
        path.read_bytes() + json.dumps({**GOOD_ROW, "ctx": "caf\u00e9"}, ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(UserError, match=r"items\.jsonl, line 2: byte \d+ is not UTF-8"):
        load_hellaswag(path)
    path.write_text(json.dumps({**GOOD_ROW, "ctx": "小さな船"}, ensure_ascii=False), encoding="utf-8")
    assert load_hellaswag(path)[0].ctx == "小さな船"


def test_a_compressed_file_and_a_byte_order_mark_are_read(tmp_path):
    path = write_rows(tmp_path / "items.jsonl", GOOD_ROW)
    items, content = load_hellaswag(path), path.read_bytes()
    for each in (codecs.BOM_UTF8 + content, gzip.compress(content)):
        path.write_bytes(each)
        assert load_hellaswag(path) == items
    for each in (gzip.compress(content)[:-9], gzip.compress(content)[:12] + b"xxxxxxxx"):
        path.write_bytes(each)
        with pytest.raises(UserError, match="cannot read the HellaSwag file"):
            load_hellaswag(path)


ROWS = [{**GOOD_ROW, "source_id": "activitynet~v_x"}, {**GOOD_ROW, "ind": 8, "label": "3", "split": "val"}]


def to_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def save_table(path, write):
    """Write the rows as the files on the Hub have them, with labels as strings."""
    import datasets

    dataset = datasets.Dataset.from_list(
        [{**GOOD_ROW, "ind": ind, "label": str(label)} for ind, label in ((7, 2), (8, 3))]
    )
    write(dataset, path)


def save_to_disk(dataset, path):
    dataset.save_to_disk(path.with_name("saved"))
    (file,) = path.with_name("saved").glob("*.arrow")
    file.rename(path)


def write_arrow_file(dataset, path):
    table = dataset.data.table
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


FORMS = {
    "lines": lambda path: path.write_bytes(to_lines(*ROWS)),
    "no last line end": lambda path: path.write_bytes(to_lines(*ROWS).rstrip()),
    "array": lambda path: path.write_text(json.dumps(ROWS)),
    "indented array": lambda path: path.write_text("\n" + json.dumps(ROWS, indent=2)),
    "array with a byte order mark": lambda path: path.write_bytes(codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
    "gzip": lambda path: path.write_bytes(gzip.compress(to_lines(*ROWS))),
    "gzipped array": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "zstd": lambda path: pa.output_stream(str(path), compression="zstd").write(to_lines(*ROWS)),
    "lm-eval's log": lambda path: path.write_bytes(
        to_lines(*({"doc_id": 0, "doc": row, "target": 1} for row in ROWS))
    ),
    "lm-eval's items": lambda path: path.write_bytes(to_lines(*({**row, "query": "x", "gold": 1} for row in ROWS))),
    "parquet": lambda path: save_table(path, lambda dataset, path: dataset.to_parquet(path)),
    "save_to_disk": lambda path: save_table(path, save_to_disk),
    "arrow": lambda path: save_table(path, write_arrow_file),
    "to_json": lambda path: save_table(path, lambda dataset, path: dataset.to_json(path)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_format_of_the_items_is_read(tmp_path, form):
    FORMS[form](tmp_path / "items")
    first, second = load_hellaswag(tmp_path / "items")
    assert (first.ind, first.label, first.ctx, first.endings) == (7, 2, GOOD_ROW["ctx"], tuple(GOOD_ROW["endings"]))
    assert (second.ind, second.label) == (8, 3)
    assert load_hellaswag(tmp_path / "items", limit=1) == [first]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\3\4" + bytes(20), "zip archive"),
        (b"\x93NUMPY" + bytes(20), "NumPy"),
        ((20240522).to_bytes(4, "little") + bytes(1020), "an llm.c file of multiple-choice questions"),
        (b"PAR1 and no more", "cannot read"),
        (b"ARROW1 and no more", "cannot read"),
        (b"\xff\xff\xff\xff and no more", "cannot read"),
        (b"\x28\xb5\x2f\xfd and no more", "cannot read"),
        (json.dumps([GOOD_ROW, 3]).encode(), "item 2: expected a JSON object"),
        (json.dumps([GOOD_ROW])[:-1].encode(), "line 1: not a JSON object"),
        (b"[" * 100_000, "line 1: not a JSON object"),
        (b"", "contains no HellaSwag items"),
        (b"[]", "contains no HellaSwag items"),
    ],
)
def test_other_files_with_the_name_of_the_items_are_identified(tmp_path, content, complaint):
    (tmp_path / "items.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"items\.jsonl.*{complaint}|{complaint}.*items\.jsonl"):
        load_hellaswag(tmp_path / "items.jsonl")


def test_files_without_items_are_rejected(tmp_path):
    with pytest.raises(UserError, match="contains no HellaSwag items"):
        load_hellaswag(write_rows(tmp_path / "empty.jsonl", ""))
    with pytest.raises(UserError, match=r"cannot read .*missing\.jsonl"):
        load_hellaswag(tmp_path / "missing.jsonl")


def test_the_hub_split_is_pinned_and_an_unreachable_hub_points_to_the_flag(monkeypatch):
    calls = []
    hub_rows = [{**GOOD_ROW, "label": "1", "source_id": "activitynet~v_x"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or hub_rows)
    assert load_hellaswag()[0].label == 1
    assert calls == [((DATASET_NAME,), {"split": "validation", "revision": DATASET_REVISION})]

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot load Rowan/hellaswag from the Hub \(no route\).*--data_file"):
        load_hellaswag()


def test_the_shipped_sample_has_the_shape_of_hellaswag():
    items = load_hellaswag(SAMPLE_FILE)
    assert len(items) >= 48
    assert len({item.ind for item in items}) == len(items)
    assert len(set(Counter(item.label for item in items).values())) == 1
    assert all(item.ctx == f"{item.ctx_a} {item.ctx_b}".strip() for item in items)
    assert all(len(set(item.endings)) == 4 for item in items)
    captions = [item for item in items if item.ctx_b]
    assert len(captions) == len(items) // 2
    assert any("[title]" in ending for item in items for ending in item.endings)
    assert not is_full_validation_split(items)


@pytest.mark.skipif(not REAL_FILE.exists(), reason="HellaSwag's validation items are not on this machine")
def test_the_full_split_is_recognized_and_disjoint_from_the_sample():
    real, sample = load_hellaswag(REAL_FILE), load_hellaswag(SAMPLE_FILE)
    assert is_full_validation_split(real)
    assert not is_full_validation_split(real[:-1])
    real_texts = {text for item in real for text in (item.ctx, *item.endings)}
    assert not real_texts & {text for item in sample for text in (item.ctx, *item.endings)}
