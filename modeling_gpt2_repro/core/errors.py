"""User errors: one exception type, and the one place that turns it into a message and an exit code."""

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .environment import name_command
from .refusals import DISK_REFUSALS, describe_refusal, find_refusal, find_unreadable
from .streams import discard_unwritten, prepare_streams, write_line

USER_ERROR_EXIT_CODE = 2
# Errors of the operating system that are not bugs: also names too long, and paths that are no folder or no file.
SYSTEM_REFUSALS = DISK_REFUSALS | {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
# A message may repeat a value as long as a book.
LINE_CHARACTERS = 1500


class UserError(ValueError):
    """An error that the user can fix: the message states in one line what is wrong and what to do about it."""


class RefusedError(UserError):
    """A file could not be read for want of permission or resources: whether it is damaged is unknown."""


def raise_if_refused(error: Exception | None, path: str | Path) -> None:
    """Raise a `RefusedError` if the machine, and not the content of a file or folder, is why reading it failed.

    Args:
        error: raised by the read; `None` if something was found to be missing.
    """
    refusal = find_refusal(error) or find_refusal(find_unreadable(path))
    if refusal is not None:
        raise RefusedError(
            f"{path} could not be read, which says nothing about what is in it ({describe_refusal(refusal)}): put "
            "that right, and give the same command again"
        ) from error


def reports_user_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a script's `main(argv) -> exit code`: a `UserError` becomes one line on stderr and exit code 2.

    So do errors of the machine, such as a full disk. Ctrl-C gives exit code 130, as in other commands. Any other
    exception is a bug and keeps its traceback. Printing works in any encoding.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        prepare_streams()
        try:
            code = main(argv)
            sys.stdout.flush()  # raises here, not at exit, if nobody reads the pipe or the disk is full
            return code
        except UserError as error:
            return _report(str(error))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            return 128 + signal.SIGPIPE
        except BaseException as error:
            if (explanation := _explain_refusal(error)) is None:
                raise
            return _report(explanation)
        finally:
            discard_unwritten()

    return wrapper


def _explain_refusal(error: BaseException) -> str | None:
    """Return what to do about an error of the machine; `None` for any other error."""
    is_rust_panic = type(error).__module__ == "pyo3_runtime"  # not an `Exception`
    if not isinstance(error, OSError | MemoryError | RuntimeError) and not is_rust_panic:
        return None
    refusal = find_refusal(error)
    if refusal is not None and refusal.errno not in SYSTEM_REFUSALS:
        return f"{describe_refusal(refusal)}: put that right, and give the same command again"
    if isinstance(error, OSError) and error.errno in SYSTEM_REFUSALS:
        return f"{error.strerror}: {error.filename or 'the disk'}: give another name, or put that right"
    return None


def _report(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # every process of a launch finds the same mistake
        write_line(f"{name_command()}: error: {format_line(message)}", sys.stderr)
    return USER_ERROR_EXIT_CODE


def format_line(message: str) -> str:
    """Return a message as one line without control characters, the middle of a very long one left out."""
    line = escape_controls(" ".join(message.split()))
    half = LINE_CHARACTERS // 2
    return line if len(line) <= LINE_CHARACTERS else f"{line[:half]} [...] {line[-half:]}"


def escape_controls(text: str) -> str:
    """Replace all that a terminal would interpret or not show by Python escapes, except spaces and line breaks."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )
