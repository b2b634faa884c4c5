"""The functional form: run or plan one call of a network in slabs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.execute import Execution, Tick
from maisi_tools.tsp.nodes import Node
from maisi_tools.tsp.plan import Plan, format_bytes, make_plan
from maisi_tools.tsp.volume import Recorder, Volume

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

OFFLOADS = ("auto", "host", "disk", "none")

HEADROOM = 0.9
"""How much of a device's free memory is planned with; the rest is for the convolution library and fragmentation."""


@dataclass
class Settings:
    """How a call is split; see :class:`maisi_tools.tsp.TSPInferer`."""

    splits: int | None = None
    axis: int | None = None
    memory_limit: str | int | None = None
    offload: str = "auto"
    dtype: torch.dtype | None = None
    devices: Sequence[str | torch.device] | None = None

    def __post_init__(self) -> None:
        if self.splits is not None and (isinstance(self.splits, bool) or int(self.splits) < 1):
            raise TSPError(f"splits is {self.splits!r}; give a whole number from 1 on, or None to have it planned")
        if self.axis is not None and self.axis not in (0, 1, 2):
            raise TSPError(f"axis is {self.axis!r}; give 0, 1 or 2 (x, y, z), or None for the longest")
        if self.offload not in OFFLOADS:
            raise TSPError(f"offload is {self.offload!r}; allowed are {', '.join(OFFLOADS)}")
        if isinstance(self.dtype, str):
            named = getattr(torch, self.dtype, None)
            if not isinstance(named, torch.dtype):
                raise TSPError(f"dtype is {self.dtype!r}; give a torch type, such as bfloat16")
            self.dtype = named
        parse_bytes(self.memory_limit)


@dataclass
class Report:
    """What a run did.

    Attributes:
        plan: the plan it followed.
        gathered: operations without a rule -> how often one ran on a gathered tensor.
        attempts: one line for each plan given up because the device ran out of memory.
    """

    plan: Plan
    gathered: dict[str, int] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(self.plan)]
        if self.gathered:
            named = ", ".join(f"{name} ({count}x)" for name, count in self.gathered.items())
            lines.append(f"without a rule, run on the gathered tensor: {named}")
        return "\n".join(lines + self.attempts)


