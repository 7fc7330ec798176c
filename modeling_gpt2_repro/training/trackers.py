"""Trackers: programs that show a run elsewhere. Each is accelerate's own, told where to write and never to ask."""

import configparser
import contextlib
import importlib.util
import netrc
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import yaml
from accelerate.tracking import TensorBoardTracker, WandBTracker

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import make_folder
from modeling_gpt2_repro.training.config import TRACKERS, TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder

# Where `wandb login` keeps a key for its own service, by the release.
WANDB_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
# In which it talks to a server.
WANDB_ONLINE_MODES = ("online", "run", "shared")
# How long a server may take to answer at all, to begin a run, and at the end to take in what it has not yet, before
# the rest is left to `wandb sync`. wandb itself waits 90 seconds for the beginning, and for ever at the end.
ANSWER_SECONDS = 5
WANDB_SECONDS = {"init_timeout": 10.0, "finish_timeout": 300.0}


class Tracker(Protocol):
    """What a run's record is fed to; any method may raise whatever its library comes up with."""

    name: str

    def start(self, first_step: int) -> str | None:
        """Begin after `first_step` updates; where it can, forget what an earlier process told of later ones.

        Returns:
            What is not as it was asked for, in a line.
        """

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

    Without a key, or where its server does not answer or its settings do not work, it runs offline, for `wandb sync`
    to upload. A resumed run is the same one there, by its id and name; steps that it makes again after a crash wandb
    has already, and keeps. Its own environment variables come before what we would say by ourselves.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder, config: TrainingConfig, run_id: str):
        self._folder, self._config, self._run_id = folder.path, config, run_id
        self._rows = [[line["step"], str(line.get("text"))] for line in folder.read_samples()]

    def start(self, first_step: int) -> str | None:
        make_folder(self._folder / self.name)  # where a link may lead, which wandb does not make
        _leave_unwritable_folders(self._folder)
        problem = self._open()
        self._tracker.store_init_configuration(asdict(self._config))
        # Its overview has the last value of every metric; which protocol a score is of belongs beside it.
        self._tracker.tracker.summary["hellaswag/protocol"] = "original"
        if problem is None:
            return None
        return f"wandb runs offline, for wandb sync {self._tracker.tracker.settings.sync_dir} to upload: {problem}"

    def _open(self) -> Exception | None:
        """Begin a run as it is asked for, else offline, and return why not as asked."""
        import wandb

        problems: list[Exception] = []
        # The last way is for variables whose values wandb refuses in any mode.
        for choose_mode, hides in ((_choose_wandb_mode, False), (lambda: "offline", False), (lambda: "offline", True)):
            with _without_wandb_variables() if hides else contextlib.nullcontext():
                try:
                    self._tracker = WandBTracker(**self._choose_arguments(), mode=choose_mode())
                    self._tracker.start()
                    return problems[0] if problems else None
                except Exception as error:
                    problems.append(error)
                    with contextlib.suppress(Exception):
                        wandb.teardown()  # or it says of the id that it is in use
        raise problems[0]

    def _choose_arguments(self) -> dict[str, Any]:
        import wandb

        def is_theirs(variable: str) -> bool:
            return bool(os.environ.get(f"WANDB_{variable}"))

        project, is_default = self._config.wandb_project, self._config.wandb_project == TrainingConfig.wandb_project
        arguments = {
            "NAME": ("name", self._config.run_name),
            "DIR": ("dir", str(self._folder)),
            "RUN_ID": ("id", self._run_id),
            "RESUME": ("resume", "allow"),
        }
        known = getattr(wandb.Settings, "model_fields", ("init_timeout",))
        return {
            "run_name": os.environ["WANDB_PROJECT"] if is_default and is_theirs("PROJECT") else project,
            "settings": {k: v for k, v in WANDB_SECONDS.items() if k in known and not is_theirs(k.upper())},
            **dict(argument for variable, argument in arguments.items() if not is_theirs(variable)),
        }

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

    name = "tensorboard"

    def __init__(self, folder: RunFolder, config: TrainingConfig):
        self._folder, self._config = folder.tensorboard, config

    def start(self, first_step: int) -> None:
        # Only where every process begins like this does TensorBoard take the second one for a resumed run.
        self._open(purge_step=first_step + 1)
        self._tracker.log({"config": _quote(yaml.safe_dump(asdict(self._config), sort_keys=False))}, first_step)

    def restart(self) -> None:
        self._open()

    def _open(self, **options: int) -> None:
        make_folder(self._folder)  # where a link may lead, which TensorBoard does not make
        self._tracker = TensorBoardTracker(self._folder.name, self._folder.parent, **options)
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

    What wandb's own switches disable is left out.

    Raises:
        UserError: one of them is not installed.
    """
    if requested in ("auto", "none"):
        requested = "wandb" if requested == "auto" and has_wandb_key() else ""
    names = [name for name in requested.split(",") if name and not (name == "wandb" and is_wandb_disabled())]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs the package of that name: pip install {name}")
    return [name for name in TRACKERS if name in names]


def build_tracker(name: str, folder: RunFolder, config: TrainingConfig, run_id: str) -> Tracker:
    """Build a tracker of the run in `folder`; it is not started."""
    return Wandb(folder, config, run_id) if name == "wandb" else TensorBoard(folder, config)


def has_wandb_key() -> bool:
    """Tell whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = urlsplit(read_wandb_setting("base_url"))
    hosts = {url.netloc, url.hostname} if url.netloc else WANDB_HOSTS
    try:
        path = os.environ.get("NETRC") or next(
            filter(os.path.exists, map(os.path.expanduser, ("~/.netrc", "~/_netrc")))
        )
        return not hosts.isdisjoint(known := netrc.netrc(os.path.expanduser(path)).hosts) or "default" in known
    except (OSError, StopIteration, netrc.NetrcParseError, ValueError):
        return bool(read_wandb_setting("api_key"))


