"""Train, evaluate, average and synthesize with WaveFlow and NanoFlow vocoders.

python train.py -c CONFIG                       train; from train_config.checkpoint_path if that is set
python train.py -c CONFIG --resume latest       go on with an interrupted run
python train.py -c CONFIG --check_data          look at every clip before training
python train.py -c CONFIG --evaluate            log-likelihood of the test clips
python train.py -c CONFIG --synthesize          the test list to wav files
python train.py --synthesize --weights nanoflow --input PATH... --output DIR
                                                sounds, mels and folders, by weights that know their config
python train.py -c CONFIG -a 20 [...]           the same from the average of the newest 20 checkpoints
python train.py --report RUN_DIR...             one HTML page about one run or several
"""

if __name__ == "__main__":
    import harness.start  # noqa: F401

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch

import checkpoint as ckpt
from checkpoint import Checkpoint, Start
from config import REMEDIES, Config, load_config
from corpora.check import inspect_corpus, report_text, write_report
from data import (
    ClipDataset,
    load_synthesis_entry,
    overlap_warning,
    read_file_list,
    read_paired_mels,
    read_test_files,
    read_test_lists,
    read_texts,
    tell_of_a_long_list,
)
from evaluation.likelihood import clip_likelihoods, summarise_lists, write_likelihoods
from fast.engine import slow_precision_warning
from harness import terminal
from harness.checkpoints import iteration_of
from harness.devices import choose_device, make_deterministic
from harness.errors import InputError
from harness.folder import locked_run, record_start
from harness.processes import gather, held_by_main, is_main, on_main, process_group, report_error, share, world_size
from harness.stopping import StopRequest, exit_status, leave
from jobs import arguments as flags
from jobs.metrics import measure_all
from jobs.report import write_run_report
from jobs.synthesis import STDOUT, Request, synthesize_all
from model import FlowVocoder, count_parameters
from synthesis.mel_checks import MelReader, MelStatistics
from training.loop import train_until
from training.precision import slow_half_warning
from training.resuming import check_resumable
from training.trainer import Trainer
from vocoder import Finish, Vocoder, config_of, find_checkpoint, has_average, trained_model


@dataclass(frozen=True)
class Training:
    """Flags of a training run, beyond its config."""

    warm_start: bool  # take only the weights of the checkpoint
    max_iterations: int | None
    max_hours: float | None


# --- the jobs ---------------------------------------------------------------------------------------------


def train(config: Config, device: torch.device, start: Start, how: Training) -> int:
    """Train until `epochs`, --max_iterations, --max_hours or a signal; returns the exit status."""
    with StopRequest(how.max_hours) as stop:
        tell_of_a_long_list(config.data_config)
        with held_by_main(locked_run(config.run_folder)):
            checkpoint = on_main(lambda: _begin_from(config, start, how.warm_start))
            trainer = Trainer(config, device, config.run_folder, checkpoint, warm=how.warm_start)
            last = config.train_config.epochs * trainer.loader.batch_sampler.batches_per_epoch
            last = min(last, how.max_iterations or last)
            if trainer.iteration >= last:
                epochs = f"{config.train_config.epochs} epochs of this corpus"
                terminal.say(
                    f"already at iteration {trainer.iteration}; there is nothing to train up to iteration {last} "
                    f"({epochs}, or --max_iterations); --warm_start counts anew"
                )
                saved = True
            else:
                test_clips = _test_clips(trainer)
                _record_and_say(trainer, last)
                saved = train_until(last, trainer, test_clips, stop)
        resume = "go on with --resume latest"
        if not ckpt.list_checkpoints(config.run_folder):
            resume = "nothing was saved yet: start it again as before"
        return stop.exit_status(saved, finished=trainer.iteration >= last, resume=resume)


def _test_clips(trainer: Trainer) -> ClipDataset:
    """This process's share of the clips of each evaluation; says what is odd about the lists."""
    config = trainer.config
    test_files = read_test_files(config.data_config)
    overlap = overlap_warning(trainer.loader.dataset.files, test_files)
    _warn(overlap, slow_half_warning(config.train_config, trainer.device))
    mels, segment = read_paired_mels(config.data_config.test_lists), config.data_config.segment_length
    test_clips = ClipDataset(share(test_files), config.data_config, max_length=segment, mels=mels)
    if trimmed := trainer.loader.dataset.trimmed:
        terminal.tell(f"{trimmed} mels are a frame longer or shorter than their clips; that frame is left out")
    load_synthesis_entry(test_files[0], config.data_config, test_clips.mel)  # each checkpoint's sample needs it
    return test_clips


