"""Interpolation: where along the split axis a row comes from is computed as torch computes it for the whole volume."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from maisi_tools.tsp.nodes import Node, clamp
from maisi_tools.tsp.rules.table import bind, per_axis, rule

_NAMES = {
    "input": None,
    "size": None,
    "scale_factor": None,
    "mode": "nearest",
    "align_corners": None,
    "recompute_scale_factor": None,
    "antialias": False,
}


@rule("interpolate", "upsample")
def interpolate(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Nearest and (tri)linear interpolation; the other modes run on the gathered tensor.

    What is not finite spreads as far as in torch; but for factors that are no power of two an infinity may stay one
    where torch multiplies it by a weight of zero and has NaN.
    """
    given = bind(_NAMES, args, kwargs)
    mode, corners = given["mode"], bool(given["align_corners"])
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear") or given["antialias"]:
        return None
    if not given["input"].is_floating_point():
        return None
    node = recorder.volume(given["input"], None)
    if node is None or node.axis < 2:
        return None
    axis, rows, dims = node.axis, node.rows, len(node.shape) - 2
    dtype = recorder.expected.dtype
    split = axis - 2
    factors = None
    if given["scale_factor"] is not None:
        one = isinstance(given["scale_factor"], (int, float))
        factors = [float(f) for f in ([given["scale_factor"]] * dims if one else given["scale_factor"])]
        sizes = [math.floor(n * f) for n, f in zip(node.shape[2:], factors, strict=True)]
        if given["recompute_scale_factor"]:
            factors = None
    else:
        sizes = per_axis(given["size"], dims)
    shape = (*node.shape[:2], *sizes)
    if dims == 2 and shape == node.shape and factors and not all(f == 1 for f in factors):
        return None  # torch copies
    out_rows = shape[axis]
    factor = factors[split] if factors else out_rows / rows

    # By a power of two, for then a row's place is exact, and so the same counted from the slab's first row.
    if factor in (1, 2, 4, 8, 16) and out_rows == rows * int(factor) and not corners:
        return _integer(recorder, func, given, node, shape, int(factor), factors)

    linear = mode in ("linear", "bilinear", "trilinear")
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    place = torch.device("cpu") if recorder.device.type == "meta" else recorder.device
    low, high, share = _rows_read(rows, out_rows, mode, factors[split] if factors else None, corners, kind, place)

    def need(k: int, a: int, b: int) -> tuple[int, int]:
        return int(low[a]), int(high[b - 1]) + 1

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab, lo = slabs[0].to(dtype), int(low[a])
        if dims > 1:
            inner: dict[str, Any] = {"align_corners": given["align_corners"]}
            if factors:
                inner["scale_factor"] = [f for d, f in enumerate(factors) if d != split]
            else:
                inner["size"] = [n for d, n in enumerate(sizes) if d != split]
            slab = _within(slab, axis, mode, inner)
        lower = slab.index_select(axis, torch.as_tensor(low[a:b] - lo, device=slab.device))
        if not linear:
            return lower
        upper = slab.index_select(axis, torch.as_tensor(high[a:b] - lo, device=slab.device))
        weight = torch.as_tensor(share[a:b], device=slab.device).to(slab.dtype)
        weight = weight.reshape(-1, *[1] * (slab.ndim - 1 - axis))
        # As torch has it, not by lerp: between two infinities that is no number.
        return lower.mul_(1 - weight).addcmul_(upper, weight)

    key = low.tobytes(), high.tobytes()
    return Node("interpolation", (node,), shape, dtype, axis, compute, need, key=key)


