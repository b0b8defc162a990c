"""A resumed or evaluated run is the same run: what defines it comes from its checkpoint, or is refused or named."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from harness.errors import InputError
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.checkpoint import load_checkpoint
from image_density_experiments.runs import starting_point
from tests.support.image_command import MODEL, begin, command, pictures, rows


@pytest.fixture
def images(tmp_path):
    return pictures(tmp_path / "images")


# --- what comes from the checkpoint -----------------------------------------------------------------------------

DEFINING = {
    "nothing": [],
    "size": ["--image_size", 4],
    "grey": ["--channels", 1],
    "bits": ["--n_bits", 5],
    "background": ["--background", "#102030"],
    "augmentation": ["--no_augment"],
    "rate": ["--lr", 1e-3, "--warmup", 1, "--seed", 3, "--max_grad_norm", 10, "--amp"],
    "epochs": ["--epochs", 3],
}


@pytest.mark.parametrize("what", DEFINING)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_run_goes_on_as_it_was_begun_without_its_flags(tmp_path, images, what, by):
    flags = DEFINING[what]
    begin(tmp_path / "whole", images, *flags, iterations=5)
    begin(tmp_path / "parts", images, *flags, iterations=3)
    before = json.loads((tmp_path / "parts" / "config.json").read_text())
    saved = tmp_path / "parts" if by == "folder" else tmp_path / "parts" / "glow_model_3.pt"
    assert command("--saved_model", saved, "--max_iterations", 5) == 0
    after = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert before == after
    whole, parts = (load_checkpoint(tmp_path / name / "glow_model_5.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert whole["data"] == parts["data"] and whole["options"] == parts["options"]


@pytest.mark.parametrize("job", ["--evaluate", "--interpolate", "--sample"])
def test_jobs_know_the_images_of_the_run(tmp_path, images, capsys, job):
    folder = begin(tmp_path / "run", images, "--image_size", 4, "--channels", 1, iterations=4)
    assert command("--saved_model", folder, job) == 0
    said = capsys.readouterr()
    assert said.err == ""
    if job == "--evaluate":
        assert "folder images: " in said.out
        found = rows(folder / "evaluation" / "glow_model_4" / "bits_per_dim.csv")
        assert [row["image"] for row in found] == ["009.png", "019.png"]
        mean = np.mean([float(row["bits_per_dim"]) for row in found])
        assert mean == pytest.approx(float(rows(folder / "epochs.csv")[-1]["test_bits_per_dim"]), abs=1e-6)


def test_moved_images_are_found_by_dataroot_and_are_the_same(tmp_path, images, capsys):
    folder = begin(tmp_path / "run", images)
    images = images.rename(tmp_path / "elsewhere")
    assert command("--saved_model", folder, "--max_iterations", 3) == 1
    assert "images: not there; --dataset folder needs --dataroot" in capsys.readouterr().err
    assert command("--saved_model", folder, "--max_iterations", 3, "--dataroot", images) == 0


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "patches"], "--dataset patches: the run was trained with folder"),
        (["--image_size", 16], "--image_size 16: the run was trained with 8"),
        (["--channels", 1], "--channels 1: the run was trained with 3"),
        (["--background", "black"], "--background black: the run was trained with white"),
        (["--no_augment"], "--no_augment: the run was trained with augmentation"),
        (["--n_bits", 5], "--n_bits 5: the checkpoint's model has 8"),
    ],
)
def test_a_flag_that_makes_it_another_run_is_refused(tmp_path, images, capsys, flags, words):
    folder = begin(tmp_path / "run", images, "--image_size", 8)
    before = (folder / "config.json").read_bytes()
    assert command("--saved_model", folder, "--max_iterations", 3, *flags) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert (folder / "config.json").read_bytes() == before


CHANGES = {
    "one more": lambda folder: pictures(folder, 21),
    "one less": lambda folder: (folder / "007.png").unlink(),
    "others of the same names": lambda folder: pictures(folder, seed=1),
    "another name": lambda folder: (folder / "007.png").rename(folder / "007b.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_images(tmp_path, images, capsys, change):
    folder = begin(tmp_path / "run", images)
    CHANGES[change](images)
    assert command("--saved_model", folder, "--max_iterations", 3) == 1
    assert "not the images that the run began with (18 and 2 of training and test, " in capsys.readouterr().err
    assert command("--saved_model", folder, "--evaluate") == 0
    assert "the model was trained on others" in capsys.readouterr().err


def test_another_test_set_is_named(tmp_path, images, capsys):
    folder = begin(tmp_path / "run", images)
    other = pictures(tmp_path / "other", seed=5)
    assert command("--saved_model", folder, "--evaluate", "--dataroot", other) == 0
    said = capsys.readouterr()
    assert "warning: these are the images of folder other, the model was trained on others" in said.err
    assert "folder other: " in said.out


def test_an_older_checkpoint_must_be_told_its_images(tmp_path, images, capsys):
    """One without an entry on its data: its folder's config.json knows the name; a file alone knows nothing."""
    folder = begin(tmp_path / "run", images)
    content = torch.load(folder / "glow_model_2.pt", weights_only=True)
    del content["data"], content["digest"]  # neither was there
    torch.save(content, folder / "glow_model_2.pt")
    assert command("--saved_model", folder, "--evaluate", "--dataroot", images) == 0
    alone = shutil.copy(folder / "glow_model_2.pt", tmp_path / "alone.pt")
    capsys.readouterr()
    assert command("--saved_model", alone, "--output_dir", tmp_path / "new", "--evaluate") == 1
    assert "alone.pt: does not say which images it was trained on; name them with --dataset" in capsys.readouterr().err


