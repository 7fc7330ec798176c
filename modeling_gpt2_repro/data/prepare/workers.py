"""A pool of worker processes that yields results in the order of the calls."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace
from typing import Any

from ...core.errors import UserError
from ...core.optional import not_none
from ...core.stop_signals import STOP_SIGNALS

# Calls in flight per worker: enough to keep workers busy, few enough to waste little if the remaining results turn out
# not to be needed.
CALLS_PER_WORKER = 2
POLL_SECONDS = 0.2

# A forked worker starts at once; a spawned one imports torch again, which takes seconds. Only Linux forks safely.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def _build_signals(num_workers: int) -> SimpleNamespace:
    """Create memory shared by the processes, or plain memory for a single process.

    Returns:
        A namespace with `is_over.value`, whether results are no longer needed, and `progress.value`, the sum of all
        amounts passed to `add_progress`.
    """
    if num_workers == 1:
        progress = SimpleNamespace(value=0, get_lock=contextlib.nullcontext)
        return SimpleNamespace(is_over=SimpleNamespace(value=False), progress=progress)
    context = multiprocessing.get_context(START_METHOD)
    return SimpleNamespace(is_over=context.Value("b", False), progress=context.Value("q", 0))


# State of this process, set by `_set_state`.
_signals = _build_signals(1)
_shared: Any = None
_failure: Exception | None = None


def is_over() -> bool:
    """Return, during a call, whether its result is no longer needed."""
    return bool(_signals.is_over.value)


def add_progress(amount: int) -> None:
    """Report, during a call, the amount of work done since the last report."""
    with _signals.progress.get_lock():
        _signals.progress.value += amount


class WorkerPool:
    """Calls functions in `num_workers` processes, or in this one if that is 1 or shared memory is unavailable.

    Args:
        num_workers: number of processes.
        shared: first argument of every call; sent to each worker once.
        on_wait: called repeatedly in this process, with the progress so far, while waiting for a result.
    """

    def __init__(self, num_workers: int, shared: Any, on_wait: Callable[[int], None] = lambda progress: None):
        try:
            self._signals = _build_signals(num_workers)
        except OSError:  # shared memory uses /dev/shm, which a container may lack
            print("shared memory (/dev/shm) is unavailable; falling back to a single process", flush=True)
            num_workers = 1
            self._signals = _build_signals(1)
        self._num_workers = num_workers
        self._on_wait = on_wait
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._thread_error: BaseException | None = None
        self._others = set(multiprocessing.active_children())
        if num_workers == 1:
            _set_state(self._signals, shared)
        else:
            # If an executor thread dies because it cannot start another thread, no result would ever arrive.
            threading.excepthook = self._note_thread_error
            self._executor = concurrent.futures.ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context(START_METHOD),
                initializer=_initialize,
                initargs=(self._signals, shared),
            )

    def map_in_order(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Generator[Any]:
        """Yield `function(shared, *call)` for each call, in order, drawing calls as workers become free.

        An exception of a call, or of `calls` itself, is raised in place of its result: a caller that stops earlier
        never sees it. After an exception, or when the caller stops, no further calls start, and running ones are
        waited for; they should poll `is_over` and return early.
        """
        if self._executor is None:
            for call in calls:
                result = _call(function, call)
                self._on_wait(self._signals.progress.value)
                yield result
            return
        futures = self._submit(function, calls)
        pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        try:
            pending.extend(itertools.islice(futures, CALLS_PER_WORKER * self._num_workers))
            while pending:
                yield self._wait(pending.popleft())
                pending.extend(itertools.islice(futures, 1))
        finally:
            self._signals.is_over.value = True  # `cancel` does not reach calls already queued to the workers
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
            # If a worker, or the thread that manages them, could not start, nothing ends the other workers, and Python
            # would wait for them at exit.
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()

    def _note_thread_error(self, thread: Any) -> None:
        self._thread_error = thread.exc_value

    def _submit(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
    ) -> Iterator[concurrent.futures.Future[Any]]:
        """Submit calls lazily, one per future drawn; an error of `calls` itself is set on the last future."""
        try:
            for call in calls:
                yield not_none(self._executor).submit(_call, function, call)
        except UserError as error:
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(error)
            yield failed

    def _wait(self, future: concurrent.futures.Future[Any]) -> Any:
        while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            if self._thread_error is not None:
                raise self._thread_error
            self._on_wait(self._signals.progress.value)
        self._on_wait(self._signals.progress.value)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, probably out of memory: lower --num_workers") from error


def _set_state(signals: SimpleNamespace, shared: Any) -> None:
    global _signals, _shared
    _signals, _shared = signals, shared


def _initialize(signals: SimpleNamespace, shared: Any) -> None:
    """Initialize a worker process."""
    global _failure
    _set_state(signals, shared)
    # Ctrl-C, and often a batch system's signals, reach all processes: the parent decides whether calls continue.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        threading.Thread(target=_exit_with_parent, name="ExitWithParent", daemon=True).start()
    except Exception as error:  # if raised here, the parent would only see a killed worker
        _failure = error


def _call(function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    if _failure is not None:
        raise _failure
    return None if is_over() else function(_shared, *call)


def _exit_with_parent() -> None:
    """Exit when the parent process dies: the worker would otherwise wait for calls forever."""
    not_none(multiprocessing.parent_process()).join()
    os._exit(1)
