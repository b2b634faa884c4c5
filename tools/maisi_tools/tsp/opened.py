"""The arguments of an operation, opened into leaves and put together again.

As :mod:`torch.utils._pytree` does for any structure, with less work, for what torch's operations take; slices
are opened too. A network has thousands of operations, and each is opened.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any


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
