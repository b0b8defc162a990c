"""Train, evaluate and sample image density models: Glow, and the types that share one estimator among many steps.

python image_density_experiments/train.py                        train nanoflow on the embedded patches
python image_density_experiments/train.py --saved_model FILE     go on from a checkpoint, or the newest of a folder
... --saved_model FILE --evaluate | --sample | --interpolate | --ood DATASET
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The root's files have the same names as this folder's: the root comes first, and this file is part of a package.
    HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]
    from image_density_experiments.train import main

    sys.exit(main())

import argparse
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch

from checkpoint import list_checkpoints, read_torch_file
from harness.devices import choose_device
from harness.errors import InputError
from harness.folder import clear, locked_run, record_start, require_empty, require_only
from harness.processes import (
    gather,
    held_by_main,
    is_main,
    on_main,
    process_group,
    rank,
    report_error,
    world_size,
)
from harness.settings import parse_section
from harness.stopping import StopRequest, exit_status
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.data import to_pixels
from image_density_experiments.datasets import ALL, ImageData, load_images
from image_density_experiments.evaluation import auroc, bits_per_dim, interpolate, reconstruct, write_bits
from image_density_experiments.figures import save_histogram, save_image_rows
from image_density_experiments.model import (
    COUPLINGS,
    DESIGNS,
    PERMUTATIONS,
    ImageFlow,
    ImageModelConfig,
    count_parameters,
)
from image_density_experiments.trainer import Trainer, TrainOptions, save_samples, train_until

FOLDER = Path(__file__).resolve().parent
RUN_FILES = (
    *("glow_model_*.pt", "losses.csv", "epochs.csv", "config.json", "run_record.jsonl", "tensorboard"),
    *("samples", "evaluation"),
)
SHOWN, PAIRS, LINE = 12, 6, 12  # images of a reconstruction, pairs of an interpolation, images from one to the other
# What changes the place in the data, or the meaning of a step: a resumed run should not.
RESUMED_AS_BEGUN = ("batch_size", "lr", "warmup", "weight_decay", "seed", "augmented", "n_init_batches")

# --- the jobs ---------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, device: torch.device) -> int:
    """Train to the last epoch or --max_iterations; returns the exit status."""
    folder = Path(options.output_dir)
    start = on_main(lambda: starting_point(options))
    on_main(lambda: _refuse_foreign_folder(folder, options))
    data = _images(options)
    how = _train_options(options)
    with held_by_main(locked_run(folder)):
        if options.fresh:
            on_main(lambda: clear(folder, RUN_FILES))
        torch.manual_seed(how.seed)
        model = _make_model(options, start, data, device)
        _warn_of_changes(start, how)
        trainer = Trainer(model, data, how, folder, start)
        last = min(how.epochs * trainer.batches_per_epoch, options.max_iterations or sys.maxsize)
        record = {**model.config.to_dict(), **asdict(how), "dataset": options.dataset}
        on_main(lambda: record_start(folder, record, processes=world_size()))
        print(
            f"{model.config.model_type}: {count_parameters(model):,} parameters, {options.dataset}: "
            f"{len(data.train.images)} training and {len(data.test.images)} test images, iterations "
            f"{trainer.iteration} to {last} on {device}, files in {folder}"
        )
        if trainer.iteration >= last:
            print(f"nothing to do: the run is at iteration {trainer.iteration}; raise --epochs or --max_iterations")
        stop = StopRequest()
        train_until(last, trainer, options.temperatures, stop)
    if stop.signal is None:
        return 0
    print(f"stopped by {signal.Signals(stop.signal).name}; go on with --saved_model {folder}")
    return 128 + stop.signal


def evaluate(options: argparse.Namespace, device: torch.device) -> int:
    """Bits per dimension of the test images, in a CSV and averaged; reconstructions."""
    model, data, folder = _trained(options, device)
    own = bits_per_dim(model, data.test, options.eval_batch_size, options.seed, options.amp, rank(), world_size())
    bits = np.array(gather(list(own)))
    if not is_main():
        return 0
    write_bits(folder / "bits_per_dim.csv", {options.dataset: bits})
    print(f"{options.dataset}: {bits.mean():.4f} bits/dim over {len(bits)} test images (std {bits.std():.4f})")
    result = reconstruct(model, data.test, SHOWN)
    n_bits = model.config.n_bits
    rows = {"test image": to_pixels(result.originals, n_bits), "inverse": to_pixels(result.images, n_bits)}
    save_image_rows(folder / "reconstructions.png", rows, f"reconstructions, largest error {result.max_error:.1e}")
    print(
        f"reconstructions: largest error {result.max_error:.2e}, {100 * result.exact:.2f} % of values restored exactly"
    )
    print(f"files: {folder}")
    return 0


def sample(options: argparse.Namespace, device: torch.device) -> int:
    """A grid of samples at the --temperatures."""
    model, _, folder = _trained(options, device)
    save_samples(folder / "samples.png", model, options.temperatures, options.seed)
    print(f"samples: {folder / 'samples.png'}")
    return 0


def interpolate_images(options: argparse.Namespace, device: torch.device) -> int:
    """Images between pairs of test images, along straight lines in the latent space."""
    model, data, folder = _trained(options, device)
    lines = interpolate(model, data.test, PAIRS, LINE)
    rows = {f"pair {number}": to_pixels(line, model.config.n_bits) for number, line in enumerate(lines, 1)}
    save_image_rows(folder / "interpolation.png", rows, "between test images, through the latent space")
    print(f"interpolation: {folder / 'interpolation.png'}")
    return 0


def compare_datasets(options: argparse.Namespace, device: torch.device) -> int:
    """Bits per dimension of this dataset's and another one's test images, as a histogram and AUROC."""
    if options.ood == options.dataset:
        raise InputError(f"--ood {options.ood}: is the model's own dataset; name another one")
    model, data, folder = _trained(options, device)
    if model.config.y_condition:
        raise InputError("--ood needs a model without --y_condition: images of another dataset have other classes")
    other = load_images(options.ood, options.ood_dataroot or options.dataroot, options.download)
    if other.image_shape != data.image_shape:
        raise InputError(f"--ood {options.ood}: images of {other.image_shape}, the model takes {data.image_shape}")
    splits = {options.dataset: data.test, options.ood: other.test}
    bits = {
        name: bits_per_dim(model, split, options.eval_batch_size, options.seed, options.amp)
        for name, split in splits.items()
    }
    area = auroc(bits[options.dataset], bits[options.ood])
    write_bits(folder / f"ood_{options.ood}.csv", bits)
    save_histogram(folder / f"ood_{options.ood}.png", bits, f"AUROC of bits/dim for {options.ood}: {area:.4f}")
    means = ", ".join(f"{name} {values.mean():.4f}" for name, values in bits.items())
    print(f"bits/dim: {means}; AUROC {area:.4f} (more bits: from outside)\nfiles: {folder}")
    return 0


# --- models and folders -----------------------------------------------------------------------------------------


def starting_point(options: argparse.Namespace) -> dict[str, Any] | None:
    """What --saved_model and --saved_optimizer hold; of a folder, its newest checkpoint that can be read."""
    if options.saved_model is None:
        if options.saved_optimizer is not None:
            raise InputError("--saved_optimizer belongs to a model; give --saved_model with it")
        return None
    path = Path(options.saved_model)
    start = _newest_whole(path) if path.is_dir() else {**ckpt.load_checkpoint(path), "path": path}
    if options.saved_optimizer is not None:
        start["optimizer"] = read_torch_file(options.saved_optimizer)
        if number := re.search(r"_(\d+)$", path.stem):  # published files are numbered by epochs
            start.setdefault("epoch", int(number[1]))
    return start


def _newest_whole(folder: Path) -> dict[str, Any]:
    for path in list_checkpoints(folder, ckpt.FILE_NAME):
        try:
            return {**ckpt.load_checkpoint(path), "path": path}
        except InputError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise InputError(f"{folder}: holds no checkpoint glow_model_<iteration>.pt; train first, or name a file")


def _make_model(
    options: argparse.Namespace, start: dict[str, Any] | None, data: ImageData, device: torch.device
) -> ImageFlow:
    """The model of the flags, or of the checkpoint, which must not contradict them."""
    given = {name: value for name in _model_flags() if (value := getattr(options, name)) is not None}
    saved = {} if start is None else start.get("config", {})
    if not isinstance(saved, dict):
        raise InputError(f"checkpoint {start['path']}: its config is damaged")
    for name, value in given.items():
        if name in saved and saved[name] != value:
            raise InputError(f"--{name} {value}: the checkpoint's model has {saved[name]!r}; leave the flag out")
    from_data = {"image_shape": data.image_shape, "y_classes": data.n_classes or 10}
    config = parse_section(ImageModelConfig, {**from_data, **given, **saved})
    if config.image_shape != data.image_shape:
        raise InputError(f"the model takes images of {config.image_shape}, {options.dataset} has {data.image_shape}")
    if config.y_condition and config.y_classes != data.n_classes:
        raise InputError(
            f"the model knows {config.y_classes} classes, {options.dataset} has {data.n_classes or 'no'} labels"
        )
    model = ImageFlow(config)
    model.memory = "reversible" if options.reversible else "checkpoint" if options.checkpoint_activations else "plain"
    if start is not None:
        ckpt.load_weights(model, start["model"])
        print(f"weights: {start['path']}, iteration {start.get('iteration', 'unknown')}")
    return model.to(device)


def _trained(options: argparse.Namespace, device: torch.device) -> tuple[ImageFlow, ImageData, Path]:
    """A trained model for a job that needs one, the data, and the folder for the job's results."""
    options.saved_model = options.saved_model or options.output_dir
    if not Path(options.saved_model).exists():
        raise InputError(f"{options.saved_model}: not there; train first, or name a checkpoint with --saved_model")
    start = on_main(lambda: starting_point(options))
    data = _images(options)
    model = _make_model(options, start, data, device).eval()
    folder = Path(options.output_dir) / "evaluation" / Path(start["path"]).stem
    folder.mkdir(parents=True, exist_ok=True)
    return model, data, folder


