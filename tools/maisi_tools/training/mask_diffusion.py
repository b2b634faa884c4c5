"""What training the mask generator needs beyond the diffusion batch: organ sizes as the condition."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.diffusion.organ_sizes import UNKNOWN, OrganSizes
from maisi_tools.masks.edits import volumes_ml
from maisi_tools.training.diffusion import DiffusionBatch
from maisi_tools.training.loaders import sample_numbers, seed_of

SIZES = 10
"""Purpose of the random numbers that drop sizes, beside those of :mod:`maisi_tools.training.loaders`."""


class OrganSizesd(MapTransform):
    """Adds ``organ_sizes`` (number of organs,), measured in a mask.

    Args:
        keys: key of the mask (1, D, H, W).
        latent_key: key of the latent whose grid the mask is on, with the image's ``spacing`` in its sidecar.
        organs: see :class:`~maisi_tools.diffusion.organ_sizes.OrganSizes`.
    """

    def __init__(self, keys: str, latent_key: str, organs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(keys)
        self.latent_key = latent_key
        self.sizes = OrganSizes(organs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        spacing = data[self.latent_key].meta["sidecar"]["spacing"]
        labels = np.asarray(data[self.keys[0]])[0].astype(np.uint8)
        return {**data, "organ_sizes": self.sizes.of_volumes(volumes_ml(labels, spacing))}


class MaskDiffusionBatch(DiffusionBatch):
    """``prepare_batch`` of the mask generator's trainer: the one condition are the organ sizes.

    Args:
        size_dropout: sizes are replaced by :data:`~maisi_tools.diffusion.organ_sizes.UNKNOWN` one by one, at a rate
            drawn for each sample between 0 and this; so the network learns to obey one size alone, and all of them.
        kwargs: of :class:`~maisi_tools.training.diffusion.DiffusionBatch`.
    """

    def __init__(self, *args: Any, size_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size_dropout = float(size_dropout)

    def _conditions(self, batch: Mapping[str, Any], chance: Tensor, device: torch.device) -> dict[str, Tensor]:
        sizes = torch.as_tensor(batch["organ_sizes"]).to(device).float()
        kept = []
        for one, draw in zip(sizes, batch["draw"], strict=True):
            with sample_numbers(seed_of(self.seed, SIZES), int(draw), device):
                rate = self.size_dropout * torch.rand((), device=device)
                kept.append(torch.rand(one.shape, device=device) >= rate)
        return {"organ_sizes": torch.where(torch.stack(kept), sizes, UNKNOWN)}
