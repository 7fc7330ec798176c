"""How to reproduce a run: its commands and software versions."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..core.arguments import Config
from ..core.devices import list_versions
from ..data.prepare.config import PrepareConfig
from ..data.shards import Manifest
from ..training.config import TrainingConfig
from ..training.run_folder import RunFolder


def list_commands(config: TrainingConfig, manifest: Manifest | None) -> str:
    """Return the command lines that prepare the data, from the same commit of its source, and repeat the run."""
    commands: list[str] = []
    defaults = TrainingConfig()
    if manifest is not None:
        recorded = manifest.settings | {"revision": manifest.source.get("revision"), "tokenizer": manifest.tokenizer}
        given = {name: value for name, value in recorded.items() if value not in (None, []) and value is not False}
        if config.data_dir != defaults.data_dir:  # the defaults of the two scripts agree
            given["output_dir"] = config.data_dir
        commands.append("python prepare_data.py" + _format_flags(PrepareConfig, given))
    shared = [field.name for field in fields(config) if not field.metadata["private"]]
    changed = {name: getattr(config, name) for name in shared if getattr(config, name) != getattr(defaults, name)}
    commands.append("python train.py" + _format_flags(TrainingConfig, changed))
    return "\n".join(commands)


def _format_flags(config_type: type[Config], settings: dict[str, Any]) -> str:
    """Format settings as command-line flags, with paths shortened."""
    paths = {field.name for field in fields(config_type) if field.metadata["path"]}
    flags = ""
    for name, value in settings.items():
        separator, values = (" ", value) if isinstance(value, list) else ("=", [value])
        words = [shorten(str(each)) if name in paths else str(each) for each in values]
        flags += f" --{name}{separator}{' '.join(map(_quote, words))}"
    return flags


def _quote(text: str) -> str:
    """Quote a value for bash on a single line, because a line break could end the code block around the commands."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = re.sub(r"[\\']", r"\\\g<0>", text)
    return "$'" + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped) + "'"


def read_versions(folder: RunFolder) -> dict[str, str]:
    """Return the versions that a finished run recorded; if there are none, the installed ones."""
    recorded = folder.read_status().get("versions")
    return recorded if isinstance(recorded, dict) and recorded else list_versions()


def shorten(path: str) -> str:
    """Return a path or Hub id unchanged, but only the last component of a path outside the working folder.

    The rest would reveal details of a private machine, and readers need a path of their own anyway.
    """
    leads_out = path.startswith(("/", "~")) or ".." in Path(path).parts
    return f"PATH/TO/{Path(path).name}" if leads_out else path
