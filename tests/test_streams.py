"""What is printed ends no program: in no encoding, and whoever has stopped reading."""

import json
import os
import pty
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import N_STEPS, flags, read_losses, run_training

import eval_hellaswag
import prepare_data
import train
from modeling_gpt2_repro.evaluation import sampling
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.reporting import summary
from modeling_gpt2_repro.streams import discard_unwritten, outliving_readers, prepare_streams

NAME = "ŝipo 日本 ▁"
PROMPT = "日本 naïve \U0001f600"
QUICK = {"eval_every": 0, "hellaswag_every": 0, "sample_every": 6, "sample_prompt": PROMPT, "sample_tokens": 24}


def run_in_fork(function: Callable[[], int], fork: Callable[[], tuple[int, int | None]] = lambda: (os.fork(), None)):
    """Run a function in a process of its own, as a script whose exit code it returns; return id and terminal."""
    process_id, terminal = fork()
    if process_id:
        return process_id, terminal
    code = 1
    try:
        code = function()
        sys.stdout.flush()  # as the interpreter does
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def wait_for_code(process_id: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])


def set_stream(name: str, encoding: str = "utf-8", errors: str = "strict") -> None:
    """Open a standard stream anew, as the interpreter does."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    setattr(sys, name, open(descriptor, "w", encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115


def redirect(encoding: str, stdout: Path, stderr: Path) -> None:
    """Give this process standard streams as the interpreter would have made them."""
    for descriptor, path, name, errors in ((1, stdout, "stdout", "strict"), (2, stderr, "stderr", "backslashreplace")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        set_stream(name, encoding, errors)


@pytest.fixture(scope="module")
def finished_run(shards, tmp_path_factory) -> Path:
    return run_training(shards, tmp_path_factory.mktemp("runs"), NAME, **QUICK)


def list_scripts(finished_run: Path, shards: Path, folder: Path) -> dict[str, tuple[Callable, list]]:
    """Return calls that print text which few encodings have."""
    data = folder / "data" / NAME
    (folder / f"{NAME}.txt").write_text(f"{PROMPT} and so on. " * 400)
    return {
        "train": (train.main, flags(shards, folder, NAME, **QUICK)),
        "prepare_data": (
            prepare_data.main,
            [f"--files={folder / NAME}.txt", f"--output_dir={data}"],
        ),
        "inspect": (prepare_data.main, [f"--output_dir={data}", "--inspect=1"]),
        "eval_hellaswag": (
            eval_hellaswag.main,
            [f"--model={finished_run / 'final'}", f"--data_file={SAMPLE_FILE}", "--limit=2"],
        ),
        "sampling": (sampling.main, [f"--model={finished_run / 'final'}", f"--prompt={PROMPT}", "--n_samples=1"]),
        "summary": (summary.main, [str(finished_run)]),
    }


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437", "shift_jis", "utf-16"])
def test_every_script_can_say_what_it_has_to_say(shards, finished_run, tmp_path, encoding):
    scripts = list_scripts(finished_run, shards, tmp_path)
    for name, (main, argv) in scripts.items():
        if encoding != "latin-1" and name in ("train", "eval_hellaswag"):
            continue
        out, err = tmp_path / "out", tmp_path / "err"
        process_id, _ = run_in_fork(lambda main=main, argv=argv: (redirect(encoding, out, err), main(argv))[1])  # noqa: B023
        assert wait_for_code(process_id) == 0, err.read_text(errors="replace")
        text = out.read_bytes().decode(encoding)
        if name != "prepare_data":
            assert "日本" in text or r"\u65e5\u672c" in text, name


def test_a_line_survives_every_encoding_that_python_has(tmp_path):
    from encodings.aliases import aliases

    encodings = sorted(set(aliases.values()))
    assert len(encodings) > 80

    def print_in_all() -> int:
        for encoding in encodings:
            try:
                redirect(encoding, tmp_path / "out", tmp_path / "err")
            except LookupError:  # of bytes, or of another system
                continue
            prepare_streams()
            print(PROMPT + "\ud800")
        return 0

    assert wait_for_code(run_in_fork(print_in_all)[0]) == 0


def test_a_choice_of_the_user_stays(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii", errors="replace") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        prepare_streams()
        print("日", flush=True)
    assert (tmp_path / "out").read_text() == "?\n"


def give_nobody(kind: str) -> None:
    """Give this process a stdout that nobody reads, or that takes nothing."""
    if kind == "closed":
        os.close(1)
        sys.stdout = None
        return
    if kind == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    os.dup2(writer, 1)
    set_stream("stdout")


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_a_run_needs_nobody_who_reads(shards, tmp_path, kind):
    process_id, _ = run_in_fork(lambda: (give_nobody(kind), train.main(flags(shards, tmp_path, **QUICK)))[1])
    assert wait_for_code(process_id) == 0
    assert list(read_losses(tmp_path / "run")) == list(range(1, N_STEPS + 1))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("kind, code", [("pipe", 141), ("full", 2), ("closed", 0)])
def test_a_command_ends_as_others_do_where_nobody_reads(finished_run, tmp_path, kind, code):
    def describe() -> int:
        os.dup2(os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT), 2)
        set_stream("stderr")
        give_nobody(kind)
        return summary.main([str(finished_run)])

    assert wait_for_code(run_in_fork(describe)[0]) == code
    err = (tmp_path / "err").read_text()
    assert "Traceback" not in err and err.count("\n") == (code == 2), err


def test_a_terminal_that_closes_costs_nothing(shards, tmp_path):
    """The system sends the run SIGHUP, and nothing can be written to it any more."""
    argv = flags(shards, tmp_path, **QUICK | {"save_every": 0, "max_steps": 100_000, "sample_tokens": 32})

    def train_on_terminal() -> int:
        set_stream("stdout")
        set_stream("stderr")
        return train.main(argv)

    process_id, terminal = run_in_fork(train_on_terminal, pty.fork)
    deadline = time.monotonic() + 60
    while '"step": 3' not in (shown := read_if_there(tmp_path / "run" / "metrics.jsonl")):
        assert time.monotonic() < deadline, shown
        time.sleep(0.02)
        drain(terminal)
    os.close(terminal)
    assert wait_for_code(process_id) == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted" and status["step"] >= 3
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:07d}").is_dir()


def read_if_there(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def drain(terminal: int) -> None:
    os.set_blocking(terminal, False)
    with outliving_readers():
        os.read(terminal, 65536)


def test_what_could_not_be_written_is_forgotten(tmp_path):
    def leave_unwritten() -> int:
        give_nobody("full")
        sys.stdout.write("text")
        discard_unwritten()
        return 0

    assert wait_for_code(run_in_fork(leave_unwritten)[0]) == 0
