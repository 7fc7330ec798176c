"""HellaSwag scores of a finished model: those in its run's folder, and the two forms in which the Hub reads them.

The Hub's forms are `model-index` in a model card, and `.eval_results/*.yaml`. Both name the protocol of every score,
and take scores on the whole validation split only (`choose_validation_split_scores`).
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
from ..model.folder import identify_weights
from ..plots.references import is_scored_on_validation_split
from ..training.config import TrainingConfig
from ..training.metrics import Metrics, read_json_object
from ..training.run_folder import RunFolder

EVAL_RESULTS = ".eval_results"
# The Hub shows a score on a dataset's leaderboard where the dataset defines a task of this name. We could not try
# whether Rowan/hellaswag does; on the model's own page it is shown in any case.
TASK_ID = "hellaswag"
ACCURACIES = {"acc_norm": "length-normalised accuracy", "acc": "accuracy"}
PROTOCOLS = {
    "original": "protocol original: build-nanogpt's script, acc_norm by tokens",
    "lm_eval": "protocol lm_eval: lm-evaluation-harness 0.4, acc_norm by characters",
}

Score = Mapping[str, Any]  # `acc`, `acc_norm`; where known their `_stderr`, `n` and `dtype`, as in results.json


def read_training_scores(last: Metrics) -> dict[str, Score]:
    """Return by protocol the scores in a run's last metrics, by the names that eval_hellaswag.py writes."""
    scores = {
        protocol: {name: last[f"{prefix}/{name}"] for name in SCORE_NAMES if f"{prefix}/{name}" in last}
        for protocol, prefix in METRIC_PREFIXES.items()
    }
    return {protocol: score for protocol, score in scores.items() if "acc_norm" in score}


def list_scores(folder: RunFolder, repo_id: str | None = None) -> list[Score]:
    """Return the HellaSwag scores of the finished model that eval_hellaswag.py wrote into the run folder.

    A file without any is skipped with a line on stderr that says why.

    Returns:
        For each file and protocol the scores, with their `protocol`, `file`, `data` (the name of the items),
        `is_validation_split` and `dtype` (`None` if unknown).
    """
    found = []
    for path in sorted(path for path in folder.path.glob("hellaswag*.json") if path.is_file()):
        content = read_json_object(path)
        scores = _read_scores(content)
        fault = _find_fault(content, path, folder, repo_id) if scores else "it is damaged, or holds no scores"
        if fault is None:
            found += [score | {"file": path.stem} for score in scores]
        else:
            print(format_line(f"{path} is skipped: {fault}"), file=sys.stderr)
    return found


def _read_scores(content: dict[str, Any]) -> list[dict[str, Any]]:
    facts = {
        "data": str(content.get("data")),
        "is_validation_split": content.get("is_validation_split") is True,
        "dtype": content.get("dtype") if content.get("dtype") in ("float32", "bfloat16") else None,
    }
    found = []
    for protocol in (each for each in METRIC_PREFIXES if isinstance(content.get(each), dict)):
        scores = content[protocol]
        accuracies = (scores.get("acc"), scores.get("acc_norm"))
        if type(scores.get("n")) is int and all(type(each) is float and 0 <= each <= 1 for each in accuracies):
            found.append(scores | facts | {"protocol": protocol})
    return found


def _find_fault(content: dict[str, Any], path: Path, folder: RunFolder, repo_id: str | None) -> str | None:
    """Return why scores are not those of the finished model; `None` if they are."""
    model_config = folder.final / "config.json"
    if not model_config.exists():
        return "the run has no finished model yet"
    if content.get("weights") is not None:
        is_same = content["weights"] == identify_weights(folder.final)
        return None if is_same else f"it is of other weights than those in {folder.final}, or of an earlier state"
    # Without a checksum, as of a model on the Hub: the model's name and the age have to do.
    names = {(Path(os.path.abspath(folder.path)).name, folder.final.name), tuple((repo_id or "").split("/"))}
    if Path(str(content.get("model"))).absolute().parts[-2:] not in names:
        return f"it is of the model {content.get('model')}"
    return f"it is older than {folder.final}" if path.stat().st_mtime < model_config.stat().st_mtime else None


def choose_validation_split_scores(
    in_training: Mapping[str, Score], afterwards: Iterable[Score], config: TrainingConfig
) -> dict[str, Score]:
    """Return by protocol the scores on the whole of HellaSwag's validation set, which alone are HellaSwag's.

    Those that eval_hellaswag.py measured take precedence over those of the training, whose precision is the
    training's; and of these, the ones in float32.

    Args:
        in_training: as `read_training_scores` returns them.
        afterwards: as `list_scores` returns them.
    """
    scores = dict(in_training) if is_scored_on_validation_split(config) else {}
    for score in sorted(afterwards, key=lambda score: score["dtype"] == "float32"):
        if score["is_validation_split"]:
            scores[score["protocol"]] = score
    return {protocol: score for protocol, score in scores.items() if "acc" in score}


def describe_score(score: Score, metric: str) -> str:
    """Format a score with its standard error, the number of items and the precision, as far as they are known."""
    stderr, n, dtype = score.get(f"{metric}_stderr"), score.get("n"), score.get("dtype")
    error = f" ± {stderr:.4f} (standard error)" if isinstance(stderr, float) else ""
    return f"{score[metric]:.4f}{error}" + (f", {n:,} items" if n else "") + (f", in {dtype}" if dtype else "")


def build_eval_results(scores: Mapping[str, Score]) -> list[EvalResult]:
    """Return an entry of a model card's `model-index` for each protocol and metric, its value a fraction.

    `ModelCardData(model_name=..., eval_results=...)` takes the list.
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
            # Not in `dataset_args`: the Hub's library puts all results on a dataset under the arguments of the first.
            metric_args={"protocol": protocol, **_collect_details(score, metric)},
        )
        for protocol, score in scores.items()
        for metric, name in ACCURACIES.items()
    ]


def _collect_details(score: Score, metric: str) -> dict[str, Any]:
    stderr, dtype = score.get(f"{metric}_stderr"), score.get("dtype")
    return ({} if stderr is None else {"stderr": round(stderr, 4)}) | ({"dtype": dtype} if dtype else {})


def render_eval_results(scores: Mapping[str, Score]) -> dict[str, str]:
    """Return the text of each `.eval_results/hellaswag_PROTOCOL.yaml`, which has `acc_norm`, by its path in a folder.

    One file a protocol, because the Hub wants several scores on one task in files of their own.
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
