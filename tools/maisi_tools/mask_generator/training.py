"""What training the mask generator needs beyond the diffusion batch: organ sizes as the condition."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from monai.networks.schedulers import RFlowScheduler
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.prior import stacked
from maisi_tools.mask_generator.sizes import UNKNOWN, OrganSizes
from maisi_tools.training.diffusion import DiffusionBatch
from maisi_tools.training.loaders import sample_numbers, seed_of

SIZES = 10
"""Purpose of the random numbers that drop sizes, beside those of :mod:`maisi_tools.training.loaders`."""


class OrganSizesd(MapTransform):
    """Adds ``organ_sizes`` (number of organs,), from the volumes in a mask latent's sidecar.

    Args:
        keys: key of the latent, whose sidecar has ``label_ml`` as ``encode_mask.json`` writes it.
        organs: see :class:`~maisi_tools.mask_generator.sizes.OrganSizes`.

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


def size_directions(samples: Iterable[Mapping[str, Any]], scale_factor: float, ridge: float = 0.03) -> Tensor:
    """What of a mask latent tells how large each organ is: the linear function that fits the samples best.

    Ridge regression in its dual form (number of samples squared, not of latent voxels). On the OpenKBP masks its
    rank correlation with the volumes of kept-out patients is from 0.2 (spinal cord) over 0.7 (parotid glands) to 0.99
    (body): sizes themselves are no linear function, but the directions are those that matter.

    Args:
        samples: with ``latent`` (4, d, h, w), all of one shape, and ``organ_sizes`` as :class:`OrganSizesd` adds them.
        scale_factor: latents are multiplied by it, as in training.
        ridge: penalty, in units of the mean square of a latent.

    Returns:
        (number of organs, 4, d, h, w), in units of the organs' ranges; zeros for an organ with fewer than two sizes.

    Raises:
        InputError: latents of several shapes.
    """
    samples_latents, sizes = stacked(samples, scale_factor)
    latents = samples_latents.flatten(1)
    directions = torch.zeros(sizes.shape[1], latents.shape[1])
    for organ, size in enumerate(sizes.T):
        known = size != UNKNOWN
        if known.sum() < 2:
            continue
        apart = latents[known] - latents[known].mean(0)
        gram = (apart @ apart.T / latents.shape[1]).double()
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), (size[known] - size[known].mean()).double())
        directions[organ] = weights.float() @ apart / latents.shape[1]
    return directions.reshape(-1, *samples_latents.shape[1:])


class MaskDiffusionBatch(DiffusionBatch):
    """``prepare_batch`` of the mask generator's trainer: the one condition are the organ sizes.

    Args:
        size_dropout: sizes are replaced by :data:`~maisi_tools.mask_generator.sizes.UNKNOWN` one by one, at a rate
            drawn for each sample between 0 and this; so the network learns to obey one size alone, and all of them.
        latest: largest share of noise that is trained for; above it
            :class:`~maisi_tools.mask_generator.prior.ShapePrior` takes over.
        kwargs: of :class:`~maisi_tools.training.diffusion.DiffusionBatch`.

    Raises:
        InputError: `latest` is no share of noise, or is below 1 with another scheduler than rectified flow's.
    """

    def __init__(self, *args: Any, size_dropout: float = 0.0, latest: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size_dropout = float(size_dropout)
        self.latest = float(latest)
        if not 0 < self.latest <= 1:
            raise InputError(f"prior_until is {latest}; allowed is a share of noise above 0, up to 1")
        if self.latest < 1 and not isinstance(self.scheduler, RFlowScheduler):
            raise InputError(
                f"prior_until is {latest} with {type(self.scheduler).__name__}; the prior is for rectified flow: give "
                "--prior_components 0 --prior_until 1"
            )

    def _timestep(self, latent: Tensor) -> Tensor:
        timestep = super()._timestep(latent)
        while timestep > self.latest * self.scheduler.num_train_timesteps:
            timestep = super()._timestep(latent)
        return timestep

    def _conditions(self, batch: Mapping[str, Any], chance: Tensor, device: torch.device) -> dict[str, Tensor]:
        sizes = torch.as_tensor(batch["organ_sizes"]).to(device).float()
        kept = []
        for one, draw in zip(sizes, batch["draw"], strict=True):
            with sample_numbers(seed_of(self.seed, SIZES), int(draw), device):
                rate = self.size_dropout * torch.rand((), device=device)
                kept.append(torch.rand(one.shape, device=device) >= rate)
        return {"organ_sizes": torch.where(torch.stack(kept), sizes, UNKNOWN)}
