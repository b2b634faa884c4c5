from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import LABEL_MAPS, ReadLabelsd, apply_label_map, read_label_map
from maisi_tools.masks.vocabulary import VOCABULARY


@pytest.fixture
def write(tmp_path):
    def write(content: object) -> Path:
        path = tmp_path / "map.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_maisi_is_the_identity():
    assert read_label_map("maisi") == {label: label for label in VOCABULARY}


@pytest.mark.parametrize(
    "file_label, id",
    [(1, 3), (2, 5), (5, 1), (16, 57), (26, 127), (27, 33), (50, 56), (79, 121), (90, 22), (91, 120), (92, 63)]
    + [(103, 74), (104, 75), (115, 86), (116, 122), (117, 114)],
)
def test_totalsegmentator(file_label, id):
    assert read_label_map("totalsegmentator")[file_label] == id


def test_totalsegmentator_is_one_to_one():
    mapping = read_label_map("totalsegmentator")
    assert list(mapping) == list(range(1, 118)) and len(set(mapping.values())) == 117
    assert set(mapping.values()) == {label.id for label in VOCABULARY.values() if label.totalsegmentator}


def test_totalsegmentator_agrees_with_a_file_of_it(repo_root):
    names = repo_root.parent / "shared" / "data" / "torso" / "ts_example_torso_labels.json"
    if not names.is_file():
        pytest.skip("needs the labels of TotalSegmentator's example torso, which are not part of the repository")
    assert read_label_map(names) == read_label_map("totalsegmentator")


def test_openkbp():
    assert read_label_map("openkbp") == {1: 2, 2: 121, 3: 11, 4: 16, 5: 120, 6: 18, 7: 20}


def test_returned_map_is_a_copy():
    read_label_map("openkbp").clear()
    assert len(LABEL_MAPS["openkbp"]) == 7


@pytest.mark.parametrize(
    "entries",
    [
        {"1": "liver", "2": "rib_left_1", "300": 200, "4": "3", "5": 0, "6": "background"},
        {"liver": 1, "left rib 1": 2, "body": 300, "Spleen": 4, "background": 5, "0": 0, "6": 0},
    ],
)
def test_json_in_both_directions(write, entries):
    mapping = read_label_map(write(entries))
    mapping.pop(0, None)
    assert mapping == {1: 1, 2: 63, 300: 200, 4: 3, 5: 0, 6: 0}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "cannot be read as JSON"),
        ([1, 2], "instead of an object"),
        ({}, "instead of an object"),
        ({"1": "lever"}, "'lever' is no label.*liver"),
        ({"1": 150}, "150 is not in the vocabulary.*1..132 and 200"),
        ({"1": None}, "null is neither a name nor an id"),
        ({"liver": "spleen"}, "names no label number"),
        ({"liver": 1.5}, "names no label number"),
        ({"-3": "liver"}, "names no label number"),
        ({"1000000000": "liver"}, "names no label number"),
        ({"1": "liver", "spleen": 1}, "two meanings"),
    ],
)
def test_bad_json(write, content, said):
    path = write(content)
    with pytest.raises(InputError, match=said) as error:
        read_label_map(path)
    assert str(path) in str(error.value)


def test_unknown_map(tmp_path):
    with pytest.raises(InputError, match=r"'mine' is neither.*totalsegmentator.*JSON file such as"):
        read_label_map("mine")
    with pytest.raises(InputError, match="neither"):
        read_label_map(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_apply_against_a_loop(dtype):
    mapping = read_label_map("totalsegmentator")
    mask = np.random.default_rng(0).integers(0, 118, (5, 6, 7)).astype(dtype)
    labels = apply_label_map(mask, mapping)
    assert labels.dtype == np.uint8
    assert [mapping.get(int(value), 0) for value in mask.ravel()] == labels.ravel().tolist()


@pytest.mark.parametrize("extra", [[8, 8, 9], [-1], [70000], [2**40]])
def test_labels_outside_the_map_are_all_named(extra):
    mask = np.array([0, 1, 2, *extra])
    with pytest.raises(InputError) as error:
        apply_label_map(mask, read_label_map("openkbp"))
    for value in set(extra):
        assert f"{value} ({extra.count(value)} voxels)" in str(error.value)
    assert "1..7" in str(error.value) and "JSON file such as" in str(error.value)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_values_that_are_no_labels(value):
    with pytest.raises(InputError, match="1 voxels of the mask are no whole number"):
        apply_label_map(np.array([0, 1, value]), read_label_map("maisi"))


def test_empty_mask():
    with pytest.raises(InputError, match="the mask is empty: every voxel is 0"):
        apply_label_map(np.zeros((3, 3, 3)), read_label_map("maisi"))
    with pytest.raises(InputError, match="the label map drops every label"):
        apply_label_map(np.full((3, 3, 3), 4), {4: 0})


def test_transform_keeps_geometry_and_can_be_turned():
    affine = torch.tensor([[-2.0, 0, 0, 9], [0, 3, 0, 8], [0, 0, 4, 7], [0, 0, 0, 1]], dtype=torch.float64)
    mask = MetaTensor(torch.arange(8.0).view(1, 2, 2, 2), affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    labels = ReadLabelsd("mask", "openkbp")({"mask": mask})["mask"]
    assert labels.dtype == torch.uint8 and torch.equal(labels.affine, affine)
    assert labels.meta["filename_or_obj"] == "a.nii.gz"
    assert labels.flatten().tolist() == [0, 2, 121, 11, 16, 120, 18, 20]
    turned = Orientation("RAS", labels=None)(labels)
    assert turned.dtype == torch.uint8 and torch.equal(turned.as_tensor(), labels.as_tensor().flip(1))
    assert mask.flatten().tolist() == list(range(8))


def test_transform_names_the_file():
    mask = MetaTensor(torch.full((1, 2, 2, 2), 9.0), meta={"filename_or_obj": "a.nii.gz"})
    with pytest.raises(InputError, match=r"^a\.nii\.gz: .*9 \(8 voxels\)"):
        ReadLabelsd("mask", "openkbp")({"mask": mask})
    with pytest.raises(InputError, match="neither"):
        ReadLabelsd("mask", "no such map")
