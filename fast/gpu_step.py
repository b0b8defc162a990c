"""Twin of `EstimatorLayer.forward` for one row on an accelerator: a fused Triton kernel, and the same in plain PyTorch.

A layer step makes one row of one layer, for all columns: it reads the rows r, r - dilation_h and r - 2 dilation_h of
the layer's input from a ring, multiplies their nine taps and the conditioning with the gate's weights, gates, adds
to the projection (skip branch) and writes the next layer's row; the last one makes the samples if the transform is
affine. Steps are counted through: layer l of row r is step r L + l. `plain_step` makes one; `fused_steps` makes any
number, each as a launch of the kernel or all of them as one. Both change the same buffers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.folding import FoldedFlow
from fast.gpu_tiles import Tile, tiles_for
from modules import Affine

try:
    from fast.gpu_kernel import flow_kernel
except ImportError:  # no Triton: plain PyTorch then
    flow_kernel = None

BLOCK = 128  # the number of columns is a multiple of this
CONDITIONING_BLOCK = 32  # and that of conditioning channels of this
ENTRY_TAPS = 32  # of layer 0: nine of x, nine of the mask, and zeros


@dataclass(frozen=True)
class StepFlow:
    """A `FoldedFlow` as the kernel takes it: R padded to a power of two, M + 1 to M', the projection to P.

    Weights of products have what is summed as their inner axis, and layers as their outer one.
    """

    folded: FoldedFlow
    front: Tensor  # [2, R]
    entry: Tensor  # [2R, ENTRY_TAPS]
    gate: Tensor  # [L - 1, 2R, 9R], from layer 1 on; taps with the oldest row first, then left to right
    conditioning: Tensor  # [L, 2R, M']
    skip: Tensor  # [L, P, R]
    residual: Tensor  # [L - 1, R, R]
    bias: Tensor  # [L - 1, R]
    offset: Tensor  # [P]
    order: Tensor  # [h], of the conditioning's rows

    @property
    def affine(self) -> bool:
        """True where the last layer's step makes the samples."""
        return isinstance(self.folded.transform, Affine)

    @property
    def dilations(self) -> list[tuple[int, int]]:
        """(height, width) of each layer."""
        return [layer.dilation for layer in self.folded.layers]

    @property
    def n_steps(self) -> int:
        """Layer steps of the whole flow."""
        return len(self.folded.order) * len(self.folded.layers)


