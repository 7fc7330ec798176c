"""The data folder: format of its shards and manifest.

A folder contains 1-D uint16 arrays of token ids, `PREFIX_val_000000.npy`, `PREFIX_train_000001.npy`, ..., and
`manifest.json`, which is written last. It also contains the tokenizer that the shards were written with, which makes
it self-contained. Folders without a manifest, such as those of build-nanogpt's `fineweb.py`, and the `.bin` files of
other programs (`foreign_shards.py`) can be read too.
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

from ..core.errors import UserError, raise_if_unreadable
from ..core.file_kinds import NUMPY, describe_content
from ..core.files import TEMPORARY_SUFFIX, compute_checksum, sync_folder, write_json
from .foreign_shards import describe_other_data, is_question_file, locate_tokens

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("val", "train")

MANIFEST_NAME = "manifest.json"
# Models' scores on the validation split, which `train.py --eval_only` caches beside it.
BASELINES_NAME = "baselines.json"
FORMAT_VERSION = 1
# Marks a folder that is being written, or whose writer was killed.
WORK_FOLDER = "unfinished"
# Also files of an unfinished folder; a writer that was killed at the very end leaves them in the finished one.
PLAN_NAME, LOCK_NAME = "plan.json", "lock"
# The tokenizer that the shards were written with, saved by `save_pretrained`.
TOKENIZER_FOLDER = "tokenizer"
# UTF-8 bytes of each validation document (`text_bytes.py`). The name must not contain a split: build-nanogpt's loader
# would take the file for a shard.
TEXT_BYTES_NAME = "text_bytes.npy"
# Figure drawn by `prepare_data.py --inspect`.
INSPECTION_NAME = "inspection.png"

# Shards store ids as uint16.
MAX_VOCAB_SIZE = 2**16
# Tokens per chunk in a pass over a shard: 2 MB of ids, which fit in the CPU cache.
TOKENS_PER_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file; `documents` is the number that start in it."""

    file: str
    split: Split
    documents: int
    tokens: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Number of documents, of tokens (including one end-of-text id per document), and of UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents and provenance of a data folder.

    Attributes:
        settings: the settings that determine the result, to detect that a request is already fulfilled.
        read: all documents that were read: the sum of `train`, `val` and `validation_copies`.
        validation_copies: training documents dropped because their text equals a validation document's.
        duplicates: training documents kept although their text equals an earlier training document's.
        empty_documents: documents skipped because they are null, empty, or have no tokens.
        validation_ends_inside_document: whether the last validation document continues in the training split.
        other_files: checksums of the other files of the folder, by relative path; empty for older folders.

    Raises:
        TypeError: a field has the wrong type or a negative count.
        ValueError: fields contradict each other, or a path leads out of the folder.
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

    def __post_init__(self) -> None:
        _check_types(self)
        for counted in (self.read, self.train, self.val, self.validation_copies, *self.shards):
            _check_types(counted)
        if not 0 < self.vocab_size <= MAX_VOCAB_SIZE or not 0 <= self.eot_id < self.vocab_size:
            raise ValueError(f"{self.vocab_size} ids with the end-of-text id {self.eot_id}")
        for file in self.source.get("files", []):
            if not isinstance(file["path"], str):
                raise TypeError(f"source: {file!r:.80}")
        for shard in self.shards:
            # Comparing with `Path.name` alone would accept "..".
            if Path(shard.file).name != shard.file or shard.file in ("", ".."):
                raise ValueError(f"{shard.file!r} is not a file of its folder")
        for name, checksum in self.other_files.items():
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name, re.ASCII) or not isinstance(checksum, str):
                raise ValueError(f"other_files: {name!r:.80} is not a file of its folder with a checksum")
        kept = self.train + self.val + self.validation_copies
        for unit in ("documents", "tokens", "bytes"):
            if getattr(self.read, unit) != getattr(kept, unit):
                raise ValueError(f"{unit} of the splits do not add up to those read")
        for split in SPLITS:
            if getattr(self, split).tokens != sum(shard.tokens for shard in self.list_shards(split)):
                raise ValueError(f"tokens of the {split} shards do not add up to those of the split")


