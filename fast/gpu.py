"""Twin of `Flow.inverse` on an accelerator: each flow of a bucket of columns is one captured graph.

A clip is some thousand layer steps one after the other, each of a few microseconds: launched one by one, launching
is all that is seen. So the inverse of a flow is captured once for a number of columns, with buffers that stay where
they are, and replayed: copy in the noise and the conditioning, replay flow after flow, copy out. Numbers of columns
are rounded up to a few sizes (buckets); the columns too many belong to no clip, as those between clips: they are
kept zero where a convolution would see them, and multiply nothing in the fused kernel. Graphs are dropped, the longest
unused first, when their columns come to more than two of the largest bucket's.

Many clips lie side by side on one row of columns (see `cpu.py`). A clip longer than the largest bucket is cut
into segments, one flow at a time: row 0 of a flow sees the clip's edge 2^L - 1 columns away, and each row below it
as much farther, so h (2^L - 1) columns of overlap on each side make the result the same as without segments.

Without an accelerator the same steps run uncaptured, so that all but the capture can be tested anywhere.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fast.folding import fold_flows
from fast.gpu_plan import Plan, choose_plan, run_flow
from fast.gpu_step import BLOCK, State, StepFlow, arrange, can_fuse, prepare
from fast.gpu_tiles import kind_of
from harness.devices import tf32_products
from modules import Flow, Upsampler

MAX_COLUMNS = 2**17  # of a bucket: 95 s at height 16, about 2 GB for 128 channels in float32
BUCKETS_PER_OCTAVE = 4


class Piece(NamedTuple):
    """Columns [start, stop) of a clip, and where they lie in a bucket."""

    mel: Tensor  # [M, F]
    z: Tensor  # [h, W], of the whole clip
    start: int
    stop: int
    at: int


def bucket(columns: int) -> int:
    """Round up to one of a few sizes."""
    step = max(BLOCK, 2 ** (columns - 1).bit_length() // 2 // BUCKETS_PER_OCTAVE)
    return math.ceil(columns / step) * step


class GraphEngine:
    """The inverse of a flow vocoder, on the device of the model; for `SynthesisEngine`, which checks the input.

    fused: whether layer steps run in the Triton kernel where there is one; by default on GPUs with TF32.
    """

    def __init__(
        self,
        flows: Sequence[Flow],
        upsampler: Upsampler,
        dtype: torch.dtype,
        fused: bool | None = None,
        max_columns: int = MAX_COLUMNS,
    ) -> None:
        n_layer, device = len(flows[0].estimator.layers), upsampler.convs[0].bias.device
        self.height, self.upsampler = len(flows[0].order), upsampler
        self.gap = 2 ** (n_layer - 1)  # the largest dilation_w
        self.reach = (2**n_layer - 1) * self.height
        self.max_columns = bucket(max(max_columns, 4 * self.reach))
        self.flows = prepare(fold_flows(flows, dtype, arrange))
        if fused is None:
            fused = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # TF32, bfloat16
        self.fused = fused
        self._buckets: OrderedDict[tuple[int, str], _Bucket] = OrderedDict()

    @property
    def choices(self) -> dict[str, str]:
        """Plans of the numbers of columns there were so far, for a run's record."""
        return {f"{columns} columns": str(held.plan) for (columns, _), held in self._buckets.items()}

    @torch.no_grad()
    def synthesize_many(self, clips: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """(mel [M, F], noise z [h, W]) of any lengths -> audio [h*W] of each, as if it were alone."""
        x: list[Tensor] = [None] * len(clips)
        for group in self._groups([z.size(1) for _, z in clips]):
            together = self._invert_group([clips[index] for index in group])
            for index, inverted in zip(group, together, strict=True):
                x[index] = inverted
        return [inverted.t().reshape(-1) for inverted in x]

    def _groups(self, columns: Sequence[int]) -> list[list[int]]:
        """Indices of clips that fit a bucket together; longer ones are alone."""
        groups, used = [], math.inf
        for index, n in enumerate(columns):
            if used + self.gap + n > self.max_columns:
                groups.append([])
                used = -self.gap
            groups[-1].append(index)
            used += self.gap + n
        return groups

    def _invert_group(self, clips: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        pieces, at = [], 0
        for mel, z in clips:
            pieces.append(Piece(mel, z, 0, z.size(1), at))
            at += z.size(1) + self.gap
        columns = at - self.gap
        if columns > self.max_columns:
            return [self._invert_long(pieces[0])]
        held = self._bucket(columns)
        held.load(pieces, [piece.z for piece in pieces], self.upsampler)
        for index in reversed(range(len(self.flows))):
            held.invert(index)
        x = held.state.noise.clone()
        return [x[:, piece.at : piece.at + piece.stop] for piece in pieces]

    def _invert_long(self, clip: Piece) -> Tensor:
        """One flow at a time, in segments that overlap by what a flow sees; x [h, W] is all that grows."""
        x, held = clip.z, self._bucket(self.max_columns)
        kept = self.max_columns - 2 * self.reach
        for index in reversed(range(len(self.flows))):
            after = torch.empty_like(x)
            for start in range(0, clip.stop, kept):
                stop = min(start + kept, clip.stop)
                first, last = max(start - self.reach, 0), min(stop + self.reach, clip.stop)
                held.load([clip._replace(start=first, stop=last)], [x[:, first:last]], self.upsampler)
                held.invert(index)
                after[:, start:stop] = held.state.noise[:, start - first : stop - first]
            x = after
        return x

    def _bucket(self, columns: int) -> "_Bucket":
        kind = kind_of(self.flows[0].front.dtype, tf32_products())
        key = (bucket(columns), kind)  # what is captured keeps its precision
        if key not in self._buckets:
            while self._buckets and sum(size for size, _ in self._buckets) + key[0] > 2 * self.max_columns:
                self._buckets.popitem(last=False)
            fused = self.fused and can_fuse(self.flows[0], kind)
            self._buckets[key] = _Bucket(self.flows, self.height, key[0], kind if fused else None)
        self._buckets.move_to_end(key)
        return self._buckets[key]


class _Bucket:
    """The buffers for a number of columns, and a graph for each flow.

    kind: that of the fused kernel's products; None: plain steps.
    """

    def __init__(self, flows: list[StepFlow], height: int, width: int, kind: str | None) -> None:
        self.flows = flows
        self.state = State(flows[0], height, width)
        self.plan = Plan("plain")
        self._graphs = None
        with torch.cuda.device_of(self.state.noise):
            if self.state.noise.is_cuda:
                self._graphs = self._capture(kind)
            elif kind:
                self.plan = choose_plan(flows[0], self.state, kind)

    def load(self, pieces: Sequence[Piece], noise: Sequence[Tensor], upsampler: Upsampler) -> None:
        """Put in the noise [h, n] and the conditioning of each piece."""
        state = self.state
        state.mask.zero_()
        for piece, z in zip(pieces, noise, strict=True):
            columns = slice(piece.at, piece.at + piece.stop - piece.start)
            state.mask[columns] = 1
            state.noise[:, columns] = z
            samples = upsampler.columns(piece.mel, state.height, piece.start, piece.stop)  # [h, n, M]
            state.conditioning[:, columns, : samples.size(2)] = samples
            state.conditioning[:, columns, samples.size(2)] = 1  # multiplies the biases
        state.planes[1, 2:, 1:-1] = state.mask
        state.use(columns.stop)

    def invert(self, index: int) -> None:
        """Flow `index` of the noise, in place."""
        if self._graphs is None:
            self._run(self.flows[index])
        else:
            self._graphs[index].replay()

    def _run(self, flow: StepFlow) -> None:
        state, permutation = self.state, flow.folded.permutation
        if flow.folded.untouched:  # row 0 passes as it is, and stands in the place of the row of zeros
            state.noise.copy_(state.noise.index_select(0, permutation))
            state.planes[0, 2, 1:-1] = torch.where(state.mask > 0, state.noise[0], 0)
        run_flow(flow, state, self.plan)
        if flow.folded.untouched:
            state.noise.copy_(state.planes[0, 2:-1, 1:-1])
            state.planes[0, 2].zero_()
        else:
            torch.index_select(state.planes[0, 3:, 1:-1], 0, permutation, out=state.noise)

    def _capture(self, kind: str | None) -> list[torch.cuda.CUDAGraph]:
        """A graph for each flow, captured on a stream of its own.

        Other threads may go on using the device meanwhile, as one that pins the loader's batches does.
        """
        # Kernels are compiled and chosen in runs beforehand, on data that looks like data.
        state, stream = self.state, torch.cuda.Stream()
        for buffer in (state.noise, state.conditioning):
            buffer.normal_()
        state.mask.fill_(1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if kind:
                self.plan = choose_plan(self.flows[0], state, kind)
            self._run(self.flows[0])
        torch.cuda.current_stream().wait_stream(stream)
        graphs: list[torch.cuda.CUDAGraph] = []
        for flow in self.flows:
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._run(flow)
            graphs.append(graph)
        torch.cuda.current_stream().wait_stream(stream)
        return graphs
