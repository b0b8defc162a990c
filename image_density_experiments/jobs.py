"""Jobs for a trained image model; files go to `evaluation/<checkpoint>/` of the run's folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness import terminal
from harness.errors import InputError
from harness.files import write_table
from harness.processes import gather, is_main
from image_density_experiments import quality
from image_density_experiments.checkpoint import Checkpoint
from image_density_experiments.datasets import OWN
from image_density_experiments.evaluation import auroc, bits_per_dim, interpolate, reconstruct, write_bits
from image_density_experiments.figures import save_histogram, save_image_rows
from image_density_experiments.model import ImageFlow
from image_density_experiments.options import DATASETS_FOLDER, DataOptions, Options, TrainOptions
from image_density_experiments.runs import (
    check_same_images,
    class_names,
    data_options,
    load_model,
    name_of,
    read_images,
    train_options,
    trained_start,
)
from image_density_experiments.sampling import SHOWN, draw, grid_rows, save_samples_as, shown
from image_density_experiments.splits import ImageData, Split, whole

PAIRS, LINE = 6, 12  # pairs of an interpolation, images from one to the other
MADE = 10_000  # samples for a distance, if the test images are not fewer


class Job(NamedTuple):
    """A trained model with the images and options of its run."""

    model: ImageFlow
    data: ImageData
    which: DataOptions
    how: TrainOptions
    start: Checkpoint
    folder: Path


def _job(options: Options, device: torch.device) -> Job:
    start = trained_start(options)
    which = data_options(options, start)
    data = read_images(which, options.download)
    check_same_images(start, which, data, training=False)
    model = load_model(start, options.model, device, data, which.dataset)
    return Job(model, data, which, train_options(options, start), start, _results(options, start))


def _results(options: Options, start: Checkpoint) -> Path:
    folder = options.output_dir / "evaluation" / start.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- likelihood -------------------------------------------------------------------------------------------------


def evaluate(options: Options, device: torch.device) -> int:
    """Bits per dimension of the test images, in a CSV and averaged; reconstructions."""
    job = _job(options, device)
    bits = np.array(gather(list(_bits(job, job.data.test, shared=True))))
    if not is_main():
        return 0
    name = name_of(job.which)
    write_bits(job.folder / "bits_per_dim.csv", {job.which.dataset: (bits, job.data.test)})
    finite = bits[np.isfinite(bits)]
    mean = f"{finite.mean():.4f} bits/dim" if len(finite) else "no finite bits/dim"
    terminal.say(f"{name}: {mean} over {len(finite)} test images (std {finite.std() if len(finite) else 0:.4f})")
    _warn_of_lost(name, bits)
    result = reconstruct(job.model, job.data.test, SHOWN)
    images = [shown(values, job.model.config.n_bits) for values in (result.originals, result.images)]
    rows = {"test image": images[0].pixels, "inverse": images[1].pixels}
    title = f"reconstructions, largest error {result.max_error:.1e}{images[1].remark}"
    save_image_rows(job.folder / "reconstructions.png", rows, title)
    terminal.say(
        f"reconstructions: largest error {result.max_error:.2e}, {100 * result.exact:.2f} % of values restored "
        f"exactly\nfiles: {job.folder}"
    )
    _warn_of_grey(images[1].n_not_finite, "reconstructions")
    return 0


def _bits(job: Job, split: Split, shared: bool = False) -> np.ndarray:
    return bits_per_dim(job.model, split, job.how.evaluated_at_once, job.how.seed, job.how.amp, shared)


def _mean(bits: np.ndarray) -> str:
    finite = bits[np.isfinite(bits)]
    return f"{finite.mean():.4f}" if len(finite) else "none finite"


def _warn_of_lost(name: str, bits: np.ndarray) -> None:
    if n_lost := int((~np.isfinite(bits)).sum()):
        terminal.warn(f"{n_lost} of {len(bits)} images of {name} have no finite bits/dim; they are left out of means")


def _warn_of_grey(n: int, what: str, where: str = "in the picture") -> None:
    if n:
        terminal.warn(f"{n} {what} hold values that are not finite: grey {where}")


def compare_datasets(options: Options, device: torch.device) -> int:
    """Bits per dimension of this dataset's test images and of another one's, as a histogram and AUROC.

    Of a folder of own images all are taken, of the other datasets the test images.
    """
    job = _job(options, device)
    if job.model.config.y_condition:
        raise InputError("--ood needs a model without --y_condition: images of another dataset have other classes")
    other, split = _other_images(options, job)
    names = {name_of(job.which): job.data.test, name_of(other): split}
    if len(names) == 1:
        names = {str(job.which.dataroot): job.data.test, str(other.dataroot): split}
    bits = {name: _bits(job, images) for name, images in names.items()}
    inside, outside = bits.values()
    area = auroc(inside, outside)
    path = job.folder / f"ood_{options.ood}"
    keys = [job.which.dataset, other.dataset] if job.which.dataset != other.dataset else list(names)
    write_bits(
        path.with_suffix(".csv"), {key: (bits[name], names[name]) for key, name in zip(keys, names, strict=True)}
    )
    save_histogram(path.with_suffix(".png"), bits, f"AUROC of bits/dim for {list(names)[1]}: {area:.4f}")
    for name, values in bits.items():
        _warn_of_lost(name, values)
    means = ", ".join(f"{name} {_mean(values)} ({len(values)})" for name, values in bits.items())
    terminal.say(f"bits/dim: {means}; AUROC {area:.4f} (more bits: from outside)\nfiles: {job.folder}")
    return 0


def _other_images(options: Options, job: Job) -> tuple[DataOptions, Split]:
    """The dataset of --ood, in the form of the model's images."""
    root = options.ood_dataroot or options.data.get("dataroot")
    if options.ood == job.which.dataset and (options.ood != OWN or _same_place(root, job.which.dataroot)):
        place = "; name other images with --ood_dataroot" if options.ood == OWN else "; name another one"
        raise InputError(f"--ood {options.ood}: is the model's own dataset{place}")
    own = {"image_size": job.which.image_size, "channels": job.data.image_shape[2], "background": job.which.background}
    form = own if options.ood == OWN else {}
    other = DataOptions(dataset=options.ood, dataroot=str(root or DATASETS_FOLDER), **form)
    data = read_images(other, options.download)
    if data.image_shape != job.data.image_shape:
        raise InputError(f"--ood {options.ood}: images of {data.image_shape}, the model takes {job.data.image_shape}")
    return other, whole(data) if options.ood == OWN else data.test


