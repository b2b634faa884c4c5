"""The recorded computation: a graph whose nodes know how to compute any range of their rows.

*Rows* are the positions along one dimension of a tensor, its *axis*. A node with an axis is a volume that can be
computed row range by row range; a node without one is *whole*: it is computed in one go.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = tuple[int, int]
"""Rows ``a <= row < b`` of a volume."""

Need = Callable[[int, int, int], Rows | None]
"""``need(k, a, b)``: the rows of input ``k`` that output rows ``a..b`` are computed from; None is all of a whole."""

_serial = itertools.count()

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions of a tensor -> the layout with its channels last."""


def same_rows(k: int, a: int, b: int) -> Rows:
    """The need of an operation that treats every row by itself."""
    return a, b


def channels_last(dtype: torch.dtype, ndim: int) -> bool:
    """Whether tensors of this type are kept with their channels last in memory.

    Convolutions in half precision are made for it: on a CPU a decoder in bfloat16 took 1.7 s instead of 2.3; in
    float32 it made no difference.
    """
    return dtype in (torch.float16, torch.bfloat16) and ndim in (4, 5)


def is_arranged(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is of that type, and in the memory layout of it."""
    if tensor.dtype != dtype:
        return False
    return not channels_last(dtype, tensor.ndim) or tensor.is_contiguous(memory_format=_LAYOUTS[tensor.ndim])


def arranged(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor, as ``dtype`` where given, in the memory layout of its type; one copy is made, or none."""
    dtype = dtype or tensor.dtype
    if is_arranged(tensor, dtype):
        return tensor
    layout = _LAYOUTS[tensor.ndim] if channels_last(dtype, tensor.ndim) else torch.preserve_format
    if tensor.dtype == dtype:
        return tensor.contiguous(memory_format=layout)
    if layout is not torch.preserve_format and tensor.is_contiguous(memory_format=layout):
        return tensor.to(dtype)
    return tensor.to(dtype, memory_format=layout)


def _forgotten(slabs: list[Tensor], a: int, b: int, **_: Any) -> Any:
    raise AssertionError("a plan's nodes compute only while it is used")


class Constants:
    """Parameters and other plain tensors, copied once to each device and type they are used with.

    One object serves one call of the network, so a weight that changes between calls is read anew. Within a call a
    tensor is held as it is when it is recorded: what is written into later is copied first.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._held: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}

    def hold(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as it is now: another tensor on the same memory, until that is written into.

        Raises:
            TypeError: it is a subclass with memory of its own kind.
        """
        known, alias = (found() for found in self._held.get(id(tensor), (_nothing, _nothing)))
        if known is tensor and alias is not None and place_of(alias) == place_of(tensor):
            return alias
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"a {type(tensor).__name__} cannot be held")
        alias = Tensor._make_subclass(Tensor, tensor)
        self._held[id(tensor)] = weakref.ref(tensor), weakref.ref(alias)
        return alias

    def written(self, tensor: Tensor) -> None:
        """Give what is held on the memory of a tensor, which is about to be written into, memory of its own."""
        for key, (_, found) in list(self._held.items()):
            alias = found()
            if alias is None:
                del self._held[key]
            elif alias.layout == torch.strided and storage_of(alias) == storage_of(tensor):
                alias.set_(alias.clone())  # type: ignore[call-overload]
                del self._held[key]

    def held(self) -> list[Tensor]:
        """Return the tensors that something recorded holds."""
        return [alias for _, found in self._held.values() if (alias := found()) is not None]

    def get(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``tensor`` on ``device`` and, where given, as ``dtype``."""
        dtype = dtype or tensor.dtype
        if tensor.device == device and tensor.dtype == dtype and not channels_last(dtype, tensor.ndim):
            return tensor
        key = (id(tensor), device, dtype)
        if key not in self._copies:  # the original is kept too, so that its id stays its own
            near = tensor.detach() if tensor.device == device else tensor.detach().to(device, dtype)
            self._copies[key] = (tensor, arranged(near, dtype))
        return self._copies[key][1]


def _nothing() -> None:
    return None


def storage_of(tensor: Tensor) -> int:
    """Return what tells the memory of one tensor from another's, as long as it lives."""
    return tensor.untyped_storage()._cdata


def place_of(tensor: Tensor) -> Any:
    """Return where a tensor's values are."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class Node:
    """One operation and its result's shape.

    Args:
        name: of the operation, for reports.
        inputs: the nodes it reads.
        shape: of the whole result.
        dtype: of the result.
        axis: the dimension whose positions are rows; None for a whole.
        need: which rows of the inputs a range of output rows needs.
        compute: ``compute(slabs, a, b)`` with the needed rows of each input -> output rows ``a..b``. Slabs may
            be views of what is stored, and are not written into.
        cost: floating point operations per output element; 0 for what only moves or scales numbers. Results of
            operations with a cost are worth keeping.
        elementwise: every element of the result depends on the elements at the same place of the inputs.
        moments_of: for a normalisation, the node whose per-channel moments it needs; ``compute`` then takes them as a
            keyword ``moments``.
        channel_concat: the inputs are joined along dimension 1, so that moments join, too.
        ruled: False for an operation without a rule, which ran on the gathered tensor.
        room: bytes that computing it takes on the way, beside inputs and result and their ``copies``.
        copies: how many times the rows of inputs and result are there again while it is computed; None for the one in a
            convolution library's own layout where there is a cost.
        key: what tells ``need`` from another one that is the same at both ends and in the middle.
    """

    __slots__ = (
        "axis",
        "channel_concat",
        "compute",
        "copies",
        "cost",
        "dtype",
        "elementwise",
        "inputs",
        "key",
        "moments_of",
        "name",
        "need",
        "room",
        "ruled",
        "serial",
        "shape",
        "value",
    )

    def __init__(
        self,
        name: str,
        inputs: Sequence[Node],
        shape: Sequence[int],
        dtype: torch.dtype,
        axis: int | None,
        compute: Callable[..., Any],
        need: Need = same_rows,
        cost: float = 0.0,
        elementwise: bool = False,
        moments_of: Node | None = None,
        channel_concat: bool = False,
        ruled: bool = True,
        room: int = 0,
        copies: int | None = None,
        value: Tensor | None = None,
        key: Hashable = None,
    ) -> None:
        self.serial = next(_serial)
        self.name = name
        self.inputs = tuple(inputs)
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.axis = axis
        self.need = need
        self.compute = compute
        self.cost = cost
        self.elementwise = elementwise
        self.moments_of = moments_of
        self.channel_concat = channel_concat
        self.ruled = ruled
        self.room = room
        self.copies = bool(cost) if copies is None else copies
        self.value = value
        self.key = key

    @property
    def rows(self) -> int:
        """How many rows the volume has; 1 for a whole."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of all of it for a whole."""
        return self.shape.numel() // max(self.rows, 1) * self.dtype.itemsize

    @property
    def row_flop(self) -> float:
        """Floating point operations to compute one row from the inputs."""
        return self.cost * (self.shape.numel() // max(self.rows, 1))

    def forget(self) -> None:
        """Let go of the tensors that the node reads; it can be planned with, but no longer computed."""
        self.compute = _forgotten
        self.need = same_rows
        self.value = None

    def __repr__(self) -> str:
        return f"<{self.name} {tuple(self.shape)} axis {self.axis}>"


def source(tensor: Tensor, axis: int | None) -> Node:
    """Return the node of a tensor that exists already."""

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return tensor if axis is None else tensor.narrow(axis, a, b - a)

    return Node("source", (), tensor.shape, tensor.dtype, axis, compute, value=tensor)


def given(shape: Sequence[int], dtype: torch.dtype, axis: int) -> Node:
    """Return the node of a tensor that one rank holds and the others know the shape of."""

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        raise AssertionError("a given node's rows are fetched, not computed")

    return Node("given", (), shape, dtype, axis, compute)


def split(whole: Node, axis: int) -> Node:
    """Return a whole node's result as a volume with rows along ``axis``."""
    if whole.value is not None:
        return source(whole.value, axis)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return slabs[0].narrow(axis, a, b - a)

    def need(k: int, a: int, b: int) -> None:
        return None

    return Node("split", (whole,), whole.shape, whole.dtype, axis, compute, need)


def gathered(
    name: str,
    inputs: Sequence[Node],
    shapes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
    compute: Callable[..., Any],
    room: int = 0,
) -> list[Node]:
    """Return the results of an operation that takes all rows of its inputs at once: one whole for each shape."""
    inputs = tuple(inputs)

    def need(k: int, a: int, b: int) -> Rows | None:
        return None if inputs[k].axis is None else (0, inputs[k].rows)

    if len(shapes) == 1:
        return [Node(name, inputs, shapes[0], dtypes[0], None, compute, need, ruled=False, room=room)]
    size = sum(shape.numel() for shape in shapes)
    together = Node(name, inputs, (size,), dtypes[0], None, compute, need, ruled=False, room=room)

    def none(k: int, a: int, b: int) -> None:
        return None

    def result(place: int) -> Callable[..., Any]:
        return lambda slabs, a, b: slabs[0][place]

    return [
        Node(f"{name}[{i}]", (together,), shape, dtype, None, result(i), none, ruled=False)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def gather(node: Node) -> Node:
    """Return a volume as a whole."""
    if node.axis is None:
        return node

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return slabs[0]

    return gathered("gather", [node], [node.shape], [node.dtype], compute)[0]


def along(node: Node, axis: int) -> Node:
    """Return a volume with rows along another axis."""
    return node if node.axis == axis else split(gather(node), axis)


def clamp(lo: float, hi: float, rows: int) -> Rows:
    """Return the part of rows ``lo..hi`` that exists; at least one row, so that a slab is never empty."""
    a = min(max(math.floor(lo), 0), rows - 1)
    return a, max(min(math.ceil(hi), rows), a + 1)
