"""Twin of `EstimatorLayer.forward` for one row on a CPU: two convolution queues.

A queue keeps for each layer the rows that later rows will see, in a ring: row r overwrites row r - 3 dilation_h, and
the weights are stored so that each rotation of the ring is a slice of them. The rows of one product stand side by side.

`WinogradQueue`, for full precision, keeps the planes that `winograd.py` explains: a row is transformed once, when it
enters, and read by the three rows that need it, and four products serve two columns where the plain sum needs six.
`DirectQueue`, for half precision, keeps the rows as they are: where a CPU multiplies half precision, products are so
fast that the transforms would cost more than they save.

The parts of the ring that a step reads and writes are always the same for a layer, a place in the ring and a window of
columns. They are looked up, not sliced anew: for few channels slicing takes as long as some of the products.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fast.folding import BIAS_ROWS, FoldedFlow, FoldedLayer
from fast.winograd import product_weights


class Window(NamedTuple):
    """Columns [start, stop) of a buffer, multiples of 2 dilation_w."""

    start: int
    stop: int


class Place(NamedTuple):
    """Place of a row in the ring of a layer, and how many rows it sees; the first have fewer above them."""

    phase: int
    slot: int
    n_rows: int

    @property
    def weights(self) -> slice:
        """Weights of the rows it sees, out of 5R rows of them, in units of R."""
        return slice(2 - self.slot, 2 - self.slot + self.n_rows)


class ConvQueue(ABC):
    """Memory of a flow: rows above and columns to the left, for `width` columns of all layers.

    tile: the longest window. silent: in order, the columns, counted from the start of the input, that belong to no
    clip: the input of every layer is zero there, as it is in the `margin` columns that stand for what lies outside.
    """

    TILE: int  # columns at a time for each thread, by default

    def __init__(self, flow: FoldedFlow, width: int, tile: int, margin: int, silent: Sequence[range]) -> None:
        like, self.margin, self.silent, self.base = flow.front, margin, silent, 0
        self.n_res = like.size(1)
        self.dilations = [layer.dilation for layer in flow.layers]
        self.params = flow.offset.new_empty(width, len(flow.offset))
        self._both = like.new_empty(tile * 2 * self.n_res)
        self._gated = like.new_zeros(tile, self.n_res + BIAS_ROWS)
        self._gated[:, self.n_res] = 1  # multiplies the bias of the residual update
        self._parts: dict[tuple[int, ...], NamedTuple] = {}
        self._inputs: list[Tensor] = []  # of the layers from 1 on, with margins

    def rewind(self) -> None:
        """Begin a flow at the start of the input; no row is read before it was written."""
        self.base = 0
        for buffer in self._inputs:
            buffer[: self.margin] = 0

    def roll(self, columns: int) -> None:
        """Move everything left."""
        self.base += columns
        for buffer in (self.params, *self._inputs):
            roll(buffer, columns, dim=0)

    def enter(self, flow: FoldedFlow, row: int, near: Tensor, conditioning: Tensor, at: Window) -> None:
        """Layer 0 of a row, from near [2, 3, 3, n]: x and the mask at each tap. The rest is as in `step`."""
        near = near.reshape(18, -1).to(flow.entry.dtype)
        layer, both = flow.layers[0], self._gate_inputs(near.size(1))
        if layer.residual is not None:
            torch.mm(near[7::9].t(), flow.front, out=self._input(1, self._place(1, row), at))
        torch.mm(near.t(), flow.entry, out=both)
        filters, gates = both.addmm_(conditioning, layer.conditioning).sigmoid_().chunk(2, dim=1)
        torch.addcmul(gates, filters, gates, value=-2, out=self._gated[: len(both), : self.n_res])
        self.params[at.start : at.stop] = flow.offset
        self._update(layer, 0, row, at)

    def step(self, flow: FoldedFlow, index: int, row: int, conditioning: Tensor, at: Window) -> None:
        """Layer `index` >= 1 of a row, conditioning [n, M+1]: adds to `params` and makes the next layer's input."""
        layer, place = flow.layers[index], self._place(index, row)
        key = (index, *place, *at)
        if key not in self._parts:
            self._parts[key] = self._find(index, place, at)
        self._gate(layer, self._parts[key], conditioning)
        self._update(layer, index, row, at)

    @staticmethod
    @abstractmethod
    def lags(n_layer: int) -> list[int]:
        """Columns by which each layer's window ends left of layer 0's input: more than the dilation_w so far add up to,
        and multiples of 2 dilation_w."""

    @abstractmethod
    def _find(self, index: int, place: Place, at: Window) -> NamedTuple:
        """The parts of the buffers that a step touches."""

    @abstractmethod
    def _gate(self, layer: FoldedLayer, parts: NamedTuple, conditioning: Tensor) -> None:
        """The gated output of a layer, into self._gated."""

    @abstractmethod
    def _input(self, index: int, place: Place, at: Window) -> Tensor:
        """Part of the buffers that holds a row of a layer's input: [n, R]."""

    def _place(self, index: int, row: int) -> Place:
        age, phase = divmod(row, self.dilations[index][0])
        return Place(phase, age % 3, min(age + 1, 3))

    def _gate_inputs(self, n: int) -> Tensor:
        """Room for [n, 2R], contiguous."""
        return self._both[: n * 2 * self.n_res].view(n, -1)

    def _columns(self, at: Window, beyond: int = 0) -> slice:
        return slice(at.start + self.margin - beyond, at.stop + self.margin + beyond)

    def _update(self, layer: FoldedLayer, index: int, row: int, at: Window) -> None:
        gated, params = self._gated[: at.stop - at.start], self.params[at.start : at.stop]
        if gated.dtype == params.dtype:
            params.addmm_(gated[:, : self.n_res], layer.skip)
        else:
            params += gated[:, : self.n_res] @ layer.skip
        if layer.residual is None:
            return
        after = self._input(index + 1, self._place(index + 1, row), at)
        if index == 0:  # its input, which layer 1 adds to, is in place already
            after.addmm_(gated, layer.residual)
        else:
            hidden = self._input(index, self._place(index, row), at)
            torch.addmm(hidden, gated, layer.residual, out=after)
        self._silence(after, at)

    def _silence(self, after: Tensor, at: Window) -> None:
        first = bisect_right(self.silent, self.base + at.start, key=lambda silent: silent.stop)
        for silent in islice(self.silent, first, None):
            start, stop = (edge - self.base - at.start for edge in (silent.start, silent.stop))
            if start >= len(after):
                return
            after[max(start, 0) : stop] = 0


