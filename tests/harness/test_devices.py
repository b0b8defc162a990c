"""devices.py: which device, and the same results twice."""

import pytest
import torch

from harness.devices import choose_device
from harness.errors import InputError
from tests.support.experiments import losses, run


def test_deterministic_runs_have_the_same_losses(config, tmp_path):
    tables = []
    try:
        for name in ("one", "two"):
            path = config(train_config__output_directory=str(tmp_path / name))
            assert run("-c", path, "--deterministic", "--max_iterations", 4) == 0
            assert torch.are_deterministic_algorithms_enabled()
            tables.append(losses(tmp_path / name / "tiny"))
            torch.rand(7)  # whatever happened in between
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tables[0]) == 4 and tables[0] == tables[1]


def test_processes_that_share_a_device_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="several processes cannot share one device"):
        choose_device("cuda:0")