# --- what a checkpoint says of itself -----------------------------------------------------------------------------


def damages():
    """(entry, name, value) of what no run writes and no job may believe."""
    strange = [torch.zeros(3), torch.zeros(()), [5, {}], {"a": 1}, 1j, math.nan, 10**400]
    texts = [5, 1.5, True, *strange]
    numbers = ["x", -1, 10**12, *strange]
    for name in ("dataset", "dataroot", "background"):
        yield from (("data", name, wrong) for wrong in texts)
    yield from (("data", name, wrong) for name in ("images", "n_images") for wrong in [None, *texts])
    yield from (("data", name, wrong) for name in ("image_size", "channels") for wrong in numbers)
    yield from [("data", "dataset", "unheard of"), ("data", "channels", 2), ("data", "background", "no colour")]
    yield from (("data", "class_names", wrong) for wrong in [None, 5, 1.5, "abc", *strange, [5], [None], ["a", b"b"]])
    yield "data", "class_names", ["x"] * (2**16 + 1)
    for name in ("batch_size", "epochs", "n_init_batches", "seed"):
        yield from (("options", name, wrong) for wrong in [None, 1.5, True, *numbers])
    for name in ("lr", "warmup", "weight_decay", "y_weight", "max_grad_clip", "max_grad_norm"):
        # A tensor of one number becomes that number.
        yield from (("options", name, wrong) for wrong in [None, *numbers[:4], *strange[2:]])
    yield from (("options", name, wrong) for name in ("augmented", "amp") for wrong in [None, 1, "yes", *strange])
    for name in ("hidden_channels", "K", "L", "flow_embed_dim", "y_classes", "n_bits"):
        yield from (("config", name, wrong) for wrong in [None, 0, 1.5, True, *numbers])
    shapes = [5, None, "8", (8, 8), (8, 8, 3, 1), (0, 8, 3), (8, 8, -3), (7, 8, 3), (2**20, 8, 3), (8.0, 8, 3)]
    yield from (("config", "image_shape", wrong) for wrong in [*shapes, *strange])
    for name in ("model_type", "flow_permutation", "flow_coupling", "LU_decomposed", "learn_top", "y_condition"):
        yield from (("config", name, wrong) for wrong in [None, 5, "unheard of", *strange])
    yield "config", "actnorm_scale", math.inf
    yield from (("config", name, 6) for name in (5, None, (1, 2), "unheard_of"))
    yield from ((entry, None, wrong) for entry in ("config", "options", "data") for wrong in [None, 5, "x", [], [3]])


