"""Folders of token shards: the one module that knows their format.

A folder holds 1-D uint16 arrays of token ids, `PREFIX_val_000000.npy`, `PREFIX_train_000001.npy`, ..., and
`manifest.json`, written last. It also has the tokenizer that they were written with, so that it can be used
anywhere. Folders without a manifest, as build-nanogpt's `fineweb.py` writes them, and the `.bin` files of other
programs (`foreign_shards.py`) are read as well.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..core.errors import UserError, raise_if_refused
from ..core.file_kinds import NUMPY, describe_content
from ..core.files import TEMPORARY_SUFFIX, compute_checksum, sync_folder, write_json
from .foreign_shards import describe_other_data, is_question_file, locate_tokens

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("val", "train")

MANIFEST_NAME = "manifest.json"
# Scores of models on the validation split, which `train.py --eval_only` keeps beside it.
BASELINES_NAME = "baselines.json"
FORMAT_VERSION = 1
# A folder that contains this one is being written, or its writer was killed.
WORK_FOLDER = "unfinished"
# These belong to unfinished folders too; a writer that was killed at the very end leaves them in the finished one.
PLAN_NAME, LOCK_NAME = "plan.json", "lock"
# The tokenizer that the shards were written with, as `save_pretrained` writes it.
TOKENIZER_FOLDER = "tokenizer"
# The UTF-8 bytes of each validation document (`text_bytes.py`). The name contains no split: build-nanogpt's loader
# takes every file whose name does for a shard.
TEXT_BYTES_NAME = "text_bytes.npy"
# What `prepare_data.py --inspect` draws beside the shards.
INSPECTION_NAME = "inspection.png"

# Shards hold 16-bit ids.
MAX_VOCAB_SIZE = 2**16
# Tokens read at once in a pass over a shard: 2 MB of ids, which stay in a processor's cache.
TOKENS_PER_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file; `documents` counts those that begin in it."""

    file: str
    split: Split
    documents: int
    tokens: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Documents, their tokens (with one end-of-text id each), and the UTF-8 bytes of their text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and where it came from.

    Attributes:
        settings: what was requested, to recognize the same request.
        read: all documents that were read; `train`, `val` and `validation_copies` add up to it.
        validation_copies: training documents with the text of a validation document, which are left out.
        duplicates: training documents whose text an earlier training document has; they are kept.
        empty_documents: texts that are null, empty, or nothing to the tokenizer, which were skipped.
        validation_ends_inside_document: the last validation document continues in the training split.
        other_files: the checksums of what belongs to the shards, by path in the folder; folders that an older version
            wrote have nothing else.
    """

    source: dict[str, Any]
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot_id: int
    seed: int
    shuffled: bool
    settings: dict[str, Any]
    read: Totals
    train: Totals
    val: Totals
    validation_copies: Totals
    duplicates: int
    empty_documents: int
    validation_ends_inside_document: bool
    shards: list[Shard]
    format_version: int = FORMAT_VERSION
    other_files: dict[str, str] = dataclasses.field(default_factory=dict)

    def list_shards(self, split: Split) -> list[Shard]:
        """Return the shards of a split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def __post_init__(self):
        _check_types(self)
        for counted in (self.read, self.train, self.val, self.validation_copies, *self.shards):
            _check_types(counted)
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE or not 0 <= self.eot_id < self.vocab_size:
            raise ValueError(f"{self.vocab_size} ids with the end-of-text id {self.eot_id}")
        for file in self.source.get("files", []):
            if not isinstance(file["path"], str):
                raise TypeError(f"source: {file!r:.80}")
        for shard in self.shards:
            # Not merely `Path.name`, which of ".." is itself.
            if Path(shard.file).name != shard.file or shard.file in ("", ".."):
                raise ValueError(f"{shard.file!r} is not a file of its folder")
        for name, checksum in self.other_files.items():
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name, re.ASCII) or not isinstance(checksum, str):
                raise ValueError(f"other_files: {name!r:.80} is not a file of its folder with a checksum")
        kept = self.train + self.val + self.validation_copies
        for unit in ("documents", "tokens", "bytes"):
            if getattr(self.read, unit) != getattr(kept, unit):
                raise ValueError(f"{unit} were lost")
        for split in SPLITS:
            if getattr(self, split).tokens != sum(shard.tokens for shard in self.list_shards(split)):
                raise ValueError(f"the {split} shards have other tokens")


