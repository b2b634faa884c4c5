"""Label values as bit planes, the form in which MAISI's ControlNet reads a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def label_bits(mask: Tensor, bits: int = 8) -> Tensor:
    """Label values (B, 1, D, H, W) -> bit planes (B, ``bits``, D, H, W), float32, least significant bit first.

    Eight planes hold the label values 0..255. Source: the ControlNet input of the MAISI v1 release (the released
    weights depend on this order).
    """
    planes = 2 ** torch.arange(bits, device=mask.device)
    values = mask.to(torch.long)
    return (values.bitwise_and(planes.view(1, bits, 1, 1, 1)) != 0).to(torch.float32)
