"""What runs ask of an accelerator, seen without one: devices, pinned memory, processes, arithmetic of convolutions."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

import training.learner
from evaluation import likelihood
from fast.cpu import CpuEngine
from harness import devices, processes
from harness.batches import BatchLoader
from harness.devices import allow_tf32, exact_convolutions, prepare_training, steps_of_one_shape, tf32_products
from image_density_experiments import trainer as image_trainer
from image_density_experiments.model import ImageFlow
from model import FlowVocoder
from tests.support.experiments import run
from tests.support.image_runs import run as run_images
from tests.support.image_runs import write_images


def test_memory_is_pinned_for_a_cuda_device_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, pinned in ((None, False), (torch.device("cpu"), False), (torch.device("cuda", 1), True)):
        assert BatchLoader([0, 1], 0, "", device=device, batch_size=1).pin_memory is pinned


def test_training_uses_its_device(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        prepare_training(device)
    assert used == [torch.device("cuda", 1)]


@pytest.mark.parametrize("newer", ["none", "ieee", "tf32"])
def test_older_and_newer_settings_of_tf32_agree_afterwards(newer):
    """torch.export reads the older ones, which raises where they do not."""
    backends, before = torch.backends, torch.backends.fp32_precision
    try:
        backends.fp32_precision = newer
        with exact_convolutions():
            assert not backends.cudnn.allow_tf32 and backends.cudnn.conv.fp32_precision == "ieee"
        for allowed in (True, False, True):
            allow_tf32(products=allowed, convolutions=allowed)
            assert backends.cudnn.allow_tf32 is backends.cuda.matmul.allow_tf32 is allowed
            with backends.cudnn.flags(enabled=True):  # as torch.export reads, sets and restores them
                pass
            assert (backends.cudnn.conv.fp32_precision == "tf32") is allowed
    finally:
        backends.fp32_precision = before
        allow_tf32(products=False, convolutions=True)  # PyTorch's own


def test_convolutions_are_tried_out_in_training_steps_on_cuda_unless_bits_must_stay(monkeypatch):
    def tried_out(device):
        with steps_of_one_shape(device):
            return torch.backends.cudnn.benchmark

    assert tried_out(torch.device("cuda", 1)) and not torch.backends.cudnn.benchmark
    assert not tried_out(torch.device("cpu"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not tried_out(torch.device("cuda", 1))


@pytest.mark.parametrize("kind", ["vocoder", "images"])
def test_steps_and_nothing_else_are_of_one_shape(kind, config, tmp_path, monkeypatch):
    within, seen = [], set()

    @contextmanager
    def noted(device):
        within.append(device)
        yield
        within.pop()

    model, room = {"vocoder": (FlowVocoder, training.learner), "images": (ImageFlow, image_trainer)}[kind]
    forward = model.forward

    def note(self, *arguments, **options):
        seen.add((torch.is_grad_enabled(), bool(within)))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(room, "steps_of_one_shape", noted)
    monkeypatch.setattr(model, "forward", note)
    if kind == "vocoder":
        assert run("-c", config(), "--max_iterations", 1) == 0
    else:
        assert run_images(write_images(tmp_path / "x.npy"), tmp_path / "run", "--epochs", 1) == 0
    assert seen == {(True, True), (False, False)}


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
        allow_tf32(convolutions=False)
        assert not tf32_products() and torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
    assert devices.tf32_products() == (before[0] == "tf32")


@pytest.mark.parametrize("job", ["--evaluate", "--synthesize", "training"])
def test_likelihoods_and_sounds_are_exact_though_tf32_is_allowed_everywhere(trained, monkeypatch, job):
    before, seen = torch.backends.fp32_precision, set()

    def seeing(method):
        def wrapped(*arguments):
            seen.add(torch.backends.cudnn.conv.fp32_precision)
            return method(*arguments)

        return wrapped

    monkeypatch.setattr(CpuEngine, "synthesize_many", seeing(CpuEngine.synthesize_many))
    monkeypatch.setattr(likelihood, "likelihood_in_tiles", seeing(likelihood.likelihood_in_tiles))
    flags = ["--resume", "latest", "--max_iterations", 12] if job == "training" else [job]
    try:
        torch.backends.fp32_precision = "tf32"
        allow_tf32(convolutions=True)
        assert run("-c", trained[0], *flags) == 0
        assert seen == {"ieee"} and torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
        allow_tf32(products=False, convolutions=True)  # PyTorch's own
