from __future__ import annotations

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from maisi_tools.errors import InputError
from maisi_tools.report.preview import BODY, label_colour, plane, preview

SHAPE = (32, 24, 40)
SPACING = (2.0, 3.0, 1.5)


def save(path, data, affine=None):
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def ct():
    """A block of soft tissue (40 HU) with a bright marker at the patient's right, front and top."""
    data = np.full(SHAPE, -1000, np.int16)
    data[4:28, 4:20, 4:36] = 40
    data[24:28, 16:20, 32:36] = 1000  # RAS: index grows towards right, anterior, superior
    return data


def centre_of(pixels: np.ndarray) -> tuple[float, float]:
    """Row (from the bottom) and column of the bright pixels, as fractions of the size."""
    rows, columns = np.nonzero(pixels > 500)
    return rows.mean() / pixels.shape[0], columns.mean() / pixels.shape[1]


def test_planes_are_in_radiological_display(ct):
    marker = (26, 18, 34)
    row, column = centre_of(plane(ct, "axial", marker))
    assert row > 0.5 and column < 0.5  # anterior up, right on the left
    row, column = centre_of(plane(ct, "coronal", marker))
    assert row > 0.5 and column < 0.5  # superior up, right on the left
    row, column = centre_of(plane(ct, "sagittal", marker))
    assert row > 0.5 and column < 0.5  # superior up, anterior on the left
    assert [plane(ct, name, marker).shape for name in ("axial", "coronal", "sagittal")] == [
        (24, 32),
        (40, 32),
        (40, 24),
    ]


def body_box(path, title=40):
    """Bounding box (top, bottom, left, right) of the grey tissue, in pixels, of each of the three panels."""
    picture = imread(path)[title:]
    grey = (np.ptp(picture[..., :3], axis=-1) < 0.01) & (np.abs(picture[..., 0] - 0.5) < 0.02)
    columns = np.flatnonzero(grey.sum(0) > 10)
    boxes = []
    for run in np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1):
        rows = np.flatnonzero(grey[:, run].sum(1) > 10)
        boxes.append((rows[0], rows[-1] + 1, run[0], run[-1] + 1))
    return boxes


def test_picture_has_the_true_proportions(tmp_path, ct):
    ct[24:28, 16:20, 32:36] = 40
    path = preview(save(tmp_path / "ct.nii.gz", ct), output=tmp_path / "out" / "x.png")
    assert path == tmp_path / "out" / "x.png"
    boxes = body_box(path)
    width, depth, height = 24 * SPACING[0], 16 * SPACING[1], 32 * SPACING[2]  # mm
    assert len(boxes) == 3
    for (top, bottom, left, right), wanted in zip(boxes, (width / depth, width / height, depth / height), strict=True):
        assert (right - left) / (bottom - top) == pytest.approx(wanted, rel=0.03)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


@pytest.mark.parametrize("name", ["cost$_{$", "a$x_$b", "50%_^2\\alpha"])
def test_a_name_is_no_formula(tmp_path, ct, name):
    assert preview(save(tmp_path / f"{name}.nii.gz", ct), output=tmp_path / "x.png").is_file()


def test_orientation_of_the_file_does_not_matter(tmp_path, ct):
    ras = save(tmp_path / "ct.nii.gz", ct)
    preview(ras, output=tmp_path / "ras.png")
    image = nib.load(ras)
    wanted = nib.orientations.axcodes2ornt("SPL")
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    assert nib.aff2axcodes(turned.affine) == ("S", "P", "L")
    nib.save(turned, ras)
    preview(ras, output=tmp_path / "spl.png")
    assert np.array_equal(imread(tmp_path / "ras.png"), imread(tmp_path / "spl.png"))


