"""The layer steps of synthesis on a CPU: a convolution queue kept in Winograd's domain.

A layer with dilation d sees columns d apart. Take its input in blocks of d columns, E_0 O_0 E_1 O_1 ...; the three
width taps g0, g1, g2 give the pair of output blocks j from O_{j-1}, E_j, O_j, E_{j+1}. F(2, 3) of Lavin and Gray
(arXiv 1509.09308) needs four products for the pair where the plain sum needs six:

    even = a + b + (O_{j-1} - O_j) g0          a = (E_j + O_j) (g0 + g1 + g2) / 2
    odd  = a - b + (E_{j+1} - E_j) g2          b = (O_j - E_j) (g0 - g1 + g2) / 2

A row is transformed once, when it enters the queue, and read by the three rows that need it; the rows of one product
stand side by side, so that its depth is 3R. What the queue holds is a ring: row r overwrites row r - 3 dilation_h,
and the weights are stored so that each rotation of the ring is a slice of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from folding import FoldedFlow, FoldedLayer


class Window(NamedTuple):
    """Columns [start, stop) of a buffer, multiples of 2 dilation_w."""

    start: int
    stop: int


class Scratch:
    """Where a layer step of up to `tile` columns keeps its products; one for each thread."""

    def __init__(self, flow: FoldedFlow, tile: int) -> None:
        n_both = flow.entry.size(1)
        self._sums, self._both = flow.entry.new_empty(2, tile * n_both)
        self._gated = flow.entry.new_empty(tile * n_both // 2)

    def of(self, n: int, n_both: int) -> tuple[Tensor, Tensor, Tensor]:
        """[n, 2R], [n, 2R] and [n, R], uninitialised and contiguous."""
        whole = n * n_both
        return (
            self._sums[:whole].view(n, n_both),
            self._both[:whole].view(n, n_both),
            self._gated[: whole // 2].view(n, n_both // 2),
        )


class WinogradQueue:
    """What a flow remembers of rows above and columns to the left, for `width` columns of all layers.

    `silent` are columns, counted from the start of the input, that belong to no clip: the input of every layer is
    zero there, as it is in the `margin` columns that stand for what lies outside.
    """

    def __init__(self, flow: FoldedFlow, width: int, margin: int, silent: Sequence[range]) -> None:
        like, self.margin, self.silent, self.base = flow.front, margin, silent, 0
        n_res, n_layers = like.size(1), len(flow.layers)
        # hidden[l] is the input of layer l >= 1; rows[l] its transformed rows, at half the columns
        self.hidden = [None, *(like.new_zeros(width + 2 * margin, n_res) for _ in range(1, n_layers))]
        self.rows = [None, *(like.new_empty(4, width // 2, layer.dilation[0], 3 * n_res) for layer in flow.layers[1:])]

    @staticmethod
    def arrange(taps: Tensor) -> Tensor:
        """[3, 3, R, 2R] -> [4, 5R, 2R]: the weights of a, b, even and odd; rows [k R, (k + 3) R) fit rotation k."""
        left, centre, right = taps.transpose(0, 1).flatten(1, 2)  # each [3R, 2R], oldest row first
        products = torch.stack([(left + centre + right) / 2, (left - centre + right) / 2, left, right])
        return torch.cat([products, products[:, : 2 * taps.size(2)]], dim=1)

    def rewind(self) -> None:
        """Begin a flow at the start of the input; no row is read before it was written."""
        self.base = 0
        for buffer in self.hidden[1:]:
            buffer[: self.margin] = 0

    def roll(self, columns: int) -> None:
        """Move everything left."""
        self.base += columns
        for buffer in self.hidden[1:]:
            roll(buffer, columns, dim=0)
        for buffer in self.rows[1:]:
            roll(buffer, columns // 2, dim=1)

    def enter(
        self, flow: FoldedFlow, near: Tensor, conditioning: Tensor, at: Window, params: Tensor, scratch: Scratch
    ) -> None:
        """Layer 0 of a row, from near [2, 3, 3, n]: x and the mask at each tap. The rest is as in `step`."""
        near = near.reshape(18, -1).to(flow.entry.dtype)
        layer = flow.layers[0]
        _, both, gated = scratch.of(near.size(1), flow.entry.size(1))
        if layer.residual:
            torch.mm(near[7::9].t(), flow.front, out=self.hidden[1][self._columns(at)])
        torch.mm(near.t(), flow.entry, out=both)
        filters, gates = both.addmm_(conditioning, layer.conditioning).sigmoid_().chunk(2, dim=1)
        torch.addcmul(gates, filters, gates, value=-2, out=gated)
        self._finish(0, layer, gated, at, params)

    def step(
        self,
        flow: FoldedFlow,
        index: int,
        row: int,
        conditioning: Tensor,
        at: Window,
        params: Tensor,
        scratch: Scratch,
    ) -> None:
        """Layer `index` >= 1 of a row: conditioning [n, M+1]; adds to params [n, P] and makes the next input."""
        layer = flow.layers[index]
        dilation_h, d = layer.dilation
        n, n_both = len(conditioning), layer.gate.size(2)
        n_res = n_both // 2
        age, phase = divmod(row, dilation_h)
        slot, depth = age % 3, min(age + 1, 3) * n_res  # the first rows have fewer above them
        queue = self.rows[index][:, at.start // 2 : at.stop // 2, phase]  # [4, n/2, 3R]
        self._push(index, queue[..., slot * n_res : (slot + 1) * n_res], at, d)

        queue, weights = queue[..., :depth], layer.gate[:, (2 - slot) * n_res : (2 - slot) * n_res + depth]
        sums, both, gated = scratch.of(n, n_both)
        pair = sums.view(2, n // 2, n_both)
        torch.bmm(queue[:2], weights[:2], out=pair)
        blocks = both.view(2, n // 2, n_both)  # even, odd
        torch.add(pair[0], pair[1], out=blocks[0])
        torch.sub(pair[0], pair[1], out=blocks[1])
        blocks.baddbmm_(queue[2:], weights[2:])
        paired = conditioning.unflatten(0, (-1, 2, d)).transpose(0, 1).reshape(n, -1)
        both.addmm_(paired, layer.conditioning).sigmoid_()

        filters, gates = both.view(2, -1, d, n_both).chunk(2, dim=3)
        torch.addcmul(gates, filters, gates, value=-2, out=gated.view(-1, 2, d, n_res).transpose(0, 1))
        self._finish(index, layer, gated, at, params)

    def _push(self, index: int, slot: Tensor, at: Window, d: int) -> None:
        blocks = self.hidden[index][at.start + self.margin - d : at.stop + self.margin + d].view(-1, d, slot.size(2))
        before, even, odd, after = blocks[0:-2:2], blocks[1:-1:2], blocks[2::2], blocks[3::2]
        total, difference, left, right = slot.view(4, -1, d, slot.size(2))
        torch.add(even, odd, out=total)
        torch.sub(odd, even, out=difference)
        torch.sub(before, odd, out=left)
        torch.sub(after, even, out=right)

    def _finish(self, index: int, layer: FoldedLayer, gated: Tensor, at: Window, params: Tensor) -> None:
        params += gated @ layer.skip
        if not layer.residual:
            return
        weight, bias = layer.residual
        columns = self._columns(at)
        before = self.hidden[max(index, 1)][columns]  # layer 0 has put its input in place already
        torch.add(before, bias, out=self.hidden[index + 1][columns]).addmm_(gated, weight)
        for silent in self.silent:
            start, stop = (min(max(edge - self.base, at.start), at.stop) for edge in (silent.start, silent.stop))
            self.hidden[index + 1][start + self.margin : stop + self.margin] = 0

    def _columns(self, at: Window) -> slice:
        return slice(at.start + self.margin, at.stop + self.margin)


def roll(buffer: Tensor, columns: int, dim: int) -> None:
    """Move a buffer left by some columns in place; what appears on the right is zero."""
    kept = buffer.size(dim) - columns
    buffer.narrow(dim, 0, kept).copy_(buffer.narrow(dim, columns, kept).clone())
    buffer.narrow(dim, kept, columns).zero_()
