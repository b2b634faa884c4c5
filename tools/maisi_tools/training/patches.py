"""Training patches of a drawn size, place and voxel spacing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTransform, SpatialResample
from monai.transforms.utils import create_rotate

from maisi_tools.errors import InputError
from maisi_tools.training.budget import Budget

PLACES_TRIED = 100
"""How often a place outside the body is drawn again before it is taken: a volume may be all air."""


def check_patches(
    min_size: Sequence[int], max_size: Sequence[int], multiple: int, smallest: int, batch_size: int
) -> None:
    """Refuse patch sizes (voxels) that the training cannot use.

    Args:
        min_size: see :class:`RandSpacingPatchd`, as ``max_size`` and ``multiple``.
        smallest: along each axis, what the network and the losses need.
        batch_size: patches that are stacked, so that they must have one size.

    Raises:
        InputError: not three whole numbers each, one below ``smallest``, smallest and largest size the wrong way round,
            or several sizes in a batch.
    """
    for name, size in (("min_patch_size", min_size), ("max_patch_size", max_size)):
        numbers = size if isinstance(size, Sequence) else [size]
        if len(numbers) != 3 or not all(isinstance(n, int) and n >= smallest and n % multiple == 0 for n in numbers):
            raise InputError(
                f"{name} is {size!r}; allowed are three multiples of {multiple}, at least {smallest} voxels, which "
                "the losses need: give larger patches"
            )
    if any(low > high for low, high in zip(min_size, max_size, strict=True)):
        raise InputError(
            f"min_patch_size is {list(min_size)}, larger than max_patch_size, {list(max_size)}; allowed is at most "
            "that: change one of them"
        )
    if batch_size > 1 and list(min_size) != list(max_size):
        raise InputError(
            f"batch_size is {batch_size} with patches from {list(min_size)} to {list(max_size)} voxels; a batch's "
            "patches must have one size: give accumulation_steps instead of batch_size, or one patch size"
        )


class RandSpacingPatchd(RandomizableTransform, MapTransform):
    """Cuts a patch of drawn size, voxel spacing and orientation around a drawn voxel.

    The autoencoder must serve volumes of any spacing and size: its group norms see a whole volume with much air at
    inference, so patches vary in size and in their share of air. Patch and resampling are one interpolation
    (trilinear, the volume's edge repeated outside).

    Args:
        keys: images (1, D, H, W) in [0, 1], ``MetaTensor`` with an axis-aligned affine.
        spacing: (lowest, highest) mm for each axis; drawn uniformly and independently.
        min_size: smallest patch in voxels.
        max_size: largest patch in voxels.
        multiple: sizes are multiples of this.
        foreground: share of the patches whose middle lies in tissue (above ``threshold``).
        threshold: in the image's intensities.
        rotation: degrees; the patch is turned about each of its axes by an angle drawn from -rotation to rotation.
    """

    def __init__(
        self,
        keys: str,
        spacing: Sequence[Sequence[float]],
        min_size: Sequence[int],
        max_size: Sequence[int],
        multiple: int = 4,
        foreground: float = 0.85,
        threshold: float = 0.3,
        rotation: float = 0.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.spacing = np.asarray(spacing, dtype=float)
        self.min_size = np.asarray(min_size)
        self.max_size = np.asarray(max_size)
        self.multiple = multiple
        self.foreground = foreground
        self.threshold = threshold
        self.rotation = math.radians(rotation)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data[self.keys[0]]
        size = self.R.randint(self.min_size // self.multiple, self.max_size // self.multiple + 1) * self.multiple
        spacing = self.R.uniform(self.spacing[:, 0], self.spacing[:, 1])
        in_tissue = self.R.random_sample() < self.foreground
        for _ in range(PLACES_TRIED):
            middle = self.R.randint(0, image.shape[1:])
            if not in_tissue or image[(0, *middle)] > self.threshold:
                break

        turn = np.asarray(create_rotate(3, self.R.uniform(-self.rotation, self.rotation, 3).tolist()))[:3, :3]
        affine = np.asarray(image.affine, dtype=float)
        patch = affine.copy()
        patch[:3, :3] = affine[:3, :3] / np.asarray(image.pixdim) @ turn * spacing
        patch[:3, 3] = (affine @ [*middle, 1])[:3] - patch[:3, :3] @ ((size - 1) / 2)
        result = dict(data)
        for key in self.key_iterator(data):
            result[key] = self.resample(data[key], dst_affine=torch.as_tensor(patch), spatial_size=size.tolist())
        return result


class RandCropOrWholed(RandomizableTransform, MapTransform):
    """Cuts a crop of drawn size and place on the volume's own grid, or, ever more often, takes all of it.

    Group norm sees a whole volume at inference, much of it air. A network that has only seen crops meets statistics
    there that it does not know, so the training ends with whole volumes among its samples.

    Args:
        keys: images (1, D, H, W) in [0, 1].
        min_size: smallest crop in voxels; an axis that is shorter is padded by its edge.
        max_size: largest crop in voxels.
        multiple: all sizes are multiples of this, whole volumes padded by their edge.
        budget: of the run; its progress decides on the share of whole volumes.
        whole: that share at the end of the run and in its last quarter; it grows evenly until then.
        foreground: share of the crops whose middle lies in tissue (above ``threshold``).
        threshold: in the image's intensities.
    """

    def __init__(
        self,
        keys: str,
        min_size: Sequence[int],
        max_size: Sequence[int],
        multiple: int,
        budget: Budget,
        whole: float = 0.5,
        foreground: float = 0.85,
        threshold: float = 0.3,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.min_size = np.asarray(min_size)
        self.max_size = np.asarray(max_size)
        self.multiple = multiple
        self.budget = budget
        self.whole = whole
        self.foreground = foreground
        self.threshold = threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data[self.keys[0]]
        size = self.R.randint(self.min_size // self.multiple, self.max_size // self.multiple + 1) * self.multiple
        in_tissue = self.R.random_sample() < self.foreground
        take_all = self.R.random_sample() < self.whole * min(1.0, self.budget.progress / 0.75)
        for _ in range(PLACES_TRIED):
            middle = self.R.randint(0, image.shape[1:])
            if not in_tissue or image[(0, *middle)] > self.threshold:
                break

        result = dict(data)
        for key in self.key_iterator(data):
            part = data[key]
            if not take_all:
                start = np.clip(middle - size // 2, 0, np.maximum(np.asarray(part.shape[1:]) - size, 0))
                part = part[(slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))]
            wanted = [-(-n // self.multiple) * self.multiple for n in part.shape[1:]] if take_all else size
            result[key] = _padded(part, wanted)
        return result


class RandLatentCropd(RandomizableTransform, MapTransform):
    """Cuts a crop of drawn size and place of a latent, with the part of the mask it stands for, or takes all of both.

    A U-Net on a fine latent learns most from many small crops; what it is to see of a whole volume comes with the share
    of those. A latent that is smaller than the crop along some axis is padded there by its edge, as its mask is.

    Args:
        keys: the latent (4, d, h, w) and its mask (1, factor d, factor h, factor w), in this order.
        factor: of the autoencoder.
        min_size: smallest crop in voxels of the latent.
        max_size: largest crop.
        multiple: sizes are multiples of this: 2 to the power of the U-Net's levels less one.
        whole: share of whole latents.
        foreground: share of the crops whose middle lies in the body.
        threshold: what the mask is above in the body; for a CT on the latent's grid in its place, its intensity.
    """

    def __init__(
        self,
        keys: Sequence[str],
        factor: int,
        min_size: Sequence[int],
        max_size: Sequence[int],
        multiple: int,
        whole: float = 0.0,
        foreground: float = 0.85,
        threshold: float = 0.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        self.threshold = threshold
        self.factor = factor
        self.min_size = np.asarray(min_size)
        self.max_size = np.asarray(max_size)
        self.multiple = multiple
        self.whole = whole
        self.foreground = foreground

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        latent, mask = (data[key] for key in self.keys)
        size = self.R.randint(self.min_size // self.multiple, self.max_size // self.multiple + 1) * self.multiple
        take_all, in_body = self.R.random_sample(2) < (self.whole, self.foreground)
        room = np.asarray(latent.shape[1:])
        for _ in range(PLACES_TRIED):
            middle = self.R.randint(0, room)
            if not in_body or mask[(0, *(middle * self.factor))] > self.threshold:
                break
        if take_all:
            return dict(data)
        start = np.clip(middle - size // 2, 0, np.maximum(room - size, 0))
        cut = {}
        for key, times in zip(self.keys, (1, self.factor), strict=True):
            span = [slice(a * times, (a + n) * times) for a, n in zip(start, size, strict=True)]
            cut[key] = _padded(data[key][(slice(None), *span)], size * times)
        return {**data, **cut}


def _padded(part: torch.Tensor, wanted: Iterable[int]) -> torch.Tensor:
    """`part` (C, D, H, W), repeated at its far edges to the size wanted."""
    missing = [int(want - n) for want, n in zip(wanted, part.shape[1:], strict=True)]
    if not any(missing):
        return part
    around = [amount for n in reversed(missing) for amount in (0, n)]
    return torch.nn.functional.pad(part[None].float(), around, mode="replicate")[0].to(part.dtype)
