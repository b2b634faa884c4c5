"""A mask on the grid the volume is to be generated on, and the volume back on the mask's own grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample

from maisi_tools.errors import InputError, first_few
from maisi_tools.volumes.checks import (
    check_output_size,
    check_spacing,
    nearest_spacing,
    three_positive,
    warn_field_of_view,
)
from maisi_tools.volumes.grid import regrid_mask
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.presets import Preset, warn_far

logger = logging.getLogger(__name__)


LARGEST_FACTOR = 2.0
"""A spacing further from the range than this is refused: its structures are of another scale than any trained on."""


class RegridMaskd(MapTransform):
    """:func:`~maisi_tools.volumes.grid.regrid_mask` when a spacing or a size is asked for.

    When neither is, and the mask's own spacing is outside `spacing_range`, the mask goes to the nearest spacing within,
    and the mask as it was is kept under `own_key`, for :class:`RestoreGridd` to bring the CT back to its grid. A
    warning names labels of which nothing is left.

    Args:
        keys: of the mask (1, X, Y, Z).
        spacing: mm along x, y, z that is asked for.
        size: voxels along x, y, z that are asked for.
        multiple: what has to divide `size`.
        spacing_range: (lowest, highest) mm for x, y, z that the weights know; None leaves every spacing as it is.
        own_key: of the item.
        preset: whose spacing and size are taken; then the others are None.
        names: label -> what the warning calls it.

    Raises:
        InputError: ``spacing`` is not three positive numbers, ``size`` is not divisible by ``multiple``, either is
            given with a ``preset``, or the mask's spacing is further from the range than by :data:`LARGEST_FACTOR`.
    """

    def __init__(
        self,
        keys: str,
        spacing: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        multiple: int = 1,
        spacing_range: Sequence[Sequence[float]] | None = None,
        own_key: str = "own_mask",
        preset: Preset | None = None,
        names: Callable[[int], str] = str,
    ) -> None:
        super().__init__(keys)
        if preset is not None:
            if spacing is not None or size is not None:
                raise InputError(
                    f"output_size {size} or spacing {spacing} is given with a preset, which stands for both: leave out "
                    "either"
                )
            spacing, size = preset.spacing, preset.size
        self.spacing = three_positive(spacing, "spacing", "numbers in mm") if spacing is not None else None
        self.size = check_output_size(size, multiple) if size is not None else None
        self.spacing_range, self.own_key, self.names = spacing_range, own_key, names

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            mask = items[key]
            spacing: Sequence[float] | None = self.spacing
            if self.spacing_range is not None and spacing is None and self.size is None:
                own = [float(mm) for mm in mask.pixdim]
                nearest = spacing = nearest_spacing(own, self.spacing_range)
                if nearest == own:
                    continue
                worst = max(max(a / b, b / a) for a, b in zip(own, nearest, strict=True))
                if worst > LARGEST_FACTOR:
                    name = mask.meta.get("filename_or_obj", key)
                    check_spacing(own, self.spacing_range, f"the spacing of {name}", LARGEST_FACTOR)
                items[self.own_key] = mask.clone()
            items[key] = regrid_mask(mask, spacing, self.size)
            if items[key] is not mask and (lost := sorted(_labels_in(mask) - _labels_in(items[key]))):
                logger.warning(
                    "%s: of %s nothing is left on the grid of the CT, %s voxels of %s; give a finer spacing or a "
                    "larger field of view if that matters",
                    mask.meta.get("filename_or_obj", key),
                    first_few([self.names(label) for label in lost]),
                    " x ".join(map(str, items[key].shape[1:])),
                    _mm(items[key].pixdim),
                )
        return items


def _labels_in(mask: MetaTensor) -> set[int]:
    return set(torch.bincount(mask.as_tensor().flatten().int()).nonzero().flatten().tolist()) - {0}


class RestoreGridd(MapTransform):
    """Brings a CT back to the mask's own grid, where :class:`RegridMaskd` put the mask on another one.

    The CT is interpolated linearly, and is air outside of the mask; the mask becomes again what it was. One line of the
    log says so.

    Args:
        keys: of the CT (1, X, Y, Z) in HU, or of an MR.
        mask_key: of the mask that it was generated from.
        own_key: of the mask as it was; items without it stay as they are.
        air: value outside of the mask.
    """

    def __init__(self, keys: str, mask_key: str, own_key: str = "own_mask", air: float = HU_RANGE[0]) -> None:
        super().__init__(keys)
        self.mask_key, self.own_key, self.air = mask_key, own_key, air

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        if (own := items.pop(self.own_key, None)) is None:
            return items
        mask = items[self.mask_key]
        for key in self.key_iterator(items):
            array = torch.as_tensor(items[key].as_tensor() if isinstance(items[key], MetaTensor) else items[key])
            ct = MetaTensor(array.float(), affine=mask.affine)
            resample: Any = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
            back = resample(ct, dst_affine=own.affine, spatial_size=own.shape[1:])
            air = torch.full_like(back.as_tensor(), self.air)
            outside = own.as_tensor().to(back.device) == 0
            items[key] = MetaTensor(torch.where(outside, air, back.as_tensor()), affine=own.affine)
        items[self.mask_key] = own
        logger.warning(
            "%s: its spacing of %s is outside of what these weights know (spacing_range); the CT was generated at %s "
            "and brought back to the mask's grid",
            mask.meta.get("filename_or_obj", self.mask_key),
            _mm(own.pixdim),
            _mm(mask.pixdim),
        )
        return items


def _mm(spacing: torch.Tensor) -> str:
    return " x ".join(f"{float(mm):.4g}" for mm in spacing) + " mm"


class CheckGridd(MapTransform):
    """Refuses a spacing the weights were not trained for, and warns of a field of view that they do not know.

    Args:
        spacing_range: (lowest, highest) mm for x, y, z.
        smallest_field_of_view: mm along x, y, z.
        presets: whose weights' fields of view are known, see :data:`~maisi_tools.volumes.presets.PRESETS`.

    Raises:
        InputError: spacing outside the range.
    """

    def __init__(
        self,
        keys: str,
        spacing_range: Sequence[Sequence[float]],
        smallest_field_of_view: Sequence[float],
        presets: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.presets = presets
        self.spacing_range = spacing_range
        self.smallest_field_of_view = smallest_field_of_view

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            spacing = [float(mm) for mm in data[key].pixdim]
            check_spacing(spacing, self.spacing_range, f"the spacing of {data[key].meta.get('filename_or_obj', key)}")
            warn_field_of_view(data[key].shape[1:], spacing, self.smallest_field_of_view)
            if self.presets is not None:
                warn_far(data[key].shape[1:], spacing, self.presets)
        return dict(data)
