from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.training.patches import RandSpacingPatchd


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


def test_a_patch_shows_the_place_its_affine_names():
    inside = 0
    for patch in patches():
        grid = torch.stack(torch.meshgrid(*map(torch.arange, patch.shape[1:]), indexing="ij"), -1).double()
        place = grid @ patch.affine[:3, :3].T + patch.affine[:3, 3]
        voxel = (place - torch.tensor([-50.0, 7.0, 11.0])) / torch.tensor([3.0, 2.0, 2.5])
        known = ((voxel >= 0) & (voxel <= torch.tensor([39, 35, 29]))).all(-1)
        wanted = (place @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) / 100 + 10
        inside += int(known.sum())
        assert (patch[0].as_tensor().double() - wanted)[known].abs().max() < 1e-3
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
