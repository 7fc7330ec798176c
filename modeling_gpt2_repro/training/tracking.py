"""The record of a run: its files, which are the truth, and the trackers that are fed the same numbers."""

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from modeling_gpt2_repro.arguments import write_settings
from modeling_gpt2_repro.files import open_atomically, write_json
from modeling_gpt2_repro.training.checkpoint import list_models, read_step, remove_folder
from modeling_gpt2_repro.training.config import TrainingConfig

CONFIG, METRICS, LOG, SAMPLES, STATUS = "config.yaml", "metrics.jsonl", "log.txt", "samples.jsonl", "status.json"
BEST, BEST_METRICS = "best", "metrics.json"
# Numbers from here on up have no place on an axis, and no run has them.
LARGEST_METRIC = 1e100


class RunRecord:
    """Writes a run folder's files, from the first process alone, and feeds the trackers.

    `metrics.jsonl` is the truth; `log.txt` is made from it, `samples.jsonl` has the texts, `config.yaml` what was run,
    and `status.json` how the run stands. A tracker that fails is named once and never stops the training.

    Args:
        warn: told of what went wrong and does not matter to the run.

    Attributes:
        best_val_loss: of the model in `best/`, infinite where there is none.
        is_started: the run has begun, in whichever process.
        tracker_run_id: by which a tracker knows a resumed run again.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, warn: Callable[[str], None] = print):
        self.folder, self.accelerator = folder, accelerator
        self.started = time.monotonic()
        self.best_val_loss = math.inf
        self.tracker_run_id = ""
        self.is_started = self.is_open = False
        self._warn = warn
        self._has_warned = False

    def start(self, config: TrainingConfig, first_step: int | None, tracker_run_id: str | None = None) -> None:
        """Open the record at `first_step`, forgetting what came after it; `None` replaces all that is there."""
        self.started = time.monotonic()
        self.tracker_run_id = tracker_run_id or uuid.uuid4().hex[:12]
        wandb = {"name": config.run_name, "dir": str(self.folder), "id": self.tracker_run_id, "resume": "allow"}
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if first_step is None:
                self._clear()
            else:
                self._go_back(first_step)
            write_settings(config, self.folder / CONFIG)
            self.is_open = True
            self.set_status("running")
        self.is_started = True
        self._feed(lambda: self.accelerator.init_trackers(config.wandb_project, asdict(config), {"wandb": wandb}))

    def _clear(self) -> None:
        for name in (METRICS, LOG, SAMPLES, "curves.png"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "final", BEST):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _go_back(self, step: int) -> None:
        for name in (METRICS, SAMPLES):
            if not (self.folder / name).exists():
                continue
            kept = [line for line in read_json_lines(self.folder / name) if line["step"] <= step]
            with open_atomically(self.folder / name) as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        lines = read_metrics(self.folder / METRICS)
        with open_atomically(self.folder / LOG) as stream:
            for line in lines:
                stream.writelines(format_log_lines(line))
        shutil.rmtree(self.folder / "final", ignore_errors=True)
        for model in list_models(self.folder / "checkpoints"):
            if read_step(model) > step:
                remove_folder(model)
        best = read_json_object(self.folder / BEST / BEST_METRICS)
        if isinstance(best.get("step"), int) and best["step"] <= step and isinstance(best.get("val/loss"), float):
            self.best_val_loss = best["val/loss"]
        else:  # of a time that is not gone through again, or of no known one
            shutil.rmtree(self.folder / BEST, ignore_errors=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of the model after `step` updates."""
        self._feed(lambda: self.accelerator.log(metrics, step))
        # JSON has no NaN; a number that is none is left out of the line.
        line = {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}}
        self._append(METRICS, json.dumps(line) + "\n")
        self._append(LOG, "".join(format_log_lines(line)))

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Record texts that the model wrote after `step` updates."""
        self._feed(lambda: self._send_samples(step, texts))
        self._append(SAMPLES, "".join(json.dumps({"step": step, "text": t}, ensure_ascii=False) + "\n" for t in texts))

    def set_status(self, status: str, **details: Any) -> None:
        """Say in `status.json` how the run stands: `running`, `finished` or `preempted`.

        Before the start it says nothing, and what an earlier run said stays.
        """
        if self.is_open:
            write_json(self.folder / STATUS, {"status": status, **details})

    def set_failed(self, error: BaseException) -> None:
        """Say in `status.json` why the run ended, in whichever process that was; a full disk keeps it to itself.

        A run that did not come to its start leaves what an earlier one said, unless that waits to be gone on with.
        """
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}", **getattr(error, "details", {})}
        if not self.accelerator.is_main_process:
            status["process"] = self.accelerator.process_index
        waiting = read_json_object(self.folder / STATUS).get("status") == "preempted"
        if self.is_started or (waiting and self.accelerator.is_main_process):
            with contextlib.suppress(OSError):
                write_json(self.folder / STATUS, status)

    def close(self) -> None:
        """Let the trackers finish."""
        self._feed(self.accelerator.end_training)

    def _send_samples(self, step: int, texts: list[str]) -> None:
        for tracker in self.accelerator.trackers if self.is_open else ():
            if tracker.name == "wandb":
                rows = [[step, text] for text in texts]
                tracker.log_table("samples", columns=["step", "text"], data=rows, step=step)

    def _feed(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # whatever a tracker's library, or its network, comes up with
            if not self._has_warned:
                self._warn(f"the tracker failed, training goes on without it: {type(error).__name__}: {error}")
            self._has_warned = True

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
    """Read the objects of a JSON-lines file that have a step; no file means none.

    A line that is none, as a crash or a damaged disk leaves it, is passed over.
    """
    if not path.exists():
        return []
    objects = (_read_object(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [content for content in objects if isinstance(content.get("step"), int)]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of `metrics.jsonl`, each its step and other numbers; what is none is passed over."""
    numbers = (
        {
            name: value
            for name, value in line.items()
            if type(value) in (int, float) and abs(value) < LARGEST_METRIC  # not NaN either
        }
        for line in read_json_lines(path)
    )
    return [line for line in numbers if line.get("step", -1) >= 0]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one for a file that is missing or is none."""
    return _read_object(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}


def _read_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair, which could be written nowhere
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def choose_tracker(requested: str) -> str | None:
    """Return `wandb` where it is asked for, or where `auto` finds a key to log in with; else `None`."""
    return "wandb" if requested == "wandb" or (requested == "auto" and has_wandb_key()) else None


def has_wandb_key() -> bool:
    """Tell whether wandb could log in without asking."""
    netrc = Path.home() / ".netrc"
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and b"api.wandb.ai" in netrc.read_bytes())
