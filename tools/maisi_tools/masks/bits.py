"""Label values as bit planes, the form in which MAISI's ControlNet reads a mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type
from torch import Tensor


def label_bits(mask: Tensor, bits: int = 8) -> Tensor:
    """Label values (B, 1, D, H, W) -> bit planes (B, ``bits``, D, H, W), float32, least significant bit first.

    Eight planes hold the label values 0..255. Source: the ControlNet input of the MAISI v1 release (the released
    weights depend on this order).
    """
    planes = 2 ** torch.arange(bits, dtype=torch.int16, device=mask.device)
    values = mask.to(torch.int16)
    return (values.bitwise_and(planes.view(1, bits, 1, 1, 1)) != 0).to(torch.float32)


class LabelBitsd(MapTransform):
    """MONAI dict transform: label mask (1, D, H, W) -> bit planes (8, D, H, W), float32, see :func:`label_bits`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        planes = {
            key: label_bits(torch.as_tensor(data[key]).as_subclass(Tensor)[None])[0] for key in self.key_iterator(data)
        }
        return {
            **data,
            **{key: convert_to_dst_type(value, dst=data[key], dtype=torch.float32)[0] for key, value in planes.items()},
        }
