"""Operations with a window of rows: convolution, transposed convolution, pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maisi_tools.convolution import computes_in_float32, conv3d, conv_transpose3d
from maisi_tools.tsp.nodes import Node, clamp
from maisi_tools.tsp.rules.table import bind, fit, per_axis, rule

_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "groups": 1,
    "dilation": 1,
}


def _beside(recorder: Any, weight: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """A convolution's ``room`` and ``copies``: both sides in the library's own layout.

    By way of float32 they are there in it, too, and so is the weight; each of them is twice the size.
    """
    by_float32 = recorder.kind == "cpu" and weight.ndim == 5 and computes_in_float32(dtype)
    return (2 * weight.numel() * torch.float32.itemsize, 4) if by_float32 else (0, 1)


@rule("conv1d", "conv2d", "conv3d")
def convolution(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A window of ``dilation * (kernel - 1) + 1`` rows every ``stride`` rows; rows outside the volume are zero."""
    given = bind(_CONV, args, kwargs)
    weight, bias = given["weight"], given["bias"]
    dims = weight.ndim - 2
    node = recorder.volume(given["input"], dims, (weight, bias))
    if node is None:
        return None
    axis, rows, split = node.axis, node.rows, node.axis - 2
    kernel = list(weight.shape[2:])
    stride, dilation = per_axis(given["stride"], dims), per_axis(given["dilation"], dims)
    if isinstance(given["padding"], str):
        total = [d * (k - 1) if given["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = per_axis(given["padding"], dims)
    uneven = before != after
    padding = [0 if uneven or d == split else before[d] for d in range(dims)]
    widths = [w for d in reversed(range(dims)) for w in ((0, 0) if d == split else (before[d], after[d]))]
    step, reach, lead = stride[split], dilation[split] * (kernel[split] - 1) + 1, before[split]
    convolve, kind = conv3d if dims == 3 else func, recorder.cast(node, weight, bias)

    def want(a: int, b: int) -> tuple[int, int]:
        return a * step - lead, (b - 1) * step - lead + reach

    def need(k: int, a: int, b: int) -> tuple[int, int]:
        return clamp(*want(a, b), rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab = fit(slabs[0].to(dtype=kind), need(0, a, b), want(a, b), axis)
        slabs.clear()
        if uneven:
            slab = functional.pad(slab, widths)
        w = recorder.constant(weight, slab.device, kind)
        c = None if bias is None else recorder.constant(bias, slab.device, kind)
        return convolve(slab, w, c, stride, padding, dilation, given["groups"])

    sizes = [
        (n + p + q - d * (k - 1) - 1) // s + 1
        for n, p, q, d, k, s in zip(node.shape[2:], before, after, dilation, kernel, stride, strict=True)
    ]
    shape = (node.shape[0], weight.shape[0], *sizes)
    cost, dtype = 2.0 * weight.shape[1:].numel(), recorder.expected.dtype
    room, copies = _beside(recorder, weight, dtype)
    return Node("convolution", (node,), shape, dtype, axis, compute, need, cost, room=room, copies=copies)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Row ``i`` of the input reaches output rows ``i * stride - padding`` and the kernel's extent on from there."""
    given = bind(_TRANSPOSED, args, kwargs)
    weight, bias = given["weight"], given["bias"]
    dims = weight.ndim - 2
    node = recorder.volume(given["input"], dims, (weight, bias))
    if node is None:
        return None
    axis, rows, split = node.axis, node.rows, node.axis - 2
    kernel = list(weight.shape[2:])
    stride, padding, extra, dilation = (
        per_axis(given[name], dims) for name in ("stride", "padding", "output_padding", "dilation")
    )
    step, lead, reach = stride[split], padding[split], dilation[split] * (kernel[split] - 1) + 1
    convolve, kind = conv_transpose3d if dims == 3 else func, recorder.cast(node, weight, bias)
    inner_padding = [0 if d == split else padding[d] for d in range(dims)]
    inner_extra = [0 if d == split else extra[d] for d in range(dims)]

    def want(a: int, b: int) -> tuple[int, int]:
        # From the first input row that reaches row a; no later than row a where a stride leaves gaps.
        return min(-((reach - 1 - a - lead) // step), (a + lead) // step), (b - 1 + lead) // step + 1

    def need(k: int, a: int, b: int) -> tuple[int, int]:
        return clamp(*want(a, b), rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        lo, hi = want(a, b)
        slab = fit(slabs[0].to(dtype=kind), need(0, a, b), (lo, hi), axis)
        w = recorder.constant(weight, slab.device, kind)
        c = None if bias is None else recorder.constant(bias, slab.device, kind)
        out = convolve(slab, w, c, stride, inner_padding, inner_extra, given["groups"], dilation)
        first = lo * step - lead
        short = b - first - out.shape[axis]
        if short > 0:  # a stride longer than the kernel leaves rows that no input row reaches: they hold the bias
            out = functional.pad(out, [0, 0] * (out.ndim - 1 - axis) + [0, short])
            if c is not None:
                out.narrow(axis, out.shape[axis] - short, short).copy_(c.reshape(1, -1, *[1] * dims))
        return out.narrow(axis, a - first, b - a)

    shape = [node.shape[0], weight.shape[1] * given["groups"]]
    for n, s, p, d, k, e in zip(node.shape[2:], stride, padding, dilation, kernel, extra, strict=True):
        shape.append((n - 1) * s - 2 * p + d * (k - 1) + e + 1)
    taps = 1.0
    for k, s in zip(kernel, stride, strict=True):
        taps *= k / s
    cost = 2.0 * node.shape[1] / given["groups"] * taps
    dtype = recorder.expected.dtype
    room, copies = _beside(recorder, weight, dtype)
    return Node("transposed convolution", (node,), shape, dtype, axis, compute, need, cost, room=room, copies=copies)


_MAX_POOL = {
    "input": None,
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
_AVERAGE_POOL = {
    "input": None,
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}


def _pool(recorder: Any, func: Any, given: dict[str, Any], dims: int, fill: float) -> Node | None:
    node = recorder.volume(given["input"], dims)
    if node is None or given["ceil_mode"]:
        return None
    axis, rows, split = node.axis, node.rows, node.axis - 2
    kernel = per_axis(given["kernel_size"], dims)
    stride = per_axis(given["stride"], dims) if given["stride"] else kernel
    padding, dilation = per_axis(given["padding"], dims), per_axis(given.get("dilation", 1), dims)
    step, reach, lead = stride[split], dilation[split] * (kernel[split] - 1) + 1, padding[split]
    keywords = {k: v for k, v in given.items() if k not in ("input", "kernel_size", "stride", "padding")}
    inner, dtype = [0 if d == split else padding[d] for d in range(dims)], recorder.expected.dtype

    def want(a: int, b: int) -> tuple[int, int]:
        return a * step - lead, (b - 1) * step - lead + reach

    def need(k: int, a: int, b: int) -> tuple[int, int]:
        return clamp(*want(a, b), rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab = fit(slabs[0], need(0, a, b), want(a, b), axis, fill)
        return recorder.widened(func, (slab, kernel, stride, inner), keywords).to(dtype)

    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(node.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    shape = (*node.shape[:2], *sizes)
    cost = float(torch.Size(kernel).numel())
    return Node("pooling", (node,), shape, dtype, axis, compute, need, cost)


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Largest value of the window; rows outside the volume never win."""
    given = bind(_MAX_POOL, args, kwargs)
    if given["return_indices"]:
        return None
    dtype = given["input"].dtype
    lowest = float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
    return _pool(recorder, func, given, int(func.__name__[-2]), lowest)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pool(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Mean of the window, rows outside the volume counted as zero."""
    given = bind(_AVERAGE_POOL, args, kwargs)
    padded = any(per_axis(given["padding"], 1))
    if padded and (not given["count_include_pad"] or given["divisor_override"] is not None):
        return None
    if func.__name__ == "avg_pool1d":
        given.pop("divisor_override")
    return _pool(recorder, func, given, int(func.__name__[-2]), 0.0)
