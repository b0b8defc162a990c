"""Entries of a checkpoint on its model, its training and its images, checked as strictly as what a user writes.

Whether a checkpoint can be used is judged by it, before anything of it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from harness.errors import InputError, show
from harness.settings import Section, parse_section
from image_density_experiments.checkpoint import Checkpoint
from image_density_experiments.datasets import ALL
from image_density_experiments.model import ImageModelConfig
from image_density_experiments.options import DataOptions, TrainOptions
from image_density_experiments.pictures import ImageForm
from image_density_experiments.splits import MAX_CLASSES

# Options that are the run's own; the others are a command's.
RUNS_OWN = ("batch_size", "epochs", "lr", "warmup", "weight_decay", "y_weight", "max_grad_clip", "max_grad_norm")
RUNS_OWN += ("n_init_batches", "seed", "augmented", "amp")
IDENTITY = ("images", "n_images")  # texts, of the images themselves


def told(start: Checkpoint) -> Checkpoint:
    """The checkpoint, its `config`, `options` and `data` as their sections give them, without what is no part of them.

    InputError, which names the file, where no run can have written them.
    """
    try:
        config = None if start.config is None else _parsed(ImageModelConfig, start.config, "config.")
        options = {name: start.options[name] for name in RUNS_OWN if name in start.options}
        return replace(
            start, config=config, options=_parsed(TrainOptions, options, "options."), data=_checked_data(start.data)
        )
    except InputError as error:
        raise InputError(f"checkpoint {start.path}: its {error}; use another one") from None


def _parsed(section: type[Section], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values that are there, of the types that the section gives them."""
    parsed = parse_section(section, dict(values), prefix).to_dict()
    return {name: parsed[name] for name in values}


def _checked_data(data: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: data[name] for name in DataOptions.model_fields if data.get(name) is not None}
    known = _parsed(DataOptions, given, "data.")
    if known.get("dataset", ALL[0]) not in ALL:
        raise InputError(f"data.dataset: expected one of {', '.join(ALL)}, got {show(known['dataset'])}")
    form = {"size": "image_size", "channels": "channels", "background": "background"}
    try:
        ImageForm(**{name: known[entry] for name, entry in form.items() if entry in known})
    except InputError as error:
        raise InputError(f"data: {error}") from None
    for name in IDENTITY:
        if name in data and not isinstance(data[name], str):
            raise InputError(f"data.{name}: expected a text, got {show(data[name])}")
    names = data.get("class_names", [])
    if not isinstance(names, (list, tuple)) or len(names) > MAX_CLASSES or not all(isinstance(n, str) for n in names):
        raise InputError(f"data.class_names: expected at most {MAX_CLASSES} texts, got {show(names)}")
    return {**known, **{name: data[name] for name in IDENTITY if name in data}, "class_names": list(names)}
