"""Where a network runs whole, that nothing of an earlier call is left in a later one, and that plans are used again."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import queue
import random
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiConvolution, MaisiGroupNorm3D
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional

from maisi_tools.networks import Autoencoder
from maisi_tools.tsp import run, whole
from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.inferer import TSPInferer, plain_maisi_modules
from maisi_tools.tsp.plan import Plan
from maisi_tools.tsp.whole import Whole
from thorough import examples


class Block(nn.Module):
    """A residual block with a condition: what the U-Nets are made of."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(2, width, 3, padding=1), nn.GroupNorm(2, width)
        self.second, self.embed = nn.Conv3d(width, width, 3, stride=2, padding=1), nn.Linear(1, width)

    def forward(self, x, timesteps=None, scale=1.0):
        h = self.first(x)
        if timesteps is not None:
            h = h + self.embed(timesteps[:, None].to(h.dtype))[..., None, None, None]
        return self.second(functional.silu(self.norm(h))) * scale


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def network() -> Block:
    return Block().eval()


@pytest.fixture
def volume() -> torch.Tensor:
    return torch.randn(1, 2, 10, 12, 11)


# --- whole, or in slabs -----------------------------------------------------------------------------------------------


def test_without_a_limit_a_small_network_runs_whole_and_the_report_says_so(network, volume):
    inferer = TSPInferer()
    for _ in range(2):
        torch.testing.assert_close(inferer(volume, network), network(volume))
        assert isinstance(inferer.report.plan, Whole) and str(inferer.report).startswith("the whole network at once")
    assert inferer.plan(volume, network) == inferer.report.plan


def test_maisis_networks_run_whole(tiny_autoencoder, tiny_unet, tiny_controlled):
    inferer, latent, mask = TSPInferer(), torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 1, 32, 32, 32)
    conditions = {"timesteps": torch.tensor([500.0]), "class_labels": torch.tensor([1])}
    controlled = {"embedding": tiny_controlled.embed(mask), **conditions}
    for network, inputs, others in (
        (tiny_autoencoder.encode, mask, {}),
        (tiny_autoencoder.decode, latent, {}),
        (tiny_unet, latent, conditions),
        (tiny_controlled.embed, mask, {}),
        (tiny_controlled.denoise, latent, controlled),
    ):
        inferer(inputs, network, **others)
        assert isinstance(inferer.report.plan, Whole), network


@pytest.mark.parametrize(
    "given",
    [{"splits": 1}, {"splits": 3}, {"devices": ["cpu", "cpu"]}, {"dtype": torch.float64}, {"devices": ["meta"]}],
)
def test_who_asks_for_slabs_another_type_or_several_devices_gets_them(network, volume, given):
    if given.get("devices") == ["meta"]:  # another device than the input's
        assert isinstance(TSPInferer(**given).plan(volume, network), Plan)
        return
    inferer = TSPInferer(**given)
    torch.testing.assert_close(inferer(volume, network), network(volume))
    assert isinstance(inferer.report.plan, Plan)


def test_a_limit_below_what_the_whole_takes_makes_slabs_and_one_above_does_not(network):
    volume = torch.randn(1, 2, 40, 40, 40)
    takes = TSPInferer().plan(volume, network)
    assert takes.base < takes.peak and takes.largest == 4 * 4 * 40**3
    for limit, kind in ((takes.peak, Whole), (takes.peak - 1, Plan)):
        inferer = TSPInferer(memory_limit=limit)
        torch.testing.assert_close(inferer(volume, network), network(volume))
        assert isinstance(inferer.report.plan, kind) and inferer.report.plan.peak <= limit


def test_what_is_large_runs_in_slabs(network, volume, monkeypatch):
    largest = TSPInferer().plan(volume, network).largest
    monkeypatch.setitem(whole.WHOLE_BYTES, "cpu", largest - 1)
    assert isinstance(TSPInferer().plan(volume, network), Plan)


