"""Results go back to the orientation of their file, voxel for voxel and with the file's very affine."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing
from scipy.spatial.transform import Rotation

from maisi_tools.volumes.latents import DescribeLatentd, RestoreGeometryd
from maisi_tools.volumes.orientation import RestoreOrientationd

from .conftest import OBLIQUE, ct_values

AXCODES = ("RAS", "LPS", "LAI", "PIR", "SLP", "ARS")


def affine_with(axcodes: str, spacing=(0.7, 0.9, 10 / 3), origin=(-101.3, 55.1, 1 / 3)) -> np.ndarray:
    """The affine of a file with these axes: a signed permutation of the axes times the spacing."""
    affine = np.zeros((4, 4))
    for axis, (code, mm) in enumerate(zip(axcodes, spacing, strict=True)):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[world, axis] = mm if code in "RAS" else -mm
    affine[3, 3] = 1
    affine[:3, 3] = origin
    return affine


AFFINES = {**{axcodes: affine_with(axcodes) for axcodes in AXCODES}, "oblique": OBLIQUE}


def as_read(affine: np.ndarray, shape=(10, 12, 14)) -> MetaTensor:
    meta = {"original_affine": affine, "filename_or_obj": "in/case.nii.gz"}
    return MetaTensor(
        torch.from_numpy(ct_values(shape)[None].astype(np.float32)), affine=torch.as_tensor(affine), meta=meta
    )


@pytest.mark.parametrize("name", AFFINES)
def test_round_trip_is_exact(name):
    volume = as_read(AFFINES[name])
    assert name in ("oblique", "".join(nib.aff2axcodes(AFFINES[name])))
    reference = Orientation("RAS", labels=None)(volume)
    assert nib.aff2axcodes(reference.affine.numpy()) == ("R", "A", "S")
    data = {"image": reference, "pred": reference.as_tensor() + 1, "mask": reference > 0}
    restored = RestoreOrientationd(["pred", "mask"], "image")(data)
    for key, expected in (("pred", volume.numpy() + 1), ("mask", volume.numpy() > 0)):
        assert np.array_equal(restored[key].numpy(), expected)
        assert np.array_equal(restored[key].affine.numpy(), AFFINES[name])  # to the last bit
        assert restored[key].meta["filename_or_obj"] == "in/case.nii.gz"
    assert restored["image"] is reference


@pytest.mark.parametrize(
    "turn",
    [
        Rotation.from_euler("zx", (135, 45), degrees=True),
        Rotation.from_euler("zx", (135, -45), degrees=True),
        Rotation.from_rotvec(np.ones(3) / 3**0.5 * np.pi / 3),
    ],
    ids=["135, 45", "135, -45", "60 about 111"],
)
@pytest.mark.parametrize("way", [1, -1])
def test_axes_as_near_to_one_direction_as_to_another_come_back_in_their_order(turn, way):
    """What is RAS then has other letters, by nibabel from 5.4 on; a latent's image knows the letters alone."""
    affine = np.eye(4)
    affine[:3, :3] = turn.as_matrix() * (1.3 * way, 0.9, 2.5)
    affine[:3, 3] = (-101.3, 55.1, 7)
    affine = affine.astype(np.float32).astype(float)  # as in a file
    volume = as_read(affine)
    reference = Orientation("RAS", labels=None)(volume)
    restored = RestoreOrientationd("pred", "image")({"image": reference, "pred": reference.as_tensor()})["pred"]
    assert np.array_equal(restored.numpy(), volume.numpy()) and np.array_equal(restored.affine.numpy(), affine)
    described = DescribeLatentd("latent", "image", 2)({"image": reference, "latent": torch.zeros(4, 5, 6, 7)})
    latent = described["latent"]
    latent.meta["sidecar"] = {key: described[key] for key in ("size", "factor", "orientation")}
    image = RestoreGeometryd("pred", "latent")({"latent": latent, "pred": reference.as_tensor()})["pred"]
    assert np.array_equal(image.numpy(), volume.numpy())
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-6)


@pytest.mark.parametrize("name", ["PIR", "oblique"])
def test_a_resampled_grid_is_turned_and_stays_in_place(name):
    volume = as_read(AFFINES[name])
    reference = Spacing((2.0, 2.0, 2.0), mode="nearest")(Orientation("RAS", labels=None)(volume))
    result = torch.zeros(reference.shape)
    marked = (1, 3, 2)
    result[0][marked] = 1
    restored = RestoreOrientationd("pred", "image")({"image": reference, "pred": result})["pred"]
    assert nib.aff2axcodes(restored.affine.numpy()) == nib.aff2axcodes(AFFINES[name])
    np.testing.assert_allclose(np.linalg.norm(restored.affine.numpy()[:3, :3], axis=0), 2.0)
    found = np.argwhere(restored.numpy()[0])
    assert len(found) == 1
    expected = reference.affine.numpy() @ [*marked, 1]
    np.testing.assert_allclose(restored.affine.numpy() @ [*found[0], 1], expected, atol=1e-6)
    assert sorted(restored.shape[1:]) == sorted(reference.shape[1:])


def test_several_channels_and_a_stale_affine():
    """A network's output may carry an affine of its own: that of the reference counts."""
    volume = as_read(AFFINES["LPS"])
    reference = Orientation("RAS", labels=None)(volume)
    stale = MetaTensor(reference.as_tensor().repeat(3, 1, 1, 1), affine=torch.eye(4) * 5)
    restored = RestoreOrientationd("pred", "image")({"image": reference, "pred": stale})["pred"]
    assert np.array_equal(restored.numpy(), volume.numpy().repeat(3, 0))
    assert np.array_equal(restored.affine.numpy(), AFFINES["LPS"])
