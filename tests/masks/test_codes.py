"""SNOMED CT codes and ROI names lead to the labels they stand for."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pydicom
import pytest
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.codedict import codes

from maisi_tools.errors import InputError
from maisi_tools.masks import codes as codes_module
from maisi_tools.masks.codes import (
    CATEGORIES,
    CODES,
    PRIVATE,
    SIDES,
    label_of_code,
    label_of_name,
    label_of_structure,
    read_roi_table,
    side_of_codes,
)
from maisi_tools.masks.vocabulary import VOCABULARY, display_name


def test_every_label_has_one_code_of_its_own_and_leads_back():
    assert set(CODES) == set(VOCABULARY)
    known = {label: code for label, code in CODES.items() if code.scheme != PRIVATE}
    assert set(CODES) - set(known) == {21, 129, 130, 131, 200}
    for label, code in known.items():
        assert label_of_code(code.code, code.side, code.region) == label
        assert code.category in CATEGORIES and code.code.isdecimal()
        assert (code.side or None) == (VOCABULARY[label].side if label not in (18, 20, 31, 108) else code.side or None)


ROWS = list(csv.DictReader((Path(codes_module.__file__).with_name("snomed.csv")).read_text().splitlines()))

MEANINGS: dict[str, set[str]] = {}
"""SNOMED CT code -> its meanings in the standard."""
for entry in concepts["SCT"].values():
    for code, (meaning, _) in entry.items():
        MEANINGS.setdefault(code, set()).add(meaning)

ELSEWHERE = {
    # Codes that pydicom's copy of the standard does not have; from the mapping that TotalSegmentator publishes.
    "110765007": "Portal vein and splenic vein",
    **dict(
        zip(
            "48535007 78247007 25888004 25523003 15339008 59558009 24915002 5953002 22565002 77644006 58830002 "
            "43993008".split(),
            "First Second Third Fourth Fifth Sixth Seventh Eighth Ninth Tenth Eleventh Twelfth".split(),
            strict=True,
        )
    ),
    "181674001": "Gluteus maximus muscle",
    "206007": "Gluteus maximus muscle",
    "78333006": "Gluteus medius muscle",
    "75297007": "Gluteus minimus muscle",
    "244849004": "Deep muscle of back",
    "68455001": "Iliopsoas muscle",
    "65985001": "S1 vertebra",
    "68786006": "Auricular appendage",
}

ELSEWHERE_RIBS = [f"{word} rib" for word in list(ELSEWHERE.values())[1:13]]

OTHER_WORDS = {
    # code: (the table's words, pydicom's), where these differ by more than case and order
    "89837001": ("Urinary bladder", "Bladder"),
    "86049000": ("Malignant neoplasm, primary", "Malignant neoplasm, primary (morphologic abnormality)"),
    "12691009": ("Brachiocephalic artery", "Innominate artery"),
    "69748006": ("Thyroid gland", "Thyroid"),
    "89187006": ("Airway", "Airway structure"),
    "119238007": ("Brainstem", "Brain Stem"),
}

SIDED = {"36765005", "29700009"}
"""Subclavian artery: programs write the code of the right one for both, with the side beside it."""


def plain(text: str) -> str:
    return " ".join(sorted(text.casefold().split()))


@pytest.mark.skipif(pydicom.__version__ < "3", reason="needs the code dictionary of pydicom 3")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['id']} {row['code']}")
def test_every_row_says_what_its_code_means(row):
    """All of snomed.csv, its regions too, against pydicom's copy of the standard, and against the vocabulary."""
    for code, meaning in ((row["code"], row["meaning"]), (row["region"], row["region_meaning"])):
        standard = MEANINGS.get(code, set())
        if code in ELSEWHERE:
            assert not standard and meaning in (ELSEWHERE[code], f"{ELSEWHERE[code]} rib")
        elif code in OTHER_WORDS:
            assert OTHER_WORDS[code][0] == meaning and OTHER_WORDS[code][1] in standard
        elif code and code not in SIDED:
            assert plain(meaning) in map(plain, standard)
    label = VOCABULARY.get(int(row["id"]))
    assert label is not None and row["category"] == (
        "49755003" if label.group == "tumor" or "cyst" in label.name else "91723000"
    )
    assert row["side"] in ("", label.side or "") or row["id"] in ("18", "20", "108")
    sides = {side for side in ("left", "right") if side in row["meaning"].casefold()}
    assert sides <= {label.side or "left"} or row["code"] in SIDED


MEANS = {
    # id -> the word by which a reader knows it in the code's meaning (or that of its region), for all labels
    **{id: name for id, name in ((1, "liver"), (2, "brainstem"), (3, "spleen"), (4, "pancreas"), (6, "aorta"))},
    **{5: "kidney", 14: "kidney", 7: "inferior vena cava", 8: "adrenal", 9: "adrenal", 10: "gallbladder"},
    **{11: "esophagus", 12: "stomach", 13: "duodenum", 15: "bladder", 16: "larynx", 17: "portal vein", 18: "parotid"},
    **{19: "small intestine", 20: "parotid", 22: "brain", 23: "lung", 24: "pancreas", 25: "liver", 26: "liver"},
    **{27: "colon", 28: "upper lobe", 29: "lower lobe", 30: "upper lobe", 31: "middle lobe", 32: "lower lobe"},
    **{33 + n: f"{name} vertebra" for n, name in enumerate(["L5", "L4", "L3", "L2", "L1"])},
    **{38 + n: f"T{12 - n} vertebra" for n in range(12)},
    **{50 + n: f"C{7 - n} vertebra" for n in range(7)},
    **{57: "trachea", 58: "iliac artery", 59: "iliac artery", 60: "iliac vein", 61: "iliac vein", 62: "colon"},
    **{start + n: word for start in (63, 75) for n, word in enumerate(ELSEWHERE_RIBS)},
    **{87: "humerus", 89: "scapula", 91: "clavicle", 93: "femur", 95: "hip", 97: "sacrum", 98: "gluteus maximus"},
    **{88: "humerus", 90: "scapula", 92: "clavicle", 94: "femur", 96: "hip", 99: "gluteus maximus"},
    **{100: "gluteus medius", 101: "gluteus medius", 102: "gluteus minimus", 103: "gluteus minimus"},
    **{104: "back", 105: "back", 106: "iliopsoas", 107: "iliopsoas", 108: "auricular appendage"},
    **{109: "brachiocephalic artery", 110: "brachiocephalic vein", 111: "brachiocephalic vein"},
    **{112: "common carotid", 113: "common carotid", 114: "costal cartilage", 115: "heart", 116: "kidney"},
    **{117: "kidney", 118: "prostate", 119: "pulmonary vein", 120: "skull", 121: "spinal cord", 122: "sternum"},
    **{123: "subclavian", 124: "subclavian", 125: "superior vena cava", 126: "thyroid", 127: "S1 vertebra"},
    **{128: "bone", 132: "airway"},
}


