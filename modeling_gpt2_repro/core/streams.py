"""Standard streams that never end a program, whatever their encoding, and whether or not anybody reads them."""

import contextlib
import os
import sys
from typing import TextIO

# The codec error handlers that accept any text.
LENIENT = ("backslashreplace", "ignore", "namereplace", "replace", "xmlcharrefreplace")


def prepare_streams() -> None:
    """Let stdout and stderr accept any text in any encoding, and open standard streams that are closed.

    Characters that the encoding lacks are written as escapes, such as `\\u2581`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file to be opened would become a standard stream
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, stays open until the process ends
        elif getattr(stream, "errors", None) not in LENIENT and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def outliving_readers() -> contextlib.AbstractContextManager[None]:
    """Ignore a stream that cannot be written to: a closed terminal, a pipe without a reader, a log on a full disk."""
    return contextlib.suppress(OSError, ValueError)  # ValueError: the stream is closed


def write_line(text: str, stream: TextIO) -> None:
    """Print a line and flush it, if the stream can be written to."""
    with outliving_readers():
        print(text, file=stream, flush=True)


def discard_unwritten() -> None:
    """Discard output that cannot be written: otherwise it fails again, with another exit code, at the exit."""
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
