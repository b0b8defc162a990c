"""Data as it walks to the model: file lists, training crops, whole clips, the loader; and `python data.py`.

Random choices come from `random_stream`, by seed, epoch and index, so what a crop is depends neither on the number of
workers nor on where a run was resumed.
"""

if __name__ == "__main__":
    import harness.start  # noqa: F401

import argparse
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from audio import (
    LOG_FLOOR,
    MelSpectrogram,
    is_mel_file,
    mel_frames,
    read_mel,
    read_wav,
    rescale,
    shortest_audio,
    wav_length,
    write_mel,
)
from config import REMEDIES, Config, DataConfig, load_config
from harness import terminal
from harness.arguments import Help, Parser, add_general
from harness.batches import BatchLoader, ShuffledBatches, check_batch_size, random_stream
from harness.errors import InputError
from harness.files import check_apart
from harness.lists import read_entries
from harness.processes import is_main
from harness.stopping import exit_status, leave

LONG_LIST = 500_000  # bytes of a list that holds some thousands of clips
MANY_CLIPS = 10_000  # whose headers take seconds, or minutes where files are far away
_CROP = 1  # a purpose of random numbers; 0 is the order of batches


# --- file lists -----------------------------------------------------------------------------------------------


def read_file_list(path: str | Path) -> list[str]:
    """Recordings, or mels to synthesize from, of a list in any of the forms of `harness.lists.read_entries`."""
    return [entry.audio for entry in read_entries(path)]


def read_test_lists(data_config: DataConfig) -> dict[str, list[str]]:
    """The entries of each test list by the list's name: its file's, with the folder's where two are alike."""
    paths = data_config.test_lists
    names = output_names(paths, "") if len(paths) > 1 else ["test"]
    return {name: read_file_list(path) for name, path in zip(names, paths, strict=True)}


def read_paired_mels(lists: Sequence[str | Path]) -> dict[str, str]:
    """The mel of each recording of lists that name one for each, as an acoustic model predicted it; else nothing.

    InputError where a list has a mel for some only.
    """
    mels: dict[str, str] = {}
    for path in lists:
        entries = read_entries(path)
        without = [entry.audio for entry in entries if not entry.mel]
        if without and len(without) < len(entries):
            raise InputError(
                f"file list {path}: {len(without)} of {len(entries)} lines name no mel ({without[0]}, ...); "
                "give every line one, or none"
            )
        mels |= {entry.audio: entry.mel for entry in entries if entry.mel}
    return mels


def read_texts(lists: Sequence[str | Path]) -> dict[str, str]:
    """The transcripts of recordings, of lists that have them."""
    return {entry.audio: entry.text for path in lists for entry in read_entries(path) if entry.text}


def read_test_files(data_config: DataConfig) -> list[str]:
    """The entries of all test lists, one after the other."""
    return list(itertools.chain(*read_test_lists(data_config).values()))


def read_synthesis_files(data_config: DataConfig) -> list[str]:
    """Files of the test lists to synthesize from: the mels that they name, or else the recordings."""
    mels = read_paired_mels(data_config.test_lists)
    return [mels.get(path, path) for path in read_test_files(data_config)]


def overlap_warning(training_files: Sequence[str], test_files: Sequence[str]) -> str | None:
    """One line about clips that are in both lists, or None; paths are compared resolved."""
    folders: dict[str, str] = {}  # resolved once each: there are many files in few
    training = {_resolved(path, folders) for path in training_files}
    shared = [path for path in test_files if _resolved(path, folders) in training]
    if not shared:
        return None
    return (
        f"{len(shared)} of {len(test_files)} test clips are also training clips ({shared[0]}, ...): "
        "their likelihood says nothing about new speech"
    )


