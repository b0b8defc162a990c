"""Measures of a run: likelihood of whole held-out clips, its speech, and its cost.

Speech is measured without mel matching, which would hide the model, and at the best of a few temperatures for each of
the two measures, since the best differs from model to model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from audio import MelSpectrogram, wav_length
from config import Config
from data import ClipDataset, read_clip, read_file_list
from evaluation.distance import intelligibility, log_mel_distance
from experiments.variants import Subject
from fast.engine import SynthesisEngine
from fast.estimators import Execution
from harness.stopping import safe_point
from model import FlowVocoder, count_parameters

TEMPERATURES = (0.6, 0.8, 1.0)
LL_CLIPS = 12  # whole ones, the first of the test list: each run on a CPU is measured in half a minute
SYNTHESIS_CLIPS = 3
SYNTHESIS_SECONDS = 1.0  # clips that are shorter have too few frames of speech for STOI
COUNTED_FRAMES = 8

Synthesis = Callable[[Tensor, float], Tensor]  # mel [M, F], temperature -> audio [T]


@dataclass(frozen=True)
class Speech:
    """Likeness of a synthesis to its recordings, each at its best temperature."""

    log_mel: float
    log_mel_temp: float
    stoi: float
    stoi_temp: float
    synthesis_clips: int


@dataclass(frozen=True)
class Scores(Speech):
    """Everything that is measured of a trained subject; fields of `runs.Result`."""

    test_ll: float
    ll_clips: int
    parameters: int
    synthesis_parameters: int
    multiply_adds: float


def measure(subject: Subject, config: Config) -> Scores:
    """Likelihood, speech and cost."""
    likelihoods = clip_log_likelihoods(subject, config)
    model = subject.model
    others = sum(parameter.numel() for parameter in subject.prior.parameters())
    return Scores(
        test_ll=sum(likelihoods) / len(likelihoods),
        ll_clips=len(likelihoods),
        parameters=count_parameters(model) + others,
        synthesis_parameters=count_parameters(model, synthesis=True) + others,
        multiply_adds=multiply_adds(model),
        **vars(speech_of(synthesis_of(subject), config)),
    )


@torch.no_grad()
def clip_log_likelihoods(subject: Subject, config: Config) -> list[float]:
    """Nats per sample of whole test clips, in the precision of training: half costs 5e-5 nats, measured."""
    clips = ClipDataset(read_file_list(config.data_config.test_files), config.data_config)
    results = []
    for _, audio, mel in (clips[index] for index in range(min(len(clips), LL_CLIPS))):
        safe_point()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train_config.fp16_run):
            outputs = subject(audio[None], mel[None])
        results.append(subject.log_likelihood(outputs).item() / len(audio))
    return results


def synthesis_of(subject: Subject) -> Synthesis:
    """The way from mels to audio of a trained subject."""
    engine = SynthesisEngine(subject.model)

    def synthesize(mel: Tensor, temp: float) -> Tensor:
        shape = subject.model.sample_noise(mel[None], 0.0).shape
        return engine(mel[None], temp * subject.prior.sample(shape))[0]

    return synthesize


@torch.no_grad()
def speech_of(synthesize: Synthesis, config: Config) -> Speech:
    """Scores of the first few test clips that are long enough, with noise that is the same for everything measured."""
    data, mel_fn = config.data_config, MelSpectrogram(config.data_config)
    recordings = [read_clip(path, data) for path in _speech_files(config)]
    table: dict[float, tuple[float, float]] = {}
    for temp in TEMPERATURES:
        scores = []
        for number, recording in enumerate(recordings):
            safe_point()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                audio = synthesize(mel_fn(recording), temp).clamp(-1, 1)
            distance = log_mel_distance(mel_fn(audio), mel_fn(recording))
            scores.append((distance, intelligibility(audio, recording, data.sampling_rate)))
        table[temp] = tuple(sum(values) / len(values) for values in zip(*scores, strict=True))
    nearest, clearest = min(table, key=lambda temp: table[temp][0]), max(table, key=lambda temp: table[temp][1])
    return Speech(table[nearest][0], nearest, table[clearest][1], clearest, len(recordings))


def _speech_files(config: Config) -> Sequence[str]:
    data = config.data_config
    files = read_file_list(data.test_files)
    long = [path for path in files if wav_length(path, data.sampling_rate) > SYNTHESIS_SECONDS * data.sampling_rate]
    return (long or files)[:SYNTHESIS_CLIPS]


def multiply_adds(model: FlowVocoder) -> float:
    """Multiply-adds of the network for one sample, as its convolutions are written, and those of the filter."""
    execution, model.execution = model.execution, Execution(plain=True)
    frames, parameter = COUNTED_FRAMES, next(model.parameters())
    samples = (frames - 1) * model.config.hop_length
    with FlopCounterMode(display=False) as counter:
        model(parameter.new_zeros(1, samples), parameter.new_zeros(1, model.config.cin_channels, frames))
    model.execution = execution
    return counter.get_total_flops() / 2 / samples + model.config.linear_prediction
