from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import (
    BODY,
    GROUPS,
    VOCABULARY,
    MergeLabelsd,
    display_name,
    hosts_of,
    label_id,
    label_of,
    labels_in_group,
    merge_labels,
    name_and_side,
    region_of,
)


def test_every_id_once():
    assert list(VOCABULARY) == [*range(1, 133), BODY]
    assert all(id == label.id for id, label in VOCABULARY.items())
    assert len({label.name for label in VOCABULARY.values()}) == 133
    segmented = [label.totalsegmentator for label in VOCABULARY.values() if label.totalsegmentator]
    assert len(segmented) == len(set(segmented)) == 117


def test_a_setting_names_a_label_by_id_by_text_or_by_name():
    assert [label_of(given) for given in (1, "26", 0, "0", BODY, "Liver", "left parotid")] == [1, 26, 0, 0, BODY, 1, 18]
    for wrong in (133, "300", -1, 26.5, "", None, "lung"):
        with pytest.raises(InputError, match="is no label; allowed are"):
            label_of(wrong)


def test_groups_cover_the_vocabulary_and_do_not_overlap():
    members = [id for group in GROUPS for id in labels_in_group(group)]
    assert sorted(members) == list(VOCABULARY)
    assert labels_in_group("airway") == (57, 132)
    assert labels_in_group("lung") == (28, 29, 30, 31, 32)
    assert labels_in_group("placeholder") == (2, 16, 18, 20, 21, 129, 130, 131)
    bones = {*range(33, 57), *range(63, 87), *range(87, 97), 97, 120, 122, 127}
    assert set(labels_in_group("bone")) == bones
    with pytest.raises(InputError, match="'bones' is no group.*bone"):
        labels_in_group("bones")


def test_sides_agree_with_totalsegmentator_and_come_in_pairs():
    for label in VOCABULARY.values():
        words = (label.totalsegmentator or "").split("_")
        if label.name == "right lung middle lobe":  # the left lung has two lobes
            assert label.side == "right"
        elif label.side:
            other = {"left": "right", "right": "left"}[label.side]
            assert VOCABULARY[label_id(label.name.replace(label.side, other))].group == label.group
            assert label.totalsegmentator is None or label.side in words
        # TotalSegmentator names a side of this one, MAISI only its place in the heart.
        elif label.name != "left atrial appendage":
            assert not {"left", "right"} & set(words), label


@pytest.mark.parametrize(
    ("name", "rest", "side"),
    [
        *(
            (name, "parotid", "left")
            for name in ("Parotid_L", "ParotidLeft", "Lt Parotid", "left parotid", "PAROTID (L)")
        ),
        ("Brachial plexus (R)", "brachialplexus", "right"),
        ("Glnd_Submand_L", "glndsubmand", "left"),
        ("lung_upper_lobe_right", "lungupperlobe", "right"),
        ("Kidney L+R", "kidney", "both"),
        ("cleft palate", "cleftpalate", ""),
        (
            "Kidney_L \u043e\u043f\u0443\u0445\u043e\u043b\u044c",
            "kidney\u043e\u043f\u0443\u0445\u043e\u043b\u044c",
            "left",
        ),
        ("L\u00edv\u00e9r", "l\u00edv\u00e9r", ""),  # no side of its first or last letter
        ("\u809d L", "\u809d", "left"),
        ("vertebrae L5", "vertebrael5", ""),
    ],
)
def test_name_and_side(name, rest, side):
    assert name_and_side(name) == (rest, side)


def test_hosts_of_lesions():
    assert hosts_of(23) == (28, 29, 30, 31, 32) and hosts_of(26) == (1,) and hosts_of(117) == (5,)
    assert hosts_of(128) == labels_in_group("bone")
    tumors = {label.id for label in VOCABULARY.values() if label.group == "tumor"}
    assert all(hosts_of(tumor) for tumor in tumors)
    with pytest.raises(InputError, match="label 1 .liver. is no lesion; allowed are lung tumor"):
        hosts_of(1)
    with pytest.raises(InputError, match="label 199"):
        hosts_of(199)


def test_atrial_appendage_is_named_as_in_totalsegmentator():
    assert VOCABULARY[108].totalsegmentator == "atrial_appendage_left"


@pytest.mark.parametrize(
    "id, name, totalsegmentator",
    [
        (5, "right kidney", "kidney_right"),
        (29, "left lung lower lobe", "lung_lower_lobe_left"),
        (33, "vertebrae L5", "vertebrae_L5"),
        (56, "vertebrae C1", "vertebrae_C1"),
        (74, "left rib 12", "rib_left_12"),
        (75, "right rib 1", "rib_right_1"),
        (15, "bladder", "urinary_bladder"),
    ],
)
def test_names(id, name, totalsegmentator):
    assert VOCABULARY[id].name == name
    assert label_id(name) == label_id(totalsegmentator) == label_id(name.upper()) == id


def test_every_name_in_totalsegmentator_is_that_of_the_same_thing():
    """Its classes are our words with the side last; two are called otherwise."""
    other = {"urinary_bladder": "bladder"}
    for label in VOCABULARY.values():
        if label.totalsegmentator:
            name = other.get(label.totalsegmentator, label.totalsegmentator)
            assert sorted(name.casefold().split("_")) == sorted(label.name.casefold().split()), label


