"""Drawing beside a training, in real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY
from written_runs import build_lines, write_run

from modeling_gpt2_repro.plots import drawer
from modeling_gpt2_repro.plots.drawer import CurveDrawer

PATIENCE_SECONDS = 120


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def find_drawers(run_folder: Path, parent: int | None = None) -> list[psutil.Process]:
    """Return the children of a process, this one unless told otherwise, that draw a run's curves."""

    def is_drawer(child: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            return child.cmdline()[-1:] == [str(run_folder)]
        return False

    return list(filter(is_drawer, psutil.Process(parent).children()))


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return write_run(tmp_path / "run", build_lines(20))


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_a_picture_comes_while_the_run_goes_on_and_another_at_its_end(run_folder, warnings):
    picture = run_folder / "curves.png"
    with CurveDrawer(run_folder, warnings.append) as curves:
        curves.request()
        wait_for(picture.exists)
        first = picture.read_bytes()
        (process,) = find_drawers(run_folder)
        process.send_signal(signal.SIGTERM)  # as a batch system that asks all processes of the run to stop
        write_run(run_folder, build_lines(40))
        curves.request()
        wait_for(lambda: picture.read_bytes() != first)
        assert find_drawers(run_folder) == [process]  # one for all pictures
        write_run(run_folder, build_lines(60))
        second = picture.read_bytes()
    assert picture.read_bytes() not in (first, second)
    assert not process.is_running() and warnings == []


def test_a_request_does_not_wait_for_the_process_that_draws(run_folder, warnings):
    with CurveDrawer(run_folder, warnings.append) as curves:
        curves.request()
        (process,) = find_drawers(run_folder)
        process.suspend()  # draws as slowly as can be
        for _ in range(100_000):  # more than a pipe holds
            curves.request()
    assert (run_folder / "curves.png").exists() and warnings == []


def test_a_picture_that_fails_is_said_once(run_folder, warnings):
    (run_folder / "curves.png").mkdir()
    with CurveDrawer(run_folder, warnings.append) as curves:
        wait_for(lambda: curves.request() or warnings)
        curves.request()
    (warning,) = warnings
    assert warning.startswith("curves.png was not drawn, training goes on: UserError: cannot write")


def test_a_process_that_dies_is_said_once_and_started_anew(run_folder, warnings):
    picture = run_folder / "curves.png"
    with CurveDrawer(run_folder, warnings.append) as curves:
        curves.request()
        for _ in range(2):
            (process,) = find_drawers(run_folder)
            process.kill()
            wait_for(lambda dead=process: curves.request() or set(find_drawers(run_folder)) - {dead})
        picture.unlink(missing_ok=True)
        curves.request()
        wait_for(picture.exists)
    assert warnings == ["curves.png was not drawn, training goes on: the process that draws it had ended"]


def test_a_run_that_fails_has_its_curves_and_one_that_is_interrupted_ends(run_folder, warnings):
    with pytest.raises(ValueError), CurveDrawer(run_folder, warnings.append):
        raise ValueError
    assert (run_folder / "curves.png").exists()
    (run_folder / "curves.png").unlink()
    with pytest.raises(KeyboardInterrupt), CurveDrawer(run_folder, warnings.append):
        raise KeyboardInterrupt
    assert not (run_folder / "curves.png").exists()


def test_only_one_process_of_a_run_draws(run_folder, warnings):
    with CurveDrawer(run_folder, warnings.append, enabled=False) as curves:
        curves.request()
        assert find_drawers(run_folder) == []
    assert not (run_folder / "curves.png").exists()


def test_it_ends_with_a_run_that_is_killed(run_folder):
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from modeling_gpt2_repro.plots.drawer import CurveDrawer\n"
        "with CurveDrawer(Path(sys.argv[1]), print) as curves:\n    curves.request()\n    time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen([sys.executable, "-c", program, str(run_folder)], env=environment)
    wait_for((run_folder / "curves.png").exists)
    (process,) = find_drawers(run_folder, run.pid)
    assert process.nice() == drawer.NICENESS
    run.kill()
    run.wait()
    process.wait(PATIENCE_SECONDS)


def test_a_run_without_numbers_is_not_drawn_and_not_complained_of(tmp_path, warnings):
    with CurveDrawer(tmp_path, warnings.append) as curves:
        curves.request()
        assert find_drawers(tmp_path) == []
    assert warnings == [] and list(tmp_path.iterdir()) == []
