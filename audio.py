"""Sound on disk and its log-mel spectrogram: wav files, mel files, `MelSpectrogram`.

Audio is float32 in [-1, 1), [T]; a mel is float32 [80, F] with F = T // hop_length + 1. The headers of wavs are read
here: the standard library's `wave` takes WAVE_FORMAT_EXTENSIBLE from Python 3.12 on only, and no file whose header was
written before its length was known; libsndfile is three times slower for crops, and quietly shortens what is truncated.
"""

import os
import shlex
import struct
import warnings
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import DataConfig
from formats.sounds import open_sound
from harness.arrays import map_array, read_header
from harness.errors import InputError
from harness.files import RefusedFile, written_whole
from harness.settings import parse_section
from harness.torch_files import load_tensors

INT16_SCALE = 32_768.0  # full scale of 16-bit audio
LOG_FLOOR = 1e-5  # smallest mel magnitude, as in Tacotron 2 and WaveGlow
PEAK = 0.999  # what `rescale` makes of a clip's loudest sample
MAX_SAMPLES = 2**28  # of a sound, over all channels: an hour and a half of stereo at 24 kHz, 1 GiB
MAX_MEL_BYTES = 2**29  # five hours at 80 bands and hop 256; more is taken for a broken or hostile file
MEL_SUFFIXES = (".npy", ".pt")
PCM, EXTENSIBLE = 1, 0xFFFE  # formats of a wav; the second says in a GUID which it is
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")  # behind the two bytes that are the format
MAX_CHUNKS = 1_000  # before the samples of a wav
OTHER_SOUND = (
    b"fLaC",
    b"OggS",
    b"ID3",
    b"\xff\xfb",
    b"\xff\xf3",
    b"\xff\xf2",
    b"FORM",
    b"RF64",
    b".snd",
    b"caff",
    b"RIFX",
)


# --- wav files ------------------------------------------------------------------------------------------------


def wav_length(path: str | Path, sampling_rate: int) -> int:
    """Samples in a 16-bit mono wav or FLAC, after checking its header; InputError names the file and the remedy."""
    if _is_flac(path):
        with _open_flac(path, sampling_rate) as file:
            return file.frames
    with _open_wav(path, sampling_rate) as wav:
        return wav.frames


def read_wav(path: str | Path, sampling_rate: int, start: int = 0, length: int | None = None) -> Tensor:
    """Samples [start, start + length) of a 16-bit mono wav or FLAC as float32 [length], reading only those from disk.

    Without `length`, to the end. InputError names a file that is missing, broken, of another format, or too short.
    """
    if _is_flac(path):
        with _open_flac(path, sampling_rate) as file:
            stop = _stop(path, start, length, file.frames)
            file.seek(start)
            samples = file.read(stop - start, dtype="int16")
    else:
        with _open_wav(path, sampling_rate) as wav:
            stop = _stop(path, start, length, wav.frames)
            wav.file.seek(wav.offset + 2 * start)
            samples = np.frombuffer(wav.file.read(2 * (stop - start)), dtype="<i2")
    if len(samples) < stop - start:
        raise InputError(f"{path}: ended after {len(samples)} samples of {stop - start}; has it changed?")
    return torch.from_numpy(samples.astype(np.float32) / INT16_SCALE)


def _stop(path: str | Path, start: int, length: int | None, frames: int) -> int:
    """Sample behind the last of a stretch; InputError where the file does not have it."""
    stop = frames if length is None else start + length
    if not 0 <= start <= stop <= frames:
        raise InputError(f"{path}: samples {start} to {stop} were asked of a file of {frames}; has it changed?")
    return stop


def write_wav(path: str | Path, audio: Tensor, sampling_rate: int) -> None:
    """Write float audio [T] as a 16-bit mono wav that appears whole or not at all; the folder is made if needed.

    Beyond full scale the audio is clipped: a plain cast would wrap it round to the other sign.
    """
    if audio.dim() != 1 or not torch.isfinite(audio).all():
        raise InputError(f"{path}: expected finite audio of shape [T], got shape {list(audio.shape)}")
    scaled = (audio.detach().cpu().float() * INT16_SCALE).round().clamp(-INT16_SCALE, INT16_SCALE - 1)
    with written_whole(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(scaled.numpy().astype("<i2").tobytes())


class _Wav(NamedTuple):
    """Samples of a wav: where they begin in the file, in bytes, and how many there are."""

    file: BinaryIO
    offset: int
    frames: int


@contextmanager
def _open_wav(path: str | Path, sampling_rate: int) -> Iterator[_Wav]:
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such wav file")
    if is_mel_file(path):
        raise InputError(f"{path}: a mel, where a recording is needed; mels can only be synthesized from")
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed below, after its header has been judged)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield _judged(file, path, sampling_rate)


