"""The record of a run."""

import json
import time

import pytest
from accelerate import Accelerator

from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.metrics import read_json_lines
from modeling_gpt2_repro.training.record import RunRecord
from modeling_gpt2_repro.training.run_folder import RunFolder


@pytest.fixture
def record(tmp_path) -> RunRecord:
    record = RunRecord(RunFolder(tmp_path / "run"), Accelerator(), print, [])
    record.start(TrainingConfig(), first_step=None)
    for step in range(1, 5):
        record.log(step, {"train/loss": 5.0 - step})
        record.log_samples(step, [f"text {step}"])
    record.log(4, {"val/loss": 1.5, "hellaswag/acc_norm": 0.25})
    return record


def begin_again(record: RunRecord) -> RunRecord:
    """Close a record, and return that of the next process."""
    record.close()
    return RunRecord(record.folder, Accelerator(), print, [])


def test_the_log_has_the_original_scripts_format(record):
    assert (record.folder.path / "log.txt").read_text() == (
        "0 train 4.000000\n1 train 3.000000\n2 train 2.000000\n3 train 1.000000\n4 val 1.5000\n4 hella 0.2500\n"
    )


def test_resuming_deletes_later_steps_from_every_file(record, tmp_path):
    with open(record.folder.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "train/lo')  # as after a crash
    again = begin_again(record)
    again.start(TrainingConfig(), first_step=2)
    again.log(3, {"train/loss": 9.0})
    assert [line["step"] for line in read_json_lines(record.folder.path / "metrics.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in read_json_lines(record.folder.path / "samples.jsonl")] == [1, 2]
    assert (record.folder.path / "log.txt").read_text() == "0 train 4.000000\n1 train 3.000000\n2 train 9.000000\n"


def test_non_finite_numbers_are_omitted(record):
    record.log(5, {"train/loss": float("nan"), "train/lr": 1.0})
    assert json.loads((record.folder.path / "metrics.jsonl").read_text().splitlines()[-1]) == {
        "step": 5,
        "train/lr": 1.0,
    }


def test_a_run_that_never_started_keeps_the_old_status(record, tmp_path):
    RunRecord(RunFolder(tmp_path / "run"), Accelerator(), print, []).set_status("failed")
    assert json.loads((record.folder.path / "status.json").read_text())["status"] == "running"


def test_the_elapsed_time_of_a_resumed_run_continues(record, tmp_path):
    record.log(5, {"train/elapsed_seconds": 500.0})
    record.log(6, {"train/elapsed_seconds": 9000.0})
    again = begin_again(record)
    again.start(TrainingConfig(), first_step=5)
    assert 500 <= time.monotonic() - again.started < 9000


@pytest.mark.parametrize(
    ("first_step", "resume_from", "kept"),
    [
        (None, "never", []),
        (None, "auto", ["best"]),
        (2, "auto", ["best", "final"]),
        (2, "elsewhere/step_0000002", ["best", "final"]),
    ],
)
def test_a_model_is_kept_until_another_one_replaces_it(record, tmp_path, first_step, resume_from, kept):
    for name in ("best", "final"):
        (record.folder.path / name).mkdir()
    again = begin_again(record)
    again.start(TrainingConfig(save_best=True, resume_from_checkpoint=resume_from), first_step=first_step)
    assert [name for name in ("best", "final") if (record.folder.path / name).exists()] == kept


def test_checkpoints_can_be_on_another_disk(record, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step_0000002").mkdir(parents=True)
    (record.folder.path / "checkpoints").symlink_to(elsewhere)
    begin_again(record).start(TrainingConfig(), first_step=None)
    assert (record.folder.path / "checkpoints").is_symlink() and not any(elsewhere.iterdir())