def test_mask_adds_a_row_in_the_colours_of_the_labels(tmp_path, ct):
    mask = np.where(ct > -1000, BODY, 0).astype(np.uint8)
    mask[10:16, 8:14, 14:22] = 121
    volume = save(tmp_path / "ct.nii.gz", ct)
    preview(volume, save(tmp_path / "mask.nii.gz", mask), tmp_path / "x.png")
    picture = imread(tmp_path / "x.png")[..., :3]
    preview(volume, output=tmp_path / "one.png")
    assert picture.shape[0] > 1.5 * imread(tmp_path / "one.png").shape[0]

    blended = 0.5 * label_colour(121) + 0.5 * 0.5  # opacity 0.5 over tissue at the middle of the window (40 HU)
    top, bottom = np.split(np.abs(picture - blended).max(-1) < 0.02, [picture.shape[0] // 2])
    assert not top.any() and bottom.sum() > 100
    body = np.abs(picture - (0.5 * label_colour(BODY) + 0.25)).max(-1) < 0.02
    assert body.sum() < 20  # the body is not filled


def test_colours_are_stable_and_different():
    colours = np.array([label_colour(label) for label in range(1, 133)])
    assert colours.min() >= 0 and colours.max() <= 1
    distances = np.abs(colours[:, None] - colours[None]).max(-1) + np.eye(len(colours))
    assert distances.min() > 0.01
    assert np.array_equal(label_colour(1), colours[0])


@pytest.mark.parametrize(
    "data",
    [
        np.full(SHAPE, -1000, np.int16),
        np.full(SHAPE, 3000, np.float32),
        np.full(SHAPE, np.nan, np.float32),
        np.full((1, 24, 40), 40, np.int16),
    ],
    ids=["air", "all bright", "NaN", "one voxel wide"],
)
def test_odd_volumes_still_give_a_picture(tmp_path, data):
    mask = save(tmp_path / "mask.nii.gz", np.full(data.shape, BODY, np.uint8))
    path = preview(save(tmp_path / "ct.nii.gz", data), mask, tmp_path / "x.png")
    assert imread(path).shape[1] == 1200


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="volume .*nope.nii.gz does not exist"):
        preview(tmp_path / "nope.nii.gz", output=tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_text_file_with_the_name_of_a_nifti(tmp_path):
    (tmp_path / "ct.nii.gz").write_text("no image")
    with pytest.raises(InputError, match="cannot be read"):
        preview(tmp_path / "ct.nii.gz", output=tmp_path / "x.png")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_file(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(-1000, 1000, SHAPE, dtype=np.int16)
    path = save(tmp_path / f"ct{suffix}", noise)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=rf"volume {path} .*(cannot be read|bytes, and holds)"):
        preview(path, output=tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("shape", [(32, 24), (32, 24, 40, 4)])
def test_wrong_number_of_dimensions(tmp_path, shape):
    volume = save(tmp_path / "ct.nii.gz", np.zeros(shape, np.int16))
    with pytest.raises(InputError, match="allowed is a 3D volume"):
        preview(volume, output=tmp_path / "x.png")


def test_mask_on_another_grid(tmp_path, ct):
    volume = save(tmp_path / "ct.nii.gz", ct)
    small = save(tmp_path / "small.nii.gz", np.ones((16, 24, 40), np.uint8))
    with pytest.raises(InputError, match=r"\(16, 24, 40\) and the volume \(32, 24, 40\)"):
        preview(volume, small, tmp_path / "x.png")
    affine = np.diag([*SPACING, 1.0])
    affine[0, 3] = 10
    moved = save(tmp_path / "moved.nii.gz", np.ones(SHAPE, np.uint8), affine)
    with pytest.raises(InputError, match="voxels away"):
        preview(volume, moved, tmp_path / "x.png")


def test_mask_that_is_no_label_mask(tmp_path, ct):
    mask = save(tmp_path / "mask.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(InputError, match="no whole number"):
        preview(save(tmp_path / "ct.nii.gz", ct), mask, tmp_path / "x.png")


@pytest.mark.parametrize("window", [(240, -160), (0, 0), (1, 2, 3), (float("nan"), 1), ("a", "b")])
def test_wrong_window(tmp_path, ct, window):
    with pytest.raises(InputError, match="window"):
        preview(save(tmp_path / "ct.nii.gz", ct), output=tmp_path / "x.png", window=window)


def test_output_must_be_a_png(tmp_path, ct):
    with pytest.raises(InputError, match=r"ends in \.png"):
        preview(save(tmp_path / "ct.nii.gz", ct), output=tmp_path / "x.jpg")


def test_pyplot_is_not_touched(repo_root):
    code = "import sys, maisi_tools.report.preview; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(repo_root / "tools")}).returncode == 0
