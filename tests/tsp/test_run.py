"""What TSPInferer refuses, plans, keeps in bounds and reports."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from bounds import check

from maisi_tools.networks import Autoencoder
from maisi_tools.tsp.errors import MemoryLimitError, TSPError
from maisi_tools.tsp.execute import Execution
from maisi_tools.tsp.heap import SlabPool
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.tsp.memory import parse_bytes
from maisi_tools.tsp.moments import BLOCK, moments
from maisi_tools.tsp.run import LIBRARY_BYTES, Call, Settings, run_in_slabs


class Body(nn.Module):
    """A network whose forward is the function given."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.fixture
def volume() -> torch.Tensor:
    return torch.randn(1, 1, 6, 7, 12)


@pytest.fixture
def autoencoder(tiny_autoencoder) -> Autoencoder:
    return tiny_autoencoder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"splits": 0}, "splits is 0; give a whole number from 1 on"),
        ({"splits": True}, "splits is True"),
        ({"splits": "two"}, "splits is 'two'; give a whole number"),
        ({"splits": 1.5}, "splits is 1.5"),
        ({"axis": 3}, "axis is 3; give 0, 1 or 2"),
        ({"offload": "cloud"}, "offload is 'cloud'; allowed are auto, host, disk, none"),
        ({"dtype": "float7"}, "dtype is 'float7'; allowed are float16, bfloat16, float32, float64, or None"),
        *(({"dtype": name}, f"dtype is '{name}'; allowed are float16") for name in "int8 uint8 int32 bool".split()),
        ({"dtype": "complex64"}, "dtype is 'complex64'; allowed"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; allowed"),
        ({"dtype": "nn"}, "dtype is 'nn'; allowed"),
        ({"dtype": torch.int64}, "dtype is torch.int64; allowed"),
        ({"dtype": 16}, "dtype is 16; allowed"),
        ({"devices": "all"}, "devices is 'all'; give a list of devices, or 'ranks'"),
        ({"memory_limit": "much"}, "memory_limit is 'much'; give a size such as 12GiB"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"memory_limit": "-3GB"}, "memory_limit is '-3GB'"),
    ],
)
def test_settings_are_checked_at_the_door(setting, message):
    with pytest.raises(TSPError, match=re.escape(message)):
        TSPInferer(**setting)


@pytest.mark.parametrize(("given", "splits"), [("", None), ("3", 3), (None, None), (2, 2)])
def test_splits_of_a_form_are_text(given, splits):
    assert TSPInferer(splits=given).settings.splits == splits


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("half", torch.float16), ("bfloat16", torch.bfloat16), (torch.float32, torch.float32), ("double", torch.float64)],
)
def test_types_by_name(given, dtype):
    assert TSPInferer(dtype=given).settings.dtype == dtype


@pytest.mark.parametrize(
    ("text", "count"), [("12GiB", 12 * 2**30), ("800 MB", 8 * 10**8), ("1.5k", 1500), (77, 77), (None, None)]
)
def test_sizes_with_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("bad", [torch.randn(3, 3), None, "volume"])
def test_an_input_that_is_no_volume(bad):
    with pytest.raises(TSPError, match="the first input has to be a volume"):
        TSPInferer()(bad, Body(torch.relu).eval())


def test_a_network_in_training_mode(volume):
    with pytest.raises(TSPError, match=r"Body is in training mode; call its eval\(\)"):
        TSPInferer()(volume, Body(torch.relu))
    with pytest.raises(TSPError, match="dropout is active"):
        TSPInferer()(volume, lambda x: nn.functional.dropout(x))


def test_gradients_would_be_lost(volume):
    with torch.enable_grad():
        with pytest.raises(TSPError, match="gradients are wanted, but"):
            TSPInferer()(volume, Body(torch.relu).eval())
        with pytest.raises(TSPError, match="gradients are wanted of an input"):
            TSPInferer()(volume.requires_grad_(), torch.relu)


def _into_a_view(x):
    view = x[:, :1]
    view += 1
    return x


def _under_a_view(x):
    view = x[:, :1]
    x.add_(1)
    return view


@pytest.mark.parametrize("function", [_into_a_view, _under_a_view])
def test_writing_into_shared_memory(volume, function):
    with pytest.raises(TSPError, match="shares its memory with another one"):
        TSPInferer()(volume, Body(function).eval())


def test_results_written_elsewhere(volume):
    with pytest.raises(TSPError, match=r"relu|add\(\.\.\., out=tensor\)"):
        TSPInferer()(volume, Body(lambda x: torch.add(x, 1, out=torch.empty(()))).eval())


