from __future__ import annotations

import numpy as np
import pytest
import torch

from maisi_tools.masks.bits import label_bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_against_numpy(dtype):
    mask = np.arange(256, dtype=np.uint8).reshape(2, 1, 8, 4, 4)
    bits = label_bits(torch.from_numpy(mask).to(dtype))
    assert bits.shape == (2, 8, 8, 4, 4) and bits.dtype == torch.float32
    assert np.array_equal(bits.numpy(), np.unpackbits(mask, axis=1, bitorder="little"))
    assert np.array_equal(np.packbits(bits.numpy().astype(np.uint8), axis=1, bitorder="little"), mask)
