"""From noise to a coarse CT."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.inferers import Inferer, SimpleInferer
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn

from maisi_tools.coarse.grid import CELL
from maisi_tools.diffusion.conditions import Conditions, draw_noise
from maisi_tools.diffusion.noise import redraw_seeds
from maisi_tools.diffusion.samplers import Progress, Scheduler, check_sampling, sample, step_generator
from maisi_tools.errors import InputError
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.volumes.checks import check_output_size, extent_within

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FieldOfView:
    """What the network that draws coarse CTs is told: the field of view in mm, and whether the chest is in it.

    Args:
        mm: (lowest, highest) along x, y, z; they enter the network as 0 and 1, what is beyond as the nearer one.

    Raises:
        InputError: these are not such pairs.
    """

    mm: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        try:
            pairs = [tuple(pair) for pair in self.mm]
        except TypeError:
            pairs = []
        if len(pairs) != 3 or not all(len(pair) == 2 and 0 <= pair[0] < pair[1] < math.inf for pair in pairs):
            raise InputError(f"field_of_view is {self.mm}; allowed are three of [lowest, highest] mm, the lowest first")

    @staticmethod
    def extents(size: Sequence[int], spacing: Sequence[float]) -> list[float]:
        """Mm along x, y, z."""
        return [n * float(mm) for n, mm in zip(size, spacing, strict=True)]

    def holds(self, size: Sequence[int], spacing: Sequence[float]) -> bool:
        """Whether the network can be told how large a volume is."""
        axes = zip(self.extents(size, spacing), self.mm, spacing, strict=True)
        return all(extent_within(mm, low, high, float(step)) for mm, (low, high), step in axes)

    def warn_beyond(self, size: Sequence[int], spacing: Sequence[float]) -> None:
        """Say that a volume is larger or smaller than what the network was told of in training."""
        if not self.holds(size, spacing):
            known = " x ".join(f"{low:g} to {high:g}" for low, high in self.mm)
            logger.warning(
                "a field of view of %s mm is beyond that of the coarse CTs' weights, %s: the body is stretched to fit",
                " x ".join(f"{mm:g}" for mm in self.extents(size, spacing)),
                known,
            )

    def vector(self, size: Sequence[int], spacing: Sequence[float], region: Sequence[str]) -> Tensor:
        """The network's input (4,) for a volume; without a region it is not known whether the chest is in it."""
        extents = self.extents(size, spacing)
        shares = [(mm - low) / (high - low) for mm, (low, high) in zip(extents, self.mm, strict=True)]
        chest = float("chest" in region) if region else UNKNOWN
        return torch.tensor([*(min(max(share, 0.0), 1.0) for share in shares), chest])


class CoarseSampler:
    """Draws the coarse CT of a sample: ``draw(conditions, seed) -> (1, 1, X, Y, Z)`` in [0, 1].

    Args:
        network: of the cells of coarse CTs (1, 8, d, h, w), conditioned on the field of view.
        scheduler, num_inference_steps, solver, progress: as in
            :class:`~maisi_tools.diffusion.inferers.LatentSampler`.
        size: voxels of a coarse CT along x, y, z.
        field_of_view: what the network is told.
        scale_factor: of the network's weights.
        inferer: how the network is run.

    Raises:
        InputError: see :func:`~maisi_tools.diffusion.samplers.check_sampling` and
            :func:`~maisi_tools.volumes.checks.check_output_size`.
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: Scheduler,
        num_inference_steps: int,
        size: Sequence[int],
        field_of_view: FieldOfView,
        scale_factor: float,
        progress: Progress = True,
        inferer: Inferer | None = None,
        solver: str = "euler",
    ) -> None:
        self.network = network
        self.scheduler = scheduler
        self.num_inference_steps = int(num_inference_steps)
        self.solver = solver
        check_sampling(self.scheduler, self.num_inference_steps, self.solver)
        self.size = check_output_size(size, CELL, "coarse_size")
        self.field_of_view = field_of_view
        self.scale_factor = float(scale_factor)
        self.progress = progress
        self.inferer = inferer or SimpleInferer()

    @torch.no_grad()
    def __call__(self, conditions: Conditions, seed: int) -> Tensor:
        self.field_of_view.warn_beyond(conditions.size, conditions.spacing)
        device = next(self.network.parameters()).device
        told = self.field_of_view.vector(conditions.size, conditions.spacing, conditions.region)[None].to(device)
        # Another seed than the latent's noise has: the two are to have nothing to do with each other.
        own = redraw_seeds(seed, 1)[1]
        noise = draw_noise((1, CELL**3, *(n // CELL for n in self.size)), own).to(device)
        cells = sample(
            lambda x, t: self.inferer(x, self.network, t, organ_sizes=told),
            noise,
            self.scheduler,
            self.num_inference_steps,
            step_generator(noise, own),
            progress=self.progress,
            solver=self.solver,
        )
        return pixelshuffle(cells / self.scale_factor, 3, CELL).clamp(0, 1)
