"""Drawing a run's curves beside its training: in a process of its own, so that no step waits for a picture."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from modeling_gpt2_repro.core.errors import UserError, format_line
from modeling_gpt2_repro.plots.run_figure import CURVES, draw_curves
from modeling_gpt2_repro.training.run_folder import RunFolder

IMPORT_FOLDER = Path(__file__).resolve().parents[2]
NICENESS = 19  # the training comes first wherever both want the same core


class CurveDrawer:
    """Keeps `curves.png` of a run level with its metrics.

    A context. Inside, `request` returns at once; the picture comes when the process that draws has the time, and
    requests that wait for one become one. At the end the last picture is drawn here, when no step is left to wait,
    and also when the run ends by an exception. A picture that fails is said once and stops nothing.

    Args:
        run_folder: where the run's files are.
        warn: told of the failure.
        enabled: whether to draw at all; only one process of a run should.
    """

    def __init__(self, run_folder: Path, warn: Callable[[str], None], enabled: bool = True):
        self._folder, self._warn, self._enabled = run_folder, warn, enabled
        self._process: subprocess.Popen | None = None
        self._has_failed = False

    def __enter__(self) -> "CurveDrawer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._is_wanted() and (kind is None or issubclass(kind, Exception)):  # who is killed does not stay to draw
            self._attempt(lambda: draw_curves(self._folder))

    def request(self) -> None:
        """Have the curves drawn as they are now, or soon will be."""
        if self._is_wanted():
            self._attempt(self._ask)

    def _is_wanted(self) -> bool:
        return (
            self._enabled and RunFolder(self._folder).metrics.exists()
        )  # a run that only samples has none at its start

    def _ask(self) -> None:
        has_ended = self._process is not None and self._process.poll() is not None
        if has_ended:
            self._stop()
        if self._process is None:
            self._process = self._start()
        self._process.stdin.write(b"\n")
        if has_ended:
            raise UserError("the process that draws it had ended")
        if said := self._process.stdout.read():  # a line for each picture that failed
            raise UserError(said.decode(errors="replace"))

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join(filter(None, [str(IMPORT_FOLDER), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a Ctrl-C is the run's to deal with
        )
        for stream in (process.stdin, process.stdout):
            os.set_blocking(stream.fileno(), False)
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # a picture appears whole or not at all
            self._process.communicate()
            self._process = None

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not self._has_failed:
                self._warn(f"{CURVES} was not drawn, training goes on: {format_line(str(error))}")
            self._has_failed = True


def draw_on_request(run_folder: Path) -> None:
    """Draw a run's curves whenever a byte comes in by stdin, until it ends; say on stdout in a line what fails."""
    os.nice(NICENESS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a batch system's: the end of stdin follows
    while os.read(sys.stdin.fileno(), 65536):  # all requests that have come meanwhile
        try:
            draw_curves(run_folder)
        except Exception as error:
            print(format_line(f"{type(error).__name__}: {error}"), flush=True)


if __name__ == "__main__":
    draw_on_request(Path(sys.argv[1]))
