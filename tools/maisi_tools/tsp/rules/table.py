"""The table of rules, by the operation's name, and what all rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maisi_tools.tsp.nodes import Rows

RULES: dict[str, Callable[..., Any]] = {}
"""Operation name, as in ``torch`` without underscores -> rule."""


MIXED: set[str] = set()
"""Rules that also take calls whose first argument is no volume."""


def rule(*names: str, mixed: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated function into the table under ``names``; ``mixed`` where any argument may be the volume."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RULES[name] = function
            if mixed:
                MIXED.add(name)
        return function

    return enter


def bind(defaults: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, given by position or by keyword, with what is missing filled in.

    Raises:
        KeyError: a keyword is not among ``defaults``; the caller then takes the gathered tensor.
    """
    bound = dict(defaults)
    bound.update(zip(defaults, args, strict=False))
    if len(args) > len(defaults) or set(kwargs) - set(defaults):
        raise KeyError(f"unexpected arguments {sorted(set(kwargs) - set(defaults))}")
    return bound | dict(kwargs)


def per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    """Return one number per spatial dimension."""
    values = [value] * dims if isinstance(value, int) else [int(v) for v in value]
    return values * dims if len(values) == 1 else values


def fit(slab: Tensor, have: Rows, want: Rows, axis: int, fill: float = 0.0) -> Tensor:
    """Return rows ``want`` of a volume whose rows ``have`` are given; rows that do not exist are ``fill``."""
    lo, hi = max(want[0], have[0]), min(want[1], have[1])
    if lo >= hi:
        shape = list(slab.shape)
        shape[axis] = want[1] - want[0]
        return slab.new_full(shape, fill)
    if (lo, hi) != have:
        slab = slab.narrow(axis, lo - have[0], hi - lo)
    before, after = lo - want[0], want[1] - hi
    if not before and not after:
        return slab
    widths = [0, 0] * (slab.ndim - 1 - axis) + [before, after]
    return torch.nn.functional.pad(slab, widths, value=fill)
