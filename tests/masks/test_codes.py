"""SNOMED CT codes and ROI names lead to the labels they stand for."""

from __future__ import annotations

import json

import pydicom
import pytest
from pydicom.sr.codedict import codes

from maisi_tools.errors import InputError
from maisi_tools.masks.codes import (
    CATEGORIES,
    CODES,
    PRIVATE,
    SIDES,
    display_name,
    label_of_code,
    label_of_name,
    read_roi_table,
)
from maisi_tools.masks.vocabulary import VOCABULARY


def test_every_label_has_one_code_of_its_own_and_leads_back():
    assert set(CODES) == set(VOCABULARY)
    known = {label: code for label, code in CODES.items() if code.scheme != PRIVATE}
    assert set(CODES) - set(known) == {21, 129, 130, 131, 200}
    for label, code in known.items():
        assert label_of_code(code.code, code.side, code.region) == label
        assert code.category in CATEGORIES and code.code.isdecimal()
        assert (code.side or None) == (VOCABULARY[label].side if label not in (18, 20, 31, 108) else code.side or None)


@pytest.mark.skipif(pydicom.__version__ < "3", reason="needs the code dictionary of pydicom 3")
def test_codes_are_those_of_the_dicom_standard():
    """Against pydicom's copy of PS3.16: a code that is there must mean what the table says."""
    for code, word in [
        (codes.SCT.Liver, "liver"),
        (codes.SCT.Spleen, "spleen"),
        (codes.SCT.Pancreas, "pancreas"),
        (codes.SCT.Esophagus, "esophagus"),
        (codes.SCT.InferiorVenaCava, "inferior vena cava"),
        (codes.SCT.SpinalCord, "spinal cord"),
        (codes.SCT.L5Vertebra, "vertebrae L5"),
        (codes.SCT.T12Vertebra, "vertebrae T12"),
        (codes.SCT.C1Vertebra, "vertebrae C1"),
        (codes.SCT.CostalCartilage, "costal cartilages"),
        (codes.SCT.LeftAuricularAppendage, "left atrial appendage"),
        (codes.SCT.MiddleLobeOfRightLung, "right lung middle lobe"),
        (codes.SCT.BrainStem, "placeholder 2"),
        (codes.SCT.Larynx, "placeholder 16"),
    ]:
        label = label_of_code(code.value)
        assert label is not None and VOCABULARY[label].name == word
    assert {side: code for side, (code, _) in SIDES.items()} == {
        "left": codes.SCT.Left.value,
        "right": codes.SCT.Right.value,
    }
    assert label_of_code(codes.SCT.SubclavianArtery.value, "left") == 123
    assert label_of_code(codes.SCT.Neoplasm.value, "", codes.SCT.Lung.value) == 23
    assert label_of_code(codes.SCT.Neoplasm.value) is None and label_of_code(codes.SCT.Kidney.value) is None


def test_names_that_are_written_are_understood():
    assert [label_of_name(display_name(label)) for label in VOCABULARY] == list(VOCABULARY)
    assert [display_name(label) for label in (1, 2, 20)] == ["liver", "brainstem", "right parotid gland"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Liver", 1),
        ("SpinalCord", 121),
        ("SPINAL CORD", 121),
        ("Kidney_L", 14),
        ("Rt kidney", 5),
        ("kidney_left", 14),
        ("BrainStem", 2),
        ("Parotid_R", 20),
        ("LT PAROTID", 18),
        ("Bone_Mandible", 120),
        ("BODY", 200),
        ("External", 200),
        ("rib_left_10", 72),
        ("vertebrae_L5", 33),
        ("Clavicle_R", 92),
        ("Glnd_Adrenal_L", 9),
        ("PTV70", None),
        ("Kidney", None),
        ("Lung_L", None),
        ("", None),
    ],
)
def test_roi_names(name, label):
    assert label_of_name(name) == label


def test_a_table_of_ones_own(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"Leber": "liver", "PTV": 0, "Lung_L": 29, "x": "rib_left_1"}))
    assert read_roi_table(path) == {"Leber": 1, "PTV": 0, "Lung_L": 29, "x": 63}
    for content, message in [("[]", "holds no JSON object"), ("{", "as JSON"), ('{"a": "livr"}', "did you mean liver")]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_roi_table(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_roi_table(tmp_path / "none.json")
