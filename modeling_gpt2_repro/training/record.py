"""The record of a run: its files, which are the source of truth, and the trackers that mirror them."""

import contextlib
import json
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..core.arguments import write_config
from ..core.devices import list_versions
from ..core.errors import UserError
from ..core.files import write_json
from ..core.locks import FolderLock
from ..core.streams import write_line
from .config import TrainingConfig
from .metrics import format_log_lines
from .run_folder import RunFolder
from .trackers import TRACKER_CLASSES, Feed


class RunRecord:
    """Writes a run folder's files, on rank 0 only, and feeds the trackers.

    `metrics.jsonl` is the source of truth, and `log.txt` is derived from it. `samples.jsonl` has the samples,
    `config.yaml` the settings, and `status.json` the state of the run. Trackers receive metrics and samples.

    Args:
        warn: receives reports of failures that do not affect the run.
        trackers: names of the trackers to feed.

    Attributes:
        best_val_loss: loss of the model in `best/`; infinite if there is none.
        is_started: whether `start` has succeeded in this process.
        tracker_run_id: the run's id in trackers, kept on resume.
    """

    def __init__(
        self, folder: RunFolder, accelerator: Accelerator, warn: Callable[[str], None], trackers: Sequence[str]
    ):
        self.folder, self.accelerator = folder, accelerator
        self.started = time.monotonic()
        self.best_val_loss = math.inf
        self.tracker_run_id = ""
        self.is_started = self.is_open = False
        self.warn, self.trackers = warn, trackers
        self._feeds: list[Feed] = []
        self._lock = FolderLock(folder.path, folder.lock.name, "another process is writing to", say=warn)
        self._may_write = True
        self._status_lock = threading.Lock()

    def claim(self) -> None:
        """Lock the folder and undo an interrupted replacement. Call this on rank 0.

        Raises:
            UserError: another process is writing to the folder.
        """
        try:
            self._lock.acquire()
        except UserError:
            self._may_write = False
            raise
        self.folder.undo_replacements()

    def check_claim(self) -> None:
        """Raise a `UserError` on rank 0 if another process has taken over the folder."""
        if self.is_open:
            self._may_write = self._lock.is_ours()
            self._lock.check()

    def start(self, config: TrainingConfig, first_step: int | None, tracker_run_id: str | None = None) -> None:
        """Open the record at `first_step` and drop later entries; `None` starts over and clears the folder."""
        self.started = time.monotonic()
        self.tracker_run_id = tracker_run_id or uuid.uuid4().hex[:12]
        if self.accelerator.is_main_process:
            self.claim()
            self._open_at(first_step, config)
            write_config(config, self.folder.config)
            self.is_open = True
            self.set_status("running")
            self._lock.start_beating(self._show_heartbeat)
            for name in self.trackers:
                tracker = TRACKER_CLASSES[name](self.folder, config, self.tracker_run_id)
                self._feeds.append(Feed(tracker, first_step or 0, self.warn))
        self.is_started = True

    def _open_at(self, first_step: int | None, config: TrainingConfig) -> None:
        self.folder.prepare()
        if first_step is None:
            self.folder.clear(keeps_best=config.save_best and config.resume_from_checkpoint != "never")
            return
        self.folder.go_back(first_step)
        elapsed = (line.get("train/elapsed_seconds", 0.0) for line in self.folder.read_metrics())
        self.started -= max(elapsed, default=0.0)
        self.read_best(first_step)
        self.folder.clear_leftovers(config)

    def read_best(self, step: int) -> None:
        """Read the loss of the model in `best/`, unless that model is from a step after `step`."""
        loss = self.folder.read_best_loss(step)
        self.best_val_loss = self.best_val_loss if loss is None else loss

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of the model after `step` updates, except values that are not finite.

        Raises:
            UserError: see `check_claim`.
        """
        self.check_claim()
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN
        line = {"step": step, **metrics}
        self._append(self.folder.metrics, json.dumps(line) + "\n")
        self._append(self.folder.log, "".join(format_log_lines(line)))
        for feed in self._feeds:
            feed.send(lambda tracker: tracker.log_metrics(step, metrics))

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Record texts sampled from the model after `step` updates."""
        lines = (json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n" for text in texts)
        self._append(self.folder.samples, "".join(lines))
        for feed in self._feeds:
            feed.send(lambda tracker: tracker.log_samples(step, texts))

    def set_status(self, status: str, **details: Any) -> None:
        """Write the state of the run, `running` or `preempted` (see also `finish`), to `status.json`.

        `running` includes host, process id and a heartbeat every `locks.HEARTBEAT_SECONDS`. Before `start`, nothing is
        written and the status of an earlier run stays.
        """
        if self.is_open:
            if status == "running":
                details |= self._lock.describe_holder()
            with self._status_lock:
                write_json(self.folder.status, {"status": status, **details})

    def _show_heartbeat(self) -> None:
        with contextlib.suppress(OSError), self._status_lock:
            status = self.folder.read_status()
            if status.get("status") == "running":  # no other process has recorded a failure
                write_json(self.folder.status, status | self._lock.describe_holder())

    def set_failed(self, error: BaseException) -> None:
        """Write this process's error to `status.json` and, except on rank 0, to stderr.

        A run that fails before `start` leaves the status of an earlier run unchanged, unless that is `preempted`.
        """
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}", **getattr(error, "details", {})}
        if not self.accelerator.is_main_process:
            status["process"] = self.accelerator.process_index
        was_preempted = self.folder.read_status().get("status") == "preempted"
        if self._may_write and (self.is_started or (was_preempted and self.accelerator.is_main_process)):
            with contextlib.suppress(OSError), self._status_lock:  # the disk may be full
                write_json(self.folder.status, status)
        if self.is_started and not self.accelerator.is_main_process and not getattr(error, "is_everywhere", False):
            write_line(f"process {self.accelerator.process_index}: {error}", sys.stderr)

    def finish(self, step: int) -> None:
        """Write `finished` to `status.json`, on rank 0."""
        self.folder.sync()
        self.set_status("finished", step=step, versions=list_versions())

    def close(self) -> None:
        """Finish the trackers and release the folder."""
        try:
            while self._feeds:
                self._feeds.pop().close()
        finally:
            self._lock.release()

    def _append(self, path: Path, text: str) -> None:
        if self.is_open and text:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(text)
