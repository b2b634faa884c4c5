"""Voxel grids: padding to what a network needs and back, the affine of a latent, a mask on another grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from monai.transforms import Resize, ResizeWithPadOrCrop, SpatialResample
from monai.utils import ensure_tuple_rep
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from maisi_tools.volumes.checks import AGREES, distance_in_voxels


def pad_to_multiple(
    x: Tensor, multiple: int | Sequence[int], mode: str = "replicate", value: float = 0.0
) -> tuple[Tensor, tuple[int, int, int]]:
    """Pad (B, C, X, Y, Z) at the end of each axis, so that `multiple` divides it; the affine keeps its origin.

    Args:
        x: the batch.
        multiple: one number, or one for each of x, y, z.
        mode: "replicate" repeats the last voxels, "constant" writes `value`.
        value: for mode "constant".

    Returns:
        The padded batch and the size (X, Y, Z) before, for :func:`crop_to`.
    """
    size = tuple(x.shape[-3:])
    missing = [-n % m for n, m in zip(size, ensure_tuple_rep(multiple, 3), strict=True)]
    if any(missing):
        amounts = [amount for axis in reversed(missing) for amount in (0, axis)]
        x = pad(x, amounts, mode=mode, **({"value": value} if mode == "constant" else {}))
    return x, (size[0], size[1], size[2])


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` = (X, Y, Z) voxels of (B, C, X, Y, Z); undoes :func:`pad_to_multiple`."""
    for axis, length in zip((-3, -2, -1), size, strict=True):
        x = x.narrow(axis, 0, length)
    return x


class PadInferer(Inferer):
    """Runs another inferer on the input padded to a multiple, and crops its output back to the input's size.

    Args:
        multiple: what must divide the size, one number or one per axis.
        inferer: runs the network on the padded input.
        mode: "replicate" or "constant", see :func:`pad_to_multiple`.
        value: for mode "constant".
    """

    def __init__(
        self,
        multiple: int | Sequence[int],
        inferer: Inferer | None = None,
        mode: str = "replicate",
        value: float = 0.0,
    ) -> None:
        self.multiple, self.mode, self.value = multiple, mode, value
        self.inferer = SimpleInferer() if inferer is None else inferer

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """`network` on (B, C, X, Y, Z); the output has the same X, Y, Z.

        Raises:
            ValueError: the network's output is not as large as its input.
        """
        padded, size = pad_to_multiple(inputs, self.multiple, self.mode, self.value)
        output = self.inferer(padded, network, *args, **kwargs)
        if output.shape[-3:] != padded.shape[-3:]:
            raise ValueError(
                f"the network made {tuple(output.shape)} of {tuple(padded.shape)}; PadInferer needs a network that "
                "keeps the size"
            )
        return crop_to(output, size)


def latent_affine(affine: ArrayLike, factor: int | Sequence[int]) -> np.ndarray:
    """Affine (4, 4) of the latent grid of an image with `affine`.

    A latent voxel covers `factor` voxels along each axis (one number, or one for each of x, y, z), so its centre lies
    (factor - 1) / 2 voxels from that of the first of them.
    """
    return np.asarray(affine, dtype=float) @ _latent_to_image(factor)


def image_affine(affine: ArrayLike, factor: int | Sequence[int]) -> np.ndarray:
    """Affine (4, 4) of the image whose latent has `affine`; the inverse of :func:`latent_affine`."""
    return np.asarray(affine, dtype=float) @ np.linalg.inv(_latent_to_image(factor))


def _latent_to_image(factor: int | Sequence[int]) -> np.ndarray:
    factors = np.asarray(ensure_tuple_rep(factor, 3), dtype=float)
    matrix = np.diag([*factors, 1.0])
    matrix[:3, 3] = (factors - 1) / 2
    return matrix


def grid_difference(one: MetaTensor, other: MetaTensor) -> str | None:
    """What differs between the grids of two volumes (C, X, Y, Z), in words; None where they have the same voxels.

    See :func:`difference_of_grids`.
    """
    first, second = (np.asarray(volume.affine, dtype=float) for volume in (one, other))
    return difference_of_grids(first, tuple(one.shape[1:]), second, tuple(other.shape[1:]))


