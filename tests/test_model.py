import json
from pathlib import Path

import pytest
import torch

from fast.estimators import Execution
from harness.errors import InputError
from model import build_model, count_parameters, row_orders
from tests.support.vocoders import random_input, random_vocoder, small_config

COUNTS = {  # training, synthesis; as published
    "waveflow-h16-r64": (5_950_180, 5_925_090),
    "waveflow-h16-r128": (22_385_892, 22_335_714),
    "nanoflow-h16-r128-emb512": (3_865_188, 2_818_530),
    "nanoflow-h16-r128-emb1024-f16": (4_936_324, 2_845_186),
    "nanoflow-naive-h16-r128": (2_798_408, 2_792_134),
    "nanoflow-decomp-h16-r128": (2_800_228, 2_793_954),
}
VARIANTS = [
    {"coupling_type": coupling_type, "transform": transform}
    for coupling_type in ("waveflow", "waveflow_official", "nanoflow_naive", "nanoflow_decomp", "nanoflow")
    for transform in ("affine", "spline")
    if (coupling_type, transform) != ("waveflow_official", "spline")
]
SHAPES = [
    {"n_height": 8, "n_layer_per_cycle": 1, "n_flow": 4},
    {"n_height": 16, "n_layer_per_cycle": 2, "n_flow": 3},
    {"n_height": 32, "n_layer_per_cycle": 3, "n_flow": 2},
    {"n_height": 64, "n_layer": 5, "n_layer_per_cycle": 5, "n_flow": 1},
    {"n_height": 16, "n_flow": 5, "bipartize": True},
    {"n_height": 8, "n_flow": 6, "bipartize": True},
]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    path = Path(__file__).parents[1] / "configs" / f"{name}.json"
    with torch.device("meta"):
        model = build_model(json.loads(path.read_text())["waveflow_config"])
    assert (count_parameters(model), count_parameters(model, synthesis=True)) == COUNTS[name]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
def test_both_inverses_invert_forward(variant, shape):
    model = random_vocoder(**variant, **shape, dtype=torch.float64)
    audio, mel = random_input(model)
    z, _ = model(audio, mel)
    assert (z.flatten() - audio.flatten()).abs().max() > 0.05
    for inverse in (model.reverse, model.reverse_fast):
        torch.testing.assert_close(inverse(mel, z=z.detach()), audio, atol=1e-10, rtol=0)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_log_det_is_that_of_the_jacobian(variant, plain):
    model = random_vocoder(**variant, n_height=4, dtype=torch.float64, upsample_strides=(4, 2))
    model.execution = Execution(plain=plain)
    audio, mel = random_input(model, frames=4)
    _, log_det = model(audio, mel)
    for item in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, item=item: model(x.unsqueeze(0), mel[item : item + 1])[0].flatten(), audio[item]
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[item], atol=1e-8, rtol=1e-8)


def test_items_of_a_batch_do_not_meet():
    model = random_vocoder()
    audio, mel = random_input(model, batch=3)
    z, log_det = model(audio, mel)
    alone_z, alone_log_det = model(audio[1:2], mel[1:2])
    torch.testing.assert_close(z[1:2], alone_z)
    torch.testing.assert_close(log_det[1:2], alone_log_det)


def test_fast_synthesis_leaves_the_model_able_to_train():
    model = random_vocoder().train()
    audio, mel = random_input(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = torch.autograd.grad(model(audio, mel)[1].sum(), model.parameters())
    model.reverse_fast(mel)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = torch.autograd.grad(model(audio, mel)[1].sum(), model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(expected, after, strict=True))


def test_every_parameter_that_can_matter_gets_a_gradient():
    model = random_vocoder()
    audio, mel = random_input(model)
    z, log_det = model(audio, mel)
    (z.square().sum() - log_det.sum()).backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad.norm() < 1e-4]
    assert silent == ["estimators.0.front_conv.weight_v"]  # the direction of a single number has no gradient


def gradients_and_saved(recompute, coupling_type, n_flow):
    """The gradients of a likelihood, and how many numbers were kept for computing them."""
    model = random_vocoder(coupling_type, n_flow=n_flow, dtype=torch.float64)
    model.execution = Execution(checkpoint_activations=recompute)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        z, log_det = model(*random_input(model))
    return torch.autograd.grad(z.square().sum() - log_det.sum(), model.parameters()), sum(kept)