def _images(options: argparse.Namespace) -> ImageData:
    if options.download:
        on_main(lambda: load_images(options.dataset, options.dataroot, True) and None)
    return load_images(options.dataset, options.dataroot)


def _model_flags() -> list[str]:
    return [name for name in ImageModelConfig.model_fields if name not in ("image_shape", "y_classes")]


def _train_options(options: argparse.Namespace) -> TrainOptions:
    values = {**vars(options), "augmented": not options.no_augment}
    return TrainOptions(**{field.name: values[field.name] for field in fields(TrainOptions)})


def _warn_of_changes(start: dict[str, Any] | None, how: TrainOptions) -> None:
    begun = (start or {}).get("options", {})
    for name in RESUMED_AS_BEGUN:
        if is_main() and name in begun and begun[name] != getattr(how, name):
            print(
                f"warning: {name} was {begun[name]}, now {getattr(how, name)}: not an exact continuation",
                file=sys.stderr,
            )


def _refuse_foreign_folder(folder: Path, options: argparse.Namespace) -> None:
    """A new run needs an empty folder, or --fresh and a folder that holds nothing but an old run."""
    if options.fresh:
        require_only(folder, RUN_FILES)
    elif options.saved_model is None:
        require_empty(
            folder,
            f"choose another --output_dir, go on with --saved_model {folder}, or start over with --fresh, which "
            "removes the run that is there",
        )


