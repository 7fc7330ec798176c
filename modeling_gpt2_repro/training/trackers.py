"""Trackers: wandb and TensorBoard, each a wrapper of accelerate's tracker."""

import contextlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import Any

import yaml
from accelerate.tracking import TensorBoardTracker, WandBTracker

from ..core.errors import UserError, format_line
from ..core.files import make_folder
from ..training import wandb_settings
from .config import TRACKERS, TrainingConfig
from .run_folder import RunFolder

# Time limits for wandb to start a run, and to upload the rest at its end before leaving it to `wandb sync`. wandb's
# own are 90 seconds and none.
WANDB_SECONDS = {"init_timeout": 10.0, "finish_timeout": 300.0}


class Tracker(ABC):
    """A receiver of a run's record. Methods may raise any exception of the underlying library."""

    name: str
    _tracker: Any

    def __init__(self, folder: RunFolder, config: TrainingConfig, run_id: str):
        self._folder, self._config, self._run_id = folder, config, run_id

    @abstractmethod
    def start(self, first_step: int) -> str | None:
        """Start after `first_step` updates; drop later steps of an earlier process, if the tracker can.

        Returns:
            A line about anything that is not as requested, or `None`.
        """

    @abstractmethod
    def restart(self) -> None:
        """Start again after a failure, keeping what was logged before."""

    @abstractmethod
    def log_samples(self, step: int, texts: list[str]) -> None:
        """Log the texts sampled from the model after `step` updates."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of the model after `step` updates."""
        self._tracker.log(metrics, step)

    def finish(self) -> None:
        """Flush and close the tracker."""
        self._tracker.finish()