def _judged(file: BinaryIO, path: str | Path, sampling_rate: int) -> _Wav:
    """Where the samples are; InputError where they are not 16-bit mono PCM at this rate, or not all there."""
    size = os.fstat(file.fileno()).st_size
    remedy = _remedy(path, sampling_rate)
    try:
        (kind, channels, rate, _, frame, bits), offset, promised = _read_header(file)
    except (struct.error, ValueError) as error:
        file.seek(0)
        advice = _advice(file.read(16), remedy)
        raise InputError(f"{path}: not a PCM wav file ({_reason(error)}); {advice}") from None
    if channels != 1:
        raise InputError(f"{path}: {channels} channels, expected mono; {remedy}")
    if kind != PCM or bits != 16 or frame != 2:
        form = "floating-point" if kind == 3 else f"{bits}-bit" if kind == PCM else f"format {kind}"
        raise InputError(f"{path}: {form} samples, expected 16-bit; {remedy}")
    if rate != sampling_rate:
        raise InputError(f"{path}: sampling rate {rate} Hz, expected {sampling_rate}; {remedy}")
    # Who writes into a pipe cannot know the length: the promise is all ones, or nothing, and the file ends the samples.
    streamed = promised in (0, 2**32 - 1) and size > offset
    frames = (size - offset if streamed else promised) // 2
    if frames == 0:
        raise InputError(f"{path}: holds no audio; remove it from the list")
    if offset + 2 * frames > size:
        raise InputError(
            f"{path}: truncated, its header promises {frames} samples; get the file again, or remove it from the list"
        )
    return _Wav(file, offset, frames)


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], int, int]:
    """The fields of `fmt `, the offset of the samples and the promised size of them in bytes."""
    riff, _, wave = struct.unpack("<4sL4s", file.read(12))
    if riff != b"RIFF" or wave != b"WAVE":
        raise ValueError("does not begin with RIFF and WAVE")
    form = None
    for _ in range(MAX_CHUNKS):
        name, size = struct.unpack("<4sL", file.read(8))
        if name == b"data":
            if form is None:
                raise ValueError("data before their format")
            return form, file.tell(), size
        begin = file.tell()
        if name == b"fmt ":
            content = file.read(min(size, 40))
            form = struct.unpack("<HHLLHH", content[:16])
            if form[0] == EXTENSIBLE and len(content) == 40 and content[26:] == GUID_TAIL:
                form = (int.from_bytes(content[24:26], "little"), *form[1:])
        file.seek(begin + size + size % 2)
    raise ValueError("no data among its chunks")


def _is_flac(path: str | Path) -> bool:
    return str(path).lower().endswith(".flac")


