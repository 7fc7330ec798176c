"""Standard streams whose encoding, closed pipe or full disk never ends a program."""

import contextlib
import os
import sys
from typing import TextIO

# Codec error handlers that accept any text.
LENIENT = ("backslashreplace", "ignore", "namereplace", "replace", "xmlcharrefreplace")


def prepare_streams() -> None:
    """Make stdout and stderr accept any text in any encoding, and open standard streams that are closed.

    Characters missing from the encoding are written as escapes such as `\\u2581`.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # otherwise the next file opened would become a standard stream
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, stays open until the process ends
        elif getattr(stream, "errors", None) not in LENIENT and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def ignoring_stream_errors() -> contextlib.AbstractContextManager[None]:
    """Ignore errors of writing to a stream: a closed terminal, a pipe without a reader, a log on a full disk."""
    return contextlib.suppress(OSError, ValueError)  # ValueError: the stream is closed


def write_line(text: str, stream: TextIO) -> None:
    """Print a line and flush it, ignoring a stream that cannot be written to."""
    with ignoring_stream_errors():
        print(text, file=stream, flush=True)


def discard_unwritten() -> None:
    """Discard output that cannot be written: flushing it at exit would fail again and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with ignoring_stream_errors():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def silence_libraries() -> None:
    """Silence warnings and progress bars of transformers and huggingface_hub: stderr is for our bars and errors."""
    from huggingface_hub.utils import logging as hub_logging  # here: this module is imported before the libraries
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
