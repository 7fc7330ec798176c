"""System errors, such as a full disk or a resource limit: distinguishing them from damaged files, and messages."""

import errno
import os
import resource
from pathlib import Path

# No permission, no space, or a failing disk.
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# Out of memory, file descriptors, processes or threads; or a file system or device that disappeared.
LIMITS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ESTALE, errno.ENOLCK, errno.ENODEV}
# Error numbers by a phrase in the message; the last is a RuntimeError of CPython.
SIGNS = {os.strerror(number): number for number in DISK_ERRORS | LIMITS} | {"can't start new thread": errno.EAGAIN}
# More than any command opens at once.
ENOUGH_OPEN_FILES = 1024


def find_system_error(error: BaseException | None) -> OSError | None:
    """Return the system error that caused an exception; `None` if there is none.

    Arrow, safetensors, tokenizers and torch raise their own exceptions, with the system's message only in the text;
    transformers raises another exception while handling the first.
    """
    while error is not None:
        number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
        if number not in SIGNS.values():
            number = next((number for sign, number in SIGNS.items() if sign in str(error)), None)
        if number is not None:
            return OSError(number, os.strerror(number), getattr(error, "filename", None))
        error = error.__cause__ or error.__context__
    return None


def find_unreadable(path: str | Path) -> OSError | None:
    """Return the error of opening a file, or any file directly in a folder; `None` if all open, or none exists.

    Some libraries report a file without read permission as missing.
    """
    try:
        os.stat(path)  # raises in a folder without search permission, where `isfile` returns false
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                names = sorted(entry.path for entry in entries if not entry.is_dir())
            return next(filter(None, map(find_unreadable, names)), None)
        if os.path.isfile(path):  # opening a pipe would block
            os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        pass
    except OSError as error:
        return error
    return None


def describe_system_error(system_error: OSError) -> str:
    """Describe a system error, with the limit to raise, if any."""
    what = (system_error.strerror or "") + (f", {system_error.filename}" if system_error.filename else "")
    limits = {
        errno.EMFILE: f"the limit is {get_limit('NOFILE')} per process (ulimit -n); {ENOUGH_OPEN_FILES} are enough",
        errno.ENFILE: "the limit is the machine's (sysctl fs.file-max)",
        errno.EAGAIN: f"the limit is {get_limit('NPROC')} threads per user (ulimit -u), possibly less in a container",
        errno.ENOMEM: f"the limit is {get_limit('AS', 1024)} kB per process (ulimit -v), possibly less in a container",
        errno.EFBIG: f"the limit is {get_limit('FSIZE', 1024)} kB per file (ulimit -f)",
    }
    return f"{what}: {limits[system_error.errno]}" if system_error.errno in limits else what


def get_limit(name: str, unit: int = 1) -> str:
    """Return the soft limit of a `getrlimit` resource, as `ulimit` prints it."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // unit}"
