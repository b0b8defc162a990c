"""Folders of pictures that tests make, and the image command on them: small, quick, on the CPU."""

import csv

import numpy as np
from PIL import Image

from image_density_experiments.train import main

MODEL = ["--model_type", "glow", "--hidden_channels", "4", "--K", "1", "--L", "1", "--n_init_batches", "1"]
QUICK = ["--n_workers", "0", "--no_cuda", "--temperatures", "1", "--sample_every", "100"]


def pictures(folder, n=20, size=(8, 8), seed=0, classes=("",)):
    """A folder of n different pictures, of each class."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(n):
            smooth = random.integers(60, 200, (2, 2, 3), dtype=np.uint8)
            image = Image.fromarray(smooth).resize(size[::-1], Image.Resampling.BILINEAR)
            noisy = np.array(image) + random.integers(0, 20, (*size, 3), dtype=np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{index:03}.png")
    return folder


def command(*arguments):
    return main([*QUICK, *map(str, arguments)])


def begin(folder, images, *arguments, iterations=2, size=4):
    data = ["--dataset", "folder", "--dataroot", images, "--batch_size", size]
    assert command(*MODEL, *data, "--output_dir", folder, "--max_iterations", iterations, *arguments) == 0
    return folder


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
