"""The order of a training run's handlers, on a real trainer: what each leaves is there when the next looks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler, TensorBoardImageHandler, TensorBoardStatsHandler

from maisi_tools.errors import TrainingError
from maisi_tools.training.best import BestWeights
from maisi_tools.training.budget import Budget
from maisi_tools.training.checkpoint import Checkpointer
from maisi_tools.training.handlers import Logs, RecordHandlers, StepHandlers, ValidationHandlers
from maisi_tools.training.loaders import TrainingLoader
from maisi_tools.training.monitor import NanGuard, StepLog
from maisi_tools.training.steps import ClipGradients, Ema, LrPerStep, SyncPerStep


class Loss(torch.nn.Module):
    def __init__(self, broken: int = 0) -> None:
        super().__init__()
        self.terms, self.broken, self.calls = {}, broken, 0

    def forward(self, prediction, target):
        self.calls += 1
        return (prediction - target).square().mean() * (float("nan") if self.calls == self.broken else 1.0)


def parts(broken: int = 0) -> SimpleNamespace:
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    data = [{"image": torch.full((1, 2, 2, 2), float(i)), "label": torch.ones(1, 2, 2, 2)} for i in range(3)]
    return SimpleNamespace(
        network=network,
        ema=Ema(network, 0.5),
        loss=Loss(broken),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        budget=Budget(None),
        dataloader=TrainingLoader(Dataset(data), seed=0, batch_size=1, num_workers=0),
    )


def train(made: SimpleNamespace, folder) -> SupervisedTrainer:
    steps = StepHandlers(**vars(made), clip_norm=1.0)
    records = RecordHandlers(steps, Logs(folder), folder, minutes=15, extra={"factor": 2})
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=made.dataloader,
        network=made.network,
        optimizer=made.optimizer,
        loss_function=made.loss,
        train_handlers=[steps, records],
        decollate=False,
    )
    trainer.run()
    return trainer


def test_the_order_is_the_one_that_steps_need():
    made = parts()
    kinds = [type(handler) for handler in StepHandlers(**vars(made)).handlers]
    assert kinds == [TrainingLoader, SyncPerStep, NanGuard, ClipGradients, StepLog, Ema, Budget, LrPerStep]
    adversary = SimpleNamespace(discriminator=torch.nn.Identity(), optimizer=made.optimizer, lr_scheduler=None)
    steps = StepHandlers(**vars(made), adversary=adversary)
    kinds = [type(handler) for handler in steps.handlers]
    assert kinds[:5] == [TrainingLoader, SyncPerStep, SyncPerStep, SimpleNamespace, NanGuard]
    assert {"discriminator", "discriminator_optimizer", "discriminator_lr_scheduler"} <= steps.objects.keys()
    assert list(steps.handlers[kinds.index(StepLog)].optimizers) == ["autoencoder", "discriminator"]


def test_a_run_leaves_the_average_the_rate_and_a_checkpoint_of_its_last_step(tmp_path):
    made = parts()
    trainer = train(made, tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["trainer"]["iteration"] == trainer.state.iteration == 3 and saved["factor"] == 2
    assert torch.equal(saved["model"]["weight"], made.network.weight)
    assert torch.equal(saved["ema"]["weight"], made.ema.ema_model.weight)
    assert not torch.equal(made.ema.ema_model.weight, made.network.weight)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert trainer.state.output["log"]["learning_rate"] == pytest.approx(0.1 * 0.5**2)  # of the step itself
    assert trainer.state.output["log"]["gradient_norm"] > 0


def test_a_loss_that_is_not_finite_touches_neither_weights_nor_average_nor_checkpoint(tmp_path):
    made = parts(broken=1)
    before = made.network.weight.detach().clone()
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(made, tmp_path)
    assert torch.equal(made.network.weight, before) and torch.equal(made.ema.ema_model.weight, before)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_only_the_first_rank_writes_and_the_checkpoint_comes_last(tmp_path):
    steps = StepHandlers(**vars(parts()))
    first = RecordHandlers(steps, Logs(tmp_path, tensorboard=True), tmp_path, 15).handlers
    assert [type(one) for one in first] == [StatsHandler, TensorBoardStatsHandler, Checkpointer]
    other = RecordHandlers(steps, Logs(tmp_path, rank=1, tensorboard=True), tmp_path, 15).handlers
    assert [type(one) for one in other] == [Checkpointer]
    assert [type(one) for one in RecordHandlers(steps, Logs(tmp_path), tmp_path, 15).handlers] == [
        StatsHandler,
        Checkpointer,
    ]


def test_a_validation_keeps_the_best_weights_and_pictures_where_they_are_asked_for(tmp_path):
    network = torch.nn.Linear(1, 1)
    asked = {"best_path": tmp_path / "best.pt", "network": network}
    kinds = [type(one) for one in ValidationHandlers(Logs(tmp_path, tensorboard=True), **asked, pictures=True).handlers]
    assert kinds == [StatsHandler, BestWeights, TensorBoardStatsHandler, TensorBoardImageHandler]
    assert [type(one) for one in ValidationHandlers(Logs(tmp_path)).handlers] == [StatsHandler]
    assert ValidationHandlers(Logs(tmp_path, rank=1), **asked).handlers == []
    engine = Engine(lambda *_: None)
    ValidationHandlers(Logs(tmp_path), **asked).attach(engine)
    engine.state.key_metric_name, engine.state.metrics = "dice", {"dice": 0.5}
    engine.fire_event(Events.COMPLETED)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["dice"] == 0.5


def test_other_validation_data_are_refused_where_the_best_weights_are_chosen_by_them(tmp_path):
    """And those of a run that chooses none, or of an earlier version, are not looked at."""
    for name in "ab":
        (tmp_path / f"{name}.nii").write_text(name)

    def settings(*names: str) -> dict:
        items = [{"image": str(tmp_path / f"{name}.nii")} for name in names]
        records = RecordHandlers(StepHandlers(**vars(parts())), Logs(tmp_path), tmp_path, 15, validation=items or None)
        return records.handlers[-1].settings

    first = settings("a")
    assert first["validation"] != settings("b")["validation"] and first["data"] == settings("b")["data"]
    (tmp_path / "a.nii").write_text("c")
    assert first["validation"] == settings("a")["validation"]
    assert first["validation_contents"] != settings("a")["validation_contents"]
    assert settings().keys() == {"data", "data_contents"} == first.keys() - {"validation", "validation_contents"}
