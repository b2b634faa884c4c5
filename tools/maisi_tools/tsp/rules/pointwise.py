"""Operations that treat every element by itself: arithmetic, comparisons, activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.nodes import Node, Rows, along, gather
from maisi_tools.tsp.rules.table import bind, rule

_POINTWISE = """
    abs acos add addcdiv addcmul asin atan atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp
    clamp_max clamp_min clip cos cosh div divide elu eq erf erfc exp exp2 expm1 floor floor_divide floordiv fmax fmin
    fmod frac ge gelu greater gt hardshrink hardsigmoid hardswish hardtanh invert isfinite isinf isnan le leaky_relu
    lerp less log log10 log1p log2 logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill
    maximum minimum mish mod mul multiply nan_to_num ne neg negative not_equal pos positive pow radd rand rdiv
    reciprocal relu relu6 remainder rfloordiv rmod rmul ror round rpow rsqrt rsub rtruediv rxor selu sgn sigmoid sign
    signbit silu sin sinh softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold
    true_divide truediv trunc where xlogy and or xor zeros_like ones_like full_like
""".split()


@rule(*_POINTWISE, mixed=True)
def pointwise(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Rows of the result from the same rows of the inputs; what is broadcast along the rows is used whole."""
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    leaves, spec = tree_flatten((args, kwargs))
    nodes = {i: leaf.node for i, leaf in enumerate(leaves) if recorder.is_volume(leaf)}
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    shape, dtype = recorder.expected.shape, recorder.expected.dtype
    shapes = {leaf.shape for leaf in tensors} - {shape}
    if shapes and torch.broadcast_shapes(shape, *shapes) != shape:
        return None
    ndim = len(shape)
    # Broadcasting aligns the last dimensions, so the axis is counted from the end.
    from_end = {len(n.shape) - n.axis for n in nodes.values() if n.axis is not None and n.rows > 1}
    if not from_end:
        from_end = {len(n.shape) - n.axis for n in nodes.values() if n.axis is not None}
    if not from_end:
        return None
    # After an attention, volumes may have their rows along different axes: the usual one is kept.
    back = from_end.pop() if len(from_end) == 1 else recorder.back
    axis = ndim - back
    rows = shape[axis]

    inputs: list[Node] = []
    aligned: list[bool] = []
    places: dict[int, int] = {}
    for i, node in nodes.items():
        place = len(node.shape) - back
        if place >= 0 and node.shape[place] == rows:
            node = along(node, place)
        elif node.axis is not None and node.axis != place:
            node = gather(node)
        places[i] = len(inputs)
        inputs.append(node)
        aligned.append(node.axis is not None and node.shape[place] == rows)

    def need(k: int, a: int, b: int) -> Rows | None:
        if inputs[k].axis is None:
            return None
        return (a, b) if aligned[k] else (0, 1)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        device = slabs[0].device
        values = list(leaves)
        for i, leaf in enumerate(leaves):
            if i in places:
                values[i] = slabs[places[i]]
            elif isinstance(leaf, Tensor) and leaf.ndim:
                values[i] = leaf = recorder.constant(leaf, device)
                if leaf.ndim >= back and leaf.shape[-back] == rows and rows > 1:
                    values[i] = leaf.narrow(leaf.ndim - back, a, b - a)
        arguments, keywords = tree_unflatten(values, spec)
        return func(*arguments, **keywords).to(dtype)

    same = all(node.shape == shape for node in inputs)
    return Node(
        _name(func),
        inputs,
        shape,
        dtype,
        axis,
        compute,
        need,
        elementwise=same,
    )


def _name(func: Any) -> str:
    return func.__name__.strip("_")


@rule("prelu")
def prelu(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Leaky ReLU with one learnt slope, or one for each channel."""
    given = bind({"input": None, "weight": None}, args, kwargs)
    node = recorder.volume(given["input"], None, (given["weight"],), lift=False)
    if node is None or node.axis < 2:
        return None

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        return torch.prelu(slabs[0], recorder.constant(given["weight"], slabs[0].device))

    return Node("prelu", (node,), node.shape, node.dtype, node.axis, compute, elementwise=True)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
def dropout(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Nothing happens in evaluation mode."""
    given = bind({"input": None, "p": 0.5, "training": True, "inplace": False}, args, kwargs)
    if given["training"]:
        raise TSPError("dropout is active: the network is in training mode; call its eval() first")
    return given["input"].node


@rule("rrelu")
def rrelu(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """The mean slope, in evaluation mode."""
    names = {"input": None, "lower": 1 / 8, "upper": 1 / 3, "training": False, "inplace": False}
    given = bind(names, args, kwargs)
    if given["training"]:
        raise TSPError("rrelu is random in training mode; call the network's eval() first")
    slope = (given["lower"] + given["upper"]) / 2
    return pointwise(recorder, torch.nn.functional.leaky_relu, (given["input"], slope), {})
