"""Training of runs: by the vocoder's own steps, gone on with exactly, stopped by signals; full disks, bad steps."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import training
from experiments.runs import Run
from experiments.series import run_one
from experiments.training import RunTrainer, train
from harness.errors import InputError
from harness.stopping import StopRequest
from tests.experiments.test_runs import SMALL, data, small  # noqa: F401 (a fixture)
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
VARIANTS = {
    "nanoflow": {},
    "no average": {"linear_prediction": 4, "train__ema_decay": 0},
    "no cosine": {"linear_prediction": 4, "cosine": False, "train__lr_decay_step": 2},
    "best combination": {
        "linear_prediction": 16,
        "n_height": 64,
        "bipartize": True,
        "train__crop_context": 256,
    },
    "half precision": {"linear_prediction": 4, "train__fp16_run": True},
    "dither": {"linear_prediction": 4, "variant": "dither"},
    "Student": {"linear_prediction": 4, "variant": "student"},
    "adapters": {"linear_prediction": 4, "variant": "adapters"},
}
by_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def saved_often(monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 3)


def trained(run, folder, stop=None):
    trainer, saved = train(run, folder, StopRequest() if stop is None else stop)
    assert saved
    return trainer


def everything(trainer: RunTrainer) -> dict[str, torch.Tensor]:
    """All that a step changes but the time, by name."""
    found = {f"weight {name}": value for name, value in trainer.model.state_dict().items()}
    if trainer.average is not None:
        found |= {f"average {name}": value for name, value in trainer.average.weights().items()}
    moments = trainer.optimizer.state_dict()["state"]
    found |= {f"{what} {number}": value for number, state in moments.items() for what, value in state.items()}
    return {**found, "random": torch.get_rng_state()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def wish_after(n: int, stop: StopRequest, monkeypatch) -> None:
    """Let a SIGTERM come while step n is taken."""
    step = RunTrainer.step

    def noted(self, *batch):
        results = step(self, *batch)
        if self.iteration == n:
            stop.signal = signal.SIGTERM
        return results

    monkeypatch.setattr(RunTrainer, "step", noted)


@pytest.mark.parametrize("name", ["nanoflow", "no average", "no cosine", "best combination", "half precision"])
def test_steps_are_those_of_a_vocoders_training(name, data, tmp_path):  # noqa: F811
    run = Run(small("tiny", **{**VARIANTS[name], "cosine": False}), data, 1, 5)
    own = trained(run, tmp_path / "work")
    vocoder = Trainer(run.config(), CPU, tmp_path / "run", None, warm=False)
    assert [vocoder.step(*batch)[0].item() for _, batch in zip(range(5), vocoder.loader, strict=False)] == own.losses
    for parameter, expected in zip(own.evaluated.model.parameters(), vocoder.evaluated.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@by_variant
def test_a_stopped_run_goes_on_as_if_it_had_not_been(changes, data, tmp_path, monkeypatch):  # noqa: F811
    run = Run(small("tiny", **changes), data, 1, 7)
    whole = trained(run, tmp_path / "whole")
    expected = everything(whole)
    stop = StopRequest()
    wish_after(4, stop, monkeypatch)
    stopped = trained(run, tmp_path / "stopped", stop)
    assert stopped.losses == whole.losses[:4] and not stopped.finished  # the step was finished
    resumed = trained(run, tmp_path / "stopped")
    assert resumed.losses == whole.losses
    assert_same(everything(resumed), expected)
    assert resumed.learning_rate == whole.learning_rate
    assert (tmp_path / "stopped" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()


def test_a_killed_run_goes_on_from_its_last_checkpoint(data, tmp_path, monkeypatch):  # noqa: F811
    run = Run(small("tiny", linear_prediction=4), data, 1, 7)
    expected = everything(trained(run, tmp_path / "whole"))
    step = RunTrainer.step
    monkeypatch.setattr(RunTrainer, "step", lambda self, *batch: 1 / 0 if self.iteration == 5 else step(self, *batch))
    with pytest.raises(ZeroDivisionError):
        train(run, tmp_path / "killed", StopRequest())
    monkeypatch.undo()
    resumed = RunTrainer(run, tmp_path / "killed")
    assert resumed.iteration == 3
    assert_same(everything(trained(run, tmp_path / "killed")), expected)


def test_a_checkpoint_from_before_bad_steps_were_kept_is_gone_on_with(data, tmp_path):  # noqa: F811
    run = Run(small("tiny"), data, 1, 3)
    trained(run, tmp_path)
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("digest", "bad_steps"):
        del content[name]
    del content["optimizer"]["param_groups"][0]["initial_lr"]
    torch.save(content, tmp_path / "state.pt")
    assert RunTrainer(run, tmp_path).losses == content["losses"]


def test_time_is_that_of_training_over_all_starts(data, tmp_path, monkeypatch):  # noqa: F811
    run, clock = Run(small("tiny"), data, 1, 7), [0.0]
    step = RunTrainer.step

    def slow(self, *batch):
        clock[0] += 10
        return step(self, *batch)

    monkeypatch.setattr(RunTrainer, "step", slow)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    stop = StopRequest()
    wish_after(4, stop, monkeypatch)
    assert trained(run, tmp_path, stop).seconds == 40
    clock[0] += 1000
    assert trained(run, tmp_path).seconds == 70
    assert trained(run, tmp_path).seconds == 70  # nothing was left to do


# --- what a run bears -------------------------------------------------------------------------------------


def test_a_full_disk_does_not_end_a_run(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_whole", full)
    run, stop = Run(small("tiny"), data, 1, 7), StopRequest()
    result, saved = run_one(run, tmp_path, stop)
    assert result.steps == 7 and not saved
    said = capsys.readouterr().out
    assert said.count("was not saved (No space left on device)") == 3
    wish_after(4, stop, monkeypatch)
    assert run_one(run, tmp_path, stop) == (None, False)


def test_bad_steps_are_skipped_by_name_and_many_of_them_end_a_run(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    run = Run(small("tiny", train__max_bad_steps=2), data, 1, 6)
    step, bad = RunTrainer.step, {3}

    def spoilt(self, audio, mel):
        return step(self, audio * (float("nan") if self.iteration + 1 in bad else 1), mel)

    monkeypatch.setattr(RunTrainer, "step", spoilt)
    trainer = trained(run, tmp_path / "one")
    assert trainer.finished and all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert "iteration 3: loss nan" in (said := capsys.readouterr().out) and "clip" in said
    bad |= {4, 5}
    with pytest.raises(InputError, match="2 steps in a row, up to iteration 4; this setting cannot be trained"):
        train(run, tmp_path / "two", StopRequest())


def test_a_stop_ends_a_measurement_which_is_made_later(data, tmp_path):  # noqa: F811
    run = Run(small("tiny"), data, 1, 2)
    trained(run, tmp_path / run.folder)
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    assert run_one(run, tmp_path, stop) == (None, True)
    assert run_one(run, tmp_path, StopRequest()).result.steps == 2


# --- signals to the command -------------------------------------------------------------------------------

COMMAND = """
import sys
import harness.start
from experiments import __main__ as experiments
from experiments.claims import Claim, change
from experiments.training import RunLoop
from harness.stopping import leave