def test_peak_of_a_chain_by_hand():
    """Two convolutions 1 -> 2 -> 1 channels of 10x10x10 float32, 4000 bytes a channel; their working copies count."""
    chain = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 1, 3, padding=1)).eval()
    found = TSPInferer().plan(torch.randn(1, 1, 10, 10, 10), chain)
    # At the second convolution: the activation (2) and its result (1), and a copy of both in the library's layout.
    assert found.peak - found.base == 4000 * (2 + 1 + 2 + 1)
    assert found.flop == 2 * 27 * 1000 * (1 * 2 + 2 * 1)


class Keeps(nn.Module):
    """Three convolutions, whose first result a variable keeps to the end, with a view of it; nothing reads either."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(n, 2, 3, padding=1) for n in (1, 2, 2))

    def forward(self, x):
        kept = x = self.layers[0](x)
        view = kept[:, :1]
        for layer in self.layers[1:]:
            x = layer(x)
        del kept, view
        return x


def test_what_a_variable_keeps_counts_by_hand():
    found = TSPInferer().plan(torch.randn(1, 1, 10, 10, 10), Keeps().eval())
    # At the third convolution: what is kept (2), input (2) and result (2), and a copy of both in the library's layout.
    assert found.peak - found.base == 4000 * (2 + 2 + 2 + 4)


def test_half_precision_counts_its_copies_of_weights_and_volumes():
    layers = nn.Sequential(*(nn.Conv3d(64, 64, 3, padding=1) for _ in range(4))).eval()
    volume = torch.randn(1, 64, 4, 4, 4)
    found = TSPInferer(dtype="bfloat16").plan(volume, layers)
    copies = 2 * (volume.numel() + sum(part.numel() for part in layers.parameters()))
    assert found.peak - found.base > copies + 2 * 2 * volume.numel()  # and an input and a result at a time


def test_another_number_among_the_arguments_is_another_call():
    class Sum(nn.Module):
        def forward(self, x, times):
            return sum([x + number for number in range(times)])

    network, volume = Sum().eval(), torch.randn(1, 4, 64, 64, 64)
    inferer = TSPInferer(memory_limit="80MiB")
    for times, kind in ((1, Whole), (30, Plan)):
        torch.testing.assert_close(inferer(volume, network, times=times), network(volume, times))
        assert isinstance(inferer.report.plan, kind)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("limit", "expected"), [("", "Whole"), ("4GiB", "Whole"), ("300MiB", "Plan")])
def test_what_a_run_takes_is_what_was_said(limit, expected):
    """In a process of its own: resident memory against the figure of the report; temporaries of ever other sizes."""
    program = """
