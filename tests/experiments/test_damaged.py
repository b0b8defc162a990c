"""Files that the experiments read, damaged: one line that names the file, and nothing runs on."""

import copy
import math
import os
from dataclasses import replace

import pytest
import torch

from experiments.curve import curve_of_logs
from experiments.runs import Run, read_results
from experiments.training import RunLoop, RunTrainer, train
from harness.errors import InputError
from harness.stopping import StopRequest
from tests.experiments.test_runs import data, small  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):  # noqa: F811
    """A run of three steps, and what its checkpoint holds."""
    folder, run = tmp_path_factory.mktemp("run"), Run(small("tiny", train__ema_decay=0.9), data, 1, 3)
    trainer, _ = train(run, folder, StopRequest())
    return trainer, torch.load(folder / "state.pt", weights_only=True)


def damages(content):
    """(place, value) of what must not pass; a place is a path of keys."""
    for name in ("subject", "average"):
        first = next(iter(content[name]))
        value = content[name][first]
        others = (value[None], value.bool(), value.to(torch.complex64), torch.full_like(value, math.nan))
        yield from (((name, first), wrong) for wrong in (None, "x", *others))
        yield from (((name,), wrong) for wrong in (None, 3, {}, [], {5: value}, {first: value}))
        yield from (((name, odd), value) for odd in (5, "odd"))
    yield from ((("losses",), wrong) for wrong in (None, [], [1], ["x"], [0.5] * 4, torch.zeros(2), {}))
    yield from ((("seconds",), wrong) for wrong in (None, [], [1.0], [-1.0, 1.0], [1.0, math.nan], ["x", 1.0], 3))
    yield from ((("bad_steps",), wrong) for wrong in (None, -1, 4, 0.5, "x"))
    yield from ((("random",), wrong) for wrong in (None, 3, [], {"random_state": torch.zeros(3)}))
    yield from ((("optimizer",), wrong) for wrong in (None, 3, {}, {"state": {}, "param_groups": []}))
    yield ("optimizer", "param_groups", 0, "lr"), math.nan
    yield from ((("optimizer", "state", 0, name), wrong) for name in ("exp_avg", "exp_avg_sq") for wrong in (None, 3.0))
    yield from ((("optimizer", "param_groups", 0, "eps"), wrong) for wrong in (0.0, 1e-300))
    state = content["optimizer"]["state"]
    yield from ((("optimizer", "state", number, "step"), torch.tensor(1.0)) for number in state)
    for wrong in (4.0, 1e6):  # of three steps
        counted = {number: {**values, "step": torch.tensor(wrong)} for number, values in state.items()}
        yield ("optimizer", "state"), counted


def test_no_damage_to_a_run_under_way_passes(saved):
    trainer, content = saved
    trainer._restore(copy.deepcopy(content))
    wrong = list(damages(copy.deepcopy(content)))
    assert len(wrong) > 50
    for place, value in wrong:
        damaged = copy.deepcopy(content)
        inner = damaged
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        with pytest.raises(InputError, match=r"remove .*state\.pt, and the run begins anew"):
            trainer._restore(damaged)
    for other in ({}, [1, 2], None, {name: content[name] for name in content if name != "seconds"}):
        with pytest.raises(InputError, match="remove"):
            trainer._restore(other)


@pytest.mark.parametrize("layout", ["stride 0", "one of the other", "one step for all"])
def test_moments_of_any_layout_become_tensors_of_their_own(saved, layout):
    training, content = saved
    damaged = copy.deepcopy(content)
    state = damaged["optimizer"]["state"]
    for values in state.values():
        if layout == "stride 0":
            values["exp_avg"] = torch.zeros(()).expand(values["exp_avg"].shape)
        elif layout == "one of the other":
            values["exp_avg"] = values["exp_avg_sq"]
        else:
            values["step"] = state[0]["step"]
    training._restore(damaged)
    own = [value for values in training.optimizer.state.values() for value in values.values()]
    assert len({value.untyped_storage().data_ptr() for value in own}) == len(own)
    assert all(value.is_contiguous() for value in own)
    training._restore(copy.deepcopy(content))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_spoilt_weights_do_not_take_the_place_of_good_ones(saved, wrong):
    trainer, _ = saved
    before = (trainer.folder / "state.pt").read_bytes()
    longer = RunTrainer(replace(trainer.run, steps=4), trainer.folder)
    with torch.no_grad():
        next(longer.model.parameters()).flatten()[-1] = wrong
    with pytest.raises(InputError, match=r"iteration 4: .* is not finite, .*; this setting cannot be trained$"):
        RunLoop(longer, StopRequest()).run()
    assert (trainer.folder / "state.pt").read_bytes() == before


TABLES = {
    "binary": b"\xff\xfe\x00\x01" * 10,
    "a long field": b"name,corpus\n" + b"x" * 200_000 + b",y\n",
    "other columns": b"a,b\n1,2\n",
    "a short row": b"iteration,loss\n1\n",
    "no number": b"iteration,loss\n1,x\n",
    "a null byte": b"iteration,loss\n1,\x00\n",
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("read", [read_results, lambda path: curve_of_logs(path.parent, [path])])
def test_a_damaged_table_is_one_line(read, content, tmp_path, data):  # noqa: F811
    for kind in ("train", "test"):
        (tmp_path / f"{kind}_files.txt").write_text((data / f"{kind}_files.txt").read_text())
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(path) in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_not_waited_for(make, tmp_path):
    make(tmp_path / "table.csv")
    with pytest.raises(InputError, match=r"table\.csv.*expected a file"):
        read_results(tmp_path / "table.csv")
