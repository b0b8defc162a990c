"""Twin of `EstimatorLayer.forward` for one row on an accelerator: a fused Triton kernel, and the same in plain PyTorch.

A layer step makes one row of one layer, for all columns: it reads the rows r, r - dilation_h and r - 2 dilation_h of
the layer's input from a ring, multiplies their nine taps and the conditioning with the gate's weights, gates, adds
to the projection (skip branch) and writes the next layer's row; the last one makes the samples if the transform is
affine. Nothing in between leaves the chip. Weights are read again by every block of columns, from the L2 cache; the
rings of a clip fit there too. `layer_step` chooses; both ways change the same buffers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.folding import FoldedFlow, FoldedLayer
from modules import Affine

try:
    from fast.gpu_kernel import layer_kernel
except ImportError:  # no Triton: plain PyTorch then
    layer_kernel = None

BLOCK = 128  # the number of columns is a multiple of this
CONDITIONING_BLOCK = 32  # and that of conditioning channels of this
ENTRY_TAPS = 32  # of layer 0: nine of x, nine of the mask, and zeros
MAX_CHANNELS = 256  # of the fused kernel, whose blocks hold all channels


class StepLayer(NamedTuple):
    """A `FoldedLayer` padded for the kernel: R to a power of two, M + 1 to M', the projection to P."""

    dilation: tuple[int, int]
    gate: Tensor  # [9R, 2R], oldest row first, then left to right; [ENTRY_TAPS, 2R] for layer 0
    conditioning: Tensor  # [M', 2R]
    skip: Tensor  # [R, P]
    residual: tuple[Tensor, Tensor] | None  # [R, R] and [R]


@dataclass(frozen=True)
class StepFlow:
    """A `FoldedFlow` padded for the kernel."""

    folded: FoldedFlow
    front: Tensor  # [2, R]
    layers: list[StepLayer]
    offset: Tensor  # [P]

    @property
    def affine(self) -> bool:
        """True where the last layer's step makes the samples."""
        return isinstance(self.folded.transform, Affine)


class State:
    """The buffers of `width` columns; what is not of a clip (mask 0) or lies beyond the edges is kept zero."""

    def __init__(self, flow: StepFlow, height: int, width: int) -> None:
        like, offset = flow.front, flow.offset
        self.height, self.width = height, width
        # planes[0] is x moved down by a row, planes[1] the mask; two rows above, a column on either side
        self.planes = offset.new_zeros(2, height + 3, width + 2)
        self.mask = offset.new_zeros(width)
        self.noise = offset.new_zeros(height, width)
        self.params = offset.new_zeros(width, len(offset))
        self.conditioning = like.new_zeros(height, width, len(flow.layers[0].conditioning))
        self.rings = [  # inputs of the layers: row r is in slot r modulo 2 dilation_h + 1
            like.new_zeros(2 * layer.dilation[0] + 1, width + 2 * layer.dilation[1], like.size(1)) if index else None
            for index, layer in enumerate(flow.layers)
        ]

    def row_of(self, flow: StepFlow, layer: int, row: int) -> Tensor:
        """Place of a row in the input of a layer >= 1, without its margins: [W, R]."""
        dilation_h, dilation_w = flow.layers[layer].dilation
        return self.rings[layer][row % (2 * dilation_h + 1), dilation_w : dilation_w + self.width]


def channels_padded(n: int) -> int:
    """The power of two, at least 16, that matrix units want."""
    return max(16, 1 << (n - 1).bit_length())


def arrange(taps: Tensor) -> Tensor:
    """[3, 3, R, 2R] -> [9R, 2R], each R padded: for `fold_flows`."""
    n_res = channels_padded(taps.size(2))
    return _pad_halves(F.pad(taps, (0, 0, 0, n_res - taps.size(2))).flatten(0, 2), n_res)


def prepare(folded: FoldedFlow) -> StepFlow:
    """Pad the weights of a flow that was folded with `arrange`."""
    n_res, n_params = channels_padded(folded.front.size(1)), channels_padded(len(folded.offset))
    entry = F.pad(folded.entry, (0, 0, 0, ENTRY_TAPS - len(folded.entry)))
    return StepFlow(
        folded=folded,
        front=_pad(folded.front, 2, n_res),
        layers=[_prepare_layer(layer, entry, n_res, n_params) for layer in folded.layers],
        offset=F.pad(folded.offset, (0, n_params - len(folded.offset))),
    )


