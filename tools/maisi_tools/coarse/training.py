"""What the two networks train on: cells of coarse CTs, and latents with coarse CTs beside them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from monai.networks.utils import pixelunshuffle
from monai.transforms import MapTransform, SpatialResample
from torch import Tensor

from maisi_tools.coarse.grid import CELL
from maisi_tools.coarse.sampler import FieldOfView
from maisi_tools.mask_generator.sizes import RARE, whole_range
from maisi_tools.training.diffusion import body_scale_factor
from maisi_tools.volumes.reading import read_volume

logger = logging.getLogger(__name__)

TISSUE = 0.4
"""In [0, 1], -200 HU: a coarse voxel above it lies in the body."""


class ReadCoarsed(MapTransform):
    """Reads a coarse CT, whose values are those of the image it was made from, in [0, 1].

    Args:
        keys: key of its path; data without it pass through.
        latent_key: key of a latent that is read already, on whose grid the coarse CT is put; None leaves it as it is.
    """

    def __init__(self, keys: str, latent_key: str | None = None) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.latent_key = latent_key
        self.resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            coarse: Tensor = read_volume(result[key], "ct", intensity_check=False)
            if self.latent_key is not None:
                latent = result[self.latent_key]
                coarse = self.resample(coarse, dst_affine=latent.affine, spatial_size=latent.shape[1:])
            result[key] = coarse
        return result


class CoarseCellsd(MapTransform):
    """What the network that draws coarse CTs trains on: ``latent`` (8, d, h, w) and ``organ_sizes`` (4,).

    Args:
        keys: the coarse CT, and the latent whose sidecar has the region; the first becomes cells, under the second.
        field_of_view: what the network is told.
    """

    def __init__(self, keys: Sequence[str], field_of_view: FieldOfView) -> None:
        super().__init__(keys)
        self.field_of_view = field_of_view

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        coarse, latent = (data[key] for key in self.keys)
        region = latent.meta["sidecar"].get("region") or ()
        told = self.field_of_view.vector(coarse.shape[1:], coarse.pixdim.tolist(), region)
        cells = pixelunshuffle(coarse.as_tensor()[None], 3, CELL)[0]
        return {self.keys[0]: coarse, self.keys[1]: cells, "organ_sizes": told}


def check_fields_of_view(cases: Sequence[Mapping[Hashable, Any]], field_of_view: FieldOfView) -> None:
    """Say where many cases are larger or smaller than what the network can be told.

    Args:
        cases: with the path of the coarse CT under ``coarse``.
        field_of_view: what the network is told.
    """
    coarse = [ReadCoarsed("coarse")(case)["coarse"] for case in cases]
    grids = [(one.shape[1:], one.pixdim.tolist()) for one in coarse]
    beyond = sum(not field_of_view.holds(*grid) for grid in grids)
    if beyond > RARE * len(grids):
        logger.warning(
            "%d of %d fields of view lie beyond field_of_view, %s mm, and count as its end; the data have %s: give "
            "that, here and as coarse#field_of_view of inference.json",
            *(beyond, len(grids), [list(pair) for pair in field_of_view.mm]),
            [whole_range(extents) for extents in zip(*(FieldOfView.extents(*grid) for grid in grids), strict=True)],
        )


def tissue_scale_factor(samples: Iterable[Mapping[str, Any]]) -> float:
    """As :func:`~maisi_tools.training.diffusion.body_scale_factor`, of what the coarse CT shows as tissue."""

    def within() -> Iterator[dict[str, Tensor]]:
        for one in samples:
            yield {"latent": one["latent"], "mask": torch.as_tensor(one["coarse"]) > TISSUE}

    return body_scale_factor(within())
