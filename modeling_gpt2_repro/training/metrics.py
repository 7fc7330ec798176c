"""The metrics of a run: their names, and reading `metrics.jsonl`, which has one JSON object per line.

`step` is the number of completed updates. `train.update` records at every step:

- `train/loss`: mean cross-entropy over the update's tokens, in nats per token
- `train/lr`, `train/grad_norm`: the learning rate, and the global gradient norm before clipping
- `train/tokens_per_second`, `train/mfu`: throughput of the update over all ranks, and its share of the devices' peak
  (`throughput.choose_peak`)
- `train/data_wait_seconds`: how long rank 0 waited for tokens
- `train/epoch`, `train/tokens`, `train/flops`: passes over the data, tokens and floating-point operations so far
- `train/elapsed_seconds`: time since the run began, without pauses between its parts
- `train/peak_memory_gb`: peak memory of rank 0, in 10^9 bytes

`train.write_checkpoint` adds `train/checkpoint_seconds`, how long training paused for a checkpoint.
`train.evaluate` records, under names that do not begin with `train/`:

- `val/loss`, `val/bpb`: nats per token, and bits per UTF-8 byte of text
- `hellaswag/acc`, `hellaswag/acc_norm`, `hellaswag/acc_stderr`, `hellaswag/acc_norm_stderr`, `hellaswag/n`:
  accuracies, standard errors and number of items, protocol `original`
- `hellaswag_lm_eval/...`: the same in protocol `lm_eval`, of the last model only

To add a metric, add it to the dictionary in `update` or `evaluate` and to this list; `RunRecord.log` passes it to
files and trackers. `plots.panels.SMALL_PANELS` draws it, `commands.summary` and `publishing.model_card` report it. An
evaluation with its own interval also needs `Plan.is_eval_step` and `Plan.evaluation_tokens`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Larger values cannot be drawn on an axis, and no run has them.
LARGEST_METRIC = 1e100
# Prefix of the metrics recorded at every step.
EVERY_STEP = "train/"

Metrics = dict[str, float]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects with a `step` from a JSON Lines file; a missing file has none.

    Invalid lines, as a crash can leave behind, are skipped.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    objects = (_parse_object(line) for line in lines)
    return [content for content in objects if isinstance(content.get("step"), int)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or invalid."""
    return _parse_object(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}


def _parse_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if "\\u" in text:  # rejects lone surrogates, which cannot be encoded
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(path: Path) -> list[Metrics]:
    """Read the lines of `metrics.jsonl`: `step` and other finite numbers; anything else is skipped."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < LARGEST_METRIC  # not NaN either

    lines = [{name: value for name, value in line.items() if is_number(value)} for line in read_json_lines(path)]
    return [line for line in lines if line.get("step", -1) >= 0]


def merge_metrics(lines: Sequence[Metrics], step: int | None = None) -> Metrics:
    """Return `step` and the metrics of the model after `step` updates (`None`: the last step).

    Metrics of every step have their last value; those of evaluations are included only if measured at this step.
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
    """Return the line of the last validation, or `None`."""
    return max((line for line in lines if "val/loss" in line), key=lambda line: line["step"], default=None)


def format_validation(line: Metrics) -> str:
    """Format a validation loss with its units."""
    text = f"{line['val/loss']:.4f} nats per token"
    return text + (f", {line['val/bpb']:.4f} bits per byte" if "val/bpb" in line else "")


def format_log_lines(metrics: Metrics) -> Iterator[str]:
    """Yield the lines of the original script's `log.txt`, in which train n is the loss of update n + 1."""
    step = int(metrics["step"])
    if "train/loss" in metrics:
        yield f"{step - 1} train {metrics['train/loss']:.6f}\n"
    if "val/loss" in metrics:
        yield f"{step} val {metrics['val/loss']:.4f}\n"
    if "hellaswag/acc_norm" in metrics:
        yield f"{step} hella {metrics['hellaswag/acc_norm']:.4f}\n"