DAMAGES = list(damages())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with two checkpoints, 2 and 4, and the newer one's content."""
    place = tmp_path_factory.mktemp("two")
    folder = begin(place / "run", pictures(place / "images"), "--save_every", 2, iterations=4)
    return folder, load_checkpoint(folder / "glow_model_4.pt")


@pytest.mark.parametrize("entry", ["config", "options", "data"])
def test_what_no_run_writes_is_refused_by_file_and_passed_over_in_a_folder(entry, two, tmp_path, monkeypatch, capsys):
    folder, content = two
    good = load_checkpoint(folder / "glow_model_2.pt")
    cases = [case for case in DAMAGES if case[0] == entry]
    assert len(cases) > 80
    for _, name, value in cases:
        damaged = {**content, entry: value if name is None else {**content[entry], name: value}}
        by_name = {"glow_model_4.pt": damaged, "glow_model_2.pt": good}
        monkeypatch.setattr(ckpt, "load_checkpoint", lambda path, by_name=by_name: by_name[path.name])
        with pytest.raises(InputError) as error:
            starting_point(folder / "glow_model_4.pt")
        said = str(error.value)
        assert said.startswith(f"checkpoint {folder}/glow_model_4.pt: its {entry}"), (name, value, said)
        assert said.isprintable() and len(said) < 400
        assert starting_point(folder).iteration == 2, (name, value)
        assert capsys.readouterr().err.count("glow_model_4.pt: ") == 1


def test_what_a_run_writes_is_told_as_it_was(two):
    folder, content = two
    start = starting_point(folder)
    assert start.iteration == 4 and start.config == content["config"]
    assert all(content["options"][name] == value for name, value in start.options.items()) and len(start.options) == 12
    assert {**content["data"], **start.data} == content["data"]


