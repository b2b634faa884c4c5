"""Plans that are used again: a sampler calls the same network with the same shapes, step after step.

Each call is recorded anew, so that weights, arguments and the network's own decisions are those of that call. What was
recorded is compared with earlier calls; where all that a plan depends on is equal, the earlier plan's nodes take over
what the new ones compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from maisi_tools.tsp.nodes import Node
from maisi_tools.tsp.plan import Plan, order_of

MOST = 16
"""How many plans are kept, the latest."""

ROOM = 1.25
"""A plan for a limit is made anew once this much more is allowed: it may be leaner and slower than it need be."""


@dataclass
class Planned:
    """A plan, and its own nodes for what is to be computed."""

    plan: Plan
    outputs: list[Node]


class Plans:
    """The latest plans, by the form of what they compute."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Plan, list[Node], int | None]] = {}

    @contextlib.contextmanager
    def plan(
        self, outputs: Sequence[Node], key: Hashable, limit: int | None, make: Callable[[], Plan]
    ) -> Iterator[Planned]:
        """A plan to compute ``outputs`` by; the one that it has in the end is kept.

        It is used inside the ``with`` alone: what its nodes compute is forgotten afterwards, and with it the tensors
        that it reads.

        Args:
            outputs: recorded nodes.
            key: what the plan depends on beside the nodes: settings, devices, bytes held.
            limit: bytes on the device; None for no limit.
            make: returns a plan for ``outputs``.
        """
        order = order_of(outputs)
        form = key, _form(order, outputs)
        plan, own, made_for = self._kept.pop(form, (None, order, None))  # nobody else has it meanwhile
        if plan is None or not _serves(plan, made_for, limit):
            plan, own, made_for = make(), order, limit
        for node, new in zip(own, order, strict=True):
            node.compute, node.need, node.value = new.compute, new.need, new.value
        places = {node: place for place, node in enumerate(order)}
        planned = Planned(plan, [own[places[output]] for output in outputs])
        try:
            yield planned
        finally:
            for node in own:
                node.forget()
            self._kept[form] = planned.plan, own, made_for
            while len(self._kept) > MOST:
                self._kept.pop(next(iter(self._kept)))


def _serves(plan: Plan, made_for: int | None, limit: int | None) -> bool:
    if limit is None or made_for is None:
        return limit is made_for
    return plan.peak <= limit <= ROOM * made_for


def _form(order: Sequence[Node], outputs: Sequence[Node]) -> Hashable:
    """All of the nodes that a plan depends on.

    What rows they need is compared at both ends and in the middle, which is all that there is to it but where a node
    has a key.
    """
    places = {node: place for place, node in enumerate(order)}
    forms: list[Hashable] = [tuple(places[output] for output in outputs)]
    for node in order:
        there = node.value is not None
        rows = node.rows
        ranges = {(0, 1), (rows // 2, rows // 2 + 1), (rows - 1, rows), (0, rows)}
        forms.append(
            (
                node.name,
                node.shape,
                node.dtype,
                node.axis,
                there,
                None
                if there
                else (
                    node.cost,
                    node.room,
                    node.copies,
                    node.elementwise,
                    node.channel_concat,
                    node.key,
                    None if node.moments_of is None else places[node.moments_of],
                    tuple(places[given] for given in node.inputs),
                    tuple(node.need(k, a, b) for k in range(len(node.inputs)) for a, b in sorted(ranges)),
                ),
            )
        )
    return tuple(forms)