RunLoop.is_due = lambda self, iteration: iteration == 2  # and at no other, in the processes of the pool too

SMALL = {small!r}
SETTINGS = tuple(change(f"order {{n}}", coupling_type="nanoflow", linear_prediction=n, **SMALL) for n in (0, 4))

if __name__ == "__main__":
    experiments.CLAIMS = (Claim("tiny", "?", SETTINGS, "order 0", seeds=1, steps=100_000),)
    leave(experiments.main(["tiny", *sys.argv[1:]]))
"""


SIGNALS = [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGHUP, 1), (signal.SIGHUP, 2)]


def started(data, tmp_path, jobs):  # noqa: F811
    """The command, which heeds hang-ups even where these tests run under nohup."""
    (tmp_path / "command.py").write_text(COMMAND.format(small=SMALL))
    flags = {"--data": data, "--work": tmp_path / "work", "--results": tmp_path / "runs.csv", "--jobs": jobs}
    command = [sys.executable, tmp_path / "command.py", *(str(word) for flag in flags.items() for word in flag)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    default = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    return subprocess.Popen(command, start_new_session=True, env=environment, **pipes, **default)


@pytest.mark.parametrize("number, jobs", SIGNALS, ids=str)
def test_a_signal_finishes_the_step_and_saves(number, jobs, data, tmp_path):  # noqa: F811
    """To all processes, as a terminal and a batch queue send it."""
    process = started(data, tmp_path, jobs)
    try:
        wait_while(process, lambda: len(list((tmp_path / "work").glob("*/state.pt"))) < jobs)
        os.killpg(process.pid, number)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number and errors == ""
    assert said.splitlines()[-1] == f"stopped by {number.name}; go on with the same command"
    states = list((tmp_path / "work").glob("*/state.pt"))
    assert len(states) == jobs and all(len(torch.load(path, weights_only=True)["losses"]) > 2 for path in states)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=str)
@pytest.mark.parametrize("after", [0.0, 0.5, 2.0])
def test_a_signal_while_the_processes_of_a_pool_start_stops_them(number, after, data, tmp_path):  # noqa: F811
    """To all of them, at some time between their first appearance and their first step."""
    process = started(data, tmp_path, jobs=2)
    try:
        wait_while(process, lambda: spawned(process.pid) < 2)
        time.sleep(after)
        os.killpg(process.pid, number)
        said, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 128 + number and errors == ""
    assert said.splitlines()[-1] == f"stopped by {number.name}; go on with the same command"


def wait_while(process, condition):
    """For what a process, which must live to do it, has yet to do."""
    until = time.monotonic() + 300
    while condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def spawned(parent):
    """Processes that Python's "spawn" began for this one."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    lines = []
    for child in children:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{child}/cmdline").read_bytes())
    return sum(b"spawn_main" in line for line in lines)