def _check_types(record: Any) -> None:
    """Check a deserialized dataclass against its fields' types; counts must be integers in [0, 2**64)."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type is Split:
            is_right = value in SPLITS
        elif field.type is int:
            is_right = type(value) is int and 0 <= value < 2**64
        else:
            kind: Any = field.type
            is_right = isinstance(value, typing.get_origin(kind) or kind)
        if not is_right:
            raise TypeError(f"{field.name}: {value!r:.80}")


class SplitWriter:
    """Writes the tokens of one split to its shards of `shard_size` tokens, at any position and in any order.

    Shards are created at full length first, which lets workers write to them independently.
    """

    def __init__(self, folder: Path, prefix: str, split: Split, first_number: int, tokens: int, shard_size: int):
        self.folder = folder
        self.split = split
        self.shard_size = shard_size
        sizes = [min(shard_size, tokens - start) for start in range(0, tokens, shard_size)]
        self.names = [f"{prefix}_{split}_{first_number + i:06d}.npy" for i in range(len(sizes))]
        self.sizes = sizes

    def create_files(self) -> None:
        """Write every shard's header and extend the file to its full length. Tokens already written are kept."""
        for name, size in zip(self.names, self.sizes, strict=True):
            # Opened without truncation: other processes may be doing the same or writing tokens.
            with os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
                header = {"descr": "<u2", "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(stream, header)
                stream.truncate(stream.tell() + 2 * size)
        sync_folder(self.folder)  # otherwise a power loss could remove the names of files with durable content

    def write(self, position: int, tokens: np.ndarray) -> None:
        """Write `tokens`, uint16, durably at `position`, in tokens from the start of the split."""
        while len(tokens):
            index, start = divmod(position, self.shard_size)
            part = tokens[: self.shard_size - start]
            path = self.folder / self.names[index]
            # Write-only, because for files open for reading too, NFS writes whole pages, over other workers' tokens.
            with os.fdopen(os.open(path, os.O_WRONLY), "wb") as stream:
                stream.seek(path.stat().st_size - 2 * self.sizes[index] + 2 * start)
                stream.write(np.ascontiguousarray(part, dtype="<u2").data)
                stream.flush()
                os.fsync(stream.fileno())
            position += len(part)
            tokens = tokens[len(part) :]


def save_manifest(manifest: Manifest, folder: str | Path) -> None:
    """Write `manifest.json`, which marks the folder as finished."""
    write_json(Path(folder) / MANIFEST_NAME, dataclasses.asdict(manifest))


def load_manifest(folder: str | Path) -> Manifest | None:
    """Load a folder's manifest; return `None` if there is none.

    Raises:
        UserError: the folder is missing, or its manifest is damaged, inconsistent or of another format version.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give a folder of shards, or pass text to prepare_data.py --files")
    if not folder.is_dir():
        command = f"prepare_data.py --output_dir {shlex.quote(str(folder))}"
        raise UserError(f"there is no data folder {folder}: create it with {command}")
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
            return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_if_unreadable(error, path)
        raise UserError(f"{path} is damaged ({error}): rebuild the folder with --overwrite") from error
    raise UserError(f"{path} has format version {version}, but this version reads only {FORMAT_VERSION}")


def list_splits(folder: str | Path) -> list[Split]:
    """Return the splits that have shards in `folder`, in the order of `SPLITS`.

    Raises:
        UserError: as `load_manifest`.
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
    """Memory-map the shards of a split, in order, keyed by path.

    Raises:
        UserError: the folder is missing or unfinished, the split has no shards, or a shard is damaged, truncated, of
            the wrong type, or differs in size from the manifest.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if (folder / WORK_FOLDER).exists():
        raise UserError(f"{folder} is unfinished: run prepare_data.py again with the final --output_dir")
    expected = {shard.file: shard.tokens for shard in manifest.shards} if manifest is not None else {}
    names = _list_names(folder, split, manifest)
    if not names:
        other_data = "" if list_splits(folder) else describe_other_data(folder)
        raise UserError(f"{folder} has no {split} shards (named like NAME_{split}_000001.npy){other_data}")
    shards = {}
    for name in names:
        tokens = map_shard(folder / name)
        if name in expected and len(tokens) != expected[name]:
            raise UserError(
                f"{folder / name} has {len(tokens):,} tokens, but the manifest lists {expected[name]:,}: rebuild the "
                "folder with --overwrite"
            )
        shards[folder / name] = tokens
    return shards


def map_shard(path: Path) -> np.ndarray:
    """Memory-map one shard, uint16 of shape `(tokens,)`.

    Raises:
        UnreadableError: a permission, a resource limit or the disk prevented the read.
        UserError: the file is missing, or is not a complete shard.
    """
    if not path.is_file():  # opening a pipe would block forever
        state = "not a file" if os.path.lexists(path) else "missing"
        raise UserError(f"{path} is {state}: rebuild the folder with --overwrite")
    try:
        if path.suffix == ".bin":
            return _map_tokens(path, *locate_tokens(path))
        tokens = np.load(path, mmap_mode="r")
        if isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.ndim == 1:
            return _map_tokens(path, tokens.offset, len(tokens))
    except UserError:
        raise
    except Exception as error:  # numpy's header parser raises errors of any type
        raise_if_unreadable(error, path)
        reason = f"it is {content}" if (content := describe_content(path)) not in (None, NUMPY) else error
        raise UserError(f"{path} is not a complete .npy file ({reason}): rebuild the folder") from error
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} is an .npz archive: save the array of token ids alone, with numpy.save")
    raise UserError(
        f"{path} is an array of {tokens.dtype.str} and shape {tokens.shape}, not a 1-D array of uint16 token ids: "
        "prepare the data again, or convert it with numpy if its values are ids below 65,536"
    )


def list_checksums(folder: str | Path, split: Split) -> list[str]:
    """Return the checksum of each shard of a split, in order: from the manifest, or computed if there is none.

    Raises:
        UserError: as `load_manifest`.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    if manifest is not None:
        return [shard.checksum for shard in manifest.list_shards(split)]
    return [compute_checksum(folder / name) for name in _list_names(folder, split, None)]


def fingerprint_split(folder: str | Path, split: Split) -> str:
    """Return `sha256:<hex digest>` that identifies a split.

    It is computed from the shards' checksums in the manifest. Without a manifest it is computed from file names and
    sizes, because a run cannot wait for a hundred shards to be hashed.

    Raises:
        UserError: as `load_manifest`.
    """
    manifest = load_manifest(folder)
    if manifest is not None:
        facts = [[shard.tokens, shard.checksum] for shard in manifest.list_shards(split)]
    else:
        names = _list_names(Path(folder), split, None)
        facts = [[name, (Path(folder) / name).stat().st_size] for name in names]
    return f"sha256:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def iterate_chunks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a shard's chunks, each as the position of its first token and a plain array."""
    for start in range(0, len(tokens), TOKENS_PER_CHUNK):
        yield start, np.asarray(tokens[start : start + TOKENS_PER_CHUNK])


def read_tokens(shards: Iterable[np.ndarray], start: int, end: int) -> np.ndarray:
    """Return tokens `[start, end)` of the concatenated shards, uint16."""
    pieces = [np.empty(0, np.uint16)]
    for tokens in shards:
        pieces.append(np.asarray(tokens[max(0, start) : max(0, end)]))
        start, end = start - len(tokens), end - len(tokens)
    return np.concatenate(pieces)


def describe_ids_beyond(tokens: np.ndarray, vocab_size: int) -> str:
    """Describe how many ids of a shard are not below `vocab_size` (at least one must be), and where the first is."""
    beyond = np.flatnonzero(tokens >= vocab_size)
    first = f"the first, {tokens[beyond[0]]}, at position {beyond[0]:,}"
    return f"has {len(beyond):,} ids beyond the vocabulary of {vocab_size:,}, {first}"


def find_foreign_file(folder: str | Path) -> str | None:
    """Return the name of an entry of `folder` that is not part of a data folder; `None` if all may be replaced.

    Hidden files, which file managers create anywhere, are ignored.
    """
    names = sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))
    shard = re.compile(r".*_(val|train)_\d{6}\.npy")
    known = {MANIFEST_NAME, WORK_FOLDER, PLAN_NAME, LOCK_NAME, INSPECTION_NAME, BASELINES_NAME}
    # Without shards, entries with these names are the user's.
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
    """Memory-map `n_tokens` ids starting at byte `offset`.

    Unlike `np.memmap`, this does not keep the file open: a corpus may have more shards than the open-file limit.
    """
    with pa.memory_map(os.fsencode(path)) as file:
        return np.frombuffer(file.read_buffer(), "<u2", n_tokens, offset)
