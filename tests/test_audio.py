"""audio.py: wav files, the mel spectrogram against its measured reference, mel files from elsewhere."""

import io
import json
import os
import re
import struct
import wave
import zipfile
from pathlib import Path

import librosa.filters
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import audio
from audio import MelSpectrogram, read_mel, read_wav, rescale, wav_length, write_mel, write_wav
from config import DataConfig
from harness.errors import InputError

RATE = 22_050
GOLDEN = Path(__file__).parent / "golden" / "mel.npz"


def noise(length, seed=0, level=0.1):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)) * level


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "clip.wav"
    write_wav(path, noise(5_000), RATE)
    return path


def write_foreign(path, channels=1, width=2, rate=RATE, frames=1_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(frames * channels * width))


# --- wav files


def test_every_16_bit_value_survives_writing_and_reading(tmp_path):
    samples = torch.arange(-32_768, 32_768)
    write_wav(tmp_path / "all.wav", samples / 32_768, RATE)
    assert torch.equal(read_wav(tmp_path / "all.wav", RATE) * 32_768, samples.float())


def test_audio_beyond_full_scale_is_clipped_and_never_wraps(tmp_path):
    write_wav(tmp_path / "loud.wav", torch.tensor([1.0, 1.5, 40.0, -1.0, -1.5, -40.0]), RATE)
    expected = torch.tensor([32_767.0] * 3 + [-32_768.0] * 3) / 32_768
    assert torch.equal(read_wav(tmp_path / "loud.wav", RATE), expected)


def test_a_stretch_equals_the_same_stretch_of_the_whole(wav):
    whole = read_wav(wav, RATE)
    assert wav_length(wav, RATE) == len(whole) == 5_000
    assert torch.equal(read_wav(wav, RATE, 1_234, 777), whole[1_234 : 1_234 + 777])
    assert torch.equal(read_wav(wav, RATE, 4_999), whole[4_999:])


def test_only_the_asked_samples_are_read(wav, monkeypatch):
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(audio, "open", lambda path, *_, **__: Counting(path), raising=False)
    assert len(read_wav(wav, RATE, 1_000, 500)) == 500
    assert min(read) > 0 and sum(read) <= 1_000 + 44  # two bytes a sample, and the header


def test_a_wav_with_other_chunks_before_its_data_is_read(tmp_path):
    samples = np.arange(-50, 50, dtype="<i2")
    note = b"LIST" + struct.pack("<L", 5) + b"odd..\0"  # an odd length is padded to even
    fmt = b"fmt " + struct.pack("<LHHLLHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + note + fmt + b"data" + struct.pack("<L", 200) + samples.tobytes()
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<L", len(body)) + body)
    assert torch.equal(read_wav(tmp_path / "x.wav", RATE) * 32_768, torch.arange(-50.0, 50.0))


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        ({"channels": 2}, "2 channels, expected mono.*ffmpeg.*-ac 1"),
        ({"width": 1}, "8-bit samples, expected 16-bit.*ffmpeg.*s16"),
        ({"width": 3}, "24-bit samples"),
        ({"rate": 16_000}, "16000 Hz, expected 22050.*ffmpeg.*-ar 22050"),
        ({"frames": 0}, "no audio"),
    ],
)
def test_a_wav_of_another_format_is_refused_with_the_remedy(tmp_path, form, complaint):
    write_foreign(tmp_path / "x.wav", **form)
    for read in (wav_length, read_wav):
        with pytest.raises(InputError, match=f"x.wav.*{complaint}") as error:
            read(tmp_path / "x.wav", RATE)
        assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "missing.wav", tmp_path):
        with pytest.raises(InputError, match=f"{path.name}.*no such wav"):
            read_wav(path, RATE)


def test_a_mel_in_the_place_of_a_wav_is_called_one(tmp_path):
    write_mel(tmp_path / "x.npy", torch.zeros(80, 3))
    with pytest.raises(InputError, match=r"x\.npy: a mel, where a recording is needed"):
        wav_length(tmp_path / "x.npy", RATE)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not a wav at all" * 10, b"RIFF\x10\0\0\0WAVEfmt "])
def test_what_is_no_wav_is_named(tmp_path, content):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.wav: not a PCM wav"):
        wav_length(tmp_path / "x.wav", RATE)


@pytest.mark.parametrize("lost", [1, 2, 3_000])
def test_a_truncated_wav_is_refused_by_its_header_alone(wav, lost):
    wav.write_bytes(wav.read_bytes()[:-lost])
    with pytest.raises(InputError, match=r"clip\.wav: truncated, its header promises 5000"):
        wav_length(wav, RATE)


