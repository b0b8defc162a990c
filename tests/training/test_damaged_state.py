"""State of a run damaged in memory, in every place and many ways: refused in one line, and --resume falls back."""

import copy
import math
import os
import shutil

import pytest
import torch

import checkpoint as ckpt
from config import load_config
from harness import terminal
from harness.checkpoints import save_whole
from harness.errors import InputError
from image_density_experiments import checkpoint as image_ckpt
from image_density_experiments.runs import check_usable
from tests.support.experiments import run
from tests.support.image_runs import run as run_images
from tests.support.image_runs import write_images
from training.resuming import check_resumable
from vocoder import find_checkpoint

NOT_FINITE = [math.nan, math.inf, -math.inf]
NO_NUMBERS = [None, "1", [], {}, True, torch.zeros(2), 1j]
NO_COUNTS = [*NO_NUMBERS, *NOT_FINITE, -1, 1.5, 2**31, 10**400]
NO_CONTAINERS = [None, 3, "x", torch.zeros(1)]


def no_moments(moment, squared):
    """Tensors that cannot be a moment like this one."""
    negative = [-moment.abs() - 1] if squared else []
    return [
        None, 0.0, {}, moment[:0], moment.flatten().unsqueeze(0).unsqueeze(0).unsqueeze(0), moment.double() + 1e300,
        moment.to(torch.complex64), moment.to(torch.int64), moment.bool(),
        *(moment + value for value in NOT_FINITE), *negative, *([] if squared else [moment + 1e20, moment - 1e30]),
    ]  # fmt: skip


def count_damages(content, most):
    """Counts of steps that do not agree with one another, or are more than `most`; None: nobody knows how many."""
    state = content["optimizer"]["state"]
    for wrong in (0.0, 1.0, 100_000.0, 2.0**24):
        for number in (min(state), max(state)):
            yield ("optimizer", "state", number, "step"), torch.tensor(wrong)
    alike = [] if most is None else [most + 1, most + 100, 10**6, 2**31 - 1]
    for wrong in alike:
        yield ("optimizer", "state"), {n: {**values, "step": torch.tensor(float(wrong))} for n, values in state.items()}
    for left_out in (min(state), max(state)):
        yield ("optimizer", "state"), {n: values for n, values in state.items() if n != left_out}


def damages(content, squared):
    """(place, value) of everything that must not pass; a place is a path of keys."""
    number = next(iter(content["optimizer"]["state"]))
    moments = ("optimizer", "state", number)
    for name, value in content["optimizer"]["state"][number].items():
        if name == "step":
            yield from (((*moments, name), wrong) for wrong in (None, "1", -1, 0.5, math.nan, 2**40, torch.zeros(2)))
        else:
            yield from (((*moments, name), wrong) for wrong in no_moments(value, name == squared))
    yield from ((moments, wrong) for wrong in [*NO_CONTAINERS, {}, {"step": 1}, {"odd": 1}])
    yield from ((("optimizer", "state"), wrong) for wrong in [*NO_CONTAINERS, {}, {0: {}}, {10**6: {}}, {"a": {}}])
    yield from ((("optimizer", "param_groups"), wrong) for wrong in [*NO_CONTAINERS, [], [{}], [{}, {}], [3]])
    yield from ((("optimizer",), wrong) for wrong in [3, "x", {}, [], torch.zeros(1)])
    group = ("optimizer", "param_groups", 0)
    for name in ("lr", "eps", "weight_decay"):
        yield from (((*group, name), wrong) for wrong in [*NO_NUMBERS, *NOT_FINITE, -1e-3, 1e30, 10**400])
    yield from (((*group, "eps"), wrong) for wrong in (0, 0.0, 5e-324, 1e-300, 1e-40, 2.0))
    wrong_betas = [3, None, [0.9], (0.9, 1.0), (-0.1, 0.9), (0.9, 2.0), (math.nan, 0.9), ("a", "b"), (0.9, 0.9, 0.9)]
    wrong_betas += [(1 - 1e-9, 0.999), (0.9, 1 - 1e-12)]
    yield from (((*group, "betas"), wrong) for wrong in wrong_betas)
    for name in ("bad_steps", *(["epoch_steps"] if "epoch_steps" in content["training_state"] else [])):
        yield from ((("training_state", name), wrong) for wrong in [*NO_COUNTS, 10**6])
    yield from ((("training_state",), wrong) for wrong in NO_CONTAINERS)
    state = content["training_state"]["random_state"]
    for wrong in [*NO_CONTAINERS, state[:-1], state.int(), state.float(), torch.full_like(state, 255), state[None]]:
        yield ("training_state", "random_state"), wrong


