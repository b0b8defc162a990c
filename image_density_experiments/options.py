"""The image command's flags: those of the published train.py and a few more, checked once, then frozen."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.arguments import Help, Parser, add_general, number, whole_number
from harness.errors import InputError
from harness.folder import CONFIG_NAME
from harness.settings import Settings
from image_density_experiments.datasets import ALL
from image_density_experiments.model import (
    COUPLINGS,
    DESIGNS,
    MAX_HIDDEN,
    MAX_LEVELS,
    MAX_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SCALE,
    PERMUTATIONS,
    ImageModelConfig,
)

FOLDER = Path(__file__).resolve().parent
DATASETS_FOLDER = FOLDER / "datasets"
JOBS = ("evaluate", "sample", "interpolate", "ood", "fid")  # beside training, each a flag
TRAINING = "training"
# What tells of a training, such as --epochs, may stay behind a job: the same command line again, and what to do.
GOES_WITH = {
    "fresh": (TRAINING,),
    "saved_optimizer": (TRAINING,),
    "ood_dataroot": ("--ood",),
    "n_samples": ("--sample", "--fid"),
    "class_name": ("--sample",),
    "save_as": ("--sample",),
}
MAX_INT = 2**31 - 1
MAX_BATCH, MAX_WORKERS, MAX_SAMPLES = 2**16, 2**8, 10**6
MAX_FACTOR = 1e6
TEMPERATURES = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0)


class DataOptions(Settings):
    """Choice of images, and how own pictures become images; `pictures.ImageForm` checks the latter."""

    dataset: str = "patches"
    dataroot: str | None = None
    image_size: int | None = Field(None, ge=2, le=MAX_SIDE)
    channels: int | None = Field(None, ge=1, le=3)
    background: str = "white"


class TrainOptions(Settings):
    """Settings of a training, under the names of the published flags."""

    batch_size: int = Field(64, ge=1, le=MAX_BATCH)
    eval_batch_size: int | None = Field(None, ge=1, le=MAX_BATCH)  # None: the batch size
    epochs: int = Field(3000, ge=1, le=MAX_INT)
    lr: float = Field(5e-4, gt=0, le=MAX_FACTOR)
    warmup: float = Field(5, ge=0, le=MAX_FACTOR)  # epochs
    weight_decay: float = Field(5e-5, ge=0, le=MAX_FACTOR)
    y_weight: float = Field(0.01, ge=0, le=MAX_FACTOR)
    max_grad_clip: float = Field(0, ge=0, le=MAX_FACTOR)  # of each component; 0: not clipped
    max_grad_norm: float = Field(0, ge=0, le=MAX_FACTOR)  # of all together; 0: not clipped
    n_init_batches: int = Field(8, ge=1, le=MAX_BATCH)
    n_workers: int = Field(2, ge=0, le=MAX_WORKERS)
    seed: int = Field(0, ge=0, le=MAX_INT)
    augmented: bool = True
    amp: bool = False
    sample_every: int = Field(1, ge=1, le=MAX_INT)  # epochs
    save_every: int | None = Field(None, ge=1, le=MAX_INT)  # iterations, beside every epoch

    @property
    def evaluated_at_once(self) -> int:
        """Images of an evaluation's batch: no more than training has memory for."""
        return self.eval_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class Options:
    """Requests of one command; `model`, `train` and `data` hold those of their flags that were given."""

    job: str  # "train" or one of JOBS
    model: Mapping[str, Any]
    memory: str  # of memory.MEMORY_MODES
    train: Mapping[str, Any]
    data: Mapping[str, Any]
    download: bool
    output_dir: Path
    saved_model: Path | None
    saved_optimizer: Path | None
    fresh: bool
    max_iterations: int | None
    device: str | None
    ood: str | None
    ood_dataroot: str | None
    fid: str | None
    temperatures: tuple[float, ...]
    n_samples: int | None
    class_name: str | None
    save_as: str | None
    quiet: bool


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line. argparse ends the program where it cannot be read; InputError on an unknown model."""
    flags = parse_arguments(arguments)
    if flags.model_type is not None and flags.model_type not in DESIGNS:
        raise InputError(f"--model_type {flags.model_type}: unknown; there are {', '.join(DESIGNS)}")
    values = vars(flags)

    def given(names: Iterable[str]) -> dict[str, Any]:
        return {name: values[name] for name in names if values.get(name) is not None}

    return Options(
        job=next((job for job in JOBS if values[job]), "train"),
        model=given(_model_flags()),
        memory="reversible" if flags.reversible else "checkpoint" if flags.checkpoint_activations else "plain",
        train=given(TrainOptions.model_fields),
        data=given(DataOptions.model_fields),
        output_dir=flags.output_dir or _default_folder(flags),
        device="cpu" if flags.no_cuda else None,
        temperatures=tuple(dict.fromkeys(flags.temperatures)),
        **{
            name: values[name]
            for name in (
                *("download", "saved_model", "saved_optimizer", "fresh", "max_iterations"),
                *("ood", "ood_dataroot", "fid", "n_samples", "class_name", "save_as", "quiet"),
            )
        },
    )


def _default_folder(flags: argparse.Namespace) -> Path:
    """The run that is gone on with, or one named after what is trained."""
    saved = flags.saved_model
    if saved is not None and saved.is_dir():
        return saved
    if saved is not None and (saved.parent / CONFIG_NAME).is_file():
        return saved.parent
    return FOLDER / "experiments" / f"{flags.model_type or 'nanoflow'}_{flags.dataset or DataOptions().dataset}"


def _model_flags() -> list[str]:
    return [name for name in ImageModelConfig.model_fields if name not in ("image_shape", "y_classes")]


# --- flags ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """All flags with their values. Model flags that are not given are None."""
    parser = Parser(
        description="Train, evaluate and sample image density models.",
        formatter_class=Help,
        epilog="Without a job, it trains; --saved_model FILE goes on from a checkpoint, or the newest of a folder.",
    )
    _add_model_flags(parser.add_argument_group("model (from the checkpoint, if there is one)"))
    _add_data_flags(parser.add_argument_group("data (of the run, if there is one)"))
    training = parser.add_argument_group("training")
    _add_training_flags(training)
    _add_run_flags(parser.add_argument_group("run"))
    _add_job_flags(parser.add_argument_group("jobs other than training"))
    add_general(parser)
    options = parser.parse_args(arguments)
    job = next((f"--{job}" for job in JOBS if getattr(options, job)), TRAINING)
    parser.refuse_unheeded(options, job, GOES_WITH)
    return options


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_type", metavar="TYPE", help=f"{', '.join(DESIGNS)} (default nanoflow)")
    add(
        "--hidden_channels",
        type=whole_number(1, MAX_HIDDEN),
        help="channels of the estimators (default 512; the published runs: 256)",
    )
    add("--K", type=whole_number(1, MAX_STEPS), help="steps per level (default 32)")
    add("--L", type=whole_number(1, MAX_LEVELS), help="levels (default 3)")
    add(
        "--actnorm_scale",
        type=number(MIN_SCALE, maximum=MAX_SCALE),
        help="standard deviation after the first actnorm (default 1.0)",
    )
    add("--flow_permutation", metavar="KIND", help=f"{', '.join(PERMUTATIONS)} (default invconv)")
    add("--flow_coupling", metavar="KIND", help=f"{', '.join(COUPLINGS)} (default affine)")
    switch = {"action": "store_false", "default": None}
    add("--no_LU_decomposed", dest="LU_decomposed", help="invconv as a plain matrix", **switch)
    add(
        "--flow_embed_dim",
        type=whole_number(1, MAX_HIDDEN),
        help="channels of the flow indication at the first level (default 1)",
    )
    add("--no_learn_top", dest="learn_top", help="a standard Gaussian at the top", **switch)
    add("--y_condition", action="store_true", default=None, help="condition on the class")
    add("--n_bits", type=int, choices=range(1, 9), metavar="N", help="bits per colour that are modelled (default 8)")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", metavar="NAME", help=f"{', '.join(ALL)} (default patches, embedded)")
    add("--dataroot", help="folder of the dataset's files, or the file itself")
    add("--download", action="store_true", help="fetch the dataset if it is not there")
    add(
        "--image_size",
        type=whole_number(2, MAX_SIDE),
        metavar="S",
        help="own images: scale the shorter side, cut out SxS",
    )
    add("--channels", type=int, choices=(1, 3), help="own images as grey or RGB (default: 1 where all are grey)")
    add("--background", metavar="COLOUR", help="own images: what shows through transparent pixels (default white)")
    add("--no_augment", dest="augmented", action="store_false", default=None, help="train on the images as they are")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    """How to train: the fields of TrainOptions, which says their defaults; None where the run or those decide."""
    add, count, not_negative = group.add_argument, whole_number(1), number(0)
    size = whole_number(1, MAX_BATCH)
    add("--batch_size", type=size, metavar="N", help="images of a step (default 64)")
    add("--eval_batch_size", type=size, metavar="N", help="images at once in evaluations (default: --batch_size)")
    add("--epochs", type=count, metavar="N", help="passes over the training images (default 3000)")
    add("--lr", type=number(0, above=True), metavar="RATE", help="learning rate of Adamax (default 5e-4)")
    add("--warmup", type=not_negative, help="epochs of linear warm-up (default 5)")
    add("--y_weight", type=not_negative, help="of the class loss, with --y_condition (default 0.01)")
    add("--max_grad_clip", type=not_negative, help="clip each gradient component (default 0: not)")
    add("--max_grad_norm", type=not_negative, help="clip the gradient norm (default 0: not)")
    add("--n_init_batches", type=size, help="batches that initialise the actnorms (default 8)")
    add("--n_workers", type=whole_number(0, MAX_WORKERS), help="data loading processes (default 2)")
    add("--seed", type=whole_number(0), metavar="N", help="of all random numbers (default 0)")
    add("--amp", action="store_true", default=None, help="estimators in bfloat16")
    add("--sample_every", type=count, metavar="N", help="epochs from one grid of samples to the next (default 1)")
    add("--save_every", type=count, metavar="N", help="iterations from one checkpoint to the next, beside every epoch")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max_iterations", type=whole_number(1), metavar="N", help="stop at iteration N")
    memory = group.add_mutually_exclusive_group()
    memory.add_argument(
        "--checkpoint_activations", action="store_true", help="recompute each step's inside: less memory"
    )
    memory.add_argument("--reversible", action="store_true", help="recompute each step's input too: memory free of K")
    add("--no_cuda", action="store_true", help="stay on the CPU")
    add("--output_dir", type=Path, help="default: experiments/TYPE_DATASET beside this file")
    add("--fresh", action="store_true", help="remove the run in --output_dir before starting")
    add("--saved_model", type=Path, metavar="FILE", help="checkpoint to start from, or a folder, whose newest is taken")
    add("--saved_optimizer", type=Path, metavar="FILE", help="optimizer state of a published checkpoint")


def _add_job_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    job = group.add_mutually_exclusive_group()
    job.add_argument("--evaluate", action="store_true", help="bits/dim of the test images, and reconstructions")
    job.add_argument("--sample", action="store_true", help="a grid of samples; needs no dataset")
    job.add_argument("--interpolate", action="store_true", help="images between test images")
    job.add_argument("--ood", metavar="DATASET", help="compare bits/dim with those of another dataset")
    job.add_argument(
        "--fid",
        metavar="FEATURES",
        help="FID and KID of samples, by the features of a TorchScript FILE, or by the flow's own: latents",
    )
    add("--ood_dataroot", help="where that dataset is (default: --dataroot)")
    add("--temperatures", type=number(0), nargs="+", default=TEMPERATURES, help="of samples")
    add("--n_samples", type=whole_number(1, MAX_SAMPLES), metavar="N", help="samples for each temperature (default 12)")
    add("--class", dest="class_name", metavar="NAME", help="sample one class of a model with --y_condition")
    add("--save_as", choices=("png", "npz"), help="samples also as single files, or as one archive, as FID tools read")
