from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import (
    LABEL_MAPS,
    ReadLabelsd,
    RestoreLabelsd,
    apply_label_map,
    read_label_map,
    recorded_label_map,
    restore_labels,
)
from maisi_tools.masks.vocabulary import BODY, VOCABULARY


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


@pytest.mark.parametrize(
    "entries",
    [
        {"1": "liver", "2": "rib_left_1", "300": 200, "4": "3", "5": 0, "6": "background"},
        {"liver": 1, "left rib 1": 2, "body": 300, "Spleen": 4, "background": 5, "0": 0, "6": 0},
    ],
)
def test_json_in_both_directions(write, entries):
    mapping = {label: id for label, id in read_label_map(write(entries)).items() if label}
    assert mapping == {1: 1, 2: 63, 300: 200, 4: 3, 5: 0, 6: 0}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "cannot be read as JSON"),
        ([1, 2], "instead of an object"),
        ({}, "instead of an object"),
        ({"1": "lever"}, "'lever' is no label.*liver.*'placeholder' for a class"),
        ({"1": 150}, "150 is not in the vocabulary.*1..132 and 200"),
        ({"1": None}, "null is neither a name nor an id"),
        ({"liver": "spleen"}, "names no label number"),
        ({"liver": 1.5}, "names no label number"),
        ({"-3": "liver"}, "names no label number"),
        ({"1000000000": "liver"}, "names no label number"),
        ({"1": "liver", "spleen": 1}, "two meanings"),
        ({"0": "liver"}, "0 is always the background"),
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
    with pytest.raises(InputError, match="label_map 'None' is neither"):
        read_label_map(None)


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
    with pytest.raises(InputError, match="the mask has 1 voxels that are no whole number"):
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


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("totalsegmentator_v1", range(1, 105), {1: 3, 7: 6, 18: 33, 41: 56, 50: 22, 58: 63, 92: 97, 104: 15}),
        ("btcv", range(1, 14), {1: 3, 2: 5, 3: 14, 9: 7, 10: 17, 12: 8, 13: 9}),
        ("amos", range(1, 16), {4: 10, 9: 7, 11: 8, 12: 9, 14: 15, 15: 118}),
        ("msd_liver", (1, 2), {1: 1, 2: 26}),
        ("msd_lung", (1,), {1: 23}),
        ("msd_pancreas", (1, 2), {1: 4, 2: 24}),
        ("msd_hepaticvessel", (1, 2), {1: 25, 2: 26}),
        ("msd_spleen", (1,), {1: 3}),
        ("msd_colon", (1,), {1: 27}),
        ("msd_prostate", (1, 2), {1: 118, 2: 118}),
        ("msd_braintumour", (1, 2, 3), {}),
        ("msd_heart", (1,), {}),
        ("msd_hippocampus", (1, 2), {}),
    ],
)
def test_data_sets(name, labels, expected):
    label_map = read_label_map(name)
    assert sorted(label_map.classes) == list(labels)
    assert {label: label_map[label] for label in expected} == expected
    assert expected or len(label_map) == 0


def test_version_1_of_totalsegmentator():
    label_map = read_label_map("totalsegmentator_v1")
    assert {label_map.classes[label] for label in label_map.classes if label not in label_map} == {
        "pulmonary_artery",
        "face",
    }
    assert label_map.merged == {115: [44, 45, 46, 47, 48]}  # the heart's chambers and its muscle
    for label, name in label_map.classes.items():
        if name in {entry.totalsegmentator for entry in VOCABULARY.values()}:
            assert VOCABULARY[label_map[label]].totalsegmentator == name


# --- classes without counterpart --------------------------------------------------------------------------------------


def test_classes_without_counterpart_are_counted_and_become_background(caplog):
    labels = apply_label_map(np.array([5, 49, 49, 93, 0]), read_label_map("totalsegmentator_v1"))
    assert labels.tolist() == [1, 0, 0, 0, 0]
    assert "pulmonary_artery (2 voxels), face (1 voxels)" in caplog.text
    with pytest.raises(
        InputError, match=r"empty: MAISI's vocabulary has no left atrium \(3 voxels\).*placeholders: auto"
    ):
        apply_label_map(np.ones(3), read_label_map("msd_heart"))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", {49: 21, 93: 129}),
        ({"face": "auto"}, {93: 21}),
        ({"pulmonary artery": "auto", "93": 21}, {49: 129, 93: 21}),
        ({"FACE": 2, 200: "131"}, {93: 2, 200: 131}),
    ],
)
def test_placeholders_on_request(asked, expected):
    label_map = read_label_map("totalsegmentator_v1", asked)
    assert dict(label_map.placeholders) == expected
    assert {label: label_map[label] for label in expected} == expected
    labels = np.array([5, *expected])
    assert restore_labels(apply_label_map(labels, label_map), label_map).labels.tolist() == labels.tolist()
    assert 49 not in read_label_map("totalsegmentator_v1")  # the map of that name stays


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"liver": "auto"}, "'liver', which totalsegmentator_v1 reads as 1"),
        ({"nose": "auto"}, "'nose'.*does not have.*pulmonary_artery, face"),
        ({"face": 1}, "id 1; allowed are 2, 16, 18"),
        ({"face": None}, "id None"),
        ({"face": 2, "pulmonary_artery": 2}, "id 2 is taken"),
        ({str(label): "auto" for label in range(200, 209)}, "free placeholder ids, .* 21, 129, 130, 131; .* 2 .brain"),
        ({str(label): "auto" for label in range(200, 205)}, "more new classes than free"),
        ("always", "'always'; allowed are auto"),
    ],
)
def test_wrong_placeholders(asked, said):
    with pytest.raises(InputError, match=said):
        read_label_map("totalsegmentator_v1", asked)


