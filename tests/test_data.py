"""data.py: file lists, crops and whole clips, the loader, the command line."""

import itertools
import json
import os

import numpy as np
import pytest
import torch

import data
from audio import MelSpectrogram, read_wav, write_wav
from config import DataConfig, config_from_dict
from data import (
    ClipDataset,
    CropDataset,
    load_synthesis_entry,
    make_train_loader,
    output_names,
    overlap_warning,
    read_file_list,
)
from harness.errors import InputError

RATE = 22_050
SMALL = DataConfig(segment_length=2_048)
LENGTHS = (9_000, 3_000, 2_048, 1_500, 6_001, 700)  # longer than, equal to and shorter than a crop


def noise(length, seed=0, level=0.1):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)) * level


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"clip{i}.wav") for i in range(len(LENGTHS))]
    for i, (path, length) in enumerate(zip(paths, LENGTHS, strict=True)):
        write_wav(path, noise(length, seed=i), RATE)
    return paths


# --- file lists


def test_a_list_is_read_without_blank_lines(tmp_path):
    (tmp_path / "list.txt").write_text("a.wav\n\n  b c.wav \r\n")
    assert read_file_list(tmp_path / "list.txt") == ["a.wav", "b c.wav"]


def test_relative_paths_count_from_here_and_else_from_the_list(tmp_path, monkeypatch):
    for folder in ("here", "corpus"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("here/both.wav", "corpus/both.wav", "corpus/beside.wav"):
        (tmp_path / path).touch()
    (tmp_path / "corpus" / "list.txt").write_text("both.wav\nbeside.wav\nneither.wav\n")
    expected = ["both.wav", str(tmp_path / "corpus" / "beside.wav"), "neither.wav"]
    assert read_file_list(tmp_path / "corpus" / "list.txt") == expected


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "empty"), (b" \n\n", "empty"), (b"\xff\xfe\0R", "cannot be read as text"), (b"a\0b", "null bytes")],
)
def test_a_list_of_nothing_or_of_bytes_is_refused(tmp_path, content, complaint):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"list\.txt: .*{complaint}"):
        read_file_list(tmp_path / "list.txt")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        read_file_list(tmp_path / "nowhere.txt")


def test_overlap_is_seen_through_other_spellings_of_a_path(tmp_path):
    train, test = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")], [str(tmp_path / "c.wav")]
    assert overlap_warning(train, test) is None
    other_spelling = str(tmp_path / "x" / ".." / "b.wav")
    warning = overlap_warning(train, [*test, other_spelling])
    assert warning.startswith(f"1 of 2 test clips are also training clips ({other_spelling}")


def test_output_names_are_plain_unique_and_in_order():
    paths = ["p/a.wav", "q/a.wav", "q/A.npy", "r/q/a.pt", "b.wav", "../../etc/..", "/", "q_a.wav", "x/häh: ?.wav"]
    names = output_names(paths)
    plain = ["p_a", "q_a", "q_A_2", "q_a_3", "b", "etc_clip", "clip", "q_a_4", "häh"]
    assert names == [f"{name}.wav" for name in plain]
    assert len({name.casefold() for name in names}) == len(paths)
    assert output_names(["a/b.wav"], ".npy") == ["b.npy"]


# --- crops


