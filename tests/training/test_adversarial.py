"""The discriminator's step against the least-squares GAN written out, and who gets which gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import nn

from maisi_tools.autocast import AutocastInferer
from maisi_tools.errors import TrainingError
from maisi_tools.training.adversarial import Adversary
from maisi_tools.training.losses import AutoencoderLoss


class Blur(nn.Module):
    """Stands for an autoencoder: (reconstruction, mean, sigma) from one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        mean = x[:, :, ::4, ::4, ::4]
        return self.scale * x, mean, torch.ones_like(mean)


def make(weight=0.1, start=0, rate=0.1):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, num_layers_d=3, norm="INSTANCE")
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Adversary(
        discriminator=discriminator,
        optimizer=optimizer,
        lr_scheduler=schedule,
        criterion=PatchAdversarialLoss(criterion="least_squares"),
        inferer=AutocastInferer("float32"),
        weight=weight,
        start=start,
        max_norm=1e6,
    )


def train(adversary, images, accumulation_steps=1, batch_size=1, weight=0.1):
    network = Blur()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader([{"image": image} for image in images], batch_size=batch_size),
        network=network,
        optimizer=optimizer,
        loss_function=AutoencoderLoss(1e-7, adversary=adversary, adversarial_weight=weight),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"], batch["image"]),
        train_handlers=[adversary],
        accumulation_steps=accumulation_steps,
        decollate=False,
    )
    trainer.run()
    return trainer


def least_squares(logits, label):
    """MONAI puts a leaky ReLU (slope 0.05) before the square."""
    return ((torch.where(logits > 0, logits, 0.05 * logits) - label) ** 2).mean()


def test_a_step_is_gradient_descent_on_the_mean_of_both_losses():
    adversary, image = make(), torch.rand(1, 24, 28, 24)
    before = copy.deepcopy(adversary.discriminator)
    trainer = train(adversary, [image])
    loss = (least_squares(before(image[None])[-1], 1) + least_squares(before(0.7 * image[None])[-1], 0)) / 2
    loss.backward()
    assert trainer.loss_function.terms["discriminator"].item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, now), then in zip(adversary.discriminator.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), (then - 0.1 * then.grad).detach(), msg=name)


def test_a_gradient_is_clipped_or_stops_the_run():
    for max_norm in (None, 1e-3):
        adversary = make()
        adversary.max_norm = max_norm
        before = copy.deepcopy(adversary.discriminator)
        train(adversary, [torch.rand(1, 24, 24, 24)])
        pairs = zip(adversary.discriminator.parameters(), before.parameters(), strict=True)
        moved = torch.stack([(now - then).norm() for now, then in pairs]).norm().item()
        assert moved > 2e-4 if max_norm is None else moved == pytest.approx(0.1 * max_norm, rel=0.1)
    adversary = make()
    next(adversary.discriminator.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="discriminator's gradient"):
        train(adversary, [torch.rand(1, 24, 24, 24)])


def test_the_autoencoder_sees_the_discriminator_as_it_was_before_the_step():
    adversary, image = make(), torch.rand(1, 24, 24, 24)
    before = copy.deepcopy(adversary.discriminator)
    terms = train(adversary, [image]).loss_function.terms
    expected = least_squares(before(0.7 * image[None])[-1], 1)
    assert terms["adversarial"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_the_adversarial_term_go_to_the_reconstruction_alone():
    adversary = make()
    reconstruction = torch.rand(1, 1, 24, 24, 24, requires_grad=True)
    adversary.generator_loss(reconstruction).backward()
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    expected = torch.autograd.grad(least_squares(adversary.discriminator(reconstruction)[-1], 1), reconstruction)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(reconstruction.grad, expected)


def test_accumulated_steps_equal_one_batch():
    images = torch.rand(4, 1, 24, 24, 24)
    one, many = make(), make()
    train(one, images, batch_size=2)
    train(many, images, batch_size=1, accumulation_steps=2)
    for a, b in zip(one.discriminator.parameters(), many.discriminator.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert many.lr_scheduler.last_epoch == 2


@pytest.mark.parametrize(("weight", "start", "steps"), [(0.1, 2, 1), (0.1, 3, 0), (0.0, 0, 0)])
def test_the_game_starts_when_asked_and_costs_nothing_before(weight, start, steps):
    adversary = make(weight, start)
    runs = []
    adversary.discriminator.register_forward_hook(lambda *_: runs.append(1))
    before = copy.deepcopy(adversary.discriminator.state_dict())
    trainer = train(adversary, torch.rand(3, 1, 24, 24, 24), weight=weight)
    changed = any(not torch.equal(value, before[name]) for name, value in adversary.discriminator.state_dict().items())
    assert changed == bool(steps) and adversary.lr_scheduler.last_epoch == steps
    assert len(runs) == 2 * steps  # once for the autoencoder, once for the discriminator's own step
    assert ("adversarial" in trainer.loss_function.terms) == bool(steps)
