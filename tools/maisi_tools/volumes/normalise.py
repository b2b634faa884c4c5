"""Intensities as MAISI's networks see them, in [0, 1], whatever the modality."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, ScaleIntensityRange, ScaleIntensityRanged
from monai.transforms.utils_pytorch_numpy_unification import percentile

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import check_ct_intensities

HU_RANGE = (-1000.0, 1000.0)
"""The window in HU that the networks see, and that figures of CTs are computed in (paper section 3.1)."""

MR_PERCENTILES = (0.0, 99.5)
"""An MR has no unit: these percentiles of each volume become 0 and 1 (paper section 3.1)."""

MR_RANGE = (0.0, 1000.0)
"""What 0 and 1 become in a generated MR (NV-Generate-CTMR)."""

INTENSITY = "intensity"
"""Entry of a volume's ``meta``, and of a latent's sidecar: the values [lowest, highest] that 0 and 1 stand for."""


def intensity_of(volume: Any) -> tuple[float, float]:
    """The values that 0 and 1 of a volume, or of what a latent decodes to, stand for; without record those of HU."""
    meta = volume.meta
    found = meta.get(INTENSITY, meta.get("sidecar", {}).get(INTENSITY))
    return HU_RANGE if found is None else (float(found[0]), float(found[1]))


def window_of(scale: Any) -> list[float]:
    """What a config's scaling of intensities depends on, as latents record it.

    Raises:
        InputError: a CT's window is another than :data:`HU_RANGE`, the one that all who decode know.
    """
    if isinstance(scale, ScaleMRd):
        return list(MR_PERCENTILES)
    scaler = scale.scaler
    return checked_window([scaler.a_min, scaler.a_max, scaler.b_min, scaler.b_max], "scale")


def checked_window(window: Sequence[float], name: str) -> list[float]:
    """The window that a CT was or is to be encoded with: the HU that become two values.

    Raises:
        InputError: it is not that of all networks, see :func:`window_of`.
    """
    if list(window) != [*HU_RANGE, 0, 1]:
        raise InputError(
            f"{name} makes {window[0]:g} to {window[1]:g} HU {window[2]:g} to {window[3]:g}; allowed is "
            f"{HU_RANGE[0]:g} to {HU_RANGE[1]:g} HU to 0 to 1, as all that decodes latents takes them: leave `scale` "
            "as it is, and encode CTs of another window again"
        )
    return list(window)


class ScaleMRd(MapTransform):
    """Maps an MR's :data:`MR_PERCENTILES` to [0, 1], clipped, and keeps their values in ``meta["intensity"]``.

    Args:
        keys: volumes (1, X, Y, Z), `MetaTensor`.

    Raises:
        InputError: the percentiles are one value, so that there is nothing to see.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            scaled, limits = _scaled_mr(items[key], key)
            scaled.meta[INTENSITY] = torch.tensor(limits, dtype=torch.float64)
            items[key] = scaled
        return items


def _scaled_mr(volume: Any, key: Hashable) -> tuple[Any, tuple[float, float]]:
    """An MR's :data:`MR_PERCENTILES` mapped to [0, 1], clipped, and their values.

    Raises:
        InputError: they are one value.
    """
    low, high = (float(percentile(volume.as_tensor(), q)) for q in MR_PERCENTILES)
    if low == high:
        name = volume.meta.get("filename_or_obj", key)
        raise InputError(
            f"{name} has the value {low:g} in more than {MR_PERCENTILES[1]:g} % of its voxels; allowed is an MR of a "
            "body: crop the air away"
        )
    return ScaleIntensityRange(a_min=low, a_max=high, b_min=0, b_max=1, clip=True)(volume), (low, high)


def restore_intensity(volume: Any, low: float, high: float) -> Any:
    """Map [0, 1] to [low, high]; a CT is clipped to :data:`HU_RANGE`, an MR, which has no upper end, below only."""
    is_ct = (low, high) == HU_RANGE
    restored: Any = ScaleIntensityRange(a_min=0, a_max=1, b_min=low, b_max=high, clip=is_ct)(volume)
    return restored if is_ct else restored.clamp(min=low)


class RestoreIntensityd(MapTransform):
    """Undoes the scaling to [0, 1] by :func:`restore_intensity`.

    Args:
        keys: volumes (1, X, Y, Z) that a network made, or that went into it.
        reference_key: of the image, noise or latent they were made from, see :func:`intensity_of`.
    """

    def __init__(self, keys: KeysCollection, reference_key: str) -> None:
        super().__init__(keys)
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items, limits = dict(data), intensity_of(data[self.reference_key])
        return {**items, **{key: restore_intensity(items[key], *limits) for key in self.key_iterator(items)}}


class FromHUd(ScaleIntensityRanged):
    """Maps a CT in HU to [0, 1], clipped to :data:`HU_RANGE`."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, *HU_RANGE, b_min=0, b_max=1, clip=True)


class ToHUd(ScaleIntensityRanged):
    """Maps what a network makes of a CT, [0, 1], to HU, clipped to :data:`HU_RANGE`."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, 0, 1, *HU_RANGE, clip=True)


class NormaliseByModalityd(MapTransform):
    """Maps a volume's intensities to [0, 1] as its item's modality asks (paper section 3.1), clipped.

    CT ("ct", "ct_contrast", ...): :data:`HU_RANGE`. MR ("mri", "mri_t1", ...): by
    :data:`MR_PERCENTILES`. An item without modality is a CT.

    Args:
        keys: volumes (1, D, H, W), read without a check of their intensities; CTs are checked here.
        modality_key: of the item, as a datalist gives it.

    Raises:
        InputError: another modality, a CT whose values cannot be HU, or an MR of one value.
    """

    def __init__(self, keys: KeysCollection, modality_key: str = "modality") -> None:
        super().__init__(keys)
        self.modality_key = modality_key
        self.ct = ScaleIntensityRange(a_min=HU_RANGE[0], a_max=HU_RANGE[1], b_min=0, b_max=1, clip=True)

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
            if kind == "mr":
                items[key], _ = _scaled_mr(items[key], key)
                continue
            check_ct_intensities(np.asarray(items[key]), name)
            items[key] = self.ct(items[key])
        return items
