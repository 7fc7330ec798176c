"""Curves of one run or of several, drawn from their files.

As a command: `python -m modeling_gpt2_repro.plots.run_figure RUN [RUN ...]`, where RUN is a run folder or a log of the
original script (karpathy/build-nanogpt).
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_gpt2_repro.core.arguments import Parser, expand_home, whole_number
from modeling_gpt2_repro.core.errors import UserError, reports_user_errors
from modeling_gpt2_repro.plots.curves import LOGGED_TOKENS_PER_STEP, Curves, load_curves
from modeling_gpt2_repro.plots.figures import build_figure, default_style, format_count, make_drawable, save_figure
from modeling_gpt2_repro.plots.panels import (
    LM_EVAL_SCORE,
    ORIGINAL_SCORE,
    SMALL_PANELS,
    Axis,
    describe_train_end,
    draw_losses,
    draw_scores,
    draw_small_panel,
)
from modeling_gpt2_repro.plots.spectrum import build_spectrum_figure, describe_spectrum
from modeling_gpt2_repro.training.console import format_duration

CURVES, COMPARISON, SPECTRUM = "curves.png", "comparison.png", "spectrum.png"


def draw_curves(run_folder: str | Path) -> Path:
    """Draw a run as `curves.png` in its folder and return the picture's path.

    Raises:
        UserError: there is nothing to draw, the run's settings cannot be read, or the picture cannot be written.
    """
    path = Path(run_folder) / CURVES
    save_figure(build_curves_figure([load_curves(run_folder)]), path)
    return path


@default_style()
def build_curves_figure(runs: Sequence[Curves], over_hours: bool = False) -> Figure:
    """Build the panels of one run, or of several for comparison.

    Losses and HellaSwag stand above; learning rate, gradient norm, speed and bits a byte below, each where a run has
    it. One run's train values stand faint as they are and strong as a mean over neighbouring steps; of several runs
    only the means are drawn. Dashed lines are what other models are known to reach on the same tokens and items.

    Args:
        over_hours: draw over the hours since the start in place of the tokens seen.

    Raises:
        UserError: a run has no times to draw it over.
    """
    panels = [metric for metric in SMALL_PANELS if any(len(run.get(metric)) for run in runs)]
    has_scores = any(len(run.get(metric)) for run in runs for metric in (ORIGINAL_SCORE, LM_EVAL_SCORE))
    figure = build_figure(13, 8.2 if panels else 5.4)
    rows = figure.subfigures(2, 1, height_ratios=(1.9, 1)) if panels else [figure.subfigures(1, 1)]
    widths = (2.2, 1) if has_scores else (1,)
    top = rows[0].subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    axis = Axis(runs, over_hours)
    draw_losses(top[0], runs, axis)
    if has_scores:
        draw_scores(top[1], runs, axis)
    if panels:
        for axes, metric in zip(rows[1].subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_small_panel(axes, metric, runs, axis)
    if len(runs) == 1:
        figure.suptitle(make_drawable(_describe(runs[0])), fontsize=13, parse_math=False)
    return figure


def _describe(run: Curves) -> str:
    text = f"{run.name}: step {run.last_step:,}, {format_count(run.last_step * run.tokens_per_step)} tokens"
    if len(run.get("train/elapsed_seconds")):
        text += f", {format_duration(3600 * run.count_hours(np.array([run.last_step]))[0])}"
    return text


def name_apart(runs: Sequence[Curves], paths: Sequence[str]) -> list[Curves]:
    """Call runs that have one name by where they lie."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=path) if counts[run.name] > 1 else run for run, path in zip(runs, paths, strict=True)]


def describe_end(run: Curves) -> str:
    """Say in a line what a run reached."""
    ends = []
    if len(run.get("train/loss")):
        end, over = describe_train_end(run.get("train/loss"))
        ends.append(f"train {end:.4f}{over}")
    metrics = {"val/loss": "validation", "hellaswag/acc_norm": "HellaSwag acc_norm (original)"}
    ends += [f"{label} {run.get(name).values[-1]:.4f}" for name, label in metrics.items() if len(run.get(name))]
    return f"{_describe(run)}: {', '.join(ends)}"


def build_parser() -> Parser:
    """Build the parser of the command."""
    parser = Parser(prog="plots", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, or a log in the original script's format (log.txt)"
    )
    parser.add_argument("--hours", action="store_true", help="draw over hours since the start, not over tokens")
    parser.add_argument(
        "--spectrum",
        action="store_true",
        help="draw the periodicity of the train loss in place of the curves: data in the order of crawling show here",
    )
    parser.add_argument(
        "--tokens_per_step",
        type=whole_number,
        default=LOGGED_TOKENS_PER_STEP,
        metavar="N",
        help="tokens of an optimizer update in logs of the original script, which do not say it",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the picture, .png, .svg or .pdf; not given: {CURVES} or {SPECTRUM} in the run folder; of several runs "
        f"{COMPARISON} in the working folder",
    )
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves of a run, or of several in one picture."""
    arguments = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if arguments.tokens_per_step < 1:
        raise UserError(f"--tokens_per_step has to be 1 or more, not {arguments.tokens_per_step}")
    paths = [expand_home(path) for path in arguments.runs]
    runs = name_apart([load_curves(path, arguments.tokens_per_step) for path in paths], paths)
    if arguments.spectrum:
        name, figure, lines = SPECTRUM, build_spectrum_figure(runs), [describe_spectrum(run) for run in runs]
    else:
        name, figure = CURVES if len(runs) == 1 else COMPARISON, build_curves_figure(runs, arguments.hours)
        lines = [describe_end(run) for run in runs]
    folder = Path(paths[0]) if len(runs) == 1 and Path(paths[0]).is_dir() else Path()
    path = Path(expand_home(arguments.output)) if arguments.output else folder / name
    save_figure(figure, path)
    print("\n".join([*lines, f"drawn as {path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
