"""Likelihood of long clips in bounded memory: each flow walks the width in tiles.

A flow's z at a column depends on no more than 2^L - 1 columns to either side, the sum of its dilations, so a tile that
is computed with so many more of them is what it is within the whole clip. Only the audio and z are kept whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fast.estimators import FastFlows
from model import FlowVocoder
from modules import Affine, Flow, Spline, squeeze

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
    return forward_of(model, [replace(flow, transform=counted)])[0](x, conditioning)


def forward_of(model: FlowVocoder, flows: Sequence[Flow]) -> list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Twin of `Flow.forward` for each of some flows of a model, in the way that it computes its likelihood."""
    if model.execution.plain:
        return [flow.forward for flow in flows]
    fast = FastFlows(flows, model.execution)
    return [partial(fast, flow) for flow in flows]


class Watched:
    """A transform whose log|dz/dx| of each sample goes through a function; all else is the transform's."""

    def __init__(self, transform: Affine | Spline, see: Callable[[Tensor], Tensor]) -> None:
        self._transform, self._see = transform, see

    def __call__(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1, h, W] -> z, and what the function makes of log|dz/dx| [B, 1, h, W]."""
        z, log_det = self._transform(x, params)
        return z, self._see(log_det)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)