JOBS = {"sample": ["--sample", "--n_samples", 2], "evaluate": ["--evaluate"], "train": ["--max_iterations", 6]}
SPOILT = {
    "class names": lambda content: content["data"].update(class_names=5),
    "dataset": lambda content: content["data"].update(dataset=torch.zeros(3)),
    "shape": lambda content: content["config"].update(image_shape=(8, 8)),
    "batch size": lambda content: content["options"].update(batch_size=torch.zeros(3)),
    "seed": lambda content: content["options"].update(seed="x"),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("job", JOBS)
def test_every_job_refuses_the_file_in_a_line_and_takes_the_one_before(job, what, two, tmp_path, capsys):
    copy = shutil.copytree(two[0], tmp_path / "run")
    content = torch.load(copy / "glow_model_4.pt", weights_only=True)
    del content["digest"]
    SPOILT[what](content)
    torch.save(content, copy / "glow_model_4.pt")
    assert command("--saved_model", copy / "glow_model_4.pt", *JOBS[job], "--batch_size", 4) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "glow_model_4.pt: its " in error
    assert command("--saved_model", copy, *JOBS[job], "--batch_size", 4) == 0
    said = capsys.readouterr()
    assert "glow_model_4.pt: its " in said.err and "glow_model_2.pt, iteration 2" in said.out


@pytest.mark.parametrize("iteration", [0, 3, 5, 10**6, 2**31 - 1])
def test_an_iteration_that_is_not_that_of_the_name_is_passed_over(iteration, two, monkeypatch, capsys):
    folder, content = two
    good = load_checkpoint(folder / "glow_model_2.pt")
    by_name = {"glow_model_4.pt": {**content, "iteration": iteration}, "glow_model_2.pt": good}
    monkeypatch.setattr(ckpt, "load_checkpoint", lambda path: by_name[path.name])
    assert starting_point(folder).iteration == ckpt.newest_checkpoint(folder).iteration == 2
    assert capsys.readouterr().err.count(f"says iteration {iteration}, its name 4") == 2


def test_sizes_without_end_are_refused_before_they_are_built(two, monkeypatch, capsys):
    folder, content = two
    huge = {**content, "config": {**content["config"], "hidden_channels": 2**14, "K": 2**10}}
    by_name = {"glow_model_4.pt": huge, "glow_model_2.pt": load_checkpoint(folder / "glow_model_2.pt")}
    monkeypatch.setattr(ckpt, "load_checkpoint", lambda path: by_name[path.name])
    assert starting_point(folder).iteration == 2
    assert "lower hidden_channels, K or the images' size" in capsys.readouterr().err


# --- memory and time --------------------------------------------------------------------------------------------


def test_an_evaluation_takes_no_larger_batches_than_training(tmp_path, images, monkeypatch):
    from image_density_experiments.model import ImageFlow

    sizes, forward = [], ImageFlow.forward
    monkeypatch.setattr(
        ImageFlow,
        "forward",
        lambda self, x, *more, **options: (sizes.append(len(x)), forward(self, x, *more, **options))[1],
    )
    folder = begin(tmp_path / "run", images, "--n_init_batches", 1, size=2, iterations=9)
    assert max(sizes) == 2
    assert command("--saved_model", folder, "--evaluate", "--eval_batch_size", 1) == 0
    assert sizes[-1] == 1
    seen = [(row["image"], row["bits_per_dim"]) for row in rows(folder / "evaluation/glow_model_9/bits_per_dim.csv")]
    assert command("--saved_model", folder, "--evaluate", "--eval_batch_size", 20) == 0
    again = rows(folder / "evaluation/glow_model_9/bits_per_dim.csv")
    for (name, bits), row in zip(seen, again, strict=True):
        assert row["image"] == name and float(row["bits_per_dim"]) == pytest.approx(float(bits), abs=1e-4)


@pytest.mark.parametrize(("every", "expected"), [(1, range(1, 7)), (3, [3, 4, 6]), (4, [4, 6]), (5, [4, 5, 6])])
def test_checkpoints_every_n_iterations_and_every_epoch(tmp_path, images, every, expected):
    folder = begin(tmp_path / "run", images, "--save_every", every, iterations=6)
    assert sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("*.pt")) == list(expected)
    plain = begin(tmp_path / "plain", images, iterations=6)
    one, other = (load_checkpoint(path / "glow_model_6.pt")["model"] for path in (folder, plain))
    assert all(torch.equal(value, other[name]) for name, value in one.items())  # nothing of the run changes
    assert [row["epoch"] for row in rows(folder / "epochs.csv")] == [row["epoch"] for row in rows(plain / "epochs.csv")]


def test_the_cost_of_an_epoch_is_said_before_it(tmp_path, images, capsys):
    begin(tmp_path / "run", images)
    lines = capsys.readouterr().out.splitlines()
    [place] = [number for number, line in enumerate(lines) if "an epoch is 4 steps of 4 images: about " in line]
    assert not any("iteration 2, epoch" in line for line in lines[:place])


def test_advice_names_a_checkpoint_only_where_there_is_one(tmp_path, images, capsys):
    broken = ["--lr", 1e6, "--warmup", 0]
    data = ["--dataset", "folder", "--dataroot", images, "--batch_size", 4, "--output_dir", tmp_path / "run"]
    assert command(*MODEL, *data, *broken, "--max_iterations", 100, "--epochs", 1000) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    saved = list((tmp_path / "run").glob("*.pt"))
    assert ("--saved_model FILE" in error) == bool(saved) and ("start over with --fresh" in error) == (not saved)
