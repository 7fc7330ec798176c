"""Drawing in a separate process while training runs."""

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

pytestmark = pytest.mark.heavy

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
    """Return the children of a process (None: of this one) that draw a run's curves."""

    def is_drawer(child: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):  # the child has exited
            return child.cmdline()[-1:] == [str(folder)]
        return False

    return list(filter(is_drawer, psutil.Process(parent).children()))


def find_drawer(folder: RunFolder, parent: int | None = None) -> psutil.Process:
    """Return the drawing process, once the system knows its command line."""
    wait_for(lambda: find_drawers(folder, parent))
    (process,) = find_drawers(folder, parent)
    return process


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(write_run(tmp_path / "run", build_lines(20)))


@pytest.fixture
def warnings() -> list[str]:
    return []


def test_figures_are_drawn_during_the_run_and_at_its_end(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        wait_for(folder.curves.exists)
        first, process = folder.curves.read_bytes(), find_drawer(folder)
        write_run(folder.path, build_lines(40))
        wait_for(lambda: curves.request() or folder.curves.read_bytes() != first)
        second = folder.curves.read_bytes()
        assert find_drawers(folder) == [process]  # starting another would cost a core several seconds
        write_run(folder.path, build_lines(60))
    assert folder.curves.read_bytes() not in (first, second)
    assert not process.is_running() and warnings == []


def test_a_request_does_not_wait_for_the_drawing_process(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        process = find_drawer(folder)
        process.suspend()  # as slow as drawing can be
        for _ in range(1000):
            curves.request()
        assert find_drawers(folder) == [process]  # one at a time
    assert folder.curves.exists() and not process.is_running() and warnings == []


def test_a_failed_figure_is_reported_once(folder, warnings):
    folder.curves.mkdir()
    with CurveDrawer(folder, warnings.append) as curves:
        wait_for(lambda: curves.request() or warnings)
        curves.request()
    (warning,) = warnings
    assert warning.startswith("drawing curves.png failed, training continues: cannot write ")


def test_a_killed_drawing_process_is_reported_once_and_restarted(folder, warnings):
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        for _ in range(2):
            process = find_drawer(folder)
            process.kill()
            wait_for(lambda dead=process: curves.request() or set(find_drawers(folder)) - {dead})
        folder.curves.unlink(missing_ok=True)
        wait_for(lambda: curves.request() or folder.curves.exists())
    assert warnings == ["drawing curves.png failed, training continues: the drawing process was killed"]


def test_a_batch_system_can_stop_the_drawing_process(folder, warnings):
    """It signals all processes of a run; the run itself then draws the last figure."""
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        process = find_drawer(folder)
        process.terminate()
        wait_for(lambda: curves.request() or set(find_drawers(folder)) - {process})
    assert folder.curves.exists() and warnings == []


def test_a_failed_run_draws_its_curves_and_an_interrupted_one_does_not(folder, warnings):
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


def test_the_drawing_process_exits_when_the_run_is_killed(folder):
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


def test_a_run_can_be_named_like_a_flag(tmp_path, monkeypatch, warnings):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(write_run(tmp_path / "--hours", build_lines(5)).name)
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        wait_for(folder.curves.exists)
    assert warnings == []


def test_a_run_without_metrics_is_silently_not_drawn(tmp_path, warnings):
    folder = RunFolder(tmp_path)
    with CurveDrawer(folder, warnings.append) as curves:
        curves.request()
        assert find_drawers(folder) == []
    assert warnings == [] and list(tmp_path.iterdir()) == []
