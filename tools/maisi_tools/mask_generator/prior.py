"""How mask latents and organ sizes vary together: a Gaussian, which knows the coarse shape that a U-Net learns last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.volumes.checks import check_output_size, check_spacing
from maisi_tools.weights import weight_shapes

RIDGE = 0.07
"""Penalty of the sizes' regression, as a share of the number of samples; the components have unit variance."""

LEAST_TIME = 1e-3
"""Below this share of noise the noisy latent is the latent."""


def check_grid(
    size: Sequence[int],
    spacing: Sequence[float],
    multiple: int,
    spacing_range: Sequence[Sequence[float]],
    ckpt_path: str | Path,
    factor: int,
) -> None:
    """Refuse a grid that a mask generator's weights do not know; with a prior they know one size.

    Args:
        size: voxels along x, y, z.
        spacing: mm along x, y, z.
        multiple: what has to divide `size`.
        spacing_range: (lowest, highest) mm for x, y, z.
        ckpt_path: the weights, with the mean of their prior where they have one.
        factor: of the autoencoder.

    Raises:
        InputError: another size or spacing.
    """
    wanted = check_output_size(size, multiple)
    check_spacing(spacing, spacing_range, "spacing", advice="give one of these as --spacing")
    mean_shape = next((shape for name, shape in weight_shapes(ckpt_path).items() if name.endswith("prior.mean")), None)
    if mean_shape is not None and wanted != (known := tuple(factor * n for n in mean_shape[1:])):
        raise InputError(
            f"output_size is {list(wanted)}; allowed is {list(known)}, the canvas of {ckpt_path}: leave it out, and "
            "put the mask on another grid afterwards, with --spacing and --output_size of maisi_controlnet"
        )


