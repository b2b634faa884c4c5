"""MAISI's label vocabulary: one table, and the questions the rest of the package asks it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from maisi_tools.errors import InputError

Array = TypeVar("Array", np.ndarray, torch.Tensor)

BODY = 200
"""Label of every voxel inside the skin that no other label covers."""

GROUPS = (
    "airway",
    "body",
    "bone",
    "bowel",
    "brain",
    "cartilage",
    "gland",
    "heart",
    "lung",
    "muscle",
    "nerve",
    "organ",
    "placeholder",
    "tumor",
    "vessel",
)
"""What a label is made of, coarsely. "bowel" is all that may hold gas, from the esophagus on; "tumor" includes lesions;
a "placeholder" is an id that the released vocabulary leaves free for a new class."""


OTHER_SIDE = {"left": "right", "right": "left"}
"""The sides of a patient, each with the opposite one."""

BOTH = "both"
"""In place of a side: no label of a paired organ has it."""

_SIDE_WORDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("l", "lt", "left"), ("left",)),
    **dict.fromkeys(("r", "rt", "right"), ("right",)),
    **dict.fromkeys(("lr", "rl", "bilat", "bilateral", "both"), ("left", "right")),
}


@dataclass(frozen=True)
class Label:
    """One class of the vocabulary.

    Attributes:
        id: the value of its voxels in a mask.
        name: as in the MAISI release; free ids are called "placeholder ID".
        group: one of :data:`GROUPS`.
        side: "left" or "right" of the patient for one of a pair, else None.
        totalsegmentator: its class in TotalSegmentator's v2 `total` task, None where that has none.
        hu_range: plausible (lowest, highest) median HU, None where no figure is published.
    """

    id: int
    name: str
    group: str
    side: str | None
    totalsegmentator: str | None
    hu_range: tuple[float, float] | None


# id, name, group, class of TotalSegmentator. Ids and names: label dictionary of the MAISI release (arXiv 2409.11169).
_TABLE: tuple[tuple[int, str, str, str | None], ...] = (
    (1, "liver", "organ", "liver"),
    (2, "placeholder 2", "placeholder", None),
    (3, "spleen", "organ", "spleen"),
    (4, "pancreas", "organ", "pancreas"),
    (5, "right kidney", "organ", "kidney_right"),
    (6, "aorta", "vessel", "aorta"),
    (7, "inferior vena cava", "vessel", "inferior_vena_cava"),
    (8, "right adrenal gland", "gland", "adrenal_gland_right"),
    (9, "left adrenal gland", "gland", "adrenal_gland_left"),
    (10, "gallbladder", "organ", "gallbladder"),
    (11, "esophagus", "bowel", "esophagus"),
    (12, "stomach", "bowel", "stomach"),
    (13, "duodenum", "bowel", "duodenum"),
    (14, "left kidney", "organ", "kidney_left"),
    (15, "bladder", "organ", "urinary_bladder"),
    (16, "placeholder 16", "placeholder", None),
    (17, "portal vein and splenic vein", "vessel", "portal_vein_and_splenic_vein"),
    (18, "placeholder 18", "placeholder", None),
    (19, "small bowel", "bowel", "small_bowel"),
    (20, "placeholder 20", "placeholder", None),
    (21, "placeholder 21", "placeholder", None),
    (22, "brain", "brain", "brain"),
    (23, "lung tumor", "tumor", None),
    (24, "pancreatic tumor", "tumor", None),
    (25, "hepatic vessel", "vessel", None),
    (26, "hepatic tumor", "tumor", None),
    (27, "colon cancer primaries", "tumor", None),
    (28, "left lung upper lobe", "lung", "lung_upper_lobe_left"),
    (29, "left lung lower lobe", "lung", "lung_lower_lobe_left"),
    (30, "right lung upper lobe", "lung", "lung_upper_lobe_right"),
    (31, "right lung middle lobe", "lung", "lung_middle_lobe_right"),
    (32, "right lung lower lobe", "lung", "lung_lower_lobe_right"),
    (33, "vertebrae L5", "bone", "vertebrae_L5"),
    (34, "vertebrae L4", "bone", "vertebrae_L4"),
    (35, "vertebrae L3", "bone", "vertebrae_L3"),
    (36, "vertebrae L2", "bone", "vertebrae_L2"),
    (37, "vertebrae L1", "bone", "vertebrae_L1"),
    (38, "vertebrae T12", "bone", "vertebrae_T12"),
    (39, "vertebrae T11", "bone", "vertebrae_T11"),
    (40, "vertebrae T10", "bone", "vertebrae_T10"),
    (41, "vertebrae T9", "bone", "vertebrae_T9"),
    (42, "vertebrae T8", "bone", "vertebrae_T8"),
    (43, "vertebrae T7", "bone", "vertebrae_T7"),
    (44, "vertebrae T6", "bone", "vertebrae_T6"),
    (45, "vertebrae T5", "bone", "vertebrae_T5"),
    (46, "vertebrae T4", "bone", "vertebrae_T4"),
    (47, "vertebrae T3", "bone", "vertebrae_T3"),
    (48, "vertebrae T2", "bone", "vertebrae_T2"),
    (49, "vertebrae T1", "bone", "vertebrae_T1"),
    (50, "vertebrae C7", "bone", "vertebrae_C7"),
    (51, "vertebrae C6", "bone", "vertebrae_C6"),
    (52, "vertebrae C5", "bone", "vertebrae_C5"),
    (53, "vertebrae C4", "bone", "vertebrae_C4"),
    (54, "vertebrae C3", "bone", "vertebrae_C3"),
    (55, "vertebrae C2", "bone", "vertebrae_C2"),
    (56, "vertebrae C1", "bone", "vertebrae_C1"),
    (57, "trachea", "airway", "trachea"),
    (58, "left iliac artery", "vessel", "iliac_artery_left"),
    (59, "right iliac artery", "vessel", "iliac_artery_right"),
    (60, "left iliac vena", "vessel", "iliac_vena_left"),
    (61, "right iliac vena", "vessel", "iliac_vena_right"),
    (62, "colon", "bowel", "colon"),
    (63, "left rib 1", "bone", "rib_left_1"),
    (64, "left rib 2", "bone", "rib_left_2"),
    (65, "left rib 3", "bone", "rib_left_3"),
    (66, "left rib 4", "bone", "rib_left_4"),
    (67, "left rib 5", "bone", "rib_left_5"),
    (68, "left rib 6", "bone", "rib_left_6"),
    (69, "left rib 7", "bone", "rib_left_7"),
    (70, "left rib 8", "bone", "rib_left_8"),
    (71, "left rib 9", "bone", "rib_left_9"),
    (72, "left rib 10", "bone", "rib_left_10"),
    (73, "left rib 11", "bone", "rib_left_11"),
    (74, "left rib 12", "bone", "rib_left_12"),
    (75, "right rib 1", "bone", "rib_right_1"),
    (76, "right rib 2", "bone", "rib_right_2"),
    (77, "right rib 3", "bone", "rib_right_3"),
    (78, "right rib 4", "bone", "rib_right_4"),
    (79, "right rib 5", "bone", "rib_right_5"),
    (80, "right rib 6", "bone", "rib_right_6"),
    (81, "right rib 7", "bone", "rib_right_7"),
    (82, "right rib 8", "bone", "rib_right_8"),
    (83, "right rib 9", "bone", "rib_right_9"),
    (84, "right rib 10", "bone", "rib_right_10"),
    (85, "right rib 11", "bone", "rib_right_11"),
    (86, "right rib 12", "bone", "rib_right_12"),
    (87, "left humerus", "bone", "humerus_left"),
    (88, "right humerus", "bone", "humerus_right"),
    (89, "left scapula", "bone", "scapula_left"),
    (90, "right scapula", "bone", "scapula_right"),
    (91, "left clavicula", "bone", "clavicula_left"),
    (92, "right clavicula", "bone", "clavicula_right"),
    (93, "left femur", "bone", "femur_left"),
    (94, "right femur", "bone", "femur_right"),
    (95, "left hip", "bone", "hip_left"),
    (96, "right hip", "bone", "hip_right"),
    (97, "sacrum", "bone", "sacrum"),
    (98, "left gluteus maximus", "muscle", "gluteus_maximus_left"),
    (99, "right gluteus maximus", "muscle", "gluteus_maximus_right"),
    (100, "left gluteus medius", "muscle", "gluteus_medius_left"),
    (101, "right gluteus medius", "muscle", "gluteus_medius_right"),
    (102, "left gluteus minimus", "muscle", "gluteus_minimus_left"),
    (103, "right gluteus minimus", "muscle", "gluteus_minimus_right"),
    (104, "left autochthon", "muscle", "autochthon_left"),
    (105, "right autochthon", "muscle", "autochthon_right"),
    (106, "left iliopsoas", "muscle", "iliopsoas_left"),
    (107, "right iliopsoas", "muscle", "iliopsoas_right"),
    (108, "left atrial appendage", "heart", "atrial_appendage_left"),
    (109, "brachiocephalic trunk", "vessel", "brachiocephalic_trunk"),
    (110, "left brachiocephalic vein", "vessel", "brachiocephalic_vein_left"),
    (111, "right brachiocephalic vein", "vessel", "brachiocephalic_vein_right"),
    (112, "left common carotid artery", "vessel", "common_carotid_artery_left"),
    (113, "right common carotid artery", "vessel", "common_carotid_artery_right"),
    (114, "costal cartilages", "cartilage", "costal_cartilages"),
    (115, "heart", "heart", "heart"),
    (116, "left kidney cyst", "organ", "kidney_cyst_left"),
    (117, "right kidney cyst", "organ", "kidney_cyst_right"),
    (118, "prostate", "gland", "prostate"),
    (119, "pulmonary vein", "vessel", "pulmonary_vein"),
    (120, "skull", "bone", "skull"),
    (121, "spinal cord", "nerve", "spinal_cord"),
    (122, "sternum", "bone", "sternum"),
    (123, "left subclavian artery", "vessel", "subclavian_artery_left"),
    (124, "right subclavian artery", "vessel", "subclavian_artery_right"),
    (125, "superior vena cava", "vessel", "superior_vena_cava"),
    (126, "thyroid gland", "gland", "thyroid_gland"),
    (127, "vertebrae S1", "bone", "vertebrae_S1"),
    (128, "bone lesion", "tumor", None),
    (129, "placeholder 129", "placeholder", None),
    (130, "placeholder 130", "placeholder", None),
    (131, "placeholder 131", "placeholder", None),
    (132, "airway", "airway", None),
    (200, "body", "body", None),
)

# Limits of the quality check of the MAISI release: for every structure the wider of mean +- 6 standard deviations and
# the 0.5-99.5 percentiles of medians over real CTs, rounded; for bone 1000 HU as the upper one. Source:
# Project-MONAI/tutorials, generation/maisi/configs/image_median_statistics.json and scripts/quality_check.py. Both
# kidneys, all lobes of the lung and all bones are pooled there. Of other labels no figure is published.
_HU_RANGES: dict[str, tuple[float, float]] = {
    "liver": (-22.0, 162.0),
    "spleen": (-43.0, 184.0),
    "pancreas": (-57.0, 150.0),
    "left kidney": (-131.0, 267.0),
    "right kidney": (-131.0, 267.0),
    "brain": (-305.0, 370.0),
}
_HU_RANGES_OF_GROUPS: dict[str, tuple[float, float]] = {"lung": (-1089.0, -367.0), "bone": (71.0, 1000.0)}


def _side(name: str) -> str | None:
    # The left atrial appendage is a part of the heart's left side and has no twin.
    first = name.split()[0]
    return first if first in OTHER_SIDE and name != "left atrial appendage" else None


VOCABULARY: dict[int, Label] = {
    id: Label(id, name, group, _side(name), totalsegmentator, _HU_RANGES.get(name, _HU_RANGES_OF_GROUPS.get(group)))
    for id, name, group, totalsegmentator in _TABLE
}
"""The whole vocabulary: ids 1..132 and :data:`BODY`; 0, the background, is no entry."""

REGIONS: dict[str, tuple[str, ...]] = {
    "head": ("brain", "skull"),
    "chest": tuple(label.name for label in VOCABULARY.values() if label.group == "lung"),
    "abdomen": ("liver", "spleen", "pancreas", "right kidney", "left kidney"),
    "lower": ("left femur", "right femur"),
}
"""Body regions from top to bottom, each with the labels that show it is in view (as in the MAISI release)."""

_BELOW_THE_CHEST = (
    *(*REGIONS["abdomen"], *REGIONS["lower"]),
    *("gallbladder", "stomach", "duodenum", "small bowel", "colon", "bladder", "prostate"),
    *("left adrenal gland", "right adrenal gland", "portal vein and splenic vein", "sacrum", "left hip", "right hip"),
    *("hepatic tumor", "pancreatic tumor", "colon cancer primaries", "left kidney cyst", "right kidney cyst"),
    *(f"vertebrae L{n}" for n in range(1, 6)),
)

HOSTS: dict[str, tuple[str, ...]] = {
    "lung tumor": REGIONS["chest"],
    "pancreatic tumor": ("pancreas",),
    "hepatic tumor": ("liver",),
    "colon cancer primaries": ("colon",),
    "bone lesion": tuple(label.name for label in VOCABULARY.values() if label.group == "bone"),
    "left kidney cyst": ("left kidney",),
    "right kidney cyst": ("right kidney",),
}
"""Lesions, each with the organs it grows in: the five tumors that MAISI draws (arXiv 2409.11169), and cysts."""

IDS = f"MAISI's ids {min(VOCABULARY)}..132 and {BODY} (body)"
ALLOWED = f"allowed are 0 (background) and {IDS}"

PLACEHOLDER_NAMES = {2: "brainstem", 16: "larynx", 18: "left parotid gland", 20: "right parotid gland"}
"""What the shipped weights, the label map "openkbp" and the phantoms use placeholder ids for: id -> its name here."""

_BY_NAME = {label.name.casefold(): label.id for label in VOCABULARY.values()}
_BY_NAME |= {label.totalsegmentator.casefold(): label.id for label in VOCABULARY.values() if label.totalsegmentator}
_BY_NAME |= {name: id for id, name in PLACEHOLDER_NAMES.items()}
_BY_NAME |= {name.removesuffix(" gland"): id for id, name in PLACEHOLDER_NAMES.items()}  # "left parotid"


def label_id(name: str) -> int:
    """The id of a label, by its name in the vocabulary, in TotalSegmentator, or by what a placeholder is used for.

    Case does not matter.

    Raises:
        InputError: there is no such name; the message lists the nearest ones.
    """
    try:
        return _BY_NAME[name.strip().casefold()]
    except KeyError:
        near = difflib.get_close_matches(name.strip().casefold(), _BY_NAME, n=3, cutoff=0.5)
        raise InputError(
            f"{name!r} is no label; allowed are the names of MAISI's vocabulary and of TotalSegmentator's total task"
            + (f": did you mean {' or '.join(near)}?" if near else ", as in maisi_tools.masks.vocabulary")
        ) from None


def label_of(given: int | str, background: bool = True) -> int:
    """The id of a label that a setting names: by the id, which as a key of JSON is text, or by the name.

    Args:
        given: id, or name of a label or of what a placeholder stands for.
        background: whether 0 is one.

    Raises:
        InputError: no such id, or no such name (:func:`label_id`).
    """
    text = str(given)
    if not text.isdecimal():
        return label_id(text)
    if int(text) not in VOCABULARY and not (background and int(text) == 0):
        raise InputError(f"{given!r} is no label; {ALLOWED if background else f'allowed are {IDS}'}, and their names")
    return int(text)


def display_name(label: int) -> str:
    """What a reader sees: the vocabulary's name, or for a placeholder id what it is used for."""
    return PLACEHOLDER_NAMES.get(label, VOCABULARY[label].name)


