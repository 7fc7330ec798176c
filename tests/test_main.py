"""The commands of the package, and the names that README and model cards gave them before."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from written_runs import build_lines, write_run

from modeling_gpt2_repro.__main__ import COMMANDS, main

FORWARDS = {
    "reporting.summary": "summary",
    "reporting.plots": "plots",
    "reporting.hub": "publish",
    "evaluation.sampling": "sample",
    "nanogpt": "convert",
}


def run_module(module: str, *argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


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
def test_a_command_that_is_not_there_is_answered_with_the_nearest(capsys, argv, complaint):
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line and all(name in line for name in COMMANDS)


def test_the_package_runs_as_a_module(tmp_path):
    run = write_run(tmp_path / "run", build_lines(5))
    process = run_module("modeling_gpt2_repro", "summary", run)
    assert (process.returncode, process.stderr) == (0, "") and "5 steps" in process.stdout
    process = run_module("modeling_gpt2_repro", "summary", tmp_path / "none")
    assert process.returncode == 2 and process.stderr.startswith("modeling_gpt2_repro: error: ")


@pytest.mark.parametrize("module", FORWARDS)
def test_an_earlier_name_does_what_the_command_does(module):
    forwarded = run_module(f"modeling_gpt2_repro.{module}", "--help")
    assert (forwarded.returncode, forwarded.stderr) == (0, "")
    assert forwarded.stdout.startswith(f"usage: python -m modeling_gpt2_repro {FORWARDS[module]} ")


@pytest.mark.parametrize(
    "module, argv",
    [("reporting.summary", ["RUN"]), ("reporting.plots", ["--hours", "RUN", "--tokens_per_step=1000"])],
)
def test_an_earlier_name_takes_the_same_arguments(tmp_path, module, argv):
    argv = [str(write_run(tmp_path / "run", build_lines(5))) if each == "RUN" else each for each in argv]
    forwarded = run_module(f"modeling_gpt2_repro.{module}", *argv)
    command = run_module("modeling_gpt2_repro", FORWARDS[module], *argv)
    assert (forwarded.returncode, forwarded.stdout) == (command.returncode, command.stdout) == (0, command.stdout)
