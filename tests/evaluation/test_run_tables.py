"""Tables of a run: nothing of a long one is skipped, and a damaged one gives what can be read."""

import math
import tracemalloc

import numpy as np
import pytest

from evaluation.run_tables import KEPT, MAX_BINS, NEWEST, read_curves, read_evaluation, read_likelihood_curves
from harness.files import RefusedFile

COLUMNS = ("loss", "grad_norm")


def write(path, rows):
    path.write_text("iteration,loss,prior,grad_norm\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


def test_a_short_table_is_itself(tmp_path):
    curves = read_curves(write(tmp_path / "t.csv", [(i, -i, 0, i * i) for i in range(1, 8)]), COLUMNS)
    assert (curves.width, curves.rows, curves.last, curves.unreadable, curves.not_finite) == (1, 7, 7, 0, 0)
    assert curves.series["loss"].x.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert curves.series["grad_norm"].mean.tolist() == [1, 4, 9, 16, 25, 36, 49]
    assert curves.kept == {i: -i for i in range(1, 8)} and curves.newest == -4
    assert curves.series["loss"].smooth(3).tolist() == [-1.5, -2, -3, -4, -5, -6, -6.5]


def test_of_a_long_table_every_row_counts_in_bounded_memory(tmp_path):
    rows = 300_000
    losses = np.random.default_rng(0).normal(size=rows)
    losses[123_456], losses[200_001] = 77.0, -88.0  # a single step each
    path = write(tmp_path / "t.csv", zip(range(1, rows + 1), losses, losses, losses, strict=True))
    tracemalloc.start()
    curves = read_curves(path, COLUMNS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    series = curves.series["loss"]
    assert peak < path.stat().st_size / 2 and MAX_BINS / 2 < len(series.x) <= MAX_BINS
    assert series.high.max() == 77 and series.low.min() == -88
    assert series.count.sum() == rows and curves.width == 1024
    assert np.average(series.mean, weights=series.count) == pytest.approx(losses.mean(), abs=1e-9)
    assert series.mean[3] == pytest.approx(losses[3 * 1024 : 4 * 1024].mean())
    assert curves.newest == pytest.approx(losses[-NEWEST:].mean()) and len(curves.kept) == KEPT


def test_steps_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    rows = [(1, 2, 0, 1), (2, "nan", 0, 1), (3, "inf", 0, "1e300"), (4, 4, 0, 1)]
    curves = read_curves(write(tmp_path / "t.csv", rows), COLUMNS)
    assert curves.not_finite == 2 and curves.unreadable == 0
    assert curves.series["loss"].x.tolist() == [1, 4] and curves.series["grad_norm"].x.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    "damage", ["\x00\x00\x00", "7,abc,0,0", "7", "1e400,1,1,1", "-3,1,1,1", "2.5,1,1,1", "x" * 200_000]
)
def test_rows_that_cannot_be_read_are_left_out(tmp_path, damage):
    path = write(tmp_path / "t.csv", [(i, 5, 0, 1) for i in range(1, 5)])
    path.write_text(path.read_text() + f"{damage}\n5,5,0,1\n")
    curves = read_curves(path, COLUMNS)
    assert curves.unreadable == 1 and curves.rows == 5 and curves.last == 5


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    path = write(tmp_path / "t.csv", [(1, 5, 0, 1)])
    path.write_text(path.read_text() + "2,5,0,1")
    curves = read_curves(path, COLUMNS)
    assert (curves.rows, curves.unreadable) == (1, 0)
    assert read_curves(write(tmp_path / "t.csv", []), COLUMNS).rows == 0


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n", b"iteration,other\n1,2\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(RefusedFile, match="expected iteration,loss,grad_norm"):
        read_curves(tmp_path / "t.csv", COLUMNS)


def test_likelihoods_by_list(tmp_path):
    path = tmp_path / "test_likelihood.csv"
    path.write_text("iteration,list,clips,log_likelihood\n0,a,3,4.5\n0,b,2,1\n10,a,3,4.75\n10,b,2,oops\n20,a")
    found = read_likelihood_curves(path)
    assert {name: points.tolist() for name, points in found.items()} == {"a": [[0, 4.5], [10, 4.75]], "b": [[0, 1]]}
    path.write_text("iteration,list\n0,a\n")
    with pytest.raises(RefusedFile, match="no column log_likelihood"):
        read_likelihood_curves(path)


def test_evaluations_with_and_without_systems(tmp_path):
    path = tmp_path / "waveflow_8.csv"
    path.write_text("clip,samples,log_likelihood,prior,log_det\na,100,4,-1,5\nb,300,5,-1,6\n")
    found = read_evaluation(path)
    assert found.clips == 2 and found.systems["waveflow_8"]["log_likelihood"].value == 4.5
    assert list(found.systems["waveflow_8"]) == ["log_likelihood", "prior", "log_det"]
    path.write_text("system,clip,stoi\none,a,0.5\none,b,nan\ntwo,a,0.75\ntwo,b,0.25\n")
    found = read_evaluation(path)
    assert [found.systems[name]["stoi"].value for name in ("one", "two")] == [0.5, 0.5]
    assert math.isnan(found.systems["one"]["stoi"].half)
    path.write_text("clip\n\n")
    with pytest.raises(RefusedFile, match="no clip"):
        read_evaluation(path)
