"""Drawing a run's curves beside its training, in a process that no step waits for.

The process lives as long as the run: to load torch takes it seconds of a core, which training may want.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from ..core.environment import PACKAGE_FOLDER
from ..core.errors import UserError, format_line, reports_user_errors
from ..training.run_folder import RunFolder
from .run_figure import draw_curves

NICENESS = 19  # the training comes first wherever both want the same core


class CurveDrawer(contextlib.AbstractContextManager):
    """Keeps a run's curves up to date with its metrics.

    Inside the context, `request` returns at once. On exit, also by an exception, the last picture is drawn in
    this process, where no step is left to wait for it. The first picture that fails is reported, and training
    continues.

    Args:
        warn: called with a line on the failure.
        enabled: whether to draw at all; only one process of a run should.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None], enabled: bool = True):
        self._folder, self._warn, self._enabled = folder, warn, enabled
        self._process: subprocess.Popen | None = None
        self._has_warned = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # a picture appears whole or not at all
            self._process.communicate()
        if self._is_wanted() and (kind is None or issubclass(kind, Exception)):  # a signal allows no time to draw
            self._attempt(lambda: draw_curves(self._folder))

    def leave_as_they_are(self) -> None:
        """Draw no last picture on exit."""
        self._enabled = False

    def request(self) -> None:
        """Have the curves drawn once the process that draws is free; requests that wait for it become one."""
        if self._is_wanted():
            self._attempt(self._ask)

    def _is_wanted(self) -> bool:
        return self._enabled and self._folder.metrics.exists()  # a run that only samples has none at its start

    def _ask(self) -> None:
        ended = self._process if self._process is not None and self._process.poll() is not None else None
        if self._process is ended:
            self._process = start_drawing(self._folder)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it has just ended, or has requests enough
            self._process.stdin.write(b"\n")
        if ended is not None:
            raise_if_failed(ended)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not self._has_warned:
                name = self._folder.curves.name
                self._warn(f"{name} was not drawn, training continues: {format_line(str(error))}")
            self._has_warned = True


def start_drawing(folder: RunFolder) -> subprocess.Popen:
    """Start a process, of low priority, that draws a run's curves for each byte on its stdin, until that ends."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_FOLDER.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"{PACKAGE_FOLDER.name}.plots.drawer", os.path.abspath(folder.path)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # a Ctrl-C is for the run
    )
    os.set_blocking(process.stdin.fileno(), False)
    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    return process


def raise_if_failed(process: subprocess.Popen) -> None:
    """Raise a `UserError` if a process of `start_drawing` ended by a picture that failed, or by a kill."""
    lines = process.communicate()[1].decode(errors="replace").splitlines()
    if process.returncode > 0:
        raise UserError(lines[-1].partition(" error: ")[2] or lines[-1] if lines else "it said nothing")
    if process.returncode not in (0, -signal.SIGTERM):  # of a batch system that asks all processes of a run to stop
        raise UserError("the process that draws it was killed")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves of a run whenever something comes in on stdin; the first failure ends this."""
    folder = RunFolder((sys.argv[1:] if argv is None else argv)[0])
    while os.read(sys.stdin.fileno(), 65536):  # all requests that have come meanwhile
        draw_curves(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
