"""The worker pool: the order of results, and the other calls when one fails."""

import contextlib
import multiprocessing
import threading
import time

import pytest

from modeling_gpt2_repro.data.prepare.workers import WorkerPool, is_over


def touch(folder, number):
    if number == 1:
        raise ValueError("call 1")
    time.sleep(0.2 if number > 1 else 0)
    (folder / str(number)).touch()
    return number


@pytest.fixture(params=[1, 2])
def pool(request, tmp_path):
    pool = WorkerPool(request.param, tmp_path)
    yield pool
    pool.shut_down()


def test_results_come_in_the_order_of_the_calls(pool):
    calls = [(number,) for number in (5, 0, 4, 0, 0)]
    assert list(pool.map_in_order(touch, calls)) == [5, 0, 4, 0, 0]


def test_a_failed_call_starts_no_others(pool, tmp_path):
    results = pool.map_in_order(touch, ((number,) for number in range(20)))
    assert next(results) == 0
    with pytest.raises(ValueError, match="call 1"):
        next(results)
    time.sleep(0.3)
    # The two calls that ran at the same time have ended; those still in the queue were not started.
    started_calls = {int(path.name) for path in tmp_path.iterdir()}
    assert started_calls <= {0, 2, 3}
    assert list(pool.map_in_order(touch, [(7,)])) == [7]


def work_for_long(folder, number):
    deadline = time.monotonic() + 30
    while number > 0 and time.monotonic() < deadline and not is_over():
        (folder / "started").touch()
        time.sleep(0.01)
    return is_over()


def test_a_call_learns_that_its_result_is_no_longer_needed(tmp_path):
    pool = WorkerPool(2, tmp_path)
    started = time.monotonic()
    results = pool.map_in_order(work_for_long, [(0,), (1,)])
    assert next(results) is False
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    results.close()
    assert time.monotonic() - started < 20
    pool.shut_down()


def fail_to_start(*_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("name", ["_ExecutorManagerThread", "QueueFeederThread", "ExitWithParent"])
def test_a_failure_to_start_threads_is_raised_and_leaves_no_worker(monkeypatch, name):
    start = threading.Thread.start

    def start_others(thread):
        if name in (type(thread).__name__, thread.name):
            fail_to_start()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    others = set(multiprocessing.active_children())
    pool = WorkerPool(2, "1")
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(pool.map_in_order(int, [()] * 9))
    with contextlib.suppress(RuntimeError):
        pool.shut_down()
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(10)
        assert worker.exitcode is not None
    assert threading.excepthook is threading.__excepthook__
