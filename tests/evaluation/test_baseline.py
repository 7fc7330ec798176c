"""Baselines: measuring and storing them, and when they apply."""

import dataclasses
import json

import pytest

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.evaluation.baseline import (
    Baseline,
    format_baseline,
    identify_model,
    load_baselines,
    read_baselines,
    record_hellaswag,
    record_validation,
    save_baseline,
)
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.evaluation.validation import ValidationResult

VALIDATION = record_validation(ValidationResult(loss=3.29, bpb=0.98, n_tokens=512), "bf16")
RESULT = HellaSwagResult("original", 48, 0.25, 0.06, 0.3, 0.07, scored_items=(), n_truncated=2)
HELLASWAG = record_hellaswag(RESULT, str(SAMPLE_FILE), None, "no") | {"examples_per_second": 1.0}
BASELINE = Baseline("gpt2", ["sha256:a", "sha256:b"], 512, 32, VALIDATION, HELLASWAG)


@pytest.fixture
def path(tmp_path):
    save_baseline(tmp_path / "baselines.json", BASELINE)
    return tmp_path / "baselines.json"


def test_baselines_survive_a_round_trip(path, tmp_path):
    assert read_baselines(path) == [BASELINE]
    assert read_baselines(tmp_path / "none.json") == []


def test_only_baselines_of_the_same_validation_shards_are_loaded(path):
    other = dataclasses.replace(BASELINE, val_checksums=["sha256:b", "sha256:a"])
    save_baseline(path, other)
    assert load_baselines(path, ["sha256:a", "sha256:b"]) == [BASELINE]
    assert load_baselines(path, ["sha256:b", "sha256:a"]) == [other]
    assert load_baselines(path, ["sha256:a"]) == []


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"val_checksums": []}, {"eval_tokens": 1024}, {"sequence_length": 16}]
)
def test_other_models_and_tokens_have_separate_baselines(path, change):
    other = dataclasses.replace(BASELINE, **change)
    save_baseline(path, other)
    assert read_baselines(path) == [BASELINE, other]


def test_a_newer_measurement_replaces_the_same_part_of_the_older_one(path):
    validation, hellaswag = {**VALIDATION, "val/loss": 3.2}, {**HELLASWAG, "acc_norm": 0.31}
    save_baseline(path, dataclasses.replace(BASELINE, validation=validation, hellaswag=None))
    assert read_baselines(path) == [dataclasses.replace(BASELINE, validation=validation)]
    save_baseline(path, dataclasses.replace(BASELINE, validation=None, hellaswag=hellaswag))
    assert read_baselines(path) == [dataclasses.replace(BASELINE, validation=validation, hellaswag=hellaswag)]


@pytest.mark.parametrize("content", ["", "[{", "[]x", "3", '["gpt2"]', '[{"model": "gpt2"}]'])
def test_a_damaged_baselines_file_is_reported_and_left_unchanged(path, content):
    path.write_text(content)
    with pytest.raises(UserError, match=r"baselines\.json is damaged"):
        load_baselines(path, [])
    with pytest.raises(UserError, match=r"baselines\.json is damaged"):
        save_baseline(path, BASELINE)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "change",
    [
        {"validation": {}},
        {"validation": {"val/loss": "low"}},
        {"hellaswag": {"acc_norm": None}},
        {"val_checksums": None},
    ],
)
def test_unusable_entries_are_reported(path, change):
    path.write_text(json.dumps([{**dataclasses.asdict(BASELINE), **change}]))
    with pytest.raises(UserError, match=r"baselines\.json is damaged"):
        load_baselines(path, [])


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_baseline(path, dataclasses.replace(BASELINE, model="other"))
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_folder_is_not_mistaken_for_the_hub_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert identify_model("gpt2") == "gpt2"
    (tmp_path / "gpt2").mkdir()
    assert identify_model("gpt2") == str(tmp_path / "gpt2")


def test_items_are_identified_by_content(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(SAMPLE_FILE.read_bytes())
    (tmp_path / "b.jsonl").write_bytes(SAMPLE_FILE.read_bytes() + b"\n")
    same, other, hub = (
        record_hellaswag(RESULT, file, None, "no")["items"]
        for file in (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), None)
    )
    assert same == HELLASWAG["items"]
    assert len({same, other, hub}) == 3


def test_without_byte_counts_bits_per_byte_are_omitted(path):
    validation = record_validation(ValidationResult(3.29, float("nan"), 512), "no")
    baseline = dataclasses.replace(BASELINE, validation=validation)
    save_baseline(path, baseline)
    assert "NaN" not in path.read_text()
    assert "bits per byte" in format_baseline(BASELINE) and "bits per byte" not in format_baseline(baseline)


def test_the_text_lists_only_what_was_measured():
    lines = format_baseline(BASELINE).splitlines()
    assert lines[0].split() == ["model", "gpt2"]
    assert "  acc_norm  0.3000 ± 0.0700 (chance 0.25, 48 items)" in lines
    assert any("2 contexts" in line for line in lines)
    assert "HellaSwag" not in format_baseline(dataclasses.replace(BASELINE, hellaswag=None))
    assert "nats" not in format_baseline(dataclasses.replace(BASELINE, validation=None))
