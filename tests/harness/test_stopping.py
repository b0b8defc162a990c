"""stopping.py: signals, hours, errors and the exit status; alone and by the real command."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import checkpoint as ckpt
from harness.errors import InputError
from harness.stopping import StopRequest, exit_status
from tests.support.experiments import ROOT, losses, run


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


def test_a_second_interrupt_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_may_be_left_half_done_ends_at_the_first_signal():
    done = []

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("never reached")

    with StopRequest() as stop:
        stop.unless_stopped(work)
        stop.unless_stopped(lambda: done.append("not even begun"))
        assert stop and done == []


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
