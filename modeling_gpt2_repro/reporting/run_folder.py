"""Reading a run folder: what every report starts from."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.arguments import parse_arguments
from modeling_gpt2_repro.data.shards import BASELINES_NAME, list_checksums
from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.evaluation.baseline import GPT2_124M_NAMES, Baseline, load_baselines
from modeling_gpt2_repro.evaluation.hellaswag_data import identify_items, name_items
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


def read_gpt2_baselines(settings: dict[str, Any]) -> list[Baseline]:
    """Return what is kept of OpenAI's 124M model beside a run's data, if any; a report does without just as well."""
    path = Path(settings["data_dir"]) / BASELINES_NAME
    if not path.exists():  # spares reading the shards for their checksums
        return []
    try:
        baselines = load_baselines(path, list_checksums(settings["data_dir"], "val"))
    except (UserError, OSError):
        return []
    return [baseline for baseline in baselines if baseline.model in GPT2_124M_NAMES]


def find_validation_loss(baselines: list[Baseline], settings: dict[str, Any]) -> tuple[str, float] | None:
    """Return whose validation loss on the very windows that a run is validated on is known, and the loss."""
    wanted = settings["eval_tokens"], settings["sequence_length"]
    for baseline in baselines:
        if baseline.validation is not None and (baseline.eval_tokens, baseline.sequence_length) == wanted:
            return baseline.model, baseline.validation["val/loss"]
    return None


def find_hellaswag_score(baselines: list[Baseline], settings: dict[str, Any]) -> tuple[str, float] | None:
    """Return whose score on the very items that a run is scored on is known, and the `acc_norm`."""
    measured = [baseline for baseline in baselines if baseline.hellaswag is not None]
    try:
        wanted = (identify_items(settings["hellaswag_file"]) if measured else None, settings["hellaswag_limit"])
    except OSError:
        return None
    for baseline in measured:
        if (baseline.hellaswag.get("items"), baseline.hellaswag.get("limit")) == wanted:
            return baseline.model, baseline.hellaswag["acc_norm"]
    return None