@pytest.mark.parametrize("coupling_type", ["waveflow", "nanoflow"])
def test_recomputed_activations_give_the_same_gradients_and_hardly_grow_with_the_flows(coupling_type):
    kept = {}
    for n_flow in (4, 6):
        plain, kept[False, n_flow] = gradients_and_saved(False, coupling_type, n_flow)
        recomputed, kept[True, n_flow] = gradients_and_saved(True, coupling_type, n_flow)
        torch.testing.assert_close(recomputed, plain)
    growth = {recompute: kept[recompute, 6] - kept[recompute, 4] for recompute in (False, True)}
    assert growth[True] < growth[False] / 20


def test_half_precision_likelihood_stays_in_float32():
    model = random_vocoder()
    audio, mel = random_input(model)
    expected_z, expected = model(audio, mel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = model(audio, mel)
    assert z.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(log_det / audio.size(1), expected / audio.size(1), atol=0.02, rtol=0)
    assert (z - expected_z).abs().mean() < 0.05


@pytest.mark.parametrize("method", ["reverse", "reverse_fast"])
def test_length_temperature_and_noise(method):
    model = random_vocoder(n_flow=1)
    mel = torch.randn(2, 80, 3)
    torch.manual_seed(5)
    audio = getattr(model, method)(mel, temp=0.5)
    assert audio.shape == (2, 2 * 256)
    torch.manual_seed(5)
    torch.testing.assert_close(getattr(model, method)(mel, z=model.sample_noise(mel, 0.5)), audio)
    silence = getattr(model, method)(mel, temp=0.0)
    torch.testing.assert_close(getattr(model, method)(mel, z=torch.zeros(2, 1, 8, 64)), silence)


def test_conditioning_order_adds_up_from_flow_to_flow():
    model = random_vocoder(n_height=4, n_flow=3)
    assert [order for _, order in row_orders(model.config)] == [(3, 2, 1, 0), (0, 1, 2, 3), (3, 2, 1, 0)]
    halves = random_vocoder(n_height=4, n_flow=2, bipartize=True)
    assert [order for _, order in row_orders(halves.config)] == [(3, 2, 1, 0), (2, 3, 0, 1)]


def test_wrong_shapes_are_named():
    model = random_vocoder()
    audio, mel = random_input(model)
    with pytest.raises(InputError, match="4 frames covers 1024 samples, but the audio has 2048"):
        model(torch.zeros(2, 2048), mel)
    with pytest.raises(InputError, match=r"\[2, 40, 4\]: expected \[batch, 80, frames\]"):
        model(audio, mel[:, :40])
    with pytest.raises(InputError, match="multiple of the squeeze height 8"):
        model(audio[:, :-3], mel)
    with pytest.raises(InputError, match=r"audio of shape \[768\]"):
        model(audio[0], mel)
    with pytest.raises(InputError, match=r"audio of shape \[1, \d+\] and mel of shape \[2, 80, 4\]"):
        model(audio[:1], mel)


@pytest.mark.parametrize("method", ["reverse", "reverse_fast"])
def test_wrong_shapes_of_synthesis_are_named(method):
    model = random_vocoder()
    mel = torch.zeros(2, 80, 4)
    with pytest.raises(InputError, match="covers no audio"):
        getattr(model, method)(mel[:, :, :1])
    with pytest.raises(InputError, match=r"\[80, 4\]: expected \[batch, 80, frames\]"):
        getattr(model, method)(mel[0])
    for shape in [(2, 1, 4, 96), (2, 2, 8, 96), (1, 1, 8, 96), (8, 96)]:
        with pytest.raises(InputError, match=r"expected \[2, 1, 8, columns\]"):
            getattr(model, method)(mel, z=torch.zeros(shape))


def test_build_model_takes_published_strings_and_names_mistakes():
    model = build_model(small_config(use_weightnorm_embed="True"))
    assert set(dict(model.flow_embedding.named_parameters())) == {"weight_g", "weight_v"}
    with pytest.raises(InputError, match=r"waveflow_config\.n_hieght: unknown key; did you mean 'n_height'"):
        build_model(small_config(n_hieght=3))
