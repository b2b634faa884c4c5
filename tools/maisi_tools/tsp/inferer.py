"""TSP as a MONAI inferer; the only file of the package that knows MONAI."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiConvolution, MaisiGroupNorm3D
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from maisi_tools.tsp.opened import mapped
from maisi_tools.tsp.plan import Plan
from maisi_tools.tsp.run import Report, Runner, Settings
from maisi_tools.tsp.whole import Whole


class TSPInferer(Inferer):
    """Runs a network on volumes larger than memory: what the unsplit network computes, slab by slab.

    A drop-in for :class:`monai.inferers.SlidingWindowInferer` without its windows: convolutions see their halo and
    norms the whole volume's statistics, so the result is the unsplit network's to float rounding, whatever the split.
    Where memory allows it and slabs would be no faster, the network runs whole.

    Args:
        splits: slabs for each step of the network; None runs it whole where that fits and is as fast, else plans
            slabs, and where results are kept, from ``memory_limit``. Text is what it says, and an empty one None: a
            row of a form, as MONAI Label's in 3D Slicer.
        axis: 0, 1 or 2, the axis of the volume that is split; None takes the longest.
        memory_limit: what inputs, weights, results and working memory may take together on the device, "12GiB" or
            bytes; None is what the device has free.
        offload: where results go that do not fit: "host" memory, "disk" (a temporary file in ``TMPDIR``), "none", or
            "auto", which is the host for a GPU and the disk for a CPU.
        dtype: float16, bfloat16, float32 or float64, by name or as ``torch.bfloat16``, to compute in; statistics stay
            float32. None keeps the network's.
        devices: the slabs are dealt out to these devices; weights are copied there. None is the input's device.
        progress: show a progress bar.

    Attributes:
        report: what the last call did, whole or in slabs (:class:`maisi_tools.tsp.run.Report`).
    """

    def __init__(
        self,
        splits: int | str | None = None,
        axis: int | None = None,
        memory_limit: str | int | None = None,
        offload: str = "auto",
        dtype: torch.dtype | str | None = None,
        devices: Sequence[str | torch.device] | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(splits, str):
            splits = int(splits) if splits.isdecimal() else splits or None
        settings = Settings(splits, axis, memory_limit, offload, dtype, devices)  # type: ignore[arg-type]
        self.runner = Runner(settings)
        self.progress = progress

    @property
    def settings(self) -> Settings:
        """How calls are split."""
        return self.runner.settings

    @property
    def report(self) -> Report | None:
        """What the last call did."""
        return self.runner.report

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``network(inputs, *args, **kwargs)``; ``network`` is a module or a function such as its ``decode``.

        Tensors among the arguments with as many dimensions as ``inputs`` are split with it.

        Raises:
            TSPError: the network is in training mode, gradients are wanted, or it writes into views.
            MemoryLimitError: the limit cannot be met; raised before anything is computed.
        """
        plain_args, kwargs = tree_map(_plain, ((inputs, *args), kwargs))
        with tqdm(desc="computing slabs", unit="slab", delay=2, disable=not self.progress, leave=False) as bar:

            def tick(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            with plain_maisi_modules():
                result = self.runner.run(network, plain_args, kwargs, tick)
        if isinstance(inputs, MetaTensor):
            return mapped(lambda leaf: _with_meta(leaf, inputs), result)
        return result

    def plan(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan | Whole:
        """Return how the call would be computed, without computing it; ``print`` shows it as a table.

        ``inputs`` and the network may be on the "meta" device, where nothing is allocated.

        Raises:
            TSPError, MemoryLimitError: as the call would.
        """
        plain_args, kwargs = tree_map(_plain, ((inputs, *args), kwargs))
        with plain_maisi_modules():
            return self.runner.plan(network, plain_args, kwargs)


class _PlainModules:
    """MAISI's convolution and group norm as what they compute, as long as anybody is inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.patches = contextlib.ExitStack()

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.patches.enter_context(patch.object(MaisiConvolution, "forward", lambda self, x: self.conv(x)))
                self.patches.enter_context(patch.object(MaisiGroupNorm3D, "forward", nn.GroupNorm.forward))

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.patches.close()


_plain_modules = _PlainModules()


@contextlib.contextmanager
def plain_maisi_modules() -> Iterator[None]:
    """Let MAISI's convolution and group norm be what they compute, without their own splitting, loops and casts.

    Their classes are changed, in all threads; the last one that leaves puts them back.
    """
    _plain_modules.enter()
    try:
        yield
    finally:
        _plain_modules.leave()


def _plain(value: Any) -> Any:
    return value.as_tensor() if isinstance(value, MetaTensor) else value


def _with_meta(value: Any, like: MetaTensor) -> Any:
    return (
        MetaTensor(value, meta=like.meta, applied_operations=like.applied_operations)
        if isinstance(value, Tensor)
        else value
    )
