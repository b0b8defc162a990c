"""`python data.py prepare`: odd recordings in, a corpus to train on out."""

import csv
import itertools
import json
import os
import reprlib
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
from audio import read_wav
from corpora import loudness as loudness_room
from corpora import recordings as recordings_room
from corpora import segments
from corpora.loudness import gain, loudness
from corpora.recordings import Source, read_recording
from corpora.segments import find_segments
from corpora.splits import assign, fraction_of
from corpora.takes import clip_names, read_notes, take_names
from data import read_file_list
from harness.errors import InputError
from tests.support.experiments import RATE, write_config
from tests.support.odd_recordings import write_odd_recordings
from tests.support.speech import speech


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "recordings"
    return folder, write_odd_recordings(folder)


@pytest.fixture
def template(tmp_path):
    return write_config(tmp_path / "template.json", tmp_path, tmp_path / "runs", data_config__test_files="none")


def prepare(template, *arguments):
    return data.main(["prepare", "-c", template, *map(str, arguments)])


def clips_of(folder):
    return [path for name in ("train", "valid", "test") for path in read_file_list(folder / f"{name}_files.txt")]


def test_every_kind_of_recording_becomes_clips(recordings, template, tmp_path, capsys):
    source, usable = recordings
    assert prepare(template, source, tmp_path / "out", "--max_seconds", 3) == 0
    said = capsys.readouterr().out
    clips = clips_of(tmp_path / "out")
    assert len(set(clips)) == len(clips)
    stems = {Path(clip).stem.removeprefix("ann_").removeprefix("bob_").partition("_00")[0] for clip in clips}
    assert stems == usable
    for words in ("silent.wav: silent", "short.wav: too short", "original.wav: the same audio as", "empty.wav: empty",
                  "page.mp3: a web page", "phone.m4a: cannot be read", "DC offset, removed: ", "clipped peaks",
                  "speaker folders: 2; in train ", "loudness as recorded", "recorded below 22050 Hz",
                  "mels of"):  # fmt: skip
        assert words in said, words
    for clip in clips:
        audio = read_wav(clip, RATE)
        assert 0.3 * RATE < len(audio) <= 3 * RATE and abs(audio.mean()) < 5e-3
    of_the_long = [clip for clip in clips if "/long_0" in clip]
    assert 2 <= len(of_the_long) <= 4  # cut, and nowhere else than in its pauses
    for clip in of_the_long:
        audio = read_wav(clip, RATE).numpy()
        assert np.abs(audio[:400]).max() < 0.05 or clip.endswith("001.wav")
    assert len(read_wav(tmp_path / "out" / "wavs" / "quiet_ends.wav", RATE)) < 1.2 * RATE


def test_its_experiment_file_names_its_lists(recordings, template, tmp_path):
    assert prepare(template, recordings[0] / "bob", tmp_path / "out") == 0
    sections = json.loads((tmp_path / "out" / "config.json").read_text())["data_config"]
    assert sections["training_files"] == str(tmp_path / "out" / "train_files.txt")
    assert sections["test_files"] == [str(tmp_path / "out" / f"{name}_files.txt") for name in ("valid", "test")]


