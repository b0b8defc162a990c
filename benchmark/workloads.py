"""Workloads to be timed: the likelihood, a training step, and synthesis in three ways, each beside its baseline."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmark.baseline import eager_conv_queue
from benchmark.made_up import made_up_trainer
from config import Config, WaveFlowConfig
from fast.engine import PRECISIONS, SynthesisEngine
from fast.estimators import Execution
from harness.devices import allow_tf32
from harness.memory import require_memory
from model import SHARING, FlowVocoder, build_model

CLIP_SECONDS = 6.5  # the mean clip of LJSpeech
SLOW_SECONDS = 0.5  # of `reverse`, which does n_height times the work
SEGMENT = 16_000  # samples of a training crop, roughly
RATE = 22_050  # Hz


@dataclass(frozen=True)
class Conditions:
    """Conditions that all workloads are run under."""

    device: torch.device
    batch: int = 1  # clips at a time
    seconds: float = CLIP_SECONDS  # of a synthesized clip
    compile: bool = False  # training steps
    threads: int | None = None  # of the CPU; None: PyTorch's choice
    tf32: bool = False  # in float32 products on CUDA

    def set_up(self) -> None:
        """Make them so in this process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        allow_tf32(products=self.tf32, convolutions=self.tf32)

    def arithmetic(self, workload: str, precision: str) -> str:
        """Name of what a workload computes with, so that none is compared with another kind."""
        if precision != "float32" or self.device.type != "cuda":
            return precision
        if self.tf32:
            return "TF32"
        return "float32 (3 x TF32)" if workload == "engine" else "float32 (IEEE)"  # as near as each other


