"""What runs ask of an accelerator, seen without one: devices, pinned memory, processes, arithmetic of convolutions."""

import torch
import torch.distributed as dist

from harness import devices, processes
from harness.batches import BatchLoader
from harness.devices import allow_tf32, prepare_training, tf32_products


def test_memory_is_pinned_for_a_cuda_device_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in ((None, False), (torch.device("cpu"), False), (torch.device("cuda", 1), True)):
        assert BatchLoader([0, 1], 0, "", device=device, batch_size=1).pin_memory is pinned


def test_training_uses_its_device_and_tries_convolutions_out_unless_bits_must_stay(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    prepare_training(torch.device("cpu"))
    assert not used and not torch.backends.cudnn.benchmark
    prepare_training(torch.device("cuda", 1))
    assert used == [torch.device("cuda", 1)] and torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    prepare_training(torch.device("cuda", 1))
    assert not torch.backends.cudnn.benchmark


def test_the_process_group_is_told_its_device(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "place", lambda: (1, 2))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: asked.append(options["device_id"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with processes.process_group(device):
            pass
    assert asked == [torch.device("cuda", 1), None]


def test_tf32_is_set_and_read_through_the_newer_interface():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        for products, convolutions in ((True, False), (False, True)):
            allow_tf32(products, convolutions)
            assert tf32_products() is products
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is convolutions
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
    assert devices.tf32_products() == (before[0] == "tf32")
