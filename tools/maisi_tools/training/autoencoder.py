"""Batches for training the autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.metrics import Average
from torch import Tensor

from maisi_tools.training.loaders import sample_numbers
from maisi_tools.volumes.checks import LATENT_CHANNELS


class AutoencoderBatch:
    """``prepare_batch`` of the autoencoder's trainer: the image, itself as the target, and the posterior's noise.

    The noise of a sample depends on the seed and the sample's number alone, so it is the same however the samples are
    spread over batches and ranks.

    Args:
        seed: of the noise.
        factor: of the autoencoder.
    """

    def __init__(self, seed: int, factor: int) -> None:
        self.seed = seed
        self.factor = factor

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor, tuple, dict[str, Tensor]]:
        image = batch["image"].to(device, non_blocking=non_blocking)
        return (
            image,
            image,
            (),
            {"noise": posterior_noise(batch["draw"], image.shape[2:], self.seed, device, self.factor)},
        )


def posterior_noise(draws: Iterable[Any], size: Sequence[int], seed: int, device: torch.device, factor: int) -> Tensor:
    """Unit normal (B, 4, D/factor, ...) for images of `size` (D, H, W), each sample's by its number in `draws`."""
    noise = []
    for draw in draws:
        with sample_numbers(seed, int(draw), device):
            noise.append(torch.randn([LATENT_CHANNELS, *(n // factor for n in size)], device=device))
    return torch.stack(noise)


def image_as_label(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **_: Any
) -> tuple[Tensor, Tensor]:
    """``prepare_batch`` of the autoencoder's validation: the image, and itself, with its meta data, as the label."""
    return batch["image"].as_tensor().to(device), batch["image"]


def case_mean(name: str) -> Average:
    """The mean over the cases of one of the ``metrics`` that a validation's postprocessing leaves."""
    return Average(lambda output: output[0]["metrics"][name])
