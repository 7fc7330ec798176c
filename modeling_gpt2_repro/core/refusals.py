"""What the machine refuses, whatever it is asked about: told from damage, and said with the limit behind it."""

import errno
import os
import stat
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

# No memory, no file descriptors, no processes or threads, no permission, no room, or a disk that fails.
MACHINE_REFUSALS = (
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ENODEV),
)
NO_THREAD = "can't start new thread"  # CPython's RuntimeError
# More than anything here opens at once.
ENOUGH_OPEN_FILES = 1024


def find_refusal(error: BaseException | None) -> OSError | None:
    """Return what the machine refused, where that is what an exception came up for; `None` for any other reason.

    Arrow, safetensors, tokenizers and torch raise exceptions of their own, which have the number in their text alone,
    and transformers raises another one while it handles the first.
    """
    while error is not None:
        for number in MACHINE_REFUSALS:
            if getattr(error, "errno", None) == number or any(sign in str(error) for sign in _list_signs(number)):
                return OSError(number, os.strerror(number), getattr(error, "filename", None))
        if isinstance(error, MemoryError):
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        error = error.__cause__ or error.__context__
    return None


def _list_signs(number: int) -> tuple[str, ...]:
    return os.strerror(number), *((NO_THREAD,) if number == errno.EAGAIN else ())


def find_unreadable(path: str | Path) -> OSError | None:
    """Return why a file, or the first such file in a folder, cannot be opened; `None` if all can.

    Some libraries take what they may not open for missing.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            with os.scandir(path) as entries:
                names = sorted(entry.path for entry in entries if not entry.is_dir())
            return next(filter(None, map(find_unreadable, names)), None)
        if os.path.isfile(path):  # to open a pipe would wait for ever
            os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def describe_refusal(refusal: OSError) -> str:
    """Say what the machine refused, and which limit to raise where that helps."""
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
    soft = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] if resource is not None else -1
    return "unlimited" if resource is None or soft == resource.RLIM_INFINITY else f"{soft // unit}"
