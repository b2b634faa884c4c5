"""The plan's figures against peaks computed by hand, and against what torch allocates.

In the plans by hand a volume has 8 rows of one channel, 4 x 4 voxels each, in float32: a row takes R = 64 bytes. All
peaks are counted in rows, above what is on the device anyway.
"""

from __future__ import annotations

import copy
import functools
import gc
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from maisi_tools.convolution import computes_in_float32
from maisi_tools.tsp.errors import MemoryLimitError, TSPError
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.tsp.nodes import Node, clamp, source
from maisi_tools.tsp.plan import Graph, Plan, Step, _last_readers, make_plan
from maisi_tools.tsp.run import LIBRARY_BYTES, Call, Settings
from maisi_tools.tsp.state import modules_of

R = 64
BASE = 1000


def outputs_of(function, volume=None):
    """The nodes that a function of a volume returns, recorded."""
    volume = torch.zeros(1, 1, 8, 4, 4) if volume is None else volume
    with torch.no_grad():
        return Call(Settings(splits=1, axis=0), function, (volume,), {}).outputs


def convolution():
    """One channel, kernel 3: rows a..b are computed from rows a-1..b+1."""
    return nn.Conv3d(1, 1, 3, padding=1).eval()


def rows_of(plan):
    return (plan.peak - BASE) / R


def planned(function, splits, device="cpu"):
    return make_plan(outputs_of(function), device, BASE, splits=splits)


def test_one_convolution():
    """The result, 8 rows, is there from the start. A slab of 4 rows is computed from 5 of the input, which is on the
    device anyway, and the convolution copies what it reads and writes into a layout of its own: 8 + 4 + (5 + 4)."""
    assert rows_of(planned(convolution(), 2)) == 8 + 4 + (5 + 4)
    assert rows_of(planned(convolution(), 1)) == 8 + 8 + (8 + 8)


def test_two_steps_are_in_flight_on_a_gpu():
    """Beside the result, 8 rows, two slabs of 4 rows, and their copies, are under way at once."""
    assert rows_of(planned(convolution(), 2, "cuda")) == 8 + 2 * (4 + 5 + 4)


def test_two_convolutions():
    """In slabs of 2 rows. Pass 1 keeps 8 rows. In pass 2 the result takes 8 too; a step of it reads its 2 rows and one
    more on each side (4), gives 2, and copies both (4 + 2). It is highest at the second step, before the first slab
    goes: 8 + 8 + 4 + 2 + 6."""
    first, second = convolution(), convolution()
    assert rows_of(planned(lambda x: second(first(x)), 4)) == 8 + 8 + 4 + 2 + (4 + 2)


def test_slabs_that_nobody_reads_any_more_are_gone():
    """Of three, in pass 3 what pass 1 kept is gone: the peak is that of two. While pass 2 runs, its own result grows
    from 0 and what it reads shrinks from 8: at most 8 + 2 + 12, less than in pass 3."""
    layers = [convolution() for _ in range(3)]
    assert rows_of(planned(nn.Sequential(*layers).eval(), 4)) == 8 + 8 + 4 + 2 + (4 + 2)


def test_a_sum_holds_its_first_term_while_the_second_is_computed():
    """y + c(y) of y = b(x), in slabs of 2 rows: y is kept, 8 rows, the result takes 8. A step reads 2 rows of y for the
    sum, then 4 for c, which gives 2 and copies both: 8 + 8 + 2 + 4 + 2 + 6. The sum's rows come when those are gone."""
    first, second = convolution(), convolution()

    def network(x):
        y = first(x)
        return y + second(y)

    assert rows_of(planned(network, 4)) == 8 + 8 + 2 + 4 + 2 + (4 + 2)


def moved(share):
    """The plan of three convolutions whose first result is moved off the device, in slabs of 2 rows."""
    layers = [convolution() for _ in range(3)]
    graph = Graph(outputs_of(nn.Sequential(*layers).eval()))
    first = next(node for node in graph.order if node.name == "convolution")
    return Plan(graph, BASE, 2**20, splits=4, away={first: share}, to="disk")


