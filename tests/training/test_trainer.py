"""What training may do besides the published schedule: parts of a batch, averages, warm-up, compiling, lines."""

import csv
import re

import pytest
import torch

import checkpoint as ckpt
from config import TrainConfig, load_config
from fast import estimators
from fast.estimators import Execution, WinogradEstimator
from harness import loop
from harness.errors import InputError
from modules import FlowLoss
from tests.support.experiments import fails, losses, run
from tests.support.vocoders import random_input, random_vocoder
from training.learner import compile_errors_named
from training.optimisation import MovingAverage, make_schedule, schedule_state
from training.trainer import Trainer

CPU = torch.device("cpu")


def make_trainer(config, tmp_path, **changes):
    settings = {f"train_config__{key}": value for key, value in changes.items()}
    trainer = Trainer(load_config(config(**settings)), CPU, tmp_path / "run", None, warm=False)
    with torch.no_grad():
        for own, other in zip(trainer.model.parameters(), random_vocoder().parameters(), strict=True):
            own.copy_(other)
    return trainer


# --- parts of a batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(config, tmp_path, half):
    results = []
    for parts in (1, 2, 4):
        trainer = make_trainer(config, tmp_path, batch_size=4, accumulation_steps=parts, fp16_run=half)
        audio, mel = random_input(trainer.model, batch=4)
        terms = torch.stack(trainer.step(audio, mel))
        results.append([terms, *(parameter.grad for parameter in trainer.model.parameters())])
    whole, *others = results
    for other in others:
        for value, expected in zip(other, whole, strict=True):
            assert (value - expected).norm() <= (0.03 if half else 1e-5) * expected.norm() + 1e-7


@pytest.mark.parametrize("coupling_type", ["waveflow", "nanoflow"])
def test_gradients_with_recomputed_activations_are_equal(coupling_type):
    model = random_vocoder(coupling_type)
    audio, mel = random_input(model)
    gradients = []
    for recompute in (False, True):
        model.execution = Execution(checkpoint_activations=recompute)
        model.zero_grad()
        FlowLoss()(model(audio, mel)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- learning rate ----------------------------------------------------------------------------------------


def settings_of(**settings):
    return TrainConfig(learning_rate=0.8, lr_decay_step=3, lr_decay_gamma=0.5, **settings)


def scheduled(steps=0, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    return make_schedule(optimizer, settings_of(**settings), steps)


def rates(schedule, n):
    found = []
    for _ in range(n):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_schedule_is_that_of_steplr():
    schedule = scheduled()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(schedule, 8) == pytest.approx(expected)
    saved = schedule_state(schedule, settings_of())
    assert {name: reference.state_dict()[name] for name in saved} == saved  # the published code can take it up


def test_warm_up_rises_to_the_schedule():
    assert rates(scheduled(warmup_steps=4), 8) == pytest.approx([0.2, 0.4, 0.6, 0.4, 0.4, 0.4, 0.2, 0.2])


def test_a_schedule_goes_on_where_it_was():
    assert rates(scheduled(steps=2), 3) == pytest.approx([0.8, 0.4, 0.4])
    saved = schedule_state(scheduled(steps=2), settings_of())
    assert (saved["last_epoch"], saved["_step_count"], saved["_last_lr"]) == (2, 3, [0.8])


def test_a_skipped_step_counts_in_the_schedule_and_leaves_the_weights(config, tmp_path):
    trainer = make_trainer(config, tmp_path, learning_rate=0.8, lr_decay_step=2, lr_decay_gamma=0.5)
    audio, mel = random_input(trainer.model)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    rates = []
    for _ in range(3):
        rates.append(trainer.learning_rate)
        trainer.step(audio * float("nan"), mel)
    assert all(torch.equal(*both) for both in zip(before, trainer.model.parameters(), strict=True))
    assert (trainer.iteration, rates) == (3, [0.8, 0.8, 0.4])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "average"])
def test_weights_or_averages_that_are_not_finite_are_named(where, wrong, config, tmp_path):
    trainer = make_trainer(config, tmp_path, ema_decay=0.9)
    assert trainer.spoilt() is None
    spoilt = trainer.model if where == "model" else trainer.average.module
    name, parameter = list(spoilt.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] = wrong
    assert trainer.spoilt() == name


@pytest.mark.parametrize("last", [3, 4])
def test_a_run_that_diverges_ends_with_the_good_checkpoint_as_its_newest(last, config, tmp_path, capsys, monkeypatch):
    """The step whose update spoils the weights has a finite loss; at its end, or one later, comes the checkpoint."""
    keep = {"train_config__keep_checkpoints": 1, "train_config__iters_per_checkpoint": 2}
    path, folder, step = config(**keep), tmp_path / "runs" / "tiny", Trainer.step

    def spoiling(trainer, *batch):
        result = step(trainer, *batch)
        if trainer.iteration == 3:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))
        return result

    monkeypatch.setattr(Trainer, "step", spoiling)
    assert run("-c", path, "--max_iterations", last) == 1
    said = capsys.readouterr().err
    assert f"iteration {last}: " in said and "is not finite, the run has diverged and this checkpoint was not" in said
    assert [found.name for found in ckpt.list_checkpoints(folder)] == ["waveflow_2"]
    monkeypatch.undo()
    assert run("-c", path, "--resume", "latest", "--max_iterations", last) == 0


