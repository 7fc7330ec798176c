"""Atomic and durable writing of files and folders, and checksums.

If the process dies or fails at any system call, a path refers either to the complete old or to the complete new
content, and the old content is removed only once all of the new is on disk. On file systems that cannot swap two
folders, this holds after `restore_folder`. POSIX only: renames are made durable by fsync of the parent folder.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, Literal

from .errors import UserError

# Suffix of a file or folder until it is complete.
TEMPORARY_SUFFIX = ".partial"
# Suffix of a folder while it is being replaced. Unique to this package, which restores or deletes such folders without
# asking.
REPLACED_SUFFIX = ".replaced-by-gpt2-repro"
# linux/fcntl.h, linux/fs.h
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# How long to wait for another process that is writing the same file.
LOCK_SECONDS = 10.0
# Errors of file systems without locks, such as some network file systems.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
LockState = Literal["ours", "held", "unsupported"]
# Errors of kernels and file systems that cannot swap two names (NFS, some overlayfs).
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)


def follow_links(path: str | Path) -> Path:
    """Return the absolute path with links resolved. Unlike `Path.resolve`, accepts a link that points to itself."""
    return Path(os.path.realpath(path))


def check_writable(path: str | Path, is_folder: bool = False) -> None:
    """Check, before the work starts, that its result can be written to `path`, following links.

    Args:
        is_folder: the result is a folder that replaces `path`, which is impossible for a mount point.

    Raises:
        UserError: the path cannot be written; the message has `path` and the target of its links.
    """
    place = follow_links(path)
    named = str(path) if place == Path(os.path.abspath(path)) else f"{path}, which points to {place}"
    if place.is_symlink():
        raise UserError(f"{path} is a link that points to itself: choose another path or remove the link")
    if place.exists() and not place.is_file() and not place.is_dir():
        return  # a device or a pipe
    existing = next(parent for parent in place.parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {named}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {named}: no permission to write to {existing}")
    if is_folder and place.is_mount():
        raise UserError(f"cannot replace {named}: it is a mount point; choose a folder below it")


def resolve_target(path: str | Path) -> Path:
    """Return `path` with links resolved; if it is a link, create its target's parent folder.

    Raises:
        OSError: the link points to itself, or the folder cannot be created.
    """
    place = follow_links(path)
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if Path(path).is_symlink():
        make_folder(place.parent)
    return place


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is valid UTF-8, which text files and libraries not written in Python require."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))  # Python's escapes of other bytes


@contextlib.contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Generator[IO[Any]]:
    """Open a file for writing that replaces `path` only once it is complete and on disk.

    On an exception the temporary file is removed and `path` stays unchanged. Devices and pipes, such as `/dev/null`,
    are written to directly.
    """
    path, encoding = resolve_target(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    temporary = _get_temporary(path)
    with os.fdopen(_open_exclusively(temporary), mode, encoding=encoding) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _open_exclusively(path: Path) -> int:
    """Create a temporary file, or empty a leftover one, once no other process writes to it; return its descriptor."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        if path.is_symlink():  # opening it would write to its target
            path.unlink()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_held = try_lock(descriptor) == "held" and time.monotonic() < deadline  # the other process may be hung
        if not is_held and is_file_at(descriptor, path):
            if os.fstat(descriptor).st_size:
                os.ftruncate(descriptor, 0)
            return descriptor
        os.close(descriptor)
        time.sleep(0.01)


def try_lock(descriptor: int, is_exclusive: bool = True) -> LockState:
    """Try to lock a file until it is closed, exclusively or shared, without waiting for the process that holds it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if is_exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return "unsupported"
    return "ours"


def is_file_at(descriptor: int, path: Path) -> bool:
    """Return whether `path` still refers to this open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


@contextlib.contextmanager
def create_folder_atomically(path: str | Path) -> Generator[Path]:
    """Yield an empty temporary folder beside `path` that replaces `path` on success, once all of it is on disk.

    On an exception the temporary folder is removed and `path` stays unchanged.
    """
    path = resolve_target(path)  # a link is kept, and its target is replaced
    temporary = _get_temporary(path)
    clear_leftovers(path)
    make_folder(path.parent)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        old = rename_over(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def rename_over(new: Path, path: Path) -> Path | None:
    """Rename `new` to `path`, and return the new name of the folder that was there, if any.

    On an exception both folders have their original names.
    """
    if not path.exists():
        os.replace(new, path)
        return None
    if _exchange(new, path):
        return new
    # Not atomic: if the process dies between the two renames, `restore_folder` undoes the first.
    replaced = set_aside(path, path)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(replaced, path)
        raise
    return replaced


def set_aside(old: Path, path: Path) -> Path:
    """Rename `old` to the path from which `restore_folder(path)` restores, or which it deletes; return that path."""
    replaced = _get_replaced(path)
    os.replace(old, replaced)
    return replaced


def remove_folder(path: str | Path) -> None:
    """Delete a folder if it exists. It vanishes from `path` atomically; a link to it is kept, dangling."""
    path = follow_links(path)
    clear_leftovers(path)
    if path.is_dir():
        os.replace(path, _get_temporary(path))
        clear_leftovers(path)


def restore_folder(path: str | Path) -> None:
    """Complete or undo an interrupted replacement of `path`."""
    path = follow_links(path)
    replaced = _get_replaced(path)
    if path.exists():
        _remove(replaced)
    elif replaced.exists():
        os.replace(replaced, path)
        sync_folder(path.parent)


def clear_leftovers(path: str | Path) -> None:
    """Clean up after a process that was killed while it was writing, replacing or deleting a folder."""
    restore_folder(path)
    _remove(_get_temporary(follow_links(path)))


def _get_temporary(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def _get_replaced(path: Path) -> Path:
    return path.with_name(path.name + REPLACED_SUFFIX)


def _remove(leftover: Path) -> None:
    """Delete a folder, if it exists, after making its siblings' names durable."""
    if leftover.is_symlink():  # the target is not ours to delete
        leftover.unlink()
    elif leftover.exists():
        sync_folder(leftover.parent)
        shutil.rmtree(leftover, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably, following links."""
    path = follow_links(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)  # even if it exists: its creator may have been killed before the sync


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically; return `False` if the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # Linux only
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with open_atomically(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def compute_checksum(path: str | Path) -> str:
    """Return `sha256:<hex digest>` of a file's bytes."""
    with open(path, "rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def sync_tree(folder: Path) -> None:
    """Make a folder and everything in it durable (fsync)."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def sync_file(path: str | Path) -> None:
    """Make a file's content durable, even if another process wrote it."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names of a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