def check_data(config: Config) -> int:
    """Look at every clip of both lists; exit status 1 where a run would fail or learn the wrong thing."""
    training_files, test_files = read_file_list(config.data_config.training_files), read_test_files(config.data_config)
    data, context = config.data_config, config.train_config.crop_context
    lists = [data.training_files, *data.test_lists]
    clips = on_main(lambda: inspect_corpus(training_files, test_files, data, read_texts(lists), context))
    path = config.run_folder / "data_check.csv"
    on_main(lambda: write_report(path, clips))
    terminal.say(f"{report_text(clips)}\nevery clip: {path}")
    return int(any(clip.severity == "error" for clip in clips))


def evaluate(config: Config, device: torch.device, start: Start) -> int:
    """Log-likelihood over the full test clips, per clip in a CSV and averaged."""
    lists = read_test_lists(config.data_config)
    mels = read_paired_mels(config.data_config.test_lists)
    clips = ClipDataset(share(list(itertools.chain(*lists.values()))), config.data_config, mels=mels)
    model, name, _ = _trained(config, device, start)
    results = gather(clip_likelihoods(model, clips, config.train_config.sigma, device))
    path = config.run_folder / "evaluation" / f"{name}.csv"
    on_main(lambda: write_likelihoods(path, results))
    sigma = config.train_config.sigma
    for of, mean in summarise_lists(results, lists).items():
        title = name if len(lists) == 1 else f"{name}, {of}"
        terminal.say(f"{title}: {mean}{'' if sigma == 1 else f', at sigma {sigma:g}'}")
    terminal.say(f"per clip: {path}")
    return 0


def measure(config: Config, device: torch.device, start: Start, how: Request, others: Sequence[str]) -> int:
    """Metrics of the recordings' copy-syntheses, beside other checkpoints and folders of another vocoder's sounds."""
    entries = how.entries(config)
    model, name, _ = _trained(config, device, start)
    _warn(slow_precision_warning(how.precision, device))
    path = measure_all(Vocoder(model, config.data_config, how.precision, name), others, entries, how, config)
    terminal.say(f"per clip: {path}")
    return 0


def synthesize(config: Config, device: torch.device, start: Start, how: Request) -> int:
    """Every entry of the test list, or every input named (wav or mel), to a sound file named after it."""
    entries = how.entries(config)  # checked before the first file is written
    model, name, statistics = _trained(config, device, start)
    _warn(slow_precision_warning(how.precision, device))
    reader = MelReader(config.data_config, how.mel_preset, MelStatistics.read(statistics), terminal.warn)
    vocoder = Vocoder(model, config.data_config, how.precision, name, reader)
    synthesize_all(vocoder, entries, how, config)
    return 0


# --- where they start -------------------------------------------------------------------------------------


def _begin_from(config: Config, start: Start, warm: bool) -> Checkpoint | None:
    """The checkpoint that training begins with, or None; InputError where it would overwrite what came later."""
    checkpoint = ckpt.starting_point(config, start, check_resumable)
    if warm and checkpoint is None:
        raise InputError("--warm_start takes weights from a checkpoint: give --weights NAME_OR_PATH")
    first = 0 if checkpoint is None or warm else checkpoint.iteration
    found = ckpt.list_checkpoints(config.run_folder)
    if later := [path for path in found if iteration_of(path, ckpt.FILE_NAME) > first and not start.resume]:
        raise InputError(
            f"{config.run_folder} already holds {len(later)} checkpoint(s) beyond iteration {first}; go on with "
            "--resume latest, start from one with --set train_config.checkpoint_path=FILE, or choose another "
            "train_config.output_directory"
        )
    return checkpoint


