"""A pool of worker processes whose results come in the order of the jobs."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from modeling_gpt2_repro.core.errors import UserError
from modeling_gpt2_repro.core.stop_signals import STOP_SIGNALS

# Jobs in flight for each worker: enough that none waits for the next, few enough that little is done in vain when the
# results so far turn out to be all that is needed.
JOBS_PER_WORKER = 2
POLL_SECONDS = 0.2

# A forked worker starts at once, where a spawned one imports torch again (seconds). Only Linux forks safely.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def has_shared_memory() -> bool:
    """Tell whether the machine has what several workers share, which lies in /dev/shm: a container may have none."""
    try:
        multiprocessing.get_context(START_METHOD).Value("b")
    except OSError:
        return False
    return True


class WorkerPool:
    """Runs functions in `num_workers` processes, or in this one where that is 1.

    Args:
        num_workers: processes.
        initializer: called with `initargs` in each worker before its first job.
        on_wait: called here again and again while a result is waited for.
    """

    def __init__(
        self, num_workers: int, initializer: Callable, initargs: tuple, on_wait: Callable[[], None] = lambda: None
    ):
        self._num_workers = num_workers
        self._on_wait = on_wait
        self._executor = None
        self._thread_error: BaseException | None = None
        self._others = set(multiprocessing.active_children())
        if num_workers == 1:
            initializer(*initargs)
        else:
            # The executor's own threads die where the machine refuses them another one, and no result would ever come.
            threading.excepthook = self._note_thread_error
            context = multiprocessing.get_context(START_METHOD)
            self._is_over = context.Value("b", False)
            self._executor = concurrent.futures.ProcessPoolExecutor(
                num_workers,
                mp_context=context,
                initializer=_initialize,
                initargs=(self._is_over, initializer, initargs),
            )

    def map_in_order(self, function: Callable, jobs: Iterable[tuple]) -> Iterator[Any]:
        """Yield `function(*job)` for each job, in order; jobs are asked for as workers come free.

        An exception of a job, or of `jobs` itself, is raised where its result would have come, so that a caller who
        stops before it never sees it. When it is raised, or the caller stops, no other job begins, and those that run
        are waited for: they look at `is_over` now and then and give up.
        """
        if self._executor is None:
            for job in jobs:
                result = function(*job)
                self._on_wait()
                yield result
            return
        jobs = iter(jobs)
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        exhausted = False
        try:
            while pending or not exhausted:
                while not exhausted and len(pending) < JOBS_PER_WORKER * self._num_workers:
                    exhausted = not self._submit_next(function, jobs, pending)
                if pending:
                    yield self._wait(pending.popleft())
        finally:
            self._is_over.value = True  # `cancel` does not reach those that lie in the queue between the processes
            for future in pending:
                future.cancel()
            if self._thread_error is None:
                concurrent.futures.wait(pending)
            self._is_over.value = False

    def shut_down(self) -> None:
        """End the workers."""
        if self._executor is not None:
            self._is_over.value = True
            threading.excepthook = threading.__excepthook__
            try:
                self._executor.shutdown(cancel_futures=True)
            finally:
                # Where the machine refused a worker, or the thread that leads them, nobody tells the others to end,
                # and Python would wait for them.
                for process in set(multiprocessing.active_children()) - self._others:
                    process.kill()

    def _note_thread_error(self, thread: Any) -> None:
        self._thread_error = thread.exc_value

    def _submit_next(self, function: Callable, jobs: Iterator[tuple], pending: collections.deque) -> bool:
        try:
            job = next(jobs)
        except StopIteration:
            return False
        except UserError as error:
            failed: concurrent.futures.Future = concurrent.futures.Future()
            failed.set_exception(error)
            pending.append(failed)
            return False
        pending.append(self._executor.submit(_run, function, job))
        return True

    def _wait(self, future: concurrent.futures.Future) -> Any:
        while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
            if self._thread_error is not None:
                raise self._thread_error
            self._on_wait()
        self._on_wait()
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, most often for memory: lower --num_workers") from error


_is_over: Any = None
_failure: Exception | None = None


def is_over() -> bool:
    """Tell, in a worker, that nobody waits for the result of its job any more."""
    return _is_over is not None and bool(_is_over.value)


def _initialize(flag: Any, initializer: Callable, initargs: tuple) -> None:
    global _is_over, _failure
    _is_over = flag
    # Ctrl-C reaches all processes of a terminal, and a batch system's signals often do: what is to become of the jobs
    # is the parent's to say.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        initializer(*initargs)
    except Exception as error:  # raised here, it would reach the parent as a worker that was killed
        _failure = error


def _run(function: Callable, job: tuple) -> Any:
    if _failure is not None:
        raise _failure
    return None if is_over() else function(*job)


def _exit_with_parent() -> None:
    """End this worker when its parent was killed: it would wait for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