def test_warm_up_is_resumed(config, tmp_path):
    path = config(train_config__warmup_steps=4)
    assert run("-c", path, "--max_iterations", 2) == 0
    assert run("-c", path, "--max_iterations", 6, "--resume", "latest") == 0
    with open(tmp_path / "runs" / "tiny" / "losses.csv", newline="") as file:
        found = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert found == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


# --- moving average ---------------------------------------------------------------------------------------


def test_the_average_follows_the_weights_and_lets_them_be():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = MovingAverage(model, 0.5)
    expected = 0.0
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.module.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 5


def test_the_average_is_saved_resumed_evaluated_and_synthesized(config, tmp_path, capsys):
    path = config(train_config__ema_decay=0.5, train_config__learning_rate=0.01)
    assert run("-c", path, "--max_iterations", 8) == 0
    whole = tmp_path / "runs" / "tiny"
    parts = config(train_config__ema_decay=0.5, train_config__learning_rate=0.01,
                   train_config__output_directory=str(tmp_path / "parts"))  # fmt: skip
    assert run("-c", parts, "--max_iterations", 5) == 0
    assert run("-c", parts, "--max_iterations", 8, "--resume", "latest") == 0
    one, other = (ckpt.load_checkpoint(folder / "waveflow_8") for folder in (whole, tmp_path / "parts" / "tiny"))
    for entry in ("ema", "model"):
        assert all(torch.equal(one[entry][name], other[entry][name]) for name in one[entry])
    assert losses(whole) == losses(tmp_path / "parts" / "tiny")
    assert not torch.equal(one["ema"]["gates.0"], one["model"]["gates.0"])

    capsys.readouterr()
    assert run("-c", parts, "--evaluate") == 0
    averaged = capsys.readouterr().out
    assert run("-c", parts, "--evaluate", "--set", "train_config.ema_decay=0") == 0
    plain = capsys.readouterr().out
    likelihoods = [re.search(r"log-likelihood (\S+)", text)[1] for text in (averaged, plain)]
    assert "moving average" in averaged and "moving average" not in plain
    assert likelihoods[0] != likelihoods[1]
    assert run("-c", parts, "--synthesize") == 0


def test_a_damaged_average_is_named(config, tmp_path, capsys):
    path = config(train_config__ema_decay=0.5)
    assert run("-c", path, "--max_iterations", 1) == 0
    file = tmp_path / "runs" / "tiny" / "waveflow_1"
    saved = torch.load(file, weights_only=True)
    del saved["digest"]
    saved["ema"]["flows.0.multgate"] = torch.ones(1)
    torch.save(saved, file)
    start = ["--set", f"train_config.checkpoint_path={file}"]
    assert "moving average 'ema' is damaged (other shape: flows.0.multgate is [1]" in fails(
        capsys, "-c", path, "--evaluate", *start
    )


# --- compiling --------------------------------------------------------------------------------------------


def gradients_of(model, audio, mel):
    model.zero_grad()
    loss = FlowLoss()(model(audio, mel))
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("coupling_type", ["waveflow", "nanoflow"])
def test_all_flows_run_one_graph(monkeypatch, coupling_type):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(estimators._estimate, dynamic=False, fullgraph=True, backend=count)
    monkeypatch.setattr(estimators, "_compiled_estimate", lambda: compiled)
    monkeypatch.setattr(WinogradEstimator, "suits", lambda *_: False)  # as in half precision, or on a GPU
    model = random_vocoder(coupling_type)
    audio, mel = random_input(model)
    expected = gradients_of(model, audio, mel)
    for recompute in (False, True):
        model.execution = Execution(compile=True, checkpoint_activations=recompute)
        for value, plain in zip(gradients_of(model, audio, mel), expected, strict=True):
            torch.testing.assert_close(value, plain, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 1
    with torch.no_grad():
        model(*random_input(model, frames=6, batch=1))  # an evaluation is not compiled
    assert len(graphs) == 1


@pytest.mark.soak
def test_compiled_training_follows_plain_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(WinogradEstimator, "suits", lambda *_: False)
    curves = []
    for compiled in (False, True):
        path = config(train_config__compile=compiled, train_config__output_directory=str(tmp_path / str(compiled)))
        assert run("-c", path, "--max_iterations", 6) == 0
        curves.append([[float(value) for value in row] for row in losses(tmp_path / str(compiled) / "tiny")])
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), atol=1e-4, rtol=1e-4)


def test_a_compiler_that_is_missing_is_named():
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    with (
        pytest.raises(InputError, match=r"No working C\+\+ compiler found.*needs a C\+\+ compiler"),
        compile_errors_named(),
    ):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    with pytest.raises(RuntimeError, match="something else"), compile_errors_named():
        raise RuntimeError("something else")


# --- lines ------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(loop, "LINE_SECONDS", 0.0)
    assert run("-c", config(), "--max_iterations", 3) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"iteration \d+: loss", line)]
    assert [re.match(r"iteration (\d+)", line)[1] for line in lines] == ["1", "2", "3"]
    for word in ("prior", "log-determinant", "gradient norm", "lr 0.001", "samples/s"):
        assert word in lines[0]
