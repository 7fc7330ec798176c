"""Any run folder, for the commands that report on it and for a run that resumes in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import TINY, answer, build_originals, cases, draw, open_case, to_flags
from hypothesis import given
from hypothesis import strategies as st
from strategies import NO_FILES, ODD_JSON_FILES, damage_bytes, damage_json, replace_file

import train
from modeling_gpt2_repro.__main__ import main as run_command
from modeling_gpt2_repro.core.files import compute_checksum

# The settings of the original run.
LONGER = {"sequence_length": 64, "tokens_per_step": 128, "eval_tokens": 64, "warmup_tokens": 128}
CURVES = ("given/run/curves.png",)
CHECKPOINT_FILES = [
    "training_state/state.json",
    "training_state/optimizer.pt",
    "training_state/checksums.json",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
]
SCORES = {"acc": 0.25, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "n": 26}


def read_lines(name: str) -> list:
    return [json.loads(line) for line in (build_originals() / "run" / name).read_text().splitlines()]


def write_lines(path: Path, lines: Any) -> None:
    lines = lines if isinstance(lines, list) else [lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(case, draws: bool) -> None:
    if draws:
        answer(draw, [str(case.given / "run")], case, CURVES)
    else:
        answer(run_command, ["summary", "../given/run"], case)


def test_an_intact_run_is_reported():
    with open_case("run") as case:
        assert answer(run_command, ["summary", "../given/run"], case).code == 0
        assert answer(draw, ["../given/run"], case, CURVES).code == 0


@cases(90)
@given(st.data(), st.sampled_from(["metrics.jsonl", "metrics.jsonl", "samples.jsonl"]), st.integers(0, 3))
def test_lines(data, name, die):
    with open_case("run") as case:
        write_lines(case.given / "run" / name, data.draw(damage_json(read_lines(name))))
        report(case, draws=die == 0)


@cases(30)
@given(st.data(), st.sampled_from(["metrics.jsonl", "samples.jsonl", "config.yaml", "status.json", "log.txt"]))
def test_a_run_resumes_with_any_record(data, name):
    with open_case("data", "run") as case:
        run = case.folder / "cwd" / "runs" / "run"
        shutil.copytree(case.given / "run", run)
        shutil.rmtree(run / "final")
        if name.endswith(".jsonl") and data.draw(st.booleans()):
            write_lines(run / name, data.draw(damage_json(read_lines(name))))
        else:
            (run / name).write_bytes(data.draw(damage_bytes((run / name).read_bytes())))
        assert answer(train.main, to_flags(TINY | LONGER), case).code == 0
        assert (run / "final" / "README.md").exists()


@cases(60)
@given(st.data(), st.sampled_from(["metrics.jsonl", "samples.jsonl", "config.yaml", "config.yaml"]), st.integers(0, 3))
def test_bytes(data, name, die):
    with open_case("run") as case:
        path = case.given / "run" / name
        path.write_bytes(data.draw(damage_bytes(path.read_bytes()) | st.sampled_from(ODD_JSON_FILES)))
        report(case, draws=name == "config.yaml" or die == 0)


@cases(40)
@given(damage_json({"model": "x", "original": SCORES, "lm_eval": SCORES}) | st.sampled_from(ODD_JSON_FILES))
def test_scores(content):
    with open_case("run") as case:
        path = case.given / "run" / "hellaswag_items.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        report(case, draws=False)


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml"])
def test_paths_that_are_not_files(kind, name):
    with open_case("run") as case:
        replace_file(case.given / "run" / name, kind, case.outside)
        report(case, draws=name == "config.yaml")


@cases(60)
@given(st.data())
def test_checkpoints(data):
    with open_case("data", "run") as case:
        checkpoint = case.given / "run" / "checkpoints" / "step_0000001"
        checksums = checkpoint / "training_state" / "checksums.json"
        path = checkpoint / data.draw(st.sampled_from(CHECKPOINT_FILES))
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(damage_json(json.loads(path.read_text())))))
        else:
            path.write_bytes(data.draw(damage_bytes(path.read_bytes())))
        # Looks like damage from before the checkpoint was saved.
        if path.suffix == ".json" and path != checksums and data.draw(st.booleans()):
            known = json.loads(checksums.read_text())
            known[str(path.relative_to(checkpoint))] = compute_checksum(path)
            checksums.write_text(json.dumps(known))
        changes = {"resume_from_checkpoint": checkpoint, "sample_every": 0}
        answer(train.main, to_flags(TINY | LONGER | changes), case)


def test_trial_and_new_runs_keep_folders_that_are_not_runs():
    with open_case("data", "run") as case:
        theirs = [
            case.folder / "cwd" / "runs" / name for name in ("notes-smoke/checkpoints", "models/final", "m/best")
        ]
        for folder in theirs:
            folder.mkdir(parents=True)
            (folder / "mine.txt").write_text("mine")
        trial = answer(train.main, [*to_flags(TINY | {"run_name": "notes"}), "--smoke"], case)
        assert trial.code == 0
        # Nor does a run that starts from another run's checkpoint.
        checkpoint = "../given/run/checkpoints/step_0000001"
        for name in ("models", "m"):
            for resume in ("auto", "never", checkpoint):
                changes = LONGER | {"run_name": name, "resume_from_checkpoint": resume}
                assert "is not a run folder" in answer(train.main, to_flags(TINY | changes), case).err
        assert all((folder / "mine.txt").exists() for folder in theirs)
