"""Printing never ends a program, in any encoding, with or without a reader."""

import json
import os
import sys
from encodings.aliases import aliases
from pathlib import Path

import pytest
from small_corpora import write_small_data
from small_runs import N_STEPS, flags, read_losses, run_training

from modeling_gpt2_repro.core.streams import prepare_streams
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE

COMMANDS = "modeling_gpt2_repro.__main__"
NAME = "ŝipo 日本 ▁"
PROMPT = "日本 naïve \U0001f600"
QUICK = {
    "n_layer": 1,
    "n_embd": 8,
    "sequence_length": 256,
    "tokens_per_step": 256,
    "eval_every": 0,
    "hellaswag_every": 0,
    "sample_every": 6,
    "sample_prompt": PROMPT,
    "sample_tokens": 40,
}


@pytest.fixture
def run_script(forks, tmp_path):
    """Return a function that runs a script in a separate process, with the standard streams that `prepare` sets up."""

    def run(prepare: str, module: str, argv: list[object]):
        call = f"importlib.import_module({module!r}).main({[str(each) for each in argv]!r})"
        script = f"import importlib\nfrom standard_streams import *\n{prepare}\nend({call})"
        return forks.run("standard_streams", [], tmp_path, script=script)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory) -> Path:
    return run_training(data, tmp_path_factory.mktemp("runs"), NAME, **QUICK)


def list_scripts(finished_run: Path, given: Path, folder: Path) -> dict[str, tuple[str, list]]:
    """Return calls that print text which few encodings can represent."""
    data, model = folder / "data" / NAME, finished_run / "final"
    (folder / f"{NAME}.txt").write_text(f"{PROMPT} and so on. " * 400)
    return {
        "train": ("train", flags(given, folder, NAME, **QUICK)),
        "prepare_data": ("prepare_data", [f"--files={folder / NAME}.txt", f"--output_dir={data}", "--num_workers=1"]),
        "inspect": ("prepare_data", [f"--output_dir={data}", "--inspect=1"]),
        "eval_hellaswag": (
            "eval_hellaswag",
            [f"--model={model}", f"--data_file={SAMPLE_FILE}", "--limit=2", "--protocol=original"],
        ),
        "sampling": (COMMANDS, ["sample", f"--model={model}", f"--prompt={PROMPT}", "--n_samples=1"]),
        "summary": (COMMANDS, ["summary", finished_run]),
    }


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-16"])
def test_every_script_prints_in_every_encoding(data, finished_run, tmp_path, run_script, encoding):
    out = tmp_path / "out"
    for name, (module, argv) in list_scripts(finished_run, data, tmp_path).items():
        if encoding != "latin-1" and name in ("train", "eval_hellaswag"):
            continue
        result = run_script(f"redirect({str(out)!r}, {encoding!r})", module, argv)
        assert result.code == 0, result.err
        text = out.read_bytes().decode(encoding)
        assert "日本" in text or r"\u65e5\u672c" in text, name


def test_a_line_can_be_printed_in_every_encoding_of_python(tmp_path, monkeypatch):
    encodings = sorted(set(aliases.values()))
    assert len(encodings) > 80
    for encoding in encodings:
        try:
            with open(tmp_path / "out", "w", encoding=encoding) as stream:
                monkeypatch.setattr(sys, "stdout", stream)
                prepare_streams()
                print(PROMPT + "\ud800", flush=True)
        except LookupError:  # a bytes-to-bytes codec, or another system's encoding
            continue


def test_the_users_error_handler_is_kept(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii", errors="replace") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        prepare_streams()
        print("日", flush=True)
    assert (tmp_path / "out").read_text() == "?\n"


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_a_run_finishes_without_a_reader_of_its_output(data, tmp_path, run_script, kind):
    result = run_script(f"break_stdout({kind!r})", "train", flags(data, tmp_path, **QUICK))
    assert result.code == 0, result.err
    assert list(read_losses(tmp_path / "run")) == list(range(1, N_STEPS + 1))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kind, code", [("pipe", 141), ("full", 2), ("closed", 0)])
def test_a_command_without_a_reader_exits_as_unix_tools_do(finished_run, run_script, kind, code):
    result = run_script(f"break_stdout({kind!r})", COMMANDS, ["summary", finished_run])
    assert result.code == code
    assert "Traceback" not in result.err and result.err.count("\n") == (code == 2), result.err


def test_a_closed_terminal_preempts_the_run(data, tmp_path, forks):
    """The system sends the run SIGHUP, and writing to the terminal fails."""
    run, argv = tmp_path / "run", flags(data, tmp_path, **QUICK | {"save_every": 0, "max_steps": 100_000})
    script = f"from standard_streams import *\nend(run_on_terminal({argv!r}, Path({str(run)!r})))"
    assert forks.run("standard_streams", [], tmp_path, script=script).code == 75
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "preempted" and status["step"] >= 3
    assert (run / "checkpoints" / f"step_{status['step']:07d}").is_dir()


def test_the_second_of_two_runs_with_one_name_is_rejected(data, tmp_path, forks):
    """As with `srun -n 2 python train.py`, or when a requeued job overlaps the old one."""
    argv = flags(data, tmp_path, **QUICK | {"sample_every": 0, "save_every": 0, "max_steps": 300})
    result = forks.run(
        "standard_streams", [], tmp_path, script=f"from standard_streams import *\nrun_twice(train.main, {argv!r})"
    )
    codes = {int(code): int(process) for process, code in map(str.split, result.out.splitlines()[-2:])}
    assert sorted(codes) == [0, 2], result.err
    (line,) = [line for line in result.err.splitlines() if "error: " in line]
    assert f"process {codes[0]} on {os.uname().nodename}, since 20" in line
    assert list(read_losses(tmp_path / "run")) == list(range(1, 301))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
