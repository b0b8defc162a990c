"""corpora/spectrum.py: where the band of real speech ends that was resampled up, cleanly, cheaply, from lossy files."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from scipy.signal import resample_poly

from corpora.spectrum import find_band_end, power_frames

RATE = 22_050
SPEECH = Path(__file__).parents[2] / "pretrained" / "speech"
TOLERANCE = 300  # Hz
CODECS = {"mp3": ("MP3", "MPEG_LAYER_III"), "ogg": ("OGG", "VORBIS")}


def recording(rate):
    """Real speech at a lower rate, of 16 bits."""
    audio, its_rate = soundfile.read(SPEECH / "vm-mismatch.wav", dtype="float32")
    return in_16_bits(soxr.resample(audio, its_rate, rate))


def in_16_bits(audio):
    return (np.round(np.clip(audio, -1, 1 - 2**-15) * 2**15) / 2**15).astype(np.float32)


def band_end(audio):
    return find_band_end(power_frames(in_16_bits(audio)), RATE)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000])
def test_the_end_of_a_band_is_half_of_the_rate_it_came_from(rate):
    audio = recording(rate)
    assert band_end(soxr.resample(audio, rate, RATE)) == pytest.approx(rate / 2, abs=TOLERANCE)
    assert band_end(soxr.resample(audio, rate, RATE, "MQ")) == pytest.approx(rate / 2, abs=TOLERANCE)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000])
def test_the_mirror_image_that_a_cheap_resampler_leaves_is_no_part_of_the_band(rate):
    """Five lobes of a windowed sinc: the image is 20 dB above the noise up to 0.7 kHz beyond the end."""
    cheap = resample_poly(recording(rate), RATE, rate, window=("kaiser", 9.0))
    assert band_end(cheap) == pytest.approx(rate / 2, abs=TOLERANCE)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000])
def test_what_ffmpeg_resampled_up(tmp_path, rate):
    soundfile.write(tmp_path / "low.wav", recording(rate), rate, subtype="PCM_16")
    up = [tmp_path / "low.wav", "-ar", str(RATE), tmp_path / "up.wav"]
    subprocess.run(["ffmpeg", "-v", "error", "-i", *up], check=True)
    audio, _ = soundfile.read(tmp_path / "up.wav", dtype="float32")
    assert band_end(audio) == pytest.approx(rate / 2, abs=TOLERANCE)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000])
def test_what_was_compressed_before(rate, codec):
    """A codec may leave out the very top of its band."""
    file = io.BytesIO()
    soundfile.write(file, recording(rate), rate, format=CODECS[codec][0], subtype=CODECS[codec][1])
    file.seek(0)
    audio, _ = soundfile.read(file, dtype="float32")
    for up in (soxr.resample(audio, rate, RATE), resample_poly(audio, RATE, rate, window=("kaiser", 9.0))):
        assert 0.9 * rate / 2 <= band_end(up) <= rate / 2 + TOLERANCE


def test_a_band_that_goes_up_to_the_top_has_no_end():
    noise = np.random.default_rng(0).normal(0, 0.1, 60_000)
    assert band_end(noise) == 0
    assert band_end(soxr.resample(noise, 44_100, RATE)) == 0
    assert band_end(np.cumsum(noise - noise.mean()) / 100) == 0  # falls by 6 dB an octave
    assert find_band_end(power_frames(np.zeros(10, np.float32)), RATE) == 0


def test_the_recordings_that_come_with_the_project_end_at_8_khz():
    """They are G.722 of 16 kHz, resampled up by ffmpeg."""
    for path in sorted(SPEECH.glob("*.wav")):
        audio, _ = soundfile.read(path, dtype="float32")
        assert band_end(audio) == pytest.approx(8_000, abs=TOLERANCE), path.name
