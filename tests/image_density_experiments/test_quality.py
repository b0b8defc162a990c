"""Distances between sets of images: known values, features by name, and what cannot be measured."""

import os
import re
import zipfile

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from harness.errors import InputError
from image_density_experiments.quality import (
    distance,
    features_of,
    frechet_distance,
    kernel_distance,
    make_features,
)
from tests.support.image_models import random_model

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 5), (40, 20, 1), (10, 12, 30)])
def test_the_frechet_distance_is_its_formula(n, m, d):
    x, y = RANDOM.normal(size=(n, d)) @ RANDOM.normal(size=(d, d)), RANDOM.normal(1, 2, (m, d))
    one, other = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6 * np.trace(one))


def test_the_kernel_distance_is_its_formula_and_nought_for_the_same_distribution():
    x, y = RANDOM.normal(size=(20, 3)), RANDOM.normal(1, 1, (20, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(20) for j in range(20)]
    within = sum(kernel(a[i], a[j]) for a in (x, y) for i, j in pairs if i != j) / (20 * 19)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 400
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(expected) and std < 1e-9  # every subset is all of them
    same = RANDOM.normal(size=(2, 400, 3))
    assert abs(kernel_distance(*same)[0]) < 0.05 < mean


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


class Maps(torch.nn.Module):
    def forward(self, x):
        return (x, x.sum())


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.mean()


def scripted(path, network):
    torch.jit.save(torch.jit.script(network), path)
    return str(path)


@pytest.mark.parametrize("network", [Mean(), Maps()])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_the_user_gives_features(tmp_path, network, channels):
    features, name = make_features(scripted(tmp_path / "net.pt", network), random_model())
    assert name == "the features of net.pt"
    result = features_of(IMAGES[..., :channels], features)
    expected = np.broadcast_to(IMAGES[..., :channels], IMAGES.shape).mean(axis=(1, 2))
    assert np.allclose(result, expected, rtol=1e-5)


def test_the_flows_own_latents_are_features():
    model = random_model().eval()
    features, name = make_features("latents", model)
    assert name == "the flow's own top latents"
    result = features_of(IMAGES, features)
    assert result.shape == (70, 24 * 2 * 2)
    assert distance(result[:35], result[35:]).fid < distance(result[:35], result[35:] + 5).fid


def test_networks_that_do_not_fit_are_one_line(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"nothing of a network")
    with pytest.raises(InputError, match=r"no\.pt: cannot be loaded as a TorchScript network"):
        make_features(str(tmp_path / "no.pt"), random_model())
    features, _ = make_features(scripted(tmp_path / "flat.pt", Flat()), random_model())
    with pytest.raises(InputError, match=r"flat\.pt: does not take images of shape .*expected \[64, D\]"):
        features_of(IMAGES, features)


def test_what_is_no_network_is_refused_at_once_in_our_words(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x" * 999)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("data.pkl", "x")
    for name in ("pipe", "empty", "text", "archive", "", "none", "n" * 300, "nul\0"):
        with pytest.raises(InputError, match="cannot be loaded as a TorchScript network") as error:
            make_features(str(tmp_path / name), random_model())
        assert not re.search("miniz|PytorchStreamReader|seeing|enforce", str(error.value))


def test_what_has_no_distance_is_refused():
    with pytest.raises(InputError, match="1 samples: a distance needs at least 2"):
        distance(np.zeros((5, 2)), np.zeros((1, 2)))
    with pytest.raises(InputError, match="3 of 70 images have features that are not finite"):
        values = iter([torch.full((64, 2), 1.0), torch.tensor([[0.0, float("nan")]] * 3 + [[0.0, 0.0]] * 3)])
        features_of(IMAGES, lambda _: next(values))