def parse_bytes(size: str | int | None) -> int | None:
    """Return a number of bytes given as such or as text with a unit, as "12GiB" or "800 MB".

    Raises:
        TSPError: it is neither.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?)b?\s*", str(size), re.IGNORECASE)
    try:
        count = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    except (ValueError, KeyError):
        count = 0
    if count <= 0:
        raise TSPError(f"memory_limit is {size!r}; give a size such as 12GiB or 800MB, or None for what is free")
    return count


class Call:
    """One call of a network, recorded.

    Raises:
        TSPError: the call cannot be split: no volume among the inputs, training mode, or gradients wanted.
    """

    def __init__(
        self, settings: Settings, network: Callable[..., Any], args: Any, kwargs: Any, dry: bool = False
    ) -> None:
        self.settings = settings
        self.dry = dry
        for module in modules_of(network):
            if module.training:
                raise TSPError(
                    f"{type(module).__name__} is in training mode; call its eval() before it is run in slabs"
                )
        leaves, spec = tree_flatten((args, kwargs))
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if first is None or first.ndim < 3:
            given = "no tensor" if first is None else f"a tensor of shape {tuple(first.shape)}"
            raise TSPError(
                f"the first input has to be a volume (batch, channels, and 1 to 3 dimensions); given is {given}"
            )
        if torch.is_grad_enabled() and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise TSPError(
                "gradients are wanted of an input, but a network is run in slabs without; use torch.no_grad()"
            )
        spatial = list(first.shape[2:])
        axis = spatial.index(max(spatial)) if settings.axis is None else settings.axis
        if axis >= len(spatial):
            raise TSPError(f"axis {axis} of a volume with {len(spatial)} spatial dimensions; give one below that")
        self.device = first.device
        self.devices = [torch.device(d) for d in settings.devices or (first.device,)]
        self.dtype = settings.dtype
        if self.dtype is None and torch.is_autocast_enabled(first.device.type):
            self.dtype = torch.get_autocast_dtype(first.device.type)
        self.first = first
        self.attempts: list[str] = []
        self.plan: Plan | None = None
        self.base = _bytes([leaf for leaf in leaves if isinstance(leaf, Tensor)], self.device)
        self.base += _bytes([p for module in modules_of(network) for p in module.parameters()], self.device)
        self.recorder = Recorder(axis + 2, first.device, self._execute, self.dtype)
        wrapped = [
            Volume(self.recorder.source(leaf, axis + 2), self.recorder)
            if isinstance(leaf, Tensor) and leaf.ndim == first.ndim
            else leaf
            for leaf in leaves
        ]
        arguments, keywords = tree_unflatten(wrapped, spec)
        with torch.autocast(first.device.type, enabled=False) if self.dtype else _nothing():
            results, self.form = tree_flatten(network(*arguments, **keywords))
        self.results = results
        self.outputs = [leaf.node for leaf in results if isinstance(leaf, Volume)]

    def make_plan(self, limit: int | None = None) -> Plan:
        """Return the plan of what is to be computed under the settings' limit, or under ``limit``."""
        limit = limit or parse_bytes(self.settings.memory_limit) or self._free()
        return make_plan(self.outputs, self.device.type, self.base, self.settings.splits, limit, self.settings.offload)

    def run(self, tick: Tick | None = None) -> Any:
        """Compute and return what the network returned."""
        with torch.no_grad():
            values = iter(self._execute(self.outputs, tick))
        floating = self.first.dtype if self.first.is_floating_point() else torch.get_default_dtype()
        leaves = []
        for leaf in self.results:
            if isinstance(leaf, Volume):
                value = next(values)
                leaf = value.to(floating) if self.settings.dtype and value.is_floating_point() else value
            leaves.append(leaf)
        return tree_unflatten(leaves, self.form)

    def report(self) -> Report:
        """What the run did, or a planned one would do."""
        assert self.plan is not None
        return Report(self.plan, dict(self.recorder.gathered), list(self.attempts))

    def _execute(self, nodes: Sequence[Node], tick: Tick | None = None) -> list[Any]:
        if self.dry or self.device.type == "meta":
            raise TSPError(
                "the network asks for values of its input while it runs, so it cannot be planned without them"
            )
        limit = None
        while True:
            self.plan = make_plan(
                nodes,
                self.device.type,
                self.base,
                self.settings.splits if limit is None else None,
                limit or parse_bytes(self.settings.memory_limit) or self._free(),
                self.settings.offload,
            )
            try:
                return Execution(self.plan, self.devices).run(nodes, tick)
            except torch.cuda.OutOfMemoryError:
                limit = self.plan.peak // 2
                self.attempts.append(
                    f"the device ran out of memory in a plan for {format_bytes(self.plan.peak)}; "
                    f"planned again for {format_bytes(limit)}"
                )
            torch.cuda.empty_cache()

    def _free(self) -> int | None:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return self.base + int(HEADROOM * (free + held))
        available = _available_host_memory()
        return None if self.device.type != "cpu" or available is None else self.base + int(HEADROOM * available)


def run_in_slabs(
    network: Callable[..., Any], *args: Any, settings: Settings | None = None, tick: Tick | None = None, **kwargs: Any
) -> Any:
    """Return ``network(*args, **kwargs)``, computed slab by slab.

    Args:
        network: a module in evaluation mode, or any function of tensors. The first tensor among its arguments is the
            volume (B, C, ...) that is split; tensors with as many dimensions are split with it.
        settings: how.
        tick: called after every step with (steps done, steps in all).

    Raises:
        TSPError: the call cannot be split, or the memory limit cannot be met (:class:`MemoryLimitError`).
    """
    return Call(settings or Settings(), network, args, kwargs).run(tick)


def modules_of(network: Callable[..., Any]) -> list[nn.Module]:
    """The modules behind a callable: itself, what it is bound to, or what it closes over."""
    if isinstance(network, nn.Module):
        return [network]
    inner = getattr(network, "func", None)  # of functools.partial
    if inner is not None:
        return modules_of(inner)
    owner = getattr(network, "__self__", None)
    cells = [cell.cell_contents for cell in getattr(network, "__closure__", None) or ()]
    return [value for value in [owner, *cells] if isinstance(value, nn.Module)]


def _bytes(tensors: Sequence[Tensor], device: torch.device) -> int:
    sizes = {id(t.untyped_storage()._cdata): t.nbytes for t in tensors if t.device == device}
    return sum(sizes.values())


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def _available_host_memory() -> int | None:
    """What the kernel says can be had without swapping, within the container's limit; None where it does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        room = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit, or no such group
        return available
    return min(available, room)
