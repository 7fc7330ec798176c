"""Command settings: one typed dataclass, filled from a YAML file and command-line flags.

Each setting is declared once, as a field created by `setting`: default, help text, bounds, and whether it is a path,
private, or may change when the work is resumed. Flags override the `--config` file, which overrides the defaults.
"""

import argparse
import codecs
import copy
import dataclasses
import difflib
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from .errors import UserError
from .files import open_atomically

AnyConfig = TypeVar("AnyConfig", bound="Config")

# Python integers are unbounded, but no setting needs larger ones, and their products could overflow a float.
LARGEST_NUMBER = 2**64
YES_OR_NO = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}  # transformers.hf_argparser.string_to_bool


def setting(
    default: Any,
    help: str,
    *,
    heading: str | None = None,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    path: bool = False,
    private: bool = False,
    resumable: bool = True,
    positional: bool = False,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare a field of a `Config`.

    Args:
        default: used if neither a flag nor the file sets the field; a list for a setting that takes several values.
        help: text for `--help`, with the unit.
        heading: starts a group of flags in `--help`, which extends to the next heading.
        above, least, below, most: bounds of a number, exclusive (above, below) or inclusive (least, most);
            `below=math.inf` requires a finite number.
        path: the value is, or may be, a path; a leading `~` is expanded.
        private: omitted from the recorded command that reproduces the work, because it does not affect the result.
        resumable: may change when the work is resumed; `False` for settings that determine the result.
        positional: given without a flag.
        metavar: placeholder for the value in `--help`.
        aliases: other flags for the same setting, with their dashes.
    """
    metavar = metavar or ("PATH" if path else None)
    metadata = {
        "argparse": {"help": help, "aliases": list(aliases)} | ({"metavar": metavar} if metavar else {}),
        "heading": heading,
        "bounds": (above, least, below, most),
        "path": path,
        "private": private,
        "resumable": resumable,
        "positional": positional,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# Declares a setting that determines the result and therefore may not change when the work is resumed.
experiment = functools.partial(setting, resumable=False)


class Config:
    """Base class of a command's settings; checks each against its bounds.

    Raises:
        UserError: a number is out of bounds.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # subclasses are dataclasses

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and (broken := _find_broken_bound(value, *field.metadata["bounds"])):
                raise UserError(f"--{field.name} must be {broken}, not {value}")

    @property
    def experiment(self) -> dict[str, Any]:
        """The settings that determine the result and may not change when the work is resumed."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata["resumable"]
        }


def parse_arguments(
    config_type: type[AnyConfig],
    argv: Sequence[str] | None,
    *,
    description: str | None,
    prog: str | None = None,
    foreign_flags: Mapping[str, str] | None = None,
) -> AnyConfig:
    """Parse `argv` (default: `sys.argv[1:]`) into a `config_type`.

    Args:
        prog: the command's name in `--help`; `None` for the script's name.
        foreign_flags: flags of other projects, without dashes, each with a sentence that names the equivalent here.

    Raises:
        UserError: an unknown setting (the message suggests the nearest known one), a value of the wrong type, or a
            `--config` file that cannot be read or is not a mapping.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    parser, foreign_flags = Parser(config_type, prog=prog, description=description), foreign_flags or {}
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    for name, field in fields.items():
        if _is_list(field) and [flag.split("=")[0] for flag in flags].count(f"--{name}") > 1:
            raise UserError(f"--{name} is given twice: list all its values after one --{name}")
    names = {name for name, field in fields.items() if not field.metadata["positional"]}
    if len(names) < len(fields):
        flags = _complete_switches(flags, {f"--{name}" for name, field in fields.items() if field.type is bool})
    config_file = Parser(add_help=False).parse_known_args(flags)[0].config
    if config_file is not None:
        # Prepended as flags: both sources pass the same checks, and the command line wins.
        aliases = {alias.lstrip("-") for field in fields.values() for alias in field.metadata["argparse"]["aliases"]}
        flags = _read_config_file(expand_home(config_file), names | aliases, foreign_flags) + flags
    namespace, unknown = parser.parse_known_args(flags)
    for argument in unknown:
        if argument.startswith("--"):
            raise UserError(_describe_unknown(argument[2:].split("=")[0], names, foreign_flags, dashes="--"))
        raise UserError(f"unexpected argument {argument!r}: pass settings as --name value (see --help)")
    return config_type(**{name: _read_value(field, getattr(namespace, name)) for name, field in fields.items()})


def write_config(config: Config, path: str | Path) -> None:
    """Write settings as YAML that `--config` reads back unchanged."""
    with open_atomically(path) as stream:
        yaml.safe_dump(dataclasses.asdict(config), stream, sort_keys=False, allow_unicode=True)


def expand_home(path: str) -> str:
    """Expand a leading `~` or `~user`, which shells leave alone in places such as `--output_dir=~/runs`.

    Raises:
        UserError: the user does not exist, or the home folder is unknown.
    """
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # a null character
        expanded = path
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise UserError(
            f"{path}: the home folder {user} is unknown: write out its path, or ./{user} for a folder of that name"
        )
    return expanded


def whole_number(text: str) -> int:
    """Parse an integer, including forms such as `10_000` and `375e6`."""
    try:
        number = int(text)
    except ValueError:
        if not float(text).is_integer():
            raise ValueError(f"{text} is not an integer") from None
        number = int(float(text))
    if abs(number) > LARGEST_NUMBER:
        raise ValueError(f"{text} is too large")
    return number


def _find_broken_bound(
    value: float, above: float | None, least: float | None, below: float | None, most: float | None
) -> str | None:
    """Return the first violated bound in words, or `None`. NaN violates every bound."""
    if above is not None and not value > above:
        return f"above {above:g}"
    if least is not None and not value >= least:
        return f"{least:,} or more"
    if below is not None and not value < below:
        return "finite" if math.isinf(below) else f"below {below:,}"
    if most is not None and not value <= most:
        return f"{most:,} or less"
    return None


def _complete_switches(flags: Sequence[str], switches: set[str]) -> list[str]:
    """Append `=true` to switches that no yes or no follows: argparse would take the next argument as their value."""
    return [
        f"{flag}=true" if flag in switches and following.lower() not in YES_OR_NO else flag
        for flag, following in itertools.zip_longest(flags, flags[1:], fillvalue="")
    ]


def _is_list(field: dataclasses.Field[Any]) -> bool:
    return field.default_factory is not dataclasses.MISSING


def _read_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Reject values that no setting can have, and expand `~` in paths."""
    if isinstance(value, list) and not _is_list(field):  # argparse parses `--name=--` as an empty list
        raise UserError(f"--{field.name}: expected one value")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise UserError(f"--{field.name} {text!r}: must be valid UTF-8 without null characters")
    if not field.metadata["path"] or value is None:
        return value
    return [expand_home(each) for each in value] if isinstance(value, list) else expand_home(value)


def _describe_unknown(name: str, names: set[str], foreign_flags: Mapping[str, str], dashes: str = "") -> str:
    """Describe an unknown setting, with the known one that was probably meant."""
    name = name.replace("-", "_")
    if name in foreign_flags:
        return f"unknown setting {dashes}{name}: {foreign_flags[name]}"
    nearest = difflib.get_close_matches(name, names | foreign_flags.keys(), n=1, cutoff=0.5)
    if not nearest:
        return f"unknown setting {dashes}{name} (see --help for the known ones)"
    hint = f" ({foreign_flags[nearest[0]]})" if nearest[0] in foreign_flags else ""
    return f"unknown setting {dashes}{name}: did you mean {dashes}{nearest[0]}?{hint}"


class _TextLoader(yaml.BaseLoader):
    """YAML loader that keeps scalars as text for the flags' types to parse, except unquoted nulls and `.inf`.

    YAML 1.1 itself would read `on` and `no` as booleans, and 6e-4 as a string.
    """

    def construct_scalar(self, node: yaml.ScalarNode) -> str | None:
        text = super().construct_scalar(node)
        return text if node.style else {"null": None, "~": None, "": None, ".inf": "inf"}.get(text, text)


def _read_config_file(path: str, names: set[str], foreign_flags: Mapping[str, str]) -> list[str]:
    """Return the settings in a YAML file as command-line flags."""
    try:
        content = Path(path).read_bytes()
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell writes UTF-16
        values = yaml.load(content.decode("utf-16" if is_wide else "utf-8"), Loader=_TextLoader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --config {path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must contain `name: value` lines, not a {type(values).__name__}")
    flags: list[str] = []
    for name, value in values.items():
        if name not in names:
            raise UserError(f"--config {path}: " + _describe_unknown(str(name), names, foreign_flags))
        # A list item could itself be a list, or look like a flag.
        items = value if isinstance(value, list) else []
        if isinstance(value, dict) or not all(isinstance(item, str) and not item.startswith("--") for item in items):
            raise UserError(f"--config {path}: {name} must be a single value or a list of single values")
        if items:
            flags += [f"--{name}", *items]
        elif value not in (None, []):
            flags.append(f"--{name}={value}")
    return flags


class Parser(HfArgumentParser):
    """Parser of a `Config`, or of `--config` alone. Raises `UserError` instead of exiting."""

    def __init__(self, config_type: type[Config] | None = None, **kwargs: Any):
        self._group: argparse._ArgumentGroup | Parser = self
        super().__init__(config_type, **{"allow_abbrev": False, "formatter_class": _HelpFormatter, **kwargs})
        self.register("type", int, whole_number)
        self.add_argument(
            "--config", metavar="FILE.yaml", help="file of settings, named like the flags below, which override it"
        )

    @staticmethod
    # pyrefly: ignore[bad-override]  transformers calls it with this class's own instances only
    def _parse_dataclass_field(parser: "Parser", field: dataclasses.Field[Any]) -> None:
        given = field.metadata
        if given["heading"]:
            parser._group = parser.add_argument_group(given["heading"])
        if given["positional"]:
            options = {name: value for name, value in given["argparse"].items() if name != "aliases"}
            parser._group.add_argument(field.name, nargs="+" if _is_list(field) else None, **options)
            return
        field = copy.copy(field)
        field.metadata = given["argparse"]
        # pyrefly: ignore[bad-argument-type]  a group of arguments has all the methods that this calls
        HfArgumentParser._parse_dataclass_field(parser._group, field)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that shows each flag once, with underscores (`HfArgumentParser` also accepts dashes)."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, max_help_position=34, width=118, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names: dict[object, str] = {int: "N", float: "X", str: "TEXT"}
        return names.get(action.type, "yes|no")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        if action.nargs == 0 or not options:
            return ", ".join(options) or super()._format_action_invocation(action)
        return f"{', '.join(options)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        positional = "".join(f" {self._format_args(each, each.dest)}" for each in actions if not each.option_strings)
        super().add_usage(f"%(prog)s{positional} [--config FILE.yaml] [--name value ...]", actions, groups, prefix)
