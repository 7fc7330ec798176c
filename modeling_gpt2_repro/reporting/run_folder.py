"""Reading a run folder: what every report starts from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.arguments import parse_arguments
from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import name_items
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.tracking import CONFIG, METRICS, read_metrics


def read_settings(run_folder: Path) -> dict[str, Any]:
    """Return the settings of a run by name.

    Raises:
        UserError: the file is missing or damaged.
    """
    return asdict(parse_arguments(TrainingConfig, [f"--config={run_folder / CONFIG}"], description=""))


def name_hellaswag_items(settings: dict[str, Any]) -> str:
    """Say on which items a run was scored."""
    return name_items(settings["hellaswag_file"], settings["hellaswag_limit"])


def merge_metrics(run_folder: Path) -> dict[str, float]:
    """Return the last value of every metric, and the last step; nothing where nothing is recorded."""
    last: dict[str, float] = {}
    for line in read_metrics(run_folder / METRICS):
        last |= line
    return last


def read_last_metrics(run_folder: Path) -> dict[str, float]:
    """Return the last value of every metric, and the last step.

    Raises:
        UserError: the folder has no metrics.
    """
    last = merge_metrics(run_folder)
    if not last:
        raise UserError(f"{run_folder} has no {METRICS}: give the folder of a run that has begun")
    return last


def describe_validation(last: dict[str, float]) -> str:
    """Write the last validation loss with its units."""
    text = f"{last['val/loss']:.4f} nats a token"
    return text + (f", {last['val/bpb']:.4f} bits a byte" if "val/bpb" in last else "")