def test_a_header_that_promises_gigabytes_is_refused(wav):
    content = bytearray(wav.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<L", 2**32 - 2)
    wav.write_bytes(content)
    with pytest.raises(InputError, match="truncated"):
        read_wav(wav, RATE)


@pytest.mark.parametrize("promise", [0, 2**32 - 1])
def test_a_streamed_wav_ends_where_its_file_does(wav, promise):
    whole, content = read_wav(wav, RATE), bytearray(wav.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<L", promise)  # written before the length was known
    wav.write_bytes(content)
    assert wav_length(wav, RATE) == 5_000 and torch.equal(read_wav(wav, RATE), whole)
    wav.write_bytes(content[:44])
    with pytest.raises(InputError, match=r"clip\.wav: (holds no audio|truncated)"):
        wav_length(wav, RATE)


def extensible(samples, code=1, bits=16, tail=audio.GUID_TAIL):
    """A wav in WAVE_FORMAT_EXTENSIBLE, what many programs write for 16-bit mono too."""
    width = bits // 8
    fields = struct.pack("<HHLLHHHHL", 0xFFFE, 1, RATE, width * RATE, width, bits, 22, bits, 4)
    fmt = b"fmt " + struct.pack("<L", 40) + fields + struct.pack("<H", code) + tail
    body = b"WAVE" + fmt + b"data" + struct.pack("<L", len(samples)) + samples
    return b"RIFF" + struct.pack("<L", len(body)) + body


def test_the_extensible_format_is_read_where_it_is_16_bit_pcm(tmp_path):
    samples = np.arange(-50, 50, dtype="<i2").tobytes()
    (tmp_path / "x.wav").write_bytes(extensible(samples))
    assert torch.equal(read_wav(tmp_path / "x.wav", RATE) * 32_768, torch.arange(-50.0, 50.0))
    for wrong, words in (
        (extensible(samples, code=3, bits=32), "floating-point samples, expected 16-bit; .*ffmpeg"),
        (extensible(samples + bytes(100), bits=24), "24-bit samples"),
        (extensible(samples, tail=bytes(14)), "format 65534 samples"),
    ):
        (tmp_path / "x.wav").write_bytes(wrong)
        with pytest.raises(InputError, match=words):
            wav_length(tmp_path / "x.wav", RATE)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (b"", "it is empty: get it again"),
        (b"<!DOCTYPE html><html>", "a web page or other text"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "get it again, or remove it"),
        (b"fLaC\0\0\0", "convert it: ffmpeg"),
        (b"\0\0\0\x20ftypM4A ", "convert it: ffmpeg"),
    ],
)
def test_advice_can_work_for_the_file_at_hand(tmp_path, content, advice):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(InputError, match=advice) as error:
        wav_length(tmp_path / "x.wav", RATE)
    assert ("ffmpeg" in str(error.value)) == ("ffmpeg" in advice)


def test_nobody_is_told_to_do_what_he_did(tmp_path):
    np.save(tmp_path / "m.npy", np.array([{"mel": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "e.npy").touch()
    for name, advice in (
        ("m.npy", "save one array of floating-point numbers"),
        ("e.npy", "it is empty: make it again"),
    ):
        with pytest.raises(InputError, match=advice) as error:
            read_mel(tmp_path / name, 80)
        assert "np.save" not in str(error.value)


def test_a_flac_is_read_as_its_wav_is(wav):
    flac = wav.with_suffix(".flac")
    soundfile.write(flac, soundfile.read(wav, dtype="int16")[0], RATE)
    assert wav_length(flac, RATE) == 5_000 and torch.equal(read_wav(flac, RATE), read_wav(wav, RATE))
    assert torch.equal(read_wav(flac, RATE, 1_234, 777), read_wav(wav, RATE, 1_234, 777))
    with pytest.raises(InputError, match="has it changed"):
        read_wav(flac, RATE, 4_000, 1_001)
    with pytest.raises(InputError, match=r"clip\.flac: .*expected 16-bit mono FLAC at 16000 Hz.*ffmpeg"):
        wav_length(flac, 16_000)
    for content, words in (
        (flac.read_bytes()[:-3_000], "truncated|not a FLAC"),
        (b"<html>", "not a FLAC"),
        (b"", "FLAC"),
    ):
        flac.write_bytes(content)
        with pytest.raises(InputError, match=words) as error:
            read_wav(flac, RATE)
        assert "\n" not in str(error.value)


def test_samples_behind_the_end_are_an_error_not_a_shorter_answer(wav):
    with pytest.raises(InputError, match="has it changed"):
        read_wav(wav, RATE, 4_000, 1_001)


def test_nothing_is_written_of_audio_that_is_not_finite(wav):
    before = wav.read_bytes()
    with pytest.raises(InputError, match="finite"):
        write_wav(wav, torch.tensor([0.0, float("nan")]), RATE)
    assert wav.read_bytes() == before
    assert os.listdir(wav.parent) == [wav.name]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=8),
    keep=st.one_of(st.none(), st.integers(0, 700)),
)
def test_a_mutated_wav_is_read_or_refused_in_one_line(tmp_path, edits, keep):
    path = tmp_path / "mutant.wav"
    buffer = io.BytesIO()
    write_foreign_to(buffer, 300)
    content = bytearray(buffer.getvalue())
    for position, value in edits:
        content[position] = value
    path.write_bytes(content[:keep])
    try:
        length = wav_length(path, RATE)
        assert len(read_wav(path, RATE)) == length > 0
    except InputError as error:
        assert "mutant.wav" in str(error) and "\n" not in str(error)


def write_foreign_to(buffer, frames):
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(2 * frames))


