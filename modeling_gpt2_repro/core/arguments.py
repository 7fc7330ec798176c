"""Settings of a script: one typed dataclass, filled from a YAML file and from command-line flags.

Every knob has one home: a field of the script's dataclass, whose `metadata={"help": ...}` says what it means and in
which unit. Flags win over the file given by `--config`, and the file wins over the defaults.
"""

import argparse
import codecs
import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import open_atomically

Settings = TypeVar("Settings")


PATH = "PATH"  # what `--help` calls the value of a setting that is one


def setting(default: Any, help: str, path: bool = False, **kwargs) -> Any:
    """Declare a field of a settings dataclass with its default and the text that `--help` shows.

    Args:
        path: the value is one, or may be one; a `~` at its front then stands for the home folder.
    """
    if path:
        kwargs["metavar"] = PATH
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def parse_arguments(
    settings_type: type[Settings],
    argv: Sequence[str] | None,
    *,
    description: str,
    foreign_flags: Mapping[str, str] | None = None,
) -> Settings:
    """Fill `settings_type` from `argv` (`None`: the process's own arguments).

    `foreign_flags` maps flag names of other projects (without dashes) to a sentence that names ours.

    Raises:
        UserError: an unknown name (the message has the nearest known one), a value of the wrong type, or a `--config`
            file that cannot be read or is not a mapping.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(settings_type, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="settings to start from, by the names of the flags below"
    )
    for action in parser._actions:
        if action.type is int:
            action.type = whole_number

    fields = dataclasses.fields(settings_type)
    names = {field.name for field in fields}
    aliases = {alias.removeprefix("--") for field in fields for alias in field.metadata.get("aliases", ())}
    for name in (field.name for field in fields if field.default_factory is not dataclasses.MISSING):
        if [argument.split("=")[0] for argument in argv].count(f"--{name}") > 1:
            raise UserError(f"--{name} is given twice: put all its values behind one")
    foreign_flags = foreign_flags or {}
    # The file is turned into flags that stand before the real ones, so that both pass the same checks.
    config_parser = Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_file = config_parser.parse_known_args(argv)[0].config
    flags = list(argv)
    if config_file is not None:
        flags = _read_config_file(expand_home(config_file), names | aliases, foreign_flags) + flags
    namespace, unknown = parser.parse_known_args(flags)
    for argument in unknown:
        if argument.startswith("--"):
            raise UserError(describe_unknown_name(argument[2:].split("=")[0], names, foreign_flags, dashes="--"))
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: every setting is given as --name value (see --help)")
    for field in fields:
        value = getattr(namespace, field.name)
        _check_value(field, value)
        if field.metadata.get("metavar") == PATH and value is not None:
            expanded = [expand_home(each) for each in value] if isinstance(value, list) else expand_home(value)
            setattr(namespace, field.name, expanded)
    return settings_type(**{name: getattr(namespace, name) for name in names})


def expand_home(path: str) -> str:
    """Return a path with the folder that `~` or `~user` at its front stands for, which shells expand in some places.

    Raises:
        UserError: there is no such user, or nobody has told where this one's home folder is.
    """
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # of a null character
        expanded = path
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(
            f"{path}: the home folder {user} is not known. Write it out, or ./{user} for a folder so called"
        )
    return expanded


def write_settings(settings: Any, path: str | Path) -> None:
    """Write a settings dataclass as YAML that `--config` reads back to the same settings."""
    with open_atomically(path) as stream:
        yaml.safe_dump(dataclasses.asdict(settings), stream, sort_keys=False, allow_unicode=True)


def describe_unknown_name(name: str, names: set[str], foreign_flags: Mapping[str, str], dashes: str = "") -> str:
    """Say that `name` is not a setting, and which one was probably meant."""
    name = name.replace("-", "_")
    if name in foreign_flags:
        return f"unknown setting {dashes}{name}: {foreign_flags[name]}"
    nearest = difflib.get_close_matches(name, names | set(foreign_flags), n=1, cutoff=0.5)
    if not nearest:
        return f"unknown setting {dashes}{name} (see --help for the known ones)"
    return f"unknown setting {dashes}{name}: did you mean {dashes}{nearest[0]}?" + (
        f" ({foreign_flags[nearest[0]]})" if nearest[0] in foreign_flags else ""
    )


def whole_number(text: str) -> int:
    """Read a whole number, also as people write large ones: `10_000`, `375e6`."""
    try:
        number = int(text)
    except ValueError:
        if not float(text).is_integer():
            raise ValueError(f"{text} is not a whole number") from None
        number = int(float(text))
    if abs(number) > 2**64:  # nothing here is counted that far, and products of larger ones fit no float
        raise ValueError(f"{text} is too large")
    return number


def _check_value(field: dataclasses.Field, value: Any) -> None:
    """Refuse what no setting can mean, whatever it is for."""
    is_list = field.default_factory is not dataclasses.MISSING
    if isinstance(value, list) and not is_list:  # argparse takes `--name=--` for no value at all
        raise UserError(f"--{field.name}: expected one value")
    for text in value if is_list else [value]:
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise UserError(f"--{field.name} {text!r}: has to be text in UTF-8 without null characters")


class _TextLoader(yaml.BaseLoader):
    """Leaves scalars text, which the flags' own types then read, but for what only YAML spells so, outside quotes.

    YAML 1.1 takes `on` and `no` for booleans, and 6e-4 for a word.
    """

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
        text = super().construct_scalar(node)
        return text if node.style else {"null": None, "~": None, "": None, ".inf": "inf"}.get(text, text)


def _read_config_file(path: str, names: set[str], foreign_flags: Mapping[str, str]) -> list[str]:
    try:
        content = Path(path).read_bytes()
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as a shell of Windows's writes it
        values = yaml.load(content.decode("utf-16" if is_wide else "utf-8"), Loader=_TextLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --config {path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} has to hold `name: value` lines, not a {type(values).__name__}")
    flags = []
    for name, value in values.items():
        if name not in names:
            raise UserError(f"--config {path}: " + describe_unknown_name(str(name), names, foreign_flags))
        # An item of a list could be a list, or else be taken for the flag that it looks like.
        items = value if isinstance(value, list) else []
        if isinstance(value, dict) or not all(isinstance(item, str) and not item.startswith("--") for item in items):
            raise UserError(f"--config {path}: {name} has to be a single value or a list of such")
        if value in (None, []):
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


class Parser(HfArgumentParser):
    """An `HfArgumentParser` whose complaints are `UserError`s, also for commands that take names without a flag."""

    def error(self, message: str):
        raise UserError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag once, with underscores (`HfArgumentParser` also accepts the spelling with dashes)."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, max_help_position=34, width=118, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {whole_number: "N", float: "X", str: "TEXT"}.get(action.type, "yes|no")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        if action.nargs == 0 or not options:
            return ", ".join(options)
        return f"{', '.join(options)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage("%(prog)s [--config FILE.yaml] [--name value ...]", actions, groups, prefix)
