"""What a generated volume is conditioned on: size, spacing, body region, modality, seed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import REGIONS as INDICATORS
from maisi_tools.masks.vocabulary import checked_regions
from maisi_tools.volumes.checks import (
    LATENT_CHANNELS,
    check_output_size,
    check_spacing,
    three_positive,
    warn_field_of_view,
)
from maisi_tools.volumes.normalise import HU_RANGE, MR_RANGE, ScaleMRd, restore_intensity
from maisi_tools.volumes.presets import warn_far

REGIONS = tuple(INDICATORS)
"""Body regions from top to bottom; "head" is head and neck, "lower" is pelvis and legs (paper section 3.2)."""

MODALITIES = {
    "unknown": 0,
    "ct": 1,
    "ct_wo_contrast": 2,
    "ct_contrast": 3,
    "mri": 8,
    "mri_t1": 9,
    "mri_t2": 10,
    "mri_flair": 11,
    "mri_pd": 12,
    "mri_dwi": 13,
    "mri_adc": 14,
    "mri_ssfp": 15,
    "mri_mra": 16,
    "mri_t1c": 17,
    "mri_swi": 20,
    "mri_t1_skull_stripped": 29,
    "mri_t2_skull_stripped": 30,
    "mri_flair_skull_stripped": 31,
    "mri_swi_skull_stripped": 32,
    "mri_mra_skull_stripped": 33,
}
"""Class codes of the modality table of NV-Generate-CTMR (v2); any code 0..127 is also accepted."""

MR_CODES = range(8, 34)
"""Codes of MR in that table, those without a name included."""


CONDITIONS = ("top_region_index_tensor", "bottom_region_index_tensor", "spacing_tensor", "class_labels")
"""The U-Net's keyword inputs that carry conditions."""

LESIONS = "lesions"
"""For guidance, the lesions of a mask: the unconditional pass sees them replaced by what is around them."""

MASK = "mask"
"""For guidance, the mask as a whole: the unconditional pass is the U-Net without its ControlNet."""


def modality_code(modality: str | int) -> int:
    """The U-Net's class label for a modality name or code.

    Raises:
        InputError: neither a known name nor a code in 0..127.
    """
    if isinstance(modality, str):
        if modality.lower() in MODALITIES:
            return MODALITIES[modality.lower()]
    elif isinstance(modality, Integral) and not isinstance(modality, bool) and 0 <= modality < 128:
        return int(modality)
    raise InputError(f"modality is {modality!r}; allowed are {', '.join(MODALITIES)} or a class code 0..127")


def is_mr(modality: str | int) -> bool:
    """Whether a modality name or code is one of MR.

    Raises:
        InputError: see :func:`modality_code`.
    """
    return modality_code(modality) in MR_CODES


SCALED = {"mr": "mr.json scales MR", "ct": "without mr.json HU are scaled"}
"""For messages: what the VAE's configs take."""


def modality_of(item: Mapping[str, Any], modality: str | int) -> str | int:
    """The modality that an item of a datalist has of its own, as :data:`MODALITIES` calls it, or else the run's.

    Args:
        item: with ``image`` and, where the datalist says it, ``modality``; case does not matter.
        modality: of the run, a name or a code.

    Raises:
        InputError: one that is not known, or a CT among MR or the reverse.
    """
    own = item.get("modality") or modality
    name = str(own).casefold()
    kind = "mr" if is_mr(modality) else "ct"
    if own == modality or (name in MODALITIES and name.startswith(kind)):
        return own if own == modality else name
    raise InputError(
        f"{item['image']} has the modality {own!r} in its datalist; {SCALED[kind]}, so allowed are "
        f"{', '.join(name for name in MODALITIES if name.startswith(kind))}: leave it out of the input"
    )


def check_scaled(modality: str | int, scaled: str) -> None:
    """Refuse a modality whose intensities are scaled as those of the other kind.

    Args:
        modality: a name or a code.
        scaled: how, "mr" or "ct".

    Raises:
        InputError: MR is scaled as CT, or the reverse.
    """
    if scaled != ("mr" if is_mr(modality) else "ct"):
        raise InputError(
            f"modality is {modality!r}; {SCALED[scaled]}, so allowed are {'MR' if scaled == 'mr' else 'CT'}'s alone: "
            f"{'leave out' if scaled == 'mr' else 'add'} mr.json, or correct the modality"
        )


