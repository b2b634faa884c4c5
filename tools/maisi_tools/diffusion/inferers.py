"""The inferers of stages 2 and 3: ``inferer(inputs, network)`` does the whole stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from maisi_tools import refuse_moved
from maisi_tools.diffusion.autoencoder import LatentDecoder
from maisi_tools.diffusion.conditions import (
    LESIONS,
    MASK,
    Conditions,
    batch_tensors,
    check_guidance,
    check_modality,
    without_conditions,
)
from maisi_tools.diffusion.samplers import (
    ALWAYS,
    Denoiser,
    Progress,
    Scheduler,
    check_interval,
    check_parallel,
    check_sampling,
    guided,
    sample,
    step_generator,
)
from maisi_tools.masks.edits import remove_lesions
from maisi_tools.masks.vocabulary import merge_labels, region_in
from maisi_tools.networks import ControlledUNet
from maisi_tools.volumes.grid import crop_to, pad_to_multiple

logger = logging.getLogger(__name__)

Draw = Callable[[int], Tensor]
"""``draw(seed) -> CT``, for one mask."""


__getattr__ = partial(refuse_moved, __name__)


class SeedOfInferer(Inferer):
    """An inferer around another one, ``inferer``, which draws: the seed of the first draw is that one's."""

    inferer: Any

    @property
    def seed(self) -> int:
        """Of the first draw; setting it sets that of the inferer within."""
        return self.inferer.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.inferer.seed = int(seed)


class LatentSampler(Inferer):
    """Stage 2: noise (B, 4, d, h, w) -> CT (B, 1, 4d, 4h, 4w) in [0, 1].

    Args:
        decoder: turns the sampled latent into a CT.
        scheduler: rectified flow, DDPM or DDIM.
        conditions: what to generate; spacing, region and modality are used here (the size is the noise's). The seed is
            that of noise which comes without one.
        guidance_scale: 0 is off; see :func:`maisi_tools.diffusion.samplers.guided`.
        guidance_interval: shares of the timesteps between which guidance is on, likewise.
        guidance_parallel: share of guidance along the prediction that is kept, likewise (there ``parallel``).
        guided_conditions: what the unconditional pass of guidance goes without: the conditions that were dropped in
            the weights' training (the released v2 weights: the modality alone); empty where none were.
        condition_scale: see :meth:`Conditions.tensors`.
        return_latent: return ``{"ct": ..., "latent": ...}`` instead of the CT alone.
        solver, last_step: see :func:`maisi_tools.diffusion.samplers.sample`.
        inferer: how the U-Net is run.
        coarse: draws what the U-Net sees beside the noisy latent, as a fifth channel on its grid: the whole field of
            view on few voxels, ``coarse(conditions, seed) -> (1, 1, X, Y, Z)``; None for a U-Net without. See
            :mod:`maisi_tools.coarse`.

    Raises:
        InputError: see :func:`~maisi_tools.diffusion.samplers.check_sampling`,
            :func:`~maisi_tools.diffusion.samplers.check_interval`,
            :func:`~maisi_tools.diffusion.samplers.check_parallel` and
            :func:`~maisi_tools.diffusion.conditions.check_guidance`.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        scheduler: Scheduler,
        num_inference_steps: int,
        conditions: Conditions,
        guidance_scale: float = 0.0,
        guided_conditions: Sequence[str] = ("class_labels",),
        condition_scale: float = 100.0,
        return_latent: bool = False,
        progress: Progress = True,
        inferer: Inferer | None = None,
        solver: str = "euler",
        guidance_interval: Sequence[float] = ALWAYS,
        coarse: Callable[[Conditions, int], Tensor] | None = None,
        last_step: float = 0.0,
        guidance_parallel: float = 1.0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.scheduler = scheduler
        self.num_inference_steps = int(num_inference_steps)
        self.solver = solver
        self.last_step = last_step
        check_sampling(self.scheduler, self.num_inference_steps, self.solver, self.last_step)
        self.conditions = conditions
        self.seed = conditions.seed
        self.coarse = coarse
        self.guidance_scale = float(guidance_scale)
        self.guidance_interval = check_interval(guidance_interval)
        self.guidance_parallel = check_parallel(guidance_parallel)
        self.guided_conditions = check_guidance(guidance_scale, guided_conditions)
        self.condition_scale = float(condition_scale)
        self.return_latent = return_latent
        self.progress = progress
        self.inferer = inferer or SimpleInferer()

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: nn.Module, seeds: Sequence[int] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """``seeds``, one a sample, by default those of the noise, feed the coarse CT and the noise that DDPM adds."""
        latents = [self._one(noise, seed, network) for noise, seed in each_sample(inputs, seeds, self.seed)]
        ct = torch.cat([self.decoder(latent) for latent in latents])
        return {"ct": ct, "latent": torch.cat(latents)} if self.return_latent else ct

    def _one(self, noise: Tensor, seed: int, network: nn.Module) -> Tensor:
        self.decoder.check(noise)
        tensors = batch_tensors([self.conditions], self.condition_scale, noise.device)
        without = without_conditions(tensors, self.guided_conditions)
        passes: list[Denoiser] = [
            lambda x, t: self.inferer(x, network, t, **tensors),
            lambda x, t: self.inferer(x, network, t, **without),
        ]
        if self.coarse is not None:
            coarse = self.coarse(self.conditions, seed).to(noise)
            coarse = interpolate(coarse, noise.shape[2:], mode="trilinear", align_corners=False)
            passes = [_beside(coarse, one) for one in passes]
        guidance = self.guidance_scale, self.scheduler, self.guidance_interval, self.guidance_parallel
        denoiser = guided(passes[0], passes[1], *guidance)
        generator = step_generator(noise, seed)
        settings = self.scheduler, self.num_inference_steps, generator, self.progress, self.solver
        return sample(denoiser, noise, *settings, last_step=self.last_step)


def _beside(coarse: Tensor, denoiser: Denoiser) -> Denoiser:
    """A denoiser that is shown a coarse CT (B, 1, d, h, w) as the noisy latent's last channel."""
    return lambda x, t: denoiser(torch.cat([x, coarse], 1), t)


