"""Files and folders that appear whole or not at all, and stay when the power fails; and checksums.

Whatever system call is the last one of a process, or fails: a name refers to the old content or to the new one, and
all of the new one is on the disk before the old one is removed.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from modeling_gpt2_repro.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY_SUFFIX = ".partial"
# Of a folder whose name another one has taken. What has it is ours to restore or to delete, so nobody else may use it.
REPLACED_SUFFIX = ".replaced-by-gpt2-repro"
# linux/fcntl.h, linux/fs.h
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# How long one process waits until another one has written the same file.
LOCK_SECONDS = 10.0
# What file systems say that cannot lock, as some that clusters share.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
LockState = Literal["ours", "held", "unsupported"]
# What kernels and file systems say that cannot swap two names (NFS, some of overlayfs).
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)


def follow_links(path: str | Path) -> Path:
    """Return the absolute path without links; unlike `Path.resolve`, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


def check_place(path: str | Path, is_folder: bool = False) -> None:
    """Check, before the work, that its result can be written to `path`, or to where links lead from there.

    Args:
        is_folder: it will be a folder that takes the place of another, which a mounted disk's cannot.

    Raises:
        UserError: it cannot; the message names `path` and where it leads.
    """
    place = follow_links(path)
    named = str(path) if place == Path(os.path.abspath(path)) else f"{path}, which leads to {place}"
    if place.is_symlink():
        raise UserError(f"{path} is a link that leads to itself: give another name, or remove the link")
    if place.exists() and not place.is_file() and not place.is_dir():
        return  # a device or a pipe
    existing = next(parent for parent in place.parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write {named}: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {named}: you may not write to {existing}")
    if is_folder and place.is_mount():
        raise UserError(f"cannot replace {named}: a disk is mounted there. Let it be a folder on that disk")


def make_way(path: str | Path) -> Path:
    """Return where `path` is written, links followed, and create the folder that a link there leads into.

    Raises:
        OSError: a link leads to itself, or nothing can be created where it leads.
    """
    place = follow_links(path)
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if Path(path).is_symlink():
        make_folder(place.parent)
    return place


def is_utf8(path: str | Path) -> bool:
    """Tell whether a name is one that text files can hold, and libraries in other languages than Python take."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))  # how Python spells other bytes


@contextlib.contextmanager
def open_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that takes its name only once it is complete and on disk.

    On an exception the temporary file is removed and whatever stood at `path` before stays as it was. A device or a
    pipe, such as `/dev/null`, is written to.
    """
    path, encoding = make_way(path), None if "b" in mode else "utf-8"
    if path.exists() and not path.is_file():
        with open(path, mode, encoding=encoding) as stream:
            yield stream
        return
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with os.fdopen(_open_alone(temporary), mode, encoding=encoding) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _open_alone(path: Path) -> int:
    """Create a temporary file, or empty one that is left over, once no other process writes to it."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        if path.is_symlink():  # it would be written through
            path.unlink()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # The wait ends, whatever holds up the other process.
        if try_lock(descriptor) != "held" or time.monotonic() > deadline:
            if is_file_at(descriptor, path):
                break
        else:
            time.sleep(0.01)
        os.close(descriptor)
    if os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, 0)
    return descriptor


def try_lock(descriptor: int, is_exclusive: bool = True) -> LockState:
    """Lock a file, exclusively or shared with others, until it is closed, if no other process holds it."""
    if fcntl is None:
        return "unsupported"
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
    """Tell whether an open file still has this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


@contextlib.contextmanager
def create_folder_atomically(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that takes `path`'s name, replacing it, on success.

    All of it is synchronised to disk first. On an exception the temporary folder is removed, as is one that was there
    before.
    """
    path = make_way(path)  # a link stays one, and what it points at is replaced
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    clear_leftovers(path)
    make_folder(path.parent)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        old = take_name(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def take_name(new: Path, path: Path) -> Path | None:
    """Rename `new` to `path`, and return what the folder is called now that had this name, if one had.

    On an exception both have the names that they had before.
    """
    if not path.exists():
        os.replace(new, path)
        return None
    if _exchange(new, path):
        return new
    # For a moment neither has the name: `restore_folder` gives it back if this is the last moment.
    replaced = set_aside(path, path)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(replaced, path)
        raise
    return replaced


def set_aside(old: Path, path: Path) -> Path:
    """Rename `old` to what `restore_folder(path)` restores or deletes, and return that."""
    replaced = path.with_name(path.name + REPLACED_SUFFIX)
    os.replace(old, replaced)
    return replaced


def remove_folder(path: str | Path) -> None:
    """Delete a folder, if it is there, so that no half of it is left under its name; a link to it stays."""
    path = follow_links(path)
    clear_leftovers(path)
    if path.is_dir():
        os.replace(path, path.with_name(path.name + TEMPORARY_SUFFIX))
        clear_leftovers(path)


def restore_folder(path: str | Path) -> None:
    """Undo a replacement of `path` that a kill or a loss of power cut short, or remove what it replaced."""
    path = follow_links(path)
    replaced = path.with_name(path.name + REPLACED_SUFFIX)
    if path.exists():
        _remove(replaced)
    elif replaced.exists():
        os.replace(replaced, path)
        sync_folder(path.parent)


def clear_leftovers(path: str | Path) -> None:
    """Put right what is left beside a folder of a process that was killed while it wrote, replaced or deleted it."""
    restore_folder(path)
    path = follow_links(path)
    _remove(path.with_name(path.name + TEMPORARY_SUFFIX))


def _remove(leftover: Path) -> None:
    """Delete a folder, if it is there, once it is durable that another one has its name."""
    if leftover.is_symlink():  # where it leads is somebody else's
        leftover.unlink()
    elif leftover.exists():
        sync_folder(leftover.parent)
        shutil.rmtree(leftover, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Create a folder, where links lead, and those above it that are missing, durably."""
    path = follow_links(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)  # where it is there already, a process may have been killed before it came to this


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step, and tell whether this system can."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if not hasattr(libc, "renameat2"):
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
    """Make a folder and all files and folders in it durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def sync_file(path: str | Path) -> None:
    """Make what was written to a file durable, by whomever."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable (POSIX wants that of the folder itself)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
