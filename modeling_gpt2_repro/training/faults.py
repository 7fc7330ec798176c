"""Failures in the middle of a run, as errors that tell how to fix them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from ..core.devices import is_out_of_memory
from ..core.errors import SYSTEM_REFUSALS, UserError
from ..core.refusals import describe_refusal, find_refusal

# "PytorchStreamWriter failed writing file", "basic_ios::clear: iostream error", "unexpected pos 704 vs 598" (torch),
# "I/O error: No space left on device (os error 28)" (safetensors and tokenizers).
WRITE_SIGNS = ("PytorchStreamWriter", "file write failed", "iostream error", "unexpected pos", "os error")

# "index_add_cuda_ does not have a deterministic implementation, but you set ..."
NONDETERMINISM_SIGN = " does not have a deterministic implementation"

# Updates in a row with an infinite gradient: fp16's scaler, which begins at 2**16 and halves, is below 1 after them.
MOST_OVERFLOWS = 20


class NonFiniteError(UserError):
    """The loss or the gradient of an update is not a number, or infinite: nothing was updated with it.

    Args:
        update: its number, counted from 1.
        windows: ids of the training windows that it was made of, by which it can be replayed.
    """

    is_everywhere = True  # every process has reduced the same numbers, and stops at the same update

    def __init__(self, update: int, loss: float, grad_norm: float, windows: Sequence[int]):
        self.details = {"update": update, "windows": [int(window) for window in windows]}
        first, last = min(windows), max(windows)
        where = f"windows {first} to {last}" if last - first + 1 == len(windows) else f"{len(windows)} windows"
        super().__init__(
            f"update {update} has a loss of {loss:g} and a gradient norm of {grad_norm:g}, so it was not made and no "
            f"checkpoint was overwritten. Its data are {where} of the training split, listed in status.json: "
            f"--skip_steps {update}:{update} passes over them, a lower --learning_rate may do without"
        )


class RepeatedOverflowError(UserError):
    """Under fp16 one update after the other has an infinite gradient, however little its scaler scales the loss.

    Args:
        update: the last one, counted from 1.
        count: of the updates in a row that were not made.
    """

    is_everywhere = True

    def __init__(self, update: int, count: int):
        self.details = {"update": update}
        super().__init__(
            f"the last {count} updates, up to {update}, were not made: their gradients overflow fp16 however little "
            "the loss is scaled. A smaller --loss_chunk_tokens may be enough, and does not change the experiment; "
            "otherwise start again, under another --run_name, with --mixed_precision bf16 or no"
        )


def is_write_failure(error: Exception) -> bool:
    """Tell whether an exception means that a file could not be written: a full or vanished disk, a quota, no rights.

    torch, safetensors and tokenizers have exceptions of their own for that, of kinds that mean other things too.
    """
    if isinstance(error, OSError):
        return error.errno in SYSTEM_REFUSALS
    is_theirs = isinstance(error, RuntimeError | SafetensorError) or type(error) is Exception
    return is_theirs and any(sign in str(error) for sign in WRITE_SIGNS)


@contextlib.contextmanager
def explained_out_of_memory(sizes: Sequence[int], size: int) -> Iterator[None]:
    """Turn memory that runs out in the middle of a run into a `UserError` that names what would need less.

    Args:
        sizes: the micro-batch sizes that divide a step, largest first.
        size: the one in use.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = next((f"--micro_batch_size {other} or " for other in sizes if other < size), "")
        advice = f"resume with {smaller}--gradient_checkpointing True, which does not change the experiment"
        raise UserError(f"memory ran out with {size} sequence(s) at once: {advice}") from error


@contextlib.contextmanager
def explained_nondeterminism() -> Iterator[None]:
    """Turn an operation that has no deterministic form into a `UserError` that names it."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(NONDETERMINISM_SIGN)
        if not found:
            raise
        raise UserError(
            f"{operation.split()[-1]} has no deterministic form on this device: change --compile or "
            "--mixed_precision, so that another operation takes its place, or, on a GPU, leave --deterministic out"
        ) from error


@contextlib.contextmanager
def tolerated_write_failures(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Let training go on where the disk refuses what it can do without, and say so.

    Args:
        what: has not happened then, as `the best model was not written`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and not is_write_failure(error):
            raise
        say(f"{what}, training goes on: {error}")


@contextlib.contextmanager
def explained_write_failures(folder: Path, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Turn a disk that cannot be written to into a `UserError`, because no bug of ours filled it.

    Args:
        folder: of the run.
        resume_hint: says how it goes on.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_write_failure(error):
            raise
        refusal = find_refusal(error)
        reason = describe_refusal(refusal) if refusal else error
        raise UserError(f"cannot write to {folder}: {reason}. Make room: {resume_hint()}") from error
