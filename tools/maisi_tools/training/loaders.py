"""Data order, augmentation and random numbers of training as functions of (seed, step), so that nothing is to be saved.

The samples of a training run are one endless numbered stream: number n is item ``order(seed, n // size)[n % size]`` of
a data set of ``size`` items, and step k of all ranks together takes the next ``batch_size * ranks`` of them. A sample's
augmentation and noise are seeded by its number. So a resumed run draws what an uninterrupted one draws, from any step,
and two ranks with half the batch each see what one process with the whole batch sees.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from torch import distributed
from torch.utils.data import Dataset, Sampler

from maisi_tools.errors import InputError
from maisi_tools.volumes.nifti import read_nifti_grid
from maisi_tools.volumes.stored import read_whole

ORDER, AUGMENTATION, STEP, NOISE = range(4)
"""What a seed is derived for; each has random numbers of its own."""


def seed_of(seed: int, purpose: int, *numbers: int) -> int:
    """A seed in 0..2^32 - 1 that depends on all of its arguments (non-negative) and differs between purposes."""
    return int(np.random.SeedSequence([seed, purpose, *numbers]).generate_state(1)[0])


@contextmanager
def sample_numbers(seed: int, draw: int, device: torch.device) -> Iterator[None]:
    """Within it torch's global generators, of the CPU and of ``device``, are those of the sample numbered ``draw``.

    For the noise of one sample of a batch; afterwards they go on as if nothing had been drawn.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, NOISE, draw))
        yield


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside torchrun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class Draw(NamedTuple):
    """One sample of the stream: which item of the data set, and the number that seeds what is random about it."""

    item: int
    number: int


class SeededDataset(Dataset):
    """A MONAI data set whose random transforms are seeded by the :class:`Draw` that is asked for.

    What is random in a transform has to come from MONAI's ``Randomizable.R``, not from global generators, which worker
    processes seed in their own way. Items (dicts, or lists of them where several patches are cut from one volume) get
    the keys ``item`` (index in the data set) and ``draw`` (number of the sample).
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> dict | list[dict]:
        self.dataset.transform.set_random_state(seed=seed_of(self.seed, AUGMENTATION, draw.number))
        found = self.dataset[draw.item]
        origin = {"item": draw.item, "draw": draw.number}
        return [{**part, **origin} for part in found] if isinstance(found, list) else {**found, **origin}


class _Stream(Sampler[Draw]):
    """This rank's part of the endless stream of samples, from sample ``start`` on."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.start = size, seed, 0
        self.rank, self.world = ranks()

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[Draw]:
        epoch, order = -1, np.empty(0, dtype=int)
        for number in itertools.count(self.start + self.rank, self.world):
            if epoch != number // self.size:
                epoch = number // self.size
                order = np.random.default_rng(seed_of(self.seed, ORDER, epoch)).permutation(self.size)
            yield Draw(int(order[number % self.size]), number)


def check_sizes(dataset: SeededDataset, batch_size: int) -> None:
    """Refuse batches of latents of several sizes at once, and not when two of them first meet in one.

    The first and the last by size are drawn twice each: what counts is the size that the transforms leave, and a crop
    may draw that.

    Args:
        dataset: whose items have the path of a ``latent``; any other is passed over.
        batch_size: of each rank.

    Raises:
        InputError: the sizes differ.
    """
    data = dataset.dataset.data
    if batch_size < 2 or not all(isinstance(item, Mapping) and isinstance(item.get("latent"), str) for item in data):
        return
    grids = [read_whole(item["latent"], partial(read_nifti_grid, item["latent"], "latent")) for item in data]
    by_size = sorted(range(len(data)), key=lambda item: grids[item][0])
    drawn: dict[tuple[int, ...], str] = {}  # size -> a file
    for number, item in enumerate((by_size[0], by_size[-1]) * 2):
        found = dataset[Draw(item, number)]
        for part in found if isinstance(found, list) else [found]:
            drawn.setdefault(tuple(part["latent"].shape[1:]), data[item]["latent"])
    if len(drawn) > 1:
        listed = ", ".join(f"{file} {size}" for size, file in drawn.items())
        raise InputError(
            f"batch_size is {batch_size}, but latents have several sizes: {listed}; allowed is 1 for these: give "
            f"--batch_size 1 --accumulation_steps {batch_size}, which averages as many in a step, or crop all to one "
            "size as recipes/small/gpu.json does"
        )


