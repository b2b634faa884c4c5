"""From noise to latent: a short loop over a scheduler, with guidance composed around the denoiser."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from monai.networks.schedulers.ddim import DDIMPredictionType
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from maisi_tools.errors import InputError

logger = logging.getLogger(__name__)

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoiser(latent (B, C, d, h, w), timesteps (B,)) -> velocity or noise`` of the latent's shape."""

Scheduler = RFlowScheduler | DDPMScheduler | DDIMScheduler
"""The schedulers of MONAI that :func:`sample` can follow."""

Progress = bool | Callable[[int, int], None]
"""Whether a bar is shown of the steps; or what is told, before each and after the last, how many of how many are
done."""

Step = TypeVar("Step")

SOLVERS = ("euler", "heun", "ab2")
"""How rectified flow is integrated, see :func:`sample`."""

ALWAYS = (0.0, 1.0)
"""The guidance interval that holds every timestep."""


def check_sampling(scheduler: Scheduler, num_inference_steps: int, solver: str, last_step: float = 0.0) -> None:
    """Refuse what :func:`sample` cannot do; for the door, before networks are run.

    Raises:
        InputError: an unknown solver; a solver of rectified flow with another scheduler; DDPM with fewer steps than it
            was trained with, which would silently give a poor image; no number of steps; a last step that is no share,
            or with another scheduler than rectified flow's.
    """
    if not (isinstance(last_step, (int, float)) and 0 <= last_step < 1):
        raise InputError(f"last_step is {last_step!r}; allowed is a share of the noise from 0 to below 1, such as 0.3")
    if solver not in SOLVERS:
        raise InputError(f"solver is {solver!r}; allowed are {', '.join(SOLVERS)}")
    if (solver != "euler" or last_step) and not isinstance(scheduler, RFlowScheduler):
        raise InputError(
            f"solver is {solver!r} and last_step {last_step:g} with {type(scheduler).__name__}, which steps itself; "
            "solvers and last_step are for rectified flow (RFlowScheduler). Add --solver euler --last_step 0, which "
            "leaves the steps to the scheduler"
        )
    if isinstance(scheduler, DDPMScheduler) and num_inference_steps != scheduler.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps} with the DDPM scheduler; it needs all "
            f"{scheduler.num_train_timesteps} steps. For fewer steps use the DDIM scheduler (--scheduler '@ddim')"
        )
    if not 1 <= num_inference_steps <= scheduler.num_train_timesteps:
        raise InputError(
            f"num_inference_steps is {num_inference_steps}; allowed are 1 to {scheduler.num_train_timesteps}"
        )


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """The guidance interval as two numbers.

    Raises:
        InputError: it is not two numbers within 0 to 1, the lower one first.
    """
    try:
        low, high = (float(share) for share in interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"guidance_interval is {interval!r}; allowed are two numbers within 0 to 1, the lower one first: shares of "
            "the timesteps from the data (0) to pure noise (1), such as [0.2, 0.8]; [0, 1] guides every step"
        )
    return low, high


def check_parallel(parallel: float) -> float:
    """The share of guidance along the prediction that is kept, see :func:`guided`.

    Raises:
        InputError: it is no number from 0 to 1.
    """
    if not isinstance(parallel, (int, float)) or isinstance(parallel, bool) or not 0 <= parallel <= 1:
        raise InputError(
            f"guidance_parallel is {parallel!r}; allowed is a number from 0 to 1: how much of guidance may change the "
            "contrast of a prediction; 1 is classifier-free guidance as it is"
        )
    return float(parallel)


