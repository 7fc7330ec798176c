"""The curves figure of one or several runs, drawn from their files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..training.console import format_duration
from ..training.run_folder import RunFolder
from .curves import Curves, load_run
from .figures import build_figure, default_style, format_count, make_drawable, save_figure
from .panels import SCORES, SMALL_PANELS, Axis, describe_train_end, draw_losses, draw_scores, draw_small_panel


def draw_curves(folder: RunFolder) -> None:
    """Draw a run's `curves.png`.

    Raises:
        UserError: there is nothing to draw, the run's settings cannot be read, or the figure cannot be written.
    """
    save_figure(build_curves_figure([load_run(folder)]), folder.curves)


@default_style()
def build_curves_figure(runs: Sequence[Curves], over_hours: bool = False) -> Figure:
    """Build the figure of one run, or of several for comparison.

    The top row has losses and HellaSwag; the bottom row learning rate, gradient norm, throughput and bits per byte, if
    recorded. For a single run, the train values are drawn faintly behind their moving average; for several runs, only
    the averages are drawn. Dashed lines are results of other models on the same tokens and items.

    Args:
        over_hours: use hours since the start as the x-axis instead of tokens seen.

    Raises:
        UserError: `over_hours` is set and a run has no recorded times.
    """
    panels = [metric for metric in SMALL_PANELS if any(len(run.get(metric)) for run in runs)]
    has_scores = any(len(run.get(metric)) for run in runs for metric in SCORES)
    figure = build_figure(13, 8.2 if panels else 5.4)
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.9, 1)) if panels else [figure.subfigures(1, 1)]
    widths = (2.2, 1) if has_scores else (1,)
    top = rows[0].subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    axis = Axis(runs, over_hours)
    draw_losses(top[0], axis)
    if has_scores:
        draw_scores(top[1], axis)
    for number, metric in enumerate(panels, start=1):
        draw_small_panel(rows[1].add_subplot(1, len(panels), number), metric, axis)
    if len(runs) == 1:
        figure.suptitle(make_drawable(_describe(runs[0])), fontsize=13, parse_math=False)
    return figure


def _describe(run: Curves) -> str:
    text = f"{run.name}: step {run.last_step:,}, {format_count(run.last_step * run.tokens_per_step)} tokens"
    if len(run.get("train/elapsed_seconds")):
        text += f", {format_duration(3600 * run.count_hours(np.array([run.last_step]))[0])}"
    return text


def describe_end(run: Curves) -> str:
    """Return a one-line summary of a run's final results."""
    ends = []
    if len(run.get("train/loss")):
        end, over = describe_train_end(run.get("train/loss"))
        ends.append(f"train {end:.4f}{over}")
    metrics = {"val/loss": "validation", "hellaswag/acc_norm": "HellaSwag acc_norm (original)"}
    ends += [f"{label} {run.get(name).values[-1]:.4f}" for name, label in metrics.items() if len(run.get(name))]
    return f"{_describe(run)}: {', '.join(ends)}"
