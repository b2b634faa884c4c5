"""Does a generated CT have, inside each kind of tissue, the Hounsfield units of that tissue?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.transforms import MapTransform

from maisi_tools.masks.vocabulary import VOCABULARY, labels_in_group

NOT_SOFT = ("bone", "airway", "lung", "cartilage", "bowel")
"""Groups whose voxels are not soft tissue: bowel holds gas, cartilage calcifies."""


def tissue_intensities(ct: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean HU of a CT inside bone, airway, lung, soft tissue (organs, muscle, unlabelled body) and outside the body.

    Args:
        ct: (D, H, W) in HU.
        labels: (D, H, W) in the MAISI vocabulary, with the body label.

    Returns:
        ``hu_bone``, ``hu_airway``, ``hu_lung``, ``hu_soft_tissue``, ``hu_outside``; a tissue without voxels is left
        out.
    """
    excluded = {label for group in NOT_SOFT for label in labels_in_group(group)}
    tissues = {
        "hu_bone": labels_in_group("bone"),
        "hu_airway": labels_in_group("airway"),
        "hu_lung": labels_in_group("lung"),
        "hu_soft_tissue": tuple(label for label in VOCABULARY if label not in excluded),
        "hu_outside": (0,),
    }
    means = {name: ct[np.isin(labels, members)] for name, members in tissues.items()}
    return {name: round(float(values.mean()), 2) for name, values in means.items() if values.size}


class TissueIntensitiesd(MapTransform):
    """Adds :func:`tissue_intensities` of a CT (1, D, H, W) in HU as ``data[output_key]``."""

    def __init__(self, keys: str, mask_key: str, output_key: str = "metrics") -> None:
        super().__init__(keys)
        self.mask_key = mask_key
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        ct, mask = (np.asarray(data[key][0].cpu()) for key in (self.keys[0], self.mask_key))
        return {**data, self.output_key: tissue_intensities(ct, mask.round().astype(int))}
