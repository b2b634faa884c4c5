from __future__ import annotations

import base64
import io
import json
import re

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from maisi_tools.errors import InputError
from maisi_tools.report.comparison import Comparison, write_comparison
from maisi_tools.volumes.inputs import sidecar_path

SHAPE, SPACING = (32, 24, 40), (2.0, 3.0, 1.5)


def save(path, data, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*SPACING, 1.0]) if affine is None else affine), path)
    return path


def block(hu: int) -> np.ndarray:
    data = np.full(SHAPE, -1000, np.int16)
    data[4:28, 4:20, 4:36] = hu
    return data


@pytest.fixture
def case(tmp_path):
    """Tissue of 40, 90 and 140 HU in three volumes; the mask has one organ at its corner."""
    volumes = {
        title: save(tmp_path / f"{title}.nii.gz", block(hu))
        for title, hu in (("real", 40), ("reconstruction", 90), ("generated", 140))
    }
    (tmp_path / "reconstruction.json").write_text(json.dumps({"metrics": {"psnr_body": 33.256, "ssim": None}}))
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:10, 6:10, 6:14] = 18
    return Comparison("p<1>", volumes, save(tmp_path / "mask.nii.gz", mask))


def pictures(page) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [imread(io.BytesIO(base64.b64decode(text)), format="png") for text in found]


def test_page_is_self_contained_and_shows_every_volume(case, tmp_path):
    page = write_comparison([case, Comparison("two", {"real": case.volumes["real"]})], tmp_path / "page.html", "A & B")
    text = page.read_text()
    assert "A &amp; B" in text and "p&lt;1&gt;" in text and "http" not in text
    assert "reconstruction: psnr_body 33.256" in text and "ssim" not in text
    first, second = pictures(page)
    # Grey of -160..240 HU: the tissue of each column has its own, from left to right, and air is black.
    quarters = np.array_split(first[60:], 4, axis=1)
    for quarter, hu in zip(quarters, (40, 90, 140, 140), strict=True):
        grey = quarter[..., 0][np.ptp(quarter[..., :3], axis=-1) < 0.01]
        values, counts = np.unique(grey[grey > 0.1].round(2), return_counts=True)
        assert values[counts.argmax()] == pytest.approx((hu + 160) / 400, abs=0.02)
    coloured = [(np.ptp(quarter[..., :3], axis=-1) > 0.2) & (quarter[..., 2] > 0.1) for quarter in quarters]
    assert coloured[3].sum() > 200 and coloured[0].sum() < coloured[3].sum() / 4  # the organ is in the last column
    assert second.shape[1] < first.shape[1] / 2


def test_a_real_ct_is_any_that_the_bundles_read(case, tmp_path):
    """As NRRD it gives the same picture."""
    nrrd = pytest.importorskip("nrrd")
    header = {"space": "right-anterior-superior", "space directions": np.diag(SPACING), "space origin": [0, 0, 0]}
    nrrd.write(str(tmp_path / "real.nrrd"), block(40), header)
    other = Comparison(case.name, {**case.volumes, "real": tmp_path / "real.nrrd"}, case.mask)
    (one,), (two,) = (pictures(write_comparison([each], tmp_path / "page.html", "A")) for each in (case, other))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("content", [b'{"InstitutionName": "Universit\xe4t"}', b"{", b"[1]", b'{"metrics": "good"}'])
def test_a_json_beside_a_ct_that_is_not_ours_says_nothing(case, tmp_path, content):
    sidecar_path(case.volumes["real"]).write_bytes(content)
    assert "psnr_body 33.256" in write_comparison([case], tmp_path / "page.html", "A").read_text()


def test_all_volumes_are_cut_at_one_place_of_the_patient(tmp_path):
    """The second one has other voxels and another origin; a bright spot is at the same place of both."""
    fine = block(40)
    fine[6:10, 6:10, 6:14] = 1000
    coarse = fine[::2, :, ::2][2:]
    affine = np.diag([2 * SPACING[0], SPACING[1], 2 * SPACING[2], 1.0])
    affine[0, 3] = 4 * SPACING[0]
    mask = np.zeros(coarse.shape, np.uint8)
    mask[coarse == 1000] = 18
    volumes = {"real": save(tmp_path / "a.nii.gz", fine), "generated": save(tmp_path / "b.nii.gz", coarse, affine)}
    case = Comparison("p", volumes, save(tmp_path / "mask.nii.gz", mask, affine))
    picture = pictures(write_comparison([case], tmp_path / "page.html", "x"))[0][60:]
    for third in np.array_split(picture, 3, axis=1)[:2]:
        assert (third[..., :3].min(axis=-1) > 0.99).sum() > 100


def test_what_is_refused(case, tmp_path):
    with pytest.raises(InputError, match="ends in .html"):
        write_comparison([case], tmp_path / "page.png", "x")
    with pytest.raises(InputError, match="no case"):
        write_comparison([], tmp_path / "page.html", "x")
    with pytest.raises(InputError, match="generated .* does not exist"):
        write_comparison([Comparison("p", {"generated": tmp_path / "none.nii.gz"})], tmp_path / "page.html", "x")
    small = save(tmp_path / "small.nii.gz", np.ones((4, 4, 4), np.uint8))
    with pytest.raises(InputError, match="on one grid"):
        write_comparison([Comparison("p", case.volumes, small)], tmp_path / "page.html", "x")
    assert not (tmp_path / "page.html").exists()
