"""Planning: which results are kept, where, and in how thin slabs they are computed, so that memory stays in bounds.

The graph is computed in *passes*. A pass goes over the rows of one result (sometimes of two that read the same input),
slab by slab, and keeps them; everything between two kept results is computed on the way and forgotten with the slab. A
slab of a kept result is freed as soon as no later step reads it.

Kept are results that are costly to compute (convolutions) and wanted more than once: as an output, by several readers,
with halo, or first for their statistics and then normalised. The rest (norms, activations, padding, interpolation,
concatenation, residual sums) is cheap and is computed again for each slab that needs it. Under a memory limit so is a
convolution of the inputs that takes little.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maisi_tools.tsp.errors import MemoryLimitError
from maisi_tools.tsp.nodes import Node, Rows
from maisi_tools.tsp.ranks import Message, share_of
from maisi_tools.tsp.store import is_moved

SLAB_BYTES = {"cpu": 8 * 2**20}
"""How large a slab may be by default. On a CPU: measured as fast as 24 MiB in float32 and faster in bfloat16, with less
memory."""

GPU_SLAB_BYTES = 512 * 2**20
"""The same on a GPU: large enough to keep it busy, and far below 2**31 elements."""

MOVED_AT_LEAST = 1 / 8
"""The smallest share of a result's slabs that is moved off the device at a time."""

HALO_ROWS = 4
"""Slabs are not made thinner than this before results are moved off the device: a thin slab is mostly halo."""

CHEAP = 64
"""Floating point operations for each byte of a result, up to which it is computed again from the inputs rather than
moved off the device: a core of 64 GFLOP/s does that many in the time in which a disk of 1 GB/s (assumed, not measured)
takes a byte. The first convolution of an encoder, from one channel to many, takes 14."""


@dataclass
class Step:
    """One slab of a pass: the rows of each target, what is read for them, where, and what is free afterwards."""

    rows: list[Rows | None]
    reads: dict[Node, Rows]
    work: int
    flop: float
    device: int = 0
    free: list[tuple[Node, Rows]] = field(default_factory=list)


@dataclass
class Pass:
    """Steps over the rows of the targets; ``keep`` False where only a target's moments are wanted.

    Across ranks, ``messages`` are the rows that change hands before the steps.
    """

    targets: list[Node]
    keep: bool
    steps: list[Step] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def work(self) -> int:
        """Bytes of the temporaries of the step that has most."""
        return max((step.work for step in self.steps), default=0)


