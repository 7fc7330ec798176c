"""Errors of the machine itself, such as a full disk or a limit: told apart from damaged files, and explained."""

import errno
import os
import resource
from pathlib import Path

# No permission, no room, or a disk that fails.
DISK_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
# No memory, file descriptors, processes or threads; or a file system or a device that is gone.
LIMITS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ESTALE, errno.ENOLCK, errno.ENODEV}
# The errors by what messages contain; the last one is a RuntimeError of CPython.
SIGNS = {os.strerror(number): number for number in DISK_REFUSALS | LIMITS} | {"can't start new thread": errno.EAGAIN}
# More than any command opens at once.
ENOUGH_OPEN_FILES = 1024


def find_refusal(error: BaseException | None) -> OSError | None:
    """Return the error of the machine that caused an exception; `None` if the cause is another one.

    Arrow, safetensors, tokenizers and torch raise exceptions of their own, with the system's message in their text
    only, and transformers raises another one while it handles the first.
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
    """Return why a file, or a file directly in a folder, cannot be opened; `None` if all can, or none exists.

    Some libraries report a file that may not be opened as missing.
    """
    try:
        os.stat(path)  # raises where `isfile` is false: in a folder that may not be searched
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


def describe_refusal(refusal: OSError) -> str:
    """Describe an error of the machine, with the limit to raise if there is one."""
    what = refusal.strerror + (f", {refusal.filename}" if refusal.filename else "")
    limits = {
        errno.EMFILE: f"a process may have {get_limit('NOFILE')} (ulimit -n), and {ENOUGH_OPEN_FILES} are enough",
        errno.ENFILE: "the limit is the whole machine's (sysctl fs.file-max)",
        errno.EAGAIN: f"a user may have {get_limit('NPROC')} processes and threads (ulimit -u), a container fewer",
        errno.ENOMEM: f"a process may have {get_limit('AS', 1024)} kB (ulimit -v), the machine or its container fewer",
        errno.EFBIG: f"a file may have {get_limit('FSIZE', 1024)} kB (ulimit -f)",
    }
    return f"{what}: {limits[refusal.errno]}" if refusal.errno in limits else what


def get_limit(name: str, unit: int = 1) -> str:
    """Return the soft limit of a resource of `getrlimit`, as `ulimit` shows it."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // unit}"
