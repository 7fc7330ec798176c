"""Panels of the curves figure: losses, HellaSwag scores, and small ones for other recorded metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ..evaluation.multiple_choice import CHANCE
from ..training.metrics import EVERY_STEP
from .curves import Curves, Series
from .figures import RUN_COLORS, TRAIN_COLOR, VAL_COLOR, finish_axes, format_count, make_drawable
from .references import Reference

REFERENCE_COLOR = "#444444"
SMOOTHED_SHARE = 0.01  # window of the moving average, as a share of the run's steps
# Values in this first share of the x-axis do not extend the y-axis: a loss that falls from 11 to 3 in the first steps
# would flatten the rest of the curve.
BEGINNING_SHARE = 0.03
TRAIN_LOSS_PERCENTILES = (0.5, 99.5)
SMALL_PANEL_PERCENTILES = (2, 97)  # within the y-axis, so that an exploding gradient does not flatten the rest either
STEPS_SHOWN_WHOLE = 200  # runs up to this length are shown from their beginning
ORIGINAL_SCORE, LM_EVAL_SCORE = "hellaswag/acc_norm", "hellaswag_lm_eval/acc_norm"
SCORES: dict[str, dict[str, Any]] = {
    ORIGINAL_SCORE: {"protocol": "original", "style": {"marker": "o"}},
    LM_EVAL_SCORE: {"protocol": "lm_eval", "style": {"marker": "s", "linestyle": ":", "fillstyle": "none"}},
}
FAINT = {"alpha": 0.22, "linewidth": 0.6}  # raw values behind their moving average
SMALLEST_SCORE_SPAN = 0.04  # about ±4 standard errors on HellaSwag's validation split
SMALL_PANELS = {
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens per second",
    "val/bpb": "validation, bits per byte",
}


class Axis:
    """The x-axis shared by all panels of a figure, with the runs drawn along it.

    Attributes:
        is_comparison: whether there are several runs, each with its own color and name.
    """

    def __init__(self, runs: Sequence[Curves], over_hours: bool):
        self.runs, self.over_hours, self.is_comparison = runs, over_hours, len(runs) > 1
        sizes = {run.tokens_per_step for run in runs}
        self.tokens_per_step = sizes.pop() if len(sizes) == 1 and not over_hours else None
        self.end = max(float(self.place(run, np.array([run.last_step]))[0]) for run in runs)

    def place(self, run: Curves, steps: np.ndarray) -> np.ndarray:
        """Return the x-coordinates of a run's steps, in hours or tokens."""
        return run.count_hours(steps) if self.over_hours else steps * run.tokens_per_step

    def choose_color(self, run: Curves, single: str) -> str:
        """Return the color of a run, which is `single` if the figure has only one."""
        return RUN_COLORS[self.runs.index(run) % len(RUN_COLORS)] if self.is_comparison else single

    def plot(
        self, axes: Axes, run: Curves, series: Series, marker: str = "", markersize: float = 3.0, **style: Any
    ) -> None:
        """Draw a series as a line, or a single point as a marker."""
        marker = marker or ("o" if len(series) == 1 else "")
        axes.plot(self.place(run, series.steps), series.values, marker=marker, markersize=markersize, **style)

    def skip_beginning(self, run: Curves, series: Series) -> np.ndarray:
        """Return the values after the first `BEGINNING_SHARE` of the axis, or all values if fewer than two remain."""
        if run.last_step <= STEPS_SHOWN_WHOLE:
            return series.values
        later = series.values[self.place(run, series.steps) >= BEGINNING_SHARE * self.end]
        return later if len(later) > 1 else series.values

    def finish(self, axes: Axes, with_steps: bool = False) -> None:
        """Label the axis. `with_steps` adds optimizer steps at the top, if all runs have the same step size."""
        if self.end:
            axes.set_xlim(-0.01 * self.end, 1.01 * self.end)
        axes.set_xlabel("hours" if self.over_hours else "tokens")
        if not self.over_hours:
            axes.xaxis.set_major_formatter(format_count)
        finish_axes(axes)
        if with_steps and self.tokens_per_step is not None:
            size = self.tokens_per_step
            # pyrefly: ignore[unsupported-operation]  matplotlib annotates anything array-like, and passes arrays
            steps = axes.secondary_xaxis("top", functions=(lambda x: x / size, lambda x: x * size))
            steps.xaxis.set_major_formatter(format_count)
            steps.xaxis.set_major_locator(MaxNLocator(integer=True))
            steps.tick_params(labelsize=8, colors="gray", length=2)
            steps.spines["top"].set_visible(False)
            steps.set_xlabel(f"steps of {size:,} tokens", fontsize=8, color="gray")


