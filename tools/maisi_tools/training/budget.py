"""How far a training run is, by steps or by a time budget, and what follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch.optim.lr_scheduler import LambdaLR

from maisi_tools.errors import InputError
from maisi_tools.training.steps import is_optimizer_step


class Budget:
    """The progress of a run from 0 to 1, which its schedules end in; where there is a time budget, it ends the run.

    Of several ranks the first one's clock counts, so that all have one learning rate and end with one step.

    It is a handler of the trainer. A step lasts from asking for its batch to the end of its iteration: validation and
    checkpoints are not counted. A run that is resumed goes on from the time it had used, if it is among the
    checkpoint's objects.

    Args:
        minutes: of training, after which the run ends if its epochs did not end it before; None for no such limit.
        longest_step: seconds that a step counts for at most, so that a process that was stopped for a while (SIGSTOP)
            or a machine that slept does not lose its budget.

    Raises:
        InputError: ``minutes`` is not above 0.
    """

    def __init__(self, minutes: float | None = None, longest_step: float = 60.0) -> None:
        if minutes is not None and not (isinstance(minutes, (int, float)) and 0 < minutes < math.inf):
            raise InputError(f"minutes is {minutes!r}; allowed is a number above 0, or null to run for all epochs")
        self.minutes = minutes
        self.longest_step = float(longest_step)
        self.used = 0.0
        self.asked: float | None = None
        self._progress = torch.zeros((), dtype=torch.float64).share_memory_()  # the loader's workers see it, too

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return float(self._progress)

    def attach(self, engine: Engine) -> None:
        """Measure each step; a run that is resumed after its end does not go on."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._end_when_used)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def state_dict(self) -> dict[str, float]:
        """The seconds used, where they are limited, and the progress they meant."""
        return {"used": 0.0 if self.minutes is None else self.used, "progress": self.progress}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from there; another budget than before may be given."""
        self.used = float(state["used"])
        self._progress.fill_(float(state["progress"]))

    def _end_when_used(self, engine: Engine) -> None:
        if self.minutes is not None and self.used >= 60 * self.minutes:
            engine.terminate()

    def _ask(self, engine: Engine) -> None:
        self.asked = time.perf_counter()

    def _count(self, engine: Engine) -> None:
        if self.asked is not None:
            self.used += min(time.perf_counter() - self.asked, self.longest_step)
        if self.minutes is not None and idist.get_world_size() > 1:
            used = torch.tensor([self.used], dtype=torch.float64, device=idist.device())
            idist.broadcast(used, src=0)  # in place
            self.used = used.item()
        steps: Any = (engine.state.max_epochs, engine.state.epoch_length)
        done = engine.state.iteration / (steps[0] * steps[1])
        if self.minutes is not None:
            done = max(done, self.used / (60 * self.minutes))
        self._progress.fill_(min(done, 1.0))
        if self.minutes is not None and done >= 1 and is_optimizer_step(engine):  # not in the middle of a step
            engine.terminate()


def cosine(progress: float, warm_up: float = 0.03) -> float:
    """Up to 1 over the first part (``warm_up``, a share of the run), then down to 0, half a cosine.

    The cosine is Loshchilov and Hutter's (2017, arXiv 1608.03983). Without the rise, Adam's first steps, which are as
    large as the rate for every weight, destroy a start that is already good.
    """
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def late_fall(progress: float, fall: float = 0.4) -> float:
    """1, and over the last part (``fall``, a share of the run) straight down to 0."""
    return min(1.0, (1 - progress) / fall)


SHAPES = {"cosine": cosine, "late_fall": late_fall}
"""Of a learning rate over a run, by name."""


def by_budget(optimizer: torch.optim.Optimizer, budget: Budget, shape: str) -> LambdaLR:
    """A schedule that multiplies the optimizer's learning rates by a shape of the budget's progress.

    Raises:
        InputError: a shape that is none of :data:`SHAPES`.
    """
    if shape not in SHAPES:
        raise InputError(f"shape is {shape!r}; allowed are {', '.join(SHAPES)}: name one of them")
    schedule = LambdaLR(optimizer, lambda _: SHAPES[shape](budget.progress))
    schedule.shape = shape  # type: ignore[attr-defined]  # what a checkpoint is compared by
    return schedule
