"""Padding and cropping, the affine of a latent and masks on other grids, against closed forms in world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from maisi_tools.volumes.grid import (
    PadInferer,
    crop_to,
    grid_difference,
    image_affine,
    latent_affine,
    pad_to_multiple,
    regrid_mask,
    same_grid,
    straighten,
)

from .conftest import OBLIQUE


@given(size=st.tuples(*[st.integers(1, 20)] * 3), multiple=st.sampled_from([1, 4, 16, (2, 8, 3)]))
@settings(max_examples=40, deadline=None)
def test_padded_is_divisible_and_cropped_is_the_same(size, multiple):
    x = torch.randn(2, 3, *size)
    padded, before = pad_to_multiple(x, multiple)
    factors = multiple if isinstance(multiple, tuple) else (multiple,) * 3
    assert before == size
    assert tuple(padded.shape[2:]) == tuple(-(-n // m) * m for n, m in zip(size, factors, strict=True))
    assert torch.equal(crop_to(padded, before), x)
    edge = np.pad(x.numpy(), [(0, 0)] * 2 + [(0, p - n) for n, p in zip(size, padded.shape[2:], strict=True)], "edge")
    assert np.array_equal(padded.numpy(), edge)


def test_constant_padding_also_of_integers():
    padded, _ = pad_to_multiple(torch.ones(1, 1, 3, 4, 5, dtype=torch.uint8), 4, mode="constant", value=7)
    assert padded.shape == (1, 1, 4, 4, 8) and padded.dtype == torch.uint8
    assert int((padded == 7).sum()) == 4 * 4 * 8 - 60 and bool((padded[..., :3, :, :5] == 1).all())


def test_affine_keeps_its_origin():
    x = MetaTensor(torch.randn(1, 1, 5, 6, 7), affine=torch.as_tensor(OBLIQUE))
    padded, size = pad_to_multiple(x, 4)
    for tensor in (padded, crop_to(padded, size)):
        assert isinstance(tensor, MetaTensor) and np.allclose(tensor.affine, OBLIQUE)


@pytest.mark.parametrize("size", [(8, 8, 8), (5, 9, 3), (1, 2, 1)])
def test_inferer_equals_padding_by_hand(size):
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(4, 8, 8), strides=(2, 2)).eval()
    x = MetaTensor(torch.randn(1, 1, *size), affine=torch.as_tensor(OBLIQUE), meta={"filename_or_obj": "a.nii"})
    large = np.pad(x.numpy(), [(0, 0)] * 2 + [(0, -n % 8) for n in size], "edge")
    with torch.no_grad():
        output = PadInferer(8)(x, network)
        expected = network(torch.from_numpy(large))[..., : size[0], : size[1], : size[2]]
    assert output.shape == (1, 2, *size)
    assert torch.allclose(torch.as_tensor(output), expected, atol=1e-6)
    assert np.allclose(output.affine, OBLIQUE) and output.meta["filename_or_obj"] == "a.nii"


def test_inferer_wraps_another_and_passes_arguments_on():
    x = torch.randn(1, 1, 10, 11, 12)
    inferer = PadInferer((16, 16, 4), SlidingWindowInferer((8, 8, 4), overlap=0), mode="constant")
    output = inferer(x, lambda window, gain, offset=0: window * gain + offset, 2, offset=1)
    assert torch.allclose(output, 2 * x + 1)
    with pytest.raises(ValueError, match="PadInferer needs a network that keeps the size"):
        PadInferer(4)(x, lambda padded: padded[..., ::2])


def test_latent_affine_places_voxels_at_the_centre_of_their_blocks():
    affine = latent_affine(OBLIQUE, (4, 2, 1))
    for voxel in np.ndindex(2, 2, 2):
        block = np.array([[4 * voxel[0] + i, 2 * voxel[1] + j, voxel[2], 1] for i in range(4) for j in range(2)])
        assert np.allclose(affine @ [*voxel, 1], (block @ OBLIQUE.T).mean(0))
    assert np.allclose(image_affine(latent_affine(torch.as_tensor(OBLIQUE), 4), 4), OBLIQUE)


def block_mask():
    """Label 3 in a block of 12 x 16 x 6 voxels of 1 x 1.5 x 2 mm: its world extent is known."""
    mask = torch.zeros(1, 24, 32, 20)
    mask[0, 6:18, 8:24, 7:13] = 3
    affine = torch.tensor([[1.0, 0, 0, -11.5], [0, 1.5, 0, 40], [0, 0, 2, 7], [0, 0, 0, 1]], dtype=torch.float64)
    return MetaTensor(mask, affine=affine)


def world_box(mask):
    """Lower and upper world corner of the labelled voxels' faces, in mm."""
    voxels = np.argwhere(np.asarray(mask[0]) > 0)
    affine = np.asarray(mask.affine)
    corners = np.array([voxels.min(0) - 0.5, voxels.max(0) + 0.5])
    return corners * np.diag(affine)[:3] + affine[:3, 3]


