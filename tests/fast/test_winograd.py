"""Training by Winograd's products is training by convolutions: the same output, the same gradients."""

import pytest
import torch

from fast import winograd
from fast.estimators import Execution
from fast.winograd import GatedLayer, Geometry, Layer, Workspace, product_weights
from modules import FlowLoss
from tests.support.vocoders import random_input, random_vocoder

COUPLINGS = ["waveflow", "waveflow_official", "nanoflow_naive", "nanoflow_decomp", "nanoflow"]
SHAPES = {
    "cycle 2": {"n_height": 16, "n_layer": 4, "n_layer_per_cycle": 2},
    "dilation as high as the rows": {"n_height": 4, "n_layer": 3, "n_layer_per_cycle": 3},
    "one row": {"n_height": 1, "n_flow": 2, "n_layer": 3},
    "one layer": {"n_layer": 1},
    "spline": {"transform": "spline"},
}


def loss_and_gradients(model, execution, audio, mel):
    model.zero_grad()
    model.execution = execution
    loss = FlowLoss()(model(audio, mel))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture(params=[4096, 300, 1], ids=["all rows", "some rows", "row by row"])
def tile(request, monkeypatch):
    monkeypatch.setattr(winograd, "TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_loss_and_gradients_are_those_of_convolutions(coupling, shape):
    model = random_vocoder(coupling, dtype=torch.float64, **SHAPES[shape])
    audio, mel = random_input(model)
    audio = audio[:, : -3 * model.config.n_height]  # not a whole number of blocks
    results = [loss_and_gradients(model, Execution(plain=plain), audio, mel) for plain in (False, True)]
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_likelihood_goes_through_it_with_the_conditioning_prepared_once(coupling, monkeypatch):
    model = random_vocoder(coupling, n_flow=4)
    layers, apply = [], GatedLayer.apply

    def counted(geometry, hidden, params, conditioning, *layer):
        layers.append(conditioning)
        return apply(geometry, hidden, params, conditioning, *layer)

    monkeypatch.setattr(GatedLayer, "apply", counted)
    model(*random_input(model))
    assert len(layers) == 4 * 2  # flows, layers after the first
    assert len({conditioning.data_ptr() for conditioning in layers}) == 2  # row orders that occur


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_recomputed_flows_give_the_same_bits(coupling):
    model = random_vocoder(coupling)
    audio, mel = random_input(model)
    kept = loss_and_gradients(model, Execution(), audio, mel)
    recomputed = loss_and_gradients(model, Execution(checkpoint_activations=True), audio, mel)
    for once, again in zip(kept, recomputed, strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("dilation", [(1, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_a_layers_backward_is_its_forwards_derivative(dilation, last):
    torch.manual_seed(0)
    n_res, bands, n_params, width = 3, 2, 2, 14  # of 16 columns, two are padding

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    hidden, params, mel = random(2, 5, width, n_res), random(2, 5, 16, n_params), random(2, 5, 16, bands)
    taps, residual = random(3, 3, n_res, 2 * n_res), (None, None) if last else (random(n_res, n_res), random(n_res))
    weights = random(bands, 2 * n_res), random(2 * n_res), random(n_res, n_params)

    def run(hidden, params, mel, taps, conditioning, bias, skip, *residual):
        layer = Layer(product_weights(taps), conditioning, bias, *residual, skip)
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, 16 - width))
        after, params = GatedLayer.apply(Geometry(dilation, width, Workspace()), padded, params, mel, *layer)
        return (params[:, :, :width],) if last else (after[:, :, :width], params[:, :, :width])

    assert torch.autograd.gradcheck(run, (hidden, params, mel, taps, *weights, *residual))


def test_padding_stays_zero():
    torch.manual_seed(0)
    hidden = torch.nn.functional.pad(torch.randn(1, 4, 5, 2), (0, 0, 0, 3))
    layer = Layer(torch.randn(3, 4, 2, 4), torch.randn(2, 4), *map(torch.randn, (4, (2, 2), 2, (2, 16))))
    after, _ = GatedLayer.apply(
        Geometry((1, 2), 5, Workspace()), hidden, torch.zeros(1, 4, 8, 16), torch.randn(1, 4, 8, 2), *layer
    )
    assert (after[:, :, 5:] == 0).all()
    assert (after[:, :, :5] != 0).all()


def test_tensors_of_another_memory_layout_give_the_same():
    torch.manual_seed(0)
    layer = Layer(torch.randn(3, 4, 2, 4), torch.randn(2, 4), *map(torch.randn, (4, (2, 2), 2, (2, 16))))
    inputs = [torch.randn(1, 4, 8, n) for n in (2, 16, 2)]

    def run(tensors):
        return GatedLayer.apply(Geometry((1, 2), 8, Workspace()), *tensors, *layer)

    swapped = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    for expected, actual in zip(run(inputs), run(swapped), strict=True):
        assert torch.equal(actual, expected)
