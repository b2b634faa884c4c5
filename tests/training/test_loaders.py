"""The stream of samples: a function of the seed and the sample's number, whatever the rank, step or process."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, Dataset
from monai.transforms import Compose, LoadImaged, RandGaussianNoised, RandSpatialCropd, RandSpatialCropSamplesd

from maisi_tools.errors import InputError
from maisi_tools.training.loaders import TrainingLoader, ValidationLoader, seed_of


def dataset(size: int = 5) -> CacheDataset:
    items = [{"image": torch.full((1, 2, 2), float(i)), "file": f"case_{i}.nii.gz"} for i in range(size)]
    return CacheDataset(items, Compose([RandGaussianNoised("image", prob=1)]), progress=False)


def draws(loader: TrainingLoader, count: int) -> list[tuple[int, int]]:
    return [tuple(draw) for draw in islice(iter(loader.stream), count)]


def test_every_item_comes_once_an_epoch_in_a_new_order():
    found = draws(TrainingLoader(dataset(), seed=1), 15)
    assert [number for _, number in found] == list(range(15))
    epochs = [tuple(item for item, _ in found[i : i + 5]) for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len(set(epochs)) == 3
    assert draws(TrainingLoader(dataset(), seed=1), 15) == found != draws(TrainingLoader(dataset(), seed=2), 15)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_share_the_steps_of_one_process(batch_size):
    whole = draws(TrainingLoader(dataset(), seed=1), 24)
    parts = []
    for rank in range(3):
        loader = TrainingLoader(dataset(), seed=1, batch_size=batch_size)
        loader.stream.rank, loader.stream.world = rank, 3
        assert len(loader) == {1: 2, 2: 1}[batch_size] and loader.samples_per_step == 3 * batch_size
        parts.append(draws(loader, 24 // 3))
    for step in range(24 // (3 * batch_size)):
        together = [draw for part in parts for draw in part[step * batch_size : (step + 1) * batch_size]]
        assert sorted(together) == sorted(whole[step * 3 * batch_size : (step + 1) * 3 * batch_size])


def run(loader: TrainingLoader, start: int, steps: int) -> list[tuple]:
    seen = []

    def step(engine, batch):
        seen.append((batch["draw"].tolist(), batch["image"].clone(), torch.rand(1).item(), np.random.random_sample()))

    engine = Engine(step)
    loader.attach(engine)
    engine.load_state_dict({"iteration": start, "max_epochs": 100, "epoch_length": 3})
    with pytest.raises(InterruptedError):

        @engine.on(Events.ITERATION_COMPLETED)
        def stop(engine):
            if engine.state.iteration == steps:
                raise InterruptedError

        engine.run(loader)
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_starts_late_sees_what_a_whole_run_sees(workers):
    whole = run(TrainingLoader(dataset(), seed=1, batch_size=2), 0, 8)
    torch.rand(7)
    late = run(TrainingLoader(dataset(), seed=1, batch_size=2, num_workers=workers), 4, 8)
    assert len(late) == 4
    for (number, image, *randoms), (other, same, *again) in zip(whole[4:], late, strict=True):
        assert number == other and torch.equal(image, same)
        assert randoms == again or workers  # workers draw their own seed from the same generators
    assert len({image.sum().item() for _, image, *_ in whole}) == 8


def test_each_rank_and_step_has_random_numbers_of_its_own():
    """What draws from the global generators, such as dropout, differs between ranks; the same rank repeats itself."""

    def numbers(rank: int) -> list[tuple]:
        loader = TrainingLoader(dataset(), seed=1)
        loader.stream.rank, loader.stream.world = rank, 2
        return [tuple(drawn) for _, _, *drawn in run(loader, 0, 4)]

    first, second, again = numbers(0), numbers(1), numbers(0)
    assert first == again
    assert len({*first, *second}) == 8
    assert len({torch_number for torch_number, _ in (*first, *second)}) == 8


def test_validation_is_the_same_every_time():
    loader = ValidationLoader(dataset(), seed=3)
    first, second = ([(batch["draw"].item(), batch["image"]) for batch in loader] for _ in range(2))
    assert [number for number, _ in first] == list(range(5)) == [number for number, _ in second]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_another_stream_is_refused_and_items_are_described():
    loader = TrainingLoader(dataset(), seed=1, batch_size=2)
    loader.load_state_dict(TrainingLoader(dataset(), seed=1, batch_size=2).state_dict())
    with pytest.raises(InputError, match=r"seed 2 \(now 1\), samples_per_step 1 \(now 2\); to resume give the same"):
        loader.load_state_dict(TrainingLoader(dataset(), seed=2).state_dict())
    assert loader.describe(3).endswith("case_3.nii.gz")
    with pytest.raises(InputError, match="no training items"):
        TrainingLoader(dataset(0), seed=1)


def latents(folder: Path, *sizes: tuple[int, ...]) -> list[dict[str, str]]:
    for i, size in enumerate(sizes):
        nib.save(nib.Nifti1Image(np.zeros((*size, 4), np.float32), np.eye(4)), folder / f"{i}_latent.nii.gz")
    return [{"latent": str(folder / f"{i}_latent.nii.gz")} for i in range(len(sizes))]


def test_batches_of_latents_of_several_sizes_are_refused_before_the_first(tmp_path):
    """Whatever cuts them to one size is welcome, and what draws their size is not."""
    read = LoadImaged("latent", ensure_channel_first=True)
    several = latents(tmp_path, (6, 8, 8), (8, 6, 8), (6, 8, 8))
    with pytest.raises(
        InputError, match=r"/0_latent\S+ \(6, 8, 8\), \S+/1_latent\S+ \(8, 6, 8\); .*--accumulation_steps 2"
    ):
        TrainingLoader(Dataset(several, read), seed=1, batch_size=2)
    TrainingLoader(Dataset(several, read), seed=1)
    fixed, drawn = (RandSpatialCropd("latent", 2, 6, random_size=random_size) for random_size in (False, True))
    loader = TrainingLoader(Dataset(several, Compose([read, fixed])), seed=1, batch_size=2)
    assert next(iter(loader))["latent"].shape == (2, 4, 2, 2, 2)
    with pytest.raises(InputError, match="several sizes"):
        TrainingLoader(Dataset(latents(tmp_path, (8, 8, 8)), Compose([read, drawn])), seed=1, batch_size=2)


def test_seeds_differ_by_purpose_and_number():
    seeds = [seed_of(seed, purpose, n) for seed in range(3) for purpose in range(3) for n in range(3)]
    assert len(set(seeds)) == 27 and all(0 <= seed < 2**32 for seed in seeds)


def test_patches_of_one_volume_are_one_sample():
    """As a cropping transform with ``num_samples`` gives them."""
    volumes = CacheDataset(
        [{"image": torch.arange(40.0)[None]}] * 2, RandSpatialCropSamplesd("image", 4, 3), progress=False
    )
    first, again = (next(iter(TrainingLoader(volumes, seed=1))) for _ in range(2))
    assert first["image"].shape == (3, 1, 4) and first["draw"].tolist() == [0, 0, 0]
    assert torch.equal(first["image"], again["image"])
