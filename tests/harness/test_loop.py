"""loop.py with a model of one number: when it reads back, judges, saves, speaks and stops."""

import csv
import errno
import itertools
import math
import os
import re
import signal
import time

import pytest
import torch

from harness import loop
from harness.bad_steps import BadSteps
from harness.errors import InputError, Remedies
from harness.log import RunLog
from harness.stopping import StopRequest

REMEDIES = Remedies(resume="", weights_only="", bad_steps="think again", worker_died="")


class Number:
    """A model whose loss at step n is n, or nan where told so."""

    def __init__(self, folder, bad=()):
        self.folder, self.bad = folder, bad
        self.device, self.iteration, self.learning_rate = torch.device("cpu"), 0, 0.1
        self.loader = ((number,) for number in itertools.count())
        self.bad_steps = BadSteps(3, lambda step: [f"item {step}"], lambda: REMEDIES.bad_steps)
        self.saved, self.pruned, self.full, self.diverged = [], [], False, math.inf

    def step(self, _):
        self.iteration += 1
        loss = math.nan if self.iteration in self.bad else float(self.iteration)
        return torch.tensor(loss), torch.tensor(1.0)

    def spoilt(self):
        return "the number" if self.iteration >= self.diverged else None

    def save(self):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.saved.append(self.iteration)
        return self.folder / str(self.iteration)

    def prune(self, newest):
        self.pruned.append(newest.name)


class NumberLoop(loop.Loop):
    """Remembers what it was told."""

    remedies = REMEDIES

    def __init__(self, model, last, every=4, stop=None):
        log = RunLog(model.folder, 0, ("iteration", "loss", "norm", "learning_rate"))
        super().__init__(model, last, every, log, StopRequest() if stop is None else stop)
        self.took, self.milestones = [], []

    def row(self, step):
        return step.iteration, *step.results, step.learning_rate

    def short(self, step, steps_per_second):
        return f"{step.results[0]}"

    def line(self, steps, steps_per_second):
        return f"{len(steps)} steps up to {steps[-1].iteration}"

    def taken(self, steps, seconds):
        self.took.append((len(steps), seconds))

    def milestone(self, finished):
        self.milestones.append((self.trained.iteration, finished))
        self.saver.save()