class Graph:
    """What has to be computed for the outputs, whatever the slabs.

    Args:
        cheap: operations a byte up to which what is computed from the inputs alone, which are there anyway, is computed
            again for each reader and not kept.

    Attributes:
        order: the nodes, inputs before readers.
        kept: nodes whose result is stored (or, for wholes, held) until its last reader; given nodes too, whose rows
            one rank holds from the start.
        moments: nodes whose moments are gathered while their rows are computed.
        passes: (targets, keep) in order.
    """

    def __init__(self, outputs: Sequence[Node], cheap: float = 0.0) -> None:
        self.outputs = [node for node in dict.fromkeys(outputs) if node.value is None]
        self.order = order_of(self.outputs)
        self.readers: dict[Node, list[Node]] = {node: [] for node in self.order}
        for node in self.order:
            for given in dict.fromkeys(node.inputs):
                if given in self.readers:
                    self.readers[given].append(node)
        self.normalised = dict.fromkeys(node.moments_of for node in self.order if node.moments_of is not None)
        self.moments = list(dict.fromkeys(part for node in self.normalised for part in parts(node)))
        self.kept = self._kept(cheap)
        self.shared = {node for node in self.order if len(self.readers[node]) > 1 and node not in self.kept}
        computed = {node for node in self.kept if not is_given(node)}
        self.passes: list[tuple[list[Node], bool]] = [
            ([node], node in computed) for node in sorted({*computed, *self.moments}, key=lambda n: n.serial)
        ]
        self._compute_early()

    def _kept(self, cheap: float) -> set[Node]:
        kept: set[Node] = set()
        pending: set[Node] = set()
        again: dict[Node, float] = {}  # results cheap to compute from the inputs -> the operations it takes
        for node in self.order:
            if node.value is not None:
                continue
            if node in self.outputs or node.axis is None or is_given(node):
                kept.add(node)
                continue
            if all(given in again or given.value is not None for given in node.inputs):
                flop = node.rows * node.row_flop + sum(again.get(given, 0.0) for given in node.inputs)
                if flop <= cheap * size_of(node) and node.moments_of is None:
                    again[node] = flop
                    continue
            if not node.cost and not any(given in pending for given in node.inputs):
                continue
            readers = self.readers[node]
            absorbed = (
                len(readers) == 1
                and readers[0].elementwise
                and readers[0].shape == node.shape
                and node not in self.normalised
                and not any(node in parts(other) for other in self.normalised)
            )
            (pending if absorbed else kept).add(node)
        return kept

    def reads(self, target: Node) -> set[Node]:
        """The kept nodes that a node is computed from."""
        found: set[Node] = set()
        stack = list(target.inputs)
        while stack:
            node = stack.pop()
            if node in self.kept:
                found.add(node)
            else:
                stack += node.inputs
        return found

    def _compute_early(self) -> None:
        """Keep a residual block's 1x1 shortcut in the pass that reads its input last, so that a wider input can go."""
        last: dict[Node, list[int]] = {}
        for number, (targets, _) in enumerate(self.passes):
            for node in self.reads(targets[0]):
                last.setdefault(node, []).append(number)
        for node in self.order:
            if node in self.kept or not node.cost or node.axis is None:
                continue
            inputs = self.reads(node)
            others = {n: [k for k in last.get(n, ()) if not self._within(node, k)] for n in inputs}
            if not inputs or not all(others.values()):
                continue
            number = max(max(numbers) for numbers in others.values())
            later = [k for n in inputs for k in last[n] if k > number]
            goes = sum(size_of(n) for n in inputs if n not in self.outputs)
            ready = self._ready(node)
            target = self.passes[number][0][0]
            if later and size_of(node) < goes and ready < number and target.axis == node.axis and target in self.kept:
                self.kept.add(node)
                self.passes[number][0].append(node)

    def _within(self, node: Node, number: int) -> bool:
        """Whether a pass computes ``node`` on its way."""
        stack = list(self.passes[number][0])
        while stack:
            current = stack.pop()
            if current is node:
                return True
            stack += [given for given in current.inputs if given not in self.kept]
        return False

    def _ready(self, node: Node) -> int:
        """The number of the last pass that must be over before ``node`` can be computed."""
        wanted = self.reads(node)
        stack = [node]
        while stack:
            current = stack.pop()
            if current.moments_of is not None:
                wanted |= set(parts(current.moments_of))
            stack += [given for given in current.inputs if given not in self.kept]
        numbers = [k for k, (targets, _) in enumerate(self.passes) if wanted & set(targets)]
        return max(numbers, default=-1)


