"""Traces of strace: the system calls that change files, in order, and when their effects are durable.

`read_trace` returns the calls, `choose_points` those at which a command is disturbed, and `find_undurable` what a
power failure could lose.
"""

import dataclasses
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from modeling_gpt2_repro.core.files import REPLACED_SUFFIX, TEMPORARY_SUFFIX

NAMING = ("rename", "renameat", "renameat2", "link", "linkat")
REMOVING = ("unlink", "unlinkat", "rmdir")
MAKING = ("mkdir", "mkdirat")
SYNCING = ("fsync", "fdatasync")
WRITING = ("write", "pwrite64", "sendfile", "copy_file_range")
# Crash points: a command is killed at each of these calls, or the call fails.
POINTS = (*NAMING, *REMOVING, *MAKING, *SYNCING, "ftruncate")
# Only every tenth of these is one, because a file of megabytes takes thousands.
RARE_POINTS = ("write", "pwrite64")
EACH_RARE_POINT = 10
TRACED = (*POINTS, *WRITING, "openat")
TEMPORARY = (TEMPORARY_SUFFIX, REPLACED_SUFFIX)

LINE = re.compile(r"(?P<thread>\d+) +(?:<\.\.\. \w+ resumed>(?P<rest>.*)|(?P<call>\w+)\((?P<arguments>.*))")
NAME = re.compile(r'(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>(?:\([^)]*\))?|"(?P<name>(?:[^"\\]|\\.)*)"(?:\.\.\.)?')


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call: `number` counts the calls of this name in its thread, from 1; `paths` are absolute."""

    thread: int
    name: str
    number: int
    paths: tuple[str, ...]
    arguments: str
    is_done: bool

    def lies_in(self, root: Path) -> bool:
        """Return whether it concerns anything in a folder."""
        return any(is_inside(path, str(root)) for path in self.paths)


def is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def list_options(trace: Path) -> list[str]:
    """Return the options of strace whose output `read_trace` reads."""
    return ["-y", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(TRACED)}", "-e", "signal=none"]


def read_trace(trace: Path) -> list[Call]:
    """Read a trace, in the order in which the calls began."""
    counts: dict[tuple[str, str], int] = {}
    began: list[list] = []
    open_calls: dict[str, list] = {}
    for line in trace.read_text(errors="replace").splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        if match["call"] is None:
            open_calls.pop(match["thread"])[2] += match["rest"]
            continue
        entry = [match["thread"], match["call"], match["arguments"]]
        began.append(entry)
        if entry[2].endswith("<unfinished ...>"):
            open_calls[match["thread"]] = entry
    calls = []
    for thread, name, arguments in began:
        counts[thread, name] = number = counts.get((thread, name), 0) + 1
        is_done = re.search(r"= (-1 E\w+|\?)", arguments) is None
        calls.append(Call(int(thread), name, number, tuple(_list_paths(name, arguments)), arguments, is_done))
    return calls


def _list_paths(name: str, arguments: str) -> Iterator[str]:
    folder = None
    for match in NAME.finditer(arguments.rpartition(" = ")[0] or arguments):
        if match["folder"] is not None:
            if name in (*SYNCING, *WRITING, "ftruncate"):
                yield match["folder"].removesuffix(" (deleted)")
            folder = match["folder"].removesuffix(" (deleted)")
        elif name not in WRITING:
            yield os.path.normpath(os.path.join(folder or "/", match["name"]))
            folder = None


def choose_points(calls: Sequence[Call], root: Path, share: float = 1.0) -> list[Call]:
    """Return the crash points in `root`, or a random share of them, the same on every call.

    If two threads make a call of the same name and number, only the first one counts: strace disturbs that one.
    """
    points: dict[tuple[str, int], Call] = {}
    n_rare = 0
    for call in calls:
        if not call.lies_in(root) or call.name not in (*POINTS, *RARE_POINTS):
            continue
        if call.name in RARE_POINTS:
            n_rare += 1
            if n_rare % EACH_RARE_POINT != 1:
                continue
        points.setdefault((call.name, call.number), call)
    chosen = list(points.values())
    return sorted(random.Random(0).sample(chosen, math.ceil(share * len(chosen))), key=chosen.index)


def is_temporary(path: str, root: Path) -> bool:
    """Return whether a path under `root` is, or is in, something under a temporary name."""
    return any(part.endswith(TEMPORARY) for part in Path(path).relative_to(root).parts)


def _find_home(path: str) -> str:
    """Return the folder that contained what is removed under its final name."""
    temporary = [parent for parent in (Path(path), *Path(path).parents) if parent.name.endswith(TEMPORARY)]
    return str((temporary[-1] if temporary else Path(path)).parent)


def find_undurable(
    calls: Iterable[Call],
    root: Path,
    existing: Iterable[str] = (),
    reports: Iterable[str] = (),
    is_disturbed: bool = False,
) -> list[str]:
    """Describe what a power failure at some moment could lose or leave incomplete.

    Before something gets its final name, it must be durable with all files and folders in it. Before anything named is
    removed, anything else is named, or anything is reported, the name itself must be durable.

    Args:
        existing: files and folders from before the first call.
        reports: files that report progress to people, such as stdout.
        is_disturbed: a call failed, or the command was killed. What could not be made durable because of that may stay
            so; only older things in the same folder must be kept until it is.
    """
    known = set(existing)
    contents: set[str] = set()  # files whose content is not durable
    names: set[str] = set()  # files and folders whose entry in their folder is not durable
    named = {path for path in known if not is_temporary(path, root)}  # everything that has or had a final name
    pending: dict[str, str] = {}  # folders with a final name that is not durable, and that name
    found = []

    def move(old: str, new: str) -> None:
        for paths in (known, contents, names, named):
            for path in [path for path in paths if is_inside(path, old)]:
                paths.discard(path)
                paths.add(new + path[len(old) :])

    def name(path: str) -> None:
        if path not in known:
            known.add(path)
            names.add(path)

    def demand_nothing_pending(what: str, folder: str | None = None, besides: Sequence[str] = ()) -> None:
        others = [path for where, path in pending.items() if path not in besides and folder in (None, where)]
        found.extend(f"{what} before the name {path} was durable" for path in others)

    for call in calls:
        if not call.is_done:
            continue
        if call.name in WRITING and call.paths[0] in reports:
            demand_nothing_pending("something was reported")
        if not call.lies_in(root):
            continue
        if call.name == "openat":
            if "O_CREAT" in call.arguments:
                name(call.paths[0])
        elif call.name in (*WRITING, "ftruncate"):
            contents.add(call.paths[0])
        elif call.name in SYNCING:
            contents.discard(call.paths[0])
            names -= {path for path in names if os.path.dirname(path) == call.paths[0]}
            pending.pop(call.paths[0], None)
        elif call.name in MAKING:
            name(call.paths[0])
        elif call.name in REMOVING:
            if call.paths[0] in named:
                home = _find_home(call.paths[0]) if is_disturbed else None
                demand_nothing_pending(f"{call.paths[0]} was removed", home)
            for paths in (known, contents, names, named):
                paths.discard(call.paths[0])
        elif call.name.startswith("link"):
            name(call.paths[1])
        else:
            old, new = call.paths
            published = [path for path in (old, new) if not is_temporary(path, root)]
            if published and not is_disturbed:
                demand_nothing_pending(f"{new} took its name", besides=call.paths)
            if not is_temporary(new, root):
                half = {path for path in contents | names if is_inside(path, old)} - {old}
                half |= {path for path in contents if path == old}
                above = {str(folder) for folder in Path(new).parents} & names
                found.extend(f"{new} took its name before {path} was durable" for path in sorted(half | above))
            if "RENAME_EXCHANGE" in call.arguments:
                move(old, old + "\0")
                move(new, old)
                move(old + "\0", new)
            else:
                move(old, new)
                names.discard(new)
                if not published:
                    names.add(new)
            named |= {path for path in known if is_inside(path, new) and not is_temporary(path, root)}
            pending |= {os.path.dirname(path): path for path in published}
    return found