def _same_place(one: str | None, other: str | None) -> bool:
    return one is None or (other is not None and Path(one).resolve() == Path(other).resolve())


# --- images -----------------------------------------------------------------------------------------------------


def sample(options: Options, device: torch.device) -> int:
    """Samples at the --temperatures: a grid, and on request single files or an archive. Needs no dataset."""
    start = trained_start(options)
    model, folder = load_model(start, options.model, device), _results(options, start)
    how, names = train_options(options, start), class_names(start, model)
    labels = _labels(options, model, names)
    drawn = {t: draw(model, len(labels), t, how.seed, labels) for t in options.temperatures}
    for temperature, samples in drawn.items():
        terminal.say(f"T = {temperature:g}: {samples}")
    n_bits = model.config.n_bits
    images = {t: shown(samples.images, n_bits) for t, samples in drawn.items()}
    rows = grid_rows(
        {t: each.pixels for t, each in images.items()}, labels if model.config.y_condition else None, names
    )
    title = f"{model.config.model_type}, {model.config.flow_coupling} coupling: samples"
    temperature = f" at T = {options.temperatures[0]:g}" if len(drawn) == 1 else ""
    n_grey = sum(each.n_not_finite for each in images.values())
    save_image_rows(
        folder / "samples.png", rows, title + temperature + (f" ({n_grey} not finite: grey)" if n_grey else "")
    )
    _warn_of_grey(n_grey, "samples")
    terminal.say(f"samples: {folder / 'samples.png'}")
    if options.save_as is not None:
        for temperature, each in images.items():
            path = save_samples_as(options.save_as, folder, temperature, each.pixels, labels)
            terminal.say(f"samples: {path}")
    return 0


def _labels(options: Options, model: ImageFlow, names: tuple[str, ...]) -> Tensor:
    """Classes of the samples [n]: the one that was asked for, or all in turn."""
    n_classes = model.config.y_classes if model.config.y_condition else 1
    if options.class_name is None:
        one_grid = model.config.y_condition and len(options.temperatures) == 1
        n = options.n_samples or (SHOWN * min(n_classes, SHOWN) if one_grid else SHOWN)
        return torch.arange(n) % n_classes
    if not model.config.y_condition:
        raise InputError(f"--class {options.class_name}: the model is not conditioned on classes")
    if options.class_name not in names:
        some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise InputError(f"--class {options.class_name}: unknown; there are {some}")
    return torch.full((options.n_samples or SHOWN,), names.index(options.class_name))


def interpolate_images(options: Options, device: torch.device) -> int:
    """Images between pairs of test images, along straight lines in the latent space."""
    job = _job(options, device)
    lines = interpolate(job.model, job.data.test, PAIRS, LINE)
    images = shown(lines, job.model.config.n_bits)
    rows = {f"pair {number}": line for number, line in enumerate(images.pixels, 1)}
    title = f"between test images, through the latent space{images.remark}"
    save_image_rows(job.folder / "interpolation.png", rows, title)
    _warn_of_grey(images.n_not_finite, "images between others")
    terminal.say(f"interpolation: {job.folder / 'interpolation.png'}")
    return 0


def measure_quality(options: Options, device: torch.device) -> int:
    """FID and KID between the test images and as many samples, at each of the --temperatures."""
    job = _job(options, device)
    features, words = quality.make_features(options.fid, job.model)
    real = quality.features_of(job.data.test.images, features)
    n = options.n_samples or min(len(real), MADE)
    rows: list[tuple[float | int, ...]] = []
    for temperature in options.temperatures:
        samples = draw(job.model, n, temperature, job.how.seed)
        images = shown(samples.images, job.model.config.n_bits)
        _warn_of_grey(images.n_not_finite, "samples", "and were compared so")
        made = quality.features_of(images.pixels, features)
        result = quality.distance(real, made, job.how.seed)
        rows.append((temperature, *result, len(real), n))
        terminal.say(
            f"T = {temperature:g}: FID {result.fid:.4g}, KID {result.kid:.4g} (std {result.kid_std:.2g}) by {words}, "
            f"{result.n_features} of them, {len(real)} test images and {samples}"
        )
    if min(len(real), n) <= result.n_features:
        terminal.warn(f"fewer images than the {result.n_features} features: FID is far too large; compare KID")
    columns = ("temperature", "fid", "kid", "kid_std", "n_features", "n_test", "n_samples")
    write_table(job.folder / "quality.csv", [columns, *rows])
    terminal.say(f"files: {job.folder}")
    return 0
