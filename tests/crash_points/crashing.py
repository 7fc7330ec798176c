"""Commands that are killed, or hindered, at each of their system calls, and given again."""

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
    """A command, and what has to hold of the folder in which it works.

    Attributes:
        module, argv: the command, given the folder.
        start: makes what is there before, given the folder.
        check_kept: asserts, given the folder and the calls that were made before, that nothing whole was lost.
        check_end: asserts, given the folder and whether the command was killed, that it ended as it does undisturbed.
        script: given the folder, code to run in the command's place.
        about: what of the folder the calls are about that may be the last.
        is_racing: threads race to make these calls, so that one of them may not be made the next time.
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
    """Runs a scenario's command in forks of a process that has imported everything, in a folder of its own each time.

    The folder has always the same path, because paths are parts of some files.
    """

    def __init__(self, server: ForkServer, scenario: Scenario, folder: Path):
        self.server, self.scenario, self.home = server, scenario, folder
        self.folder = folder / "here"

    def begin(self) -> None:
        """Put the folder into the state before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.scenario.start(self.folder)

    def run(self, strace: Sequence[str] = ()):
        """Give the command."""
        scenario = self.scenario
        argv, script = scenario.argv(self.folder), scenario.script(self.folder)
        return self.server.run(scenario.module, argv, self.home, script=script, strace=strace)

    @cached_property
    def calls(self) -> list[Call]:
        """The calls of the command where nothing happens to it."""
        self.begin()
        self.existing = [str(path) for path in self.folder.rglob("*")]
        result = self.run(list_options(self.home / "trace"))
        assert result.code == 0, result.err
        self.scenario.check_end(self.folder, True)
        return read_trace(self.home / "trace")

    def find_undurable(self) -> list[str]:
        """Return what a loss of power could cost (`tracing.find_undurable`)."""
        reports = [str(self.home / name) for name in ("stdout", "stderr")]
        return find_undurable(self.calls, self.folder, self.existing, reports)

    def hit(self, point: Call, form: str) -> str | None:
        """Let one call be the last, or fail, and give the command again; return what is wrong then."""
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
            assert again.code == 0, f"given again it ended with {again.code}: {again.err}"
            # What the first command left undone, the second one may not take for done.
            calls += read_trace(self.home / "trace")
            undurable = find_undurable(calls, self.folder, self.existing, is_disturbed=True)
            assert not undurable, "; ".join(undurable)
            self.scenario.check_end(self.folder, form == "kill")
        except AssertionError as error:
            return f"{form} at {point.name} {point.number} of {', '.join(point.paths)}: {error}"
        return None

    def hit_all(self, form: str, share: float = 1.0) -> tuple[int, list[str]]:
        """Hit every point, or a share of them; return how many, and what was wrong."""
        points = choose_points(self.calls, self.folder / self.scenario.about, share)
        problems = [problem for point in points if (problem := self.hit(point, form)) is not None]
        return len(points), problems


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which kills and hinders, is missing")
class CrashTests:
    """The tests of the fixture `crasher` of the module in which a class inherits them.

    Attributes:
        share: of its points, how large a sample `make test` tries.
        at_least: how many points there are at least.
    """

    share: float
    at_least: int

    def test_what_takes_a_name_is_durable_before_anything_older_goes(self, crasher: Crasher):
        assert crasher.find_undurable() == []

    @pytest.mark.parametrize("form", FORMS)
    def test_some_call_is_the_last_or_fails(self, crasher: Crasher, form: str):
        self.assert_survived(crasher, form, self.share)

    @pytest.mark.slow
    @pytest.mark.parametrize("form", FORMS)
    def test_each_call_is_the_last_or_fails(self, crasher: Crasher, form: str):
        self.assert_survived(crasher, form, 1.0)

    def assert_survived(self, crasher: Crasher, form: str, share: float) -> None:
        n_points, problems = crasher.hit_all(form, share)
        print(f"{form}: {n_points - len(problems)} of {n_points} points survived")
        assert not problems, "\n\n".join(problems)
        assert n_points >= self.at_least * share


def list_tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file under a folder; of a folder itself, nothing."""
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}
