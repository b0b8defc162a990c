import csv

import numpy as np
import pytest
import torch
from PIL import Image

from harness.log import RunLog, save_mel_figure


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path, tensorboard):
    first = RunLog(tmp_path, 0, tensorboard)
    first.steps([(step, float(step), 0, 0, 0, 0) for step in range(1, 6)])
    first.close()
    with open(tmp_path / "losses.csv", "a") as file:
        file.write("6,0.")  # the process died while writing
    second = RunLog(tmp_path, 3, tensorboard)
    second.steps([(4, 40.0, 0, 0, 0, 0)])
    second.close()
    rows = read_table(tmp_path / "losses.csv")
    assert [(row["iteration"], float(row["loss"])) for row in rows] == [("1", 1), ("2", 2), ("3", 3), ("4", 40)]


def test_mel_picture_shows_each_mel(tmp_path):
    path = tmp_path / "mels.png"
    mel = torch.linspace(-11, 1, 80).unsqueeze(1).expand(80, 40)
    save_mel_figure(path, {"recording": mel, "synthesis": mel.flip(0)})
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.shape[0] > 400
    assert picture.std() > 20
