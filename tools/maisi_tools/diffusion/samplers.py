"""From noise to latent: a short loop over a scheduler, with guidance composed around the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from torch import Tensor
from tqdm import tqdm

from maisi_tools.errors import InputError

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoiser(latent (B, C, d, h, w), timesteps (B,)) -> velocity or noise`` of the latent's shape."""

Scheduler = RFlowScheduler | DDPMScheduler | DDIMScheduler
"""The schedulers of MONAI that :func:`sample` can follow."""


def guided(conditional: Denoiser, unconditional: Denoiser, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): ``u + guidance_scale * (c - u)``.

    A scale of 0 switches guidance off, as in the MAISI releases: the conditional denoiser alone, one pass instead of
    two. (1 gives the same result at twice the cost.)
    """
    if guidance_scale == 0:
        return conditional

    def denoiser(latent: Tensor, timesteps: Tensor) -> Tensor:
        base = unconditional(latent, timesteps)
        return base + guidance_scale * (conditional(latent, timesteps) - base)

    return denoiser


def step_generator(noise: Tensor, seed: int) -> torch.Generator:
    """The source of the noise that DDPM adds on the way: a seed's random numbers after those of its initial noise.

    Args:
        noise: the initial noise, :meth:`maisi_tools.diffusion.conditions.Conditions.noise` of the same seed. DDPM's
            first step would otherwise add that very noise once more.
    """
    generator = torch.Generator(noise.device).manual_seed(seed)
    torch.randn(noise.shape, generator=generator, device=noise.device)
    return generator


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Tensor,
    scheduler: Scheduler,
    num_inference_steps: int,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Integrate from noise to a latent.

    Rectified flow (Liu et al. 2022; MAISI-v2 section 3.1) takes Euler steps along the predicted velocity
    ``latent - noise``. The step length is the exact distance between the timesteps the network is shown; MONAI's own
    ``RFlowScheduler.step`` truncates the next timestep to an integer, which overshoots by about 1.5 % over 30 steps.
    Other schedulers step themselves.

    Args:
        noise: (B, C, d, h, w), standard normal.
        scheduler: its timesteps are set here.
        generator: source of the noise that DDPM adds at each step.

    Raises:
        InputError: DDPM with fewer steps than it was trained with, which would silently give a poor image.
    """
    if isinstance(scheduler, DDPMScheduler) and num_inference_steps != scheduler.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps} with the DDPM scheduler; it needs all "
            f"{scheduler.num_train_timesteps} steps. For fewer steps use the DDIM scheduler (--scheduler '@ddim')"
        )
    if not 1 <= num_inference_steps <= scheduler.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps}; allowed are 1 to {scheduler.num_train_timesteps}"
        )
    if isinstance(scheduler, RFlowScheduler):
        scheduler.set_timesteps(num_inference_steps, noise.device, math.prod(noise.shape[2:]))
    else:
        scheduler.set_timesteps(num_inference_steps, noise.device)
    timesteps = scheduler.timesteps.float()
    following = torch.cat([timesteps[1:], timesteps.new_zeros(1)])

    latent = noise
    steps = tqdm(
        zip(scheduler.timesteps, following, strict=True), total=len(timesteps), desc="sampling", disable=not progress
    )
    for timestep, next_timestep in steps:
        output = denoiser(latent, timestep.float().expand(len(latent)))
        if isinstance(scheduler, RFlowScheduler):
            latent = latent + output * (timestep.float() - next_timestep) / scheduler.num_train_timesteps
        elif isinstance(scheduler, DDPMScheduler):
            latent, _ = scheduler.step(output, int(timestep), latent, generator=generator)
        else:
            latent, _ = scheduler.step(output, int(timestep), latent)
    return latent
