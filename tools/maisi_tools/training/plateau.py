"""Ends a training when its validation stops improving."""

from __future__ import annotations

from ignite.engine import Engine, Events
from torch.optim.lr_scheduler import ReduceLROnPlateau


class StopAtPlateau:
    """Trainer's handler: gives each epoch's validation to the scheduler, and ends the run when the rate is least.

    So a run ends when it has stopped improving at the last of the scheduler's rates, however many steps it took. It
    stands behind the ValidationHandler, which validates at every epoch, and before the Checkpointer, which keeps the
    scheduler.

    Args:
        evaluator: whose key metric counts; higher is better.
        scheduler: of the trainer's optimizer, with ``mode="max"``.
        least_rate: the run ends when the learning rate falls below it.
    """

    def __init__(self, evaluator: Engine, scheduler: ReduceLROnPlateau, least_rate: float) -> None:
        self.evaluator = evaluator
        self.scheduler = scheduler
        self.least_rate = float(least_rate)

    def attach(self, engine: Engine) -> None:
        """Look at the end of each epoch; a run that is resumed after its end does not go on."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._end_when_least)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state = self.evaluator.state
        self.scheduler.step(float(state.metrics[state.key_metric_name]))  # type: ignore[attr-defined]
        self._end_when_least(engine)

    def _end_when_least(self, engine: Engine) -> None:
        if self.scheduler.optimizer.param_groups[0]["lr"] < self.least_rate:
            engine.terminate()