# --- mel spectrograms


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_mel_agrees_with_the_published_one(golden):
    sound = torch.from_numpy(golden["wav_int16"].astype(np.float32) / 32_768)
    config = json.loads(str(golden["config"]))
    for name, use_dbmel in (("mel", False), ("mel_db", True)):
        mel = MelSpectrogram({**config, "use_dbmel": use_dbmel})(sound)
        torch.testing.assert_close(mel, torch.from_numpy(golden[name]), atol=1e-4, rtol=0)


def plain_mel(sound, config):
    """The definition of spec and papers, frame by frame in float64."""
    n_fft, hop, win = config.filter_length, config.hop_length, config.win_length
    window = np.zeros(n_fft)
    first = (n_fft - win) // 2
    window[first : first + win] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win)  # periodic Hann
    padded = np.pad(sound.double().numpy(), n_fft // 2, mode="reflect")
    frames = [padded[i * hop : i * hop + n_fft] * window for i in range(len(sound) // hop + 1)]
    filters = librosa.filters.mel(
        sr=config.sampling_rate, n_fft=n_fft, fmin=config.mel_fmin, fmax=config.mel_fmax, n_mels=80
    )
    return torch.from_numpy(np.log(np.maximum(filters @ np.abs(np.fft.rfft(frames)).T, 1e-5)))


@pytest.mark.parametrize("form", [{}, {"filter_length": 1024, "win_length": 400, "hop_length": 100, "mel_fmin": 90.0}])
def test_mel_follows_its_definition_also_with_a_window_shorter_than_the_filter(form):
    config, sound = DataConfig(**form), noise(7_001)
    mel = MelSpectrogram(config)(sound)
    assert mel.shape == (80, 7_001 // config.hop_length + 1)
    torch.testing.assert_close(mel.double(), plain_mel(sound, config), atol=1e-4, rtol=0)


def test_mel_of_a_batch_is_the_mels_of_its_items():
    batch = torch.stack([noise(4_096, 1), noise(4_096, 2)])
    mel = MelSpectrogram({})
    assert mel(batch).shape == (2, 80, 17)
    torch.testing.assert_close(mel(batch), torch.stack([mel(batch[0]), mel(batch[1])]))


def test_mel_of_silence_is_the_floor():
    assert torch.equal(MelSpectrogram({})(torch.zeros(2_000)), torch.full((80, 8), 1e-5).log())
    assert MelSpectrogram({"use_dbmel": True})(torch.zeros(2_000)).max() == 0  # 20 log10(1e-5) - 10 is below -100


def test_mel_leaves_no_trace_in_a_state_dict_and_passes_gradients():
    mel = MelSpectrogram({})
    assert mel.state_dict() == {}
    sound = noise(2_000).requires_grad_()
    mel(sound).sum().backward()
    assert torch.isfinite(sound.grad).all() and sound.grad.abs().sum() > 0


def test_mel_says_what_audio_it_needs():
    mel = MelSpectrogram({})
    assert mel(noise(513)).shape == (80, 3)
    with pytest.raises(InputError, match=r"512 samples is too short.*at least 513"):
        mel(noise(512))
    for wrong in (torch.zeros(2, 1, 2_000), torch.zeros(2_000, dtype=torch.int16)):
        with pytest.raises(InputError, match=r"expected floating-point samples of shape \[T\] or \[B, T\]"):
            mel(wrong)


def test_rescale_brings_the_peak_to_almost_full_scale_and_leaves_silence():
    sound = noise(1_000)
    assert rescale(sound, sound.abs().max().item()).abs().max() == pytest.approx(0.999)
    assert torch.equal(rescale(torch.zeros(9), 0.0), torch.zeros(9))


# --- mel files


def test_a_mel_survives_writing_and_reading(tmp_path):
    mel = noise(80 * 7).reshape(80, 7)
    write_mel(tmp_path / "deep" / "a.npy", mel)
    torch.save(mel, tmp_path / "a.pt")
    assert torch.equal(read_mel(tmp_path / "deep" / "a.npy", 80), mel)
    assert torch.equal(read_mel(tmp_path / "a.pt", 80), mel)


@pytest.mark.parametrize(
    "saved",
    [
        lambda mel, path: np.save(path, mel.numpy().astype(">f8")),
        lambda mel, path: np.save(path, np.asfortranarray(mel.numpy())),
        lambda mel, path: np.save(path, mel.numpy()[None]),
        lambda mel, path: torch.save(mel[None].double().requires_grad_(), path.with_suffix(".pt")),
        lambda mel, path: torch.save(mel, path.with_suffix(".pt"), _use_new_zipfile_serialization=False),
    ],
    ids=["big-endian float64", "column order", "batch axis", "float64 with gradient and batch axis", "old torch.save"],
)
def test_mels_of_any_front_end_become_contiguous_float32(tmp_path, saved):
    mel = noise(80 * 5).reshape(80, 5)
    saved(mel, tmp_path / "m.npy")
    (path,) = tmp_path.iterdir()
    read = read_mel(path, 80)
    assert read.dtype == torch.float32 and read.is_contiguous() and not read.requires_grad
    assert torch.equal(read, mel)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((7, 80), np.float32), r"\(7, 80\), expected \(80, frames\); it is transposed"),
        (np.zeros((64, 7), np.float32), r"\(64, 7\), expected \(80, frames\)"),
        (np.zeros((2, 80, 7), np.float32), "one mel per file"),
        (np.zeros((80, 0), np.float32), "one mel per file"),
        (np.zeros(80, np.float32), "one mel per file"),
        (np.zeros((80, 7), np.int16), "int16, expected floating-point"),
        (np.full((80, 7), np.nan, np.float32), "NaN or infinite"),
        (np.full((80, 7), -np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_arrays_that_are_no_mel_are_refused_in_both_formats(tmp_path, array, complaint):
    np.save(tmp_path / "m.npy", array)
    torch.save(torch.from_numpy(array), tmp_path / "m.pt")
    for name in ("m.npy", "m.pt"):
        with pytest.raises(InputError, match=f"{name}.*{complaint}"):
            read_mel(tmp_path / name, 80)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_executed(tmp_path):
    trap = Trap(tmp_path / "sprung")
    torch.save(trap, tmp_path / "m.pt")
    np.save(tmp_path / "m.npy", np.array([trap], dtype=object), allow_pickle=True)
    for name in ("m.npy", "m.pt"):
        with pytest.raises(InputError, match=f"{name}: not a readable mel"):
            read_mel(tmp_path / name, 80)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("frames", [2**40, 2**62])
def test_an_npy_header_that_promises_too_much_is_refused(tmp_path, frames):
    with open(tmp_path / "m.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (80, frames)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match=r"m\.npy: not a readable mel"):
        read_mel(tmp_path / "m.npy", 80)


def test_a_small_pt_that_grows_on_loading_is_refused(tmp_path, monkeypatch):
    torch.save(torch.zeros(80, 1).expand(80, 2**40), tmp_path / "repeated.pt")
    with pytest.raises(InputError, match=r"repeated\.pt.*unpacks to more than its size"):
        read_mel(tmp_path / "repeated.pt", 80)

    torch.save(torch.zeros(80, 10_000), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**16
    with pytest.raises(InputError, match=r"bomb\.pt.*unpacks to more than its size"):
        read_mel(tmp_path / "bomb.pt", 80)

    monkeypatch.setattr(audio, "MAX_MEL_BYTES", 2**20)
    with pytest.raises(InputError, match=r"plain\.pt.*bytes, at most"):
        read_mel(tmp_path / "plain.pt", 80)


@pytest.mark.parametrize("name", ["m.npy", "m.pt"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")  # numpy and torch warn of what they then refuse
def test_a_mutated_mel_is_read_or_refused_in_one_line(tmp_path, name, data):
    buffer = io.BytesIO()
    if name == "m.npy":
        np.save(buffer, np.zeros((80, 3), np.float32))
    else:
        torch.save(torch.zeros(80, 3), buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))])
    try:
        mel = read_mel(tmp_path / name, 80)
        assert mel.shape[0] == 80 and torch.isfinite(mel).all()
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)


def test_bands_without_a_frequency_are_named_in_words_of_the_config(recwarn):
    MelSpectrogram({"filter_length": 256, "win_length": 256})
    [warning] = recwarn.list
    message = str(warning.message)
    assert re.match(r"\d+ of 80 mel bands hold no frequency .*; raise data_config\.filter_length, or lower", message)
    recwarn.clear()
    MelSpectrogram({})
    assert not recwarn.list