def average_damages(content):
    """What must not pass for a moving average of the weights: other names, kinds of numbers, shapes, no numbers."""
    average = content["ema"]
    first, tensor = next(iter(average.items()))
    yield from (
        (("ema",), wrong) for wrong in [*NO_CONTAINERS, {}, [tensor], average | {5: tensor}, average | {"x": "y"}]
    )
    yield ("ema",), average | {"xx": tensor}
    yield ("ema",), {name: value for name, value in average.items() if name != first}
    for wrong in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        yield ("ema",), {name: value.to(wrong) for name, value in average.items()}
        yield ("ema", first), tensor.to(wrong)
    yield from ((("ema", first), wrong) for wrong in [None, 3, "x", [], tensor[None], tensor.flatten()[:0]])
    yield from ((("ema", first), tensor + wrong) for wrong in NOT_FINITE)


def schedule_damages(content):
    for name in ("last_epoch", "step_size", "_step_count"):
        yield from ((("scheduler", name), wrong) for wrong in NO_COUNTS)
    yield ("scheduler", "last_epoch"), 0  # it would begin again
    for wrong in (content["iteration"] + 1, 10**6, 2**31 - 2):
        yield ("scheduler",), {**content["scheduler"], "last_epoch": wrong, "_step_count": wrong + 1}
    yield ("scheduler", "step_size"), 0
    yield from ((("scheduler", "gamma"), wrong) for wrong in [*NO_NUMBERS, *NOT_FINITE, -0.5, 1e300])
    yield from ((("scheduler", "base_lrs"), wrong) for wrong in [*NO_CONTAINERS, [], [1, 2], [math.nan], [-1], ["x"]])
    yield from ((("scheduler",), wrong) for wrong in [3, {}, [], {"last_epoch": 3}])
    for name, wrong in [("scale", 0.0), ("scale", math.nan), ("scale", -1.0), ("growth_factor", 0.5), ("scale", "x"),
                        ("backoff_factor", 2.0), ("growth_interval", 0), ("_growth_tracker", -1)]:  # fmt: skip
        yield ("training_state", "precision"), {name: wrong}
    yield from ((("training_state", "precision"), wrong) for wrong in NO_CONTAINERS)