def test_placeholders_in_a_json(write):
    entries = {"1": "liver", "2": "placeholder 18: left parotid gland", "3": "placeholder", "4": "Placeholder: nodule"}
    label_map = read_label_map(write(entries), {"9": "auto"})
    assert label_map == {1: 1, 2: 18, 3: 21, 4: 129, 9: 130}
    assert label_map.classes == {1: "liver", 2: "left parotid gland", 3: "label 3", 4: "nodule", 9: "label 9"}
    with pytest.raises(InputError, match="map.json gives label 2 two meanings"):
        read_label_map(write({"2": "placeholder", "liver": 2}))
    with pytest.raises(InputError, match="map.json: placeholders gives label 2 the id '5'"):
        read_label_map(write({"2": "placeholder 5"}))


@pytest.mark.parametrize(
    ("entries", "asked", "said"),
    [
        ({"2": "placeholder: node", "3": "placeholder: node"}, None, "label 2 is called 'node', .* label 3 is"),
        ({"2": "placeholder: Lymph_node", "3": "placeholder 20: lymph Node"}, None, "label 2 .* label 3 "),
        ({"2": "placeholder: liver", "5": "Liver"}, None, "label 2 is called 'liver', .* label 5 is"),
        ({"2": "placeholder: liver", "5": 1}, None, "label 2 .* label 5 "),
        ({"2": "placeholder: left kidney", "5": "kidney_left"}, None, "label 2 .* label 5 "),  # one name of two
        ({"2": "placeholder: Kidney_Left", "5": "left kidney"}, None, None),  # words in another order are another name
        ({"2": "placeholder: left parotid gland", "5": "left parotid"}, None, "label 2 .* label 5 "),
        ({"2": "placeholder: background", "5": "liver"}, None, "label 2 is called 'background', .* label 0 is"),
        ({"2": "placeholder", "3": "placeholder: label 2"}, None, "label 2 is called 'label 2', .* label 3 is"),
        ({"2": "placeholder: label 9"}, {"9": "auto"}, "label 2 is called 'label 9', .* label 9 is"),
        ({"2": "placeholder: left parotid gland", "3": "placeholder 18: pituitary"}, None, None),
        ({"2": "placeholder: node", "3": "placeholder: nodes", "5": "liver", "6": "liver", "7": 0}, None, None),
        ({"1": "liver", "2": 3, "4": "placeholder: lymph node"}, None, None),  # docs/how-to/own-masks.md
        ({"1": "liver", "2": 200, "3": "placeholder"}, None, None),  # JSON_HELP
    ],
)
def test_a_placeholder_has_a_name_of_its_own(write, entries, asked, said):
    """By names classes are recorded and listed: of two with one name, one would be lost."""
    path = write(entries)
    if said:
        with pytest.raises(InputError, match=f"map.json: the placeholder of {said}.*another name"):
            read_label_map(path, asked)
        return
    label_map = read_label_map(path, asked)
    assert len(label_map.record("input")["placeholders"]) == len(label_map.placeholders) > 0
    again = recorded_label_map(label_map.record("input"))
    assert (again, again.own_names) == (label_map, label_map.own_names)


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_new_classes_of_known_maps_have_names_of_their_own(name):
    label_map = read_label_map(name, "auto")
    assert {*label_map} == {*label_map.classes}
    assert {label_map.label_of(known) for known in label_map.classes.values()} == {*label_map.classes}


