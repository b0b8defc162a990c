"""The image subproject's real command: train, resume, evaluate, sample; and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imsave

from image_density_experiments.checkpoint import load_checkpoint, to_published
from image_density_experiments.train import main
from tests.support.image_models import random_model
from tests.support.image_runs import QUICK, SMALL, rows, run, write_images

ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path):
    """An array of 20 images of 8x8: 18 for training, 4 batches per epoch."""
    return write_images(tmp_path / "images.npy")


def test_training_writes_curves_checkpoints_and_samples(images, tmp_path):
    assert run(images, tmp_path / "run", "--epochs", 2) == 0
    steps, epochs = rows(tmp_path / "run" / "losses.csv"), rows(tmp_path / "run" / "epochs.csv")
    assert [int(row["iteration"]) for row in steps] == list(range(1, 9))
    assert [float(row["learning_rate"]) for row in steps] == [2.5e-4] * 4 + [5e-4] * 4
    assert [int(row["iteration"]) for row in epochs] == [4, 8]
    train = np.mean([float(row["bits_per_dim"]) for row in steps[:4]])
    assert float(epochs[0]["train_bits_per_dim"]) == pytest.approx(train)
    assert sorted(path.name for path in (tmp_path / "run").glob("glow_model_*")) == [
        "glow_model_4.pt",
        "glow_model_8.pt",
    ]
    for epoch in (1, 2):
        assert (tmp_path / "run" / "samples" / f"epoch_{epoch:04d}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_run_stopped_within_an_epoch_goes_on_to_the_same_bits(images, tmp_path, n_workers):
    conditions = ["--n_workers", n_workers, "--max_grad_norm", 10]
    assert run(images, tmp_path / "whole", *conditions, "--max_iterations", 8) == 0
    assert run(images, tmp_path / "parts", *conditions, "--max_iterations", 6) == 0
    torch.manual_seed(99)  # whatever happened in between
    assert run(images, tmp_path / "parts", *conditions, "--max_iterations", 8, "--saved_model", tmp_path / "parts") == 0
    whole, parts = (load_checkpoint(tmp_path / name / "glow_model_8.pt") for name in ("whole", "parts"))
    assert whole["training_state"]["random_state"].equal(parts["training_state"]["random_state"])
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    for index, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts["optimizer"]["state"][index][name])), name
    for table in ("losses.csv", "epochs.csv"):
        one, other = rows(tmp_path / "whole" / table), rows(tmp_path / "parts" / table)
        for row in [*one, *other]:
            row.pop("images_per_second", None)
        assert one == other


@pytest.mark.parametrize("memory", ["--checkpoint_activations", "--reversible", "--amp"])
def test_options_of_memory_and_precision_train(images, tmp_path, memory):
    assert run(images, tmp_path / "run", memory, "--max_iterations", 3) == 0
    assert all(np.isfinite(float(row["bits_per_dim"])) for row in rows(tmp_path / "run" / "losses.csv"))


def test_only_the_newest_ten_checkpoints_stay(images, tmp_path):
    assert run(images, tmp_path / "run", "--epochs", 12, "--sample_every", 100) == 0
    found = sorted(int(path.stem.rpartition("_")[-1]) for path in (tmp_path / "run").glob("glow_model_*"))
    assert found == list(range(12, 52, 4))


def test_jobs_of_a_trained_model(images, tmp_path, capsys):
    run(images, tmp_path / "run", "--max_iterations", 2)
    other = tmp_path / "other.npz"
    np.savez(other, np.random.default_rng(2).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    results = tmp_path / "run" / "evaluation" / "glow_model_2"
    for job, output in (
        (["--evaluate"], "reconstructions.png"),
        (["--sample"], "samples.png"),
        (["--interpolate"], "interpolation.png"),
    ):
        # the architecture comes from the checkpoint
        assert run(images, tmp_path / "run", *job, model=[]) == 0
        assert (results / output).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "100.00 % of values restored exactly" in printed
    bits = [float(row["bits_per_dim"]) for row in rows(results / "bits_per_dim.csv")]
    assert f"{np.mean(bits):.4f} bits/dim over 2 test images" in printed


def test_out_of_distribution_histogram_and_auroc(tmp_path, capsys):
    folder = tmp_path / "run"
    patches = ["--dataset", "patches", "--output_dir", str(folder), "--batch_size", "16", "--eval_batch_size", "350"]
    quick = [*SMALL, *QUICK, *patches]
    assert main([*quick, "--max_iterations", "1"]) == 0
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    assert main([*quick, "--ood", "folder", "--ood_dataroot", str(tmp_path / "noise.npy")]) == 0
    assert "AUROC 1.0000" in capsys.readouterr().out  # noise is harder to compress than a photograph
    assert (folder / "evaluation" / "glow_model_1" / "ood_folder.png").read_bytes()[:4] == b"\x89PNG"


def test_images_of_another_size_are_no_second_dataset(images, tmp_path, capsys):
    run(images, tmp_path / "run", "--max_iterations", 1)
    assert run(images, tmp_path / "run", "--ood", "patches", model=[]) == 1
    assert "--ood patches: images of (32, 32, 3), the model takes (8, 8, 3)" in capsys.readouterr().err


def test_a_class_conditional_model_trains_goes_on_evaluates_and_samples(tmp_path):
    folder = tmp_path / "run"
    patches = ["--dataset", "patches", "--output_dir", str(folder), "--eval_batch_size", "350", "--batch_size", "16"]
    assert main([*SMALL, *QUICK, *patches, "--y_condition", "--y_weight", "0.5", "--max_iterations", "2"]) == 0
    assert all(float(row["class_loss"]) > 0 for row in rows(folder / "losses.csv"))
    assert main([*QUICK, *patches, "--saved_model", str(folder), "--max_iterations", "3"]) == 0
    weights = load_checkpoint(folder / "glow_model_3.pt")["model"]
    assert (
        weights["project_class.linear.weight"].abs().max() > 0 and weights["project_ycond.linear.weight"].size(1) == 2
    )
    for job in ("--evaluate", "--sample"):
        assert main([*QUICK, *patches, job]) == 0


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_image_damaged_behind_its_header_stops_the_run_by_name(tmp_path, capsys, n_workers):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate("abcdef"):
        imsave(folder / f"{name}.png", np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:150])
    assert run(folder, tmp_path / "run", "--max_iterations", 4, "--n_workers", n_workers) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "b.png: cannot be read as an image" in error


def test_a_damaged_newest_checkpoint_leaves_the_one_before(images, tmp_path, capsys):
    run(images, tmp_path / "run", "--epochs", 2)
    (tmp_path / "run" / "glow_model_8.pt").write_bytes(b"half a file")
    assert run(images, tmp_path / "run", "--saved_model", tmp_path / "run", "--max_iterations", 5) == 0
    assert "trying the one before" in capsys.readouterr().err
    assert rows(tmp_path / "run" / "losses.csv")[-1]["iteration"] == "5"


@pytest.mark.parametrize(("flag", "limit"), [("--max_grad_clip", 1e-4), ("--max_grad_norm", 1e-3)])
def test_gradients_are_clipped_before_the_step(images, tmp_path, flag, limit):
    run(images, tmp_path / "run", flag, limit, "--max_iterations", 1)
    state = load_checkpoint(tmp_path / "run" / "glow_model_1.pt")["optimizer"]["state"]
    # Adamax's first moment is a tenth of the gradient after one step; weight decay adds 5e-5 times the weight.
    largest = max(10 * moments["exp_avg"].abs().max() for moments in state.values())
    assert largest < limit + 5e-5 * 10


def test_a_published_model_and_optimizer_go_on(images, tmp_path):
    model = random_model("nanoflow", hidden_channels=4, K=2)
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-4, weight_decay=5e-5)
    model(torch.zeros(2, 3, 8, 8))[1].mean().backward()
    optimizer.step()
    published = {
        to_published(name, model.config): value
        for name, value in model.state_dict().items()
        if not name.endswith("initialised")
    }
    torch.save(published, tmp_path / "glow_model_1.pth")
    torch.save(optimizer.state_dict(), tmp_path / "glow_optimizer_1.pth")
    start = ["--saved_model", tmp_path / "glow_model_1.pth", "--saved_optimizer", tmp_path / "glow_optimizer_1.pth"]
    assert run(images, tmp_path / "run", *start, "--max_iterations", 5) == 0
    [row] = rows(tmp_path / "run" / "losses.csv")
    assert (row["iteration"], row["epoch"], float(row["learning_rate"])) == ("5", "2", 5e-4)  # warm-up is not repeated


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(images, tmp_path, capsys):
    run(images, tmp_path / "run", "--max_iterations", 2)
    checkpoint = load_checkpoint(tmp_path / "run" / "glow_model_2.pt")
    before = (tmp_path / "run" / "glow_model_2.pt").read_bytes()
    checkpoint["model"]["learn_top_fn.conv.bias"].fill_(3e38)  # finite, but not what comes of it
    torch.save(checkpoint, tmp_path / "broken.pt")
    assert run(images, tmp_path / "run", "--saved_model", tmp_path / "broken.pt", "--max_iterations", 19) == 1
    captured = capsys.readouterr()
    assert "warning: iteration 3: loss inf" in captured.out
    assert "not finite in 10 steps in a row, up to iteration 12; the checkpoints are intact: " in captured.err
    assert [path.name for path in (tmp_path / "run").glob("glow_model_*")] == ["glow_model_2.pt"]
    assert (tmp_path / "run" / "glow_model_2.pt").read_bytes() == before


def test_a_folder_that_is_not_empty_is_refused_and_only_a_run_is_removed(images, tmp_path, capsys):
    folder = tmp_path / "run"
    run(images, folder, "--max_iterations", 2)
    assert run(images, folder, "--max_iterations", 1) == 1
    assert "not empty; choose another" in capsys.readouterr().err
    assert run(images, folder, "--max_iterations", 1, "--fresh") == 0
    assert [path.name for path in folder.glob("glow_model_*")] == ["glow_model_1.pt"]
    (folder / "thesis.tex").write_text("years of work")
    assert run(images, folder, "--max_iterations", 1, "--fresh") == 1
    assert "'thesis.tex', which is not of a run" in capsys.readouterr().err
    assert (folder / "thesis.tex").exists() and (folder / "glow_model_1.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_type", "glowing"], "unknown; there are glow, glow_large, nanoflow_naive"),
        (["--dataset", "mnist"], "dataset 'mnist': unknown; there are patches, cifar10, svhn"),
        (["--flow_coupling", "cubic"], "flow_coupling: expected one of affine, additive, spline"),
        (["--L", "4"], "images of 8x8 cannot be halved 4 times"),
        (["--batch_size", "19"], "18 training images are fewer than --batch_size 19"),
        (["--y_condition"], "the model knows 10 classes, folder has no labels"),
        (["--saved_model", "nowhere.pt"], "checkpoint nowhere.pt: no such file"),
        (["--saved_optimizer", "some.pt"], "give --saved_model with it"),
        (["--dataset", "cifar10"], "fetch it with --download (170 MB)"),
        (["--sample"], "train first, or name a checkpoint"),
    ],
)
def test_bad_input_is_one_line(images, tmp_path, capsys, arguments, message):
    if arguments == ["--dataset", "cifar10"]:
        arguments += ["--dataroot", str(tmp_path)]
    assert run(images, tmp_path / "run", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_flags_that_contradict_the_checkpoint_are_refused(images, tmp_path, capsys):
    run(images, tmp_path / "run", "--max_iterations", 1)
    assert run(images, tmp_path / "run", "--saved_model", tmp_path / "run", "--K", 3) == 1
    assert "--K 3: the checkpoint's model has 2" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [True, False])
def test_the_script_runs_from_the_root_and_from_inside_its_folder(images, tmp_path, inside):
    folder = ROOT / "image_density_experiments"
    script, directory = ("train.py", folder) if inside else ("image_density_experiments/train.py", ROOT)
    data = ["--dataset", "folder", "--dataroot", images, "--output_dir", tmp_path / "run", "--max_iterations", "1"]
    command = [sys.executable, script, *SMALL, *QUICK, *map(str, data), "--n_workers", "1"]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hidden_channels"] == 4


def test_own_images_are_scaled_as_asked_and_other_datasets_refuse_it(images, tmp_path, capsys):
    form = ["--image_size", 4, "--channels", 1]
    assert run(images, tmp_path / "run", "--max_iterations", 1, *form) == 0
    assert load_checkpoint(tmp_path / "run" / "glow_model_1.pt")["config"]["image_shape"] == (4, 4, 1)
    assert main([*QUICK, "--image_size", "4", "--output_dir", str(tmp_path / "other")]) == 1
    assert "--image_size and --channels are for own images" in capsys.readouterr().err
