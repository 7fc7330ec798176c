"""A run in a few lines."""

import json

import pytest

from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.training.config import TrainingConfig


@pytest.fixture
def run_folder(tmp_path, shards):
    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainingConfig(data_dir=str(shards), run_name="run", max_steps=2, hellaswag_file="my/items.jsonl")
    write_config(config, folder / "config.yaml")
    lines = [
        {"step": 1, "train/loss": 9.0, "train/tokens": 524288, "train/epoch": 0.5},
        {"step": 2, "train/loss": 8.0, "train/tokens": 1048576, "train/epoch": 1.0},
        {"step": 2, "val/loss": 8.25, "val/bpb": 3.5, "hellaswag/acc_norm": 0.2604},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": 1, "text": "early words"}, {"step": 2, "text": "last words"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def test_summary_says_what_was_reached_and_where_it_is(run_folder, capsys):
    (run_folder / "final").mkdir()
    (run_folder / "final" / "config.json").write_text("{}")
    scores = {"acc": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "n": 26}
    facts = {"model": str(run_folder / "final"), "data": "y", "dtype": "float32", "original": scores}
    (run_folder / "hellaswag_items.json").write_text(json.dumps(facts))
    (run_folder / "hellaswag_gpt2.json").write_text(json.dumps(facts | {"model": "gpt2"}))
    assert main(["summary", str(run_folder)]) == 0
    text, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert line.endswith("hellaswag_gpt2.json: it was measured with the model gpt2") and "hellaswag_gpt2" not in text
    assert "2 steps, 1,048,576 tokens" in text
    assert "8.2500 nats per token, 3.5000 bits per byte" in text
    assert "hellaswag_items, protocol original: acc_norm 0.5000 ± 0.1000 (standard error), 26 items, in " in text
    assert "in float32, acc 0.2500" in text
    assert "'last words'" in text
    assert str(run_folder / "metrics.jsonl") in text


def test_a_loss_of_an_earlier_model_is_shown_with_its_step(run_folder, capsys):
    with open(run_folder / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 3, "train/loss": 7.0}) + "\n")
    assert main(["summary", str(run_folder)]) == 0
    assert "3.5000 bits per byte, at step 2" in capsys.readouterr().out


def test_folders_without_metrics_are_refused(tmp_path, capsys):
    assert main(["summary", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main(["summary"]) == 2