def _prepare_layer(layer: FoldedLayer, entry: Tensor, n_res: int, n_params: int) -> StepLayer:
    n_conditioning = -(-len(layer.conditioning) // CONDITIONING_BLOCK) * CONDITIONING_BLOCK
    residual = layer.residual
    if residual is not None:
        n_own = residual.size(1)
        residual = (_pad(residual[:n_own], n_res, n_res), F.pad(residual[n_own], (0, n_res - n_own)))
    return StepLayer(
        dilation=layer.dilation,
        gate=_pad_halves(entry, n_res) if layer.gate is None else layer.gate,
        conditioning=_pad_halves(F.pad(layer.conditioning, (0, 0, 0, n_conditioning - len(layer.conditioning))), n_res),
        skip=_pad(layer.skip, n_res, n_params),
        residual=residual,
    )


def _pad(weight: Tensor, n_in: int, n_out: int) -> Tensor:
    return F.pad(weight, (0, n_out - weight.size(1), 0, n_in - weight.size(0))).contiguous()


def _pad_halves(weight: Tensor, n_res: int) -> Tensor:
    halves = weight.unflatten(1, (2, -1))
    return F.pad(halves, (0, n_res - halves.size(2))).flatten(1)


# --- a layer step -------------------------------------------------------------------------------------------


def can_fuse(flow: StepFlow) -> bool:
    """Tell whether the Triton kernel takes this flow."""
    return layer_kernel is not None and flow.front.size(1) <= MAX_CHANNELS and flow.front.dtype != torch.float64


def layer_step(flow: StepFlow, state: State, index: int, row: int, fused: bool) -> None:
    """Layer `index` of a row, all columns; fused: in one kernel."""
    (_fused_step if fused else plain_step)(flow, state, index, row)


def plain_step(flow: StepFlow, state: State, index: int, row: int) -> None:
    """The layer step in plain PyTorch."""
    layer, width = flow.layers[index], state.width
    if index == 0:
        near = state.planes[:, row : row + 3].unfold(2, width, 1).reshape(18, width).to(flow.front.dtype)
        hidden = near[7::9].t() @ flow.front  # [W, R]
        both = near.t() @ layer.gate[:18]
    else:
        dilation_h, dilation_w = layer.dilation
        ring = state.rings[index]
        ages = [age for age in (2, 1, 0) if age * dilation_h <= row]  # the first rows have fewer above them
        rows = [ring[(row - age * dilation_h) % len(ring)] for age in ages]
        taps = [line[tap * dilation_w : tap * dilation_w + width] for line in rows for tap in range(3)]
        hidden = state.row_of(flow, index, row)
        both = torch.cat(taps, dim=1) @ layer.gate[-len(taps) * hidden.size(1) :]
    both = torch.addmm(both, state.conditioning[flow.folded.order[row]], layer.conditioning)
    filters, gates = both.sigmoid().chunk(2, dim=1)
    gated = torch.addcmul(gates, filters, gates, value=-2)

    if index == 0:
        state.params.copy_(flow.offset.expand_as(state.params))
    state.params += gated @ layer.skip
    if layer.residual is not None:
        weight, bias = layer.residual
        after = torch.addmm(hidden + bias, gated, weight)
        state.row_of(flow, index + 1, row).copy_(torch.where(state.mask[:, None] > 0, after, 0))
    elif flow.affine:
        finish_row(flow, state, row)


def finish_row(flow: StepFlow, state: State, row: int) -> None:
    """The samples of a row from its parameters."""
    params = state.params[:, : flow.folded.n_params].t()[None, :, None]  # [1, P, 1, W]
    x = flow.folded.transform.inverse(state.noise[row + flow.folded.untouched].view(1, 1, 1, -1), params).view(-1)
    state.planes[0, row + 3, 1:-1] = torch.where(state.mask > 0, x, 0)


def _fused_step(flow: StepFlow, state: State, index: int, row: int) -> None:
    layer, n_slots = flow.layers[index], 2 * flow.layers[index].dilation[0] + 1
    ages = [min(age * layer.dilation[0], row) for age in (2, 1, 0)]
    rows_missing = sum(age * layer.dilation[0] > row for age in (2, 1))
    last, unused = layer.residual is None, state.params
    layer_kernel[lambda options: (state.width // options["block_n"],)](
        state.planes,
        state.mask,
        state.noise[row + flow.folded.untouched],
        state.conditioning[flow.folded.order[row]],
        state.params,
        flow.offset,
        state.rings[index] if index else unused,
        unused if last else state.row_of(flow, index + 1, row),
        layer.gate,
        layer.conditioning,
        layer.skip,
        *((unused, unused) if last else layer.residual),
        flow.front,
        row,
        *((row - age) % n_slots for age in ages),
        3 * rows_missing,
        layer.dilation[1],
        state.width,
        state.height,
        n_res=flow.front.size(1),
        n_params=len(flow.offset),
        n_conditioning=len(layer.conditioning),
        n_taps=ENTRY_TAPS,
        block_c=CONDITIONING_BLOCK,
        first=index == 0,
        last=last,
        affine=flow.affine,
        # of float32: three products in TF32 where it was not asked for, as near as float32's own and far faster
        precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
    )
