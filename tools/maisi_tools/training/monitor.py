"""Handlers that watch a training run: what is logged of each step, and the guard against losses that are not finite."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import Tensor, nn

from maisi_tools.errors import TrainingError
from maisi_tools.training.loaders import ranks

LOG = "log"
"""The key of a step's figures in the trainer's output, for the ``output_transform`` of MONAI's logging handlers."""


def loss_terms(output: Mapping[str, Any], losses: Sequence[nn.Module] = ()) -> dict[str, float]:
    """Every scalar in a trainer's output, and each of ``losses``'s ``terms``: name -> scalar, of its last call."""
    found = {str(name): value for name, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}
    for loss in losses:
        found.update(loss.terms)  # type: ignore[arg-type]
    return {name: float(value.detach()) for name, value in found.items()}


class StepLog:
    """Leaves the figures of a step in the trainer's output under ``"log"``, name -> float.

    MONAI's StatsHandler, TensorBoardStatsHandler and MLFlowHandler write them with the ``output_transform``
    ``$lambda output: output['log']``, and come after this handler in the list. Figures: every loss term,
    ``learning_rate`` (or ``learning_rate_NAME`` of several optimizers), ``gradient_norm`` where the gradients are
    clipped, ``voxels_per_second`` (image voxels of all ranks), ``data_share`` (the part of the step spent waiting for
    data). A step lasts from asking for its batch to the end of its iteration, without validation and checkpoints.

    Args:
        optimizers: one, or name -> optimizer.
        losses: modules with ``terms``, see :func:`loss_terms`.
        voxel_factor: image voxels along an axis for each voxel of the batch's input (where it is a latent, the
            autoencoder's factor).
    """

    def __init__(
        self,
        optimizers: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        losses: Sequence[nn.Module] = (),
        voxel_factor: int = 1,
    ) -> None:
        self.optimizers = optimizers if isinstance(optimizers, Mapping) else {"": optimizers}
        self.losses = losses
        self.voxel_factor = voxel_factor
        self.asked = self.got = 0.0

    def attach(self, engine: Engine) -> None:
        """Time each step and gather its figures at its end."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._get)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._gather)

    def _ask(self, engine: Engine) -> None:
        self.asked = time.perf_counter()

    def _get(self, engine: Engine) -> None:
        self.got = time.perf_counter()

    def _gather(self, engine: Engine) -> None:
        output: Any = engine.state.output
        figures = loss_terms(output, self.losses)  # waits for the device
        seconds = time.perf_counter() - self.asked
        for name, optimizer in self.optimizers.items():
            figures["learning_rate" + (f"_{name}" if name else "")] = optimizer.param_groups[0]["lr"]
        if hasattr(engine.state, "gradient_norm"):
            figures["gradient_norm"] = engine.state.gradient_norm
        batch: Any = engine.state.batch
        voxels = len(batch["item"]) * output["image"][0, 0].numel() * self.voxel_factor**3
        figures["voxels_per_second"] = voxels * ranks()[1] / seconds
        figures["data_share"] = (self.got - self.asked) / seconds
        output[LOG] = figures


class NanGuard:
    """Stops a run whose loss is not finite, before its weights or its checkpoint are touched.

    Args:
        losses: modules with ``terms``, see :func:`loss_terms`.
        events: when to look; by default when ``SupervisedTrainer`` has its loss and has not gone backward.

    Raises:
        TrainingError: names the loss terms, the inputs or outputs, and the files of the batch's items that broke.
    """

    def __init__(
        self, losses: Sequence[nn.Module] = (), events: Sequence[Any] = (IterationEvents.LOSS_COMPLETED,)
    ) -> None:
        self.losses = losses
        self.events = events

    def attach(self, engine: Engine) -> None:
        """Look at the events given."""
        for event in self.events:
            engine.add_event_handler(event, self)

    def __call__(self, engine: Engine) -> None:
        output: Any = engine.state.output
        terms = loss_terms(output, self.losses)
        broken = {name: value for name, value in terms.items() if not abs(value) < float("inf")}
        if not broken:
            return
        batch: Any = engine.state.batch
        items = [int(item) for item in batch["item"]]
        found = []
        for place, item in enumerate(items):
            parts = [name for name, value in _batched(output, len(items)) if not torch.isfinite(value[place]).all()]
            if parts:
                described = engine.data_loader.describe(item)  # type: ignore[attr-defined]
                found.append(f"{described} (not finite: {', '.join(dict.fromkeys(parts))})")
        raise TrainingError(
            f"in iteration {engine.state.iteration} of epoch {engine.state.epoch} the loss is not finite: "
            + ", ".join(f"{name} is {value}" for name, value in broken.items())
            + f". Batch items at fault: {'; '.join(found) or 'none, every input and output is finite'}. The last "
            "checkpoint is intact: look at these files, or resume with a lower learning rate or amp_dtype float32"
        )


def _batched(value: Any, size: int, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``value``, each as (size, ...): what belongs to an item of the batch in its row."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _batched(part, size, name or str(key))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _batched(part, size, name)
    elif isinstance(value, Tensor) and value.ndim and len(value) and len(value) % size == 0:
        yield name, value.reshape(-1, size, *value.shape[1:]).transpose(0, 1)
