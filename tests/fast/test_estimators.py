"""Fast likelihoods are the plain ones: values and gradients, in float64, whichever way they are computed."""

import pytest
import torch

from evaluation.tiles import forward_of
from fast.estimators import CompiledEstimator, ConvEstimator, Execution, FastFlows, WinogradEstimator, project
from modules import Affine, FlowLoss
from tests.fast.test_engine import COUPLINGS, GRID, assert_same, plain_case
from tests.support.vocoders import random_input, random_vocoder


def loss_and_gradients(model, execution):
    model.execution = execution
    model.zero_grad()
    loss = FlowLoss()(model(*random_input(model)))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.parametrize("shape", [{"n_layer_per_cycle": 2, "n_height": 16}, {"transform": "spline"}, {"n_layer": 1}])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_loss_and_gradients_are_those_of_the_plain_estimator(coupling, shape, winograd, recompute, monkeypatch):
    monkeypatch.setattr(WinogradEstimator, "suits", lambda *_: winograd)
    model = random_vocoder(coupling, dtype=torch.float64, **shape)
    plain = loss_and_gradients(model, Execution(plain=True))
    fast = loss_and_gradients(model, Execution(checkpoint_activations=recompute))
    for ours, reference in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-9)


@GRID
def test_folded_flows_invert_like_plain_ones(coupling, shape, transform):
    model, mel, z, expected = plain_case(coupling, shape, transform)
    assert_same(model.reverse(mel, z=z), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_conditioning_belongs_to_the_flows_of_a_pass(plain):
    model = random_vocoder(dtype=torch.float64)
    model.execution = Execution(plain=plain)
    flows, x = model.flows(), torch.randn(1, 1, 8, 64, dtype=torch.float64)
    for conditioning in torch.randn(2, 1, 80, 8, 64, dtype=torch.float64):
        for flow, forward in zip(flows, forward_of(model, flows, conditioning), strict=True):
            torch.testing.assert_close(forward(x), flow.forward(x, conditioning))


def test_which_estimator_is_used_where():
    model = random_vocoder("waveflow")  # three layers: blocks of eight columns

    def kind(width=64, **how):
        [bound, *_] = FastFlows(model.flows(), torch.zeros(1, 80, 8, width), Execution(**how))._bound.values()
        return type(bound)

    assert kind() is WinogradEstimator
    assert kind(width=5) is ConvEstimator  # padding would be most of the work
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kind() is ConvEstimator
        assert kind(compile=True) is CompiledEstimator
        with torch.no_grad():
            assert kind(compile=True) is ConvEstimator
    assert kind(compile=True) is WinogradEstimator  # compiling is slower here


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_flows_share_is_folded_and_prepared_once(coupling, monkeypatch):
    monkeypatch.setattr(WinogradEstimator, "suits", lambda *_: False)
    model = random_vocoder(coupling, n_flow=4)
    flows, x = model.flows(), torch.zeros(1, 1, 8, 64)
    step = FastFlows(flows, torch.zeros(1, 80, 8, 64), Execution())
    for flow in flows:
        step(flow, x)
    kept = [len(bound._products) for bound in step._bound.values()]
    assert kept == ([2] if coupling.startswith("nanoflow") else [0] * 4)  # row orders that occur


def test_projection_stays_in_float32_under_autocast():
    transform, features = Affine(random_vocoder().config), torch.randn(1, 6, 2, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = project(transform, features)
    assert params.dtype == torch.float32
    torch.testing.assert_close(params, transform.project(features.float()))
