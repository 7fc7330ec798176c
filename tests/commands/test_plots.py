"""The command that draws runs."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, SHARED_DATA
from written_runs import build_lines, write_run

from modeling_gpt2_repro.__main__ import main

REFERENCE_LOG = SHARED_DATA / "reference_runs" / "build_nanogpt_fork_10b.log.txt"


def test_the_command_draws_one_run_into_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", build_lines(50))
    assert main(["plots", str(run)]) == 0
    assert (run / "curves.png").exists()
    assert "run: step 50, 26.21M tokens, 50 min: train 4.5110, validation 4.6110" in capsys.readouterr().out


@pytest.mark.heavy
def test_the_command_compares_runs_with_logs_in_a_new_process(tmp_path):
    run, again = write_run(tmp_path / "run", build_lines(50)), tmp_path / "again" / "run"
    shutil.copytree(run, again)
    (tmp_path / "log.txt").write_text("0 train 10.9\n0 val 10.9\n0 hella 0.25\n1 train 10.8\n")
    command = [sys.executable, "-m", "modeling_gpt2_repro", "plots", "run", "again/run", "log.txt"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    first, second, *_, last = process.stdout.splitlines()
    assert first.startswith("run: ") and second.startswith("again/run: ")  # equal names, so the path is added
    assert last == "figure saved as comparison.png"


@pytest.mark.parametrize("kind, head", [("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_of_the_output_selects_its_format(tmp_path, kind, head):
    run = write_run(tmp_path / "run", build_lines(5))
    assert main(["plots", str(run), "--output", str(tmp_path / f"picture.{kind}")]) == 0
    assert (tmp_path / f"picture.{kind}").read_bytes().startswith(head)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: RUN"),
        (["missing"], "missing has neither metrics.jsonl nor log.txt"),
        (["empty"], "empty has neither metrics.jsonl nor log.txt"),
        (["run", "--tokens_per_step=0"], "--tokens_per_step must be 1 or more"),
        (["run", "--tokens_per_step=many"], "invalid int value: 'many'"),
        (["run", "--output=curves.bmp"], "its name must end in .png, .svg, .pdf"),
        (["run", "--output=missing/curves.png"], "cannot write missing/curves.png: No such file or directory"),
        (["run", "--output=log.txt/curves.png"], "cannot write log.txt/curves.png: Not a directory"),
        (["run", "log.txt", "--hours"], "has no recorded times"),
        (["run", "--spectrum"], "detecting periods needs at least 128 steps"),
        (["run", "--hour"], "unknown setting --hour: did you mean --hours?"),
    ],
)
def test_mistakes_give_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", build_lines(5))
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.txt").write_text("0 train 10.9\n")
    assert main(["plots", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_read_only_folder_is_reported(capsys):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are readable only by their owner
        os.chmod(folder, 0o755)
        run = write_run(Path(folder) / "run", build_lines(5))
        run.chmod(0o555)
        with without_privileges():
            assert main(["plots", str(run)]) == 2
        run.chmod(0o755)
    assert f"cannot write {run / 'curves.png'}: Permission denied" in capsys.readouterr().err


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Drop root's privileges, with which every folder is writable."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.skipif(not REFERENCE_LOG.exists(), reason="needs ../shared/data/reference_runs, a log of a public run")
def test_the_command_draws_the_spectrum_and_reports_the_periods(tmp_path, capsys):
    assert main(["plots", str(REFERENCE_LOG), "--spectrum", f"--output={tmp_path / 'spectrum.png'}"]) == 0
    assert "the train loss has periods of 46.5 steps" in capsys.readouterr().out
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
