"""HellaSwag scores in the two forms that the Hub reads: `model-index` in a model card, and `.eval_results/*.yaml`.

Both name the protocol of every score. They are of HellaSwag only where the whole validation split was scored: whoever
calls this makes sure of it (`is_full_validation_split`).
"""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from modeling_gpt2_repro.evaluation.hellaswag_data import DATASET_NAME, DATASET_REVISION

FOLDER = ".eval_results"
# The Hub shows a score on a dataset's leaderboard where the dataset defines a task of this name. We could not try
# whether Rowan/hellaswag does; on the model's own page it is shown in any case.
TASK_ID = "hellaswag"
METRICS = {"acc_norm": "length-normalised accuracy", "acc": "accuracy"}
PROTOCOLS = {
    "original": "protocol original: build-nanogpt's script, acc_norm by tokens",
    "lm_eval": "protocol lm_eval: lm-evaluation-harness 0.4, acc_norm by characters",
}

Summaries = Mapping[str, Mapping[str, Any]]


def build_eval_results(summaries: Summaries) -> list[EvalResult]:
    """Return an entry of a model card's `model-index` for each protocol and metric, its value a fraction.

    `ModelCardData(model_name=..., eval_results=...)` takes the list.

    Args:
        summaries: by protocol `acc` and `acc_norm`, and where they are known their `*_stderr` and the model's `dtype`,
            as `results.json` has them.
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
            metric_value=round(summary[metric], 4),
            # Not in `dataset_args`: the Hub's library puts all results on a dataset under the arguments of the first.
            metric_args={"protocol": protocol, **_collect_details(summary, metric)},
        )
        for protocol, summary in summaries.items()
        for metric, name in METRICS.items()
    ]


def build_eval_result_entries(summaries: Summaries) -> dict[str, EvalResultEntry]:
    """Return by protocol the entry of `.eval_results` that says `acc_norm`, as a fraction.

    Args:
        summaries: as for `build_eval_results`.
    """
    return {
        protocol: EvalResultEntry(
            dataset_id=DATASET_NAME,
            task_id=TASK_ID,
            value=round(summary["acc_norm"], 4),
            dataset_revision=DATASET_REVISION,
            notes=f"acc_norm, zero-shot, {PROTOCOLS[protocol]}"
            + (f", in {summary['dtype']}" if summary.get("dtype") else ""),
        )
        for protocol, summary in summaries.items()
    }


def render_eval_results(summaries: Summaries) -> dict[str, str]:
    """Return the text of each `.eval_results/hellaswag_PROTOCOL.yaml` by its path in a model folder.

    One file a protocol, because the Hub wants several scores on one task in files of their own.
    """
    return {
        f"{FOLDER}/hellaswag_{protocol}.yaml": yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        for protocol, entry in build_eval_result_entries(summaries).items()
    }


def _collect_details(summary: Mapping[str, Any], metric: str) -> dict[str, Any]:
    stderr, dtype = summary.get(f"{metric}_stderr"), summary.get("dtype")
    return ({} if stderr is None else {"stderr": round(stderr, 4)}) | ({"dtype": dtype} if dtype else {})
