"""What trackers get to know of a run, in the files that they write themselves."""

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from conftest import REPOSITORY
from small_runs import flags, read_series
from tracker_files import PATIENCE_SECONDS, read_tensorboard, read_wandb_run

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.training.checkpoint import load_state
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.trackers import choose_trackers, has_wandb_key
from modeling_gpt2_repro.training.tracking import RunRecord, read_json_lines


@pytest.fixture(autouse=True)
def _nobodys_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("NETRC", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def train_in_a_terminal(argv: list[str], folder: Path) -> str:
    """Run train.py with a terminal as its input and output; a question, to which silence is the answer, ends it."""
    terminal, end = pty.openpty()
    command = [sys.executable, str(REPOSITORY / "train.py"), *argv]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, cwd=folder, start_new_session=True)
    os.close(end)
    printed = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the other end open
        while select.select([terminal], [], [], PATIENCE_SECONDS)[0]:
            printed += os.read(terminal, 65536)
    os.close(terminal)  # which hangs up, and so ends a process that still waits
    assert process.wait() == 0, printed.decode()
    return printed.decode()


def read_wandb_runs(run: Path) -> list[dict]:
    return [read_wandb_run(path) for path in sorted(run.rglob("*.wandb"), key=lambda path: path.stat().st_mtime)]


def read_table(run: Path) -> list:
    """Return the last table of samples that wandb was given."""
    tables = [json.loads(path.read_text()) for path in run.rglob("samples_*.table.json")]
    return max((table["data"] for table in tables), key=len)


def test_trackers_show_what_the_files_say_also_of_a_resumed_run(shards, tmp_path):
    argv = flags(shards, tmp_path, report_to="wandb,tensorboard")
    printed = train_in_a_terminal(argv, tmp_path)
    assert "tracked by wandb and tensorboard" in printed
    run = tmp_path / "run"
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    train_in_a_terminal(argv, tmp_path)

    first, second = read_wandb_runs(run)
    state = load_state(run / "checkpoints" / "step_0000012")
    assert first["id"] == second["id"] == state.tracker_run_id
    assert first["name"] == second["name"] == "run"
    assert first["config"]["learning_rate"] == 2e-2
    assert second["summary"]["hellaswag/protocol"] == "original"
    scalars, texts = read_tensorboard(run / "tensorboard")
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/bpb", "hellaswag/acc_norm"):
        series = read_series(run, name)
        history = {step: items[name] for step, items in first["history"].items() if name in items and step <= 6}
        history |= {step: items[name] for step, items in second["history"].items() if name in items}
        assert history == pytest.approx(series), name
        assert scalars[name] == pytest.approx(series), name
        assert second["summary"][name] == pytest.approx(series[12])
    samples = [[line["step"], line["text"]] for line in read_json_lines(run / "samples.jsonl")]
    assert {step for step, _ in samples} == {0, 6, 12}
    assert read_table(run) == samples
    assert list(texts["samples"]) == [0, 6, 12]
    for step, shown in texts["samples"].items():
        written = [text for at, text in samples if at == step]
        assert [text.split() for text in shown.split("\n\n---\n\n")] == [text.split() for text in written]
    assert "learning_rate: 0.02" in texts["config"][6]


class Warnings(list):
    def __call__(self, text: str) -> None:
        self.append(text)


def start_record(folder: Path, report_to: str, first_step: int | None = None) -> RunRecord:
    record = RunRecord(folder, Accelerator(), warn=Warnings())
    record.start(TrainingConfig(run_name="run", report_to=report_to), first_step)
    return record


def log_steps(record: RunRecord, steps: range) -> None:
    for step in steps:
        record.log(step, {"train/loss": 5.0 - step})
        record.log_samples(step, [f"text {step}", f"other {step}"])


