"""Preemption: on request, a run saves a checkpoint and exits with code 75.

Inside `deferred`, which covers `train.run_to_the_end` and the closing of trackers, a stop signal (`core.stop_signals`)
or the launcher's death only sets a flag. All ranks check it together before each update, and then save a checkpoint;
`train.stop_early` writes `preempted` to `status.json`. If the checkpoint cannot be written, the run fails with code 2.
A smoke test saves none and exits with 130. A request after the last update, while the finished model is written and
uploaded, has no effect. A second Ctrl-C or SIGTERM ends the process even then. Before `deferred`, while the run is
built, any stop signal ends it with exit code 128 plus its number.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Generator
from types import FrameType

import torch
from accelerate import Accelerator

from ..core.stop_signals import handled_stop_signals, raise_terminated

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of BSD's sysexits.h: try again later
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # the shells' code for Ctrl-C; the run leaves nothing to resume
# Signals within this time count as one request: a batch system and the launcher may both signal a process.
SECONDS_OF_ONE_REQUEST = 5.0
# Only these, sent a second time, end a run before it has saved: the system itself repeats others, such as SIGXCPU.
INSISTENT = (signal.SIGINT, signal.SIGTERM)
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch, torchrun


class Preemption:
    """Handler of this process's stop signals, active inside the context `handled`.

    A signal raises `KeyboardInterrupt` or `Terminated`; inside `deferred` it is recorded instead. A second SIGINT or
    SIGTERM, at least `SECONDS_OF_ONE_REQUEST` after the first, raises even there, and a third ends the process at
    once. The launcher's death counts as a request, because a single worker gets no signal and would run on unnoticed.
    Create the object at process start, when the parent is still the launcher.
    """

    def __init__(self):
        self._requests: dict[int, float] = {}  # signal number -> time of its first arrival
        self._is_deferred = self._has_lost_launcher = False
        self._restore_handlers: Callable[[], None]
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    @contextlib.contextmanager
    def handled(self) -> Generator["Preemption"]:
        """Install the handlers and yield this object."""
        with handled_stop_signals(self._handle) as self._restore_handlers:
            yield self

    @contextlib.contextmanager
    def deferred(self) -> Generator[None]:
        """Record requests instead of raising them."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def is_requested(self, accelerator: Accelerator) -> bool:
        """Return whether any rank was asked to stop; all ranks get the same answer at the same step."""
        self._has_lost_launcher |= self._launcher is not None and os.getppid() != self._launcher
        is_requested = bool(self._requests) or self._has_lost_launcher
        if accelerator.num_processes == 1:
            return is_requested
        requests = torch.tensor(float(is_requested), device=accelerator.device)
        return accelerator.reduce(requests, reduction="sum").item() > 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, earlier = time.monotonic(), list(self._requests.values())
        is_new = number not in self._requests
        first = self._requests.setdefault(number, now)
        if self._is_deferred:
            # The loop will save a checkpoint first, unless the same signal is sent again.
            if is_new or number not in INSISTENT or now - first < SECONDS_OF_ONE_REQUEST:
                return
            self._restore_handlers()
        elif earlier:
            if now - min(earlier) < SECONDS_OF_ONE_REQUEST:
                return
            self._restore_handlers()
        raise_terminated(number, frame)
