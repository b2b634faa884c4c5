"""What training the mask generator needs beyond the diffusion batch: organ sizes as the condition."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.diffusion.organ_sizes import UNKNOWN, OrganSizes
from maisi_tools.errors import InputError
from maisi_tools.training.diffusion import DiffusionBatch
from maisi_tools.training.loaders import sample_numbers, seed_of

SIZES = 10
"""Purpose of the random numbers that drop sizes, beside those of :mod:`maisi_tools.training.loaders`."""


class OrganSizesd(MapTransform):
    """Adds ``organ_sizes`` (number of organs,), from the volumes in a mask latent's sidecar.

    Args:
        keys: key of the latent, whose sidecar has ``label_ml`` as ``encode_mask.json`` writes it.
        organs: see :class:`~maisi_tools.diffusion.organ_sizes.OrganSizes`.

    Raises:
        InputError: the sidecar has no volumes.
    """

    def __init__(self, keys: str, organs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(keys)
        self.sizes = OrganSizes(organs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        meta = data[self.keys[0]].meta
        if "label_ml" not in meta["sidecar"]:
            raise InputError(
                f"latent {meta.get('filename_or_obj')} has no label_ml in its sidecar, the volumes of a mask's labels; "
                "the mask generator trains from masks encoded with encode.json and encode_mask.json of maisi_vae"
            )
        volumes = {int(label): float(ml) for label, ml in meta["sidecar"]["label_ml"].items()}
        return {**data, "organ_sizes": self.sizes.of_volumes(volumes)}


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
