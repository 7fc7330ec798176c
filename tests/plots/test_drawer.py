"""Drawing beside a training, in real processes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from conftest import REPOSITORY, real_pictures
from written_runs import build_lines, write_run

from modeling_gpt2_repro.plots import drawer
from modeling_gpt2_repro.plots.drawer import CurveDrawer
from modeling_gpt2_repro.training.run_folder import RunFolder

PATIENCE_SECONDS = 120


@pytest.fixture(autouse=True)
def _pictures():
    with real_pictures():
        yield


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def find_drawers(folder: RunFolder, parent: int | None = None) -> list[psutil.Process]:
    """Return the children of a process (`None`: of this one) that draw a run's curves."""

    def is_drawer(child: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            return child.cmdline()[-1:] == [str(folder)]
        return False

    return list(filter(is_drawer, psutil.Process(parent).children()))


def find_drawer(folder: RunFolder, parent: int | None = None) -> psutil.Process:
    """Return the one process that draws, once the system knows its command."""
    wait_for(lambda: find_drawers(folder, parent))
    (process,) = find_drawers(folder, parent)
    return process


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(write_run(tmp_path / "run", build_lines(20)))


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_pictures_come_while_the_run_goes_on_and_another_at_its_end(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        wait_for(folder.curves.exists)
        first, process = folder.curves.read_bytes(), find_drawer(folder)
        write_run(folder.path, build_lines(40))
        wait_for(lambda: curves.request() or folder.curves.read_bytes() != first)
        second = folder.curves.read_bytes()
        assert find_drawers(folder) == [process]  # to start another one would take seconds of a core
        write_run(folder.path, build_lines(60))
    assert folder.curves.read_bytes() not in (first, second)
    assert not process.is_running() and warnings == []


def test_a_request_does_not_wait_for_the_process_that_draws(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        process = find_drawer(folder)
        process.suspend()  # draws as slowly as can be
        for _ in range(1000):
            curves.request()
        assert find_drawers(folder) == [process]  # one at a time
    assert folder.curves.exists() and not process.is_running() and warnings == []


def test_a_picture_that_fails_is_said_once(folder, warnings):
    folder.curves.mkdir()
    with CurveDrawer(folder, warnings.append) as curves:
        wait_for(lambda: curves.request() or warnings)
        curves.request()
    (warning,) = warnings
    assert warning.startswith("drawing curves.png failed, training continues: cannot write ")


def test_a_process_that_is_killed_is_said_once_and_started_anew(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        for _ in range(2):
            process = find_drawer(folder)
            process.kill()
            wait_for(lambda dead=process: curves.request() or set(find_drawers(folder)) - {dead})
        folder.curves.unlink(missing_ok=True)
        wait_for(lambda: curves.request() or folder.curves.exists())
    assert warnings == ["drawing curves.png failed, training continues: the drawing process was killed"]


def test_a_batch_system_may_stop_the_process_that_draws(folder, warnings):
    """It asks all processes of a run to stop; the run itself then draws the last picture."""
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        process = find_drawer(folder)
        process.terminate()
        wait_for(lambda: curves.request() or set(find_drawers(folder)) - {process})
    assert folder.curves.exists() and warnings == []


def test_a_run_that_fails_has_its_curves_and_one_that_is_interrupted_ends(folder, warnings):
    with pytest.raises(ValueError), CurveDrawer(folder, warnings.append):
        raise ValueError
    assert folder.curves.exists()
    folder.curves.unlink()
    with pytest.raises(KeyboardInterrupt), CurveDrawer(folder, warnings.append):
        raise KeyboardInterrupt
    assert not folder.curves.exists()


def test_only_one_process_of_a_run_draws(folder, warnings):
    with CurveDrawer(folder, warnings.append, enabled=False) as curves:
        curves.request()
        assert find_drawers(folder) == []
    assert not folder.curves.exists()


def test_it_ends_with_a_run_that_is_killed(folder):
    program = (
        "import sys, time\n"
        "from modeling_gpt2_repro.plots.drawer import CurveDrawer, RunFolder\n"
        "with CurveDrawer(RunFolder(sys.argv[1]), print) as curves:\n    curves.request()\n    time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=environment)
    process = find_drawer(folder, run.pid)
    wait_for(lambda: process.nice() == drawer.NICENESS)
    run.kill()
    run.wait()
    process.wait(PATIENCE_SECONDS)


def test_a_run_may_be_called_like_a_flag(tmp_path, monkeypatch, warnings):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(write_run(tmp_path / "--hours", build_lines(5)).name)
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        wait_for(folder.curves.exists)
    assert warnings == []


def test_a_run_without_numbers_is_not_drawn_and_not_complained_of(tmp_path, warnings):
    folder = RunFolder(tmp_path)
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        assert find_drawers(folder) == []
    assert warnings == [] and list(tmp_path.iterdir()) == []
