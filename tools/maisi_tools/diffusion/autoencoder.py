"""Stage 1 as inferers: CT -> latent and latent -> CT."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor

from maisi_tools.networks import Autoencoder
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.volumes.grid import pad_to_multiple


class EncodeInferer(Inferer):
    """CT (B, 1, D, H, W) in [0, 1] -> posterior mean (B, 4, d, h, w), the CT padded to ``multiple`` by its edge.

    Args:
        multiple: the autoencoder's factor is the least; for latents that the diffusion stages can train on, that times
            2 for each level of their U-Net but the first. None for the factor.
        inferer: how the encoder is run.
        sigma: return ``{"mean": ..., "sigma": ...}``, with the posterior's standard deviation, instead of the mean
            alone.
    """

    def __init__(self, multiple: int | None = None, inferer: Inferer | None = None, sigma: bool = False) -> None:
        super().__init__()
        self.multiple = multiple
        self.sigma = sigma
        self.inferer = inferer or SimpleInferer()

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Autoencoder, *args: Any, **kwargs: Any
    ) -> Tensor | dict[str, Tensor]:
        padded, _ = pad_to_multiple(inputs, self.multiple or network.factor, "replicate", 0)
        if self.sigma:
            mean, sigma = self.inferer(torch.as_tensor(padded), network.encode)
            return {"mean": mean, "sigma": sigma}
        return self.inferer(torch.as_tensor(padded), lambda x: network.encode(x)[0])


class LatentEncoder:
    """CT (B, 1, D, H, W) in [0, 1] -> latent (B, 4, d, h, w) as the diffusion stages see it; undoes `LatentDecoder`.

    Args:
        autoencoder: encodes; set to evaluation mode.
        scale_factor: the posterior's mean is multiplied by it.
        inferer: how the encoder is run.
    """

    def __init__(self, autoencoder: Autoencoder, scale_factor: float = 1.0, inferer: Inferer | None = None) -> None:
        self.autoencoder = autoencoder.eval()
        self.scale_factor = float(scale_factor)
        self.encode = EncodeInferer(inferer=inferer)

    @torch.no_grad()
    def __call__(self, ct: Tensor) -> Tensor:
        mean = self.encode(ct, self.autoencoder)
        assert isinstance(mean, Tensor)
        return mean * self.scale_factor


class LatentDecoder:
    """Latent (B, 4, d, h, w) -> CT (B, 1, factor * d, ...) in [0, 1], for stages whose network is not the autoencoder.

    Args:
        autoencoder: decodes; set to evaluation mode.
        scale_factor: latents are divided by it before decoding; 1 for latents that come from the encoder.
        inferer: how the decoder is run.
    """

    def __init__(self, autoencoder: Autoencoder, scale_factor: float = 1.0, inferer: Inferer | None = None) -> None:
        self.autoencoder = autoencoder.eval()
        self.scale_factor = float(scale_factor)
        self.inferer = inferer or SimpleInferer()

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        return self.inferer(latent / self.scale_factor, self.autoencoder.decode)

    @torch.no_grad()
    def check(self, latent: Tensor) -> None:
        """Plan to decode a latent of this shape where memory is limited: before the hours of sampling, not after.

        Raises:
            MemoryLimitError: the limit cannot be met.
        """
        if isinstance(self.inferer, TSPInferer) and self.inferer.settings.memory_limit is not None:
            self.inferer.plan(latent, self.autoencoder.decode)


class DecodeInferer(Inferer):
    """Latent (B, 4, d, h, w), as encode.json or maisi_ldm write it -> CT (B, 1, factor * d, ...) in [0, 1].

    Args:
        inferer: how the decoder is run.
    """

    def __init__(self, inferer: Inferer | None = None) -> None:
        super().__init__()
        self.inferer = inferer

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: Autoencoder, *args: Any, **kwargs: Any
    ) -> Tensor:
        return LatentDecoder(network, inferer=self.inferer)(inputs)
