"""What the vocabulary's labels are called elsewhere: SNOMED CT codes (DICOM SEG) and ROI names (DICOM RT-STRUCT)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maisi_tools import refuse_moved
from maisi_tools.errors import InputError
from maisi_tools.files import expanded, read_json
from maisi_tools.masks.label_maps import label_target
from maisi_tools.masks.vocabulary import BODY, BOTH, PLACEHOLDER_NAMES, VOCABULARY, name_and_side

__getattr__ = partial(refuse_moved, __name__)

SNOMED, PRIVATE = "SCT", "99MAISI"
"""Coding schemes: SNOMED CT, and the private one of labels that have no code there; its values are the label ids."""

ABNORMAL = "49755003"
CATEGORIES = {"91723000": "Anatomical Structure", ABNORMAL: "Morphologically Abnormal Structure"}
"""SNOMED CT codes of the categories used, from DICOM PS3.16 CID 7150."""

SIDES = {"left": ("7771000", "Left"), "right": ("24028007", "Right")}
"""SNOMED CT codes of the sides, from DICOM PS3.16 CID 244."""

BILATERAL = "51440002"
"""SNOMED CT code of both sides, from DICOM PS3.16 CID 244."""


@dataclass(frozen=True)
class LabelCode:
    """How DICOM names a label.

    Attributes:
        category: SNOMED CT code, one of :data:`CATEGORIES`.
        scheme: :data:`SNOMED` or :data:`PRIVATE`.
        code: of what it is.
        meaning: the code's text.
        side: "left", "right" or "" where the code says it all.
        region: SNOMED CT code of the organ a lesion or vessel is in, or "".
        region_meaning: that code's text.
    """

    category: str
    scheme: str
    code: str
    meaning: str
    side: str = ""
    region: str = ""
    region_meaning: str = ""


# snomed.csv: id of the vocabulary -> code. The first row of an id is written, further ones are understood as well.
# Sources: DICOM PS3.16 (the context groups in pydicom.sr.codedict) and, for the ribs, S1, the muscles, and the portal
# with the splenic vein, the SNOMED mapping that TotalSegmentator publishes. The placeholder ids 2, 16, 18 and 20 are
# the brainstem, the larynx and the parotid glands, as in the label map "openkbp".
def _read() -> tuple[dict[int, LabelCode], dict[tuple[str, str, str], int]]:
    written: dict[int, LabelCode] = {}
    understood: dict[tuple[str, str, str], int] = {}
    with open(Path(__file__).with_name("snomed.csv"), newline="") as file:
        for row in csv.DictReader(file):
            label = int(row.pop("id"))
            code = LabelCode(scheme=SNOMED, **row)
            if label != BODY:  # what others call the body includes the organs; ours is the rest of it
                written.setdefault(label, code)
            understood[code.code, code.side, code.region] = label
    for label, entry in VOCABULARY.items():
        written.setdefault(label, LabelCode("91723000", PRIVATE, str(label), entry.name))
    return written, understood


CODES, _BY_CODE = _read()
"""Label -> code that is written. Labels without a SNOMED CT code (free placeholders, body) have a private one."""


def label_of_code(code: str, side: str = "", region: str = "") -> int | None:
    """The label that a SNOMED CT code stands for, None where the vocabulary has none: of a brain's left half, say.

    Args:
        code: of the segmented property type.
        side: "left", "right", :data:`BOTH` or "": the modifier of the type or of the region.
        region: code of the anatomic region, or "".
    """
    keys = ((code, side, region), (code, side, ""), (code, "", region), (code, "", ""))
    return next((_BY_CODE[key] for key in keys if key in _BY_CODE and _is_of_side(_BY_CODE[key], side)), None)


def _is_of_side(label: int, side: str) -> bool:
    """Whether a structure said to be of a side, or of both, may have a label; a lesion on a side is still one."""
    own = name_and_side(PLACEHOLDER_NAMES.get(label, VOCABULARY[label].name))[1]
    return not side or VOCABULARY[label].group == "tumor" or own == side.replace(BOTH, "")


def label_of_structure(name: str, code: str = "", side: str = "", region: str = "", category: str = "") -> int | None:
    """The label of a structure by its SNOMED CT code, else by its name; None where neither is known.

    A label that is not of the structure's side is none, nor is an organ where the category says that it is abnormal.

    Args:
        name: of the structure.
        code, side, region: see :func:`label_of_code`; "" for no code.
        category: code of the segmented property category, or "".
    """
    for label in (label_of_code(code, side, region), label_of_name(name)):
        if label is None or not _is_of_side(label, side):
            continue
        if category != ABNORMAL or CODES[label].category == ABNORMAL:
            return label
    return None


def side_of_codes(values: Iterable[str]) -> str:
    """The side that SNOMED CT codes of modifiers say: "left", "right", :data:`BOTH`, or "" where none says one."""
    values = set(values)
    sides = [side for side, (code, _) in SIDES.items() if code in values or BILATERAL in values]
    return BOTH if len(sides) > 1 else "".join(sides)


def _names() -> dict[tuple[str, str], int]:
    names = {name_and_side(entry.name): label for label, entry in VOCABULARY.items()}
    names |= {
        name_and_side(entry.totalsegmentator): label for label, entry in VOCABULARY.items() if entry.totalsegmentator
    }
    # roi_names.json: further names, among them those of AAPM TG-263; one of a paired organ stands for both sides.
    for name, meaning in json.loads(Path(__file__).with_name("roi_names.json").read_text()).items():
        rest, side = name_and_side(name)
        target, target_side = name_and_side(meaning)
        for one in ("left", "right", ""):
            if (target, target_side or one) in names:
                names.setdefault((rest, side or one), names[target, target_side or one])
    return names


_BY_NAME = _names()


def label_of_name(name: str) -> int | None:
    """The label that the name of an ROI or segment stands for, None where it is none that is known.

    "~Liver" is a part of the liver (AAPM TG-263 section 8), which is none.
    """
    return None if name.lstrip().startswith("~") else _BY_NAME.get(name_and_side(name))


def read_roi_table(path: str | os.PathLike) -> dict[str, int]:
    """The user's own names: a JSON object, ROI or segment name -> name or id in the vocabulary, 0 to drop it.

    Raises:
        InputError: no such file, no such JSON, or a label that is not in the vocabulary.
    """
    path = expanded(path)
    form = 'give a JSON file such as {"Lung_L": "left lung lower lobe", "PTV": 0}'
    try:
        entries = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"table of ROI names {path} cannot be read as JSON ({error}); {form}") from error
    if not isinstance(entries, Mapping):
        raise InputError(f"table of ROI names {path} holds no JSON object; {form}")
    return {name: label_target(path, meaning) for name, meaning in entries.items()}
