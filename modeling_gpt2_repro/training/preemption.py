"""Being asked to stop: by Ctrl-C, by a batch system, or by a launcher that has died."""

import os
import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of BSD's sysexits.h: try again later
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preemption:
    """Takes note of a request to stop, which the loop asks for after each step.

    A context: inside, the first SIGINT or SIGTERM is noted, and the same signal a second time does what it always
    does, so that it ends the process at once. (The same, because a launcher that is interrupted sends its workers the
    other kind.) A worker that `accelerate launch` started also takes the death of its launcher for a request: a lone
    one gets no signal then, and would run on unseen.
    """

    def __init__(self):
        self._is_requested = False
        self._previous: dict[signal.Signals, object] = {}
        is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # accelerate launch exports it in any case
        self._launcher = os.getppid() if is_launched else None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():  # Python's rule for setting handlers
            self._previous = {number: signal.signal(number, self._take_note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_requested(self, accelerator: Accelerator) -> bool:
        """Tell whether any process was asked to stop; every process gets the same answer, at the same step."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._is_requested = True
        if accelerator.num_processes == 1:
            return self._is_requested
        requests = torch.tensor(float(self._is_requested), device=accelerator.device)
        return accelerator.reduce(requests, reduction="sum").item() > 0

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self._is_requested = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
