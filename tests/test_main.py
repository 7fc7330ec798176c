"""The commands of the package, and their former names in older READMEs and model cards."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from written_runs import build_lines, write_run

from modeling_gpt2_repro.__main__ import COMMANDS, main

PACKAGE = "modeling_gpt2_repro"
FORWARDS = {
    "reporting.summary": "summary",
    "reporting.plots": "plots",
    "reporting.hub": "publish",
    "evaluation.sampling": "sample",
    "nanogpt": "convert",
}


# Does what `python -m MODULE` does.
RUN_MODULE = "import runpy\nsys.argv[1:] = run['argv']\nrunpy.run_module({module!r}, run_name='__main__')"


def test_help_lists_the_commands_in_a_line_each(capsys):
    assert main(["--help"]) == main(["-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, description in COMMANDS.items():
        assert lines.count(f"  {name:10}{description}") == 2


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["plot", "runs/a"], "unknown command 'plot': choose one of plots, "),
        (["convrt"], "unknown command 'convrt': choose one of convert, "),
        (["--model=x"], "unknown command '--model=x': choose one of "),
        ([], "no command given: choose one of sample, plots, summary, publish, convert "),
    ],
)
def test_an_unknown_command_suggests_the_nearest_one(capsys, argv, complaint):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line and all(name in line for name in COMMANDS)


@pytest.mark.heavy
def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", PACKAGE, "summary"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for run, code in ((write_run(tmp_path / "run", build_lines(5)), 0), (tmp_path / "none", 2)):
        process = subprocess.run([*command, str(run)], env=environment, capture_output=True, text=True)
        assert process.returncode == code
        assert ("5 steps" in process.stdout and not process.stderr) == (code == 0)
        assert process.stderr.startswith("modeling_gpt2_repro: error: ") == (code == 2)


@pytest.mark.parametrize("module", FORWARDS)
def test_a_former_name_forwards_to_the_command(forks, tmp_path, module):
    script = RUN_MODULE.format(module=f"{PACKAGE}.{module}")
    forwarded = forks.run(PACKAGE, ["--help"], tmp_path, script=script)
    assert (forwarded.code, forwarded.err) == (0, "")
    assert forwarded.out.startswith(f"usage: python -m {PACKAGE} {FORWARDS[module]} ")
    assert forks.run(PACKAGE, ["--modle=x"], tmp_path, script=script).code == 2


@pytest.mark.parametrize(
    "module, argv",
    [("reporting.summary", ["RUN"]), ("reporting.plots", ["--hours", "RUN", "--tokens_per_step=1000"])],
)
def test_a_former_name_accepts_the_same_arguments(forks, tmp_path, capsys, module, argv):
    argv = [str(write_run(tmp_path / "run", build_lines(5))) if each == "RUN" else each for each in argv]
    forwarded = forks.run(PACKAGE, argv, tmp_path, script=RUN_MODULE.format(module=f"{PACKAGE}.{module}"))
    assert main([FORWARDS[module], *argv]) == forwarded.code == 0
    assert forwarded.out == capsys.readouterr().out
