from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.volumes.presets import PRESETS
from maisi_tools.volumes.regrid import CheckGridd, RegridMaskd, RestoreGridd

from .conftest import OBLIQUE

RANGE = [[0.5, 3.0], [0.5, 3.0], [0.5, 5.0]]


def mask(spacing=(1.0, 1.0, 2.0), size=(16, 8, 24)) -> MetaTensor:
    labels = torch.randint(0, 133, (1, *size)).float()
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return MetaTensor(labels, affine=affine, meta={"filename_or_obj": "case.nii.gz"})


def test_nothing_asked_for_changes_nothing():
    given = mask(size=(5, 7, 9))  # no multiple of 16 either: the inferer pads
    result = RegridMaskd("mask", multiple=16)({"mask": given, "other": 1})
    assert torch.equal(result["mask"], given) and torch.equal(result["mask"].affine, given.affine)
    assert result["other"] == 1


@pytest.mark.parametrize("spacing", [4, [4, 4, -3], [4, 3], "444", [4, 4, "x"]])
def test_a_spacing_that_is_not_three_positive_numbers_is_refused(spacing):
    with pytest.raises(InputError, match="spacing is .*; allowed are three positive numbers in mm"):
        RegridMaskd("mask", spacing=spacing)


@pytest.mark.parametrize("given", [{"spacing": [4, 4, 3]}, {"size": [32, 32, 32]}])
def test_a_preset_with_a_size_or_a_spacing_is_refused(given):
    with pytest.raises(InputError, match="given with a preset, which stands for both"):
        RegridMaskd("mask", preset=PRESETS["small"]["head_neck"], **given)


@pytest.mark.parametrize(
    ("settings", "size", "spacing"),
    [
        ({"spacing": [2, 2, 2]}, (8, 4, 24), (2, 2, 2)),
        ({"size": [32, 16, 16]}, (32, 16, 16), (0.5, 0.5, 3)),
        ({"spacing": [0.5, 0.5, 1], "size": [16, 32, 48]}, (16, 32, 48), (0.5, 0.5, 1)),
    ],
)
def test_size_and_spacing_are_those_asked_for(settings, size, spacing):
    given = mask()
    result = RegridMaskd("mask", **settings)({"mask": given})["mask"]
    assert tuple(result.shape[1:]) == size
    np.testing.assert_allclose(result.pixdim, spacing)
    assert set(result.unique().tolist()) <= set(given.unique().tolist()) | {0}
    assert result.meta["filename_or_obj"] == "case.nii.gz"
    centres = [m.affine.numpy() @ [*((np.array(m.shape[1:]) - 1) / 2), 1] for m in (given, result)]
    np.testing.assert_allclose(centres[1], centres[0], atol=max(spacing) / 2)


@pytest.mark.parametrize("size", [[30, 32, 32], [32, 32], [32, 32, 0], [32.0, 32, 32], "323232"])
def test_impossible_sizes_are_refused_when_the_config_is_parsed(size):
    with pytest.raises(InputError, match="output_size is"):
        RegridMaskd("mask", size=size, multiple=16)


def test_spacing_within_the_range_passes(caplog):
    data = {"mask": mask(), "other": 1}
    with caplog.at_level(logging.WARNING):
        assert CheckGridd("mask", RANGE, [16, 8, 48])(data) == data
    assert caplog.records == []


def test_spacing_of_an_oblique_grid_is_its_columns_length():
    lengths = np.linalg.norm(OBLIQUE[:3, :3], axis=0)
    given = MetaTensor(torch.ones(1, 8, 8, 8), affine=torch.as_tensor(OBLIQUE))
    tight = [[mm - 0.01, mm + 0.01] for mm in lengths]
    CheckGridd("mask", tight, [1, 1, 1])({"mask": given})
    for axis in range(3):
        narrow = [list(pair) for pair in tight]
        narrow[axis] = [lengths[axis] + 0.01, lengths[axis] + 1]
        with pytest.raises(InputError, match=f"outside along {'xyz'[axis]};"):
            CheckGridd("mask", narrow, [1, 1, 1])({"mask": given})


@pytest.mark.parametrize(("spacing", "axis"), [((0.4, 1, 1), "x"), ((1, 3.1, 1), "y"), ((1, 1, 5.2), "z")])
def test_spacing_outside_the_range_names_the_file_and_the_axis(spacing, axis):
    with pytest.raises(InputError, match=rf"the spacing of case\.nii\.gz is .* outside along {axis}; allowed"):
        CheckGridd("mask", RANGE, [1, 1, 1])({"mask": mask(spacing)})


def test_small_field_of_view_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        CheckGridd("mask", RANGE, [16, 10, 48])({"mask": mask()})
    assert len(caplog.records) == 1 and "16 x 8 x 48 mm" in caplog.text and "16 x 10 x 48 mm" in caplog.text


