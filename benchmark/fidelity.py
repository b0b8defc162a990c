"""Change of a trained model's sound by half precision: what `python -m benchmark --fidelity` measures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config
from data import read_test_files
from evaluation.distance import log_mel_distance
from fast.engine import slow_precision_warning
from harness import terminal
from vocoder import Clip, Vocoder

TEMPERATURES = (0.6, 1.0)
CLIPS = 40  # at most, the first of the test list


class Distance(NamedTuple):
    """Log-mel distance in nats between the outputs of an engine and something else, over clips."""

    temperature: float
    of: str
    to: str
    mean: float
    largest: float


def measure_fidelity(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Half precision beside float32 from the same noise, and float32 beside the recordings for scale.

    Of the newest checkpoint in the run folder and the first test clips. Says a Markdown table and returns its rows.
    Precisions that are slow on this device are left out with a line that says so.
    """
    files = read_test_files(config.data_config)[:CLIPS]
    vocoders = _vocoders(config, device)
    terminal.say(f"\n{vocoders['float32'].name}, {len(files)} test clip(s), log-mel distance in nats\n")
    terminal.say("| temperature | of | to | mean | largest |\n|---|---|---|---|---|")
    rows = []
    for temperature in TEMPERATURES:
        for (of, to), distances in _distances(vocoders, files, temperature, config.train_config.seed).items():
            row = Distance(temperature, of, to, sum(distances) / len(distances), max(distances))
            terminal.say(f"| {temperature:g} | {of} | {to} | {row.mean:.4f} | {row.largest:.4f} |")
            rows.append(row._asdict())
    return rows


def _vocoders(config: Config, device: torch.device) -> dict[str, Vocoder]:
    """The trained model by precision, float32 first."""
    plain = Vocoder.from_pretrained(config, device=device, precision="float32")
    vocoders = {"float32": plain}
    for precision in ("bfloat16", "float16"):
        if warning := slow_precision_warning(precision, device):
            terminal.say(f"left out: {warning}")
        else:
            vocoders[precision] = Vocoder(plain.model, config.data_config, precision, plain.name)
    return vocoders


def _distances(
    vocoders: dict[str, Vocoder], files: Sequence[str], temperature: float, seed: int
) -> dict[tuple[str, str], list[float]]:
    """Log-mel distances of each clip by (of, to)."""
    plain = vocoders["float32"]
    found: dict[tuple[str, str], list[float]] = {}
    for number, file in enumerate(files):
        clip = plain.read(file, temperature, seed + number)  # with the noise of `train.py --synthesize`
        mels = {precision: _mel_of(vocoder, clip) for precision, vocoder in vocoders.items()}
        if clip.recording is not None:
            found.setdefault(("float32", "the recording"), []).append(log_mel_distance(mels["float32"], clip.mel))
        for precision in list(vocoders)[1:]:
            found.setdefault((precision, "float32"), []).append(log_mel_distance(mels[precision], mels["float32"]))
    return found


def _mel_of(vocoder: Vocoder, clip: Clip) -> Tensor:
    """The log-mel [M, F] of what is heard: audio cut off at full scale, as in a wav."""
    [[sound]] = vocoder.synthesize([clip])
    return vocoder.mel_spectrogram(sound.audio.clamp(-1, 1))
