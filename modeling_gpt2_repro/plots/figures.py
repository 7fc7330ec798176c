"""Common style of all figures, and writing them to files."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from ..core.errors import UserError
from ..core.files import open_atomically

TRAIN_COLOR, VAL_COLOR = "#1f77b4", "#d62728"
SPLIT_COLORS = {"train": TRAIN_COLOR, "val": VAL_COLOR}
# Okabe and Ito's color-blind-safe palette, without its yellow.
RUN_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
FORMATS = ("png", "svg", "pdf")


@contextlib.contextmanager
def default_style() -> Generator[None]:
    """Use matplotlib's defaults, not the user's matplotlibrc, so that figures look the same everywhere.

    Use it to build and to save a figure, because matplotlib reads settings at both times. Also works as a decorator.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def build_figure(width: float, height: float) -> Figure:
    """Build an empty figure (sizes in inches) without pyplot, which keeps global state and looks for a display."""
    return Figure(figsize=(width, height), layout="constrained")


def finish_axes(axes: Axes) -> None:
    """Add a faint grid and remove the top and right spines."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def format_count(value: float, _: float | None = None) -> str:
    """Format a count of tokens, such as `500k`, `2.5M` or `10B`. Also works as an axis formatter."""
    for length, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= length:
            return f"{value / length:.4g}{letter}"
    return f"{value:.4g}"


def make_drawable(text: str, font: FontProperties | None = None) -> str:
    """Replace characters missing from a font (`None`: the default font) by their Python escapes."""
    drawable = get_font(findfont(font or FontProperties())).get_charmap()
    return "".join(character if ord(character) in drawable else ascii(character)[1:-1] for character in text)


@default_style()
def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format given by its file extension.

    Raises:
        UserError: the format is not PNG, SVG or PDF, or the file cannot be written.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(f"cannot draw {path}: its name must end in .{', .'.join(FORMATS)}")
    try:
        with open_atomically(path, "wb") as stream:
            figure.savefig(stream, dpi=110, format=kind)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
