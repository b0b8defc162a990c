"""Train, evaluate, average and synthesize with WaveFlow and NanoFlow vocoders.

python train.py -c CONFIG                       train; from train_config.checkpoint_path if that is set
python train.py -c CONFIG --resume latest       go on with an interrupted run
python train.py -c CONFIG --check_data          look at every clip before training
python train.py -c CONFIG --evaluate            log-likelihood of the test clips
python train.py -c CONFIG --synthesize          the test list to wav files
python train.py -c CONFIG -a 20 [...]           the same from the average of the newest 20 checkpoints
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint as ckpt
from audio import MelSpectrogram, is_mel_file, read_mel, wav_length, write_wav
from config import REMEDIES, Config, DataConfig, load_config
from corpora.check import inspect_corpus, report_text, write_report
from data import ClipDataset, load_synthesis_entry, output_names, overlap_warning, read_file_list
from evaluation.distance import log_mel_distance, noise_like
from evaluation.likelihood import clip_likelihoods, summarise, write_likelihoods
from evaluation.pictures import save_mel_figure
from fast.engine import slow_precision_warning
from harness.devices import choose_device, make_deterministic
from harness.errors import InputError
from harness.folder import locked_run, record_start
from harness.processes import (
    gather,
    held_by_main,
    is_main,
    on_main,
    process_group,
    report_error,
    share,
    world_size,
)
from harness.stopping import StopRequest, exit_status
from model import FlowVocoder, count_parameters
from training.loop import train_until
from training.precision import slow_half_warning
from training.trainer import Trainer
from vocoder import Clip, Sound, Vocoder, has_average, trained_model

# --- the jobs ---------------------------------------------------------------------------------------------


def train(config: Config, options: argparse.Namespace, device: torch.device) -> int:
    """Train until `epochs`, --max_iterations, --max_hours or a signal; returns the exit status."""
    stop = StopRequest(options.max_hours)
    folder = config.run_folder
    with held_by_main(locked_run(folder)):
        start = on_main(lambda: ckpt.starting_point(config, _start(options, must_write=True)))
        if options.warm_start and start is None:
            raise InputError("--warm_start takes weights from a checkpoint: --set train_config.checkpoint_path=FILE")
        if not options.resume:
            first = 0 if start is None or options.warm_start else start.iteration
            on_main(lambda: _refuse_to_overwrite(folder, first))
        trainer = Trainer(config, device, folder, start, warm=options.warm_start)
        training_files, test_files = trainer.loader.dataset.files, read_file_list(config.data_config.test_files)
        for warning in (overlap_warning(training_files, test_files), slow_half_warning(config.train_config, device)):
            if warning and is_main():
                print(f"warning: {warning}", file=sys.stderr)
        test_clips = ClipDataset(share(test_files), config.data_config, max_length=config.data_config.segment_length)
        last = config.train_config.epochs * trainer.loader.batch_sampler.batches_per_epoch
        last = last if options.max_iterations is None else min(last, options.max_iterations)
        if trainer.iteration >= last:
            print(f"already at iteration {trainer.iteration}; there is nothing to train up to iteration {last}")
            return 0
        load_synthesis_entry(test_files[0], config.data_config, test_clips.mel)  # each checkpoint's sample needs it
        facts = {"device": str(device), "processes": world_size(), "iterations": [trainer.iteration, last]}
        on_main(lambda: record_start(folder, config.to_dict(), **facts))
        print(
            f"{config.waveflow_config.model_name}: {count_parameters(trainer.model):,} parameters "
            f"({count_parameters(trainer.model, synthesis=True):,} for synthesis), {len(training_files)} clips, "
            f"iterations {trainer.iteration} to {last} on {_devices(device)}, files in {folder}"
        )
        saved = train_until(last, trainer, test_clips, stop)
    return stop.exit_status(saved, finished=trainer.iteration >= last, resume="go on with --resume latest")


def _devices(device: torch.device) -> str:
    return str(device) if world_size() == 1 else f"{world_size()} processes, each with a {device.type} device"


def check_data(config: Config, options: argparse.Namespace, device: torch.device) -> int:
    """Look at every clip of both lists; exit status 1 where a run would fail or learn the wrong thing."""
    training_files, test_files = map(read_file_list, (config.data_config.training_files, config.data_config.test_files))
    clips = on_main(lambda: inspect_corpus(training_files, test_files, config.data_config))
    path = config.run_folder / "data_check.csv"
    on_main(lambda: write_report(path, clips))
    print(f"{report_text(clips)}\nevery clip: {path}")
    return int(any(clip.severity == "error" for clip in clips))


def evaluate(config: Config, options: argparse.Namespace, device: torch.device) -> int:
    """Log-likelihood over the full test clips, per clip in a CSV and averaged."""
    clips = ClipDataset(share(read_file_list(config.data_config.test_files)), config.data_config)
    model, name = _load_model(config, options, device)
    results = gather(clip_likelihoods(model, clips, config.train_config.sigma, device))
    path = config.run_folder / "evaluation" / f"{name}.csv"
    on_main(lambda: write_likelihoods(path, results))
    sigma = config.train_config.sigma
    print(f"{name}: {summarise(results)}{'' if sigma == 1 else f', at sigma {sigma:g}'}\nper clip: {path}")
    return 0


def synthesize(config: Config, options: argparse.Namespace, device: torch.device) -> int:
    """Every entry of the test list (wav or mel) to a wav named after it, a few at once."""
    files = read_file_list(config.data_config.test_files)
    _check_entries(files, config.data_config)  # before the first wav is written
    model, name = _load_model(config, options, device)
    if (warning := slow_precision_warning(options.precision, device)) and is_main():
        print(f"warning: {warning}", file=sys.stderr)
    vocoder = Vocoder(model, config.data_config, options.precision)
    folder = config.run_folder / "synthesis" / f"{name}_temp{options.temp:g}"
    entries = share(list(enumerate(zip(files, output_names(files), strict=True))))
    samples, seconds = 0, 0.0
    for sounds in vocoder.synthesize(_clips(vocoder, entries, config, options.temp), options.batch_seconds):
        _write_batch(sounds, folder, vocoder)
        samples += sum(len(sound.audio) for sound in sounds)
        seconds += sum(sound.seconds for sound in sounds)
    samples, seconds = map(sum, zip(*gather([(samples, seconds)]), strict=True))
    print(f"{len(files)} clip(s): {_speed(samples, seconds, vocoder.sampling_rate)}\nwavs: {folder}")
    return 0


# --- synthesis, batch by batch ------------------------------------------------------------------------------


def _check_entries(files: Sequence[str], data: DataConfig) -> None:
    for file in files:
        read_mel(file, data.n_mel_channels) if is_mel_file(file) else wav_length(file, data.sampling_rate)


def _clips(
    vocoder: Vocoder, entries: Sequence[tuple[int, tuple[str, str]]], config: Config, temp: float
) -> Iterator[Clip]:
    """Mels and noise of (number in the list, (file, output)); on the main process the first recording stays."""
    compared = next((number for number, (file, _) in entries if is_main() and not is_mel_file(file)), None)
    for number, (file, output) in entries:
        mel, recording = load_synthesis_entry(file, config.data_config, vocoder.mel_spectrogram)
        # Noise by the number in the list does not depend on who does the others.
        clip = vocoder.clip(file, mel, temp, config.train_config.seed + number)
        yield replace(clip, output=output, recording=recording if number == compared else None)


def _write_batch(sounds: Sequence[Sound], folder: Path, vocoder: Vocoder) -> None:
    """Wav and line of each sound; InputError names one that is not finite, after the others have been written."""
    shared = f" (its share of a batch of {len(sounds)})" if len(sounds) > 1 else ""
    for sound in filter(lambda sound: sound.is_finite, sounds):
        write_wav(folder / sound.clip.output, sound.audio, vocoder.sampling_rate)
        print(f"{sound.clip.output}: {_speed(len(sound.audio), sound.seconds, vocoder.sampling_rate)}{shared}")
        if sound.clip.recording is not None:
            _compare(folder, sound, vocoder.mel_spectrogram)
    for sound in sounds:
        if not sound.is_finite:
            raise InputError(f"{sound.clip.source}: the synthesis is not finite; train longer, or lower --temp")


def _speed(samples: int, seconds: float, sampling_rate: int) -> str:
    return (
        f"{samples / sampling_rate:.2f} s of audio in {seconds:.2f} s, {samples / seconds / 1000:.1f} kHz, "
        f"{samples / sampling_rate / seconds:.2f} x real time"
    )


def _compare(folder: Path, sound: Sound, mel_fn: MelSpectrogram) -> None:
    """Picture and log-mel distance of a copy-synthesis beside its recording and white noise of the same power."""
    recording = sound.clip.recording
    heard = {"recording": recording, "synthesis": sound.audio.clamp(-1, 1), "white noise": noise_like(recording)}
    mels = {name: mel_fn(audio) for name, audio in heard.items()}
    picture = (folder / sound.clip.output).with_suffix(".png")
    save_mel_figure(picture, mels)
    distances = [f"{log_mel_distance(mels[name], mels['recording']):.3f} of the {name}" for name in list(mels)[1:]]
    print(f"log-mel distance to the recording: {', '.join(distances)}; picture: {picture}")


# --- where to start ---------------------------------------------------------------------------------------


def _start(options: argparse.Namespace, must_write: bool) -> ckpt.Start:
    return ckpt.Start(
        resume=options.resume is not None,
        average=options.average_checkpoint,
        epsilon=options.epsilon,
        must_write=must_write,
    )


def _load_model(config: Config, options: argparse.Namespace, device: torch.device) -> tuple[FlowVocoder, str]:
    start = on_main(lambda: ckpt.starting_point(config, _start(options, must_write=False)) or ckpt.newest_whole(config))
    if start is None:
        raise InputError(
            f"no checkpoint in {config.run_folder}; train first, or name one: --set train_config.checkpoint_path=FILE"
        )
    averaged = ", moving average" if has_average(start, config) else ""
    print(f"weights: {start.name}, iteration {start.iteration}{averaged}")
    torch.backends.cudnn.allow_tf32 = False  # likelihoods and audio as exact as on the CPU
    return trained_model(start, config).to(device), start.name


def _refuse_to_overwrite(folder: Path, iteration: int) -> None:
    if found := [path for path in ckpt.list_checkpoints(folder) if int(path.name.split("_")[1]) > iteration]:
        raise InputError(
            f"{folder} already holds {len(found)} checkpoint(s) beyond iteration {iteration}; go on with --resume "
            "latest, start from one with --set train_config.checkpoint_path=FILE, or choose another "
            "train_config.output_directory"
        )


# --- command line -----------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the published train.py, and a few more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-c", "--config", required=True, metavar="FILE", help="experiment file, see configs/")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a config value")
    add("-w", "--warm_start", action="store_true", help="take only the weights of the checkpoint, start at iteration 0")
    add("-v", "--evaluate", action="store_true", help="log-likelihood of the full test clips")
    add("-s", "--synthesize", action="store_true", help="synthesize every wav or mel of the test list")
    add("-t", "--temp", type=float, default=1.0, help="standard deviation of the noise that synthesis starts from")
    add("--precision", choices=["float32", "bfloat16", "float16"], help="of the products of synthesis, default float32")
    add("--batch_seconds", type=float, metavar="S", help="audio synthesized at once; 0: a clip at a time")
    add("-a", "--average_checkpoint", type=int, metavar="N", help="start from the average of the newest N checkpoints")
    add("-e", "--epsilon", type=float, help="with -a: exponential weights epsilon (1 - epsilon)^i instead of the mean")
    add("--resume", choices=["latest"], help="go on from the newest whole checkpoint of the run, if it has any")
    add("--max_iterations", type=int, metavar="N", help="stop training at iteration N")
    add("--max_hours", type=float, metavar="H", help="save and end after H hours; --resume latest goes on")
    add("--deterministic", action="store_true", help="the same results twice on the same machine, at some speed")
    add("--check_data", action="store_true", help="look for clips that would spoil the training, and do nothing else")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA where there is any)")
    options = parser.parse_args(arguments)
    if options.evaluate + options.synthesize + options.check_data > 1:
        parser.error("--evaluate, --synthesize and --check_data are jobs of their own; give one at a time")
    for flag, value, valid in (
        ("--temp", options.temp, 0 <= options.temp < float("inf")),
        ("--batch_seconds", s := options.batch_seconds, s is None or 0 <= s < float("inf")),
        ("--average_checkpoint", n := options.average_checkpoint, n is None or n > 0),
        ("--max_iterations", n := options.max_iterations, n is None or n > 0),
        ("--max_hours", options.max_hours, options.max_hours is None or 0 < options.max_hours < float("inf")),
    ):
        if not valid:
            parser.error(f"{flag} {value}: out of range")
    if options.resume and (options.average_checkpoint is not None or options.warm_start):
        parser.error("--resume, --average_checkpoint and --warm_start all say where to start; give one")
    for flag, value in (("--precision", options.precision), ("--batch_seconds", options.batch_seconds)):
        if value is not None and not options.synthesize:
            parser.error(f"{flag} is that of synthesis; give --synthesize with it")
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
        return _job(options)(config, options, device)


def _job(options: argparse.Namespace) -> Callable[[Config, argparse.Namespace, torch.device], int]:
    if options.check_data:
        return check_data
    return evaluate if options.evaluate else synthesize if options.synthesize else train


if __name__ == "__main__":
    sys.exit(main())
