"""Learning rates over a run, as the autoencoder's config chooses among them: optimizer, rate and steps -> scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from maisi_tools.errors import InputError
from maisi_tools.training.budget import Budget, by_budget

RISE = 0.0501
"""Share of a cycle in which the rate rises; a little more than 1/20, so that 20 steps have one of them."""


def check_schedule(schedule: Any) -> None:
    """Refuse a name in a schedule's place; the config's own are referred to.

    Raises:
        InputError: it cannot be called.
    """
    if not callable(schedule):
        raise InputError(
            f"schedule is {schedule!r}; allowed are '@one_cycle', '@cosine' and '@warm_up', with the @, or another "
            "function of optimizer, rate and steps"
        )


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> OneCycleLR:
    """Up to `rate` and down again within `steps` (Smith and Topin 2018, arXiv 1708.07120)."""
    return OneCycleLR(optimizer, rate, total_steps=steps, pct_start=RISE)


def cosine(optimizer: Optimizer, rate: float, steps: int, budget: Budget) -> LambdaLR:
    """Half a cosine over what the budget allows, see :func:`~maisi_tools.training.budget.cosine`."""
    return by_budget(optimizer, budget, "cosine")


def warm_up(
    optimizer: Optimizer, rate: float, steps: int, factors: Sequence[Sequence[Any]], epoch_steps: int
) -> LambdaLR:
    """The rate times a factor in the first epochs, then the rate.

    Args:
        factors: (epoch, factor) in order; a factor holds before its epoch.
        epoch_steps: steps of an epoch.
    """
    return LambdaLR(optimizer, lambda step: next((x for epoch, x in factors if step < epoch * epoch_steps), 1.0))