def guided(
    conditional: Denoiser,
    unconditional: Denoiser,
    guidance_scale: float,
    scheduler: Scheduler,
    interval: Sequence[float] = ALWAYS,
    parallel: float = 1.0,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): ``u + guidance_scale * (c - u)``.

    A scale of 0 switches guidance off, as in the MAISI releases: the conditional denoiser alone, one pass instead of
    two. (1 gives the same result at twice the cost.)

    Args:
        scheduler: whose noise and prediction the denoisers were trained with.
        interval: guidance is on where ``timestep / num_train_timesteps`` lies in it, both ends included; elsewhere the
            conditional denoiser runs alone (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        parallel: how much is kept of the part of ``c - u`` that is parallel to the data that ``c`` predicts. That part
            scales what is there, so that contrast grows with the scale: bone too bright, air too dark; the rest changes
            what is there (Sadat et al. 2024, arXiv 2410.02416, equation 8, where this is eta). They take a volume as
            one vector; here each cell of the latent is one, of its channels, as a CT's air must not set how far its
            bone may go. 1 keeps all.

    Raises:
        InputError: see :func:`check_interval` and :func:`check_parallel`.
    """
    low, high = check_interval(interval)
    parallel = check_parallel(parallel)
    if guidance_scale == 0:
        return conditional

    def denoiser(latent: Tensor, timesteps: Tensor) -> Tensor:
        # All samples of a batch are at the same timestep; reading it waits for the device, so only where it matters.
        if (low, high) != ALWAYS and not low <= float(timesteps.flatten()[0]) / scheduler.num_train_timesteps <= high:
            return conditional(latent, timesteps)
        base = unconditional(latent, timesteps)
        output = conditional(latent, timesteps)
        if parallel == 1:
            return base + guidance_scale * (output - base)
        change = output - base
        data, _ = data_and_noise(scheduler, latent, output, *signal_and_noise(scheduler, float(timesteps.flatten()[0])))
        direction = normalize(data, dim=1)
        along = (change * direction).sum(1, keepdim=True) * direction
        return output + (guidance_scale - 1) * (change - (1 - parallel) * along)

    return denoiser


def check_start(strength: float, resample_steps: int) -> None:
    """Refuse a start that :func:`sample` cannot take.

    Raises:
        InputError: `strength` is no number above 0 up to 1, or `resample_steps` no whole number from 0 on.
    """
    if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 < strength <= 1:
        raise InputError(
            f"strength is {strength!r}; allowed is a number above 0 up to 1: 1 starts from noise alone, less from the "
            "given latent noised to that share"
        )
    if not isinstance(resample_steps, int) or isinstance(resample_steps, bool) or resample_steps < 0:
        raise InputError(f"resample_steps is {resample_steps!r}; allowed are whole numbers from 0 on")


def signal_and_noise(scheduler: Scheduler, timestep: float) -> tuple[float, float]:
    """The shares of data and of noise in the noisy latent at a timestep: ``signal * data + spread * noise``."""
    if isinstance(scheduler, RFlowScheduler):
        spread = timestep / scheduler.num_train_timesteps
        return 1 - spread, spread
    alpha = float(scheduler.alphas_cumprod[int(timestep)])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def data_and_noise(
    scheduler: Scheduler, latent: Tensor, output: Tensor, signal: float | Tensor, spread: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What a network's output takes its noisy latent, ``signal * data + spread * noise``, to be made of."""
    if isinstance(scheduler, RFlowScheduler):
        return latent + spread * output, latent - signal * output
    if scheduler.prediction_type == DDIMPredictionType.EPSILON:
        return (latent - spread * output) / signal, output
    if scheduler.prediction_type == DDIMPredictionType.SAMPLE:
        return output, (latent - signal * output) / spread
    return signal * latent - spread * output, signal * output + spread * latent  # v prediction


def known_outside(denoiser: Denoiser, known: Tensor, region: Tensor, scheduler: Scheduler) -> Denoiser:
    """A denoiser that leads to `known` outside of `region`, whatever the scheduler and its solver.

    There it gives what the true network of the one data point `known` would: the noisy latent is then the known one at
    each step's noise (Lugmayr et al. 2022, RePaint, equation 8a), and the end is `known` itself.

    Args:
        known: (B, C, d, h, w).
        region: (B, 1, d, h, w), True where the latent is drawn.
    """

    def inside(latent: Tensor, timesteps: Tensor) -> Tensor:
        output = denoiser(latent, timesteps)
        signal, spread = signal_and_noise(scheduler, float(timesteps.flatten()[0]))
        noise = (latent - signal * known) / spread
        if isinstance(scheduler, RFlowScheduler):
            true = known - noise
        else:
            kind = str(scheduler.prediction_type)
            v_prediction = signal * noise - spread * known
            true = {"epsilon": noise, "sample": known, "v_prediction": v_prediction}[kind]
        return torch.where(region, output, true.to(output.dtype))

    return inside


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
    progress: Progress = True,
    solver: str = "euler",
    data: Tensor | None = None,
    strength: float = 1.0,
    resample_steps: int = 0,
    last_step: float = 0.0,
) -> Tensor:
    """Integrate from noise to a latent.

    Rectified flow (Liu et al. 2022; MAISI-v2 section 3.1) goes along the predicted velocity ``data - noise``. The step
    length is the exact distance between the timesteps the network is shown; MONAI's own ``RFlowScheduler.step``
    truncates the next timestep to an integer, which overshoots by 0.7 to 1.1 % over 30 steps. DDPM steps itself. DDIM
    goes from each of its timesteps to the next one; MONAI's ``step`` goes ``num_train_timesteps // N`` down wherever
    the next one is.

    Args:
        denoiser: called once a step, by ``heun`` twice in all steps but the last.
        noise: (B, C, d, h, w), standard normal.
        scheduler: its timesteps are set here.
        num_inference_steps: steps N from noise to data. ``euler`` and ``ab2`` call the denoiser N times, ``heun``
            2 N - 1 times.
        generator: source of the noise that DDPM adds at each step.
        solver: for rectified flow. ``euler``: first order. ``heun``: second order, the mean of the velocities at both
            ends of a step; the last step, which ends at the data, is Euler's (Karras et al. 2022, algorithm 1).
            ``ab2``: second order at Euler's cost, the velocity extrapolated to the middle of the step from the one
            before (Adams-Bashforth on the uneven grid); the first step is Euler's.
        data: the latent (B, C, d, h, w) that a `strength` below 1 starts from.
        strength: the steps begin at this share of the timesteps, from `data` noised to that level (Meng et al. 2022,
            SDEdit); 1 takes all of them, from noise alone. DDPM and DDIM begin at the highest of their timesteps that
            is not above it, or at their lowest, and say so.
        resample_steps: how often each step is taken back, by noising its result to the level it came from, and taken
            again (RePaint, section 4.2 with jumps of one step), so that what is drawn fits what is known beside it.
        last_step: the first timestep at or below this share of all of them goes to the data in one step of Euler's,
            which is what the network expects the data to be: timesteps below are left out. What little noise a network
            mistakes for signal there would stay as grain. 0 takes all timesteps.

    Raises:
        InputError: see :func:`check_sampling` and :func:`check_start`; or a `strength` below 1 without `data`.
    """
    check_sampling(scheduler, num_inference_steps, solver, last_step)
    check_start(strength, resample_steps)
    if isinstance(scheduler, RFlowScheduler):
        scheduler.set_timesteps(num_inference_steps, noise.device, math.prod(noise.shape[2:]))
    else:
        scheduler.set_timesteps(num_inference_steps, noise.device)
    timesteps = scheduler.timesteps.float()
    latent = noise
    if strength < 1:
        if data is None:
            raise InputError(f"strength is {strength} without a latent to start from; allowed is 1")
        timesteps = _timesteps_from(strength, timesteps, scheduler)
        signal, spread = signal_and_noise(scheduler, float(timesteps[0]))
        latent = signal * data + spread * noise
    few = timesteps <= last_step * scheduler.num_train_timesteps
    if few.any():
        timesteps = timesteps[: int(few.nonzero()[0]) + 1]
    following = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    lengths = (timesteps - following).tolist()

    before: tuple[Tensor, float] | None = None  # velocity and length of the step before
    taken = [(number, back) for number in range(len(lengths)) for back in (*[True] * resample_steps, False)]
    for number, back in _told(taken, progress):
        timestep, next_timestep, length = timesteps[number], following[number], lengths[number]
        last = number + 1 == len(lengths)
        output = denoiser(latent, timestep.expand(len(latent)))
        if isinstance(scheduler, RFlowScheduler):
            velocity = output
            if solver == "heun" and not last:
                ahead = latent + output * length / scheduler.num_train_timesteps
                velocity = (output + denoiser(ahead, next_timestep.expand(len(latent)))) / 2
            elif solver == "ab2" and before is not None and not (last and last_step):
                velocity = output + (output - before[0]) * (length / before[1] / 2)
            if length:  # float16 timesteps can coincide: such a step goes nowhere, and its slope is unknown
                before = output, length
            latent = latent + velocity * length / scheduler.num_train_timesteps
        elif isinstance(scheduler, DDPMScheduler):
            latent, _ = scheduler.step(output, int(timestep), latent, generator=generator)
        else:
            latent = _ddim_step(scheduler, output, latent, int(timestep), None if last else int(next_timestep))
        if back:
            signal, spread = signal_and_noise(scheduler, float(timestep))
            there, left = (1.0, 0.0) if last else signal_and_noise(scheduler, float(next_timestep))
            kept = signal / there
            added = torch.randn(latent.shape, generator=generator, device=latent.device, dtype=latent.dtype)
            latent = kept * latent + math.sqrt(max(spread**2 - (kept * left) ** 2, 0.0)) * added
            before = None  # the slope of another path
    return latent