def draw_losses(axes: Axes, axis: Axis) -> None:
    """Draw train and validation losses, with GPT-2's loss on the same tokens."""
    shown: list[float] = []  # values that the y-axis must include
    for run in axis.runs:
        prefix = f"{_label(run)}: " if axis.is_comparison else ""
        if len(run.get("train/loss")):
            shown += _draw_train_loss(axes, axis, run, prefix)
        if len(val := run.get("val/loss")):
            label = f"{prefix}validation {val.values[-1]:.3f}"
            color = axis.choose_color(run, VAL_COLOR)
            axis.plot(axes, run, val, marker="o", markersize=3.5, color=color, label=label)
            shown += list(axis.skip_beginning(run, val))
    references = _draw_references(axes, [run.loss_references for run in axis.runs], separator=" ")
    validations = {run.validation for run in axis.runs}
    is_comparable = not axis.is_comparison or (len(validations) == 1 and None not in validations)
    warning = "" if is_comparable else " (not known to be validated on the same tokens)"
    axes.set_title(f"loss, nats per token{warning}", fontsize=11, loc="left")
    if shown:
        _set_limits(axes, [*shown, *references])
        losses = [each for run in axis.runs for each in (smooth(run.get("train/loss"))[0], run.get("val/loss"))]
        first = max(series.values[0] for series in losses if len(series))
        if first > axes.get_ylim()[1]:
            axes.text(0.08, 0.985, f"↑ from {first:.2f}", transform=axes.transAxes, va="top", fontsize=9)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    axis.finish(axes, with_steps=True)


def _draw_train_loss(axes: Axes, axis: Axis, run: Curves, prefix: str) -> list[float]:
    """Draw a run's smoothed train loss, over the raw values if it is the only run; return the values to be shown."""
    train = run.get("train/loss")
    mean, width = smooth(train)
    shown = list(axis.skip_beginning(run, mean))
    style: dict[str, Any] = {"color": axis.choose_color(run, TRAIN_COLOR)}
    if axis.is_comparison:
        style |= {"alpha": 0.55, "linewidth": 1}
    elif width > 1:
        axis.plot(axes, run, train, color=TRAIN_COLOR, **FAINT)
        shown += list(np.percentile(axis.skip_beginning(run, train), TRAIN_LOSS_PERCENTILES))
    end, over = describe_train_end(train)
    axis.plot(axes, run, mean, label=f"{prefix}train {end:.3f}{over}", **style)
    return shown


def draw_scores(axes: Axes, axis: Axis) -> None:
    """Draw HellaSwag's `acc_norm`, with the scores of GPT-2 and GPT-3 on the same items."""
    scored = [(run, metric) for run in axis.runs for metric in SCORES if len(run.get(metric))]
    shown = [CHANCE]
    for run, metric in scored:
        score, color = run.get(metric), axis.choose_color(run, VAL_COLOR)
        name = _label(run) if axis.is_comparison else SCORES[metric]["protocol"]
        label = f"{name} {score.values[-1]:.4f}"
        axis.plot(axes, run, score, markersize=4, color=color, label=label, **SCORES[metric]["style"])
        low, high = _draw_standard_errors(axes, axis, run, metric, color)
        shown += [*score.values, *low, *high]
    shown += _draw_references(axes, [run.score_references for run in axis.runs], separator="\n")
    axes.axhline(CHANCE, color="gray", linestyle=":", linewidth=1, zorder=1, label=f"chance {CHANCE}")
    items = sorted({run.items + _describe_n(run) for run, _ in scored})
    axes.set_title(make_drawable(" / ".join(items)), fontsize=10, loc="left", parse_math=False)
    has_both = any(metric == LM_EVAL_SCORE for _, metric in scored)
    axes.set_ylabel("acc_norm, original protocol" + (" (hollow: lm_eval)" if has_both else ""))
    legend = axes.legend(frameon=False, fontsize=8, loc="lower right")
    span = max(max(shown) - min(shown), SMALLEST_SCORE_SPAN)
    # Leave room for the legend below all lines.
    axes.set_ylim(min(shown) - span * (0.1 + 0.055 * len(legend.texts)), max(shown) + 0.1 * span)
    axis.finish(axes, with_steps=True)


