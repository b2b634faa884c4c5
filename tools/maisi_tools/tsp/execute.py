"""Executing a plan: pass by pass, slab by slab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maisi_tools.tsp.heap import MMAP_THRESHOLD, SlabPool, reset_heap, set_heap, trim_heap
from maisi_tools.tsp.moments import Moments, concatenate, merge, moments
from maisi_tools.tsp.nodes import Node, Rows
from maisi_tools.tsp.plan import Graph, Pass, Plan, Step, is_given
from maisi_tools.tsp.ranks import Ranks, Shard
from maisi_tools.tsp.store import DeviceStore, FileStore, HostStore, OutputStore

Tick = Callable[[int, int], None]
"""Called after every step with (steps done, steps in all)."""

STEPS_IN_FLIGHT = 2
"""How many steps may be queued on a GPU: the next one's copies run beside this one's computing, no more."""


class Execution:
    """One run of a plan.

    Args:
        plan: what to do.
        devices: those the plan counts, in its order.
        ranks: the plan's ranks, where there are several.
        given: the tensors of given nodes, on the rank that holds them.
        gather: return whole results on every rank, not each rank's :class:`~maisi_tools.tsp.ranks.Shard`.
        lean: memory goes before time, for the plan was made for a limit that somebody set.
    """

    def __init__(
        self,
        plan: Plan,
        devices: Sequence[torch.device],
        ranks: Ranks | None = None,
        given: Mapping[Node, Tensor] | None = None,
        gather: bool = True,
        lean: bool = False,
    ) -> None:
        self.plan = plan
        self.lean = lean
        self.ranks = ranks
        self.gather = gather
        self.graph: Graph = plan.graph
        self.devices = list(devices)
        self.pool = SlabPool() if self.devices[0].type == "cpu" else None
        self.stores: dict[Node, DeviceStore] = {}
        self.wholes: dict[Node, Any] = {}
        self.moments: dict[Node, Moments] = {}
        self.results: dict[Node, Any] = {}
        for node in plan.graph.kept:
            if is_given(node):
                self.stores[node] = store = DeviceStore(node)
                if node in (given or {}):
                    store.write((0, node.rows), (given or {})[node])

    def run(self, outputs: Sequence[Node], tick: Tick | None = None) -> list[Any]:
        """Return the outputs' values."""
        total, done = sum(len(part.steps) for part in self.plan.passes), 0
        if self.pool is not None:
            set_heap(self.plan.slab_bytes // 2 if self.lean else MMAP_THRESHOLD)
        try:
            left = 0  # bytes, at most, that temporaries of the passes so far have left in the heap
            for part, peak in zip(self.plan.passes, self.plan.peaks, strict=True):
                if self.pool is not None and peak + left > self.plan.peak:
                    trim_heap()
                    left = 0
                left = max(left, part.work)
                self._open(part)
                self._exchange(part)
                gathered: dict[Node, list[tuple[Rows, Moments]]] = {
                    t: [] for t in part.targets if t in self.graph.moments
                }
                queue: list[Any] = []
                for step in part.steps:
                    device = self.devices[step.device]
                    self._step(part, step, device, gathered)
                    self._wait(queue, device)
                    done += 1
                    if tick is not None:
                        tick(done, total)
                for target, found in gathered.items():
                    self._merge(target, found)
                for store in self.stores.values():
                    store.end_pass()
            return [self._result(node) for node in outputs]
        finally:
            for store in self.stores.values():
                store.close()
            if self.pool is not None:
                self.pool.close()
                reset_heap()

    def _exchange(self, part: Pass) -> None:
        """Send and fetch the rows that this pass reads across the ranks' borders."""
        if self.ranks is None:
            return
        sent, received = [], []
        for message in part.messages:
            store = self.stores[message.node]
            if message.source == self.ranks.rank:
                sent.append((message.target, store.read(message.rows, self.devices[0]).contiguous()))
            elif message.target == self.ranks.rank:
                shape = list(message.node.shape)
                shape[store.axis] = message.rows[1] - message.rows[0]
                store.lent[message.rows] = torch.empty(shape, dtype=message.node.dtype, device=self.devices[0])
                received.append((message.source, store.lent[message.rows]))
        self.ranks.exchange(sent, received)

    def _merge(self, target: Node, found: list[tuple[Rows, Moments]]) -> None:
        found.sort(key=lambda item: item[0])
        parts = [of_slab for _, of_slab in found]
        if self.ranks is not None and target.axis is not None:
            parts = self.ranks.moments(merge(parts) if parts else None, target.shape, self.devices[0])
        self.moments[target] = merge(parts)

    def _result(self, node: Node) -> Any:
        """What is returned for an output: its value, gathered from the ranks or this rank's part."""
        if node.value is not None:
            return node.value
        result = self.results[node]
        if self.ranks is None or node.axis is None:
            return result
        own = self.plan.owned(node, self.ranks.rank)
        if not self.gather:
            return Shard(result, own, node.axis, node.shape)
        whole = torch.empty(node.shape, dtype=node.dtype, device=result.device)
        whole.narrow(node.axis, own[0], own[1] - own[0]).copy_(result)
        peers = [rank for rank in range(self.ranks.count) if rank != self.ranks.rank]
        spans = {rank: self.plan.owned(node, rank) for rank in peers}
        buffers = {}
        for rank, (a, b) in spans.items():
            if a < b:
                shape = [*node.shape[: node.axis], b - a, *node.shape[node.axis + 1 :]]
                buffers[rank] = torch.empty(shape, dtype=node.dtype, device=result.device)
        sent = [(rank, result.contiguous()) for rank in peers if own[0] < own[1]]
        self.ranks.exchange(sent, list(buffers.items()))
        for rank, buffer in buffers.items():
            whole.narrow(node.axis, spans[rank][0], buffer.shape[node.axis]).copy_(buffer)
        return whole

    def _open(self, part: Pass) -> None:
        if not part.keep:
            return
        for target in part.targets:
            if target.axis is None:
                continue
            place = self.plan.where[target]
            if place == "output":
                first, last = self.plan.owned(target, self.plan.rank)
                shape = [*target.shape[: target.axis], last - first, *target.shape[target.axis + 1 :]]
                result = torch.empty(shape, dtype=target.dtype, device=self.devices[0])
                self.results[target] = result
                self.stores[target] = OutputStore(target, result, first)
            else:
                kind = {"device": DeviceStore, "host": HostStore, "disk": FileStore}[place]
                self.stores[target] = kind(target, self.plan.away.get(target, 0.0), self.pool)

    def _step(
        self,
        part: Pass,
        step: Step,
        device: torch.device,
        gathered: dict[Node, list[tuple[Rows, Moments]]],
    ) -> None:
        memo: dict[tuple[Node, int, int], Any] = {}
        for target, rows in zip(part.targets, step.rows, strict=True):
            if rows is None:
                continue
            slab = self._compute(target, *rows, device, memo)
            if target.axis is None:
                self.wholes[target] = slab
                if target in self.graph.outputs:
                    self.results[target] = slab
                continue
            if target in gathered:
                gathered[target].append((rows, moments(slab)))
            if part.keep:
                self.stores[target].write(rows, slab)
        del memo
        for node, rows in step.free:
            if node.axis is None:
                self.wholes.pop(node, None)
            else:
                self.stores[node].free(rows)

    @staticmethod
    def _wait(queue: list[Any], device: torch.device) -> None:
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        queue.append(event)
        if len(queue) > STEPS_IN_FLIGHT:
            queue.pop(0).synchronize()

    def _rows(self, node: Node, rows: Rows | None, device: torch.device, memo: dict[Any, Any]) -> Any:
        """Return rows of a node, read or computed."""
        if node.value is not None:
            value = node.value
            if isinstance(value, list):
                return value
            if rows is not None and node.axis is not None:
                value = value.narrow(node.axis, rows[0], rows[1] - rows[0])
            return value.to(device)
        if node in self.wholes:
            value = self.wholes[node]
            return value.to(device) if isinstance(value, Tensor) else value
        a, b = rows or (0, 1)
        if node in self.stores:
            return self.stores[node].read((a, b), device)
        return self._compute(node, a, b, device, memo)

    def _compute(self, node: Node, a: int, b: int, device: torch.device, memo: dict[Any, Any]) -> Any:
        shared = node in self.graph.shared
        if shared and (node, a, b) in memo:
            return memo[node, a, b]
        if not node.inputs:
            return self._rows(node, (a, b), device, memo)
        slabs = [self._rows(given, node.need(k, a, b), device, memo) for k, given in enumerate(node.inputs)]
        keywords = {} if node.moments_of is None else {"moments": self._moments_of(node.moments_of)}
        result = node.compute(slabs, a, b, **keywords)
        if shared:
            memo[node, a, b] = result
        return result

    def _moments_of(self, node: Node) -> Moments:
        if node not in self.moments:
            self.moments[node] = concatenate([self._moments_of(given) for given in node.inputs])
        return self.moments[node]