@functools.lru_cache(256)
def _rows_read(
    rows: int,
    out_rows: int,
    mode: str,
    factor: float | None,
    corners: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each row of the result the two rows it is made of, and the share of the second.

    Torch itself is asked, with one line of rows: a place is rounded in ways that differ between builds and types, and
    what rounds to another row is another voxel, or spreads a NaN to it.
    """
    how: dict[str, Any] = {"size": (1, 1, out_rows)} if factor is None else {"scale_factor": (1.0, 1.0, factor)}
    with _disable_current_modes(), torch.autocast(device.type, enabled=False):
        if mode.startswith("nearest"):
            line = torch.arange(rows, dtype=dtype, device=device).reshape(1, 1, 1, 1, rows)
            low = functional.interpolate(line, mode=mode, **how).flatten().long().cpu().numpy()
            return low, low, np.zeros(out_rows, np.float32)

        def through(value: float) -> np.ndarray:  # of a row that holds the value, among zeros: (rows, out_rows)
            lines = torch.zeros(rows, rows, dtype=dtype, device=device).fill_diagonal_(value)[None]
            size = {name: values[-1] for name, values in how.items()}
            return functional.interpolate(lines, mode="linear", align_corners=corners, **size)[0].cpu().numpy()

        read, weights, infinite = np.isnan(through(float("nan"))), through(1.0), through(float("inf"))
    low, high = read.argmax(0), rows - 1 - read[::-1].argmax(0)
    place = np.arange(out_rows)
    # Where both are the same row its shares matter for an infinity alone: 0 times that is no number.
    same = np.where(np.isnan(infinite[low, place]), 0.0, 0.5)
    return low, high, np.where(high > low, weights[high, place], same).astype(np.float32)


def _within(slab: Tensor, axis: int, mode: str, how: dict[str, Any]) -> Tensor:
    """Interpolate each row by itself, for across rows of the same place a NaN would spread.

    The nearest ones by the kernel for volumes: that for planes copies where no size changes, whatever the factor.
    """
    rows = slab.movedim(axis, 2)
    others = rows.shape[3:]
    linear = not mode.startswith("nearest")
    ones = [] if linear else [1] * (3 - len(others))
    mode = {1: "linear", 2: "bilinear"}[len(others)] if linear else mode
    how = {name: value if name == "align_corners" else [*ones, *value] for name, value in how.items()}
    planes = functional.interpolate(rows.reshape(rows.shape[0], -1, *ones, *others), mode=mode, **how)
    return planes.reshape(*rows.shape[:3], *planes.shape[2 + len(ones) :]).movedim(2, axis)


def _integer(
    recorder: Any, func: Any, given: dict[str, Any], node: Node, shape: Any, factor: int, factors: Any
) -> Node:
    """Enlarging by a whole number: a slab with one more row on each side is enlarged, and the margin cut off."""
    axis, rows = node.axis, node.rows
    assert axis is not None
    linear, dtype = given["mode"] in ("linear", "bilinear", "trilinear"), recorder.expected.dtype
    sizes = per_axis(list(shape[2:]), len(shape) - 2)

    def need(k: int, a: int, b: int) -> tuple[int, int]:
        if not linear:
            return a // factor, (b - 1) // factor + 1
        return clamp((a + 0.5) / factor - 0.5, np.floor((b - 0.5) / factor - 0.5) + 2, rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        lo, hi = need(0, a, b)
        slab = slabs[0].to(dtype)
        apart = factor > 1 and given["mode"] == "trilinear" and axis == 2
        if apart and slab.device.type == "cpu" and slab.dtype.itemsize >= 4:
            return _planes(slab, lo, factor, a, b, sizes, factors)
        inner: dict[str, Any] = {"mode": given["mode"], "align_corners": given["align_corners"]}
        if factors:
            inner["scale_factor"] = tuple(factors)
        else:
            inner["size"] = tuple((hi - lo) * factor if d == axis - 2 else n for d, n in enumerate(sizes))
        out = functional.interpolate(slab, **inner)
        return out.narrow(axis, a - lo * factor, b - a)

    return Node("interpolation", (node,), shape, dtype, axis, compute, need, key=(factor, linear))


def _planes(
    slab: Tensor, lo: int, factor: int, a: int, b: int, sizes: Sequence[int], factors: Sequence[float] | None
) -> Tensor:
    """Rows ``a..b`` of an enlarged volume whose rows from ``lo`` on are given: planes first, then between planes.

    For 64 channels of 128 x 128 from 64 x 64 in float32 this took 19 ms a step where torch's trilinear kernel, which
    also computes the margin, took 59 (one thread). In half precision, with the channels last, torch's is the faster.
    """
    batch, channels, rows = slab.shape[:3]
    inner: dict[str, Any] = {"scale_factor": tuple(factors[1:])} if factors else {"size": tuple(sizes[1:])}
    planes = functional.interpolate(slab.reshape(batch * channels, rows, *slab.shape[3:]), mode="bilinear", **inner)
    planes = planes.reshape(batch, channels, rows, *planes.shape[2:])
    out = slab.new_empty(batch, channels, b - a, *planes.shape[3:])
    for row in range(a, b):
        place = max((row + 0.5) / factor - 0.5, 0.0) - lo  # the slab begins no later, and ends no earlier, than needed
        low = min(math.floor(place), rows - 1)
        made = torch.mul(planes[:, :, low], 1 - (place - low), out=out[:, :, row - a])
        made.add_(planes[:, :, min(low + 1, rows - 1)], alpha=place - low)
    return out
