"""Of a CT the coarse one: means of boxes, on a grid of one size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import MapTransform, Resize

from maisi_tools.volumes.checks import check_output_size

CELL = 2
"""Voxels of the coarse CT along an axis that are one cell, with a channel each, of the network that draws it."""


class Coarsend(MapTransform):
    """Adds ``coarse``, the means of an image in as many boxes as `size` says, on the grid that these boxes are.

    Args:
        keys: key of the image, a ``MetaTensor`` (1, X, Y, Z) in [0, 1]; what an MR has above is clipped.
        size: voxels along x, y, z, each a multiple of 2; None adds nothing.
    """

    def __init__(self, keys: str, size: Sequence[int] | None) -> None:
        super().__init__(keys)
        self.size = None if size is None else check_output_size(size, CELL, "coarse_size")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.size is None:
            return dict(data)
        coarse: Any = Resize(self.size, mode="area")(data[self.keys[0]])
        return {**data, "coarse": coarse.clamp(0, 1)}