def _timesteps_from(strength: float, timesteps: Tensor, scheduler: Scheduler) -> Tensor:
    """The timesteps (N,) that are left where the steps begin at a share of all of them, see :func:`sample`."""
    start = strength * scheduler.num_train_timesteps
    if isinstance(scheduler, RFlowScheduler) and not scheduler.use_discrete_timesteps:
        below = timesteps[timesteps < start].tolist()
        # From a first step that is much shorter than the next, ab2 would extrapolate mostly the network's noise.
        after = [*below, 0.0, 0.0]
        if start - after[0] < (after[0] - after[1]) / 2:
            below = below[1:]
        return timesteps.new_tensor([start, *below])
    left = timesteps[min(int((timesteps > start).sum()), len(timesteps) - 1) :]
    if abs(float(left[0]) - start) > 1:
        logger.warning(
            "strength is %g, and with %d steps the nearest that %s can begin at is %g",
            strength,
            len(timesteps),
            type(scheduler).__name__,
            float(left[0]) / scheduler.num_train_timesteps,
        )
    return left


def _told(steps: Sequence[Step], progress: Progress) -> Iterator[Step]:
    if not callable(progress):
        yield from tqdm(steps, desc="sampling", disable=not progress)
        return
    for number, step in enumerate(steps):
        progress(number, len(steps))
        yield step
    progress(len(steps), len(steps))


def _ddim_step(
    scheduler: DDIMScheduler, output: Tensor, latent: Tensor, timestep: int, next_timestep: int | None
) -> Tensor:
    """From one timestep to the next without adding noise (DDIM, Song et al. 2021, equation 12); None is the data."""
    alpha = scheduler.alphas_cumprod[timestep]
    next_alpha = scheduler.final_alpha_cumprod if next_timestep is None else scheduler.alphas_cumprod[next_timestep]
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    data, noise = data_and_noise(scheduler, latent, output, signal, spread)
    if scheduler.clip_sample:
        data = data.clamp(*scheduler.clip_sample_values)
    return next_alpha.sqrt() * data + (1 - next_alpha).sqrt() * noise
