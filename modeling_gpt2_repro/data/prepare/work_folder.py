"""The folder in which shards are made, `NAME.partial` beside the final `NAME`: who may work in it, and on what.

It outlives its processes. A killed run finds its finished pieces there when it is started again; several processes, on
several machines that see the folder, may each make a share of the pieces.

    plan.json       what is being made: settings, source and tokenizer; later runs must agree
    lock            held shared by a process that makes a share, exclusively by one that makes everything left
    unfinished/     the finished pieces of both stages
    *.npy           the shards
    tokenizer/, text_bytes.npy
                    what belongs to the shards
"""

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from ...core.errors import UserError, raise_if_refused
from ...core.files import (
    TEMPORARY_SUFFIX,
    follow_links,
    make_folder,
    restore_folder,
    set_aside,
    sync_folder,
    sync_tree,
    take_name,
    write_json,
)
from ...core.locks import FolderLock
from ..shards import LOCK_NAME, MANIFEST_NAME, PLAN_NAME, WORK_FOLDER, find_foreign_file

# The format of the pieces. Change it with them, so that an upgrade never resumes with old ones.
WORK_VERSION = 3
# Can be checked only once the corpus has been read: a run that failed for them may be repeated with others.
PLANNING_SETTINGS = ("shard_size", "val_tokens")


