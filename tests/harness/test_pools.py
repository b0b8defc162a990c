"""pools.py: processes that work for another leave Ctrl-C to it, and end with it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from harness import pools
from harness.errors import InputError
from harness.pools import MOST_THREADS, process_pool, results_of, signals_left_to_this_process, thread_pool
from tests.support.experiments import ROOT

COMMAND = """
import multiprocessing, os, sys, time
import torch
from harness.pools import process_pool, results_of
from harness.stopping import exit_status

def job():
    with process_pool(2, "died", {method!r}) as pool:
        tasks = [pool.submit(time.sleep, 600) for _ in range(2)]
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        list(results_of(tasks))

if __name__ == "__main__":
    sys.exit(exit_status(job))
"""


def _begun(folder, method):
    """The command in a session of its own, and the numbers of its pool's processes."""
    (folder / "command.py").write_text(COMMAND.format(method=method))
    process = subprocess.Popen([sys.executable, folder / "command.py"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    children = [int(number) for number in process.stdout.readline().split()]
    assert len(children) == 2
    return process, children


@pytest.mark.parametrize("seconds", [0, 1])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ctrl_c_at_a_terminal_ends_a_pool_in_one_word(tmp_path, method, seconds):
    """It reaches all processes of the terminal; while those of the pool begin, too."""
    process, children = _begun(tmp_path, method)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n"
    assert not any(os.path.exists(f"/proc/{number}") for number in children)


def test_a_signal_that_comes_as_a_wait_begins_is_heard():
    """Its handler waits for Python's main thread, which waits: as where another thread of the system gets it."""
    heard, ready = [], threading.Event()

    def hears():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        ready.set()
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGUSR1)

    def note(*_):
        heard.append(1)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, note)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), process_pool(1, "died") as pool:
            tasks = [pool.submit(time.sleep, 600)]
            threading.Thread(target=hears, daemon=True).start()
            assert ready.wait(60)
            list(results_of(tasks))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR1, before)
    assert heard and time.monotonic() - began < 300


@pytest.mark.parametrize("number, seconds", [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGKILL, 1)])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_at_work_end_with_a_command_that_is_ended_or_killed(tmp_path, method, number, seconds):
    """They would go on for hours, in folders that are nobody's any more."""
    process, children = _begun(tmp_path, method)
    time.sleep(seconds)
    os.kill(process.pid, number)
    process.communicate(timeout=60)  # to the end of stderr, which those at work hold, too
    assert process.returncode == -number
    _assert_ending(children)


