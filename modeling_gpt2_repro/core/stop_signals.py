"""Signals by which terminals, batch systems and launchers request a process to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType

# In order: Ctrl-C; a batch system or `kill`; a closed terminal; Ctrl-\; two that Slurm and SGE can send before a time
# limit; a CPU-time limit; a power failure. By default each ends the process; torchrun forwards the first four.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
STOP_SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Terminated(SystemExit):
    """Exits the program with a signal's exit code, running `finally` clauses first."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Signal handler that raises `KeyboardInterrupt` for SIGINT and `Terminated` for other signals."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextlib.contextmanager
def handled_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Generator[Callable[[], None]]:
    """Handle the stop signals in the context, and yield a function that restores the previous handlers early.

    A signal that was ignored when the process started stays ignored: `nohup` and a shell's `&` rely on that.
    """
    with contextlib.ExitStack() as restoring:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in the main thread only
            for number in STOP_SIGNALS:
                # None stands for a handler not installed by Python, which Python could not restore.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    restoring.callback(signal.signal, number, signal.signal(number, handler))
        yield restoring.close
