from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.training.budget import Budget
from maisi_tools.training.patches import RandCropOrWholed, RandLatentCropd, RandSpacingPatchd, check_patches


def ramp(size=(40, 36, 30), spacing=(3.0, 2.0, 2.5), origin=(-50.0, 7.0, 11.0)):
    """An image whose intensity is a known linear function of the place in mm, tissue everywhere."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    grid = np.meshgrid(*map(np.arange, size), indexing="ij")
    place = sum(weight * (o + s * g) for weight, o, s, g in zip((1, 2, 3), origin, spacing, grid, strict=True))
    return {"image": MetaTensor(torch.tensor(place, dtype=torch.float32)[None] / 100 + 10, affine=torch.tensor(affine))}


def patches(count=30, **settings):
    given = {"spacing": [[1.5, 3.0], [1.0, 2.0], [2.0, 4.0]], "min_size": [8, 12, 8], "max_size": [24, 16, 20]}
    transform = RandSpacingPatchd("image", **given | settings)
    transform.set_random_state(seed=5)
    data = ramp()
    return [transform(data)["image"] for _ in range(count)]


def test_sizes_and_spacings_cover_what_is_allowed_and_no_more():
    made = patches(80)
    sizes = np.array([patch.shape[1:] for patch in made])
    assert [sorted(set(axis)) for axis in sizes.T] == [[8, 12, 16, 20, 24], [12, 16], [8, 12, 16, 20]]
    spacings = np.array([patch.pixdim.tolist() for patch in made])
    assert (spacings >= [1.5, 1.0, 2.0]).all() and (spacings <= [3.0, 2.0, 4.0]).all()
    assert (np.ptp(spacings, axis=0) > [1.2, 0.8, 1.6]).all()


def voxels_in_place(patch) -> int:
    """Check that every voxel inside the volume has the value of the place that the affine names; how many these are."""
    grid = torch.stack(torch.meshgrid(*map(torch.arange, patch.shape[1:]), indexing="ij"), -1).double()
    place = grid @ patch.affine[:3, :3].T + patch.affine[:3, 3]
    voxel = (place - torch.tensor([-50.0, 7.0, 11.0])) / torch.tensor([3.0, 2.0, 2.5])
    known = ((voxel >= 0) & (voxel <= torch.tensor([39, 35, 29]))).all(-1)
    wanted = (place @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) / 100 + 10
    assert (patch[0].as_tensor().double() - wanted)[known].abs().max() < 1e-3
    return int(known.sum())


def test_a_patch_shows_the_place_its_affine_names():
    inside = 0
    for patch in patches():
        inside += voxels_in_place(patch)
    assert inside > 10000


@pytest.mark.parametrize(("foreground", "least", "most"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.6)])
def test_patches_centre_on_tissue_as_often_as_asked(foreground, least, most):
    image = torch.zeros(1, 32, 32, 32)
    image[:, 12:24, 12:24, 8:24] = 1.0
    transform = RandSpacingPatchd(
        "image", [[1, 1]] * 3, [4, 4, 4], [4, 4, 4], foreground=foreground, threshold=0.3
    ).set_random_state(seed=1)
    data = {"image": MetaTensor(image, affine=torch.eye(4))}
    share = np.mean([float(transform(data)["image"].max()) > 0 for _ in range(60)])
    assert least <= share <= most


def test_a_volume_of_air_ends_and_the_same_seed_draws_the_same():
    data = {"image": MetaTensor(torch.zeros(1, 9, 9, 9), affine=torch.eye(4))}
    one, two = (
        RandSpacingPatchd("image", [[1, 2]] * 3, [4, 4, 4], [8, 8, 8]).set_random_state(seed=3) for _ in range(2)
    )
    for _ in range(4):
        first, second = one(data)["image"], two(data)["image"]
        assert first.shape == second.shape and not first.any() and torch.equal(first.affine, second.affine)


def test_a_turned_patch_shows_the_place_its_affine_names():
    """A linear image is known everywhere, so every voxel tells whether it was taken from where the affine says."""
    angles, inside = [], 0
    for patch in patches(rotation=10.0):
        axes = patch.affine[:3, :3] / patch.pixdim
        torch.testing.assert_close(axes.T @ axes, torch.eye(3, dtype=axes.dtype))
        angles.append(np.degrees(np.arccos((np.trace(axes.numpy()) - 1) / 2)))
        inside += voxels_in_place(patch)
    assert inside > 10000
    assert 5 < max(angles) < 10 * 3**0.5 + 0.1


@pytest.mark.parametrize(
    ("low", "high", "batch", "match"),
    [
        ([16, 32, 32], [64, 64, 64], 1, "at least 24"),
        ([32, 32, 34], [64, 64, 64], 1, "multiples of 4"),
        ([32, 32], [64, 64, 64], 1, "three multiples"),
        (32, [64, 64, 64], 1, "min_patch_size is 32; allowed are three multiples"),
        ([64, 32, 32], [48, 64, 64], 1, "larger than max_patch_size"),
        ([32, 32, 32], [64, 64, 64], 2, "accumulation_steps"),
    ],
)
def test_patch_sizes_that_cannot_be_used_are_refused(low, high, batch, match):
    with pytest.raises(InputError, match=match):
        check_patches(low, high, multiple=4, smallest=24, batch_size=batch)


def test_usable_patch_sizes_pass():
    check_patches([24, 24, 24], [64, 64, 64], multiple=4, smallest=24, batch_size=1)
    check_patches([48, 48, 32], [48, 48, 32], multiple=4, smallest=24, batch_size=4)


def counted(size: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    """A volume in which every voxel has its own number, and 1 + that in each further channel."""
    numbers = torch.arange(1, 1 + int(np.prod(size)), dtype=torch.float32).reshape(1, *size)
    return torch.cat([numbers + 1e6 * channel for channel in range(channels)])


def test_crops_on_the_own_grid_are_parts_of_the_volume_or_all_of_it():
    image, budget = counted((20, 13, 9)), Budget()
    crop = RandCropOrWholed("image", [8, 8, 4], [12, 12, 12], 4, budget, whole=0.5, threshold=0)
    crop.set_random_state(seed=0)
    for progress, share in ((0.0, 0.0), (0.375, 0.25), (0.75, 0.5), (1.0, 0.5)):
        budget._progress.fill_(progress)
        made = [crop({"image": image})["image"] for _ in range(400)]
        whole = [part for part in made if part.shape == (1, 20, 16, 12)]
        assert len(whole) / len(made) == pytest.approx(share, abs=0.07)
        expected = np.pad(image.numpy(), [(0, 0), (0, 0), (0, 3), (0, 3)], mode="edge")
        assert all(np.array_equal(part.numpy(), expected) for part in whole)
        for part in made:
            if part.shape != (1, 20, 16, 12):
                assert all(4 <= n <= 12 and n % 4 == 0 for n in part.shape[1:])
                first = int(part[0, 0, 0, 0]) - 1
                a, b, c = first // (13 * 9), first // 9 % 13, first % 9
                inside = image[:, a : a + part.shape[1], b : b + part.shape[2], c : c + part.shape[3]].numpy()
                widths = [(0, n - m) for n, m in zip(part.shape, inside.shape, strict=True)]
                assert np.array_equal(part.numpy(), np.pad(inside, widths, mode="edge"))


def test_a_crop_of_a_latent_comes_with_its_part_of_the_mask():
    latent, mask = counted((24, 16, 20), 4), counted((48, 32, 40))
    crop = RandLatentCropd(["latent", "mask"], 2, [8, 8, 8], [16, 8, 16], 8)
    crop.set_random_state(seed=0)
    sizes = set()
    for _ in range(50):
        made = crop({"latent": latent, "mask": mask, "other": 1})
        sizes.add(tuple(made["latent"].shape[1:]))
        first = int(made["latent"][0, 0, 0, 0]) - 1
        start = np.array([first // (16 * 20), first // 20 % 16, first % 20])
        place = 2 * start
        assert int(made["mask"][0, 0, 0, 0]) - 1 == (place[0] * 32 + place[1]) * 40 + place[2]
        assert [2 * n for n in made["latent"].shape[1:]] == list(made["mask"].shape[1:]) and made["other"] == 1
    assert sizes == {(a, 8, c) for a in (8, 16) for c in (8, 16)}
    whole = RandLatentCropd(["latent", "mask"], 2, [8, 8, 8], [8, 8, 8], 8, whole=1.0)
    assert whole({"latent": latent, "mask": mask})["latent"] is latent
    larger = RandLatentCropd(["latent", "mask"], 2, [24, 24, 16], [24, 24, 16], 8)  # than the latent, along two axes
    larger.set_random_state(seed=0)
    made = larger({"latent": latent, "mask": mask})
    assert made["latent"].shape[1:] == (24, 24, 16) and made["mask"].shape[1:] == (48, 48, 32)
    assert made["mask"].dtype == mask.dtype
    size = latent.shape[1:]
    for key, times in (("latent", 1), ("mask", 2)):
        part, known = made[key], [min(want, n) * times for want, n in zip((24, 24, 16), size, strict=True)]
        inside = part[:, : known[0], : known[1], : known[2]]
        assert (part[:, known[0] :] == inside[:, -1:, :1, :1] * 0 + part[:, known[0] - 1 : known[0]]).all()
        assert (part[:, :, known[1] :] == part[:, :, known[1] - 1 : known[1]]).all()
