"""A folder of recordings as people have them: every format, rate and fault."""

import struct

import numpy as np
import soundfile

from tests.support.speech import speech


def write_odd_recordings(folder):
    """Takes of two speakers in many formats, and files that cannot be used; returns those that can, by stem."""
    folder.mkdir(parents=True)
    good = {
        "ann/stereo24.wav": (44_100, 2, "PCM_24"),
        "ann/float.wav": (48_000, 1, "FLOAT"),
        "ann/lossless.flac": (22_050, 1, "PCM_16"),
        "ann/vorbis.ogg": (32_000, 1, "VORBIS"),
        "bob/layer3.mp3": (24_000, 1, "MPEG_LAYER_III"),
        "bob/eight.wav": (16_000, 1, "PCM_U8"),
        "bob/phone.wav": (8_000, 1, "PCM_16"),
        "bob/apple.aiff": (44_100, 1, "PCM_16"),
        "bob/tape.w64": (22_050, 2, "PCM_16"),
        "bob/big.rf64": (22_050, 1, "PCM_16"),
    }
    for number, (name, (rate, channels, subtype)) in enumerate(good.items()):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        sound = np.stack([speech(0.9, rate, 90 + 11 * number)] * channels, axis=1)
        soundfile.write(path, sound, rate, subtype)
    soundfile.write(folder / "ann" / "wavex.wav", speech(0.9, 22_050, 300), 22_050, "PCM_16", format="WAVEX")
    for name, promise in (("streamed", 2**32 - 1), ("piped", 0)):
        path = folder / "bob" / f"{name}.wav"
        soundfile.write(path, speech(0.9, 22_050, 310 + promise % 7), 22_050, "PCM_16")
        content = bytearray(path.read_bytes())
        content[4:8] = content[40:44] = struct.pack("<L", promise)
        path.write_bytes(content)
    return {
        *(name.rpartition("/")[2].partition(".")[0] for name in good),
        "wavex",
        "streamed",
        "piped",
        *_special(folder),
    }


def _special(folder):
    """Takes that need more than reading, and some that are of no use."""
    take = speech(0.9, 22_050, 400)
    pauses = [np.concatenate([speech(1.4, 22_050, 410 + n), np.full(6_000, 1e-4)]) for n in range(4)]
    usable = {
        "quiet_ends": np.concatenate([np.zeros(15_000), take, np.zeros(15_000)]),
        "long": np.concatenate(pauses),
        "offset": speech(0.9, 22_050, 420) * 0.5 + 0.1,
        "loud": np.clip(speech(0.9, 22_050, 430) * 9, -1, 1 - 2.0**-15),
    }
    useless = {"silent": np.zeros(20_000), "short": take[:2_000], "copy": take}
    for name, sound in {**usable, "original": take, **useless}.items():
        soundfile.write(folder / f"{name}.wav", sound, 22_050, "PCM_16")
    (folder / "empty.wav").touch()
    (folder / "page.mp3").write_text("<!DOCTYPE html><html>not found</html>")
    (folder / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(99))
    (folder / "notes.txt").write_text("not sound")
    return {*usable, "copy"}  # of two that are the same, the first by name
