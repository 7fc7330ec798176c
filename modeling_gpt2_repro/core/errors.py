"""User errors: the exception types, and the decorator that turns them into one line on stderr and an exit code."""

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from .environment import name_command
from .streams import discard_unwritten, prepare_streams, write_line
from .system_errors import DISK_ERRORS, describe_system_error, find_system_error, find_unreadable

USER_ERROR_EXIT_CODE = 2
# Operating-system errors that are not bugs, including overlong names and a file where a folder should be.
SYSTEM_ERRORS = DISK_ERRORS | {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
# Longest message, because one may quote a value of any length.
LINE_CHARACTERS = 1500


class UserError(ValueError):
    """An error that the user can fix: the message states what is wrong, where, and what to do about it."""


class UnreadableError(UserError):
    """A file that could not be read because of permissions or resource limits; whether it is damaged is unknown."""


def raise_if_unreadable(error: Exception | None, path: str | Path) -> None:
    """Raise a `UnreadableError` if reading a file or folder failed because of the system rather than its content.

    Args:
        error: the exception of the read; `None` if a file was reported missing.

    Raises:
        UnreadableError: a permission, a resource limit or the disk prevented the read.
    """
    system_error = find_system_error(error) or find_system_error(find_unreadable(path))
    if system_error is not None:
        raise UnreadableError(
            f"{path} could not be read, and may be intact ({describe_system_error(system_error)}): fix this and run "
            "the same command again"
        ) from error


class Main(Protocol):
    """A script's `main`: `argv` (default: the arguments of this process) to an exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def reports_user_errors(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Decorate a script's `main(argv) -> exit code`: a `UserError` becomes one line on stderr and exit code 2.

    System errors such as a full disk are reported the same way. Ctrl-C exits with code 130, as in other commands. Any
    other exception is a bug and keeps its traceback. Printing works in any encoding.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        prepare_streams()
        try:
            code = main(argv)
            sys.stdout.flush()  # a closed pipe or a full disk must raise here, not at exit
            return code
        except UserError as error:
            return _report(str(error))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:  # the reader, such as `head`, closed the pipe
            return 128 + signal.SIGPIPE
        except BaseException as error:
            if (explanation := _explain_system_error(error)) is None:
                raise
            return _report(explanation)
        finally:
            discard_unwritten()

    return wrapper


def _explain_system_error(error: BaseException) -> str | None:
    """Return a message for a system error; `None` for any other error."""
    is_rust_panic = type(error).__module__ == "pyo3_runtime"  # not an `Exception`
    if not isinstance(error, OSError | MemoryError | RuntimeError) and not is_rust_panic:
        return None
    system_error = find_system_error(error)
    if system_error is not None and system_error.errno not in SYSTEM_ERRORS:
        return f"{describe_system_error(system_error)}: fix this and run the same command again"
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        return f"{error.strerror}: {error.filename or 'the disk'}: fix this or choose another path"
    return None


def _report(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # every rank detects the same mistake
        write_line(f"{name_command()}: error: {format_line(message)}", sys.stderr)
    return USER_ERROR_EXIT_CODE


def format_line(message: str) -> str:
    """Return a message as one line without control characters; the middle of a very long one is elided."""
    line = escape_controls(" ".join(message.split()))
    half = LINE_CHARACTERS // 2
    return line if len(line) <= LINE_CHARACTERS else f"{line[:half]} [...] {line[-half:]}"


def escape_controls(text: str) -> str:
    """Replace characters that a terminal would interpret or not display by Python escapes; keep line breaks."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )
