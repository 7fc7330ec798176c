"""Documents in local `.parquet`, `.jsonl` and `.txt` files.

A task can be read independently: row groups of a parquet file, a byte range of a JSON Lines file, a whole compressed
file, or a group of text files. Tasks are in the order of their documents.

To support another file type, add its suffix to `SUFFIXES`, a branch to `list_file_tasks` (which reads everything but
text and parquet as JSON Lines), and a class that implements `corpus.Task`; `config.py` lists the types in `--help`.
"""

import codecs
import contextlib
import dataclasses
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet

from ...core.errors import UserError, raise_if_unreadable
from ...core.file_kinds import check_encoding
from ...core.files import is_utf8

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", *TEXT_SUFFIXES)
# A Windows line ending is never matched as two.
LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
# Includes null, the type of a column that contains only nulls.
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null())
NOT_UTF8 = "not valid UTF-8: convert it first (for Windows text: iconv -f CP1252 -t UTF-8)"

# Bytes of text per task: enough to make the overhead negligible, few enough to let two cores share a small corpus.
TASK_BYTES = 2**25
# Bytes and rows of text per batch, the unit of decoding and encoding.
BATCH_BYTES = 4 * 2**20
BATCH_ROWS = 1024
# Size of the read buffer.
READ_BYTES = 2**20

Item = TypeVar("Item")


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that match `patterns` (paths, globs or folders), sorted and without duplicates.

    Raises:
        UserError: a pattern has no match, or a file has an unsupported type.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not matches and Path(pattern).exists():  # a name that contains brackets
            matches = [Path(pattern)]
        files = {path for path in matches if path.is_file()}
        for folder in set(matches) - files:
            # `**` follows links to folders and skips hidden files, which macOS for example leaves beside others.
            inside = map(Path, glob.iglob(f"{glob.escape(str(folder))}/**", recursive=True))
            files.update(path for path in inside if path.is_file() and _has_known_suffix(path))
        if not files:
            raise UserError(f"--files {pattern}: no such file, or a folder without {', '.join(SUFFIXES)} files")
        found |= files
    for path in found:
        if not is_utf8(path):
            raise UserError(f"--files {path}: the name is not UTF-8 and cannot be stored in a manifest: rename it")
        if not _has_known_suffix(path):
            raise UserError(f"--files {path}: unsupported file type: use one of {', '.join(SUFFIXES)}")
    # Several paths may refer to the same file.
    return sorted({os.path.realpath(path): path for path in sorted(found, reverse=True)}.values())


def list_file_tasks(
    paths: Iterable[Path], text_column: str, document_separator: str | None
) -> Iterator["ParquetTask | JsonlTask | TextTask"]:
    """Yield the files' tasks in the order of their documents.

    Raises:
        UserError: a file cannot be opened, or has no column `text_column`.
    """
    for is_text, files in itertools.groupby(paths, lambda path: path.name.lower().endswith(TEXT_SUFFIXES)):
        if is_text:
            for group in _group_by_size(files, lambda path: path.stat().st_size, TASK_BYTES):
                yield TextTask(tuple(map(str, group)), document_separator)
            continue
        for path in files:
            list_tasks = _list_parquet_tasks if path.suffix.lower() == ".parquet" else _list_jsonl_tasks
            yield from list_tasks(str(path), text_column)


