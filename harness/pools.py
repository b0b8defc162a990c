"""Processes and threads that work for this one: they leave Ctrl-C to it, and end when it does not wait for them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any
from weakref import WeakSet

from harness.errors import InputError

MOST_THREADS = 8


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


class _Pool(ProcessPoolExecutor):
    """Executor whose processes begin with Ctrl-C left to this one; some start methods start one by each task."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given: WeakSet[Future] = WeakSet()

    def submit(self, *task: Any, **options: Any) -> Future:
        with signals_left_to_this_process(signal.SIGINT):
            future = super().submit(*task, **options)
        self._given.add(future)
        return future

    def end(self) -> None:
        """Kill the processes, and wait for the thread that looks after them.

        Ctrl-C may come between the taking of a task's lock by this thread and the code that gives it back; the other
        one would wait for it at the end of the command, without end.
        """
        for future in self._given:
            with suppress(RuntimeError):  # not, or no longer, this thread's
                while True:
                    future._condition.release()
        end_children()
        self.shutdown(cancel_futures=True)


@contextmanager
def process_pool(
    n: int,
    if_one_dies: str,
    method: str | None = None,
    initializer: Callable[..., Any] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """Context of a pool of n processes. They leave Ctrl-C to this one, and SIGTERM ends them; by an exception they are
    killed, whatever they are at, and they end when this one is killed.

    if_one_dies: what the InputError says then, with what to do.
    """
    _start_resource_tracker()  # or the pool's locks would, in their own way
    with _Pool(n, multiprocessing.get_context(method), _begin, (initializer, *arguments)) as pool:
        try:
            yield pool
        except BaseException as error:
            pool.end()
            if isinstance(error, BrokenProcessPool):
                raise InputError(if_one_dies) from None
            raise


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """Context of a pool of some threads; by an exception, Ctrl-C while tasks are handed in too, what none of them has
    begun is left.
    """
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(initializer: Callable[..., Any] | None, *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def end_children() -> None:
    """Kill the processes that `multiprocessing` began for this one."""
    for child in multiprocessing.active_children():
        with suppress(OSError):
            os.kill(child.pid, signal.SIGKILL)
