"""The same plan on several ranks of ``torch.distributed``: each owns a range of every volume's rows.

All ranks record the same graph and compute the same schedule from shapes alone, so every rank knows which rows every
other one needs: before each pass the missing rows go point to point, all in one batch and in one order. Moments are
gathered and merged in rank order, so that every rank normalises with the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.moments import Moments
from maisi_tools.tsp.nodes import Node, Rows


@dataclass(frozen=True)
class Message:
    """Rows of a node that go from one rank to another before a pass."""

    node: Node
    rows: Rows
    source: int
    target: int


@dataclass(frozen=True)
class Shard:
    """A rank's part of a result: ``rows`` along dimension ``axis`` of a tensor of ``shape``."""

    tensor: Tensor
    rows: Rows
    axis: int
    shape: torch.Size


def share_of(rows: int, rank: int, ranks: int) -> Rows:
    """Return the rows a rank owns: as even as they go, in rank order, none where there are fewer rows than ranks."""
    return rows * rank // ranks, rows * (rank + 1) // ranks


class Ranks:
    """The ranks of a process group, and what they say to each other.

    Raises:
        TSPError: there is no process group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise TSPError(
                "devices='ranks' needs a process group: start the program with torchrun and call "
                "torch.distributed.init_process_group first (the multi_gpu_inference.json overlays do)"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.count = dist.get_world_size(group)

    def least(self, number: int | None, device: torch.device) -> int | None:
        """Return the smallest of the ranks' numbers, None standing for infinity."""
        with _clear_errors():
            given = torch.tensor([number or 2**62], dtype=torch.int64, device=device)
            dist.all_reduce(given, dist.ReduceOp.MIN, group=self.group)
        return None if given.item() == 2**62 else int(given.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        flags: list[Any] = [None] * self.count
        with _clear_errors():
            dist.all_gather_object(flags, flag, group=self.group)
        return any(flags)

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        holder = [value]
        with _clear_errors():
            dist.broadcast_object_list(holder, src=self._peer(0), group=self.group)
        return holder[0]

    def exchange(self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> None:
        """Send tensors to, and fill tensors from, other ranks; both lists in an order the ranks agree on."""
        operations = [dist.P2POp(dist.isend, tensor, self._peer(peer), self.group) for peer, tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, self._peer(peer), self.group) for peer, tensor in received]
        if operations:
            with _clear_errors():
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

    def moments(self, own: Moments | None, shape: Sequence[int], device: torch.device) -> list[Moments]:
        """Return all ranks' moments in rank order, without those of ranks that own no rows."""
        batch, channels = shape[:2]
        packed = torch.zeros(1 + 2 * batch * channels, dtype=torch.float64)
        if own is not None:
            packed = torch.cat(
                [torch.tensor([float(own.count)]).double(), own.mean.cpu().view(-1), own.m2.cpu().view(-1)]
            )
        packed = packed.to(device)
        parts = [torch.empty_like(packed) for _ in range(self.count)]
        with _clear_errors():
            dist.all_gather(parts, packed, group=self.group)
        found = []
        for part in parts:
            count, mean, m2 = part.cpu().split([1, batch * channels, batch * channels])
            if count:
                found.append(Moments(int(count), mean.reshape(batch, channels), m2.reshape(batch, channels)))
        return found

    def _peer(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Say what a failed exchange means: the other side is gone, or far behind."""
    try:
        yield
    except RuntimeError as error:
        raise TSPError(
            "another rank did not answer: it failed, was killed, or is later than the process group's timeout "
            f"({error})"
        ) from error
