"""Failures in the middle of a run, translated into errors that explain the remedy."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ..core.devices import is_out_of_memory
from ..core.errors import SYSTEM_ERRORS, UserError
from ..core.system_errors import describe_system_error, find_system_error

# From "PytorchStreamWriter failed writing file", "basic_ios::clear: iostream error", "unexpected pos 704 vs 598"
# (torch), and "I/O error: No space left on device (os error 28)" (safetensors and tokenizers).
WRITE_SIGNS = ("PytorchStreamWriter", "file write failed", "iostream error", "unexpected pos", "os error")

# From "index_add_cuda_ does not have a deterministic implementation, but you set ..."
NONDETERMINISM_SIGN = " does not have a deterministic implementation"

# Consecutive overflows that end a run: by then fp16's loss scale, 2**16 at first and halved each time, is below 1.
MOST_OVERFLOWS = 20


class NonFiniteError(UserError):
    """The loss or gradient of an update is NaN or infinite; the update was not applied.

    Args:
        update: number of the update, counted from 1.
        windows: ids of its training windows, with which it can be replayed.
    """

    is_everywhere = True  # all ranks reduce the same numbers, and stop at the same update

    def __init__(self, update: int, loss: float, grad_norm: float, windows: Sequence[int] | np.ndarray):
        self.details = {"update": update, "windows": [int(window) for window in windows]}
        first, last = min(windows), max(windows)
        where = f"windows {first} to {last}" if last - first + 1 == len(windows) else f"{len(windows)} windows"
        super().__init__(
            f"update {update} has a loss of {loss:g} and a gradient norm of {grad_norm:g}; it was not applied, and no "
            f"checkpoint was overwritten. Its data are {where} of the training split, listed in status.json: skip it "
            f"with --skip_steps {update}:{update}, or try a lower --learning_rate"
        )


class RepeatedOverflowError(UserError):
    """Under fp16, gradients stay infinite however small the loss scale.

    Args:
        update: number of the last update, counted from 1.
        count: consecutive updates that were skipped.
    """

    is_everywhere = True

    def __init__(self, update: int, count: int):
        self.details = {"update": update}
        super().__init__(
            f"the last {count} updates, up to {update}, were skipped: their gradients overflow fp16 at any loss "
            "scale. Try a smaller --loss_chunk_tokens, which does not change the experiment; otherwise start over "
            "under another --run_name with --mixed_precision bf16 or no"
        )


def is_write_failure(error: Exception) -> bool:
    """Return whether an exception means that a file could not be written: disk full or gone, quota, permissions.

    torch, safetensors and tokenizers raise their own types, which also mean other things: the message decides.
    """
    if isinstance(error, OSError):
        return error.errno in SYSTEM_ERRORS
    is_library_error = isinstance(error, RuntimeError | SafetensorError) or type(error) is Exception
    return is_library_error and any(sign in str(error) for sign in WRITE_SIGNS)


@contextlib.contextmanager
def explained_out_of_memory(sizes: Sequence[int], size: int) -> Generator[None]:
    """Turn running out of memory in the middle of a run into a `UserError` with settings that need less.

    Args:
        sizes: all possible micro-batch sizes, largest first.
        size: the size in use.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = next((f"--micro_batch_size {other} or " for other in sizes if other < size), "")
        advice = f"resume with {smaller}--gradient_checkpointing True, which does not change the experiment"
        raise UserError(f"out of memory with {size} sequence(s) per micro-step: {advice}") from error


@contextlib.contextmanager
def explained_nondeterminism() -> Generator[None]:
    """Turn an operation without a deterministic implementation into a `UserError` that names it."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(NONDETERMINISM_SIGN)
        if not found:
            raise
        raise UserError(
            f"{operation.split()[-1]} has no deterministic implementation on this device: change --compile or "
            "--mixed_precision to use another operation or, on a GPU, drop --deterministic"
        ) from error


@contextlib.contextmanager
def tolerated_write_failures(what: str, say: Callable[[str], None]) -> Generator[None]:
    """Report a failed write that training can do without, and continue.

    Args:
        what: the beginning of the message, such as `the best model was not written`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and not is_write_failure(error):
            raise
        say(f"{what}, training continues: {error}")


@contextlib.contextmanager
def explained_write_failures(folder: Path, resume_hint: Callable[[], str]) -> Generator[None]:
    """Turn a failed write into a `UserError`, because a full disk is no bug.

    Args:
        folder: the run folder.
        resume_hint: returns how to resume the run.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_write_failure(error):
            raise
        system_error = find_system_error(error)
        reason = describe_system_error(system_error) if system_error else error
        raise UserError(f"cannot write to {folder}: {reason}. Free some space: {resume_hint()}") from error
