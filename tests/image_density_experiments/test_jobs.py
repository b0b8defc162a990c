"""Jobs on trained models, as a user asks for them: samples, lines, distances, other people's images; and compare."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_density_experiments import jobs, sampling
from image_density_experiments.checkpoint import load_checkpoint
from image_density_experiments.datasets import Split
from image_density_experiments.evaluation import interpolate, reconstruct, spread_images
from tests.support.image_command import MODEL, begin, command, pictures, rows
from tests.support.image_models import random_model

ROOT = Path(__file__).parents[2]
RESULTS = "evaluation/glow_model_4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    return begin(place / "run", pictures(place / "images"), iterations=4)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    place = tmp_path_factory.mktemp("classes")
    images = pictures(place / "images", classes=("cat", "cow", "dog"))
    return begin(place / "run", images, "--y_condition", iterations=4)


@pytest.fixture
def shown_rows(monkeypatch):
    """What pictures were drawn: their rows by name, and their titles."""
    drawn = []
    for module in (jobs, sampling):
        save = module.save_image_rows
        monkeypatch.setattr(
            module,
            "save_image_rows",
            lambda path, rows, title, save=save: (drawn.append((rows, title)), save(path, rows, title)),
        )
    return drawn


# --- samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--temperatures", 0.5, 1], {"T = 0.5": 12, "T = 1": 12}),
        (["--temperatures", 0.5, 1, "--n_samples", 5], {"T = 0.5": 5, "T = 1": 5}),
        (["--temperatures", 0.5], {"1 ...": 12}),
        (["--temperatures", 0.5, "--n_samples", 27], {"1 ...": 12, "13 ...": 12, "25 ...": 3}),
    ],
)
def test_a_grid_of_samples_needs_no_dataset(folder, shown_rows, capsys, flags, sizes):
    images = folder.parent / "images"
    images.rename(folder.parent / "away")
    try:
        assert command("--saved_model", folder, "--sample", *flags) == 0
    finally:
        (folder.parent / "away").rename(images)
    [(drawn, title)] = shown_rows
    assert {name: len(row) for name, row in drawn.items()} == sizes and "glow, affine coupling" in title
    assert capsys.readouterr().out.count("T = ") == len([flag for flag in flags[1:3] if isinstance(flag, (int, float))])


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], {"cat": 12, "cow": 12, "dog": 12}),
        (["--n_samples", 7], {"cat": 3, "cow": 2, "dog": 2}),
        (["--class", "cow"], {"cow": 12}),
        (["--class", "dog", "--n_samples", 3], {"dog": 3}),
    ],
)
def test_samples_of_classes_are_named(classes, shown_rows, flags, sizes):
    assert command("--saved_model", classes, "--sample", *flags) == 0
    [(drawn, _)] = shown_rows
    assert {name: len(row) for name, row in drawn.items()} == sizes


def test_a_class_is_known_by_its_name(classes, folder, capsys):
    assert command("--saved_model", classes, "--sample", "--class", "horse") == 1
    assert "--class horse: unknown; there are cat, cow, dog" in capsys.readouterr().err
    assert command("--saved_model", folder, "--sample", "--class", "cat") == 1
    assert "--class cat: the model is not conditioned on classes" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 70])
def test_samples_as_files_for_other_tools(folder, n):
    options = ["--saved_model", folder, "--sample", "--n_samples", n, "--temperatures", 0.7]
    assert command(*options, "--save_as", "npz") == command(*options, "--save_as", "png") == 0
    with np.load(folder / RESULTS / "samples_T0.7.npz") as content:
        images = content["arr_0"]
    assert images.shape == (n, 8, 8, 3) and images.dtype == np.uint8
    files = sorted((folder / RESULTS / "samples_T0.7").iterdir())
    assert len(files) == n
    assert all(np.array_equal(np.array(Image.open(path)), image) for path, image in zip(files, images, strict=True))


# --- values that are not finite ---------------------------------------------------------------------------------


@pytest.fixture
def broken(folder, tmp_path):
    """A model whose inverse overflows for some latents, and whose likelihood does for all."""
    content = load_checkpoint(folder / "glow_model_4.pt")
    for name, value in content["model"].items():
        if name.endswith("conv.bias") and "learn_top" not in name:
            value.fill_(-3e38)  # infinities are refused when a file is read
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "glow_model_4.pt")
    return tmp_path / "run"


@pytest.mark.parametrize("job", ["--sample", "--interpolate", "--evaluate"])
def test_values_that_are_not_finite_are_grey_and_named_in_every_job(broken, shown_rows, capsys, job):
    assert command("--saved_model", broken, job) == 0
    error = capsys.readouterr().err
    assert "hold values that are not finite: grey in the picture" in error
    assert "not finite: grey)" in shown_rows[0][1]
    assert any(np.all(row[-1] == 128) for row in shown_rows[0][0].values())
    if job == "--evaluate":
        assert "2 of 2 images of folder images have no finite bits/dim" in error


def test_distances_of_values_that_are_not_finite_are_named(broken, tmp_path, capsys):
    other = pictures(tmp_path / "other", 7, seed=9)
    assert command("--saved_model", broken, "--ood", "folder", "--ood_dataroot", other) == 0
    assert "bits/dim: folder images none finite (2), folder other none finite (7)" in capsys.readouterr().out
    assert command("--saved_model", broken, "--fid", "latents") == 0
    assert "2 samples hold values that are not finite: grey and were compared so" in capsys.readouterr().err


# --- small test sets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 13, 40])
def test_no_image_is_shown_twice(n):
    model = random_model().eval()
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    split = Split(images)
    assert len({image.numpy().tobytes() for image in spread_images(model, split, 12)}) == min(n, 12)
    assert len(reconstruct(model, split, 12).originals) == min(n, 12)
    if n == 1:
        with pytest.raises(ValueError, match="1 test images: a line between two needs at least 2"):
            interpolate(model, split, 6, 5)
        return
    lines = interpolate(model, split, 6, 5)
    ends = torch.cat([lines[:, 0], lines[:, -1]])
    assert len(lines) == min(6, n // 2) and len({end.numpy().round(1).tobytes() for end in ends}) == len(ends)


# --- other images -----------------------------------------------------------------------------------------------


def test_all_images_of_another_folder_are_compared_by_name(folder, tmp_path, capsys):
    other = pictures(tmp_path / "strangers, all", 7, seed=9)
    assert command("--saved_model", folder, "--ood", "folder", "--ood_dataroot", other) == 0
    found = rows(folder / RESULTS / "ood_folder.csv")
    assert [row["image"] for row in found if row["dataset"] == "folder images"] == ["009.png", "019.png"]
    names = [row["image"] for row in found if row["dataset"] == "folder strangers, all"]
    assert sorted(names) == [f"00{number}.png" for number in range(7)]
    said = capsys.readouterr().out
    assert "folder images " in said and "folder strangers, all " in said and "AUROC" in said
    assert (folder / RESULTS / "ood_folder.png").read_bytes()[:4] == b"\x89PNG"


def test_folders_of_one_name_are_told_apart(folder, tmp_path, capsys):
    other = pictures(tmp_path / "images", 4, seed=9)
    assert command("--saved_model", folder, "--ood", "folder", "--ood_dataroot", other) == 0
    assert f"{other} " in capsys.readouterr().out


def test_pictures_of_other_sizes_take_the_form_of_the_runs(tmp_path):
    run = begin(tmp_path / "run", pictures(tmp_path / "a"), "--image_size", 8, "--channels", 1, iterations=4)
    other = pictures(tmp_path / "b", 5, size=(20, 31))
    assert command("--saved_model", run, "--ood", "folder", "--ood_dataroot", other) == 0
    assert len(rows(run / RESULTS / "ood_folder.csv")) == 7


@pytest.mark.parametrize("flags", [[], ["--ood_dataroot"]])
def test_the_own_images_are_no_others(folder, capsys, flags):
    place = [*flags, folder.parent / "images"] if flags else []
    assert command("--saved_model", folder, "--ood", "folder", *place) == 1
    assert "is the model's own dataset; name other images with --ood_dataroot" in capsys.readouterr().err


# --- distances --------------------------------------------------------------------------------------------------


def test_distances_by_the_flows_latents_and_by_a_network(folder, tmp_path, capsys):
    network = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 8, 8)), tmp_path / "net.pt")
    for source, words in (("latents", "the flow's own top latents"), (tmp_path / "net.pt", "the features of net.pt")):
        assert command("--saved_model", folder, "--fid", source, "--n_samples", 8) == 0
        said = capsys.readouterr()
        assert words in said.out and "2 test images and 8 samples" in said.out and "compare KID" in said.err
    [row] = rows(folder / RESULTS / "quality.csv")
    assert (row["temperature"], row["n_features"], row["n_test"], row["n_samples"]) == ("1.0", "12", "2", "8")
    assert float(row["fid"]) > 0


# --- compare ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_compare_runs_as_a_script(folder, tmp_path, inside):
    place = ROOT / "image_density_experiments"
    script, directory = ("compare.py", place) if inside else ("image_density_experiments/compare.py", ROOT)
    arguments = [str(folder), "--curves", str(tmp_path / "curves.png")]
    result = subprocess.run([sys.executable, script, *arguments], cwd=directory, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "glow" in result.stdout and (tmp_path / "curves.png").is_file()


def test_the_model_flags_of_a_job_must_agree(folder, capsys):
    assert command("--saved_model", folder, "--sample", *MODEL[:2]) == 0
    assert command("--saved_model", folder, "--sample", "--K", 2) == 1
    assert "--K 2: the checkpoint's model has 1" in capsys.readouterr().err
