"""A folder has one writer at a time, which can be identified, and whose death releases the folder."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modeling_gpt2_repro.core import files, locks
from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.locks import FolderLock, Holder, read_holder

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shorten the wait for a lock, its heartbeat, and the silence after which a machine counts as dead."""
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(locks, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.5)


@pytest.fixture
def without_flock(monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)


def build_lock(folder: Path, messages: list[str] | None = None, **options) -> FolderLock:
    return FolderLock(
        folder, "lock", "somebody writes to", say=(messages if messages is not None else []).append, **options
    )


@contextlib.contextmanager
def another_holder(folder: Path, after: Callable[[FolderLock], object] = lambda lock: None) -> Iterator[int]:
    """Hold the lock in another process, and yield that process's id."""

    def hold():
        lock = build_lock(folder)
        lock.acquire()
        after(lock)
        held.set()
        time.sleep(60)

    held = FORK.Event()
    process = FORK.Process(target=hold)
    process.start()
    try:
        assert held.wait(30)
        yield process.pid
    finally:
        process.kill()
        process.join()


def write_foreign_lock(folder: Path, **changes) -> Holder:
    """Write a lock file from another machine, without the kernel's lock."""
    now = time.time()
    holder = Holder("node7", "another boot", 123, now - 60, now)
    holder = dataclasses.replace(holder, **changes)
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    with another_holder(tmp_path) as process_id, pytest.raises(UserError) as caught:
        build_lock(tmp_path).acquire()
    assert f"somebody writes to {tmp_path}: process {process_id} on {os.uname().nodename}, since 20" in str(
        caught.value
    )


def test_a_released_lock_is_free_and_leaves_no_files(tmp_path):
    for _ in range(2):
        lock = build_lock(tmp_path)
        lock.acquire()
        lock.acquire()
        assert read_holder(tmp_path / "lock").process_id == os.getpid()
        lock.release()
        lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_used", [False, True])
def test_a_folder_created_for_the_lock_is_removed_unless_used(tmp_path, is_used):
    lock = build_lock(tmp_path / "runs" / "run")
    lock.acquire()
    if is_used:
        (tmp_path / "runs" / "run" / "config.yaml").touch()
    lock.release()
    assert (tmp_path / "runs").exists() == is_used


@pytest.mark.parametrize("fixture", [None, "without_flock"])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, request, fixture):
    if fixture:
        request.getfixturevalue(fixture)
    with another_holder(tmp_path) as process_id:
        os.kill(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)
        started = time.monotonic()
        build_lock(tmp_path).acquire()
        assert time.monotonic() - started < 1
    assert read_holder(tmp_path / "lock").process_id == os.getpid()


def test_without_file_system_locks_the_holder_is_found_by_process_id(tmp_path, without_flock):
    with another_holder(tmp_path) as process_id, pytest.raises(UserError, match=f"process {process_id} on"):
        build_lock(tmp_path).acquire()


def test_a_machine_without_recent_heartbeat_counts_as_dead(tmp_path):
    write_foreign_lock(tmp_path, heartbeat=time.time() - 4)
    messages: list[str] = []
    build_lock(tmp_path, messages).acquire()
    assert messages == [] and read_holder(tmp_path / "lock").is_here


@pytest.mark.parametrize("ahead", [0, 3600], ids=["same clock", "clock ahead"])
def test_a_machine_with_a_recent_heartbeat_is_waited_for(tmp_path, ahead):
    write_foreign_lock(tmp_path, heartbeat=time.time() + ahead)
    messages: list[str] = []
    started = time.monotonic()
    build_lock(tmp_path, messages).acquire()
    assert 2 < time.monotonic() - started < 6
    assert len(messages) == 1 and "process 123 on node7" in messages[0]


def test_a_machine_that_renews_its_heartbeat_keeps_its_lock(tmp_path):
    holder = write_foreign_lock(tmp_path)

    def send_heartbeat():
        time.sleep(0.5)
        write_foreign_lock(tmp_path, since=holder.since, heartbeat=time.time())

    process = FORK.Process(target=send_heartbeat)
    process.start()
    with pytest.raises(UserError, match="process 123 on node7"):
        build_lock(tmp_path).acquire()
    process.join()


def test_a_dead_machines_lock_on_the_file_server_is_overridden(tmp_path):
    with another_holder(tmp_path, lambda lock: write_foreign_lock(tmp_path, heartbeat=time.time() - 4)):
        lock = build_lock(tmp_path)
        lock.acquire()
        assert read_holder(tmp_path / "lock").is_here and lock.is_ours()


def test_a_writer_suspended_for_too_long_learns_that_it_lost_the_lock(tmp_path):
    lock = build_lock(tmp_path)
    lock.acquire()
    lock.check()
    write_foreign_lock(tmp_path)
    with pytest.raises(UserError, match="taken over by process 123 on node7"):
        lock.check()
    lock.beat()
    lock.release()
    assert read_holder(tmp_path / "lock").host == "node7"


def test_heartbeats_are_renewed_and_recorded(tmp_path):
    lock, beats = build_lock(tmp_path), []
    lock.acquire()
    first = lock.describe_holder()
    lock.start_beating(lambda: beats.append(read_holder(tmp_path / "lock").heartbeat))
    time.sleep(1.8)
    lock.release()
    assert len(beats) >= 2 and beats == sorted(set(beats))
    assert lock.describe_holder().items() >= {name: first[name] for name in ("host", "process_id", "since")}.items()


def test_shared_holders_exclude_an_exclusive_one(tmp_path):
    several = [build_lock(tmp_path, is_shared=True) for _ in range(2)]
    for lock in several:
        lock.acquire()
        lock.share()
    alone = build_lock(tmp_path)
    for lock in several:
        with pytest.raises(UserError):
            alone.acquire()
        lock.release()
    alone.acquire()
    with pytest.raises(UserError):
        several[0].acquire()
