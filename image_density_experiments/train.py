"""Train, evaluate and sample image density models: Glow, and the types that share one estimator among many steps.

python image_density_experiments/train.py                        train nanoflow on the embedded patches
python image_density_experiments/train.py --saved_model FILE     go on from a checkpoint, or the newest of a folder
... --saved_model FILE --evaluate | --sample | --interpolate | --ood DATASET
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # As a script this file is part of no package and sees nothing of the project around it: it begins again, in the
    # same process, as `python -m image_density_experiments.train` from the project's root. -P: its folder, which the
    # user may be in, has files of the same names as the root.
    places = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "image_density_experiments.train", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": os.pathsep.join(places)})

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from harness import terminal
from harness.checkpoints import read_torch_file
from harness.devices import choose_device
from harness.errors import InputError
from harness.folder import clear, locked_run, record_start, require_empty, require_only
from harness.processes import gather, held_by_main, is_main, on_main, process_group, report_error, world_size
from harness.settings import parse_section
from harness.stopping import StopRequest, exit_status
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.data import to_pixels
from image_density_experiments.datasets import OWN, ImageData, load_images
from image_density_experiments.evaluation import (
    auroc,
    bits_per_dim,
    interpolate,
    reconstruct,
    save_samples,
    write_bits,
)
from image_density_experiments.figures import save_histogram, save_image_rows
from image_density_experiments.loop import train_until
from image_density_experiments.model import ImageFlow, ImageModelConfig, count_parameters
from image_density_experiments.options import Options, TrainOptions, read_options
from image_density_experiments.pictures import ImageForm
from image_density_experiments.trainer import Trainer

RUN_FILES = (
    *("glow_model_*.pt", "losses.csv", "epochs.csv", "config.json", "run_record.jsonl", "tensorboard"),
    *("samples", "evaluation"),
)
SHOWN, PAIRS, LINE = 12, 6, 12  # images of a reconstruction, pairs of an interpolation, images from one to the other
# What changes the place in the data, or the meaning of a step: a resumed run should not.
RESUMED_AS_BEGUN = ("batch_size", "lr", "warmup", "weight_decay", "seed", "augmented", "n_init_batches")

# --- the jobs ---------------------------------------------------------------------------------------------------


def train(options: Options, device: torch.device) -> int:
    """Train to the last epoch or --max_iterations; returns the exit status."""
    folder, how = options.output_dir, options.train
    start = on_main(lambda: starting_point(options.saved_model, options.saved_optimizer))
    on_main(lambda: _refuse_foreign_folder(options))
    data = _images(options)
    with held_by_main(locked_run(folder)):
        if options.fresh:
            on_main(lambda: clear(folder, RUN_FILES))
        torch.manual_seed(how.seed)
        model = _make_model(options, start, data, device)
        _warn_of_changes(start, how)
        trainer = Trainer(model, data, how, folder, start)
        last = min(how.epochs * trainer.batches_per_epoch, options.max_iterations or sys.maxsize)
        record = {**model.config.to_dict(), **how.to_dict(), "dataset": options.dataset}
        on_main(lambda: record_start(folder, record, processes=world_size()))
        terminal.say(
            f"{model.config.model_type}: {count_parameters(model):,} parameters, {options.dataset}: "
            f"{len(data.train.images)} training and {len(data.test.images)} test images, iterations "
            f"{trainer.iteration} to {last} on {device}, files in {folder}"
        )
        if trainer.iteration >= last:
            terminal.say(f"already at iteration {trainer.iteration}; raise --epochs or --max_iterations to go on")
        stop = StopRequest()
        saved = train_until(last, trainer, options.temperatures, stop)
    return stop.exit_status(saved, finished=trainer.iteration >= last, resume=f"go on with --saved_model {folder}")


def evaluate(options: Options, device: torch.device) -> int:
    """Bits per dimension of the test images, in a CSV and averaged; reconstructions."""
    model, data, folder = _trained(options, device)
    how = options.train
    bits = np.array(gather(list(bits_per_dim(model, data.test, how.eval_batch_size, how.seed, how.amp, shared=True))))
    if not is_main():
        return 0
    write_bits(folder / "bits_per_dim.csv", {options.dataset: bits})
    terminal.say(f"{options.dataset}: {bits.mean():.4f} bits/dim over {len(bits)} test images (std {bits.std():.4f})")
    result = reconstruct(model, data.test, SHOWN)
    n_bits = model.config.n_bits
    rows = {"test image": to_pixels(result.originals, n_bits), "inverse": to_pixels(result.images, n_bits)}
    save_image_rows(folder / "reconstructions.png", rows, f"reconstructions, largest error {result.max_error:.1e}")
    terminal.say(
        f"reconstructions: largest error {result.max_error:.2e}, {100 * result.exact:.2f} % of values restored "
        f"exactly\nfiles: {folder}"
    )
    return 0


def sample(options: Options, device: torch.device) -> int:
    """A grid of samples at the --temperatures."""
    model, _, folder = _trained(options, device)
    save_samples(folder / "samples.png", model, options.temperatures, options.train.seed)
    terminal.say(f"samples: {folder / 'samples.png'}")
    return 0


def interpolate_images(options: Options, device: torch.device) -> int:
    """Images between pairs of test images, along straight lines in the latent space."""
    model, data, folder = _trained(options, device)
    lines = interpolate(model, data.test, PAIRS, LINE)
    rows = {f"pair {number}": to_pixels(line, model.config.n_bits) for number, line in enumerate(lines, 1)}
    save_image_rows(folder / "interpolation.png", rows, "between test images, through the latent space")
    terminal.say(f"interpolation: {folder / 'interpolation.png'}")
    return 0


def compare_datasets(options: Options, device: torch.device) -> int:
    """Bits per dimension of this dataset's and another one's test images, as a histogram and AUROC."""
    if options.ood == options.dataset:
        raise InputError(f"--ood {options.ood}: is the model's own dataset; name another one")
    model, data, folder = _trained(options, device)
    if model.config.y_condition:
        raise InputError("--ood needs a model without --y_condition: images of another dataset have other classes")
    other = load_images(options.ood, options.ood_dataroot, options.download, _form(options, options.ood))
    if other.image_shape != data.image_shape:
        raise InputError(f"--ood {options.ood}: images of {other.image_shape}, the model takes {data.image_shape}")
    splits, how = {options.dataset: data.test, options.ood: other.test}, options.train
    bits = {name: bits_per_dim(model, split, how.eval_batch_size, how.seed, how.amp) for name, split in splits.items()}
    area = auroc(bits[options.dataset], bits[options.ood])
    write_bits(folder / f"ood_{options.ood}.csv", bits)
    save_histogram(folder / f"ood_{options.ood}.png", bits, f"AUROC of bits/dim for {options.ood}: {area:.4f}")
    means = ", ".join(f"{name} {values.mean():.4f}" for name, values in bits.items())
    terminal.say(f"bits/dim: {means}; AUROC {area:.4f} (more bits: from outside)\nfiles: {folder}")
    return 0


# --- models and folders -----------------------------------------------------------------------------------------


def starting_point(model: Path | None, optimizer: Path | None = None) -> dict[str, Any] | None:
    """Contents of --saved_model and --saved_optimizer; of a folder, its newest checkpoint that can be read."""
    if model is None:
        if optimizer is not None:
            raise InputError("--saved_optimizer belongs to a model; give --saved_model with it")
        return None
    start = ckpt.newest_checkpoint(model) if model.is_dir() else {**ckpt.load_checkpoint(model), "path": model}
    if optimizer is None:
        return start
    number = re.search(r"_(\d+)$", model.stem)  # published files are numbered by epochs
    epoch = {"epoch": int(number[1])} if number else {}
    return {**epoch, **start, "optimizer": read_torch_file(optimizer)}


def _make_model(options: Options, start: dict[str, Any] | None, data: ImageData, device: torch.device) -> ImageFlow:
    """The model of the flags, or of the checkpoint, which must not contradict them."""
    saved = {} if start is None else start.get("config", {})
    if not isinstance(saved, dict):
        raise InputError(f"checkpoint {start['path']}: its config is damaged")
    for name, value in options.model.items():
        if name in saved and saved[name] != value:
            raise InputError(f"--{name} {value}: the checkpoint's model has {saved[name]!r}; leave the flag out")
    from_data = {"image_shape": data.image_shape, "y_classes": data.n_classes or 10}
    config = parse_section(ImageModelConfig, {**from_data, **options.model, **saved})
    if config.image_shape != data.image_shape:
        raise InputError(f"the model takes images of {config.image_shape}, {options.dataset} has {data.image_shape}")
    if config.y_condition and config.y_classes != data.n_classes:
        raise InputError(
            f"the model knows {config.y_classes} classes, {options.dataset} has {data.n_classes or 'no'} labels"
        )
    model = ImageFlow(config)
    model.memory = options.memory
    if start is not None:
        ckpt.load_weights(model, start["model"])
        terminal.say(f"weights: {start['path']}, iteration {start.get('iteration', 'unknown')}")
    return model.to(device)


def _trained(options: Options, device: torch.device) -> tuple[ImageFlow, ImageData, Path]:
    """A trained model for a job that needs one, the data, and the folder for the job's results."""
    path = options.saved_model or options.output_dir
    if not path.exists():
        raise InputError(f"{path}: not there; train first, or name a checkpoint with --saved_model")
    start = on_main(lambda: starting_point(path))
    data = _images(options)
    model = _make_model(options, start, data, device).eval()
    folder = options.output_dir / "evaluation" / start["path"].stem
    folder.mkdir(parents=True, exist_ok=True)
    return model, data, folder


