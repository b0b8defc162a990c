"""Training batches without end: their order, which no worker or restart changes, and a loader with one-line errors.

Every random choice comes from a generator seeded by (purpose, seed, epoch, ...), never from a global one.
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.errors import InputError
from harness.pools import signals_left_to_this_process
from harness.stopping import WISHES, leave_signals_to_the_main_process, worker_deaths_named

_ORDER = 0  # a purpose of random numbers; datasets have others


def random_stream(purpose: int, *key: int) -> np.random.Generator:
    """Random numbers for one purpose and place, such as (seed, epoch, index): independent of every other stream."""
    return np.random.default_rng((purpose, *key))


def check_batch_size(batch_size: int, n_items: int, world_size: int, option: str, items: str) -> None:
    """InputError where there is not one batch, or processes cannot share it evenly.

    option: what the user calls the batch size; items: what a batch consists of, in the plural.
    """
    if n_items < batch_size:
        raise InputError(
            f"{n_items} {items} are fewer than {option} {batch_size}: not one batch; add some, or lower {option}"
        )
    if batch_size % world_size:
        raise InputError(
            f"{option} {batch_size} cannot be shared evenly by {world_size} processes; choose a multiple of "
            f"{world_size}"
        )


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of keys (epoch, index): a new permutation every epoch, its incomplete last batch dropped.

    Batch number `start_batch` (counted from the start of training) comes first, so a resumed run goes on exactly
    where it stopped. Of each global batch of `batch_size`, rank r of world_size takes the r-th slice.
    """

    def __init__(
        self, n_items: int, batch_size: int, seed: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        check_batch_size(batch_size, n_items, world_size, "batch_size", "items")
        self.n_items, self.batch_size, self.seed, self.start_batch = n_items, batch_size, seed, start_batch
        self._epoch, self._order = -1, []  # of the last batch made
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    @property
    def batches_per_epoch(self) -> int:
        """Optimiser steps in one pass over the items."""
        return self.n_items // self.batch_size

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Keys of global batch `number`, of all ranks."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if self._epoch != epoch:
            order = random_stream(_ORDER, self.seed, epoch).permutation(self.n_items)
            self._epoch, self._order = epoch, order.tolist()
        return [(epoch, index) for index in self._order[position * self.batch_size :][: self.batch_size]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in itertools.count(self.start_batch):
            yield self.batch(number)[self.share]


def _begin_worker(worker: int) -> None:
    leave_signals_to_the_main_process(worker)
    warnings.simplefilter("ignore")  # of libraries; what is wrong with an item, its error says


class BatchLoader(DataLoader):
    """A DataLoader in which a worker's InputError stays the one line it was, without the worker's traceback.

    Its workers leave signals to the main process; the global random state is neither read nor moved.
    worker_died: what to do where one dies, the end of the error message. device: where its batches go; those for a CUDA
    device are made ready in pinned memory, so that the host need not wait.
    """

    def __init__(
        self,
        dataset: Dataset,
        n_workers: int,
        worker_died: str,
        seed: int = 0,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        self._worker_died = worker_died
        with warnings.catch_warnings(action="ignore"):  # more workers than cores are the user's wish
            super().__init__(
                dataset,
                num_workers=n_workers,
                persistent_workers=n_workers > 0,
                pin_memory=device is not None and device.type == "cuda",
                worker_init_fn=_begin_worker,
                # DataLoader draws a seed for its workers even if they need none; left alone, from the global generator.
                generator=torch.Generator().manual_seed(seed),
                **options,
            )

    def __iter__(self) -> Iterator[Any]:
        try:
            with worker_deaths_named(self._worker_died):
                with signals_left_to_this_process(*WISHES):
                    batches = super().__iter__()
                yield from batches
        except InputError as error:
            error.__traceback__ = None  # a cycle through the frames that hold the workers; they would linger
            raise InputError(error.full.rstrip().rpartition("InputError: ")[-1]) from None
