"""--check_data: what is found in a corpus, and what the command says of it."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from audio import write_wav
from config import DataConfig
from corpora.check import SHOWN, _LongestRun, inspect_corpus, report_text, write_report
from corpora.spectrum import find_band_end, power_frames
from tests.support.experiments import RATE, run
from tests.support.speech import speech

DATA = DataConfig(segment_length=2048)


def noise(length, seed=0):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).mul(0.1).clamp(-0.9, 0.9)


def found(folder, audio, list_name="train", rate=RATE, context=0):
    """The report on one clip beside a good one of the other list."""
    write_wav(folder / "clip.wav", audio, rate)
    write_wav(folder / "good.wav", noise(6_000, seed=99), RATE)
    lists = [[str(folder / "clip.wav")], [str(folder / "good.wav")]]
    clips = inspect_corpus(*(lists if list_name == "train" else lists[::-1]), DATA, crop_context=context)
    [clip], [good] = ([clip for clip in clips if clip.file.endswith(name)] for name in ("clip.wav", "good.wav"))
    assert good.severity == "ok"
    return clip


def test_a_good_clip_is_measured(tmp_path):
    clip = found(tmp_path, noise(5_000))
    assert (clip.severity, clip.samples, clip.clipped) == ("ok", 5_000, 0)
    assert clip.peak == pytest.approx(noise(5_000).abs().max().item(), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_clip_that_stands_still_is_an_error(tmp_path, value):
    assert found(tmp_path, torch.full((5_000,), value)).errors == ["silent: every sample is the same"]


@pytest.mark.parametrize(("length", "severity"), [(1_000, "ok"), (1_500, "warning"), (2_100, "error")])
def test_silence_within_a_clip_is_judged_by_its_length(tmp_path, length, severity):
    audio = noise(9_000)
    audio[3_000 : 3_000 + length] = 0
    clip = found(tmp_path, audio)
    assert (clip.severity, clip.longest_constant) == (severity, length)


@pytest.mark.parametrize(("context", "severity"), [(0, "warning"), (512, "warning"), (768, "error")])
def test_what_a_crops_context_leaves_of_it_may_not_be_silent(tmp_path, context, severity):
    audio = noise(9_000)
    audio[3_000:4_500] = 0  # of 2,048 samples of a crop
    assert found(tmp_path, audio, context=context).severity == severity


def test_a_clip_of_nothing_but_context_is_an_error(tmp_path):
    assert found(tmp_path, noise(700), context=512).severity == "warning"
    clip = found(tmp_path, noise(700), context=768)
    assert clip.errors == ["too short: 700 samples, and the first 768 of a crop are only its past"]


def test_clipping_is_counted_but_not_single_peaks(tmp_path):
    audio = noise(5_000)
    audio[100], audio[200:202], audio[300:310], audio[400:403] = 1.0, -1.0, 1.0, -1.0
    clip = found(tmp_path, audio)
    assert clip.warnings == ["clipped: 13 samples at full scale"] and not clip.errors


def test_other_formats_and_broken_files_are_errors(tmp_path):
    clip = found(tmp_path, noise(5_000), rate=16_000)
    [error] = clip.errors
    assert error.startswith("sampling rate 16000 Hz, expected 22050")
    (tmp_path / "text.wav").write_text("not a wav")
    for name, words in (("text.wav", "not a PCM wav"), ("none.wav", "no such wav file")):
        [clip, _] = inspect_corpus([str(tmp_path / name)], [str(tmp_path / "good.wav")], DATA)
        assert words in clip.errors[0]


def test_short_clips_are_padded_for_training_and_useless_for_test(tmp_path):
    assert "its crops end in zeros up to 2048" in found(tmp_path, noise(600)).warnings[0]
    assert found(tmp_path, noise(600), "test").errors == ["too short: 600 samples, at least 768 are needed"]
    assert found(tmp_path, noise(768), "test").severity == "ok"


def test_the_same_audio_is_found_whatever_its_name(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("copy_of_a", 1), ("test_copy_of_b", 2), ("test", 3)):
        write_wav(tmp_path / f"{name}.wav", noise(4_000, seed), RATE)
    train, test = ([str(tmp_path / f"{name}.wav") for name in names]
                   for names in (("a", "b", "copy_of_a"), ("test_copy_of_b", "test")))  # fmt: skip
    a, b, copy_of_a, test_copy_of_b, other = inspect_corpus(train, test, DATA)
    assert a.severity == b.severity == other.severity == "ok"
    assert copy_of_a.warnings == [f"the same audio as {train[0]}"] and not copy_of_a.errors
    assert test_copy_of_b.errors == [f"the same audio as training clip {train[1]}"]


def test_measurements_do_not_depend_on_the_size_of_the_blocks(tmp_path, monkeypatch):
    audio = noise(9_000)
    audio[1_000:2_200], audio[4_000:4_100] = 0.5, 1.0
    whole = found(tmp_path, audio)
    monkeypatch.setattr("corpora.check.BLOCK", 97)
    pieces = found(tmp_path, audio)
    for name in ("samples", "peak", "longest_constant", "clipped", "warnings"):
        assert getattr(pieces, name) == getattr(whole, name), name


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_counted_as_by_walking_through_them(seed):
    random = np.random.default_rng(seed)
    flags = random.random(500) < 0.7
    lengths, current = [], 0
    for flag in [*flags, False]:
        if flag:
            current += 1
        else:
            lengths, current = [*lengths, current], 0
    runs = _LongestRun(at_least=3)
    for block in np.split(flags, np.sort(random.integers(0, 500, 9))):
        runs.add(block)
    assert runs.longest() == max(lengths)
    assert runs.total() == sum(length for length in lengths if length >= 3)


def test_the_text_shows_errors_first_and_not_too_much(tmp_path):
    good = str(tmp_path / "good.wav")
    write_wav(good, noise(6_000), RATE)
    clips = inspect_corpus([good] * 4, [str(tmp_path / f"{i}.wav") for i in range(SHOWN)], DATA)
    *lines, more, total = report_text(clips).splitlines()
    assert len(lines) == SHOWN and all(line.startswith("error: ") for line in lines)
    assert (more, total) == ("... and 3 more", f"24 clips: {SHOWN} with errors, 3 with warnings, 1 good")


def test_a_warning_that_many_clips_share_is_said_once(tmp_path):
    files = []
    for number in range(SHOWN + 2):
        files.append(str(tmp_path / f"{number}.wav"))
        write_wav(files[-1], noise(5_000, number) + 0.1 + 0.01 * (number % 3), RATE)
    write_wav(files[3], noise(1_000, 3) + 0.1, RATE)
    *lines, total = report_text(inspect_corpus(files, [], DATA)).splitlines()
    short, shared = lines
    assert short == f"warning: {files[3]}: short: 1000 samples, its crops end in zeros up to 2048"
    assert shared.startswith(f"warning: {SHOWN + 2} clips: DC offset of 0.0") and "to 0.12" in shared
    assert total == f"{SHOWN + 2} clips: 0 with errors, {SHOWN + 2} with warnings, 0 good"


def test_the_command_reports_and_its_status_tells(config, corpus, tmp_path, capsys):
    table = tmp_path / "runs" / "tiny" / "data_check.csv"
    assert run("-c", config(), "--check_data") == 0
    assert "8 clips: 0 with errors, 0 with warnings, 8 good" in capsys.readouterr().out
    write_wav(tmp_path / "silent.wav", torch.zeros(5_000), RATE)
    (tmp_path / "list.txt").write_text((corpus / "train.txt").read_text() + f"\n{tmp_path / 'silent.wav'}")
    path = config(data_config__training_files=str(tmp_path / "list.txt"))
    assert run("-c", path, "--check_data") == 1
    assert f"error: {tmp_path / 'silent.wav'}: silent" in capsys.readouterr().out
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["severity"] for row in rows] == ["ok"] * 6 + ["error"] + ["ok"] * 2
    assert not list(table.parent.glob("waveflow_*"))


# --- faults that can be heard


def voice(seconds=3.0, rate=RATE, pitch=130):
    return torch.from_numpy(speech(seconds, rate, pitch)).float()


def test_an_offset_hum_and_a_band_that_ends_early_are_named(tmp_path):
    assert found(tmp_path, voice()).warnings == []
    [offset] = found(tmp_path, voice() + 0.03).warnings
    assert offset.startswith("DC offset of 0.03")
    time = torch.arange(3 * RATE) / RATE
    for mains in (50, 60):
        hum = sum(0.02 * torch.sin(2 * torch.pi * mains * k * time) for k in (1, 2, 3))
        gaps = (torch.sin(2 * torch.pi * 0.7 * time) > 0).float()
        assert found(tmp_path, voice() * gaps + hum).warnings == [f"mains hum at {mains} Hz and above"]
    low = torch.from_numpy(soxr.resample(noise(24_000).numpy(), 8_000, RATE))
    [band] = found(tmp_path, low).warnings
    assert band.startswith(("nothing above 3.", "nothing above 4."))
    assert find_band_end(power_frames(noise(60_000).numpy()), RATE) == 0


def test_levels_and_texts_unlike_those_of_the_others_are_named(tmp_path):
    files, texts = [], {}
    for number in range(8):
        files.append(str(tmp_path / f"{number}.wav"))
        write_wav(files[-1], noise(9_000, number) * (0.01 if number == 3 else 1), RATE)
        texts[files[-1]] = "ten letter" * (6 if number == 5 else 1)
    clips = inspect_corpus(files[:6], files[6:], DATA, texts)
    named = {clip.file: clip.warnings for clip in clips if clip.warnings}
    assert set(named) == {files[3], files[5]}
    assert named[files[3]][0].startswith("level -60 dB, the middle one is -20")
    assert named[files[5]][0].startswith("147 characters a second, the middle is 24")


@pytest.mark.parametrize("name", ["\udcff.wav", "none\udcff.wav", "\ud800.wav"], ids=repr)
def test_a_name_that_is_not_utf8_stands_in_the_table(tmp_path, name):
    write_wav(tmp_path / "good.wav", noise(6_000), RATE)
    (tmp_path / "\udcff.wav").write_bytes((tmp_path / "good.wav").read_bytes())
    clips = inspect_corpus([str(tmp_path / "good.wav")], [str(tmp_path / name)], DATA)
    write_report(tmp_path / "report.csv", clips)
    rows = list(csv.DictReader((tmp_path / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert [Path(row["file"]).name for row in rows] == ["good.wav", repr(name)[1:-1]]
    assert [row["severity"] for row in rows] == ["ok", "error"]
    assert report_text(clips)
