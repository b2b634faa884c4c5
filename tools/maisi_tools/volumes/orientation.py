"""Back to the orientation a file came in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation


class RestoreOrientationd(MapTransform):
    """Turns results on the (RAS) grid of a preprocessed input back to the orientation the input's file has.

    Args:
        keys: results (C, D, H, W) on the grid of ``reference_key``; they take its affine and file name.
        reference_key: the preprocessed input, a ``MetaTensor`` with ``meta["original_affine"]``. Where its grid is
            still that of the file, the results get the file's affine to the last bit.
    """

    def __init__(self, keys: str | list[str], reference_key: str) -> None:
        super().__init__(keys)
        self.reference_key = reference_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        reference = data[self.reference_key]
        original = np.asarray(reference.meta["original_affine"], dtype=float)
        turn = Orientation(axcodes="".join(nib.aff2axcodes(original)), labels=None)
        meta = {"filename_or_obj": reference.meta["filename_or_obj"]}
        result = dict(data)
        for key in self.key_iterator(data):
            array = data[key].as_tensor() if isinstance(data[key], MetaTensor) else torch.as_tensor(data[key])
            turned: Any = turn(MetaTensor(array, affine=reference.affine, meta=dict(meta)))
            if np.allclose(turned.affine, original, atol=1e-3):
                turned.affine = torch.as_tensor(original)
            result[key] = turned
        return result
