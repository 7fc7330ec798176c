"""The standard streams: neither their encoding nor a reader that has gone away ends a program."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# The error handlers of codecs that let any text through.
LENIENT = ("backslashreplace", "ignore", "namereplace", "replace", "xmlcharrefreplace")


def prepare_streams() -> None:
    """Let stdout and stderr take any text in any encoding, and open those that are closed.

    A character that the encoding lacks is written as an escape, such as `\\u2581`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # or the next file to be opened would be taken for a standard stream
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, open as long as the process
        elif getattr(stream, "errors", None) not in LENIENT and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Go on where a stream cannot be written to: a closed terminal, a pipe without a reader, a log on a full disk."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: of a stream that was closed
        yield


def write_line(text: str, stream: TextIO) -> None:
    """Print a line at once, if anybody can read it."""
    with outliving_readers():
        print(text, file=stream, flush=True)


def discard_unwritten() -> None:
    """Forget what cannot be written, which would fail once more, and set the exit code, when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with outliving_readers():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def silence_libraries() -> None:
    """Keep stderr for our progress bars and one-line errors: no warnings and bars of transformers and the Hub."""
    from huggingface_hub.utils import logging as hub_logging  # here: this module starts before the libraries
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