def test_a_view_alone_may_be_written_into(volume):
    check(Body(lambda x: (x * 2)[:, :1].add_(3)).eval(), (volume,), splits=3)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_flop_and_peak_of_one_convolution():
    conv = nn.Conv3d(3, 5, 3, padding=1, device="meta").eval()
    plan = TSPInferer(splits=1).plan(torch.empty(1, 3, 10, 20, 30, device="meta"), conv)
    assert plan.flop == 2 * 27 * 3 * 5 * 10 * 20 * 30
    held = 4 * (3 * 6000 + 5 * 3 * 27 + 5) + LIBRARY_BYTES["cpu"]  # input, weight and bias, float32
    assert plan.base == held
    assert held + 4 * 5 * 6000 <= plan.peak <= held + 4 * 5 * 6000 * 4  # the result, and a slab with its working copies


def test_planning_computes_nothing_and_needs_no_values():
    with torch.device("meta"):
        network = Body(lambda x: nn.functional.instance_norm(x).relu()).eval()
    plan = TSPInferer(splits=4).plan(torch.empty(1, 1, 8, 8, 64, device="meta"), network)
    assert "convolution 1x2x8x8x64" in str(plan) and "peak on the device" in str(plan)
    assert [len(done.steps) for done in plan.passes] == [4, 4]
    with pytest.raises(TSPError, match="asks for values of its input"):
        TSPInferer().plan(torch.empty(1, 1, 8, 8, 8), Body(lambda x: x if x.sum() > 0 else -x).eval())


def test_a_lower_limit_makes_a_leaner_plan_of_the_same_computation(autoencoder):
    z = torch.randn(1, 4, 12, 12, 16)
    whole = autoencoder.decode(z)
    free = Call(Settings(memory_limit=2**40), autoencoder.decode, (z,), {}).make_plan()
    peaks = []
    for percent in (100, 70, 40, 25):
        limit = free.base + percent * (free.peak - free.base) // 100
        inferer = TSPInferer(memory_limit=limit)
        found = inferer(z, autoencoder.decode)
        assert (found - whole).abs().max() < 2e-5
        peaks.append(inferer.report.plan.peak)
        assert peaks[-1] <= limit
    assert sorted(peaks, reverse=True) == peaks and len(set(peaks)) == 4
    assert inferer.report.plan.moved[0] > 0 and "on the disk" in str(inferer.report)


def test_a_limit_that_cannot_be_met_is_refused_before_computing(autoencoder, monkeypatch):
    z = torch.randn(1, 4, 8, 8, 8)
    started = []
    run = Execution.run
    monkeypatch.setattr(Execution, "run", lambda self, *args: started.append(1) or run(self, *args))
    with pytest.raises(MemoryLimitError, match="cannot be met; the least that would do is") as refusal:
        TSPInferer(memory_limit="100kB")(z, autoencoder.decode)
    assert not started
    number, unit = re.search(r"least that would do is ([\d.]+) (\w+)", str(refusal.value)).groups()
    least = (float(number) + 0.1) * {"KiB": 2**10, "MiB": 2**20}[unit]  # as printed, rounded up
    assert TSPInferer(memory_limit=int(least))(z, autoencoder.decode).shape == (1, 1, 32, 32, 32)
    assert started


def test_offloading_changes_no_bit(autoencoder):
    z = torch.randn(1, 4, 9, 8, 7)
    results = {}
    for offload in ("none", "disk"):
        call = Call(Settings(splits=6, memory_limit=2**40, offload=offload), autoencoder.decode, (z,), {})
        plan = call.make_plan()
        if offload == "disk":
            kept = {node: 1.0 for node in plan.graph.kept if node.axis is not None}
            plan = type(plan)(plan.graph, plan.base, plan.slab_bytes, 6, kept, "disk")
            assert plan.moved[0] > 0
        results[offload] = Execution(plan, [torch.device("cpu")]).run(call.outputs)[0]
    assert torch.equal(results["none"], results["disk"])


