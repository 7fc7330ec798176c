"""Trackers: programs that show a run elsewhere. Each is accelerate's own, told where to write and never to ask."""

import contextlib
import importlib.util
import netrc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import yaml
from accelerate.tracking import TensorBoardTracker, WandBTracker

from modeling_gpt2_repro.errors import UserError
from modeling_gpt2_repro.files import make_folder
from modeling_gpt2_repro.training.config import TRACKERS, TrainingConfig

TENSORBOARD = "tensorboard"
WANDB_HOST = "https://api.wandb.ai"
# What wandb does without a network, by its environment variable WANDB_MODE.
WANDB_LOCAL_MODES = ("offline", "dryrun", "disabled")


class Tracker(Protocol):
    """What a run's record is fed to; any method may raise whatever its library comes up with."""

    name: str

    def start(self, first_step: int) -> None:
        """Begin after `first_step` updates; where it can, forget what an earlier process told of later ones."""

    def restart(self) -> None:
        """Begin anew after a failure, with what was told before."""

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Take numbers of the model after `step` updates."""

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Take all texts that the model wrote after `step` updates."""

    def finish(self) -> None:
        """Write out what is left."""


class Wandb:
    """Weights & Biases: the curves, the settings, and all samples in one table.

    Without a key it runs offline, for `wandb sync` to upload. A resumed run is the same one there, by its id and name;
    steps that it makes again after a crash wandb has already, and keeps.
    """

    name = "wandb"

    def __init__(self, folder: Path, config: TrainingConfig, run_id: str, samples: list[dict[str, Any]]):
        self._folder, self._config = folder, config
        self._rows = [[line["step"], str(line.get("text"))] for line in samples]
        self._tracker = WandBTracker(
            config.wandb_project,
            name=config.run_name,
            dir=str(folder),
            id=run_id,
            resume="allow",
            mode=None if has_wandb_key() or os.environ.get("WANDB_MODE") in WANDB_LOCAL_MODES else "offline",
        )

    def start(self, first_step: int) -> None:
        make_folder(self._folder / self.name)  # where a link may lead, which wandb does not make
        self._tracker.start()
        self._tracker.store_init_configuration(asdict(self._config))
        # Its overview has the last value of every metric; which protocol a score is of belongs beside it.
        self._tracker.tracker.summary["hellaswag/protocol"] = "original"

    def restart(self) -> None:
        import wandb  # a second that runs without it need not wait for

        for end in (self.finish, wandb.teardown):  # of a service that may be dead
            with contextlib.suppress(Exception):
                end()
        self.start(0)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.log(metrics, step)

    def log_samples(self, step: int, texts: list[str]) -> None:
        rows = self._rows + [[step, text] for text in texts]
        self._tracker.log_table("samples", columns=["step", "text"], data=rows, step=step)
        self._rows = rows

    def finish(self) -> None:
        self._tracker.finish()


class TensorBoard:
    """TensorBoard's event files in the run folder's `tensorboard/`: the curves, the settings and the samples as text.

    `tensorboard --logdir runs` then shows all runs of a folder.
    """

    name = TENSORBOARD

    def __init__(self, folder: Path, config: TrainingConfig):
        self._folder, self._config = folder, config

    def start(self, first_step: int) -> None:
        # Only where every process begins like this does TensorBoard take the second one for a resumed run.
        self._open(purge_step=first_step + 1)
        self._tracker.log({"config": _quote(yaml.safe_dump(asdict(self._config), sort_keys=False))}, first_step)

    def restart(self) -> None:
        self._open()

    def _open(self, **options: int) -> None:
        make_folder(self._folder / self.name)  # where a link may lead, which TensorBoard does not make
        self._tracker = TensorBoardTracker(self.name, self._folder, **options)
        self._tracker.start()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.log(metrics, step)

    def log_samples(self, step: int, texts: list[str]) -> None:
        self._tracker.log({"samples": "\n\n---\n\n".join(map(_quote, texts))}, step)

    def finish(self) -> None:
        self._tracker.finish()


def _quote(text: str) -> str:
    """Indent a text, so that TensorBoard shows it as it is and does not take it for Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def choose_trackers(requested: str) -> list[str]:
    """Return the names of the trackers that `--report_to` asks for; `auto` is wandb where it could log in.

    Raises:
        UserError: one of them is not installed.
    """
    if requested in ("auto", "none"):
        return ["wandb"] if requested == "auto" and has_wandb_key() else []
    names = requested.split(",")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package of that name: pip install {name}")
    return [name for name in TRACKERS if name in names]


def build_tracker(
    name: str, folder: Path, config: TrainingConfig, run_id: str, samples: list[dict[str, Any]]
) -> Tracker:
    """Build a tracker of a run that lies in `folder` and has written `samples` before; it is not started."""
    return Wandb(folder, config, run_id, samples) if name == "wandb" else TensorBoard(folder, config)


def has_wandb_key() -> bool:
    """Tell whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname
    try:
        path = Path(os.environ["NETRC"]) if "NETRC" in os.environ else Path.home() / ".netrc"
        return host in netrc.netrc(path).hosts
    except (OSError, RuntimeError, netrc.NetrcParseError, ValueError):  # in a container nobody may have a home
        return False
