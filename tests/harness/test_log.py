import csv

import pytest

from harness.log import RunLog

COLUMNS = ("iteration", "loss", "prior", "log_det", "grad_norm", "learning_rate")


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path, tensorboard):
    first = RunLog(tmp_path, 0, COLUMNS, tensorboard)
    first.steps([(step, float(step), 0, 0, 0, 0) for step in range(1, 6)])
    first.close()
    with open(tmp_path / "losses.csv", "a") as file:
        file.write("6,0.")  # the process died while writing
    second = RunLog(tmp_path, 3, COLUMNS, tensorboard)
    second.steps([(4, 40.0, 0, 0, 0, 0)])
    second.close()
    rows = read_table(tmp_path / "losses.csv")
    assert [(row["iteration"], float(row["loss"])) for row in rows] == [("1", 1), ("2", 2), ("3", 3), ("4", 40)]
