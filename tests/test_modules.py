import math

import pytest
import torch

from config import WaveFlowConfig
from harness.errors import InputError
from harness.settings import parse_section
from modules import (
    Affine,
    Estimator,
    FlowEmbedding,
    FlowLoss,
    Spline,
    Upsampler,
    WeightNorm,
    row_permutation,
    shift_down,
    squeeze,
    unsqueeze,
)
from spline import rational_quadratic_spline
from tests.support.vocoders import small_config


def config(**changes):
    return parse_section(WaveFlowConfig, small_config(**changes))


def test_squeeze_fills_column_by_column():
    x = torch.arange(12.0).view(1, 1, 12)
    squeezed = squeeze(x, 4)
    assert squeezed[0, 0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert torch.equal(unsqueeze(squeezed), x)
    with pytest.raises(InputError, match="multiple"):
        squeeze(x, 5)


def test_shift_down_puts_a_zero_row_on_top():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert shift_down(x)[0, 0].tolist() == [[0, 0], [1, 2]]


def test_row_permutations_are_their_own_inverses():
    assert row_permutation(6, halves=False) == [5, 4, 3, 2, 1, 0]
    assert row_permutation(6, halves=True) == [2, 1, 0, 5, 4, 3]
    for halves in (False, True):
        rows = row_permutation(8, halves)
        assert [rows[row] for row in rows] == list(range(8))


def test_weight_norm_starts_at_its_own_direction_and_has_the_norm_g():
    conv = WeightNorm(5, 3, 3, 3)
    torch.testing.assert_close(conv.weight(), conv.weight_v)
    with torch.no_grad():
        conv.weight_g.copy_(torch.arange(1.0, 6.0).view(5, 1, 1, 1))
    torch.testing.assert_close(conv.weight().flatten(1).norm(dim=1), torch.arange(1.0, 6.0))


@pytest.mark.parametrize("strides", [(16, 16), (4, 8, 2)])
def test_upsampler_gives_one_column_per_sample(strides):
    assert Upsampler(strides)(torch.randn(2, 10, 5)).shape == (2, 10, 5 * math.prod(strides))


def test_flow_embedding_is_orthogonal_and_weight_norm_changes_only_its_parameters():
    for weight_norm in (False, True):
        table = FlowEmbedding(4, 9, weight_norm).table()
        torch.testing.assert_close(table @ table.T, torch.eye(4))


def spline_parameters(shape, n_bins, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, n, generator=generator, dtype=torch.float64) for n in (n_bins, n_bins, n_bins - 1)]


def test_spline_inverts_and_its_log_derivative_is_autograds():
    x = torch.linspace(-7, 7, 401, dtype=torch.float64, requires_grad=True)
    parameters = spline_parameters((401,), 6)
    y, log_det = rational_quadratic_spline(x, *parameters, tail_bound=5.0)
    [slope] = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(log_det, slope.log())
    back, inverse_log_det = rational_quadratic_spline(y, *parameters, tail_bound=5.0, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-9, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-8, rtol=0)
    assert slope.std() > 0.05  # not the identity


def test_spline_needs_no_running_sum_whose_order_may_vary(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cumsum", None)  # of floats: on CUDA it raises under deterministic algorithms
    monkeypatch.setattr(torch, "cumsum", None)
    for device in ("cpu", "meta"):
        x, *parameters = (tensor.to(device) for tensor in (torch.zeros(3), *spline_parameters((3,), 6)))
        assert rational_quadratic_spline(x, *parameters, tail_bound=5.0)[0].shape == (3,)


def test_spline_knots_do_not_depend_on_autocast():
    x, parameters = torch.linspace(-4, 4, 50), spline_parameters((50,), 6)
    expected, _ = rational_quadratic_spline(x, *parameters, tail_bound=5.0)
    with torch.autocast("cpu"):
        torch.testing.assert_close(rational_quadratic_spline(x, *parameters, tail_bound=5.0)[0], expected)


def test_spline_is_the_identity_outside_and_joins_it_smoothly():
    parameters = spline_parameters((4,), 5)
    x = torch.tensor([-6.0, -4.0, 4.0, 6.0], dtype=torch.float64)
    y, log_det = rational_quadratic_spline(x, *parameters, tail_bound=4.0)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_det, torch.zeros_like(x))


def test_spline_keeps_gradients_finite_far_outside():
    x = torch.tensor([-1e4, 0.1, 1e4], requires_grad=True)
    parameters = [value.float().requires_grad_() for value in spline_parameters((3,), 5)]
    y, log_det = rational_quadratic_spline(x, *parameters, tail_bound=4.0)
    (y.sum() + log_det.sum()).backward()
    assert all(torch.isfinite(value.grad).all() for value in [x, *parameters])


@pytest.mark.parametrize("kind", [Affine, Spline])
def test_transform_inverts_and_its_log_det_is_autograds(kind):
    torch.manual_seed(0)
    transform = kind(config()).double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(std=0.5)
    params = transform.project(torch.randn(2, 6, 3, 4, dtype=torch.float64))
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    z, log_det = transform(x, params)
    [slope] = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_det, slope.log())
    torch.testing.assert_close(transform.inverse(z, params), x)
    assert log_det.abs().max() > 0.01


def test_loss_is_the_negative_log_density_in_nats_per_sample():
    z, log_det = torch.randn(2, 1, 4, 5), torch.tensor([3.0, -1.0])
    density = torch.distributions.Normal(0.0, 0.7).log_prob(z).sum() + log_det.sum()
    torch.testing.assert_close(FlowLoss(0.7)((z, log_det)), -density / 40)


@pytest.mark.parametrize("cycle", [1, 2, 3])
def test_estimator_row_sees_rows_up_to_its_own_and_nothing_below(cycle):
    torch.manual_seed(0)
    estimator = Estimator(config(coupling_type="waveflow", n_layer_per_cycle=cycle))
    x = torch.randn(1, 1, 8, 20, requires_grad=True)
    features = estimator(x, torch.randn(1, 80, 8, 20))
    [gradient] = torch.autograd.grad(features[:, :, 5].square().sum(), x)
    rows = gradient[0, 0].abs().sum(1)
    assert (rows[6:] == 0).all()
    assert rows[5] > 0
    assert rows[5 - 2] > 0


def test_estimator_of_the_first_rows_is_the_first_rows_of_the_estimator():
    torch.manual_seed(0)
    estimator = Estimator(config(coupling_type="waveflow", n_layer_per_cycle=2))
    x, mel = torch.randn(2, 1, 8, 20), torch.randn(2, 80, 8, 20)
    torch.testing.assert_close(estimator(x[:, :, :3], mel[:, :, :3]), estimator(x, mel)[:, :, :3])
