"""A series of runs, one after the other or several at a time: each is trained, measured, and then a row of the table.

An interrupted run goes on from its checkpoint; one that stands in the table is not run again, whichever claim it was
run for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.measures import Scores, measure
from experiments.runs import RESULTS, WORK, Result, Run, add_result, read_results
from experiments.training import GO_ON, RunTrainer, train
from harness import terminal
from harness.pools import process_pool, results_of, signals_left_to_this_process
from harness.stopping import WISHES, SharedStop, StopRequest, leave_signals_to_the_main_process


class Outcome(NamedTuple):
    """Outcome of a run: its row, or None after a stop; whether its last checkpoint could be saved."""

    result: Result | None
    saved: bool = True


def run_all(runs: Sequence[Run], stop: SharedStop, results: Path = RESULTS, work: Path = WORK, jobs: int = 1) -> bool:
    """Run what is not in the table yet, several at a time if asked, each with its share of the threads.

    Returns whether the checkpoints of those that a stop ended could be saved.
    """
    done, finished, saved = read_results(results), 0, True
    missing = list({run.key: run for run in runs if run.key not in done}.values())
    if len(missing) < len(runs):
        terminal.tell(f"{len(runs) - len(missing)} of {len(runs)} runs are in {results}")
    for result, was_saved in _outcomes(missing, stop, work, jobs):
        if result is None:
            saved = saved and was_saved
            continue
        add_result(results, result)
        finished += 1
        terminal.tell(
            f"{finished} of {len(missing)}: {result.name}, seed {result.seed}, {result.steps} steps: log-likelihood "
            f"{result.test_ll:.4f}, log-mel distance {result.log_mel:.3f}, STOI {result.stoi:.3f}, "
            f"{result.seconds:.0f} s"
        )
    return saved


def _outcomes(runs: Sequence[Run], stop: SharedStop, work: Path, jobs: int) -> Iterator[Outcome]:
    if jobs == 1 or len(runs) < 2:
        yield from (run_one(run, work, stop) for run in runs)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    died = f"the process of a run died, as when memory runs out; {GO_ON}, and fewer --jobs"
    with process_pool(jobs, died, "spawn", _begin, (threads, stop.shared)) as pool:  # what they did is in checkpoints
        with signals_left_to_this_process(*WISHES):
            tasks = [pool.submit(_run_in_pool, run, work) for run in runs]
        yield from results_of(tasks)


def run_one(run: Run, work: Path, stop: StopRequest) -> Outcome:
    """Train and measure, unless stopped."""
    if stop:
        return Outcome(None)
    trainer, saved = train(run, work / run.folder, stop)
    scores = stop.unless_stopped(lambda: measure(trainer.evaluated, trainer.config)) if trainer.finished else None
    return Outcome(None if scores is None else _result(trainer, scores), saved)


def _result(trainer: RunTrainer, scores: Scores) -> Result:
    run, last = trainer.run, trainer.losses[-50:]
    return Result(
        name=run.setting.name,
        corpus=run.data.name,
        seed=run.seed,
        steps=run.steps,
        order=trainer.config.waveflow_config.linear_prediction,
        train_loss=sum(last) / len(last),
        seconds=trainer.seconds,
        cpu_seconds=trainer.cpu_seconds,
        precision=run.precision,
        settings=run.setting.text,
        **asdict(scores),
    )


# --- in a process of the pool -----------------------------------------------------------------------------

_stop: StopRequest  # the wish of the process that began this one


def _begin(threads: int, shared: Any) -> None:
    """Make a process of the pool ready: the one that began it takes the signals, and speaks of the work under way."""
    global _stop
    leave_signals_to_the_main_process(0)
    terminal.hush(True)
    torch.set_num_threads(threads)
    _stop = SharedStop(shared)


def _run_in_pool(run: Run, work: Path) -> Outcome:
    return run_one(run, work, _stop)