import sys
import torch
from torch import nn
from torch.nn import functional
from maisi_tools.tsp.run import Runner, Settings
torch.set_num_threads(1)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
    def forward(self, x):
        h = self.a(x)
        kept = [h]
        for i in range(1, 4):
            h = h + self.b(functional.silu(self.n(h)))
            kept.append(functional.interpolate(h, size=96 - 7 * i))
        return h
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
net, runner, x = Net().eval(), Runner(Settings(memory_limit=sys.argv[1] or None)), torch.zeros(1, 1, 96, 96, 96)
with torch.no_grad():
    runner.run(net, (torch.zeros(1, 1, 16, 16, 16),), {})
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    runner.run(net, (x,), {})
print(peak() - before, runner.report.plan.peak - runner.report.plan.base, type(runner.report.plan).__name__)
"""
    found = subprocess.run([sys.executable, "-c", program, limit], capture_output=True, text=True, check=True)
    took, said, kind = found.stdout.split()
    assert kind == expected and 0.5 * int(said) < int(took) < 1.05 * int(said)


# --- as exact, and as careful -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_half_precision_is_as_exact_as_the_network_in_it(network, batch):
    volume, timesteps = torch.randn(batch, 2, 10, 12, 11), torch.rand(batch)
    exact = deepcopy(network).double()(volume.double(), timesteps.double())
    own = (deepcopy(network).bfloat16()(volume.bfloat16(), timesteps.bfloat16()).double() - exact).abs().max()
    inferer = TSPInferer(dtype="bfloat16")
    found = inferer(volume, network, timesteps)
    assert isinstance(inferer.report.plan, Whole) and found.dtype == torch.float32
    assert 1e-4 < (found - exact).abs().max() <= 2 * own


@dataclass(frozen=True)
class Parts:
    """What some networks return."""

    first: torch.Tensor
    others: list
    name: str = "parts"


@pytest.mark.parametrize("given", [{}, {"splits": 2}])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
def test_tensors_in_a_dataclass_are_as_those_in_a_tuple(network, volume, dtype, given):
    """Of the input's type, and with its metadata where it has some."""

    def parted(x):
        y = network(x)
        return Parts(y, [{"inner": Parts(y * 2, [])}, y > 0]), y

    for x in (volume, MetaTensor(volume, meta={"patient": "phantom"})):
        parts, alone = TSPInferer(dtype=dtype, **given)(x, parted)
        inner = parts.others[0]["inner"]
        assert (parts.name, inner.name, inner.others) == ("parts", "parts", [])
        for found in (parts.first, inner.first, alone):
            assert type(found) is type(x) and found.dtype == torch.float32
            assert not isinstance(x, MetaTensor) or found.meta["patient"] == "phantom"
        assert parts.others[1].dtype == torch.bool and type(parts.others[1]) is type(x)
        assert torch.equal(parts.first, alone) and torch.equal(inner.first, alone * 2)
        tolerance = 0.1 if dtype in ("bfloat16", "float16") else 1e-5
        torch.testing.assert_close(torch.as_tensor(alone), network(volume), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_far_from_zero_with_the_channels_last(dtype):
    """torch's own takes the variance as a difference of large numbers there: off by 2.6e-3 in float32."""
    norm = nn.GroupNorm(2, 8).eval()
    volume = (torch.randn(1, 8, 12, 12, 12) + 30).contiguous(memory_format=torch.channels_last_3d).to(dtype)
    exact = deepcopy(norm).double()(volume.double())
    found = TSPInferer(dtype=None if dtype == torch.float32 else dtype)(volume, norm)
    assert (found - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
    assert (found.double().var() - 1).abs() < 1e-3


def test_a_second_call_is_refused_what_a_first_is(network, volume):
    inferer = TSPInferer()
    inferer(volume, network)
    with torch.enable_grad(), pytest.raises(TSPError, match="gradients are wanted"):
        inferer(volume, network)
    with pytest.raises(TSPError, match="Block is in training mode"):
        inferer(volume, network.train())
    dropping = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Dropout()).eval()
    inferer(volume, dropping)
    dropping[1].train()
    with pytest.raises(TSPError, match="dropout is active"):
        inferer(volume, dropping)


# --- what is kept from call to call -----------------------------------------------------------------------------------


def _reload(network):
    network.load_state_dict({name: value + 0.1 for name, value in network.state_dict().items()})


def _replace(network):
    network.first.weight = nn.Parameter(network.first.weight * 2)


def _change_in_place(network):
    network.norm.bias.add_(1)


def _another_layer(network):
    network.second = nn.Conv3d(4, 4, 3, stride=2, padding=2, dilation=2).eval()


def _another_attribute(network):
    network.norm.eps *= 1000


CHANGES = [_reload, _replace, _change_in_place, _another_layer, _another_attribute]
SETTINGS = [{}, {"splits": 3}, {"splits": 2, "axis": 1}, {"dtype": "bfloat16"}, {"splits": 3, "dtype": "bfloat16"}]


@settings(max_examples=examples(8), deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_changed_a_call_gives_what_a_fresh_inferer_gives(data):
    """Shapes, types, arguments, settings and weights changed in random order, with inferers that are kept."""
    torch.manual_seed(0)
    networks = [Block().eval(), Block(6).eval()]
    kept = [TSPInferer(**setting) for setting in SETTINGS]
    for _ in range(data.draw(st.integers(2, 6))):
        number, setting = data.draw(st.integers(0, 1)), data.draw(st.integers(0, len(SETTINGS) - 1))
        network = networks[number]
        if data.draw(st.booleans()):
            change = data.draw(st.sampled_from(CHANGES))
            if not (change is _another_layer and number):
                change(network)
        size = data.draw(st.sampled_from([(8, 9, 10), (10, 9, 8), (12, 8, 8)]))
        batch = data.draw(st.integers(1, 2))
        volume = torch.randn(batch, 2, *size)
        arguments = (torch.rand(batch),) if data.draw(st.booleans()) else ()
        scale = data.draw(st.sampled_from([1.0, 0.5]))
        with torch.no_grad():
            found = kept[setting](volume, network, *arguments, scale=scale)
            assert torch.equal(found, TSPInferer(**SETTINGS[setting])(volume, network, *arguments, scale=scale))
            tolerance = 0.2 if "dtype" in SETTINGS[setting] else 1e-4
            torch.testing.assert_close(found, network(volume, *arguments, scale=scale), atol=tolerance, rtol=tolerance)


def test_a_sampler_plans_once(network, volume, monkeypatch):
    planned = []
    make_plan = run.make_plan
    monkeypatch.setattr(run, "make_plan", lambda *args, **kwargs: planned.append(1) or make_plan(*args, **kwargs))
    inferer = TSPInferer(splits=4)
    for step in range(30):
        timesteps = torch.tensor([step / 30])
        torch.testing.assert_close(inferer(volume, network, timesteps), network(volume, timesteps))
    assert len(planned) == 1
    inferer(volume[:, :, 1:], network, timesteps)
    assert len(planned) == 2


def test_a_plan_for_less_memory_is_not_kept_when_more_is_free(network, monkeypatch):
    volume = torch.randn(1, 2, 40, 40, 40)
    monkeypatch.setitem(whole.WHOLE_BYTES, "cpu", 0)
    inferer, fast = TSPInferer(), TSPInferer(memory_limit=2**40).plan(volume, network)
    room = 0
    monkeypatch.setattr(run, "free_bytes", lambda device, base: room)
    for room in (fast.base + (fast.peak - fast.base) * 4 // 5, fast.peak * 2):
        torch.testing.assert_close(inferer(volume, network), network(volume))
        assert inferer.report.plan.peak <= room
    assert inferer.report.plan.peak == fast.peak


def test_nothing_of_a_call_is_held_by_what_is_kept(network):
    for inferer in (TSPInferer(), TSPInferer(splits=2)):
        volume = torch.randn(1, 2, 8, 8, 8)
        held = weakref.ref(volume)
        inferer(volume, network)
        del volume
        gc.collect()
        assert held() is None and inferer.report is not None


# --- what a network does beside its result ----------------------------------------------------------------------------


class Joined(nn.Module):
    """Joins its input with a buffer that it writes into afterwards."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2 if axis == 1 else 1, 2, 1)
        self.register_buffer("more", torch.ones(1, 1, 8, 8, 8))
        self.axis = axis

    def forward(self, x):
        joined = torch.cat([x, self.more], self.axis)
        self.more.mul_(3)
        return self.conv(joined)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("given", [{}, {"splits": 2, "axis": 0}])
def test_what_is_joined_counts_as_it_was(axis, given):
    network, volume = Joined(axis).eval(), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        found = TSPInferer(**given)(volume, network)
        assert torch.equal(network.more, torch.full((1, 1, 8, 8, 8), 3.0))
        network.more.fill_(1)
        torch.testing.assert_close(found, network(volume))


class Counting(nn.Module):
    """Remembers in a way of its own how often it was called, and its result depends on that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 1)
        self.how, self.calls, self.seen, self.inner = how, {"n": 0}, [], {"deep": [0]}

    def forward(self, x):
        if self.how == "dict":
            self.calls["n"] += 1
            return self.conv(x) * self.calls["n"]
        if self.how == "list":
            self.seen.append(1)
            return self.conv(x) * len(self.seen)
        if self.how == "deep":
            self.inner["deep"][0] += 1
            return self.conv(x) * self.inner["deep"][0]
        number = random.random() if self.how == "random" else float(np.random.rand())  # noqa: NPY002
        return self.conv(x) * number


@pytest.mark.parametrize("how", ["dict", "list", "deep", "random", "numpy"])
def test_a_network_that_remembers_is_called_once(how):
    volume, results = torch.randn(1, 1, 8, 8, 8), []
    for call in (lambda network: TSPInferer()(volume, network), lambda network: network(volume)):
        torch.manual_seed(0)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        network = Counting(how).eval()
        with torch.no_grad():
            results.append(call(network))
        if how == "list":
            assert network.seen == [1]
    torch.testing.assert_close(*results)


class Plain:
    """An object that is no module."""

    total = 0

    def __init__(self):
        self.count, self.inner = 0, [SimpleNamespace(count=0)]


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


def _generator(start=1):
    while True:
        yield float(start)
        start += 1


def _add(owner, name="count"):
    setattr(owner, name, getattr(owner, name) + 1)
    return float(getattr(owner, name))


def _add_in_place(array):
    array += 1
    return float(array[0])


REMEMBERED = {
    "an iterator": (lambda: itertools.count(1), lambda state: float(next(state))),
    "an iterator of a list": (lambda: iter([2.0, 3.0, 5.0, 7.0]), next),
    "a generator": (_generator, next),
    "an array": (lambda: np.zeros(2), _add_in_place),
    "an object": (Plain, _add),
    "a namespace": (lambda: SimpleNamespace(count=0), _add),
    "an object in a list of an object": (Plain, lambda state: _add(state.inner[0])),
    "an object with slots": (Slotted, _add),
    "a class": (lambda: type("Other", (Plain,), {"total": 0}), lambda state: _add(state, "total")),
    "random numbers of torch": (lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand(1, generator=g))),
    "random numbers of numpy": (lambda: np.random.default_rng(1), lambda state: state.random()),
    "random numbers of Python": (lambda: random.Random(1), lambda state: state.random()),
    "an attribute of a function": (lambda: _fresh_function(), lambda state: state()),
    "a default": (lambda: _fresh_default(), lambda state: state()),
    "a queue": (lambda: queue.SimpleQueue(), lambda state: [state.put(1), float(state.qsize())][1]),
}
"""Where a network may count its calls -> what makes that, and what counts on and returns a number."""


def _fresh_function():
    def count():
        return _add(count)

    count.count = 0
    return count


def _fresh_default():
    def count(calls=[]):  # noqa: B006
        calls.append(1)
        return float(len(calls))

    return count


@pytest.mark.parametrize("where", REMEMBERED)
def test_wherever_a_network_counts_its_calls_it_is_called_once(where):
    made, count = REMEMBERED[where]
    conv, volume = nn.Conv3d(1, 1, 3, padding=1).eval(), torch.randn(1, 1, 8, 8, 8)

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.state = conv, made()

        def forward(self, x):
            return self.conv(x) * count(self.state)

    def closes_over(state):
        return lambda x: conv(x) * count(state)

    class Owner:
        def __init__(self):
            self.state = made()

        def decode(self, x):
            return conv(x) * count(self.state)

    for network in (lambda: Remembers().eval(), lambda: closes_over(made()), lambda: Owner().decode):
        for splits in (None, 2):
            inferer, split, plain = TSPInferer(splits=splits), network(), network()
            for _ in range(3):
                torch.testing.assert_close(inferer(volume, split), plain(volume))
            assert isinstance(inferer.report.plan, Plan)


@pytest.mark.parametrize(
    "state",
    [
        lambda: np.ones(3),
        Plain,
        lambda: SimpleNamespace(scale=[1.0, {"deep": (2, None)}]),
        lambda: functional.silu,
        lambda: functools.partial(torch.add, alpha=2),
        lambda: logging.getLogger("a network's"),
        lambda: [torch.float32, Path("weights"), torch.device("cpu"), re.compile("x"), nn.ReLU, slice],
        TSPInferer,  # which has its own books
    ],
)
def test_what_only_is_there_does_not_make_slabs(network, volume, state):
    network.state, inferer = state(), TSPInferer()
    inner = network.state if isinstance(network.state, TSPInferer) else lambda x, layer: layer(x)

    def call(x):
        return inner(x, network)

    for function in (network, call):
        torch.testing.assert_close(inferer(volume, function), network(volume))
        assert isinstance(inferer.report.plan, Whole)


def test_a_hook_sees_each_call_once():
    network, seen = nn.Sequential(nn.Conv3d(1, 1, 1)).eval(), []
    network[0].register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape)))
    with torch.no_grad():
        TSPInferer()(torch.randn(1, 1, 8, 8, 8), network)
    assert seen == [(1, 1, 8, 8, 8)]


