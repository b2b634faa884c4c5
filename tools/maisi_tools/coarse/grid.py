"""Of a CT the coarse one: means of boxes, on a grid of one size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import MapTransform, Resize

from maisi_tools.errors import InputError

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
        self.size = None if size is None else check_coarse_size(size)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.size is None:
            return dict(data)
        coarse: Any = Resize(self.size, mode="area")(data[self.keys[0]])
        return {**data, "coarse": coarse.clamp(0, 1)}


def check_coarse_size(size: Sequence[int]) -> tuple[int, int, int]:
    """Three whole numbers.

    Raises:
        InputError: they are not three even numbers from 2 on.
    """
    numbers = tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(numbers) != 3 or not all(type(n) is int and n >= CELL and n % CELL == 0 for n in numbers):
        raise InputError(f"coarse_size is {size!r}; allowed are three even numbers of voxels, such as [48, 32, 48]")
    return numbers
