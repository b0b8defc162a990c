"""Layers of the image models: actnorm's state, permutations, saved state, and figures of merit."""

import copy

import numpy as np
import pytest
import torch

from harness.errors import InputError
from image_density_experiments.checkpoint import load_checkpoint, save_checkpoint, to_published
from image_density_experiments.datasets import Split
from image_density_experiments.evaluation import auroc, interpolate, reconstruct
from image_density_experiments.model import load_weights
from image_density_experiments.modules import (
    COUPLINGS,
    ActNorm,
    FlowIndication,
    FlowStep,
    InvertibleConv1x1,
    Permutation,
    squeeze,
    unsqueeze,
)
from tests.support.image_models import random_images, random_model


def test_actnorm_normalises_its_first_training_batch_and_no_other():
    torch.manual_seed(0)
    actnorm = ActNorm(3, scale=0.5)
    first, second = 4 * torch.randn(64, 3, 4, 4) + 2, torch.randn(64, 3, 4, 4)
    actnorm.eval()
    torch.testing.assert_close(actnorm(first)[0], first)  # evaluation data change nothing
    actnorm.train()
    y, _ = actnorm(first)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(dim=(0, 2, 3), correction=0), torch.full((3,), 0.5), atol=1e-5, rtol=0)
    state = copy.deepcopy(actnorm.state_dict())
    actnorm(second)
    assert all(torch.equal(value, actnorm.state_dict()[name]) for name, value in state.items())


def test_a_reloaded_actnorm_is_not_initialised_again():
    actnorm, fresh = ActNorm(2), ActNorm(2)
    actnorm(torch.randn(8, 2, 2, 2))
    fresh.load_state_dict(actnorm.state_dict())
    x = torch.randn(8, 2, 2, 2) * 9
    torch.testing.assert_close(fresh(x)[0], actnorm(x)[0])


@pytest.mark.parametrize("coupling", COUPLINGS.values())
def test_couplings_invert_and_have_the_right_gradients_in_float64(coupling):
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 2, 2, 2, dtype=torch.float64)  # some beyond the spline's tails
    params = torch.randn(2, 2 * coupling.params_per_channel, 2, 2, dtype=torch.float64)
    z, log_scale = coupling.forward(x, params)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(coupling.inverse(z, params), x, atol=1e-10, rtol=0)
    slopes = torch.autograd.functional.jacobian(lambda v: coupling.forward(v, params)[0].sum(), x)
    torch.testing.assert_close(log_scale, slopes.log(), atol=1e-10, rtol=0)
    inputs = (x.requires_grad_(), params.requires_grad_())
    assert torch.autograd.gradcheck(coupling.forward, inputs)
    assert torch.autograd.gradcheck(coupling.inverse, inputs)


def test_squeeze_orders_channels_by_row_and_column_in_the_block():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert squeeze(x).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert squeeze(torch.arange(16.0).view(1, 1, 4, 4))[0, :, 0, 1].tolist() == [2, 3, 6, 7]
    assert torch.equal(unsqueeze(squeeze(x)), x)


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(InputError, match="5 channels cannot be halved"):
        FlowStep(5, Permutation(5, shuffle=False), 1.0)


@pytest.mark.parametrize("model_type", ["glow", "glow_large", "nanoflow_naive", "nanoflow", "nanoflowalt_decomp"])
@pytest.mark.parametrize("permutation", ["invconv", "shuffle"])
def test_a_saved_model_is_the_same_model(tmp_path, model_type, permutation):
    options = {"flow_permutation": permutation, "y_condition": True, "y_classes": 4}
    model = random_model(model_type, **options)
    save_checkpoint(tmp_path / "model.pt", model, iteration=3)
    other = random_model(model_type, seed=1, **options)
    for name, buffer in other.named_buffers():
        if name.endswith("initialised"):
            buffer.fill_(False)
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    load_weights(other, checkpoint["model"])
    x, classes = random_images(model), torch.eye(4)
    noise = model.draw_noise(x)
    for ours, theirs in zip(model(x, classes, noise), other.train()(x, classes, noise), strict=True):
        assert torch.equal(ours, theirs)
    assert checkpoint["iteration"] == 3


@pytest.mark.parametrize("model_type", ["glow", "glow_large", "nanoflow_naive", "nanoflow", "nanoflowalt_naive"])
def test_published_names_are_unique_and_weights_load_under_our_own_names_too(model_type):
    model, other = random_model(model_type), random_model(model_type, seed=1)
    assert len({to_published(name, model.config) for name in model.state_dict()}) == len(model.state_dict())
    load_weights(other, model.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused_by_name():
    with pytest.raises(InputError, match=r"missing: .*gates"):
        load_weights(random_model("nanoflow"), random_model("nanoflow_decomp").state_dict())


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {"a": 3}}, {"model": None}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: (holds no|its) weights"):
        load_checkpoint(tmp_path / "a.pt")


def uniform_split(n):
    return Split(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))


def test_reconstructions_are_exact_and_the_error_is_measured():
    result = reconstruct(random_model("nanoflow").eval(), uniform_split(5), 4)
    assert result.images.shape == (4, 3, 8, 8)
    assert result.exact == 1 and 0 < result.max_error < 1e-4


def test_interpolation_ends_at_the_images():
    model, split = random_model("nanoflow").eval(), uniform_split(6)
    lines = interpolate(model, split, n_pairs=2, n_steps=5)
    assert lines.shape == (2, 5, 3, 8, 8)
    ends = np.stack([split.images[index] for index in (0, 2, 3, 5)]).transpose(0, 3, 1, 2) / 256 - 0.5 + 0.5 / 256
    found = torch.cat([lines[:, 0], lines[:, -1]])
    torch.testing.assert_close(found, torch.from_numpy(ends).float(), atol=1e-4, rtol=0)
    assert (lines[:, 2] - (lines[:, 0] + lines[:, -1]) / 2).abs().max() > 1e-3  # straight in the latents only


def test_auroc_counts_pairs():
    random = np.random.default_rng(0)
    inside, outside = random.integers(0, 9, 30), random.integers(2, 11, 40)
    pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([1.0, 2.0]), np.array([3.0])) == 1


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 8, 8)])
def test_a_constant_channel_is_not_amplified(shape, value):
    norm = ActNorm(4).train()
    norm(torch.full(shape, value))
    assert torch.allclose(norm.logs, torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_an_indication_map_enters_with_its_own_size(side):
    indication = FlowIndication(3, side, side).train()
    before = indication.map.detach().clone()
    added = indication(torch.zeros(2, 4, side, side))[:, 4:]
    assert added.abs().max() < 10
    assert added.abs().min() > 0 or side > 1  # a single number is not normalised away
    added.sum().backward()
    assert indication.map.grad.abs().max() < 100 and before.equal(indication.map)


@pytest.mark.parametrize("lu", [True, False])
def test_a_singular_mixing_matrix_is_one_line(lu):
    mixing = InvertibleConv1x1(4, LU_decomposed=lu)
    with torch.no_grad():
        if lu:
            mixing.log_s[1] = -float("inf")
        else:
            mixing.weight[2] = 0
    with pytest.raises(InputError, match=r"mixing matrix of 4 channels has become singular: .* earlier checkpoint"):
        mixing.inverse(torch.zeros(1, 4, 2, 2))
