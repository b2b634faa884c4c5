"""The discriminator of the VAE-GAN, trained beside an autoencoder that MONAI's ``SupervisedTrainer`` trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_


class Adversary:
    """A patch discriminator that learns to tell reconstructions from images, and what it says of a reconstruction.

    MONAI's ``AdversarialTrainer`` cannot express this step: it gives the generator's output as it is to the
    discriminator, and the autoencoder's is a tuple; it has no gradient accumulation; and its discriminator runs from
    the first step on. So the autoencoder is trained by MONAI's ``SupervisedTrainer`` with
    :class:`maisi_tools.training.losses.AutoencoderLoss`, which asks :meth:`generator_loss`; and this, one of the trainer's handlers,
    lets the discriminator take its own step after each of the autoencoder's, with the same accumulation. As in the
    paper's code its loss is the mean of that on images and that on reconstructions.

    Args:
        discriminator: image (B, 1, D, H, W) -> list of features, the logits last
            (``monai.networks.nets.PatchDiscriminator``); may be wrapped in ``DistributedDataParallel``. Its layers must
            treat the items of a batch apart, as instance norm does: images and reconstructions are one batch.
        optimizer: of the discriminator.
        criterion: ``monai.losses.PatchAdversarialLoss``.
        inferer: runs the discriminator, for mixed precision.
        weight: of the adversarial term in the autoencoder's loss; with 0 the discriminator is neither run nor trained.
        start: number of the first iteration it takes part in.
        max_norm: the discriminator's gradient is clipped to this norm; None for no clipping.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., Tensor],
        inferer: Callable[..., Any],
        weight: float,
        start: int,
        max_norm: float | None,
    ) -> None:
        self.discriminator = discriminator
        self.optimizer = optimizer
        self.criterion = criterion
        self.inferer = inferer
        self.weight = weight
        self.start = start
        self.max_norm = max_norm
        self.active = False

    def attach(self, engine: Engine) -> None:
        """Take part in the training of a ``SupervisedTrainer``."""
        if self.weight:
            engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
            engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self._step)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """How far the discriminator is from taking ``reconstruction`` (B, 1, D, H, W) for an image.

        Gradients go to the reconstruction alone.
        """
        plain = self.discriminator
        if isinstance(plain, DistributedDataParallel):
            plain = plain.module
        frozen = {name: value.detach() for name, value in plain.state_dict().items()}
        logits = self.inferer(reconstruction, lambda image: functional_call(plain, frozen, (image,)))[-1]
        return self.criterion(logits.float(), target_is_real=True, for_discriminator=False)

    def _begin(self, engine: Engine) -> None:
        self.active = engine.state.iteration >= self.start

    def _step(self, engine: Any) -> None:
        if not self.active:
            return
        step, steps = (engine.state.iteration - 1) % engine.state.epoch_length + 1, engine.accumulation_steps
        self.discriminator.train()
        if step % steps == 1 % steps:
            self.optimizer.zero_grad()
        output = engine.state.output
        images, reconstructions = output[CommonKeys.LABEL].detach().float(), output[CommonKeys.PRED][0].detach().float()
        logits = self.inferer(torch.cat([images, reconstructions]), self.discriminator)[-1].float()
        real, fake = logits.chunk(2)
        loss = (
            self.criterion(real, target_is_real=True, for_discriminator=True)
            + self.criterion(fake, target_is_real=False, for_discriminator=True)
        ) / 2
        (loss / steps).backward()
        engine.loss_function.terms["discriminator"] = loss.detach()
        if step % steps == 0 or step == engine.state.epoch_length:
            if self.max_norm is not None:
                clip_grad_norm_(self.discriminator.parameters(), self.max_norm)
            self.optimizer.step()
