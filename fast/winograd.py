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
    """Memory that the flows of one pass share: buffers that layers use one after the other, and the conditioning in
    the few row orders that occur."""

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


class _Product(NamedTuple):
    """Gradients that `_products_backward` makes."""

    planes: Tensor  # [2, c, N, R], written
    weights: Tensor  # [3, 2, R, 2R], added to
    dilation_h: int


def _products_backward(gradient: Tensor, planes: Tensor, weights: Tensor, rows: slice, into: _Product) -> None:
    """Transpose of `_add_products`, from the gradient [2, h, N, 2R] of these rows and those below; here planes
    [2, c, N, R] are those of these rows."""
    n_rows, height = rows.stop - rows.start, gradient.size(1)
    for age in range(3):
        below = age * into.dilation_h
        n_seen = min(n_rows, height - below - rows.start)
        if n_seen <= 0:
            return
        tap = weights[2 - age].transpose(1, 2)
        seeing = gradient[:, rows.start + below :][:, :n_seen].flatten(1, 2)
        seen = planes[:, :n_seen].flatten(1, 2)
        if age == 0:
            torch.bmm(seeing, tap, out=into.planes.flatten(1, 2))
        else:
            into.planes[:, :n_seen].flatten(1, 2).baddbmm_(seeing, tap)
        into.weights[2 - age].baddbmm_(seen.transpose(1, 2), seeing)


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
    """Sizes and memory of a layer, beside its tensors."""

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
        for clip in _clips(hidden, conditioning, branches, params, after):
            _LayerOfClip(layer, geometry, clip).forward()
        ctx.save_for_backward(hidden, conditioning, branches, *weights)
        ctx.geometry = geometry
        return after, params

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_after: Tensor | None, grad_params: Tensor) -> tuple[Tensor | None, ...]:
        hidden, conditioning, branches, *weights = ctx.saved_tensors
        grad_hidden, grad_conditioning = hidden.new_empty(hidden.shape), conditioning.new_empty(conditioning.shape)
        grad_layer = Layer(*(None if weight is None else torch.zeros_like(weight) for weight in weights))
        values = _clips(hidden, conditioning, branches, None, None)
        gradients = _clips(grad_hidden, grad_conditioning, None, grad_params, grad_after)
        for clip, gradient in zip(values, gradients, strict=True):
            _LayerOfClip(Layer(*weights), ctx.geometry, clip).backward(gradient, grad_layer)
        return None, grad_hidden, grad_params, grad_conditioning, *grad_layer


class _Clip(NamedTuple):
    """One clip's part of what a layer reads and writes, or of its gradients."""

    hidden: Tensor  # [h, W, R]
    conditioning: Tensor  # [h, W, M]
    branches: Tensor | None  # [2, h, W/2, 2R]: tanh and sigmoid
    params: Tensor | None  # [h, W, P]
    after: Tensor | None  # [h, W, R]; None for the last layer


def _clips(*tensors: Tensor | None) -> list[_Clip]:
    return [_Clip(*(None if t is None else t[index] for t in tensors)) for index in range(len(tensors[0]))]


