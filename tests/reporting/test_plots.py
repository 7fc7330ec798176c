"""Curves of a run."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from modeling_gpt2_repro.arguments import write_settings
from modeling_gpt2_repro.data.shards import BASELINES_NAME, list_checksums
from modeling_gpt2_repro.evaluation.baseline import Baseline, record_hellaswag, record_validation, save_baseline
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.evaluation.validation import ValidationResult
from modeling_gpt2_repro.reporting.plots import draw_curves, smooth
from modeling_gpt2_repro.training.config import TrainingConfig

RESULT = HellaSwagResult("original", 48, 0.25, 0.06, 0.2955, 0.07, scored_items=(), examples_per_second=1.0)


def write_run(folder, lines, **settings) -> None:
    write_settings(TrainingConfig(**settings), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw(folder, lines) -> np.ndarray:
    write_run(folder, lines)
    return matplotlib.image.imread(draw_curves(folder))


def test_curves_show_what_the_metrics_say(tmp_path):
    train = [{"step": step, "train/loss": 9 / step, "train/tokens": 100 * step} for step in range(1, 50)]
    without_validation = draw(tmp_path, train)
    with_validation = draw(tmp_path, [*train, {"step": 20, "val/loss": 5.0, "hellaswag/acc_norm": 0.3}])
    assert without_validation.shape == with_validation.shape
    assert np.abs(without_validation - with_validation).max() > 0.5


@pytest.mark.parametrize("lines", [[], [{"step": 0, "val/loss": 10.9}], [{"step": 1, "train/loss": 10.0}]])
def test_runs_that_have_hardly_begun_are_drawn(tmp_path, lines):
    assert draw(tmp_path, lines).std() > 0


def keep_baseline(data_dir: Path, **changes) -> None:
    fields = {
        "model": "openai-community/gpt2",
        "val_checksums": list_checksums(data_dir, "val"),
        "eval_tokens": 512,
        "sequence_length": 32,
        "validation": record_validation(ValidationResult(3.2924, 0.98, 512), "bf16"),
        "hellaswag": record_hellaswag(RESULT, str(SAMPLE_FILE), 6, "bf16"),
    }
    save_baseline(data_dir / BASELINES_NAME, Baseline(**{**fields, **changes}))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    np.save(tmp_path / "x_val_000000.npy", np.arange(600, dtype=np.uint16))
    return tmp_path


@pytest.fixture
def draw_labels(data_dir, tmp_path, monkeypatch):
    """Draw a run on `data_dir` and return the labels of its dashed lines, with their heights."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (figures.append(self), savefig(self, *args, **kw))
    )

    def draw(**settings) -> dict[str, float]:
        measured = {
            "eval_tokens": 512,
            "sequence_length": 32,
            "hellaswag_file": str(SAMPLE_FILE),
            "hellaswag_limit": 6,
        }
        (tmp_path / "run").mkdir(exist_ok=True)
        lines = [{"step": step, "train/loss": 9 / step, "train/tokens": 100 * step} for step in range(1, 50)]
        lines += [{"step": step, "val/loss": 9 / step, "hellaswag/acc_norm": 0.3} for step in (1, 25, 49)]
        write_run(tmp_path / "run", lines, **{"data_dir": str(data_dir), **measured, **settings})
        draw_curves(tmp_path / "run")
        return {
            line.get_label(): line.get_ydata()[0]
            for axes in figures[-1].axes
            for line in axes.lines
            if line.get_linestyle() == "--" and line in axes.get_legend_handles_labels()[0]
        }

    return draw


LOSS_LABEL = "openai-community/gpt2 3.29 (measured on these tokens)"
SCORE_LABEL = "openai-community/gpt2\n0.2955 on these items"


def test_gpt2_is_drawn_where_it_was_measured_on_the_runs_tokens_and_items(draw_labels, data_dir):
    assert draw_labels() == {}
    keep_baseline(data_dir)
    assert draw_labels() == {LOSS_LABEL: 3.2924, SCORE_LABEL: 0.2955}
    keep_baseline(data_dir, hellaswag=None, eval_tokens=256)
    keep_baseline(data_dir, validation=None, hellaswag=None, sequence_length=16)
    assert draw_labels(eval_tokens=256) == {LOSS_LABEL: 3.2924, SCORE_LABEL: 0.2955}
    assert draw_labels(sequence_length=16) == {SCORE_LABEL: 0.2955}


@pytest.mark.parametrize(
    "settings, drawn",
    [
        ({"eval_tokens": 544}, {SCORE_LABEL}),
        ({"sequence_length": 16}, {SCORE_LABEL}),
        ({"hellaswag_limit": 5}, {LOSS_LABEL}),
        ({"hellaswag_limit": None}, {LOSS_LABEL}),
        ({"hellaswag_file": None}, {LOSS_LABEL}),
        ({"hellaswag_file": "missing.jsonl"}, {LOSS_LABEL}),
        ({"data_dir": "missing"}, set()),
    ],
)
def test_gpt2_is_not_drawn_beside_what_was_measured_otherwise(settings, drawn, draw_labels, data_dir):
    keep_baseline(data_dir)
    assert set(draw_labels(**settings)) == drawn


def test_gpt2_is_not_drawn_once_the_validation_tokens_are_others(draw_labels, data_dir):
    keep_baseline(data_dir)
    np.save(data_dir / "x_val_000000.npy", np.arange(1, 601, dtype=np.uint16))
    assert draw_labels() == {}


def test_no_other_model_is_drawn_and_damaged_baselines_neither(draw_labels, data_dir):
    keep_baseline(data_dir, model="gpt2-medium")
    keep_baseline(data_dir, model="/models/gpt2")
    assert draw_labels() == {}
    keep_baseline(data_dir, model="gpt2")
    assert len(draw_labels()) == 2
    (data_dir / BASELINES_NAME).write_text("[{")
    assert draw_labels() == {}


def test_smoothing_is_a_mean_over_the_past():
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert smooth(np.array([]), 3).tolist() == []