def _resolved(path: str, folders: dict[str, str]) -> str:
    """The path without links in it, which may be the file itself or in the way to it."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def output_names(paths: Sequence[str], suffix: str = ".wav") -> list[str]:
    """A file name for each source, unique also where folders differ and stems do not, and without any folder.

    Sources of the same stem get their folder's name in front, and if that is not enough a number behind.
    """
    stems = [_plain_name(Path(path).stem) for path in paths]
    count = Counter(stem.casefold() for stem in stems)  # some file systems hold A and a for the same
    taken: set[str] = set()
    names = []
    for path, stem in zip(paths, stems, strict=True):
        if count[stem.casefold()] > 1:
            stem = _plain_name(f"{Path(path).parent.name}_{stem}")
        candidates = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in candidates if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(f"{name}{suffix}")
    return names


def _plain_name(text: str) -> str:
    return re.sub(r"[^\w .+-]", "_", text).strip("._ ") or "clip"


# --- clips ----------------------------------------------------------------------------------------------------


class CropDataset(Dataset):
    """Random training crops. An item's key is (epoch, index), its value (audio [T], mel [80, T // hop + 1]),
    T = segment_length; shorter clips are padded with zeros.

    `mel_source` "crop" (published): the mel of the crop by itself, so its edge frames see reflected samples.
    "clip": the crop starts on a frame and its mel is cut from the whole clip's. Only the samples that those frames
    see are read, the crop and half a filter on each side: the result is the same.

    Recordings in `mels` have a mel that somebody else made, from which crops are cut on whole frames too.
    """

    def __init__(
        self, files: Sequence[str], data_config: DataConfig, seed: int, mels: Mapping[str, str] | None = None
    ) -> None:
        self.files, self.config, self.seed, self.mels = list(files), data_config, seed, mels or {}
        self.mel = MelSpectrogram(data_config)
        if data_config.segment_length < shortest_audio(data_config):
            raise InputError(
                f"data_config.segment_length {data_config.segment_length} is too short for filter_length "
                f"{data_config.filter_length}; at least {shortest_audio(data_config)} samples are needed"
            )
        title = f"looking at {len(self.files):,} training clips"
        if len(self.files) >= MANY_CLIPS and is_main():
            terminal.tell(f"{title} of {data_config.training_files}")
        shown = terminal.bar(self.files, title, unit="clip", leave=False, delay=1.0, disable=not is_main())
        self.lengths = [wav_length(path, data_config.sampling_rate) for path in shown]
        self.trimmed = _check_pairs(dict(zip(self.files, self.lengths, strict=True)), self.mels, data_config)
        self._peaks: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        segment, hop = self.config.segment_length, self.config.hop_length
        if self.files[index] in self.mels:
            return self._with_given_mel(epoch, index)
        aligned = self.config.mel_source == "clip"
        step = hop if aligned else 1
        context = -(-(self.config.filter_length // 2) // hop) * hop if aligned else 0  # whole frames

        room = max(0, self.lengths[index] - segment)
        start = step * int(random_stream(_CROP, self.seed, epoch, index).integers(room // step + 1))
        before = min(start, context)
        stop = min(start + segment + context, self.lengths[index])
        stretch = self._read(index, start - before, stop)
        stretch = F.pad(stretch, (0, max(0, segment - len(stretch))))
        first = before // hop
        mel = self.mel(stretch)[:, first : first + segment // hop + 1]
        return stretch[before : before + segment], mel

    def _with_given_mel(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        segment, hop, path = self.config.segment_length, self.config.hop_length, self.files[index]
        mel = _given_mel(path, self.mels[path], self.lengths[index], self.config)
        room = max(0, hop * (mel.size(1) - 1) - segment) // hop
        frame = int(random_stream(_CROP, self.seed, epoch, index).integers(room + 1))
        audio = self._read(index, hop * frame, min(hop * frame + segment, self.lengths[index]))
        frames = segment // hop + 1
        return F.pad(audio, (0, segment - len(audio))), _of_length(mel[:, frame : frame + frames], frames, self.config)

    def _read(self, index: int, start: int, stop: int) -> Tensor:
        path, rate = self.files[index], self.config.sampling_rate
        audio = read_wav(path, rate, start, stop - start)
        if not self.config.rescale:
            return audio
        if index not in self._peaks:  # the whole clip's peak: one full read per clip and worker
            self._peaks[index] = _peak(read_wav(path, rate))
        return rescale(audio, self._peaks[index])


class ClipDataset(Dataset):
    """Test clips. An item is (path, audio [T], mel [80, T // hop + 1]).

    Whole clips, cut to a multiple of the hop; with `max_length`, the first that many samples of each, padded with
    zeros (what the published code evaluates during training).
    """

    def __init__(
        self,
        files: Sequence[str],
        data_config: DataConfig,
        max_length: int | None = None,
        mels: Mapping[str, str] | None = None,
    ) -> None:
        self.files, self.config, self.max_length, self.mels = list(files), data_config, max_length, mels or {}
        self.mel = MelSpectrogram(data_config)
        lengths = {path: wav_length(path, data_config.sampling_rate) for path in self.files}
        if max_length is None:
            for path, length in lengths.items():
                _whole_frames(length, path, data_config)
        _check_pairs(lengths, self.mels, data_config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        path = self.files[index]
        if self.max_length is None:
            audio = read_clip(path, self.config)
        else:
            audio = _read_rescaled(path, self.config, self.max_length)
            audio = F.pad(audio, (0, self.max_length - len(audio)))
        if path not in self.mels:
            return path, audio, self.mel(audio)
        mel = _given_mel(path, self.mels[path], wav_length(path, self.config.sampling_rate), self.config)
        hop = self.config.hop_length
        if self.max_length is None:
            audio = audio[: hop * (mel.size(1) - 1)]
        return path, audio, _of_length(mel, len(audio) // hop + 1, self.config)


def read_clip(path: str, data_config: DataConfig, max_length: int | None = None) -> Tensor:
    """A clip [T], or its first `max_length` samples, rescaled if the config says so, cut to a multiple of the hop."""
    audio = _read_rescaled(path, data_config, max_length)
    return audio[: _whole_frames(len(audio), path, data_config)]


def _check_pairs(lengths: Mapping[str, int], mels: Mapping[str, str], config: DataConfig) -> int:
    """InputError where a mel's length is not its recording's to a frame; else how many are a frame off."""
    different = 0
    for path, samples in lengths.items():
        if path in mels:
            frames, expected = mel_frames(mels[path], config.n_mel_channels), samples // config.hop_length + 1
            if abs(frames - expected) > 1:
                raise InputError(
                    f"{mels[path]}: {frames} frames, {expected} expected for the {samples} samples of {path} at hop "
                    f"{config.hop_length}; make it again with the config's settings"
                )
            different += frames != expected
    return different


def _given_mel(path: str, mel: str, samples: int, config: DataConfig) -> Tensor:
    return read_mel(mel, config.n_mel_channels)[:, : samples // config.hop_length + 1]


def _of_length(mel: Tensor, frames: int, config: DataConfig) -> Tensor:
    """The first so many frames of a mel [M, F], silence behind its last."""
    silence = 0.0 if config.use_dbmel else math.log(LOG_FLOOR)
    return F.pad(mel[:, :frames], (0, max(0, frames - mel.size(1))), value=silence)


def load_synthesis_entry(
    path: str, data_config: DataConfig, mel_fn: MelSpectrogram, max_length: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Load what to synthesize from: (mel [80, F], the recording [T] or None) of a wav, or of a .npy / .pt mel.

    max_length: of the audio, in samples; the rest is left out.
    """
    if is_mel_file(path):
        mel = read_mel(path, data_config.n_mel_channels)
        return mel if max_length is None else mel[:, : max_length // data_config.hop_length + 1], None
    audio = read_clip(path, data_config, max_length)
    return mel_fn(audio), audio


def check_synthesis_entries(files: Sequence[str], data_config: DataConfig) -> None:
    """InputError, naming the file, where a wav or mel is not fit to synthesize from."""
    for file in files:
        if is_mel_file(file):
            read_mel(file, data_config.n_mel_channels)
        else:
            wav_length(file, data_config.sampling_rate)


def _read_rescaled(path: str, config: DataConfig, max_length: int | None = None) -> Tensor:
    if config.rescale:  # by the peak of the whole clip
        audio = read_wav(path, config.sampling_rate)
        return rescale(audio, _peak(audio))[:max_length]
    length = wav_length(path, config.sampling_rate)
    return read_wav(path, config.sampling_rate, length=length if max_length is None else min(length, max_length))


def _peak(audio: Tensor) -> float:
    return audio.abs().max().item()


def _whole_frames(length: int, path: str, config: DataConfig) -> int:
    """Length cut to a multiple of the hop; InputError if that is too short for a mel."""
    whole = length // config.hop_length * config.hop_length
    if whole < shortest_audio(config):
        needed = -(-shortest_audio(config) // config.hop_length) * config.hop_length
        raise InputError(f"{path}: {length} samples, at least {needed} are needed; remove it from the list")
    return whole


# --- batches --------------------------------------------------------------------------------------------------


def tell_of_a_long_list(data_config: DataConfig) -> None:
    """A line before the list of training clips is read, where what follows takes seconds."""
    path = data_config.training_files
    if is_main() and os.path.isfile(path) and os.path.getsize(path) >= LONG_LIST:
        terminal.tell(f"reading {path}, {os.path.getsize(path) / 1e6:.1f} MB")


def make_train_loader(
    config: Config, start_batch: int = 0, rank: int = 0, world_size: int = 1, device: torch.device | None = None
) -> BatchLoader:
    """Endless training batches (audio [B, T], mel [B, 80, F]) from global batch number `start_batch` on.

    The same batches whatever the number of workers. device: where they go.
    """
    train = config.train_config
    data = config.data_config
    mels = read_paired_mels([data.training_files])
    dataset = CropDataset(read_file_list(data.training_files), data, train.seed, mels)
    check_batch_size(train.batch_size, len(dataset), world_size, "train_config.batch_size", "training clips")
    batches = ShuffledBatches(len(dataset), train.batch_size, train.seed, start_batch, rank, world_size)
    return BatchLoader(dataset, train.num_workers, REMEDIES.worker_died, train.seed, device, batch_sampler=batches)


def first_batch(loader: BatchLoader) -> list[Tensor]:
    """The first batch of a training, whole on every process: audio [B, T] and mel [B, M, F]."""
    return default_collate([loader.dataset[key] for key in loader.batch_sampler.batch(0)])


# --- command line ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """`python data.py mel | prepare | ljspeech | asterisk | demo`; returns the exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.run(options), quiet=options.quiet)


def _parser() -> argparse.ArgumentParser:
    from corpora.command import add_commands  # the recipes stand above this room, and only this command line needs them

    parser = Parser(prog="data.py", description="Prepare corpora, and mels of recordings.", formatter_class=Help)
    add_general(parser)
    commands = parser.add_subparsers(required=True, metavar="command")

    mel = commands.add_parser("mel", help="save the log-mels of wavs as .npy files of shape (80, frames)")
    mel.add_argument("-c", "--config", required=True, help="experiment file whose data_config says how")
    mel.add_argument("--list", metavar="FILE", help="a file with one wav path per line, instead of or beside WAV")
    mel.add_argument("output", metavar="OUT_DIR", help="folder for the .npy files, made if needed")
    mel.add_argument("wavs", metavar="WAV", nargs="*", help="16-bit mono wavs")
    mel.set_defaults(run=_save_mels)

    add_commands(commands)
    for command in commands.choices.values():
        command.formatter_class = Help
        add_general(command, top=False)
    return parser


def _save_mels(options: argparse.Namespace) -> None:
    data_config = load_config(options.config).data_config
    wavs = options.wavs + (read_file_list(options.list) if options.list else [])
    if not wavs:
        raise InputError("no wavs given; name some, or a list of them with --list")
    clips = ClipDataset(wavs, data_config)  # every header is checked before anything is written
    mels = [Path(options.output, name) for name in output_names(wavs, ".npy")]
    check_apart(mels, wavs, "choose another folder")
    for index, path in enumerate(terminal.bar(mels, desc="mel", unit="clip")):
        _, _, mel = clips[index]
        write_mel(path, mel)
    terminal.say(f"{len(wavs)} mels in {options.output}")


if __name__ == "__main__":
    leave(main())