class _Once(Sampler[Draw]):
    """Every item once, in order, split among the ranks; every rank takes all when there are fewer items than ranks."""

    def __init__(self, size: int) -> None:
        rank, world = ranks()
        self.items = range(rank, size, world) if size >= world else range(size)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Draw]:
        return (Draw(item, item) for item in self.items)


class ValidationLoader(DataLoader):
    """Every item once, each with the same random numbers at every validation; split among the ranks of torchrun.

    Args:
        dataset: MONAI data set of dicts.
        seed: of noise and timesteps; give another than in training.
    """

    def __init__(self, dataset: Any, seed: int, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__(SeededDataset(dataset, seed), num_workers, batch_size=batch_size, sampler=_Once(len(dataset)))


class TrainingLoader(DataLoader):
    """The endless stream of training batches; see the module.

    It is also a handler, to be listed among the trainer's: it starts the stream at the trainer's iteration, and seeds
    the global generators (python, numpy, torch) of each step by (seed, iteration, rank) for what draws from them, such
    as dropout. ``len()`` is the number of batches of this rank that cover the data once, rounded up. Nothing needs to
    be set for torchrun.

    Args:
        dataset: MONAI data set of dicts with items of equal shape, or ``batch_size`` 1.
        seed: decides order, augmentation and noise.
        batch_size: of each rank.

    Raises:
        InputError: the data set is empty, or its latents have several sizes in batches of more than one.
    """

    def __init__(self, dataset: Any, seed: int, batch_size: int = 1, num_workers: int = 0) -> None:
        if not len(dataset):
            raise InputError("there are no training items; give at least one that is not held out")
        self.seed = seed
        self.stream = _Stream(len(dataset), seed)
        seeded = SeededDataset(dataset, seed)
        check_sizes(seeded, batch_size)
        super().__init__(seeded, num_workers, batch_size=batch_size, sampler=self.stream)

    @property
    def samples_per_step(self) -> int:
        """Samples of one batch of all ranks together."""
        return int(self.batch_size or 1) * self.stream.world

    def attach(self, engine: Engine) -> None:
        """Start at the engine's iteration and seed each of its steps."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._seed_step)

    def _start(self, engine: Engine) -> None:
        self.stream.start = engine.state.iteration * self.samples_per_step

    def _seed_step(self, engine: Engine) -> None:
        seed = seed_of(self.seed, STEP, engine.state.iteration, self.stream.rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def describe(self, item: int) -> str:
        """The files of an item, for messages."""
        data = self.dataset.dataset.data[item]  # type: ignore[attr-defined]
        return ", ".join(str(value) for value in data.values()) if isinstance(data, Mapping) else str(data)

    def state_dict(self) -> dict[str, int]:
        """What has to be the same for a run to go on with the same samples."""
        return {"items": self.stream.size, "seed": self.seed, "samples_per_step": self.samples_per_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Check that this loader goes on with the stream that ``state`` was taken from.

        Raises:
            InputError: another number of items, seed, or batch size times ranks.
        """
        own = self.state_dict()
        if changed := [f"{name} {state[name]} (now {own[name]})" for name in own if own[name] != state[name]]:
            raise InputError(
                f"the checkpoint was written with {', '.join(changed)}; to resume give the same data, seed, and batch "
                "size times ranks, or start a new run from its weights with --init_ckpt"
            )
