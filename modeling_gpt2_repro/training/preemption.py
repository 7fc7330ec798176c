"""Being asked to stop: by Ctrl-C, by a batch system, or by a launcher that has died."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of BSD's sysexits.h: try again later
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # what a shell says of who was stopped and leaves nothing to go on from
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A batch system that signals every process, and a launcher that passes the signal on, are one request.
SECONDS_OF_ONE_REQUEST = 5.0
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch, torchrun


class Preemption:
    """Takes note of a request to stop, which the loop asks for at each step.

    A context: inside, SIGINT and SIGTERM are noted; one that comes `SECONDS_OF_ONE_REQUEST` after the first does what
    it always does, and ends the process at once. A worker of a launcher also takes the launcher's death for a request:
    a lone one gets no signal then, and would run on unseen. Made at the start of the process, to know the launcher.
    """

    def __init__(self):
        self._requested_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

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
            self._requested_at = time.monotonic()
        is_requested = self._requested_at is not None
        if accelerator.num_processes == 1:
            return is_requested
        requests = torch.tensor(float(is_requested), device=accelerator.device)
        return accelerator.reduce(requests, reduction="sum").item() > 0

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at >= SECONDS_OF_ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            signal.raise_signal(number)