@pytest.mark.parametrize("mel_source", ["crop", "clip"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_crop_is_a_stretch_of_its_clip_or_the_clip_and_zeros(clips, mel_source, rescale):
    dataset = CropDataset(clips, SMALL.replace(mel_source=mel_source, rescale=rescale), seed=3)
    for index, path in enumerate(clips):
        clip = read_wav(path, RATE)
        if rescale:
            clip = clip / clip.abs().max() * 0.999
        clip = torch.nn.functional.pad(clip, (0, max(0, 2_048 - len(clip))))
        places = clip.unfold(0, 2_048, 1)
        audio, mel = dataset[4, index]
        (found,) = (places == audio).all(dim=1).nonzero(as_tuple=True)
        assert len(found) == 1
        assert mel.shape == (80, 9)


def test_the_mel_of_a_crop_is_taken_from_the_crop(clips):
    audio, mel = CropDataset(clips, SMALL, seed=0)[0, 0]
    assert torch.equal(mel, MelSpectrogram(SMALL)(audio))


@pytest.mark.parametrize("form", [{}, {"segment_length": 2_000}, {"filter_length": 900, "win_length": 900}])
def test_mel_source_clip_gives_the_frames_of_the_whole_clips_mel(clips, form):
    config = SMALL.replace(mel_source="clip", **form)
    dataset = CropDataset(clips, config, seed=0)
    clip = read_wav(clips[4], RATE)
    whole_mel = MelSpectrogram(config)(clip)
    beginnings = clip.unfold(0, 16, 1)
    starts = set()
    for epoch in range(200):
        audio, mel = dataset[epoch, 4]
        (start,) = (beginnings == audio[:16]).all(dim=1).nonzero(as_tuple=True)[0].tolist()
        assert torch.equal(audio, clip[start : start + config.segment_length])
        frame, offset = divmod(start, 256)
        assert offset == 0
        torch.testing.assert_close(mel, whole_mel[:, frame : frame + mel.shape[1]], atol=1e-5, rtol=0)
        starts.add(frame)
    assert starts == set(range((6_001 - config.segment_length) // 256 + 1))  # both ends of the clip included


def test_crops_reach_every_position_and_differ_by_seed_epoch_and_clip(tmp_path):
    ramp = torch.arange(2_058) / 32_768  # the first sample of a crop tells where it starts
    for name in ("a.wav", "b.wav"):
        write_wav(tmp_path / name, ramp, RATE)
    files = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]

    def starts(seed, index):
        dataset = CropDataset(files, SMALL, seed)
        return [round(dataset[epoch, index][0][0].item() * 32_768) for epoch in range(200)]

    assert set(starts(1, 0)) == set(range(11))
    assert starts(1, 0) == starts(1, 0)
    assert starts(1, 0) != starts(2, 0) and starts(1, 0) != starts(1, 1)


def test_the_first_bad_file_of_a_list_is_named_at_once(clips, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no wav")
    for dataset in (lambda files: CropDataset(files, SMALL, 0), lambda files: ClipDataset(files, SMALL)):
        with pytest.raises(InputError, match=r"bad\.wav: not a PCM wav"):
            dataset([*clips[:3], str(tmp_path / "bad.wav"), "missing.wav"])


def test_a_segment_shorter_than_half_a_filter_is_refused(clips):
    with pytest.raises(InputError, match=r"segment_length 512 is too short .* at least 513"):
        CropDataset(clips, SMALL.replace(segment_length=512), 0)


def test_rescale_reads_a_clip_whole_once_only(clips, monkeypatch):
    lengths = []

    def counting(path, rate, start=0, length=None):
        lengths.append(length)
        return read_wav(path, rate, start, length)

    monkeypatch.setattr(data, "read_wav", counting)
    dataset = CropDataset(clips, SMALL.replace(rescale=True), seed=0)
    for epoch in range(5):
        dataset[epoch, 0]
    assert lengths.count(None) == 1 and lengths.count(2_048) == 5


# --- whole clips


def test_whole_clips_are_cut_to_the_hop_and_have_their_own_mel(clips):
    dataset = ClipDataset(clips[:5], SMALL)
    for index, (path, length) in enumerate(zip(clips[:5], LENGTHS[:5], strict=True)):
        name, audio, mel = dataset[index]
        assert name == path
        assert torch.equal(audio, read_wav(path, RATE)[: length // 256 * 256])
        assert torch.equal(mel, MelSpectrogram(SMALL)(audio)) and mel.shape == (80, length // 256 + 1)


def test_clips_of_one_length_are_the_beginning_padded_with_zeros(clips):
    dataset = ClipDataset(clips, SMALL, max_length=2_000)
    for index, length in enumerate(LENGTHS):
        _, audio, mel = dataset[index]
        assert audio.shape == (2_000,) and mel.shape == (80, 8)
        assert torch.equal(audio[:length], read_wav(clips[index], RATE)[:2_000])
        assert not audio[length:].any()


def test_a_clip_too_short_for_a_mel_is_named(clips):
    with pytest.raises(InputError, match=r"clip5\.wav: 700 samples, at least 768 are needed"):
        ClipDataset(clips, SMALL)


def test_rescaled_clips_peak_just_below_full_scale_whatever_is_cut(tmp_path):
    sound = noise(5_000)
    sound[4_900] = 0.9  # the peak lies where neither cut keeps it
    write_wav(tmp_path / "a.wav", sound, RATE)
    config = SMALL.replace(rescale=True)
    for max_length in (None, 1_000):
        _, audio, _ = ClipDataset([str(tmp_path / "a.wav")], config, max_length)[0]
        torch.testing.assert_close(audio, sound[: len(audio)] / 0.9 * 0.999, atol=1e-4, rtol=0)


def test_synthesis_starts_from_a_wav_or_a_saved_mel(clips, tmp_path):
    mel_fn = MelSpectrogram(SMALL)
    mel, audio = load_synthesis_entry(clips[0], SMALL, mel_fn)
    assert audio.shape == (8_960,) and torch.equal(mel, mel_fn(audio))
    np.save(tmp_path / "a.npy", mel.numpy())
    torch.save(mel, tmp_path / "a.PT")
    for name in ("a.npy", "a.PT"):
        read, reference = load_synthesis_entry(str(tmp_path / name), SMALL, mel_fn)
        assert torch.equal(read, mel) and reference is None


# --- the loader


def first(batches, count):
    return list(itertools.islice(batches, count))


@pytest.fixture
def experiment(clips, tmp_path):
    def make(files=clips, **train):
        (tmp_path / "train.txt").write_text("\n".join(files))
        (tmp_path / "test.txt").write_text(clips[0])
        lists = {"training_files": str(tmp_path / "train.txt"), "test_files": str(tmp_path / "test.txt")}
        sections = {
            "train_config": {"batch_size": 2, "num_workers": 0, **train},
            "data_config": {**lists, "segment_length": 2_048},
            "waveflow_config": {"res_channels": 8, "coupling_type": "waveflow"},
        }
        (tmp_path / "config.json").write_text(json.dumps(sections))
        return config_from_dict(sections)

    return make


def test_batches_are_the_same_for_any_number_of_workers_and_any_start(experiment):
    expected = first(make_train_loader(experiment()), 7)
    assert expected[0][0].shape == (2, 2_048) and expected[0][1].shape == (2, 80, 9)
    for workers, start in ((0, 4), (1, 0), (2, 0), (2, 5)):
        batches = first(make_train_loader(experiment(num_workers=workers), start), 7 - start)
        for batch, other in zip(batches, expected[start:], strict=True):
            assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_neither_reads_nor_moves_the_global_random_states(experiment, workers):
    torch.manual_seed(1)
    np.random.seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = first(make_train_loader(experiment(num_workers=workers)), 3)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(2)
    other = first(make_train_loader(experiment(num_workers=workers)), 3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_lost_during_training_is_named_in_one_line(experiment, tmp_path, workers):
    lost = [str(tmp_path / f"lost{i}.wav") for i in range(2)]
    for path in lost:
        write_wav(path, noise(3_000), RATE)
    loader = make_train_loader(experiment(lost, num_workers=workers))
    for path in lost:
        os.remove(path)
    with pytest.raises(InputError, match=r"\A\S*lost[01]\.wav: no such wav file\Z"):
        first(loader, 1)


def test_too_few_clips_and_uneven_shares_are_refused(experiment, clips):
    with pytest.raises(InputError, match=r"6 training clips are fewer than train_config\.batch_size 8"):
        make_train_loader(experiment(batch_size=8))
    with pytest.raises(InputError, match=r"train_config\.batch_size 4 cannot be shared evenly by 3"):
        make_train_loader(experiment(batch_size=4), world_size=3)


# --- the command line


def test_mels_of_wavs_are_saved_and_are_what_synthesis_takes(clips, experiment, tmp_path, capsys):
    experiment()
    (tmp_path / "more.txt").write_text(clips[1])
    arguments = ["mel", "-c", str(tmp_path / "config.json"), "--list", str(tmp_path / "more.txt")]
    assert data.main([*arguments, str(tmp_path / "mels"), clips[0]]) == 0
    assert sorted(os.listdir(tmp_path / "mels")) == ["clip0.npy", "clip1.npy"]
    for clip, name in zip(clips, ("clip0.npy", "clip1.npy"), strict=False):
        expected, _ = load_synthesis_entry(clip, SMALL, MelSpectrogram(SMALL))
        saved, _ = load_synthesis_entry(str(tmp_path / "mels" / name), SMALL, MelSpectrogram(SMALL))
        assert torch.equal(saved, expected)
    assert "2 mels" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["missing.wav"], []])
def test_a_bad_wav_or_none_is_one_line_on_stderr_and_nothing_is_written(clips, experiment, tmp_path, capsys, wrong):
    experiment()
    wavs = [clips[0], *wrong] if wrong else []
    assert data.main(["mel", "-c", str(tmp_path / "config.json"), str(tmp_path / "mels"), *wavs]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert ("missing.wav" if wrong else "no wavs given") in message
    assert not (tmp_path / "mels").exists()


@pytest.mark.parametrize("rescaled", [False, True])
def test_only_the_start_of_a_clip_is_read_where_no_more_is_needed(tmp_path, monkeypatch, rescaled):
    path = str(tmp_path / "long.wav")
    write_wav(path, noise(30_000), RATE)
    whole = read_wav(path, RATE)
    read = []
    monkeypatch.setattr(data, "read_wav", lambda *args, **kwargs: read.append(read_wav(*args, **kwargs)) or read[-1])
    _, audio, _ = ClipDataset([path], SMALL.replace(rescale=rescaled), max_length=4096)[0]
    torch.testing.assert_close(audio, (whole * 0.999 / whole.abs().max() if rescaled else whole)[:4096])
    assert [len(samples) for samples in read] == [30_000 if rescaled else 4096]  # the peak is the whole clip's
