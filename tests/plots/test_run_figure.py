"""The figures of runs."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import SHARED_DATA
from matplotlib.text import Annotation
from written_runs import build_lines, write_run

from modeling_gpt2_repro.data.shards import BASELINES_NAME, Manifest, Shard, Totals, list_checksums, save_manifest
from modeling_gpt2_repro.evaluation.baseline import Baseline, record_hellaswag, record_validation, save_baseline
from modeling_gpt2_repro.evaluation.hellaswag import HellaSwagResult
from modeling_gpt2_repro.evaluation.hellaswag_data import SAMPLE_FILE
from modeling_gpt2_repro.evaluation.validation import ValidationResult
from modeling_gpt2_repro.plots.curves import Series, load_curves
from modeling_gpt2_repro.plots.figures import format_count
from modeling_gpt2_repro.plots.panels import smooth
from modeling_gpt2_repro.plots.run_figure import build_curves_figure, describe_end, draw_curves
from modeling_gpt2_repro.training.run_folder import RunFolder

RESULT = HellaSwagResult("original", 48, 0.25, 0.06, 0.2955, 0.07, scored_items=(), examples_per_second=1.0)
REFERENCE_LOG = SHARED_DATA / "reference_runs" / "build_nanogpt_fork_10b.log.txt"
ITEMS = SHARED_DATA / "hellaswag_val.jsonl"


def draw(folder: Path, lines: list[dict]) -> np.ndarray:
    run_folder = RunFolder(write_run(folder, lines))
    draw_curves(run_folder)
    return matplotlib.image.imread(run_folder.curves)


def find_panel(figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def read_references(figure) -> dict[str, float]:
    """Return the heights of the dashed lines, by label."""
    texts = [text for axes in figure.axes for text in axes.texts if isinstance(text, Annotation)]
    dashed = [line.get_ydata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == sorted(text.xy[1] for text in texts)
    return {text.get_text(): text.xy[1] for text in texts}


def test_curves_match_the_metrics(tmp_path):
    lines = build_lines(50)
    picture = draw(tmp_path, lines)
    other = draw(tmp_path, [*lines[:-1], {**lines[-1], "val/loss": 9.0}])
    assert picture.shape == other.shape
    assert np.abs(picture - other).max() > 0.5


@pytest.mark.parametrize(
    "lines",
    [
        [{"step": 0, "val/loss": 10.9}],
        [{"step": 1, "train/loss": 10.0}],
        [{"step": 1, "train/grad_norm": 0.0}],
        [{"step": 5, "hellaswag/acc_norm": 0.25}],
        [{"step": step, "train/loss": 3.0} for step in (1, 2)],
    ],
)
def test_runs_with_few_steps_are_drawn(tmp_path, lines):
    assert draw(tmp_path, lines).std() > 0


def test_an_early_high_loss_does_not_set_the_scale(tmp_path):
    figure = build_curves_figure([load_curves(write_run(tmp_path / "run", build_lines(2000)))])
    panel = find_panel(figure, "loss")
    low, high = panel.get_ylim()
    assert 2.5 < low < 3.0 and 3.2 < high < 5.0
    assert [text.get_text() for text in panel.texts] == ["↑ from 11.10"]
    short = build_curves_figure([load_curves(write_run(tmp_path / "short", build_lines(60)))])
    assert find_panel(short, "loss").get_ylim()[1] > 11


def test_an_exploding_gradient_does_not_set_the_scale(tmp_path):
    norms = [100.0 if step == 30 else 1.0 for step in range(1, 201)]
    lines = [{"step": step, "train/grad_norm": norm} for step, norm in enumerate(norms, start=1)]
    panel = find_panel(build_curves_figure([load_curves(write_run(tmp_path / "run", lines))]), "gradient norm")
    assert panel.get_ylim()[0] == 0 and 1 < panel.get_ylim()[1] < 2


def test_the_axis_below_shows_tokens_and_the_one_above_steps(tmp_path):
    figure = build_curves_figure([load_curves(write_run(tmp_path / "run", build_lines(50), tokens_per_step=2048))])
    panel = find_panel(figure, "loss")
    assert panel.get_xlabel() == "tokens"
    assert max(panel.lines[0].get_xdata()) == 50 * 2048
    (steps,) = (axes for axes in panel.child_axes if axes.get_xlabel() == "steps of 2,048 tokens")
    figure.draw_without_rendering()
    assert steps.get_xlim()[1] == pytest.approx(panel.get_xlim()[1] / 2048)


def test_runs_of_different_step_sizes_are_compared_over_tokens_or_hours(tmp_path):
    runs = [
        load_curves(write_run(tmp_path / name, build_lines(50), tokens_per_step=size))
        for name, size in (("small", 1024), ("large", 4096))
    ]
    panel = find_panel(build_curves_figure(runs), "loss")
    ends = {line.get_label().split(":")[0]: max(line.get_xdata()) for line in panel.lines}
    assert ends == {"small": 50 * 1024, "large": 50 * 4096}
    assert panel.child_axes == []  # the runs' steps have different sizes
    panel = find_panel(build_curves_figure(runs, over_hours=True), "loss")
    assert panel.get_xlabel() == "hours"
    assert {max(line.get_xdata()) for line in panel.lines} == {50 / 60}


def test_losses_are_labeled_comparable_only_on_the_same_tokens(tmp_path):
    def title(*names: str) -> str:
        return find_panel(build_curves_figure([load_curves(tmp_path / name) for name in names]), "loss").get_title(
            loc="left"
        )

    for name in ("a", "b", "c"):
        (tmp_path / f"data_{name[0]}").mkdir()
        save_manifest(
            build_manifest("x", val_checksum="sha256:c" if name == "c" else "sha256:ab"), tmp_path / f"data_{name}"
        )
        write_run(tmp_path / name, build_lines(5), data_dir=str(tmp_path / f"data_{name}"))
    write_run(tmp_path / "unknown", build_lines(5), data_dir=str(tmp_path / "missing"))
    assert title("a") == title("a", "b") == "loss, nats per token"
    for others in (("a", "c"), ("a", "unknown"), ("unknown", "unknown")):
        assert "not known to be validated on the same tokens" in title(*others)


def store_baseline(data_dir: Path, **changes) -> None:
    fields = {
        "model": "openai-community/gpt2",
        "val_checksums": list_checksums(data_dir, "val"),
        "eval_tokens": 512,
        "sequence_length": 32,
        "validation": record_validation(ValidationResult(3.3, 0.98, 512), "bf16"),
        "hellaswag": record_hellaswag(RESULT, str(SAMPLE_FILE), 6, "bf16"),
    }
    save_baseline(data_dir / BASELINES_NAME, Baseline(**{**fields, **changes}))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    np.save(tmp_path / "x_val_000000.npy", np.arange(600, dtype=np.uint16))
    return tmp_path


@pytest.fixture
def list_references(data_dir, tmp_path):
    """Return a function that draws a run on `data_dir` and returns the heights of the dashed lines, by label."""

    def draw(**settings) -> dict[str, float]:
        measured = {
            "eval_tokens": 512,
            "sequence_length": 32,
            "hellaswag_file": str(SAMPLE_FILE),
            "hellaswag_limit": 6,
        }
        run = write_run(tmp_path / "run", build_lines(5), **{"data_dir": str(data_dir), **measured, **settings})
        return read_references(build_curves_figure([load_curves(run)]))

    return draw


LOSS = {"GPT-2 124M 3.3000 (measured on these tokens)": 3.3}
SCORE = {"GPT-2 124M 0.2955\n(measured on these items)": 0.2955}
PUBLISHED_LOSS = {"GPT-2 124M 3.2924 (original script's figure)": 3.2924}
PUBLISHED_SCORES = {
    "GPT-2 124M 0.2955\n(original script's figure)": 0.2955,
    "GPT-3 125M 0.3370\n(its paper's figure)": 0.337,
}


def test_gpt2_is_drawn_if_measured_on_the_runs_tokens_and_items(list_references, data_dir):
    assert list_references() == {}
    store_baseline(data_dir)
    assert list_references() == LOSS | SCORE
    store_baseline(data_dir, hellaswag=None, eval_tokens=256)
    store_baseline(data_dir, validation=None, hellaswag=None, sequence_length=16)
    assert list_references(eval_tokens=256) == LOSS | SCORE
    assert list_references(sequence_length=16) == SCORE


@pytest.mark.parametrize(
    "settings, drawn",
    [
        ({"eval_tokens": 544}, SCORE),
        ({"sequence_length": 16}, SCORE),
        ({"hellaswag_limit": 5}, LOSS),
        ({"hellaswag_limit": None}, LOSS),
        ({"hellaswag_file": None}, LOSS),
        ({"hellaswag_file": "missing.jsonl"}, LOSS),
        ({"data_dir": "missing"}, {}),
    ],
)
def test_gpt2_is_not_drawn_if_measured_differently(settings, drawn, list_references, data_dir):
    store_baseline(data_dir)
    assert list_references(**settings) == drawn


def test_gpt2_is_not_drawn_after_the_validation_tokens_change(list_references, data_dir):
    store_baseline(data_dir)
    np.save(data_dir / "x_val_000000.npy", np.arange(1, 601, dtype=np.uint16))
    assert list_references() == {}


def test_other_models_and_damaged_baselines_are_not_drawn(list_references, data_dir):
    store_baseline(data_dir, model="gpt2-medium")
    store_baseline(data_dir, model="/models/gpt2")
    assert list_references() == {}
    store_baseline(data_dir, model="gpt2")
    assert len(list_references()) == 2
    (data_dir / BASELINES_NAME).write_text("[{")
    assert list_references() == {}


def build_manifest(source_id: str, config: str | None = "sample-10BT", val_tokens: int = 10**8, **changes) -> Manifest:
    val_checksum = changes.pop("val_checksum", "sha256:0")
    fields = {
        "source": {"id": source_id, "config": config, "split": "train", "revision": "0" * 40},
        "tokenizer": "openai-community/gpt2",
        "tokenizer_fingerprint": "sha256:0",
        "vocab_size": 50257,
        "eot_id": 50256,
        "seed": 1337,
        "shuffled": True,
        "settings": {},
        "read": Totals(2, 2 * val_tokens, 2),
        "train": Totals(1, val_tokens, 1),
        "val": Totals(1, val_tokens, 1),
        "validation_copies": Totals(),
        "duplicates": 0,
        "empty_documents": 0,
        "validation_ends_inside_document": False,
        "shards": [
            Shard("edufineweb_val_000000.npy", "val", 1, val_tokens, val_checksum),
            Shard("edufineweb_train_000001.npy", "train", 1, val_tokens, "sha256:1"),
        ],
    }
    return Manifest(**{**fields, **changes})


FINEWEB_EDU = {"source_id": "HuggingFaceFW/fineweb-edu"}
AS_IN_THE_ORIGINAL = {"eval_tokens": 10_485_760, "sequence_length": 1024}


@pytest.mark.parametrize(
    "manifest, settings, drawn",
    [
        (FINEWEB_EDU, AS_IN_THE_ORIGINAL, PUBLISHED_LOSS),
        (FINEWEB_EDU, AS_IN_THE_ORIGINAL | {"eval_tokens": 1_048_576}, {}),
        (FINEWEB_EDU, AS_IN_THE_ORIGINAL | {"sequence_length": 2048}, {}),
        (FINEWEB_EDU | {"config": "sample-100BT"}, AS_IN_THE_ORIGINAL, {}),
        (FINEWEB_EDU | {"val_tokens": 10_000_000}, AS_IN_THE_ORIGINAL, {}),
        (FINEWEB_EDU | {"vocab_size": 32000, "eot_id": 2}, AS_IN_THE_ORIGINAL, {}),
        ({"source_id": "someone/fineweb-edu"}, AS_IN_THE_ORIGINAL, {}),
        ({"source_id": "docstrings"}, AS_IN_THE_ORIGINAL, {}),
    ],
)
def test_the_original_loss_of_gpt2_is_drawn_only_for_its_own_tokens(
    manifest, settings, drawn, list_references, data_dir
):
    save_manifest(build_manifest(**manifest), data_dir)
    assert list_references(**settings) == drawn


def test_published_scores_are_drawn_only_for_the_full_validation_set(list_references):
    assert list_references(hellaswag_file=None, hellaswag_limit=None) == PUBLISHED_SCORES
    assert list_references(hellaswag_file=None, hellaswag_limit=10_000) == {}
    assert list_references(hellaswag_file=str(SAMPLE_FILE), hellaswag_limit=None) == {}


@pytest.mark.skipif(not ITEMS.exists(), reason="needs ../shared/data/hellaswag_val.jsonl, all validation items")
def test_the_full_validation_set_is_recognized_by_its_items(list_references):
    assert list_references(hellaswag_file=str(ITEMS), hellaswag_limit=None) == PUBLISHED_SCORES


def test_only_references_shared_by_all_runs_are_drawn_for_several(tmp_path):
    full = write_run(tmp_path / "full", build_lines(5))
    part = write_run(tmp_path / "part", build_lines(5), hellaswag_limit=100)
    (tmp_path / "log.txt").write_text("0 train 10.9\n0 hella 0.25\n")
    assert (
        read_references(build_curves_figure([load_curves(full), load_curves(tmp_path / "log.txt")]))
        == PUBLISHED_SCORES
    )
    assert read_references(build_curves_figure([load_curves(full), load_curves(part)])) == {}


def test_smoothing_is_a_mean_over_neighbors():
    values = np.arange(400.0)
    mean, width = smooth(Series(values, values))
    assert width == 5
    assert mean.values[2:-2].tolist() == values[2:-2].tolist()  # a straight line is unchanged
    assert mean.values[[0, -1]].tolist() == [1.0, 398.0]
    assert smooth(Series(values[:50], values[:50]))[1] == 1


def test_legend_and_summary_give_the_mean_of_the_last_steps(tmp_path):
    lines = [{"step": step, "train/loss": 10 - step / 100} for step in range(1, 401)]
    run = load_curves(write_run(tmp_path, lines))
    (label,) = (text.get_text() for text in build_curves_figure([run]).axes[0].get_legend().get_texts())
    assert label == "train 6.020 (mean of the last 5 steps)"
    assert describe_end(run).endswith("train 6.0200 (mean of the last 5 steps)")


def test_scores_are_drawn_with_their_standard_error_and_n(tmp_path):
    score = {"hellaswag/acc_norm": 0.3, "hellaswag/acc_norm_stderr": 0.05, "hellaswag/n": 1042}
    run = load_curves(write_run(tmp_path, [{"step": step, **score} for step in (0, 10, 20)]))
    axes = find_panel(build_curves_figure([run]), "HellaSwag validation, n = 1,042")
    assert "± 1 standard error" in [text.get_text() for text in axes.get_legend().get_texts()]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.25, 0.35))
    assert axes.get_ylim()[0] < 0.25 and axes.get_ylim()[1] > 0.35


@pytest.mark.parametrize(
    "count, text", [(0, "0"), (128, "128"), (2500, "2.5k"), (524_288, "524.3k"), (1e10, "10B"), (2e12, "2T")]
)
def test_counts_are_abbreviated(count, text):
    assert format_count(count) == text


@pytest.mark.filterwarnings("error")
def test_any_run_name_can_be_drawn(tmp_path):
    runs = [load_curves(write_run(tmp_path / name, build_lines(5))) for name in ("_$\\x^$ \U0001f600", "$_$", "名")]
    figure = build_curves_figure(runs)
    figure.canvas.draw()
    assert len(find_panel(figure, "loss").get_legend().texts) == 6
    build_curves_figure(runs[:1]).canvas.draw()


@pytest.mark.skipif(not REFERENCE_LOG.exists(), reason="needs ../shared/data/reference_runs, a log of a public run")
def test_an_old_run_is_compared_with_a_new_one(tmp_path):
    run = write_run(tmp_path / "run", build_lines(50))
    figure = build_curves_figure([load_curves(run), load_curves(REFERENCE_LOG)])
    labels = find_panel(figure, "loss").get_legend_handles_labels()[1]
    assert "build_nanogpt_fork_10b: validation 3.066" in labels and "run: validation 4.611" in labels
    assert read_references(figure) == PUBLISHED_SCORES
