"""Losses of the MAISI stages that MONAI does not have in the form its trainers call."""

from __future__ import annotations

from torch import Tensor, nn

from maisi_tools.training.diffusion import Target


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
    """L1 between predicted and wanted velocity (or noise), weighted by voxel and sample (paper section 3.3).

    The target is a :class:`~maisi_tools.training.diffusion.Target`, or a plain tensor, which means weight 1 everywhere.
    """

    def forward(self, prediction: Tensor, target: Tensor | Target) -> Tensor:
        if isinstance(target, Tensor):
            return nn.functional.l1_loss(prediction.float(), target.float())
        return ((prediction.float() - target.value.float()).abs() * target.weight).mean()


class RegionContrastiveLoss(nn.Module):
    """:class:`WeightedVelocityLoss` plus MAISI-v2's region-specific contrastive loss (arXiv 2508.05772).

    Where the target has a ``region``, the prediction has two halves (2 B, 4, d, h, w): from the mask as it is, and from
    the mask whose labels in the region are replaced. They should differ inside the region and agree outside it, away
    from its border: ``L1 + contrast_weight (mean outside |difference| - min(mean inside |difference|, limit))``. Both
    means are taken for each sample; a sample without a region adds nothing.

    Args:
        contrast_weight: the paper's is 0.01.
        limit: beyond which a difference inside is no longer rewarded; the paper's is 2.

    Attributes:
        terms: "l1" and "contrast" (before its weight) of the last call.
    """

    def __init__(self, contrast_weight: float, limit: float) -> None:
        super().__init__()
        self.contrast_weight = float(contrast_weight)
        self.limit = float(limit)
        self.l1 = WeightedVelocityLoss()
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: Tensor, target: Tensor | Target) -> Tensor:
        if isinstance(target, Tensor) or target.region is None:
            l1, contrast = self.l1(prediction, target), prediction.new_zeros(())
        else:
            prediction, other = prediction.chunk(2)
            l1 = self.l1(prediction, target)
            contrast = region_contrast(prediction, other, target.region, self.limit)
        self.terms = {"l1": l1.detach(), "contrast": contrast.detach()}
        return l1 + self.contrast_weight * contrast


def region_contrast(prediction: Tensor, other: Tensor, region: Tensor, limit: float) -> Tensor:
    """``mean outside |difference| - min(mean inside |difference|, limit)``, averaged over the samples.

    Args:
        prediction: (B, 4, d, h, w).
        other: of the same shape.
        region: (B, 1, d, h, w), 1 inside, else 0. Outside begins beyond its neighbouring voxels: the paper dilates the
            region and does not say how far; one latent voxel is four of the image.
        limit: see :class:`RegionContrastiveLoss`.
    """
    difference = (prediction.float() - other.float()).abs().mean(1, keepdim=True)
    outside = 1 - nn.functional.max_pool3d(region, 3, stride=1, padding=1)
    axes = (1, 2, 3, 4)
    inside = (difference * region).sum(axes) / region.sum(axes).clamp_min(1)
    around = (difference * outside).sum(axes) / outside.sum(axes).clamp_min(1)
    shown = region.amax(axes)  # 0 for a sample without a region: its halves are the same
    return ((around - inside.clamp_max(limit)) * shown).mean()