def check_modalities(items: list[dict[str, Any]], modality: str | int, scale: Any = None) -> list[dict[str, Any]]:
    """The items as they are, none of which is a CT among MR or the reverse.

    Args:
        items: see :func:`modality_of`.
        modality: of the run.
        scale: what scales their intensities, where a config may have another.

    Raises:
        InputError: see :func:`modality_of` and :func:`check_scaled`.
    """
    if scale is not None:
        check_scaled(modality, "mr" if isinstance(scale, ScaleMRd) else "ct")
    for item in items:
        modality_of(item, modality)
    return items


def unit_of(modality: str | int) -> str:
    """What a volume of a modality is measured in, as names of figures begin: "hu", or "mr", which has no unit."""
    return "mr" if is_mr(modality) else "hu"


def check_is_ct(modality: str | int, what: str) -> str | int:
    """The modality, where only a CT makes sense.

    Args:
        modality: see :func:`modality_code`.
        what: needs a CT, for the message.

    Raises:
        InputError: it is MR.
    """
    if is_mr(modality):
        raise InputError(f"modality is {modality!r}; {what} works in HU: allowed is CT. Leave {what} out for MR")
    return modality


def range_of(modality: str | int) -> tuple[float, float]:
    """What 0 and 1 of a generated volume stand for: HU of a CT, of an MR numbers without a unit."""
    return MR_RANGE if is_mr(modality) else HU_RANGE


class ToIntensitiesd(MapTransform):
    """Maps what was generated, [0, 1], to HU, clipped to both ends, or to an MR's numbers, which have no upper end.

    Args:
        keys: volumes (1, X, Y, Z).
        modality: see :func:`modality_code`.
    """

    def __init__(self, keys: KeysCollection, modality: str | int = "ct") -> None:
        super().__init__(keys)
        self.range = range_of(modality)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        return {**items, **{key: restore_intensity(items[key], *self.range) for key in self.key_iterator(items)}}


def check_modality(modality: str | int, trained: Sequence[str | int] | None) -> None:
    """Refuse a modality that particular weights were not trained on; they would draw what they know, without a word.

    Args:
        modality: see :func:`modality_code`.
        trained: names or codes, from the bundle's config; None for any.

    Raises:
        InputError: with those that are allowed.
    """
    code = modality_code(modality)
    if trained is not None and code not in {modality_code(name) for name in trained}:
        raise InputError(
            f"modality is {modality!r}, which was not in these weights' training data; allowed are "
            f"{', '.join(map(str, trained))} (trained_modalities of the config, for weights of yours)"
        )


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The initial noise of a seed, standard normal of this shape, drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed)))


