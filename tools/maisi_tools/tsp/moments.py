"""Mean and variance of a volume from its slabs: two-pass sums in float32 (float64 for float64), merged in float64.

Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979): the merge
of (count, mean, sum of squared deviations) of two parts is exact in exact arithmetic and stable in floating point,
which sums of squares are not. The moments are kept for every channel, so the groups of any group norm, and the
channels of concatenated volumes, can be formed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations M2 of every channel: ``mean`` and ``m2`` are (B, C), float64."""

    count: int
    mean: Tensor
    m2: Tensor

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and (biased) variance of each channel's group of channels, both (B, C) float64."""
        batch, channels = self.mean.shape
        mean = self.mean.reshape(batch, groups, -1)
        centre = mean.mean(-1, keepdim=True)
        between = (mean - centre).square().mean(-1, keepdim=True)
        within = self.m2.reshape(batch, groups, -1).mean(-1, keepdim=True) / self.count
        shape = (batch, groups, channels // groups)
        return centre.expand(shape).reshape(batch, channels), (within + between).expand(shape).reshape(batch, channels)


BLOCK = {"cpu": 2**20}
"""Elements whose moments are taken at a time: few enough that the passes over them stay in the cache."""

LARGE_BLOCK = 2**26
"""The same on other devices: few enough that the float32 copy of a half-precision block is small beside a slab."""


def moments(slab: Tensor) -> Moments:
    """Return the moments of a slab (B, C, ...) over all positions; the sums are float32 around a block's mean."""
    block = BLOCK.get(slab.device.type, LARGE_BLOCK)
    if slab.numel() <= block:
        return _of_block(slab)
    # Along the outermost dimension in memory, so that a block is one piece of it, or one for each channel.
    along = max(range(2, slab.ndim), key=slab.stride)
    rows = max(1, block * slab.shape[along] // slab.numel())
    return merge([_of_block(part) for part in slab.split(rows, along)])


def statistics_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of a tensor are computed and applied: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_block(block: Tensor) -> Moments:
    positions = tuple(range(2, block.ndim))
    values = block.to(statistics_type(block.dtype))
    count = values.shape[2:].numel()
    first = values.mean(positions, keepdim=True)
    deviation = values - first
    rest = deviation.mean(positions).double()
    squares = deviation.square_().sum(positions).double()
    return Moments(count, first.reshape(rest.shape).double() + rest, squares - count * rest.square())


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together; the result depends on their order in the last bits only."""
    count = sum(part.count for part in parts)
    weights = torch.tensor([part.count / count for part in parts], dtype=torch.float64).reshape(-1, 1, 1)
    means = torch.stack([part.mean.cpu() for part in parts])
    mean = (weights * means).sum(0)
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64).reshape(-1, 1, 1)
    m2 = torch.stack([part.m2.cpu() for part in parts]).sum(0) + (counts * (means - mean).square()).sum(0)
    return Moments(count, mean, m2)


def concatenate(parts: Sequence[Moments]) -> Moments:
    """Return the moments of volumes joined along the channels."""
    return Moments(
        parts[0].count, torch.cat([part.mean for part in parts], 1), torch.cat([part.m2 for part in parts], 1)
    )


def alike(dtype: torch.dtype, *parts: Tensor | None) -> bool:
    """Whether a norm's parameters are of the volume's type, or float32 beside half precision: what torch takes."""
    half = dtype in (torch.float16, torch.bfloat16)
    return dtype.is_floating_point and all(
        part is None or part.dtype == dtype or (half and part.dtype == torch.float32) for part in parts
    )
