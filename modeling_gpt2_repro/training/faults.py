"""What can go wrong in the middle of a run, said so that it can be put right."""

import contextlib
from collections.abc import Iterator, Sequence

from modeling_gpt2_repro.devices import is_out_of_memory
from modeling_gpt2_repro.errors import UserError


class NonFiniteError(UserError):
    """The loss or the gradient of an update is not a number, or infinite: nothing was updated with it.

    Args:
        update: its number, counted from 1.
        windows: ids of the training windows that it was made of, by which it can be replayed.
    """

    def __init__(self, update: int, loss: float, grad_norm: float, windows: Sequence[int]):
        self.details = {"update": update, "windows": [int(window) for window in windows]}
        first, last = min(windows), max(windows)
        where = f"windows {first} to {last}" if last - first + 1 == len(windows) else f"{len(windows)} windows"
        super().__init__(
            f"update {update} has a loss of {loss:g} and a gradient norm of {grad_norm:g}, so it was not made and no "
            f"checkpoint was overwritten. Its data are {where} of the training split, listed in status.json: "
            f"--skip_steps {update}:{update} passes over them, a lower --learning_rate may do without"
        )


@contextlib.contextmanager
def explained_out_of_memory(sizes: Sequence[int], size: int) -> Iterator[None]:
    """Turn memory that runs out in the middle of a run into a `UserError` that names what would need less.

    Args:
        sizes: the micro-batch sizes that divide a step, largest first.
        size: the one in use.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        smaller = next((f"--micro_batch_size {other}" for other in sizes if other < size), "a smaller --model_size")
        raise UserError(
            f"memory ran out with {size} sequence(s) at once: resume with {smaller}, which does not change the "
            "experiment, or with --gradient_checkpointing True"
        ) from error