def test_what_is_held_is_what_was_planned(autoencoder):
    """After every step the rows kept are those the plan counts, and slabs are freed as soon as nothing reads them."""
    z = torch.randn(1, 4, 8, 8, 12)
    call = Call(Settings(splits=5, axis=2, memory_limit=2**40), autoencoder.decode, (z,), {})
    plan = call.make_plan()
    alive, expected, seen = {}, [], []
    for done in plan.passes:
        for step in done.steps:
            for target, rows in zip(done.targets, step.rows, strict=True):
                if plan.where[target] == "device" and done.keep:
                    alive[target, rows] = (rows[1] - rows[0]) * target.row_bytes
            for freed in step.free:
                del alive[freed]
            expected.append(sum(alive.values()))
    execution = Execution(plan, [torch.device("cpu")])

    def tick(done: int, total: int) -> None:
        stores = {node: store for node, store in execution.stores.items() if plan.where[node] == "device"}
        slabs = [slab for store in stores.values() for slab in store.slabs.values()]
        assert all(slab.untyped_storage().nbytes() == slab.nbytes for slab in slabs)
        seen.append(sum(slab.nbytes for slab in slabs))

    execution.run(call.outputs, tick)
    assert seen == expected and seen[-1] == 0 and max(seen) > 0


# --- runs -------------------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_exact_as_the_unsplit_network_in_bfloat16(autoencoder):
    z = torch.randn(1, 4, 8, 10, 6)
    exact = Autoencoder.decode(autoencoder.double(), z.double())
    autoencoder.float()
    unsplit = autoencoder.bfloat16().decode(z.bfloat16()).float()
    autoencoder.float()
    own = (unsplit - exact).abs().max()
    for settings in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
        found = TSPInferer(splits=4, **settings)(z, autoencoder.decode)
        assert found.dtype == torch.float32 and 1e-4 < (found - exact).abs().max() <= 2 * own
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = TSPInferer(splits=4)(z, autoencoder.decode)
    assert torch.equal(cast, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_conditions_beside_the_volume_are_computed_in_the_same_type(dtype):
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embed = nn.Conv3d(2, 3, 3, padding=1), nn.Linear(5, 3)

        def forward(self, x, condition):
            return self.conv(x) + self.embed(condition.to(x.dtype))[:, :, None, None, None]

    network, x, condition = Conditioned().eval(), torch.randn(1, 2, 9, 5, 6), torch.randn(1, 5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = TSPInferer(splits=3, dtype=dtype)(x, network, condition)
        apart = (found - network(x, condition)).abs().max()
    assert found.dtype == torch.float32 and apart < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_several_devices_in_one_process(autoencoder):
    z = torch.randn(1, 4, 8, 10, 6)
    found = TSPInferer(splits=5, devices=["cpu", "cpu", "cpu"])(z, autoencoder.decode)
    assert (found - autoencoder.decode(z)).abs().max() < 2e-5


def test_metadata_is_carried_over(autoencoder):
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    image = MetaTensor(torch.rand(1, 1, 16, 16, 16), affine=affine, meta={"filename_or_obj": "ct.nii.gz"})
    found = TSPInferer(splits=2)(image, autoencoder)
    assert isinstance(found, MetaTensor) and found.meta["filename_or_obj"] == "ct.nii.gz"
    assert torch.equal(found.affine, affine.to(found.affine))
    assert not isinstance(TSPInferer()(image.as_tensor(), autoencoder), MetaTensor)


def test_what_can_be_called_can_be_run(autoencoder):
    z = torch.randn(1, 4, 4, 6, 8)
    wanted = autoencoder.decode(z)
    for function in (
        autoencoder.decode,
        lambda x: autoencoder.decode(x),
        functools.partial(autoencoder.decode),
        functools.partial(Autoencoder.decode, autoencoder),
    ):
        if isinstance(function, functools.partial) and function.args:
            function = functools.partial(lambda network, x: network.decode(x), autoencoder)
        assert (TSPInferer(splits=3)(z, function) - wanted).abs().max() < 1e-5
    assert (run_in_slabs(autoencoder.decode, z, settings=Settings(splits=3)) - wanted).abs().max() < 1e-5


def test_operations_without_a_rule_are_named_in_the_report(volume):
    inferer = TSPInferer(splits=3, axis=2)
    network = Body(lambda x: x.cumsum(-1).relu() + x.cumsum(-1)).eval()
    assert torch.allclose(inferer(volume, network), network(volume), atol=1e-5)
    assert inferer.report.gathered == {"cumsum": 2}
    assert "without a rule, run on the gathered tensor: cumsum (2x)" in str(inferer.report)
    inferer(volume, Body(torch.relu).eval())
    assert inferer.report.gathered == {}


def test_a_second_call_reads_the_weights_anew(volume):
    network = Body(torch.relu).eval()
    inferer = TSPInferer(splits=2)
    first = inferer(volume, network)
    network.conv.weight.mul_(2)
    assert not torch.equal(inferer(volume, network), first)
    assert torch.allclose(inferer(volume, network), network(volume), atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_moments_of_blocks_are_those_of_the_slab(monkeypatch, channels_last):
    """Also where the values drift through the slab, far from the first block's mean."""
    slab = torch.randn(2, 3, 40, 9, 7, generator=torch.Generator().manual_seed(0))
    slab += torch.linspace(0, 1000, 40).reshape(-1, 1, 1)
    if channels_last:
        slab = slab.contiguous(memory_format=torch.channels_last_3d)
    exact = slab.double().flatten(2)
    for block in (1, 500, slab.numel()):
        monkeypatch.setitem(BLOCK, "cpu", block)
        found = moments(slab)
        assert found.count == 40 * 9 * 7
        assert torch.allclose(found.mean, exact.mean(-1), rtol=1e-6)
        assert torch.allclose(found.m2, exact.var(-1, correction=0) * found.count, rtol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_slab_gets_a_mapping_that_nothing_else_uses(channels_last):
    pool = SlabPool()
    slab = torch.randn(1, 4, 33, 64, 64, generator=torch.Generator().manual_seed(0))
    if channels_last:
        slab = slab.to(torch.bfloat16, memory_format=torch.channels_last_3d)
    first = pool.store(slab)
    assert torch.equal(first, slab) and first.stride() == slab.stride() and first.data_ptr() != slab.data_ptr()
    place, view, seen = first.data_ptr(), first[:, 1:2], slab[:, 1:2].clone()
    del first
    second = pool.store(slab + 1)  # the view still holds the first one's
    assert torch.equal(view, seen) and torch.equal(second, slab + 1)
    del view
    third = pool.store(slab[:, :, 1:])  # one row less, and a part of a larger tensor
    assert third.data_ptr() == place and torch.equal(third, slab[:, :, 1:]) and torch.equal(second, slab + 1)
    assert third.untyped_storage().nbytes() == third.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries' heaps are left as they are")
@pytest.mark.parametrize(("slab", "each"), [(24, 12), (2, 1.5), (0.1, 1.5)])  # MiB
def test_under_a_limit_temporaries_leave_no_holes(slab, each):
    """In a process of its own: blocks freed between blocks that stay go back to the system."""
    program = f"""
import torch
from maisi_tools.tsp.heap import MMAP_THRESHOLD, set_heap
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def given_back():
    blocks = [torch.ones(int({each} * 2**18)) for _ in range(64)]
    before = held()
    del blocks[::2]
    return before - held()
set_heap(int({slab} * 2**20) // 2)
lean = given_back()
set_heap(MMAP_THRESHOLD)
print(lean, given_back())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lean, fast = map(int, found.stdout.split())
    freed = 32 * each * 2**20
    assert lean > 0.9 * freed and fast < 0.1 * freed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mappings_not_in_use_are_given_back_before_others_are_made():
    """In a process of its own, for other things than slabs come and go in this one."""
    program = """
import torch
from maisi_tools.tsp.heap import SlabPool
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
pool, large, small = SlabPool(), torch.ones(2**20), torch.ones(2**19)  # 4 MiB and 2 MiB
pool.store(large)
before = held()
slabs = [pool.store(large) for _ in range(32)]
most = held()
del slabs
slabs = [pool.store(small) for _ in range(64)]
again = held()
pool.close()
del slabs
print(most - before, again - before, held() - before)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    most, again, rest = map(int, found.stdout.split())
    whole = 31 * 4 * 2**20
    assert 0.9 * whole < most < 1.1 * whole and 0.9 * whole < again < 1.1 * whole and rest < 0.1 * whole


def test_under_a_limit_what_is_cheap_to_compute_from_the_input_is_computed_again(autoencoder):
    """The encoder's first convolution, at the image's full size."""
    image = torch.rand(1, 1, 24, 24, 32)
    whole = autoencoder.encode(image)[0]

    def kept(plan):
        return [target.shape for done in plan.passes if done.keep for target in done.targets]

    free = Call(Settings(memory_limit=2**40), autoencoder.encode, (image,), {}).make_plan()
    limit = free.base + (free.peak - free.base) * 3 // 4
    call = Call(Settings(memory_limit=limit), autoencoder.encode, (image,), {})
    assert (call.run()[0] - whole).abs().max() < 2e-5
    leaner = call.plan
    assert len(kept(leaner)) == len(kept(free)) - 1 and kept(leaner) == kept(free)[1:]
    assert free.flop < leaner.flop < 1.1 * free.flop