class Plan:
    """A graph with slabs and places: every step of every pass, and what it takes.

    Attributes:
        passes: what is computed, in order.
        where: kept volume -> "device", "host", "disk" or "output" (the tensor that is returned).
        peak: bytes on the device at the worst moment.
        peaks: the same of each pass.
        flop: floating point operations, those done twice in halos included.
        away: kept volume -> share of its slabs that are moved off the device.
        moved: bytes written to, and read from, host memory or disk.
    """

    def __init__(
        self,
        graph: Graph,
        base: int,
        slab_bytes: int,
        splits: int | None = None,
        away: Mapping[Node, float] | None = None,
        to: str = "host",
        in_flight: int = 1,
        rank: int = 0,
        ranks: int = 1,
        devices: int = 1,
        like: Plan | None = None,
    ) -> None:
        self.graph = graph
        self.base = base
        self.splits = splits
        self.slab_bytes = slab_bytes
        self.rank = rank
        self.ranks = ranks
        self.devices = devices
        self.away = dict(away or {})
        self.where: dict[Node, str] = {}
        for node in graph.kept:
            if is_given(node):
                self.where[node] = "given"
            elif node in graph.outputs:
                self.where[node] = "output"
            else:
                self.where[node] = to if node in self.away else "device"
        if like is None:
            self.passes = [Pass(targets, keep) for targets, keep in graph.passes]
            for done in self.passes:
                self._divide(done)
                self._exchange(done)
            self._free()
        else:  # the same slabs; only the places differ
            self.passes = like.passes
        self.peaks, self.peak_alive, self.moved = self._simulate(in_flight)
        self.peak = max(self.peaks, default=base)
        self.flop = sum(step.flop for done in self.passes for step in done.steps)

    def owned(self, node: Node, rank: int) -> Rows:
        """The rows of a node that a rank holds."""
        if is_given(node):
            return (0, node.rows) if rank == 0 else (0, 0)
        return share_of(node.rows, rank, self.ranks)

    def _own_rows(self, target: Node, rank: int) -> Rows:
        """The rows a rank computes: every rank computes wholes for itself."""
        return (0, 1) if target.axis is None else share_of(target.rows, rank, self.ranks)

    def _divide(self, done: Pass) -> None:
        spans = [self._own_rows(target, self.rank) for target in done.targets]
        rows = max(b - a for a, b in spans)
        if not rows:
            return
        if self.splits is None:
            widest = max(self._probe(done, [span if span[0] < span[1] else None for span in spans])[1], 1)
            steps = math.ceil(widest / self.slab_bytes)
        else:
            steps = self.splits
        steps = max(1, min(steps, rows))
        for i in range(steps):
            ranges: list[Rows | None] = []
            for lo, hi in spans:
                a, b = lo + (hi - lo) * i // steps, lo + (hi - lo) * (i + 1) // steps
                ranges.append((a, b) if a < b else None)
            step = self._probe(done, ranges)[0]
            step.device = i * self.devices // steps
            done.steps.append(step)
        # Each device has a range of its own; the devices take turns, so that they compute side by side.
        first = {step.device: place for place, step in reversed(list(enumerate(done.steps)))}
        turns = {id(step): (place - first[step.device], step.device) for place, step in enumerate(done.steps)}
        done.steps.sort(key=lambda step: turns[id(step)])

    def _exchange(self, done: Pass) -> None:
        if self.ranks == 1:
            return
        for target in range(self.ranks):
            spans = [self._own_rows(node, target) for node in done.targets]
            reads = self._probe(done, [span if span[0] < span[1] else None for span in spans])[0].reads
            for node in sorted(reads, key=lambda n: n.serial):
                if node.axis is None:
                    continue
                for source in range(self.ranks):
                    a, b = self.owned(node, source)
                    rows = (max(a, reads[node][0]), min(b, reads[node][1]))
                    if source != target and rows[0] < rows[1]:
                        done.messages.append(Message(node, rows, source, target))

    def _probe(self, done: Pass, ranges: Sequence[Rows | None]) -> tuple[Step, int]:
        probe = _Probe(self.graph)
        held = 0
        for target, rows in zip(done.targets, ranges, strict=True):
            if rows is not None:
                held += probe.compute(target, *rows, held)
        return Step(list(ranges), probe.reads, probe.top, probe.flop), probe.widest

    def _free(self) -> None:
        """Note after which step each slab is read for the last time, by this rank or to be sent to another one."""
        last = {}
        for done in self.passes:
            for node in (
                *(node for step in done.steps for node in step.reads),
                *(message.node for message in done.messages if message.source == self.rank),
            ):
                last[node] = done
        after = {id(done): number for number, done in enumerate(self.passes)}
        slabs: dict[Node, list[Rows]] = {
            target: [rows for step in done.steps if (rows := step.rows[place]) is not None]
            for done in self.passes
            if done.keep
            for place, target in enumerate(done.targets)
        }
        for node, done in last.items():
            if self.where[node] in ("output", "given"):
                continue
            # A rank without rows in a pass frees in its next one what it sent there, or keeps it to the end.
            at = next((later for later in self.passes[after[id(done)] :] if later.steps), None)
            if at is None or node not in slabs:
                continue
            for rows, step in zip(slabs[node], _last_readers(slabs[node], at.steps, node), strict=True):
                step.free.append((node, rows))

    def _simulate(self, in_flight: int) -> tuple[list[int], dict[Node, int], tuple[int, int]]:
        """Each pass's peak, what is alive at the highest, bytes moved."""
        alive: dict[Node, int] = {}
        peaks: list[int] = []
        peak, at_peak = self.base, {}
        written = read = 0
        gone: set[tuple[Node, Rows]] = set()
        for done in self.passes:
            lent = sum((m.rows[1] - m.rows[0]) * m.node.row_bytes for m in done.messages if m.target == self.rank)
            for target in done.targets:
                if done.keep and self.where[target] == "output":
                    alive[target] = size_of(target)
            fetched: dict[Node, int] = {}
            peaks.append(self.base)
            for number, step in enumerate(done.steps):
                now = self.base + sum(alive.values()) + lent + step.work * in_flight
                for node, (a, b) in step.reads.items():
                    if node in self.away:
                        now += (b - a) * node.row_bytes  # what was read last stays until the next slab has its halo
                        read += (b - min(b, max(a, fetched.get(node, 0)))) * int(node.row_bytes * self.away[node])
                        fetched[node] = b
                peaks[-1] = max(peaks[-1], now)
                if now > peak:
                    peak, at_peak = now, dict(alive)
                for target, span in zip(done.targets, step.rows, strict=True):
                    if not done.keep or span is None or self.where[target] == "output":
                        continue
                    size = (span[1] - span[0]) * target.row_bytes
                    if is_moved(number, self.away.get(target, 0.0)):
                        written += size
                        gone.add((target, span))
                    else:
                        alive[target] = alive.get(target, 0) + size
                for node, rows in step.free:
                    if (node, rows) not in gone and node in alive:
                        alive[node] -= (rows[1] - rows[0]) * node.row_bytes
        return peaks, at_peak, (written, read)

    def __str__(self) -> str:
        lines = [f"{'computed':<44}{'rows':>6}{'slabs':>7}{'size':>11}  kept"]
        for done in self.passes:
            for target in done.targets:
                name = f"{target.name} {'x'.join(map(str, target.shape))}"
                place = self.where[target] if done.keep else "no, its moments only"
                if self.away.get(target, 1.0) < 1:
                    place = f"device, {self.away[target]:.0%} on the {place}"
                size = format_bytes(size_of(target))
                lines.append(f"{name:<44}{target.rows:>6}{len(done.steps):>7}{size:>11}  {place}")
        lines.append(f"peak on the device {format_bytes(self.peak)}, {self.flop / 1e9:,.1f} GFLOP")
        if any(self.moved):
            lines.append(f"moved off the device {format_bytes(self.moved[0])}, read back {format_bytes(self.moved[1])}")
        return "\n".join(lines)