def test_every_label_is_written_with_the_code_of_its_organ():
    for label, code in CODES.items():
        if code.scheme == PRIVATE:
            assert code.code == str(label)
        else:
            assert MEANS[label].casefold() in f"{code.meaning}, {code.region_meaning}".casefold(), label
    assert MEANS.keys() == {label for label, code in CODES.items() if code.scheme != PRIVATE}


def test_every_further_name_of_an_roi():
    """All of roi_names.json."""
    left_right = {"adrenal": (9, 8), "glnd adrenal": (9, 8), "suprarenal gland": (9, 8), "clavicle": (91, 92)}
    single = {"a aorta": 6, "bone mandible": 120, "mandible": 120, "bowel large": 62, "large bowel": 62}
    single |= {"bowel small": 19, "small intestine": 19, "brain stem": 2, "larynx": 16, "external": 200, "skin": 200}
    single |= {"parotid left": 18, "parotid right": 20, "parotid gland left": 18, "parotid gland right": 20}
    single |= {"gall bladder": 10, "glnd thyroid": 126, "thyroid": 126, "ivc": 7, "vena cava inferior": 7, "svc": 125}
    single |= {"vena cava superior": 125, "oesophagus": 11, "cord": 121}
    names = json.loads(Path(codes_module.__file__).with_name("roi_names.json").read_text())
    assert names.keys() == left_right.keys() | single.keys()
    for name, label in single.items():
        assert label_of_name(name) == label_of_name(name.title().replace(" ", "_")) == label
    for name, (left, right) in left_right.items():
        assert (label_of_name(f"{name} L"), label_of_name(f"RT {name}"), label_of_name(name)) == (left, right, None)


def test_a_part_of_an_organ_is_not_the_organ():
    assert label_of_name("Liver") == 1 and label_of_name("~Liver") is label_of_name(" ~Lung_L") is None


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
        *((f"Kidney{both}", None) for both in (" L+R", "s L+R", "_L_R", " (L+R)", "_LR", "s RL", " left and right")),
        ("Femur_L+R", None),
        ("Hip L&R", None),
        ("Bilateral Parotid", None),
        ("L_Kidney_LT", 14),
        ("PTV70", None),
        ("liver \u80bf\u7624", None),  # tumour
        ("\u041f\u0435\u0447\u0435\u043d\u044c liver \u0431\u0435\u0437 \u0413\u0426\u041a", None),
        ("LIVER\u00c4", None),
        ("Kidney\u00b7L", 14),
        ("Kidney", None),
        ("Lung_L", None),
        ("", None),
    ],
)
def test_roi_names(name, label):
    assert label_of_name(name) == label


def test_codes_of_both_sides_are_of_no_single_one():
    """One code for both (CID 244), or a modifier for each; an organ without sides stays what it is."""
    left, right = codes.SCT.Left.value, codes.SCT.Right.value
    assert [side_of_codes(values) for values in ([left], [right], ["x"], [])] == ["left", "right", "", ""]
    assert side_of_codes([left, right]) == side_of_codes(["51440002"]) == "both"
    kidney, subclavian, liver = codes.SCT.Kidney.value, "36765005", codes.SCT.Liver.value
    assert [label_of_code(code, "both") for code in (kidney, subclavian, liver)] == [None, None, 1]


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (("Brain left", "12738006", "left"), None),  # a half of what the vocabulary has whole
        (("Brain", "12738006", "left"), None),  # whatever it is called
        (("Brain", "12738006", "both"), 22),
        (("x", "33626005", "left"), 108),  # the code says the side, too
        (("x", "72481006", "right"), 31),
        (("x", "72481006", "left"), None),
        (("x", "85235006", "left"), 123),
        (("x", "108369006", "left", "39607008"), 23),  # a tumour of the left lung is one of the lung
        (("x", "10200004", "", "", "49755003"), None),  # an abnormal liver is not the liver
        (("Liver", "10200004", "", "", "49755003"), None),
        (("hepatic tumor", "10200004", "", "", "49755003"), 26),
        (("x", "108369006", "", "10200004", "49755003"), 26),
        (("x", "367643001", "left", "64033007", "49755003"), 116),
        (("Kidney_L", "64033007", ""), 14),  # the name says what the code leaves open
        (("Kidney_L", "64033007", "both"), None),
        (("Kidney_L", "64033007", "right"), 5),
        (("Parotid_L", "", "left"), 18),
        (("Liver", "", ""), 1),
    ],
)
def test_what_side_and_category_make_of_a_code(given, label):
    assert label_of_structure(*given) == label


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
