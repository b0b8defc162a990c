"""Run that a command means: where it starts, its images, its options, its model. What a checkpoint says is not asked.

Whatever defines a run (images and their form, split, augmentation, architecture, how to train) is in its checkpoints. A
flag that contradicts one is refused in training; another job may take other test images, and says so.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import terminal
from harness.checkpoints import checked, read_torch_file
from harness.errors import InputError
from harness.files import read_text
from harness.folder import CONFIG_NAME
from harness.memory import require_memory
from harness.processes import is_main, on_main
from harness.settings import parse_section
from harness.training_state import check_random_state
from image_density_experiments import checkpoint as ckpt
from image_density_experiments.checkpoint import Checkpoint
from image_density_experiments.datasets import OWN, load_images
from image_density_experiments.entries import told
from image_density_experiments.model import ImageFlow, ImageModelConfig
from image_density_experiments.options import DATASETS_FOLDER, DataOptions, Options, TrainOptions
from image_density_experiments.pictures import ImageForm, picture_bytes
from image_density_experiments.splits import ImageData, Split

# Options whose change makes the run another one than was begun.
RESUMED_AS_BEGUN = ("batch_size", "lr", "warmup", "weight_decay", "seed", "n_init_batches")
MAX_RECORD_BYTES = 2**20
COMPARED = 16  # images of a split that tell it from another one

# --- where it starts --------------------------------------------------------------------------------------------


def starting_point(model: Path | None, optimizer: Path | None = None) -> Checkpoint | None:
    """Contents of --saved_model and --saved_optimizer; of a folder, its newest checkpoint that can be read."""
    if model is None:
        if optimizer is not None:
            raise InputError("--saved_optimizer belongs to a model; give --saved_model with it")
        return None
    start = told(ckpt.newest_checkpoint(model, check_usable) if model.is_dir() else ckpt.read_checkpoint(model))
    if optimizer is None:
        return start
    number = re.search(r"_(\d+)$", model.stem)  # published files are numbered by epochs
    epoch = int(number[1]) if number and start.epoch is None else start.epoch
    return replace(start, epoch=epoch, optimizer=read_torch_file(optimizer))


def check_usable(start: Checkpoint) -> None:
    """InputError where the model that a checkpoint describes has other weights, or where a run cannot go on from it.

    What a published file does not say is not missed.
    """
    start = told(start)
    state = ckpt.checked_state(start)
    checked(lambda: check_random_state(state), "random state is damaged", ckpt.REMEDIES.weights_only)
    if start.config is None:
        return
    with torch.random.fork_rng(devices=[]):  # none of the run's own random numbers
        model = _fresh_model(ImageModelConfig(**start.config))
    ckpt.load_weights(model, start.weights)
    if start.optimizer is not None:
        ckpt.load_optimizer(torch.optim.Adamax(model.parameters()), model, start)


def trained_start(options: Options) -> Checkpoint:
    """The checkpoint for a job that needs a trained model."""
    path = options.saved_model or options.output_dir
    if not path.exists():
        raise InputError(f"{path}: not there; train first, or name a checkpoint with --saved_model")
    return on_main(lambda: starting_point(path))


def _told(start: Checkpoint | None, name: str) -> Mapping[str, Any]:
    """What a checkpoint says of its `config`, `options` or `data`; nothing without one."""
    return {} if start is None else getattr(start, name) or {}


# --- how to train -----------------------------------------------------------------------------------------------


def train_options(options: Options, start: Checkpoint | None) -> TrainOptions:
    """The options of the run, with the flags that were given; InputError where they make it another one."""
    saved = _told(start, "options")
    given = options.train
    if options.job == "train" and saved.get("augmented") and given.get("augmented") is False:
        raise InputError("--no_augment: the run was trained with augmentation; leave the flag out, or start a new run")
    for name in RESUMED_AS_BEGUN if options.job == "train" and is_main() else ():
        if name in given and name in saved and given[name] != saved[name]:
            terminal.warn(f"{name} was {saved[name]}, now {given[name]}: not an exact continuation")
    return parse_section(TrainOptions, {**saved, **given})


# --- its images -------------------------------------------------------------------------------------------------


def data_options(options: Options, start: Checkpoint | None) -> DataOptions:
    """Choice of images: those of the run; InputError where a flag says otherwise in training, or nothing says which."""
    given, saved = dict(options.data), _saved_data(start)
    if start is not None and "dataset" not in {**saved, **given}:
        raise InputError(
            f"checkpoint {start.path}: does not say which images it was trained on; name them with --dataset"
        )
    if options.job == "train":
        for name in given.keys() & saved.keys() - {"dataroot"}:  # they may have moved: they are compared themselves
            if given[name] != saved[name]:
                raise InputError(
                    f"--{name} {given[name]}: the run was trained with {saved[name]}; leave the flag out, or start a "
                    "new run in another --output_dir"
                )
    elif given.get("dataset", saved.get("dataset")) != saved.get("dataset"):
        saved = {name: saved[name] for name in ("image_size", "background") if name in saved}
    merged = {**saved, **given}
    if merged.get("dataset") != OWN:
        merged = {name: value for name, value in merged.items() if name in given or name in ("dataset", "dataroot")}
    elif shape := _told(start, "config").get("image_shape"):
        merged.setdefault("channels", shape[2])
    return parse_section(DataOptions, {name: value for name, value in merged.items() if value is not None})


def _saved_data(start: Checkpoint | None) -> dict[str, Any]:
    saved = {name: value for name, value in _told(start, "data").items() if name in DataOptions.model_fields}
    if start is not None and not saved:  # an older checkpoint: its folder knows at least the name
        record = start.path.parent / CONFIG_NAME
        try:
            dataset = json.loads(read_text(record, MAX_RECORD_BYTES))["dataset"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        saved = {"dataset": dataset} if isinstance(dataset, str) else {}
    return {name: value for name, value in saved.items() if value is not None}


def read_images(which: DataOptions, download: bool = False) -> ImageData:
    """The images, fetched first by one process if they may be; their notes are said."""
    form = None
    if which.dataset == OWN or which.image_size is not None or which.channels is not None:
        form = ImageForm(size=which.image_size, channels=which.channels, background=which.background)
    root = which.dataroot or DATASETS_FOLDER
    if download:
        on_main(lambda: load_images(which.dataset, root, True, form) and None)
    data = load_images(which.dataset, root, form=form)
    if is_main():
        for note in data.notes:
            terminal.tell(f"{root}: {note}")
    return data


def name_of(which: DataOptions) -> str:
    """Name of a dataset in pictures and lines: own images by the name of their folder."""
    return f"{OWN} {Path(which.dataroot or DATASETS_FOLDER).resolve().name}" if which.dataset == OWN else which.dataset


def check_same_images(start: Checkpoint | None, which: DataOptions, data: ImageData, training: bool) -> None:
    """InputError where a run would go on with other images than it began with; a warning before another job."""
    saved = _told(start, "data")
    if "images" not in saved or saved["images"] == identity(data):
        return
    if not training:
        if is_main():
            terminal.warn(f"these are the images of {name_of(which)}, the model was trained on others")
        return
    raise InputError(
        f"{which.dataroot or which.dataset}: not the images that the run began with ({saved.get('n_images')} of "
        f"training and test, {_sizes(data)} now); give it those with --dataroot, or start a new run"
    )


def data_record(which: DataOptions, data: ImageData) -> dict[str, Any]:
    """Entries of a checkpoint on its images."""
    root = which.dataroot and str(Path(which.dataroot).resolve())
    about = {"n_images": _sizes(data), "images": identity(data), "class_names": list(data.class_names)}
    form = {"channels": data.image_shape[2]} if which.dataset == OWN else {}
    return {**which.to_dict(), "dataroot": root, **form, **about}


def _sizes(data: ImageData) -> str:
    return f"{len(data.train.images)} and {len(data.test.images)}"


def identity(data: ImageData) -> str:
    """A hash that differs where the number, the names, or some of the images of a split differ."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        digest.update(
            f"{len(split.images)} {'' if split.names is None else '/'.join(split.names)}".encode("utf8", "replace")
        )
        for index in np.linspace(0, len(split.images) - 1, COMPARED).round().astype(int):
            digest.update(_content(split, int(index)))
    return digest.hexdigest()