def _assert_ending(numbers):
    deadline, numbers = time.monotonic() + 60, list(numbers)
    while any(map(_lives, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _blocks(process, number):
    mask = Path(f"/proc/{process}/status").read_text().partition("SigBlk:")[2].split()[0]
    return bool(int(mask, 16) & 1 << number - 1)


def _lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_pool_gives_results_and_an_exception_does_not_wait_for_it():
    with process_pool(1, "died") as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), process_pool(1, "died") as pool:
        pool.submit(time.sleep, 600)
        raise ZeroDivisionError
    assert time.monotonic() - began < 60


def test_a_pool_that_ends_leaves_other_processes_alone():
    """Those that load data would be found killed, by torch, at any later time."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with pytest.raises(ZeroDivisionError), process_pool(1, "died") as pool:
            pool.submit(time.sleep, 600)
            raise ZeroDivisionError
        other.join(1)
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_results_come_as_they_are_done():
    with process_pool(2, "died") as pool:
        slow = pool.submit(_later, 2.5, "slow")  # longer than a single wait
        assert list(results_of([slow, *(pool.submit(_later, 0, n) for n in range(3))])) == [0, 1, 2, "slow"]
        with pytest.raises(ZeroDivisionError):
            list(results_of([pool.submit(divmod, 1, 0)]))


def _later(seconds, what):
    time.sleep(seconds)
    return what


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="tells what a process blocks")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_process_of_a_pool_leaves_ctrl_c_to_this_one_from_its_start(method):
    """Those that a later task starts, too."""
    others = set(multiprocessing.active_children())
    with process_pool(3, "died", method) as pool:
        tasks = [pool.submit(time.sleep, 1) for _ in range(5)]
        children = set(multiprocessing.active_children()) - others
        assert len(children) == 3
        for child in children:
            assert _blocks(child.pid, signal.SIGINT)
            deadline = time.monotonic() + 60
            while _blocks(child.pid, signal.SIGTERM):  # as all signals are within fork itself
                assert time.monotonic() < deadline
        [task.result() for task in tasks]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_dies_is_said_in_one_line(method, number):
    """And the others end."""
    others = set(multiprocessing.active_children())  # such as those that load data for what is not yet collected
    with pytest.raises(InputError, match="it died; do this"), process_pool(2, "it died; do this", method) as pool:
        tasks = [pool.submit(time.sleep, 600) for _ in range(2)]
        children = sorted(set(multiprocessing.active_children()) - others, key=lambda child: child.pid)
        os.kill(children[0].pid, number)
        tasks[1].result(timeout=60)
    _assert_ending(child.pid for child in children)


@pytest.mark.parametrize(
    "begun, seconds", [(partial(process_pool, 1, "died"), 600), (thread_pool, 1)], ids=["processes", "threads"]
)
def test_ctrl_c_with_a_tasks_lock_in_hand_ends_all_the_same(begun, seconds):
    """It may come so late in the taking of it that nobody gives it back."""
    with pytest.raises(KeyboardInterrupt), begun() as pool:
        tasks = [pool.submit(time.sleep, seconds) for _ in range(3)]
        for task in tasks[:2]:
            task._condition.acquire()
        raise KeyboardInterrupt
    assert all(task.done() for task in tasks)


def test_ctrl_c_before_the_end_of_a_pool_holds_it_back_ends_it_all_the_same(monkeypatch):
    """While a pool ends for another reason."""

    @contextmanager
    def late():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt), process_pool(1, "died") as pool:
        task = pool.submit(time.sleep, 600)
        monkeypatch.setattr(pools, "uninterrupted", late)
        raise ZeroDivisionError
    assert task.done()


def test_the_end_does_not_wait_for_what_nobody_will_read():
    """A process begun beside the pool has its queue open, too."""
    with pytest.raises(ZeroDivisionError), process_pool(1, "died", "fork") as pool:
        pool.submit(time.sleep, 600)
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        other.start()
        for _ in range(3):
            pool.submit(len, bytes(1_000_000))
        time.sleep(0.5)  # the first of them fills the queue's pipe
        raise ZeroDivisionError
    assert other.is_alive()
    other.kill()
    other.join()


@pytest.mark.parametrize("begun", [thread_pool, partial(process_pool, 1, "died")], ids=["threads", "processes"])
def test_results_that_nobody_asks_for_are_not_worked_out(begun):
    began = time.monotonic()
    with begun() as pool:
        for _ in pool.map(time.sleep, [0.1, *[1.0] * 600]):
            break
    assert time.monotonic() - began < 60


def test_threads_leave_what_they_have_not_begun():
    """By Ctrl-C while tasks are handed in, too."""
    done = []

    def work(number):
        time.sleep(0.05)
        done.append(number)

    def interrupted(numbers):
        yield from numbers
        raise KeyboardInterrupt

    with thread_pool() as pool:
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    with pytest.raises(KeyboardInterrupt), thread_pool() as pool:
        pool.map(work, interrupted(range(600)))
    assert len(done) <= MOST_THREADS


def test_no_room_has_a_pool_of_its_own():
    own = ("ThreadPoolExecutor", "ProcessPoolExecutor", "BrokenProcessPool", "multiprocessing.Pool")
    waits = ("as_completed", ".result(")  # for as long as a task takes
    rooms = [
        path for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")) if path.parent.name not in ("tests", "harness")
    ]
    assert not [path for path in rooms if any(name in path.read_text(encoding="utf-8") for name in own + waits)]


def test_signals_come_behind_the_context_and_not_to_those_begun_in_it():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with signals_left_to_this_process(signal.SIGINT):
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(0 if not heard else 1)
            os.kill(os.getpid(), signal.SIGINT)  # libraries' threads may hear it at once
        assert heard == [signal.SIGINT]
        assert os.waitpid(child, 0)[1] == 0
    finally:
        signal.signal(signal.SIGINT, before)
