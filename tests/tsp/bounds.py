"""The bound that tests hold a split run to: twice the unsplit network's own error."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from maisi_tools.tsp.inferer import TSPInferer


def flat(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_flatten(value)[0]


def check(network: nn.Module, args: tuple, call: Callable = lambda network: network, **settings: Any) -> TSPInferer:
    """Run ``call(network)`` in slabs and unsplit, in float32 and float64, and compare."""
    inferer = TSPInferer(**settings)
    double = deepcopy(network).double()
    with torch.no_grad():
        exact = flat(call(double)(*(a.double() if a.is_floating_point() else a for a in args)))
        unsplit = flat(call(network)(*args))
        split = flat(inferer(args[0], call(network), *args[1:]))
    assert len(split) == len(unsplit) == len(exact)
    for wanted, whole, found in zip(exact, unsplit, split, strict=True):
        assert found.shape == whole.shape and found.dtype == whole.dtype
        if not whole.is_floating_point():
            assert torch.equal(found, whole)
            continue
        own = (whole - wanted).abs().max().item()
        # Where the unsplit network happens to be off by less than a rounding step of its largest value, any other
        # order of the same sums may be further off; sixteen steps are allowed for (13.6 seen on an AMD EPYC).
        floor = 16 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
        assert (found - wanted).abs().max().item() <= max(2 * own, floor)
    return inferer
