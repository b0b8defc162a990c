import csv

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.distance import log_mel_distance, noise_like
from evaluation.likelihood import ClipLikelihood, summarise, write_likelihoods
from evaluation.metrics import ClipMetrics, write_metrics
from evaluation.pictures import save_mel_figure

CLIPS = [ClipLikelihood("a.wav", 100, 4.0, -1.0, 5.0), ClipLikelihood("b.wav", 300, 2.0, -1.5, 3.5)]


def test_mean_over_clips_and_mean_over_samples():
    result = summarise(CLIPS)
    assert (result.n_clips, result.mean, result.weighted) == (2, 3.0, 2.5)
    assert (result.prior, result.log_det) == (-1.25, 4.25)
    assert "3.0000 nats/sample" in str(result)


def test_likelihood_table_has_a_row_per_clip(tmp_path):
    write_likelihoods(tmp_path / "deep" / "table.csv", CLIPS)
    with open(tmp_path / "deep" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == ["a.wav", "b.wav"]
    assert float(rows[1]["log_likelihood"]) == 2.0


def test_log_mel_distance_is_over_common_frames():
    reference = torch.zeros(80, 10)
    assert log_mel_distance(torch.full((80, 8), -2.0), reference) == 2.0


def test_comparison_noise_has_the_power_of_the_recording():
    recording = 0.1 * torch.sin(torch.arange(20_000) / 10)
    assert noise_like(recording).square().mean().item() == pytest.approx(recording.square().mean().item(), rel=0.05)


def test_mel_picture_shows_each_mel(tmp_path):
    path = tmp_path / "mels.png"
    mel = torch.linspace(-11, 1, 80).unsqueeze(1).expand(80, 40)
    save_mel_figure(path, {"recording": mel, "synthesis": mel.flip(0)})
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[0] > 400
    assert picture.std() > 20


@pytest.mark.parametrize("name", ["a.wav", "ü.wav", "w\udcff.wav", 'a,"b\n.wav'])
def test_tables_hold_any_name(name, tmp_path):
    write_likelihoods(tmp_path / "one.csv", [ClipLikelihood(name, 9, 1.5, 1.0, 0.5)])
    write_metrics(tmp_path / "two.csv", [ClipMetrics(name, name, {"log_mel": 0.5})])
    for table, columns in (("one.csv", ["clip"]), ("two.csv", ["system", "clip"])):
        with open(tmp_path / table, newline="", encoding="utf-8") as file:
            [row] = csv.DictReader(file)
        assert [row[column] for column in columns] == [name.replace("\udcff", "\\udcff")] * len(columns)
