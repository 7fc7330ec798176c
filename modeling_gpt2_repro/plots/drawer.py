"""Drawing a run's curves during training, in a background process.

The process lives as long as the run, because starting one takes seconds of CPU time to import torch.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from ..core.environment import PACKAGE_FOLDER
from ..core.errors import UserError, format_line, reports_user_errors
from ..core.optional import not_none
from ..training.run_folder import RunFolder
from .run_figure import draw_curves

NICENESS = 19  # training takes precedence when both need the same core


class CurveDrawer(contextlib.AbstractContextManager["CurveDrawer", None]):
    """Keeps a run's curves up to date with its metrics.

    Inside the context, `request` returns at once. On exit, even by an exception, the final figure is drawn in this
    process, because it no longer delays training. The first failure is reported, and training continues.

    Args:
        warn: called with a line about the failure.
        enabled: whether to draw at all; only one process of a run should.
    """

    def __init__(self, folder: RunFolder, warn: Callable[[str], None], enabled: bool = True):
        self._folder, self._warn, self._enabled = folder, warn, enabled
        self._process: subprocess.Popen[bytes] | None = None
        self._has_warned = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # safe, because figures are written atomically
            self._process.communicate()
        if self._can_draw() and (kind is None or issubclass(kind, Exception)):  # a signal allows no time to draw
            self._attempt(lambda: draw_curves(self._folder))

    def skip_final_figure(self) -> None:
        """Draw no figure on exit."""
        self._enabled = False

    def request(self) -> None:
        """Request a redraw; requests made while the process is busy are merged into one."""
        if self._can_draw():
            self._attempt(self._send_request)

    def _can_draw(self) -> bool:
        return self._enabled and self._folder.metrics.exists()  # a run that only samples has none at its start

    def _send_request(self) -> None:
        ended = self._process if self._process is not None and self._process.poll() is not None else None
        if self._process is None or self._process is ended:
            self._process = start_drawing(self._folder)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # it has just exited, or its pipe is full
            not_none(self._process.stdin).write(b"\n")
        if ended is not None:
            raise_if_failed(ended)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not self._has_warned:
                name = self._folder.curves.name
                self._warn(f"drawing {name} failed, training continues: {format_line(str(error))}")
            self._has_warned = True


def start_drawing(folder: RunFolder) -> subprocess.Popen[bytes]:
    """Start a low-priority process that draws a run's curves whenever its stdin receives data, until end of file."""
    path = os.pathsep.join(filter(None, [str(PACKAGE_FOLDER.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", f"{PACKAGE_FOLDER.name}.plots.drawer", os.path.abspath(folder.path)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C should reach only the run
    )
    os.set_blocking(not_none(process.stdin).fileno(), False)
    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    return process


def raise_if_failed(process: subprocess.Popen[bytes]) -> None:
    """Raise a `UserError` if a process of `start_drawing` failed to draw or was killed."""
    lines = process.communicate()[1].decode(errors="replace").splitlines()
    if process.returncode > 0:
        raise UserError(lines[-1].partition(" error: ")[2] or lines[-1] if lines else "no error message")
    if process.returncode not in (0, -signal.SIGTERM):  # a batch system may send SIGTERM to all processes of a run
        raise UserError("the drawing process was killed")


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves of a run whenever stdin receives data, until end of file or the first failure."""
    folder = RunFolder((sys.argv[1:] if argv is None else argv)[0])
    while os.read(sys.stdin.fileno(), 65536):  # all pending requests
        draw_curves(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