def is_wandb_disabled() -> bool:
    """Tell whether wandb is switched off, by its own mode or by the variable that transformers knows."""
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return is_off or read_wandb_setting("mode").lower() == "disabled"


def read_wandb_setting(name: str) -> str:
    """Return a setting from wandb's environment variable, or the files that `wandb offline` and its like write."""
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):  # wandb, too, goes on without
        parser.read([Path(folder, "settings"), Path(os.environ.get("WANDB_DIR") or ".", "wandb", "settings")], "utf-8")
    return parser.get("default", name, fallback="")


def _choose_wandb_mode() -> str:
    """Return the mode that wandb's settings ask for, or offline where it could only ask for a key.

    Raises:
        OSError: the server does not answer.
    """
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        os.environ["WANDB_MODE"] = mode.lower()
    else:
        os.environ.pop("WANDB_MODE", None)  # an empty one wandb refuses
    settings = wandb.setup().settings
    if settings.mode not in WANDB_ONLINE_MODES:
        return settings.mode
    if not has_wandb_key():
        return "offline"
    ask_server(settings.base_url)
    return settings.mode


def ask_server(url: str) -> None:
    """Return once the server at `url` has answered anything that it takes for an answer.

    In a thread, because a name service that is silent knows no time limit.

    Raises:
        OSError: it has not, within `ANSWER_SECONDS`, or is out of order.
    """
    problem: list[OSError] = [TimeoutError(f"{url} does not answer")]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                problem[0] = ConnectionError(f"{url} answers {error.code}")
                return
        except Exception as error:  # of an address, or of what no web server says, urllib raises anything
            # A certificate that only Python does not know is an answer.
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                problem[0] = ConnectionError(f"{url} does not answer ({getattr(error, 'reason', error)})")
                return
        problem.clear()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if problem:
        raise problem[0]


def _leave_unwritable_folders(run_folder: Path) -> None:
    """Let wandb write to the run folder where it could not write elsewhere, as in a container without a home."""
    data_folder = os.environ.get("WANDB_DATA_DIR") or os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    if not _is_writable(data_folder):
        os.environ["WANDB_DATA_DIR"] = str(run_folder.absolute() / "wandb")
    if not _is_writable(os.environ.get("WANDB_DIR", ".")):
        os.environ.pop("WANDB_DIR", None)


def _is_writable(folder: str) -> bool:
    path = Path(os.path.expanduser(folder))
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    return os.access(path, os.W_OK)


@contextlib.contextmanager
def _without_wandb_variables() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    try:
        yield
    finally:
        os.environ.update(hidden)
