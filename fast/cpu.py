"""Twin of `Flow.inverse` on a CPU: one pass over rows, layers and tiles of columns.

A row of a layer needs the layer's input at rows r, r - dilation_h and r - 2 dilation_h only. Keeping those rows
makes one pass over the rows enough: h steps per flow instead of h growing recomputations (the convolution queue of
Paine et al., arXiv 1611.09482, used by WaveFlow, section 3.3). `folding.py` prepares the weights and
`cpu_queues.py` does the layer steps; this room decides which columns of which row are next.

Long input. Row r of a flow needs its own row r - 1 at 2^L - 1 columns to either side (the sum of dilation_w), that
row needs the one above, and so on: tiles cut straight down would need h times as many columns of overlap. So tiles
lean: each layer's part of a row ends some columns left of what the layer before it made, and each row, 2^L at least,
left of the row above. Everything a tile needs was then made by itself or by the tile before, nothing is computed
twice, the result is the same as without tiles, and memory does not grow with the length.

Many inputs. Clips lie side by side on one row of columns, far enough apart not to meet, and the columns between them
are zeroed wherever a convolution would see them: each clip sounds as it does alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fast.cpu_queues import ConvQueue, DirectQueue, Window, WinogradQueue, roll
from fast.folding import FoldedFlow, fold_flows
from modules import Flow, Upsampler

MAX_THREADS = 4  # beyond which tiles grow no longer, since the buffers grow with them


@dataclass(frozen=True)
class _Clip:
    mel: Tensor  # [M, F]
    z: Tensor  # [h, W]
    start: int  # first column among all clips

    @property
    def stop(self) -> int:
        return self.start + self.z.size(1)


class CpuEngine:
    """Flows folded for one of the convolution queues.

    queue: that of the layer steps, by default the one for the precision, and tile its columns at a time.
    """

    def __init__(
        self,
        flows: Sequence[Flow],
        upsampler: Upsampler,
        dtype: torch.dtype,
        tile: int | None = None,
        queue: type[ConvQueue] | None = None,
    ) -> None:
        half = dtype in (torch.bfloat16, torch.float16)
        self.queue = queue or (DirectQueue if half else WinogradQueue)
        self.unit = 2 ** len(flows[0].estimator.layers)  # tiles are multiples of this
        tile = tile or self.queue.TILE * min(torch.get_num_threads(), MAX_THREADS)
        self.tile = max(1, tile // self.unit) * self.unit
        self.upsampler, self.flows = upsampler, fold_flows(flows, dtype, self.queue.arrange)

    @property
    def choices(self) -> dict[str, str]:
        """Queue and tile of the layer steps, for a run's record."""
        return {"queue": self.queue.__name__, "tile": f"{self.tile} columns"}

    def synthesize_many(self, clips: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """(mel [M, F], noise z [h, W]) of any lengths -> audio [h*W] of each, as if it were alone."""
        placed, start = [], 0
        for mel, z in clips:
            placed.append(_Clip(mel, z, start))
            start += z.size(1) + self.unit // 2  # half a unit is the largest dilation_w
        x = _Run(self, placed).invert()  # [h, columns]
        return [x[:, clip.start : clip.stop].t().reshape(-1) for clip in placed]


class _Run:
    """The buffers of a synthesis of `columns` columns, and the loop over flows, tiles, rows and layers.

    Columns are counted over all clips; the buffers hold `width` of them, from column `base` on.
    """

    def __init__(self, engine: CpuEngine, clips: list[_Clip]) -> None:
        self.flows, self.upsampler, self.unit = engine.flows, engine.upsampler, engine.unit
        self.clips, self.height = clips, clips[0].z.size(0)
        self.columns = math.ceil(clips[-1].stop / self.unit) * self.unit
        # how far left of its end a tile ends in each layer of row 0, and how much farther in each row below
        self.layer_lags = engine.queue.lags(len(self.flows[0].layers))
        self.row_lag = self.layer_lags[-1]
        self.lean = (self.height + 1) * self.row_lag  # how far left of a tile's end its last row and layer look
        self.width = min(self.columns, self.lean + 4 * engine.tile)
        self.tile = min(engine.tile, self.width)
        self.base = self.filled = 0
        edges = [0, *(edge for clip in clips for edge in (clip.start, clip.stop)), self.columns]
        silent = [range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True) if pair[0] < pair[1]]

        offset, front, bands = self.flows[0].offset, self.flows[0].front, clips[0].mel.size(0)
        self.queue = engine.queue(self.flows[0], self.width, self.tile, self.unit // 2, silent)
        self.conditioning = front.new_zeros(self.height, self.width, bands + 1)
        self.noise = offset.new_zeros(self.height, self.columns)
        self.mask = offset.new_zeros(self.columns)
        for clip in clips:
            self.noise[:, clip.start : clip.stop] = clip.z
            self.mask[clip.start : clip.stop] = 1

    def invert(self) -> Tensor:
        """Invert all flows: x [h, columns]."""
        x = self.noise
        for flow in reversed(self.flows):
            x = self._invert_flow(flow, x)
        return x

    def _invert_flow(self, flow: FoldedFlow, z: Tensor) -> Tensor:
        # planes[0] is x moved down by a row, planes[1] the mask of clips; two rows above, a column on either side.
        # Where row 0 passes as it is, it stands in the place of the row of zeros.
        planes = z.new_zeros(2, self.height + 3, self.columns + 2)
        planes[1, 2:, 1:-1] = self.mask
        if flow.untouched:
            z = z.index_select(0, flow.permutation)
            planes[0, 2, 1:-1] = z[0]
        self._rewind()
        for end in range(self.tile, self.columns + self.height * self.row_lag + self.tile, self.tile):
            self._reach(min(end, self.columns))
            for row in range(len(flow.order)):
                self._invert_row(flow, row, end, z[flow.untouched :], planes)
        if flow.untouched:
            return planes[0, 2:-1, 1:-1].clone()
        return planes[0, 3:, 1:-1].index_select(0, flow.permutation)

    def _invert_row(self, flow: FoldedFlow, row: int, end: int, z: Tensor, planes: Tensor) -> None:
        """A row of the estimator, and the row of z that it transforms."""
        for index in range(len(flow.layers)):
            columns = self._window(end, row, index)
            if not columns:
                continue
            at = Window(columns.start - self.base, columns.stop - self.base)
            conditioning = self.conditioning[flow.order[row], at.start : at.stop]
            if index == 0:
                near = planes[:, row : row + 3, columns.start : columns.stop + 2].unfold(2, len(columns), 1)
                self.queue.enter(flow, row, near, conditioning, at)
            else:
                self.queue.step(flow, index, row, conditioning, at)
        if columns:  # of the last layer: all layers are through here
            params = self.queue.params[at.start : at.stop, : flow.n_params].t()[None, :, None]  # [1, P, 1, n]
            x = flow.transform.inverse(z[row, columns.start : columns.stop].view(1, 1, 1, -1), params).view(-1)
            inside = slice(columns.start + 1, columns.stop + 1)
            planes[0, row + 3, inside] = torch.where(planes[1, -1, inside] > 0, x, 0)  # NaN stays in its clip

    def _window(self, end: int, row: int, layer: int) -> range:
        """The columns of a layer's row that belong to the tile ending at `end`: see the top of this file."""
        stop = end - row * self.row_lag - self.layer_lags[layer]
        return range(*(min(max(column, 0), self.columns) for column in (stop - self.tile, stop)))

    # --- what the buffers hold ---

    def _rewind(self) -> None:
        self.queue.rewind()
        if self.base:
            self.base = self.filled = 0

    def _reach(self, end: int) -> None:
        """Have the columns up to `end`, a tile's, in the buffers."""
        if end > self.base + self.width:
            forward = max(end - self.tile - self.lean, 0) - self.base
            self.queue.roll(forward)
            roll(self.conditioning, forward, dim=1)
            self.base += forward
        while self.filled < end:
            stop = min(self.filled + self.tile, self.base + self.width)
            for clip in self.clips:
                self._condition(clip, max(self.filled, clip.start), min(stop, clip.stop))
            self.filled = stop

    def _condition(self, clip: _Clip, start: int, stop: int) -> None:
        """Upsample and squeeze the mel for columns [start, stop), which are the clip's."""
        if start >= stop:
            return
        columns = self.conditioning[:, start - self.base : stop - self.base]
        within = (column - clip.start for column in (start, stop))
        columns[..., :-1] = self.upsampler.columns(clip.mel, self.height, *within)
        columns[..., -1] = 1  # multiplies the biases