def test_a_result_moved_off_the_device_by_half():
    """Every second slab of 2 rows is moved: 4 rows of 8 stay. Pass 3, that of the peak, has nothing of it: 8 + 8 + 12,
    as if it were not there; a slab that was moved is not taken off twice. 4 rows are written. Read are rows 0..3, 3..5,
    5..7 and 7..8, for what the slab before has read is not read again: 8 rows, half of them from the disk."""
    plan = moved(0.5)
    assert rows_of(plan) == 8 + 8 + 4 + 2 + (4 + 2)
    assert plan.moved == (4 * R, 4 * R)


def test_what_is_read_back_is_held():
    """Of two convolutions the first is moved off the device as a whole. In pass 2 a step holds the 4 rows that it reads
    as they were read, for the next one's halo, beside its own 4 + 2 + 6: 8 + 4 + 12. In pass 1 nothing is held."""
    first, second = convolution(), convolution()
    graph = Graph(outputs_of(lambda x: second(first(x))))
    away = {next(node for node in graph.order if node.name == "convolution"): 1.0}
    plan = Plan(graph, BASE, 2**20, splits=4, away=away, to="disk")
    assert rows_of(plan) == 8 + 4 + 4 + 2 + (4 + 2)
    assert plan.moved == (8 * R, 8 * R)


def test_operations_are_counted_with_the_halo():
    """Instance norm and ReLU between two convolutions cost none; the second convolution computes 8 rows of 16 voxels,
    27 taps. Slabs of 2 rows compute no row of the first twice, for it is kept."""
    first, second = convolution(), convolution()
    plan = planned(lambda x: second(nn.functional.instance_norm(first(x)).relu()), 4)
    assert plan.flop == 2 * (2 * 27) * 8 * 16
    assert [len(done.steps) for done in plan.passes] == [4, 4]


# --- measured -------------------------------------------------------------------------------------------------------


def allocated_at_most(function):
    """The most bytes that torch had allocated at once while a function ran, above those before."""
    gc.collect()  # or what earlier calls left is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


class Residual(nn.Module):
    """Two blocks of norms, activations and convolutions, and a wider level between."""

    def __init__(self):
        super().__init__()
        self.enter, self.wide = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)
        self.norm, self.leave = nn.GroupNorm(4, 16), nn.Conv3d(16, 8, 3, padding=1)
        self.last = nn.Conv3d(8, 1, 3, padding=1)

    def forward(self, x):
        y = self.enter(x)
        y = y + self.leave(torch.relu(self.norm(self.wide(y))))
        return self.last(torch.relu(y))


@pytest.mark.parametrize("splits", [2, 8])
def test_what_torch_allocates_is_what_was_planned(splits):
    """Not above the plan, and no less than three quarters of it: the convolution library's own copies, which the plan
    counts, are not torch's to see. Slabs are kept below the size from which they are stored outside torch."""
    network, volume = Residual().eval(), torch.randn(1, 2, 48, 12, 12)
    with torch.no_grad():
        inferer = TSPInferer(splits=splits)
        plan = inferer.plan(volume, network)
        inferer(volume, network)  # what is imported and remembered at the first call is not measured
        most = allocated_at_most(lambda: inferer(volume, network))
    assert 0.75 * (plan.peak - plan.base) <= most <= 1.05 * (plan.peak - plan.base)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize(("width", "out", "kernel", "size"), [(64, 64, 5, 3), (16, 1, 1, 48)])
