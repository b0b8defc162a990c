"""Twin of `EstimatorLayer.forward` in training on a CPU: its convolution in Winograd's domain, forward and backward.

A layer with dilation d sees columns d apart. Take its input in blocks of d columns, E_0 O_0 E_1 O_1 ...; the three
width taps g0, g1, g2 give the pair of output blocks j from O_{j-1}, E_j, O_j, E_{j+1}. F(2, 3) of Lavin and Gray
(arXiv 1509.09308) needs four products for the pair where the plain sum needs six:

    even = a + b + (O_{j-1} - O_j) g0          a = (E_j + O_j) (g0 + g1 + g2) / 2
    odd  = a - b + (E_{j+1} - E_j) g2          b = (O_j - E_j) (g0 - g1 + g2) / 2

The four brackets on the left of a product are the planes of the input: two sums, two differences. A 1x1 product c
joins a and b, as (E + O) c / 2 and -(O - E) c / 2. The gradients are the same sums transposed, with the same four
products for the planes and four for the weights. Rows above come in as further products of the same planes.

Channels are innermost, and the work goes some rows at a time, so that what lies between two products stays in cache.
The skip branches and the projection are merged, as in `folding.py`: their product is R -> P and not R -> R -> P. The
conditioning's product is not kept for the flows that share it: with its gradient it would be most of the memory.
`estimators.py` says when it is used.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules import permute_rows

TILE = 4096  # columns at a time, in whole rows: what a layer makes of them fits the second-level cache of two cores


def product_weights(taps: Tensor) -> Tensor:
    """Taps [3, 3, R, 2R] of a convolution, height by width -> weights [3, 4, R, 2R] of a, b, even and odd."""
    left, centre, right = taps.unbind(1)
    return torch.stack([(left + centre + right) / 2, (left - centre + right) / 2, left, right], dim=1)


class Workspace:
    """What the flows of one pass share: buffers that layers use one after the other, and the conditioning in the few
    row orders that occur."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised and contiguous, of the precision of `like`."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def rows(self, conditioning: Tensor, order: tuple[int, ...], n_layer: int) -> Tensor:
        """conditioning [B, M, h, W] -> [B, h, W', M], rows in `order`, padded to whole pairs of blocks."""
        if order not in self._rows:
            rows = permute_rows(conditioning, order).permute(0, 2, 3, 1)
            self._rows[order] = F.pad(rows, (0, 0, 0, padding(rows.size(2), n_layer))).contiguous()
        return self._rows[order]


def padding(width: int, n_layer: int) -> int:
    """Columns that complete whole pairs of blocks in every layer."""
    return -width % 2**n_layer


# --- planes of rows [c, W, C], in pairs of blocks of d columns ---------------------------------------------------


