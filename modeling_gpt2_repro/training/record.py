"""The record of a run: its files, which are the truth, and the trackers that are fed the same numbers."""

import contextlib
import json
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.core.devices import list_versions
from modeling_gpt2_repro.core.errors import UserError, format_line
from modeling_gpt2_repro.core.files import (
    clear_leftovers,
    follow_links,
    make_folder,
    make_way,
    open_atomically,
    remove_folder,
    restore_folder,
    sync_file,
    write_json,
)
from modeling_gpt2_repro.core.locks import FolderLock
from modeling_gpt2_repro.core.streams import write_line
from modeling_gpt2_repro.training.checkpoint import list_models, prune_checkpoints, read_step
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.trackers import TENSORBOARD, Tracker, build_tracker, choose_trackers

CONFIG, METRICS, LOG, SAMPLES, STATUS = "config.yaml", "metrics.jsonl", "log.txt", "samples.jsonl", "status.json"
CURVES, LOCK = "curves.png", "lock"
FILES = (CONFIG, METRICS, LOG, SAMPLES, STATUS, CURVES)
CHECKPOINTS, FINAL, BEST, BEST_METRICS = "checkpoints", "final", "best", "metrics.json"
# What a run that begins anew takes the place of.
REPLACED_FILES, REPLACED_FOLDERS = (METRICS, LOG, SAMPLES, CURVES), (CHECKPOINTS, FINAL, BEST, TENSORBOARD)
# Numbers from here on up have no place on an axis, and no run has them.
LARGEST_METRIC = 1e100


