"""Products of volumes: rows of the result from rows of one factor and all of the other, as attention needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.nodes import Node, Rows, split
from maisi_tools.tsp.rules.table import bind, rule


def _product(
    recorder: Any, name: str, operands: Sequence[Any], terms: Sequence[str], out: str, product: Callable[..., Tensor]
) -> Node | None:
    """A product of two tensors whose dimensions are named by letters.

    The rows of the result are those of a letter that is some factor's axis. A factor that has the letter is cut to the
    rows, one that has not is taken whole.
    """
    nodes = [operand.node if recorder.is_volume(operand) else None for operand in operands]
    letters = [
        term[node.axis] for node, term in zip(nodes, terms, strict=True) if node is not None and node.axis is not None
    ]
    letter = next((letter for letter in letters if letter in out), None)
    if letter is None:
        # All factors are gathered. Queries become rows again, for the product with all keys may be very large.
        if letters or nodes[0] is None or len(terms[0]) < 3 or terms[0][-2] not in out:
            return None
        letter = terms[0][-2]
        nodes[0] = split(nodes[0], len(terms[0]) - 2)
    sizes: dict[str, int] = {}
    for operand, term in zip(operands, terms, strict=True):
        for size, own in zip(operand.shape, term, strict=True):
            if sizes.setdefault(own, size) != size:  # broadcast
                return None
    axis = out.index(letter)
    places = [term.find(letter) for term in terms]
    volumes = [k for k, node in enumerate(nodes) if node is not None]
    inputs = [node for node in nodes if node is not None]

    def need(i: int, a: int, b: int) -> Rows | None:
        node = inputs[i]
        if node.axis is None:
            return None
        return (a, b) if node.axis == places[volumes[i]] else (0, node.rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        values = [
            slabs[volumes.index(k)] if k in volumes else recorder.constant(operand, slabs[0].device)
            for k, operand in enumerate(operands)
        ]
        for k, place in enumerate(places):
            if place >= 0 and values[k].shape[place] != b - a:
                values[k] = values[k].narrow(place, a, b - a)
        return product(*values)

    shape = [sizes[own] for own in out]
    cost = 2.0 * math.prod(sizes[own] for own in set("".join(terms)) - set(out))
    return Node(name, inputs, shape, recorder.expected.dtype, axis, compute, need, cost)


@rule("einsum", mixed=True)
def einsum(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A product of two factors, every letter of the result in one of them."""
    if kwargs or len(args) < 2:
        return None
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    equation = equation.replace(" ", "") if isinstance(equation, str) else ""
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    given, out = equation.split("->")
    terms = given.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return _product(recorder, "einsum", operands, terms, out, lambda *values: torch.einsum(equation, *values))


@rule("matmul", "bmm", mixed=True)
def matmul(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """A product of matrices, or of batches of them."""
    if kwargs or len(args) != 2 or args[0].ndim < 2 or args[1].ndim not in (2, args[0].ndim):
        return None
    batch = "abcdefgh"[: args[0].ndim - 2]
    right = "yz" if args[1].ndim == 2 else f"{batch}yz"
    return _product(recorder, "matrix product", args, [f"{batch}xy", right], f"{batch}xz", torch.matmul)


@rule("scaled_dot_product_attention")
def attention(recorder: Any, func: Any, args: Any, kwargs: Any) -> Node | None:
    """Attention of the query's rows to all keys and values, or, where the rows are a batch, to those of the row."""
    names = {
        "query": None,
        "key": None,
        "value": None,
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    given = bind(names, args, kwargs)
    parts = [given.pop(name) for name in ("query", "key", "value")]
    if given["dropout_p"]:
        raise TSPError("attention drops out at random; call the network's eval() first, or give dropout_p=0")
    if given["attn_mask"] is not None or given["is_causal"] or given["enable_gqa"]:
        return None
    if not all(recorder.is_volume(part) for part in parts):
        return None
    nodes = [part.node for part in parts]
    tokens = len(nodes[0].shape) - 2
    if nodes[0].axis is None and tokens > 0:
        nodes[0] = split(nodes[0], tokens)
    query, *others = nodes
    if query.axis is None or query.axis > tokens or len({len(node.shape) for node in nodes}) != 1:
        return None
    batched = query.axis < tokens
    if batched and any(node.axis != query.axis or node.rows != query.rows for node in others):
        return None

    def need(k: int, a: int, b: int) -> Rows | None:
        if k == 0 or batched:
            return a, b
        return None if nodes[k].axis is None else (0, nodes[k].rows)

    def compute(slabs: list[Tensor], a: int, b: int) -> Tensor:
        q, k, v = slabs
        return functional.scaled_dot_product_attention(q, k, v, scale=given["scale"])

    shape = (*query.shape[:-1], others[1].shape[-1])
    cost = 4.0 * others[0].shape[-2] * query.shape[-1] / others[1].shape[-1]
    return Node("attention", nodes, shape, recorder.expected.dtype, query.axis, compute, need, cost)
