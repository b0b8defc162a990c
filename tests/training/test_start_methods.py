"""Training with loader processes under every way that Python starts processes; `forkserver` is that of Python 3.14."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.support.experiments import ROOT, losses

PROGRAM = """
import multiprocessing, sys
multiprocessing.set_start_method(sys.argv[1])
import train
sys.exit(train.main(sys.argv[2:]))
"""
METHODS = [method for method in ("fork", "forkserver", "spawn") if method in multiprocessing.get_all_start_methods()]


@contextmanager
def start(method, *arguments):
    """A run as a process of its own, which does not outlive its test."""
    command = [sys.executable, "-c", PROGRAM, method, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # Hang-ups are heeded, as where it is not run under nohup.
    default = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes, **(default if os.name == "posix" else {}))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_by_itself_with_the_same_losses(method, config, tmp_path, expected):
    with start(method, "-c", config(train_config__num_workers=1), "--max_iterations", 6) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    rows = losses(tmp_path / "runs" / "tiny")
    assert len(rows) == 6 and rows == expected.setdefault("losses", rows)


@pytest.mark.skipif(os.name != "posix", reason="no signals to send")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=str)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "fork"])
def test_a_signal_saves_and_ends_it(method, number, config, tmp_path):
    """A hang-up reaches every process: the workers, and those that Python begins beside them."""
    log, deadline = tmp_path / "runs" / "tiny" / "losses.csv", time.monotonic() + 600
    endless = config(train_config__num_workers=1, train_config__iters_per_checkpoint=100_000)
    with start(method, "-c", endless) as process:
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, number) if number == signal.SIGHUP else process.send_signal(number)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, output
    assert "--resume latest" in output
    assert "Traceback" not in output and "resource_tracker" not in output, output
    assert list((tmp_path / "runs" / "tiny").glob("waveflow_*"))