def _check_types(record: Any) -> None:
    """Compare what was read from a file with the fields' types; counts are whole and not negative."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type is Split:
            is_right = value in SPLITS
        elif field.type is int:
            is_right = type(value) is int and 0 <= value < 2**64
        else:
            is_right = isinstance(value, typing.get_origin(field.type) or field.type)
        if not is_right:
            raise TypeError(f"{field.name}: {value!r:.80}")


class SplitWriter:
    """Writes one split's tokens, in any order, to their places in shards of `shard_size` tokens.

    Shards are made at full length first, so that workers can write to them independently.
    """

    def __init__(self, folder: Path, prefix: str, split: Split, first_number: int, tokens: int, shard_size: int):
        self.folder = folder
        self.split = split
        self.shard_size = shard_size
        sizes = [min(shard_size, tokens - start) for start in range(0, tokens, shard_size)]
        self.names = [f"{prefix}_{split}_{first_number + i:06d}.npy" for i in range(len(sizes))]
        self.sizes = sizes

    def create_files(self) -> None:
        """Write the header of every shard and reserve its length; a shard that exists already keeps its tokens."""
        for name, size in zip(self.names, self.sizes, strict=True):
            # Opened so that two processes may do this at once, and that what a third has written stays.
            with os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
                header = {"descr": "<u2", "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(stream, header)
                stream.truncate(stream.tell() + 2 * size)
        sync_folder(self.folder)  # or a part that was written durably could lose its file's name with the power

    def write(self, position: int, tokens: np.ndarray) -> None:
        """Write `tokens`, uint16, at `position`, counted in tokens from the start of the split, durably."""
        while len(tokens):
            index, start = divmod(position, self.shard_size)
            part = tokens[: self.shard_size - start]
            path = self.folder / self.names[index]
            # For writing only: opened to read as well, NFS writes whole pages, over a neighbour's tokens in them.
            with os.fdopen(os.open(path, os.O_WRONLY), "wb") as stream:
                stream.seek(path.stat().st_size - 2 * self.sizes[index] + 2 * start)
                stream.write(np.ascontiguousarray(part, dtype="<u2").data)
                stream.flush()
                os.fsync(stream.fileno())
            position += len(part)
            tokens = tokens[len(part) :]


def save_manifest(manifest: Manifest, folder: str | Path) -> None:
    """Write `manifest.json`, which makes the folder a finished one."""
    write_json(Path(folder) / MANIFEST_NAME, dataclasses.asdict(manifest))


def load_manifest(folder: str | Path) -> Manifest | None:
    """Read a folder's manifest; None where there is none.

    Raises:
        UserError: a missing folder, or a manifest that this version cannot read or that contradicts itself.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the folder of its shards, or text to prepare_data.py --files")
    if not folder.is_dir():
        command = f"prepare_data.py --output_dir {shlex.quote(str(folder))}"
        raise UserError(f"there is no data folder {folder}: make it with {command}")
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            for name in ("read", "train", "val", "validation_copies"):
                content[name] = Totals(**content[name])
            manifest = Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_if_refused(error, path)
        raise UserError(f"{path} is damaged ({error}): make the folder again with --overwrite") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    return manifest


def list_splits(folder: str | Path) -> list[Split]:
    """Return the splits of which `folder` has shards, in the order of `SPLITS`.

    Raises:
        UserError: a missing folder or a manifest that cannot be read.
    """
    manifest = load_manifest(folder)
    return [split for split in SPLITS if _list_names(Path(folder), split, manifest)]


def open_split(folder: str | Path, split: Split) -> list[np.ndarray]:
    """Memory-map the shards of a split, in order, each uint16 of shape `(tokens,)`.

    Raises:
        UserError: as `map_files`.
    """
    return list(map_files(folder, split).values())


def map_files(folder: str | Path, split: Split) -> dict[Path, np.ndarray]:
    """Memory-map the shards of a split, in order, by their files.

    Raises:
        UserError: a missing or unfinished folder, no shards of that split, or a shard that is damaged, truncated, of
            another type, or of another size than the manifest says.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if (folder / WORK_FOLDER).exists():
        raise UserError(f"{folder} is unfinished: run prepare_data.py again with the folder's final name")
    expected = {shard.file: shard.tokens for shard in manifest.shards} if manifest is not None else {}
    names = _list_names(folder, split, manifest)
    if not names:
        other_data = "" if list_splits(folder) else describe_other_data(folder)
        raise UserError(f"{folder} holds no {split} shards (names such as NAME_{split}_000001.npy){other_data}")
    shards = {}
    for name in names:
        tokens = map_shard(folder / name)
        if name in expected and len(tokens) != expected[name]:
            raise UserError(
                f"{folder / name} has {len(tokens):,} tokens where the manifest says {expected[name]:,}: make the "
                "folder again with --overwrite"
            )
        shards[folder / name] = tokens
    return shards


def map_shard(path: Path) -> np.ndarray:
    """Memory-map one shard, uint16 of shape `(tokens,)`.

    Raises:
        RefusedError: the machine does not let it be read.
        UserError: no file, or none that is a whole shard.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        state = "no file" if os.path.lexists(path) else "missing"
        raise UserError(f"{path} is {state}: make the folder again with --overwrite")
    try:
        if path.suffix == ".bin":
            return _map_tokens(path, *locate_tokens(path))
        tokens = np.load(path, mmap_mode="r")
        if isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.ndim == 1:
            return _map_tokens(path, tokens.offset, len(tokens))
    except UserError:
        raise
    except Exception as error:  # numpy's parser of headers raises any of Python's errors
        raise_if_refused(error, path)
        reason = f"it is {content}" if (content := describe_content(path)) not in (None, NUMPY) else error
        raise UserError(f"{path} is no whole .npy file ({reason}): make the folder again") from error
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} is an .npz archive: save its array of token ids alone, with numpy.save")
    raise UserError(
        f"{path} is an array of {tokens.dtype.str} and shape {tokens.shape}, not a 1-D array of uint16 token ids: "
        "prepare the data again, or save it as such with numpy if its numbers are ids below 65,536"
    )


