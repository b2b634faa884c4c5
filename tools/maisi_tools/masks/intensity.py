"""Does a generated CT have, inside each kind of tissue, the Hounsfield units of that tissue?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import VOCABULARY, display_name, label_of, labels_in_group
from maisi_tools.settings import is_range

NOT_SOFT = ("bone", "airway", "lung", "cartilage", "bowel")
"""Groups whose voxels are not soft tissue: bowel holds gas, cartilage calcifies."""


LEAST_VOXELS = 64
"""Organs with fewer voxels are not checked: partial volume decides their median."""


def tissue_intensities(ct: np.ndarray, labels: np.ndarray, unit: str = "hu") -> dict[str, float]:
    """Mean inside bone, airway, lung, soft tissue (organs, muscle, unlabelled body), and outside the body.

    Args:
        ct: (D, H, W) in HU, or an MR.
        labels: (D, H, W) in the MAISI vocabulary, with the body label.
        unit: that the names of the figures begin with.

    Returns:
        ``hu_bone``, ``hu_airway``, ``hu_lung``, ``hu_soft_tissue``, ``hu_outside``; a tissue without voxels is left
        out.
    """
    excluded = {label for group in NOT_SOFT for label in labels_in_group(group)}
    tissues = {
        "bone": labels_in_group("bone"),
        "airway": labels_in_group("airway"),
        "lung": labels_in_group("lung"),
        "soft_tissue": tuple(label for label in VOCABULARY if label not in excluded),
        "outside": (0,),
    }
    means = {name: ct[np.isin(labels, members)] for name, members in tissues.items()}
    return {f"{unit}_{name}": round(float(values.mean()), 2) for name, values in means.items() if values.size}


class TissueIntensitiesd(MapTransform):
    """Adds :func:`tissue_intensities` of a volume (1, D, H, W) as ``data[output_key]``."""

    def __init__(self, keys: str, mask_key: str, output_key: str = "metrics", unit: str = "hu") -> None:
        super().__init__(keys)
        self.mask_key = mask_key
        self.output_key = output_key
        self.unit = unit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        ct, mask = (np.asarray(data[key][0].cpu()) for key in (self.keys[0], self.mask_key))
        return {**data, self.output_key: tissue_intensities(ct, mask.round().astype(int), self.unit)}


def hu_ranges(changed: Mapping[str | int, Sequence[float] | None] | None = None) -> dict[int, tuple[float, float]]:
    """Plausible (lowest, highest) median HU of each label that has one.

    Args:
        changed: label (name or id) -> another range, for a contrast phase or an organ that has none in the vocabulary;
            None leaves the label unchecked.

    Raises:
        InputError: an unknown label, or a range that is none.
    """
    ranges = {label: entry.hu_range for label, entry in VOCABULARY.items() if entry.hu_range is not None}
    if not isinstance(changed or {}, Mapping):
        raise InputError(f"hu_ranges is {changed!r}; allowed is label -> [lowest, highest]: {{'liver': [-22, 250]}}")
    for name, limits in (changed or {}).items():
        label = label_of(name, background=False)
        if limits is None:
            ranges.pop(label, None)
            continue
        if not is_range(limits):
            raise InputError(f"hu_ranges has {name}: {limits!r}; allowed are [lowest, highest] in HU, or null")
        ranges[label] = (float(limits[0]), float(limits[1]))
    return ranges


def implausible_organs(
    ct: np.ndarray, labels: np.ndarray, ranges: Mapping[int, tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """Organs whose median HU lies outside its range (the quality check of the MAISI release).

    Args:
        ct: (D, H, W) in HU.
        labels: (D, H, W) in the MAISI vocabulary.
        ranges: see :func:`hu_ranges`.

    Returns:
        name -> ``median``, ``lowest``, ``highest``.
    """
    found = {}
    for label in np.unique(labels).tolist():
        if label not in ranges:
            continue
        values = ct[labels == label]
        low, high = ranges[label]
        if values.size >= LEAST_VOXELS and not low <= (median := float(np.median(values))) <= high:
            found[display_name(label)] = {"median": round(median, 1), "lowest": low, "highest": high}
    return found
