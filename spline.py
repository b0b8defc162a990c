"""The rational-quadratic spline (Durkan et al., NeurIPS 2019), of the vocoder's and the image models' transforms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BIN = 1e-3  # smallest width, height and derivative of a bin


def rational_quadratic_spline(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, tail_bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Monotonic rational-quadratic spline with linear tails (Durkan et al., 2019, eq. 4 to 8).

    x [...]; widths and heights [..., K] and inner derivatives [..., K-1] unconstrained. Returns the mapped x and
    log|derivative| of the direction taken, both [...]. Identity outside [-tail_bound, tail_bound].
    """
    inside = (x >= -tail_bound) & (x <= tail_bound)
    clamped = x.clamp(-tail_bound, tail_bound)
    knots_x, knots_y = _knots(widths, tail_bound), _knots(heights, tail_bound)  # [..., K+1]
    boundary = math.log(math.expm1(1 - MIN_BIN))  # softplus of it + MIN_BIN = 1, the slope of the tails
    slopes = MIN_BIN + F.softplus(F.pad(derivatives, (1, 1), value=boundary))  # [..., K+1]

    searched = knots_y if inverse else knots_x
    k = (clamped.unsqueeze(-1) >= searched[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (
        values.gather(-1, k + step).squeeze(-1) for values in (knots_x, knots_y, slopes) for step in (0, 1)
    )
    width, height = x1 - x0, y1 - y0
    slope = height / width
    curve = d0 + d1 - 2 * slope
    theta = _spline_inverse_theta(clamped - y0, height, slope, d0, curve) if inverse else (clamped - x0) / width
    mixed = theta * (1 - theta)
    denominator = slope + curve * mixed
    mapped = x0 + theta * width if inverse else y0 + height * (slope * theta**2 + d0 * mixed) / denominator
    log_det = (
        2 * torch.log(slope)
        + torch.log(d1 * theta**2 + 2 * slope * mixed + d0 * (1 - theta) ** 2)
        - 2 * torch.log(denominator)
    )
    log_det = torch.where(inside, -log_det if inverse else log_det, 0.0)
    return torch.where(inside, mapped, x), log_det


def _knots(sizes: Tensor, tail_bound: float) -> Tensor:
    n_bins = sizes.size(-1)
    fractions = MIN_BIN + (1 - MIN_BIN * n_bins) * F.softmax(sizes, dim=-1)
    inner = 2 * tail_bound * _running_sums(fractions[..., :-1]) - tail_bound
    return F.pad(F.pad(inner, (1, 0), value=-tail_bound), (0, 1), value=tail_bound)


def _running_sums(x: Tensor) -> Tensor:
    """Running sums along the last axis, which cumsum gives on CUDA only where results may vary.

    As a product in float64, which neither TF32 nor autocast touches, and by a name that Apex does not cast.
    """
    triangle = torch.ones(x.size(-1), x.size(-1), dtype=torch.float64, device=x.device).triu()
    return torch.ops.aten.matmul(x.double(), triangle).to(x.dtype)


def _spline_inverse_theta(dy: Tensor, height: Tensor, slope: Tensor, d0: Tensor, curve: Tensor) -> Tensor:
    # The root of a theta^2 + b theta + c that lies in [0, 1], in the form that does not cancel (eq. 6 to 8).
    a = height * (slope - d0) + dy * curve
    b = height * d0 - dy * curve
    c = -slope * dy
    discriminant = (b**2 - 4 * a * c).clamp(min=0)
    return 2 * c / (-b - discriminant.sqrt())
