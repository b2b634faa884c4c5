"""Operations that move elements: slices, permutations, reshapes, joins, padding; and those along other dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maisi_tools.tsp.nodes import Node, Rows, along, clamp
from maisi_tools.tsp.rules.table import bind, fit, rule


def _local(
    name: str,
    node: Node,
    shape: Sequence[int],
    axis: int,
    function: Callable[[Tensor, int], Tensor],
    cost: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Node:
    """A node that treats rows apart: ``function(slab, count)`` gives the rows of the result, along ``axis``."""

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return function(slabs[0], b - a)

    return Node(name, (node,), shape, dtype or node.dtype, axis, compute, cost=cost)


def _mapped(name: str, node: Node, shape: Sequence[int], rows: np.ndarray, other: Callable[[Tensor], Tensor]) -> Node:
    """A node whose row ``i`` is row ``rows[i]`` of its input, after ``other`` has seen to the other dimensions."""
    axis = node.axis
    assert axis is not None

    def need(k: int, a: int, b: int) -> Rows:
        return int(rows[a:b].min()), int(rows[a:b].max()) + 1

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab = other(slabs[0])
        return slab.index_select(axis, torch.as_tensor(rows[a:b] - rows[a:b].min(), device=slab.device))

    return Node(name, (node,), shape, node.dtype, axis, compute, need, key=rows.tobytes())


@rule("clone", "contiguous", "detach", "alias", "requires_grad", "positive", "data", "resolve_conj", "resolve_neg")
def same(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node:
    """The volume as it is: nodes never change, so a copy needs no copying."""
    return args[0].node


@rule("to", "type", "float", "half", "bfloat16", "double", "bool", "int", "long", "type_as", "cuda", "cpu")
def cast(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Another type; between floating types nothing happens when the inferer was given its own ``dtype``."""
    node, dtype = args[0].node, recorder.expected.dtype
    if dtype == node.dtype:
        return node
    if node.axis is None:
        return None
    return _local("cast", node, node.shape, node.axis, lambda slab, _: slab.to(dtype), dtype=dtype)