def changed(content, place, value):
    """A copy of the content with another value in a place."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def refused(content, place, value, check):
    with pytest.raises(InputError) as raised:
        check(changed(content, place, value))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600, place


@pytest.fixture(scope="module")
def vocoder(corpus, tmp_path_factory):
    from tests.support.experiments import write_config

    folder = tmp_path_factory.mktemp("vocoder")
    steps = {"train_config__iters_per_checkpoint": 1, "train_config__ema_decay": 0.5}
    path = write_config(folder / "config.json", corpus, folder / "runs", **steps)
    assert run("-c", path, "--max_iterations", 2) == 0
    return path, folder / "runs" / "tiny"


def test_no_damage_to_a_vocoders_state_passes(vocoder, tmp_path, monkeypatch):
    _, folder = vocoder
    content = ckpt.read_torch_file(folder / "waveflow_2")

    def check(damaged):
        monkeypatch.setattr(ckpt, "read_torch_file", lambda *_: damaged)
        check_resumable(ckpt.read_checkpoint("waveflow_2"))

    check(content)
    cases = [*damages(content, "exp_avg_sq"), *schedule_damages(content), *average_damages(content)]
    cases += count_damages(content, content["iteration"] + 1)  # published files count from 0
    for place, value in cases:
        refused(content, place, value, check)
    print(f"{len(cases)} damages")
    assert len(cases) > 200


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    array = write_images(folder / "images.npy")
    assert run_images(array, folder / "run", "--max_iterations", 4) == 0
    assert run_images(array, folder / "run", "--max_iterations", 6, "--saved_model", folder / "run", model=[]) == 0
    return array, folder / "run"


def test_no_damage_to_an_image_models_state_passes(images):
    _, folder = images
    content = image_ckpt.load_checkpoint(folder / "glow_model_6.pt")

    def check(content):
        check_usable(image_ckpt.told_apart(folder / "glow_model_6.pt", content))

    check(content)
    cases = [*damages(content, "exp_inf"), *count_damages(content, None)]
    indices = next((name for name in content["model"] if name.endswith("indices")), None)
    if indices:
        cases += [
            (("model", indices), content["model"][indices] * 0),
            (("model", indices), content["model"][indices] + 1),
        ]
    for place, value in cases:
        refused(content, place, value, check)
    print(f"{len(cases)} damages")
    assert len(cases) > 150


# --- what --resume latest does with them


def spoil_weights(content):
    content["model"] = {name: value * math.nan for name, value in content["model"].items()}


def make_complex(content):
    content["model"] = {name: value.to(torch.complex64) for name, value in content["model"].items()}


def lose_the_optimizer(content):
    del content["optimizer"]


def empty_the_optimizer(content):
    content["optimizer"]["state"] = {}


def make_another_model(content):
    name = next(iter(content["model"]))
    content["model"][name] = torch.zeros(1, 2, 3)


def make_whole(content):
    content["ema"] = {name: value.long() for name, value in content["ema"].items()}


def lose_a_name(content):
    content["ema"][5] = torch.zeros(3)


def say_no_iteration(content):
    content["iteration"] = 0


def say_another_iteration(content):
    content["iteration"] = 10**6


def say_the_last_iteration(content):
    content["iteration"] = 2**31 - 1


def say_the_iteration_before(content):
    content["iteration"] -= 1


def lose_eps(content):
    content["optimizer"]["param_groups"][0]["eps"] = 0.0


def count_otherwise(content):
    content["optimizer"]["state"][0]["step"] = torch.tensor(1e5)


def exaggerate_the_mean(content):
    content["optimizer"]["state"][0]["exp_avg"] += 1e30


ITERATIONS = (say_no_iteration, say_another_iteration, say_the_last_iteration, say_the_iteration_before)
BELIEVED = (lose_eps, count_otherwise, exaggerate_the_mean)
SPOILT = (spoil_weights, make_complex, lose_the_optimizer, empty_the_optimizer, make_another_model)
SPOILT += (*ITERATIONS, *BELIEVED)
SPOILT_AVERAGE = (make_whole, lose_a_name)


def in_its_place(path, what):
    """Put something in the place of a checkpoint."""
    if what in SPOILT + SPOILT_AVERAGE:
        content = torch.load(path, weights_only=True)
        del content["digest"]
        what(content)
        save_whole(path, content)
        return
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "empty": lambda p: p.touch(),
     "link": lambda p: p.symlink_to("/dev/zero")}[what](path)  # fmt: skip


@pytest.mark.parametrize("what", [*SPOILT, *SPOILT_AVERAGE, "pipe", "folder", "empty", "link"])
def test_the_newest_that_can_be_used_is_taken_whatever_the_later_ones_are(what, vocoder, tmp_path, capsys):
    path, folder = vocoder
    own = tmp_path / "runs" / "tiny"
    own.mkdir(parents=True)
    for number in (1, 2):
        (own / f"waveflow_{number}").write_bytes((folder / f"waveflow_{number}").read_bytes())
    in_its_place(own / "waveflow_2", what)
    config = load_config(path, [f"train_config.output_directory={tmp_path / 'runs'}"])
    start = ckpt.starting_point(config, ckpt.Start(resume=True), check_resumable)
    assert start.iteration == 1
    assert capsys.readouterr().err.count("waveflow_2: ") == 1
    in_its_place(own / "waveflow_1", "empty")
    with pytest.raises(InputError, match=r"none of its 2 checkpoint\(s\) can be used; checkpoint .*waveflow_2: "):
        ckpt.starting_point(config, ckpt.Start(resume=True), check_resumable)


@pytest.mark.parametrize("what", ITERATIONS)
def test_jobs_that_only_read_pass_over_another_iteration_too(what, vocoder, tmp_path, capsys):
    path, folder = vocoder
    own = tmp_path / "runs" / "tiny"
    shutil.copytree(folder, own)
    in_its_place(own / "waveflow_2", what)
    assert find_checkpoint(own, terminal.warn).iteration == 1
    config = load_config(path, [f"train_config.output_directory={tmp_path / 'runs'}"])
    assert ckpt.newest_whole(config).iteration == 1
    said = capsys.readouterr().err
    assert said.count("waveflow_2: says iteration ") == 2 and said.count("its name 2") == 2
    for average in (lambda: ckpt.average_checkpoints([own / "waveflow_1", own / "waveflow_2"]),
                    lambda: ckpt.starting_point(config, ckpt.Start(average=2))):  # fmt: skip
        with pytest.raises(InputError, match=r"waveflow_2: says iteration .*, its name 2"):
            average()
    ckpt.read_checkpoint(own / "waveflow_2")  # named by itself, it may be called anything


@pytest.mark.parametrize("what", [*SPOILT[:2], *SPOILT[3:], "pipe", "folder"])
def test_the_image_models_fall_back_too(what, images, tmp_path, capsys):
    _, folder = images
    for number in (4, 6):
        (tmp_path / f"glow_model_{number}.pt").write_bytes((folder / f"glow_model_{number}.pt").read_bytes())
    in_its_place(tmp_path / "glow_model_6.pt", what)
    assert image_ckpt.newest_checkpoint(tmp_path, check_usable).iteration == 4
    assert capsys.readouterr().err.count("glow_model_6.pt: ") == 1


def test_folders_of_a_checkpoints_name_are_neither_counted_nor_removed(tmp_path):
    for number in (2, 3, 4):
        (tmp_path / f"waveflow_{number}").touch()
    (tmp_path / "waveflow_1").mkdir()
    os.mkfifo(tmp_path / "waveflow_0")
    assert ckpt.keep_newest(tmp_path / "waveflow_4", 1) == [tmp_path / "waveflow_3", tmp_path / "waveflow_2"]
    assert sorted(os.listdir(tmp_path)) == ["waveflow_0", "waveflow_1", "waveflow_4"]