class WorkFolder:
    """A work folder that this process has locked.

    Attributes:
        path: the folder, where the shards are written.
        pieces: the folder of finished pieces.
        lock: of the folder, while it is open.
    """

    lock: FolderLock

    def __init__(self, final: Path):
        self.final = follow_links(final)  # a link stays one, and what it points at is replaced
        self.path = get_work_path(self.final)
        self.pieces = self.path / WORK_FOLDER

    def agree_on(self, plan: dict[str, Any]) -> None:
        """Record what is being made, or check that it is the same.

        Raises:
            UserError: the folder was begun with other settings, another source or another tokenizer.
        """
        plan = json.loads(json.dumps({"version": WORK_VERSION, **plan}))
        path = self.path / PLAN_NAME
        if not path.exists():
            write_json(path, plan)
            return
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            then, now = begun.pop("settings"), plan["settings"]
            changes = list_changes(then, {name: value for name, value in now.items() if name in then})
            has_changed = begun.pop("corpus_state", None) != plan["corpus_state"]
            changes += [name for name, value in begun.items() if value != plan[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise_if_refused(error, path)
            raise UserError(f"{path} is damaged ({error}): --overwrite starts afresh") from error
        if changes:
            raise UserError(
                f"{self.path} was begun with other settings: {', '.join(changes)}. Give those again to go on, or "
                "--overwrite to start afresh, or another --output_dir"
            )
        if has_changed:
            raise UserError(
                f"the files of the corpus have changed since {self.path} was begun: --overwrite starts afresh"
            )
        if then != now:
            write_json(path, plan)

    def is_complete(self) -> bool:
        """Return whether everything is there but the final name."""
        return (self.path / MANIFEST_NAME).exists()

    def reopen_planning(self) -> None:
        """Let the next run change the settings of the splits, because the present ones do not fit the corpus."""
        path = self.path / PLAN_NAME
        plan = json.loads(path.read_text(encoding="utf-8"))
        plan["settings"] = {name: value for name, value in plan["settings"].items() if name not in PLANNING_SETTINGS}
        write_json(path, plan)

    def publish(self) -> None:
        """Remove the pieces, synchronize the rest to disk, and give the folder its final name.

        Killed at any moment, it can be called again: the manifest marks the folder as complete, the plan shows whose
        it is, and in the folder with the final name the plan shows that `finish_publishing` is still due.
        """
        _remove(self.pieces)
        sync_tree(self.path)
        old = take_name(self.path, self.final)
        if old is not None and self.final.is_symlink():  # so was the work folder: no later run will look here
            shutil.rmtree(old)
        finish_publishing(self.final)


def finish_publishing(final: Path) -> None:
    """Remove leftovers, also those of a killed run, once `final` has its name."""
    final = follow_links(final)
    restore_folder(final)
    if not ((final / PLAN_NAME).exists() and (final / MANIFEST_NAME).exists() and find_foreign_file(final) is None):
        return
    sync_folder(final.parent)
    work_path = get_work_path(final)
    if work_path.is_dir():  # what had the name before, unless another process works there
        with _build_lock(work_path, alone=True):
            if not (work_path / PLAN_NAME).exists():
                set_aside(work_path, final)
    restore_folder(final)
    for name in (LOCK_NAME, PLAN_NAME):
        (final / name).unlink(missing_ok=True)
    sync_folder(final)


def get_work_path(final: Path) -> Path:
    """Return where the shards of the folder `final` are made."""
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def list_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return which of the settings `now` were others `then`, with the value that each had."""
    return [f"{name} ({then.get(name)} there)" for name, value in now.items() if then.get(name) != value]


def count_finished_pieces(final: Path) -> int:
    """Return how many pieces earlier runs have finished for the folder `final`."""
    return len(list((get_work_path(follow_links(final)) / WORK_FOLDER).glob("*.json")))


def load_begun_revision(final: Path, settings: dict[str, Any]) -> str | None:
    """Return the dataset's commit in an unfinished run for the folder `final` with `settings`; `None` without one."""
    try:
        begun = json.loads((get_work_path(follow_links(final)) / PLAN_NAME).read_text(encoding="utf-8"))
        same = all(settings.get(name) == value for name, value in begun["settings"].items())
        return begun["source"].get("revision") if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def open_work_folder(
    final: Path, plan: dict[str, Any], *, alone: bool, overwrite: bool = False
) -> Generator[WorkFolder]:
    """Lock the work folder of `final`, made where it is missing and emptied for `overwrite`, and agree on `plan`.

    On an exception finished pieces are kept; a folder without any is removed.

    Args:
        plan: what is made there (see `WorkFolder.agree_on`).
        alone: lock out all other processes, not only those that want to be alone.

    Raises:
        UserError: another process works there, it was begun with another plan, or it holds other files.
    """
    work = WorkFolder(final)
    _check_is_free(work.path)
    with _build_lock(work.path, alone) as work.lock:
        _check_is_free(work.path)  # another process may just have put there what it replaced
        if overwrite:
            for path in work.path.iterdir():
                if path.is_dir():
                    _remove(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
        work.agree_on(plan)
        if not alone:
            work.lock.share()
        make_folder(work.pieces)
        if alone:
            for path in work.pieces.glob(f"*.{'[0-9a-f]' * 32}"):  # half written by killed workers
                path.unlink()
        try:
            yield work
        except BaseException:
            if alone and not work.is_complete() and work.pieces.is_dir() and not list(work.pieces.glob("*.json")):
                shutil.rmtree(follow_links(work.path))
            raise


def _remove(path: Path) -> None:
    """Delete a folder, and the link if `path` is a link to it."""
    shutil.rmtree(follow_links(path))
    if path.is_symlink():
        path.unlink()


def _check_is_free(work_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        foreign = find_foreign_file(work_path)
        if foreign is None and not (work_path / PLAN_NAME).exists():
            foreign = next((path.name for path in sorted(work_path.glob("*.npy"))), None)
        if foreign is not None:
            raise UserError(
                f"{work_path} is where the shards would be made, and holds {foreign}, which is of something else: "
                "give another --output_dir"
            )


def _build_lock(folder: Path, alone: bool) -> FolderLock:
    return FolderLock(folder, LOCK_NAME, "another prepare_data.py is working on", is_shared=not alone)


@contextlib.contextmanager
def create_file(path: Path) -> Generator[IO[bytes]]:
    """Open a file that gets its name once it is complete.

    Its temporary name is unique, because the same task may run twice at once. Nothing waits for the disk: digests show
    what a loss of power destroyed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON."""
    with create_file(path) as stream:
        stream.write(json.dumps(dataclasses.asdict(record)).encode())


def load_record(path: Path, kind: type) -> Any:
    """Read a dataclass `kind` that `save_record` wrote; `None` if the file is missing or damaged.

    Raises:
        RefusedError: the machine does not let it be read.
    """
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise_if_refused(error, path)
        return None