def _rows(height: int, columns: int) -> list[slice]:
    step = max(1, TILE // columns)
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


class _LayerOfClip:
    """A layer at work on one clip, some rows at a time."""

    def __init__(self, layer: Layer, geometry: Geometry, clip: _Clip) -> None:
        self.layer, self.clip, self.workspace = layer, clip, geometry.workspace
        (self.dilation_h, self.d), self.clip_width = geometry.dilation, geometry.width
        self.height, self.width, self.n_res = clip.hidden.shape
        self.mel_weights = torch.stack([layer.conditioning, -layer.conditioning]) / 2  # [2, M, 2R], for its sums

    def forward(self) -> None:
        """Write branches and after, add to params."""
        layer, clip, n_res, half = self.layer, self.clip, self.n_res, self.width // 2
        planes = self._buffer("planes", 4, self.height, half, n_res)
        bias = torch.stack([layer.bias, torch.zeros_like(layer.bias)]).unsqueeze(1)
        for rows in _rows(self.height, self.width):
            n = rows.stop - rows.start
            _sums(clip.hidden[rows], self.d, planes[:2, rows])
            _differences(clip.hidden[rows], self.d, planes[2:, rows])
            sums = self._buffer("sums", 2, n, half, 2 * n_res)
            torch.baddbmm(bias, self._mel_planes(rows), self.mel_weights, out=sums.flatten(1, 2))
            _add_products(sums, planes[:2], layer.products[:, :2], rows, self.dilation_h)
            both = self._buffer("both", 2, n, half, 2 * n_res)
            torch.add(sums[0], sums[1], out=both[0])
            torch.sub(sums[0], sums[1], out=both[1])
            _add_products(both, planes[2:], layer.products[:, 2:], rows, self.dilation_h)
            filters, gates = clip.branches[:, rows].chunk(2, dim=3)
            torch.tanh(both[..., :n_res], out=filters)
            torch.sigmoid(both[..., n_res:], out=gates)
            self._update(self._gated(rows), rows)

    def _update(self, gated: Tensor, rows: slice) -> None:
        """Add the projection to params, make the next hidden state, from gated [c W, R]."""
        layer, clip = self.layer, self.clip
        clip.params[rows].view(len(gated), -1).addmm_(gated, layer.skip)
        if clip.after is not None:
            torch.add(clip.hidden[rows], layer.residual_bias, out=clip.after[rows])
            clip.after[rows].view(len(gated), self.n_res).addmm_(gated, layer.residual)
            clip.after[rows, self.clip_width :] = 0

    def backward(self, grad: _Clip, grad_layer: Layer) -> None:
        """Write the gradients of hidden and conditioning, add to those of the weights, from those of after and params.

        The lowest rows come first, which need nothing of those above them.
        """
        grad_mel_weights = torch.zeros_like(self.mel_weights)
        grad_both = self._buffer("grad_both", 2, self.height, self.width // 2, 2 * self.n_res)
        grad_sums = self._buffer("grad_sums", 2, self.height, self.width // 2, 2 * self.n_res)
        for rows in reversed(_rows(self.height, self.width)):
            gated = self._gated(rows)
            self._gate_backward(self._update_backward(gated, grad, rows, grad_layer), rows, grad_both[:, rows])
            torch.add(grad_both[0, rows], grad_both[1, rows], out=grad_sums[0, rows])
            torch.sub(grad_both[0, rows], grad_both[1, rows], out=grad_sums[1, rows])
            grad_layer.bias.add_(grad_sums[0, rows].sum((0, 1)))

            mel = self._mel_planes(rows)
            grad_mel_weights.baddbmm_(mel.transpose(1, 2), grad_sums[:, rows].flatten(1, 2))
            torch.bmm(grad_sums[:, rows].flatten(1, 2), self.mel_weights.transpose(1, 2), out=mel)
            _sums_backward(mel, self.d, grad.conditioning[rows])

            self._planes_backward(grad_sums, grad_both, rows, grad.hidden, grad_layer)
            grad.hidden[rows, self.clip_width :] = 0
            if grad.after is not None:
                grad.hidden[rows] += grad.after[rows]
        grad_layer.conditioning.add_((grad_mel_weights[0] - grad_mel_weights[1]) / 2)

    def _update_backward(self, gated: Tensor, grad: _Clip, rows: slice, grad_layer: Layer) -> Tensor:
        """Gradient [c W, R] of gated."""
        grad_params, grad_gated = grad.params[rows].flatten(0, 1), self._buffer("grad_gated", *gated.shape)
        torch.mm(grad_params, self.layer.skip.t(), out=grad_gated)
        grad_layer.skip.addmm_(gated.t(), grad_params)
        if grad.after is not None:
            grad_after = grad.after[rows].flatten(0, 1)
            grad_gated.addmm_(grad_after, self.layer.residual.t())
            grad_layer.residual.addmm_(gated.t(), grad_after)
            grad_layer.residual_bias.add_(grad_after.sum(0))
        return grad_gated

    def _gate_backward(self, grad_gated: Tensor, rows: slice, grad_both: Tensor) -> None:
        """Gradient [2, c, W/2, 2R] of what the gate takes, from that of its output [c W, R]."""
        _, n_rows, half, n_both = grad_both.shape
        grad_gated = grad_gated.view(n_rows, half // self.d, 2, self.d, n_both // 2).movedim(2, 0)
        filters, gates = self.clip.branches[:, rows].unflatten(2, (-1, self.d)).chunk(2, dim=4)
        grad_filters, grad_gates = grad_both.unflatten(2, (-1, self.d)).chunk(2, dim=4)
        torch.mul(grad_gated, gates, out=grad_filters)
        torch.ops.aten.tanh_backward.grad_input(grad_filters, filters, grad_input=grad_filters)
        torch.mul(grad_gated, filters, out=grad_gates)
        torch.ops.aten.sigmoid_backward.grad_input(grad_gates, gates, grad_input=grad_gates)

    def _planes_backward(
        self, grad_sums: Tensor, grad_both: Tensor, rows: slice, grad_hidden: Tensor, grad_layer: Layer
    ) -> None:
        """Gradient of the convolution: the hidden state's is written for these rows, the weights' is added to."""
        hidden, products = self.clip.hidden[rows], self.layer.products
        planes = self._buffer("planes", 4, len(hidden), self.width // 2, self.n_res)
        _sums(hidden, self.d, planes[:2])
        _differences(hidden, self.d, planes[2:])
        grad_planes = self._buffer("grad_planes", *planes.shape)
        for pair, gradient in ((slice(0, 2), grad_sums), (slice(2, 4), grad_both)):
            into = _Product(grad_planes[pair], grad_layer.products[:, pair], self.dilation_h)
            _products_backward(gradient, planes[pair], products[:, pair], rows, into)
        _sums_backward(grad_planes[:2], self.d, grad_hidden[rows])
        _add_differences_backward(grad_planes[2:], self.d, grad_hidden[rows])

    def _gated(self, rows: slice) -> Tensor:
        """tanh times sigmoid, with the columns in their places: [c W, R]."""
        branches = self.clip.branches[:, rows].unflatten(2, (-1, self.d))  # [2, c, W/2d, d, 2R]
        gated = self._buffer("gated", *branches.shape[1:3], 2, self.d, self.n_res)
        filters, gates = branches.chunk(2, dim=4)
        torch.mul(filters, gates, out=gated.movedim(2, 0))
        return gated.view(-1, self.n_res)

    def _mel_planes(self, rows: slice) -> Tensor:
        """Sums of some rows of the conditioning: [2, c W/2, M]."""
        conditioning = self.clip.conditioning[rows]
        planes = self._buffer("mel", 2, len(conditioning), self.width // 2, conditioning.size(2))
        _sums(conditioning, self.d, planes)
        return planes.flatten(1, 2)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        return self.workspace.buffer(name, self.clip.hidden, *shape)
