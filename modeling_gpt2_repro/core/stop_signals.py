"""The signals by which terminals, batch systems and launchers ask a process to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# In order: Ctrl-C; a batch system or `kill`; a terminal that closes; Ctrl-\; two that a batch system sends ahead of
# its limit if told to, as Slurm and SGE; a CPU-time limit; a failing power supply. By default they end the process;
# torchrun passes the first four on.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Terminated(SystemExit):
    """Ends the program as a signal would, after its `finally` clauses."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Handle a signal as an interruption, or by raising `Terminated`."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextlib.contextmanager
def handled_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Handle the stop signals inside the context, and yield what restores them before its end.

    A signal that the process was started to ignore stays ignored: `nohup` and a shell's `&` do that on purpose.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():  # Python's rule for setting handlers
        for number in STOP_SIGNALS:
            # None is a handler that is not Python's, which Python could not restore.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)

    def restore() -> None:
        for number, former in previous.items():
            signal.signal(number, former)

    try:
        yield restore
    finally:
        restore()
