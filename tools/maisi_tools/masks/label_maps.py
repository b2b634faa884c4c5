"""How the labels of a file are read: from its numbering to MAISI's vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import ALLOWED, VOCABULARY, label_id

# TotalSegmentator numbers its v2 `total` task from 1 in this order (its class map): sides alternate in no fixed order.
_TOTALSEGMENTATOR = (
    "spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left "
    "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right "
    "esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left "
    "kidney_cyst_right sacrum vertebrae_S1 vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 "
    "vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 "
    "vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1 vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 "
    "vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein brachiocephalic_trunk subclavian_artery_right "
    "subclavian_artery_left common_carotid_artery_right common_carotid_artery_left brachiocephalic_vein_left "
    "brachiocephalic_vein_right atrial_appendage_left superior_vena_cava inferior_vena_cava "
    "portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right humerus_left "
    "humerus_right scapula_left scapula_right clavicula_left clavicula_right femur_left femur_right hip_left hip_right "
    "spinal_cord gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right "
    "gluteus_minimus_left gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right brain "
    "skull rib_left_1 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8 rib_left_9 "
    "rib_left_10 rib_left_11 rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6 "
    "rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11 rib_right_12 sternum costal_cartilages"
).split()

OPENKBP = {
    1: "placeholder 2",  # brainstem
    2: "spinal cord",
    3: "esophagus",
    4: "placeholder 16",  # larynx
    5: "skull",  # mandible; the released vocabulary counts it as skull
    6: "placeholder 18",  # left parotid gland
    7: "placeholder 20",  # right parotid gland
}
"""OpenKBP's structures (Babier et al. 2021), numbered as in its releases as NIfTI masks -> name in the vocabulary.

