"""The record of a run: its files, which are the truth, and the trackers that are fed the same numbers."""

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

from modeling_gpt2_repro.core.arguments import write_config
from modeling_gpt2_repro.core.devices import list_versions
from modeling_gpt2_repro.core.errors import UserError, format_line
from modeling_gpt2_repro.core.files import write_json
from modeling_gpt2_repro.core.locks import FolderLock
from modeling_gpt2_repro.core.streams import write_line
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.metrics import format_log_lines, read_json_lines, read_metrics
from modeling_gpt2_repro.training.run_folder import RunFolder
from modeling_gpt2_repro.training.trackers import Tracker, build_tracker


class RunRecord:
    """Writes a run folder's files, from the first process alone, and feeds the trackers.

    `metrics.jsonl` is the truth; `log.txt` is made from it, `samples.jsonl` has the texts, `config.yaml` what was run,
    and `status.json` how the run stands. The trackers are fed from the first two.

    Args:
        warn: told of what went wrong and does not matter to the run.
        trackers: the names of those to feed.

    Attributes:
        best_val_loss: of the model in `best/`, infinite where there is none.
        is_started: the run has begun, in whichever process.
        tracker_run_id: by which a tracker knows a resumed run again.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        warn: Callable[[str], None] = print,
        trackers: Sequence[str] = (),
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
        self._writes_status = threading.Lock()

    def claim(self) -> None:
        """Become the folder's only writer, in the first process, and undo a replacement that a kill cut short.

        Raises:
            UserError: another process is its writer.
        """
        try:
            self._lock.acquire()
        except UserError:
            self._may_write = False
            raise
        self.folder.undo_replacements()

    def check_claim(self) -> None:
        """Raise a `UserError` in the first process if another one has become the folder's writer."""
        if self.is_open:
            self._may_write = self._lock.is_ours()
            self._lock.check()

    def start(self, config: TrainingConfig, first_step: int | None, tracker_run_id: str | None = None) -> None:
        """Open the record at `first_step`, forgetting what came after it; `None` replaces all that is there."""
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
                tracker = build_tracker(name, self.folder, config, self.tracker_run_id)
                self._feeds.append(Feed(tracker, self.folder, first_step or 0, self.warn))
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
        """Read the loss of the best model up to `step`; a later one stays until the next validation replaces it."""
        loss = self.folder.read_best_loss(step)
        self.best_val_loss = self.best_val_loss if loss is None else loss

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record numbers of the model after `step` updates.

        Raises:
            UserError: see `check_claim`.
        """
        self.check_claim()
        # JSON has no NaN; a number that is none is left out of the line.
        line = {"step": step, **{name: value for name, value in metrics.items() if math.isfinite(value)}}
        self._append(self.folder.metrics, json.dumps(line) + "\n")
        self._append(self.folder.log, "".join(format_log_lines(line)))
        self._feed()

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Record texts that the model wrote after `step` updates."""
        self._append(
            self.folder.samples,
            "".join(json.dumps({"step": step, "text": t}, ensure_ascii=False) + "\n" for t in texts),
        )
        self._feed()

    def set_status(self, status: str, **details: Any) -> None:
        """Say in `status.json` how the run stands: `running` or `preempted` (see also `finish`).

        A running one comes with what tells whether its process is alive: host, process id and a heartbeat, which is
        renewed every `locks.HEARTBEAT_SECONDS`. Before the start it says nothing, and what an earlier run said stays.
        """
        if self.is_open:
            if status == "running":
                details |= self._lock.describe_holder()
            with self._writes_status:
                write_json(self.folder.status, {"status": status, **details})

    def _show_heartbeat(self) -> None:
        with contextlib.suppress(OSError), self._writes_status:
            status = self.folder.read_status()
            if status.get("status") == "running":  # and no other process of the run has said why it ended
                write_json(self.folder.status, status | self._lock.describe_holder())

    def set_failed(self, error: BaseException) -> None:
        """Say in `status.json`, and on stderr in all processes but the first, why the run ended in this one.

        A run that did not come to its start leaves what an earlier one said, unless that waits to be gone on with.
        """
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}", **getattr(error, "details", {})}
        if not self.accelerator.is_main_process:
            status["process"] = self.accelerator.process_index
        waiting = self.folder.read_status().get("status") == "preempted"
        if self._may_write and (self.is_started or (waiting and self.accelerator.is_main_process)):
            with contextlib.suppress(OSError), self._writes_status:  # of a full disk
                write_json(self.folder.status, status)
        if self.is_started and not self.accelerator.is_main_process and not getattr(error, "is_everywhere", False):
            write_line(f"process {self.accelerator.process_index}: {error}", sys.stderr)

    def finish(self, step: int) -> None:
        """Say that the run is finished, in the first process."""
        self.folder.sync()
        self.set_status("finished", step=step, versions=list_versions())

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

    def _append(self, path: Path, text: str) -> None:
        if self.is_open and text:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(text)


class Feed:
    """Tells a tracker what a run's files gain.

    Whatever the tracker's library, or its network, comes up with is said once and stops nothing. From then on no step
    waits for that tracker; at the end it is started anew and told what it missed.
    """

    def __init__(self, tracker: Tracker, folder: RunFolder, first_step: int, warn: Callable[[str], None]):
        self._tracker, self._folder, self.warn = tracker, folder, warn
        self._read = {path: _measure(path) for path in (folder.metrics, folder.samples)}  # bytes that the tracker has
        self._is_behind = False
        self._attempt(lambda: self._start(first_step), "failed, training goes on without it")

    def _start(self, first_step: int) -> None:
        if note := self._tracker.start(first_step):
            self.warn(format_line(note))

    def catch_up(self) -> None:
        """Tell the tracker what is new, unless it has failed."""
        if not self._is_behind:
            self._attempt(self._send, "failed, training goes on without it")

    def close(self) -> None:
        """Tell a tracker that failed all that it missed, and let it finish."""
        if self._is_behind:
            self._attempt(self._restart_and_send, f"failed again, and lacks what {self._folder.metrics.name} has")
        else:
            self._attempt(self._tracker.finish, "failed at its end")

    def _restart_and_send(self) -> None:
        self._tracker.restart()
        self._send()
        self._tracker.finish()
        self.warn(f"the tracker {self._tracker.name} was told at the end what it had missed")

    def _send(self) -> None:
        folder = self._folder
        ends = {path: _measure(path) for path in self._read}
        texts: dict[int, list[str]] = {}
        for line in read_json_lines(folder.samples, self._read[folder.samples]):
            texts.setdefault(line["step"], []).append(line["text"])
        lines = read_metrics(folder.metrics, self._read[folder.metrics])
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
            self.warn(f"the tracker {self._tracker.name} {consequence}: {reason}")


def _measure(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
