"""Fused training layers give what the plain ones give, and so do their gradients; without a GPU in the interpreter."""

import pytest
import torch

from fast import gpu_training
from fast.estimators import Execution
from fast.gpu_training import FusedEstimator, FusedLayer, can_fuse, fits
from modules import FlowLoss
from tests.support.vocoders import random_input, random_vocoder

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "waveflow": {"coupling_type": "waveflow"},
    "as released": {"coupling_type": "waveflow_official"},
    "cycle 2": {"n_layer": 3, "n_layer_per_cycle": 2, "n_flow": 1},
    "dilation as high as the rows": {"n_height": 2, "n_layer": 3, "n_layer_per_cycle": 3, "n_flow": 1},
    "one layer": {"n_layer": 1},
    "spline": {"transform": "spline", "n_flow": 1},
}


@pytest.fixture
def fused(monkeypatch):
    """Fused layers wherever they can be, in the precision there is; records the layers made."""
    layers, apply = [], FusedLayer.apply
    monkeypatch.setattr(FusedEstimator, "suits", lambda *_: True)
    monkeypatch.setattr(FusedLayer, "apply", lambda *arguments: (layers.append(1), apply(*arguments))[1])
    return layers


def loss_and_gradients(model, execution, audio, mel):
    model.zero_grad()
    model.execution = execution
    loss = FlowLoss()(model(audio, mel))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))
def test_loss_and_gradients_are_those_of_the_plain_layers(changes, fused):
    options = {"res_channels": 16, "n_height": 4, "n_layer": 2, "n_flow": 2, **changes}
    model = random_vocoder(**options).to(DEVICE)
    audio, mel = (tensor.to(DEVICE) for tensor in random_input(model, frames=2, batch=2))
    audio = audio[:, : 20 * model.config.n_height]
    plain, made = (loss_and_gradients(model, Execution(plain=plain), audio, mel) for plain in (True, False))
    assert len(fused) == options["n_flow"] * options["n_layer"]
    for expected, actual in zip(plain, made, strict=True):
        if expected is None:  # of a last layer's residual gate
            assert actual is None or not actual.any()
            continue
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(actual / scale, expected / scale, atol=3e-4, rtol=0)


def test_half_precision_stays_near(fused):
    model = random_vocoder("nanoflow", res_channels=16, n_flow=1, n_height=4, n_layer=2).to(DEVICE)
    audio, mel = (tensor.to(DEVICE) for tensor in random_input(model, frames=2, batch=1))
    plain = loss_and_gradients(model, Execution(plain=True), audio, mel)
    with torch.autocast(DEVICE, dtype=torch.float16):
        made = loss_and_gradients(model, Execution(), audio, mel)
    assert fused and all(gradient.dtype == torch.float32 for gradient in made)
    for expected, actual in zip(plain, made, strict=True):
        assert (actual - expected).norm() <= 0.02 * expected.norm() + 1e-5


def test_layers_the_kernels_do_not_take_are_left_to_convolutions():
    assert can_fuse(128, 16) and not can_fuse(20, 16) and not can_fuse(64, 128)
    model = random_vocoder("nanoflow", res_channels=16)
    assert not FusedEstimator.suits(model.flows()[0], torch.zeros(1), False)  # not on CUDA


class OnACard:
    """A tensor of the interpreter that says it is on a card, for the choice alone."""

    def __init__(self, dtype):
        self.is_cuda, self.dtype, self.device = True, dtype, torch.device(DEVICE)

    def size(self, _):
        return 80


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whether_a_card_has_room_can_be_asked_where_gradients_are_off(mode):
    model = random_vocoder("nanoflow", res_channels=16)
    fits.cache_clear()
    with mode():
        assert FusedEstimator.suits(model.flows()[0], OnACard(torch.float16), False)


@pytest.mark.parametrize("kernel", ["forward", "gate_backward", "hidden_backward", "taps_backward"])
def test_cards_without_room_for_a_kernels_blocks_are_left_to_convolutions(kernel, monkeypatch):
    model = random_vocoder("nanoflow", res_channels=16)
    fits.cache_clear()
    assert FusedEstimator.suits(model.flows()[0], OnACard(torch.float16), False)
    assert not FusedEstimator.suits(model.flows()[0], OnACard(torch.float32), False)

    class TooLarge:
        def __getitem__(self, grid):
            raise gpu_training.OutOfResources(120_000, 101_376, "shared memory")

    fits.cache_clear()
    monkeypatch.setattr(gpu_training.kernels, f"{kernel}_kernel", TooLarge())
    assert not FusedEstimator.suits(model.flows()[0], OnACard(torch.float16), False)
    fits.cache_clear()


def test_a_fused_layer_keeps_only_its_inputs(fused):
    model = random_vocoder("waveflow", res_channels=16, n_flow=1, n_layer=2, n_height=4)
    audio, mel = random_input(model, frames=2, batch=1)
    audio = audio[:, :80]
    kept = []
    keep = lambda tensor: (kept.append(tensor), tensor)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(audio, mel)
    hidden = [tensor for tensor in kept if tensor.dim() == 4 and tensor.size(3) == 16 and tensor.size(1) == 4]
    assert len({tensor.data_ptr() for tensor in hidden}) == 2  # of two layers
    assert not any(tensor.dim() == 4 and 32 in tensor.shape and tensor.size(1) == 4 for tensor in kept)
