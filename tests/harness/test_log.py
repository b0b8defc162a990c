import csv
import tracemalloc

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


@pytest.mark.parametrize("thing", ["file", "link to a file", "link to nothing"])
def test_something_else_in_tensorboards_place_is_said_once(tmp_path, capsys, thing):
    if thing == "file":
        (tmp_path / "tensorboard").touch()
    else:
        (tmp_path / "own").write_text("mine" * (thing == "link to a file"))
        (tmp_path / "tensorboard").symlink_to("own" if thing == "link to a file" else "own/below")
    log = RunLog(tmp_path, 0, COLUMNS, tensorboard=True)
    for step in range(1, 6):
        log.steps([(step, float(step), 0, 0, 0, 0)])
    log.close()
    said = capsys.readouterr()
    assert said.err.count("TensorBoard gets no more") == 1 and "the disk takes" not in said.out + said.err
    assert len(read_table(tmp_path / "losses.csv")) == 5


@pytest.mark.parametrize("filling", [b"\n", b"\0", b"9", b"1,2\n", b"99999,0,0,0,0,0\n", b"\xff\xfe\n"])
def test_a_table_of_any_content_is_taken_up_in_little_memory(tmp_path, filling):
    head = b"".join(b"%d,%d.5,0,0,0,0\n" % (step, step) for step in range(1, 4))
    names = ",".join(COLUMNS).encode() + b"\n"
    (tmp_path / "losses.csv").write_bytes(names + head + filling * (2**24 // len(filling)) + b"\n4,0,0,0,0,0\n5,0,0,0")
    tracemalloc.start()
    RunLog(tmp_path, 3, COLUMNS).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "losses.csv").read_bytes() == names + head
    # The list of a block's lines; of nothing but line ends, pointers to one empty one.
    assert peak < 2**26


def test_a_folder_in_the_tables_place_is_an_error_and_no_new_table(tmp_path, capsys):
    (tmp_path / "losses.csv").mkdir()
    with pytest.raises(OSError, match="directory") as error:
        RunLog(tmp_path, 3, COLUMNS)
    assert error.value.filename == str(tmp_path / "losses.csv")
    assert "begins anew" not in capsys.readouterr().err
