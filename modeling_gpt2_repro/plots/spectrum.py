"""Periods in a train loss, which appear when text is in crawl order and similar documents recur at intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.mlab import psd

from ..core.errors import UserError
from .curves import Curves
from .figures import RUN_COLORS, build_figure, default_style, finish_axes, make_drawable

# The first steps are skipped, because the loss falls too fast there for a period to show.
SKIPPED_SHARE = 0.05
SEGMENT_STEPS, FEWEST_SEGMENTS = 4096, 4
FEWEST_WAVES = 4  # periods in a segment, to distinguish a period from the trend
LONGEST_PERIOD = 200
FEWEST_STEPS = 128
# In a loss without periods, the maximum of a few thousand powers is about 3 times their median.
PEAK_POWER = 8.0
PEAK_DISTANCE = 1.08  # peaks whose periods have a smaller ratio are merged
NAMED_PEAKS = 4


@dataclass(frozen=True)
class Spectrum:
    """Power of a train loss by period: two float64 arrays of equal length, with periods in steps, descending.

    Power is relative to its median over all periods, which is the level of a loss without periods.
    """

    periods: np.ndarray
    powers: np.ndarray

    def list_peaks(self) -> list[tuple[float, float]]:
        """Return the strongest periods with their powers, in descending order of power."""
        powers = self.powers
        is_peak = (powers[1:-1] >= powers[:-2]) & (powers[1:-1] >= powers[2:]) & (powers[1:-1] >= PEAK_POWER)
        peaks: list[tuple[float, float]] = []
        for index in sorted(np.flatnonzero(is_peak) + 1, key=lambda index: -powers[index]):
            period = self.periods[index]
            if all(max(period, other) / min(period, other) > PEAK_DISTANCE for other, _ in peaks):
                peaks.append((float(period), float(powers[index])))
        return peaks[:NAMED_PEAKS]


def compute_spectrum(run: Curves) -> Spectrum:
    """Compute the power spectrum of a run's train loss, after its beginning, by Welch's method.

    Segments overlap by half and are linearly detrended, with a Hann window. Missing steps are interpolated.

    Raises:
        UserError: there are too few steps to detect a period, or the loss never changes.
    """
    losses = run.get("train/loss")
    steps = np.arange(losses.steps[0], losses.steps[-1] + 1) if 0 < len(losses) < 10**7 else np.array([])
    steps = steps[int(len(steps) * SKIPPED_SHARE) :]
    if len(steps) < FEWEST_STEPS:
        raise UserError(f"{run.name}: detecting periods needs at least {FEWEST_STEPS} steps, not {len(steps)}")
    values = np.interp(steps, losses.steps, losses.values)
    segment = min(SEGMENT_STEPS, 2 ** int(np.log2(len(values) / FEWEST_SEGMENTS)))
    powers, frequencies = map(np.asarray, psd(values, NFFT=segment, Fs=1, noverlap=segment // 2, detrend="linear"))
    is_seen = frequencies >= max(FEWEST_WAVES / segment, 1 / LONGEST_PERIOD)
    median = np.median(powers[is_seen])
    if not median > 0:
        raise UserError(f"{run.name}: the train loss never changes, so it has no periods")
    return Spectrum(1 / frequencies[is_seen], powers[is_seen] / median)


@default_style()
def build_spectrum_figure(runs: Sequence[Curves]) -> Figure:
    """Build one panel per run: power by period, with the strongest periods labeled.

    Raises:
        UserError: a run is too short, or its loss never changes.
    """
    figure = build_figure(11, 1.2 + 3.4 * len(runs))
    rows = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    spectra = [compute_spectrum(run) for run in runs]
    for axes, run, spectrum, color in zip(rows, runs, spectra, RUN_COLORS * len(runs), strict=False):
        _draw_spectrum(axes, spectrum, color)
        title = f"{make_drawable(run.name)}: power of the train loss (median = 1)"
        axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    rows[0].set_ylim(0.1, max(30.0, *(2.5 * spectrum.powers.max() for spectrum in spectra)))
    rows[-1].set_xticks([2, 3, 5, 10, 20, 30, 50, 100, LONGEST_PERIOD])
    rows[-1].set_xlabel("period in steps")
    return figure


def _draw_spectrum(axes: Axes, spectrum: Spectrum, color: str) -> None:
    axes.plot(spectrum.periods, spectrum.powers, color=color, linewidth=0.9)
    place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    for period, power in spectrum.list_peaks():
        axes.annotate(f"{period:.1f} steps", (period, power), **place)
        axes.plot(period, power, "o", color=color, markersize=4)
    axes.axhline(1, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    finish_axes(axes)


def describe_spectrum(run: Curves) -> str:
    """Return a line with the periods that stand out in a run's train loss.

    Raises:
        UserError: the run is too short, or its loss never changes.
    """
    peaks = [
        f"{period:.1f} steps ({power:,.0f} times the median)" for period, power in compute_spectrum(run).list_peaks()
    ]
    found = f"the train loss has periods of {', '.join(peaks)}" if peaks else "no period stands out in the train loss"
    return f"{run.name}: {found}"