def _images(options: Options) -> ImageData:
    form = _form(options, options.dataset)
    if options.download:
        on_main(lambda: load_images(options.dataset, options.dataroot, True, form) and None)
    return load_images(options.dataset, options.dataroot, form=form)


def _form(options: Options, dataset: str) -> ImageForm | None:
    """How the dataset's pictures become images; of two datasets, only own ones are asked to change."""
    return None if OWN in (options.dataset, options.ood) and dataset != OWN else options.form


def _warn_of_changes(start: dict[str, Any] | None, how: TrainOptions) -> None:
    begun = (start or {}).get("options", {})
    for name in RESUMED_AS_BEGUN:
        if is_main() and name in begun and begun[name] != getattr(how, name):
            terminal.warn(f"{name} was {begun[name]}, now {getattr(how, name)}: not an exact continuation")


def _refuse_foreign_folder(options: Options) -> None:
    """A new run needs an empty folder, or --fresh and a folder that holds nothing but an old run."""
    folder = options.output_dir
    if options.fresh:
        require_only(folder, RUN_FILES)
    elif options.saved_model is None:
        require_empty(
            folder,
            f"choose another --output_dir, go on with --saved_model {folder}, or start over with --fresh, which "
            "removes the run that is there",
        )


# --- command line -----------------------------------------------------------------------------------------------

JOBS = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "interpolate": interpolate_images,
    "ood": compare_datasets,
}
SHARED = ("train", "evaluate")  # among processes; the other jobs are for one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    return exit_status(lambda: _run(read_options(arguments)), report_error)


def _run(options: Options) -> int:
    job, device = JOBS[options.job], choose_device(options.device)
    with process_group(device, resume=ckpt.REMEDIES.resume):
        return job(options, device) if options.job in SHARED else on_main(lambda: job(options, device))


if __name__ == "__main__":
    sys.exit(main())