def make_plan(
    outputs: Sequence[Node],
    device_type: str,
    base: int = 0,
    splits: int | None = None,
    limit: int | None = None,
    offload: str = "auto",
    rank: int = 0,
    ranks: int = 1,
    devices: int = 1,
) -> Plan:
    """Return the first plan under the limit, from the fastest to the leanest.

    Args:
        outputs: what is to be computed.
        device_type: "cpu" or "cuda".
        base: bytes that are on the device anyway (inputs, weights).
        splits: steps a pass; None chooses them by bytes.
        limit: bytes on the device; None for no limit.
        offload: "host", "disk", "none", or "auto", which is the host's memory for a GPU and the disk for a CPU.
        devices: in this process; the slabs of a pass are dealt out to them in consecutive ranges.
        rank: whose plan; each of the ``ranks`` computes its share of the rows.

    Raises:
        MemoryLimitError: no plan is under the limit; the message names the least limit that would do.
    """
    fast = Graph(outputs)
    lean = (
        Graph(outputs, CHEAP) if ranks == 1 else fast
    )  # the ranks' passes have to be the same, whatever each has room for
    to = {"auto": "disk" if device_type == "cpu" else "host"}.get(offload, offload)
    slab_bytes = SLAB_BYTES.get(device_type, GPU_SLAB_BYTES)
    flights = 1 if device_type == "cpu" else 2  # a GPU's steps are queued ahead of what it computes

    def planned(
        size: int, away: Mapping[Node, float] | None = None, like: Plan | None = None, graph: Graph = lean
    ) -> Plan:
        return Plan(graph, base, size, splits, away, to, flights, rank, ranks, devices, like)

    plan = planned(slab_bytes, graph=fast)
    if limit is None or plan.peak <= limit:
        return plan
    plan = planned(slab_bytes)
    if plan.peak <= limit:
        return plan
    widest = max((node.row_bytes for node in lean.order if node.axis is not None), default=1)
    sizes = [slab_bytes]
    while splits is None and sizes[-1] > widest:
        sizes.append(sizes[-1] // 2)
    thick = [size for size in sizes if size == slab_bytes or size >= HALO_ROWS * widest]
    for size in thick[1:]:
        plan = planned(size)
        if plan.peak <= limit:
            return plan
    for size in sizes[len(thick) - 1 :]:
        away: dict[Node, float] = {}
        plan = planned(size)
        while to != "none":
            plan = planned(size, away, plan)
            if plan.peak <= limit:
                return plan
            movable = {
                node: held
                for node, held in plan.peak_alive.items()
                if node.axis is not None and plan.where[node] != "output" and away.get(node, 0.0) < 1 and held
            }
            if not movable:
                break
            node = max(movable, key=lambda n: movable[n])
            more = max((plan.peak - limit) / size_of(node), MOVED_AT_LEAST)
            away[node] = min(1.0, away.get(node, 0.0) + more)
    everything = {node: 1.0 for node in lean.kept if node.axis is not None} if to != "none" else {}
    least = min(planned(sizes[-1], everything).peak, plan.peak)
    raise MemoryLimitError(
        f"a memory limit of {format_bytes(limit)} cannot be met; the least that would do is {format_bytes(least)} for "
        "this network"
        + (" with this number of splits; splits=None plans thinner slabs" if splits is not None else "")
        + ("; offload='auto' needs less, by moving results off the device" if to == "none" else "")
    )


def _last_readers(slabs: Sequence[Rows], steps: Sequence[Step], node: Node) -> list[Step]:
    """For each slab of a node the last step that reads of it; the first step where none does.

    From the last step back, each takes the slabs it reads that no later one took; every slab is looked at once.
    """
    by_rows = sorted(range(len(slabs)), key=lambda i: slabs[i])
    begins, ends = [slabs[i][0] for i in by_rows], [slabs[i][1] for i in by_rows]
    left = list(range(len(slabs) + 1))  # from each place on, the first slab that may not have been taken yet
    found = [steps[0]] * len(slabs)

    def first_left(place: int) -> int:
        while left[place] != place:
            left[place] = left[left[place]]
            place = left[place]
        return place

    for step in reversed(steps):
        a, b = step.reads.get(node, (0, 0))
        place, end = bisect_right(ends, a), bisect_left(begins, b)
        while (place := first_left(place)) < end:
            found[by_rows[place]] = step
            left[place] = place + 1
    return found


class _Probe:
    """Goes through one step without values: what is read, held at most, and computed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.reads: dict[Node, Rows] = {}
        self.top = 0
        self.widest = 0
        self.flop = 0.0
        self._shared: set[tuple[Node, int, int]] = set()
        self._held = 0

    def visit(self, node: Node, a: int, b: int, base: int) -> int:
        """Note what rows ``a..b`` take; return the bytes of the result."""
        if node.value is not None:
            return 0
        if node not in self.graph.kept:
            return self.compute(node, a, b, base)
        seen = self.reads.get(node, (a, b))
        self.reads[node] = (min(a, seen[0]), max(b, seen[1]))
        if node.axis is None:
            return 0
        size = (b - a) * node.row_bytes  # a copy, where the rows span several slabs
        self.top = max(self.top, self._held + base + size)
        return size

    def compute(self, node: Node, a: int, b: int, base: int) -> int:
        """The same for a node that is computed in this step."""
        if not node.inputs:
            return self.visit(node, a, b, base)
        if (node, a, b) in self._shared:
            return 0
        held = read = 0
        for k, given in enumerate(node.inputs):
            lo, hi = node.need(k, a, b) or (0, 1)
            held += self.visit(given, lo, hi, base + held)
            read += (hi - lo) * given.row_bytes
        size = (b - a) * node.row_bytes
        work = node.room + node.copies * (read + size)
        self.top = max(self.top, self._held + base + held + size + work)
        self.widest = max(self.widest, size, held // max(len(node.inputs), 1))
        self.flop += (b - a) * node.row_flop
        if node in self.graph.shared:
            self._shared.add((node, a, b))
            self._held += size
            return 0
        return size


def is_given(node: Node) -> bool:
    """Whether a node's rows are there from the start, held by rank 0 alone."""
    return not node.inputs and node.value is None


def parts(node: Node) -> list[Node]:
    """The nodes whose moments make up a node's: those joined along the channels, or itself."""
    if node.channel_concat and node.value is None:
        return [part for given in node.inputs for part in parts(given)]
    return [node]


def format_bytes(count: float) -> str:
    """Return a size for people: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def size_of(node: Node) -> int:
    """Bytes of a node's whole result."""
    return node.rows * node.row_bytes


def order_of(outputs: Sequence[Node]) -> list[Node]:
    """The nodes that outputs are computed from, and these, inputs before readers."""
    found: set[Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node.value is None:
                stack += node.inputs
                if node.moments_of is not None:
                    stack.append(node.moments_of)
    return sorted(found, key=lambda node: node.serial)
