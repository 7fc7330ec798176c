"""The panels of a picture of runs: losses, HellaSwag scores, and small ones for what else was recorded."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from modeling_gpt2_repro.plots.curves import Curves, Series
from modeling_gpt2_repro.plots.figures import (
    RUN_COLOURS,
    TRAIN_COLOUR,
    VAL_COLOUR,
    finish_axes,
    format_count,
    make_drawable,
)
from modeling_gpt2_repro.plots.references import Reference

REFERENCE_COLOUR = "#444444"
SMOOTHED_SHARE = 0.01  # of a run's steps make up a smoothed point
# What comes before this share of the picture's width may lie above its upper edge: a loss that falls from 11 to 3
# within the first steps would squash the rest.
BEGINNING_SHARE = 0.03
SMALL_PANEL_PERCENTILES = (2, 97)  # are inside, so that a gradient out of hand does not squash the rest either
STEPS_SHOWN_WHOLE = 200  # a run that is no longer is shown with its beginning
ORIGINAL_SCORE, LM_EVAL_SCORE = "hellaswag/acc_norm", "hellaswag_lm_eval/acc_norm"
CHANCE = 0.25
SMALLEST_SCORE_SPAN = 0.04  # four standard errors on HellaSwag's validation set are as much
SMALL_PANELS = {
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens a second",
    "val/bpb": "validation, bits a byte",
}


class Axis:
    """The horizontal axis that all panels share."""

    def __init__(self, runs: Sequence[Curves], over_hours: bool):
        self.over_hours = over_hours
        sizes = {run.tokens_per_step for run in runs}
        self.tokens_per_step = sizes.pop() if len(sizes) == 1 and not over_hours else None
        self.end = max(float(self.place(run, np.array([run.last_step]))[0]) for run in runs)

    def place(self, run: Curves, steps: np.ndarray) -> np.ndarray:
        """Return where a run's steps lie."""
        return run.count_hours(steps) if self.over_hours else steps * run.tokens_per_step

    def finish(self, axes: Axes, with_steps: bool = False) -> None:
        """Label it; `with_steps` also in optimizer steps, on top, where those of all runs have one size."""
        if self.end:
            axes.set_xlim(-0.01 * self.end, 1.01 * self.end)
        axes.set_xlabel("hours" if self.over_hours else "tokens")
        if not self.over_hours:
            axes.xaxis.set_major_formatter(format_count)
        finish_axes(axes)
        if with_steps and self.tokens_per_step is not None:
            size = self.tokens_per_step
            steps = axes.secondary_xaxis("top", functions=(lambda x: x / size, lambda x: x * size))
            steps.xaxis.set_major_formatter(format_count)
            steps.xaxis.set_major_locator(MaxNLocator(integer=True))
            steps.tick_params(labelsize=8, colors="grey", length=2)
            steps.spines["top"].set_visible(False)
            steps.set_xlabel(f"steps of {size:,} tokens", fontsize=8, color="grey")


def draw_losses(axes: Axes, runs: Sequence[Curves], axis: Axis) -> None:
    """Draw train and validation losses, with what GPT-2 reaches on the same tokens."""
    shown, first = [], []  # heights that have to be inside, and the losses that the runs began with
    for run, colour in zip(runs, _choose_colours(runs), strict=True):
        train, val = run.get("train/loss"), run.get("val/loss")
        prefix = f"{_label(run)}: " if len(runs) > 1 else ""
        if len(train):
            mean, width = smooth(train)
            end, over = describe_train_end(train)
            if len(runs) == 1 and width > 1:
                axes.plot(axis.place(run, train.steps), train.values, color=TRAIN_COLOUR, alpha=0.22, linewidth=0.6)
                shown += list(np.percentile(_leave_out_beginning(axis, run, train), (0.5, 99.5)))
            style = {"color": TRAIN_COLOUR} if len(runs) == 1 else {"color": colour, "alpha": 0.55, "linewidth": 1}
            label = f"{prefix}train {end:.3f}{over}"
            _plot(axes, axis.place(run, mean.steps), mean.values, label=label, **style)
            shown += list(_leave_out_beginning(axis, run, mean))
            first.append(mean.values[0])
        if len(val):
            style = {"color": VAL_COLOUR if len(runs) == 1 else colour, "marker": "o", "markersize": 3.5}
            _plot(
                axes, axis.place(run, val.steps), val.values, label=f"{prefix}validation {val.values[-1]:.3f}", **style
            )
            shown += list(_leave_out_beginning(axis, run, val))
            first.append(val.values[0])
    references = _list_shared([run.loss_references for run in runs])
    for reference in references:
        _draw_reference(axes, reference.value, " ".join(reference.label.split("\n")))
    title = "loss, nats a token"
    if len(runs) > 1 and (runs[0].validation is None or any(run.validation != runs[0].validation for run in runs)):
        title += " (not known to be validated on the same tokens)"
    axes.set_title(title, fontsize=11, loc="left")
    if shown:
        _set_limits(axes, [*shown, *(reference.value for reference in references)])
        if max(first) > axes.get_ylim()[1]:
            axes.text(0.08, 0.985, f"↑ from {max(first):.2f}", transform=axes.transAxes, va="top", fontsize=9)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    axis.finish(axes, with_steps=True)


