"""Train, evaluate and sample image density models: Glow, and the types that share one estimator among many steps.

python image_density_experiments/train.py                        train nanoflow on the embedded patches
python image_density_experiments/train.py --saved_model FILE     go on from a checkpoint, or the newest of a folder
... --saved_model FILE --evaluate | --sample | --interpolate | --ood DATASET | --fid FEATURES
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
elif __name__ == "__main__":
    import harness.start  # noqa: F401

from collections.abc import Sequence

import torch

from harness import terminal
from harness.devices import choose_device
from harness.folder import clear, locked_run, record_start, require_empty, require_only
from harness.processes import held_by_main, on_main, process_group, report_error, world_size
from harness.stopping import StopRequest, exit_status, leave
from image_density_experiments import checkpoint as ckpt
from image_density_experiments import jobs
from image_density_experiments.loop import train_until
from image_density_experiments.model import count_parameters
from image_density_experiments.options import DataOptions, Options, read_options
from image_density_experiments.runs import (
    check_same_images,
    data_options,
    data_record,
    make_model,
    model_config,
    name_of,
    read_images,
    starting_point,
    train_options,
)
from image_density_experiments.trainer import Trainer, check_memory

RUN_FILES = (
    *("glow_model_*.pt", "losses.csv", "epochs.csv", "config.json", "run_record.jsonl", "tensorboard"),
    *("samples", "evaluation"),
)


def train(options: Options, device: torch.device) -> int:
    """Train to the last epoch, --max_iterations or a signal; returns the exit status."""
    folder = options.output_dir
    start = on_main(lambda: starting_point(options.saved_model, options.saved_optimizer))
    on_main(lambda: _refuse_foreign_folder(options))
    how, which = train_options(options, start), data_options(options, start)
    data = read_images(which, options.download)
    check_same_images(start, which, data, training=True)
    with StopRequest() as stop:
        with held_by_main(locked_run(folder)):
            if options.fresh:
                on_main(lambda: clear(folder, RUN_FILES))
            torch.manual_seed(how.seed)
            sizes = model_config(start, options.model, data, which.dataset)
            check_memory(sizes, how, options.memory, device)
            model = make_model(start, sizes).to(device)
            model.memory = options.memory
            if start is not None:
                terminal.tell(f"weights: {start}")
            trainer = Trainer(model, data, how, folder, start, {"data": data_record(which, data)})
            last = min(how.epochs * trainer.batches_per_epoch, options.max_iterations or sys.maxsize)
            _record_and_say(trainer, which, last)
            saved = train_until(last, trainer, options.temperatures, stop)
        resume = f"go on with --saved_model {folder}" if ckpt.list_checkpoints(folder) else "nothing was saved yet"
        return stop.exit_status(saved, finished=trainer.iteration >= last, resume=resume)


def _record_and_say(trainer: Trainer, which: DataOptions, last: int) -> None:
    config, data, folder = trainer.model.config, trainer.data, trainer.folder
    record = {**config.to_dict(), **trainer.options.to_dict(), **trainer.entries["data"]}
    on_main(lambda: record_start(folder, record, processes=world_size()))
    terminal.tell(
        f"{config.model_type}: {count_parameters(trainer.model):,} parameters, {name_of(which)}: "
        f"{len(data.train.images)} training and {len(data.test.images)} test images, iterations "
        f"{trainer.iteration} to {last} on {trainer.device}, files in {folder}"
    )
    if trainer.iteration >= last:
        terminal.say(f"already at iteration {trainer.iteration}; raise --epochs or --max_iterations to go on")


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
    "evaluate": jobs.evaluate,
    "sample": jobs.sample,
    "interpolate": jobs.interpolate_images,
    "ood": jobs.compare_datasets,
    "fid": jobs.measure_quality,
}
SHARED = ("train", "evaluate")  # among processes; the other jobs are for one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit status."""
    return exit_status(lambda: _run(read_options(arguments)), report_error)


def _run(options: Options) -> int:
    terminal.hush(options.quiet)
    job, device = JOBS[options.job], choose_device(options.device)
    with process_group(device, resume=ckpt.REMEDIES.resume):
        return job(options, device) if options.job in SHARED else on_main(lambda: job(options, device))


if __name__ == "__main__":
    leave(main())