def test_a_placeholder_that_weights_know_as_something_else_is_said(write, caplog):
    """By the ids of OpenKBP's structures the small weights would draw these."""
    label_map = read_label_map(write({"1": "placeholder 18: pituitary", "2": "placeholder 20: Right_Parotid_Gland"}))
    assert label_map.own_names == {18: "pituitary", 20: "Right_Parotid_Gland"}
    assert label_map.shown_to(None) is label_map.shown_to([2, 129]) is label_map and not caplog.text
    assert label_map.shown_to([18, 20]) is label_map
    assert "18 is pituitary here, left parotid gland there; free are 21, 129, 130, 131" in caplog.text
    assert "Right" not in caplog.text
    four = {str(label): f"placeholder: class {label}" for label in range(1, 5)}
    assert set(read_label_map(write(four)).values()) == {21, 129, 130, 131}
    with pytest.raises(InputError, match=r"map.json: .*name the ids of what these know: placeholder 2 \(brainstem\)"):
        read_label_map(write(four | {"5": "placeholder: pituitary"}))
    assert read_label_map(write(four | {"5": "placeholder 2: pituitary"}))[5] == 2  # on request


# --- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, label_map in LABEL_MAPS.items() if len(label_map)])
def test_round_trip_loses_only_what_is_listed(name):
    """Vocabulary -> data set -> vocabulary."""
    label_map = read_label_map(name)
    mask = np.repeat(np.array([0, *VOCABULARY]), 2)
    restored = restore_labels(mask, label_map)
    assert restored.labels.dtype == np.uint8
    again = apply_label_map(restored.labels, label_map)
    lost = np.isin(mask, list(restored.without_counterpart))
    assert np.array_equal(again, np.where(lost, 0, mask))
    assert set(restored.without_counterpart) == VOCABULARY.keys() - set(label_map.values())
    assert set(restored.without_counterpart.values()) <= {2}


def test_round_trip_from_totalsegmentator_loses_nothing():
    labels = np.arange(118)
    label_map = read_label_map("totalsegmentator")
    restored = restore_labels(apply_label_map(labels, label_map), label_map)
    assert np.array_equal(restored.labels, labels) and not restored.without_counterpart and not restored.merged


def test_merged_labels_are_told():
    label_map = read_label_map("totalsegmentator_v1")
    restored = restore_labels(apply_label_map(np.array([44, 46, 5]), label_map), label_map)
    assert restored.labels.tolist() == [44, 44, 5] and restored.merged == {115: [44, 45, 46, 47, 48]}


def test_large_labels_come_back(write):
    label_map = read_label_map(write({"300": "liver", "60000": "spleen"}))
    labels = restore_labels(np.array([0, 1, 3]), label_map).labels
    assert labels.dtype == np.uint16 and labels.tolist() == [0, 300, 60000]
    with pytest.raises(InputError, match=r"the labels \[150\]"):
        restore_labels(np.array([150]), label_map)


def test_restore_transform(caplog):
    label_map = read_label_map("openkbp")
    mask = MetaTensor(torch.tensor([0, 2, 121, BODY, BODY], dtype=torch.uint8).view(1, 1, 1, 5))
    kept = RestoreLabelsd("mask", label_map)({"mask": mask})
    assert kept["mask"] is mask and kept["labels"] == {
        "numbering": "vocabulary",
        "label_map": "openkbp",
        "placeholders": {},
    }
    back = RestoreLabelsd("mask", label_map, "input")({"mask": mask})
    assert back["mask"].flatten().tolist() == [0, 1, 2, 0, 0] and torch.equal(back["mask"].affine, mask.affine)
    assert back["labels"]["without_counterpart"] == {"body": 2} and "'body': 2" in caplog.text
    with pytest.raises(InputError, match="'maisi'; allowed are vocabulary and input"):
        RestoreLabelsd("mask", label_map, "maisi")


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65535, np.uint16)])
def test_the_type_holds_the_largest_label(write, largest, dtype):
    """256 in eight bits would come back as 0, the background."""
    label_map = read_label_map(write({str(largest): "liver"}))
    assert apply_label_map(np.array([0, largest]), label_map).tolist() == [0, 1]
    labels = restore_labels(np.array([0, 1]), label_map).labels
    assert labels.dtype == dtype and labels.tolist() == [0, largest]
    with pytest.raises(InputError, match="65536"):
        read_label_map(write({"65536": "liver"}))


@pytest.mark.parametrize("text", ['{"5": "liver", "5": "spleen"}', '{"liver": 5, "liver": 7}'])
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match="stands there more than once"):
        read_label_map(tmp_path / "map.json")


def test_names_for_a_reader(tmp_path):
    (tmp_path / "map.json").write_text('{"1": "liver", "2": "placeholder 129: Eye_L", "3": 18}')
    read = read_label_map(tmp_path / "map.json")
    assert [read.display_name(id) for id in (1, 129, 18, 130)] == [
        *("liver", "Eye_L", "left parotid gland", "placeholder 130")
    ]