def _trained(config: Config, device: torch.device, start: Start) -> tuple[FlowVocoder, str, Any]:
    """The model to evaluate or synthesize with, the name of its checkpoint, and the mel statistics that this knows."""
    checkpoint = on_main(lambda: ckpt.starting_point(config, start) or ckpt.newest_whole(config))
    if checkpoint is None:
        raise InputError(
            f"no checkpoint in {config.run_folder}; train first, or name one: --set train_config.checkpoint_path=FILE"
        )
    averaged = ", moving average" if has_average(checkpoint, config) else ""
    terminal.tell(f"weights: {checkpoint.name}, iteration {checkpoint.iteration}{averaged}")
    return trained_model(checkpoint, config).to(device), checkpoint.name, checkpoint.mel_statistics


# --- what they say and write ------------------------------------------------------------------------------


def _warn(*warnings: str | None) -> None:
    for warning in warnings:
        if warning and is_main():
            terminal.warn(warning)


def _record_and_say(trainer: Trainer, last: int) -> None:
    config, model, device = trainer.config, trainer.model, trainer.device
    facts = {"device": str(device), "processes": world_size(), "iterations": [trainer.iteration, last]}
    lengths = trainer.loader.dataset.lengths
    facts |= {"training_clips": len(lengths), "training_samples": sum(lengths)}
    on_main(lambda: record_start(trainer.folder, config.to_dict(), **facts))
    several = f"{world_size()} processes, each with a {device.type} device"
    terminal.tell(
        f"{config.waveflow_config.model_name}: {count_parameters(model):,} parameters "
        f"({count_parameters(model, synthesis=True):,} for synthesis), {len(trainer.loader.dataset.files)} clips, "
        f"iterations {trainer.iteration} to {last} on {device if world_size() == 1 else several}, "
        f"files in {trainer.folder}"
    )


# --- command line -----------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of this command line."""
    return flags.parse_arguments(__doc__, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: _run(options), report_error, options.quiet)


def _run(options: argparse.Namespace) -> int:
    config, given = _config(options)
    if options.deterministic:
        make_deterministic()
    device = choose_device(options.device)
    if options.report is not None:
        with redirect_stdout(sys.stderr) if options.output == STDOUT else nullcontext():
            write_run_report(options.report or [config.run_folder], options.output, device)
        return 0
    place, meet = config.dist_config, "--set dist_config.dist_url=env:// leaves the place to torchrun"
    group = process_group(device, place.dist_backend, place.dist_url, meet=meet, resume=REMEDIES.resume)
    # Where the sound goes to stdout, words do not.
    with group, redirect_stdout(sys.stderr) if options.output == STDOUT else nullcontext():
        return _job(options, config, device, given)


def _config(options: argparse.Namespace) -> tuple[Config, Checkpoint | None]:
    """The experiment, and the checkpoint of --weights, which knows its own."""
    config = load_config(options.config, options.set) if options.config else None
    if options.weights is None:
        return config, None
    checkpoint = find_checkpoint(options.weights, terminal.warn)
    if options.warm_start:
        path = f"train_config.checkpoint_path={json.dumps(str(checkpoint.path))}"
        return load_config(options.config, [*options.set, path]), None
    return config_of(checkpoint, config, "give it with -c FILE", options.set), checkpoint


def _job(options: argparse.Namespace, config: Config, device: torch.device, given: Checkpoint | None) -> int:
    job = flags.job_of(options)
    trains = job == flags.TRAINING
    start = Start(
        resume=options.resume == "latest",
        average=options.average_checkpoint,
        warm=options.warm_start and trains,
        epsilon=options.epsilon,
        given=given,
        must_write=trains,
    )
    if job == flags.CHECK:
        return check_data(config)
    if job == flags.METRICS:
        return measure(config, device, start, _request(options), options.metrics)
    if job == flags.EVALUATE:
        return evaluate(config, device, start)
    if job == flags.SYNTHESIZE:
        return synthesize(config, device, start, _request(options))
    return train(config, device, start, Training(options.warm_start, options.max_iterations, options.max_hours))


def _request(options: argparse.Namespace) -> Request:
    return Request(
        inputs=options.input or (),
        output=options.output,
        format=options.format or "wav",
        temps=tuple(dict.fromkeys(options.temp or [1.0])),
        seed=options.seed,
        mel_preset=options.mel_preset,
        precision=options.precision,
        batch_seconds=options.batch_seconds,
        finish=Finish(options.match_mel or 0, options.denoise or 0.0),
    )


if __name__ == "__main__":
    leave(main())
