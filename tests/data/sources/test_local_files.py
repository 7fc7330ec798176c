"""Reading local files: every document once, in order and unchanged, or an error with the file's name."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.data.sources import local_files
from modeling_gpt2_repro.data.sources.docstrings import extract_docstrings, keep_prose, list_docstring_tasks
from modeling_gpt2_repro.data.sources.local_files import find_files, list_file_tasks

TEXTS = ["one", 'quotes " and \\ and\nlines\ttabs', "日本語 🙂", "", None, "a" * 3000, "\u2028 \x7f", "last"]


def read(path, column="text", separator=None):
    tasks = list_file_tasks([path], column, separator)
    return [text for task in tasks for batch in task.read_batches() for text in batch.to_pylist()]


def write_jsonl(path, texts):
    data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_reads_jsonl(tmp_path, name):
    assert read(write_jsonl(tmp_path / name, TEXTS)) == TEXTS


@pytest.mark.parametrize("task_bytes", [1, 7, 100, 1000, 3100])
@pytest.mark.parametrize("batch_bytes", [5, 64, 4000])
def test_jsonl_does_not_depend_on_task_boundaries(tmp_path, monkeypatch, task_bytes, batch_bytes):
    monkeypatch.setattr(local_files, "TASK_BYTES", task_bytes)
    monkeypatch.setattr(local_files, "BATCH_BYTES", batch_bytes)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert read(path) == TEXTS
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read(path) == TEXTS


def test_jsonl_lines_that_only_pythons_parser_accepts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n\n{"text": "twice", "text": "last wins"}\n{"text": "b", "n": NaN}\n')
    assert read(path) == ["cut \ufffd", "last wins", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_reads_parquet(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(local_files, "TASK_BYTES", 100)
    column = pa.array(TEXTS).cast(kind) if kind != pa.binary() else pa.array([t and t.encode() for t in TEXTS], kind)
    pa.parquet.write_table(
        pa.table({"n": range(len(TEXTS)), "text": column}), tmp_path / "a.parquet", row_group_size=2
    )
    assert len(list(list_file_tasks([tmp_path / "a.parquet"], "text", None))) > 1
    assert read(tmp_path / "a.parquet") == TEXTS


def test_long_documents_of_parquet_come_in_small_batches(tmp_path):
    texts = ["".join(map(str, np.random.default_rng(number).integers(0, 10, 500_000))) for number in range(20)]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "books.parquet", use_dictionary=False)
    (task,) = list_file_tasks([tmp_path / "books.parquet"], "text", None)
    batches = [batch.to_pylist() for batch in task.read_batches()]
    assert [text for batch in batches for text in batch] == texts
    assert max(len(batch) for batch in batches) * 500_000 <= local_files.BATCH_BYTES


def test_a_large_row_group_is_read_in_small_batches(tmp_path):
    text = np.random.default_rng(0).integers(97, 123, 2**26, np.uint8).tobytes().decode()
    texts = [text[start : start + 2**12] for start in range(0, len(text), 2**12)]
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    (task,) = list_file_tasks([tmp_path / "a.parquet"], "text", None)
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in task.read_batches()) < 2**24


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_reads_text(tmp_path, monkeypatch, name):
    content = b"first\r\n\n--- second --\n---third"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [content.decode()]
    monkeypatch.setattr(local_files, "BATCH_BYTES", 4)
    assert read(tmp_path / name, separator="---") == ["first\r\n\n", " second --\n", "third"]


MARK = b"\xef\xbb\xbf"
ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r", "mixed": None}


def write_text(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\r\r", "\n---\n", "\n\n\n", "\n", "\t", "\f", "\x1a"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_separator_matches_any_line_ends(tmp_path, monkeypatch, name, end, separator):
    plain = separator.replace("\r\n", "\n").replace("\r", "\n")
    # Separators at the start, at the end, and doubled; other line ends, NULs and control characters inside the text.
    content = (
        plain.join(["", "a b\0", "", "c\fd" if separator != "\f" else "c", "-\n-", "\u2028é", "", "last"]) + plain
    )
    generator = np.random.default_rng(0)
    # "random" has no lone \\r, because it could join a following \\n into one line end.
    written = re.sub("\n", lambda _: ENDS[end] or ("\n", "\r\n")[generator.integers(2)], content)
    path = write_text(tmp_path / name, MARK + written.encode())
    for batch_bytes in (1, 2, 3, 4, 5, 7, 4096):
        monkeypatch.setattr(local_files, "BATCH_BYTES", batch_bytes)
        documents = read(path, separator=separator)
        assert [text.replace("\r\n", "\n").replace("\r", "\n") for text in documents] == content.split(plain)
        # Only separators are gone, and every line end is unchanged.
        position = 0
        for text in documents:
            position = written.index(text, position) + len(text)


def test_a_windows_line_end_counts_once(tmp_path):
    path = write_text(tmp_path / "a.txt", b"a\r\nb\r\n\r\nc\n\r\nd\r\re\r\nf")
    assert read(path, separator="\n\n") == ["a\r\nb", "c", "d", "e\r\nf"]
    assert read(path) == [path.read_bytes().decode()]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("separator", [None, "x"])
def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path, monkeypatch, name, separator):
    monkeypatch.setattr(local_files, "BATCH_BYTES", 1)
    assert read(write_text(tmp_path / name, MARK + b"a" + MARK), separator=separator) == ["a\ufeff"]
    assert read(write_text(tmp_path / name, MARK), separator=separator) == [""]


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp1252"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_another_encoding_is_identified(tmp_path, name, encoding, separator):
    content = '{"text": "café"}\r\n\r\n{"text": "b"}\r\n'.encode(encoding)
    expected = "CP1252" if encoding == "cp1252" else encoding[:6].upper()
    with pytest.raises(UserError, match=rf"{name}.* UTF-8.*iconv -f {expected} -t UTF-8"):
        read(write_text(tmp_path / name, content), separator=separator)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\n\r\n \r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_with_line_ends_of_windows_and_old_macs(tmp_path, monkeypatch, name, end):
    path = write_jsonl(tmp_path / name, [])
    lines = [json.dumps({"text": text}) for text in TEXTS] + ['{"text": "cut \\ud83d"}']
    content = MARK + end.join(["", *lines, ""]).encode()
    for batch_bytes in (1, 3, 64, 4096):
        monkeypatch.setattr(local_files, "BATCH_BYTES", batch_bytes)
        if name.endswith(".zst"):
            with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
                stream.write(content)
        else:
            write_text(path, content)
        assert read(path) == [*TEXTS, "cut \ufffd"]
        with pytest.raises(UserError, match="no column 'story'"):
            read(path, column="story")


def test_small_texts_share_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "TASK_BYTES", 12)
    names = ["a.txt", "b.txt", "c.txt.gz", "d.jsonl", "e.TXT"]
    for name in names:
        content = b'{"text":"d"}' if name == "d.jsonl" else f"text {name[0]}".encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    tasks = list(list_file_tasks([tmp_path / name for name in names], "text", None))
    assert [[batch.to_pylist() for batch in task.read_batches()] for task in tasks] == [
        [["text a", "text b"]],
        [["text c"]],
        [["d"]],
        [["text e"]],
    ]
    assert tasks[0].name == f"{tmp_path / 'a.txt'} and 1 more"


@pytest.mark.parametrize("line", ["null", '{"text": "cut \\ud83d"}'])
def test_a_byte_order_mark_is_not_part_of_jsonl(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b'\n{"text": "a"}\n')
    assert read(tmp_path / "a.jsonl") == [None if line == "null" else "cut \ufffd", "a"]


def test_a_file_with_two_paths_is_found_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").touch()
    (tmp_path / "real" / "._a.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "z.txt").symlink_to(tmp_path / "real" / "a.txt")
    through_links = find_files([str(tmp_path / "folder")])
    assert [path.name for path in through_links] == ["a.txt"]
    patterns = [str(tmp_path / name) for name in ("z.txt", "real/a.txt", "real/../real", "folder")]
    assert len(find_files(patterns)) == 1


def test_finds_files_sorted_and_once(tmp_path):
    for name in ("b/2.jsonl", "b/1.txt.gz", "a.parquet", "b/notes.md", "c[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "*.parquet"), str(tmp_path), str(tmp_path / "c[1].txt")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.parquet", "b/1.txt.gz", "b/2.jsonl", "c[1].txt"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "b"', "line 3: "),
        (b'{"text": 3}', "line 3: 'text' is a int"),
        (b'["b"]', "line 3: not a JSON object"),
        (b'{"text": "\xff"}', "line 3: not valid UTF-8.* iconv -f CP1252"),
        (b'{"text": "b"} {"text": "c"', "line 3: "),
    ],
)
@pytest.mark.parametrize("task_bytes", [20, 10])  # the line is in the first task, or in the second
def test_a_corrupt_jsonl_line_is_reported(tmp_path, monkeypatch, line, reason, task_bytes):
    monkeypatch.setattr(local_files, "TASK_BYTES", task_bytes)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "d"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl, {reason}"):
        read(tmp_path / "a.jsonl")


def test_a_missing_column_lists_the_existing_ones(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    pa.parquet.write_table(pa.table({"id": [0], "body": ["a"]}), tmp_path / "a.parquet")
    for name, others in (("a.jsonl", "id, text"), ("a.parquet", "id, body")):
        with pytest.raises(UserError, match=f"no column 'story': give --text_column one of {others}"):
            read(tmp_path / name, column="story")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30]),
        ("no.txt.gz", b"no gzip at all"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:40]),
        ("no.parquet", b"no parquet at all"),
        ("bad.txt", b"caf\xe9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes make unprintable test ids
)
def test_a_damaged_file_is_reported(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read(tmp_path / name)


def test_a_damaged_parquet_page_is_reported(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["some text " * 50] * 500}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet"):
        read(path)


def test_a_column_of_numbers_is_rejected(tmp_path):
    pa.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="int64, not strings"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("pattern", ["none.txt", "*.parquet", "empty"])
def test_a_pattern_without_match_is_rejected(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such file"):
        find_files([str(tmp_path / pattern)])


def test_an_unknown_file_type_is_rejected(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(UserError, match="unsupported file type"):
        find_files([str(tmp_path / "a.csv")])


def test_extracts_docstrings_in_order():
    source = b'''"""Module."""
class A:
    """Class."""
    def f(self):
        """Method.

        More."""
        if self:
            def g():
                """Inner."""
        return """no docstring"""
async def h():
    r"""Raw \\d."""
'''
    assert extract_docstrings(source) == "Module.\n\nClass.\n\nMethod.\n\nMore.\n\nInner.\n\nRaw \\d."
    assert extract_docstrings(b'print """Python 2"""') == ""


def test_prose_is_distinguished_from_data():
    text = "This is a paragraph of documentation,\n    which goes on here.\n \nAnd here is more of it, twice."
    assert keep_prose(text) == (
        "This is a paragraph of documentation, which goes on here.\n\nAnd here is more of it, twice."
    )
    for other in (
        "apple",
        "0.1 0.2 0.3 0.4 0.5\n1.0 2.0 3.0 4.0 5.0",
        ">>> print the words of this example here",
        "x = f(a)[0] + {b: c}; y |= z ** 2; w[:, 1] //= (3 - q)",
        "",
    ):
        assert keep_prose(other) == ""
        assert keep_prose(f"{text}\n\n{other}\n\n{text}") == keep_prose(f"{text}\n\n{text}")


def test_docstring_corpus_is_in_a_fixed_order():
    first = [next(iter(list_docstring_tasks())) for _ in range(2)]
    assert first[0] == first[1]
    texts = [text for batch in first[0].read_batches() for text in batch.to_pylist()]
    assert all(len(text) >= 200 for text in texts)
