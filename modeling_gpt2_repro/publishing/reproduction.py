"""How a run is made again: the commands, and the versions it ran with."""

import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from modeling_gpt2_repro.core.arguments import Config
from modeling_gpt2_repro.core.devices import list_versions
from modeling_gpt2_repro.data.prepare.config import PrepareConfig
from modeling_gpt2_repro.data.shards import Manifest
from modeling_gpt2_repro.training.config import TrainingConfig
from modeling_gpt2_repro.training.run_folder import RunFolder


def list_commands(settings: dict[str, Any], manifest: Manifest | None) -> str:
    """Return the command lines that make the data, of the same commit, and the run on them again."""
    commands, defaults = [], asdict(TrainingConfig())
    if manifest is not None:
        recorded = manifest.settings | {"revision": manifest.source.get("revision"), "tokenizer": manifest.tokenizer}
        unset = {name: value for name, value in recorded.items() if value is None or value is False or value == []}
        # By default, one script writes to where the other reads.
        folder = {"output_dir": settings["data_dir"]} if settings["data_dir"] != defaults["data_dir"] else {}
        commands.append("python prepare_data.py" + _format_flags(PrepareConfig, recorded | folder, unset))
    private = {field.name for field in fields(TrainingConfig) if field.metadata["private"]}
    shared = {name: value for name, value in settings.items() if name not in private}
    commands.append("python train.py" + _format_flags(TrainingConfig, shared, defaults))
    return "\n".join(commands)


def _format_flags(config_type: type[Config], settings: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults as flags; of their paths only what others may see."""
    paths = {field.name for field in fields(config_type) if field.metadata["path"]}
    flags = ""
    for name, value in settings.items():
        if name in defaults and value == defaults[name]:
            continue
        values = [str(each) for each in (value if isinstance(value, list) else [value])]
        if name in paths:
            values = [shorten(each) for each in values]
        separator = " " if isinstance(value, list) else "="
        flags += f" --{name}{separator}{' '.join(map(_quote, values))}"
    return flags


def _quote(text: str) -> str:
    """Quote a value for bash, on one line: a line of its own could end the block in which the commands stand."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = re.sub(r"[\\']", r"\\\g<0>", text)
    return "$'" + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in escaped) + "'"


def read_versions(run_folder: Path) -> dict[str, str]:
    """Return the versions that a finished run says it ran with, else those that are installed."""
    recorded = RunFolder(run_folder).read_status().get("versions")
    return recorded if isinstance(recorded, dict) and recorded else list_versions()


def shorten(path: str) -> str:
    """Return a path, or the name of something on the Hub, but of one out of the working folder only what it ends in.

    Where that lay is nobody's business, and the reader has to put a path of their own.
    """
    leads_out = path.startswith(("/", "~")) or ".." in Path(path).parts
    return f"PATH/TO/{Path(path).name}" if leads_out else path
