"""Handlers around the optimizer's steps: learning rate, average of the weights, gradients."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.engines import IterationEvents, SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from maisi_tools.errors import InputError, TrainingError


def listed(handler: Any) -> Any:
    """The handler itself: MONAI's ``check_properties`` takes dicts in ``train#handlers`` and no references."""
    return handler


def whole_steps(iterations: int, accumulation_steps: int) -> int:
    """The length of an epoch: ``iterations``, rounded up so that it ends with an optimizer step.

    So every optimizer step is the average of ``accumulation_steps`` batches, the last one of an epoch too.

    Raises:
        InputError: one of them is not a whole number above 0.
    """
    for name, value in (("epoch_length", iterations), ("accumulation_steps", accumulation_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed is a whole number of batches, at least 1")
    return -(-iterations // accumulation_steps) * accumulation_steps


def is_optimizer_step(engine: Engine) -> bool:
    """Whether this iteration ends with an optimizer step, given an epoch of :func:`whole_steps`."""
    return engine.state.iteration % getattr(engine, "accumulation_steps", 1) == 0


class Trainer(SupervisedTrainer):
    """MONAI's trainer in mixed precision, without decollating what it has trained on.

    Args:
        device: to train on.
        amp_dtype: see :class:`~maisi_tools.autocast.AutocastInferer`, which computes in it; float16 on a GPU also needs
            the gradient scaler that is put in here.
        kwargs: of MONAI's trainer.
    """

    def __init__(self, device: torch.device | str, amp_dtype: str = "float32", **kwargs: Any) -> None:
        device = torch.device(device)
        scaled = amp_dtype == "float16" and device.type == "cuda"
        settings = {"amp": scaled, "amp_kwargs": {"dtype": torch.float16}, "decollate": False, **kwargs}
        super().__init__(device=device, **settings)


class LrPerStep(LrScheduleHandler):
    """Steps the learning-rate scheduler once an optimizer step, also under gradient accumulation."""

    def __init__(self, lr_scheduler: Any) -> None:
        super().__init__(lr_scheduler, print_lr=False, epoch_level=False)

    def __call__(self, engine: Engine) -> None:
        if is_optimizer_step(engine):
            super().__call__(engine)


class SyncPerStep:
    """Lets the ranks exchange gradients only in the iterations that end with an optimizer step.

    What ``DistributedDataParallel.no_sync`` does, which needs a trainer of one's own; nothing for any other network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def attach(self, engine: Engine) -> None:
        """Set it at the start of each iteration."""
        if isinstance(self.network, DistributedDataParallel):
            engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.network.require_backward_grad_sync = is_optimizer_step(engine)  # type: ignore[assignment]


class Ema(EMAHandler):
    """Exponential moving average of the weights, once an optimizer step: ``ema += momentum (weights - ema)``.

    The momentum of step n (1, 2, ...) is at least 9 / (n + 10), as in TensorFlow's ``ExponentialMovingAverage``:
    otherwise the average of a short run would mostly be the weights that it began with. Frozen parameters stay as they
    are, to the bit. The averaged network is ``ema_model``, in evaluation mode.

    Args:
        model: that is trained.
        momentum: the share of a step's weights once the run is long, from step ``9 / momentum - 10`` on.
    """

    def __init__(self, model: nn.Module, momentum: float) -> None:
        super().__init__(model, momentum, handle_buffers="copy")

    def momentum_of(self, step: int) -> float:
        """The momentum of the optimizer step numbered ``step``, from 1 on."""
        return max(self.momentum, 9 / (step + 10))

    @torch.no_grad()
    def _update_ema_model(self, engine: Engine, name: str) -> None:
        if not is_optimizer_step(engine):
            return
        # By the trainer's iteration, which a checkpoint holds: so nothing else has to be saved to go on exactly.
        momentum = self.momentum_of(engine.state.iteration // getattr(engine, "accumulation_steps", 1))
        pairs = zip(self.ema_model.parameters(), self.model.parameters(), strict=True)
        means, trained = zip(*((mean, now) for mean, now in pairs if now.requires_grad), strict=True)
        torch._foreach_lerp_(means, trained, momentum)  # on a GPU a few kernels instead of one a parameter
        for kept, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged network's."""
        return self.ema_model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Set the averaged network."""
        self.ema_model.load_state_dict(state)


class ClipGradients:
    """Scales the gradients of an optimizer's parameters so that their norm is at most ``max_norm``, before its step.

    The norm before clipping is left in ``engine.state.gradient_norm``.

    Args:
        optimizer: whose parameters.
        max_norm: see :func:`clip_gradients`.

    Raises:
        TrainingError: a gradient is not finite (with a scaler this is left to the scaler, which skips the step).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Act between a ``SupervisedTrainer``'s backward pass and its step."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if not is_optimizer_step(engine):
            return
        if engine.scaler:
            engine.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.max_norm)
        engine.state.gradient_norm = norm
        if engine.scaler is None:
            check_norm(norm, engine)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    """Scale the gradients of an optimizer's parameters, and return their norm before.

    Args:
        optimizer: whose parameters.
        max_norm: largest Euclidean norm over all gradients; None only measures.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(clip_grad_norm_(parameters, float("inf") if max_norm is None else float(max_norm)))


def check_norm(norm: float, engine: Engine, whose: str = "gradient") -> None:
    """Stop before a step along gradients that are not finite.

    Raises:
        TrainingError: the norm is not finite.
    """
    if not norm < float("inf"):
        raise TrainingError(
            f"the {whose}'s norm is {norm} in iteration {engine.state.iteration}, though the loss is finite; the "
            "optimizer was not stepped. Resume from the last checkpoint with a lower learning rate or another seed"
        )
