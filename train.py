"""Train, evaluate, average and synthesize with WaveFlow and NanoFlow vocoders.

python train.py -c CONFIG                       train; from train_config.checkpoint_path if that is set
python train.py -c CONFIG --resume latest       go on with an interrupted run
python train.py -c CONFIG --check_data          look at every clip before training
python train.py -c CONFIG --evaluate            log-likelihood of the test clips
python train.py -c CONFIG --synthesize          the test list to wav files
python train.py -c CONFIG -a 20 [...]           the same from the average of the newest 20 checkpoints
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import checkpoint as ckpt
from audio import write_wav
from checkpoint import Checkpoint, Start
from config import REMEDIES, Config, load_config
from corpora.check import inspect_corpus, report_text, write_report
from data import (
    ClipDataset,
    check_synthesis_entries,
    load_synthesis_entry,
    output_names,
    overlap_warning,
    read_file_list,
    read_test_files,
    read_test_lists,
)
from evaluation.comparison import compare_with_recording
from evaluation.likelihood import clip_likelihoods, summarise_lists, write_likelihoods
from fast.engine import slow_precision_warning
from harness import terminal
from harness.arguments import number, whole_number
from harness.devices import choose_device, make_deterministic
from harness.errors import InputError
from harness.folder import locked_run, record_start
from harness.processes import gather, held_by_main, is_main, on_main, process_group, report_error, share, world_size
from harness.stopping import StopRequest, exit_status
from model import FlowVocoder, count_parameters
from training.loop import train_until
from training.precision import slow_half_warning
from training.trainer import Trainer
from vocoder import Clip, Sound, Vocoder, has_average, trained_model


@dataclass(frozen=True)
class Training:
    """Flags of a training run, beyond its config."""

    warm_start: bool  # take only the weights of the checkpoint
    max_iterations: int | None
    max_hours: float | None


@dataclass(frozen=True)
class Synthesis:
    """Flags of a synthesis."""

    temp: float  # standard deviation of the noise
    precision: str | None  # of the products; None: that of the weights
    batch_seconds: float | None  # of audio at once; None: as the device likes
    match_mel: int  # passes of mel matching


# --- the jobs ---------------------------------------------------------------------------------------------


def train(config: Config, device: torch.device, start: Start, how: Training) -> int:
    """Train until `epochs`, --max_iterations, --max_hours or a signal; returns the exit status."""
    stop = StopRequest(how.max_hours)
    with held_by_main(locked_run(config.run_folder)):
        checkpoint = on_main(lambda: _begin_from(config, start, how.warm_start))
        trainer = Trainer(config, device, config.run_folder, checkpoint, warm=how.warm_start)
        last = config.train_config.epochs * trainer.loader.batch_sampler.batches_per_epoch
        last = min(last, how.max_iterations or last)
        test_files = read_test_files(config.data_config)
        _warn(overlap_warning(trainer.loader.dataset.files, test_files), slow_half_warning(config.train_config, device))
        test_clips = ClipDataset(share(test_files), config.data_config, max_length=config.data_config.segment_length)
        if trainer.iteration >= last:
            terminal.say(
                f"already at iteration {trainer.iteration}; there is nothing to train up to iteration {last} "
                f"({config.train_config.epochs} epochs of this corpus, or --max_iterations); --warm_start counts anew"
            )
            return 0
        load_synthesis_entry(test_files[0], config.data_config, test_clips.mel)  # each checkpoint's sample needs it
        _record_and_say(trainer, last)
        saved = train_until(last, trainer, test_clips, stop)
    return stop.exit_status(saved, finished=trainer.iteration >= last, resume="go on with --resume latest")


def check_data(config: Config) -> int:
    """Look at every clip of both lists; exit status 1 where a run would fail or learn the wrong thing."""
    training_files, test_files = read_file_list(config.data_config.training_files), read_test_files(config.data_config)
    clips = on_main(lambda: inspect_corpus(training_files, test_files, config.data_config))
    path = config.run_folder / "data_check.csv"
    on_main(lambda: write_report(path, clips))
    terminal.say(f"{report_text(clips)}\nevery clip: {path}")
    return int(any(clip.severity == "error" for clip in clips))


def evaluate(config: Config, device: torch.device, start: Start) -> int:
    """Log-likelihood over the full test clips, per clip in a CSV and averaged."""
    lists = read_test_lists(config.data_config)
    clips = ClipDataset(share(list(itertools.chain(*lists.values()))), config.data_config)
    model, name = _trained(config, device, start)
    results = gather(clip_likelihoods(model, clips, config.train_config.sigma, device))
    path = config.run_folder / "evaluation" / f"{name}.csv"
    on_main(lambda: write_likelihoods(path, results))
    sigma = config.train_config.sigma
    for of, mean in summarise_lists(results, lists).items():
        title = name if len(lists) == 1 else f"{name}, {of}"
        terminal.say(f"{title}: {mean}{'' if sigma == 1 else f', at sigma {sigma:g}'}")
    terminal.say(f"per clip: {path}")
    return 0


def synthesize(config: Config, device: torch.device, start: Start, how: Synthesis) -> int:
    """Every entry of the test list (wav or mel) to a wav named after it, a few at once."""
    files = read_test_files(config.data_config)
    check_synthesis_entries(files, config.data_config)  # before the first wav is written
    model, name = _trained(config, device, start)
    _warn(slow_precision_warning(how.precision, device))
    vocoder = Vocoder(model, config.data_config, how.precision, name)
    matched = f"_matched{how.match_mel}" if how.match_mel else ""
    folder = config.run_folder / "synthesis" / f"{name}_temp{how.temp:g}{matched}"
    samples, seconds = 0, 0.0
    clips = _clips(vocoder, files, how.temp, config.train_config.seed)
    for sounds in vocoder.synthesize(clips, how.batch_seconds, how.match_mel):
        _write_batch(sounds, folder, vocoder)
        samples += sum(len(sound.audio) for sound in sounds)
        seconds += sum(sound.seconds for sound in sounds)
    samples, seconds = map(sum, zip(*gather([(samples, seconds)]), strict=True))
    terminal.say(f"{len(files)} clip(s): {_speed(samples, seconds, vocoder.sampling_rate)}\nwavs: {folder}")
    return 0


# --- where they start -------------------------------------------------------------------------------------


def _begin_from(config: Config, start: Start, warm: bool) -> Checkpoint | None:
    """The checkpoint that training begins with, or None; InputError where it would overwrite what came later."""
    checkpoint = ckpt.starting_point(config, start)
    if warm and checkpoint is None:
        raise InputError("--warm_start takes weights from a checkpoint: --set train_config.checkpoint_path=FILE")
    first = 0 if checkpoint is None or warm else checkpoint.iteration
    found = ckpt.list_checkpoints(config.run_folder)
    if later := [path for path in found if int(path.name.split("_")[1]) > first and not start.resume]:
        raise InputError(
            f"{config.run_folder} already holds {len(later)} checkpoint(s) beyond iteration {first}; go on with "
            "--resume latest, start from one with --set train_config.checkpoint_path=FILE, or choose another "
            "train_config.output_directory"
        )
    return checkpoint


def _trained(config: Config, device: torch.device, start: Start) -> tuple[FlowVocoder, str]:
    """The model to evaluate or synthesize with, and the name of its checkpoint."""
    checkpoint = on_main(lambda: ckpt.starting_point(config, start) or ckpt.newest_whole(config))
    if checkpoint is None:
        raise InputError(
            f"no checkpoint in {config.run_folder}; train first, or name one: --set train_config.checkpoint_path=FILE"
        )
    averaged = ", moving average" if has_average(checkpoint, config) else ""
    terminal.say(f"weights: {checkpoint.name}, iteration {checkpoint.iteration}{averaged}")
    torch.backends.cudnn.allow_tf32 = False  # likelihoods and audio as exact as on the CPU
    return trained_model(checkpoint, config).to(device), checkpoint.name


# --- what they say and write ------------------------------------------------------------------------------


def _warn(*warnings: str | None) -> None:
    for warning in warnings:
        if warning and is_main():
            terminal.warn(warning)


def _record_and_say(trainer: Trainer, last: int) -> None:
    config, model, device = trainer.config, trainer.model, trainer.device
    facts = {"device": str(device), "processes": world_size(), "iterations": [trainer.iteration, last]}
    on_main(lambda: record_start(trainer.folder, config.to_dict(), **facts))
    several = f"{world_size()} processes, each with a {device.type} device"
    terminal.say(
        f"{config.waveflow_config.model_name}: {count_parameters(model):,} parameters "
        f"({count_parameters(model, synthesis=True):,} for synthesis), {len(trainer.loader.dataset.files)} clips, "
        f"iterations {trainer.iteration} to {last} on {device if world_size() == 1 else several}, "
        f"files in {trainer.folder}"
    )


def _clips(vocoder: Vocoder, files: Sequence[str], temp: float, seed: int) -> Iterator[Clip]:
    """Share of this process in the clips of a list; on the main process the first recording stays, for comparison."""
    compared = is_main()
    for place, (file, output) in share(list(enumerate(zip(files, output_names(files), strict=True)))):
        clip = vocoder.read(file, temp, seed + place)  # with noise that does not depend on who does the others
        yield replace(clip, output=output, recording=clip.recording if compared else None)
        compared = compared and clip.recording is None


def _write_batch(sounds: Sequence[Sound], folder: Path, vocoder: Vocoder) -> None:
    """Wav and line of each sound; InputError names one that is not finite, after the others have been written."""
    shared = f" (its share of a batch of {len(sounds)})" if len(sounds) > 1 else ""
    for sound in filter(lambda sound: sound.is_finite, sounds):
        write_wav(folder / sound.clip.output, sound.audio, vocoder.sampling_rate)
        speed = _speed(len(sound.audio), sound.seconds, vocoder.sampling_rate)
        terminal.say(f"{sound.clip.output}: {speed}{shared}")
        if (recording := sound.clip.recording) is not None:
            picture = (folder / sound.clip.output).with_suffix(".png")
            distances = compare_with_recording(sound.audio, recording, vocoder.mel_spectrogram, picture)
            shown = ", ".join(f"{distance:.3f} of the {name}" for name, distance in distances.items())
            terminal.say(f"log-mel distance to the recording: {shown}; picture: {picture}")
    for sound in sounds:
        if not sound.is_finite:
            raise InputError(f"{sound.clip.source}: the synthesis is not finite; train longer, or lower --temp")


def _speed(samples: int, seconds: float, sampling_rate: int) -> str:
    return (
        f"{samples / sampling_rate:.2f} s of audio in {seconds:.2f} s, {samples / seconds / 1000:.1f} kHz, "
        f"{samples / sampling_rate / seconds:.2f} x real time"
    )


# --- command line -----------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the published train.py, and a few more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, job = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("-c", "--config", required=True, metavar="FILE", help="experiment file, see configs/")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config value")
    job("-v", "--evaluate", action="store_true", help="log-likelihood of the full test clips")
    job("-s", "--synthesize", action="store_true", help="synthesize every wav or mel of the test list")
    job("--check_data", action="store_true", help="look for clips that would spoil the training, and do nothing else")
    add("-w", "--warm_start", action="store_true", help="take only the weights of the checkpoint, start at iteration 0")
    add("-a", "--average_checkpoint", type=whole_number(1), metavar="N", help="start from the average of the newest N")
    add("-e", "--epsilon", type=float, help="with -a: exponential weights epsilon (1 - epsilon)^i instead of the mean")
    add("--resume", choices=["latest"], help="go on from the newest whole checkpoint of the run, if it has any")
    add("--max_iterations", type=whole_number(1), metavar="N", help="stop training at iteration N")
    add(
        "--max_hours",
        type=number(0, above=True),
        metavar="H",
        help="save and end after H hours; --resume goes on",
    )
    add("-t", "--temp", type=number(0), default=1.0, help="standard deviation of the noise of synthesis, default 1")
    add("--precision", choices=["float32", "bfloat16", "float16"], help="of the products of synthesis, default float32")
    add("--batch_seconds", type=number(0), metavar="S", help="audio synthesized at once; 0: a clip at a time")
    add("--match_mel", type=whole_number(0), metavar="N", help="filter each synthesis N times towards its mel")
    add("--deterministic", action="store_true", help="the same results twice on the same machine, at some speed")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA where there is any)")
    options = parser.parse_args(arguments)
    if options.resume and (options.average_checkpoint is not None or options.warm_start):
        parser.error("--resume, --average_checkpoint and --warm_start all say where to start; give one")
    for flag in ("precision", "batch_seconds", "match_mel"):
        if getattr(options, flag) is not None and not options.synthesize:
            parser.error(f"--{flag} is that of synthesis; give --synthesize with it")
    if options.epsilon is not None and options.average_checkpoint is None:
        parser.error("--epsilon weights an average; give -a N with it")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: _run(options), report_error)


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    if options.deterministic:
        make_deterministic()
    device = choose_device(options.device)
    place, meet = config.dist_config, "--set dist_config.dist_url=env:// leaves the place to torchrun"
    with process_group(device, place.dist_backend, place.dist_url, meet=meet, resume=REMEDIES.resume):
        return _job(options, config, device)


def _job(options: argparse.Namespace, config: Config, device: torch.device) -> int:
    trains = not (options.evaluate or options.synthesize)
    start = Start(
        resume=options.resume == "latest",
        average=options.average_checkpoint,
        warm=options.warm_start,
        epsilon=options.epsilon,
        must_write=trains,
    )
    if options.check_data:
        return check_data(config)
    if options.evaluate:
        return evaluate(config, device, start)
    if options.synthesize:
        how = Synthesis(options.temp, options.precision, options.batch_seconds, options.match_mel or 0)
        return synthesize(config, device, start, how)
    return train(config, device, start, Training(options.warm_start, options.max_iterations, options.max_hours))


if __name__ == "__main__":
    sys.exit(main())
