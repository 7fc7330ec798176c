"""Documents in local `.parquet`, `.jsonl` and `.txt` files.

A task is a part of one file that can be read on its own: some row groups of a parquet file, a range of bytes of a
JSON Lines file, one whole compressed file, or some text files. Tasks follow each other in the order of the documents.

Another kind of file would have its suffix in `SUFFIXES`, a branch in `list_file_tasks` (what is neither text nor
parquet is read as JSON Lines), and a class that is a `corpus.Task`; `config.py` names the kinds to users.
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

from ...core.errors import UserError, raise_if_refused
from ...core.file_kinds import check_encoding
from ...core.files import is_utf8

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", *TEXT_SUFFIXES)
# A Windows line end is never taken for two.
LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
# A column of nulls alone has no other type.
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null())
NOT_UTF8 = "not valid UTF-8: convert it first (text of Windows's: iconv -f CP1252 -t UTF-8)"

# Text per task: enough that starting one costs nothing, little enough that two cores share a small corpus.
TASK_BYTES = 2**25
# Text per batch, which is decoded and encoded at once.
BATCH_BYTES = 4 * 2**20
BATCH_ROWS = 1024
# How much of a file is read at once.
READ_BYTES = 2**20

Item = TypeVar("Item")


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that `patterns` (paths, globs or folders) name, sorted, each once.

    Raises:
        UserError: a pattern without a match, or a file of a kind that is not read here.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
        if not matches and Path(pattern).exists():  # a name with brackets in it
            matches = [Path(pattern)]
        files = {path for path in matches if path.is_file()}
        for folder in set(matches) - files:
            # `**` follows links to folders, and passes over hidden files such as macOS leaves beside others.
            inside = map(Path, glob.iglob(f"{glob.escape(str(folder))}/**", recursive=True))
            files.update(path for path in inside if path.is_file() and _has_known_suffix(path))
        if not files:
            raise UserError(f"--files {pattern}: no such file, or a folder without {', '.join(SUFFIXES)} files")
        found |= files
    for path in found:
        if not is_utf8(path):
            raise UserError(f"--files {path}: its name is not UTF-8, and no manifest could say it: rename it")
        if not _has_known_suffix(path):
            raise UserError(f"--files {path}: cannot read this kind of file; known are {', '.join(SUFFIXES)}")
    # Two paths may lead to one file.
    return sorted({os.path.realpath(path): path for path in sorted(found, reverse=True)}.values())


def list_file_tasks(
    paths: Iterable[Path], text_column: str, document_separator: str | None
) -> Iterator["FileTask | TextTask"]:
    """Yield the tasks of some files, in the order of their documents.

    Raises:
        UserError: a file that cannot be opened, or one without the column `text_column`.
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
    with _explained_errors(path, "is not a whole parquet file"):
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
        # Books come a few at a time.
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
    """Raise a `UserError` if the first line lacks the text column: other lines may, but not all of them."""
    with _open(path) as stream:
        first = next((line for line in stream if line.strip()), b"")
    try:
        row = json.loads(first.strip().splitlines()[0]) if first else None
    except (ValueError, RecursionError):
        return  # reported with its line number when it is read
    if isinstance(row, dict) and text_column not in row:
        raise UserError(_describe_missing_column(path, text_column, list(row)))


def _group_by_size(items: Iterable[Item], size_of: Callable[[Item], int], min_size: int) -> Iterator[list[Item]]:
    """Group consecutive items; each group but the last ends with the item that brings it to `min_size`."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= min_size:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A part of the file `path`."""

    path: str

    @property
    def name(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True)
class ParquetTask(FileTask):
    """Some row groups of a parquet file; only the text column is read."""

    text_column: str
    row_groups: tuple[int, ...]
    rows_per_batch: int

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the rows' texts; a null stays null."""
        with (
            _explained_errors(self.path, "is not a whole parquet file"),
            # A buffer of its own, or whole row groups are read ahead: gigabytes, of files that have few of them.
            pa.parquet.ParquetFile(self.path, buffer_size=READ_BYTES, pre_buffer=False) as file,
        ):
            for batch in file.iter_batches(
                self.rows_per_batch, row_groups=self.row_groups, columns=[self.text_column], use_threads=False
            ):
                yield as_texts(batch.column(0), self.path)


@dataclasses.dataclass(frozen=True)
class JsonlTask(FileTask):
    """The lines of a JSON Lines file that begin in the bytes `[start, end)`; `end=None` is the whole file."""

    text_column: str
    start: int = 0
    end: int | None = None

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the lines' texts; a line without the column, or with `null` in it, gives a null."""
        n_lines = 0
        for lines in _group_by_size(self._read_lines(), len, BATCH_BYTES):
            yield self._parse(b"".join(lines), n_lines)
            n_lines += len(lines)

    def _read_lines(self) -> Iterator[bytes]:
        with _open(self.path) as stream:
            if self.start > 0:
                stream.seek(self.start - 1)
                stream.readline()  # the end of a line of the task before
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
        """Find the line that Arrow cannot read: read it with Python's parser, or raise an error that names it."""
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
            # Half of a surrogate pair, which texts that were cut by length end with, has no UTF-8.
            texts.append(text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return pa.array(texts, pa.large_string())

    def _count_lines_before_start(self) -> int:
        before = dataclasses.replace(self, start=0, end=self.start)
        return sum(1 for _ in before._read_lines()) if self.start else 0  # a compressed file has no positions


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Some text files: one document each, or the pieces between the occurrences of `document_separator`."""

    paths: tuple[str, ...]
    document_separator: str | None = None

    @property
    def name(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def read_batches(self) -> Iterator[pa.LargeStringArray]:
        """Yield the files' documents unchanged: no line end is converted, no space stripped.

        A byte order mark is not text, and line ends in the separator match those of any system.
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
            # At least as much again as is left over, or a text without a separator would be split over and over.
            while lines := stream.readlines(max(BATCH_BYTES, len(rest))):
                text = rest + b"".join(lines)
                # Splitting at bytes is five times as fast as at a pattern.
                *documents, rest = separator.split(text) if b"\r" in text else text.split(plain)
                yield documents
            yield [rest]


def as_texts(column: pa.Array, source: str) -> pa.LargeStringArray:
    """Return a column as valid UTF-8 strings, nulls kept.

    Raises:
        UserError: a column of another type, or bytes that are not UTF-8; the message names `source`.
    """
    kind = column.type.value_type if isinstance(column, pa.DictionaryArray) else column.type
    if kind not in TEXT_TYPES:
        raise UserError(f"{source}: the text column holds {kind}, not strings (see --text_column)")
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
    """Open a file of text, uncompressed, after its byte order mark.

    Raises:
        UserError: it cannot be read, or its front shows that it is not UTF-8.
    """
    compression = _get_compression(path)
    with (
        _explained_errors(path, "is damaged, or cannot be read"),
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
        raise_if_refused(error, path)
        raise UserError(f"{path} {problem}: {error}") from error
