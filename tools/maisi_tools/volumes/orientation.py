"""Back to the orientation a file came in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform


def from_ras(volume: MetaTensor, axcodes: str) -> MetaTensor:
    """Undo MONAI's ``Orientation(axcodes="RAS")`` of a volume (C, D, H, W) that had the orientation `axcodes` before.

    MONAI's own would name the axes of the RAS grid anew, and where two are as near to one direction as to another (a
    grid at 45 degrees), it would call them otherwise than before, and give them back in another order.
    """
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axcodes))
    affine = np.asarray(volume.affine, dtype=float) @ nib.orientations.inv_ornt_aff(ornt, volume.shape[1:])
    array = volume.as_tensor().flip([1 + axis for axis, (_, way) in enumerate(ornt) if way < 0])
    array = array.permute(0, *(1 + int(axis) for axis in np.argsort(ornt[:, 0])))
    meta = {key: value for key, value in volume.meta.items() if key != "affine"}
    return MetaTensor(array, affine=torch.as_tensor(affine), meta=meta)


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
        axcodes = "".join(nib.aff2axcodes(original))
        meta = {"filename_or_obj": reference.meta["filename_or_obj"]}
        result = dict(data)
        for key in self.key_iterator(data):
            array = data[key].as_tensor() if isinstance(data[key], MetaTensor) else torch.as_tensor(data[key])
            turned = from_ras(MetaTensor(array, affine=reference.affine, meta=dict(meta)), axcodes)
            if np.allclose(turned.affine, original, atol=1e-3):
                turned.affine = torch.as_tensor(original)
            result[key] = turned
        return result
