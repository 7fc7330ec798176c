"""Metrics of a run by step, from its folder or from a log of the original script."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..core.errors import UserError
from ..core.file_kinds import check_encoding
from ..evaluation.hellaswag_data import name_items
from ..training.run_folder import RunFolder
from .references import (
    Reference,
    identify_validation,
    list_loss_references,
    list_score_references,
    list_validation_split_references,
)

# build-nanogpt's total_batch_size. Its log records steps, not tokens.
LOGGED_TOKENS_PER_STEP = 524_288
LOGGED_METRICS = {"train": "train/loss", "val": "val/loss", "hella": "hellaswag/acc_norm"}


@dataclass(frozen=True)
class Series:
    """Values of a metric, each for the model after that many steps: two float64 arrays, with ascending steps."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class Curves:
    """The metrics of a run.

    Attributes:
        series: the recorded series, keyed by metric.
        items: name of the HellaSwag-format items that the run was scored on.
        validation: key of the validation windows, equal for equal windows; `None` if unknown.
        loss_references, score_references: results of other models on the same tokens and items.
    """

    name: str
    tokens_per_step: int
    series: dict[str, Series]
    items: str
    validation: tuple[str | int, ...] | None = None
    loss_references: list[Reference] = field(default_factory=list)
    score_references: list[Reference] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step with a value for any metric."""
        return int(max(series.steps[-1] for series in self.series.values()))

    def get(self, metric: str) -> Series:
        """Return the series of a metric, which is empty if none was recorded."""
        return self.series.get(metric, Series(np.array([]), np.array([])))

    def count_hours(self, steps: np.ndarray) -> np.ndarray:
        """Return the hours from the start of the run to each step, interpolated between recorded times.

        Raises:
            UserError: no times were recorded.
        """
        elapsed = self.get("train/elapsed_seconds")
        if not len(elapsed):
            raise UserError(f"{self.name} has no recorded times: omit --hours to draw it over tokens")
        return np.interp(steps, elapsed.steps, elapsed.values) / 3600


def load_curves(path: str | Path, logged_tokens_per_step: int = LOGGED_TOKENS_PER_STEP) -> Curves:
    """Read the metrics of a run.

    Args:
        path: a run folder, a log in the original script's format, or the folder of such a log.
        logged_tokens_per_step: tokens per optimizer update in such a log.

    Raises:
        UserError: `path` is neither, has no metrics, or the run's settings cannot be read.
    """
    folder = RunFolder(path)
    if folder.path.name == folder.metrics.name:
        folder = RunFolder(folder.path.parent)
    if folder.metrics.exists():
        return load_run(folder)
    log = folder.log if folder.path.is_dir() else folder.path
    if not log.exists():
        raise UserError(f"{path} has neither {folder.metrics.name} nor {folder.log.name}: pass a run folder or a log")
    return _load_log(log, logged_tokens_per_step)


def load_run(folder: RunFolder) -> Curves:
    """Read the metrics of a run folder.

    Raises:
        UserError: there are no metrics, or the run's settings cannot be read.
    """
    config = folder.read_config()
    series = collect_series(
        (line["step"], name, value) for line in folder.read_metrics() for name, value in line.items() if name != "step"
    )
    if not series:
        raise UserError(f"{folder.metrics} contains no metrics yet: draw it once the run has started")
    return Curves(
        name=config.run_name,
        tokens_per_step=config.tokens_per_step,
        series=series,
        items=name_items(config.hellaswag_file, config.hellaswag_limit),
        validation=identify_validation(config),
        loss_references=list_loss_references(config),
        score_references=list_score_references(config),
    )


def _load_log(path: Path, tokens_per_step: int) -> Curves:
    content = path.read_bytes()
    check_encoding(content[:4], path)
    lines = content.decode("utf-8-sig", errors="replace").splitlines()
    series = collect_series(point for point in map(_parse_log_line, lines) if point is not None)
    if not series:
        raise UserError(f"{path} is not a log of the original script: expected lines such as `250 train 5.9`")
    stem = path.name.removesuffix(".txt").removesuffix(".log")
    name = path.absolute().parent.name if stem == "log" else stem
    # The original script always scores the full validation split.
    return Curves(
        name, tokens_per_step, series, name_items(None, None), score_references=list_validation_split_references()
    )


def _parse_log_line(line: str) -> tuple[int, str, float] | None:
    """Return step, metric and value, or `None` for any other line and for values that are not finite."""
    try:
        step, kind, text = line.split()
        value = float(text)
        # "train n" is the loss of update n + 1.
        point = int(step) + (kind == "train"), LOGGED_METRICS[kind], value
    except (ValueError, KeyError):
        return None
    return point if math.isfinite(value) and 0 <= point[0] < 2**53 else None


def collect_series(points: Iterable[tuple[float, str, float]]) -> dict[str, Series]:
    """Group (step, metric, value) tuples into series, stably sorted by step."""
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step, metric, value in points:
        columns[metric].append((step, value))
    series = {}
    for metric, column in columns.items():
        steps, values = np.array(column, dtype=np.float64).T
        order = np.argsort(steps, kind="stable")
        series[metric] = Series(steps[order], values[order])
    return series
