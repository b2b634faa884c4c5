"""Losses of the MAISI stages that MONAI does not have in the form its trainers call."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AutoencoderLoss(nn.Module):
    """Reconstruction + KL loss of the VAE (paper section 3.1): ``L1 + kl_weight * KL``.

    Called by MONAI's ``SupervisedTrainer`` with the training-mode output of
    :class:`maisi_tools.networks.Autoencoder`, ``(reconstruction, mean, sigma)``, and the image, both (B, 1, D, H, W) in
    [0, 1]. KL is summed over a latent and averaged over the batch, as in the paper's code, so ``kl_weight`` is small
    (1e-7): it only keeps the latents' scale in check.
    """

    def __init__(self, kl_weight: float) -> None:
        super().__init__()
        self.kl_weight = kl_weight

    def forward(self, prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, mean, sigma = (part.float() for part in prediction)
        variance = sigma.pow(2).clamp_min(1e-12)
        kl = 0.5 * (mean.pow(2) + variance - variance.log() - 1)
        kl = kl.sum() / kl.shape[0]
        return nn.functional.l1_loss(reconstruction, target.float()) + self.kl_weight * kl


class WeightedVelocityLoss(nn.Module):
    """L1 between predicted and wanted velocity (or noise), weighted by image region (paper section 3.3).

    The target is ``(target, weight)``, both at latent resolution; ``weight`` (B, 1, d, h, w) is larger where a voxel's
    label asks for more attention, 1 elsewhere. A plain tensor means weight 1 everywhere.
    """

    def forward(self, prediction: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        wanted, weight = target if isinstance(target, tuple) else (target, torch.ones_like(target[:, :1]))
        return ((prediction.float() - wanted.float()).abs() * weight).mean()