@dataclass(frozen=True)
class Conditions:
    """The conditions of one volume, checked when made.

    Args:
        size: voxels along x, y, z (RAS).
        spacing: voxel size in mm along x, y, z.
        region: the body regions covered, neighbours, from top to bottom; empty when unknown.
        modality: name from :data:`MODALITIES` or a class code.
        seed: seed of the volume's noise.

    Raises:
        InputError: a value that no network accepts. Limits of particular weights are checked by
            :func:`maisi_tools.volumes.checks.check_spacing`.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    region: tuple[str, ...] = ()
    modality: str | int = "ct"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_output_size(self.size, 1, "size"))
        object.__setattr__(self, "spacing", three_positive(self.spacing, "spacing", "numbers in mm"))
        region = checked_regions(self.region)
        if region:
            first, last = REGIONS.index(region[0]), REGIONS.index(region[-1])
            if last - first + 1 != len(region):
                whole = list(REGIONS[first : last + 1])
                raise InputError(f"region {list(region)} has a gap; give neighbouring regions, here {whole}")
        object.__setattr__(self, "region", region)
        modality_code(self.modality)

    @property
    def intensity(self) -> tuple[float, float]:
        """See :func:`range_of`."""
        return range_of(self.modality)

    def noise(self, factor: int) -> Tensor:
        """The initial noise (4, x / factor, y / factor, z / factor), drawn on the CPU from the seed alone."""
        return draw_noise((LATENT_CHANNELS, *(n // factor for n in self.size)), self.seed)

    def tensors(self, scale: float) -> dict[str, Tensor]:
        """The conditions as the U-Net's keyword inputs, one sample, unbatched.

        Args:
            scale: factor on region and spacing. The released weights were trained with 100; it is a property of the
                weights and stands in each bundle's config as ``condition_scale``.

        Returns:
            ``top_region_index_tensor`` (4,) and ``bottom_region_index_tensor`` (4,), one-hot or zeros when the region
            is unknown, ``spacing_tensor`` (3,), ``class_labels`` ().
        """
        top, bottom = torch.zeros(4), torch.zeros(4)
        if self.region:
            top[REGIONS.index(self.region[0])] = scale
            bottom[REGIONS.index(self.region[-1])] = scale
        return {
            "top_region_index_tensor": top,
            "bottom_region_index_tensor": bottom,
            "spacing_tensor": torch.tensor(self.spacing) * scale,
            "class_labels": torch.tensor(modality_code(self.modality)),
        }


def batch_tensors(conditions: Sequence[Conditions], scale: float, device: torch.device) -> dict[str, Tensor]:
    """Stack the conditions of a batch: each tensor of :meth:`Conditions.tensors` with a leading batch axis."""
    each = [one.tensors(scale) for one in conditions]
    return {name: torch.stack([one[name] for one in each]).to(device) for name in each[0]}


def check_guidance(
    guidance_scale: float, guided_conditions: Sequence[str], of_mask: Sequence[str] = ()
) -> tuple[str, ...]:
    """The conditions that guidance leaves out in its unconditional pass.

    Args:
        of_mask: those of a mask that may be left out beside the U-Net's, where there is a mask.

    Raises:
        InputError: an unknown condition; or guidance is asked for, but no condition was dropped in training.
    """
    allowed = (*CONDITIONS, *of_mask)
    if isinstance(guided_conditions, str) or (unknown := sorted(set(guided_conditions) - set(allowed))):
        given = guided_conditions if isinstance(guided_conditions, str) else ", ".join(unknown)
        raise InputError(f"guided_conditions has {given}; allowed is a list of {', '.join(allowed)}")
    if guidance_scale != 0 and not guided_conditions:
        raise InputError(
            f"guidance_scale is {guidance_scale}, but these weights were trained without dropping conditions and know "
            "no unconditional pass; allowed is 0"
        )
    if {MASK, LESIONS} <= set(guided_conditions):
        raise InputError("guided_conditions has mask and lesions; allowed is one of them: a mask's lesions go with it")
    return tuple(guided_conditions)


def without_conditions(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The same inputs with the named conditions replaced by their null value, zeros."""
    return {name: torch.zeros_like(value) if name in names else value for name, value in tensors.items()}


def check_conditions(
    conditions: Conditions,
    size_multiple: int,
    spacing_range: Sequence[Sequence[float]],
    smallest_field_of_view: Sequence[float],
    trained_regions: Sequence[str],
    trained_modalities: Sequence[str | int] | None,
    presets: str | None = None,
) -> None:
    """Refuse conditions that particular weights cannot serve (their limits stand in the bundle's config).

    Args:
        size_multiple: every axis must be divisible by it.
        spacing_range: (lowest, highest) mm for x, y, z.
        smallest_field_of_view: mm along x, y, z of the smallest volume trained on; below it there is only a warning.
        trained_regions: names of the regions the weights were trained on.
        trained_modalities: names or codes of the modalities likewise; None for any.
        presets: whose weights' fields of view are known, see :data:`~maisi_tools.volumes.presets.PRESETS`; far from
            them all there is only a warning.

    Raises:
        InputError: a size, spacing, region or modality outside the limits.
    """
    check_modality(conditions.modality, trained_modalities)
    check_output_size(conditions.size, size_multiple)
    check_spacing(conditions.spacing, spacing_range, "spacing")
    warn_field_of_view(conditions.size, conditions.spacing, smallest_field_of_view)
    if presets is not None:
        warn_far(conditions.size, conditions.spacing, presets)
    if untrained := [name for name in conditions.region if name not in trained_regions]:
        raise InputError(
            f"region {', '.join(untrained)} was not in these weights' training data; allowed are "
            f"{', '.join(trained_regions)} (trained_regions of the config, for weights of yours). The full-size "
            f"weights know all of {', '.join(REGIONS)}"
        )
