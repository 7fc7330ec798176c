"""A folder has one writer: a lock file that names the process which holds it.

The kernel's lock on the file (flock) ends with the process, whatever ended it. It may not reach another machine that
shares the folder, or not exist there; so the holder writes a heartbeat into the file, and is taken for dead by other
machines once that has been silent for `SILENCE_SECONDS`.
"""

import contextlib
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.files import LockState, follow_links, is_file_at, make_folder, try_lock

HEARTBEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
# The children of a process that was killed hold its lock until they have noticed.
PATIENCE_SECONDS = 3.0
FILE_BYTES = 512


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    Attributes:
        host: the machine's name, for people.
        machine: tells one boot of a machine, and one container's process ids, from another.
        process_id: on that machine.
        since: when it took the lock, and `heartbeat` when it last said that it has it, in seconds since 1970.
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
        """Whether this machine knows if the process exists."""
        return self.machine == identify_machine()

    def is_same(self, other: "Holder") -> bool:
        """Tell whether two are one, heartbeats aside."""
        return replace(self, heartbeat=other.heartbeat) == other


class FolderLock:
    """The right of one process to write to a folder, by a file in it. A context, too.

    Args:
        folder: made where it is missing.
        name: of the file.
        what: what a process that holds it does to the folder, for the message to others.
        is_shared: others may share it, once `share` has been called. Heartbeats do not count then.
        say: told of a wait, and of a file system on which a shared lock keeps nobody out.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        what: str,
        *,
        is_shared: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.folder, self.path, self.what = folder, follow_links(folder / name), what
        self.is_shared, self._say = is_shared, say
        self._holder: Holder | None = None
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._turns = itertools.cycle((True, False))
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, unless it is taken already; at once where its holder has died on this machine.

        Where the holder is on another machine, wait for its next heartbeat, or for `SILENCE_SECONDS` without one.

        Raises:
            UserError: another process holds it.
        """
        if self._descriptor is not None:
            return
        self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        started = time.monotonic()
        first = read_holder(self.path)
        while not self._try_to_take(time.monotonic() - started):
            holder, waited = read_holder(self.path), time.monotonic() - started
            if holder is not None and not holder.is_here and not self.is_shared and waited < 2 * SILENCE_SECONDS:
                if holder != first:
                    self._refuse(holder)
                if waited < 1:
                    self._say(f"{self.path} is of {holder}: waiting up to {SILENCE_SECONDS:.0f} s for a sign of it")
                time.sleep(1)
            elif waited > PATIENCE_SECONDS:
                self._refuse(holder)
            time.sleep(0.05)

    def _refuse(self, holder: Holder | None) -> NoReturn:
        who = f": {holder}" if holder is not None else ""
        raise UserError(f"{self.what} {self.folder}{who}. Wait for it, or stop it")

    def _try_to_take(self, waited: float) -> bool:
        """Take the lock if it is free, also of a holder on another machine that was silent while this one waited."""
        for folder in (self.folder, self.path.parent):  # not the same where the file is a link
            make_folder(folder)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        # Others may share it, but whoever comes first has it alone for a while.
        state = try_lock(descriptor, is_exclusive=not self.is_shared or next(self._turns))
        # If not, whoever had the lock has just removed it, or moved the folder.
        if is_file_at(descriptor, self.path):
            holder = read_holder(self.path)
            if self._is_free(state, holder, waited):
                if state != "held":
                    return self._take(descriptor, state)
                self.path.unlink(missing_ok=True)  # of a machine that has died, and nobody else would release it
        os.close(descriptor)
        return False

    def _is_free(self, state: LockState, holder: Holder | None, waited: float) -> bool:
        if self.is_shared or holder is None:
            return state != "held"
        is_silent = max(time.time() - holder.heartbeat, waited) > SILENCE_SECONDS
        if not holder.is_here:
            return is_silent
        return state == "ours" or (state == "unsupported" and (is_silent or not _exists(holder)))

    def _take(self, descriptor: int, state: LockState) -> bool:
        now = time.time()
        self._descriptor = descriptor
        self._write(Holder(platform.node(), identify_machine(), os.getpid(), now, now))
        if state == "unsupported":
            if self.is_shared:
                self._say(f"the file system of {self.folder} has no locks: see that nothing else works there")
                return True
            time.sleep(0.2)  # another process may have found it free in the same moment: the last to write has it
            if not self.is_ours():
                os.close(descriptor)
                self._descriptor = None
                return False
        return True

    def share(self) -> None:
        """Let others share a lock that was taken to be shared."""
        try_lock(self._descriptor, is_exclusive=False)

    def beat(self) -> None:
        """Write a heartbeat, if one is due and the lock is still this process's."""
        if time.time() - self._holder.heartbeat >= HEARTBEAT_SECONDS and self.is_ours():
            with contextlib.suppress(OSError):  # a disk that is full may have room at the next beat
                self._write(replace(self._holder, heartbeat=time.time()))

    def start_beating(self, on_beat: Callable[[], None] = lambda: None) -> None:
        """Write heartbeats from a thread, until the release, and call `on_beat` after each."""

        def go_on() -> None:
            while not self._end.wait(HEARTBEAT_SECONDS):
                self.beat()
                on_beat()

        self._thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def describe_holder(self) -> dict[str, str | int]:
        """Return, as JSON, by what others can tell whether this process is alive."""
        return {
            "host": self._holder.host,
            "process_id": self._holder.process_id,
            "since": format_time(self._holder.since),
            "heartbeat": format_time(self._holder.heartbeat),
        }

    def is_ours(self) -> bool:
        """Tell whether no other process has taken the lock meanwhile, as from one that was suspended for long."""
        found = read_holder(self.path)
        return found is None or found.is_same(self._holder)

    def check(self) -> None:
        """Raise a `UserError` where another process has taken the lock."""
        if not self.is_ours():
            raise UserError(
                f"{self.folder} was taken over by {read_holder(self.path)}: this process had given no sign of itself "
                f"for {SILENCE_SECONDS:.0f} s"
            )

    def release(self) -> None:
        """Let others have the lock, if this process has it, and remove the folder if it was made for nothing else."""
        if self._descriptor is None:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if is_file_at(self._descriptor, self.path) and self.is_ours():
                if self.is_shared:  # others may go on
                    os.truncate(self._descriptor, 0)
                else:
                    self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
        with contextlib.suppress(OSError):  # of a folder that is not empty
            for folder in self._made:
                folder.rmdir()

    def _write(self, holder: Holder) -> None:
        # At once and always as long, so that nobody reads half of it; JSON may end in blanks.
        content = json.dumps(asdict(holder)).encode()
        os.pwrite(self._descriptor, content.ljust(FILE_BYTES - 1) + b"\n", 0)
        self._holder = holder


def read_holder(path: Path) -> Holder | None:
    """Read who holds a lock; `None` where nobody does, or has not said so yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def identify_machine() -> str:
    """Return what tells this boot of this machine, and this container's process ids, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def format_time(seconds: float) -> str:
    """Write a time, in seconds since 1970, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _exists(holder: Holder) -> bool:
    """Tell whether a process of this machine exists, going by its heartbeat where the system cannot be asked."""
    if os.name != "posix":  # signal 0 would end it
        return time.time() - holder.heartbeat < SILENCE_SECONDS
    try:
        os.kill(holder.process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
