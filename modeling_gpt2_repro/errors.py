"""Mistakes of the user's: one exception type, and the one place that turns it into an exit code."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """Something that the user can put right: the message says in one line what is wrong and what to do about it."""


def reports_user_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a script's `main(argv) -> exit code`: a `UserError` becomes one line on stderr and exit code 2.

    Any other exception passes through with its traceback, because it is a bug of ours and not a mistake of the user's.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            one_line = " ".join(str(error).split())
            if os.environ.get("RANK", "0") == "0":  # every process of a launch finds the same mistake
                print(f"{Path(sys.argv[0]).name}: error: {one_line}", file=sys.stderr, flush=True)
            return USER_ERROR_EXIT_CODE
        except BrokenPipeError:
            # Whoever read the output, such as `head`, has had enough; nor can Python's own last flush reach them.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return wrapper
