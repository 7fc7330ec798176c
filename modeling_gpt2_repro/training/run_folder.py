"""Reading a run folder: what every report starts from."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.arguments import parse_arguments
from modeling_gpt2_repro.evaluation.hellaswag_data import name_items
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.record import CONFIG, METRICS, read_metrics

MEASURED = ("val/", "hellaswag")  # how the names of such metrics begin


def read_settings(run_folder: Path) -> dict[str, Any]:
    """Return the settings of a run by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    return asdict(parse_arguments(TrainingConfig, [f"--config={run_folder / CONFIG}"], description=""))


def name_hellaswag_items(settings: dict[str, Any]) -> str:
    """Say on which items a run was scored."""
    return name_items(settings["hellaswag_file"], settings["hellaswag_limit"])


def read_lines(run_folder: Path, step: int | None = None) -> list[dict[str, float]]:
    """Return the lines of a run's metrics, of those after `step` none."""
    return [line for line in read_metrics(run_folder / METRICS) if step is None or line["step"] <= step]


def merge_lines(lines: Sequence[dict[str, float]], step: int | None = None) -> dict[str, float]:
    """Return what is recorded of the model after `step` updates, or of the last model: nothing where nothing is.

    The last value of every metric that goes on from step to step, and the step; but what is measured of one model now
    and then is not true of the next one, and only the values at this very step are given.
    """
    if not lines:
        return {}
    step = max(int(line["step"]) for line in lines) if step is None else step
    merged: dict[str, float] = {}
    for line in lines:
        is_of_model = line["step"] == step
        merged |= {name: value for name, value in line.items() if is_of_model or not name.startswith(MEASURED)}
    return merged | {"step": step}


def find_last_validation(lines: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Return the line of the last validation, if there was one."""
    return max((line for line in lines if "val/loss" in line), key=lambda line: line["step"], default=None)


def describe_validation(last: dict[str, float]) -> str:
    """Write the last validation loss with its units."""
    text = f"{last['val/loss']:.4f} nats a token"
    return text + (f", {last['val/bpb']:.4f} bits a byte" if "val/bpb" in last else "")
