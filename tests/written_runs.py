"""Run folders written by hand, to test their readers."""

import json
from pathlib import Path

import numpy as np

from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.training.config import TrainingConfig


def write_run(folder: Path, lines: list[dict], **settings) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(TrainingConfig(**{"run_name": folder.name, **settings}), folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def build_lines(n_steps: int, every: int = 10) -> list[dict]:
    """Return metrics of a loss that falls from 11 to 3 within the first hundred steps."""
    lines = []
    for step in range(n_steps + 1):
        loss = 3 + 8 * np.exp(-step / 30)
        if step:
            lines.append({"step": step, "train/loss": loss, "train/lr": 1e-3, "train/elapsed_seconds": 60.0 * step})
        if step % every == 0:
            lines.append({"step": step, "val/loss": loss + 0.1, "hellaswag/acc_norm": 0.26})
    return lines
