"""What a callable holds beside its arguments: the modules behind it, and all that a call of it may change."""

from __future__ import annotations

import copyreg
import dis
import functools
import logging
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maisi_tools.tsp.nodes import place_of

_DATA = (int, float, complex, str, bytes)

_FIXED = (
    *(*_DATA, range, type(None), type(Ellipsis), Enum, PurePath, re.Pattern),
    *(types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType, weakref.ref, logging.Logger),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic, np.dtype),
)
"""What no call changes, or, as a log, no result depends on."""

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)

_EMPTY = types.CellType()
"""Of a name that a function closes over before it has a value."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Bookkeeping:
    """What no result depends on, whatever a call changes in it."""


def modules_of(network: Callable[..., Any]) -> list[nn.Module]:
    """The modules behind a callable: itself, or those that it is bound to, closes over, or has in what it holds."""
    found: list[nn.Module] = []
    seen, open_ = set[int](), [network]
    for value in open_:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        else:
            open_ += _inside(value) or ()
    return found


class State:
    """What a network remembers, and what it draws from, to tell whether a call changed it.

    What cannot be looked into, as an iterator or a generator of random numbers, counts as changed.
    """

    def __init__(self, network: Callable[..., Any]) -> None:
        self._network = network
        modules = [part for outer in modules_of(network) for part in outer.modules()]
        # A hook may do anything with what it is shown, so it is shown each call once.
        self._opaque = any(vars(part).get(name) for part in modules for name in _HOOKS)
        self._kept = self._contents()
        self._places = [(value, place_of(value)) for value in self._kept if isinstance(value, Tensor)]
        self._drawn = random.getstate(), _numpy_state()

    def changed(self) -> bool:
        """Whether anything that it holds, at any depth, is another object, an array's value or a tensor elsewhere."""
        now = self._contents()
        return (
            self._opaque
            or len(now) != len(self._kept)
            or any(a is not b and not (type(a) is bytes and a == b) for a, b in zip(now, self._kept, strict=True))
            or any(place_of(tensor) != place for tensor, place in self._places)
        )

    def drew(self) -> bool:
        """Whether Python's or numpy's random numbers were drawn, by this thread or another."""
        return self._drawn != (random.getstate(), _numpy_state())

    def _contents(self) -> list[Any]:
        """All that the network holds, at any depth; of arrays the bytes."""
        found: list[Any] = [self._network]
        seen = set[int]()
        for value in found:
            if id(value) in seen:
                continue
            seen.add(id(value))
            inside = _inside(value)
            if inside is None:
                self._opaque = True
            else:
                found += inside
        return found


def _inside(value: Any) -> list[Any] | None:
    """What a value holds; None where it cannot be looked into.

    Of an object that is its attributes and its classes, of a class its data, of a function what it closes over, its
    defaults, and what it has by a global name, but for other functions.
    """
    if isinstance(value, (*_FIXED, Tensor, Bookkeeping)):
        return []
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else [value.tobytes()]
    if isinstance(value, type):
        data = (*_DATA, *_CONTAINERS, np.ndarray)
        return [one for name, one in vars(value).items() if isinstance(one, data) and not name.startswith("__")]
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        return [value.__self__, getattr(value, "__func__", None)]
    own = [value.__dict__] if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        return [*own, *value.keys(), *value.values()]
    if isinstance(value, _CONTAINERS):
        return [*own, *value]
    if isinstance(value, functools.partial):
        return [*own, value.func, value.args, value.keywords]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        named = [value.__globals__.get(name) for name in _globals_of(value.__code__)]
        functions = (types.FunctionType, types.BuiltinFunctionType)
        return [
            *(*own, *cells, value.__defaults__, value.__kwdefaults__),
            *(one for one in named if not isinstance(one, functions)),
        ]
    kind = type(value)
    made_plainly = kind.__new__ in (object.__new__, types.SimpleNamespace.__new__)
    if not own or not made_plainly or copyreg._slotnames(kind):  # type: ignore[attr-defined]
        return None
    return [*own, *kind.__mro__]


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> list[str]:
    """The global names that a function reads; its own list of names has those of attributes, too."""
    read = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return [name for name in code.co_names if name in read]


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return name, np.asarray(keys).tobytes(), *rest
