"""The inferer of the mask generator: from noise and organ sizes to a label mask."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from maisi_tools.diffusion.autoencoder import LatentDecoder
from maisi_tools.diffusion.conditions import draw_noise
from maisi_tools.diffusion.inferers import each_sample
from maisi_tools.diffusion.noise import check_redraws, redraw_seeds
from maisi_tools.diffusion.samplers import (
    ALWAYS,
    Progress,
    Scheduler,
    check_interval,
    check_sampling,
    guided,
    sample,
    step_generator,
)
from maisi_tools.mask_generator.sizes import UNKNOWN, AskedSizes
from maisi_tools.masks.pieces import keep_largest_pieces

logger = logging.getLogger(__name__)


class MaskSampler(Inferer):
    """Mask generator (paper section 3.3): noise (B, 4, d, h, w) -> label mask (B, 1, factor * d, ...), uint8.

    Args:
        decoder: latent -> logits of the classes.
        scheduler, num_inference_steps, solver, guidance_interval: as in
            :class:`~maisi_tools.diffusion.inferers.LatentSampler`.
        asked: the sizes that masks should have.
        classes: the label that each channel of the logits stands for.
        single_pieces: labels of organs in one piece, see :func:`~maisi_tools.masks.pieces.keep_largest_pieces`.
        guidance_scale: 0 is off; the unconditional pass knows no size.
        redraws: how often at most a mask is drawn again while a size is not what is asked for: by turns from the same
            noise, but asked for more of what came out too small, and from another one. The one whose sizes are nearest
            is kept, the first of them.
        seed: of noise that comes without one.
        inferer: how the U-Net is run.

    Raises:
        InputError: as in :class:`~maisi_tools.diffusion.inferers.LatentSampler`; or `redraws` is no number of draws.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        scheduler: Scheduler,
        num_inference_steps: int,
        asked: AskedSizes,
        classes: Sequence[int],
        single_pieces: Sequence[int] = (),
        guidance_scale: float = 0.0,
        redraws: int = 0,
        seed: int = 0,
        progress: Progress = True,
        inferer: Inferer | None = None,
        solver: str = "euler",
        guidance_interval: Sequence[float] = ALWAYS,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.scheduler = scheduler
        self.num_inference_steps = int(num_inference_steps)
        self.solver = solver
        check_sampling(self.scheduler, self.num_inference_steps, self.solver)
        self.asked = asked
        self.classes = torch.tensor([int(label) for label in classes], dtype=torch.uint8)
        self.single_pieces = tuple(single_pieces)
        self.guidance_scale = float(guidance_scale)
        self.guidance_interval = check_interval(guidance_interval)
        self.redraws = check_redraws(redraws)
        self.seed = int(seed)
        self.progress = progress
        self.inferer = inferer or SimpleInferer()

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: nn.Module, seeds: Sequence[int] | None = None
    ) -> Tensor:
        drawn = [self._nearest(noise, seed, network) for noise, seed in each_sample(inputs, seeds, self.seed)]
        return torch.from_numpy(np.stack(drawn))[:, None].to(inputs.device)

    def _nearest(self, noise: Tensor, seed: int, network: nn.Module) -> np.ndarray:
        """Of the draws for a sample, the one whose organs are nearest to what is asked for.

        With a prior, organs whose size is not given are asked for, too, with a size that goes with the given ones.
        """
        prior = getattr(network, "prior", None)
        asked = self.asked
        if prior is not None:
            asked = asked.completed(prior.complete(asked.vector, torch.Generator().manual_seed(seed)))
        kept, least, sizes, drawn = np.empty(0), math.inf, asked.vector, np.empty(0)
        starts = [start for start in redraw_seeds(seed, self.redraws // 2) for _ in range(2)]
        for number, start in enumerate(starts[: self.redraws + 1]):
            if number % 2:
                sizes = asked.corrected(sizes, drawn)
            elif number:
                sizes = asked.vector
                noise = draw_noise(noise.shape, start).to(noise)
            drawn = self._one(noise, start, network, sizes)
            labels = keep_largest_pieces(asked.resize(drawn), self.single_pieces)  # growing may leave loose voxels
            if (distance := asked.distance(labels)) < least:
                kept, least = labels, distance
            if not asked.misses(labels):
                break
        if misses := self.asked.misses(kept):
            listed = ", ".join(f"{name} {ml:g} ml" for name, ml in misses.items())
            logger.warning("seed %d: not of the size that is asked for: %s", seed, listed)
        return kept

    def _one(self, noise: Tensor, seed: int, network: nn.Module, organ_sizes: Tensor) -> np.ndarray:
        sizes = organ_sizes[None].to(noise)
        denoiser = guided(
            lambda x, t: self.inferer(x, network, t, organ_sizes=sizes),
            lambda x, t: self.inferer(x, network, t, organ_sizes=torch.full_like(sizes, UNKNOWN)),
            self.guidance_scale,
            self.scheduler,
            self.guidance_interval,
        )
        generator = step_generator(noise, seed)
        latent = sample(
            denoiser, noise, self.scheduler, self.num_inference_steps, generator, self.progress, self.solver
        )
        channels = self.decoder(latent).argmax(1)[0]
        labels = self.classes.to(channels.device)[channels].cpu().numpy()
        return keep_largest_pieces(labels, self.single_pieces)
