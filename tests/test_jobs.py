"""What the jobs of train.py compute, checked against the same thing worked out from the pieces."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint as ckpt
import vocoder
from audio import MelSpectrogram, read_wav
from config import load_config
from data import ClipDataset, read_file_list
from evaluation.likelihood import clip_likelihoods
from fast.engine import SynthesisEngine
from harness.errors import InputError
from model import build_model
from modules import FlowLoss
from tests.support.experiments import assert_same_wavs, fails, losses, run, wavs
from tests.support.vocoders import random_vocoder
from tests.test_golden import GOLDEN, assert_near, golden_model, read
from training.trainer import Trainer

CPU = torch.device("cpu")


def setting(key, value):
    return ["--set", f"{key}={value}"]


def learning_rates(folder):
    with open(folder / "losses.csv", newline="") as file:
        return [float(row["learning_rate"]) for row in csv.DictReader(file)]


def final_weights(folder, iteration):
    return ckpt.load_checkpoint(folder / f"waveflow_{iteration}")["model"]


# --- training ---------------------------------------------------------------------------------------------


def test_the_trainer_follows_the_published_trajectory(config, tmp_path):
    data = read(GOLDEN / "training_nanoflow.npz")
    weights = golden_model(data).state_dict()
    start = ckpt.Checkpoint(path=Path("golden"), name="golden", iteration=0, weights=weights)
    sections = {f"waveflow_config__{k}": v for k, v in json.loads(str(data["waveflow_config"])).items()}
    path = config(train_config__learning_rate=1e-3, train_config__lr_decay_step=8, train_config__lr_decay_gamma=0.5,
                  **sections)  # fmt: skip
    trainer = Trainer(load_config(path), CPU, tmp_path / "run", start, warm=True)
    results = [trainer.step(data["audio"][step % 4], data["mel"][step % 4]) for step in range(20)]
    assert_near(torch.tensor([loss.item() for loss, *_ in results], dtype=torch.float64), data["losses"])
    norms = torch.tensor([norm.item() for *_, norm in results], dtype=torch.float64)
    torch.testing.assert_close(norms, data["grad_norms"], atol=1e-3, rtol=1e-3)
    for loss, prior, log_det, _ in results:
        assert_near(-(prior + log_det), loss)


@pytest.mark.parametrize("half", [False, True])
def test_resuming_keeps_the_learning_rate_schedule(config, tmp_path, half):
    schedule = {"train_config__lr_decay_step": 3, "train_config__fp16_run": half}
    assert run("-c", config(**schedule), "--max_iterations", 8) == 0
    whole = tmp_path / "runs" / "tiny"
    parts = config(**schedule, train_config__output_directory=str(tmp_path / "parts"))
    assert run("-c", parts, "--max_iterations", 4) == 0
    assert run("-c", parts, "--max_iterations", 8, "--resume", "latest") == 0
    resumed = tmp_path / "parts" / "tiny"
    assert learning_rates(resumed) == learning_rates(whole)
    assert learning_rates(whole) == pytest.approx([1e-3] * 3 + [5e-4] * 3 + [2.5e-4] * 2)
    assert losses(resumed) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(*(final_weights(f, 8).values() for f in (whole, resumed)),
                                                 strict=True))  # fmt: skip


def test_a_learning_rate_changed_between_runs_is_followed(trained, tmp_path):
    path, folder = trained
    changed = [*setting("train_config.learning_rate", 2e-4), *setting("train_config.lr_decay_step", 5)]
    assert run("-c", path, "--resume", "latest", "--max_iterations", 11, *changed) == 0
    assert learning_rates(folder)[8:] == pytest.approx([1e-4, 1e-4, 5e-5])  # decayed after steps 5 and 10


@pytest.mark.parametrize("change", [{"sigma": 0.5}, {"max_grad_norm": 1e-3}, {"fp16_run": True}, {"seed": 5}])
def test_settings_of_training_matter(config, tmp_path, change):
    runs = []
    for name, changes in (("plain", {}), ("changed", change)):
        path = config(train_config__output_directory=str(tmp_path / name),
                      **{f"train_config__{key}": value for key, value in changes.items()})  # fmt: skip
        assert run("-c", path, "--max_iterations", 3) == 0
        runs.append(losses(tmp_path / name / "tiny"))
    plain, changed = runs
    assert plain[-1] != changed[-1]


def test_training_after_averaging_starts_from_the_average(trained, tmp_path):
    path, folder = trained
    expected = ckpt.average_checkpoints([folder / "waveflow_8", folder / "waveflow_4"], 0.25)["model"]
    assert run("-c", path, "-a", 2, "-e", 0.25, "--max_iterations", 9, *setting("train_config.learning_rate", 1e-30),
               *setting("train_config.checkpoint_path", folder)) == 0  # fmt: skip
    written = ckpt.load_checkpoint(folder / "waveflow_8_average2_epsilon0.25")["model"]
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    for name, value in final_weights(folder, 9).items():
        torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=1e-6)


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_likelihood_of_a_clip_is_its_loss(config, sigma):
    experiment = load_config(config())
    clips = ClipDataset(read_file_list(experiment.data_config.test_files), experiment.data_config)
    model = random_vocoder()
    for result, (path, audio, mel) in zip(clip_likelihoods(model, clips, sigma, CPU), clips, strict=True):
        assert (result.clip, result.samples) == (path, len(read_wav(path, 22_050)) // 256 * 256)
        loss = FlowLoss(sigma)(model(audio.unsqueeze(0), mel.unsqueeze(0)))
        assert result.log_likelihood == pytest.approx(-loss.item(), abs=1e-5)
        assert result.prior + result.log_det == pytest.approx(result.log_likelihood)


# --- synthesis --------------------------------------------------------------------------------------------


def test_the_wav_is_the_inverse_of_seeded_noise(trained):
    path, folder = trained
    experiment = load_config(path)
    assert run("-c", path, "--synthesize", "-t", 0.8) == 0
    model = build_model(experiment.waveflow_config)
    ckpt.load_weights(model, ckpt.load_checkpoint(folder / "waveflow_8")["model"])
    for number, source in enumerate(read_file_list(experiment.data_config.test_files)):
        recording = read_wav(source, 22_050)
        mel = MelSpectrogram(experiment.data_config)(recording[: len(recording) // 256 * 256]).unsqueeze(0)
        torch.manual_seed(experiment.train_config.seed + number)
        expected = model.reverse(mel, z=model.sample_noise(mel, 0.8))[0].clamp(-1, 1)
        written = read_wav(folder / "synthesis" / "waveflow_8_temp0.8" / Path(source).name, 22_050)
        torch.testing.assert_close(written, expected, atol=1e-3, rtol=0)
        assert expected.abs().max() > 0.1

    assert run("-c", path, "--synthesize", "-t", 0) == 0
    still = read_wav(folder / "synthesis" / "waveflow_8_temp0" / Path(source).name, 22_050)
    assert (still - written).abs().max() > 0.05


def test_nothing_is_synthesized_where_a_later_entry_is_bad(trained, tmp_path, capsys):
    path, folder = trained
    np.save(tmp_path / "good.npy", np.zeros((80, 9), np.float32))
    np.save(tmp_path / "bad.npy", np.zeros((40, 9), np.float32))
    (tmp_path / "list.txt").write_text(f"{tmp_path}/good.npy\n{tmp_path}/bad.npy\n")
    message = fails(capsys, "-c", path, "-s", *setting("data_config.test_files", tmp_path / "list.txt"))
    assert "bad.npy" in message
    assert "80" in message
    assert not (folder / "synthesis").exists()


def test_a_synthesis_that_is_not_finite_is_not_written(trained, tmp_path, capsys):
    path, folder = trained
    checkpoint = torch.load(folder / "waveflow_8", weights_only=True)
    del checkpoint["digest"]
    for name in [name for name in checkpoint["model"] if name.endswith("proj_log_s_t.scale")]:
        checkpoint["model"][name].fill_(60.0)
    torch.save(checkpoint, tmp_path / "waveflow_8")
    message = fails(capsys, "-c", path, "-s", *setting("train_config.checkpoint_path", tmp_path / "waveflow_8"))
    assert "not finite" in message


@pytest.fixture
def mels(tmp_path):
    """A list of five mels of different lengths, 0.07 to 0.21 s; returns its path and the folder."""
    generator = torch.Generator().manual_seed(3)
    names = [f"mel{i}.npy" for i in range(5)]
    for name, frames in zip(names, (13, 7, 19, 7, 10), strict=True):
        np.save(tmp_path / name, (torch.randn(80, frames, generator=generator) - 5).numpy())
    (tmp_path / "mels.txt").write_text("\n".join(names))
    return tmp_path / "mels.txt", tmp_path


@pytest.fixture
def batches(monkeypatch):
    """The number of clips of each batch that the engine is given."""
    counts, synthesize_many = [], SynthesisEngine.synthesize_many

    def counted(engine, clips):
        counts.append(len(clips))
        return synthesize_many(engine, clips)

    monkeypatch.setattr(SynthesisEngine, "synthesize_many", counted)
    return counts


def test_clips_synthesized_at_once_sound_as_they_do_alone(trained, mels, batches, capsys):
    path, folder = trained
    job = ["-c", path, "-s", *setting("data_config.test_files", mels[0])]
    assert run(*job, "--batch_seconds", 0) == 0
    alone = wavs(folder)
    assert [len(alone[f"mel{i}"]) for i in range(5)] == [256 * n for n in (12, 6, 18, 6, 9)]
    assert all(audio.abs().max() > 3_000 for audio in alone.values())
    assert batches == [1, 1, 1, 1, 1]
    assert "batch" not in capsys.readouterr().out
    for limit, expected in (
        ([256 * 18 / 22_050], [2, 1, 2]),  # 12 + 6 frames fill it, and 18
        ([256 * 17 / 22_050], [1, 1, 1, 2]),  # the third clip is longer than that
        ([1000], [5]),
        ([], [5]),  # by default short clips are not alone
    ):
        batches.clear()
        assert run(*job, *(["--batch_seconds", *limit] if limit else [])) == 0
        assert batches == expected
        assert_same_wavs(wavs(folder), alone)


def test_the_time_of_a_batch_is_shared_out_by_samples(trained, mels, capsys, monkeypatch):
    path, _ = trained
    clock = iter(range(100))
    monkeypatch.setattr(vocoder, "time", SimpleNamespace(perf_counter=lambda: next(clock)))  # a batch takes a second
    job = ["-c", path, "-s", *setting("data_config.test_files", mels[0])]
    assert run(*job, "--batch_seconds", 0.21) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "x real time" in line]
    assert [line.split(":")[0] for line in lines] == [*(f"mel{i}.wav" for i in range(5)), "5 clip(s)"]
    seconds = [float(line.split(" in ")[1].split(" s")[0]) for line in lines]
    assert seconds == pytest.approx([12 / 18, 6 / 18, 1, 6 / 15, 9 / 15, 3], abs=0.006)
    shares = [line.partition(" (")[2] for line in lines]
    assert shares == [*2 * ["its share of a batch of 2)"], "", *2 * ["its share of a batch of 2)"], ""]


def spoil_one(trained, mels):
    """Make the third mel alone overflow, with weights that bring it there; returns the flags for them."""
    (_, folder), (_, sources) = trained, mels
    checkpoint = torch.load(folder / "waveflow_8", weights_only=True)
    del checkpoint["digest"]
    for name, weight in checkpoint["model"].items():
        if name.startswith("upsample_conv") and name.endswith("weight_g"):
            weight *= 100
    torch.save(checkpoint, sources / "waveflow_8")
    np.save(sources / "mel2.npy", 1e37 * np.sign(np.load(sources / "mel2.npy") + 5))
    return setting("train_config.checkpoint_path", sources / "waveflow_8")


def test_a_synthesis_that_is_not_finite_spares_its_neighbours(trained, mels, capsys):
    path, folder = trained
    start = spoil_one(trained, mels)
    job = ["-c", path, "-s", *start, *setting("data_config.test_files", mels[0])]
    message = fails(capsys, *job, "--batch_seconds", 0)
    assert "mel2.npy: the synthesis is not finite" in message
    before = wavs(folder)
    assert sorted(before) == ["mel0", "mel1"]  # as ever, the run stops there
    assert fails(capsys, *job, "--batch_seconds", 60) == message
    together = wavs(folder)
    assert sorted(together) == ["mel0", "mel1", "mel3", "mel4"]
    assert all(audio.abs().max() > 3_000 for audio in together.values())
    assert_same_wavs({name: together[name] for name in before}, before)


def test_clips_before_one_that_cannot_be_read_are_written(trained, mels, capsys, monkeypatch):
    path, folder = trained
    _, sources = mels
    load = vocoder.load_synthesis_entry

    def load_while_files_vanish(file, *others):
        (sources / "mel2.npy").unlink(missing_ok=True)  # after all were found fit
        return load(file, *others)

    monkeypatch.setattr(vocoder, "load_synthesis_entry", load_while_files_vanish)
    message = fails(capsys, "-c", path, "-s", *setting("data_config.test_files", mels[0]))
    assert "mel2.npy: no such mel file" in message
    assert sorted(wavs(folder)) == ["mel0", "mel1"]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([], 5, []),
        ([1, 2, 3], 6, [[1, 2, 3]]),
        ([1, 2, 3], 5, [[1, 2], [3]]),
        ([4, 1, 9, 1, 4], 5, [[4, 1], [9], [1, 4]]),
        ([9], 5, [[9]]),
        ([1, 9], 5, [[1], [9]]),
        ([1, 1], 0, [[1], [1]]),
    ],
)
def test_batches_are_consecutive_and_bounded(sizes, limit, expected):
    assert list(vocoder.in_batches(sizes, lambda size: size, limit)) == expected


def test_batches_take_no_more_than_the_next_item():
    taken = []
    batches = vocoder.in_batches((taken.append(n) or n for n in range(100)), lambda _: 1, 3)
    assert next(batches) == [0, 1, 2]
    assert taken == [0, 1, 2, 3]


def test_batches_hand_out_what_came_before_an_error():
    def items():
        yield from (1, 1, 1)
        raise InputError("no more")

    batches = vocoder.in_batches(items(), lambda size: size, 2)
    assert [next(batches), next(batches)] == [[1, 1], [1]]
    with pytest.raises(InputError, match="no more"):
        next(batches)


# --- where runs start -------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_configuration_is_refused(trained, capsys):
    path, folder = trained
    start = setting("train_config.checkpoint_path", folder / "waveflow_8")
    for key, value in (("waveflow_config.n_height", 16), ("waveflow_config.n_layer_per_cycle", 2),
                       ("data_config.use_dbmel", "true")):  # fmt: skip
        message = fails(capsys, "-c", path, "--evaluate", *start, *setting(key, value))
        assert key in message


def test_going_back_refuses_to_overwrite_what_came_later(trained, capsys):
    path, folder = trained
    before = (folder / "waveflow_8").read_bytes()
    back = setting("train_config.checkpoint_path", folder / "waveflow_4")
    assert "1 checkpoint(s) beyond iteration 4" in fails(capsys, "-c", path, *back, "--max_iterations", 8)
    assert (folder / "waveflow_8").read_bytes() == before
    assert run("-c", path, *setting("train_config.checkpoint_path", folder / "waveflow_8"), "--max_iterations", 9) == 0


def test_resuming_without_checkpoints_starts_where_the_config_says(trained, tmp_path):
    path, folder = trained
    start = setting("train_config.checkpoint_path", folder / "waveflow_4")
    elsewhere = setting("train_config.output_directory", tmp_path / "next")
    assert run("-c", path, "--resume", "latest", *start, *elsewhere, "--max_iterations", 6) == 0
    assert losses(tmp_path / "next" / "tiny") == losses(folder)[4:6]


def test_a_run_that_is_through_says_so(trained, capsys):
    path, folder = trained
    table = (folder / "losses.csv").read_bytes()
    assert run("-c", path, "--resume", "latest", "--max_iterations", 8) == 0
    assert "already at iteration 8" in capsys.readouterr().out
    assert (folder / "losses.csv").read_bytes() == table


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_iterations", "0"],
        ["-a", "0"],
        ["-t", "-1"],
        ["-e", "0.5"],
        ["--evaluate", "--synthesize"],
        ["--evaluate", "--precision", "float32"],
        ["--evaluate", "--batch_seconds", "5"],
        ["--batch_seconds", "0"],
        ["-s", "--batch_seconds", "-1"],
        ["-s", "--batch_seconds", "nan"],
        ["-s", "--batch_seconds", "inf"],
        ["-s", "--batch_seconds", "many"],
        ["-a", "2", "--resume", "latest"],
        ["-w", "--resume", "latest"],
        ["--max_hours", "nan"],
    ],
)
def test_flags_that_make_no_sense_are_refused(config, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        run("-c", config(), *flags)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_devices_that_are_not_supported_are_refused(config, capsys):
    assert "expected cpu, cuda or cuda:N" in fails(capsys, "-c", config(), "--device", "mps")
