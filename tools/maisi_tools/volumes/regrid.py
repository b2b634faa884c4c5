"""A mask on the grid the volume is to be generated on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import MapTransform

from maisi_tools.volumes.checks import check_output_size, check_spacing, warn_field_of_view
from maisi_tools.volumes.grid import regrid_mask


class RegridMaskd(MapTransform):
    """:func:`~maisi_tools.volumes.grid.regrid_mask` when a spacing or a size is asked for, else nothing.

    Raises:
        InputError: ``size`` is not divisible by ``multiple``.
    """

    def __init__(
        self,
        keys: str,
        spacing: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        multiple: int = 1,
    ) -> None:
        super().__init__(keys)
        self.spacing = spacing
        self.size = check_output_size(size, multiple) if size is not None else None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: regrid_mask(data[key], self.spacing, self.size) for key in self.key_iterator(data)}}


class CheckGridd(MapTransform):
    """Refuses a spacing the weights were not trained for, and warns of a field of view smaller than any trained on.

    Args:
        spacing_range: (lowest, highest) mm for x, y, z.
        smallest_field_of_view: mm along x, y, z.

    Raises:
        InputError: spacing outside the range.
    """

    def __init__(
        self, keys: str, spacing_range: Sequence[Sequence[float]], smallest_field_of_view: Sequence[float]
    ) -> None:
        super().__init__(keys)
        self.spacing_range = spacing_range
        self.smallest_field_of_view = smallest_field_of_view

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            spacing = [float(mm) for mm in data[key].pixdim]
            check_spacing(spacing, self.spacing_range, f"the spacing of {data[key].meta.get('filename_or_obj', key)}")
            warn_field_of_view(data[key].shape[1:], spacing, self.smallest_field_of_view)
        return dict(data)