def test_a_mask_outside_the_range_goes_to_the_nearest_spacing_and_its_ct_comes_back(caplog):
    """The CT that comes back is the ramp in world coordinates that was on the network's grid."""
    given = mask((3.3, 0.9, 0.4), (20, 30, 40))
    given[:, :4] = 0
    given.affine = torch.as_tensor(OBLIQUE @ np.diag([1 / 0.8438, 1 / 1.0112, 1 / 2.2361, 1])) @ given.affine
    own = [float(mm) for mm in given.pixdim]
    narrow = [[0.5, 3.0], [0.5, 3.0], [0.5, 5.0]]
    put = RegridMaskd("mask", spacing_range=narrow, multiple=16)({"mask": given})
    wanted = [min(own[0], 3.0), own[1], max(own[2], 0.5)]
    np.testing.assert_allclose(put["mask"].pixdim, wanted, rtol=1e-4)
    CheckGridd("mask", narrow, [1, 1, 1])(put)
    assert torch.equal(put["own_mask"], given)

    def ramp(volume):
        index = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape[1:]), indexing="ij"))
        x, y, z = np.einsum("ij,j...->i...", volume.affine[:3, :3].numpy(), index) + volume.affine[
            :3, 3
        ].numpy().reshape(3, 1, 1, 1)
        return 3 * x - 2 * y + z

    pred = torch.as_tensor(ramp(put["mask"]))[None].float()
    with caplog.at_level(logging.WARNING):
        back = RestoreGridd("pred", "mask")({**put, "pred": pred})
    assert "own_mask" not in back and torch.equal(back["mask"], given)
    assert back["pred"].shape == given.shape and torch.equal(back["pred"].affine, given.affine)
    inner = (slice(None), *(slice(3, -3) for _ in range(3)))
    inside = (given != 0).numpy()[inner]
    np.testing.assert_allclose(back["pred"].numpy()[inner][inside], ramp(given)[None][inner][inside], atol=0.05)
    assert (back["pred"].numpy()[given.numpy() == 0] == -1000).all()
    of_mr = RestoreGridd("pred", "mask", air=0.0)({**put, "pred": pred})["pred"]  # whose numbers begin at 0
    assert (of_mr.numpy()[given.numpy() == 0] == 0).all()
    del caplog.records[1:]
    assert len(caplog.records) == 1 and "case.nii.gz: its spacing of" in caplog.text


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ({"spacing": [3.0, 3.0, 3.0]}, "cord"),
        ({"spacing_range": [[1.8, 3.0]] * 3}, "cord"),
        ({"size": [2, 2, 2]}, "cord"),
        ({"preset": PRESETS["small"]["head_neck"]}, "cord"),
        ({"spacing": [1.0, 1.0, 1.0], "size": [4, 4, 4]}, "liver"),  # cropped
        ({"spacing": [0.5, 0.5, 0.5]}, None),
        ({"spacing_range": RANGE}, None),
    ],
)
def test_what_a_coarser_or_smaller_grid_loses_is_named(settings, lost, caplog):
    """A body, a liver of 3^3 voxels in a corner, and a spinal cord of one voxel that coarser grids' centres miss."""
    labels = torch.full((1, 10, 10, 10), 200.0)
    labels[:, :3, :3, :3], labels[:, 5, 5, 5] = 1, 121
    given = MetaTensor(labels, affine=torch.eye(4, dtype=torch.float64), meta={"filename_or_obj": "case.nii.gz"})
    put = RegridMaskd("mask", names={121: "cord", 1: "liver"}.get, **settings)({"mask": given})["mask"]
    kept = {1, 121} - {None: set(), "cord": {121}, "liver": {1}}[lost]
    assert set(put.unique().tolist()) - {0} == {200, *kept}
    assert (
        (f"case.nii.gz: of {lost} nothing is left on the grid of the CT, " in caplog.text)
        if lost
        else (not caplog.text)
    )


def test_a_mask_within_the_range_or_with_a_wish_is_left_alone():
    data = {"mask": mask(), "pred": torch.ones(1, 16, 8, 24)}
    assert RegridMaskd("mask", spacing_range=RANGE)(data)["mask"] is data["mask"]
    assert torch.equal(RestoreGridd("pred", "mask")(data)["pred"], data["pred"])
    asked = RegridMaskd("mask", spacing=[6, 1, 1], spacing_range=RANGE)({"mask": mask((5.0, 1, 1))})
    assert "own_mask" not in asked and abs(float(asked["mask"].pixdim[0]) - 6) < 1e-9


@pytest.mark.parametrize(("spacing", "refused"), [((6.0, 1, 1), False), ((6.1, 1, 1), True), ((1, 0.24, 1), True)])
def test_beyond_a_factor_of_two_a_mask_is_refused(spacing, refused):
    put = RegridMaskd("mask", spacing_range=RANGE)
    if not refused:
        assert float(put({"mask": mask(spacing)})["mask"].pixdim[0]) == 3
        return
    with pytest.raises(InputError, match=r"spacing of case\.nii\.gz is .*trained for, and up to 2 times beyond it"):
        put({"mask": mask(spacing)})
