"""One writer per folder: a lock file that identifies the process holding it.

The kernel releases the lock (flock) however its process ends. But flock may not be visible to other machines that
share the folder, or not be supported by the file system. The holder therefore writes a heartbeat into the file, and
other machines consider it dead after `SILENCE_SECONDS` without one.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from .errors import UserError
from .files import LockState, follow_links, is_file_at, make_folder, try_lock
from .optional import not_none

HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
# Child processes of a killed holder keep its lock until they notice.
PATIENCE_SECONDS = 3.0
FILE_BYTES = 512


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as recorded in the lock file. Times are in seconds since 1970.

    Attributes:
        host: name of the machine, for messages.
        machine: identifies one boot of the machine and one process-id namespace (see `identify_machine`).
        process_id: in that namespace.
        since: when the process acquired the lock.
        heartbeat: when it last confirmed that it holds the lock.
    """

    host: str
    machine: str
    process_id: int
    since: float
    heartbeat: float

    def __str__(self) -> str:
        return f"process {self.process_id} on {self.host}, since {format_time(self.since)}"

    @property
    def is_here(self) -> bool:
        """Whether the process runs on this machine, where its existence can be checked."""
        return self.machine == identify_machine()


class FolderLock:
    """A lock file that grants the exclusive right to write to a folder. Also a context manager.

    Args:
        folder: created if missing.
        name: of the lock file.
        what: start of the error message that other processes get, up to the folder ("another x is working on").
        is_shared: allow other holders once `share` is called; heartbeats are then ignored.
        say: called with a notice before a wait, and if the file system does not support a shared lock.
    """

    def __init__(
        self, folder: Path, name: str, what: str, *, is_shared: bool = False, say: Callable[[str], None] = print
    ):
        self.folder, self.path, self.what = folder, follow_links(folder / name), what
        self.is_shared, self._say = is_shared, say
        self._holder: Holder  # set when the lock is taken
        self._descriptor: int | None = None
        self._created: list[Path] = []
        self._is_released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the lock, unless this process holds it; immediately if the holder died on this machine.

        If the holder is on another machine, wait for its next heartbeat, or for `SILENCE_SECONDS` without one.

        Raises:
            UserError: another process holds the lock.
        """
        if self._descriptor is not None:
            return
        self._created = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        started, first = time.monotonic(), read_holder(self.path)
        while not self._try_to_take(waited := time.monotonic() - started):
            holder = read_holder(self.path)
            is_elsewhere = holder is not None and not holder.is_here and not self.is_shared
            if is_elsewhere and holder == first and waited < 2 * SILENCE_SECONDS:
                if waited < 1:
                    self._say(f"{self.path} is held by {holder}: waiting {SILENCE_SECONDS:.0f} s for a heartbeat")
                time.sleep(1)
            elif is_elsewhere or waited > PATIENCE_SECONDS:
                who = f": {holder}" if holder is not None else ""
                raise UserError(f"{self.what} {self.folder}{who}: wait for it to finish, or stop it")
            time.sleep(0.05)

    def _try_to_take(self, waited: float) -> bool:
        """Acquire the lock if it is free, or if its holder on another machine sent no heartbeat during the wait."""
        for folder in (self.folder, self.path.parent):  # they differ if the lock file is a link
            make_folder(folder)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        state = try_lock(descriptor)
        if state == "held" and self.is_shared:  # the first holder has it exclusively until it calls `share`
            state = try_lock(descriptor, is_exclusive=False)
        # If the path refers to another file now, the holder just removed this one or moved its folder.
        is_free = is_file_at(descriptor, self.path) and self._is_free(state, read_holder(self.path), waited)
        if is_free and state == "held":
            self.path.unlink(missing_ok=True)  # the holder's machine is dead: nobody else would release it
        elif is_free and self._sign(descriptor, state):
            self._descriptor = descriptor
            return True
        os.close(descriptor)
        return False

    def _is_free(self, state: LockState, holder: Holder | None, waited: float) -> bool:
        if self.is_shared or holder is None or (holder.is_here and state != "unsupported"):
            return state != "held"
        is_silent = max(time.time() - holder.heartbeat, waited) > SILENCE_SECONDS
        return is_silent or (holder.is_here and not psutil.pid_exists(holder.process_id))

    def _sign(self, descriptor: int, state: LockState) -> bool:
        """Record this process in the lock file, and return whether it holds the lock."""
        now = time.time()
        self._write(descriptor, Holder(platform.node(), identify_machine(), os.getpid(), now, now))
        if state == "unsupported" and self.is_shared:
            self._say(f"the file system of {self.folder} has no locks: make sure that no other process writes there")
        elif state == "unsupported":
            time.sleep(0.2)  # if several processes found it free at the same time, the last to write wins
            return self.is_ours()
        return True

    def share(self) -> None:
        """Allow other holders of a lock that was created with `is_shared`."""
        try_lock(not_none(self._descriptor), is_exclusive=False)

    def beat(self) -> None:
        """Write a heartbeat if one is due and this process still holds the lock."""
        if time.time() - self._holder.heartbeat >= HEARTBEAT_SECONDS and self.is_ours():
            with contextlib.suppress(OSError):  # a full disk may have space by the next heartbeat
                self._write(not_none(self._descriptor), replace(self._holder, heartbeat=time.time()))

    def start_beating(self, on_beat: Callable[[], None]) -> None:
        """Write heartbeats from a thread until `release`, calling `on_beat` after each."""

        def keep_beating() -> None:
            while not self._is_released.wait(HEARTBEAT_SECONDS):
                self.beat()
                on_beat()

        self._thread = threading.Thread(target=keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def describe_holder(self) -> dict[str, str | int]:
        """Return a JSON-compatible record from which others can see whether this process is alive."""
        return {
            "host": self._holder.host,
            "process_id": self._holder.process_id,
            "since": format_time(self._holder.since),
            "heartbeat": format_time(self._holder.heartbeat),
        }

    def is_ours(self) -> bool:
        """Return whether this process still holds the lock: another may have taken it during a long suspension."""
        found = read_holder(self.path)
        return found is None or replace(found, heartbeat=self._holder.heartbeat) == self._holder

    def check(self) -> None:
        """Check that this process still holds the lock.

        Raises:
            UserError: another process has taken the lock.
        """
        if not self.is_ours():
            raise UserError(
                f"{self.folder} was taken over by {read_holder(self.path)}: this process had written no heartbeat for "
                f"{SILENCE_SECONDS:.0f} s"
            )

    def release(self) -> None:
        """Release the lock if this process holds it, and remove folders that it created and that are empty."""
        if self._descriptor is None:
            return
        self._is_released.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if is_file_at(self._descriptor, self.path) and self.is_ours():
                if self.is_shared:  # others may still hold it
                    os.truncate(self._descriptor, 0)
                else:
                    self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):  # not empty
            for folder in self._created:
                folder.rmdir()

    def _write(self, descriptor: int, holder: Holder) -> None:
        # A single write of constant length, so that no reader sees half of it; JSON allows trailing spaces.
        content = json.dumps(asdict(holder)).encode()
        os.pwrite(descriptor, content.ljust(FILE_BYTES - 1) + b"\n", 0)
        self._holder = holder


def read_holder(path: Path) -> Holder | None:
    """Return the holder of a lock; `None` if there is none, or it has not been recorded yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def identify_machine() -> str:
    """Return an identifier of this boot of this machine, and of this container's process-id namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def format_time(seconds: float) -> str:
    """Format seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
