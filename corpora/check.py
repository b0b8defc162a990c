"""`train.py --check_data`: look at every clip of a corpus for what spoils a training, before it is started.

Errors make a run fail or its figures meaningless; warnings are worth a look. Users of flow vocoders report NaN from
silent and very short files: where the signal is constant, its density has no upper bound.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audio import INT16_SCALE, read_wav, shortest_audio, wav_length
from config import DataConfig
from corpora.spectrum import find_band_end, find_hum, power_frames
from harness import terminal
from harness.errors import InputError, one_line
from harness.files import write_table
from harness.pools import thread_pool

BLOCK = 2**20  # samples read at a time: memory does not grow with the clip
CLIPPED_RUN = 3  # samples in a row at full scale; a single one may be a genuine peak
FULL_SCALE = (INT16_SCALE - 1) / INT16_SCALE
LOOKED_AT = 2**18  # samples from the start, for hum and the end of the band
OFFSET = 1e-3  # of full scale
LEVEL_SPREAD = 15.0  # dB from the middle of the corpus
TEXT_SPREAD = 3.0  # times the characters a second of the corpus, or a part of it
COMPARED = 5  # clips at least, to know what is usual
SHOWN = 20  # problems printed; the CSV has them all
SAME = "the same audio as"
_NUMBER = re.compile(r"-?\b\d+(?:\.\d+)?")


@dataclass
class ClipReport:
    """Findings in one clip; lengths in samples."""

    file: str
    list: str  # "train" or "test"
    samples: int = 0
    peak: float = 0.0
    longest_constant: int = 0  # digital silence, or any other standing value
    clipped: int = 0  # in runs of at least CLIPPED_RUN
    offset: float = 0.0  # mean of the samples
    level: float = -math.inf  # root mean square, dB of full scale
    hum: float = 0.0  # Hz of the mains, if it is heard
    band_end: float = 0.0  # Hz above which there is nothing, if it is below half of the rate
    content: str = ""  # hash of the samples, whatever the header
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def severity(self) -> str:
        """The worst of it: error, warning or ok."""
        return "error" if self.errors else "warning" if self.warnings else "ok"


def inspect_corpus(
    training_files: Sequence[str],
    test_files: Sequence[str],
    data_config: DataConfig,
    texts: Mapping[str, str] | None = None,
    crop_context: int = 0,
) -> list[ClipReport]:
    """A report per entry of the two lists, in order, duplicates between and within them included.

    texts: transcripts by file, of those that have one. crop_context: `train_config.crop_context`. A few clips are
    looked at at once.
    """
    clips = [ClipReport(file, "train") for file in training_files] + [ClipReport(file, "test") for file in test_files]

    def inspect(clip: ClipReport) -> None:
        try:
            _measure(clip, data_config.sampling_rate)
            _judge(clip, data_config, crop_context)
        except (InputError, OSError) as error:
            clip.errors.append(str(error).removeprefix(one_line(f"{clip.file}: ")))

    with thread_pool() as pool:
        for _ in terminal.bar(pool.map(inspect, clips), "check", total=len(clips), unit="clip"):
            pass
    _find_duplicates(clips)
    _compare_levels(clips)
    _compare_texts(clips, texts or {}, data_config.sampling_rate)
    return clips


def _measure(clip: ClipReport, sampling_rate: int) -> None:
    clip.samples = wav_length(clip.file, sampling_rate)
    digest = hashlib.blake2b(digest_size=16)
    constant, clipped = _LongestRun(), _LongestRun(at_least=CLIPPED_RUN)
    previous, total, power = np.nan, 0.0, 0.0
    for start in range(0, clip.samples, BLOCK):
        block = read_wav(clip.file, sampling_rate, start, min(BLOCK, clip.samples - start)).numpy()
        digest.update(block.tobytes())
        total, power = (
            total + float(block.sum(dtype=np.float64)),
            power + float(np.square(block, dtype=np.float64).sum()),
        )
        if start == 0:
            frames = power_frames(block[:LOOKED_AT])
            clip.hum, clip.band_end = find_hum(frames, sampling_rate), find_band_end(frames, sampling_rate)
        clip.peak = max(clip.peak, float(np.abs(block).max()))
        constant.add(np.diff(block, prepend=previous) == 0)
        clipped.add(np.abs(block) >= FULL_SCALE)
        previous = block[-1]
    clip.content = digest.hexdigest()
    clip.offset = total / clip.samples
    clip.level = 10 * math.log10(power / clip.samples) if power else -math.inf
    clip.longest_constant = constant.longest() + 1  # n equal steps are n + 1 equal samples
    clip.clipped = clipped.total()


class _LongestRun:
    """Runs of True in a sequence given block by block: the longest, and the sum of those at least so long."""

    def __init__(self, at_least: int = 1) -> None:
        self.at_least, self._open, self._longest, self._total = at_least, 0, 0, 0

    def add(self, flags: np.ndarray) -> None:
        if not len(flags):
            return
        edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
        runs = edges[1::2] - edges[::2]  # lengths
        if flags[0]:
            runs[0] += self._open
        else:
            self._close(self._open)
        self._open = 0
        if flags[-1]:
            self._open, runs = int(runs[-1]), runs[:-1]
        for run in runs[runs >= self.at_least]:
            self._close(int(run))

    def _close(self, run: int) -> None:
        if run >= self.at_least:
            self._longest, self._total = max(self._longest, run), self._total + run

    def longest(self) -> int:
        """Call after the last block."""
        return max(self._longest, self._open)

    def total(self) -> int:
        """Call after the last block."""
        return self._total + (self._open if self._open >= self.at_least else 0)


def _judge(clip: ClipReport, config: DataConfig, context: int) -> None:
    seconds = clip.longest_constant / config.sampling_rate
    shortest = -(-shortest_audio(config) // config.hop_length) * config.hop_length
    if clip.list == "test" and clip.samples < shortest:
        clip.errors.append(f"too short: {clip.samples} samples, at least {shortest} are needed")
    elif clip.list == "train" and clip.samples <= context:
        clip.errors.append(f"too short: {clip.samples} samples, and the first {context} of a crop are only its past")
    elif clip.list == "train" and clip.samples < config.segment_length:
        clip.warnings.append(f"short: {clip.samples} samples, its crops end in zeros up to {config.segment_length}")
    if clip.longest_constant == clip.samples:
        clip.errors.append("silent: every sample is the same")
    elif clip.longest_constant >= config.segment_length - context:
        clip.errors.append(f"{seconds:.2f} s of digital silence in a row, so that a whole crop can be silent")
    elif clip.longest_constant >= config.filter_length:
        clip.warnings.append(f"{seconds:.2f} s of digital silence in a row")
    if clip.clipped:
        clip.warnings.append(f"clipped: {clip.clipped} samples at full scale")
    if clip.errors:
        return
    chance = 10 ** (clip.level / 20) / math.sqrt(clip.samples)  # standard deviation of the mean of noise
    if abs(clip.offset) > max(OFFSET, 5 * chance):
        clip.warnings.append(f"DC offset of {clip.offset:.4f}; python data.py prepare removes it")
    if clip.hum:
        clip.warnings.append(f"mains hum at {clip.hum:g} Hz and above")
    if clip.band_end:
        clip.warnings.append(f"nothing above {clip.band_end / 1000:.1f} kHz, as if resampled up from a lower rate")


def _find_duplicates(clips: Sequence[ClipReport]) -> None:
    first: dict[str, ClipReport] = {}
    for clip in clips:  # training clips come first
        if not clip.content:
            continue
        earlier = first.setdefault(clip.content, clip)
        if earlier is clip:
            continue
        if earlier.list != clip.list:
            clip.errors.append(f"{SAME} training clip {earlier.file}")
        else:
            clip.warnings.append(f"{SAME} {earlier.file}")


def _compare_levels(clips: Sequence[ClipReport]) -> None:
    levels = [clip.level for clip in clips if not clip.errors and math.isfinite(clip.level)]
    if len(levels) < COMPARED:
        return
    middle = float(np.median(levels))
    for clip in clips:
        if not clip.errors and abs(clip.level - middle) > LEVEL_SPREAD:
            clip.warnings.append(f"level {clip.level:.0f} dB, the middle one is {middle:.0f}")


def _compare_texts(clips: Sequence[ClipReport], texts: Mapping[str, str], sampling_rate: int) -> None:
    speeds = {
        clip.file: len(texts[clip.file]) * sampling_rate / clip.samples
        for clip in clips
        if texts.get(clip.file) and clip.samples
    }
    if len(speeds) < COMPARED:
        return
    middle = float(np.median(list(speeds.values())))
    for clip in clips:
        if (speed := speeds.get(clip.file)) and not middle / TEXT_SPREAD < speed < middle * TEXT_SPREAD:
            clip.warnings.append(f"{speed:.0f} characters a second, the middle is {middle:.0f}: is this its text?")


def write_report(path: Path, clips: Sequence[ClipReport]) -> None:
    """One CSV row per clip."""
    columns = ("list", "file", "severity", "samples", "peak", "longest_constant", "clipped")
    columns += ("offset", "level", "hum", "band_end")
    rows = ([*(getattr(clip, column) for column in columns), "; ".join(clip.errors + clip.warnings)] for clip in clips)
    write_table(path, [[*columns, "problems"], *rows])


def report_text(clips: Sequence[ClipReport]) -> str:
    """Counts, and the first problems, errors before warnings; a warning that many clips share is said once."""
    kinds: dict[str, list[str]] = {}
    for warning in (warning for clip in clips for warning in clip.warnings):
        kinds.setdefault(_kind(warning), []).append(warning)
    common = {kind: warnings for kind, warnings in kinds.items() if len(warnings) > SHOWN}
    lines = []
    for severity in ("error", "warning"):
        for clip in clips:
            problems = clip.errors + [text for text in clip.warnings if _kind(text) not in common]
            if problems and clip.severity == severity:
                lines.append(f"{severity}: {clip.file}: {'; '.join(problems)}")
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    count = Counter(clip.severity for clip in clips)
    total = f"{len(clips)} clips: {count['error']} with errors, {count['warning']} with warnings, {count['ok']} good"
    shared = [f"warning: {len(warnings)} clips: {_in_one(warnings)}" for warnings in common.values()]
    return "\n".join([*lines[:SHOWN], *more, *shared, total])


def _kind(warning: str) -> str:
    """What warnings have in common that differ in their numbers only; one that names a file is of its own kind."""
    return warning if warning.startswith(SAME) else _NUMBER.sub("{}", warning)


def _in_one(warnings: Sequence[str]) -> str:
    """Warnings that differ in their numbers only, with the range of each."""
    columns = zip(*(_NUMBER.findall(warning) for warning in warnings), strict=True)
    ranges = [sorted(set(column), key=float) for column in columns]
    texts = iter(some[0] if len(some) == 1 else f"{some[0]} to {some[-1]}" for some in ranges)
    return _NUMBER.sub(lambda _: next(texts), warnings[0])
