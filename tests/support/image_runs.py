"""Made-up images, and the image subproject's real command on them in this process."""

import csv

import numpy as np

from image_density_experiments.train import main

SMALL = ["--model_type", "nanoflow", "--hidden_channels", "4", "--K", "2", "--L", "2", "--n_init_batches", "2"]
QUICK = ["--batch_size", "4", "--warmup", "2", "--n_workers", "0", "--no_cuda", "--temperatures", "0.5", "1"]


def write_images(path):
    """An array of 20 images of 8x8: 18 for training, 4 batches of 4 per epoch."""
    smooth = np.random.default_rng(0).integers(0, 200, (20, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)
    np.save(path, (smooth + np.random.default_rng(1).integers(0, 50, smooth.shape)).astype(np.uint8))
    return path


def run(images, folder, *arguments, model=SMALL):
    """The command on an array of images; returns the exit status."""
    data = ["--dataset", "folder", "--dataroot", str(images), "--output_dir", str(folder)]
    return main([*model, *QUICK, *data, *map(str, arguments)])


def rows(path):
    """A table's rows by column."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
