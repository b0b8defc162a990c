"""Training on mels that an acoustic model predicted: lists of recordings with their mels."""

import math

import numpy as np
import pytest
import torch

from audio import MelSpectrogram, read_wav, write_mel, write_wav
from config import DataConfig
from data import ClipDataset, CropDataset, read_paired_mels
from harness.errors import InputError
from tests.support.experiments import RATE, fails, run

DATA = DataConfig(segment_length=2_048)
LENGTHS = (6_100, 4_096, 900)


@pytest.fixture
def pairs(tmp_path):
    """Recordings, each with a mel that is its own, and so recognised, but for a constant."""
    mels = {}
    for number, length in enumerate(LENGTHS):
        path, sound = tmp_path / f"{number}.wav", 0.1 * torch.randn(length)
        write_wav(path, sound, RATE)
        mels[str(path)] = str(tmp_path / f"{number}.npy")
        write_mel(mels[str(path)], MelSpectrogram(DATA)(read_wav(path, RATE)) + 1)
    return mels


def write_list(path, pairs):
    path.write_text("".join(f"{wav}|{mel}\n" for wav, mel in pairs.items()))
    return str(path)


def test_crops_are_cut_from_both_at_the_same_frame(pairs):
    dataset = CropDataset(list(pairs), DATA, 0, pairs)
    assert dataset.trimmed == 0
    for index, (wav, mel_path) in enumerate(pairs.items()):
        clip = torch.nn.functional.pad(read_wav(wav, RATE), (0, 2_048))
        whole, starts = torch.from_numpy(np.load(mel_path)), set()
        for epoch in range(150):
            audio, mel = dataset[epoch, index]
            assert audio.shape == (2_048,) and mel.shape == (80, 9)
            [start] = (clip.unfold(0, 2_048, 1)[: len(clip) - 2_047] == audio).all(dim=1).nonzero()[:1, 0].tolist()
            assert start % 256 == 0
            part = whole[:, start // 256 : start // 256 + 9]
            assert torch.equal(mel[:, : part.size(1)], part)
            assert (mel[:, part.size(1) :] == math.log(1e-5)).all()
            starts.add(start // 256)
        assert starts == set(range(max(0, LENGTHS[index] // 256 * 256 - 2_048) // 256 + 1))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_frame_more_or_less_is_trimmed(pairs, change):
    for path in pairs.values():
        mel = np.load(path)
        np.save(path, mel[:, :-1] if change < 0 else np.concatenate([mel, mel[:, :1]], axis=1))
    assert CropDataset(list(pairs), DATA, 0, pairs).trimmed == 3
    for (_, audio, mel), length in zip(ClipDataset(list(pairs), DATA, mels=pairs), LENGTHS, strict=True):
        assert mel.size(1) == length // 256 + min(1, 1 + change)
        assert len(audio) == 256 * (mel.size(1) - 1)


def test_a_mel_of_another_clip_is_refused(pairs, tmp_path):
    first, second, _ = pairs
    for make in (
        lambda mels: CropDataset([first], DATA, 0, mels),
        lambda mels: ClipDataset([first], DATA, mels=mels),
    ):
        with pytest.raises(InputError, match=r"1\.npy: 17 frames, 24 expected for the 6100 samples of .*0\.wav"):
            make({first: pairs[second]})
    path = tmp_path / "some.txt"
    path.write_text(f"{first}|{pairs[first]}\n{second}\n")
    with pytest.raises(InputError, match=r"some\.txt: 1 of 2 lines name no mel"):
        read_paired_mels([path])


def test_a_run_on_predicted_mels(config, pairs, tmp_path, capsys):
    lists = {f"data_config__{name}_files": write_list(tmp_path / f"{name}.txt", pairs) for name in ("training", "test")}
    path = config(**lists)
    assert run("-c", path, "--max_iterations", 2) == 0
    assert run("-c", path, "--evaluate") == 0
    assert run("-c", path, "--synthesize") == 0
    assert sorted(wav.stem for wav in (tmp_path / "runs").rglob("synthesis/*/*.wav")) == ["0", "1", "2"]
    assert "log-likelihood" in capsys.readouterr().out
    (tmp_path / "training.txt").write_text(f"{next(iter(pairs))}|{tmp_path / 'none.npy'}\n" * 2)
    assert "none.npy: no such mel file" in fails(capsys, "-c", path, "--resume", "latest", "--max_iterations", 3)
