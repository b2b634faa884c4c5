"""Optimizer steps of MONAI's trainer with the handlers, against plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.engines import SupervisedTrainer
from monai.transforms import Compose

from maisi_tools.errors import InputError, TrainingError
from maisi_tools.training.loaders import TrainingLoader
from maisi_tools.training.steps import ClipGradients, Ema, LrPerStep, whole_steps


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    layers[0].requires_grad_(False)
    return layers


def data(size: int = 4) -> Dataset:
    values = torch.randn(size, 4, generator=torch.Generator().manual_seed(2))
    return Dataset([{"image": value[:3], "label": value[3:]} for value in values], Compose([]))


class Run:
    """A trainer with its parts; `loss` is the mean squared error."""

    def __init__(self, batch_size=1, accumulation_steps=1, epochs=2, epoch_length=4, max_norm=None, rate=0.1):
        self.network = network()
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=rate)
        steps = epochs * epoch_length // accumulation_steps
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=steps, power=2)
        self.ema = Ema(self.network, 0.25)
        self.clip = ClipGradients(self.optimizer, max_norm)
        self.loader = TrainingLoader(data(), seed=0, batch_size=batch_size)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            epoch_length=epoch_length,
            train_data_loader=self.loader,
            network=self.network,
            optimizer=self.optimizer,
            loss_function=torch.nn.MSELoss(),
            train_handlers=[self.loader, self.clip, self.ema, LrPerStep(self.schedule)],
            accumulation_steps=accumulation_steps,
            decollate=False,
        )


def test_accumulated_batches_step_like_one_batch_of_all():
    """Weights, average and learning rate: accumulation is not visible from outside."""
    accumulated, whole = Run(1, 2, epoch_length=4), Run(2, 1, epoch_length=2)
    accumulated.trainer.run()
    whole.trainer.run()
    for a, b in ((accumulated.network, whole.network), (accumulated.ema.ema_model, whole.ema.ema_model)):
        for name, value in a.state_dict().items():
            torch.testing.assert_close(value, b.state_dict()[name])
    assert accumulated.schedule.last_epoch == whole.schedule.last_epoch == 4
    assert accumulated.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
def test_learning_rate_falls_once_an_optimizer_step(accumulation_steps):
    run, rates = Run(accumulation_steps=accumulation_steps), []
    run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    run.trainer.run()
    steps = 8 // accumulation_steps
    expected = [0.1 * (1 - k // accumulation_steps / steps) ** 2 for k in range(8)]
    assert rates == pytest.approx(expected)


def test_average_in_closed_form_and_frozen_to_the_bit():
    """The momenta of a run's first steps are 9/11, 9/12, 9/13, 9/14, all above the 0.25 that is given."""
    run = Run(epochs=1)
    first, states = copy.deepcopy(run.network.state_dict()), []
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: states.append(copy.deepcopy(run.network.state_dict()))
    )
    run.trainer.run()
    mean = run.ema.ema_model.state_dict()
    for name in ("2.weight", "2.bias"):
        expected = first[name].double()
        for state, share in zip(states, (9 / 11, 9 / 12, 9 / 13, 9 / 14), strict=True):
            expected = (1 - share) * expected + share * state[name]
        torch.testing.assert_close(mean[name], expected.float())
    assert torch.equal(mean["0.weight"], first["0.weight"]) and not run.ema.ema_model.training


def test_little_is_left_of_the_first_weights_in_the_average_of_a_short_run():
    """Of 200 steps with momentum 0.001; without a warm-up it would be 0.999 to the power of 200, 82 %."""
    ema, left = Ema(network(), 0.001), 1.0
    for step in range(1, 201):
        left *= 1 - ema.momentum_of(step)
    assert left < 1e-9
    assert ema.momentum_of(8989) > ema.momentum_of(8990) == ema.momentum_of(10**6) == 0.001


def test_gradients_are_clipped_to_the_norm_and_measured_before():
    free, clipped = Run(epochs=1, epoch_length=1), Run(epochs=1, epoch_length=1, max_norm=0.01)
    before = [parameter.clone() for parameter in clipped.network[2].parameters()]
    free.trainer.run()
    clipped.trainer.run()
    assert clipped.trainer.state.gradient_norm == free.trainer.state.gradient_norm > 0.01
    moved = [now - then for now, then in zip(clipped.network[2].parameters(), before, strict=True)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    run = Run()
    run.network[2].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = run.network[2].weight.clone()
    with pytest.raises(TrainingError, match="norm is .* in iteration 1, though the loss is finite"):
        run.trainer.run()
    assert torch.equal(run.network[2].weight, before)


def test_an_epoch_is_whole_steps():
    assert [whole_steps(n, 4) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    for accumulation_steps in (0, 1.5):
        with pytest.raises(InputError, match="accumulation_steps"):
            whole_steps(4, accumulation_steps)
