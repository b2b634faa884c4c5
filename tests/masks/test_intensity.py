from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.masks.intensity import TissueIntensitiesd, hu_ranges, implausible_organs, tissue_intensities
from maisi_tools.masks.vocabulary import BODY, label_id


def case() -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """A CT of random values, a mask of layers along x, and the mean of each tissue by hand."""
    ct = np.random.default_rng(0).normal(0, 300, (10, 4, 5)).astype(np.float32)
    layers = ("skull", "left femur", "airway", "left lung upper lobe", "liver", "spinal cord", "colon")
    mask = np.zeros(ct.shape, dtype=np.uint8)
    for x, name in enumerate(layers):
        mask[x] = label_id(name)
    mask[7] = label_id("costal cartilages")
    mask[8] = BODY
    rows = {
        "hu_bone": [0, 1],
        "hu_airway": [2],
        "hu_lung": [3],
        "hu_soft_tissue": [4, 5, 8],  # neither colon, which holds gas, nor cartilage
        "hu_outside": [9],
    }
    return ct, mask, {name: float(ct[index].astype(float).mean()) for name, index in rows.items()}


def test_means_of_each_tissue():
    ct, mask, expected = case()
    assert tissue_intensities(ct, mask) == pytest.approx(expected, abs=0.006)  # rounded to 0.01 HU


def test_absent_tissues_are_left_out():
    ct, mask, expected = case()
    assert tissue_intensities(ct[8:], mask[8:]).keys() == {"hu_soft_tissue", "hu_outside"}
    assert tissue_intensities(ct, np.zeros_like(mask)) == {"hu_outside": pytest.approx(ct.mean(), abs=0.006)}
    assert tissue_intensities(ct, np.full_like(mask, label_id("colon"))) == {}


def test_transform_takes_masks_of_floating_point():
    ct, mask, expected = case()
    labels = torch.from_numpy(mask[None]).float() - 1e-4  # what a resampling may leave
    data = {"ct": MetaTensor(torch.from_numpy(ct[None])), "mask": MetaTensor(labels), "name": "x"}
    result = TissueIntensitiesd("ct", "mask", output_key="figures")(data)
    assert result["figures"] == pytest.approx(expected, abs=0.006) and result["name"] == "x"
    assert TissueIntensitiesd("ct", "mask")(data)["metrics"] == result["figures"]


def test_ranges_of_the_vocabulary_and_changed_ones():
    ranges = hu_ranges({"liver": [-22, 300], "121": [-50, 100], "left parotid gland": [-100, 100], "spleen": None})
    assert ranges[1] == (-22, 300) and ranges[121] == (-50, 100) and ranges[18] == (-100, 100)
    assert 3 not in ranges and ranges[120] == (71, 1000)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"nose": [0, 1]}, "'nose' is no label"),
        ({"liver": [3, 1]}, r"liver: \[3, 1\]; allowed are .lowest, highest. in HU"),
        ({"liver": [1, 1]}, r"liver: \[1, 1\]"),
        ({"liver": 3}, "liver: 3; allowed are"),
        ({"liver": ["a", "b"]}, r"liver: \['a', 'b'\]; allowed are"),
        ({"liver": "ab"}, "liver: 'ab'; allowed are"),
        ({"liver": [None, 1]}, "liver: .None, 1.; allowed are"),
        ({"liver": [False, True]}, "liver: .False, True.; allowed are"),
        ({"liver": [0, float("inf")]}, "liver: .0, inf.; allowed are"),
        ({"999": [0, 1]}, "'999' is no label"),
        ({"0": [0, 1]}, "'0' is no label; allowed are MAISI's ids 1..132 and 200 .body., and their names"),
        ([1], r"hu_ranges is \[1\]; allowed is label"),
    ],
)
def test_wrong_ranges_are_refused(changed, words):
    with pytest.raises(InputError, match=words):
        hu_ranges(changed)


def test_medians_outside_their_range_are_named():
    labels = np.zeros((8, 8, 8), dtype=np.uint8)
    labels[0], labels[1], labels[2, :7, :9] = 1, 120, 3  # liver, skull, and a spleen of 56 voxels, too few
    ct = np.where(labels == 1, 250.0, -500.0)
    ct[1, :5] = 400  # most of the skull
    found = implausible_organs(ct, labels, hu_ranges())
    assert found == {"liver": {"median": 250.0, "lowest": -22.0, "highest": 162.0}}
    assert implausible_organs(ct, labels, hu_ranges({"liver": [-22, 300]})) == {}
    for limits, fits in (([250, 300], True), ([-22, 250], True), ([251, 300], False), ([-22, 249], False)):
        assert (implausible_organs(ct, labels, hu_ranges({"liver": limits})) == {}) == fits
