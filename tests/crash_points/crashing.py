"""Commands that are killed at one of their system calls, or in which that call fails, and that are then repeated."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from fork_server import ForkServer
from tracing import Call, choose_points, find_undurable, list_options, read_trace

FORMS = {"kill": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}


@dataclass(frozen=True)
class Scenario:
    """A command, and what must hold in its folder.

    Attributes:
        module, argv: the command, as a function of the folder.
        start: creates the initial contents of the folder.
        check_kept: asserts that no complete file was lost, from the folder and the calls made so far.
        check_end: asserts that the repeated command ended like an undisturbed one, from the folder and whether the
            first command was killed.
        script: code to run instead of the command, as a function of the folder.
        about: the part of the folder whose calls are tested.
        is_racing: threads race to make these calls, so a call may be missing in the next run.
    """

    module: str
    argv: Callable[[Path], Sequence[object]]
    start: Callable[[Path], object]
    check_kept: Callable[[Path, Sequence[Call]], None]
    check_end: Callable[[Path, bool], None]
    script: Callable[[Path], str] = lambda folder: ""
    about: str = "."
    is_racing: bool = False


class Crasher:
    """Runs the command of a scenario in forks of a process that has imported everything, each in a fresh folder.

    The folder always has the same path, because some files contain paths.
    """

    def __init__(self, server: ForkServer, scenario: Scenario, folder: Path):
        self.server, self.scenario, self.home = server, scenario, folder
        self.folder = folder / "here"

    def begin(self) -> None:
        """Reset the folder to its initial contents."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.scenario.start(self.folder)

    def run(self, strace: Sequence[str] = ()):
        """Run the command."""
        scenario = self.scenario
        argv, script = scenario.argv(self.folder), scenario.script(self.folder)
        return self.server.run(scenario.module, argv, self.home, script=script, strace=strace)

    @cached_property
    def calls(self) -> list[Call]:
        """The system calls of an undisturbed command."""
        self.begin()
        self.existing = [str(path) for path in self.folder.rglob("*")]
        result = self.run(list_options(self.home / "trace"))
        assert result.code == 0, result.err
        self.scenario.check_end(self.folder, True)
        return read_trace(self.home / "trace")

    def find_undurable(self) -> list[str]:
        """Return what a power failure could lose (see `tracing.find_undurable`)."""
        reports = [str(self.home / name) for name in ("stdout", "stderr")]
        return find_undurable(self.calls, self.folder, self.existing, reports)

    def disturb(self, point: Call, form: str) -> str | None:
        """Kill the command at a call, or let the call fail, and repeat the command; return the problem, if any."""
        self.begin()
        options = list_options(self.home / "trace")
        try:
            result = self.run([*options, "-e", f"inject={point.name}:{FORMS[form]}:when={point.number}"])
            expected = (-9, *((0,) if self.scenario.is_racing else ())) if form == "kill" else (0, 2)
            assert result.code in expected, f"it ended with {result.code}: {result.err}"
            assert "Traceback" not in result.err, result.err
            calls = read_trace(self.home / "trace")
            self.scenario.check_kept(self.folder, calls)
            again = self.run(options)
            assert again.code == 0, f"repeated, it ended with {again.code}: {again.err}"
            # The second command must not rely on anything that the first one left undurable.
            calls += read_trace(self.home / "trace")
            undurable = find_undurable(calls, self.folder, self.existing, is_disturbed=True)
            assert not undurable, "; ".join(undurable)
            self.scenario.check_end(self.folder, form == "kill")
        except AssertionError as error:
            return f"{form} at {point.name} {point.number} of {', '.join(point.paths)}: {error}"
        return None

    def disturb_all(self, form: str, share: float = 1.0) -> tuple[int, list[str]]:
        """Test every point, or a share of them; return their number and the problems."""
        points = choose_points(self.calls, self.folder / self.scenario.about, share)
        problems = [problem for point in points if (problem := self.disturb(point, form)) is not None]
        return len(points), problems


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which injects the faults, is missing")
class CrashTests:
    """Tests of the fixture `crasher` in the module of a subclass.

    Attributes:
        share: the share of the points that `make test` tries.
        at_least: the minimum number of points.
    """

    share: float
    at_least: int

    def test_files_are_durable_before_they_are_named_and_anything_older_is_deleted(self, crasher: Crasher):
        assert crasher.find_undurable() == []

    @pytest.mark.parametrize("form", FORMS)
    def test_a_sample_of_crash_points_is_survived(self, crasher: Crasher, form: str):
        self.assert_survived(crasher, form, self.share)

    @pytest.mark.slow
    @pytest.mark.parametrize("form", FORMS)
    def test_every_crash_point_is_survived(self, crasher: Crasher, form: str):
        self.assert_survived(crasher, form, 1.0)

    def assert_survived(self, crasher: Crasher, form: str, share: float) -> None:
        n_points, problems = crasher.disturb_all(form, share)
        print(f"{form}: {n_points - len(problems)} of {n_points} points survived")
        assert not problems, "\n\n".join(problems)
        assert n_points >= self.at_least * share


def list_tree(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files under a folder by path; those of folders are empty."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}
