"""What befalls image runs: steps that are not finite, a full disk, checkpoints of the code before; and who waits."""

import errno
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from harness import loop
from image_density_experiments import checkpoint as ckpt
from image_density_experiments import sampling
from image_density_experiments.model import ImageFlow
from image_density_experiments.trainer import Trainer
from tests.support.image_runs import rows, run, write_images

DATA = Path(__file__).with_name("data")
OLD = ["--model_type", "nanoflow", "--hidden_channels", "2", "--K", "2", "--L", "1", "--n_init_batches", "2"]


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images.npy")


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def spoil(monkeypatch, *steps):
    """Dequantisation noise that is not finite in these steps."""
    draw_noise, calls = ImageFlow.draw_noise, []

    def spoilt(model, x):
        calls.append(None)
        noise = draw_noise(model, x)
        return noise * math.nan if len(calls) in steps else noise

    monkeypatch.setattr(ImageFlow, "draw_noise", spoilt)


def test_a_bad_step_changes_nothing_and_the_run_goes_on(images, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert run(images, folder, "--max_iterations", 2) == 0
    spoil(monkeypatch, 1)
    resume = ["--saved_model", folder, "--max_iterations"]
    assert run(images, folder, *resume, 3) == 0
    before, after = (ckpt.load_checkpoint(folder / f"glow_model_{n}.pt") for n in (2, 3))
    assert same(before["model"], after["model"]) and same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["training_state"]["bad_steps"] == 1
    assert "warning: iteration 3: loss nan" in capsys.readouterr().out
    assert run(images, folder, *resume, 4) == 0
    bits = [float(row["bits_per_dim"]) for row in rows(folder / "losses.csv")]
    assert [math.isnan(value) for value in bits] == [False, False, True, False]
    [epoch] = rows(folder / "epochs.csv")
    assert float(epoch["train_bits_per_dim"]) == pytest.approx((bits[0] + bits[1] + bits[3]) / 3)


def test_an_epoch_that_ends_badly_is_reported_after_the_next_good_step(images, tmp_path, monkeypatch):
    spoil(monkeypatch, 5, 6)  # the first call initialises: steps 4 and 5
    assert run(images, tmp_path / "run", "--max_iterations", 9, "--sample_every", 9) == 0
    assert [int(row["iteration"]) for row in rows(tmp_path / "run" / "epochs.csv")] == [6, 8]
    found = sorted(path.name for path in (tmp_path / "run").glob("glow_model_*"))
    assert found == ["glow_model_6.pt", "glow_model_8.pt", "glow_model_9.pt"]


def test_a_full_disk_is_survived(images, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    save = ckpt.save_checkpoint

    def save_some(path, *arguments, **entries):
        (refuse if path.name in ("glow_model_4.pt", "glow_model_13.pt") else save)(path, *arguments, **entries)

    monkeypatch.setattr(ckpt, "save_checkpoint", save_some)
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "save_image_rows", refuse)
        assert run(images, tmp_path / "run", "--max_iterations", 8) == 0
    assert [path.name for path in (tmp_path / "run").glob("glow_model_*")] == ["glow_model_8.pt"]
    said = capsys.readouterr().out
    assert "the checkpoint of iteration 4 was not saved (No space left on device)" in said
    assert "the samples were not written (No space left on device)" in said
    assert len(rows(tmp_path / "run" / "epochs.csv")) == 2
    assert run(images, tmp_path / "run", "--max_iterations", 13, "--saved_model", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"could not be saved; free some space, go on with --saved_model {tmp_path / 'run'}" in error


def test_no_step_waits_for_the_device(images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "READ_BACK_EVERY", {"cpu": 5})
    inside, waits, readings = [False], [], []
    step, item, tolist = Trainer.step, torch.Tensor.item, torch.Tensor.tolist

    def watched_step(trainer, *batch):
        inside[0] = True
        results = step(trainer, *batch)
        inside[0] = False
        return results

    def watched(read, tensor):
        # The optimizer's own count is on the host here; on CUDA it is on the device, see `capturable`.
        if inside[0] and "optim" not in sys._getframe(2).f_code.co_filename:
            waits.append(sys._getframe(2).f_code)
        if read is tolist and tensor.dim() == 2:
            readings.append(len(tensor))
        return read(tensor)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: watched(item, tensor))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: watched(tolist, tensor))
    assert run(images, tmp_path / "run", "--batch_size", 1, "--max_iterations", 14, "--max_grad_norm", 10) == 0
    assert waits == [] and readings == [5, 5, 4]


def test_a_checkpoint_of_the_code_before_goes_on_as_it_would_have_then(images, tmp_path):
    """`data/glow_model_6.pt` and the tables are of a run of the code before epochs were counted in good steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(DATA / "glow_model_6.pt", folder)
    resumed = ["--saved_model", folder, "--max_iterations", 9, "--max_grad_norm", 10]
    assert run(images, folder, *resumed, model=OLD) == 0
    for name, n in (("losses.csv", 3), ("epochs.csv", 1)):
        expected = rows(DATA / name)[-n:]
        for row, then in zip(rows(folder / name), expected, strict=True):
            assert row.keys() == then.keys()
            for key in row.keys() - {"images_per_second"}:
                assert float(row[key]) == pytest.approx(float(then[key]), rel=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("last", [3, 4, 8])
def test_spoilt_weights_are_not_saved(last, wrong, images, tmp_path, capsys, monkeypatch):
    folder, step = tmp_path / "run", Trainer.step

    def spoiling(trainer, *batch):
        result = step(trainer, *batch)
        if trainer.iteration == 3:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(wrong)
        return result

    monkeypatch.setattr(Trainer, "step", spoiling)
    assert run(images, folder, "--max_iterations", last, "--save_every", 2) == 1
    said = capsys.readouterr().err
    assert "is not finite, the run has diverged" in said or "not finite in 10 steps in a row" in said
    assert "Traceback" not in said
    assert [path.name for path in ckpt.list_checkpoints(folder)] == ["glow_model_2.pt"]