# --- command line -----------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of the published train.py, and a few more. Model flags that are not given are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model_flags(parser.add_argument_group("model (from the checkpoint, if there is one)"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_job_flags(parser.add_argument_group("jobs other than training"))
    options = parser.parse_args(arguments)
    for name, minimum in (
        *((name, 1) for name in ("batch_size", "eval_batch_size", "epochs", "n_init_batches", "sample_every")),
        *((name, 0) for name in ("n_workers", "seed", "warmup", "max_grad_clip", "max_grad_norm", "y_weight")),
        *((name, 1) for name in ("max_iterations",) if options.max_iterations is not None),
    ):
        if not minimum <= getattr(options, name) < float("inf"):
            parser.error(f"--{name} {getattr(options, name)}: expected at least {minimum}")
    if not 0 < options.lr < float("inf"):
        parser.error(f"--lr {options.lr}: expected a number above 0")
    if any(not 0 <= temperature < float("inf") for temperature in options.temperatures):
        parser.error("--temperatures: expected numbers of at least 0")
    options.output_dir = (
        options.output_dir or FOLDER / "experiments" / f"{options.model_type or 'nanoflow'}_{options.dataset}"
    )
    return options


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_type", metavar="TYPE", help=f"{', '.join(DESIGNS)} (default nanoflow)")
    add("--hidden_channels", type=int, help="channels of the estimators (default 512; the published runs: 256)")
    add("--K", type=int, help="steps per level (default 32)")
    add("--L", type=int, help="levels (default 3)")
    add("--actnorm_scale", type=float, help="standard deviation after the first actnorm (default 1.0)")
    add("--flow_permutation", metavar="KIND", help=f"{', '.join(PERMUTATIONS)} (default invconv)")
    add("--flow_coupling", metavar="KIND", help=f"{', '.join(COUPLINGS)} (default affine)")
    add(
        "--no_LU_decomposed", dest="LU_decomposed", action="store_false", default=None, help="invconv as a plain matrix"
    )
    add("--flow_embed_dim", type=int, help="channels of the flow indication at the first level (default 1)")
    add("--no_learn_top", dest="learn_top", action="store_false", default=None, help="a standard Gaussian at the top")
    add("--y_condition", action="store_true", default=None, help="condition on the class")
    add("--n_bits", type=int, choices=(5, 8), help="bits per colour that are modelled (default 8)")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", default="patches", metavar="NAME", help=f"{', '.join(ALL)} (default patches, embedded)")
    add("--dataroot", default=FOLDER / "datasets", help="folder of the dataset's files, or the file itself")
    add("--download", action="store_true", help="fetch the dataset if it is not there")
    add("--no_augment", action="store_true", help="train on the images as they are")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch_size", type=int, default=64)
    add("--eval_batch_size", type=int, default=512)
    add("--epochs", type=int, default=3000)
    add("--max_iterations", type=int, metavar="N", help="stop at iteration N")
    add("--lr", type=float, default=5e-4, help="of Adamax (default 5e-4)")
    add("--warmup", type=float, default=5, help="epochs of linear warm-up (default 5)")
    add("--y_weight", type=float, default=0.01, help="of the class loss, with --y_condition (default 0.01)")
    add("--max_grad_clip", type=float, default=0, help="clip each gradient component (default 0: not)")
    add("--max_grad_norm", type=float, default=0, help="clip the gradient norm (default 0: not)")
    add("--n_init_batches", type=int, default=8, help="batches that initialise the actnorms (default 8)")
    add("--n_workers", type=int, default=2, help="data loading processes (default 2)")
    add("--seed", type=int, default=0)
    add("--amp", action="store_true", help="estimators in bfloat16")
    memory = group.add_mutually_exclusive_group()
    memory.add_argument(
        "--checkpoint_activations", action="store_true", help="recompute each step's inside: less memory"
    )
    memory.add_argument("--reversible", action="store_true", help="recompute each step's input too: memory free of K")
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--output_dir", help="default: experiments/TYPE_DATASET beside this file")
    add("--fresh", action="store_true", help="remove the run in --output_dir before starting")
    add("--saved_model", metavar="FILE", help="checkpoint to start from, or a folder, whose newest is taken")
    add("--saved_optimizer", metavar="FILE", help="optimizer state of a published checkpoint")
    add("--sample_every", type=int, default=1, metavar="N", help="epochs from one grid of samples to the next")
    group.set_defaults(weight_decay=5e-5)


