"""TSP on each device: against the plain network, in half precision, under a limit, and when memory runs out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bounds import check

from maisi_tools.tsp.execute import Execution
from maisi_tools.tsp.inferer import TSPInferer

HALF = {"cpu": torch.bfloat16, "cuda": torch.float16}
"""What inference takes where it is fast."""

EDGE = {"cpu": 24, "cuda": 40}
"""Latent voxels along an edge: on a GPU so many that its allocator's blocks of 20 MB are small beside them."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_slabs_are_the_plain_network(device, tiny_autoencoder):
    network = tiny_autoencoder.to(device)
    z, image = torch.randn(1, 4, 9, 8, 7, device=device), torch.rand(1, 1, 28, 24, 36, device=device)
    check(network, (z,), lambda network: network.decode, splits=4)
    check(network, (image,), lambda network: network.encode, splits=4)
    check(network, (z,), lambda network: network.decode)


def test_unet_and_controlnet_are_the_plain_ones(device, tiny_controlled):
    mask = torch.randint(0, 133, (1, 1, 24, 32, 16), device=device).float()
    latent, timestep = torch.randn(1, 4, 6, 8, 4, device=device), torch.tensor([500.0], device=device)
    check(tiny_controlled.to(device), (mask, latent, timestep), splits=3)


@pytest.mark.parametrize("splits", [None, 4])
def test_half_precision_is_as_exact_as_the_plain_network_in_it(device, tiny_autoencoder, splits):
    z = torch.randn(1, 4, 8, 10, 6, device=device)
    network = tiny_autoencoder.to(device)
    exact = network.double().decode(z.double())
    own = (network.to(HALF[device]).decode(z.to(HALF[device])) - exact).abs().max()
    network.float()
    found = TSPInferer(splits, dtype=HALF[device])(z, network.decode)
    assert found.dtype == torch.float32 and (found - exact).abs().max() <= 2 * own
    with torch.autocast(device, HALF[device]):
        cast = TSPInferer(splits)(z, network.decode)
    assert (cast - exact).abs().max() <= 2 * own


def test_what_does_not_fit_is_kept_elsewhere_and_the_limit_is_held(device, tiny_autoencoder):
    network, z = tiny_autoencoder.to(device), torch.randn(1, 4, EDGE[device], 12, 16, device=device)
    whole = network.decode(z)
    free = TSPInferer(memory_limit=2**40, splits=8).plan(z, network.decode)
    limit = free.base + (free.peak - free.base) // 3
    inferer = TSPInferer(memory_limit=limit)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - free.base
    found = inferer(z, network.decode)
    assert (found - whole).abs().max() < 2e-5
    plan = inferer.report.plan
    assert plan.peak <= limit and plan.moved[0] > 0 and plan.moved[1] > 0
    assert {"cpu": "disk", "cuda": "host"}[device] in plan.where.values()
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() - others <= limit


@contextlib.contextmanager
def little_memory(device: str, size: int) -> Iterator[None]:
    """Let the device have no more than ``size`` bytes; a CPU's memory runs out once."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
        else:
            run, runs = Execution.run, []

            def run_out(self: Execution, *args):
                runs.append(args)
                if len(runs) == 1:
                    raise torch.cuda.OutOfMemoryError("no memory left")
                return run(self, *args)

            patch.setattr(Execution, "run", run_out)
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_is_planned_again(device, tiny_autoencoder):
    network, z = tiny_autoencoder.to(device), torch.randn(1, 4, *(EDGE[device],) * 3, device=device)
    whole = network.decode(z).cpu()
    inferer = TSPInferer(splits=2)
    peak = inferer.plan(z, network.decode).peak
    with little_memory(device, peak * 3 // 10):
        found = inferer(z, network.decode)
    assert (found.cpu() - whole).abs().max() < 2e-5
    first, *_ = inferer.report.attempts
    assert "the device ran out of memory in a plan for" in first
    assert inferer.report.plan.peak <= peak // 2
    assert (inferer(z, network.decode).cpu() - whole).abs().max() < 2e-5 and not inferer.report.attempts
