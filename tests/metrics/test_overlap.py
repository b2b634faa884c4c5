from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.metrics.overlap import dice, score_segmentations, structure_dice
from maisi_tools.volumes.reading import read_ras

CLASSES = {"cord": 1, "left parotid": 2, "mandible": 3}


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return path


def formula(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def test_dice_is_the_formula():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 5, 6, 7)) < 0.4
    assert dice(a, b) == pytest.approx(formula(a, b), abs=1e-6)
    assert dice(a, a) == 1 and dice(a, ~a) == 0
    assert np.isnan(dice(a, np.zeros_like(a)))
    assert dice(np.zeros_like(a), a) == 0


def test_structures_of_the_reference_in_either_numbering():
    rng = np.random.default_rng(1)
    prediction = rng.integers(0, 4, (6, 6, 6))
    reference = rng.choice([0, 121, 18], (6, 6, 6))  # no mandible
    found = structure_dice(prediction, reference, CLASSES, {"cord": 121, "left parotid": 18, "mandible": 120, "x": 18})
    assert found == {
        "cord": pytest.approx(formula(prediction == 1, reference == 121), abs=1e-4),
        "left parotid": pytest.approx(formula(prediction == 2, reference == 18), abs=1e-4),
    }


def test_score_of_a_folder(tmp_path):
    rng = np.random.default_rng(2)
    cases, means = [], []
    for name in ("a", "b"):
        prediction, reference = rng.integers(0, 3, (2, 5, 5, 4)).astype(np.uint8)
        # The label lies in another orientation than the segmentation.
        flipped = np.array([[-2.0, 0, 0, 8], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
        save(tmp_path / "out" / f"{name}_ct_seg.nii.gz", prediction)
        label = save(tmp_path / f"{name}_seg.nii.gz", reference[::-1], flipped)
        cases.append({"image": str(tmp_path / f"{name}_ct.nii.gz"), "label": str(label)})
        means.append(np.mean([formula(prediction == label, reference == label) for label in (1, 2)]))
    summary = score_segmentations(cases, tmp_path / "out", CLASSES)
    assert summary["dice_mean"]["mean"] == pytest.approx(np.mean(means), abs=1e-4)
    assert summary["dice_cord"]["cases"] == 2 and "dice_mandible" not in summary
    with open(tmp_path / "out" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["a_ct", "b_ct"]
    assert float(rows[1]["dice_mean"]) == pytest.approx(means[1], abs=1e-4)


def test_what_cannot_be_scored(tmp_path):
    save(tmp_path / "a_ct_seg.nii.gz", np.ones((5, 5, 4), np.uint8))
    label = save(tmp_path / "label.nii.gz", np.ones((5, 5, 5), np.uint8))
    with pytest.raises(InputError, match="no label in the datalist"):
        score_segmentations([{"image": "a_ct.nii.gz"}], tmp_path, CLASSES)
    with pytest.raises(InputError, match="another grid .*5 x 5 x 4 voxels of .* and 5 x 5 x 5 voxels"):
        score_segmentations([{"image": "a_ct.nii.gz", "label": str(label)}], tmp_path, CLASSES)
    with pytest.raises(InputError, match="1/ct.nii.gz and 2/ct.nii.gz have the same stem 'ct'"):
        twins = [{"image": f"{name}/ct.nii.gz", "label": str(label)} for name in (1, 2)]
        score_segmentations(twins, tmp_path, CLASSES)
    with pytest.raises(InputError, match="b_ct_seg.nii.gz does not exist"):
        score_segmentations([{"image": "b_ct.nii.gz", "label": str(label)}], tmp_path, CLASSES)


def test_same_size_at_another_place_is_another_grid(tmp_path):
    moved = np.diag([2.0, 2.0, 3.0, 1.0])
    moved[0, 3] = 5
    one = read_ras(save(tmp_path / "one.nii.gz", np.ones((4, 4, 4), np.uint8)), "mask")
    with pytest.raises(InputError, match="another grid"):
        read_ras(save(tmp_path / "two.nii.gz", np.ones((4, 4, 4), np.uint8), moved), "mask", like=one)
