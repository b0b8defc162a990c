"""What `modules.Transform` asks of a transform is all that training and synthesis need; ONNX says what it lacks."""

import pytest
import torch
from torch import nn

from fast.engine import SynthesisEngine
from fast.estimators import Execution, WinogradEstimator
from fast.graph import SynthesisGraph
from fast.onnx_graph import onnx_model
from harness.errors import InputError
from model import TRANSFORMS
from modules import Transform
from tests.fast.test_engine import QUEUES, assert_same
from tests.fast.test_estimators import loss_and_gradients
from tests.fast.test_gpu import engine_of, run
from tests.support.vocoders import plain_inverse, random_input, random_vocoder


class Bent(Transform):
    """z = asinh(x exp(log_s) + u) + t."""

    n_params = 3

    def __init__(self, config):
        super().__init__()
        self.projection = nn.Conv2d(config.res_channels, 3, 1)

    def fold(self):
        return self.projection.weight, self.projection.bias

    def forward(self, x, params):
        log_s, u, t = params.chunk(3, dim=1)
        bent = x * torch.exp(log_s) + u
        return torch.asinh(bent) + t, log_s - torch.log1p(bent.square()) / 2

    def inverse(self, z, params):
        log_s, u, t = params.chunk(3, dim=1)
        return (torch.sinh(z - t) - u) * torch.exp(-log_s)


@pytest.fixture(params=["waveflow", "nanoflow"])
def model(request, monkeypatch):
    """A vocoder with this transform, under a name that `config.py` knows."""
    monkeypatch.setitem(TRANSFORMS, "affine", Bent)
    return random_vocoder(request.param, dtype=torch.float64)


@pytest.mark.parametrize("winograd", [False, True])
def test_it_trains(model, winograd, monkeypatch):
    monkeypatch.setattr(WinogradEstimator, "suits", lambda *_: winograd)
    plain, fast = (loss_and_gradients(model, Execution(plain=plain)) for plain in (True, False))
    assert model.transforms[0].projection.weight.grad.abs().max() > 0
    for ours, reference in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-9)


@QUEUES
@torch.no_grad()
def test_it_is_inverted(model, queue):
    audio, mel = random_input(model)
    z, _ = model(audio, mel)
    for inverted in (
        plain_inverse(model, mel, z),
        model.reverse(mel, z=z),
        SynthesisEngine(model, queue=queue)(mel, z),
        run(engine_of(model), mel, z),
    ):
        assert_same(inverted, audio)


@torch.no_grad()
def test_it_is_exported_by_torch_and_unknown_to_onnx(model):
    audio, mel = (tensor[:1].float() for tensor in random_input(model))
    z, _ = model.float()(audio, mel)
    graph = SynthesisGraph(model)
    assert_same(graph(mel, z.transpose(2, 3).flatten(1)), audio, 1e-4)
    with pytest.raises(InputError, match=r"^Bent cannot be written as ONNX; expected a transform of Affine, Spline$"):
        onnx_model(graph, {})
