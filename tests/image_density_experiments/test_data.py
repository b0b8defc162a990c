"""Quantisation, augmentation and batches of images."""

import numpy as np
import pytest
import torch

from image_density_experiments.data import augment, make_train_loader, quantise, to_pixels, training_images
from image_density_experiments.datasets import ImageData, Split

ALL_VALUES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)


@pytest.mark.parametrize("n_bits", [5, 8])
def test_quantisation_is_the_published_formula(n_bits):
    expected = np.floor(ALL_VALUES.astype(float) / 2 ** (8 - n_bits)) / 2**n_bits - 0.5
    x = quantise(ALL_VALUES, n_bits)
    assert x.shape == (1, 3, 16, 16)
    assert np.array_equal(x.numpy(), expected.transpose(0, 3, 1, 2).astype(np.float32))


def test_pixels_undo_quantisation_whatever_the_dequantisation_noise():
    x = quantise(ALL_VALUES, 8)
    for noise in (0, 0.999 / 256):
        assert np.array_equal(to_pixels(x + noise, 8), ALL_VALUES)
    five = to_pixels(quantise(ALL_VALUES, 5), 5)
    assert (five.min(), five.max()) == (0, 255)
    assert to_pixels(torch.tensor([[[-3.0]], [[0.0]], [[3.0]]]), 8).tolist() == [[[0, 128, 255]]]


def test_shifts_move_by_at_most_a_tenth_and_leave_black():
    image = np.full((20, 20, 3), 7, np.uint8)
    shifts = set()
    for seed in range(60):
        result = augment(image, np.random.default_rng(seed), shift=True, flip=False)
        kept = result[:, :, 0] == 7
        assert set(np.unique(result)) <= {0, 7}
        shifts.add((int(20 - kept.any(1).sum()), int(20 - kept.any(0).sum())))
    assert {down for down, _ in shifts} == {right for _, right in shifts} == {0, 1, 2}


def test_half_of_the_images_are_mirrored():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    results = [augment(image, np.random.default_rng(seed), shift=False, flip=True) for seed in range(200)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert all(np.array_equal(result, image) or np.array_equal(result, image[:, ::-1]) for result in results)
    assert 70 < mirrored < 130


def batches(n, augmented=True, **changes):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    data = ImageData(Split(images, np.arange(10)), Split(images), shift=True, flip=True)
    loader = make_train_loader(
        training_images(data, n_bits=8, seed=1, augmented=augmented), **{"batch_size": 4, "n_workers": 0, **changes}
    )
    return [batch for batch, _ in zip(loader, range(n), strict=False)]


@pytest.mark.parametrize("changes", [{"n_workers": 2}, {"start_batch": 3}])
def test_batches_depend_neither_on_workers_nor_on_where_the_run_resumed(changes):
    expected = batches(6)[changes.get("start_batch", 0) :]
    for (x, y), (other_x, other_y) in zip(expected, batches(len(expected), **changes), strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_images_are_augmented_anew_every_epoch_and_only_if_asked():
    distinct = {augmented: set() for augmented in (True, False)}
    for augmented, found in distinct.items():
        for x, labels in batches(40, augmented=augmented):
            found |= {(int(label), image.numpy().tobytes()) for image, label in zip(x, labels, strict=True)}
    assert len(distinct[False]) == 10
    assert len(distinct[True]) > 30