def hosts_of(lesion: int) -> tuple[int, ...]:
    """The ids of the organs that a lesion lies in.

    Raises:
        InputError: the label is no lesion of :data:`HOSTS`.
    """
    name = VOCABULARY[lesion].name if lesion in VOCABULARY else str(lesion)
    if name not in HOSTS:
        raise InputError(f"label {lesion} ({name}) is no lesion; allowed are {', '.join(HOSTS)}")
    return tuple(label_id(host) for host in HOSTS[name])


_WORDS = re.compile(r"[^\W\d_]*[^\W\d_A-Za-z][^\W\d_]*|[A-Z]?[a-z]+\d*|[A-Z]+\d*|\d+")
"""Words in a name; one with letters beyond ASCII is whole, so that a name says no less without its script."""


def name_and_side(name: str) -> tuple[str, str]:
    """A name without regard to case, separators and place of the side: ("kidney", "left") for "Kidney_L".

    The side is "left", "right", :data:`BOTH` ("Kidney L+R") or "".
    """
    words = [word.casefold() for word in _WORDS.findall(name)]
    sides = {side for word in words for side in _SIDE_WORDS.get(word, ())}
    side = BOTH if len(sides) > 1 else next(iter(sides), "")
    return "".join(word for word in words if word not in _SIDE_WORDS), side


