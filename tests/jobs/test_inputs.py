"""Sounds of a user: told by their content, whatever their names are; damaged and huge ones refused in one line."""

import io
import os
import struct

import numpy as np
import pytest
import soundfile
import torch

from audio import MAX_SAMPLES, read_wav, wav_length
from harness.errors import InputError
from jobs.inputs import check_input, read_sound
from tests.support.experiments import RATE

TONE = (0.3 * np.sin(2 * np.pi * 220 * np.arange(RATE // 2) / RATE)).astype(np.float32)
KINDS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "aiff": {"format": "AIFF", "subtype": "PCM_16"},
}


def encoded(kind, audio=TONE, rate=RATE):
    content = io.BytesIO()
    soundfile.write(content, audio, rate, **KINDS[kind])
    return content.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.raw", "x.RAW", "x.sd2", "x.mp3", "x", "w\udcff.wav", "\udcff\udcfe.flac"])
def test_a_sound_is_told_by_its_content_whatever_its_name_is(kind, name, tmp_path):
    path = str(tmp_path / name)
    with open(path, "wb") as file:
        file.write(encoded(kind))
    check_input(path, RATE)
    torch.testing.assert_close(read_sound(path, RATE), torch.from_numpy(TONE), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_recordings_of_lists_may_have_names_that_are_not_utf8(kind, tmp_path):
    path = tmp_path / f"w\udcff.{kind}"
    path.write_bytes(encoded(kind))
    assert wav_length(path, RATE) == len(read_wav(path, RATE)) == len(TONE)


def damaged(kind):
    """A sound with bytes flipped, or parts lost, in one place after another."""
    content = encoded(kind)
    for place in range(0, len(content), max(1, len(content) // 40)):
        yield content[:place]
        yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        yield content[:place] + bytes(64) + content[place + 64 :]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_sounds_are_read_or_refused_in_one_line_and_libraries_say_nothing(kind, tmp_path, capfd):
    path, refused = tmp_path / f"x.{kind}", 0
    for content in damaged(kind):
        path.write_bytes(content)
        for read in (lambda: read_sound(str(path), RATE), lambda: kind == "flac" and read_wav(path, RATE)):
            try:
                read()
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                assert "cut it up" not in str(error) or "samples of" in str(error)
    assert refused
    assert capfd.readouterr() == ("", "")


def test_a_sound_without_samples_is_not_to_be_cut_up(tmp_path):
    path = tmp_path / "x.wav"
    path.write_bytes(encoded("wav", TONE[:0]))
    with pytest.raises(InputError, match="holds no samples, or is damaged; get it again"):
        check_input(str(path), RATE)


@pytest.mark.parametrize(("rate", "target", "fits"), [(1, 22_050, False), (1, 8_000, True), (192_000, 8_000, True),
                                                      (2, 48_000, False), (0, 22_050, False)])  # fmt: skip
def test_the_samples_at_the_rate_wanted_are_bounded_too(rate, target, fits, tmp_path):
    path = tmp_path / "x.wav"
    content = bytearray(encoded("wav", np.zeros(20_000, np.float32)))
    content[24:28] = struct.pack("<L", rate)
    path.write_bytes(content)
    assert (0 < 20_000 / max(rate, 1e-9) * target <= MAX_SAMPLES) == fits
    if fits:
        check_input(str(path), target)
        return
    for read in (check_input, read_sound):
        with pytest.raises(InputError, match=r"cut it up|not a sound file"):
            read(str(path), target)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, device, os.mkdir])
def test_what_is_no_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "x.wav")
    with pytest.raises(InputError, match=r"x\.wav: not a sound file"):
        check_input(str(tmp_path / "x.wav"), RATE)
