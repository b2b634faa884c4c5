"""Losses of the MAISI stages that MONAI does not have in the form its trainers call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maisi_tools.errors import InputError
from maisi_tools.training.adversarial import Adversary
from maisi_tools.training.diffusion import Target


class AutoencoderLoss(nn.Module):
    """Loss of the VAE-GAN's autoencoder (paper section 3.1): the sum of these terms, each times its weight.

    ======================  ==========================================================================================
    ``l1``                  mean absolute error; with ``intensity_weights`` a weighted mean over each image
    ``mse``                 mean squared error, weighted likewise; of use where the network starts near its goal
    ``kl``                  KL divergence of the posterior from a unit normal, summed over a latent and averaged over
                            the batch as in the paper's code; so its weight is small (1e-7): it only keeps the latents'
                            scale in check. With ``kl_per_value`` its mean, which does not grow with the image
    ``perceptual``          ``perceptual(reconstruction, image)``
    ``adversarial``         what the adversary says of the reconstruction, from its first step on
    ======================  ==========================================================================================

    Called by MONAI's ``SupervisedTrainer`` with the training-mode output of
    :class:`maisi_tools.networks.Autoencoder`, ``(reconstruction, mean, sigma)``, and the image, both (B, 1, D, H, W) in
    [0, 1].

    Args:
        kl_weight: MAISI's released training settings have 1e-7.
        kl_per_value: take the mean over the latent's values instead of the sum.
        l1_weight: the paper's is 1.
        mse_weight: the paper has no such term.
        perceptual: None for no such term.
        perceptual_weight: there 0.3.
        adversary: None for no such term.
        adversarial_weight: there 0.1; with 0 the adversary is not asked.
        intensity_weights: (lowest, highest, weight) for ranges of the image's intensities whose voxels have this weight
            in ``l1`` and ``mse``, 1 elsewhere; where ranges overlap, the last one counts. L1 alone draws what is thin,
            such as an airway between two walls, to the tissue around it.

    Attributes:
        terms: each term of the last call before its weight, and "scale_factor", 1 / standard deviation of the latents
            (of the posteriors' means), which the KL weight should keep near 1.

    Raises:
        InputError: ``intensity_weights`` is not a list of such ranges with positive weights.
    """

    def __init__(
        self,
        kl_weight: float,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 0.0,
        adversary: Adversary | None = None,
        adversarial_weight: float = 0.0,
        intensity_weights: Sequence[Sequence[float]] = (),
        l1_weight: float = 1.0,
        mse_weight: float = 0.0,
        kl_per_value: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(intensity_weights, Sequence) or not all(map(_is_weighted_range, intensity_weights)):
            raise InputError(
                f"intensity_weights is {intensity_weights!r}; allowed is a list of [lowest, highest, weight] with "
                "lowest <= highest in the image's intensities (0 to 1) and a weight above 0: [[0.0, 0.3, 6.0]]"
            )
        self.intensity_weights = intensity_weights
        self.kl_per_value = kl_per_value
        self.perceptual = perceptual
        self.adversary = adversary
        self.weights = {
            "l1": l1_weight,
            "mse": mse_weight,
            "kl": kl_weight,
            "perceptual": perceptual_weight,
            "adversarial": adversarial_weight,
        }
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        reconstruction, mean, sigma = (part.float() for part in prediction)
        target = target.float()
        _check_alike(reconstruction, target)
        error = (reconstruction - target).abs()
        weight = self._weight(target)
        kl = kl_divergence(mean, sigma)
        terms = {"l1": _mean(error, weight), "kl": kl / mean[0].numel() if self.kl_per_value else kl}
        if self.weights["mse"]:
            terms["mse"] = _mean(error.square(), weight)
        if self.perceptual is not None and self.weights["perceptual"]:
            terms["perceptual"] = self.perceptual(reconstruction, target)
        if self.adversary is not None and self.weights["adversarial"] and self.adversary.active:
            terms["adversarial"] = self.adversary.generator_loss(reconstruction)
        self.terms = {name: term.detach() for name, term in terms.items()}
        self.terms["scale_factor"] = 1 / mean.detach().std()
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _weight(self, target: Tensor) -> Tensor | None:
        if not self.intensity_weights:
            return None
        weight = torch.ones_like(target)
        for lowest, highest, value in self.intensity_weights:
            weight[(target >= lowest) & (target <= highest)] = value
        return weight


def _check_alike(prediction: Tensor, target: Tensor) -> None:
    """Refuse what torch would broadcast, such as the doubled batch of a contrast against its one target."""
    if prediction.shape != target.shape:
        raise InputError(
            f"the prediction has the shape {tuple(prediction.shape)}, its target {tuple(target.shape)}; allowed is one "
            "shape for both; with contrast_labels the loss has to be RegionContrastiveLoss"
        )


def _mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted image by image, so that the ranks' mean is that of the whole batch."""
    if weight is None:
        return error.mean()
    axes = (1, 2, 3, 4)
    return (error * weight).sum(axes).div(weight.sum(axes)).mean()


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence of N(mean, sigma) from a unit normal, summed over a latent and averaged over the batch."""
    variance = sigma.pow(2).clamp_min(1e-12)
    return 0.5 * (mean.pow(2) + variance - variance.log() - 1).sum() / mean.shape[0]


def _is_weighted_range(entry: object) -> bool:
    if not isinstance(entry, Sequence) or len(entry) != 3:
        return False
    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in entry)
    return numbers and entry[0] <= entry[1] and entry[2] > 0


class WeightedVelocityLoss(nn.Module):
    """L1 between predicted and wanted velocity (or noise), weighted by voxel and sample (paper section 3.3).

    The target is a :class:`~maisi_tools.training.diffusion.Target`, or a plain tensor, which means weight 1 everywhere.

    Args:
        power: of the absolute difference. 1 is the paper's; its optimum is the median of what may come, with which a
            sample of few voxels of one kind loses them where samples differ much, as masks do. 2 has the mean, with
            which the flow keeps the distribution (Lipman et al. 2023, arXiv 2210.02747, theorem 2).

    Attributes:
        terms: what a subclass adds up; here there is but one.

    Raises:
        InputError: prediction and target have different shapes, when called.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = float(power)
        self.terms: dict[str, Tensor] = {}

    def forward(self, prediction: Tensor, target: Tensor | Target) -> Tensor:
        value, weight = (target, 1.0) if isinstance(target, Tensor) else (target.value, target.weight)
        _check_alike(prediction, value)
        return ((prediction.float() - value.float()).abs() ** self.power * weight).mean()


class SizeVelocityLoss(WeightedVelocityLoss):
    """:class:`WeightedVelocityLoss` with power 2, plus the squared error of each organ's size, for the mask generator.

    A small organ fills a handful of the latent's voxels, so that the plain loss hardly notices whether it has the size
    that was asked for. The size is taken as a linear function of the latent, which makes the sum a squared error in
    another metric: its optimum is the same velocity, the mean of what may come.

    Args:
        directions: (number of organs, 4, d, h, w), what of a latent tells each organ's size, see
            :func:`~maisi_tools.mask_generator.training.size_directions`.
        size_weight: of the sizes' errors, summed over organs.

    Attributes:
        terms: "l2" and "size" (before its weight) of the last call.
    """

    directions: Tensor

    def __init__(self, directions: Tensor, size_weight: float) -> None:
        super().__init__(power=2)
        self.register_buffer("directions", directions.flatten(1), persistent=False)
        self.size_weight = float(size_weight)

    def forward(self, prediction: Tensor, target: Tensor | Target) -> Tensor:
        value = target if isinstance(target, Tensor) else target.value
        l2 = super().forward(prediction, target)
        apart = (prediction.float() - value.float()).flatten(1)
        size = (apart @ self.directions.to(apart).T).square().sum(1).mean()
        self.terms = {"l2": l2.detach(), "size": size.detach()}
        return l2 + self.size_weight * size


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