def labels_in_group(group: str) -> tuple[int, ...]:
    """The ids of a group's labels, ascending.

    Raises:
        InputError: `group` is not in :data:`GROUPS`.
    """
    if group not in GROUPS:
        raise InputError(f"{group!r} is no group of labels; allowed are {', '.join(GROUPS)}")
    return tuple(label.id for label in VOCABULARY.values() if label.group == group)


def region_of(labels: Iterable[int]) -> tuple[str, ...]:
    """The body regions that a mask with these `labels` shows, from top to bottom; none where no label tells one.

    What lies between two regions is in view with them. The skull tells the head only where nothing below the chest is
    seen: its id also stands for bone that was found by its intensity, or merged.
    """
    present = {int(label) for label in labels}
    if present & {label_id(name) for name in _BELOW_THE_CHEST}:
        present.discard(label_id("skull"))
    seen = [n for n, names in enumerate(REGIONS.values()) if present & {label_id(name) for name in names}]
    return tuple(REGIONS)[seen[0] : seen[-1] + 1] if seen else ()


def region_in(mask: torch.Tensor) -> tuple[str, ...]:
    """:func:`region_of` the labels in a mask: whole numbers from 0 on, of any shape and type."""
    # Counting takes a fifteenth of the time that sorting does, `unique`: seconds for each sample of 512^3 voxels.
    return region_of(torch.bincount(mask.flatten().int()).nonzero().flatten().tolist())


