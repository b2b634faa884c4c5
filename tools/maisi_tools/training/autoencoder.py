"""Batches for training the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maisi_tools.training.loaders import sample_numbers
from maisi_tools.volumes.checks import LATENT_CHANNELS
from maisi_tools.volumes.latents import FACTOR


class AutoencoderBatch:
    """``prepare_batch`` of the autoencoder's trainer: the image, itself as the target, and the posterior's noise.

    The noise of a sample depends on the seed and the sample's number alone, so it is the same however the samples are
    spread over batches and ranks.

    Args:
        seed: of the noise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict[str, Tensor]]:
        image = batch["image"].to(device, non_blocking=non_blocking)
        size = [LATENT_CHANNELS, *(n // FACTOR for n in image.shape[2:])]
        noise = []
        for draw in batch["draw"]:
            with sample_numbers(self.seed, int(draw), device):
                noise.append(torch.randn(size, device=device))
        return image, image, (), {"noise": torch.stack(noise)}
