"""The expected loss: shown for runs of a measured config on a measured corpus, and for no other."""

from pathlib import Path

import pytest

from config import load_config
from experiments import curve as curves
from experiments.curve import curve_of_logs
from tests.support.experiments import run
from training import expected
from training.expected import Corpus, expected_curve, write_curve

LENGTHS = [1000, 2000]


@pytest.fixture
def measured(config, tmp_path):
    """A config, and a folder with its curve of two runs of 50 steps."""
    loaded = load_config(config())
    runs = [[1.0 - step / 100 + shift for step in range(1, 51)] for shift in (-0.1, 0.1)]
    write_curve(tmp_path / "curve-tones.csv", loaded, Corpus.of("tones", LENGTHS), runs, "command")
    return loaded, tmp_path


def test_a_run_is_placed_beside_the_curve(measured):
    loaded, folder = measured
    curve = expected_curve(loaded, LENGTHS, folder)
    assert curve.seeds == 2 and sorted(curve.points) == [25, 50]
    assert curve.points[50][0] == pytest.approx(1 - 0.38, abs=1e-3)
    losses = {step: 1.0 - step / 100 for step in range(1, 41)}
    standing = curve.standing(losses)
    assert standing.iteration == 25 and str(standing).endswith("as expected")
    worse = curve.standing({step: loss + 9 for step, loss in losses.items()})
    assert str(worse).endswith("worse than expected")
    assert curve.standing({step: losses[step] for step in range(5, 41)}) is None  # resumed within the window
    assert "0.87 at 25" in str(curve) or "at 50" in str(curve)


@pytest.mark.parametrize("name, clips, samples", [("demo", 92, 5_815_407), ("asterisk", 336, 27_070_897)])
def test_the_demos_config_has_a_curve_of_made_up_and_of_real_speech(name, clips, samples):
    demo = load_config(Path(__file__).parents[2] / "configs" / "demo.json")
    lengths = [samples // clips] * clips
    curve = expected_curve(demo, lengths)
    assert curve is not None and curve.corpus.name == name and max(curve.points) == 600
    assert expected_curve(demo, lengths[1:]) is None


def test_another_config_or_corpus_has_no_curve(measured, config):
    loaded, folder = measured
    assert expected_curve(load_config(config(waveflow_config__n_flow=2)), LENGTHS, folder) is None
    assert expected_curve(load_config(config(train_config__learning_rate=5.0)), LENGTHS, folder) is None
    assert expected_curve(load_config(config(waveflow_config__model_name="other")), LENGTHS, folder) is not None
    assert expected_curve(loaded, [*LENGTHS, 100], folder) is None
    assert expected_curve(loaded, [1005, 2010], folder) is not None  # half a percent longer


def test_a_crop_context_changes_the_loss_and_so_the_curve(config, tmp_path):
    plain = load_config(config(waveflow_config__linear_prediction=6))
    write_curve(tmp_path / "curve-tones.csv", plain, Corpus.of("tones", LENGTHS), [[1.0] * 50], "command")
    assert expected_curve(plain, LENGTHS, tmp_path) is not None
    context = load_config(config(waveflow_config__linear_prediction=6, train_config__crop_context=256))
    assert expected_curve(context, LENGTHS, tmp_path) is None


def test_train_says_once_that_negative_losses_are_right_and_how_the_run_stands(config, tmp_path, monkeypatch, capsys):
    path = config(train_config__iters_per_checkpoint=2)
    loaded = load_config(path)
    assert run("-c", path, "--max_iterations", 2) == 0
    out = capsys.readouterr().out
    assert out.count(expected.NEGATIVE_IS_RIGHT) == 1 and "expected loss" not in out
    monkeypatch.setattr(expected, "WINDOW", 2)
    monkeypatch.setattr(curves, "CURVES", tmp_path)
    folder = tmp_path / "corpus_name"
    folder.mkdir()
    for kind, name in (("train", "training_files"), ("test", "test_files")):
        (folder / f"{kind}_files.txt").write_text(Path(getattr(loaded.data_config, name)).read_text())
    monkeypatch.setattr(curves.Run, "config", lambda self: loaded)
    curve_of_logs(folder, [loaded.run_folder / "losses.csv"])
    monkeypatch.setattr(expected.expected_curve, "__defaults__", (tmp_path,))
    assert run("-c", path, "--max_iterations", 4, "--resume", "latest") == 0
    assert "expected loss of this config" not in capsys.readouterr().out  # said at the start of a run only
    again = config(train_config__iters_per_checkpoint=2, train_config__output_directory=str(tmp_path / "again"))
    assert run("-c", again, "--max_iterations", 2) == 0
    out = capsys.readouterr().out
    assert "expected loss of this config on this corpus (corpus_name)" in out
    assert "iteration 2: mean loss of 2 steps" in out and "as expected" in out