def _content(split: Split, index: int) -> bytes:
    """A file as it is, which does not depend on who decodes it, or the pixels of an array."""
    files: Sequence[Path] | None = getattr(split.images, "files", None)
    return np.ascontiguousarray(split.images[index]).tobytes() if files is None else picture_bytes(files[index])


# --- its model --------------------------------------------------------------------------------------------------


def model_config(
    start: Checkpoint | None, given: Mapping[str, Any], data: ImageData | None = None, dataset: str = ""
) -> ImageModelConfig:
    """The sizes that the flags give, or the checkpoint, which they must not contradict.

    data: the images that the model is for, where there are some; dataset: their name.
    """
    saved = _told(start, "config")
    for name, value in given.items():
        if name in saved and saved[name] != value:
            raise InputError(f"--{name} {value}: the checkpoint's model has {saved[name]!r}; leave the flag out")
    from_data = {} if data is None else {"image_shape": data.image_shape, "y_classes": data.n_classes or 10}
    config = parse_section(ImageModelConfig, {**from_data, **given, **saved})
    if data is not None:
        _check_fit(config, data, dataset)
    return config


def make_model(start: Checkpoint | None, config: ImageModelConfig) -> ImageFlow:
    """The model, with the weights of a checkpoint if there is one. InputError where there is no memory for it."""
    model = _fresh_model(config)
    if start is not None:
        ckpt.load_weights(model, start.weights)
    return model


def _fresh_model(config: ImageModelConfig) -> ImageFlow:
    require_memory(4.0 * config.weights_at_least, config.describe(), "lower hidden_channels, K or the images' size")
    return ImageFlow(config)


def _check_fit(config: ImageModelConfig, data: ImageData, dataset: str) -> None:
    if config.image_shape != data.image_shape:
        raise InputError(f"the model takes images of {config.image_shape}, {dataset} has {data.image_shape}")
    if config.y_condition and config.y_classes != data.n_classes:
        raise InputError(f"the model knows {config.y_classes} classes, {dataset} has {data.n_classes or 'no'} labels")


def load_model(start: Checkpoint, given: Mapping[str, Any], device: torch.device, *images: Any) -> ImageFlow:
    """The trained model of a checkpoint on the device, for jobs; given and images as for `model_config`."""
    model = make_model(start, model_config(start, given, *images))
    terminal.tell(f"weights: {start}")
    return model.to(device).eval()


def class_names(start: Checkpoint, model: ImageFlow) -> tuple[str, ...]:
    """Names of the model's classes, as its images had them; numbers where they had none."""
    names = _told(start, "data").get("class_names", [])
    return tuple(names) if len(names) == model.config.y_classes else tuple(map(str, range(model.config.y_classes)))