def _add_job_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    job = group.add_mutually_exclusive_group()
    job.add_argument("--evaluate", action="store_true", help="bits/dim of the test images, and reconstructions")
    job.add_argument("--sample", action="store_true", help="a grid of samples")
    job.add_argument("--interpolate", action="store_true", help="images between test images")
    job.add_argument("--ood", metavar="DATASET", help="compare bits/dim with those of another dataset")
    add("--ood_dataroot", help="where that dataset is (default: --dataroot)")
    add("--temperatures", type=float, nargs="+", default=[0.25, 0.5, 0.7, 0.8, 0.9, 1.0], help="of samples")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    options = parse_arguments(arguments)
    jobs = {"evaluate": evaluate, "sample": sample, "interpolate": interpolate_images, "ood": compare_datasets}
    job = next((run for name, run in jobs.items() if getattr(options, name)), train)
    return exit_status(lambda: _checked(job, options), report_error)


def _checked(job: Callable[[argparse.Namespace, torch.device], int], options: argparse.Namespace) -> int:
    if options.model_type is not None and options.model_type not in DESIGNS:
        raise InputError(f"--model_type {options.model_type}: unknown; there are {', '.join(DESIGNS)}")
    device = choose_device("cpu" if options.no_cuda else None)
    with process_group(device, resume=ckpt.REMEDIES.resume):
        shared = job in (train, evaluate)  # the others are for one
        return job(options, device) if shared else on_main(lambda: job(options, device))