def _draw_standard_errors(
    axes: Axes, axis: Axis, run: Curves, metric: str, color: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the standard error of a score, if recorded, as a band, and return the band's edges."""
    score, error = run.get(metric), run.get(f"{metric}_stderr")
    steps, of_score, of_error = np.intersect1d(score.steps, error.steps, return_indices=True)
    low, high = (score.values[of_score] + sign * error.values[of_error] for sign in (-1, 1))
    if len(steps) > 1:
        style = {"color": color, "alpha": 0.12, "linewidth": 0, "zorder": 0}
        label = "_" if axes.collections else "± 1 standard error"  # label only one band
        axes.fill_between(axis.place(run, steps), low, high, label=label, **style)
    return low, high


def _describe_n(run: Curves) -> str:
    n = [run.get(f"{metric.rpartition('/')[0]}/n") for metric in SCORES]
    return next((f", n = {series.values[-1]:,.0f}" for series in n if len(series)), "")


def draw_small_panel(axes: Axes, metric: str, axis: Axis) -> None:
    """Draw one of `SMALL_PANELS`."""
    is_rare = not metric.startswith(EVERY_STEP)
    shown: list[float] = [] if is_rare else [0.0]
    for run in axis.runs:
        series, color = run.get(metric), axis.choose_color(run, VAL_COLOR if is_rare else TRAIN_COLOR)
        if not len(series):
            continue
        mean, width = (series, 1) if is_rare or metric == "train/lr" else smooth(series)
        drawn = [mean]
        if width > 1 and not axis.is_comparison:
            axis.plot(axes, run, series, color=color, **FAINT)
            drawn.append(series)
        axis.plot(axes, run, mean, color=color, linewidth=1.2, marker="o" if is_rare else "")
        for values in (axis.skip_beginning(run, each) for each in drawn):
            shown += list(values if width == 1 else np.percentile(values, SMALL_PANEL_PERCENTILES))
    axes.set_title(SMALL_PANELS[metric], fontsize=10, loc="left")
    _set_limits(axes, shown)
    if metric == "train/tokens_per_second":
        axes.yaxis.set_major_formatter(format_count)
    if metric == "train/lr":
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    axis.finish(axes)


def smooth(series: Series) -> tuple[Series, int]:
    """Return the centered moving average of a series and its window in values, which is shorter at the ends."""
    half = int(len(series) * SMOOTHED_SHARE / 2)
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    places = np.arange(len(series))
    starts, ends = np.maximum(0, places - half), np.minimum(len(series), places + half + 1)
    return Series(series.steps, (sums[ends] - sums[starts]) / (ends - starts)), 2 * half + 1


def describe_train_end(losses: Series) -> tuple[float, str]:
    """Return the final train loss, as a mean over the last smoothing window, and a note about that window.

    The last value of the smoothed line is a mean over only half as many steps.
    """
    width = smooth(losses)[1]
    return float(losses.values[-width:].mean()), f" (mean of the last {width} steps)" if width > 1 else ""


def _set_limits(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - (margin if low else 0.0), high + margin)


def _draw_references(axes: Axes, of_runs: Sequence[list[Reference]], separator: str) -> list[float]:
    """Draw the references shared by all runs as dashed lines, and return their values."""
    references = [each for each in of_runs[0] if all(each in others for others in of_runs)]
    for reference in references:
        axes.axhline(reference.value, color=REFERENCE_COLOR, linestyle="--", linewidth=1, zorder=1, label="_reference")
        text = axes.annotate(
            f"{reference.model} {reference.value:.4f}{separator}({reference.origin})",
            (0.01, reference.value),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            color=REFERENCE_COLOR,
            fontsize=8,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    return [reference.value for reference in references]


def _label(run: Curves) -> str:
    """Return a run's name for a legend, where `$` would start a formula and a leading `_` would hide the entry."""
    name = make_drawable(run.name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
