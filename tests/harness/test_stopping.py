"""stopping.py: signals, hours, errors and the exit status; alone and by the real command."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint as ckpt
from harness.errors import InputError
from harness.stopping import SAME_INTERRUPT, StopRequest, exit_status, safe_point
from tests.support.experiments import ROOT, losses, run

FORK = multiprocessing.get_context("fork")


def test_a_signal_is_noted_and_its_status_is_the_conventional_one(capsys):
    for number in (signal.SIGINT, signal.SIGTERM):
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
        assert stop.exit_status(saved=True, finished=False, resume="go on") == 128 + number
        assert stop.exit_status(saved=False, finished=False, resume="go on") == 1
    said = capsys.readouterr()
    assert said.out == "stopped by SIGINT; go on\nstopped by SIGTERM; go on\n"
    assert said.err == "error: the last checkpoint could not be saved; free some space, go on\n" * 2


def signalled(numbers, pause):
    """The exit status of a process that gets signals while it has a StopRequest, one after the other."""

    def run():
        with StopRequest():
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(pause)
        os._exit(7)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    return process.exitcode


INT, TERM = signal.SIGINT, signal.SIGTERM


def test_a_second_interrupt_stops_at_once_and_handlers_are_put_back(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    pause = SAME_INTERRUPT + 0.05
    assert signalled([INT, INT], pause) == 130
    assert signalled([TERM, INT, TERM, INT], pause) == 130
    assert capfd.readouterr().err.split() == ["interrupted"] * 2


@pytest.mark.parametrize(
    ("numbers", "pause"),
    [([TERM, INT], 0.3), ([INT, TERM], 0.3), ([TERM] * 5, 0), ([TERM, TERM, INT, TERM], 0), ([INT] * 5, 0),
     ([INT, TERM] * 3, 0)],
)  # fmt: skip
def test_signals_as_batch_queues_and_launchers_send_them_are_one_wish(numbers, pause):
    assert signalled(numbers, pause) == 7


def test_what_may_be_left_half_done_ends_at_its_next_safe_point_and_nowhere_else():
    done = []

    def work():
        try:
            safe_point()
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("what was begun is finished")
            safe_point()
            done.append("never reached")
        finally:
            done.append("put back")

    safe_point()
    with StopRequest() as stop:
        assert stop.unless_stopped(work) is None
        assert stop.unless_stopped(lambda: done.append("not even begun")) is None
        safe_point()  # not in such a work
        assert stop and done == ["what was begun is finished", "put back"]


def test_a_process_that_inherits_the_handler_leaves_the_signal_alone():
    with StopRequest() as stop:
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.write(writing, b"1" if stop else b"0")
            os._exit(0)
        assert os.read(reading, 1) == b"0" and not stop
        os.wait()


def test_max_hours_saves_and_ends_well(config, tmp_path, capsys):
    path = config(train_config__iters_per_checkpoint=100_000)
    assert run("-c", path, "--max_iterations", 1000, "--max_hours", 1e-9) == 0
    assert "stopped after 1e-09 hours; go on with --resume latest" in capsys.readouterr().out
    [saved] = ckpt.list_checkpoints(tmp_path / "runs" / "tiny")
    assert ckpt.load_checkpoint(saved)["iteration"] == len(losses(saved.parent)) == 1


def test_errors_become_one_line_and_a_status(capsys):
    def raises(error):
        def job():
            raise error

        return job

    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3
    assert exit_status(raises(KeyboardInterrupt())) == 130
    for error in (InputError("words"), OSError(28, "No space left"), MemoryError(), torch.OutOfMemoryError("a\nb"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):  # fmt: skip
        capsys.readouterr()
        assert exit_status(raises(error)) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        exit_status(raises(RuntimeError("a mistake of ours")))


def test_interrupts_in_quick_succession_leave_a_run_that_goes_on(config, tmp_path):
    path, folder = config(train_config__iters_per_checkpoint=2), tmp_path / "runs" / "tiny"
    command, quietly = [sys.executable, ROOT / "train.py", "-c", path], {"stdout": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **quietly)
    for _ in range(600):
        if ckpt.list_checkpoints(folder):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    iteration = int(ckpt.list_checkpoints(folder)[0].name.split("_")[1])
    assert run("-c", path, "--resume", "latest", "--max_iterations", iteration + 1) == 0
