"""wandb's environment variables and settings files, and a check that its server answers.

Importing wandb takes a second, so this module imports it only when a run starts with it.
"""

import configparser
import contextlib
import netrc
import os
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

# Hosts under which `wandb login` stores a key for wandb's own service, depending on the release.
DEFAULT_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
# The modes in which wandb talks to a server.
ONLINE_MODES = ("online", "run", "shared")
# Time limit for the server's first answer.
ANSWER_SECONDS = 5


def has_key() -> bool:
    """Return whether wandb can log in without prompting."""
    if read_setting("api_key") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = urlsplit(read_setting("base_url"))
    hosts = {url.netloc, url.hostname} if url.netloc else DEFAULT_HOSTS
    return not _list_netrc_hosts().isdisjoint({*hosts, "default"})


def _list_netrc_hosts() -> set[str]:
    """Return the hosts with keys in the user's netrc file, which `wandb login` writes."""
    candidates = (path,) if (path := os.environ.get("NETRC")) else ("~/.netrc", "~/_netrc")
    for candidate in map(os.path.expanduser, candidates):
        with contextlib.suppress(OSError, ValueError, netrc.NetrcParseError):  # no such file, or a damaged one
            return set(netrc.netrc(candidate).hosts)
    return set()


def is_disabled() -> bool:
    """Return whether wandb is disabled, by its mode or by transformers' `WANDB_DISABLED`."""
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    return is_off or read_setting("mode").lower() == "disabled"


def read_setting(name: str) -> str:
    """Return a setting from wandb's environment variable, or from the files that commands like `wandb offline` write.

    Returns an empty string if neither has it.
    """
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):  # wandb ignores such files, too
        parser.read([Path(folder, "settings"), Path(os.environ.get("WANDB_DIR") or ".", "wandb", "settings")], "utf-8")
    return parser.get("default", name, fallback="")


def choose_mode() -> str:
    """Return the mode in wandb's settings, or `offline` if wandb would prompt for a key.

    Raises:
        OSError: the server does not answer.
    """
    import wandb

    if mode := os.environ.pop("WANDB_MODE", "").lower():  # wandb rejects empty and upper-case values
        os.environ["WANDB_MODE"] = mode
    settings = wandb.setup().settings
    if settings.mode in ONLINE_MODES:
        if not has_key():
            return "offline"
        ask_server(settings.base_url)
    return settings.mode


def ask_server(url: str) -> None:
    """Return once the server at `url` has answered.

    Raises:
        OSError: no answer within `ANSWER_SECONDS`, or a server error.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # In a thread, because name resolution has no timeout.
    threading.Thread(target=lambda: answers.put(_find_problem(url)), daemon=True).start()
    try:
        problem = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"{url} does not answer") from None
    if problem is not None:
        raise ConnectionError(f"{url} {problem}")


def _find_problem(url: str) -> str | None:
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"answers {error.code}" if error.code >= 500 else None
    except Exception as error:  # urllib raises many types for a bad address or a server that does not speak HTTP
        reason = getattr(error, "reason", error)
        # A certificate that Python does not trust is still an answer.
        return None if isinstance(reason, ssl.SSLError) else f"does not answer ({reason})"
    return None


def replace_unwritable_folders(run_folder: Path) -> None:
    """Redirect wandb's files to the run folder if its own folders are not writable, as in a container without home."""
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
def without_variables() -> Generator[None]:
    """Hide wandb's environment variables inside the context."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    try:
        yield
    finally:
        os.environ.update(hidden)
