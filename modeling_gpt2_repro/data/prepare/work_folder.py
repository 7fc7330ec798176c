"""The work folder, `NAME.partial` beside the final `NAME`, in which shards are built: its plan, lock and publication.

It outlives its processes: a killed run resumes from the finished pieces, and several processes, also on different
machines that share the file system, may each contribute a share of the pieces.

    plan.json       what is being built: settings, source and tokenizer; later runs must match
    lock            shared by processes that work on a share, exclusive for one that does all remaining work
    unfinished/     finished pieces of both stages
    *.npy           the shards
    tokenizer/, text_bytes.npy
                    the other files of the data folder
"""

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from ...core.errors import UserError, raise_if_unreadable
from ...core.files import (
    TEMPORARY_SUFFIX,
    follow_links,
    make_folder,
    rename_over,
    restore_folder,
    set_aside,
    sync_folder,
    sync_tree,
    write_json,
)
from ...core.locks import FolderLock
from ..shards import LOCK_NAME, MANIFEST_NAME, PLAN_NAME, WORK_FOLDER, find_foreign_file

# Version of the pieces' format. Increment it with every change, to keep an upgrade from resuming with old pieces.
WORK_VERSION = 3
# Settings that can be validated only after the corpus was read: a run that fails on them may be repeated with others.
PLANNING_SETTINGS = ("shard_size", "val_tokens")


class WorkFolder:
    """A work folder locked by this process.

    Attributes:
        path: the folder, in which the shards are written.
        pieces: the folder of finished pieces.
        lock: the folder's lock, while it is open.
    """

    lock: FolderLock

    def __init__(self, final: Path):
        self.final = follow_links(final)  # a link is kept, and its target is replaced
        self.path = get_work_path(self.final)
        self.pieces = self.path / WORK_FOLDER

    def agree_on(self, plan: dict[str, Any]) -> None:
        """Record the plan, or check that the recorded one is the same.

        Raises:
            UserError: the folder was started with different settings, another source or another tokenizer.
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
            raise_if_unreadable(error, path)
            raise UserError(f"{path} is damaged ({error}): start over with --overwrite") from error
        if changes:
            raise UserError(
                f"{self.path} was started with different settings: {', '.join(changes)}; resume with those, start "
                "over with --overwrite, or choose another --output_dir"
            )
        if has_changed:
            raise UserError(
                f"the files of the corpus changed since {self.path} was started: start over with --overwrite"
            )
        if then != now:
            write_json(path, plan)

    def is_complete(self) -> bool:
        """Return whether the folder is complete except for its final name."""
        return (self.path / MANIFEST_NAME).exists()

    def reopen_planning(self) -> None:
        """Let the next run change the settings of the splits, because the current ones do not fit the corpus."""
        path = self.path / PLAN_NAME
        plan = json.loads(path.read_text(encoding="utf-8"))
        plan["settings"] = {name: value for name, value in plan["settings"].items() if name not in PLANNING_SETTINGS}
        write_json(path, plan)

    def publish(self) -> None:
        """Delete the pieces, sync the rest to disk, and rename the folder to its final name.

        Idempotent, even if killed at any moment: the manifest marks the folder as complete, the plan identifies its
        request, and a plan in the final folder shows that `finish_publishing` is still due.
        """
        _remove(self.pieces)
        sync_tree(self.path)
        old = rename_over(self.path, self.final)
        if old is not None and self.final.is_symlink():  # the work folder was a link too: no later run looks here
            shutil.rmtree(old)
        finish_publishing(self.final)


def finish_publishing(final: Path) -> None:
    """Delete leftovers, including those of a killed run, after `final` was renamed into place."""
    final = follow_links(final)
    restore_folder(final)
    if not ((final / PLAN_NAME).exists() and (final / MANIFEST_NAME).exists() and find_foreign_file(final) is None):
        return
    sync_folder(final.parent)
    work_path = get_work_path(final)
    if work_path.is_dir():  # the folder that was replaced, unless another process is working there
        with _build_lock(work_path, alone=True):
            if not (work_path / PLAN_NAME).exists():
                set_aside(work_path, final)
    restore_folder(final)
    for name in (LOCK_NAME, PLAN_NAME):
        (final / name).unlink(missing_ok=True)
    sync_folder(final)


def get_work_path(final: Path) -> Path:
    """Return the path of the work folder for the folder `final`."""
    return final.with_name(final.name + TEMPORARY_SUFFIX)


def list_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the settings in `now` that differ from `then`, each with both values."""
    return [f"{name} (was {then.get(name)}, now {value})" for name, value in now.items() if then.get(name) != value]


def count_finished_pieces(final: Path) -> int:
    """Return the number of pieces that earlier runs have finished for the folder `final`."""
    return len(list((get_work_path(follow_links(final)) / WORK_FOLDER).glob("*.json")))


def load_begun_revision(final: Path, settings: dict[str, Any]) -> str | None:
    """Return the dataset commit of an unfinished run for `final` with the same `settings`; `None` if there is none."""
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
    """Lock the work folder of `final`, creating it if missing and emptying it for `overwrite`, and agree on `plan`.

    On an exception finished pieces are kept; a folder without any is removed.

    Args:
        plan: what is being built (see `WorkFolder.agree_on`).
        alone: lock out all other processes, not only those that request to be alone.

    Raises:
        UserError: another process is working there, or the folder has another plan or contains foreign files.
    """
    work = WorkFolder(final)
    _check_is_free(work.path)
    with _build_lock(work.path, alone) as work.lock:
        _check_is_free(work.path)  # another process may just have moved a replaced folder here
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
            for path in work.pieces.glob(f"*.{'[0-9a-f]' * 32}"):  # partial files of killed workers
                path.unlink()
        try:
            yield work
        except BaseException:
            if alone and not work.is_complete() and work.pieces.is_dir() and not list(work.pieces.glob("*.json")):
                shutil.rmtree(follow_links(work.path))
            raise


def _remove(path: Path) -> None:
    """Delete a folder and, if `path` is a link to it, the link."""
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
                f"{work_path}, the work folder of this --output_dir, contains {foreign}, which does not belong to it: "
                "choose another --output_dir"
            )


def _build_lock(folder: Path, alone: bool) -> FolderLock:
    return FolderLock(folder, LOCK_NAME, "another prepare_data.py is working on", is_shared=not alone)


@contextlib.contextmanager
def create_file(path: Path) -> Generator[IO[bytes]]:
    """Open a file that is renamed to `path` once it is complete.

    The temporary name is unique, because a task may run twice concurrently. There is no fsync: digests reveal files
    lost in a power failure.
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
    """Write a dataclass instance as JSON."""
    with create_file(path) as stream:
        stream.write(json.dumps(dataclasses.asdict(record)).encode())


def load_record(path: Path, kind: type) -> Any:
    """Load a dataclass of type `kind` written by `save_record`; return `None` if the file is missing or damaged.

    Raises:
        UnreadableError: a permission, a resource limit or the disk prevented the read.
    """
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise_if_unreadable(error, path)
        return None
