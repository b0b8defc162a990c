"""TensorBoard of a run, read back: curves, flows, z, memory, and sounds of a few seconds."""

import io
import json
import wave

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from audio import read_wav
from config import load_config
from data import ClipDataset
from tests.support.experiments import RATE, losses, run, tone, write_config
from training import expected, loop
from training.expected import Corpus, write_curve
from vocoder import Vocoder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, corpus):
    """A run of 27 steps with a measured curve, its longest sample cut to 0.2 s: (folder, event accumulator)."""
    folder, patch = tmp_path_factory.mktemp("tensorboard"), pytest.MonkeyPatch()
    changes = {"train_config__with_tensorboard": True, "train_config__iters_per_checkpoint": 10}
    path = write_config(
        folder / "config.json", corpus, folder / "runs", **changes, waveflow_config__linear_prediction=4
    )
    config = load_config(path)
    lengths = ClipDataset(sorted((corpus / "train.txt").read_text().split()), config.data_config)
    samples = [len(read_wav(path, RATE)) for path in lengths.files]
    write_curve(folder / "curve-tones.csv", config, Corpus.of("tones", samples), [[0.5] * 25, [0.7] * 25], "command")
    patch.setattr(expected.expected_curve, "__defaults__", (folder,))
    patch.setattr(loop, "SAMPLE_SECONDS", 0.2)
    try:
        assert run("-c", path, "--max_iterations", 27) == 0
    finally:
        patch.undo()
    everything = dict.fromkeys(("scalars", "audio", "images", "histograms", "tensors"), 0)
    events = EventAccumulator(str(folder / "runs" / "tiny" / "tensorboard"), everything)
    return folder / "runs" / "tiny", events.Reload()


def scalars(events, name):
    return {event.step: event.value for event in events.Scalars(name)}


def test_flows_and_z_are_shown_at_each_checkpoint(recorded):
    _, events = recorded
    checkpoints = [0, 10, 20, 27]
    names = ("linear_prediction", "flow_0", "flow_1", "flow_2")
    shares = [scalars(events, f"log_det/{name}") for name in names]
    assert all(list(share) == checkpoints for share in shares)
    whole = scalars(events, "test/log_likelihood_log_det")
    for step in checkpoints:  # two test clips of equal length: the flows' shares are the whole
        assert sum(share[step] for share in shares) == pytest.approx(whole[step], abs=1e-4)
    assert not any(name == "log_s_std/linear_prediction" for name in events.Tags()["scalars"])
    assert scalars(events, "log_s_std/flow_0")[27] > 0
    prior, std, mean = (scalars(events, name) for name in ("test/log_likelihood_prior", "z/std", "z/mean"))
    for step in checkpoints:
        power = std[step] ** 2 + mean[step] ** 2
        assert -0.5 * power - 0.9189385 == pytest.approx(prior[step], abs=1e-3)
    assert {"z/skewness", "z/excess_kurtosis", "z/beyond"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Histograms("z")] == checkpoints
    assert events.Histograms("z")[-1].histogram_value.num == 2 * 2048


def test_speed_and_memory_are_shown(recorded):
    _, events = recorded
    assert len(scalars(events, "train/samples_per_second")) == 27
    memory = scalars(events, "memory_mib/resident")
    assert list(memory) == [0, 10, 20, 27] and 50 < memory[27] < 50_000


def test_recording_and_synthesis_are_heard_and_seen_and_short(recorded):
    folder, events = recorded
    frames = int(0.2 * RATE) // 256
    for name in ("recording", "synthesis"):
        sounds = events.Audio(f"audio/{name}")
        assert [sound.step for sound in sounds] == [10, 20, 27]
        with wave.open(io.BytesIO(sounds[-1].encoded_audio_string)) as file:
            assert (file.getnframes(), file.getframerate()) == (256 * frames, RATE)
        assert [picture.step for picture in events.Images(f"mel/{name}")] == [10, 20, 27]
    with wave.open(str(folder / "samples" / "waveflow_27.wav")) as file:
        assert file.getnframes() == 256 * frames
    one, other = (events.Audio(f"audio/{name}")[-1].encoded_audio_string for name in ("recording", "synthesis"))
    assert one != other


def test_the_expected_loss_lies_over_the_runs_own(recorded):
    _, events = recorded
    assert scalars(events, "expected/loss") == {25: pytest.approx(0.6)}
    [layout] = events.Tensors("custom_scalars__config__")
    found = Layout.FromString(layout.tensor_proto.string_val[0])
    charts = [list(chart.multiline.tag) for category in found.category for chart in category.chart]
    assert ["train/loss", "expected/loss"] in charts
    assert ["log_det/.*"] in charts


def test_the_record_knows_the_corpus_and_the_table_the_likelihood(recorded):
    folder, events = recorded
    record = json.loads((folder / "run_record.jsonl").read_text().splitlines()[0])
    assert record["training_clips"] == 6 and record["training_samples"] > 6 * 0.25 * RATE
    rows = [line.split(",") for line in (folder / "test_likelihood.csv").read_text().splitlines()]
    assert rows[0] == list(loop.LIKELIHOOD_COLUMNS)
    assert [(row[0], row[1], row[2]) for row in rows[1:]] == [(str(step), "test", "2") for step in (0, 10, 20, 27)]
    shown = scalars(events, "test/log_likelihood_mean")
    assert [float(row[3]) for row in rows[1:]] == pytest.approx(list(shown.values()), rel=1e-5)


def test_statistics_take_nothing_from_training(config, tmp_path):
    tables = []
    for shown in (False, True):
        place = str(tmp_path / str(shown))
        path = config(train_config__with_tensorboard=shown, train_config__output_directory=place)
        assert run("-c", path, "--max_iterations", 6) == 0
        tables.append(losses(tmp_path / str(shown) / "tiny"))
    assert tables[0] == tables[1]


def test_a_sample_is_at_most_five_seconds(config, tmp_path, corpus):
    long = tone(tmp_path / "long.wav", 7.0, 120)
    (tmp_path / "test.txt").write_text(f"{long}\n")
    path = config(data_config__test_files=str(tmp_path / "test.txt"))
    assert run("-c", path, "--max_iterations", 1) == 0
    sample = read_wav(tmp_path / "runs" / "tiny" / "samples" / "waveflow_1.wav", RATE)
    assert 4.9 * RATE < len(sample) <= 5 * RATE
    vocoder = Vocoder.from_pretrained(tmp_path / "runs" / "tiny", device="cpu")
    mel = vocoder.mel(read_wav(long, RATE, length=int(5 * RATE) // 256 * 256), RATE)
    torch.testing.assert_close(vocoder(mel, seed=1234), sample, atol=1e-3, rtol=0)
