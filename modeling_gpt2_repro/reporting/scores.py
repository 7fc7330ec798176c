"""HellaSwag scores of a finished model, as they lie in its run's folder."""

from pathlib import Path
from typing import Any

from modeling_gpt2_repro.evaluation.hellaswag import ENCODERS, METRIC_PREFIXES, SCORE_NAMES
from modeling_gpt2_repro.reporting.references import is_scored_on_validation_split
from modeling_gpt2_repro.training.tracking import read_json_object


def read_training_scores(last: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return by protocol the scores in a run's last metrics, by the names that eval_hellaswag.py writes."""
    scores = {
        protocol: {name: last[f"{prefix}/{name}"] for name in SCORE_NAMES if f"{prefix}/{name}" in last}
        for protocol, prefix in METRIC_PREFIXES.items()
    }
    return {protocol: score for protocol, score in scores.items() if "acc_norm" in score}


def find_validation_split_scores(
    run_folder: Path, settings: dict[str, Any], last: dict[str, float], step: int | None, repo_id: str | None = None
) -> dict[str, dict[str, Any]]:
    """Return by protocol the scores on the whole of HellaSwag's validation set, which alone are HellaSwag's.

    Those that eval_hellaswag.py measured come before those of the training, where the precision is the training's.
    """
    scores: dict[str, dict[str, Any]] = {}
    if is_scored_on_validation_split(settings):
        scores |= read_training_scores(last)
    if step is None:
        found = [score for _, score in list_scores(run_folder, repo_id) if score["is_validation_split"]]
        scores |= {score["protocol"]: score for score in found}
    return {protocol: score for protocol, score in scores.items() if "acc" in score}


def list_scores(run_folder: Path, repo_id: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return the HellaSwag scores of the finished model that eval_hellaswag.py wrote into the run folder.

    What is older than the model, or is another model's, is none of them.

    Returns:
        The name of the items and the scores, each with its `protocol` and `is_validation_split`.
    """
    finished = run_folder / "final" / "config.json"
    names = {(run_folder.resolve().name, "final"), tuple((repo_id or "").split("/"))}
    found = []
    for path in sorted(run_folder.glob("hellaswag*.json")) if finished.exists() else ():
        content = read_json_object(path)
        if (
            path.stat().st_mtime < finished.stat().st_mtime
            or Path(str(content.get("model"))).absolute().parts[-2:] not in names
        ):
            continue
        for protocol in (each for each in ENCODERS if isinstance(content.get(each), dict)):
            is_validation_split = content.get("is_validation_split") is True
            scores = content[protocol] | {"protocol": protocol, "is_validation_split": is_validation_split}
            accuracies = (scores.get("acc"), scores.get("acc_norm"))
            if type(scores.get("n")) is int and all(type(each) is float and 0 <= each <= 1 for each in accuracies):
                found.append((str(content.get("data")), scores))
    return found
