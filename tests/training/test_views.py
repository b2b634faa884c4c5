"""Views of small volumes, compared with an independent interpolation of the same grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import BODY, label_id
from maisi_tools.training.controlnet import FitMaskd
from maisi_tools.training.views import SeeMaskd, SeeViewd, View, make_views
from maisi_tools.volumes.grid import latent_affine

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2.0, 0, 10], [0, 0, 4.0, 5], [0, 0, 0, 1]])
SIZE = (24, 20, 12)


@pytest.fixture
def volume() -> MetaTensor:
    """A smooth field, so that two interpolations of it agree."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in SIZE), indexing="ij")
    field = 1000 * np.sin(3 * x + 1) * np.cos(2 * y) * np.sin(z + 0.5)
    return MetaTensor(torch.from_numpy(field[None]).float(), affine=torch.as_tensor(AFFINE))


def interpolated(volume: MetaTensor, affine: np.ndarray, size) -> np.ndarray:
    voxels = np.stack([*np.indices(size).reshape(3, -1), np.ones(np.prod(size))])
    at = np.linalg.inv(volume.affine.numpy()) @ affine @ voxels
    return map_coordinates(volume[0].numpy(), at[:3], order=1, mode="nearest").reshape(size)


@pytest.mark.parametrize(
    "view",
    [
        View(),
        View("coarse", spacing=[3.0, 3.0, 4.0]),
        View("any", spacing=[[1.5, 3.0], [1.5, 3.0], [2.0, 6.0]]),
        View("flip", flip=True),
        View("turn", rotate=20),
        View("all", spacing=[2.5, 2.5, 3.0], flip=True, rotate=20),
    ],
    ids=lambda view: view.name,
)
def test_a_view_shows_what_lies_where_its_affine_says(volume, view):
    before = volume.clone()
    seen = view.see(volume, 3, "pt_1")
    assert torch.equal(volume, before) and not volume.pending_operations
    grid = seen.affine.numpy()
    np.testing.assert_allclose(seen[0].numpy(), interpolated(volume, grid, seen.shape[1:]), atol=1)
    spacing = [float(mm) for mm in seen.pixdim]
    if view.name == "any":
        assert spacing[0] == spacing[1] and 1.5 <= spacing[0] <= 3 and 2 <= spacing[2] <= 6
    else:
        np.testing.assert_allclose(spacing, view.spacing or [2, 2, 4], rtol=1e-6)
    assert (np.linalg.det(grid[:3, :3]) < 0) == view.flip
    axes = grid[:3, :3] / np.linalg.norm(grid[:3, :3], axis=0)
    angle = np.degrees(np.arccos(np.abs(np.diag(axes)).min()))
    assert 1 < angle < 35 if view.rotate else angle < 1e-6
    # turned about the centre
    if view.name == "turn":
        middle = [*((n - 1) / 2 for n in SIZE), 1]
        np.testing.assert_allclose(grid @ middle, AFFINE @ middle, atol=1e-6)


def test_what_is_drawn_depends_on_seed_case_and_view_alone(volume):
    view = View("a", rotate=10, shift_hu=50)
    seen = view.see(volume, 0, "pt_1")
    assert torch.equal(view.see(volume, 0, "pt_1"), seen)
    for other in (
        view.see(volume, 1, "pt_1"),
        view.see(volume, 0, "pt_2"),
        View("b", rotate=10).see(volume, 0, "pt_1"),
    ):
        assert not torch.equal(other, seen)
    shift = View("a", shift_hu=50).see(volume, 0, "pt_1") - volume
    assert shift.std() < 1e-3 and 0 < shift.mean().abs() <= 50


def test_the_seed_is_a_setting_only_where_something_is_drawn():
    assert View("flip", flip=True).settings(3) == {"name": "flip", "flip": True}
    assert View("a", rotate=5.0).settings(3) == {"name": "a", "rotate": 5.0, "seed": 3}
    assert View("b", spacing=[[1, 2], 2, 2]).settings(0)["seed"] == 0


def test_the_view_of_an_item_is_shown(volume):
    see = SeeViewd("image", [{}, {"name": "flip", "flip": True}], 0)
    plain, flipped = (see({"image": volume, "case": "pt_1", "view": name})["image"] for name in ("", "flip"))
    assert torch.equal(plain, volume) and torch.equal(flipped, volume.flip(1))


