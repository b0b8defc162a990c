"""Image models: sharing, counts, inverses, likelihoods, sampling, bad input."""

import math

import pytest
import torch

from harness.errors import InputError
from image_density_experiments.model import DESIGNS, build_model, count_parameters
from tests.support.image_models import random_images, random_model

PUBLISHED_COUNTS = [  # at 32x32x3, hidden 256, K 32, L 3, D 1, affine, LU, learned top, unless said otherwise
    ("glow", {}, 15_972_912),
    ("glow", {"hidden_channels": 512}, 44_235_312),
    ("glow_large", {}, 287_488_560),
    ("nanoflow_naive", {}, 9_263_064),
    ("nanoflow_decomp", {}, 9_934_896),
    ("nanoflow", {}, 10_113_264),
    ("nanoflow", {"K": 48, "flow_embed_dim": 3}, 10_718_544),
    ("nanoflowalt", {}, 6_961_392),
]


@pytest.mark.parametrize(("model_type", "changes", "count"), PUBLISHED_COUNTS)
def test_parameter_counts_are_the_published_ones(model_type, changes, count):
    with torch.device("meta"):
        model = build_model(model_type=model_type, **{"hidden_channels": 256, **changes})
    assert count_parameters(model) == count


@pytest.mark.parametrize("model_type", DESIGNS)
@pytest.mark.parametrize("coupling", ["affine", "additive", "spline"])
@pytest.mark.parametrize("permutation", ["invconv", "shuffle", "reverse"])
def test_decoding_inverts_encoding(model_type, coupling, permutation):
    model = random_model(model_type, flow_coupling=coupling, flow_permutation=permutation)
    x = random_images(model)
    latents, _ = model.encode(x)
    torch.testing.assert_close(model.decode(latents), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["glow", "nanoflow", "nanoflow_naive"])
@pytest.mark.parametrize("coupling", ["affine", "additive", "spline"])
@pytest.mark.parametrize("options", [{}, {"LU_decomposed": False}, {"flow_permutation": "shuffle"}])
def test_log_determinant_is_that_of_the_jacobian(model_type, coupling, options):
    model = random_model(model_type, dtype=torch.float64, image_shape=(4, 4, 2), flow_coupling=coupling, **options)
    x = random_images(model, n=1)

    def flat(inputs):
        return torch.cat([latent.flatten() for latent in model.encode(inputs.view_as(x))[0]])

    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    torch.testing.assert_close(model.encode(x)[1][0], torch.linalg.slogdet(jacobian)[1], atol=1e-9, rtol=1e-9)


def test_bits_per_dim_are_those_of_the_latents():
    model = random_model("glow", n_bits=5)
    x = random_images(model)
    noise = torch.full_like(x, 0.5 / 32)
    z, bits_per_dim, _ = model(x, noise=noise)
    latents, log_det = model.encode(x + noise)
    mean, log_std = model.prior(len(x))
    densities = [torch.distributions.Normal(0, 1).log_prob(latent).flatten(1).sum(1) for latent in latents[:-1]]
    top = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).flatten(1).sum(1)
    nats = log_det + sum(densities) + top
    torch.testing.assert_close(bits_per_dim, 5 - nats / (math.log(2) * 8 * 8 * 3))


@pytest.mark.parametrize("model_type", DESIGNS)
def test_a_training_step_lowers_the_bits(model_type):
    torch.manual_seed(0)
    model = build_model(model_type=model_type, image_shape=(8, 8, 3), hidden_channels=8, K=2, L=2)
    x = random_images(model, n=16) * 0.3
    noise = model.draw_noise(x)
    model(x, noise=noise)  # the first data initialise the actnorms
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(x, noise=noise)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("model_type", DESIGNS)
def test_samples_of_any_number(model_type):
    model = random_model(model_type)
    for n in (1, 5):
        images = model.reverse(n=n, temperature=0.7)
        assert images.shape == (n, 3, 8, 8)
        assert torch.isfinite(images).all()
    assert model.reverse().shape == (1, 3, 8, 8)


def test_temperature_scales_all_that_is_drawn():
    model = random_model("glow")
    model_means = [model.reverse(temperature=0.0) for _ in range(2)]
    assert torch.equal(*model_means)
    latents, _ = model.encode(model_means[0])
    for noise in latents[:-1]:
        assert noise.abs().max() < 1e-3
    torch.testing.assert_close(latents[-1], model.prior(1)[0], atol=1e-3, rtol=0)


def test_class_conditional_samples_and_likelihood_depend_on_the_class():
    model = random_model("nanoflow", y_condition=True, y_classes=4)
    x, noise = random_images(model), 0.0
    classes = torch.eye(4)
    images = model.reverse(y_onehot=classes, temperature=0.0)
    assert images.shape == (4, 3, 8, 8)
    assert len({image.sum().item() for image in images}) == 4
    bits = [model(x, classes[c].expand(4, -1), noise=torch.full_like(x, noise))[1] for c in (0, 1)]
    assert not torch.equal(*bits)
    logits = model(x, classes)[2]
    assert logits.shape == (4, 4)


@pytest.mark.parametrize("y_onehot", [None, torch.zeros(2, 4), torch.zeros(4, 3)])
def test_labels_that_do_not_fit_are_refused(y_onehot):
    model = random_model("glow", y_condition=True, y_classes=4)
    with pytest.raises(InputError, match=r"expected.*\[4, 4\]"):
        model(random_images(model), y_onehot)


@pytest.mark.parametrize("shape", [(4, 3, 8, 4), (4, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"expected \[batch, 3, 8, 8\]"):
        random_model("glow")(torch.zeros(shape))


def test_latents_of_another_shape_and_no_images_are_refused():
    model = random_model("glow")
    with pytest.raises(InputError, match=r"z of shape \[2, 12, 2, 2\]: expected \[n, 24, 2, 2\]"):
        model.reverse(torch.zeros(2, 12, 2, 2))
    with pytest.raises(InputError, match="n 0: expected at least 1"):
        model.reverse(n=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "glowing"}, r"model_type: expected one of glow, glow_large, nanoflow_naive, .*'glowing'"),
        ({"image_shape": (32, 36, 3)}, r"images of 32x36 cannot be halved 3 times.*2\^L = 8"),
        ({"image_shape": (32, 32)}, r"expected \(height, width, channels\)"),
        ({"flow_coupling": "cubic"}, "flow_coupling: expected one of affine, additive, spline"),
        ({"flow_permutation": "swap"}, "flow_permutation: expected one of invconv, shuffle, reverse"),
        ({"K": 0}, "K: expected at least 1"),
        ({"n_bits": 9}, "n_bits: expected at most 8, got 9"),
        ({"k": 3}, "k: unknown key"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build_model(**options)
