"""What TensorBoard shows of a validation: reconstruction beside original."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def three_planes(*volumes: Tensor) -> Tensor:
    """One picture of the middle axial, coronal and sagittal plane of each volume, a row a volume.

    Args:
        volumes: (1, X, Y, Z) in RAS, all of one size.

    Returns:
        (1, height, width); anterior (axial) and superior are up, the patient's right is on the left. What no plane
        covers has the lowest value.
    """
    rows = []
    for volume in volumes:
        x, y, z = (n // 2 for n in volume.shape[1:])
        planes = [volume[0, :, :, z], volume[0, :, y, :], volume[0, x, :, :]]
        planes = [plane.T.flip(0) for plane in planes]
        height = max(len(plane) for plane in planes)
        lowest = float(volume.min())
        rows.append(torch.cat([pad(plane, (0, 0, 0, height - len(plane)), value=lowest) for plane in planes], 1))
    return torch.cat(rows)[None]
