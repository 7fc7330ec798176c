"""What strace says of a process: its calls that change files, in order, and what of them is durable when.

`read_trace` gives the calls; `choose_points` those of them that may be the last; `find_undurable` what a loss of power
could lose.
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
# Each in turn is the last, or fails.
POINTS = (*NAMING, *REMOVING, *MAKING, *SYNCING, "ftruncate")
# Of these only some are: a file of megabytes has thousands.
RARE_POINTS = ("write", "pwrite64")
EACH_RARE_POINT = 10
TRACED = (*POINTS, *WRITING, "openat")
TEMPORARY = (TEMPORARY_SUFFIX, REPLACED_SUFFIX)

LINE = re.compile(r"(?P<thread>\d+) +(?:<\.\.\. \w+ resumed>(?P<rest>.*)|(?P<call>\w+)\((?P<arguments>.*))")
NAME = re.compile(r'(?:AT_FDCWD|\d+)<(?P<folder>[^>]*)>(?:\([^)]*\))?|"(?P<name>(?:[^"\\]|\\.)*)"(?:\.\.\.)?')


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call: `number` counts those of its kind in its thread, from 1; `paths` are the absolute ones."""

    thread: int
    name: str
    number: int
    paths: tuple[str, ...]
    arguments: str
    is_done: bool

    def lies_in(self, root: Path) -> bool:
        """Tell whether it is about something in a folder."""
        return any(is_inside(path, str(root)) for path in self.paths)


def is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def list_options(trace: Path) -> list[str]:
    """Return the options with which strace writes what `read_trace` reads."""
    return ["-y", "-s", "0", "-o", str(trace), "-e", f"trace={','.join(TRACED)}", "-e", "signal=none"]


def read_trace(trace: Path) -> list[Call]:
    """Read what strace wrote, in the order in which the calls began."""
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
    """Return the calls about `root` of which each may be the last, or, by chance and always the same, a share of them.

    Of two threads' calls of the same kind and number only the first is one: it is the one that is hit.
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
    """Tell whether a path under `root` is, or lies in, something that has not got its name yet or has lost it."""
    return any(part.endswith(TEMPORARY) for part in Path(path).relative_to(root).parts)


def _find_home(path: str) -> str:
    """Return the folder in which what is removed had its name."""
    temporary = [parent for parent in (Path(path), *Path(path).parents) if parent.name.endswith(TEMPORARY)]
    return str((temporary[-1] if temporary else Path(path)).parent)


def find_undurable(
    calls: Iterable[Call],
    root: Path,
    existing: Iterable[str] = (),
    reports: Iterable[str] = (),
    is_disturbed: bool = False,
) -> list[str]:
    """Return, in words, what a loss of power at some moment could leave half of, or lose.

    What takes a name must be on the disk before, with all files and folders in it; and the name itself before
    anything is removed that had one, anything else takes one, or anything is reported.

    Args:
        existing: files and folders that were there before the first call.
        reports: files that tell people what is done, as a stdout.
        is_disturbed: some call has failed, or was the last. What could not be made durable for that may stay so, and
            only what is older in the same folder is kept until it is.
    """
    known = set(existing)
    contents: set[str] = set()  # files whose content is not on the disk
    names: set[str] = set()  # files and folders whose names in their folders are not
    named = {path for path in known if not is_temporary(path, root)}  # what has, or had, a name for good
    pending: dict[str, str] = {}  # folders with a name of a published thing that is not, and that name
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
