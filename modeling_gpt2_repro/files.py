"""Files that appear whole or not at all, and their checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".partial"


def follow_links(path: str | Path) -> Path:
    """Return the absolute path without links; unlike `Path.resolve`, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is complete and on disk.

    On an exception the temporary file is removed and whatever stood at `path` before stays as it was. A device or a
    pipe, such as `/dev/null`, is written to.
    """
    path, encoding = follow_links(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, mode, encoding=encoding) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def create_folder_atomically(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes `path`'s name, replacing it, on success.

    Every file in it is synchronised to disk first. On an exception the temporary folder is removed.
    """
    path = follow_links(path)  # a link stays one, and what it points at is replaced
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with open_atomically(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def check_weight_names(folder: str | Path) -> None:
    """Check what the index of a model in several files calls them; transformers would follow a path out of `folder`.

    Raises:
        ValueError: an index is damaged, or names a file that is not in the folder.
    """
    for index in Path(folder).glob("*.index.json") if Path(folder).is_dir() else ():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{index} names {name!r}, which is not a file of its folder")


def compute_checksum(path: str | Path) -> str:
    """Return `sha256:<hex digest>` of a file's bytes."""
    with open(path, "rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def identify_weights(folder: str | Path) -> str | None:
    """Return what tells the weights in a model folder from others: the checksum of their file, or of all checksums.

    `None` where there are none, as for the name of a model on the Hub.
    """
    checksums = [f"{compute_checksum(path)} {path.name}" for path in sorted(Path(folder).glob("*.safetensors"))]
    if len(checksums) > 1:
        return f"sha256:{hashlib.sha256(chr(10).join(checksums).encode()).hexdigest()}"
    return checksums[0].split()[0] if checksums else None


def sync_tree(folder: Path) -> None:
    """Make all files under `folder` durable."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make a rename in `folder` durable (POSIX needs the folder itself synchronised)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
