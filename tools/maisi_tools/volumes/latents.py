"""A latent on disk: a 4-channel NIfTI on the latent grid, and a JSON that tells how it becomes a CT again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation
from numpy.typing import ArrayLike

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import UNRECORDED_FACTOR, check_latent_size, checked_scale_factor
from maisi_tools.volumes.grid import crop_to, image_affine, latent_affine
from maisi_tools.volumes.normalise import HU_RANGE, intensity_of
from maisi_tools.volumes.orientation import from_ras

SIDECAR = ("size", "spacing", "orientation", "region", "modality", "intensity", "factor", "scale_factor")
"""What the sidecar holds: voxels and mm of the image the latent stands for (RAS), the orientation to write it in, the
conditions, the values that 0 and 1 of the image stand for, image voxels per latent voxel along each axis, and what the
latent is divided by before decoding."""


NEEDED = ("size", "spacing", "scale_factor")
"""What a sidecar must hold: without it there is no way back to an image."""


def checked_sidecar(sidecar: Mapping[str, Any], latent: Sequence[int], affine: ArrayLike, name: str) -> dict[str, Any]:
    """A latent's sidecar, checked, with its factor.

    Args:
        sidecar: as in the file, without entries that are null.
        latent: voxels (d, h, w) of the latent.
        affine: (4, 4) of the latent, in mm.
        name: of the latent's file.

    Returns:
        The sidecar; its "factor" is :data:`~maisi_tools.volumes.checks.UNRECORDED_FACTOR` where it has none.

    Raises:
        InputError: an entry is missing, or is not what it should be, or does not fit the latent.
    """
    if missing := [key for key in NEEDED if sidecar.get(key) is None]:
        raise InputError(
            f"the sidecar of {name} has no {', '.join(missing)}; allowed is one as the encode config writes it: encode "
            "the volume again, or add the entries"
        )
    factor = sidecar.get("factor", UNRECORDED_FACTOR)
    check_latent_size(latent, sidecar["size"], factor, name)
    checked_scale_factor(sidecar["scale_factor"], f"the sidecar of {name}", "encode it again")
    spacing, given = sidecar["spacing"], np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0) / factor
    numbers = isinstance(spacing, (list, tuple)) and all(type(mm) in (int, float) for mm in spacing)
    if not numbers or len(spacing) != 3 or not np.allclose(spacing, given, rtol=1e-3):
        raise InputError(
            f"the sidecar of {name} has the spacing {spacing!r}; the latent's own grid and the factor {factor} give "
            f"{np.round(given, 4).tolist()} mm, and allowed is that: encode it again"
        )
    orientation = sidecar.get("orientation", "RAS")
    if not isinstance(orientation, str) or sorted(map(_AXES.get, orientation), key=str) != ["AP", "IS", "LR"]:
        raise InputError(
            f"the sidecar of {name} has the orientation {orientation!r}; allowed are three letters such as RAS or LPS"
        )
    region = sidecar.get("region", [])
    if not isinstance(region, (list, tuple)) or not all(isinstance(one, str) for one in region):
        raise InputError(f"the sidecar of {name} has the region {region!r}; allowed is a list of names")
    ends = sidecar.get("intensity", HU_RANGE)
    finite = isinstance(ends, (list, tuple)) and all(type(end) in (int, float) and np.isfinite(end) for end in ends)
    if not finite or len(ends) != 2 or ends[0] >= ends[1]:
        raise InputError(
            f"the sidecar of {name} has the intensity {ends!r}; allowed are two finite numbers, the values of the "
            "image that 0 and 1 stand for, the lower one first: encode it again"
        )
    return {**sidecar, "factor": factor}


_AXES = {letter: pair for pair in ("LR", "AP", "IS") for letter in pair}


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
            "intensity": list(intensity_of(image)),
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
        affine = torch.as_tensor(image_affine(latent.affine, int(sidecar["factor"])))
        ct = MetaTensor(ct, affine=affine, meta=meta)
        if torch.linalg.det(affine[:3, :3]) < 0:  # a mirrored view, which lies otherwise than RAS
            ct = Orientation(axcodes="RAS", labels=None)(ct)
        return {**data, self.keys[0]: from_ras(ct, sidecar.get("orientation", "RAS"))}


class UnscaleLatentd(MapTransform):
    """Divides a latent read from disk by its sidecar's ``scale_factor``, so that the decoder can take it.

    The item gets ``from_scan``: whether the latent was encoded from a scan, not drawn.

    Args:
        keys: latents with ``meta["sidecar"]``.
        factor: of the autoencoder that is to decode them.
        encoder: its fingerprint, see :func:`maisi_tools.weights.encoder_fingerprint`; None where it does not matter.

    Raises:
        InputError: a latent of another factor, or one that records another encoder (one that was drawn has none).
    """

    def __init__(self, keys: KeysCollection, factor: int, encoder: str | None = None) -> None:
        super().__init__(keys)
        self.factor = factor
        self.encoder = encoder

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            meta = data[key].meta
            if meta["sidecar"]["factor"] != self.factor:
                raise InputError(
                    f"latent {meta.get('filename_or_obj')} has factor {meta['sidecar']['factor']}, the autoencoder "
                    f"that is to decode it {self.factor}; give the weights that it was encoded with, or encode it again"
                )
            made_by = meta["sidecar"].get("autoencoder", self.encoder)
            if self.encoder is not None and made_by != self.encoder:
                raise InputError(
                    f"latent {meta.get('filename_or_obj')} comes from an autoencoder with {made_by}, and that which is "
                    f"to decode it has {self.encoder}; give the weights that it was encoded with, or encode it again"
                )
        unscaled = {key: data[key] / data[key].meta["sidecar"]["scale_factor"] for key in self.key_iterator(data)}
        from_scan = any("source" in data[key].meta["sidecar"] for key in self.key_iterator(data))
        return {**data, **unscaled, "from_scan": from_scan}