def test_a_plan_is_not_used_for_other_rows_of_an_interpolation():
    """At both ends and in the middle "nearest" and "nearest-exact" read the same rows of twenty."""

    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.mode = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 3, padding=1), "nearest-exact"

        def forward(self, x):
            y = nn.functional.interpolate(self.first(x), scale_factor=1.5, mode=self.mode)
            return self.last(y)

    network, inferer, volume = Resized().eval(), TSPInferer(splits=30, axis=0), torch.randn(1, 1, 20, 6, 6)
    with torch.no_grad():
        for mode in ("nearest-exact", "nearest"):
            network.mode = mode
            torch.testing.assert_close(inferer(volume, network), network(volume))


def test_threads_leave_monais_classes_as_they_were():
    small = {"num_channels": [8, 8], "num_res_blocks": [1, 1], "norm_num_groups": 4}
    network, volume = Autoencoder(**small).eval(), torch.randn(1, 1, 8, 8, 8)
    forwards = MaisiConvolution.forward, MaisiGroupNorm3D.forward
    inferer = TSPInferer()

    @torch.no_grad()  # which each thread has of its own
    def infer(_):
        return inferer(volume, network)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(infer, range(12)))
    assert (MaisiConvolution.forward, MaisiGroupNorm3D.forward) == forwards
    with torch.no_grad():
        expected = network(volume)
    for one in found:
        torch.testing.assert_close(one, expected)
    outer, inner = plain_maisi_modules(), plain_maisi_modules()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert MaisiConvolution.forward is not forwards[0]  # somebody is inside
    inner.__exit__(None, None, None)
    assert (MaisiConvolution.forward, MaisiGroupNorm3D.forward) == forwards


