"""Curves of a run, drawn from its files."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from modeling_gpt2_repro.reporting.figures import TRAIN_COLOUR, VAL_COLOUR, build_figure, finish_axes, save_figure
from modeling_gpt2_repro.reporting.run_folder import (
    find_hellaswag_score,
    find_validation_loss,
    name_hellaswag_items,
    read_gpt2_baselines,
    read_settings,
)
from modeling_gpt2_repro.training.tracking import METRICS, read_metrics

CURVES = "curves.png"
BASELINE_COLOUR = "#444444"


def draw_curves(run_folder: str | Path) -> Path:
    """Draw `metrics.jsonl` of a run as `curves.png` beside it and return the picture's path.

    Train loss stands faint as it is and strong as a running mean, with the validation loss over it; then HellaSwag,
    learning rate, gradient norm and speed, all over the tokens seen. Dashed lines are GPT-2 124M's, where
    `train.py --eval_only` measured it on the same tokens and items.
    """
    run_folder = Path(run_folder)
    settings = read_settings(run_folder)
    baselines = read_gpt2_baselines(settings)
    lines = read_metrics(run_folder / METRICS)
    tokens_per_step = next(
        (line["train/tokens"] / line["step"] for line in lines if "train/tokens" in line and line["step"]), 1.0
    )

    def series(name: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(line["step"] * tokens_per_step, line[name]) for line in lines if name in line]
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.array(x), np.array(y)

    figure = build_figure(12, 7.5)
    grid = figure.add_gridspec(2, 4, height_ratios=(2, 1))
    loss_axes = figure.add_subplot(grid[0, :3])
    multiple_choice_axes = figure.add_subplot(grid[0, 3])
    _draw_losses(loss_axes, series("train/loss"), series("val/loss"), find_validation_loss(baselines, settings))
    items = name_hellaswag_items(settings)
    _draw_line(multiple_choice_axes, f"{items}\nacc_norm, original protocol", series("hellaswag/acc_norm"), marker="o")
    multiple_choice_axes.axhline(0.25, color="grey", linestyle=":", label="chance")
    if score := find_hellaswag_score(baselines, settings):
        _draw_baseline(multiple_choice_axes, score[1], f"{score[0]}\n{score[1]:.4f} on these items")
    multiple_choice_axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    _draw_line(figure.add_subplot(grid[1, 0]), "learning rate", series("train/lr"))
    _draw_line(figure.add_subplot(grid[1, 1]), "gradient norm", series("train/grad_norm"))
    _draw_line(figure.add_subplot(grid[1, 2]), "tokens a second", series("train/tokens_per_second"))
    _draw_line(figure.add_subplot(grid[1, 3]), "validation bits a byte", series("val/bpb"), marker="o")
    figure.suptitle(run_folder.name)

    path = run_folder / CURVES
    save_figure(figure, path)
    return path


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the running mean over the last `width` values (fewer at the start), of the same length."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_losses(
    axes: Axes,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    baseline: tuple[str, float] | None,
) -> None:
    tokens, losses = train
    if len(losses):
        width = max(1, len(losses) // 50)
        axes.plot(tokens, losses, color=TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
        label = "train" if width == 1 else f"train, mean of {width} steps"
        axes.plot(tokens, smooth(losses, width), color=TRAIN_COLOUR, label=label)
    if len(val[1]):
        axes.plot(*val, color=VAL_COLOUR, marker="o", markersize=4, label=f"validation, last {val[1][-1]:.3f}")
    if baseline:
        _draw_baseline(axes, baseline[1], f"{baseline[0]} {baseline[1]:.2f} (measured on these tokens)")
    axes.set_title("loss (nats a token)")
    if axes.lines:
        axes.legend(frameon=False)
    _finish(axes)


def _draw_line(axes: Axes, title: str, points: tuple[np.ndarray, np.ndarray], marker: str | None = None) -> None:
    axes.plot(*points, color=TRAIN_COLOUR if marker is None else VAL_COLOUR, marker=marker, markersize=4, linewidth=1)
    axes.set_title(title, fontsize=10)
    _finish(axes)


def _draw_baseline(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=BASELINE_COLOUR, linestyle="--", linewidth=1.2, zorder=1, label=label)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    finish_axes(axes)