def table(folder):
    with open(folder / "losses.csv", newline="") as file:
        return [(int(row["iteration"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture
def every_five(monkeypatch):
    monkeypatch.setattr(loop, "READ_BACK_EVERY", {"cpu": 5})


def test_results_are_read_back_a_few_at_a_time_and_before_each_milestone(tmp_path, monkeypatch, every_five):
    readings, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: readings.append(tuple(tensor.shape)) or tolist(tensor))
    run = NumberLoop(Number(tmp_path), last=19, every=8)
    assert run.run()
    assert [rows for rows, _ in readings] == [5, 3, 5, 3, 3]
    assert [steps for steps, _ in run.took] == [5, 3, 5, 3, 3]
    assert run.milestones == [(8, False), (16, False), (19, True)]
    assert table(tmp_path) == [(n, n) for n in range(1, 20)]


def test_a_checkpoint_waits_for_a_good_step(tmp_path, capsys):
    model = Number(tmp_path, bad=(4, 5, 9))
    run = NumberLoop(model, last=9)
    assert run.run()
    assert run.milestones == [(6, False), (8, False), (9, True)]
    assert model.pruned == ["6", "8"]  # the last one may be spoilt: the older ones stay
    assert model.bad_steps.in_a_row == 1
    said = capsys.readouterr().out
    assert re.findall(r"warning: iteration (\d): loss nan.* item (\d)", said) == [("4", "3"), ("5", "4"), ("9", "8")]


@pytest.mark.parametrize("last", [8, 9, 20])
@pytest.mark.parametrize("diverged", [1, 4, 5, 7, 8])
def test_spoilt_weights_are_never_saved_nor_do_they_cost_an_older_checkpoint(last, diverged, tmp_path):
    model = Number(tmp_path)
    model.diverged = diverged
    with pytest.raises(
        InputError, match=r"iteration \d+: the number is not finite, .* was not written; think again"
    ) as error:
        NumberLoop(model, last).run()
    due = min(last, next(iteration for iteration in (4, 8, 12) if iteration >= diverged))
    assert str(error.value).startswith(f"iteration {due}: ")
    assert model.saved == [iteration for iteration in (4, 8) if iteration < min(due, diverged)]
    assert model.pruned == [str(iteration) for iteration in model.saved]


def test_a_signal_does_not_save_spoilt_weights(tmp_path):
    model = Number(tmp_path)
    model.diverged = 6

    class Signalled(NumberLoop):
        def taken(self, steps, seconds):
            if steps[-1].iteration == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop, pytest.raises(InputError, match="iteration 6: the number is not finite"):
        Signalled(model, last=100, stop=stop).run()
    assert model.saved == [4]


def test_bad_steps_in_a_row_end_the_run_though_read_late(tmp_path, every_five):
    model = Number(tmp_path, bad=range(2, 99))
    with pytest.raises(InputError, match="3 steps in a row, up to iteration 4; think again"):
        NumberLoop(model, last=50, every=20).run()
    assert model.saved == [] and len(table(tmp_path)) == 5


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, capsys):
    model = Number(tmp_path)

    class Filling(NumberLoop):
        def milestone(self, finished):
            model.full = model.iteration in (8, 12)
            super().milestone(finished)

    run = Filling(model, last=10)
    assert run.run()
    assert model.saved == [4, 10] and not run.saver.failed
    assert "the checkpoint of iteration 8 was not saved (No space left on device)" in capsys.readouterr().out
    assert not Filling(model, last=12).run()  # the last one is missing


def test_a_signal_ends_it_after_the_steps_that_were_read_back(tmp_path, every_five):
    model = Number(tmp_path)

    class Signalled(NumberLoop):
        def taken(self, steps, seconds):
            if steps[-1].iteration == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:
        run = Signalled(model, last=10_000, every=10_000, stop=stop)
        assert run.run() and stop.signal == signal.SIGTERM
    assert run.milestones == [(10, True)] and model.saved == [10]


def test_after_a_signal_that_came_before_it_there_is_no_step(tmp_path):
    model = Number(tmp_path)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        run = NumberLoop(model, last=10, stop=stop)
        assert run.run()
    assert run.took == [] and model.saved == [] and table(tmp_path) == []


def test_without_a_terminal_there_is_a_line_now_and_then_and_one_before_each_milestone(tmp_path, capsys, monkeypatch):
    NumberLoop(Number(tmp_path), last=10).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps up to" in line]
    assert lines == ["4 steps up to 4", "4 steps up to 8", "2 steps up to 10"]
    monkeypatch.setattr(loop, "LINE_SECONDS", 0.0)
    NumberLoop(Number(tmp_path), last=3).run()
    assert capsys.readouterr().out.count("1 steps up to") == 3


def test_the_speed_leaves_out_the_pauses(tmp_path):
    class Pausing(NumberLoop):
        def begin(self):
            time.sleep(0.3)

        def milestone(self, finished):
            time.sleep(0.3)

    run = Pausing(Number(tmp_path), last=9)
    run.run()
    assert max(seconds for _, seconds in run.took) < 0.2


def test_nothing_is_done_where_nothing_is_left(tmp_path):
    model = Number(tmp_path)
    model.iteration = 5
    run = NumberLoop(model, last=5)
    assert run.run() and run.milestones == [] and model.saved == []


def test_the_time_that_the_run_will_take_is_told_once_it_can_be_known(tmp_path, capsys):
    run = NumberLoop(Number(tmp_path), last=1000, every=400)
    run.trained.iteration = 13
    step = loop.Step(13, (1.0, 1.0), 0.1)
    run.progress.show([step], 30.0)  # the first, which takes longer
    for _ in range(12):
        run.progress.show([step], 1.0)
    run.close()
    told = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    assert told == [
        "1 steps/s: iteration 1000 in about 16.4 min, checkpoint 400 in about 6.5 min, without what is evaluated at "
        "checkpoints"
    ]