def checked_regions(region: str | Iterable[str] | None) -> tuple[str, ...]:
    """Body regions as a file or a user gives them, one as text or several, from top to bottom.

    Raises:
        InputError: one that is not known, or what is neither.
    """
    if not isinstance(region, Iterable | None):
        raise InputError(f"region is {region!r}; allowed are {', '.join(REGIONS)}, one or a list of them")
    names = [region] if isinstance(region, str) else list(region or ())
    if unknown := [name for name in names if name not in REGIONS]:
        raise InputError(f"region {', '.join(map(repr, unknown))} is not known; allowed are {', '.join(REGIONS)}")
    return tuple(name for name in REGIONS if name in names)


def merge_labels(mask: Array, keep: Iterable[int], merge: Mapping[str, int]) -> Array:
    """Reduce a mask to the labels that weights trained on fewer classes know.

    Args:
        mask: label values of any shape, array or tensor (also floating point).
        keep: labels that stay.
        merge: group -> label that stands for the group's other labels; what is in neither becomes :data:`BODY`.

    Returns:
        Same type, shape and dtype; 0 stays 0.

    Raises:
        InputError: `keep`, `merge` or the mask has a label that is not in the vocabulary.
    """
    keep, targets = set(keep), set(merge.values())
    if unknown := sorted((keep | targets) - VOCABULARY.keys(), key=str):
        raise InputError(f"labels {unknown} to keep or to merge into are not in the vocabulary; {ALLOWED}")
    table = np.full(BODY + 1, -1)
    table[0] = 0
    table[list(VOCABULARY)] = BODY
    for group, target in merge.items():
        table[list(labels_in_group(group))] = target
    table[list(keep)] = list(keep)

    values = torch.as_tensor(mask).as_subclass(torch.Tensor).long()
    merged = torch.from_numpy(table).to(values.device)[values.clamp(0, BODY)]
    wrong = (merged < 0) | (values < 0) | (values > BODY)
    if wrong.any():
        raise InputError(f"the mask has the labels {values[wrong].unique().tolist()}; {ALLOWED}")
    return convert_to_dst_type(merged, dst=mask)[0]


class MergeLabelsd(MapTransform):
    """MONAI dict transform of :func:`merge_labels`; ``keep`` None leaves the masks as they are."""

    def __init__(
        self, keys: KeysCollection, keep: Sequence[int] | None, merge: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(keys)
        self.keep, self.merge = keep, merge or {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.keep is None:
            return dict(data)
        return {**data, **{key: merge_labels(data[key], self.keep, self.merge) for key in self.key_iterator(data)}}
