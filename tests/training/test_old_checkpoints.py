"""A checkpoint written before training was rearranged goes on as it would have then.

`data/waveflow_5` is of a run with a moving average, warm-up, decay and one skipped step, which the schedule of that
time left out; `data/steps_after.json` says what the code of that time made of the next five steps.
"""

import json
from pathlib import Path

import pytest
import torch

import checkpoint as ckpt
from config import load_config
from training.trainer import Trainer

DATA = Path(__file__).with_name("data")


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    return 0.5 * torch.randn(2, 1024, generator=generator), torch.randn(2, 80, 5, generator=generator)


@pytest.fixture
def resumed(corpus, tmp_path):
    """A trainer that goes on from the old checkpoint, and what is expected of it."""
    expected = json.loads((DATA / "steps_after.json").read_text())
    lists = {"training_files": str(corpus / "train.txt"), "test_files": str(corpus / "test.txt")}
    expected["config"]["data_config"].update(lists)
    (tmp_path / "config.json").write_text(json.dumps(expected["config"]))
    start = ckpt.read_checkpoint(DATA / "waveflow_5")
    config = load_config(tmp_path / "config.json")
    return Trainer(config, torch.device("cpu"), tmp_path / "run", start, warm=False), expected


def sums(parameters):
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return [flat.sum().item(), flat.square().sum().item()]


def test_the_next_steps_are_those_of_the_code_that_wrote_it(resumed):
    trainer, expected = resumed
    rows = []
    for step in range(6, 11):
        rate = trainer.learning_rate
        rows.append([rate, *(value.item() for value in trainer.step(*batch(step)))])
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected["rows"]), atol=1e-5, rtol=1e-5)
    assert [row[0] for row in rows] == [row[0] for row in expected["rows"]]
    assert trainer.iteration == expected["iteration"]
    assert sums(trainer.model.parameters()) == pytest.approx(expected["weights"], rel=1e-6)
    assert sums(trainer.evaluated.parameters()) == pytest.approx(expected["average"], rel=1e-6)
    assert sums(trainer.evaluated.parameters()) != pytest.approx(expected["weights"], rel=1e-6)


def test_written_again_it_is_the_same_file(resumed):
    trainer, _ = resumed
    again, old = ckpt.load_checkpoint(trainer.save()), ckpt.load_checkpoint(DATA / "waveflow_5")
    assert again.keys() - {"mel_statistics"} == old.keys()  # a new file also says what its mels are like
    for entry in ("model", "ema"):
        assert all(torch.equal(again[entry][name], value) for name, value in old[entry].items())
    assert list(again["model"]) == list(old["model"])  # the order of the optimizer's parameters
    for entry in ("scheduler", "iteration", "learning_rate"):
        assert again[entry] == old[entry]
    for index, moments in old["optimizer"]["state"].items():
        assert all(torch.equal(again["optimizer"]["state"][index][name], value) for name, value in moments.items())
