"""Reading and merging the metrics of a run."""

from modeling_gpt2_repro.training.metrics import (
    find_last_validation,
    format_validation,
    merge_metrics,
    read_json_object,
    read_metrics,
)

LINES = [
    {"step": 1, "train/loss": 9.0, "train/tokens": 10},
    {"step": 1, "val/loss": 8.0, "hellaswag/acc": 0.25},
    {"step": 2, "train/loss": 7.0},
]


def test_occasional_measurements_are_merged_only_into_their_own_step():
    assert merge_metrics(LINES) == {"step": 2, "train/loss": 7.0, "train/tokens": 10}
    assert merge_metrics(LINES[:2], step=1) == {
        "step": 1,
        "train/loss": 9.0,
        "train/tokens": 10,
        "val/loss": 8.0,
        "hellaswag/acc": 0.25,
    }
    assert merge_metrics([]) == {}


def test_the_last_validation_is_that_of_the_highest_step():
    lines = [*LINES, {"step": 0, "val/loss": 11.0}]
    assert find_last_validation(lines)["val/loss"] == 8.0
    assert find_last_validation([LINES[0]]) is None
    assert format_validation({"val/loss": 3.06631}) == "3.0663 nats per token"
    assert format_validation({"val/loss": 3.0, "val/bpb": 1.0}).endswith(", 1.0000 bits per byte")


def test_lines_broken_by_a_crash_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5, "b": "x", "c": NaN, "d": 1e200}\n{"step": 2\n[3]\n{"step": -1}\n\n{"st')
    assert read_metrics(path) == [{"step": 1, "a": 1.5}]
    assert read_metrics(tmp_path / "none") == []
    (tmp_path / "status.json").write_text('{"text": "\\ud800"}')
    assert read_json_object(tmp_path / "status.json") == read_json_object(path) == {}