The vocabulary has no brainstem, larynx and parotid glands; they take placeholder ids. These are part of what the small
weights were trained with, and the phantoms of :mod:`maisi_tools.masks.phantom` use the same."""

LABEL_MAPS: dict[str, dict[int, int]] = {
    "maisi": {label: label for label in VOCABULARY},
    "totalsegmentator": {number: label_id(name) for number, name in enumerate(_TOTALSEGMENTATOR, start=1)},
    "openkbp": {number: label_id(name) for number, name in OPENKBP.items()},
}
"""The label maps that have a name: label in the file -> id in the vocabulary."""

JSON_HELP = (
    'name one of maisi, totalsegmentator, openkbp, or give a JSON file such as {"1": "liver", "2": 200}: label in '
    "the file -> name or id in MAISI's vocabulary or name in TotalSegmentator, 0 to drop a label"
)

LARGEST_LABEL = 65535
"""Labels above it are no plausible class numbers, and the lookup table of a mask is that long."""


def read_label_map(label_map: str | os.PathLike) -> dict[int, int]:
    """How to read a file's labels: label in the file -> id in the vocabulary (0 for what is to be dropped).

    Args:
        label_map: a name in :data:`LABEL_MAPS`, or the path of a JSON object. Its entries are file label -> name or id
            (``{"5": "liver"}``, names of the vocabulary or of TotalSegmentator), or name -> file label
            (``{"liver": 5}``).

    Raises:
        InputError: neither a name nor a file, or a JSON that is no label map; the message names the entry.
    """
    if str(label_map) in LABEL_MAPS:
        return dict(LABEL_MAPS[str(label_map)])
    path = Path(label_map).expanduser()
    if not path.is_file():
        raise InputError(f"label_map {str(label_map)!r} is neither a known name nor a file; {JSON_HELP}")
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"label map {path} cannot be read as JSON ({error}); {JSON_HELP}") from error
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"label map {path} holds {_shown(entries)} instead of an object with entries; {JSON_HELP}")

    mapping: dict[int, int] = {}
    for key, value in entries.items():
        number, meaning = (key, value) if _is_number(key) else (value, key)
        if not _is_number(number) or not 0 <= int(number) <= LARGEST_LABEL:
            raise InputError(f"label map {path}: the entry {_shown({key: value})} names no label number; {JSON_HELP}")
        target = label_target(path, meaning)
        if mapping.setdefault(int(number), target) != target:
            raise InputError(f"label map {path} gives label {int(number)} two meanings; keep one entry for it")
    return mapping


def apply_label_map(mask: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """Translate a mask's labels into the vocabulary.

    Args:
        mask: label values, any shape, integers or whole floating-point numbers; 0 is the background.
        mapping: label in the file -> id in the vocabulary, see :func:`read_label_map`.

    Returns:
        uint8 array of the same shape.

    Raises:
        InputError: values that are no whole number, labels that `mapping` does not have (all are listed, with their
            numbers of voxels), or a mask without any label.
    """
    values = np.asarray(mask)
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.isfinite(values) & (values == np.rint(values))
        if not whole.all():
            some = ", ".join(f"{value:g}" for value in np.unique(values[~whole])[:5])
            raise InputError(
                f"{np.count_nonzero(~whole)} voxels of the mask are no whole number, for instance {some}; allowed are "
                "label values: resample the mask with nearest neighbour, and give no probability map"
            )
    table = np.full(max([*mapping, 0]) + 1, -1, dtype=np.int16)
    for number, label in mapping.items():
        table[number] = label
    table[0] = 0

    outside = (values < 0) | (values >= len(table))
    labels = table[np.where(outside, 0, values).astype(np.int32, copy=False)]
    labels[outside] = -1
    if (labels < 0).any():
        wrong, counts = np.unique(values[labels < 0], return_counts=True)
        found = ", ".join(f"{int(label)} ({count} voxels)" for label, count in zip(wrong, counts, strict=True))
        raise InputError(
            f"the mask has labels that this label map does not know: {found}; allowed are 0 (background) and "
            f"{_ranges(sorted(mapping))}: {JSON_HELP}"
        )
    if not labels.any():
        given = "every voxel is 0" if not values.any() else "the label map drops every label it has"
        raise InputError(f"the mask is empty: {given}; allowed is a mask with at least one label: give another file")
    return labels.astype(np.uint8)


class ReadLabelsd(MapTransform):
    """MONAI dict transform: masks (1, X, Y, Z) in a file's numbering -> uint8 masks in the vocabulary, same affine.

    Args:
        keys: of the masks, `MetaTensor` or array.
        label_map: see :func:`read_label_map`; a bad one is refused here, before the first mask is read.

    Raises:
        InputError: see :func:`apply_label_map`; the message begins with the mask's file.
    """

    def __init__(self, keys: KeysCollection, label_map: str | os.PathLike) -> None:
        super().__init__(keys)
        self.mapping = read_label_map(label_map)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            mask = MetaTensor(items[key]) if not isinstance(items[key], MetaTensor) else items[key]
            try:
                labels = apply_label_map(mask.as_tensor().cpu().numpy(), self.mapping)
            except InputError as error:
                raise InputError(f"{mask.meta.get('filename_or_obj', key)}: {error}") from None
            items[key] = MetaTensor(
                torch.from_numpy(labels).to(mask.device), meta=mask.meta, applied_operations=mask.applied_operations
            )
        return items


def label_target(path: Path, meaning: Any) -> int:
    """The id for a name or an id in the JSON file `path`; 0 for "background".

    Raises:
        InputError: there is no such label; the message names the file.
    """
    if _is_number(meaning):
        if int(meaning) == 0 or int(meaning) in VOCABULARY:
            return int(meaning)
        raise InputError(f"label map {path}: {int(meaning)} is not in the vocabulary; {ALLOWED}")
    if not isinstance(meaning, str):
        raise InputError(f"label map {path}: {_shown(meaning)} is neither a name nor an id; {JSON_HELP}")
    try:
        return 0 if meaning.strip().casefold() == "background" else label_id(meaning)
    except InputError as error:
        raise InputError(f"label map {path}: {error}") from None


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1..3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
