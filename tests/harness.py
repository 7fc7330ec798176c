"""lm-evaluation-harness, its own `hellaswag` task reading a local file, as the reference for our scores."""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs


def build_task(data_file: Path) -> ConfigurableTask:
    """Return the harness's own task, except that its items come from `data_file`."""
    text = (Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml").read_text()
    config = yaml.safe_load(text.replace("!function", ""))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data_file)}}}
    return ConfigurableTask(config=config | source | {"training_split": None, "process_docs": process_docs})


def silence_harness() -> None:
    """Keep the harness's log off the terminal, and silence the tokenizers' warning about forks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def encode_pairs(model, tokenizer, data_file: Path) -> list[tuple[list[int], list[int]]]:
    """Return the context and ending ids that the harness gives a model, four pairs per item."""
    silence_harness()
    task = build_task(data_file)
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests()
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer)
    return [harness_model._encode_pair(*instance.args) for instance in task.instances]


def run_harness(model, tokenizer, data_file: Path, batch_size: int = 16) -> dict[str, Any]:
    """Score a model on all items of a file.

    Returns:
        `acc`, `acc_norm` and their `*_stderr`, and `nll`: four sums per item, in the file's order.
    """
    silence_harness()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[build_task(data_file)],
            task_manager=TaskManager(include_defaults=False),  # reading all of its tasks takes five seconds
        )
    scores = results["results"]["hellaswag"]
    samples = sorted(results["samples"]["hellaswag"], key=lambda sample: sample["doc_id"])
    return {
        **{name: scores[f"{name},none"] for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")},
        "nll": [[-log_likelihood for log_likelihood, _ in sample["filtered_resps"]] for sample in samples],
    }