def test_a_tracker_that_does_not_start_is_told_all_at_the_end_and_others_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    record = start_record(tmp_path / "run", "wandb,tensorboard")
    log_steps(record, range(1, 4))
    (warning,) = record._warn
    assert warning.startswith("the tracker tensorboard failed, training goes on without it: FileExistsError")
    (record.folder / "tensorboard").unlink()
    record.close()
    assert record._warn[1:] == ["the tracker tensorboard was told at the end what it had missed"]
    scalars, texts = read_tensorboard(record.folder / "tensorboard")
    assert scalars["train/loss"] == {1: 4.0, 2: 3.0, 3: 2.0}
    assert list(texts["samples"]) == [1, 2, 3]
    (run,) = read_wandb_runs(record.folder)
    assert {step: items["train/loss"] for step, items in run["history"].items()} == {1: 4.0, 2: 3.0, 3: 2.0}


def test_what_wandb_missed_while_its_service_was_dead_is_told_at_the_end(tmp_path):
    record = start_record(tmp_path / "run", "wandb")
    log_steps(record, range(1, 4))
    (service,) = (child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core")
    service.kill()
    service.wait()
    log_steps(record, range(4, 8))
    record.close()
    first, last = record._warn
    assert first.startswith("the tracker wandb failed, training goes on without it")
    assert last == "the tracker wandb was told at the end what it had missed"
    told = read_wandb_run(max(record.folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime))
    losses = {step: items["train/loss"] for step, items in told["history"].items()}
    # One message may vanish in the dead service's socket before anybody knows.
    assert losses == {step: 5.0 - step for step in range(min(losses), 8)} and min(losses) <= 5
    assert told["id"] == record.tracker_run_id
    assert read_table(record.folder)[-2:] == [[7, "text 7"], [7, "other 7"]]
    assert len(read_table(record.folder)) == 14


def test_a_resumed_run_does_not_show_what_it_went_back_from(tmp_path):
    record = start_record(tmp_path / "run", "tensorboard")
    log_steps(record, range(1, 6))
    record.close()
    record = start_record(tmp_path / "run", "tensorboard", first_step=3)
    record.log(4, {"train/loss": 0.5})
    record.close()
    scalars, texts = read_tensorboard(tmp_path / "run" / "tensorboard")
    assert scalars["train/loss"] == {1: 4.0, 2: 3.0, 3: 2.0, 4: 0.5}
    assert list(texts["samples"]) == [1, 2, 3]


def test_a_new_run_in_the_folder_of_another_is_another_one(tmp_path):
    record = start_record(tmp_path / "run", "tensorboard")
    record.log(0, {"val/loss": 9.0})
    log_steps(record, range(1, 6))
    record.close()
    again = start_record(tmp_path / "run", "tensorboard")
    again.log(1, {"train/loss": 0.5})
    again.close()
    assert read_tensorboard(tmp_path / "run" / "tensorboard")[0] == {"train/loss": {1: 0.5}}
    assert again.tracker_run_id != record.tracker_run_id


def test_wandb_is_chosen_only_with_a_key_or_on_request(monkeypatch, tmp_path):
    assert choose_trackers("auto") == choose_trackers("none") == []
    assert choose_trackers("wandb") == ["wandb"]
    assert choose_trackers("tensorboard,wandb") == ["wandb", "tensorboard"]
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine api.wandb.ai\n  login user\n  password key\n")
    netrc.chmod(0o600)
    assert choose_trackers("auto") == ["wandb"]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_trackers("auto") == []
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    assert choose_trackers("auto") == ["wandb"]
    assert choose_trackers("none") == []


@pytest.mark.parametrize("requested", ["tensorbord", "wandb,", "all", "wandb, tensorboard", "none,wandb", ""])
def test_unknown_trackers_are_refused(requested):
    with pytest.raises(UserError, match="has to be auto, none, or one or more of wandb, tensorboard"):
        TrainingConfig(report_to=requested)


def test_a_tracker_that_is_not_installed_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        choose_trackers("tensorboard")


def test_nobody_needs_a_home(monkeypatch, tmp_path):
    """As in a container, whose user id has neither a name nor a home."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_wandb_key()
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert has_wandb_key()
