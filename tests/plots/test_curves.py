"""A run's metrics by step, from its folder or from the original script's log."""

import json

import pytest
from conftest import SHARED_DATA

from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.plots.curves import load_curves
from modeling_gpt2_repro.training.config import TrainingConfig

REFERENCE_LOG = SHARED_DATA / "reference_runs" / "build_nanogpt_fork_10b.log.txt"


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(TrainingConfig(run_name="run", tokens_per_step=2048), folder / "config.yaml")
    return folder


def write_metrics(folder, lines: list[str]) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_null_numbers_and_incomplete_lines_are_skipped(run_folder):
    write_metrics(
        run_folder,
        [
            '{"step": 0, "val/loss": 10.9}',
            '{"step": 1, "train/loss": NaN, "train/lr": 0.1}',
            '{"step": 2, "train/loss": 9.5, "train/lr": null}',
            '{"step": 3, "train/lo',
        ],
    )
    curves = load_curves(run_folder)
    assert (curves.name, curves.tokens_per_step, curves.last_step) == ("run", 2048, 2)
    assert {name: list(zip(s.steps, s.values, strict=True)) for name, s in curves.series.items()} == {
        "val/loss": [(0, 10.9)],
        "train/lr": [(1, 0.1)],
        "train/loss": [(2, 9.5)],
    }


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_logs_from_windows_are_read(tmp_path, end):
    log = tmp_path / "mine.log.txt"
    log.write_bytes(end.join(["0 val 10.9", "1 val 9.5", ""]).encode("utf-8-sig"))
    assert load_curves(log).get("val/loss").values.tolist() == [10.9, 9.5]
    log.write_bytes("0 val 10.9\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="is UTF-16"):
        load_curves(log)


def test_unordered_lines_are_sorted(run_folder):
    write_metrics(run_folder, [json.dumps({"step": step, "train/loss": step / 2}) for step in (3, 1, 2)])
    assert load_curves(run_folder).get("train/loss").steps.tolist() == [1, 2, 3]


def test_hours_of_metrics_without_a_time_are_interpolated(run_folder):
    lines = [{"step": step, "train/elapsed_seconds": 3600.0 * step} for step in (1, 2, 4)]
    write_metrics(run_folder, [json.dumps(line) for line in [*lines, {"step": 3, "val/loss": 1.0}]])
    curves = load_curves(run_folder)
    assert curves.count_hours(curves.get("val/loss").steps).tolist() == [3.0]


def test_the_original_scripts_log_is_read_with_its_numbering(tmp_path):
    log = tmp_path / "mine.log.txt"
    log.write_text("0 val 10.9522\n0 hella 0.2487\n0 train 10.955010\n1 train nan\n2 train 10.8\n2 notes x\n3 tr")
    curves = load_curves(log, logged_tokens_per_step=100)
    assert (curves.name, curves.tokens_per_step) == ("mine", 100)
    assert curves.get("train/loss").steps.tolist() == [1, 3]
    assert curves.get("val/loss").values.tolist() == [10.9522]
    assert curves.get("hellaswag/acc_norm").values.tolist() == [0.2487]


def test_a_folder_with_only_a_log_is_read_as_a_run(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 10.9\n")
    assert load_curves(tmp_path / "log").name == "log"
    assert load_curves(tmp_path / "log" / "log.txt").tokens_per_step == 524_288


def test_a_runs_log_matches_its_metrics(run_folder):
    write_metrics(run_folder, ['{"step": 7, "train/loss": 4.25}', '{"step": 7, "val/loss": 4.5}'])
    (run_folder / "log.txt").write_text("6 train 4.250000\n7 val 4.5000\n")
    ours, log = load_curves(run_folder), load_curves(run_folder / "log.txt")
    for metric in ("train/loss", "val/loss"):
        assert ours.get(metric).steps.tolist() == log.get(metric).steps.tolist() == [7]


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"step": 3}\n', "\x00\xff"])
def test_a_run_without_metrics_is_rejected(run_folder, content):
    if content is not None:
        (run_folder / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        load_curves(run_folder)


@pytest.mark.parametrize("content", ["", "hello\n", "1 train\n", "epoch 1 loss 3.5\n"])
def test_a_text_that_is_not_a_log_is_rejected(tmp_path, content):
    (tmp_path / "log.txt").write_text(content)
    with pytest.raises(UserError, match="not a log of the original script"):
        load_curves(tmp_path / "log.txt")


@pytest.mark.skipif(not REFERENCE_LOG.exists(), reason="needs ../shared/data/reference_runs, a log of a public run")
def test_a_real_log_is_read_completely():
    curves = load_curves(REFERENCE_LOG)
    assert {name: len(series) for name, series in curves.series.items()} == {
        "train/loss": 19073,
        "val/loss": 78,
        "hellaswag/acc_norm": 78,
    }
    assert curves.get("val/loss").values[-1] == 3.0663
    assert curves.last_step == 19073
