"""What training the mask generator needs beyond the diffusion batch: organ sizes as the condition."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.schedulers import RFlowScheduler
from monai.transforms import MapTransform, ResizeWithPadOrCrop
from torch import Tensor

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.prior import stacked
from maisi_tools.mask_generator.sizes import RARE, UNKNOWN, OrganSizes, whole_range
from maisi_tools.masks.vocabulary import BODY, display_name
from maisi_tools.training.diffusion import DiffusionBatch
from maisi_tools.training.loaders import sample_numbers, seed_of
from maisi_tools.volumes.checks import check_output_size
from maisi_tools.volumes.reading import read_sidecar

logger = logging.getLogger(__name__)

SIZES = 10
"""Purpose of the random numbers that drop sizes, beside those of :mod:`maisi_tools.training.loaders`."""


class ToCanvasd(MapTransform):
    """Puts a mask, a ``MetaTensor`` (1, X, Y, Z), into the middle of the canvas; what it cuts of the body is said.

    Args:
        keys: key of the mask.
        canvas: voxels along x, y, z.
        multiple: what has to divide a canvas.

    Raises:
        InputError: no canvas, or one that would cut an organ, whose size would be learned as what is left.
    """

    def __init__(self, keys: str, canvas: Sequence[int], multiple: int) -> None:
        super().__init__(keys)
        self.canvas = check_output_size(canvas, multiple, "canvas")
        self.multiple = multiple
        self.fit = ResizeWithPadOrCrop(self.canvas)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask = data[self.keys[0]]
        fitted = self.fit(mask)
        voxels, kept = (np.bincount(np.asarray(one, np.uint8).ravel(), minlength=BODY + 1) for one in (mask, fitted))
        if cut := [int(label) for label in np.flatnonzero(kept < voxels) if label]:
            size = mask.shape[1:]
            wide = [
                max(n, self.multiple * math.ceil(m / self.multiple)) for n, m in zip(self.canvas, size, strict=True)
            ]
            given = (
                f"{mask.meta.get('filename_or_obj')} has a body of {' x '.join(map(str, size))} voxels; the canvas of "
                f"{' x '.join(map(str, self.canvas))}"
            )
            if cut != [BODY]:
                listed = ", ".join(f"{display_name(label)} ({label})" for label in cut)
                raise InputError(
                    f"{given} would cut {listed}, whose sizes would be learned as what is left; allowed is one that "
                    f"holds all organs: give --canvas '{wide}', for all masks, or leave this one out"
                )
            lost = 100 * (voxels - kept)[BODY] / voxels[1:].sum()
            logger.warning("%s cuts off %.2g %% of it, and no organ; --canvas '%s' holds it all", given, lost, wide)
        return {**data, self.keys[0]: fitted}


class OrganSizesd(MapTransform):
    """Adds ``organ_sizes`` (number of organs,), from the volumes in a mask latent's sidecar.

    Args:
        keys: key of the latent, whose sidecar has ``label_ml`` as ``encode_mask.json`` writes it.
        organs: see :class:`~maisi_tools.mask_generator.sizes.OrganSizes`.

    Raises:
        InputError: the sidecar has no volumes.
    """

    def __init__(self, keys: str, organs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(keys)
        self.sizes = OrganSizes(organs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        meta = data[self.keys[0]].meta
        volumes = _volumes_in(meta["sidecar"], meta.get("filename_or_obj"))
        return {**data, "organ_sizes": self.sizes.of_volumes(volumes)}


def check_organs(
    latents: Sequence[Mapping[str, str]], organs: Mapping[str, Mapping[str, Any]], weights: str | None = None
) -> None:
    """Refuse organs that no training mask has, and say where many sizes lie beyond their range.

    Args:
        latents: of masks, with their paths under ``latent``.
        organs: see :class:`~maisi_tools.mask_generator.sizes.OrganSizes`.
        weights: to go on from; they have learned their organs, so that one without masks is said.

    Raises:
        InputError: no mask has an organ, or a sidecar has no volumes.
    """
    volumes = [_volumes_in(read_sidecar(one["latent"]), one["latent"]) for one in latents]
    found = {label for of_one in volumes for label, ml in of_one.items() if ml > 0}
    absent = [f"{name} ({organ['label']})" for name, organ in organs.items() if int(organ["label"]) not in found]
    if absent and volumes:
        given = f"organs has {', '.join(absent)}, which none of the {len(volumes)} training masks has"
        if weights is None:
            raise InputError(f"{given}; they have the labels {sorted(found)}: give --organs with some of these alone")
        logger.warning("%s: the weights learn nothing more of it", given)
    for name, organ in organs.items():
        low, high = organ["range"]
        sizes = [ml for of_one in volumes if (ml := of_one.get(int(organ["label"]), 0.0)) > 0]
        beyond = sum(not low <= ml <= high for ml in sizes)
        if beyond > RARE * len(sizes):
            logger.warning(
                "%s: %d of %d sizes lie beyond the range of organs, %g to %g ml, and count as its end; 95 %% of the "
                "data's lie within %s: give that, here and in mask_inference.json",
                *(name, beyond, len(sizes), low, high, whole_range(np.percentile(sizes, [2.5, 97.5]).tolist())),
            )


def _volumes_in(sidecar: Mapping[str, Any], name: str | None) -> dict[int, float]:
    """Label -> ml, as ``encode_mask.json`` writes them."""
    if "label_ml" not in sidecar:
        raise InputError(
            f"latent {name} has no label_ml in its sidecar, the volumes of a mask's labels; the mask generator trains "
            "from masks encoded with encode.json and encode_mask.json of maisi_vae"
        )
    return {int(label): float(ml) for label, ml in sidecar["label_ml"].items()}


def size_directions(samples: Iterable[Mapping[str, Any]], scale_factor: float, ridge: float = 0.03) -> Tensor:
    """What of a mask latent tells how large each organ is: the linear function that fits the samples best.

    Ridge regression in its dual form (number of samples squared, not of latent voxels). On the OpenKBP masks its
    rank correlation with the volumes of kept-out patients is from 0.2 (spinal cord) over 0.7 (parotid glands) to 0.99
    (body): sizes themselves are no linear function, but the directions are those that matter.

    Args:
        samples: with ``latent`` (4, d, h, w), all of one shape, and ``organ_sizes`` as :class:`OrganSizesd` adds them.
        scale_factor: latents are multiplied by it, as in training.
        ridge: penalty, in units of the mean square of a latent.

    Returns:
        (number of organs, 4, d, h, w), in units of the organs' ranges; zeros for an organ with fewer than two sizes.

    Raises:
        InputError: latents of several shapes.
    """
    samples_latents, sizes = stacked(samples, scale_factor)
    latents = samples_latents.flatten(1)
    directions = torch.zeros(sizes.shape[1], latents.shape[1])
    for organ, size in enumerate(sizes.T):
        known = size != UNKNOWN
        if known.sum() < 2:
            continue
        apart = latents[known] - latents[known].mean(0)
        gram = (apart @ apart.T / latents.shape[1]).double()
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), (size[known] - size[known].mean()).double())
        directions[organ] = weights.float() @ apart / latents.shape[1]
    return directions.reshape(-1, *samples_latents.shape[1:])


class MaskDiffusionBatch(DiffusionBatch):
    """``prepare_batch`` of the mask generator's trainer: the one condition are the organ sizes.

    Args:
        size_dropout: sizes are replaced by :data:`~maisi_tools.mask_generator.sizes.UNKNOWN` one by one, at a rate
            drawn for each sample between 0 and this; so the network learns to obey one size alone, and all of them.
        latest: largest share of noise that is trained for; above it
            :class:`~maisi_tools.mask_generator.prior.ShapePrior` takes over.
        kwargs: of :class:`~maisi_tools.training.diffusion.DiffusionBatch`.

    Raises:
        InputError: `latest` is no share of noise, or is below 1 with another scheduler than rectified flow's.
    """

    def __init__(self, *args: Any, size_dropout: float = 0.0, latest: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size_dropout = float(size_dropout)
        self.latest = float(latest)
        if not 0 < self.latest <= 1:
            raise InputError(f"prior_until is {latest}; allowed is a share of noise above 0, up to 1")
        if self.latest < 1 and not isinstance(self.scheduler, RFlowScheduler):
            raise InputError(
                f"prior_until is {latest} with {type(self.scheduler).__name__}; the prior is for rectified flow: give "
                "--prior_components 0 --prior_until 1"
            )

    def _timestep(self, latent: Tensor) -> Tensor:
        timestep = super()._timestep(latent)
        while timestep > self.latest * self.scheduler.num_train_timesteps:
            timestep = super()._timestep(latent)
        return timestep

    def _conditions(self, batch: Mapping[str, Any], chance: Tensor, device: torch.device) -> dict[str, Tensor]:
        sizes = torch.as_tensor(batch["organ_sizes"]).to(device).float()
        kept = []
        for one, draw in zip(sizes, batch["draw"], strict=True):
            with sample_numbers(seed_of(self.seed, SIZES), int(draw), device):
                rate = self.size_dropout * torch.rand((), device=device)
                kept.append(torch.rand(one.shape, device=device) >= rate)
        return {"organ_sizes": torch.where(torch.stack(kept), sizes, UNKNOWN)}