class ShapePrior(nn.Module):
    """Principal components of mask latents, and each organ's size as a linear function of them.

    Where a latent is mostly noise, the mean of what may be under it is nearly that of a Gaussian with the data's mean
    and covariance (Wang and Vastola 2024, arXiv 2412.09726), here also given the sizes: ``prior(noisy, share, sizes)``.
    Latents are on one canvas, so that a voxel means the same place in each.

    Args:
        organs: number of sizes.
        channels: of a latent.
        latent_size: (d, h, w) of the latents.
        components: number of principal components; those beyond the number of samples stay zero.
    """

    mean: Tensor
    directions: Tensor
    size_mean: Tensor
    size_slopes: Tensor
    size_noise: Tensor

    def __init__(self, organs: int, channels: int, latent_size: tuple[int, ...] | list[int], components: int) -> None:
        super().__init__()
        shape = (int(channels), *map(int, latent_size))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("directions", torch.zeros(int(components), *shape))
        self.register_buffer("size_mean", torch.zeros(organs))
        self.register_buffer("size_slopes", torch.zeros(organs, int(components)))
        self.register_buffer("size_noise", torch.ones(organs))

    @torch.no_grad()
    def fit(self, samples: Iterable[Mapping[str, Any]], scale_factor: float) -> None:
        """Fit to samples with ``latent`` (channels, d, h, w) and ``organ_sizes`` (number of organs,).

        Args:
            scale_factor: latents are multiplied by it, as in training.

        Raises:
            InputError: a latent has another shape.
        """
        latents, sizes = stacked(samples, scale_factor)
        if latents.shape[1:] != self.mean.shape:
            raise InputError(
                f"mask latents have the shape {tuple(latents.shape[1:])}, but the network's prior "
                f"{tuple(self.mean.shape)}; encode the masks with the canvas that latent_size stands for"
            )
        self.mean.copy_(latents.mean(0))
        apart = (latents - self.mean.cpu()).flatten(1)
        variances, vectors = torch.linalg.eigh(apart.double() @ apart.double().T / len(apart))
        count = min(len(self.directions), len(apart) - 1)
        variances, vectors = variances.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
        self.directions.zero_()
        self.directions[:count] = (vectors.T.float() @ apart / len(apart) ** 0.5).reshape(count, *self.mean.shape)
        coefficients = vectors * len(apart) ** 0.5 * (variances > variances[:1] * 1e-9)
        for organ, size in enumerate(sizes.T.double()):
            known = size != UNKNOWN
            if known.sum() < 2:
                continue
            x, y = coefficients[known], size[known] - size[known].mean()
            gram = x.T @ x + RIDGE * len(x) * torch.eye(count, dtype=x.dtype)
            slopes = torch.linalg.solve(gram, x.T @ y)
            leverage = (x * torch.linalg.solve(gram, x.T).T).sum(1)
            left_out = (y - x @ slopes) / (1 - leverage)
            self.size_mean[organ] = size[known].mean()
            self.size_slopes[organ, :count] = slopes.float()
            self.size_noise[organ] = left_out.square().mean().clamp_min(1e-4)

    @torch.no_grad()
    def complete(self, sizes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sizes (number of organs,) with those that are unknown drawn from what goes with the known ones, in 0 to 1.

        Args:
            generator: source of the draw, on the CPU.
        """
        slopes, noise, mean = (each.float().cpu() for each in (self.size_slopes, self.size_noise, self.size_mean))
        drawn = torch.randn(slopes.shape[1] + len(mean), generator=generator)
        known = (sizes != UNKNOWN).float() / noise
        precision = torch.eye(slopes.shape[1]) + slopes.T @ (known[:, None] * slopes)
        covariance = torch.linalg.inv(precision)
        coefficients = covariance @ (slopes.T @ (known * (sizes - mean)))
        coefficients = coefficients + torch.linalg.cholesky(covariance) @ drawn[: len(covariance)]
        likely = mean + slopes @ coefficients + noise.sqrt() * drawn[len(covariance) :]
        return torch.where(sizes == UNKNOWN, likely.clamp(0, 1), sizes)

    @torch.no_grad()
    def forward(self, noisy: Tensor, share: Tensor, sizes: Tensor) -> Tensor:
        """The mean of what may be under the noise.

        Args:
            noisy: (B, channels, d, h, w), ``(1 - share) latent + share noise``.
            share: (B,), of noise, from 0 to 1.
            sizes: (B, number of organs), as :class:`~maisi_tools.mask_generator.sizes.OrganSizes` has them.

        Returns:
            float32, of the shape of `noisy`.

        Raises:
            InputError: a latent of another size.
        """
        if noisy.shape[1:] != self.mean.shape:
            raise InputError(
                f"a mask latent has the shape {tuple(noisy.shape[1:])}; these weights know {tuple(self.mean.shape)}: "
                "give the output_size that they were trained with"
            )
        return _expected(
            noisy, share, sizes, self.mean, self.directions, self.size_mean, self.size_slopes, self.size_noise
        )


@wrap_torch_function(lambda noisy, *_: (noisy,))
def _expected(
    noisy: Tensor,
    share: Tensor,
    sizes: Tensor,
    mean: Tensor,
    directions: Tensor,
    size_mean: Tensor,
    size_slopes: Tensor,
    size_noise: Tensor,
) -> Tensor:
    """:meth:`ShapePrior.forward` as one function of torch: a network run in slabs gives it the whole latent."""
    with torch.autocast(noisy.device.type, enabled=False):
        mean, directions, slopes = mean.float().flatten(), directions.float().flatten(1), size_slopes.float()
        t = share.float().clamp_min(LEAST_TIME)[:, None]
        seen = (noisy.float().flatten(1) - (1 - t) * mean) @ directions.T
        known = (sizes != UNKNOWN).float() / size_noise.float()
        # Precision and mean of the coefficients, which have unit variance, both times t squared.
        of_sizes = torch.eye(slopes.shape[1], device=slopes.device) + torch.einsum(
            "bo,ok,ol->bkl", known, slopes, slopes
        )
        precision = t[:, :, None] ** 2 * of_sizes + torch.diag_embed((1 - t) ** 2 * directions.square().sum(1))
        wanted = t**2 * ((known * (sizes.float() - size_mean.float())) @ slopes) + (1 - t) * seen
        coefficients = torch.linalg.solve(precision, wanted[:, :, None])[:, :, 0]
        return (mean + coefficients @ directions).reshape(noisy.shape)


def stacked(samples: Iterable[Mapping[str, Any]], scale_factor: float) -> tuple[Tensor, Tensor]:
    """The scaled latents (N, channels, d, h, w) and organ sizes (N, organs) of samples.

    Raises:
        InputError: latents of several shapes.
    """
    pairs = [(torch.as_tensor(one["latent"]), torch.as_tensor(one["organ_sizes"])) for one in samples]
    if len(shapes := {tuple(latent.shape) for latent, _ in pairs}) != 1:
        raise InputError(
            f"latents have the shapes {sorted(shapes)}; allowed is one: encode all masks with encode_mask.json, or all "
            "CTs with one coarse_size"
        )
    return torch.stack([latent.float() for latent, _ in pairs]) * scale_factor, torch.stack([s for _, s in pairs])