class MaskToCT(Inferer):
    """Stage 3: label mask (B, 1, D, H, W) in the MAISI vocabulary -> CT of the same size in [0, 1].

    The mask is padded by its edge to a legal size and the result cropped back; voxels outside the body (label 0) are
    air (0, that is -1000 HU). Unless given, spacing is read from the mask's affine; the body region is read from the
    labels the weights know, as it was for their training.

    Args:
        decoder, scheduler, num_inference_steps, solver, last_step: as in :class:`LatentSampler`.
        guidance_scale, guidance_interval, guidance_parallel, guided_conditions, condition_scale: likewise.
            ``guided_conditions`` may have "mask": the unconditional pass is the U-Net's alone, without the ControlNet;
            or "lesions": it sees the mask with its lesions replaced by what is around them, so that they stand out
            more the larger the scale. Without a lesion that the weights know, these guide nothing.
        seed: seed of the noise, the same for every mask, so that a mask gives the same CT alone or among others.
        multiple: legal sizes are multiples of this: the factor, times 2 for each further level of the U-Net.
        spacing: mm along x, y, z; None reads it from the mask's affine.
        keep_labels: labels these weights were trained with; None means the whole vocabulary.
        merge_labels: group -> label that stands for every other label of that group (the rest counts as body).
        control_scale: weight of the ControlNet's contribution.
        inferer: how the U-Net and the ControlNet are run.
        trained_modalities: that the weights know; None takes any.

    Raises:
        InputError: as in :class:`LatentSampler`, or a modality that the weights do not know.
    """

    def __init__(
        self,
        decoder: LatentDecoder,
        scheduler: Scheduler,
        num_inference_steps: int,
        seed: int = 0,
        multiple: int = 16,
        spacing: Sequence[float] | None = None,
        modality: str | int = "ct",
        keep_labels: Sequence[int] | None = None,
        merge_labels: Mapping[str, int] | None = None,
        guidance_scale: float = 0.0,
        guided_conditions: Sequence[str] = ("class_labels",),
        condition_scale: float = 100.0,
        control_scale: float = 1.0,
        progress: Progress = True,
        inferer: Inferer | None = None,
        solver: str = "euler",
        guidance_interval: Sequence[float] = ALWAYS,
        trained_modalities: Sequence[str | int] | None = None,
        last_step: float = 0.0,
        guidance_parallel: float = 1.0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.scheduler = scheduler
        self.num_inference_steps = int(num_inference_steps)
        self.solver = solver
        self.last_step = last_step
        check_sampling(self.scheduler, self.num_inference_steps, self.solver, self.last_step)
        check_modality(modality, trained_modalities)
        self.seed = int(seed)
        self.multiple = int(multiple)
        self.spacing = tuple(spacing) if spacing is not None else None
        self.modality = modality
        self.keep_labels = keep_labels
        self.merge_labels = merge_labels or {}
        self.guidance_scale = float(guidance_scale)
        self.guidance_interval = check_interval(guidance_interval)
        self.guidance_parallel = check_parallel(guidance_parallel)
        self.guided_conditions = check_guidance(guidance_scale, guided_conditions, (MASK, LESIONS))
        self.condition_scale = float(condition_scale)
        self.control_scale = float(control_scale)
        self.progress = progress
        self.inferer = inferer or SimpleInferer()

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: ControlledUNet, *args: Any, **kwargs: Any
    ) -> Tensor:
        return torch.cat([draw(self.seed) for draw in self.draws(inputs, network)])

    def draws(self, inputs: Tensor, network: ControlledUNet) -> Iterator[Draw]:
        """For each mask of a batch a function that draws a CT for it: seed -> (1, 1, D, H, W) in [0, 1].

        What no seed changes, the mask's embedding foremost, is computed once a mask. One mask at a time: a CT must not
        depend on the batch its mask was in.
        """
        spacings = self.spacings(inputs)
        labels = torch.as_tensor(inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs).round()
        for mask, spacing in zip(labels.split(1), spacings, strict=True):
            yield self._prepare(mask, spacing, network)

    @torch.no_grad()
    def denoiser(
        self, labels: Tensor, spacing: Sequence[float], network: ControlledUNet
    ) -> tuple[Denoiser, Conditions]:
        """What a sampler follows to draw a latent for a mask (1, 1, D, H, W) of a legal size, and its conditions.

        What no step changes, the mask's embedding foremost, is computed here.
        """
        condition = labels
        if self.keep_labels is not None:
            condition = merge_labels(labels, self.keep_labels, self.merge_labels)
        conditions = Conditions(
            size=(labels.shape[2], labels.shape[3], labels.shape[4]),
            spacing=(spacing[0], spacing[1], spacing[2]),
            region=region_in(condition),
            modality=self.modality,
        )
        tensors = batch_tensors([conditions], self.condition_scale, labels.device)
        without = without_conditions(tensors, self.guided_conditions)
        embedding = other = self.inferer(condition, network.embed)
        scale = self.guidance_scale
        if scale and LESIONS in self.guided_conditions:
            healthy = self._healthy(labels, spacing)
            if not torch.equal(healthy, condition):
                other = self.inferer(healthy, network.embed)
            elif self.guided_conditions == (LESIONS,):
                logger.warning("there is no lesion in the mask that these weights know: nothing is guided")
                scale = 0.0

        def unguided(x: Tensor, t: Tensor) -> Tensor:
            if MASK in self.guided_conditions:
                return self.inferer(x, network.unet, t, **without)
            return self.inferer(x, network.denoise, other, t, self.control_scale, **without)

        denoiser = guided(
            lambda x, t: self.inferer(x, network.denoise, embedding, t, self.control_scale, **tensors),
            unguided,
            scale,
            self.scheduler,
            self.guidance_interval,
            self.guidance_parallel,
        )
        return denoiser, conditions

    def _healthy(self, labels: Tensor, spacing: Sequence[float]) -> Tensor:
        """The condition that a mask would be without its lesions."""
        without = remove_lesions(labels[0, 0].round().to(torch.uint8).cpu().numpy(), spacing)
        healthy = torch.from_numpy(without).to(labels)[None, None]
        return healthy if self.keep_labels is None else merge_labels(healthy, self.keep_labels, self.merge_labels)

    def spacings(self, inputs: Tensor) -> list[Sequence[float]]:
        """Mm along x, y, z of each mask of a batch."""
        if self.spacing is not None:
            return [self.spacing] * len(inputs)
        if not isinstance(inputs, MetaTensor):
            raise ValueError("the mask has no affine to read its spacing from; pass a MetaTensor or set `spacing`")
        # Depending on the loader, there is one affine a mask, or one for all without a batch axis.
        affines = inputs.affine.reshape(-1, 4, 4)
        if len(affines) < len(inputs):  # torch.stack and torch.cat keep the first one's
            logger.warning(
                "%d masks have one affine, and all are taken to have its spacing, %s mm; masks of several spacings are "
                "collated with MONAI's list_data_collate",
                len(inputs),
                " x ".join(f"{mm:g}" for mm in affines[0, :3, :3].norm(dim=0).tolist()),
            )
        return affines.expand(len(inputs), 4, 4)[:, :3, :3].norm(dim=1).tolist()

    @torch.no_grad()
    def _prepare(self, labels: Tensor, spacing: Sequence[float], network: ControlledUNet) -> Draw:
        padded, size = pad_to_multiple(labels.float(), self.multiple, "replicate")
        denoiser, conditions = self.denoiser(padded, spacing, network)

        @torch.no_grad()
        def draw(seed: int) -> Tensor:
            noise = replace(conditions, seed=seed).noise(network.factor)[None].to(labels.device)
            self.decoder.check(noise)
            generator = step_generator(noise, seed)
            settings = self.scheduler, self.num_inference_steps, generator, self.progress, self.solver
            latent = sample(denoiser, noise, *settings, last_step=self.last_step)
            ct = crop_to(self.decoder(latent), size)
            return torch.where(labels == 0, torch.zeros_like(ct), ct)

        return draw


def each_sample(inputs: Tensor, seeds: Sequence[int] | None, seed: int) -> Iterator[tuple[Tensor, int]]:
    """(noise (1, 4, d, h, w), seed) one sample at a time: a volume must not depend on the batch it was drawn in.

    Args:
        inputs: (B, 4, d, h, w).
        seeds: one a sample; None takes those that :class:`~maisi_tools.diffusion.noise.DrawNoised` left in the meta.
        seed: of all, where there is none.

    Raises:
        ValueError: not as many seeds as samples.
    """
    if seeds is None:
        found = inputs.meta.get("seed") if isinstance(inputs, MetaTensor) else None
        seeds = [seed] * len(inputs) if found is None else torch.as_tensor(found).reshape(-1).tolist()
    if len(seeds) != len(inputs):
        raise ValueError(f"{len(inputs)} samples have {len(seeds)} seeds; collate with MONAI's list_data_collate")
    inputs = torch.as_tensor(inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs)
    return zip(inputs.split(1), map(int, seeds), strict=True)