@rule("getitem")
def getitem(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Slices, numbers, None and Ellipsis; a single row, a mask or an index tensor takes the gathered tensor."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
        return None
    if any(isinstance(i, bool) for i in index):
        return None
    return _index(recorder, args[0].node, index)


def _index(recorder: Any, node: Node, index: Sequence[Any]) -> Node | None:
    if node.axis is None:
        return None
    ndim = len(node.shape)
    taken = sum(i is not None and i is not Ellipsis for i in index)
    full: list[Any] = []
    for i in index:
        full += [slice(None)] * (ndim - taken) if i is Ellipsis else [i]
    full += [slice(None)] * (ndim - sum(i is not None for i in full))
    meta = torch.empty(node.shape, device="meta")[tuple(full)]
    dim, out = 0, 0
    place, axis = None, None
    for position, i in enumerate(full):
        if i is None:
            out += 1
            continue
        if dim == node.axis:
            place, axis = position, out
        dim += 1
        out += not isinstance(i, int)
    assert place is not None and axis is not None
    chosen = full[place]
    if isinstance(chosen, int):
        return None
    start, _, step = chosen.indices(node.rows)
    if meta.shape[axis] == 0:
        return None
    within = tuple(slice(None, None, step) if p == place else i for p, i in enumerate(full))

    def need(k: int, a: int, b: int) -> Rows:
        return start + a * step, start + (b - 1) * step + 1

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return slabs[0][within]

    return Node("slice", (node,), meta.shape, node.dtype, axis, compute, need)


@rule("narrow")
def narrow(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A range along one dimension."""
    given = bind({"input": None, "dim": None, "start": None, "length": None}, args, kwargs)
    node = given["input"].node
    dim, start = given["dim"] % len(node.shape), given["start"]
    start += node.shape[dim] if start < 0 else 0
    return _index(recorder, node, [slice(None)] * dim + [slice(start, start + given["length"])])


@rule("select")
def select(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """One position along a dimension that is not the axis."""
    given = bind({"input": None, "dim": None, "index": None}, args, kwargs)
    node = given["input"].node
    return _index(recorder, node, [slice(None)] * (given["dim"] % len(node.shape)) + [given["index"]])


@rule("split", "chunk", "tensor_split", "unbind", "split_with_sizes", "unsafe_chunk", "unsafe_split")
def pieces(recorder: Any, func: Any, args: Any, kwargs: Any) -> tuple[Node, ...] | None:
    """Pieces along a dimension, each a slice."""
    node = args[0].node
    if node.axis is None:
        return None
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if _plain_name(func) == "unbind":
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    dim %= len(node.shape)
    before = [slice(None)] * dim
    if _plain_name(func) == "unbind":
        made = [_index(recorder, node, [*before, i]) for i in range(node.shape[dim])]
    else:
        parts = recorder.expected if isinstance(recorder.expected, list) else [recorder.expected]
        sizes = [part.shape[dim] for part in parts]
        starts = np.cumsum([0, *sizes])
        made = [
            _index(recorder, node, [*before, slice(int(s), int(s) + n)]) for s, n in zip(starts, sizes, strict=False)
        ]
    return None if any(part is None for part in made) else tuple(part for part in made if part is not None)


def _plain_name(func: Any) -> str:
    return func.__name__.strip("_")


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT")
def permute(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Dimensions in another order; the axis moves with them."""
    node = args[0].node
    if node.axis is None:
        return None
    probe = torch.empty([0 if d == node.axis else 1 for d in range(len(node.shape))], device="meta")
    axis = list(func(probe, *args[1:], **kwargs).shape).index(0)
    shape = recorder.expected.shape
    return _local("permutation", node, shape, axis, lambda slab, _: func(slab, *args[1:], **kwargs))


@rule("unsqueeze")
def unsqueeze(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """One more dimension."""
    given = bind({"input": None, "dim": None}, args, kwargs)
    node = given["input"].node
    if node.axis is None:
        return None
    dim = given["dim"] % (len(node.shape) + 1)
    shape = (*node.shape[:dim], 1, *node.shape[dim:])
    return _local("unsqueeze", node, shape, node.axis + (dim <= node.axis), lambda slab, _: slab.unsqueeze(dim))


@rule("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze")
def reshape(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Another shape, as long as rows stay rows, or become equal groups or parts of rows."""
    node = args[0].node
    if node.axis is None or any(isinstance(a, torch.dtype) for a in args[1:]):
        return None
    shape = list(recorder.expected.shape)
    before, rows = math.prod(node.shape[: node.axis]), node.rows
    rest = math.prod(node.shape[node.axis + 1 :])
    places = [j for j in range(len(shape)) if math.prod(shape[:j]) == before and shape[j] > 0]
    for j in places:
        if shape[j] == rows and math.prod(shape[j + 1 :]) == rest:
            return _alike(node, shape, j)
    for j in places:
        if shape[j] > rows and shape[j] % rows == 0 and rest % (shape[j] // rows) == 0:
            return _parts(node, shape, j, shape[j] // rows)
        if 1 < shape[j] < rows and rows % shape[j] == 0:
            return _groups(node, shape, j, rows // shape[j])
    return None


def _alike(node: Node, shape: list[int], axis: int) -> Node:
    """Rows stay what they are; other dimensions merge or divide."""
    return _local("reshape", node, shape, axis, lambda slab, n: slab.reshape(*shape[:axis], n, *shape[axis + 1 :]))


def _parts(node: Node, shape: list[int], axis: int, parts: int) -> Node:
    """Each row becomes ``parts`` rows (the dimensions after the axis merge into it)."""

    def need(k: int, a: int, b: int) -> Rows:
        return a // parts, (b - 1) // parts + 1

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        lo, hi = need(0, a, b)
        whole = slabs[0].reshape(*shape[:axis], (hi - lo) * parts, *shape[axis + 1 :])
        return whole.narrow(axis, a - lo * parts, b - a)

    return Node("reshape", (node,), shape, node.dtype, axis, compute, need)


def _groups(node: Node, shape: list[int], axis: int, size: int) -> Node:
    """Every ``size`` rows become one (the axis is divided)."""

    def need(k: int, a: int, b: int) -> Rows:
        return a * size, b * size

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return slabs[0].reshape(*shape[:axis], b - a, *shape[axis + 1 :])

    return Node("reshape", (node,), shape, node.dtype, axis, compute, need)


@rule("expand", "expand_as", "broadcast_to")
def expand(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Dimensions of size one made longer, other than the axis."""
    node = args[0].node
    if node.axis is None:
        return None
    shape = list(recorder.expected.shape)
    axis = len(shape) - (len(node.shape) - node.axis)
    if shape[axis] != node.rows:
        return None
    return _local("expand", node, shape, axis, lambda slab, n: slab.expand(*shape[:axis], n, *shape[axis + 1 :]))


@rule("repeat", "tile")
def repeat(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Copies one after the other."""
    node = args[0].node
    if node.axis is None or kwargs:
        return None
    times = list(args[1]) if len(args) == 2 and not isinstance(args[1], int) else list(args[1:])
    if len(times) != len(node.shape):
        return None
    other = [1 if d == node.axis else n for d, n in enumerate(times)]
    shape = [n * t for n, t in zip(node.shape, times, strict=True)]
    rows = np.tile(np.arange(node.rows), times[node.axis])
    return _mapped("repeat", node, shape, rows, lambda slab: slab.repeat(other))


@rule("flip")
def flip(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Reversed order along some dimensions."""
    node = args[0].node
    dims = kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
    dims = {d % len(node.shape) for d in ([dims] if isinstance(dims, int) else dims)}
    if node.axis is None:
        return None
    other = sorted(dims - {node.axis})
    rows = np.arange(node.rows)
    return _mapped("flip", node, node.shape, rows[::-1].copy() if node.axis in dims else rows, lambda s: s.flip(other))


@rule("roll")
def roll(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Rows moved on, those at the end coming in at the start."""
    given = bind({"input": None, "shifts": None, "dims": None}, args, kwargs)
    node, shifts, dims = given["input"].node, given["shifts"], given["dims"]
    if node.axis is None or dims is None:
        return None
    shifts, dims = ((value,) if isinstance(value, int) else tuple(value) for value in (shifts, dims))
    dims = tuple(d % len(node.shape) for d in dims)
    moved = sum(shift for shift, d in zip(shifts, dims, strict=True) if d == node.axis)
    rows = (np.arange(node.rows) - moved) % node.rows
    other = [(shift, d) for shift, d in zip(shifts, dims, strict=True) if d != node.axis]
    if not other:
        return _mapped("roll", node, node.shape, rows, lambda slab: slab)
    return _mapped("roll", node, node.shape, rows, lambda slab: torch.roll(slab, *map(list, zip(*other, strict=True))))


@rule("cat", "concat", "concatenate", mixed=True)
def cat(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Volumes joined along another dimension, or along the axis itself."""
    given = bind({"tensors": None, "dim": 0}, args, {("dim" if k == "axis" else k): v for k, v in kwargs.items()})
    parts = list(given["tensors"])
    axes = {p.node.axis for p in parts if recorder.is_volume(p) and p.node.axis is not None}
    if not axes or len({p.ndim for p in parts}) != 1:
        return None
    axis = axes.pop() if len(axes) == 1 else max(parts[0].ndim - recorder.back, 0)
    dim = given["dim"] % parts[0].ndim
    nodes = [along(part.node, axis) if recorder.is_volume(part) else recorder.source(part, axis) for part in parts]
    meta = recorder.expected
    if dim != axis:

        def joined(slabs: list[Tensor], a: int, b: int) -> Tensor:
            return torch.cat(slabs, dim)

        channels = dim == 1 and axis >= 2
        return Node("concatenation", nodes, meta.shape, meta.dtype, axis, joined, channel_concat=channels)
    starts = np.cumsum([0, *(node.rows for node in nodes)]).tolist()

    def need(k: int, a: int, b: int) -> Rows:
        return clamp(a - starts[k], b - starts[k], nodes[k].rows)

    def stacked(slabs: list[Tensor], a: int, b: int) -> Tensor:
        taken = []
        for k, slab in enumerate(slabs):
            lo, hi = max(a, starts[k]), min(b, starts[k + 1])
            if lo < hi:
                taken.append(slab.narrow(axis, lo - starts[k] - need(k, a, b)[0], hi - lo))
        return (torch.cat(taken, axis) if len(taken) > 1 else taken[0]).to(meta.dtype)

    return Node("concatenation", nodes, meta.shape, meta.dtype, axis, stacked, need)


@rule("stack", mixed=True)
def stack(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Volumes joined along a new dimension."""
    given = bind({"tensors": None, "dim": 0}, args, kwargs)
    parts = list(given["tensors"])
    if not all(recorder.is_volume(p) for p in parts) or len({p.node.axis for p in parts}) != 1:
        return None
    axis = parts[0].node.axis
    if axis is None:
        return None
    meta = recorder.expected
    dim = given["dim"] % meta.ndim

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return torch.stack(slabs, dim)

    nodes = [p.node for p in parts]
    return Node("stack", nodes, meta.shape, meta.dtype, axis + (dim <= axis), compute)


@rule("pad")
def pad(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Padding or cropping at the borders, by a constant, the edge, a mirror or the other side."""
    given = bind({"input": None, "pad": None, "mode": "constant", "value": None}, args, kwargs)
    node = given["input"].node
    if node.axis is None:
        return None
    axis, rows, ndim = node.axis, node.rows, len(node.shape)
    widths = list(given["pad"]) + [0, 0] * (ndim - len(given["pad"]) // 2)
    at = 2 * (ndim - 1 - axis)
    before, after = widths[at : at + 2]
    shape = [n + widths[2 * (ndim - 1 - d)] + widths[2 * (ndim - 1 - d) + 1] for d, n in enumerate(node.shape)]
    other = widths[:at] + [0, 0] + widths[at + 2 :]
    other = other[: max(len(given["pad"]), at + 2)]
    fill = 0.0 if given["value"] is None else given["value"]
    if shape[axis] <= 0:
        return None

    def around(slab: Tensor) -> Tensor:
        if not any(other):
            return slab
        if given["mode"] == "constant":
            return functional.pad(slab, other, value=fill)
        return functional.pad(slab, other[: len(given["pad"])], mode=given["mode"])

    if given["mode"] != "constant":
        index = np.arange(-before, rows + after)
        if given["mode"] == "replicate":
            index = index.clip(0, rows - 1)
        elif given["mode"] == "circular":
            if min(before, after) < 0:  # torch crops first, and goes around what is left
                return None
            index %= rows
        elif given["mode"] == "reflect":
            index = np.abs(index)
            index = np.where(index >= rows, 2 * (rows - 1) - index, index)
        else:
            return None
        return _mapped("padding", node, shape, index, around)

    def need(k: int, a: int, b: int) -> Rows:
        return clamp(a - before, b - before, rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return fit(around(slabs[0]), need(0, a, b), (a - before, b - before), axis, fill)

    return Node("padding", (node,), shape, node.dtype, axis, compute, need, key=(before, after))


@rule("linear")
def linear(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A matrix on the last dimension, when that is not the axis."""
    given = bind({"input": None, "weight": None, "bias": None}, args, kwargs)
    weight, bias = given["weight"], given["bias"]
    node = recorder.volume(given["input"], None, (weight, bias), lift=False)
    if node is None or node.axis == len(node.shape) - 1:
        return None

    kind = recorder.cast(node, weight, bias)

    def function(slab: Tensor, n: int) -> Tensor:
        w = recorder.constant(weight, slab.device, kind)
        c = None if bias is None else recorder.constant(bias, slab.device, kind)
        return functional.linear(slab.to(dtype=kind), w, c)

    shape = (*node.shape[:-1], weight.shape[0])
    dtype = recorder.expected.dtype
    return _local("linear", node, shape, node.axis, function, cost=2.0 * weight.shape[1], dtype=dtype)


@rule("softmax", "log_softmax", "softmin")
def softmax(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A softmax along a dimension that is not the axis."""
    node = args[0].node
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if node.axis is None or not isinstance(dim, int) or dim % len(node.shape) == node.axis:
        return None
    dtype = recorder.expected.dtype
    return _local(
        "softmax", node, node.shape, node.axis, lambda slab, _: func(slab, *args[1:], **kwargs).to(dtype), dtype=dtype
    )


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "argmax", "argmin", "all", "any", "logsumexp")
def reduction(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A reduction over dimensions that leave the axis alone."""
    node = args[0].node
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if node.axis is None or dim is None or isinstance(dim, bool):
        return None
    ndim = len(node.shape)
    dims = {d % ndim for d in ([dim] if isinstance(dim, int) else dim)}
    if node.axis in dims or not dims:
        return None
    meta = recorder.expected
    axis = node.axis if meta.ndim == ndim else node.axis - sum(d < node.axis for d in dims)
    return _local(
        _plain_name(func),
        node,
        meta.shape,
        axis,
        lambda slab, _: func(slab, *args[1:], **kwargs).to(meta.dtype),
        dtype=meta.dtype,
    )
