"""The handlers of a training run, in the order that they need: around each step, then validation, then what is kept.

The order is code, and not a config's, because a wrong one fails without a word: the guard against losses that are not
finite has to come before the optimizer's step, the average of the weights after it, what is logged after what it logs,
and the checkpoint last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.engines import IterationEvents
from monai.handlers import MLFlowHandler, StatsHandler, TensorBoardImageHandler, TensorBoardStatsHandler
from monai.utils.enums import AdversarialIterationEvents
from torch import nn

from maisi_tools.training.adversarial import Adversary
from maisi_tools.training.best import BestWeights
from maisi_tools.training.budget import Budget
from maisi_tools.training.checkpoint import Checkpointer, constants_of, data_of
from maisi_tools.training.monitor import LOG, NanGuard, StepLog
from maisi_tools.training.pictures import three_planes
from maisi_tools.training.steps import ClipGradients, Ema, LrPerStep, SyncPerStep


class _InOrder:
    """Handlers that are attached one after another."""

    handlers: Sequence[Any] = ()

    def attach(self, engine: Engine) -> None:
        """Attach them all."""
        for handler in self.handlers:
            handler.attach(engine)


class StepHandlers(_InOrder):
    """What belongs to each step, up to the learning rate of the next.

    Args:
        network: that is trained.
        ema: average of its weights.
        loss: with ``terms``.
        optimizer, lr_scheduler: of the network.
        budget: of time.
        dataloader: that is trained from.
        clip_norm: see :class:`~maisi_tools.training.steps.ClipGradients`.
        adversary: that the network is trained against, with optimizer and scheduler of its own.
        voxel_factor: see :class:`~maisi_tools.training.monitor.StepLog`.

    Attributes:
        objects: name -> what a checkpoint holds of them.
    """

    def __init__(
        self,
        network: nn.Module,
        ema: Ema,
        loss: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        budget: Budget,
        dataloader: Any,
        clip_norm: float | None = None,
        adversary: Adversary | None = None,
        voxel_factor: int = 1,
    ) -> None:
        self.objects = {
            **{"model": network, "ema": ema, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "budget": budget},
            "data": dataloader,
        }
        optimizers: Any = optimizer
        events: list[Any] = [IterationEvents.LOSS_COMPLETED]
        against: list[Any] = []
        if adversary is not None:
            self.objects |= {
                "discriminator": adversary.discriminator,
                "discriminator_optimizer": adversary.optimizer,
                "discriminator_lr_scheduler": adversary.lr_scheduler,
            }
            optimizers = {"autoencoder": optimizer, "discriminator": adversary.optimizer}
            events.append(AdversarialIterationEvents.DISCRIMINATOR_LOSS_COMPLETED)
            against = [SyncPerStep(adversary.discriminator), adversary]
        self.handlers = [
            dataloader,
            SyncPerStep(network),
            *against,
            NanGuard([loss], events),
            ClipGradients(optimizer, clip_norm),
            StepLog(optimizers, [loss], voxel_factor),
            ema,
            budget,
            LrPerStep(lr_scheduler),
        ]


@dataclass(frozen=True)
class Logs:
    """Where a run's figures go: to the log, TensorBoard and MLflow, from its first rank.

    Attributes:
        output_dir: of TensorBoard's files.
        rank: of this process.
        tensorboard: whether it is written.
        mlflow_uri: of an MLflow server; None for none.
    """

    output_dir: str | Path
    rank: int = 0
    tensorboard: bool = False
    mlflow_uri: str | None = None

    def handlers(self, pictures: Any = None, **settings: Any) -> list[Any]:
        """MONAI's, with the same settings each; `pictures` follow TensorBoard's figures."""
        if self.rank:
            return []
        found: list[Any] = []
        if self.tensorboard:
            found.append(TensorBoardStatsHandler(log_dir=str(self.output_dir), **settings))
            if pictures is not None:
                found.append(
                    TensorBoardImageHandler(
                        log_dir=str(self.output_dir),
                        batch_transform=lambda batch: ([None], [None]),
                        output_transform=pictures,
                    )
                )
        if self.mlflow_uri:
            found.append(MLFlowHandler(tracking_uri=self.mlflow_uri, **settings))
        return found


class RecordHandlers(_InOrder):
    """What is kept of a training run: its figures, and, last of all, the checkpoint to go on from.

    Args:
        steps: what belongs to each step.
        log: where the figures go.
        ckpt_dir, minutes, resume_from, extra, settings: see
            :class:`~maisi_tools.training.checkpoint.Checkpointer`; the data that are trained from are added. Of a
            component among the settings its constants count, see
            :func:`~maisi_tools.training.checkpoint.constants_of`.
        validation: data by which the best weights are chosen, added as well: on others they are not to be compared.
    """

    def __init__(
        self,
        steps: StepHandlers,
        log: Logs,
        ckpt_dir: str | Path,
        minutes: float,
        resume_from: str | Path | None = None,
        extra: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        validation: Sequence[Any] | None = None,
    ) -> None:
        data = data_of("data", steps.objects["data"].dataset.dataset.data)
        data |= {} if validation is None else data_of("validation", validation)
        wanted = {
            key: value for name, one in (settings or {}).items() for key, value in constants_of(name, one).items()
        }

        def figures(output: Any) -> Any:
            return output[LOG]

        self.handlers = [
            *([] if log.rank else [StatsHandler(output_transform=figures, key_var_format="{}: {:.4g} ")]),
            *log.handlers(output_transform=figures),
            Checkpointer(ckpt_dir, steps.objects, minutes, resume_from, extra, {**wanted, **data}),
        ]


class ValidationHandlers(_InOrder):
    """What is kept of a validation: its figures and, where asked for, the best weights and pictures.

    Args:
        log: where the figures go.
        best_path: for the weights with the highest key metric, see :class:`~maisi_tools.training.best.BestWeights`.
        network: whose weights.
        resume: whether the run goes on from an earlier part of it.
        extra: entries of the best weights' file beside them.
        pictures: show three planes of a volume and of what the network makes of it.
    """

    def __init__(
        self,
        log: Logs,
        best_path: str | Path | None = None,
        network: nn.Module | None = None,
        resume: bool = False,
        extra: Mapping[str, Any] | None = None,
        pictures: bool = False,
    ) -> None:
        self.handlers: list[Any] = []
        if not log.rank:
            self.handlers.append(StatsHandler(iteration_log=False))
            if best_path is not None and network is not None:
                self.handlers.append(BestWeights(best_path, network, resume, extra))
        drawn = (lambda output: [three_planes(output[0]["label"], output[0]["pred"])]) if pictures else None
        self.handlers += log.handlers(drawn, iteration_log=False)
