"""Segmentations of 3D Slicer: names, terminology and layers of the header decide, not the values that it deals out."""

from __future__ import annotations

import json
import logging

import nrrd
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import ReadMaskd, read_mask, read_numbers
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.vocabulary import label_id

SHAPE = (8, 9, 10)
MAISI = read_label_map("maisi")


def entry(value, scheme="SCT", side="", region=""):
    """A terminology tag as 3D Slicer writes it."""
    modifier = {"left": "SCT^7771000^Left", "right": "SCT^24028007^Right", "": "^^"}[side]
    return (
        "Segmentation.Status:completed|TerminologyEntry:Segmentation category and type - 3D Slicer General Anatomy list"
        f"~SCT^123037004^Anatomical Structure~{scheme}^{value}^what it is~{modifier}"
        f"~Anatomic codes - DICOM master list~{region or '^^'}~^^|"
    )


@pytest.fixture
def write(tmp_path):
    """Writes segments {name: (inside, value, layer, tags)} as Slicer does; returns the path."""

    def write(segments, layers=1, name="case.seg.nrrd", space="left-posterior-superior", fields=True):
        array = np.zeros((layers, *SHAPE), dtype=np.uint8)
        header = {"space": space, "encoding": "gzip"}
        for number, (title, (inside, value, layer, tags)) in enumerate(segments.items()):
            array[layer][inside] = value
            key = f"Segment{number}_"
            header |= {f"{key}ID": f"Segment_{number}", f"{key}Name": title, f"{key}Tags": tags}
            if fields:
                header |= {f"{key}LabelValue": str(value), f"{key}Layer": str(layer)}
        directions = np.diag([2.0, 2.0, 3.0])
        if layers > 1:
            directions = np.vstack([[np.nan] * 3, directions])
            header["kinds"] = ["list", "domain", "domain", "domain"]
        header |= {"space directions": directions, "space origin": [1.0, 2.0, 3.0]}
        nrrd.write(str(tmp_path / name), array if layers > 1 else array[0], header)
        return tmp_path / name

    return write


def box(*edges):
    inside = np.zeros(SHAPE, dtype=bool)
    inside[tuple(slice(*edge) for edge in edges)] = True
    return inside


BODY, AIRWAY, LIVER = (
    box((0, 8), (0, 9), (0, 10)),
    box((3, 5), (3, 5), (0, 10)),
    box((1, 3), (5, 8), (4, 9)),
)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("space", ["left-posterior-superior", "LPS", "Left-Posterior-Superior"])
def test_names_decide_and_layers_are_merged(write, layers, space):
    """By their numbers alone, 1, 2, 3 would be liver, brainstem and spleen."""
    shell = BODY & ~AIRWAY & ~LIVER if layers == 1 else BODY
    path = write(
        {
            "body": (shell, 1, 0, ""),
            "Airway": (AIRWAY, 2, min(1, layers - 1), ""),
            "my liver": (LIVER, 3, layers - 1, entry("10200004")),
        },
        layers,
        space=space,
    )
    expected = np.where(LIVER, 1, np.where(AIRWAY, 132, 200))
    mask = read_mask(path, MAISI)  # in RAS: both first axes are turned
    assert np.array_equal(mask[0].numpy(), expected[::-1, ::-1])
    assert mask.pixdim.tolist() == [2, 2, 3]
    assert np.array_equal(ReadMaskd("image", MAISI)({"image": path})["image"][0].numpy(), expected)


def test_terminology_is_above_the_name_and_knows_sides(write):
    left, right = box((0, 2), (0, 9), (0, 10)), box((5, 8), (0, 9), (0, 10))
    path = write(
        {"liver": (left, 1, 0, entry("64033007", side="left")), "B": (right, 2, 0, entry("64033007", side="right"))}
    )
    found = read_numbers(path, MAISI)[0].numpy()
    assert (found[left] == label_id("left kidney")).all() and (found[right] == label_id("right kidney")).all()


def test_segments_are_found_in_another_numbering_by_name(write):
    path = write({"Liver": (LIVER, 1, 0, ""), "kidney_left": (AIRWAY, 2, 0, "")})
    total = read_label_map("totalsegmentator")
    found = read_numbers(path, total)[0].numpy()
    assert set(found[LIVER]) == {total.label_of("liver")} and set(found[AIRWAY]) == {total.label_of("kidney_left")}
    assert set(np.unique(read_mask(path, total))) == {0, label_id("liver"), label_id("left kidney")}


def test_a_json_label_map_is_about_the_values(write, tmp_path):
    path = write({"body": (LIVER, 1, 0, ""), "airway": (AIRWAY, 2, 0, "")})
    (tmp_path / "map.json").write_text(json.dumps({"1": "spleen", "2": 0}))
    assert set(np.unique(read_mask(path, read_label_map(tmp_path / "map.json")))) == {0, 3}
    layered = write({"body": (BODY, 1, 0, ""), "airway": (AIRWAY, 1, 1, "")}, 2)
    with pytest.raises(InputError, match="value 1 for body and, in another layer, for airway; allowed with a JSON"):
        read_mask(layered, read_label_map(tmp_path / "map.json"))


def test_unknown_segments_are_said_and_none_known_is_refused(write, caplog):
    path = write({"Tumour 1": (AIRWAY, 4, 0, entry("85756007")), "liver": (LIVER, 9, 0, "")})
    with caplog.at_level(logging.WARNING):
        assert set(np.unique(read_mask(path, MAISI))) == {0, 1}
    assert f"Tumour 1 ({AIRWAY.sum()} voxels)" in caplog.text and "JSON label_map" in caplog.text
    path = write({"Segment_1": (AIRWAY, 1, 0, "")})
    with pytest.raises(InputError, match=r"has no segment that maisi knows .* Segment_1 \(40 voxels\)"):
        read_mask(path, MAISI)


def test_old_files_have_a_layer_for_each_segment(write):
    path = write({"body": (BODY, 1, 0, ""), "airway": (AIRWAY, 1, 1, "")}, 2, fields=False)
    found = read_numbers(path, MAISI)[0].numpy()
    assert np.array_equal(found, np.where(AIRWAY, 132, 200))


def test_a_layer_that_is_not_there_is_refused(write):
    path = write({"body": (BODY, 1, 0, "")})
    path.write_bytes(path.read_bytes().replace(b"Segment0_Layer:=0", b"Segment0_Layer:=7"))
    with pytest.raises(InputError, match="value 1 in layer 7; allowed are .* 0 to 0"):
        read_mask(path, MAISI)


def test_an_nrrd_without_segments_is_read_by_its_values(tmp_path):
    header = {"space": "LPS", "space directions": np.eye(3), "space origin": [0, 0, 0]}
    nrrd.write(str(tmp_path / "x.nrrd"), np.where(LIVER, 3, 0).astype(np.uint8), header)
    assert set(np.unique(read_mask(tmp_path / "x.nrrd", MAISI))) == {0, 3}