class RunRecord:
    """Writes a run folder's files, from the first process alone, and feeds the trackers.

    `metrics.jsonl` is the truth; `log.txt` is made from it, `samples.jsonl` has the texts, `config.yaml` what was run,
    and `status.json` how the run stands. The trackers are fed from the first two.

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
        self._feeds: list[Feed] = []
        self._lock = FolderLock(folder, LOCK, "another process is writing to", say=warn)
        self._may_write = True
        self._writes_status = threading.Lock()

    def claim(self) -> None:
        """Become the folder's only writer, in the first process, and undo a replacement that a kill cut short.

        Raises:
            UserError: another process is it.
        """
        try:
            self._lock.acquire()
        except UserError:
            self._may_write = False
            raise
        for name in (FINAL, BEST):
            restore_folder(self.folder / name)

    def check_claim(self) -> None:
        """Raise a `UserError` in the first process where another one has become the folder's writer."""
        if self.is_open:
            self._may_write = self._lock.is_ours()
            self._lock.check()

    def start(self, config: TrainingConfig, first_step: int | None, tracker_run_id: str | None = None) -> None:
        """Open the record at `first_step`, forgetting what came after it; `None` replaces all that is there."""
        self.started = time.monotonic()
        self.tracker_run_id = tracker_run_id or uuid.uuid4().hex[:12]
        if self.accelerator.is_main_process:
            self.claim()
            for name in FILES:
                make_way(self.folder / name)
            if (self.folder / CHECKPOINTS).is_symlink():  # so that one that leads nowhere has lost what was there
                make_folder(self.folder / CHECKPOINTS)
            if first_step is None:
                self._clear(keeps_best=config.save_best and config.resume_from_checkpoint != "never")
            else:
                self._go_back(first_step)
                self.clear_leftovers(config)
            write_config(config, self.folder / CONFIG)
            self.is_open = True
            self.set_status("running")
            self._lock.start_beating(self._show_heartbeat)
            for name in choose_trackers(config.report_to):
                samples = read_json_lines(self.folder / SAMPLES)
                tracker = build_tracker(name, self.folder, config, self.tracker_run_id, samples)
                self._feeds.append(Feed(tracker, self.folder, first_step or 0, self._warn))
        self.is_started = True

    def _clear(self, keeps_best: bool) -> None:
        for name in REPLACED_FILES:
            follow_links(self.folder / name).unlink(missing_ok=True)
        prune_checkpoints(self.folder / CHECKPOINTS, keep=0, keep_weights_every=0)  # which may restore one
        for model in list_models(self.folder / CHECKPOINTS):
            remove_folder(model)
        for name in REPLACED_FOLDERS:
            # The folder of the checkpoints stays: it may be a file system of its own.
            if name != CHECKPOINTS and not (name == BEST and keeps_best):
                remove_folder(self.folder / name)

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
        self.started -= max((line.get("train/elapsed_seconds", 0.0) for line in lines), default=0.0)
        for model in list_models(self.folder / CHECKPOINTS):
            if read_step(model) > step:
                remove_folder(model)
        self.read_best(step)

    def read_best(self, step: int) -> None:
        """Learn the loss of the best model up to `step`; a later one stays until the next validation replaces it."""
        best = read_json_object(self.folder / BEST / BEST_METRICS)
        if isinstance(best.get("step"), int) and best["step"] <= step and isinstance(best.get("val/loss"), float):
            self.best_val_loss = best["val/loss"]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of the model after `step` updates.

        Raises:
            UserError: see `check_claim`.
        """
        self.check_claim()
        # JSON has no NaN; a number that is none is left out of the line.
        line = {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}}
        self._append(METRICS, json.dumps(line) + "\n")
        self._append(LOG, "".join(format_log_lines(line)))
        self._feed()

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Record texts that the model wrote after `step` updates."""
        self._append(SAMPLES, "".join(json.dumps({"step": step, "text": t}, ensure_ascii=False) + "\n" for t in texts))
        self._feed()

    def sync(self) -> None:
        """Make durable what was recorded so far, before something is that begins where it ends."""
        for name in (METRICS, SAMPLES):
            if (self.folder / name).exists():
                sync_file(self.folder / name)

    def set_status(self, status: str, **details: Any) -> None:
        """Say in `status.json` how the run stands: `running` or `preempted` (see also `finish`).

        A running one comes with what tells whether its process is alive: host, process id and a heartbeat, which is
        renewed every `locks.HEARTBEAT_SECONDS`. Before the start it says nothing, and what an earlier run said stays.
        """
        if self.is_open:
            if status == "running":
                details |= self._lock.describe_holder()
            with self._writes_status:
                write_json(self.folder / STATUS, {"status": status, **details})

    def _show_heartbeat(self) -> None:
        with contextlib.suppress(OSError), self._writes_status:
            status = read_json_object(self.folder / STATUS)
            if status.get("status") == "running":  # and no other process of the run has said why it ended
                write_json(self.folder / STATUS, status | self._lock.describe_holder())

    def set_failed(self, error: BaseException) -> None:
        """Say in `status.json`, and on stderr in all processes but the first, why the run ended in this one.

        A run that did not come to its start leaves what an earlier one said, unless that waits to be gone on with.
        """
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}", **getattr(error, "details", {})}
        if not self.accelerator.is_main_process:
            status["process"] = self.accelerator.process_index
        waiting = read_json_object(self.folder / STATUS).get("status") == "preempted"
        if self._may_write and (self.is_started or (waiting and self.accelerator.is_main_process)):
            with contextlib.suppress(OSError), self._writes_status:  # of a full disk
                write_json(self.folder / STATUS, status)
        if self.is_started and not self.accelerator.is_main_process and not getattr(error, "is_everywhere", False):
            write_line(f"process {self.accelerator.process_index}: {error}", sys.stderr)

    def get_finished_step(self) -> int:
        """Return the steps of the finished model; 0 where there is none, or its steps are not known."""
        status = read_json_object(self.folder / STATUS)
        is_finished = status.get("status") == "finished" and (self.folder / FINAL).is_dir()
        return status["step"] if is_finished and isinstance(status.get("step"), int) else 0

    def finish(self, step: int) -> None:
        """Say that the run is finished, in the first process."""
        self.sync()
        self.set_status("finished", step=step, versions=list_versions())

    def clear_leftovers(self, config: TrainingConfig) -> None:
        """Do, in the first process, what a run that was killed, or had a bad disk, had left to do."""
        if self.accelerator.is_main_process:
            for name in (FINAL, BEST):
                clear_leftovers(self.folder / name)
            prune_checkpoints(self.folder / CHECKPOINTS, config.keep_checkpoints, config.keep_weights_every)

    def close(self) -> None:
        """Let the trackers finish, and others write to the folder."""
        try:
            while self._feeds:
                self._feeds.pop().close()
        finally:
            self._lock.release()

    def _feed(self) -> None:
        for feed in self._feeds:
            feed.catch_up()

    def _append(self, name: str, text: str) -> None:
        if self.is_open and text:
            with open(self.folder / name, "a", encoding="utf-8") as stream:
                stream.write(text)


