"""What all our pictures share: their look, and how they get onto the disk."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modeling_gpt2_repro.files import open_atomically

TRAIN_COLOUR, VAL_COLOUR = "#1f77b4", "#d62728"
SPLIT_COLOURS = {"train": TRAIN_COLOUR, "val": VAL_COLOUR}


def build_figure(width: float, height: float) -> Figure:
    """Build an empty figure, in inches: one of its own and not pyplot's, which keeps state and looks for a display."""
    return Figure(figsize=(width, height), layout="constrained")


def finish_axes(axes: Axes) -> None:
    """Give axes a faint grid and no frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with open_atomically(path, "wb") as stream:
        figure.savefig(stream, dpi=110, format="png")
