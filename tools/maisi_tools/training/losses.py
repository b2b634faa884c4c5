"""Losses of the MAISI stages that MONAI does not have in the form its trainers call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maisi_tools.training.adversarial import Adversary


class AutoencoderLoss(nn.Module):
    """Loss of the VAE-GAN's autoencoder (paper section 3.1): the sum of these terms, each times its weight.

    ======================  ==========================================================================================
    ``l1``                  mean absolute error, weight 1
    ``kl``                  KL divergence of the posterior from a unit normal, summed over a latent and averaged over
                            the batch as in the paper's code; so its weight is small (1e-7): it only keeps the latents'
                            scale in check
    ``perceptual``          ``perceptual(reconstruction, image)``
    ``adversarial``         what the adversary says of the reconstruction, from its first step on
    ======================  ==========================================================================================

    Called by MONAI's ``SupervisedTrainer`` with the training-mode output of
    :class:`maisi_tools.networks.Autoencoder`, ``(reconstruction, mean, sigma)``, and the image, both (B, 1, D, H, W) in
    [0, 1]. Afterwards ``terms`` holds each term of this call without its weight, and ``scale_factor`` 1 / standard
    deviation of the latents' means.

    Args:
        kl_weight: REFERENCE values are 1e-7 for the KL, 0.3 for the perceptual and 0.1 for the adversarial term.
        perceptual: None for no such term.
        perceptual_weight: see above.
        adversary: None for no such term.
        adversarial_weight: see above; with 0 the adversary is not asked.
    """

    def __init__(
        self,
        kl_weight: float,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
        adversary: Adversary | None = None,
        adversarial_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.adversary = adversary
        self.weights = {
            "l1": 1.0,
            "kl": kl_weight,
            "perceptual": perceptual_weight,
            "adversarial": adversarial_weight,
        }
        self.terms: dict[str, Tensor] = {}
        self.scale_factor = float("nan")

    def forward(self, prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, mean, sigma = (part.float() for part in prediction)
        target = target.float()
        variance = sigma.pow(2).clamp_min(1e-12)
        kl = 0.5 * (mean.pow(2) + variance - variance.log() - 1)
        terms = {"l1": nn.functional.l1_loss(reconstruction, target), "kl": kl.sum() / kl.shape[0]}
        if self.perceptual is not None and self.weights["perceptual"]:
            terms["perceptual"] = self.perceptual(reconstruction, target)
        if self.adversary is not None and self.weights["adversarial"] and self.adversary.active:
            terms["adversarial"] = self.adversary.generator_loss(reconstruction)
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.scale_factor = float(1 / mean.detach().std())
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()


class WeightedVelocityLoss(nn.Module):
    """L1 between predicted and wanted velocity (or noise), weighted by image region (paper section 3.3).

    The target is ``(target, weight)``, both at latent resolution; ``weight`` (B, 1, d, h, w) is larger where a voxel's
    label asks for more attention, 1 elsewhere. A plain tensor means weight 1 everywhere.
    """

    def forward(self, prediction: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        wanted, weight = target if isinstance(target, tuple) else (target, torch.ones_like(target[:, :1]))
        return ((prediction.float() - wanted.float()).abs() * weight).mean()
