"""Batches for training the diffusion stages: noise, timesteps, targets and conditions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.networks.schedulers import RFlowScheduler
from monai.networks.schedulers.scheduler import Scheduler
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn.functional import interpolate

from maisi_tools.diffusion.conditions import CONDITIONS, Conditions
from maisi_tools.volumes.latents import FACTOR


class ConditionTensorsd(MapTransform):
    """Adds the U-Net's condition inputs of a cached latent, read from its sidecar.

    Args:
        keys: key of the latent, a ``MetaTensor`` with ``meta["sidecar"]`` as
            :class:`maisi_tools.volumes.reading.ReadVolumed` leaves it.
        condition_scale: see :meth:`maisi_tools.diffusion.conditions.Conditions.tensors`.
    """

    def __init__(self, keys: str, condition_scale: float) -> None:
        super().__init__(keys)
        self.condition_scale = condition_scale

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        latent = data[self.keys[0]]
        sidecar = latent.meta["sidecar"]
        conditions = Conditions(
            size=tuple(FACTOR * n for n in latent.shape[1:]),
            spacing=sidecar["spacing"],
            region=sidecar.get("region") or (),
            modality=sidecar.get("modality", "ct"),
        )
        return dict(data) | conditions.tensors(self.condition_scale)


class DiffusionBatch:
    """``prepare_batch`` of the trainers of stages 2 and 3.

    Draws a timestep and noise for each latent and returns what MONAI's ``SupervisedTrainer`` passes on:
    ``(input, target, (), network keywords)``. The target is ``latent - noise`` for rectified flow, ``noise`` for the
    other schedulers (paper section 3.2; MAISI-v2 section 3.1).

    Args:
        scheduler: adds the noise; ``RFlowScheduler`` also draws the timesteps.
        scale_factor: latents are multiplied by it.
        condition_dropout: probability of replacing all conditions of a sample by their null values (zeros), so that
            classifier-free guidance has an unconditional model.
        mask_key: key of the label mask (B, 1, D, H, W) when a ControlNet is trained; the mask is then the network's
            input and the noisy latent the keyword ``latent``.
        label_weights: label -> weight of its voxels in the loss (the paper weights tumours with 100); 1 elsewhere.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        scale_factor: float,
        condition_dropout: float = 0.0,
        latent_key: str = "latent",
        mask_key: str | None = None,
        label_weights: Mapping[int, float] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.scale_factor = float(scale_factor)
        self.condition_dropout = float(condition_dropout)
        self.latent_key = latent_key
        self.mask_key = mask_key
        self.label_weights = {int(label): float(weight) for label, weight in (label_weights or {}).items()}

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor], tuple, dict[str, Tensor]]:
        latent = torch.as_tensor(batch[self.latent_key]).to(device, non_blocking=non_blocking) * self.scale_factor
        noise = torch.randn_like(latent)
        if isinstance(self.scheduler, RFlowScheduler):
            timesteps = self.scheduler.sample_timesteps(latent)
            target = latent - noise
        else:
            timesteps = torch.randint(0, self.scheduler.num_train_timesteps, (len(latent),), device=device)
            target = noise
        noisy = self.scheduler.add_noise(latent, noise, timesteps)

        kept = torch.rand(len(latent), device=device) >= self.condition_dropout
        keywords: dict[str, Tensor] = {"timesteps": timesteps}
        for name in CONDITIONS:
            value = batch[name].to(device)
            keywords[name] = value * kept.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))
        if self.mask_key is None:
            return noisy, target, (), keywords
        mask = torch.as_tensor(batch[self.mask_key]).to(device, non_blocking=non_blocking)
        keywords["latent"] = noisy
        if not self.label_weights:
            return mask, target, (), keywords
        weight = torch.ones(mask.shape, device=device)
        for label, value in self.label_weights.items():
            weight[mask == label] = value
        return mask, (target, interpolate(weight, size=latent.shape[2:], mode="area")), (), keywords


def latent_scale_factor(latents: Sequence[Tensor]) -> float:
    """1 / standard deviation over all voxels of all latents, so that scaled latents have unit variance."""
    count = sum(latent.numel() for latent in latents)
    mean = sum(latent.double().sum() for latent in latents) / count
    variance = sum((latent.double() - mean).pow(2).sum() for latent in latents) / count
    return float(variance**-0.5)
