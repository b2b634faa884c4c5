"""Where the rows of stored results live: on the device, in the host's memory, or in a file."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.heap import POOLED_BYTES, SlabPool
from maisi_tools.tsp.nodes import Node, Rows


def is_moved(number: int, share: float) -> bool:
    """Whether slab ``number`` is among the share that is moved off the device, evenly spread over all slabs."""
    return math.floor((number + 1) * share) > math.floor(number * share)


def rows_first(slab: Tensor, axis: int) -> tuple[Tensor, list[int]]:
    """Return the slab with its axis first and contiguous, so that any range of rows is one piece, and the way back.

    The other dimensions keep their order in memory, so a channels-last slab comes back channels-last.
    """
    others = sorted((d for d in range(slab.ndim) if d != axis), key=slab.stride, reverse=True)
    order = [axis, *others]
    return slab.permute(order).contiguous(), [order.index(d) for d in range(slab.ndim)]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class DeviceStore:
    """Rows on the devices that computed them, slab by slab, so that each slab can be freed on its own.

    Args:
        node: whose rows.
        away: share of the slabs that a subclass moves off the device.
        pool: where larger slabs are put, on a CPU; None leaves them where they were computed.
    """

    def __init__(self, node: Node, away: float = 0.0, pool: SlabPool | None = None) -> None:
        assert node.axis is not None
        self.pool = pool
        self.axis = node.axis
        self.away = away
        self.slabs: dict[Rows, Any] = {}
        self.lent: dict[Rows, Tensor] = {}
        """Rows that other ranks own, for the length of a pass."""
        self.recent: dict[torch.device, tuple[Rows, Tensor]] = {}
        """What was read last, where reading costs a transfer."""
        self._written = 0

    def write(self, rows: Rows, slab: Tensor) -> None:
        """Keep the rows."""
        moves = self.away > 0 and is_moved(self._written, self.away)
        self.slabs[rows] = self._put(slab) if moves else self._own(slab)
        self._written += 1

    def read(self, rows: Rows, device: torch.device) -> Tensor:
        """Return the rows on a device; a view of what is kept where that is one piece."""
        a, b = rows
        parts = []
        seen, last_read = self.recent.get(device, ((0, 0), None))
        if last_read is not None and seen[0] <= a < seen[1]:  # the halo of neighbouring slabs is fetched once
            a = min(b, seen[1])
            parts.append(last_read.narrow(self.axis, rows[0] - seen[0], a - rows[0]))
        for lo, hi in sorted({*self.slabs, *self.lent}):
            first, last = max(a, lo), min(b, hi)
            if first >= last:
                continue
            if (lo, hi) in self.lent:
                parts.append(self.lent[lo, hi].narrow(self.axis, first - lo, last - first).to(device))
            else:
                parts.append(self._get(self.slabs[lo, hi], first - lo, last - first, device))
        if sum(part.shape[self.axis] for part in parts) != rows[1] - rows[0]:
            raise TSPError(f"rows {rows[0]} to {rows[1]} were forgotten before they were read; report this")
        result = parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)
        if self.away and rows[1] > seen[1]:
            self.recent[device] = (rows, result)
        return result

    def end_pass(self) -> None:
        """Forget what was held for the length of a pass."""
        self.lent.clear()
        self.recent.clear()

    def free(self, rows: Rows) -> None:
        """Forget a slab."""
        del self.slabs[rows]

    def close(self) -> None:
        """Give back what is held beside the slabs."""

    def _own(self, slab: Tensor) -> Tensor:
        if self.pool is not None and slab.nbytes >= POOLED_BYTES:
            return self.pool.store(slab)
        # A part of a larger slab would keep that alive.
        return slab.clone() if slab.untyped_storage().nbytes() > slab.nbytes else slab

    def _put(self, slab: Tensor) -> Any:
        raise NotImplementedError

    def _get(self, kept: Any, start: int, length: int, device: torch.device) -> Tensor:
        return kept.narrow(self.axis, start, length).to(device)


class HostStore(DeviceStore):
    """Rows in pinned host memory; copies run on streams of their own, beside the computing."""

    _streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    @classmethod
    def streams(cls, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """Return the streams for copies out of and into the device."""
        if device not in cls._streams:
            cls._streams[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return cls._streams[device]

    def _put(self, slab: Tensor) -> Any:
        out, _ = self.streams(slab.device)
        rows, order = rows_first(slab, self.axis)
        copy = torch.empty_like(rows, device="cpu", pin_memory=True)
        out.wait_stream(torch.cuda.current_stream(slab.device))
        with torch.cuda.stream(out):
            copy.copy_(rows, non_blocking=True)
            done = torch.cuda.Event()
            done.record(out)
        rows.record_stream(out)  # its memory may be used again only after the copy
        return copy, order, done

    def _get(self, kept: Any, start: int, length: int, device: torch.device) -> Tensor:
        if isinstance(kept, Tensor):
            return super()._get(kept, start, length, device)
        copy, order, done = kept
        _, into = self.streams(device)
        into.wait_event(done)
        with torch.cuda.stream(into):
            rows = copy.narrow(0, start, length).to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(into)
        rows.record_stream(current)
        return rows.permute(order)


class FileStore(DeviceStore):
    """Rows in an unnamed temporary file (in ``TMPDIR``), read and written without being mapped into memory."""

    def __init__(self, node: Node, away: float = 0.0, pool: SlabPool | None = None) -> None:
        super().__init__(node, away, pool)
        self.file = tempfile.TemporaryFile(buffering=0)
        self.end = 0

    def _put(self, slab: Tensor) -> Any:
        rows, order = rows_first(slab, self.axis)
        start = self.end
        self.file.seek(start)
        data = _bytes(rows.cpu())
        while len(data):
            data = data[self.file.write(data) :]
        self.end = self.file.tell()
        return start, order, rows.shape[1:], rows.dtype

    def _get(self, kept: Any, start: int, length: int, device: torch.device) -> Tensor:
        if isinstance(kept, Tensor):
            return super()._get(kept, start, length, device)
        offset, order, shape, dtype = kept
        rows = torch.empty((length, *shape), dtype=dtype)
        self.file.seek(offset + start * shape.numel() * dtype.itemsize)
        data = _bytes(rows)
        while len(data):
            got = self.file.readinto(data)  # type: ignore[attr-defined]
            if not got:
                raise OSError("the temporary file of an offloaded volume was cut short")
            data = data[got:]
        return rows.permute(order).contiguous().to(device)

    def close(self) -> None:
        """Remove the file."""
        self.file.close()


class OutputStore(DeviceStore):
    """The rows of a result, written straight into the tensor that is returned.

    Args:
        tensor: holds the rows from ``first`` on.
    """

    def __init__(self, node: Node, tensor: Tensor, first: int = 0) -> None:
        super().__init__(node)
        self.tensor = tensor
        self.first = first
        self.slabs[first, first + tensor.shape[self.axis]] = tensor

    def write(self, rows: Rows, slab: Tensor) -> None:
        """Copy the rows into their place."""
        self.tensor.narrow(self.axis, rows[0] - self.first, rows[1] - rows[0]).copy_(slab)
