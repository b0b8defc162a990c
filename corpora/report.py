"""Report on a corpus by `python data.py prepare`."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from audio import LOG_FLOOR, MelSpectrogram, read_wav, shortest_audio
from config import DataConfig
from corpora.splits import SETS
from corpora.takes import Take
from harness.files import write_table

MEASURED = 100  # clips, at most, whose mels are measured
SHOWN = 20  # problems printed; the CSV has them all
NOTICED_OFFSET = 1e-3  # of full scale


def write_report(path: Path, takes: Sequence[Take]) -> None:
    """One CSV row per take."""
    columns = ("path", "used_as", "form", "rate", "seconds", "offset", "clipped", "loudness", "problem")
    rows = ([*(getattr(take, column) for column in columns), " ".join(c.name for c in take.clips)] for take in takes)
    write_table(path, [[*columns, "clips"], *rows])


def report_text(folder: Path, takes: Sequence[Take], data: DataConfig) -> str:
    """Hours, forms, levels, what was left out and what was put right, mel statistics."""
    used = [take for take in takes if take.used_as and not take.problem]
    left_out = [take for take in takes if take.problem]
    lines = [f"left out: {take.path}: {take.problem}" for take in left_out[:SHOWN]]
    lines += [f"... and {len(left_out) - SHOWN} more"] if len(left_out) > SHOWN else []
    for name in SETS:
        clips = [clip for take in used if take.used_as == name for clip in take.clips]
        seconds = sum(clip.samples for clip in clips) / data.sampling_rate
        lines.append(f"{name}: {len(clips)} clips, {_duration(seconds)}")
    forms = Counter(f"{take.form} at {take.rate} Hz" for take in used)
    lines.append("recordings: " + ", ".join(f"{count} x {form}" for form, count in forms.most_common()))
    if speakers := {take.speaker for take in used if take.speaker}:
        of_sets = ((name, {take.speaker for take in used if take.used_as == name} & speakers) for name in SETS)
        parts = ", ".join(f"{name} {len(some)}" for name, some in of_sets)
        lines.append(f"speaker folders: {len(speakers)}; in {parts}")
    if levels := [take.loudness for take in used if math.isfinite(take.loudness)]:
        mean = sum(levels) / len(levels)
        lines.append(f"loudness as recorded: mean {mean:.1f} LUFS, {min(levels):.1f} to {max(levels):.1f}")
    offsets = [take for take in used if abs(take.offset) > NOTICED_OFFSET]
    clipped = [take for take in used if take.clipped]
    for what, some in (("DC offset, removed", offsets), ("clipped peaks, which stay", clipped)):
        if some:
            lines.append(f"{what}: {len(some)} recordings ({some[0].path}, ...)")
    lower = [take for take in used if take.rate < data.sampling_rate]
    if lower:
        enough = max(take.rate for take in lower)
        lines.append(
            f"recorded below {data.sampling_rate} Hz: {len(lower)} recordings ({lower[0].path}, ...); "
            f"there is nothing above {min(take.rate for take in lower) / 2:g} Hz in them"
            + (f", so that an experiment file of {enough} Hz would do" if len(lower) == len(used) else "")
        )
    return "\n".join([*lines, _mel_line(folder, used, data)])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _mel_line(folder: Path, takes: Sequence[Take], data: DataConfig) -> str:
    clips = [clip for take in takes if take.used_as == "train" for clip in take.clips][:MEASURED]
    mel_fn, mels = MelSpectrogram(data), []
    for clip in clips:
        audio = read_wav(folder / "wavs" / f"{clip.name}.wav", data.sampling_rate)
        if len(audio) >= shortest_audio(data):
            mels.append(mel_fn(audio[: 30 * data.sampling_rate]))
    mel = torch.cat(mels, dim=1)
    floor = (mel <= math.log(LOG_FLOOR) + 1e-3).float().mean().item()
    return (
        f"mels of {len(mels)} training clips: mean {mel.mean():.2f}, standard deviation {mel.std():.2f}, "
        f"{mel.min():.2f} to {mel.max():.2f}, {100 * floor:.1f} % at the floor"
    )