def list_checksums(folder: str | Path, split: Split) -> list[str]:
    """Return the checksum of each shard of a split, in order: from the manifest, or computed if there is none.

    Raises:
        UserError: a missing folder or a manifest that cannot be read.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if manifest is not None:
        return [shard.checksum for shard in manifest.list_shards(split)]
    return [compute_checksum(folder / name) for name in _list_names(folder, split, None)]


def fingerprint_split(folder: str | Path, split: Split) -> str:
    """Return `sha256:<hex digest>` to recognize a split by: of its checksums or, without a manifest, of the names and
    sizes of its files, because a run cannot wait until a hundred shards are read.

    Raises:
        UserError: a missing folder or a manifest that cannot be read.
    """
    manifest = load_manifest(folder)
    if manifest is not None:
        facts = [[shard.tokens, shard.checksum] for shard in manifest.list_shards(split)]
    else:
        names = _list_names(Path(folder), split, None)
        facts = [[name, (Path(folder) / name).stat().st_size] for name in names]
    return f"sha256:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def iterate_chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a shard in chunks: the position of each chunk's first token, and the chunk as a plain array."""
    for start in range(0, len(tokens), TOKENS_PER_CHUNK):
        yield start, np.asarray(tokens[start : start + TOKENS_PER_CHUNK])


def read_tokens(shards: Iterable[np.ndarray], start: int, end: int) -> np.ndarray:
    """Return the tokens `[start, end)` of consecutive shards, counted from the first one's start, uint16."""
    pieces = [np.empty(0, np.uint16)]
    for tokens in shards:
        pieces.append(np.asarray(tokens[max(0, start) : max(0, end)]))
        start, end = start - len(tokens), end - len(tokens)
    return np.concatenate(pieces)


def describe_ids_beyond(tokens: np.ndarray, vocab_size: int) -> str:
    """Describe how many ids of a shard, which has some, are not below `vocab_size`, and where the first one is."""
    beyond = np.flatnonzero(tokens >= vocab_size)
    first = f"the first, {tokens[beyond[0]]}, at position {beyond[0]:,}"
    return f"holds {len(beyond):,} ids beyond the vocabulary of {vocab_size:,}, {first}"


def find_foreign_file(folder: str | Path) -> str | None:
    """Return the name of something in `folder` that does not belong to a folder of shards; `None` if all of it may be
    replaced. Hidden files, which file managers leave anywhere, do not count."""
    names = sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))
    shard = re.compile(r".*_(val|train)_\d{6}\.npy")
    known = {MANIFEST_NAME, WORK_FOLDER, PLAN_NAME, LOCK_NAME, INSPECTION_NAME, BASELINES_NAME}
    # Without shards, files of these names are the user's own.
    if any(name in (MANIFEST_NAME, PLAN_NAME) or shard.fullmatch(name) for name in names):
        known |= {TOKENIZER_FOLDER, TEXT_BYTES_NAME}
    for name in names:
        final_name = name.removesuffix(TEMPORARY_SUFFIX)
        if final_name not in known and not shard.fullmatch(final_name):
            return name
    return None


def _list_names(folder: Path, split: Split, manifest: Manifest | None) -> list[str]:
    if manifest is not None:
        return [shard.file for shard in manifest.list_shards(split)]
    pattern = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    paths = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    return sorted(path.name for path in paths if not is_question_file(path))


def _map_tokens(path: Path, offset: int, n_tokens: int) -> np.ndarray:
    """Map `n_tokens` ids from byte `offset` on, without keeping the file open as `np.memmap` does: a corpus may have
    more shards than a process may have open files."""
    with pa.memory_map(os.fsencode(path)) as file:
        return np.frombuffer(file.read_buffer(), "<u2", n_tokens, offset)
