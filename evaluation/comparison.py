"""A copy-synthesis beside its recording."""

from pathlib import Path

from torch import Tensor

from audio import MelSpectrogram
from evaluation.distance import log_mel_distance, noise_like
from evaluation.pictures import save_mel_figure


def compare_with_recording(audio: Tensor, recording: Tensor, mel_fn: MelSpectrogram, picture: Path) -> dict[str, float]:
    """Log-mel distances to a recording [T] of its copy-synthesis [T] and of white noise of the same power, by name.

    The mels of all three are drawn as a PNG file, `picture`.
    """
    heard = {"recording": recording, "synthesis": audio.clamp(-1, 1), "white noise": noise_like(recording)}
    mels = {name: mel_fn(sound) for name, sound in heard.items()}
    save_mel_figure(picture, mels)
    return {name: log_mel_distance(mel, mels["recording"]) for name, mel in mels.items() if name != "recording"}
