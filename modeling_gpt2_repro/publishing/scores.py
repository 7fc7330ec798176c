"""HellaSwag scores of a finished model: reading them from its run folder, and formatting them for the Hub.

The Hub reads `model-index` in a model card and `.eval_results/*.yaml`. Both state the protocol of every score and
contain only scores on the full validation split (`choose_validation_split_scores`).
"""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..core.errors import format_line
from ..evaluation.hellaswag import METRIC_PREFIXES, SCORE_NAMES
from ..evaluation.hellaswag_data import DATASET_NAME, DATASET_REVISION
from ..evaluation.multiple_choice import format_score
from ..model.folder import identify_weights
from ..plots.references import is_scored_on_validation_split
from ..training.config import TrainingConfig
from ..training.metrics import Metrics, read_json_object
from ..training.run_folder import RunFolder

EVAL_RESULTS = ".eval_results"
# The Hub shows a score on a dataset's leaderboard if the dataset defines a task with this id. Whether Rowan/hellaswag
# does is untested; the model's own page shows the score in any case.
TASK_ID = "hellaswag"
ACCURACIES = {"acc_norm": "length-normalized accuracy", "acc": "accuracy"}
PROTOCOLS = {
    "original": "protocol original: build-nanogpt's script, acc_norm by tokens",
    "lm_eval": "protocol lm_eval: lm-evaluation-harness 0.4, acc_norm by characters",
}

Score = Mapping[str, Any]  # `acc`, `acc_norm` and, if known, their `_stderr`, `n` and `dtype`, as in results.json


def read_training_scores(last: Metrics) -> dict[str, Score]:
    """Return the scores in a run's last metrics, keyed by protocol, with the field names of eval_hellaswag.py."""
    scores = {
        protocol: {name: last[f"{prefix}/{name}"] for name in SCORE_NAMES if f"{prefix}/{name}" in last}
        for protocol, prefix in METRIC_PREFIXES.items()
    }
    return {protocol: score for protocol, score in scores.items() if "acc_norm" in score}


def list_scores(folder: RunFolder, repo_id: str | None = None) -> list[Score]:
    """Return the HellaSwag scores of the finished model that eval_hellaswag.py wrote to the run folder.

    Files without valid scores of this model are skipped, with the reason on stderr.

    Returns:
        The scores of each file and protocol, with their `protocol`, `file`, `data` (name of the items),
        `is_validation_split` and `dtype` (`None` if unknown).
    """
    found: list[Score] = []
    for path in sorted(path for path in folder.path.glob("hellaswag*.json") if path.is_file()):
        content = read_json_object(path)
        scores = _read_scores(content)
        fault = _find_fault(content, path, folder, repo_id) if scores else "it is damaged or contains no scores"
        if fault is None:
            found += [score | {"file": path.stem} for score in scores]
        else:
            print(format_line(f"skipping {path}: {fault}"), file=sys.stderr)
    return found


def _read_scores(content: dict[str, Any]) -> list[dict[str, Any]]:
    facts = {
        "data": str(content.get("data")),
        "is_validation_split": content.get("is_validation_split") is True,
        "dtype": content.get("dtype") if content.get("dtype") in ("float32", "bfloat16") else None,
    }
    found: list[dict[str, Any]] = []
    for protocol in (each for each in METRIC_PREFIXES if isinstance(content.get(each), dict)):
        scores = content[protocol]
        accuracies = (scores.get("acc"), scores.get("acc_norm"))
        if type(scores.get("n")) is int and all(type(each) is float and 0 <= each <= 1 for each in accuracies):
            found.append(scores | facts | {"protocol": protocol})
    return found


def _find_fault(content: dict[str, Any], path: Path, folder: RunFolder, repo_id: str | None) -> str | None:
    """Return why scores are not those of the finished model, or `None` if they are."""
    model_config = folder.final / "config.json"
    if not model_config.exists():
        return "the run has no finished model yet"
    if content.get("weights") is not None:
        is_same = content["weights"] == identify_weights(folder.final)
        return None if is_same else f"it was measured with other (or earlier) weights than those in {folder.final}"
    # Without a checksum (of a model on the Hub, for example), compare the model's name and the file's age.
    names = {(Path(os.path.abspath(folder.path)).name, folder.final.name), tuple((repo_id or "").split("/"))}
    if Path(str(content.get("model"))).absolute().parts[-2:] not in names:
        return f"it was measured with the model {content.get('model')}"
    return f"it is older than {folder.final}" if path.stat().st_mtime < model_config.stat().st_mtime else None


def choose_validation_split_scores(
    in_training: Mapping[str, Score], afterwards: Iterable[Score], config: TrainingConfig
) -> dict[str, Score]:
    """Return the scores on HellaSwag's full validation split, keyed by protocol; no others may be called HellaSwag's.

    Scores by eval_hellaswag.py take precedence over those measured in training, in its precision, and among the former
    those in float32.

    Args:
        in_training: the result of `read_training_scores`.
        afterwards: the result of `list_scores`.
    """
    scores = dict(in_training) if is_scored_on_validation_split(config) else {}
    for score in sorted(afterwards, key=lambda score: score["dtype"] == "float32"):
        if score["is_validation_split"]:
            scores[score["protocol"]] = score
    return {protocol: score for protocol, score in scores.items() if "acc" in score}


def describe_score(score: Score, metric: str) -> str:
    """Format a score as `format_score` does, with its precision, as far as known."""
    stderr, n, dtype = score.get(f"{metric}_stderr"), score.get("n"), score.get("dtype")
    text = format_score(score[metric], stderr if isinstance(stderr, float) else None, int(n) if n else None)
    return text + (f", in {dtype}" if dtype else "")


def build_eval_results(scores: Mapping[str, Score]) -> list[EvalResult]:
    """Return a `model-index` entry for each protocol and metric, with the value as a fraction.

    The list is the `eval_results` of `ModelCardData(model_name=..., eval_results=...)`.
    """
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=DATASET_NAME,
            dataset_name="HellaSwag",
            dataset_split="validation",
            dataset_revision=DATASET_REVISION,
            dataset_args={"num_few_shot": 0},
            metric_type=metric,
            metric_name=f"{name}, {PROTOCOLS[protocol]}",
            metric_value=round(score[metric], 4),
            # Not in `dataset_args`: huggingface_hub groups results by dataset and keeps only the first's arguments.
            metric_args={"protocol": protocol, **_collect_details(score, metric)},
        )
        for protocol, score in scores.items()
        for metric, name in ACCURACIES.items()
    ]


def _collect_details(score: Score, metric: str) -> dict[str, Any]:
    stderr, dtype = score.get(f"{metric}_stderr"), score.get("dtype")
    return ({} if stderr is None else {"stderr": round(stderr, 4)}) | ({"dtype": dtype} if dtype else {})


def render_eval_results(scores: Mapping[str, Score]) -> dict[str, str]:
    """Return the content of each `.eval_results/hellaswag_PROTOCOL.yaml`, with `acc_norm`, keyed by relative path.

    There is one file per protocol, because the Hub requires separate files for several scores on one task.
    """
    texts = {}
    for protocol, score in scores.items():
        precision = f", in {score['dtype']}" if score.get("dtype") else ""
        entry = EvalResultEntry(
            dataset_id=DATASET_NAME,
            task_id=TASK_ID,
            value=round(score["acc_norm"], 4),
            dataset_revision=DATASET_REVISION,
            notes=f"acc_norm, zero-shot, {PROTOCOLS[protocol]}{precision}",
        )
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        texts[f"{EVAL_RESULTS}/{TASK_ID}_{protocol}.yaml"] = content
    return texts
