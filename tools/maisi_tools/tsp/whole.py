"""Running a network as it is, unsplit: what a call does where memory allows it and slabs would be no faster.

The result is that of the plain network, to rounding: a convolution on a CPU takes the faster way
(:mod:`maisi_tools.convolution`), and a group norm over channels-last memory takes its statistics in two passes, as in
slabs, because torch's own in that layout are inaccurate (1.8 % of the variance at mean 30 and deviation 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from maisi_tools.convolution import conv3d, conv_transpose3d
from maisi_tools.tsp.heap import lean_heap
from maisi_tools.tsp.memory import free_bytes, parse_bytes
from maisi_tools.tsp.moments import alike, moments, statistics_type
from maisi_tools.tsp.nodes import Node, arranged
from maisi_tools.tsp.opened import mapped
from maisi_tools.tsp.plan import format_bytes, order_of, size_of

WHOLE_BYTES = {"cpu": 128 * 2**20}
"""Up to which size of its largest result a network is run whole.

On a CPU: measured on two cores with autoencoders of 16 to 128 channels in float32. At 16 MiB whole takes a third of the
time of slabs, at 128 MiB 0.6 to 1.0 of it, at 432 MiB as long, with far more memory.
"""

GPU_WHOLE_BYTES = 512 * 2**20
"""The same on a GPU: where each pass would be a single slab."""


@dataclass(frozen=True)
class Whole:
    """A call that is computed at once, and what it takes; in the place of a :class:`~maisi_tools.tsp.plan.Plan`.

    Attributes:
        base: bytes on the device anyway: inputs, weights, the convolution library.
        peak: bytes on the device at the worst moment, those included.
        flop: floating point operations.
        largest: bytes of the largest result.
        device, kind: where it is computed, and the type of device that is meant ("meta" stands for one).
        dtype: half precision to compute in; None for the network's own type.
        result_dtype: of the results, where ``dtype`` is given.
        moved: bytes moved off the device, and read back: none.
    """

    base: int
    peak: int
    flop: float
    largest: int
    device: torch.device
    kind: str
    dtype: torch.dtype | None
    result_dtype: torch.dtype
    moved: tuple[int, int] = (0, 0)

    def fits(self, memory_limit: str | int | None) -> bool:
        """Whether it is as fast as slabs are, and within the limit (None: what the device has free)."""
        if self.largest > WHOLE_BYTES.get(self.kind, GPU_WHOLE_BYTES):
            return False
        limit = parse_bytes(memory_limit) or free_bytes(self.device, self.base)
        return limit is None or self.peak <= limit

    def __str__(self) -> str:
        return (
            f"the whole network at once, no slabs\npeak on the device {format_bytes(self.peak)}, "
            f"{self.flop / 1e9:,.1f} GFLOP"
        )


def whole_of(outputs: Sequence[Node], base: int, held: int, *rest: Any) -> Whole:
    """Return what it takes to compute the recorded results one operation after the other.

    Args:
        held: bytes at the worst moment, beside ``base``.
        rest: further attributes of :class:`Whole`, from ``device`` on.
    """
    computed = [node for node in order_of(outputs) if node.value is None]
    flop = sum(node.rows * node.row_flop for node in computed)
    return Whole(base, base + held, flop, max(map(size_of, computed), default=0), *rest)


def run_whole(whole: Whole, network: Callable[..., Any], args: Any, kwargs: Any, lean: bool = False) -> Any:
    """Return ``network(*args, **kwargs)``, without gradients.

    Args:
        lean: on a CPU memory goes before time, for somebody set a limit.
    """
    half = whole.dtype if whole.dtype in (torch.float16, torch.bfloat16) else None
    cast: Any = contextlib.nullcontext()
    if half is not None:
        cast = torch.autocast(whole.device.type, half)
        args, kwargs = _volumes_as(half, args, kwargs)
    heap = lean_heap() if lean and whole.device.type == "cpu" else contextlib.nullcontext()
    with torch.no_grad(), heap, cast, _ExactAndFast(half is not None):
        result = network(*args, **kwargs)
    if half is None:
        return result
    return mapped(
        lambda leaf: leaf.to(whole.result_dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        result,
    )


def _volumes_as(dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    """The arguments with their volumes, tensors with as many dimensions as the first, in a type and its layout."""
    first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim != first.ndim or not leaf.is_floating_point():
            return leaf
        return arranged(leaf, dtype)

    return tree_map(cast, (args, kwargs))


class _ExactAndFast(TorchFunctionMode):
    """Args: ``half``: norms stay in their input's type, which autocast on a GPU would double."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.conv3d:
            return conv3d(*args, **(kwargs or {}))
        if func is functional.conv_transpose3d:
            return conv_transpose3d(*args, **(kwargs or {}))
        if func is functional.group_norm:
            return self._group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        fast = type(input) is Tensor and input.device.type == "cpu" and input.ndim > 3 and not input.is_contiguous()
        if fast and alike(input.dtype, weight, bias):
            batch, channels = input.shape[:2]
            kind = statistics_type(input.dtype)
            mean, variance = (part.reshape(-1).to(kind) for part in moments(input).of_groups(num_groups))
            weight, bias = (None if part is None else part.to(mean).repeat(batch) for part in (weight, bias))
            # Samples are normalised apart, so they become channels; with one sample that keeps the layout.
            flat = input.reshape(1, batch * channels, *input.shape[2:])
            return functional.batch_norm(flat, mean, variance, weight, bias, False, 0.0, eps).reshape(input.shape)
        if not self.half or input.device.type == "cpu":
            return functional.group_norm(input, num_groups, weight, bias, eps)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = (None if part is None else part.to(input) for part in (weight, bias))
            return functional.group_norm(input, num_groups, weight, bias, eps)