def draw_scores(axes: Axes, runs: Sequence[Curves], axis: Axis) -> None:
    """Draw HellaSwag's `acc_norm`, with what GPT-2 and GPT-3 reach on the same items."""
    shown = [CHANCE]
    has_both = any(len(run.get(LM_EVAL_SCORE)) for run in runs)
    for run, colour in zip(runs, _choose_colours(runs), strict=True):
        for metric, marker, protocol in ((ORIGINAL_SCORE, "o", "original"), (LM_EVAL_SCORE, "s", "lm_eval")):
            score = run.get(metric)
            if len(score):
                style = {"color": VAL_COLOUR if len(runs) == 1 else colour, "marker": marker}
                if metric == LM_EVAL_SCORE:
                    style |= {"linestyle": ":", "fillstyle": "none"}
                label = f"{_label(run) if len(runs) > 1 else protocol} {score.values[-1]:.4f}"
                _plot(axes, axis.place(run, score.steps), score.values, markersize=4, label=label, **style)
                low, high = _draw_standard_errors(axes, run, metric, axis, style["color"])
                shown += [*score.values, *low, *high]
    references = _list_shared([run.score_references for run in runs])
    for reference in references:
        _draw_reference(axes, reference.value, reference.label)
    axes.axhline(CHANCE, color="grey", linestyle=":", linewidth=1, zorder=1, label=f"chance {CHANCE}")
    scored = [run for run in runs if len(run.get(ORIGINAL_SCORE)) or len(run.get(LM_EVAL_SCORE))]
    items = sorted({run.items + _describe_n(run) for run in scored})
    axes.set_title(make_drawable(" / ".join(items)), fontsize=10, loc="left", parse_math=False)
    axes.set_ylabel("acc_norm, original protocol, and hollow lm_eval" if has_both else "acc_norm, original protocol")
    legend = axes.legend(frameon=False, fontsize=8, loc="lower right")
    shown += [reference.value for reference in references]
    span = max(max(shown) - min(shown), SMALLEST_SCORE_SPAN)
    # The legend stands below all lines.
    axes.set_ylim(min(shown) - span * (0.1 + 0.055 * len(legend.texts)), max(shown) + 0.1 * span)
    axis.finish(axes, with_steps=True)


