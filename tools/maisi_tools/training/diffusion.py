"""Batches for training the diffusion stages: noise, timesteps, targets and conditions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from monai.handlers import MeanAbsoluteError
from monai.networks.schedulers import RFlowScheduler
from monai.networks.schedulers.ddpm import DDPMPredictionType
from monai.networks.schedulers.scheduler import Scheduler
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn.functional import adaptive_max_pool3d, avg_pool3d, interpolate

from maisi_tools.diffusion.conditions import CONDITIONS, MR_CODES, Conditions
from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import label_of, region_in
from maisi_tools.settings import check_number
from maisi_tools.training.loaders import sample_numbers, seed_of

COARSE = 11
"""Purpose of the random numbers that are the noise on coarse CTs, beside those of :mod:`~maisi_tools.training.loaders`
and of the mask generator."""


class ConditionTensorsd(MapTransform):
    """Adds the U-Net's condition inputs of a cached latent, read from its sidecar, as drawing has them.

    Args:
        keys: key of the latent, a ``MetaTensor`` with ``meta["sidecar"]`` as
            :class:`maisi_tools.volumes.reading.ReadVolumed` leaves it.
        condition_scale: see :meth:`maisi_tools.diffusion.conditions.Conditions.tensors`.
        mask_key: key of the mask that is drawn from, as the network sees it: it tells the region, and the sidecar does
            not, since there is none where a CT is drawn from a mask.
    """

    def __init__(self, keys: str, condition_scale: float, mask_key: str | None = None) -> None:
        super().__init__(keys)
        self.condition_scale = condition_scale
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        latent = data[self.keys[0]]
        sidecar = latent.meta["sidecar"]
        region = sidecar.get("region") or ()
        if self.mask_key is not None:
            region = region_in(torch.as_tensor(data[self.mask_key]))
        conditions = Conditions(
            size=tuple(sidecar["factor"] * n for n in latent.shape[1:]),
            spacing=sidecar["spacing"],
            region=region,
            modality=sidecar.get("modality", "ct"),
        )
        return dict(data) | conditions.tensors(self.condition_scale)


class Target(NamedTuple):
    """What the network should return, with weights.

    Attributes:
        value: (B, 4, d, h, w).
        weight: of the loss, broadcastable to (B, 1, d, h, w).
        region: (B, 1, d, h, w), 1 where the network's second half of the batch saw another mask than the first, else
            0; None when the batch was not doubled.
    """

    value: Tensor
    weight: Tensor
    region: Tensor | None = None


class DiffusionBatch:
    """``prepare_batch`` of the trainers of stages 2 and 3.

    Draws a timestep and noise for each latent and returns what MONAI's ``SupervisedTrainer`` passes on:
    ``(input, target, (), network keywords)``. The target is ``latent - noise`` for rectified flow (MAISI-v2 section
    3.1); for the other schedulers it is what their ``prediction_type`` says, ``noise`` for MAISI (paper section 3.2).
    All that is random about a sample follows from ``seed`` and its number (``batch["draw"]``, see
    :mod:`maisi_tools.training.loaders`), whatever the batch and the rank it is in.

    Args:
        scheduler: adds the noise; ``RFlowScheduler`` also draws the timesteps. Its ``sample_method`` "logit-normal"
            draws them around the middle (Esser et al. 2024, arXiv 2403.03206, section 3.1).
        scale_factor: latents are multiplied by it.
        seed: of timesteps, noise and dropped conditions.
        condition_dropout: probability of replacing all conditions of a sample by their null value (zeros), so that
            classifier-free guidance has an unconditional model.
        modality_dropout: probability of replacing the modality alone (MAISI: 0.1).
        modality_coarsening: probability of replacing a modality by the one above it: CT with or without contrast
            (2, 3) by CT (1), the kinds of MR (9 to 33) by MR (8) (MAISI: 0.1).
        min_snr_gamma: weights a sample's loss by its signal-to-noise ratio clipped at this (Hang et al. 2023, arXiv
            2303.09556; they take 5); None for weight 1. Not for rectified flow, which has no such ratio.
        mask_key: key of the label mask (B, 1, D, H, W) when a ControlNet is trained; the mask is then the network's
            input and the noisy latent the keyword ``latent``.
        mask_dropout: probability of replacing the whole mask by zeros.
        control_dropout: probability of leaving the ControlNet's residuals out (the keyword ``conditioning_scale`` is
            then 0), so that a U-Net that is trained with its ControlNet also learns to do without.
        label_weights: label -> weight of its voxels in the loss (the paper weights tumours with 100); 1 elsewhere. A
            label is an id or a name, here and in `contrast_labels`: :func:`~maisi_tools.masks.vocabulary.label_of`.
        contrast_labels: label -> label around it, for the region-contrastive loss of MAISI-v2: a batch that
            shows such a label is doubled, and the second half sees the mask with the label replaced.
        coarse_noise: standard deviation of the noise on the coarse CTs that the U-Net sees (``batch["coarse"]``, (B, 1,
            d, h, w), where there are any), drawn for each sample between 0 and this: at inference they are drawn, too,
            and not as true as in training.

    Raises:
        InputError: ``min_snr_gamma`` is given for rectified flow; a label is none, or its weight no number from 0 on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        scale_factor: float,
        seed: int,
        condition_dropout: float = 0.0,
        modality_dropout: float = 0.0,
        modality_coarsening: float = 0.0,
        min_snr_gamma: float | None = None,
        latent_key: str = "latent",
        mask_key: str | None = None,
        mask_dropout: float = 0.0,
        control_dropout: float = 0.0,
        label_weights: Mapping[int, float] | None = None,
        contrast_labels: Mapping[int, int] | None = None,
        coarse_noise: float = 0.0,
    ) -> None:
        if min_snr_gamma is not None and isinstance(scheduler, RFlowScheduler):
            raise InputError(
                f"min_snr_gamma is {min_snr_gamma}, but rectified flow has no signal-to-noise weighting; leave it out, "
                "or train with a DDPM scheduler; for rectified flow there is timestep_sampling logit-normal"
            )
        self.scheduler = scheduler
        self.scale_factor = float(scale_factor)
        self.seed = seed
        self.condition_dropout = float(condition_dropout)
        self.modality_dropout = float(modality_dropout)
        self.modality_coarsening = float(modality_coarsening)
        self.min_snr_gamma = min_snr_gamma
        self.latent_key = latent_key
        self.mask_key = mask_key
        self.mask_dropout = float(mask_dropout)
        self.control_dropout = float(control_dropout)
        for label, weight in (label_weights or {}).items():
            check_number(f"label_weights of {label}", weight, 0, math.inf)
        self.label_weights = {label_of(label): float(weight) for label, weight in (label_weights or {}).items()}
        self.contrast_labels = {label_of(label): label_of(other) for label, other in (contrast_labels or {}).items()}
        self.coarse_noise = float(coarse_noise)

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | Target, tuple, dict[str, Tensor]]:
        latent = torch.as_tensor(batch[self.latent_key]).to(device, non_blocking=non_blocking) * self.scale_factor
        noise, timesteps, chance = self._draw(latent, batch["draw"])
        noisy = self.scheduler.add_noise(latent, noise, timesteps)
        target, weight = self._target(latent, noise, timesteps)

        keywords = {"timesteps": timesteps, **self._conditions(batch, chance, device)}
        if "coarse" in batch:
            noisy = torch.cat([noisy, self._coarse(batch, device)], 1)
        if self.mask_key is None:
            return noisy, target if weight is None else Target(target, weight), (), keywords

        keywords["latent"] = noisy
        if self.control_dropout:
            keywords["conditioning_scale"] = (chance[4] >= self.control_dropout).to(noisy.dtype).reshape(-1, 1, 1, 1, 1)
        mask = torch.as_tensor(batch[self.mask_key]).to(device, non_blocking=non_blocking)
        if self.label_weights:
            labelled = torch.ones(mask.shape, device=device)
            for label, value in self.label_weights.items():
                labelled[mask == label] = value
            labelled = interpolate(labelled, size=latent.shape[2:], mode="area")
            weight = labelled if weight is None else weight * labelled
        mask = mask * (chance[3] >= self.mask_dropout).to(mask.dtype).reshape(-1, 1, 1, 1, 1)
        other = mask.clone() if self.contrast_labels else mask
        for label, around in self.contrast_labels.items():
            other[mask == label] = around
        if not self.contrast_labels or torch.equal(mask, other):
            return mask, target if weight is None else Target(target, weight), (), keywords
        region = adaptive_max_pool3d((mask != other).float(), latent.shape[2:])
        weight = torch.ones_like(region) if weight is None else weight
        keywords = {name: torch.cat([value, value]) for name, value in keywords.items()}
        return torch.cat([mask, other]), Target(target, weight, region), (), keywords

    def _conditions(self, batch: Mapping[str, Any], chance: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The network's condition inputs, of some samples replaced by their null value."""
        conditions = {name: batch[name].to(device) for name in CONDITIONS}
        conditions["class_labels"] = self._coarsened(conditions["class_labels"], chance)
        kept = chance[0] >= self.condition_dropout
        return {
            name: value * kept.to(value.dtype).reshape(-1, *[1] * (value.ndim - 1))
            for name, value in conditions.items()
        }

    def _coarse(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The coarse CTs, with noise."""
        coarse = torch.as_tensor(batch["coarse"]).to(device).float()
        if not self.coarse_noise:
            return coarse
        noised = []
        for one, draw in zip(coarse.split(1), batch["draw"].tolist(), strict=True):
            with sample_numbers(seed_of(self.seed, COARSE), draw, device):
                spread = self.coarse_noise * torch.rand((), device=device)
                noised.append(one + spread * torch.randn_like(one))
        return torch.cat(noised)

    def _draw(self, latent: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, 4, d, h, w), timesteps (B,), and five uniform numbers for each sample (5, B)."""
        noise, timesteps, chance = [], [], []
        for one, draw in zip(latent.split(1), draws.tolist(), strict=True):
            with sample_numbers(self.seed, draw, latent.device):
                noise.append(torch.randn_like(one))
                timesteps.append(self._timestep(one))
                chance.append(torch.rand(5, 1, device=latent.device))
        return torch.cat(noise), torch.cat(timesteps), torch.cat(chance, dim=1)

    def _timestep(self, latent: Tensor) -> Tensor:
        """(1,), drawn from the random numbers of the sample (1, 4, d, h, w)."""
        if isinstance(self.scheduler, RFlowScheduler):
            return self.scheduler.sample_timesteps(latent)
        return torch.randint(self.scheduler.num_train_timesteps, (1,), device=latent.device)

    def _target(self, latent: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network should return, and the min-SNR weight (B, 1, 1, 1, 1) of each sample."""
        if isinstance(self.scheduler, RFlowScheduler):
            return latent - noise, None
        kept = self.scheduler.alphas_cumprod.to(latent)[timesteps].reshape(-1, 1, 1, 1, 1)
        snr = kept / (1 - kept)
        kind = self.scheduler.prediction_type  # type: ignore[attr-defined]
        if kind == DDPMPredictionType.EPSILON:
            target, scale = noise, 1 / snr
        elif kind == DDPMPredictionType.SAMPLE:
            target, scale = latent, torch.ones_like(snr)
        else:  # v, Salimans and Ho 2022 (arXiv 2202.00512)
            target, scale = kept.sqrt() * noise - (1 - kept).sqrt() * latent, 1 / (snr + 1)
        return target, None if self.min_snr_gamma is None else snr.clamp_max(self.min_snr_gamma) * scale

    def _coarsened(self, labels: Tensor, chance: Tensor) -> Tensor:
        """The modalities, some replaced by a more general one or by 0 (unknown)."""
        kinds_of_mr = (labels >= MR_CODES[0]) & (labels <= MR_CODES[-1])
        coarse = torch.where((labels == 2) | (labels == 3), 1, torch.where(kinds_of_mr, MR_CODES[0], labels))
        labels = torch.where(chance[1] < self.modality_coarsening, coarse, labels)
        return torch.where(chance[2] < self.modality_dropout, 0, labels)


def latent_scale_factor(latents: Iterable[Tensor]) -> float:
    """1 / standard deviation over all voxels of all latents, so that scaled latents have unit variance.

    The latents are looked at one after another; counts, means and sums of squares are merged as in Chan et al. (1983).
    """
    count, mean, squares = 0, 0.0, 0.0
    for latent in latents:
        values = torch.as_tensor(latent).double()
        own, n = float(values.mean()), values.numel()
        squares += float((values - own).pow(2).sum()) + (own - mean) ** 2 * count * n / (count + n)
        mean += (own - mean) * n / (count + n)
        count += n
    return (count / squares) ** 0.5


def body_scale_factor(samples: Iterable[Mapping[str, Any]]) -> float:
    """1 / standard deviation over the cells that lie in the body, each channel about its own mean.

    The step from air to body is the largest thing in a latent of a CT. Scaled by that, what differs between soft
    tissues is small beside the noise.

    Args:
        samples: with ``latent`` (4, d, h, w) and ``mask`` (1, D, H, W), not 0 in the body.

    Raises:
        InputError: no cell lies in a body.
    """
    inside = []
    for sample in samples:
        latent, mask = torch.as_tensor(sample["latent"]).double(), torch.as_tensor(sample["mask"])
        block = [n // m for n, m in zip(mask.shape[1:], latent.shape[1:], strict=True)]
        share = avg_pool3d((mask > 0).double(), block)[0]
        inside.append(latent[:, share == 1])
    values = torch.cat(inside, 1) if inside else torch.empty(4, 0)
    if not values.shape[1]:
        raise InputError("no cell of the latents lies in a body; give masks of the CTs that were encoded")
    return float(1 / values.var(1, correction=0).mean().sqrt())


def velocity_error() -> MeanAbsoluteError:
    """The mean absolute error of what a U-Net says of a noisy latent, for a validation."""
    return MeanAbsoluteError(output_transform=lambda output: (output["pred"].float(), output["label"]))
