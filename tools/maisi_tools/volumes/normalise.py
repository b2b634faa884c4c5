"""Intensities as MAISI's networks see them, in [0, 1], whatever the modality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange, ScaleIntensityRangePercentiles

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import check_ct_intensities

HU_RANGE = (-1000.0, 1000.0)
"""The window in HU that the networks see, and that figures of CTs are computed in (paper section 3.1)."""


class NormaliseByModalityd(MapTransform):
    """Maps a volume's intensities to [0, 1] as its item's modality asks (paper section 3.1), clipped.

    CT ("ct", "ct_contrast", ...): :data:`HU_RANGE`. MR ("mri", "mri_t1", ...): from the lowest value to the 99.5th
    percentile, because MR has no unit. An item without modality is a CT.

    Args:
        keys: volumes (1, D, H, W), read without a check of their intensities; CTs are checked here.
        modality_key: of the item, as a datalist gives it.

    Raises:
        InputError: another modality, or a CT whose values cannot be HU.
    """

    def __init__(self, keys: KeysCollection, modality_key: str = "modality") -> None:
        super().__init__(keys)
        self.modality_key = modality_key
        self.ct = ScaleIntensityRange(a_min=HU_RANGE[0], a_max=HU_RANGE[1], b_min=0, b_max=1, clip=True)
        self.mr = ScaleIntensityRangePercentiles(lower=0, upper=99.5, b_min=0, b_max=1, clip=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        modality = items.get(self.modality_key, "ct")
        kind = str(modality).lower()[:2]
        for key in self.key_iterator(items):
            name = str(items[key].meta.get("filename_or_obj"))
            if kind not in ("ct", "mr"):
                raise InputError(
                    f"{name} has the modality {modality!r} in its datalist; allowed are 'ct' and 'mri', or names that "
                    "begin so: correct the datalist"
                )
            if kind == "ct":
                check_ct_intensities(np.asarray(items[key]), name)
            items[key] = (self.ct if kind == "ct" else self.mr)(items[key])
        return items
