"""Where a volume is changed: the weight that blends the new into the old, windows around it, what joins the two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Box = tuple[slice, ...]

CONTEXT_MM = 30.0
"""What a window has around a region at least, on each side where the volume goes on."""

SEAM_MM = 4.0
"""How far a residual is averaged, beside the border of a region, see :func:`extended`."""


def box_of(inside: np.ndarray) -> Box:
    """The smallest box around the true voxels, of which there is at least one."""
    return ndimage.find_objects(np.asarray(inside, bool).view(np.uint8))[0]


def grown(box: Box, shape: Sequence[int], voxels: Sequence[int]) -> Box:
    """The box with so many voxels more on each side, as far as the volume reaches."""
    return tuple(
        slice(max(side.start - more, 0), min(side.stop + more, length))
        for side, length, more in zip(box, shape, voxels, strict=True)
    )


def blend_weight(changed: np.ndarray, spacing: Sequence[float], margin_mm: float) -> np.ndarray:
    """1 where something changed, falling to 0 at the margin's end as a cosine does, without a kink; float32.

    Args:
        changed: (X, Y, Z), boolean, with at least one true voxel.
        spacing: mm along x, y, z.
        margin_mm: distance from the nearest changed voxel at and beyond which it is 0.
    """
    if margin_mm <= 0:
        return changed.astype(np.float32)
    distance = ndimage.distance_transform_edt(~changed, sampling=spacing)
    return (0.5 + 0.5 * np.cos(np.pi * np.minimum(distance / margin_mm, 1))).astype(np.float32)


def window_around(box: Box, shape: Sequence[int], spacing: Sequence[float], field_of_view: Sequence[float]) -> Box:
    """A box around another: with :data:`CONTEXT_MM` on each side, and at least of a field of view.

    It is shifted rather than cut where the volume ends, and is the whole of an axis that is shorter.

    Args:
        box: in voxels.
        shape: of the volume.
        spacing: mm along x, y, z.
        field_of_view: mm along x, y, z.
    """
    window = []
    for side, length, mm, wanted in zip(box, shape, spacing, field_of_view, strict=True):
        around = int(np.ceil(CONTEXT_MM / mm))
        size = min(length, max(side.stop - side.start + 2 * around, int(np.ceil(wanted / mm))))
        start = min(max((side.start + side.stop - size) // 2, 0), length - size)
        window.append(slice(start, start + size))
    return tuple(window)


def windows(
    boxes: Sequence[Box], shape: Sequence[int], spacing: Sequence[float], field_of_view: Sequence[float]
) -> list[tuple[list[int], Box]]:
    """Windows for several regions; those that reach into the window of another share one.

    Args:
        boxes: of the regions.
        shape, spacing, field_of_view: as in :func:`window_around`.

    Returns:
        (indices of the regions, window), in the order of the first region of each.
    """
    groups = [([number], box) for number, box in enumerate(boxes)]
    while True:
        looks = [window_around(box, shape, spacing, field_of_view) for _, box in groups]
        pair = next(
            (
                (one, other)
                for one in range(len(groups))
                for other in range(len(groups))
                if one != other and _meet(looks[one], groups[other][1])
            ),
            None,
        )
        if pair is None:
            return sorted((sorted(members), look) for (members, _), look in zip(groups, looks, strict=True))
        (members, box), (more, second) = (groups[index] for index in pair)
        joined = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, second, strict=True))
        groups = [group for index, group in enumerate(groups) if index not in pair] + [(members + more, joined)]


def extended(values: np.ndarray, where: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """A smooth field that follows `values` (averaged over :data:`SEAM_MM`) where they count, and goes on elsewhere.

    A normalised convolution (Knutsson & Westin 1993) with Gaussians from coarse to fine: the finer ones lead where they
    see enough of what counts, so that the field reaches into regions of any size.

    Args:
        values: (X, Y, Z).
        where: boolean, the voxels that count; without any the field is 0.
        spacing: mm along x, y, z.
    """
    result = np.zeros(values.shape, dtype=np.float32)
    if not where.any():
        return result
    counted = where.astype(np.float32)
    given = (values * counted).astype(np.float32)
    result += given.sum() / counted.sum()
    for times in (8, 4, 2, 1):
        sigma = [times * SEAM_MM / float(mm) for mm in spacing]
        share = ndimage.gaussian_filter(counted, sigma, mode="nearest", truncate=3.0)
        result = (ndimage.gaussian_filter(given, sigma, mode="nearest", truncate=3.0) + 0.05 * result) / (share + 0.05)
    return result


def _meet(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