def test_copies_in_another_type_or_layout_count(width, out, kernel, size, given, computed):
    """Of weights that are larger than the volume, and of a volume that is larger than the weights: one of each.

    Against what torch allocates where that is mostly the copies; a convolution in float64 or float16 has its columns.
    """
    network = nn.Conv3d(width, out, kernel, padding=kernel // 2).eval().to(given)
    volume = torch.randn(1, width, size, size, size).to(given)
    wanted = computed or given
    there = volume.nbytes + network.weight.nbytes + network.bias.nbytes + LIBRARY_BYTES["cpu"]
    moved = (volume, network.weight)  # to another type, or to channels that are last
    copies = 0 if given == wanted == torch.float32 else wanted.itemsize * sum(part.numel() for part in moved)
    copies -= wanted.itemsize * network.weight.numel() if given == wanted != torch.float32 and kernel == 1 else 0
    copies += wanted.itemsize * out if given != wanted else 0
    with torch.no_grad():
        inferer = TSPInferer(splits=8, dtype=computed)
        plan = inferer.plan(volume, network)
        inferer(volume, network)
        most = allocated_at_most(lambda: inferer(volume, network))
        assert plan.base == there + copies
        meta = TSPInferer(splits=8, dtype=computed, devices=["cpu"])
        planned = meta.plan(volume.to("meta"), copy.deepcopy(network).to("meta"))
        assert [done.work for done in planned.passes] == [done.work for done in plan.passes]
        if wanted == torch.bfloat16:
            own = 0 if computes_in_float32(wanted) else 4 * (volume.numel() // 8 + network.weight.numel())  # oneDNN's
            assert 0.9 * copies <= most <= 1.05 * (plan.peak - there) + own
        with pytest.raises(MemoryLimitError):
            TSPInferer(splits=8, dtype=computed, memory_limit=plan.base - 1).plan(volume, network)


UNRULED = {
    "power average": nn.LPPool3d(2, 1).eval(),
    "gated": nn.GLU(1).eval(),
    "local response": nn.LocalResponseNorm(5).eval(),
    "several results": lambda x: torch.median(x, 1)[0] + x.sort(1)[0],
    "differences": lambda x: torch.diff(x, n=3, dim=2),
    "by hand": lambda x: nn.functional.pairwise_distance(x.transpose(1, 4) + 1, x.transpose(1, 4)),
}


@pytest.mark.parametrize("given", [{}, {"splits": 4}])
@pytest.mark.parametrize("name", UNRULED)
def test_what_an_operation_without_a_rule_takes_on_the_way_counts(name, given):
    """Many of torch's functions call others, whose results are there for a moment."""
    volume = torch.randn(1, 16, 32, 24, 24)
    with torch.no_grad():
        inferer = TSPInferer(**given)
        plan = inferer.plan(volume, UNRULED[name])
        inferer(volume, UNRULED[name])
        most = allocated_at_most(lambda: inferer(volume, UNRULED[name]))
    room = plan.peak - volume.nbytes - LIBRARY_BYTES["cpu"]
    assert 0.45 * room <= most <= 1.02 * room


def test_what_is_on_the_way_by_hand():
    """Local response: sums of squares, these times alpha or its power, and these plus k are there at once."""
    volume = torch.randn(1, 4, 8, 8, 8)
    for layer, held in ((nn.LocalResponseNorm(3), 3), (nn.ReLU(), 1)):
        whole = TSPInferer().plan(volume, layer.eval())
        assert whole.peak - whole.base == held * volume.nbytes
    slabs = TSPInferer(splits=1).plan(volume, nn.LocalResponseNorm(3).eval())
    assert slabs.peak - slabs.base == (1 + 3) * volume.nbytes  # the output as well, into which the result is copied


class Holder:
    """Layers in an object that is no module, for a method of it."""

    def __init__(self, layers):
        self.parts = {"layers": layers}

    def decode(self, x):
        return _sum_of(self.parts["layers"], x)


def _sum_of(layers, x):
    return sum(layer(x) for layer in layers)


HOLDERS = {
    "closure": lambda layers: lambda x: _sum_of(layers, x),
    "method": lambda layers: Holder(layers).decode,
    "partial": lambda layers: functools.partial(_sum_of, layers),
    "partial by name": lambda layers: functools.partial(lambda x, layers: _sum_of(layers, x), layers=layers),
    "module": lambda layers: functools.partial(_sum_of, nn.ModuleList(layers).eval()),
    "default": lambda layers: lambda x, held=layers: _sum_of(held, x),
    "its own module": lambda layers: nn.ModuleList(layers)[0].forward,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_weights_count_wherever_they_are_held(holder):
    layers = [nn.Conv3d(2, 3, 3, padding=1).eval() for _ in range(1 if holder == "its own module" else 4)]
    network, volume = HOLDERS[holder](layers), torch.randn(1, 2, 8, 8, 8)
    held = volume.nbytes + sum(part.nbytes for layer in layers for part in layer.parameters())
    with torch.no_grad():
        for settings in ({}, {"splits": 2}):
            assert TSPInferer(**settings).plan(volume, network).base == held + LIBRARY_BYTES["cpu"]
        for module in modules_of(network):
            module.train()
        with pytest.raises(TSPError, match="is in training mode"):
            TSPInferer()(volume, network)


inner = nn.Conv3d(2, 2, 1)
"""In training mode; nothing reads it but by an attribute's name."""

GLOBAL = [nn.Conv3d(2, 3, 1).eval()]


def test_an_attribute_is_no_global_of_its_name():
    volume, held = torch.randn(1, 2, 8, 8, 8), SimpleNamespace(inner=nn.Conv3d(2, 2, 1).eval())

    def network(x):
        return GLOBAL[0](held.inner(x))

    assert set(modules_of(network)) == {held.inner, *GLOBAL}
    weights = sum(part.nbytes for layer in modules_of(network) for part in layer.parameters())
    with torch.no_grad():
        assert TSPInferer().plan(volume, network).base == volume.nbytes + weights + LIBRARY_BYTES["cpu"]


def test_tensors_that_are_no_weights_count_as_they_are_met():
    """A plain tensor and a part of it, which share their memory, and a buffer; not one that nothing reads."""
    kernel, unread = torch.randn(3, 2, 3, 3, 3), torch.randn(100)
    norm, volume = nn.BatchNorm3d(3).eval(), torch.randn(1, 2, 8, 8, 8)

    def network(x):
        assert len(unread)
        return norm(nn.functional.conv3d(x, kernel) + nn.functional.conv3d(x, kernel[:1]))

    held = volume.nbytes + kernel.nbytes + sum(part.nbytes for part in (*norm.parameters(), *norm.buffers()))
    with torch.no_grad():
        assert TSPInferer(splits=2).plan(volume, network).base == held + LIBRARY_BYTES["cpu"]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_what_a_rank_has_to_send_is_not_freed_before(ranks):
    """A layer with few rows leaves some ranks without any, whose rows others still need."""
    start = source(torch.zeros(1, 1, 8, 4, 4), 2)

    def conv(name, given, rows, step):
        def need(k, a, b):
            return clamp(a * step - 1, (b - 1) * step + 2, given.rows)

        return Node(name, (given,), (1, 1, rows, 4, 4), torch.float32, 2, lambda slabs, a, b: None, need, cost=50.0)

    first = conv("first", start, 8, 1)
    graph = Graph([conv("early", first, 8, 1), conv("down", first, 2, 4)])
    for rank in range(ranks):
        plan, freed, sent = Plan(graph, 0, 1 << 30, 1, rank=rank, ranks=ranks), [], 0
        for done in plan.passes:
            for message in (message for message in done.messages if message.source == rank):
                sent += 1
                for node, (a, b) in freed:
                    assert node is not message.node or b <= message.rows[0] or a >= message.rows[1]
            freed += [entry for step in done.steps for entry in step.free]
        assert sent or ranks == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_slab_is_freed_after_the_last_step_that_reads_of_it(seed):
    """As looking at every step for every slab says; slabs and steps in any order, with gaps and overlaps."""
    rng = random.Random(seed)
    ends = sorted(rng.sample(range(1, 60), rng.randint(1, 20)))
    slabs = list(zip([0, *ends[:-1]], ends, strict=True))
    rng.shuffle(slabs)
    node = object()
    reads = [(a, min(a + rng.choice([1, 5, 60]), 60)) for a in rng.choices(range(60), k=12)]
    steps = [Step([], {node: rows} if rng.random() < 0.9 else {}, 0, 0.0) for rows in reads]
    wanted = []
    for a, b in slabs:
        overlap = [
            step for step in steps if max(a, step.reads.get(node, (0, 0))[0]) < min(b, step.reads.get(node, (0, 0))[1])
        ]
        wanted.append(overlap[-1] if overlap else steps[0])
    assert all(one is other for one, other in zip(_last_readers(slabs, steps, node), wanted, strict=True))
