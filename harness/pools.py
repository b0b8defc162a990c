"""Processes and threads that work for this one: they leave Ctrl-C to it, and end when it does not wait for them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakSet

from harness.errors import InputError
from harness.stopping import safe_point, uninterrupted

MOST_THREADS = 8
LONGEST_WAIT = 1.0  # seconds

Result = TypeVar("Result")


@contextmanager
def signals_left_to_this_process(*numbers: int) -> Iterator[None]:
    """Context in which processes are begun that these signals, of a terminal or a queue, do not reach.

    They are blocked, which processes inherit, and come to this one behind the context.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    _start_resource_tracker()  # or its start, within that of a process, would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_resource_tracker() -> None:
    """Begin Python's own process beside pools and workers; it leaves SIGINT and SIGTERM alone, but not a hang-up."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    try:
        resource_tracker.ensure_running()  # which unblocks the other two
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pool(Executor):
    """What both kinds of pools have in common: Ctrl-C may come at any time, and nobody waits for a lock it left behind.

    It may come between the taking of a lock by this thread and the code that gives it back; another thread would wait
    for that without end. So it comes behind what takes the pool's, and those of tasks are given back by `end`.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given: WeakSet[Future] = WeakSet()

    def submit(self, *task: Any, **options: Any) -> Future:
        with uninterrupted():
            future = super().submit(*task, **options)
            self.given.add(future)
        return future

    def map(self, work: Callable[..., Result], *columns: Iterable[Any]) -> Iterator[Result]:
        return self._in_order(deque(self.submit(work, *row) for row in zip(*columns, strict=False)))

    def _in_order(self, tasks: deque[Future]) -> Iterator[Any]:
        try:
            while tasks:
                yield from results_of([tasks.popleft()])
        finally:
            for task in tasks:
                task.cancel()

    def end(self) -> None:
        """Leave what is not begun, and wait for what is under way."""
        for future in self.given:
            with suppress(RuntimeError):  # not, or no longer, this thread's
                while True:
                    future._condition.release()
        self.shutdown(cancel_futures=True)


class _Threads(_Pool, ThreadPoolExecutor):
    pass


class _Processes(_Pool, ProcessPoolExecutor):
    """Processes that begin with Ctrl-C left to this one; some start methods start one by each task."""

    def submit(self, *task: Any, **options: Any) -> Future:
        with uninterrupted(), signals_left_to_this_process(signal.SIGINT):
            return super().submit(*task, **options)

    def end(self) -> None:
        """Kill the processes, and wait for the thread that looks after them."""
        for process in list((self._processes or {}).values()):  # no others, such as those that load data
            process.kill()
        if self._call_queue is not None:
            self._call_queue.cancel_join_thread()  # no one will read what is still on the way to them
        super().end()


@contextmanager
def _ended(pool: _Pool) -> Iterator[None]:
    try:
        yield
        for _ in _done(list(pool.given)):
            pass
        with uninterrupted():
            pool.shutdown()
    except BaseException:
        try:
            with uninterrupted():
                pool.end()
        except KeyboardInterrupt:  # perhaps before it was held back; there is no second one
            pool.end()
            raise
        raise


@contextmanager
def process_pool(
    n: int,
    if_one_dies: str,
    method: str | None = None,
    initializer: Callable[..., Any] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Executor]:
    """Context of a pool of n processes. They leave Ctrl-C to this one, and SIGTERM ends them; by an exception they are
    killed, whatever they are at, and they end when this one is killed.

    if_one_dies: what the InputError says then, with what to do.
    """
    _start_resource_tracker()  # or the pool's locks would, in their own way
    pool = _Processes(n, multiprocessing.get_context(method), _begin, (initializer, *arguments))
    try:
        with _ended(pool):
            yield pool
    except BrokenProcessPool:
        raise InputError(if_one_dies) from None


@contextmanager
def thread_pool() -> Iterator[Executor]:
    """Context of a pool of some threads; by an exception, Ctrl-C while tasks are handed in too, what none of them has
    begun is left.
    """
    pool = _Threads(min(MOST_THREADS, os.cpu_count() or 1))
    with _ended(pool):
        yield pool


def results_of(tasks: Sequence[Future]) -> Iterator[Any]:
    """Results of what a pool was given, in the order in which they come.

    A signal is heard within LONGEST_WAIT. Where it arrives while Python's main thread begins to wait, its handler is
    not called before the wait ends: that of a Future's `result` lasts as long as its task.
    """
    return (task.result() for task in _done(tasks))


def _done(tasks: Sequence[Future]) -> Iterator[Future]:
    done: SimpleQueue[Future] = SimpleQueue()  # written in C: an exception finds it whole
    for task in tasks:
        task.add_done_callback(done.put)
    came = 0
    while came < len(tasks):
        safe_point()
        try:
            task = done.get(timeout=LONGEST_WAIT)
        except Empty:
            continue
        came += 1
        yield task


def _begin(initializer: Callable[..., Any] | None, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