class Feed:
    """Tells a tracker what a run's files gain.

    Whatever the tracker's library, or its network, comes up with is said once and stops nothing. From then on no step
    waits for that tracker; at the end it is started anew and told what it missed.
    """

    def __init__(self, tracker: Tracker, folder: Path, first_step: int, warn: Callable[[str], None]):
        self._tracker, self._folder, self._warn = tracker, folder, warn
        self._read = {name: _measure(folder / name) for name in (METRICS, SAMPLES)}  # bytes that the tracker has
        self._is_behind = False
        self._attempt(lambda: self._start(first_step), "failed, training goes on without it")

    def _start(self, first_step: int) -> None:
        if note := self._tracker.start(first_step):
            self._warn(format_line(note))

    def catch_up(self) -> None:
        """Tell the tracker what is new, unless it has failed."""
        if not self._is_behind:
            self._attempt(self._send, "failed, training goes on without it")

    def close(self) -> None:
        """Tell a tracker that failed all that it missed, and let it finish."""
        if self._is_behind:
            self._attempt(self._restart_and_send, f"failed again, and lacks what {METRICS} has")
        else:
            self._attempt(self._tracker.finish, "failed at its end")

    def _restart_and_send(self) -> None:
        self._tracker.restart()
        self._send()
        self._tracker.finish()
        self._warn(f"the tracker {self._tracker.name} was told at the end what it had missed")

    def _send(self) -> None:
        ends = {name: _measure(self._folder / name) for name in self._read}
        texts: dict[int, list[str]] = {}
        for line in read_json_lines(self._folder / SAMPLES, self._read[SAMPLES]):
            texts.setdefault(line["step"], []).append(line["text"])
        lines = read_metrics(self._folder / METRICS, self._read[METRICS])
        messages = [(line.pop("step"), line) for line in lines] + list(texts.items())
        for step, message in sorted(messages, key=lambda message: message[0]):
            (self._tracker.log_metrics if isinstance(message, dict) else self._tracker.log_samples)(step, message)
        self._read = ends

    def _attempt(self, action: Callable[[], None], consequence: str) -> None:
        try:
            action()
        except Exception as error:
            self._is_behind = True
            reason = format_line(f"{type(error).__name__}: {error}")
            self._warn(f"the tracker {self._tracker.name} {consequence}: {reason}")


def _measure(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def format_log_lines(metrics: dict[str, float]) -> Iterator[str]:
    """Yield a line of metrics as the original script wrote them, where train n is the loss of update n+1."""
    step = int(metrics["step"])
    if "train/loss" in metrics:
        yield f"{step - 1} train {metrics['train/loss']:.6f}\n"
    if "val/loss" in metrics:
        yield f"{step} val {metrics['val/loss']:.4f}\n"
    if "hellaswag/acc_norm" in metrics:
        yield f"{step} hella {metrics['hellaswag/acc_norm']:.4f}\n"


def read_json_lines(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file that have a step, from its byte `start` on; no file means none.

    A line that is none, as a crash or a damaged disk leaves it, is passed over.
    """
    if not path.exists():
        return []
    with open(path, "rb") as stream:
        stream.seek(start)
        text = stream.read().decode("utf-8", errors="replace")
    objects = (_read_object(line) for line in text.split("\n"))
    return [content for content in objects if isinstance(content.get("step"), int)]


def read_metrics(path: Path, start: int = 0) -> list[dict[str, float]]:
    """Read the lines of `metrics.jsonl` from its byte `start` on, each its step and other numbers.

    What is no number is passed over.
    """
    numbers = (
        {
            name: value
            for name, value in line.items()
            if type(value) in (int, float) and abs(value) < LARGEST_METRIC  # not NaN either
        }
        for line in read_json_lines(path, start)
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
