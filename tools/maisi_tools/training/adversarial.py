"""The discriminator of the VAE-GAN, trained beside an autoencoder that MONAI's ``SupervisedTrainer`` trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.utils.enums import AdversarialIterationEvents, CommonKeys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from maisi_tools.training.steps import check_norm, clip_gradients, is_optimizer_step


class Adversary:
    """A patch discriminator that learns to tell reconstructions from images, and judges them for the autoencoder.

    MONAI's ``AdversarialTrainer`` cannot express this step: it hands the generator's output to the discriminator as it
    is, and the autoencoder's is a tuple; it has no gradient accumulation; and its discriminator runs from the first
    step on. So ``SupervisedTrainer`` trains the autoencoder with
    :class:`maisi_tools.training.losses.AutoencoderLoss`, which asks :meth:`generator_loss`. This handler, the first in
    the trainer's list, lets the discriminator step after the autoencoder, with the same gradient accumulation, and
    fires MONAI's ``AdversarialIterationEvents.DISCRIMINATOR_LOSS_COMPLETED``. The discriminator's loss, the mean of
    that on images and that on reconstructions, joins the ``terms`` of the autoencoder's as "discriminator".

    Args:
        discriminator: image (B, 1, D, H, W) -> list of features, the logits last
            (``monai.networks.nets.PatchDiscriminator``), plain or in ``DistributedDataParallel``. Its layers must treat
            the items of a batch apart, as instance norm does: images and reconstructions are one batch.
        optimizer: of the discriminator.
        lr_scheduler: of the optimizer, stepped with it: its first step is the discriminator's.
        criterion: ``monai.losses.PatchAdversarialLoss``.
        inferer: runs the discriminator, for mixed precision without a gradient scaler (bfloat16 or float32).
        weight: of the adversarial term in the autoencoder's loss; with 0 the discriminator is neither run nor trained.
        start: the discriminator, and the adversarial term, start after this many iterations.
        max_norm: the discriminator's gradient is clipped to this norm; None does not clip it.

    Raises:
        TrainingError: the discriminator's gradient is not finite.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        criterion: Callable[..., Tensor],
        inferer: Callable[..., Any],
        weight: float,
        start: int,
        max_norm: float | None,
    ) -> None:
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.criterion = criterion
        self.inferer = inferer
        self.weight = weight
        self.start = start
        self.max_norm = max_norm
        self.active = False

    def attach(self, engine: Engine) -> None:
        """Take part in the training of a ``SupervisedTrainer``."""
        engine.register_events(*AdversarialIterationEvents)
        if self.weight:
            engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._step)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How far the discriminator is from taking ``reconstruction`` (B, 1, D, H, W) for an image.

        Gradients go to the reconstruction alone, not to the discriminator.
        """
        plain = self.discriminator
        if isinstance(plain, DistributedDataParallel):
            plain = plain.module
        frozen = {name: value.detach() for name, value in plain.state_dict().items()}
        logits = self.inferer(reconstruction, lambda image: functional_call(plain, frozen, (image,)))[-1]
        return self.criterion(logits.float(), target_is_real=True, for_discriminator=False)

    def _begin(self, engine: Engine) -> None:
        self.active = engine.state.iteration > self.start

    def _step(self, engine: Any) -> None:
        if not self.active:
            return
        steps = engine.accumulation_steps
        if (engine.state.iteration - 1) % steps == 0:
            self.optimizer.zero_grad()
        output = engine.state.output
        images, reconstructions = output[CommonKeys.LABEL], output[CommonKeys.PRED][0]
        both = torch.cat([images.float(), reconstructions.float()]).detach()
        real, fake = self.inferer(both, self.discriminator)[-1].float().chunk(2)
        loss = (
            self.criterion(real, target_is_real=True, for_discriminator=True)
            + self.criterion(fake, target_is_real=False, for_discriminator=True)
        ) / 2
        engine.loss_function.terms["discriminator"] = loss.detach()
        engine.fire_event(AdversarialIterationEvents.DISCRIMINATOR_LOSS_COMPLETED)
        (loss / steps).backward()
        if is_optimizer_step(engine):
            check_norm(clip_gradients(self.optimizer, self.max_norm), engine, "discriminator's gradient")
            self.optimizer.step()
            self.lr_scheduler.step()
