"""A pool of worker processes whose results come in the order of the calls."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

from ...core.errors import UserError
from ...core.stop_signals import STOP_SIGNALS

# Calls in flight for each worker: enough that no worker waits for its next one, few enough that little is wasted when
# the results so far turn out to be all that is needed.
CALLS_PER_WORKER = 2
POLL_SECONDS = 0.2

# A forked worker starts at once, while a spawned one imports torch again (seconds). Only Linux forks safely.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def _build_signals(num_workers: int) -> SimpleNamespace:
    """Build the memory that the processes share; plain memory for a single process.

    Returns:
        `is_over.value`, whether nobody waits for the results any more, and `progress.value`, the sum of what
        `add_progress` was called with.
    """
    if num_workers == 1:
        progress = SimpleNamespace(value=0, get_lock=contextlib.nullcontext)
        return SimpleNamespace(is_over=SimpleNamespace(value=False), progress=progress)
    context = multiprocessing.get_context(START_METHOD)
    return SimpleNamespace(is_over=context.Value("b", False), progress=context.Value("q", 0))


# Of the process that makes the calls.
_signals = _build_signals(1)
_shared: Any = None
_failure: Exception | None = None


def is_over() -> bool:
    """Return, during a call, whether nobody waits for its result any more."""
    return bool(_signals.is_over.value)


def add_progress(amount: int) -> None:
    """Report, during a call, how much has been done since the last report."""
    with _signals.progress.get_lock():
        _signals.progress.value += amount


class WorkerPool:
    """Calls functions in `num_workers` processes, or in this one if that is 1 or if they can share no memory.

    Args:
        num_workers: processes.
        shared: the first argument of every call; each worker receives it once.
        on_wait: called here, with the progress so far, again and again while a result is waited for.
    """

    def __init__(self, num_workers: int, shared: Any, on_wait: Callable[[int], None] = lambda progress: None):
        try:
            self._signals = _build_signals(num_workers)
        except OSError:  # shared memory lies in /dev/shm, which a container may lack
            print("no shared memory (/dev/shm) can be had for more processes: a single one does the work", flush=True)
            num_workers = 1
            self._signals = _build_signals(1)
        self._num_workers = num_workers
        self._on_wait = on_wait
        self._executor = None
        self._thread_error: BaseException | None = None
        self._others = set(multiprocessing.active_children())
        if num_workers == 1:
            _set_state(self._signals, shared)
        else:
            # If the machine refuses one of the executor's own threads another, it dies, and no result would ever come.
            threading.excepthook = self._note_thread_error
            self._executor = concurrent.futures.ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context(START_METHOD),
                initializer=_initialize,
                initargs=(self._signals, shared),
            )

    def map_in_order(self, function: Callable, calls: Iterable[tuple]) -> Iterator[Any]:
        """Yield `function(shared, *call)` for each call, in order; calls are requested as workers come free.

        An exception of a call, or of `calls` itself, is raised where its result would have come, so that a caller who
        stops before it never sees it. When it is raised, or the caller stops, no other call begins, and running ones
        are waited for: they check `is_over` now and then and give up.
        """
        if self._executor is None:
            for call in calls:
                result = _call(function, call)
                self._on_wait(self._signals.progress.value)
                yield result
            return
        futures = self._submit(function, calls)
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            pending.extend(itertools.islice(futures, CALLS_PER_WORKER * self._num_workers))
            while pending:
                yield self._wait(pending.popleft())
                pending.extend(itertools.islice(futures, 1))
        finally:
            self._signals.is_over.value = True  # `cancel` does not reach calls in the queue between the processes
            for future in pending:
                future.cancel()
            if self._thread_error is None:
                concurrent.futures.wait(pending)
            self._signals.is_over.value = False

    def shut_down(self) -> None:
        """End the workers."""
        if self._executor is None:
            return
        self._signals.is_over.value = True
        threading.excepthook = threading.__excepthook__
        try:
            self._executor.shutdown(cancel_futures=True)
        finally:
            # If the machine refused a worker, or the thread that manages them, nothing ends the others, and Python
            # would wait for them.
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()

    def _note_thread_error(self, thread: Any) -> None:
        self._thread_error = thread.exc_value

    def _submit(self, function: Callable, calls: Iterable[tuple]) -> Iterator[concurrent.futures.Future]:
        """Submit one call for each future that is requested; an error of `calls` itself is in the last future."""
        try:
            for call in calls:
                yield self._executor.submit(_call, function, call)
        except UserError as error:
            failed: concurrent.futures.Future = concurrent.futures.Future()
            failed.set_exception(error)
            yield failed

    def _wait(self, future: concurrent.futures.Future) -> Any:
        while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            if self._thread_error is not None:
                raise self._thread_error
            self._on_wait(self._signals.progress.value)
        self._on_wait(self._signals.progress.value)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, most often for memory: lower --num_workers") from error


def _set_state(signals: SimpleNamespace, shared: Any) -> None:
    global _signals, _shared
    _signals, _shared = signals, shared


def _initialize(signals: SimpleNamespace, shared: Any) -> None:
    """Prepare a worker."""
    global _failure
    _set_state(signals, shared)
    # Ctrl-C reaches all processes of a terminal, and a batch system's signals often do: the parent decides what
    # becomes of the calls.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        threading.Thread(target=_exit_with_parent, name="ExitWithParent", daemon=True).start()
    except Exception as error:  # raised here, it would reach the parent as a worker that was killed
        _failure = error


def _call(function: Callable, call: tuple) -> Any:
    if _failure is not None:
        raise _failure
    return None if is_over() else function(_shared, *call)


def _exit_with_parent() -> None:
    """End this worker when its parent was killed: it would wait for calls for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