def test_what_the_small_weights_know_has_a_name():
    """OpenKBP's structures without an entry in the released vocabulary, by the names that reports and DICOM show."""
    assert [label_id(name) for name in ("larynx", "Brainstem", "left parotid gland", "right parotid gland")] == [
        *(16, 2, 18, 20)
    ]
    assert [label_id(name) for name in ("left parotid", "Right parotid")] == [18, 20]  # as networks call them
    assert [label_id(display_name(label)) for label in VOCABULARY] == list(VOCABULARY)


def test_unknown_name_suggests_one():
    with pytest.raises(InputError, match="'left parotide' is no label.*left parotid"):
        label_id("left parotide")
    with pytest.raises(InputError, match="'lever' is no label.*liver"):
        label_id("lever")


def test_hu_ranges_hold_real_medians():
    """Textbook values: lung -700, brain 35, soft organs 50, trabecular bone 200 HU."""
    ranges = {label.id: label.hu_range for label in VOCABULARY.values() if label.hu_range}
    typical = {1: 55, 3: 50, 4: 40, 5: 30, 14: 30, 22: 35}
    typical |= dict.fromkeys(labels_in_group("lung"), -700) | dict.fromkeys(labels_in_group("bone"), 200)
    assert ranges.keys() == typical.keys()
    assert all(low < typical[id] < high for id, (low, high) in ranges.items())
    # As published, see the table's comment; every label of a group has the group's.
    published = {1: (-22, 162), 3: (-43, 184), 4: (-57, 150), 5: (-131, 267), 14: (-131, 267), 22: (-305, 370)}
    published |= dict.fromkeys(labels_in_group("lung"), (-1089, -367))
    published |= dict.fromkeys(labels_in_group("bone"), (71, 1000))
    assert ranges == published


def test_regions_from_top_to_bottom():
    assert region_of([93, 1, 22]) == ("head", "chest", "abdomen", "lower")  # what lies between is in view
    assert region_of([1, 26, 120, 200]) == region_of([120, 34, 3]) == ("abdomen",)  # 120 also stands for any bone
    assert region_of([120, 200]) == ("head",) and region_of([120, 28]) == ("head", "chest")
    assert region_of([120, 1, 28]) == ("chest", "abdomen") and region_of([120, 62]) == ()
    assert region_of(np.array([0, 200, 31])) == ("chest",)
    assert region_of([]) == region_of([0, 200, 121]) == ()


KEEP, MERGE = [2, 11, 121, 120, 132, 28, 200], {"bone": 120, "airway": 132, "lung": 28}


@given(npst.arrays(np.uint8, npst.array_shapes(min_dims=1, max_dims=4), elements=st.sampled_from([0, *VOCABULARY])))
def test_merge_labels_voxel_by_voxel(mask):
    def one(value: int) -> int:
        if value == 0 or value in KEEP:
            return value
        return MERGE.get(VOCABULARY[value].group, 200)

    merged = merge_labels(mask, KEEP, MERGE)
    assert merged.dtype == mask.dtype and merged.shape == mask.shape
    assert [one(int(value)) for value in mask.ravel()] == merged.ravel().tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_merge_labels_keeps_type_and_affine(dtype):
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    mask = MetaTensor(torch.tensor([0, 1, 33, 121, 57, 200]).view(1, 1, 2, 3).to(dtype), affine=affine)
    merged = merge_labels(mask, KEEP, MERGE)
    assert isinstance(merged, MetaTensor) and merged.dtype == dtype and torch.equal(merged.affine, affine)
    assert merged.flatten().tolist() == [0, 200, 120, 121, 132, 200]
    assert mask.flatten().tolist() == [0, 1, 33, 121, 57, 200]  # the input stays
    assert type(merge_labels(mask.as_tensor(), KEEP, MERGE)) is torch.Tensor


@pytest.mark.parametrize("value", [133, 199, 201, 255, -1, 5000])
def test_merge_labels_refuses_what_is_not_in_the_vocabulary(value):
    with pytest.raises(InputError, match=rf"\[{value}\].*1\.\.132 and 200"):
        merge_labels(np.array([0, 1, value]), KEEP, MERGE)


def test_merge_labels_refuses_wrong_settings():
    with pytest.raises(InputError, match=r"\[150\]"):
        merge_labels(np.zeros(3), [1, 150], {})
    with pytest.raises(InputError, match=r"\[199\]"):
        merge_labels(np.zeros(3), [1], {"bone": 199})
    with pytest.raises(InputError, match="'bones' is no group"):
        merge_labels(np.zeros(3), [1], {"bones": 120})


def test_merge_labels_transform():
    item = {"mask": torch.tensor([[[[0.0, 1.0, 40.0]]]]), "name": "a"}
    assert MergeLabelsd("mask", KEEP, MERGE)(item)["mask"].flatten().tolist() == [0, 200, 120]
    assert MergeLabelsd("mask", None)(item)["mask"] is item["mask"]
