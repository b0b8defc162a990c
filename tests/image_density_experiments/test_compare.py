"""Runs side by side: the table and the curves."""

import numpy as np

from image_density_experiments.compare import main
from image_density_experiments.model import build_model, count_parameters
from image_density_experiments.train import main as train

MODEL = ["--hidden_channels", "4", "--K", "2", "--L", "1", "--n_init_batches", "1", "--temperatures", "1"]
HOW = ["--batch_size", "4", "--epochs", "1", "--n_workers", "0", "--no_cuda", "--dataset", "folder"]


def test_runs_are_compared_by_parameters_and_bits(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8))
    for model_type in ("glow", "nanoflow"):
        place = ["--dataroot", str(tmp_path / "images.npy"), "--output_dir", str(tmp_path / model_type)]
        assert train(["--model_type", model_type, *MODEL, *HOW, *place]) == 0
    capsys.readouterr()
    picture = tmp_path / "curves.png"
    assert main([str(tmp_path / "glow"), str(tmp_path / "nanoflow"), "--curves", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, model_type in zip(lines[1:3], ("glow", "nanoflow"), strict=True):
        options = {"image_shape": (4, 4, 3), "hidden_channels": 4, "K": 2, "L": 1}
        assert f"{count_parameters(build_model(model_type=model_type, **options)):,}" in line
        test_bits = (tmp_path / model_type / "epochs.csv").read_text().splitlines()[1].split(",")[3]
        assert f"{float(test_bits):.4f}" in line
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"error: {tmp_path}: holds no run with a whole epoch" in capsys.readouterr().err
