"""The metrics of a run: their names, and reading `metrics.jsonl`, which has one JSON object a line.

Each is of the model after `step` updates. `train.update` makes those of every update:

- `train/loss`: mean cross-entropy of the update's tokens, in nats per token
- `train/lr`, `train/grad_norm`: the learning rate, and the global norm of the gradient before it is clipped
- `train/tokens_per_second`, `train/mfu`: of the update alone, all processes together; the latter as a share of the
  devices' peak (`throughput.choose_peak`)
- `train/data_wait_seconds`: how long the first process waited for tokens
- `train/epoch`, `train/tokens`, `train/flops`: passes over the data, tokens and floating-point operations up to here
- `train/elapsed_seconds`: since the run began, time between its parts left out
- `train/peak_memory_gb`: of the first process, 10^9 bytes

`train.write_checkpoint` adds `train/checkpoint_seconds`, how long a save held the run up. `train.evaluate` makes
those of evaluations, whose names do not begin with `train/`:

- `val/loss`, `val/bpb`: nats per token, and bits per UTF-8 byte of text
- `hellaswag/acc`, `hellaswag/acc_norm`, `hellaswag/acc_stderr`, `hellaswag/acc_norm_stderr`, `hellaswag/n`:
  accuracies, standard errors and number of items, protocol `original`
- `hellaswag_lm_eval/...`: the same in protocol `lm_eval`, of the last model

A new one is a line in `update` or `evaluate` and here: `RunRecord.log` hands it to the files and the trackers. A panel
in the picture is a line in `plots.panels.SMALL_PANELS`; `commands.summary` and `publishing.model_card` choose what
they tell. An evaluation with an interval of its own is also known to `Plan.is_eval_step` and `Plan.evaluation_tokens`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Numbers from here on have no place on an axis, and no run has them.
LARGEST_METRIC = 1e100
# Names of metrics that every update has begin so; the others are measured of one model now and then.
EVERY_STEP = "train/"

Metrics = dict[str, float]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file that have a step; none if there is no file.

    Lines that a crash or a damaged disk left broken are skipped.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    objects = (_parse_object(line) for line in lines)
    return [content for content in objects if isinstance(content.get("step"), int)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file is missing or holds none."""
    return _parse_object(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}


def _parse_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair, which could be written nowhere
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> list[Metrics]:
    """Read the lines of `metrics.jsonl`, each its step and other numbers; the rest is skipped."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < LARGEST_METRIC  # not NaN either

    lines = [{name: value for name, value in line.items() if is_number(value)} for line in read_json_lines(path)]
    return [line for line in lines if line.get("step", -1) >= 0]


def merge_metrics(lines: Sequence[Metrics], step: int | None = None) -> Metrics:
    """Return what is recorded of the model after `step` updates (`None`: of the last model), and the step.

    Metrics of every update have their last value. Those of evaluations are given only if measured at this very step.
    """
    if not lines:
        return {}
    step = max(int(line["step"]) for line in lines) if step is None else step
    merged: Metrics = {}
    for line in lines:
        is_of_model = line["step"] == step
        merged |= {name: value for name, value in line.items() if is_of_model or name.startswith(EVERY_STEP)}
    return merged | {"step": step}


def find_last_validation(lines: Sequence[Metrics]) -> Metrics | None:
    """Return the line of the last validation, if there was one."""
    return max((line for line in lines if "val/loss" in line), key=lambda line: line["step"], default=None)


def format_validation(line: Metrics) -> str:
    """Write a validation loss with its units."""
    text = f"{line['val/loss']:.4f} nats per token"
    return text + (f", {line['val/bpb']:.4f} bits per byte" if "val/bpb" in line else "")


def format_log_lines(metrics: Metrics) -> Iterator[str]:
    """Yield a line of metrics as the original script logged them, where train n is the loss of update n + 1."""
    step = int(metrics["step"])
    if "train/loss" in metrics:
        yield f"{step - 1} train {metrics['train/loss']:.6f}\n"
    if "val/loss" in metrics:
        yield f"{step} val {metrics['val/loss']:.4f}\n"
    if "hellaswag/acc_norm" in metrics:
        yield f"{step} hella {metrics['hellaswag/acc_norm']:.4f}\n"
