"""Reading a run folder: what every report starts from."""

from pathlib import Path
from typing import Any

import yaml

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.evaluation.hellaswag_data import name_items
from modeling_gpt2_repro.training.tracking import CONFIG, METRICS, read_json_lines


def read_settings(run_folder: Path) -> dict[str, Any]:
    """Return the settings of a run by name."""
    return yaml.safe_load((run_folder / CONFIG).read_text(encoding="utf-8"))


def name_hellaswag_items(settings: dict[str, Any]) -> str:
    """Say on which items a run was scored."""
    return name_items(settings["hellaswag_file"], settings["hellaswag_limit"])


def read_last_metrics(run_folder: Path) -> dict[str, float]:
    """Return the last value of every metric, and the last step.

    Raises:
        UserError: the folder has no metrics.
    """
    last: dict[str, float] = {}
    for line in read_json_lines(run_folder / METRICS):
        last |= line
    if not last:
        raise UserError(f"{run_folder} has no {METRICS}: give the folder of a run that has begun")
    return last


def describe_validation(last: dict[str, float]) -> str:
    """Write the last validation loss with its units."""
    text = f"{last['val/loss']:.4f} nats a token"
    return text + (f", {last['val/bpb']:.4f} bits a byte" if "val/bpb" in last else "")