def difference_of_grids(
    first: np.ndarray, ours: Sequence[int], second: np.ndarray, theirs: Sequence[int]
) -> str | None:
    """What differs between two grids, in words; None where they have the same voxels.

    They are the same where there are as many and no voxel is further from its counterpart than
    :data:`~maisi_tools.volumes.checks.AGREES`.

    Args:
        first, second: affines (4, 4), from voxels to mm.
        ours, theirs: (X, Y, Z), numbers of their voxels.
    """
    if tuple(ours) != tuple(theirs):
        spacings = (np.linalg.norm(affine[:3, :3], axis=0).round(3).tolist() for affine in (first, second))
        of_mm = [
            f"{_voxels(size)} voxels of {spacing} mm" for size, spacing in zip((ours, theirs), spacings, strict=True)
        ]
        return " and ".join(of_mm)
    if (apart := distance_in_voxels(first, second, tuple(ours))) <= AGREES:
        return None
    parts = [f"{_voxels(ours)} voxels each, up to {apart:.3g} voxels apart"]
    for what, a, b in (
        ("spacing", *(np.linalg.norm(affine[:3, :3], axis=0) for affine in (first, second))),
        ("origin", first[:3, 3], second[:3, 3]),
        ("axes", *(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (first, second))),
    ):
        if not np.allclose(a, b, rtol=1e-3, atol=1e-3):
            unit = "" if what == "axes" else " mm"
            parts.append(f"{what} {np.round(a.T, 3).tolist()} and {np.round(b.T, 3).tolist()}{unit}")
    return ", ".join(parts)


def same_grid(one: MetaTensor, other: MetaTensor) -> bool:
    """Whether two volumes (C, X, Y, Z) have the same voxels, see :func:`grid_difference`."""
    return grid_difference(one, other) is None


def _voxels(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def straighten(volume: MetaTensor, mode: str, fill: float) -> MetaTensor:
    """A volume whose slices are shifted against each other (gantry tilt) on a straight grid of the same spacing.

    Rows, columns and the distance of the slices stay; the field of view grows to hold all voxels.

    Args:
        volume: (1, X, Y, Z), the axis of the slices last, with its affine.
        mode: "bilinear" or "nearest".
        fill: value outside of the slices.

    Returns:
        The volume itself where it is straight, to a tenth of a voxel over its whole length.
    """
    affine = np.asarray(volume.affine, dtype=float)
    straight, size = straight_grid(affine, volume.shape[1:])
    if straight is affine:
        return volume
    resample = SpatialResample(mode=mode, padding_mode="zeros", align_corners=True, dtype=np.float64)
    # What lies outside becomes 0.
    resampled: Any = resample(volume - fill, dst_affine=torch.as_tensor(straight), spatial_size=list(size))
    return resampled + fill


def straight_grid(affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine (4, 4) and shape of the grid that :func:`straighten` gives a volume; those given where it is straight."""
    columns, rows, slices = (int(n) for n in shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    step = affine[:3, 2] @ normal * normal
    shift = np.linalg.norm(affine[:3, 2] - step) * (slices - 1)
    if shift < 0.1 * min(spacing[:2]):
        return affine, (columns, rows, slices)
    straight = affine.copy()
    straight[:3, 2] = step
    ends = np.array([np.eye(4)[3], [0, 0, slices - 1, 1]]).T
    # Where the first and the last slice begin on the straight grid, in voxels along x and y.
    begin = (np.linalg.inv(straight) @ affine @ ends)[:2]
    low = np.floor(begin.min(axis=1) + 1e-3)
    grow = np.ceil(begin.max(axis=1) - 1e-3) - low
    straight[:3, 3] += straight[:3, :2] @ low
    return straight, (columns + int(grow[0]), rows + int(grow[1]), slices)


def regrid_mask(
    mask: MetaTensor, spacing: Sequence[float] | None = None, size: Sequence[int] | None = None
) -> MetaTensor:
    """A label mask on another grid, each voxel with the label nearest to it; labels are never mixed.

    Args:
        mask: (1, X, Y, Z), with its affine (RAS axes).
        spacing: mm along x, y, z. Given alone, the field of view stays (to half a voxel).
        size: voxels along x, y, z. Given with `spacing`, the mask is cropped or padded with 0 about its centre. Given
            alone, the field of view stays and the spacing becomes extent / size.

    Returns:
        The mask, its affine that of the new grid.
    """
    regridded: Any = mask
    if spacing is not None:
        # The outer faces of the grid stay in place, not the centres of its corner voxels. (MONAI's Spacing with
        # scale_extent moves them where the grid begins near 0.)
        affine = np.asarray(mask.affine, dtype=float)
        ratio = np.asarray(spacing, dtype=float) / np.linalg.norm(affine[:3, :3], axis=0)
        wanted = affine @ np.diag([*ratio, 1.0])
        wanted[:3, 3] = (affine @ [*(ratio / 2 - 0.5), 1.0])[:3]
        shape = [max(1, round(n / one)) for n, one in zip(mask.shape[1:], ratio.tolist(), strict=True)]
        resample: Any = SpatialResample(mode="nearest", padding_mode="border", align_corners=False, dtype=np.float32)
        regridded = resample(mask, dst_affine=torch.as_tensor(wanted), spatial_size=shape)
        if size is not None:
            regridded = ResizeWithPadOrCrop(size, mode="constant", value=0)(regridded)
    elif size is not None and tuple(size) != tuple(mask.shape[1:]):
        regridded = Resize(size, mode="nearest-exact")(mask)
    return regridded
