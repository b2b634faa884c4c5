"""Normalisation: global statistics, gathered while a tensor is produced, applied slab by slab."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.moments import Moments, alike, statistics_type
from maisi_tools.tsp.nodes import Node
from maisi_tools.tsp.rules.table import bind, rule


def _apply(recorder: Any, name: str, node: Node, groups: int, weight: Any, bias: Any, eps: float) -> Node | None:
    """Normalise over each of ``groups`` groups of channels and all positions, by the moments of the whole volume."""
    if not _alike(recorder, node, weight, bias):
        return None
    batch, channels = node.shape[:2]
    dtype = recorder.expected.dtype
    found: dict[Any, tuple[Moments, Tensor, Tensor, Any, Any]] = {}

    def compute(slabs: list[Tensor], a: int, b: int, moments: Moments) -> Tensor:
        slab = slabs[0].to(dtype)
        if slab.device not in found or found[slab.device][0] is not moments:
            kind = statistics_type(slab.dtype)
            mean, variance = (part.reshape(-1).to(slab.device, kind) for part in moments.of_groups(groups))
            w, c = (
                None if part is None else recorder.constants.get(part, slab.device).to(kind).repeat(batch)
                for part in (weight, bias)
            )
            found[slab.device] = (moments, mean, variance, w, c)
        _, mean, variance, w, c = found[slab.device]
        # One fused pass with statistics given; samples are normalised apart, so they become channels.
        flat = slab.reshape(1, batch * channels, *slab.shape[2:])
        return functional.batch_norm(flat, mean, variance, w, c, False, 0.0, eps).reshape(slab.shape)

    return Node(name, (node,), node.shape, dtype, node.axis, compute, elementwise=True, moments_of=node)


def _alike(recorder: Any, node: Node, *parts: Tensor | None) -> bool:
    """Whether the parameters are of the volume's type, or float32 beside half precision: what torch takes."""
    if recorder.dtype is not None:
        return True
    return alike(node.dtype, *parts)


@rule("group_norm")
def group_norm(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Group norm over volumes with the channels in dimension 1."""
    names = {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5, "cudnn_enabled": True}
    given = bind(names, args, kwargs)
    node = recorder.volume(given["input"], None, (given["weight"], given["bias"]))
    if node is None or node.axis < 2:
        return None
    return _apply(recorder, "group norm", node, given["num_groups"], given["weight"], given["bias"], given["eps"])


@rule("instance_norm")
def instance_norm(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Instance norm: group norm with one channel a group, or the running statistics."""
    names = {
        "input": None,
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "cudnn_enabled": True,
    }
    given = bind(names, args, kwargs)
    parts = (given["weight"], given["bias"], given["running_mean"], given["running_var"])
    node = recorder.volume(given["input"], None, parts)
    if node is None or node.axis < 2:
        return None
    if given["use_input_stats"]:
        if given["running_mean"] is not None:
            return None
        return _apply(recorder, "instance norm", node, node.shape[1], given["weight"], given["bias"], given["eps"])
    return _running(recorder, "instance norm", node, given)


@rule("batch_norm")
def batch_norm(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Batch norm in evaluation mode: an affine map of every channel."""
    names = {
        "input": None,
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
        "cudnn_enabled": True,
    }
    given = bind(names, args, kwargs)
    parts = (given["weight"], given["bias"], given["running_mean"], given["running_var"])
    node = recorder.volume(given["input"], None, parts)
    if given["training"] and given["running_mean"] is not None:
        raise TSPError("batch norm is in training mode; call the network's eval() first")
    if node is None or node.axis < 2 or given["training"] or given["running_mean"] is None:
        return None
    return _running(recorder, "batch norm", node, given)


def _running(recorder: Any, name: str, node: Node, given: dict[str, Any]) -> Node:
    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab = slabs[0]
        mean, variance, weight, bias = (
            None if given[part] is None else recorder.constant(given[part], slab.device)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(slab, mean, variance, weight, bias, False, 0.0, given["eps"])

    return Node(name, (node,), node.shape, recorder.expected.dtype, node.axis, compute, elementwise=True)


@rule("layer_norm")
def layer_norm(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Layer norm over the last dimensions, when the rows are not among them."""
    names = {
        "input": None,
        "normalized_shape": None,
        "weight": None,
        "bias": None,
        "eps": 1e-5,
        "cudnn_enable": True,
    }
    given = bind(names, args, kwargs)
    node = recorder.volume(given["input"], None, (given["weight"], given["bias"]), lift=False)
    if node is None or node.axis >= len(node.shape) - len(given["normalized_shape"]):
        return None

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        slab = slabs[0]
        weight, bias = (
            None if given[part] is None else recorder.constant(given[part], slab.device) for part in ("weight", "bias")
        )
        return functional.layer_norm(slab, given["normalized_shape"], weight, bias, given["eps"])

    return Node("layer norm", (node,), node.shape, recorder.expected.dtype, node.axis, compute)