def _pairs(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """The even and the odd blocks, each [c, W/2d, d, C]."""
    return x.view(len(x), -1, 2, d, x.size(2)).unbind(2)


def _sums(x: Tensor, d: int, out: Tensor) -> None:
    """E + O and O - E into out [2, c, W/2, C]."""
    even, odd = _pairs(x, d)
    total, difference = out.view(2, *even.shape)
    torch.add(even, odd, out=total)
    torch.sub(odd, even, out=difference)


def _differences(x: Tensor, d: int, out: Tensor) -> None:
    """O_{j-1} - O_j and E_{j+1} - E_j into out [2, c, W/2, C]; what lies beyond the edges is zero."""
    even, odd = _pairs(x, d)
    left, right = out.view(2, *even.shape)
    torch.sub(odd[:, :-1], odd[:, 1:], out=left[:, 1:])
    torch.neg(odd[:, 0], out=left[:, 0])
    torch.sub(even[:, 1:], even[:, :-1], out=right[:, :-1])
    torch.neg(even[:, -1], out=right[:, -1])


def _sums_backward(planes: Tensor, d: int, x: Tensor) -> None:
    """The transpose of `_sums`, into x."""
    even, odd = _pairs(x, d)
    total, difference = planes.view(2, *even.shape)
    torch.sub(total, difference, out=even)
    torch.add(total, difference, out=odd)


def _add_differences_backward(planes: Tensor, d: int, x: Tensor) -> None:
    """The transpose of `_differences`, added to x."""
    even, odd = _pairs(x, d)
    left, right = planes.view(2, *even.shape)
    even -= right
    even[:, 1:] += right[:, :-1]
    odd -= left
    odd[:, :-1] += left[:, 1:]


# --- products -----------------------------------------------------------------------------------------------------


def _add_products(out: Tensor, planes: Tensor, weights: Tensor, rows: slice, dilation_h: int) -> None:
    """out [2, c, N, 2R] of some rows += planes [2, h, N, R] of the rows r, r - dilation_h, r - 2 dilation_h times
    weights [3, 2, R, 2R], the oldest first; there is nothing above row 0."""
    for age in range(3):
        above = age * dilation_h
        first = max(rows.start, above)
        if first < rows.stop:
            seen = planes[:, first - above : rows.stop - above]
            out[:, first - rows.start :].flatten(1, 2).baddbmm_(seen.flatten(1, 2), weights[2 - age])


def _products_backward(
    gradient: Tensor, planes: Tensor, weights: Tensor, rows: slice, dilation_h: int, into: tuple[Tensor, Tensor]
) -> None:
    """Of `_add_products`, from the gradient [2, h, N, 2R] of these rows and those below: the planes' gradient
    [2, c, N, R] into into[0], the weights' [3, 2, R, 2R] added to into[1]. Here planes [2, c, N, R] are these rows'."""
    grad_planes, grad_weights = into
    n_rows, height = rows.stop - rows.start, gradient.size(1)
    for age in range(3):
        n_seen = min(n_rows, height - age * dilation_h - rows.start)
        if n_seen <= 0:
            return
        tap = weights[2 - age].transpose(1, 2)
        below = gradient[:, rows.start + age * dilation_h :][:, :n_seen].flatten(1, 2)
        seen = planes[:, :n_seen].flatten(1, 2)
        if age == 0:
            torch.bmm(below, tap, out=grad_planes.flatten(1, 2))
        else:
            grad_planes[:, :n_seen].flatten(1, 2).baddbmm_(below, tap)
        grad_weights[2 - age].baddbmm_(seen.transpose(1, 2), below)


# --- a layer ------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The weights of a gated layer as its products take them; residual and its bias are None for the last layer."""

    products: Tensor  # [3, 4, R, 2R]
    conditioning: Tensor  # [M, 2R]
    bias: Tensor  # [2R], of the gate: all of them added up
    residual: Tensor | None  # [R, R]
    residual_bias: Tensor | None  # [R]
    skip: Tensor  # [R, P]


class Geometry(NamedTuple):
    """What a layer must know beside tensors."""

    dilation: tuple[int, int]  # (height, width)
    width: int  # columns of the clip; those beyond it, up to W, are padding
    workspace: Workspace


class GatedLayer(torch.autograd.Function):
    """hidden [B, h, W, R], params [B, h, W, P], conditioning [B, h, W, M] and a `Layer` -> the next two.

    Padding is zero in hidden, and stays so. Kept for the backward pass: hidden, and the two branches of the gate.
    """

    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, hidden: Tensor, params: Tensor, conditioning: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        layer = Layer(*weights)
        n_clips, height, width, n_res = hidden.shape
        branches = hidden.new_empty(n_clips, 2, height, width // 2, 2 * n_res)
        after = None if layer.residual is None else hidden.new_empty(hidden.shape)
        params = params.clone(memory_format=torch.contiguous_format)
        for clip in range(n_clips):
            clip_after = None if after is None else after[clip]
            _forward(layer, geometry, (hidden[clip], conditioning[clip]), (branches[clip], params[clip], clip_after))
        ctx.save_for_backward(hidden, conditioning, branches, *weights)
        ctx.geometry = geometry
        return after, params

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_after: Tensor | None, grad_params: Tensor) -> tuple[Tensor | None, ...]:
        hidden, conditioning, branches, *weights = ctx.saved_tensors
        grad_hidden, grad_conditioning = hidden.new_empty(hidden.shape), conditioning.new_empty(conditioning.shape)
        grad_layer = Layer(*(None if weight is None else torch.zeros_like(weight) for weight in weights))
        for clip in range(len(hidden)):
            clip_grad_after = None if grad_after is None else grad_after[clip]
            _backward(
                Layer(*weights),
                ctx.geometry,
                (hidden[clip], conditioning[clip], branches[clip]),
                (clip_grad_after, grad_params[clip]),
                (grad_hidden[clip], grad_conditioning[clip], grad_layer),
            )
        return None, grad_hidden, grad_params, grad_conditioning, *grad_layer


def _rows(height: int, columns: int) -> list[slice]:
    step = max(1, TILE // columns)
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


def _forward(
    layer: Layer, geometry: Geometry, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    """One clip: hidden [h, W, R] and conditioning [h, W, M] -> branches [2, h, W/2, 2R] and after [h, W, R], written,
    and params [h, W, P], added to."""
    (dilation_h, d), clip_width, workspace = geometry
    (hidden, conditioning), (branches, params, after) = inputs, outputs
    height, width, n_res = hidden.shape
    half = width // 2
    planes = workspace.buffer("planes", hidden, 4, height, half, n_res)
    bias = torch.stack([layer.bias, torch.zeros_like(layer.bias)]).unsqueeze(1)
    mel_weights = _mel_weights(layer)
    for rows in _rows(height, width):
        n = rows.stop - rows.start
        _sums(hidden[rows], d, planes[:2, rows])
        _differences(hidden[rows], d, planes[2:, rows])
        mel = _mel_planes(conditioning[rows], d, workspace)
        sums = workspace.buffer("sums", hidden, 2, n, half, 2 * n_res)
        torch.baddbmm(bias, mel, mel_weights, out=sums.flatten(1, 2))
        _add_products(sums, planes[:2], layer.products[:, :2], rows, dilation_h)
        both = workspace.buffer("both", hidden, 2, n, half, 2 * n_res)
        torch.add(sums[0], sums[1], out=both[0])
        torch.sub(sums[0], sums[1], out=both[1])
        _add_products(both, planes[2:], layer.products[:, 2:], rows, dilation_h)
        filters, gates = branches[:, rows].chunk(2, dim=3)
        torch.tanh(both[..., :n_res], out=filters)
        torch.sigmoid(both[..., n_res:], out=gates)
        gated = _gated(branches[:, rows], d, workspace)
        params[rows].view(n * width, -1).addmm_(gated, layer.skip)
        if after is not None:
            torch.add(hidden[rows], layer.residual_bias, out=after[rows])
            after[rows].view(n * width, n_res).addmm_(gated, layer.residual)
            after[rows, clip_width:] = 0


def _mel_planes(conditioning: Tensor, d: int, workspace: Workspace) -> Tensor:
    """The sums of some rows of conditioning [c, W, M]: [2, c W/2, M]."""
    n, width, bands = conditioning.shape
    planes = workspace.buffer("mel", conditioning, 2, n, width // 2, bands)
    _sums(conditioning, d, planes)
    return planes.flatten(1, 2)


def _mel_weights(layer: Layer) -> Tensor:
    """[2, M, 2R], for the sums of the conditioning."""
    return torch.stack([layer.conditioning, -layer.conditioning]) / 2


def _gated(branches: Tensor, d: int, workspace: Workspace) -> Tensor:
    """tanh times sigmoid of branches [2, c, W/2, 2R], with the columns in their places: [c W, R]."""
    _, n_rows, half, n_both = branches.shape
    gated = workspace.buffer("gated", branches, n_rows, half // d, 2, d, n_both // 2)
    filters, gates = branches.unflatten(2, (-1, d)).chunk(2, dim=4)
    torch.mul(filters, gates, out=gated.movedim(2, 0))
    return gated.view(-1, n_both // 2)


def _backward(
    layer: Layer,
    geometry: Geometry,
    saved: tuple[Tensor, Tensor, Tensor],
    grad_outputs: tuple[Tensor | None, Tensor],
    grad_inputs: tuple[Tensor, Tensor, Layer],
) -> None:
    """One clip, from the gradients of `after` and `params`: those of hidden and conditioning are written, those of
    the weights are added to. The lowest rows come first, which need nothing of those above them."""
    (_, d), clip_width, workspace = geometry
    hidden, conditioning, branches = saved
    (grad_after, grad_params), (grad_hidden, grad_conditioning, grad_layer) = grad_outputs, grad_inputs
    height, width, n_res = hidden.shape
    mel_weights = _mel_weights(layer)
    grad_mel_weights = torch.zeros_like(mel_weights)
    grad_both = workspace.buffer("grad_both", hidden, 2, height, width // 2, 2 * n_res)
    grad_sums = workspace.buffer("grad_sums", hidden, 2, height, width // 2, 2 * n_res)
    for rows in reversed(_rows(height, width)):
        gated = _gated(branches[:, rows], d, workspace)
        grad_gated = _update_backward(layer, gated, grad_after, grad_params, rows, grad_layer, workspace)
        _gate_backward(grad_gated, branches[:, rows], d, grad_both[:, rows])
        torch.add(grad_both[0, rows], grad_both[1, rows], out=grad_sums[0, rows])
        torch.sub(grad_both[0, rows], grad_both[1, rows], out=grad_sums[1, rows])
        grad_layer.bias.add_(grad_sums[0, rows].sum((0, 1)))

        mel = _mel_planes(conditioning[rows], d, workspace)
        grad_mel_weights.baddbmm_(mel.transpose(1, 2), grad_sums[:, rows].flatten(1, 2))
        torch.bmm(grad_sums[:, rows].flatten(1, 2), mel_weights.transpose(1, 2), out=mel)
        _sums_backward(mel, d, grad_conditioning[rows])

        _planes_backward(layer, geometry, hidden, rows, (grad_sums, grad_both), (grad_hidden, grad_layer))
        grad_hidden[rows, clip_width:] = 0
        if grad_after is not None:
            grad_hidden[rows] += grad_after[rows]
    grad_layer.conditioning.add_((grad_mel_weights[0] - grad_mel_weights[1]) / 2)


def _planes_backward(
    layer: Layer,
    geometry: Geometry,
    hidden: Tensor,
    rows: slice,
    grad_products: tuple[Tensor, Tensor],
    grad_inputs: tuple[Tensor, Layer],
) -> None:
    """Of the convolution, from the gradients of its sums and of `both`: the hidden state's is written for these rows,
    the weights' is added to."""
    (dilation_h, d), _, workspace = geometry
    grad_hidden, grad_layer = grad_inputs
    n, width, n_res = hidden[rows].shape
    planes = workspace.buffer("planes", hidden, 4, n, width // 2, n_res)
    _sums(hidden[rows], d, planes[:2])
    _differences(hidden[rows], d, planes[2:])
    grad_planes = workspace.buffer("grad_planes", hidden, 4, n, width // 2, n_res)
    for pair, gradient in zip((slice(0, 2), slice(2, 4)), grad_products, strict=True):
        into = grad_planes[pair], grad_layer.products[:, pair]
        _products_backward(gradient, planes[pair], layer.products[:, pair], rows, dilation_h, into)
    _sums_backward(grad_planes[:2], d, grad_hidden[rows])
    _add_differences_backward(grad_planes[2:], d, grad_hidden[rows])


def _update_backward(
    layer: Layer,
    gated: Tensor,
    grad_after: Tensor | None,
    grad_params: Tensor,
    rows: slice,
    grad_layer: Layer,
    workspace: Workspace,
) -> Tensor:
    """Of the residual update and the projection: the gradient [c W, R] of gated."""
    grad_params = grad_params[rows].flatten(0, 1)
    grad_gated = workspace.buffer("grad_gated", gated, *gated.shape)
    torch.mm(grad_params, layer.skip.t(), out=grad_gated)
    grad_layer.skip.addmm_(gated.t(), grad_params)
    if grad_after is not None:
        grad_after = grad_after[rows].flatten(0, 1)
        grad_gated.addmm_(grad_after, layer.residual.t())
        grad_layer.residual.addmm_(gated.t(), grad_after)
        grad_layer.residual_bias.add_(grad_after.sum(0))
    return grad_gated


def _gate_backward(grad_gated: Tensor, branches: Tensor, d: int, grad_both: Tensor) -> None:
    """Of tanh times sigmoid: grad_gated [c W, R] -> grad_both [2, c, W/2, 2R]."""
    _, n_rows, half, n_both = branches.shape
    grad_gated = grad_gated.view(n_rows, half // d, 2, d, n_both // 2).movedim(2, 0)
    filters, gates = branches.unflatten(2, (-1, d)).chunk(2, dim=4)
    grad_filters, grad_gates = grad_both.unflatten(2, (-1, d)).chunk(2, dim=4)
    torch.mul(grad_gated, gates, out=grad_filters)
    torch.ops.aten.tanh_backward.grad_input(grad_filters, filters, grad_input=grad_filters)
    torch.mul(grad_gated, filters, out=grad_gates)
    torch.ops.aten.sigmoid_backward.grad_input(grad_gates, gates, grad_input=grad_gates)
