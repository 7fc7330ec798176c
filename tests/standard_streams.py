"""Standard streams of every kind, and scripts that use them, in processes of the fork server."""

import contextlib
import os
import pty
import select
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import train
from modeling_gpt2_repro.core import locks


def set_stream(name: str, encoding: str = "utf-8", errors: str = "strict") -> None:
    """Reopen a standard stream as the interpreter does."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    setattr(sys, name, open(descriptor, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115


def redirect(path: str, encoding: str) -> None:
    """Redirect stdout to a file in the given encoding."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    set_stream("stdout", encoding)
    set_stream("stderr", encoding, "backslashreplace")


def break_stdout(kind: str) -> None:
    """Make stdout closed, a pipe without a reader, or a full device."""
    if kind == "closed":
        os.close(1)
        sys.stdout = None
        return
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    os.dup2(writer, 1)
    set_stream("stdout")


def end(code: int) -> None:
    """End this process as the interpreter does at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_on_terminal(argv: Sequence[str], run: Path) -> int:
    """Run train.py on a terminal that closes after a few steps; return its exit code."""
    process_id, terminal = pty.fork()
    if process_id == 0:
        set_stream("stdout")
        set_stream("stderr")
        end(train.main(argv))
    os.set_blocking(terminal, False)
    while not (run / "metrics.jsonl").exists() or '"step": 3' not in (run / "metrics.jsonl").read_text():
        time.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def show_terminal(argv: Sequence[str], patience_seconds: float) -> int:
    """Run train.py on a terminal and print its output; hang up when it falls silent, as a question would make it."""
    process_id, terminal = pty.fork()
    if process_id == 0:
        set_stream("stdout")
        set_stream("stderr")
        end(train.main(argv))
    printed = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while select.select([terminal], [], [], patience_seconds)[0]:
            printed += os.read(terminal, 65536)
    os.close(terminal)  # hangs up, which ends a process that still waits
    print(printed.decode(), flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def run_twice(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> None:
    """Run a script twice at the same time, with a short wait for locks; print each process's id and exit code."""
    locks.PATIENCE_SECONDS = 0.2
    processes = []
    for _ in range(2):
        processes.append(os.fork())
        if processes[-1] == 0:
            end(main(argv))
    codes = [os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]) for process_id in processes]
    for process_id, code in zip(processes, codes, strict=True):
        print(process_id, code, flush=True)