def test_a_spacing_that_leaves_one_voxel_is_refused(volume):
    see = SeeViewd("image", [{"spacing": [500, 500, 500]}], 0)
    with pytest.raises(InputError, match=r"pt_1, seen at \[500, 500, 500\] mm, is a 3D image of shape .*at least two"):
        see({"image": volume, "case": "pt_1", "view": ""})


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ([], "at least one"),
        ({"name": "x"}, "at least one"),
        ([{"flipped": True}], "entries flipped; allowed are name, spacing"),
        ([{"name": "a_b"}], "letters, digits and hyphens"),
        ([{"name": 3}], "letters, digits and hyphens"),
        ([{}, {"flip": True}], "two of the name ''"),
        ([{"spacing": [2, 2]}], "three positive numbers"),
        ([{"spacing": [2, 2, [3, 1]]}], "three positive numbers"),
        ([{"spacing": [2, 2, 0]}], "three positive numbers"),
        ([{"spacing": 2}], "three positive numbers"),
        ([{"flip": 1}], "true and false"),
        ([{"rotate": -1}], "from 0 to 180"),
        ([{"shift_hu": "much"}], "from 0 to inf"),
    ],
)
def test_views_that_are_none_are_refused(views, said):
    with pytest.raises(InputError, match=said):
        make_views(views)


@pytest.mark.parametrize(
    "view", [View("flip", flip=True), View("turn", spacing=[2, 2, 2], rotate=8), View("both", flip=True, rotate=8)]
)
def test_a_mask_follows_its_view_and_changes_sides(view):
    """A mirrored patient: what lies on the left of the picture is called left, whatever its name was."""
    left, right, cord = label_id("left kidney"), label_id("right kidney"), label_id("spinal cord")
    labels = torch.zeros(1, *SIZE)
    labels[0, 2:7, 4:16, 2:10] = left  # RAS: x grows from left to right
    labels[0, 17:22, 4:16, 2:10] = right
    labels[0, 2:7, 16:, 2:10], labels[0, 17:22, 16:, 2:10] = 18, 20  # openkbp's parotids, left and right
    labels[0, 10:13, 4:16, 2:10] = cord
    labels[0, 10:13, 16:, 2:10] = BODY
    ct = MetaTensor((labels > 0) * 1000.0 - 900, affine=torch.as_tensor(AFFINE))
    seen = view.see(ct, 0, "pt_1")
    mask = MetaTensor(labels, affine=torch.as_tensor(AFFINE), meta={"filename_or_obj": "pt_1_mask.nii.gz"})
    size = list(seen.shape[1:])
    latent = MetaTensor(
        torch.zeros(4, *(-(-n // 4) for n in size)),
        affine=torch.as_tensor(latent_affine(seen.affine.numpy(), 4)),
        meta={"sidecar": {"size": size, "factor": 4}},
    )
    fitted = FitMaskd("mask", "latent")({"mask": mask, "latent": latent})["mask"]
    fitted = fitted[0, : size[0], : size[1], : size[2]].numpy()
    tissue = seen[0].numpy() > -400
    assert np.mean((fitted > 0) == tissue) > 0.97
    middle = size[0] / 2
    for one, other in ((left, right), (18, 20)):
        assert np.argwhere(fitted == one)[:, 0].mean() < middle < np.argwhere(fitted == other)[:, 0].mean()
    assert abs(np.argwhere(fitted == cord)[:, 0].mean() - middle) < 2


def test_a_masks_view_has_its_labels_and_changes_sides(tmp_path):
    labels = torch.zeros(1, 8, 8, 8)
    labels[0, :3], labels[0, 5:] = 18, 20
    mask = MetaTensor(labels, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    views = [{"name": "flip", "flip": True, "spacing": [3.0, 3.0, 3.0]}]
    seen = SeeMaskd("image", views, 0)({"image": mask, "view": "flip", "case": "a"})["image"]
    assert set(seen.unique().tolist()) == {0.0, 18.0, 20.0}
    assert (seen[0, 0] == 18).all() and (seen[0, -1] == 20).all() and np.linalg.det(seen.affine) < 0
    # and those of its own placeholders, which the JSON beside its file names
    (tmp_path / "a_mask.json").write_text('{"twins": [[129, 130], [130, 129]]}')
    own = MetaTensor(labels, affine=mask.affine, meta={"filename_or_obj": str(tmp_path / "a_mask.nii.gz")})
    own[0, :3, 4:] = 129
    seen = SeeMaskd("image", views, 0)({"image": own, "view": "flip", "case": "a"})["image"]
    assert set(seen[0, -1].unique().tolist()) == {18.0, 130.0} and (seen[0, 0] == 20).all()
    with pytest.raises(InputError, match="shift_hu"):
        SeeMaskd("image", [{"shift_hu": 5}], 0)


def test_what_is_drawn_covers_its_range_on_both_sides(volume):
    """HU offsets within +-40: as often up as down, and nearly as far as allowed."""
    view = View("shift", shift_hu=40)
    drawn = np.array([float((view.see(volume, 3, f"case{n}") - volume).mean()) for n in range(300)])
    assert np.abs(drawn).max() <= 40 and drawn.min() < -36 and drawn.max() > 36
    assert abs(drawn.mean()) < 5 and abs((drawn > 0).mean() - 0.5) < 0.1
    assert np.allclose(drawn[:3], [float((view.see(volume, 3, f"case{n}") - volume).mean()) for n in range(3)])
