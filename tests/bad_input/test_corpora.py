"""Any file passed as a corpus."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from cases import answer, build_originals, cases, open_case
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import NO_FILES, ODD_JSON_FILES, damage_bytes, odd_json, replace_file

import prepare_data

FILES = ["a.jsonl", "b.jsonl.gz", "c.txt", "d.txt.gz", "e.parquet", "f.jsonl.zst"]
COMMAND = ["--tokenizer=../given/tokenizer", "--output_dir=out", "--num_workers=1", "--shard_size=900"]


def prepare(case, name: str, *flags: str) -> int:
    """Prepare a file, and check that success leaves a complete folder and failure none."""
    code = answer(prepare_data.main, [*COMMAND, f"--files=../given/corpus/{name}", *flags], case).code
    out = case.folder / "cwd" / "out"
    assert out.exists() == (code == 0)
    if code == 0:
        assert answer(prepare_data.main, ["--output_dir=out", "--verify"], case).code == 0
    return code


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read(name):
    with open_case("corpus", "tokenizer") as case:
        assert prepare(case, name) == 0


@cases(150)
@given(st.data(), st.sampled_from(FILES))
def test_damaged_files(data, name):
    with open_case("corpus", "tokenizer") as case:
        path = case.given / "corpus" / name
        path.write_bytes(data.draw(damage_bytes(path.read_bytes())))
        flags = data.draw(
            st.sampled_from([(), (), ("--document_separator=\\n",), ("--no_shuffle",), ("--val_tokens=9",)])
        )
        prepare(case, name, *flags)


@st.composite
def draw_rows(draw) -> bytes:
    rows = [{"text": f"document {i} of a few"} for i in range(12)]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(
            st.one_of(odd_json, st.fixed_dictionaries({"text": odd_json}), st.just({"text": "a\r\nb\u2028c\0d"}))
        )
        rows.insert(draw(st.integers(0, 12)), row)
    return "".join(json.dumps(row) + draw(st.sampled_from(["\n", "\n", "\r\n", "\n\n"])) for row in rows).encode()


@cases(70)
@given(draw_rows(), st.booleans())
@example(b'{"text": "a b c d"}\n' * 30 + b'{"text": ' + b"[" * 100_000 + b"}\n", False)
@example(b'{"x": ' + b"[" * 100_000 + b"\n" + b'{"text": "a b c d"}\n' * 30, False)
def test_lines_of_other_content(content, is_compressed):
    with open_case("corpus", "tokenizer") as case:
        name = "b.jsonl.gz" if is_compressed else "a.jsonl"
        (case.given / "corpus" / name).write_bytes(gzip.compress(content) if is_compressed else content)
        prepare(case, name)


@pytest.mark.parametrize("content", ODD_JSON_FILES, ids=range(len(ODD_JSON_FILES)))
def test_odd_files(content):
    with open_case("corpus", "tokenizer") as case:
        (case.given / "corpus" / "a.jsonl").write_bytes(content)
        assert prepare(case, "a.jsonl") == 2


COLUMNS = [
    pa.array(range(50)),
    pa.array([None] * 50),
    pa.array([[1, 2]] * 50),
    pa.array([{"text": "a"}] * 50),
    pa.array([b"\xff\xfe"] * 50),
    pa.array(["a b c d e"] * 50).dictionary_encode(),
    pa.array([""] * 50),
    pa.array([1.5] * 50),
    pa.array([True] * 50),
    pa.array(["a b c d e f"] * 49 + [None]),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_columns_of_another_type(column):
    with open_case("corpus", "tokenizer") as case:
        pa.parquet.write_table(pa.table({"text": column}), case.given / "corpus" / "e.parquet")
        prepare(case, "e.parquet")


@pytest.mark.parametrize("kind", [*NO_FILES, "pipe"])
@pytest.mark.parametrize("name", ["a.jsonl", "e.parquet"])
def test_paths_that_are_not_files(kind, name):
    with open_case("corpus", "tokenizer") as case:
        replace_file(case.given / "corpus" / name, kind, case.outside)
        assert prepare(case, name) == 2


def test_the_originals_are_unchanged():
    assert sorted(path.name for path in (build_originals() / "corpus").iterdir()) == FILES


PLANS = [
    b"[]",
    b"{}",
    b'{"settings": 5}',
    b'{"settings": {}, "source": []}',
    b"[" * 100_000,
    b'{"settings": {"seed": 5}}',
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: repr(plan[:30]))
def test_plans_of_an_unfinished_run(plan):
    with open_case("corpus", "tokenizer") as case:
        work = case.folder / "cwd" / "out.partial"
        (work / "unfinished").mkdir(parents=True)
        (work / "plan.json").write_bytes(plan)
        assert answer(prepare_data.main, [*COMMAND, "--files=../given/corpus/a.jsonl"], case).code == 2
        assert (work / "plan.json").read_bytes() == plan
