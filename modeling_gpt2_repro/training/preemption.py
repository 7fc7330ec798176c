"""Preemption: a run that is asked to stop saves a checkpoint and exits with code 75.

A stop signal (`core.stop_signals`), or the death of the launcher, is noted during `deferred`, which is all of
`train.run_to_the_end`, and the end of the trackers. The loop asks before each update, in all processes together, then
saves what is new since the last checkpoint; `train.stop_early` writes `preempted` to `status.json`. If the disk
refuses that checkpoint, the run fails with code 2; a trial (`--smoke`) saves none, and exits with 130. A request that
comes later, while the finished model is written and uploaded, changes nothing. A second Ctrl-C or SIGTERM ends the
process even then; before `deferred`, while a run is built, any signal does, with 128 plus its number.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from accelerate import Accelerator

from ..core.stop_signals import handled_stop_signals, raise_terminated

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of BSD's sysexits.h: try again later
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # of a run that leaves nothing to resume, as shells have it
# A batch system that signals every process, and a launcher that passes the signal on, are one request.
SECONDS_OF_ONE_REQUEST = 5.0
# Which of the signals, sent again, end a run that is about to save. The system may repeat others, as SIGXCPU.
INSISTENT = (signal.SIGINT, signal.SIGTERM)
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch, torchrun


class Preemption:
    """The stop signals of this process, handled inside the context `handled`.

    A signal raises `KeyboardInterrupt` or `Terminated`; inside `deferred` it is noted instead. A second SIGINT or
    SIGTERM, at least `SECONDS_OF_ONE_REQUEST` after the first, raises there too, and the next one ends the process at
    once. A worker of a launcher also takes the launcher's death for a request: a lone one gets no signal then, and
    would keep running unseen. Create it at the start of the process, to know the launcher.
    """

    def __init__(self):
        self._requests: dict[int, float] = {}  # when each signal came first
        self._is_deferred = self._has_lost_launcher = False
        self._restore_handlers: Callable[[], None]
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHED) else None

    @contextlib.contextmanager
    def handled(self) -> Iterator["Preemption"]:
        """Handle the signals, and return this object."""
        with handled_stop_signals(self._handle) as self._restore_handlers:
            yield self

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a request instead of raising it."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def is_requested(self, accelerator: Accelerator) -> bool:
        """Tell whether any process was asked to stop; every process gets the same answer, at the same step."""
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
            # The loop may still save: only who insists, with the same signal, is heard.
            if is_new or number not in INSISTENT or now - first < SECONDS_OF_ONE_REQUEST:
                return
            self._restore_handlers()
        elif earlier:
            if now - min(earlier) < SECONDS_OF_ONE_REQUEST:
                return
            self._restore_handlers()
        raise_terminated(number, frame)
