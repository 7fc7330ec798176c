"""Mistakes of the user's: one exception type, and the one place that turns it into an exit code."""

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from modeling_gpt2_repro.core.environment import name_command
from modeling_gpt2_repro.core.refusals import describe_refusal, find_refusal, find_unreadable
from modeling_gpt2_repro.core.streams import discard_unwritten, prepare_streams, write_line

USER_ERROR_EXIT_CODE = 2
# What the operating system refuses whoever asks: names too long, things that are no folder or no file, no permission,
# a full or a broken disk.
SYSTEM_REFUSALS = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}
# A value that a message repeats may be a whole book.
LINE_CHARACTERS = 1500


class UserError(ValueError):
    """Something that the user can put right: the message says in one line what is wrong and what to do about it."""


class RefusedError(UserError):
    """The machine refused a file, or what it takes to read it: whether anything is wrong with it is not known."""


def raise_if_refused(error: Exception | None, path: str | Path) -> None:
    """Raise a `RefusedError` where the machine, and nothing in a file or a folder, is why reading it raised `error`.

    Args:
        error: `None` where something was found to be missing.
    """
    refusal = find_refusal(error) or find_refusal(find_unreadable(path))
    if refusal is not None:
        raise RefusedError(
            f"{path} could not be read, which says nothing about what is in it ({describe_refusal(refusal)}): put "
            "that right, and give the same command again"
        ) from error


def reports_user_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a script's `main(argv) -> exit code`: a `UserError` becomes one line on stderr and exit code 2.

    So does what the operating system refuses whoever asks. Ctrl-C becomes 130, as of other commands. Any other
    exception passes through with its traceback, because it is a bug of ours and not a mistake of the user's. Whatever
    is printed can be, in any encoding.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        prepare_streams()
        try:
            code = main(argv)
            sys.stdout.flush()  # to hear now of a pipe that nobody reads, or of a full disk
            return code
        except UserError as error:
            return _report(str(error))
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
            return 128 + signal.SIGPIPE
        except BaseException as error:
            is_of_rust = type(error).__module__ == "pyo3_runtime"  # its panics, which are no `Exception`
            if not isinstance(error, OSError | MemoryError | RuntimeError) and not is_of_rust:
                raise
            refusal = find_refusal(error)
            if refusal is not None and refusal.errno not in SYSTEM_REFUSALS:
                return _report(f"{describe_refusal(refusal)}: put that right, and give the same command again")
            if not isinstance(error, OSError) or error.errno not in SYSTEM_REFUSALS:
                raise
            return _report(f"{error.strerror}: {error.filename or 'the disk'}: give another name, or put that right")
        finally:
            discard_unwritten()

    return wrapper


def _report(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # every process of a launch finds the same mistake
        write_line(f"{name_command()}: error: {format_line(message)}", sys.stderr)
    return USER_ERROR_EXIT_CODE


def format_line(message: str) -> str:
    """Return a message as one line that does nothing to a terminal, the middle of a very long one left out."""
    line = "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(message.split())
    )
    half = LINE_CHARACTERS // 2
    return line if len(line) <= LINE_CHARACTERS else f"{line[:half]} [...] {line[-half:]}"
