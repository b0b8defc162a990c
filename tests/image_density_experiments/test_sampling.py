"""Samples that leave the range of pixels are drawn again and counted; values that are not finite are shown as grey."""

import numpy as np
import pytest
import torch

from image_density_experiments.sampling import ATTEMPTS, draw, shown
from tests.support.image_models import random_model

COUPLINGS = ("affine", "additive", "spline")


class Scripted(torch.nn.Module):
    """A stand-in for a model whose every draw is scripted: the value that each image is filled with."""

    def __init__(self, *draws):
        super().__init__()
        self.config = random_model(K=1).config
        self.draws, self.asked = list(draws), []
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def reverse(self, y_onehot, temperature, n):
        self.asked.append(n)
        values = torch.tensor(self.draws.pop(0) if self.draws else [9.0] * n)
        return values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.01, -7.0, 1e38])
def test_only_what_leaves_the_range_is_drawn_again(bad):
    model = Scripted([0.1, bad, 0.3, bad], [0.5, bad], [-0.9])
    samples = draw(model, 4, 1.0, seed=0)
    assert samples.images[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.5, 0.3, -0.9])
    assert model.asked == [4, 2, 1] and (samples.n_drawn, samples.n_rejected) == (7, 3)
    assert str(samples) == "3 of 7 draws left the range of pixels and were drawn again"


def test_a_model_that_cannot_do_better_is_given_up_and_named():
    samples = draw(Scripted([0.1, float("nan")], *[[float("inf")]] * ATTEMPTS), 2, 1.0, seed=0)
    assert samples.n_rejected == ATTEMPTS
    assert str(samples).endswith("drawn again; 1 of 2 samples still do")


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampling_repeats_and_leaves_no_trace(coupling):
    model = random_model(flow_coupling=coupling).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = draw(model, 70, 0.7, seed=3).images, draw(model, 70, 0.7, seed=3).images
    assert one.equal(other) and torch.get_rng_state().equal(before) and model.training
    assert not one.equal(draw(model, 70, 0.7, seed=4).images)


def test_classes_are_drawn_in_turn_or_as_asked():
    model = random_model(y_condition=True, y_classes=3)
    by_turn, asked = draw(model, 6, 0.5, seed=0), draw(model, 6, 0.5, seed=0, labels=torch.arange(6) % 3)
    assert by_turn.images.equal(asked.images)
    assert not by_turn.images.equal(draw(model, 6, 0.5, seed=0, labels=torch.full((6,), 2)).images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (2, 5, 1, 4, 4)])
def test_values_that_are_not_finite_are_grey_and_counted(shape, bad):
    images = torch.full(shape, 0.49)
    images[..., 1, 0, 0, 0] = bad
    result = shown(images, 8)
    assert result.n_not_finite == np.prod(shape[:-4], dtype=int)
    assert result.pixels[..., 1, 0, 0, 0].flat[0] == 128 and result.pixels[..., 0, 0, 0, 0].flat[0] == 253
    assert "not finite: grey" in result.remark and shown(torch.zeros(shape), 8).remark == ""
