"""The numbers of a run by step: from its folder, or from the log of the original script."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.file_kinds import check_encoding
from modeling_gpt2_repro.evaluation.hellaswag_data import name_items
from modeling_gpt2_repro.plots.references import (
    Reference,
    identify_validation,
    list_loss_references,
    list_score_references,
    list_validation_split_references,
)
from modeling_gpt2_repro.training.run_folder import RunFolder

# build-nanogpt's total_batch_size: its log counts steps, not tokens.
LOGGED_TOKENS_PER_STEP = 524_288
LOGGED_METRICS = {"train": "train/loss", "val": "val/loss", "hella": "hellaswag/acc_norm"}


@dataclass(frozen=True)
class Series:
    """A metric's values, each of the model after so many steps: two float64 arrays of one length, steps ascending."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run.

    Attributes:
        name: what people call it.
        series: by metric; the ones that were recorded.
        items: on which HellaSwag-format items it was scored.
        validation: tells the tokens that it was validated on from others; `None` where they are not known.
        loss_references, score_references: known results of other models on the same tokens and items.
    """

    name: str
    tokens_per_step: int
    series: dict[str, Series]
    items: str
    validation: tuple | None = None
    loss_references: list[Reference] = field(default_factory=list)
    score_references: list[Reference] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return int(max(series.steps[-1] for series in self.series.values()))

    def get(self, metric: str) -> Series:
        """Return a metric's series, empty where none was recorded."""
        return self.series.get(metric, Series(np.array([]), np.array([])))

    def count_hours(self, steps: np.ndarray) -> np.ndarray:
        """Return the hours that had passed at each step, from the run's start on; what lies between is interpolated.

        Raises:
            UserError: no times were recorded.
        """
        elapsed = self.get("train/elapsed_seconds")
        if not len(elapsed):
            raise UserError(f"{self.name} has no times: draw it over tokens, without --hours")
        return np.interp(steps, elapsed.steps, elapsed.values) / 3600


def load_curves(path: str | Path, logged_tokens_per_step: int = LOGGED_TOKENS_PER_STEP) -> Curves:
    """Read a run's numbers.

    Args:
        path: a run folder; or a log of the original script's format, or the folder of one.
        logged_tokens_per_step: tokens of an optimizer update in such a log.

    Raises:
        UserError: it is neither, or holds no numbers, or the run's settings cannot be read.
    """
    path = Path(path)
    if path.name == RunFolder(path).metrics.name:
        path = path.parent
    if RunFolder(path).metrics.exists():
        return _load_run(path)
    log = RunFolder(path).log if path.is_dir() else path
    if not log.exists():
        raise UserError(f"{path} has neither metrics.jsonl nor log.txt: give the folder of a begun run, or a log")
    return _load_log(log, logged_tokens_per_step)


def _load_run(folder: Path) -> Curves:
    settings = asdict(RunFolder(folder).read_config())
    series = collect_series(
        [(line["step"], name, value) for line in RunFolder(folder).read_metrics() for name, value in line.items()]
    )
    series.pop("step", None)
    if not series:
        raise UserError(f"{RunFolder(folder).metrics} holds no numbers yet: draw it when the run has begun")
    return Curves(
        name=settings["run_name"],
        tokens_per_step=settings["tokens_per_step"],
        series=series,
        items=name_items(settings["hellaswag_file"], settings["hellaswag_limit"]),
        validation=identify_validation(settings),
        loss_references=list_loss_references(settings),
        score_references=list_score_references(settings),
    )


def _load_log(path: Path, tokens_per_step: int) -> Curves:
    content = path.read_bytes()
    check_encoding(content[:4], path)
    points = []
    for line in content.decode("utf-8-sig", errors="replace").splitlines():
        point = _parse_log_line(line)
        if point is not None:
            points.append(point)
    if not points:
        raise UserError(f"{path} is no log of the original script, whose lines are such as `250 train 5.9`")
    stem = path.name.removesuffix(".txt").removesuffix(".log")
    name = path.absolute().parent.name if stem == "log" else stem
    # The script has no other items than all of the validation set.
    return Curves(
        name,
        tokens_per_step,
        collect_series(points),
        "HellaSwag validation",
        score_references=list_validation_split_references(),
    )


def _parse_log_line(line: str) -> tuple[int, str, float] | None:
    """Return step, metric and value, or `None` for what is none: half a line, or a loss that is not finite."""
    try:
        step, kind, text = line.split()
        value = float(text)
        # Its "train n" is the loss of update n + 1.
        point = int(step) + (kind == "train"), LOGGED_METRICS[kind], value
    except (ValueError, KeyError):
        return None
    return point if math.isfinite(value) and 0 <= point[0] < 2**53 else None


def collect_series(points: list[tuple[int, str, float]]) -> dict[str, Series]:
    """Sort (step, metric, value) into series, by step."""
    columns: dict[str, tuple[list, list]] = {}
    for step, metric, value in points:
        steps, values = columns.setdefault(metric, ([], []))
        steps.append(step)
        values.append(value)
    series = {}
    for metric, (steps, values) in columns.items():
        order = np.argsort(np.array(steps, dtype=np.float64), kind="stable")
        series[metric] = Series(np.array(steps, dtype=np.float64)[order], np.array(values, dtype=np.float64)[order])
    return series
