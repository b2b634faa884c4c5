"""The arguments of an operation, opened into leaves and put together again.

As :mod:`torch.utils._pytree` does for any structure, with less work, for what torch's operations take; slices
are opened too. A network has thousands of operations, and each is opened. What a network returns is opened by
:func:`mapped`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils._pytree import tree_map


def opened(value: Any, leaves: list[Any]) -> Hashable:
    """Append the leaves of nested tuples, lists, dictionaries and slices to ``leaves``; return their form."""
    if isinstance(value, (tuple, list)):
        return type(value), tuple([opened(part, leaves) for part in value])
    if isinstance(value, dict):
        return type(value), tuple([opened(part, leaves) for part in value.values()]), tuple(value)
    if isinstance(value, slice):
        return slice, (opened(value.start, leaves), opened(value.stop, leaves), opened(value.step, leaves))
    leaves.append(value)
    return None


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves alone."""
    leaves: list[Any] = []
    opened(value, leaves)
    return leaves


def closed(form: Any, leaves: Iterator[Any]) -> Any:
    """Return a value of a form, with the next of ``leaves``."""
    if form is None:
        return next(leaves)
    kind, parts, *names = form
    values = [closed(part, leaves) for part in parts]
    if kind is list:
        return values
    if names:
        return kind(zip(names[0], values, strict=True))
    return kind(*values) if kind is slice or hasattr(kind, "_make") else kind(values)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a network's result with every leaf replaced, as torch's ``tree_map``; dataclasses are opened, too."""

    def replaced(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return function(leaf)
        opened = copy.copy(leaf)
        for part in fields(leaf):
            object.__setattr__(opened, part.name, mapped(function, getattr(leaf, part.name)))
        return opened

    return tree_map(replaced, value)