class _Planes(NamedTuple):
    """n columns in blocks of d."""

    even: Tensor  # [n/2d, d, R], of the layer's input
    odd: Tensor
    before: Tensor  # [n/2d, 2, d, R]: blocks O_{-1}, E_0, O_0, ... and those two further on
    after: Tensor
    total: Tensor  # [n/2d, d, R], of the row in the queue
    difference: Tensor
    differences: Tensor  # [n/2d, 2, d, R]: of even, of odd
    rows: tuple[Tensor, ...]  # four planes [n/2, depth] of the rows that this one sees, depth R to 3R
    weights: slice
    gated: Tensor  # [2, n/2d, d, R]: the output in the order of the products


class WinogradQueue(ConvQueue):
    """The inputs of the layers, and their transformed rows at half the columns."""

    TILE = 2048  # the operands of a product then stay in cache

    def __init__(self, flow: FoldedFlow, width: int, tile: int, margin: int, silent: Sequence[range]) -> None:
        super().__init__(flow, width, tile, margin, silent)
        like, later = flow.front, flow.layers[1:]
        self._sums = torch.empty_like(self._both)
        self._paired = like.new_empty(tile, len(flow.layers[0].conditioning))
        self._inputs = [like.new_zeros(width + 2 * margin, self.n_res) for _ in later]
        self._rows = [like.new_empty(4, width // 2, layer.dilation[0], 3 * self.n_res) for layer in later]

    @staticmethod
    def arrange(taps: Tensor) -> Tensor:
        """[3, 3, R, 2R] -> [4, 5R, 2R]: the weights of a, b, even and odd; rows [k R, (k + 3) R) fit rotation k.

        The queue has O_j - O_{j-1} for the difference of even, hence the sign.
        """
        products = product_weights(taps).transpose(0, 1).flatten(1, 2)  # [4, 3R, 2R], oldest row first
        products[2] *= -1
        return torch.cat([products, products[:, : 2 * taps.size(2)]], dim=1)

    @staticmethod
    def lags(n_layer: int) -> list[int]:
        """Fewest columns that are enough."""
        return [2 ** (layer + 1) for layer in range(n_layer)]

    def roll(self, columns: int) -> None:
        super().roll(columns)
        for buffer in self._rows:
            roll(buffer, columns // 2, dim=1)

    def _input(self, index: int, place: Place, at: Window) -> Tensor:
        return self._inputs[index - 1][self._columns(at)]

    def _find(self, index: int, place: Place, at: Window) -> _Planes:
        d, n_res = self.dilations[index][1], self.n_res
        queue = self._rows[index - 1][:, at.start // 2 : at.stop // 2, place.phase]  # [4, n/2, 3R]
        pushed = queue[..., place.slot * n_res : (place.slot + 1) * n_res].unflatten(1, (-1, d))
        blocks = self._inputs[index - 1][self._columns(at, beyond=d)].view(-1, d, n_res)
        weights = place.weights
        return _Planes(
            even=blocks[1:-1:2],
            odd=blocks[2::2],
            before=blocks[:-2].unflatten(0, (-1, 2)),
            after=blocks[2:].unflatten(0, (-1, 2)),
            total=pushed[0],
            difference=pushed[1],
            differences=pushed[2:].transpose(0, 1),
            rows=queue[..., : place.n_rows * n_res].unbind(),
            weights=slice(weights.start * n_res, weights.stop * n_res),
            gated=self._gated[: at.stop - at.start, :n_res].unflatten(0, (-1, 2, d)).transpose(0, 1),
        )

    def _gate(self, layer: FoldedLayer, parts: _Planes, conditioning: Tensor) -> None:
        torch.add(parts.even, parts.odd, out=parts.total)
        torch.sub(parts.odd, parts.even, out=parts.difference)
        torch.sub(parts.after, parts.before, out=parts.differences)

        n, d, weights = len(conditioning), layer.dilation[1], layer.gate[:, parts.weights]
        both = self._gate_inputs(n)
        sums, blocks = self._sums[: both.numel()].view(2, n // 2, -1), both.view(2, n // 2, -1)
        for plane in range(2):
            torch.mm(parts.rows[plane], weights[plane], out=sums[plane])
        torch.add(sums[0], sums[1], out=blocks[0])
        torch.sub(sums[0], sums[1], out=blocks[1])
        for plane in range(2):
            blocks[plane].addmm_(parts.rows[2 + plane], weights[2 + plane])
        paired = self._paired[:n]
        paired.unflatten(0, (2, -1, d)).copy_(conditioning.unflatten(0, (-1, 2, d)).transpose(0, 1))
        both.addmm_(paired, layer.conditioning).sigmoid_()
        filters, gates = both.view(2, -1, d, 2 * self.n_res).chunk(2, dim=3)
        torch.addcmul(gates, filters, gates, value=-2, out=parts.gated)


class _Taps(NamedTuple):
    rows: tuple[Tensor, ...]  # [n, depth] to the left, here, and to the right
    weights: slice
    gated: Tensor  # [n, R]


class DirectQueue(ConvQueue):
    """The last three rows of every layer's input."""

    TILE = 4096  # of half the size, and products this fast want to be long

    def __init__(self, flow: FoldedFlow, width: int, tile: int, margin: int, silent: Sequence[range]) -> None:
        super().__init__(flow, width, tile, margin, silent)
        self._inputs = [
            flow.front.new_zeros(width + 2 * margin, layer.dilation[0], 3 * self.n_res) for layer in flow.layers[1:]
        ]

    @staticmethod
    def arrange(taps: Tensor) -> Tensor:
        """[3, 3, R, 2R] -> [3, 5R, 2R], left, here and right; rows [k R, (k + 3) R) fit rotation k of the ring."""
        products = taps.transpose(0, 1).flatten(1, 2)  # [3, 3R, 2R], oldest row first
        return torch.cat([products, products[:, : 2 * taps.size(2)]], dim=1)

    @staticmethod
    def lags(n_layer: int) -> list[int]:
        """Whole units of 2^L columns, so that windows have few different lengths: for each that it has not seen lately
        oneDNN, which multiplies half precision, generates code, and that takes longer than the product."""
        return [(layer + 1) * 2**n_layer for layer in range(n_layer)]

    def _input(self, index: int, place: Place, at: Window) -> Tensor:
        columns = self._inputs[index - 1][self._columns(at), place.phase]
        return columns[:, place.slot * self.n_res : (place.slot + 1) * self.n_res]

    def _find(self, index: int, place: Place, at: Window) -> _Taps:
        d, n, weights = self.dilations[index][1], at.stop - at.start, place.weights
        seen = self._inputs[index - 1][self._columns(at, beyond=d), place.phase, : place.n_rows * self.n_res]
        return _Taps(
            rows=tuple(seen[start : start + n] for start in (0, d, 2 * d)),
            weights=slice(weights.start * self.n_res, weights.stop * self.n_res),
            gated=self._gated[:n, : self.n_res],
        )

    def _gate(self, layer: FoldedLayer, parts: _Taps, conditioning: Tensor) -> None:
        both, weights = self._gate_inputs(len(conditioning)), layer.gate[:, parts.weights]
        torch.mm(conditioning, layer.conditioning, out=both)
        for tap, rows in enumerate(parts.rows):
            both.addmm_(rows, weights[tap])
        filters, gates = both.sigmoid_().chunk(2, dim=1)
        torch.addcmul(gates, filters, gates, value=-2, out=parts.gated)


def roll(buffer: Tensor, columns: int, dim: int) -> None:
    """Move a buffer left by some columns in place; what appears on the right is zero."""
    kept = buffer.size(dim) - columns
    buffer.narrow(dim, 0, kept).copy_(buffer.narrow(dim, columns, kept).clone())
    buffer.narrow(dim, kept, columns).zero_()
