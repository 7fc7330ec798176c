"""Trackers: programs that show a run elsewhere. Each wraps accelerate's tracker."""

import contextlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import yaml
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from ..core.errors import UserError, format_line
from ..core.files import make_folder
from ..training import wandb_settings
from .config import TRACKERS, TrainingConfig
from .run_folder import RunFolder

# How long wandb may take to start a run, and at the end to upload the rest before it is left to `wandb sync`. Its own
# limits are 90 seconds and none.
WANDB_SECONDS = {"init_timeout": 10.0, "finish_timeout": 300.0}


class Tracker(ABC):
    """What a run's record is sent to. Any method may raise whatever its library raises."""

    name: str
    _tracker: GeneralTracker

    def __init__(self, folder: RunFolder, config: TrainingConfig, run_id: str):
        self._folder, self._config, self._run_id = folder, config, run_id

    @abstractmethod
    def start(self, first_step: int) -> str | None:
        """Begin after `first_step` updates; forget later steps of an earlier process, if the tracker can.

        Returns:
            A line on what is not as requested.
        """

    @abstractmethod
    def restart(self) -> None:
        """Begin again after a failure, keeping what was logged before."""

    @abstractmethod
    def log_samples(self, step: int, texts: list[str]) -> None:
        """Log all texts that the model wrote after `step` updates."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Log numbers of the model after `step` updates."""
        self._tracker.log(metrics, step)

    def finish(self) -> None:
        """Write out what is left."""
        self._tracker.finish()


class Wandb(Tracker):
    """Weights & Biases: the curves, the settings, and all samples in one table.

    Without a key, or if the server does not answer or the settings do not work, the run is offline, for `wandb sync`
    to upload. A resumed run keeps its id and name there; wandb keeps the first values of steps that are repeated after
    a crash. wandb's own environment variables override the defaults given here.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder, config: TrainingConfig, run_id: str):
        super().__init__(folder, config, run_id)
        self._rows = [[line["step"], str(line.get("text"))] for line in folder.read_samples()]

    def start(self, first_step: int) -> str | None:
        make_folder(self._folder.path / self.name)  # wandb does not create what a link leads to
        wandb_settings.replace_unwritable_folders(self._folder.path)
        problem = self._open()
        self._tracker.store_init_configuration(asdict(self._config))
        # wandb's overview shows the last value of every metric; the protocol of a score belongs beside it.
        self._tracker.tracker.summary["hellaswag/protocol"] = "original"
        if problem is None:
            return None
        return f"wandb runs offline, for wandb sync {self._tracker.tracker.settings.sync_dir} to upload: {problem}"

    def _open(self) -> Exception | None:
        """Start a run as requested, or else offline; return why it is not as requested."""
        import wandb  # takes a second, which runs without it need not wait for

        attempts = (
            (contextlib.nullcontext, wandb_settings.choose_mode),
            (contextlib.nullcontext, lambda: "offline"),
            (wandb_settings.without_variables, lambda: "offline"),  # some have values that wandb refuses in any mode
        )
        problems: list[Exception] = []
        for environment, choose_mode in attempts:
            with contextlib.suppress(Exception):
                wandb.teardown()  # of a service that may be dead, or takes the run's id for one in use
            try:
                with environment():
                    self._tracker = WandBTracker(**self._choose_arguments(), mode=choose_mode())
                    self._tracker.start()
                return problems[0] if problems else None
            except Exception as error:
                problems.append(error)
        raise problems[0]

    def _choose_arguments(self) -> dict[str, Any]:
        """Return the arguments of accelerate's tracker and `wandb.init` that no variable of wandb's overrides."""
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
    """TensorBoard's event files in the run folder's `tensorboard/`: the curves, the settings and the samples as text.

    `tensorboard --logdir runs` then shows all runs of a folder.
    """

    name = "tensorboard"

    def start(self, first_step: int) -> None:
        # TensorBoard takes the second process for a resumed run only if every process starts like this.
        self._open(purge_step=first_step + 1)
        self._tracker.log({"config": _quote(yaml.safe_dump(asdict(self._config), sort_keys=False))}, first_step)

    def restart(self) -> None:
        self._open()

    def _open(self, **options: int) -> None:
        folder = self._folder.tensorboard
        make_folder(folder)  # TensorBoard does not create what a link leads to
        self._tracker = TensorBoardTracker(folder.name, folder.parent, **options)
        self._tracker.start()

    def log_samples(self, step: int, texts: list[str]) -> None:
        self._tracker.log({"samples": "\n\n---\n\n".join(map(_quote, texts))}, step)


def _quote(text: str) -> str:
    """Indent a text, so that TensorBoard shows it verbatim instead of as Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class Feed:
    """Sends a tracker what is recorded.

    An error of the tracker's library or network is reported once and stops nothing. No later step waits for that
    tracker; at the end it is restarted and sent what it missed.

    Args:
        warn: receives the reports.
    """

    def __init__(self, tracker: Tracker, first_step: int, warn: Callable[[str], None]):
        self._tracker, self._warn = tracker, warn
        self._has_failed = False
        self._missed: list[Callable[[Tracker], None]] = []
        with self._tolerated_failure("failed, training goes on without it"):
            if note := tracker.start(first_step):
                warn(format_line(note))

    def send(self, message: Callable[[Tracker], None]) -> None:
        """Call `message` with the tracker, at the end if the tracker has failed."""
        if not self._has_failed:
            with self._tolerated_failure("failed, training goes on without it"):
                message(self._tracker)
        if self._has_failed:
            self._missed.append(message)

    def close(self) -> None:
        """Let the tracker finish; if it has failed, send it what it missed first."""
        if not self._has_failed:
            with self._tolerated_failure("failed at its end"):
                self._tracker.finish()
            return
        with self._tolerated_failure("failed again, and lacks what metrics.jsonl has"):
            self._tracker.restart()
            for message in self._missed:
                message(self._tracker)
            self._tracker.finish()
            self._warn(f"the tracker {self._tracker.name} was told at the end what it had missed")

    @contextlib.contextmanager
    def _tolerated_failure(self, consequence: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._has_failed = True
            reason = format_line(f"{type(error).__name__}: {error}")
            self._warn(f"the tracker {self._tracker.name} {consequence}: {reason}")


TRACKER_CLASSES = {each.name: each for each in (Wandb, TensorBoard)}


def choose_trackers(requested: str) -> list[str]:
    """Return the names of the trackers that `--report_to` asks for; `auto` is wandb if it could log in.

    wandb is left out if its own switches disable it.

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
            raise UserError(f"--report_to {name} needs the package of that name: pip install {name}")
    return names
