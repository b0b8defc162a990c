"""Likelihood in tiles is that of the whole clip."""

import pytest
import torch

import evaluation.tiles as tiles
from config import DataConfig
from data import ClipDataset
from evaluation.likelihood import clip_likelihoods
from evaluation.tiles import likelihood_in_tiles
from fast.estimators import Execution
from tests.support.vocoders import random_input, random_vocoder


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("coupling_type", "changes"),
    [
        ("nanoflow", {}),
        ("waveflow", {"n_layer_per_cycle": 2, "bipartize": True}),
        ("waveflow_official", {"n_flow": 2}),
        ("nanoflow_decomp", {"transform": "spline"}),
        ("nanoflow", {"linear_prediction": 8}),
    ],
)
def test_tiles_give_what_the_whole_gives(coupling_type, changes, plain):
    model = random_vocoder(coupling_type, data_config=DataConfig(), **changes).eval()
    model.execution = Execution(plain=plain)
    audio, mel = random_input(model, frames=8)
    with torch.no_grad():
        z, log_det = model(audio, mel)
    for columns in (37, 64):
        tiled_z, tiled_log_det = likelihood_in_tiles(model, audio, mel, columns)
        torch.testing.assert_close(tiled_z, z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tiled_log_det / audio.size(1), log_det / audio.size(1), atol=1e-5, rtol=0)


def test_evaluation_of_a_long_clip_goes_in_tiles(corpus, monkeypatch):
    model, data = random_vocoder().eval(), DataConfig()
    clips = ClipDataset((corpus / "test.txt").read_text().split("\n"), data)
    whole = clip_likelihoods(model, clips, 1.0, torch.device("cpu"))
    widths = []
    monkeypatch.setattr(tiles, "COLUMNS", 100)
    forward = tiles._forward_of_tile
    monkeypatch.setattr(tiles, "_forward_of_tile", lambda *given: widths.append(given[2].size(3)) or forward(*given))
    tiled = clip_likelihoods(model, clips, 1.0, torch.device("cpu"))
    assert widths and max(widths) <= 100 + 2 * 7
    for one, other in zip(whole, tiled, strict=True):
        assert abs(one.log_likelihood - other.log_likelihood) < 1e-5