@contextmanager
def _open_flac(path: str | Path, sampling_rate: int) -> Iterator[Any]:
    """A FLAC file of 16-bit mono, as `soundfile` opens it: a crop takes 0.26 ms, of a wav 0.02."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such FLAC file")
    remedy = _remedy(path, sampling_rate)
    try:
        with open_sound(path) as file:
            form = (file.format, file.subtype, file.channels, file.samplerate)
            if form != ("FLAC", "PCM_16", 1, sampling_rate):
                raise InputError(f"{path}: {form}, expected 16-bit mono FLAC at {sampling_rate} Hz; {remedy}")
            if not file.frames:
                raise InputError(f"{path}: holds no audio; remove it from the list")
            file.seek(file.frames - 1)
            if not len(file.read(1)):
                raise InputError(f"{path}: truncated; get the file again, or remove it from the list")
            yield file
    except (RefusedFile, OSError) as error:
        raise InputError(f"{path}: not a FLAC file ({_reason(error)}); get it again, or remove it") from None


def _remedy(path: str | Path, sampling_rate: int) -> str:
    source = shlex.quote(str(path))
    return f"convert it: ffmpeg -i {source} -ac 1 -ar {sampling_rate} -sample_fmt s16 converted.wav"


def _advice(beginning: bytes, remedy: str) -> str:
    """What can be done about a file that begins so: only sound of another kind can be converted."""
    if beginning.startswith(OTHER_SOUND) or beginning[4:8] == b"ftyp":
        return remedy
    if not beginning:
        return "it is empty: get it again, or remove it from the list"
    if beginning.lstrip()[:1] in (b"<", b"{"):
        return "it is a web page or other text: get the recording again, or remove it from the list"
    return "get it again, or remove it from the list"


# --- mel spectrograms -----------------------------------------------------------------------------------------


class MelSpectrogram(nn.Module):
    """Log-mel spectrogram of Tacotron 2 and WaveGlow (magnitude STFT, Slaney mel filters, natural log).

    `data_config`: a DataConfig, or a dict of any of its keys (defaults for the rest). With `use_dbmel` the values
    are decibels mapped to [0, 1] instead. Follows its buffers in device and precision; gradients flow through it.
    """

    def __init__(self, data_config: DataConfig | dict[str, Any]) -> None:
        super().__init__()
        import librosa.filters  # seconds to import, and only needed here

        self.config = config = parse_section(DataConfig, data_config, "data_config.")
        with warnings.catch_warnings(action="ignore"):  # of what is said below, in the words of the config
            filters = librosa.filters.mel(
                sr=config.sampling_rate,
                n_fft=config.filter_length,
                n_mels=config.n_mel_channels,
                fmin=config.mel_fmin,
                fmax=config.mel_fmax,
            )
        if n_empty := int((filters.max(axis=1) == 0).sum()):
            warnings.warn(
                f"{n_empty} of {config.n_mel_channels} mel bands hold no frequency of the Fourier transform and stay "
                "silent; raise data_config.filter_length, or lower n_mel_channels",
                stacklevel=2,
            )
        self.register_buffer("filters", torch.from_numpy(filters), persistent=False)  # [80, n_fft/2 + 1]
        self.register_buffer("window", torch.hann_window(config.win_length), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Audio in [-1, 1], [T] or [B, T] -> mel [80, F] or [B, 80, F] with F = T // hop_length + 1."""
        if audio.dim() not in (1, 2) or not audio.is_floating_point():
            raise InputError(
                f"audio: expected floating-point samples of shape [T] or [B, T], got {audio.dtype} {list(audio.shape)}"
            )
        if audio.shape[-1] < shortest_audio(self.config):
            raise InputError(
                f"audio of {audio.shape[-1]} samples is too short for a mel with filter_length "
                f"{self.config.filter_length}; at least {shortest_audio(self.config)} are needed"
            )
        spectrum = torch.stft(
            audio.to(self.window.dtype),
            n_fft=self.config.filter_length,
            hop_length=self.config.hop_length,
            win_length=self.config.win_length,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        ).abs()  # [B, n_fft/2 + 1, F]
        mel = (self.filters @ spectrum).clamp(min=LOG_FLOOR)  # [B, 80, F]
        if not self.config.use_dbmel:
            return mel.log()
        decibels = 20 * mel.log10() - 10
        return ((decibels + 100) / 100).clamp(0, 1)


def shortest_audio(config: DataConfig) -> int:
    """Fewest samples that have a mel: half a filter is reflected at each end."""
    return config.filter_length // 2 + 1


def check_length(source: str | Path, frames: int, channels: int, rate: int, target: int) -> None:
    """InputError where so many frames, at their own rate or at `target` Hz, are more samples than can be borne."""
    if max(frames * channels, frames / rate * target) > MAX_SAMPLES:
        raise InputError(
            f"{source}: {frames} samples of {channels} channel(s) at {rate} Hz, expected at most {MAX_SAMPLES}, and no "
            f"more at {target} Hz; cut it up"
        )


def resample(audio: Tensor, rate: int, target: int) -> Tensor:
    """Audio [T] at `rate` Hz as audio at `target` Hz, by librosa's band-limited interpolation."""
    if rate == target:
        return audio
    if audio.dim() != 1 or not audio.is_floating_point() or rate < 1:
        raise InputError(
            f"audio: expected floating-point samples of shape [T] and a rate in Hz, got {audio.dtype} "
            f"{list(audio.shape)} at {rate}"
        )
    import librosa  # seconds to import, and only needed here

    return torch.from_numpy(librosa.resample(audio.float().numpy(), orig_sr=rate, target_sr=target))


