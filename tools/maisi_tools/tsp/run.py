"""The functional form: run or plan one call of a network in slabs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.execute import Execution, Tick
from maisi_tools.tsp.nodes import Node, given
from maisi_tools.tsp.plan import Plan, format_bytes, make_plan
from maisi_tools.tsp.ranks import Ranks, Shard
from maisi_tools.tsp.volume import Recorder, Volume

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

OFFLOADS = ("auto", "host", "disk", "none")

LIBRARY_BYTES = {"cpu": 48 * 2**20}
"""What the convolution library keeps beside the slabs: up to 42 MB were measured on two cores (benchmarks)."""

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
    devices: Sequence[str | torch.device] | str | None = None
    gather: bool = True

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
        if isinstance(self.devices, str) and self.devices != "ranks":
            raise TSPError(f"devices is {self.devices!r}; give a list of devices, or 'ranks'")
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
        self.ranks = Ranks() if settings.devices == "ranks" else None
        leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
        if self.ranks is not None and self.ranks.any(leaves[0] is None):
            leaves, spec = _from_first_rank(self.ranks, leaves, spec)
        first = next((leaf for leaf in leaves if isinstance(leaf, (Tensor, _Elsewhere))), None)
        if first is None or len(first.shape) < 3:
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
        self.device = first.device if isinstance(first, Tensor) else _device_of(network)
        listed = [] if self.ranks is not None else [torch.device(d) for d in settings.devices or ()]
        self.devices = listed or [self.device]
        self.dtype = settings.dtype
        # Tensors on "meta" stand for those of a real device: the one named, or the one there is.
        there = "cuda" if torch.cuda.is_available() else "cpu"
        self.kind = self.devices[0].type if self.devices[0].type != "meta" else there
        if self.dtype is None and torch.is_autocast_enabled(self.kind):
            self.dtype = torch.get_autocast_dtype(self.kind)
        self.result_dtype = first.dtype if first.dtype.is_floating_point else torch.get_default_dtype()
        self.attempts: list[str] = []
        self.plan: Plan | None = None
        self.base = _bytes([leaf for leaf in leaves if isinstance(leaf, Tensor)], self.device)
        self.base += _bytes([p for module in modules_of(network) for p in module.parameters()], self.device)
        self.base += LIBRARY_BYTES.get(self.kind, 0)
        self.recorder = Recorder(axis + 2, len(first.shape), self.device, self._execute, self.dtype)
        self.given: dict[Node, Tensor] = {}
        wrapped = [
            Volume(self._source(leaf, axis + 2), self.recorder)
            if isinstance(leaf, (Tensor, _Elsewhere)) and len(leaf.shape) == len(first.shape)
            else leaf
            for leaf in leaves
        ]
        arguments, keywords = tree_unflatten(wrapped, spec)
        # What has no volume in it is computed right here, by layers whose weights are still in the network's own type.
        half = self.dtype in (torch.float16, torch.bfloat16)
        here = self.kind if self.kind == there else "cpu"
        with torch.autocast(here, self.dtype, enabled=half) if self.dtype else contextlib.nullcontext():
            results, self.form = tree_flatten(network(*arguments, **keywords))
        self.results = results
        self.outputs = [leaf.node for leaf in results if isinstance(leaf, Volume)]

    def _source(self, leaf: Tensor | _Elsewhere, axis: int) -> Node:
        if isinstance(leaf, Tensor):
            return self.recorder.source(leaf, axis)
        dtype = self.recorder.kept(leaf.dtype, leaf.dtype)
        node = given(leaf.shape, dtype, axis)
        if leaf.tensor is not None:
            self.given[node] = leaf.tensor.detach().to(dtype)
        return node

    def make_plan(self, limit: int | None = None) -> Plan:
        """Return the plan of what is to be computed under the settings' limit, or under ``limit``."""
        return self._make_plan(self.outputs, limit)

    def run(self, tick: Tick | None = None) -> Any:
        """Compute and return what the network returned."""
        with torch.no_grad():
            values = iter(self._execute(self.outputs, tick, self.settings.gather))
        leaves = []
        for leaf in self.results:
            if isinstance(leaf, Volume):
                value = next(values)
                leaf = self._returned(value)
            leaves.append(leaf)
        return tree_unflatten(leaves, self.form)

    def _returned(self, value: Any) -> Any:
        tensor = value.tensor if isinstance(value, Shard) else value
        if self.settings.dtype and tensor.is_floating_point():
            tensor = tensor.to(self.result_dtype)
        return replace(value, tensor=tensor) if isinstance(value, Shard) else tensor

    def report(self) -> Report:
        """What the run did, or a planned one would do."""
        assert self.plan is not None
        return Report(self.plan, dict(self.recorder.gathered), list(self.attempts))

    def _execute(self, nodes: Sequence[Node], tick: Tick | None = None, gather: bool = True) -> list[Any]:
        if self.dry or self.device.type == "meta":
            raise TSPError(
                "the network asks for values of its input while it runs, so it cannot be planned without them"
            )
        limit = None
        while True:
            self.plan = self._make_plan(nodes, limit)
            try:
                lean = self.settings.memory_limit is not None
                execution = Execution(self.plan, self.devices, self.ranks, self.given, gather, lean)
                return execution.run(nodes, tick)
            except torch.cuda.OutOfMemoryError as error:
                if self.ranks is not None:
                    raise TSPError("a rank ran out of memory; start more ranks, or give a memory_limit") from error
                limit = self.plan.peak // 2
                self.attempts.append(
                    f"the device ran out of memory in a plan for {format_bytes(self.plan.peak)}; "
                    f"planned again for {format_bytes(limit)}"
                )
            del execution
            torch.cuda.empty_cache()

    def _make_plan(self, nodes: Sequence[Node], limit: int | None) -> Plan:
        """Plan for ``limit``, which overrides the settings' number of splits, or as the settings say."""
        splits = self.settings.splits if limit is None else None
        limit = limit or parse_bytes(self.settings.memory_limit) or self._free()
        rank, ranks = 0, 1
        if self.ranks is not None:
            rank, ranks = self.ranks.rank, self.ranks.count
            limit = self.ranks.least(limit, self.device)
        return make_plan(
            nodes, self.kind, self.base, splits, limit, self.settings.offload, rank, ranks, len(self.devices)
        )

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
    sizes = {t.untyped_storage()._cdata: t.nbytes for t in tensors if t.device == device}  # shared ones count once
    return sum(sizes.values())


@dataclass(frozen=True)
class _Elsewhere:
    """A volume that only rank 0 was given: its shape and type, and on rank 0 the tensor itself."""

    shape: torch.Size
    dtype: torch.dtype
    tensor: Tensor | None


def _from_first_rank(ranks: Ranks, leaves: list[Any], spec: Any) -> tuple[list[Any], Any]:
    """The arguments that rank 0 was given: small tensors are copied to all ranks, volumes are not."""
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    told = [
        _Elsewhere(leaf.shape, leaf.dtype, None)
        if first is not None and isinstance(leaf, Tensor) and leaf.ndim == first.ndim
        else leaf.cpu()
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in leaves
    ]
    told, spec = ranks.from_first((told, spec))
    if ranks.rank == 0:
        return [
            replace(t, tensor=own) if isinstance(t, _Elsewhere) else own for t, own in zip(told, leaves, strict=True)
        ], spec
    return told, spec


def _device_of(network: Callable[..., Any]) -> torch.device:
    """Where the network's weights are."""
    return next((p.device for module in modules_of(network) for p in module.parameters()), torch.device("cpu"))


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
