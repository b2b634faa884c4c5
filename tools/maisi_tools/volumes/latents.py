"""A latent on disk: a 4-channel NIfTI on the latent grid, and a JSON that tells how it becomes a CT again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation

from maisi_tools.errors import InputError
from maisi_tools.volumes.grid import crop_to, image_affine, latent_affine

SIDECAR = ("size", "spacing", "orientation", "region", "modality", "factor", "scale_factor")
"""What the sidecar holds: voxels and mm of the image the latent stands for (RAS), the orientation to write it in, the
conditions, image voxels per latent voxel along each axis, and what the latent is divided by before decoding."""


class DescribeLatentd(MapTransform):
    """Gives an encoded latent its affine, and adds the :data:`SIDECAR` entries to the data.

    Args:
        keys: key of the latent (4, d, h, w), or of a dict with its ``mean`` and ``sigma`` as
            :class:`maisi_tools.diffusion.autoencoder.EncodeInferer` returns it; then ``data["sigma"]`` gets the latter.
        image_key: key of the image it was encoded from, a ``MetaTensor`` (1, D, H, W) in RAS.
        factor: of the autoencoder.
        modality: written as condition of data that have none of their own; ``region`` is the data's own alone.
    """

    def __init__(self, keys: str, image_key: str, factor: int, modality: str = "ct") -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.factor = factor
        self.modality = modality

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, latent = data[self.image_key], data[self.keys[0]]
        parts = {"mean": latent} if not isinstance(latent, Mapping) else latent
        affine = torch.as_tensor(latent_affine(image.affine, self.factor))
        meta = {"filename_or_obj": image.meta["filename_or_obj"]}
        placed = {
            self.keys[0] if name == "mean" else name: MetaTensor(part, affine=affine, meta=dict(meta))
            for name, part in parts.items()
        }
        return {
            **data,
            **placed,
            "size": [int(n) for n in image.shape[1:]],
            "spacing": [round(float(mm), 6) for mm in image.pixdim],
            "orientation": "".join(nib.aff2axcodes(np.asarray(image.meta["original_affine"], dtype=float))),
            "region": list(data.get("region") or []),
            "modality": data.get("modality", self.modality),
            "factor": self.factor,
            "scale_factor": 1.0,
        }


class RestoreGeometryd(MapTransform):
    """Crops a decoded CT to the size its latent stands for and turns it to the orientation of the original.

    Args:
        keys: key of the decoded CT (1, D, H, W).
        latent_key: key of the latent it was decoded from, with ``meta["sidecar"]``.
    """

    def __init__(self, keys: str, latent_key: str) -> None:
        super().__init__(keys)
        self.latent_key = latent_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        latent, ct = data[self.latent_key], data[self.keys[0]]
        sidecar = latent.meta["sidecar"]
        ct = crop_to(ct[None], sidecar["size"])[0]
        meta = {"filename_or_obj": latent.meta["filename_or_obj"]}
        ct = MetaTensor(ct, affine=torch.as_tensor(image_affine(latent.affine, int(sidecar["factor"]))), meta=meta)
        return {**data, self.keys[0]: Orientation(axcodes=sidecar.get("orientation", "RAS"), labels=None)(ct)}


class UnscaleLatentd(MapTransform):
    """Divides a latent read from disk by its sidecar's ``scale_factor``, so that the decoder can take it.

    Args:
        keys: latents with ``meta["sidecar"]``.
        factor: of the autoencoder that is to decode them.

    Raises:
        InputError: a latent of another factor.
    """

    def __init__(self, keys: KeysCollection, factor: int) -> None:
        super().__init__(keys)
        self.factor = factor

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            meta = data[key].meta
            if meta["sidecar"]["factor"] != self.factor:
                raise InputError(
                    f"latent {meta.get('filename_or_obj')} has factor {meta['sidecar']['factor']}, the autoencoder "
                    f"that is to decode it {self.factor}; give the weights that it was encoded with, or encode it again"
                )
        unscaled = {
            key: data[key] / float(data[key].meta["sidecar"]["scale_factor"]) for key in self.key_iterator(data)
        }
        return {**data, **unscaled}
