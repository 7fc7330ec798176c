"""HellaSwag scores of a finished model, as they lie in its run's folder."""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.errors import format_line
from modeling_gpt2_repro.evaluation.hellaswag import ENCODERS, METRIC_PREFIXES, SCORE_NAMES
from modeling_gpt2_repro.model.folder import identify_weights
from modeling_gpt2_repro.plots.references import is_scored_on_validation_split
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.metrics import read_json_object


def read_training_scores(last: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return by protocol the scores in a run's last metrics, by the names that eval_hellaswag.py writes."""
    scores = {
        protocol: {name: last[f"{prefix}/{name}"] for name in SCORE_NAMES if f"{prefix}/{name}" in last}
        for protocol, prefix in METRIC_PREFIXES.items()
    }
    return {protocol: score for protocol, score in scores.items() if "acc_norm" in score}


def choose_validation_split_scores(
    training_scores: dict[str, dict[str, Any]], own_scores: Iterable[dict[str, Any]], config: TrainingConfig
) -> dict[str, dict[str, Any]]:
    """Return by protocol the scores on the whole of HellaSwag's validation set, which alone are HellaSwag's.

    Those that eval_hellaswag.py measured come before those of the training, where the precision is the training's, and
    of those the ones in float32.

    Args:
        training_scores: as `read_training_scores` returns them.
        own_scores: as `list_scores` returns them.
    """
    scores = training_scores if is_scored_on_validation_split(config) else {}
    found = [score for score in own_scores if score["is_validation_split"]]
    found.sort(key=lambda score: score["dtype"] == "float32")
    scores = scores | {score["protocol"]: score for score in found}
    return {protocol: score for protocol, score in scores.items() if "acc" in score}


def list_scores(run_folder: Path, repo_id: str | None = None) -> list[dict[str, Any]]:
    """Return the HellaSwag scores of the finished model that eval_hellaswag.py wrote into the run folder.

    A file with none of them is passed over with a line on stderr that says why.

    Returns:
        For each file and protocol the scores, with their `protocol`, `file`, `data` (the name of the items),
        `is_validation_split` and `dtype` (where it is known).
    """
    found = []
    for path in sorted(path for path in run_folder.glob("hellaswag*.json") if path.is_file()):
        content = read_json_object(path)
        scores = _read_scores(content)
        fault = _find_fault(content, path, run_folder, repo_id) if scores else "it is damaged, or holds no scores"
        if fault is None:
            found += [score | {"file": path.stem} for score in scores]
        else:
            print(format_line(f"{path} is passed over: {fault}"), file=sys.stderr)
    return found


def format_score(score: Mapping[str, Any], metric: str) -> str:
    """Write a score with its standard error, the number of items and the precision, where they are known."""
    stderr, n, dtype = score.get(f"{metric}_stderr"), score.get("n"), score.get("dtype")
    error = f" ± {stderr:.4f} (standard error)" if isinstance(stderr, float) else ""
    return f"{score[metric]:.4f}{error}" + (f", {n:,} items" if n else "") + (f", in {dtype}" if dtype else "")


def _read_scores(content: dict[str, Any]) -> list[dict[str, Any]]:
    facts = {
        "data": str(content.get("data")),
        "is_validation_split": content.get("is_validation_split") is True,
        "dtype": content.get("dtype") if content.get("dtype") in ("float32", "bfloat16") else None,
    }
    found = []
    for protocol in (each for each in ENCODERS if isinstance(content.get(each), dict)):
        scores = content[protocol]
        accuracies = (scores.get("acc"), scores.get("acc_norm"))
        if type(scores.get("n")) is int and all(type(each) is float and 0 <= each <= 1 for each in accuracies):
            found.append(scores | facts | {"protocol": protocol})
    return found


def _find_fault(content: dict[str, Any], path: Path, run_folder: Path, repo_id: str | None) -> str | None:
    """Say why scores are not those of the finished model; `None` if they are."""
    final = run_folder / "final"
    if not (final / "config.json").exists():
        return "the run has no finished model yet"
    if content.get("weights") is not None:
        is_same = content["weights"] == identify_weights(final)
        return None if is_same else f"it is of other weights than those in {final}, or of an earlier state of them"
    # Without a checksum, as of a model on the Hub: the model's name and the age have to do.
    names = {(Path(os.path.abspath(run_folder)).name, "final"), tuple((repo_id or "").split("/"))}
    if Path(str(content.get("model"))).absolute().parts[-2:] not in names:
        return f"it is of the model {content.get('model')}"
    if path.stat().st_mtime < (final / "config.json").stat().st_mtime:
        return f"it is older than {final}"
    return None
