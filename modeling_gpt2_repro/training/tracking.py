"""The record of a run: its files, which are the truth, and the trackers that are fed the same numbers."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from modeling_gpt2_repro.arguments import write_settings
from modeling_gpt2_repro.files import open_atomically, write_json
from modeling_gpt2_repro.training.checkpoint import list_checkpoints
from modeling_gpt2_repro.training.config import TrainingConfig

CONFIG, METRICS, LOG, SAMPLES, STATUS = "config.yaml", "metrics.jsonl", "log.txt", "samples.jsonl", "status.json"


class RunRecord:
    """Writes a run folder's files, from the first process alone, and feeds the trackers.

    `metrics.jsonl` is the truth; `log.txt` is made from it, `samples.jsonl` has the texts, `config.yaml` what was run,
    and `status.json` how the run stands.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.started = time.monotonic()
        self.is_open = False

    def start(self, config: TrainingConfig, first_step: int | None) -> None:
        """Open the record at `first_step`, forgetting what came after it; `None` replaces all that is there."""
        self.started = time.monotonic()
        self.accelerator.init_trackers(
            config.wandb_project, asdict(config), {"wandb": {"name": config.run_name, "dir": str(self.folder)}}
        )
        if not self.accelerator.is_main_process:
            return
        self.is_open = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if first_step is None:
            for name in (METRICS, LOG, SAMPLES, "curves.png"):
                (self.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "final"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        else:
            self._cut_back(first_step)
            shutil.rmtree(self.folder / "final", ignore_errors=True)
            for checkpoint in list_checkpoints(self.folder / "checkpoints"):
                if checkpoint.name > f"step_{first_step:07d}":
                    shutil.rmtree(checkpoint)
        write_settings(config, self.folder / CONFIG)
        self.set_status("running")

    def _cut_back(self, step: int) -> None:
        for name in (METRICS, SAMPLES):
            kept = [line for line in read_json_lines(self.folder / name) if line["step"] <= step]
            with open_atomically(self.folder / name) as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        with open_atomically(self.folder / LOG) as stream:
            for line in read_json_lines(self.folder / METRICS):
                stream.writelines(format_log_lines(line))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of the model after `step` updates."""
        self.accelerator.log(metrics, step)
        # JSON has no NaN; a number that is none is left out of the line.
        line = {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}}
        self._append(METRICS, json.dumps(line) + "\n")
        self._append(LOG, "".join(format_log_lines(line)))

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Record texts that the model wrote after `step` updates."""
        for tracker in self.accelerator.trackers if self.is_open else ():
            if tracker.name == "wandb":
                tracker.log_table(
                    "samples", columns=["step", "text"], data=[[step, text] for text in texts], step=step
                )
        self._append(SAMPLES, "".join(json.dumps({"step": step, "text": t}, ensure_ascii=False) + "\n" for t in texts))

    def set_status(self, status: str, **details: Any) -> None:
        """Say in `status.json` how the run stands: `running`, `finished` or `failed`; before the start, nothing."""
        if self.is_open:
            write_json(self.folder / STATUS, {"status": status, **details})

    def _append(self, name: str, text: str) -> None:
        if self.is_open and text:
            with open(self.folder / name, "a", encoding="utf-8") as stream:
                stream.write(text)


def format_log_lines(metrics: dict[str, float]) -> Iterator[str]:
    """Yield a line of metrics as the original script wrote them, where train n is the loss of update n+1."""
    step = int(metrics["step"])
    if "train/loss" in metrics:
        yield f"{step - 1} train {metrics['train/loss']:.6f}\n"
    if "val/loss" in metrics:
        yield f"{step} val {metrics['val/loss']:.4f}\n"
    if "hellaswag/acc_norm" in metrics:
        yield f"{step} hella {metrics['hellaswag/acc_norm']:.4f}\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file, up to a last line that a crash cut short; no file means none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def choose_tracker(requested: str) -> str | None:
    """Return `wandb` where it is asked for, or where `auto` finds a key to log in with; else `None`."""
    return "wandb" if requested == "wandb" or (requested == "auto" and has_wandb_key()) else None


def has_wandb_key() -> bool:
    """Tell whether wandb could log in without asking."""
    netrc = Path.home() / ".netrc"
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.exists() and "api.wandb.ai" in netrc.read_text())
