import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that began the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["OMP_NUM_THREADS"] = "1"  # processes compare bits, and a process may fork: both want a single thread

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run on the CPU, to be tested
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.support.experiments import run, write_config, write_corpus

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with wavs and their two lists."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(corpus, tmp_path):
    """A function that writes an experiment file with changes and returns its path."""
    return lambda **changes: write_config(tmp_path / "config.json", corpus, tmp_path / "runs", **changes)


@pytest.fixture
def trained(config, tmp_path):
    """An experiment file and its run folder, trained for 8 steps with checkpoints 4 and 8."""
    path = config()
    assert run("-c", path, "--max_iterations", 8) == 0
    return path, tmp_path / "runs" / "tiny"