def test_a_norm_that_torch_refuses_is_refused():
    norm = nn.GroupNorm(2, 4).eval()
    volume = torch.randn(1, 4, 6, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    for call in (norm, lambda x: TSPInferer()(x, norm)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="mixed dtype"):
            call(volume)


def test_a_plan_for_which_memory_ran_out_is_not_tried_again(network, monkeypatch):
    volume, tried = torch.randn(1, 2, 40, 16, 16), []
    execute = run.Execution.run

    def fails_once(self, nodes, tick=None):
        tried.append(self.plan.peak)
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError("no memory left")
        return execute(self, nodes, tick)

    monkeypatch.setattr(run.Execution, "run", fails_once)
    monkeypatch.setattr(run.Call, "_limit", lambda self: 2**40)
    monkeypatch.setitem(run.LIBRARY_BYTES, "cpu", 0)
    inferer = TSPInferer(splits=2)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(inferer(volume, network), network(volume))
    assert len(tried) == 4 and tried[1:] == [tried[1]] * 3


class Sized(nn.Module):
    """Pads and joins as it is told between two convolutions."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 1, 3, padding=1), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def _pads(mode, *widths):
    return lambda y: functional.pad(y, widths, mode=mode)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "between",
    [
        _pads("circular", 2, -1, 2, -1, 2, -1),
        _pads("circular", -1, 3, -1, 3, -1, 3),
        _pads("reflect", 2, -1, 2, -1, 2, -1),
        lambda y: torch.cat([y.half(), y.half(), y], 2) * 3000,
        lambda y: torch.cat([y, y.half(), y.half()], 4) * 3000,
    ],
)
def test_pads_of_both_signs_and_joins_of_several_types(between, axis):
    network, volume = Sized(between).eval(), torch.randn(1, 1, 6, 7, 8)
    expected = network(volume)
    for splits in (1, 2, 5):
        found = TSPInferer(splits=splits, axis=axis)(volume, network)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_plan_is_not_used_for_another_pad():
    inferer, volume = TSPInferer(splits=5, axis=0), torch.randn(1, 1, 2, 4, 4)
    for mode in ("replicate", "constant"):
        network = Sized(None).eval()
        for before in (2, 3, 4):
            network.between = _pads(mode, 0, 0, 0, 0, before, 8 - before)
            torch.testing.assert_close(inferer(volume, network), network(volume))
