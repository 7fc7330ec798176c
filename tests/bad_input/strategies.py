"""Strategies for bad input: values of flags and files, and damage to valid files."""

import copy
import dataclasses
import os
import typing
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

ODD_TEXTS = [
    "",
    " ",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "2",
    "8",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e3",
    "1e18",
    "1e400",
    "0x10",
    "1_0",
    "9" * 40,
    "9" * 5000,
    "a" * 300,
    "ab/" * 2000,
    "é\U0001f600",
    "\u202e",
    "%s%n{0}",
    "null",
    "~x",
    "[1]",
    "{}",
    "true",
    "no",
    "None",
    "1:1",
    "2:1",
    "1:99999999",
    "0/1",
    "1/2",
    "9" * 5000 + "/1",
    "'",
    '"',
    "\\",
    "$HOME",
    "*",
    "[",
    "?",
    "nowhere",
    "../given",
    "../given/loop",
    "../given/items.jsonl",
    "../given/data",
    "/dev/null",
    "/nowhere/x",
    "line\nline",
    "\t",
    "\x1b[31m",
    "\ufeff",
    "\uff11\uff12",
    "x" * 100_000,
    "../given/model",
    "a/b/c",
    "a b",
    "bytes that are not UTF-8: \udcff",
]
ODD_INTEGERS = [
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    64,
    -1,
    2**31,
    2**40,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    "1e3",
    "1e18",
    "1.5",
    "9" * 5000,
    "-0",
    "+8",
    "8_0",
    "",
]
ODD_NUMBERS = [
    0,
    1,
    2,
    0.5,
    0.999999,
    1e-3,
    -1,
    -0.0,
    1e30,
    -1e30,
    1e308,
    1e-320,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    2**63,
    10**30,
    "",
]
# Kept out of output flags, where a script would rightly write to these paths.
OUTSIDE_PATHS = ("/", "~", "..")

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(st.characters(exclude_characters="\0"), max_size=20))


def list_values(kind: Any) -> st.SearchStrategy:
    """Return a strategy for values of a flag of this type, most of them valid for the type."""
    kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if len(kinds) == 1 and typing.get_origin(kind) is not list:
        return list_values(kinds[0])
    if kind is bool:
        return st.sampled_from(["True", "False", "yes", "", "2"])
    integers = st.sampled_from([1, 2, 3, 4, 8, 16, 24, 32]) | st.sampled_from(ODD_INTEGERS)
    return {int: integers, float: st.sampled_from(ODD_NUMBERS)}.get(kind, texts)


@st.composite
def draw_settings(draw, settings_type: type, choices: dict[str, list], fixed: frozenset[str]) -> dict:
    """Draw a few settings.

    Args:
        choices: good values of some settings, drawn as often as bad ones.
        fixed: settings that are not drawn.
    """
    fields = {field.name: field for field in dataclasses.fields(settings_type) if field.name not in fixed}
    most = draw(st.sampled_from([1, 1, 2, 3]))
    names = draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=most, unique=True))
    values = {}
    for name in names:
        strategies = [*[list_values(fields[name].type)] * 4, texts]
        if name in choices:
            strategies += [st.sampled_from(choices[name])] * 5
        values[name] = draw(st.one_of(strategies))
    return values


@st.composite
def draw_arguments(draw, base: dict, values: dict) -> list[str]:
    """Draw a command line of `base` overridden by `values`, with flags spelled in any accepted way."""
    arguments = []
    for name, value in (base | values).items():
        spelling = draw(st.sampled_from("=== -2")) if name in values else "="
        if spelling == "-":
            arguments.append(f"--{name.replace('_', '-')}={value}")
        elif spelling == " ":
            arguments += [f"--{name}", str(value)]
        else:
            arguments += [f"--{name}={value}"] * (2 if spelling == "2" else 1)
    odd = st.sampled_from(
        ["--", "-h", "--help", "--nothing", "--nothing=1", "stray", "--see", "--=", "-x", "--x-", "@x"]
    )
    for argument in draw(st.one_of(*[st.just([])] * 7, st.lists(odd, min_size=1, max_size=2))):
        arguments.insert(draw(st.integers(0, len(arguments))), argument)
    return arguments


def is_in_working_folder(value: Any) -> bool:
    """Return whether a value, used as an output path, stays in the working folder."""
    return not str(value).startswith(OUTSIDE_PATHS)


# Odd values for any place in JSON and YAML.
odd_json = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            1.5,
            -0.0,
            2**31,
            2**63,
            10**30,
            10**400,
            1e308,
            float("nan"),
            float("inf"),
            "",
            "x",
            "a" * 300,
            "\ud800",
            "\0",
            "../../outside/secret_val_000000.npy",
            "/etc/hostname",
            "..",
            ".",
            "/",
            "nan",
            "1",
            "é",
            [],
            {},
            [[]],
            [None],
            {"": 1},
            ["x"],
            [1, 2],
            {"a": {"b": 1}},
            "x_val_000000.npy",
        ]
    ),
    st.text(max_size=8),
    st.integers(-5, 5000),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)


def list_places(value: Any, place: tuple = ()) -> list[tuple]:
    """Return the paths of all values within a JSON value, each as a tuple of keys."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(inner for key, child in children for inner in list_places(child, (*place, key)))]


@st.composite
def damage_json(draw, whole: Any, most: int = 2) -> Any:
    """Draw `whole` with some values replaced, removed, duplicated or added."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        places = list_places(value)
        # Top-level values are as likely as all others together.
        shallow = [place for place in places if 0 < len(place) < 2] or places
        place = draw(st.one_of(st.sampled_from(shallow), st.sampled_from(places)))
        if not place:
            value = draw(odd_json)
            continue
        owner = value
        for key in place[:-1]:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "repeat", "add"]))
        if action == "remove":
            del owner[place[-1]]
        elif action == "repeat" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[place[-1]]))
        elif action == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5))] = draw(odd_json)
        else:
            owner[place[-1]] = draw(odd_json)
    return value


@st.composite
def damage_bytes(draw, whole: bytes, header: int = 160) -> bytes:
    """Draw `whole` truncated, with some bytes changed (in its first `header` as often as anywhere), or with junk."""
    action = draw(st.sampled_from(["cut", "change", "change", "change", "insert", "append", "replace", "double"]))
    places = st.one_of(st.integers(0, min(header, len(whole))), st.integers(0, len(whole)))
    if action == "cut":
        return whole[: draw(places)]
    if action == "replace":
        return draw(st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"\0" * 200, b"\xff" * 200])))
    if action == "double":
        return whole + whole
    junk = draw(
        st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\xff\xfe", b"\0", b"\n", b"\x93NUMPY"]))
    )
    if action == "append":
        return whole + junk
    place = draw(places)
    if action == "insert":
        return whole[:place] + junk + whole[place:]
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(places)
        if place < len(changed):
            changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


DEEP = 100_000
ODD_JSON_FILES = [
    b"",
    b"\n",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"1",
    b"NaN",
    b"{",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"a": 1} x',
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b"[" * DEEP + b"]" * DEEP,
    b"9" * 5000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b"\0" * 100,
]


# A pipe can be intended (`--config <(...)`), where its size is not needed.
NO_FILES = ["nothing", "folder", "link to itself", "dangling link", "link to a folder"]


def replace_file(path: Path, kind: str, outside: Path) -> None:
    """Replace a file with one of `NO_FILES`, or with a pipe."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to({"link to itself": path, "dangling link": outside / "x", "link to a folder": outside}[kind])
