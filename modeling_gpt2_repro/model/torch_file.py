"""Reader for the `torch.save` files of other projects that never executes code in them.

`torch.load(weights_only=True)` accepts only tensors and plain containers, but checkpoints also contain configuration
objects, NumPy losses and paths. Each such class is replaced by a stand-in, matched by its name; the class itself is
never imported.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..core.errors import UserError, raise_if_unreadable
from ..core.file_kinds import LLMC_MODEL, SAFETENSORS, ZIP, describe_content
from .convert_llmc import read_llmc_model


class SavedConfig:
    """Stand-in for a configuration class such as build-nanogpt's `GPTConfig`: its fields without its code."""


class IgnoredValue:
    """Stand-in for a value that conversion does not need: accepts and discards any arguments and state."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _make_dict(*_: Any) -> dict[str, Any]:
    return {}


# Keyed by a regular expression for the full name of the class.
STAND_INS: dict[str, Callable[..., Any]] = {
    r"(\w+\.)+(Simple)?\w*(Config|Args|Arguments|Namespace|Settings|HParams|Options)": SavedConfig,
    r"collections\.defaultdict": _make_dict,
    r"(numpy|pathlib|datetime|decimal|uuid)\.[\w.]+": IgnoredValue,
    r"builtins\.(bool|bytes|complex|dict|Ellipsis|float|frozenset|int|list|range|set|slice|str|tuple)": IgnoredValue,
}


def read_checkpoint_file(path: Path) -> dict[str, Any]:
    """Read the dict in a `torch.save` (memory-mapped if its format allows), safetensors or llm.c file.

    Raises:
        UserError: the file is missing, damaged or of another kind, or reading it would run code.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not a file"
        raise UserError(f"--checkpoint {path} {found}: pass the .pt file; a model folder needs no conversion")
    content = describe_content(path)
    if content == LLMC_MODEL:
        return read_llmc_model(path)
    if content not in (None, SAFETENSORS, ZIP):
        raise UserError(f"{path} is not a torch.save file: it is {content}")
    try:
        saved = safetensors.torch.load_file(path) if content == SAFETENSORS else _unpickle(path, content == ZIP)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise_if_unreadable(error, path)
        # Keep the reason from torch's message, but drop its advice to disable weights_only.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a complete torch.save file: {reason}") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} contains a {type(saved).__name__}, not a checkpoint's dict")
    return saved


def _unpickle(path: Path, is_mapped: bool) -> Any:
    """Unpickle a file, replacing each class that torch rejects and that is known to be plain data by a stand-in."""
    stand_ins: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            with (
                warnings.catch_warnings(action="ignore"),  # about the pickle protocol
                torch.serialization.safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]),
            ):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
        except Exception as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = refused and (refused[1] if "." in refused[1] else f"builtins.{refused[1]}")
            if name is None or name in stand_ins:
                raise
        stand_in = next((each for pattern, each in STAND_INS.items() if re.fullmatch(pattern, name)), None)
        if stand_in is None:
            raise UserError(f"{path} would run code ({name}) when loaded: save only the model's state_dict()")
        stand_ins[name] = stand_in
