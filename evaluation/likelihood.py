"""Likelihood of clips under a vocoder, in nats per sample: each clip's, and their means."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import ClipDataset
from evaluation.tiles import likelihood_in_tiles
from harness import terminal
from harness.devices import exact_convolutions
from harness.files import write_table
from harness.stopping import safe_point
from model import FlowVocoder
from modules import gaussian_log_density


class ClipLikelihood(NamedTuple):
    """The log-likelihood of one clip in nats per sample, and its two terms."""

    clip: str
    samples: int
    log_likelihood: float
    prior: float
    log_det: float


class Likelihood(NamedTuple):
    """Means over clips (the published figure) and over samples, in nats per sample."""

    n_clips: int
    mean: float
    weighted: float
    prior: float
    log_det: float

    def __str__(self) -> str:
        return (
            f"log-likelihood {self.mean:.4f} nats/sample (mean over {self.n_clips} clips; weighted by length "
            f"{self.weighted:.4f}; prior {self.prior:.4f}, log-determinant {self.log_det:.4f})"
        )


def summarise(clips: Sequence[ClipLikelihood]) -> Likelihood:
    """Average the likelihoods of clips."""
    values = np.array([clip[2:] for clip in clips])
    weighted = np.average(values[:, 0], weights=[clip.samples for clip in clips])
    mean, prior, log_det = values.mean(axis=0)
    return Likelihood(len(clips), float(mean), float(weighted), float(prior), float(log_det))


def summarise_lists(clips: Sequence[ClipLikelihood], lists: Mapping[str, Sequence[str]]) -> dict[str, Likelihood]:
    """The means of each list; the clips are those of all lists, one after the other."""
    means, first = {}, 0
    for name, files in lists.items():
        means[name] = summarise(clips[first : first + len(files)])
        first += len(files)
    return means


def write_likelihoods(path: Path, clips: Sequence[ClipLikelihood]) -> None:
    """One CSV row per clip."""
    write_table(path, [ClipLikelihood._fields, *clips])


@torch.no_grad()
@exact_convolutions()
def clip_likelihoods(
    model: FlowVocoder, clips: ClipDataset, sigma: float, device: torch.device
) -> list[ClipLikelihood]:
    """The log-likelihood of each clip, one at a time, in nats per sample.

    Of up to n_height - 1 samples less, where the height does not divide the clip's length.
    """
    results = []
    # A generator of its own: a loader draws a number even if it needs none, and not from a training run's.
    loader = DataLoader(clips, batch_size=None, generator=torch.Generator())
    for path, audio, mel in terminal.bar(loader, "likelihood", unit="clip", leave=False):
        audio = audio[: len(audio) // model.config.n_height * model.config.n_height]
        safe_point()
        z, log_det = likelihood_in_tiles(model, audio.unsqueeze(0).to(device), mel.unsqueeze(0).to(device))
        prior = gaussian_log_density(z, sigma).item() / len(audio)
        per_sample = log_det.item() / len(audio)
        results.append(ClipLikelihood(path, len(audio), prior + per_sample, prior, per_sample))
    return results
