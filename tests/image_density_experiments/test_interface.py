"""The three lines from Python: likelihood, samples, latents of a trained model, as the command gives them."""

import math

import numpy as np
import pytest
import torch

from harness.errors import InputError
from image_density_experiments.checkpoint import load_checkpoint
from image_density_experiments.interface import ImageDensity
from image_density_experiments.pictures import ImageForm, read_picture
from tests.support.image_command import begin, command, pictures, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    return begin(place / "run", pictures(place / "images"), iterations=4)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    place = tmp_path_factory.mktemp("classes")
    images = pictures(place / "images", classes=("cat", "dog"))
    return ImageDensity.from_pretrained(
        begin(place / "run", images, "--y_condition", "--channels", 1, iterations=4), "cpu"
    )


def test_bits_are_those_of_the_command(run):
    assert command("--saved_model", run, "--evaluate") == 0
    table = rows(run / "evaluation" / "glow_model_4" / "bits_per_dim.csv")
    images = [read_picture(run.parent / "images" / row["image"], ImageForm()) for row in table]
    density = ImageDensity.from_pretrained(run, "cpu")
    bits = density.bits_per_dim(images)
    assert bits == pytest.approx([float(row["bits_per_dim"]) for row in table], abs=1e-5)
    assert density.log_likelihood(images) == pytest.approx(-bits * math.log(2) * 8 * 8 * 3)
    assert density.bits_per_dim(images[0])[0] == pytest.approx(bits[0], abs=1e-5)  # one image is a batch of one


@pytest.mark.parametrize("path", ["", "glow_model_4.pt"])
def test_decode_undoes_encode(run, path):
    density = ImageDensity.from_pretrained(run / path, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, *density.shape), dtype=np.uint8)
    latents = density.encode(images)
    assert np.array_equal(density.decode(latents), images) and len(latents) == density.model.config.L


def test_samples_repeat_and_cool_down(run):
    density = ImageDensity.from_pretrained(run, "cpu")
    one, other = density.sample(5, temperature=0.7, seed=1), density.sample(5, temperature=0.7, seed=1)
    assert one.shape == (5, 8, 8, 3) and one.dtype == np.uint8 and np.array_equal(one, other)
    cold = density.sample(4, temperature=0)
    assert np.array_equal(cold[0], cold[3]) and not np.array_equal(one[0], one[1])
    _, counts = density.sample(5, with_counts=True)
    assert counts.n_drawn == 5 + counts.n_rejected


def test_classes_by_name_or_number(conditional):
    assert conditional.classes == ("cat", "dog") and conditional.shape == (8, 8, 1)
    by_name, by_number = conditional.sample(3, 0.5, labels="dog"), conditional.sample(3, 0.5, labels=[1, 1, 1])
    assert np.array_equal(by_name, by_number)
    grey = np.zeros((2, 8, 8), np.uint8)
    bits = conditional.bits_per_dim(grey, labels=["cat", "dog"])
    assert bits.shape == (2,) and np.isfinite(bits).all()


def test_published_weights_need_their_architecture(run, tmp_path):
    content = load_checkpoint(run / "glow_model_4.pt")
    torch.save(content["model"], tmp_path / "published.pt")
    config = {name: content["config"][name] for name in ("model_type", "image_shape", "hidden_channels", "K", "L")}
    density = ImageDensity.from_pretrained(tmp_path / "published.pt", "cpu", **config)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    assert density.bits_per_dim(images) == pytest.approx(ImageDensity.from_pretrained(run, "cpu").bits_per_dim(images))


WRONG = {
    "another size": (lambda d: d.bits_per_dim(np.zeros((1, 4, 4, 3), np.uint8)), r"expected uint8 \[N, 8, 8, 3\]"),
    "floats": (lambda d: d.encode(np.zeros((1, 8, 8, 3))), "of float64: expected uint8"),
    "none": (lambda d: d.bits_per_dim(np.zeros((0, 8, 8, 3), np.uint8)), "expected uint8"),
    "no samples": (lambda d: d.sample(0), "expected at least 1"),
    "a negative temperature": (lambda d: d.sample(1, temperature=-1), "at 0 or more"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line(run, what):
    call, words = WRONG[what]
    with pytest.raises(InputError, match=words):
        call(ImageDensity.from_pretrained(run, "cpu"))


@pytest.mark.parametrize("labels", [None, ["cat"], ["cat", "cow"], [0, 2], [0, -1]])
def test_a_conditional_model_asks_for_its_classes(conditional, labels):
    with pytest.raises(InputError, match=r"conditioned on classes|expected classes 0 to 1, or cat, dog"):
        conditional.bits_per_dim(np.zeros((2, 8, 8, 1), np.uint8), labels)