class Wandb(Tracker):
    """Weights & Biases: metrics, settings, and all samples in one table.

    Without a key, without an answer from the server, or with unusable settings, the run is offline, for `wandb sync`
    to upload. A resumed run keeps its id and name. Of steps repeated after a crash, wandb keeps the first values.
    wandb's own environment variables override the defaults set here.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder, config: TrainingConfig, run_id: str):
        super().__init__(folder, config, run_id)
        self._rows = [[line["step"], str(line.get("text"))] for line in folder.read_samples()]

    def start(self, first_step: int) -> str | None:
        make_folder(self._folder.path / self.name)  # wandb does not create the target of a link
        wandb_settings.replace_unwritable_folders(self._folder.path)
        problem = self._open()
        self._tracker.store_init_configuration(asdict(self._config))
        # wandb's overview shows the last value of every metric: show the protocol next to the score.
        self._tracker.tracker.summary["hellaswag/protocol"] = "original"
        if problem is None:
            return None
        return f"wandb is offline ({problem}): upload later with wandb sync {self._tracker.tracker.settings.sync_dir}"

    def _open(self) -> Exception | None:
        """Start a run as requested, or else offline; return the reason if it is offline."""
        import wandb  # slow to import

        attempts = (
            (contextlib.nullcontext, wandb_settings.choose_mode),
            (contextlib.nullcontext, lambda: "offline"),
            (wandb_settings.without_variables, lambda: "offline"),  # wandb may reject a variable's value in any mode
        )
        problems: list[Exception] = []
        for environment, choose_mode in attempts:
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service may be dead, or consider the run's id still in use
            try:
                with environment():
                    self._tracker = WandBTracker(**self._choose_arguments(), mode=choose_mode())
                    self._tracker.start()
                return problems[0] if problems else None
            except Exception as error:
                problems.append(error)
        raise problems[0]

    def _choose_arguments(self) -> dict[str, Any]:
        """Return arguments for accelerate's tracker and `wandb.init`, except those that wandb's variables override."""
        project = self._config.wandb_project
        if project == TrainingConfig.wandb_project:
            project = os.environ.get("WANDB_PROJECT") or project
        defaults = {
            "name": self._config.run_name,
            "dir": str(self._folder.path),
            "resume": "allow",
            "run_id": self._run_id,
            **WANDB_SECONDS,
        }
        settings = {name: value for name, value in defaults.items() if not os.environ.get(f"WANDB_{name.upper()}")}
        arguments = {name: settings.pop(name) for name in ("name", "dir", "resume") if name in settings}
        return {"run_name": project, "settings": settings, **arguments}

    def restart(self) -> None:
        with contextlib.suppress(Exception):  # its service may be dead
            self.finish()
        self.start(0)

    def log_samples(self, step: int, texts: list[str]) -> None:
        rows = self._rows + [[step, text] for text in texts]
        self._tracker.log_table("samples", columns=["step", "text"], data=rows, step=step)
        self._rows = rows


class TensorBoard(Tracker):
    """TensorBoard: metrics, settings and samples as event files in the run folder's `tensorboard/`.

    `tensorboard --logdir runs` shows all runs of a folder.
    """

    name = "tensorboard"

    def start(self, first_step: int) -> None:
        # TensorBoard recognizes a resumed run only if every process passes `purge_step`.
        self._open(purge_step=first_step + 1)
        self._tracker.log({"config": _quote(yaml.safe_dump(asdict(self._config), sort_keys=False))}, first_step)

    def restart(self) -> None:
        self._open()

    def _open(self, **options: int) -> None:
        folder = self._folder.tensorboard
        make_folder(folder)  # TensorBoard does not create the target of a link
        self._tracker = TensorBoardTracker(folder.name, folder.parent, **options)
        self._tracker.start()

    def log_samples(self, step: int, texts: list[str]) -> None:
        self._tracker.log({"samples": "\n\n---\n\n".join(map(_quote, texts))}, step)


def _quote(text: str) -> str:
    """Indent a text so that TensorBoard shows it verbatim instead of as Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class Feed:
    """Sends records to a tracker.

    An error of the tracker is reported once and does not stop the run. The tracker then receives nothing until the end
    of the run, when it is restarted and sent what it missed.

    Args:
        warn: receives the reports.
    """

    def __init__(self, tracker: Tracker, first_step: int, warn: Callable[[str], None]):
        self._tracker, self._warn = tracker, warn
        self._has_failed = False
        self._missed: list[Callable[[Tracker], None]] = []
        with self._tolerated_failure("failed, training continues without it"):
            if note := tracker.start(first_step):
                warn(format_line(note))

    def send(self, message: Callable[[Tracker], None]) -> None:
        """Call `message` with the tracker, or at the end of the run if the tracker has failed."""
        if not self._has_failed:
            with self._tolerated_failure("failed, training continues without it"):
                message(self._tracker)
        if self._has_failed:
            self._missed.append(message)

    def close(self) -> None:
        """Finish the tracker; if it has failed, first send it what it missed."""
        if not self._has_failed:
            with self._tolerated_failure("failed to finish"):
                self._tracker.finish()
            return
        with self._tolerated_failure("failed again and is incomplete (metrics.jsonl is complete)"):
            self._tracker.restart()
            for message in self._missed:
                message(self._tracker)
            self._tracker.finish()
            self._warn(f"the tracker {self._tracker.name} has received at the end what it missed")

    @contextlib.contextmanager
    def _tolerated_failure(self, consequence: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self._has_failed = True
            reason = format_line(f"{type(error).__name__}: {error}")
            self._warn(f"the tracker {self._tracker.name} {consequence}: {reason}")


TRACKER_CLASSES = {each.name: each for each in (Wandb, TensorBoard)}


def choose_trackers(requested: str) -> list[str]:
    """Return the names of the trackers in `--report_to`; `auto` is wandb if it can log in, else none.

    wandb is left out if its own settings disable it.

    Raises:
        UserError: a tracker is not installed.
    """
    if requested == "auto":
        requested = "wandb" if wandb_settings.has_key() else "none"
    names = [name for name in TRACKERS if name in requested.split(",")]
    if "wandb" in names and wandb_settings.is_disabled():
        names.remove("wandb")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package {name}, which is not installed: pip install {name}")
    return names