@dataclass(frozen=True)
class Bench:
    """A model of an experiment, with random weights (speed does not depend on what they are), and the conditions."""

    config: Config
    conditions: Conditions

    @cached_property
    def model(self) -> FlowVocoder:
        """The one model that all workloads but training share."""
        torch.manual_seed(0)
        return build_model(self.config.waveflow_config, self.config.data_config).to(self.conditions.device)

    def clip(self, seconds: float) -> tuple[Tensor, Tensor]:
        """A mel [B, M, F] and noise [B, 1, h, W] for at least `seconds` of audio."""
        batch, device = self.conditions.batch, self.conditions.device
        require_memory(8 * batch * seconds * RATE, f"{batch} x {seconds:g} s of audio", "choose less", device)
        mel = self._mel(max(2, round(seconds * RATE / self.model.config.hop_length) + 1))
        return mel, self.model.sample_noise(mel, 1.0)

    def crops(self) -> tuple[Tensor, Tensor]:
        """Training crops [B, T] and their mels [B, M, F]."""
        hop = self.config.data_config.hop_length
        frames = round(SEGMENT / hop) + 1
        height = self.config.waveflow_config.n_height
        audio = torch.randn(self.conditions.batch, hop * (frames - 1) // height * height, device=self.conditions.device)
        return audio, self._mel(frames)

    def _mel(self, frames: int) -> Tensor:
        bands = self.config.data_config.n_mel_channels
        return torch.randn(self.conditions.batch, bands, frames, device=self.conditions.device)


@dataclass(frozen=True)
class Job:
    """A workload made ready to run."""

    model: FlowVocoder  # with which it computes
    run: Callable[[], Any]
    samples: int  # of audio, in one run
    passes: float  # over these samples that the work of one run comes to


@dataclass(frozen=True)
class Workload:
    """One thing to time."""

    name: str
    precision: str
    job: Job

    @property
    def flop(self) -> float:
        """Floating-point operations of one run, computed directly."""
        return self.job.passes * self.job.samples * flop_per_sample(self.job.model.config)


def has_workload(config: Config, name: str) -> bool:
    """Tell whether a model has what a workload measures."""
    return name != "linear_prediction" or config.waveflow_config.linear_prediction > 0


def make_workloads(bench: Bench, chosen: Sequence[tuple[str, str]]) -> list[Workload]:
    """Workloads chosen by name and precision."""
    return [Workload(name, precision, BUILDERS[name](bench, precision)) for name, precision in chosen]


def run_once(bench: Bench, name: str, precision: str) -> None:
    """Make a workload and run it: what its peak memory is that of."""
    bench.conditions.set_up()
    BUILDERS[name](bench, precision).run()


def flop_per_sample(config: WaveFlowConfig) -> float:
    """Operations (multiply-add = 2) for one audio sample of synthesis or of the likelihood, computed directly.

    The 3x3 and residual products, the skip branch merged with an affine projection, and the conditioning once per
    estimator.
    """
    n_res, n_layer = config.res_channels, config.n_layer
    flow = n_layer * 18 * n_res**2 + (n_layer - 1) * n_res**2 + n_layer * n_res * 2
    estimators = 1 if SHARING[config.coupling_type].estimator else config.n_flow
    return 2.0 * (config.n_flow * flow + estimators * n_layer * config.cin_channels * 2 * n_res)


# --- training -------------------------------------------------------------------------------------------------


def _train_baseline(bench: Bench, precision: str) -> Job:
    """The trainer's step on the model as `modules.py` has it, convolution by convolution."""
    return _training(bench, precision, Execution(plain=True))


def _train(bench: Bench, precision: str) -> Job:
    return _training(bench, precision, Execution(compile=bench.conditions.compile))


def _train_checkpointed(bench: Bench, precision: str) -> Job:
    """Training with `checkpoint_activations`; what is computed again is not counted as work."""
    return _training(bench, precision, Execution(compile=bench.conditions.compile, checkpoint_activations=True))


def _training(bench: Bench, precision: str, execution: Execution) -> Job:
    """The trainer's own step: backward is two products for each one of the forward pass."""
    changes = {"batch_size": bench.conditions.batch, "fp16_run": precision != "float32", "amp_backend": "torch"}
    if precision != "float32":
        changes["amp_dtype"] = precision
    trainer = made_up_trainer(bench.config, bench.conditions.device, changes)
    audio, mel = bench.crops()

    def run() -> None:
        trainer.model.execution = execution
        trainer.step(audio, mel)

    return Job(trainer.model, run, audio.numel(), passes=3.0)


# --- likelihood and synthesis ---------------------------------------------------------------------------------


def _forward(bench: Bench, _precision: str) -> Job:
    audio, mel = bench.crops()

    @torch.no_grad()
    def run() -> None:
        bench.model(audio, mel)

    return Job(bench.model, run, audio.numel(), passes=1.0)


def _reverse(bench: Bench, _precision: str) -> Job:
    mel, z = bench.clip(min(SLOW_SECONDS, bench.conditions.seconds))
    rows = (bench.model.config.n_height + 1) / 2  # each row recomputes those above
    return Job(bench.model, lambda: bench.model.reverse(mel, z=z), z.numel(), passes=rows)


def _queue(bench: Bench, precision: str) -> Job:
    mel, z = (tensor.to(PRECISIONS[precision]) for tensor in bench.clip(bench.conditions.seconds))
    model = copy.deepcopy(bench.model).to(PRECISIONS[precision])
    return Job(model, lambda: eager_conv_queue(model, mel, z), z.numel(), passes=1.0)


def _engine(bench: Bench, precision: str) -> Job:
    mel, z = bench.clip(bench.conditions.seconds)
    engine = SynthesisEngine(bench.model, precision=precision)
    return Job(bench.model, lambda: engine(mel, z), z.numel(), passes=1.0)


def _linear_prediction(bench: Bench, _precision: str) -> Job:
    """The inverse of the outermost flow, which the engine's time has in it: filters from the mel, then the recursion.

    For order p, Levinson's recursion is 2 p^2 operations a frame, the filter 2 p a sample.
    """
    mel, z = bench.clip(bench.conditions.seconds)
    model, residual = bench.model, z.flatten(1)
    order, hop = model.linear_prediction.order, model.config.hop_length
    flop = 2 * order**2 / hop + 2 * order
    return Job(
        model,
        lambda: model.linear_prediction.inverse(residual, mel),
        residual.numel(),
        passes=flop / flop_per_sample(model.config),
    )


BUILDERS: dict[str, Callable[[Bench, str], Job]] = {
    "forward": _forward,
    "train_baseline": _train_baseline,
    "train": _train,
    "train_checkpointed": _train_checkpointed,
    "reverse": _reverse,
    "queue": _queue,
    "engine": _engine,
    "linear_prediction": _linear_prediction,
}
