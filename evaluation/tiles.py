"""Likelihood of long clips in bounded memory: each flow walks the width in tiles.

A flow's z at a column depends on no more than 2^L - 1 columns to either side, the sum of its dilations, so a tile that
is computed with so many more of them is what it is within the whole clip. Only the audio and z are kept whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fast.estimators import FastFlows
from model import FlowVocoder
from modules import Flow, Transform, squeeze

COLUMNS = 2**12  # of a tile; clips of up to twice as many are computed at once


@torch.no_grad()
def likelihood_in_tiles(
    model: FlowVocoder, audio: Tensor, mel: Tensor, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `FlowVocoder.forward` without gradients: audio [B, T], mel [B, M, F] -> z [B, 1, h, T/h], log|det| [B].

    Equal to 1e-5; clips of up to two tiles are left to `forward` itself.
    """
    height, columns = model.config.n_height, columns or COLUMNS
    if audio.dim() != 2 or audio.size(1) <= 2 * columns * height:
        return model(audio, mel)
    with model.execution.products(audio):
        return _walk(model, audio, mel, columns)


def _walk(model: FlowVocoder, audio: Tensor, mel: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    log_det = audio.new_zeros(len(audio))
    if model.linear_prediction is not None:
        audio, log_det = model.linear_prediction(audio, mel)
    x = squeeze(audio.unsqueeze(1), model.config.n_height)  # [B, 1, h, W]
    for flow in model.flows():
        z = torch.empty_like(x)
        for tile in _tiles(x.size(3), columns, 2 ** len(flow.estimator.layers) - 1):
            part, part_log_det = _forward_of_tile(model, flow, x[..., tile.seen], mel, tile)
            z[..., tile.own] = part[..., tile.within]
            log_det = log_det + part_log_det
        x = z
    return x, log_det


@dataclass(frozen=True)
class _Tile:
    own: slice  # columns of the clip that are the tile's
    seen: slice  # those that it is computed from

    @property
    def within(self) -> slice:
        return slice(self.own.start - self.seen.start, self.own.stop - self.seen.start)


def _tiles(width: int, columns: int, reach: int) -> Iterator[_Tile]:
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        yield _Tile(slice(start, stop), slice(max(start - reach, 0), min(stop + reach, width)))


def _forward_of_tile(model: FlowVocoder, flow: Flow, x: Tensor, mel: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """z [B, 1, h, n] of the columns that the tile sees, log|det| [B] of its own."""
    height, seen = model.config.n_height, tile.seen
    columns = [model.upsampler.columns(one, height, seen.start, seen.stop) for one in mel]  # each [h, n, M]
    conditioning = torch.stack(columns).permute(0, 3, 1, 2)  # [B, M, h, n]
    counted = Watched(flow.transform, lambda log_det: log_det[..., tile.within])  # its own columns only
    return forward_of(model, [replace(flow, transform=counted)], conditioning)[0](x)


def forward_of(
    model: FlowVocoder, flows: Sequence[Flow], conditioning: Tensor
) -> list[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Twin of `Flow.forward` for each of some flows of a model, in the way that it computes its likelihood."""
    if model.execution.plain:
        return [partial(flow.forward, conditioning=conditioning) for flow in flows]
    fast = FastFlows(flows, conditioning, model.execution)
    return [partial(fast, flow) for flow in flows]


class Watched(Transform):
    """Another transform, whose log|dz/dx| of each sample goes through a function."""

    def __init__(self, transform: Transform, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform, self.n_params, self.see = transform, transform.n_params, see

    def fold(self) -> tuple[Tensor, Tensor]:
        return self.transform.fold()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.transform(x, params)
        return z, self.see(log_det)

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        return self.transform.inverse(z, params)
