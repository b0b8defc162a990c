"""Synthesis of a mel that is still being made: audio in chunks, latency and memory that do not grow.

The flows stand one behind the other. Each keeps the columns that its next output still depends on, and runs over blocks
with as many columns of context to either side as a flow can see (`fast.engine.receptive_field`): what it then gives is
what it gives within the whole clip. The linear prediction follows, with the audio before as its state.

With `lookahead_frames` the flows share so many frames of context among them, which is less than they can see: audio
comes sooner and a little different.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from config import WaveFlowConfig
from fast.engine import SynthesisEngine, receptive_field
from harness.errors import InputError
from model import FlowVocoder
from modules import CONTEXT_FRAMES, Flow, Upsampler
from synthesis.arguments import whole_number

SHORTEST_BLOCK = 16  # frames


def frame_noise(generator: torch.Generator | None, frames: int, hop: int) -> Tensor:
    """Noise [frames, hop] of standard deviation 1: that of a frame depends on its place and the seed only."""
    return torch.stack([torch.randn(hop, generator=generator) for _ in range(frames)])


@dataclass(frozen=True)
class _OneFlow:
    """A single flow of a model, as the engine takes models."""

    model: FlowVocoder
    flow: Flow
    linear_prediction: None = None

    @property
    def config(self) -> WaveFlowConfig:
        return self.model.config

    @property
    def upsampler(self) -> Upsampler:
        return self.model.upsampler

    def flows(self) -> list[Flow]:
        return [self.flow]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def buffers(self) -> Iterator[Tensor]:
        return self.model.buffers()


@dataclass
class _Sliding:
    """The newest columns [rows, n] of something endless, from column `base` on."""

    columns: Tensor
    base: int = 0

    @property
    def stop(self) -> int:
        return self.base + self.columns.size(1)

    def append(self, columns: Tensor) -> None:
        self.columns = torch.cat([self.columns, columns], dim=1)

    def cut(self, start: int, stop: int) -> Tensor:
        return self.columns[:, start - self.base : stop - self.base]

    def forget(self, before: int) -> None:
        if before > self.base:
            self.columns = self.columns[:, before - self.base :].clone()
            self.base = before


@dataclass(frozen=True)
class Reach:
    """Columns of context to either side of a flow's block, of the block, and of the least that is whole frames."""

    context: int
    block: int
    unit: int

    @classmethod
    def of(cls, config: WaveFlowConfig, lookahead_frames: int | None) -> "Reach":
        """All that a flow sees, or its share of the lookahead; both whole frames and whole columns."""
        if lookahead_frames is not None:
            lookahead_frames = whole_number(lookahead_frames, "lookahead_frames", 0)
        unit = math.lcm(config.hop_length, config.n_height)  # samples that are both
        needed = receptive_field(config).per_flow + CONTEXT_FRAMES * config.hop_length
        if lookahead_frames is not None:
            needed = min(needed, lookahead_frames * config.hop_length // config.n_flow)
        units = -(-needed // unit) if lookahead_frames is None else needed // unit
        block = max(2 * units, -(-SHORTEST_BLOCK * config.hop_length // unit))
        columns = unit // config.n_height
        return cls(units * columns, block * columns, columns)


@dataclass
class _Stage:
    """One flow of a stream."""

    engine: SynthesisEngine
    reach: Reach
    z: _Sliding  # [h, n] that came in
    done: int = 0  # columns that went out

    def push(self, z: Tensor, mel: _Sliding, ended: bool) -> Tensor:
        """Take in columns [h, n]; returns those that are ready, [h, n'], with n' = 0 while there is no block."""
        self.z.append(z)
        stop = self.z.stop if ended else (self.z.stop - self.reach.context) // self.reach.unit * self.reach.unit
        if stop <= self.done or (stop - self.done < self.reach.block and not ended):
            return z[:, :0]
        height, hop = self.engine.config.n_height, self.engine.config.hop_length
        first, last = max(self.done - self.reach.context, 0), self.z.stop
        frames = first * height // hop, min(-(-last * height // hop) + CONTEXT_FRAMES, mel.stop)
        [samples] = self.engine.synthesize_many([(mel.cut(*frames), self.z.cut(first, last))])
        x = samples.view(-1, height).t()[:, self.done - first : stop - first]
        self.done = stop
        self.z.forget(stop - self.reach.context)
        return x


@dataclass
class Stream:
    """The stages of a synthesis, fed with frames. Noise is drawn frame by frame from the generator."""

    model: FlowVocoder
    engines: Sequence[SynthesisEngine]  # of the flows, in the order of synthesis
    reach: Reach
    temp: float
    generator: torch.Generator | None
    stages: list[_Stage] = field(init=False)

    def __post_init__(self) -> None:
        config, device = self.model.config, next(self.model.parameters()).device
        none = torch.zeros(config.n_height, 0, device=device)
        self.stages = [_Stage(engine, self.reach, _Sliding(none)) for engine in self.engines]
        self.mel = _Sliding(torch.zeros(config.cin_channels, 0, device=device))
        self.noise = _Sliding(torch.zeros(1, 0, device=device))
        self.drawn, self.made, self.past = 0, 0, None  # samples of noise and of audio, the newest audio

    def run(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Mel frames [M, f] on the CPU -> audio [n], as soon as it can be had; T = hop (F - 1) samples in all."""
        for chunk in chunks:
            self.mel.append(chunk.to(self.mel.columns.device))
            yield from self._advance(ended=False)
        if self.mel.stop < 2:
            raise InputError(f"a stream of {self.mel.stop} frame(s) covers no audio; expected at least 2")
        yield from self._advance(ended=True)

    @torch.no_grad()
    def _advance(self, ended: bool) -> Iterator[Tensor]:
        config = self.model.config
        height, hop = config.n_height, config.hop_length
        frames = self.mel.stop - 1 if ended else max(self.mel.stop - 1 - CONTEXT_FRAMES, self.drawn // hop)
        fresh = frame_noise(self.generator, frames - self.drawn // hop, hop) if frames > self.drawn // hop else None
        if fresh is not None:
            self.noise.append(self.temp * fresh.flatten().unsqueeze(0).to(self.noise.columns.device))
            self.drawn = frames * hop
        taken = self.noise.base
        available = self.noise.stop // height * height
        samples = self.noise.cut(taken, self.noise.stop if ended else available)[0]
        if ended and len(samples) % height:  # whole columns; what they are too long by is cut off below
            samples = torch.cat([samples, samples.new_zeros(-len(samples) % height)])
        self.noise.forget(self.noise.stop if ended else available)
        x = samples.view(-1, height).t()
        for stage in self.stages:
            x = stage.push(x, self.mel, ended)
        audio = x.t().reshape(-1)[: self.drawn - self.made if ended else None]
        if len(audio):
            yield self._filtered(audio)
        oldest = min(stage.z.base for stage in self.stages) * height // hop
        self.mel.forget(max(min(oldest, self.made // hop - 1), 0))

    def _filtered(self, audio: Tensor) -> Tensor:
        start = self.made
        self.made += len(audio)
        if self.model.linear_prediction is None:
            return audio
        shift, order = self.mel.base, self.model.linear_prediction.order
        place = start - shift * self.model.config.hop_length
        audio = self.model.linear_prediction.inverse(audio[None], self.mel.columns[None], place, self.past)
        before = audio.new_zeros(1, order) if self.past is None else self.past
        self.past = torch.cat([before, audio], dim=1)[:, -order:]
        return audio[0]


def stream_engines(model: FlowVocoder, precision: str | None) -> list[SynthesisEngine]:
    """An engine for each flow, in the order of synthesis."""
    return [SynthesisEngine(_OneFlow(model, flow), precision) for flow in reversed(model.flows())]