@pytest.mark.parametrize(
    ("spacing", "size", "expected"),
    [
        ((2, 3, 4), None, (12, 16, 10)),
        ((0.5, 0.75, 1), None, (48, 64, 40)),
        (None, (12, 16, 10), (12, 16, 10)),
        (None, (48, 32, 40), (48, 32, 40)),
        ((1, 1.5, 2), (16, 48, 16), (16, 48, 16)),
        ((0.5, 3, 1), (64, 16, 32), (64, 16, 32)),
        (None, None, (24, 32, 20)),
    ],
)
def test_regridded_mask_stays_in_place(spacing, size, expected):
    mask = block_mask()
    regridded = regrid_mask(mask, spacing, size)
    assert tuple(regridded.shape) == (1, *expected)
    assert set(np.unique(regridded.numpy())) == {0, 3}
    # When the spacing is not named, the field of view of 24 x 48 x 40 mm stays.
    wanted = spacing or np.array([24, 48, 40]) / np.array(expected)
    assert np.allclose(regridded.pixdim, wanted)
    assert np.allclose(world_box(regridded), world_box(mask), atol=max(wanted) / 2)


@pytest.mark.parametrize("origin", [0.0, 0.5, -3.0, 100.0, -100.0])
@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("spacing", [0.5, 2.0, 4.0])
def test_the_faces_of_the_grid_stay_wherever_it_begins(origin, turned, spacing):
    affine = torch.diag(torch.tensor([turned, turned, 1.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = origin
    mask = MetaTensor(torch.ones(1, 80, 40, 80), affine=affine)
    found = regrid_mask(mask, spacing=(spacing,) * 3)
    for one in (mask, found):
        ends = np.array([[-0.5] * 3, [n - 0.5 for n in one.shape[1:]]])
        faces = ends @ np.asarray(one.affine)[:3, :3].T + np.asarray(one.affine)[:3, 3]
        assert np.allclose(faces, [[origin - 0.5 * turned] * 2 + [origin - 0.5],
                                   [origin + 79.5 * turned, origin + 39.5 * turned, origin + 79.5]])  # fmt: skip


def test_regridding_by_two_is_exact():
    mask = MetaTensor(torch.randint(0, 200, (1, 6, 5, 4)).float(), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    for finer in (regrid_mask(mask, spacing=(1, 1, 1)), regrid_mask(mask, size=(12, 10, 8))):
        assert np.array_equal(finer.numpy()[0], mask.numpy()[0].repeat(2, 0).repeat(2, 1).repeat(2, 2))
        assert np.allclose(finer.affine[:3, 3], -0.5)


@pytest.mark.parametrize("degrees", [-18, 25])
def test_straightened_volume_has_every_value_in_its_place(degrees):
    """A tilted stack of a field that is linear in the world, which linear interpolation reproduces."""
    affine = np.diag([-1.0, -1.5, 2.0, 1.0])
    affine[1, 2] = 2 * np.tan(np.radians(degrees))
    voxels = np.indices((6, 14, 10)).reshape(3, -1)
    field = (affine @ np.vstack([voxels, np.ones(voxels.shape[1])]))[1].reshape(1, 6, 14, 10)
    tilted = MetaTensor(torch.from_numpy(10 * field).float(), affine=torch.from_numpy(affine))
    straight = straighten(tilted, "bilinear", -1000)
    assert np.allclose(np.asarray(straight.affine)[:3, :3], np.diag([-1.0, -1.5, 2.0]))
    seen = 0
    for index in np.ndindex(*straight.shape[1:]):
        place = np.asarray(straight.affine) @ [*index, 1]
        row = (np.linalg.inv(affine) @ place)[1]
        if 0 <= row <= 13:
            assert abs(float(straight[(0, *index)]) - 10 * place[1]) < 1e-2
            seen += 1
        elif not -1 < row < 14:
            assert float(straight[(0, *index)]) == -1000
    assert seen >= 6 * 13 * 10
    assert straighten(straight, "bilinear", -1000) is straight


def volume_on(affine, shape=(10, 12, 14)):
    return MetaTensor(torch.zeros(1, *shape), affine=torch.as_tensor(affine, dtype=torch.float64))


def test_grids_are_compared_in_fractions_of_a_voxel():
    affine = np.diag([0.7, 0.7, 2.5, 1])
    rounded = affine + np.array([[0, 0, 0, 0.02], [0, 0, 0, -0.02], [0, 0, 0, 0.02], [0, 0, 0, 0]])
    assert grid_difference(volume_on(affine), volume_on(rounded)) is None
    assert same_grid(volume_on(affine), volume_on(rounded))
    # Ten microns are more than a tenth of a voxel of 50 microns: what counted as one grid by 0.01 mm.
    micro = np.diag([0.05, 0.05, 0.05, 1])
    moved = micro + np.array([[0, 0, 0, 0.0099], [0] * 4, [0] * 4, [0] * 4])
    assert grid_difference(volume_on(micro), volume_on(moved)) == (
        "10 x 12 x 14 voxels each, up to 0.198 voxels apart, origin [0.0, 0.0, 0.0] and [0.01, 0.0, 0.0] mm"
    )
    # A spacing off by 0.02 mm comes to more at the far end: 9 * 0.02 / 0.72 voxels.
    wider = np.diag([0.72, 0.7, 2.5, 1])
    assert grid_difference(volume_on(affine), volume_on(wider)) == (
        "10 x 12 x 14 voxels each, up to 0.25 voxels apart, spacing [0.7, 0.7, 2.5] and [0.72, 0.7, 2.5] mm"
    )
    assert "axes" in grid_difference(volume_on(affine), volume_on(np.diag([-0.7, 0.7, 2.5, 1])))
    assert grid_difference(volume_on(affine), volume_on(affine, (10, 12, 13))) == (
        "10 x 12 x 14 voxels of [0.7, 0.7, 2.5] mm and 10 x 12 x 13 voxels of [0.7, 0.7, 2.5] mm"
    )


def test_what_a_larger_field_of_view_adds_is_background():
    """Not the border's label: a body that the mask cuts is not drawn on beyond it."""
    mask = MetaTensor(torch.full((1, 4, 4, 4), 200.0), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    found = regrid_mask(mask, spacing=(2.0, 2.0, 2.0), size=(8, 6, 4))
    assert found.shape == (1, 8, 6, 4) and (found[0, 2:6, 1:5] == 200).all()
    assert float(found.sum()) == 200 * 64


@pytest.mark.parametrize(("shift", "straightened"), [(0.05, False), (0.09, False), (0.11, True), (0.5, True)])
def test_a_stack_that_leans_by_a_tenth_of_a_voxel_is_straight(shift, straightened):
    """Between its first and its last slice, in voxels of 2 mm."""
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 2] = 2 * shift / 9
    volume = MetaTensor(torch.rand(1, 6, 5, 10), affine=torch.as_tensor(affine))
    found = straighten(volume, "bilinear", 0)
    assert (found is not volume) == straightened
    assert np.allclose(np.asarray(found.affine)[:3, 2], [0, 0, 3] if straightened else affine[:3, 2])