def rescale(audio: Tensor, peak: float) -> Tensor:
    """Bring a clip whose loudest sample is `peak` to almost full scale; digital silence stays as it is."""
    return audio / peak * PEAK if peak > 0 else audio


# --- mel files ------------------------------------------------------------------------------------------------


def is_mel_file(path: str | Path) -> bool:
    """Test of a name: a saved mel's, or else that of audio."""
    return Path(path).suffix.lower() in MEL_SUFFIXES


def read_mel(path: str | Path, n_mel_channels: int) -> Tensor:
    """A log-mel saved as .npy or .pt by any front end, as float32 [n_mel_channels, F]; a batch axis of 1 is dropped.

    No pickle is executed, and memory is bounded whatever the file promises. InputError names the file and the fault.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such mel file")
    try:
        mel = _load_npy(path) if Path(path).suffix.lower() == ".npy" else _load_pt(path)
    except Exception as error:  # arbitrary bytes make both parsers raise nearly anything
        raise InputError(f"{path}: not a readable mel ({_reason(error)}); {_mel_advice(path)}") from None
    return check_mel(mel, path, n_mel_channels)


def mel_frames(path: str | Path, n_mel_channels: int) -> int:
    """Frames of a saved mel; of an .npy that is [n_mel_channels, F], by its header alone."""
    if Path(path).suffix.lower() == ".npy" and os.path.isfile(path):
        try:
            shape = read_header(path).shape
            if len(shape) == 2 and shape[0] == n_mel_channels:
                return shape[1]
        except (ValueError, OSError):
            pass  # to be named by what follows
    return read_mel(path, n_mel_channels).size(1)


def _mel_advice(path: str | Path) -> str:
    with open(path, "rb") as file:
        beginning = file.read(6)
    if beginning == b"\x93NUMPY":
        return "save one array of floating-point numbers, whole, nothing else"
    return "save it with np.save or torch.save" if beginning else "it is empty: make it again"


def check_mel(mel: Tensor, name: str | Path, n_mel_channels: int, least_frames: int = 2) -> Tensor:
    """A log-mel as float32 [n_mel_channels, F]; a batch axis of 1 is dropped. InputError names it and the fault."""
    if not mel.is_floating_point():
        raise InputError(f"{name}: a mel of type {mel.dtype}, expected floating-point numbers")
    if mel.dim() == 3 and mel.shape[0] == 1:
        mel = mel[0]
    _check_mel_shape(mel, name, n_mel_channels, least_frames)
    mel = mel.float().contiguous()
    if not torch.isfinite(mel).all():
        raise InputError(f"{name}: the mel holds NaN or infinite values; make it again from clean audio")
    return mel


def write_mel(path: str | Path, mel: Tensor) -> None:
    """Save a mel [80, F] as float32 .npy, whole or not at all; the folder is made if needed."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.save(file, mel.detach().cpu().float().numpy())


def _check_mel_shape(mel: Tensor, name: str | Path, n_mel_channels: int, least_frames: int) -> None:
    shape = tuple(mel.shape)
    found = f"{name}: a mel of shape {shape}, expected ({n_mel_channels}, frames)"
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{found}; save one mel per file")
    if shape[0] != n_mel_channels and shape[1] == n_mel_channels:
        raise InputError(f"{found}; it is transposed, save mel.T")
    if shape[0] != n_mel_channels:
        raise InputError(f"{found}; make it with the mel settings of the config")
    if shape[1] < least_frames:
        raise InputError(f"{found}; one frame covers no audio, at least 2 are needed")
    if mel.numel() * mel.element_size() > MAX_MEL_BYTES:  # a .pt may repeat few numbers over any shape
        raise InputError(f"{found}; longer than the {MAX_MEL_BYTES} bytes accepted, cut it up")


def _load_npy(path: str | Path) -> Tensor:
    array = map_array(path, MAX_MEL_BYTES)
    # Copied to this machine's byte order, and out of the mapping.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _load_pt(path: str | Path) -> Tensor:
    mel = load_tensors(path, MAX_MEL_BYTES)
    if not isinstance(mel, Tensor):
        raise ValueError(f"expected one plain tensor, got {type(mel).__name__}")
    return mel.detach()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["cut short or damaged"]
    return lines[0][:120]