def test_a_second_run_does_what_is_new_and_leaves_the_split(recordings, template, tmp_path):
    own = tmp_path / "own"
    for number in range(6):
        (own / "x").mkdir(parents=True, exist_ok=True)
        soundfile.write(own / "x" / f"{number}.wav", speech(0.6, RATE, 100 + number), RATE)
    out = tmp_path / "out"
    assert prepare(template, own, out) == 0
    before = {name: set(read_file_list(out / f"{name}_files.txt")) for name in ("train", "valid", "test")}
    assert all(before.values())
    times = {path: path.stat().st_mtime_ns for path in (out / "wavs").iterdir()}
    with open(out / "takes.jsonl", "a") as file:
        file.write('{"path": "cut sho')  # by a crash
    soundfile.write(own / "x" / "new.wav", speech(0.6, RATE, 200), RATE)
    soundfile.write(own / "x" / "0.wav", speech(0.7, RATE, 201), RATE)  # changed
    assert prepare(template, own, out) == 0
    for name, clips in before.items():
        assert clips <= set(read_file_list(out / f"{name}_files.txt"))
    kept = [path for path in times if path.name != "x_0.wav"]
    assert len(kept) == 5 and all(path.stat().st_mtime_ns == times[path] for path in kept)
    assert len(read_wav(out / "wavs" / "x_0.wav", RATE)) == int(0.7 * RATE)
    assert (out / "wavs" / "x_new.wav").is_file()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A corpus of one take in two pieces and one in one, in a folder of its own."""
    folder = tmp_path_factory.mktemp("prepared")
    template = write_config(folder / "template.json", folder, folder / "runs", data_config__test_files="none")
    (folder / "in").mkdir()
    long = np.concatenate([speech(0.7, RATE, 110), np.zeros(2_000), speech(0.7, RATE, 130)])
    for name, audio in (("long", long), ("one", speech(0.6, RATE, 150))):
        soundfile.write(folder / "in" / f"{name}.wav", audio, RATE)
    assert prepare(template, folder / "in", folder / "out", "--max_seconds", 1) == 0
    return template, folder


@pytest.mark.parametrize(
    "changes",
    [
        *({"name": name} for name in ("../../escaped", "/escaped", "..", "", "a/b", "one_1", "long\n", 5, None, [])),
        *({"below": below} for below in (".", "", "../../x.wav", None, [], 5)),
        *({key: value} for key in ("rate", "clipped") for value in ([], "1", None, -1, 1.5, 10**400)),
        *({key: value} for key in ("offset", "seconds", "loudness") for value in ("q", None, [], 10**400)),
        *({"seconds": value} for value in (float("nan"), float("inf"))),
        *({"clips": clips} for clips in (5, None, {}, [5], [{}], [[]])),
        *({"problem": 5}, {"path": 5}, {"stamp": None}, {"speaker": []}, {"form": 1}, {"used_as": {}}, {"more": 1}),
        *({"clip": {"name": name}} for name in ("../../../wavs/c0", "/escaped", "two", "long_002", 5, None, "")),
        *({"clip": {"samples": value}} for value in ("x", None, -1, 1.5, 10**400, True)),
        *({"clip": {"digest": value}} for value in ([], {}, None, 5)),
        {"clip": {"more": 1}},
    ],
    ids=reprlib.repr,
)
def test_a_note_that_no_run_wrote_is_left_out(prepared, tmp_path, changes):
    _, folder = prepared
    notes = [json.loads(line) for line in (folder / "out" / "takes.jsonl").read_text().splitlines()]
    assert [Path(path).stem for path in read_notes(folder / "out" / "takes.jsonl")] == ["long", "one"]
    for note in notes:
        note["clips"][0] |= changes.get("clip", {})
        note |= {key: value for key, value in changes.items() if key != "clip"}
    lines = [*map(json.dumps, notes), "null", "[]", "5", "[" * 9_999, '{"path": "cut sho']
    (tmp_path / "takes.jsonl").write_text("\n".join(lines))
    assert read_notes(tmp_path / "takes.jsonl") == {}


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "other"])
def test_clips_go_nowhere_else_whatever_is_noted(prepared, name):
    template, folder = prepared
    files, notes = set(folder.rglob("*")), folder / "out" / "takes.jsonl"
    note = {**json.loads(notes.read_text().splitlines()[0]), "name": name, "stamp": "another"}
    notes.write_text(json.dumps(note) + "\n")
    assert prepare(template, folder / "in", folder / "out", "--max_seconds", 1) == 0
    assert set(folder.rglob("*")) == files
    assert [Path(path).stem for path in read_notes(notes)] == ["long", "one"]


@pytest.mark.parametrize(
    "paths",
    [
        ["a.wav", "A.wav", "a.flac", "sub/a.wav", "sub_a.wav"],
        ["x_001.wav", "x.wav", "x/002.wav", "x_003_001.wav", "x_003.wav"],
        ["é" * 149 + "1.wav", "é" * 149 + "2.wav", "語" * 80 + "1.wav", "語" * 80 + "2.wav"],
        ["...wav", "_.wav", "../../b.wav", "/b.wav", "\udcff.wav", "a\nb.wav", "a|b.wav"],
    ],
)
def test_no_two_takes_have_the_clips_of_one_name(paths):
    sources = [Source(Path("in", path), Path(path)) for path in paths]
    for order in (sources, sources[::-1]):
        names = list(take_names(order, {}).values())
        clips = [clip.casefold() for name in names for pieces in (1, 3) for clip in clip_names(name, pieces)]
        assert len(set(clips)) == len(clips) == 4 * len(paths)
        assert all(len(os.fsencode(f".{clip}.wav.1234567.tmp")) < 256 and Path(clip).name == clip for clip in clips)


def test_16_bit_audio_at_the_rate_is_not_touched(template, tmp_path):
    samples = np.random.default_rng(0).integers(-9_000, 9_000, 20_000).astype(np.int16)
    samples -= np.int16(samples.mean().round())
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    assert prepare(template, tmp_path / "a.wav", tmp_path / "out") == 0
    assert np.array_equal(soundfile.read(tmp_path / "out" / "wavs" / "a.wav", dtype="int16")[0], samples)


def test_finer_audio_is_dithered_the_same_way_twice(template, tmp_path):
    quiet = np.full(20_000, 0.3 / 32_768)
    quiet[::50] = 0.1
    soundfile.write(tmp_path / "a.wav", quiet, RATE, "FLOAT")
    for name in ("one", "two"):
        assert prepare(template, tmp_path / "a.wav", tmp_path / name) == 0
    one, two = (soundfile.read(tmp_path / name / "wavs" / "a.wav", dtype="int16")[0] for name in ("one", "two"))
    assert np.array_equal(one, two)
    low = one[np.arange(20_000) % 50 > 0]
    assert set(np.unique(low)) <= {-60, *range(-70, 3)} and low.std() > 0.3  # no longer one and the same value


def test_whole_speakers_are_held_out_if_asked(recordings, template, tmp_path):
    assert prepare(template, recordings[0] / "ann", recordings[0] / "bob", tmp_path / "flat") == 0
    assert prepare(template, recordings[0], tmp_path / "out", "--by_speaker", "--valid", 0) == 0
    sets = [{Path(clip).name.partition("_")[0] for clip in read_file_list(tmp_path / "out" / f"{name}_files.txt")}
            for name in ("train", "test")]  # fmt: skip
    assert sets[0].isdisjoint(sets[1] & {"ann", "bob"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], "nowhere: no such file or folder"),
        (["empty", "out"], "no recordings there"),
        (["silent.wav", "out"], "no recording can be used; the first: silent.wav: silent"),
        (["silent.wav", "empty/.."], "not empty, and no corpus that was prepared before"),
    ],
)
def test_what_cannot_be_prepared_is_named(template, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    soundfile.write("silent.wav", np.zeros(9_000), RATE)
    assert prepare(template, *arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and words in message


def test_recordings_whose_names_are_not_utf8_are_left_out(template, tmp_path, capsys):
    names = ["plain", "\udcff", "\udcfe", "a\udc80/b"]
    for number, name in enumerate(names):
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "good.wav", speech(0.6, RATE, 100 + number), RATE)
        (tmp_path / "good.wav").rename(tmp_path / "own" / f"{name}.wav")
    for _ in range(2):
        assert prepare(template, tmp_path / "own", tmp_path / "out") == 0
        said = capsys.readouterr()
        assert r"left out: " in said.out and r"own/\udcff.wav: its name is not UTF-8; rename it" in said.out
        rows = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text(encoding="utf-8").splitlines()))
        assert [row["problem"] for row in rows if row["clips"]] == [""]
        assert [row["problem"] for row in rows if not row["clips"]] == ["its name is not UTF-8; rename it"] * 3
    assert prepare(template, tmp_path / "own" / "\udcff.wav", tmp_path / "none") == 1
    assert capsys.readouterr().err.endswith("\\udcff.wav: its name is not UTF-8; rename it\n")


@pytest.mark.parametrize("name", ["a\0b.wav", "\ud800.wav"], ids=repr)
def test_a_list_that_names_no_file_is_refused(template, tmp_path, capsys, name):
    (tmp_path / "list.jsonl").write_text(json.dumps({"audio": name}))
    assert prepare(template, tmp_path / "list.jsonl", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "list.jsonl: " in message and "is no name of a file; mend the list" in message and message.count("\n") == 1


@pytest.mark.parametrize("sets", ["[]", "5", '{"a": "other"}', '{"a": []}', '{"\\ud800": "train"}', "{", "\udcff"])
def test_a_damaged_split_is_said_in_one_line(prepared, tmp_path, capsys, sets):
    template, folder = prepared
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "out" / "split.json").write_bytes(os.fsencode(sets))
    assert prepare(template, folder / "in", tmp_path / "copy" / "out", "--max_seconds", 1) == 1
    message = capsys.readouterr().err
    assert "split.json: holds no sets of takes" in message and message.count("\n") == 1


# --- the parts


@pytest.mark.parametrize("channels", [1, 3, 200])
def test_a_recording_is_read_by_blocks_of_so_many_samples(tmp_path, monkeypatch, channels):
    """Whatever its channels; what it becomes does not depend on that."""
    sound = np.random.default_rng(0).normal(0, 0.1, (3_000, channels))
    soundfile.write(tmp_path / "a.wav", sound, 16_000, "FLOAT")
    whole, read, sizes = read_recording(tmp_path / "a.wav", RATE), soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *given, **options: noted(read(*given, **options)))

    def noted(block):
        sizes.append(block.size)
        return block

    monkeypatch.setattr(recordings_room, "BLOCK", 1_000)
    parts = read_recording(tmp_path / "a.wav", RATE)
    assert max(sizes) <= 1_000 and sum(sizes) == sound.size
    assert np.allclose(parts.audio, whole.audio, atol=1e-6)


def test_a_take_is_measured_by_blocks(monkeypatch):
    """Minutes of it in double precision at a time, never hours; loudness and levels do not depend on that."""
    take = speech(3.7, RATE, 130).astype(np.float32)
    whole = loudness(take, RATE), segments.levels(take, RATE), find_segments(take, RATE, 50.0, 1.0)
    monkeypatch.setattr(loudness_room, "BLOCK_SECONDS", 1)
    monkeypatch.setattr(segments, "BLOCK_FRAMES", 7)
    assert loudness(take, RATE) == pytest.approx(whole[0], abs=1e-9)
    assert np.array_equal(segments.levels(take, RATE), whole[1])
    assert find_segments(take, RATE, 50.0, 1.0) == whole[2]
    take = np.tile(take, 30)
    tracemalloc.start()
    for measured in (loudness, segments.levels, lambda audio, _: gain(audio, -20.0, "loudness")):
        tracemalloc.reset_peak()
        measured(take, RATE)
        assert tracemalloc.get_traced_memory()[1] < take.nbytes / 2
    tracemalloc.stop()


def streamed(path, samples, rate=8_000, bits=8, data=0, more=b""):
    """A wav as it comes out of a pipe, of zeros that take no disk."""
    block = bits // 8
    form = struct.pack("<4sLHHLLHH", b"fmt ", 16, 1, 1, rate, rate * block, block, bits)
    path.write_bytes(b"RIFF" + bytes(4) + b"WAVE" + form + more + b"data" + struct.pack("<L", data))
    os.truncate(path, path.stat().st_size + samples * block)
    return path


def test_a_streamed_recording_is_not_held_to_be_mended(tmp_path):
    """Nor is one that is too long."""
    take = (speech(0.9, RATE, 110) * 2**15).astype("<i2")
    path = streamed(tmp_path / "a.wav", 0, RATE, 16, more=b"LIST" + struct.pack("<L", 4) + b"odds")
    with open(path, "ab") as file:
        file.write(take.tobytes())
    assert np.allclose(read_recording(path, RATE).audio, take / 2**15, atol=2e-3)
    assert len(read_recording(path, RATE).audio) == len(take)
    long = streamed(tmp_path / "long.wav", 2**32 - 99)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"long\.wav: over 6 hours; cut it into parts"):
        read_recording(long, RATE)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_an_offset_is_removed_and_channels_are_averaged(tmp_path):
    left = speech(0.5, 44_100, 120)
    soundfile.write(tmp_path / "a.wav", np.stack([left, -left], axis=1) + 0.1, 44_100, "FLOAT")
    recording = read_recording(tmp_path / "a.wav", RATE)
    assert recording.offset == pytest.approx(0.1, abs=1e-3)
    assert np.abs(recording.audio[500:-500]).max() < 1e-3 and len(recording.audio) == round(0.5 * RATE)
    assert (recording.form, recording.rate) == ("WAV FLOAT, 2 channels", 44_100)


def test_resampling_keeps_what_both_rates_hold(tmp_path):
    time = np.arange(48_000) / 48_000
    both = 0.5 * np.sin(2 * np.pi * 1_000 * time) + 0.3 * np.sin(2 * np.pi * 15_000 * time)
    soundfile.write(tmp_path / "a.wav", both, 48_000, "FLOAT")
    audio = read_recording(tmp_path / "a.wav", RATE).audio
    expected = 0.5 * np.sin(2 * np.pi * 1_000 * np.arange(len(audio)) / RATE)
    assert np.abs(audio - expected)[500:-500].max() < 1e-3


def test_segments_cover_the_speech_within_their_length():
    pause = np.zeros(4_000)
    take = np.concatenate([np.zeros(9_000), *(np.concatenate([speech(0.5, RATE, 100 + n), pause]) for n in range(9))])
    pieces = find_segments(take, RATE, 50.0, 2.0)
    assert all(0 < last - first <= 2 * RATE + 221 for first, last in pieces)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(pieces))
    inside = sum(np.square(take[first:last]).sum() for first, last in pieces)
    assert inside > 0.999 * np.square(take).sum()
    for first, _ in pieces[1:]:
        assert np.abs(take[first : first + 200]).max() < 0.05
    assert find_segments(take, RATE, 0.0, 99.0) == [(0, len(take))]
    assert find_segments(np.zeros(9_000), RATE, 50.0, 2.0) == []


def test_loudness_is_that_of_the_standard():
    for rate in (48_000, 44_100, 16_000):  # BS.1770: a full-scale sine of 997 Hz in one channel is -3.01 LUFS
        sine = np.sin(2 * np.pi * 997 * np.arange(3 * rate) / rate)
        assert loudness(sine, rate) == pytest.approx(-3.01, abs=0.05)
        assert loudness(0.1 * sine, rate) == pytest.approx(-23.01, abs=0.05)
    assert loudness(np.zeros(9_000), RATE) == -np.inf
    assert loudness(speech(0.2, RATE, 99), RATE) > -40  # shorter than a block
    assert gain(0.1 * sine, -23.01, "loudness") == pytest.approx(1, abs=1e-2)
    assert gain(sine, -3.0, "keep") == pytest.approx(0.999) and gain(0.5 * sine, -9.0, "peak") == pytest.approx(1.9)


def test_a_set_is_a_matter_of_the_name():
    units = [f"take{n}" for n in range(2_000)]
    sets = assign(units, 0.05, 0.1, {})
    shares = [sum(name == which for name in sets.values()) / len(units) for which in ("valid", "test")]
    assert shares == pytest.approx([0.05, 0.1], abs=0.02)
    assert assign(units[:1_000], 0.05, 0.1, {}) == {unit: sets[unit] for unit in units[:1_000]}
    few = sorted(f"u{n}" for n in range(200) if fraction_of(f"u{n}") > 0.9)[:4]
    first = assign(few, 0.05, 0.05, {})
    assert sorted(first.values()) == ["test", "train", "train", "valid"]
    assert assign([*few, "another"], 0.05, 0.05, first).items() >= first.items()
    assert assign(["one"], 0.5, 0.5, {"one": "train"}) == {"one": "train"}
    for units in ([f"u{number}" for number in range(first, first + 3)] for first in range(0, 60, 3)):
        for some in (units, units[:1], units[:2]):  # there is always something to train on
            assert "train" in assign(some, 0.5, 0.5, {}).values()
            assert "train" in assign(some, 0.5, 0.49, dict.fromkeys(some, "test")).values()
    old, *new = sorted(few, key=fraction_of)
    assert assign([old, *new], 0.05, 0.05, {old: "train"})[old] == "train"  # though its number is the smallest


def test_every_speaker_with_enough_takes_is_in_every_set():
    sizes = {"ann": 400, "bob": 20, "cem": 19, "dot": 1}
    speakers = {f"{name}/{n}.wav": name for name, size in sizes.items() for n in range(size)}
    speakers |= {f"{n}.wav": "" for n in range(30)}
    plain, sets = assign(list(speakers), 0.05, 0.05, {}), assign(list(speakers), 0.05, 0.05, {}, speakers)
    for name in ("ann", "bob"):
        assert {sets[unit] for unit in speakers if speakers[unit] == name} == {"train", "valid", "test"}
    moved = [unit for unit in sets if sets[unit] != plain[unit]]
    assert 1 <= len(moved) <= 2 and all(speakers[unit] == "bob" for unit in moved)

    more = speakers | {f"cem/new{n}.wav": "cem" for n in range(21)} | {f"eve/{n}.wav": "eve" for n in range(20)}
    later = assign(list(more), 0.05, 0.05, sets, more)
    assert later.items() >= sets.items()
    for name in ("cem", "eve"):
        assert {later[unit] for unit in more if more[unit] == name} == {"train", "valid", "test"}


def test_recordings_that_are_all_below_the_rate_are_said_to_need_less(template, tmp_path, capsys):
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.wav", speech(0.6, 16_000, 120 + n), 16_000)
    assert prepare(template, *tmp_path.glob("*.wav"), tmp_path / "out") == 0
    assert "nothing above 8000 Hz in them, so that an experiment file of 16000 Hz would do" in capsys.readouterr().out
    soundfile.write(tmp_path / "3.wav", speech(0.6, RATE, 150), RATE)
    assert prepare(template, *tmp_path.glob("*.wav"), tmp_path / "out") == 0
    assert "nothing above 8000 Hz in them\n" in capsys.readouterr().out


def test_folders_are_speakers_of_every_set(template, tmp_path, capsys):
    for name, pitch in (("ann", 190), ("bob", 110)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for n in range(5):
            soundfile.write(tmp_path / "own" / name / f"{n}.wav", speech(0.6, RATE, pitch + n), RATE)
    assert prepare(template, tmp_path / "own", tmp_path / "out", "--test", 0.2, "--valid", 0.2) == 0
    assert "speaker folders: 2; in train 2, valid 2, test 2" in capsys.readouterr().out