class State:
    """The buffers of `width` columns; what is not of a clip (mask 0) or lies beyond the edges is kept zero."""

    def __init__(self, flow: StepFlow, height: int, width: int) -> None:
        like, offset, dilations = flow.front, flow.offset, flow.dilations
        self.height, self.width, self.dilations = height, width, dilations
        # planes[0] is x moved down by a row, planes[1] the mask; two rows above, a column on either side
        self.planes = offset.new_zeros(2, height + 3, width + 2)
        self.mask = offset.new_zeros(width)
        self.noise = offset.new_zeros(height, width)
        self.params = offset.new_zeros(width, len(offset))
        self.conditioning = like.new_zeros(height, width, flow.conditioning.size(2))
        # inputs of the layers from 1 on: row r is in slot r modulo 2 dilation_h + 1
        shapes = [(2 * dh + 1, width + 2 * dw, like.size(1)) for dh, dw in dilations[1:]]
        sizes = [slots * line * n_res for slots, line, n_res in shapes]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.buffer = like.new_zeros(max(sum(sizes), 1))
        self.rings = [None] + [
            self.buffer[start : start + size].view(shape)
            for start, size, shape in zip(starts, sizes, shapes, strict=True)
        ]
        rows = [(0, 1, *dilations[0])] + [
            (start, shape[0], *dilation) for start, shape, dilation in zip(starts, shapes, dilations[1:], strict=True)
        ]
        device = like.device
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.extent = torch.full((1,), width, dtype=torch.int32, device=device)  # of the columns that steps make
        self.done = torch.zeros(width // 16 + 2 * _reach(dilations, 16), dtype=torch.int32, device=device)

    def row_of(self, layer: int, row: int) -> Tensor:
        """Place of a row in the input of a layer >= 1, without its margins: [W, R]."""
        dilation_h, dilation_w = self.dilations[layer]
        return self.rings[layer][row % (2 * dilation_h + 1), dilation_w : dilation_w + self.width]

    def use(self, columns: int) -> None:
        """Make steps for this many columns, and for as many beyond them as layers see, which must be zero."""
        self.extent.fill_(min(columns + self.dilations[-1][1], self.width))


def channels_padded(n: int) -> int:
    """The power of two, at least 16, that matrix units want."""
    return max(16, 1 << (n - 1).bit_length())


def arrange(taps: Tensor) -> Tensor:
    """[3, 3, R, 2R] -> [2R, 9R], each R padded: for `fold_flows`."""
    n_res = channels_padded(taps.size(2))
    return _pad_halves(F.pad(taps, (0, 0, 0, n_res - taps.size(2))).flatten(0, 2), n_res).t().contiguous()


def prepare(flows: Sequence[FoldedFlow]) -> list[StepFlow]:
    """Flows that were folded with `arrange`; those that share the weights of an estimator go on sharing them."""
    gates: dict[tuple[int, ...], Tensor] = {}
    return [_prepare_flow(flow, gates) for flow in flows]


def _prepare_flow(folded: FoldedFlow, gates: dict[tuple[int, ...], Tensor]) -> StepFlow:
    layers, n_own = folded.layers, folded.front.size(1)
    n_res, n_params = channels_padded(n_own), channels_padded(len(folded.offset))
    n_conditioning = -(-len(layers[0].conditioning) // CONDITIONING_BLOCK) * CONDITIONING_BLOCK
    shared = tuple(id(layer.gate) for layer in layers)
    if shared not in gates:
        gates[shared] = _stack([layer.gate for layer in layers[1:]], folded.front, 2 * n_res, 9 * n_res)
    entry, residuals = _pad_halves(folded.entry, n_res).t(), [layer.residual for layer in layers[:-1]]
    return StepFlow(
        folded=folded,
        front=_pad(folded.front, 2, n_res),
        entry=_pad(entry, 2 * n_res, ENTRY_TAPS),
        gate=gates[shared],
        conditioning=torch.stack(
            [_pad(_pad_halves(layer.conditioning, n_res).t(), 2 * n_res, n_conditioning) for layer in layers]
        ),
        skip=torch.stack([_pad(layer.skip.t(), n_params, n_res) for layer in layers]),
        residual=_stack([_pad(weight[:n_own].t(), n_res, n_res) for weight in residuals], folded.front, n_res, n_res),
        bias=_stack([F.pad(weight[n_own], (0, n_res - n_own)) for weight in residuals], folded.front, n_res),
        offset=F.pad(folded.offset, (0, n_params - len(folded.offset))),
        order=torch.tensor(folded.order, dtype=torch.int32, device=folded.front.device),
    )


def _stack(weights: Sequence[Tensor], like: Tensor, *shape: int) -> Tensor:
    """Weights of all layers in one, which are none for a single layer."""
    return torch.stack(list(weights)) if weights else like.new_zeros(0, *shape)


def _pad(weight: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return F.pad(weight, (0, n_columns - weight.size(1), 0, n_rows - weight.size(0))).contiguous()


def _pad_halves(weight: Tensor, n_res: int) -> Tensor:
    halves = weight.unflatten(1, (2, -1))
    return F.pad(halves, (0, n_res - halves.size(2))).flatten(1)


# --- layer steps in plain PyTorch -------------------------------------------------------------------------------


def plain_step(flow: StepFlow, state: State, index: int, row: int) -> None:
    """Layer `index` of a row, all columns."""
    width, last = state.width, index == len(flow.dilations) - 1
    if index == 0:
        near = state.planes[:, row : row + 3].unfold(2, width, 1).reshape(18, width).to(flow.front.dtype)
        hidden = near[7::9].t() @ flow.front  # [W, R]
        both = near.t() @ flow.entry[:, :18].t()
    else:
        dilation_h, dilation_w = flow.dilations[index]
        ring = state.rings[index]
        ages = [age for age in (2, 1, 0) if age * dilation_h <= row]  # the first rows have fewer above them
        rows = [ring[(row - age * dilation_h) % len(ring)] for age in ages]
        taps = [line[tap * dilation_w : tap * dilation_w + width] for line in rows for tap in range(3)]
        hidden = state.row_of(index, row)
        both = torch.cat(taps, dim=1) @ flow.gate[index - 1][:, -len(taps) * hidden.size(1) :].t()
    both = torch.addmm(both, state.conditioning[flow.folded.order[row]], flow.conditioning[index].t())
    filters, gates = both.sigmoid().chunk(2, dim=1)
    gated = torch.addcmul(gates, filters, gates, value=-2)

    if index == 0:
        state.params.copy_(flow.offset.expand_as(state.params))
    state.params += gated @ flow.skip[index].t()
    if not last:
        after = torch.addmm(hidden + flow.bias[index], gated, flow.residual[index].t())
        state.row_of(index + 1, row).copy_(torch.where(state.mask[:, None] > 0, after, 0))
    elif flow.affine:
        finish_row(flow, state, row)


def finish_row(flow: StepFlow, state: State, row: int) -> None:
    """The samples of a row from its parameters."""
    params = state.params[:, : flow.folded.n_params].t()[None, :, None]  # [1, P, 1, W]
    x = flow.folded.transform.inverse(state.noise[row + flow.folded.untouched].view(1, 1, 1, -1), params).view(-1)
    state.planes[0, row + 3, 1:-1] = torch.where(state.mask > 0, x, 0)


# --- layer steps in the kernel --------------------------------------------------------------------------------------


def can_fuse(flow: StepFlow, kind: str) -> bool:
    """Tell whether the Triton kernel takes this flow with such products, which `gpu_tiles` names."""
    return flow_kernel is not None and flow.front.dtype != torch.float64 and bool(tiles_for(kind, flow.front.size(1)))


def fused_steps(
    flow: StepFlow, state: State, steps: range, options: dict[str, Any], tile: Tile, blocks: int | None = None
) -> Any:
    """Steps of a flow; with `blocks` in one launch of so many, else each in one of its own.

    All blocks must fit the chip at once, and `state.done` be zero before the first step of a flow. options: those that
    `kernel_options` gave. Returns the compiled kernel of the last launch.
    """
    spans = [steps] if blocks else [range(step, step + 1) for step in steps]
    kernel, meta = None, options | {"block_n": tile.block_n, "block_k": tile.block_k, "block_r": tile.block_r}
    meta |= {"num_warps": tile.warps, "num_stages": tile.stages, "n_near": 2 * _reach(state.dilations, tile.block_n)}
    if blocks:
        meta |= {"persistent": True, "overlap": False, "launch_cooperative_grid": True}
    elif meta["overlap"]:
        meta["launch_pdl"] = True
    arguments = _arguments(flow, state)
    for span in spans:
        grid = (blocks or state.width // tile.block_n,)
        sizes = (span.start, span.stop, len(flow.dilations), state.width, state.height)
        kernel = flow_kernel[grid](*arguments, *sizes, **meta)
    return kernel


def kernel_options(flow: StepFlow, precision: str, overlap: bool) -> dict[str, Any]:
    """Constants of the kernel for a flow; precision: of products in float32, as Triton names it."""
    return {
        "n_res": flow.front.size(1),
        "n_params": len(flow.offset),
        "n_conditioning": flow.conditioning.size(2),
        "n_taps": ENTRY_TAPS,
        "block_c": CONDITIONING_BLOCK,
        "affine": flow.affine,
        "precision": precision,
        "persistent": False,
        "overlap": overlap,
    }


def _arguments(flow: StepFlow, state: State) -> tuple[Tensor, ...]:
    weights = (flow.front, flow.entry, flow.gate, flow.conditioning, flow.skip, flow.residual, flow.bias)
    noise = state.noise[flow.folded.untouched :]
    return (
        *(state.planes, state.mask, noise, state.conditioning, flow.order, state.params, flow.offset),
        *(state.buffer, state.table, state.extent, state.done),
        *weights,
    )


def _reach(dilations: Sequence[tuple[int, int]], block_n: int) -> int:
    """Power of two above the number of tiles on one side in which a task's columns are read."""
    return 1 << (-(-dilations[-1][1] // block_n)).bit_length()
