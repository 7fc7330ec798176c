"""The summary of a run, in a block that fits the terminal."""

import dataclasses
import json
import math

import pytest
from conftest import REPOSITORY

from modeling_gpt2_repro.__main__ import main
from modeling_gpt2_repro.commands.summary import FULL_RUN_TOKENS, summarize
from modeling_gpt2_repro.core.arguments import parse_arguments, write_config
from modeling_gpt2_repro.core.terminal import count_columns
from modeling_gpt2_repro.data.shards import fingerprint_split, load_manifest
from modeling_gpt2_repro.data.unigram import measure_unigram_loss
from modeling_gpt2_repro.training.checkpoint import TrainingState
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder

LONG_TEXT = "They said: " + "the function returns 小さな船 \n\x1b[31m" * 20
# FLOPs per token of the 124M model, as printed by train.py --plan.
FULL_FLOPS = 855_166_464


@pytest.fixture
def run_folder(tmp_path, shards, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainingConfig(
        data_dir=str(shards),
        run_name="run",
        max_steps=2,
        sequence_length=16,
        eval_tokens=64,
        hellaswag_file="my.jsonl",
    )
    write_config(config, folder / "config.yaml")
    lines = [
        {"step": 1, "train/loss": 9.0, "train/tokens": 524288, "train/epoch": 0.5, "train/tokens_per_second": 1000.0},
        {"step": 2, "train/loss": 8.0, "train/tokens": 1048576, "train/flops": 1e6 * 1048576},
        {"step": 2, "val/loss": 8.25, "val/bpb": 3.5, "hellaswag/acc_norm": 0.2604},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    samples = [(0, "early words"), (0, "more"), (1, "middle"), (2, "last words"), (2, "even more")]
    write_lines(folder / "samples.jsonl", [{"step": step, "text": text} for step, text in samples])
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_rows(folder):
    """Return the summary's values by label, unwrapped."""
    lines, rows = summarize(RunFolder(folder), 10_000), {}
    for line in lines[1:]:
        rows[line[:18].strip()] = line[18:]
    return rows


def test_the_loss_is_shown_beside_the_unigram_entropy_and_chance(run_folder, shards):
    rows, vocab_size = read_rows(run_folder), load_manifest(shards).vocab_size
    assert rows["validation loss"] == "8.2500 nats per token, 3.5000 bits per byte"
    unigram_loss = measure_unigram_loss(str(shards), n_windows=4, sequence_length=16, vocab_size=vocab_size)
    assert rows["unigram entropy"].startswith(f"{unigram_loss:.4f}, ")
    assert rows["chance"].startswith(f"{math.log(vocab_size):.4f}, ")


def test_the_vocabulary_is_that_of_the_model(run_folder):
    (run_folder / "final").mkdir()
    (run_folder / "final" / "config.json").write_text('{"vocab_size": 100}')
    rows = read_rows(run_folder)
    assert rows["chance"].startswith(f"{math.log(100):.4f}, ")
    assert "not available" in rows["unigram entropy"] and "beyond the vocabulary" in rows["unigram entropy"]


@pytest.mark.parametrize("missing", ["data", "config"])
def test_a_missing_data_folder_or_configuration_is_reported(run_folder, missing):
    if missing == "config":
        (run_folder / "config.yaml").unlink()
    else:
        write_config(TrainingConfig(data_dir="gone"), run_folder / "config.yaml")
    rows = read_rows(run_folder)
    assert "not available" in rows["unigram entropy"]
    assert ("gone" if missing == "data" else "config.yaml") in rows["unigram entropy"]
    assert rows["chance"].startswith("10.8249, ")


@pytest.mark.parametrize("is_same", [True, False])
def test_data_that_changed_since_the_run_are_not_measured(run_folder, shards, is_same):
    state = run_folder / "checkpoints" / "step_0000002" / "training_state" / "state.json"
    state.parent.mkdir(parents=True)
    experiment = {"data": fingerprint_split(shards, "train") if is_same else "sha256:0"}
    saved = TrainingState(step=2, tokens=32, experiment=experiment, skips=[], tracker_run_id="")
    state.write_text(json.dumps(dataclasses.asdict(saved)))
    rows = read_rows(run_folder)
    assert ("not available" in rows["unigram entropy"]) is not is_same
    assert (str(shards) in rows["unigram entropy"]) is not is_same


def test_the_first_and_the_last_sample_are_shown(run_folder):
    rows = read_rows(run_folder)
    assert (rows["before training"], rows["step 2"]) == ("early words", "last words")
    (run_folder / "final").mkdir()
    (run_folder / "status.json").write_text('{"status": "finished", "step": 2}')
    assert read_rows(run_folder)["after training"] == "last words"
    write_lines(run_folder / "samples.jsonl", [{"step": 1, "text": "middle"}])
    rows = read_rows(run_folder)
    assert rows["step 1"] == "middle" and "before training" not in rows
    (run_folder / "samples.jsonl").unlink()
    assert "step 1" not in read_rows(run_folder)


def test_the_full_run_is_projected_from_the_measured_arithmetic(run_folder):
    rows = read_rows(run_folder)
    assert rows["speed"].startswith("1,000 tokens/s")
    years = FULL_RUN_TOKENS * FULL_FLOPS / 1e6 / 1000 / (365.25 * 86400)
    assert (
        f"{years:.1f} years" in rows["full run"]
        and "855 M FLOPs per token" in rows["full run"]
        and "1 M here" in rows["full run"]
    )
    # Without FLOPs the rate itself is extrapolated, and the summary admits it.
    write_lines(run_folder / "metrics.jsonl", [{"step": 1, "train/tokens_per_second": 1e6}])
    rows = read_rows(run_folder)
    assert "2.8 h" in rows["full run"] and "do not record" in rows["full run"] and "GPU" not in rows["full run"]


def test_the_full_run_matches_its_configuration():
    config = parse_arguments(TrainingConfig, [f"--config={REPOSITORY}/configs/gpt2_124M.yaml"], description="")
    assert config.max_steps * config.tokens_per_step == pytest.approx(FULL_RUN_TOKENS, rel=1e-3)


def test_scores_of_the_finished_model_replace_those_in_training(run_folder, capsys):
    assert "0.2604" in read_rows(run_folder)["original"]
    (run_folder / "final").mkdir()
    (run_folder / "final" / "config.json").write_text("{}")
    scores = {"acc": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "n": 26}
    facts = {"model": str(run_folder / "final"), "data": "items.jsonl", "dtype": "float32", "original": scores}
    (run_folder / "hellaswag_items.json").write_text(json.dumps(facts))
    (run_folder / "hellaswag_gpt2.json").write_text(json.dumps(facts | {"model": "gpt2"}))
    assert main(["summary", str(run_folder)]) == 0
    text, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert "hellaswag_gpt2.json" in line and "gpt2" in line
    assert "items.jsonl" in text and "acc_norm 0.5000 ± 0.1000 (chance 0.25, 26 items), in float32" in text
    assert "0.2604" not in text


def test_paths_are_on_separate_lines(run_folder):
    rows = read_rows(run_folder)
    assert rows["numbers"] == str(run_folder / "metrics.jsonl") and "model" not in rows


@pytest.mark.parametrize("columns", [80, 200])
def test_the_summary_fits_the_terminal(run_folder, columns):
    write_lines(run_folder / "samples.jsonl", [{"step": step, "text": LONG_TEXT} for step in (0, 2)])
    lines = [line for line in summarize(RunFolder(run_folder), columns) if str(run_folder) not in line]
    assert max(map(count_columns, lines)) <= columns
    assert max(map(count_columns, lines)) > columns - 12
    assert not any("\x1b" in line for line in lines)


def test_a_loss_of_an_earlier_model_is_shown_with_its_step(run_folder):
    with open(run_folder / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 3, "train/loss": 7.0}) + "\n")
    assert read_rows(run_folder)["validation loss"].endswith("3.5000 bits per byte, at step 2")


def test_folders_without_metrics_are_rejected(tmp_path, capsys):
    assert main(["summary", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert main(["summary"]) == 2
