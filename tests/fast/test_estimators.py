"""The estimator sees what it may see, and is the same whichever way it is computed."""

import pytest
import torch

from config import WaveFlowConfig, section_from_dict
from fast.estimators import BoundEstimator, Estimator, WinogradEstimator
from fast.winograd import Workspace
from modules import Affine
from tests.support.vocoders import random_vocoder, small_config


def config(**changes):
    return section_from_dict(WaveFlowConfig, small_config(**changes))


@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_estimator_row_sees_rows_up_to_its_own_and_nothing_below(cycle):
    torch.manual_seed(0)
    settings = config(coupling_type="waveflow", n_layer_per_cycle=cycle)
    estimator = Estimator(settings)
    x = torch.randn(1, 1, 8, 20, requires_grad=True)
    bound = estimator.bind(torch.randn(1, 80, 8, 20))
    features = bound(x, bound.prepare(tuple(range(8))), flow=0)
    [gradient] = torch.autograd.grad(features[:, :, 5].square().sum(), x)
    rows = gradient[0, 0].abs().sum(1)
    assert (rows[6:] == 0).all()
    assert rows[5] > 0
    assert rows[5 - 2] > 0


def test_estimator_of_the_first_rows_is_the_first_rows_of_the_estimator():
    torch.manual_seed(0)
    bound = Estimator(config(coupling_type="waveflow", n_layer_per_cycle=2)).bind(torch.randn(2, 80, 8, 20))
    x, products = torch.randn(2, 1, 8, 20), bound.prepare(tuple(reversed(range(8))))
    torch.testing.assert_close(bound(x[:, :, :3], products, flow=0), bound(x, products, flow=0)[:, :, :3])


def test_where_winograds_products_are_used():
    estimator = Estimator(random_vocoder("waveflow").config)  # three layers: blocks of eight columns

    def bound(width=64, **options):
        return estimator.bind(torch.zeros(1, 80, 8, width), **options)

    assert isinstance(bound(workspace=Workspace()), WinogradEstimator)
    assert isinstance(bound(), BoundEstimator)
    assert isinstance(bound(width=5, workspace=Workspace()), BoundEstimator)  # padding would be most of the work
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(bound(workspace=Workspace()), BoundEstimator)
    estimator.compiled = True  # slower here
    assert isinstance(bound(workspace=Workspace()), WinogradEstimator)


def test_merged_skip_and_projection_are_the_transforms_parameters():
    torch.manual_seed(0)
    model = random_vocoder("waveflow", dtype=torch.float64)
    estimator, transform = model.estimators[0], Affine(model.config).double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_()
    x, mel = torch.randn(2, 1, 8, 30, dtype=torch.float64), torch.randn(2, 80, 8, 30, dtype=torch.float64)
    order = tuple(reversed(range(8)))
    plain, fast = (estimator.bind(mel, workspace=workspace) for workspace in (None, Workspace()))
    expected = transform.project(plain(x, plain.prepare(order), flow=0))
    torch.testing.assert_close(fast.params(x, fast.prepare(order), 0, None, transform), expected)