def _draw_standard_errors(
    axes: Axes, run: Curves, metric: str, axis: Axis, colour: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a standard error on either side of a score as a band, where they were recorded, and return its edges."""
    score, error = run.get(metric), run.get(f"{metric}_stderr")
    steps, of_score, of_error = np.intersect1d(score.steps, error.steps, return_indices=True)
    low, high = (score.values[of_score] + sign * error.values[of_error] for sign in (-1, 1))
    if len(steps) > 1:
        style = {"color": colour, "alpha": 0.12, "linewidth": 0, "zorder": 0}
        label = "_" if axes.collections else "± 1 standard error"  # once is enough
        axes.fill_between(axis.place(run, steps), low, high, label=label, **style)
    return low, high


def _describe_n(run: Curves) -> str:
    n = [run.get(f"{metric.rpartition('/')[0]}/n") for metric in (ORIGINAL_SCORE, LM_EVAL_SCORE)]
    return next((f", n = {series.values[-1]:,.0f}" for series in n if len(series)), "")


def draw_small_panel(axes: Axes, metric: str, runs: Sequence[Curves], axis: Axis) -> None:
    """Draw one of `SMALL_PANELS`."""
    shown = []
    is_rare = metric.startswith("val/")
    for run, colour in zip(runs, _choose_colours(runs), strict=True):
        series = run.get(metric)
        if not len(series):
            continue
        if len(runs) == 1:
            colour = VAL_COLOUR if is_rare else TRAIN_COLOUR
        mean, width = (series, 1) if is_rare or metric == "train/lr" else smooth(series)
        if width > 1 and len(runs) == 1:
            axes.plot(axis.place(run, series.steps), series.values, color=colour, alpha=0.22, linewidth=0.6)
        _plot(
            axes, axis.place(run, mean.steps), mean.values, color=colour, linewidth=1.2, marker="o" if is_rare else ""
        )
        later = _leave_out_beginning(axis, run, mean)
        shown += list(later if width == 1 else np.percentile(later, SMALL_PANEL_PERCENTILES))
        if width > 1 and len(runs) == 1:
            shown += list(np.percentile(_leave_out_beginning(axis, run, series), SMALL_PANEL_PERCENTILES))
    axes.set_title(SMALL_PANELS[metric], fontsize=10, loc="left")
    _set_limits(axes, shown if is_rare else [0, *shown])
    if metric == "train/tokens_per_second":
        axes.yaxis.set_major_formatter(format_count)
    if metric == "train/lr":
        axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}".replace("e-0", "e-") if rate else "0")
    axis.finish(axes)


def smooth(series: Series) -> tuple[Series, int]:
    """Return the mean over neighbouring values, as many on either side, and how many they are; fewer at the ends."""
    half = int(len(series) * SMOOTHED_SHARE / 2)
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    places = np.arange(len(series))
    starts, ends = np.maximum(0, places - half), np.minimum(len(series), places + half + 1)
    return Series(series.steps, (sums[ends] - sums[starts]) / (ends - starts)), 2 * half + 1


def describe_train_end(losses: Series) -> tuple[float, str]:
    """Return the one number for what a train loss came to, and over what it is a mean: as many steps as are smoothed.

    The smoothed line's own last value is a mean over half as many.
    """
    width = smooth(losses)[1]
    return float(losses.values[-width:].mean()), f" (mean of the last {width} steps)" if width > 1 else ""


def _leave_out_beginning(axis: Axis, run: Curves, series: Series) -> np.ndarray:
    """Return the values after the picture's first part; all of them where hardly any come later."""
    if run.last_step <= STEPS_SHOWN_WHOLE:
        return series.values
    later = series.values[axis.place(run, series.steps) >= BEGINNING_SHARE * axis.end]
    return later if len(later) > 1 else series.values


def _set_limits(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - (margin if low else 0.0), high + margin)


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, marker: str = "", markersize: float = 3.0, **style) -> None:
    """Draw a line, whose points are marked where the line would be none."""
    axes.plot(x, y, marker=marker or ("o" if len(x) == 1 else ""), markersize=markersize, **style)


def _draw_reference(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=REFERENCE_COLOUR, linestyle="--", linewidth=1, zorder=1, label="_reference")
    text = axes.annotate(
        label,
        (0.01, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color=REFERENCE_COLOUR,
        fontsize=8,
    )
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _list_shared(references: Sequence[list[Reference]]) -> list[Reference]:
    """Return the references that hold for all runs."""
    return [reference for reference in references[0] if all(reference in others for others in references)]


def _choose_colours(runs: Sequence[Curves]) -> list[str]:
    return [RUN_COLOURS[index % len(RUN_COLOURS)] for index in range(len(runs))]


def _label(run: Curves) -> str:
    """Return a run's name as a legend shows it: it would take dollars for formulas, and leave out a leading `_`."""
    name = make_drawable(run.name).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
