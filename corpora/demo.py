"""The demo corpus: five minutes of English spoken by espeak-ng, offline, the same samples wherever it is made."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from audio import INT16_SCALE, wav_length, write_wav
from corpora.lists import FileLists, write_lists, write_text
from corpora.names import check_listable
from harness import terminal
from harness.downloads import damage_named
from harness.errors import InputError
from harness.files import read_text
from harness.pools import process_pool, results_of

SAMPLING_RATE = 22_050  # Hz, what espeak-ng speaks at
SENTENCES = Path(__file__).parents[1] / "configs" / "demo_sentences.txt"
CLIP = "demo_"  # begins the names of its clips
MAX_METADATA_BYTES = 2**26
TEST_EVERY = 10  # every tenth sentence is held out
VOICE, WORDS_PER_MINUTE = "en-us", 165
VOLUME = 70  # percent of espeak-ng's default, whose peaks touch full scale
# espeak-ng's pauses are digital silence, where a flow's density has no bound and likelihoods mean nothing. A noise
# floor of 8 steps of 16-bit audio, -72 dBFS, makes them a quiet room.
NOISE_FLOOR = 8.0


def make_demo_corpus(folder: str | Path, sentences: str | Path = SENTENCES) -> tuple[FileLists, bool]:
    """Speak the sentences into `folder`; returns the lists, and whether a finished corpus was found and kept.

    The same sentences give the same samples wherever this runs.
    """
    folder = Path(folder)
    check_listable(folder)
    _check_own(folder)
    text = [line for line in Path(sentences).read_text(encoding="utf-8").splitlines() if line]
    clips = [str(folder / "wavs" / f"{CLIP}{number:03d}.wav") for number in range(1, len(text) + 1)]
    metadata = "".join(f"{Path(clip).stem}|{line}\n" for clip, line in zip(clips, text, strict=True))
    finished = _is_finished(folder, metadata, clips)
    if not finished:
        _speak_clips(text, clips)
    lists = write_lists(
        folder,
        train=[clip for number, clip in enumerate(clips, 1) if number % TEST_EVERY],
        test=[clip for number, clip in enumerate(clips, 1) if number % TEST_EVERY == 0],
    )
    write_text(folder / "metadata.csv", metadata)  # last: its presence says that all the rest is there
    return lists, finished


def _check_own(folder: Path) -> None:
    """Refuse the folder of another corpus, such as an unpacked LJSpeech."""
    path = folder / "metadata.csv"
    if path.exists():
        with damage_named(path, "no table of the demo corpus; choose another folder"):
            foreign = [line for line in read_text(path, MAX_METADATA_BYTES).splitlines() if not line.startswith(CLIP)]
            if foreign:
                raise ValueError(f"it names {foreign[0].partition('|')[0][:40]!r}")


def _is_finished(folder: Path, metadata: str, clips: Sequence[str]) -> bool:
    try:
        if (folder / "metadata.csv").read_text(encoding="utf-8") != metadata:
            return False
        return all(wav_length(clip, SAMPLING_RATE) > 0 for clip in clips)
    except (InputError, OSError, ValueError):
        return False


def _speak_clips(text: Sequence[str], clips: Sequence[str]) -> None:
    # In a process of its own: the C library gives the same samples again only from its first initialisation on.
    with process_pool(1, "espeak-ng crashed; reinstall the espeakng-loader package") as pool:
        spoken = next(results_of([pool.submit(speak, text)]))
    noise = np.random.default_rng(0)
    for clip, samples in zip(clips, terminal.bar(spoken, desc="demo corpus", unit="clip"), strict=True):
        floor = noise.normal(0.0, NOISE_FLOOR, len(samples))
        write_wav(clip, torch.from_numpy((samples + floor) / INT16_SCALE), SAMPLING_RATE)


def speak(text: Sequence[str]) -> list[np.ndarray]:
    """Each sentence as int16 samples at SAMPLING_RATE, by espeak-ng's C library (constants of its speak_lib.h)."""
    import espeakng_loader  # only the demo needs it

    synchronous, dont_exit, rate_parameter, volume_parameter, utf8 = 2, 0x8000, 1, 2, 1
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data = os.fsencode(espeakng_loader.get_data_path())
    if library.espeak_Initialize(synchronous, 0, data, dont_exit) != SAMPLING_RATE:
        raise InputError(f"espeak-ng found no data in {os.fsdecode(data)}; reinstall the espeakng-loader package")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: "ctypes._Pointer", count: int, events: int) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())  # the buffer is espeak's
        return 0  # go on

    library.espeak_SetSynthCallback(collect)
    library.espeak_SetVoiceByName(VOICE.encode())
    library.espeak_SetParameter(rate_parameter, WORDS_PER_MINUTE, 0)
    library.espeak_SetParameter(volume_parameter, VOLUME, 0)
    spoken = []
    for sentence in text:
        pieces.clear()
        encoded = sentence.encode()
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, utf8, None, None)
        spoken.append(np.concatenate(pieces))
    library.espeak_Terminate()
    return spoken