def _has_known_suffix(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _list_parquet_tasks(path: str, text_column: str) -> Iterator["ParquetTask"]:
    with _explained_errors(path, "is not a complete parquet file"):
        metadata = pa.parquet.read_metadata(path)
    names = metadata.schema.to_arrow_schema().names
    if text_column not in names:
        raise UserError(_describe_missing_column(path, text_column, names))
    leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaf = leaves.index(text_column) if text_column in leaves else 0
    row_groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [row_group.column(leaf).total_uncompressed_size for row_group in row_groups]
    for group in _group_by_size(range(len(row_groups)), sizes.__getitem__, TASK_BYTES):
        rows, size = sum(row_groups[i].num_rows for i in group), sum(sizes[i] for i in group)
        # Fewer rows per batch if documents are long, such as books.
        rows_per_batch = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
        yield ParquetTask(path, text_column, tuple(group), rows_per_batch)


def _list_jsonl_tasks(path: str, text_column: str) -> Iterator["JsonlTask"]:
    _check_first_line(path, text_column)
    if _get_compression(path):
        yield JsonlTask(path, text_column)
        return
    size = os.path.getsize(path)
    for start in range(0, size, TASK_BYTES):
        yield JsonlTask(path, text_column, start, min(start + TASK_BYTES, size))


def _check_first_line(path: str, text_column: str) -> None:
    """Check that the first line has the text column. Other lines may lack it.

    Raises:
        UserError: the first line is a JSON object without the column.
    """
    with _open(path) as stream:
        first = next((line for line in stream if line.strip()), b"")
    try:
        row = json.loads(first.strip().splitlines()[0]) if first else None
    except (ValueError, RecursionError):
        return  # reported with its line number when the file is read
    if isinstance(row, dict) and text_column not in row:
        raise UserError(_describe_missing_column(path, text_column, list(row)))


def _group_by_size(items: Iterable[Item], size_of: Callable[[Item], int], min_size: int) -> Iterator[list[Item]]:
    """Group consecutive items; each group except the last ends with the item that brings it to `min_size`."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= min_size:
            yield group
            group = []
            size = 0
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A task that reads part of the file `path`."""

    path: str

    @property
    def name(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True)
class ParquetTask(FileTask):
    """Row groups of a parquet file; only the text column is read."""

    text_column: str
    row_groups: tuple[int, ...]
    rows_per_batch: int

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the rows' texts; nulls are kept."""
        with (
            _explained_errors(self.path, "is not a complete parquet file"),
            # Buffered, because otherwise whole row groups are read ahead: gigabytes in files that have few of them.
            pa.parquet.ParquetFile(self.path, buffer_size=READ_BYTES, pre_buffer=False) as file,
        ):
            for batch in file.iter_batches(
                self.rows_per_batch, row_groups=self.row_groups, columns=[self.text_column], use_threads=False
            ):
                yield as_texts(batch.column(0), self.path)


@dataclasses.dataclass(frozen=True)
class JsonlTask(FileTask):
    """The lines of a JSON Lines file that start in bytes `[start, end)`; `end=None` means the end of the file."""

    text_column: str
    start: int = 0
    end: int | None = None

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the lines' texts; a missing column or a `null` in it yields a null."""
        n_lines = 0
        for lines in _group_by_size(self._read_lines(), len, BATCH_BYTES):
            yield self._parse(b"".join(lines), n_lines)
            n_lines += len(lines)

    def _read_lines(self) -> Iterator[bytes]:
        with _open(self.path) as stream:
            if self.start > 0:
                stream.seek(self.start - 1)
                stream.readline()  # the rest of a line that belongs to the previous task
            while (self.end is None or stream.tell() < self.end) and (line := stream.readline()):
                yield line

    def _parse(self, lines: bytes, n_lines_before: int) -> pa.LargeStringArray:
        if lines.lstrip().startswith(b"null"):  # Arrow 26 crashes on a first row that is null
            return self._parse_line_by_line(lines, n_lines_before)
        schema = pa.schema([(self.text_column, pa.large_string())])
        try:
            table = pa.json.read_json(
                pa.BufferReader(lines),
                read_options=pa.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
                parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
            )
            texts = table[self.text_column].combine_chunks()
            texts.validate(full=True)
        except (pa.ArrowException, UnicodeDecodeError):
            return self._parse_line_by_line(lines, n_lines_before)
        return texts

    def _parse_line_by_line(self, lines: bytes, n_lines_before: int) -> pa.LargeStringArray:
        """Parse lines that Arrow rejects with Python's parser.

        Raises:
            UserError: a line is invalid; the message has its number.
        """
        texts = []
        for number, line in enumerate(lines.splitlines()):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                text = None if row is None else row.get(self.text_column)
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"{self.text_column!r} is a {type(text).__name__}, not a string")
            except (ValueError, AttributeError, RecursionError) as error:
                reason = "not a JSON object" if isinstance(error, AttributeError) else error
                reason = NOT_UTF8 if isinstance(error, UnicodeDecodeError) else reason
                line_number = self._count_lines_before_start() + n_lines_before + number + 1
                raise UserError(f"{self.path}, line {line_number}: {reason}") from error
            # Lone surrogates, left by truncating texts to a length, cannot be encoded as UTF-8.
            texts.append(text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return pa.array(texts, pa.large_string())

    def _count_lines_before_start(self) -> int:
        before = dataclasses.replace(self, start=0, end=self.start)
        return sum(1 for _ in before._read_lines()) if self.start else 0  # compressed files are not seekable


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Text files, each one document or split into documents at `document_separator`."""

    paths: tuple[str, ...]
    document_separator: str | None = None

    @property
    def name(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the files' documents unchanged: line endings are not converted, and spaces are not stripped.

        A byte order mark is dropped, and line endings in the separator match those of any system.
        """
        texts = (
            as_texts(pa.array(documents, pa.large_binary()), path)
            for path in self.paths
            for documents in self._read_documents(path)
        )
        for batch in _group_by_size(texts, lambda array: pc.sum(pc.binary_length(array)).as_py() or 0, BATCH_BYTES):
            yield pa.concat_arrays(batch)

    def _read_documents(self, path: str) -> Iterator[list[bytes]]:
        with _open(path) as stream:
            if self.document_separator is None:
                yield [stream.read()]
                return
            parts = re.split(LINE_END, self.document_separator.encode())
            plain, separator = b"\n".join(parts), re.compile(LINE_END.join(map(re.escape, parts)))
            rest = b""
            # Read at least as much as is left over: otherwise the time for text without a separator is quadratic.
            while lines := stream.readlines(max(BATCH_BYTES, len(rest))):
                text = rest + b"".join(lines)
                # Splitting at bytes is five times as fast as at a regular expression.
                *documents, rest = separator.split(text) if b"\r" in text else text.split(plain)
                yield documents
            yield [rest]


def as_texts(column: pa.Array, source: str) -> pa.LargeStringArray:
    """Return a column as valid UTF-8 strings, keeping nulls.

    Raises:
        UserError: the column has another type, or is not valid UTF-8; the message starts with `source`.
    """
    kind = column.type.value_type if isinstance(column, pa.DictionaryArray) else column.type
    if kind not in TEXT_TYPES:
        raise UserError(f"{source}: the text column contains {kind}, not strings (see --text_column)")
    try:
        texts = column.cast(pa.large_string())
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise UserError(f"{source} is {NOT_UTF8}") from error
    return texts


def _describe_missing_column(path: str, text_column: str, names: list[str]) -> str:
    return f"{path} has no column {text_column!r}: give --text_column one of {', '.join(map(str, names))}"


def _get_compression(path: str) -> str | None:
    return COMPRESSIONS.get(Path(path).suffix.lower())


@contextlib.contextmanager
def _open(path: str) -> Generator[io.BufferedReader]:
    """Open a text file, decompressing it and skipping a byte order mark.

    Raises:
        UserError: the file cannot be read, or its first bytes are not UTF-8.
    """
    compression = _get_compression(path)
    with (
        _explained_errors(path, "is damaged or cannot be read"),
        pa.input_stream(path, compression=compression) if compression else open(path, "rb", 0) as raw,
        io.BufferedReader(raw, READ_BYTES) as stream,
    ):
        front = stream.peek(4)[:4]
        check_encoding(front, path)
        if front.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


@contextlib.contextmanager
def _explained_errors(path: str, problem: str) -> Generator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise_if_unreadable(error, path)
        raise UserError(f"{path} {problem}: {error}") from error
