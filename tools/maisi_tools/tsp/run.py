"""The functional form: run or plan one call of a network in slabs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.execute import Execution, Tick
from maisi_tools.tsp.memory import free_bytes, parse_bytes
from maisi_tools.tsp.nodes import Node, given, is_arranged, place_of, storage_of
from maisi_tools.tsp.opened import mapped
from maisi_tools.tsp.plan import Plan, format_bytes, make_plan, order_of
from maisi_tools.tsp.plans import Plans
from maisi_tools.tsp.ranks import Ranks, Shard
from maisi_tools.tsp.shadow import Memory, Shadow
from maisi_tools.tsp.state import Bookkeeping, State, modules_of
from maisi_tools.tsp.volume import Recorder, Volume
from maisi_tools.tsp.whole import Whole, run_whole, whole_of

OFFLOADS = ("auto", "host", "disk", "none")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LIBRARY_BYTES = {"cpu": 48 * 2**20}
"""What the convolution library keeps beside the slabs: up to 42 MB were measured on two cores (benchmarks)."""


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
        whole = isinstance(self.splits, Integral) and not isinstance(self.splits, bool)
        if self.splits is not None and not (whole and self.splits >= 1):
            raise TSPError(f"splits is {self.splits!r}; give a whole number from 1 on, or None to have it planned")
        if self.axis is not None and self.axis not in (0, 1, 2):
            raise TSPError(f"axis is {self.axis!r}; give 0, 1 or 2 (x, y, z), or None for the longest")
        if self.offload not in OFFLOADS:
            raise TSPError(f"offload is {self.offload!r}; allowed are {', '.join(OFFLOADS)}")
        named = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if named is None and self.dtype is not None or named not in (None, *DTYPES):
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TSPError(f"dtype is {self.dtype!r}; allowed are {allowed}, or None for the network's own")
        self.dtype = named
        if isinstance(self.devices, str) and self.devices != "ranks":
            raise TSPError(f"devices is {self.devices!r}; give a list of devices, or 'ranks'")
        parse_bytes(self.memory_limit)


@dataclass
class Report:
    """What a run did.

    Attributes:
        plan: the plan it followed, or :class:`~maisi_tools.tsp.whole.Whole` where the network ran unsplit.
        gathered: operations without a rule -> how often one ran on a gathered tensor.
        attempts: one line for each plan given up because the device ran out of memory.
    """

    plan: Plan | Whole
    gathered: dict[str, int] = field(default_factory=dict)
    attempts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(self.plan)]
        if self.gathered:
            named = ", ".join(f"{name} ({count}x)" for name, count in self.gathered.items())
            lines.append(f"without a rule, run on the gathered tensor: {named}")
        return "\n".join(lines + self.attempts)


class Call:
    """One call of a network, recorded.

    Args:
        plans: those of earlier calls, which are used again.
        known: that it does not run whole is known already.

    Raises:
        TSPError: the call cannot be split: no volume among the inputs, training mode, or gradients wanted.
    """

    def __init__(
        self,
        settings: Settings,
        network: Callable[..., Any],
        args: Any,
        kwargs: Any,
        dry: bool = False,
        plans: Plans | None = None,
        known: bool = False,
    ) -> None:
        self.settings = settings
        self.dry = dry
        self.plans = plans or Plans()
        modules = modules_of(network)
        for module in modules:
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
        self.result_dtype = first.dtype if first.dtype.is_floating_point else torch.get_default_dtype()
        self.attempts: list[str] = []
        self.plan: Plan | None = None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        tensors += [part for module in modules for part in (*module.parameters(), *module.buffers())]
        self._weigh(tensors)
        self.floating = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        self.recorder = Recorder(axis + 2, len(first.shape), self.device, self.kind, self._execute, self.dtype)
        self.given: dict[Node, Tensor] = {}
        self.inputs: dict[int, tuple[Any, Volume, Node]] = {}
        """Volumes among the arguments, by identity: tensor, handle, and the node that stands for its own values."""
        for leaf in leaves:
            if isinstance(leaf, (Tensor, _Elsewhere)) and len(leaf.shape) == len(first.shape):
                if id(leaf) not in self.inputs:
                    node = self._source(leaf, axis + 2)
                    self.inputs[id(leaf)] = leaf, self.recorder.handle(node, self._shadow(leaf)), node
        wrapped = [self.inputs[id(leaf)][1] if id(leaf) in self.inputs else leaf for leaf in leaves]
        arguments, keywords = tree_unflatten(wrapped, spec)
        # What has no volume in it is computed right here, by layers whose weights are still in the network's own type.
        half = self.dtype in (torch.float16, torch.bfloat16)
        here = self.kind if self.kind == there else "cpu"
        before = None if known else State(network)
        cast = torch.autocast(here, self.dtype, enabled=half) if self.dtype else contextlib.nullcontext()
        with cast, self.recorder.watch:
            self.result = network(*arguments, **keywords)
        results: list[Volume] = []
        self._mapped(lambda leaf: results.append(leaf) if isinstance(leaf, Volume) else leaf, self.result)
        # What the network wrote into its arguments is written into the caller's.
        self.changed = [(tensor, handle) for tensor, handle, node in self.inputs.values() if handle.node is not node]
        self.outputs = [handle.node for handle in (*results, *(handle for _, handle in self.changed))]
        reached = set(order_of(self.outputs)) if self.recorder.doubtful else set()
        for node in reversed(self.recorder.doubtful):
            if node not in reached and node.value is None:
                self.outputs.append(node)
                reached.update(order_of([node]))
        self.recorder.close()
        self._weigh([*tensors, *self.recorder.constants.held()])
        watch = self.recorder.watch
        self.drew = before is not None and before.drew()
        self.touched = before is None or watch.drew or watch.left_a_trace() or self.drew or before.changed()

    def _weigh(self, tensors: Sequence[Tensor]) -> None:
        """Note what tensors take on the device, and their copies in the type that is computed in and its layout."""
        there = {place_of(tensor): tensor for tensor in tensors if tensor.device == self.device}.values()
        self.base = _bytes(there) + LIBRARY_BYTES.get(self.kind, 0)
        types = [(t, self.dtype or t.dtype) for t in there if t.is_floating_point() and t.layout == torch.strided]
        self.copies = sum(t.numel() * dtype.itemsize for t, dtype in types if not is_arranged(t, dtype))

    def _shadow(self, leaf: Tensor | _Elsewhere) -> Shadow:
        shadows = self.recorder.shadows
        if isinstance(leaf, Tensor) and (self.dtype in (None, leaf.dtype) or not leaf.is_floating_point()):
            with contextlib.suppress(TypeError):
                return shadows.of(leaf)
        return shadows.empty(leaf.shape, self.recorder.kept(leaf.dtype, leaf.dtype))

    def _mapped(self, function: Callable[[Any], Any], value: Any) -> Any:
        """The network's result with every leaf replaced.

        Raises:
            TSPError: handles are where they cannot be replaced.
        """

        def replaced(leaf: Any) -> Any:
            inside = list(leaf) if isinstance(leaf, (set, frozenset)) else list(getattr(leaf, "__dict__", {}).values())
            if isinstance(leaf, Iterator) or any(isinstance(part, Volume) for part in tree_leaves(inside)):
                if not isinstance(leaf, (Tensor, nn.Module)):
                    raise TSPError(
                        f"the network returns tensors inside a {type(leaf).__name__}; return them in tuples, lists, "
                        "dictionaries or dataclasses"
                    )
            return function(leaf)

        return mapped(replaced, value)

    def _source(self, leaf: Tensor | _Elsewhere, axis: int) -> Node:
        if isinstance(leaf, Tensor):
            return self.recorder.source(leaf, axis)
        dtype = self.recorder.kept(leaf.dtype, leaf.dtype)
        node = given(leaf.shape, dtype, axis)
        if leaf.tensor is not None:
            self.given[node] = leaf.tensor.detach().to(dtype)
        return node

    def make_plan(self) -> Plan:
        """Return the plan of what is to be computed."""
        return self._make_plan(self.outputs, self._limit())

    def as_whole(self) -> Whole | None:
        """Return what the call would take if it were not split; None where it has to be."""
        alone = self.ranks is None and len(self.devices) == 1 and self.device in (self.devices[0], torch.device("meta"))
        if not alone or self.settings.splits is not None or self.plan is not None:
            return None
        if self.touched:
            return None  # to call the network again would draw, or write, a second time
        if self.settings.dtype is not None and self.floating - {torch.float32, self.settings.dtype}:
            return None  # autocast leaves double precision as it is
        if self.settings.dtype not in (None, torch.float16, torch.bfloat16) and self.floating != {self.settings.dtype}:
            return None
        held = self.recorder.holdings.most
        if self.settings.dtype in (torch.float16, torch.bfloat16):
            if self.kind == "cpu":  # where autocast has norms and softmax in float32, and bfloat16 may be none
                held *= 2
            held += self.copies
        return whole_of(self.outputs, self.base, held, self.device, self.kind, self.settings.dtype, self.result_dtype)

    def run(self, tick: Tick | None = None) -> Any:
        """Compute and return what the network returned."""
        limit = self._limit()
        with (
            torch.no_grad(),
            self.plans.plan(self.outputs, self._key, limit, lambda: self._make_plan(self.outputs, limit)) as planned,
        ):
            values = iter(self._run(planned.plan, planned.outputs, tick, self.settings.gather))
            assert self.plan is not None
            planned.plan = self.plan  # a leaner one, where memory ran out
        own = {id(handle): tensor for tensor, handle, node in self.inputs.values() if handle.node is node}
        returned: dict[int, Memory] = {}  # storage of what was returned -> what it was returned for

        def computed(leaf: Any) -> Any:
            if not isinstance(leaf, Volume):
                return leaf
            value = next(values)
            if self.settings.dtype is None and isinstance(own.get(id(leaf)), Tensor):
                return own[id(leaf)]  # an argument itself
            value = self._returned(value)
            if isinstance(value, Tensor):
                memory = leaf.shadow.memory
                if leaf.node.inputs == () or returned.setdefault(storage_of(value), memory) is not memory:
                    value = value.clone()  # torch would have made a copy
            return value

        result = self._mapped(computed, self.result)
        with torch.no_grad():
            for (tensor, _), value in zip(self.changed, values, strict=False):
                if isinstance(tensor, Tensor):
                    tensor.copy_(value)
        return result

    def _returned(self, value: Any) -> Any:
        tensor = value.tensor if isinstance(value, Shard) else value
        if self.settings.dtype and tensor.is_floating_point():
            tensor = tensor.to(self.result_dtype)
        return replace(value, tensor=tensor) if isinstance(value, Shard) else tensor

    def report(self) -> Report:
        """What the run did, or a planned one would do."""
        assert self.plan is not None
        return Report(self.plan, dict(self.recorder.gathered), list(self.attempts))

    @property
    def _key(self) -> Hashable:
        """What a plan depends on beside the nodes and the limit."""
        ranks = None if self.ranks is None else (self.ranks.rank, self.ranks.count)
        return (
            self.kind,
            self.base + self.copies,
            self.settings.splits,
            self.settings.offload,
            ranks,
            tuple(self.devices),
        )

    def _execute(self, nodes: Sequence[Node]) -> list[Any]:
        """Compute nodes that the network asks the values of while it is recorded."""
        return self._run(self._make_plan(nodes, self._limit()), nodes)

    def _run(self, plan: Plan, nodes: Sequence[Node], tick: Tick | None = None, gather: bool = True) -> list[Any]:
        if self.dry or self.device.type == "meta":
            raise TSPError(
                "the network asks for values of its input while it runs, so it cannot be planned without them"
            )
        while True:
            self.plan = plan
            try:
                lean = self.settings.memory_limit is not None
                execution = Execution(plan, self.devices, self.ranks, self.given, gather, lean)
                with torch.autocast(self.devices[0].type, enabled=False):  # nodes know what they were recorded under
                    return execution.run(nodes, tick)
            except torch.cuda.OutOfMemoryError as error:
                if self.ranks is not None:
                    raise TSPError("a rank ran out of memory; start more ranks, or give a memory_limit") from error
                limit = plan.peak // 2
                self.attempts.append(
                    f"the device ran out of memory in a plan for {format_bytes(plan.peak)}; "
                    f"planned again for {format_bytes(limit)}"
                )
            del execution
            torch.cuda.empty_cache()
            plan = self._make_plan(nodes, limit, splits=None)

    def _make_plan(self, nodes: Sequence[Node], limit: int | None, **settings: Any) -> Plan:
        """Plan under a limit, as the settings say but for ``settings``."""
        given = {"splits": self.settings.splits, **settings}
        rank, ranks = (0, 1) if self.ranks is None else (self.ranks.rank, self.ranks.count)
        return make_plan(
            nodes,
            self.kind,
            self.base + self.copies,
            limit=limit,
            offload=self.settings.offload,
            rank=rank,
            ranks=ranks,
            devices=len(self.devices),
            **given,
        )

    def _limit(self) -> int | None:
        """Bytes that may be used, the same on every rank; None for no limit."""
        limit = parse_bytes(self.settings.memory_limit) or free_bytes(self.device, self.base)
        return limit if self.ranks is None else self.ranks.least(limit, self.device)


_UNKNOWN = "unknown"


class Runner(Bookkeeping):
    """Runs calls of networks, whole or in slabs, and keeps what it found out about them for the next ones.

    A network runs whole where nobody asks for slabs, memory allows it and its largest result is small
    (:data:`~maisi_tools.tsp.whole.WHOLE_BYTES`).

    Attributes:
        report: what the last call did.
    """

    MOST = 64
    """How many forms of calls are known, the latest."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plans = Plans()
        self.report: Report | None = None
        self._known: dict[Hashable, Whole | None] = {}

    def run(self, network: Callable[..., Any], args: Any, kwargs: Any, tick: Tick | None = None) -> Any:
        """Return ``network(*args, **kwargs)``.

        Raises:
            TSPError, MemoryLimitError: see :class:`Call`.
        """
        form, call = _form_of(network, args, kwargs), None
        whole = self._known.pop(form, _UNKNOWN)  # at once, for another thread may be here, too
        if isinstance(whole, str):
            call = Call(self.settings, network, args, kwargs, plans=self.plans)
            whole = call.as_whole()
        if call is None or not call.drew:  # or it was another thread that drew: it is looked at again
            self._known[form] = whole
        if len(self._known) > self.MOST:
            self._known.pop(next(iter(list(self._known))), None)
        attempts = []
        if whole is not None and whole.fits(self.settings.memory_limit):
            call = None  # and with it copies of the input in the type computed in
            try:
                result = run_whole(whole, network, args, kwargs, lean=self.settings.memory_limit is not None)
                self.report = Report(whole)
                return result
            except torch.cuda.OutOfMemoryError:
                self._known[form] = None
                attempts.append("the device ran out of memory with the whole network at once; it was run in slabs")
            except NotImplementedError as error:
                if self.settings.dtype is None:
                    raise
                self._known[form] = None
                attempts.append(f"with the whole network at once {error}; it was run in slabs, that step in float32")
            torch.cuda.empty_cache()
        call = call or Call(self.settings, network, args, kwargs, plans=self.plans, known=True)
        result = call.run(tick)
        self.report = call.report()
        self.report.attempts[:0] = attempts
        return result

    def plan(self, network: Callable[..., Any], args: Any, kwargs: Any) -> Plan | Whole:
        """Return how the call would be computed, without computing it.

        Raises:
            TSPError, MemoryLimitError: as the call would.
        """
        call = Call(self.settings, network, args, kwargs, dry=True)
        whole = call.as_whole()
        return whole if whole is not None and whole.fits(self.settings.memory_limit) else call.make_plan()


def _form_of(network: Callable[..., Any], args: Any, kwargs: Any) -> Hashable:
    """What tells one kind of call from another: the function, its modules, shapes and types, and plain values.

    It decides whether a call that was looked at before is recorded again to see what it would take. What the call
    computes never comes from an earlier one.
    """
    leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda leaf: leaf is None)
    described = [
        (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf if isinstance(leaf, (int, float, str)) else None)
        for leaf in leaves
    ]
    outer = modules_of(network)
    modules = [part for module in outer for part in module.modules()]
    function = getattr(network, "__func__", network)
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (
        id(getattr(function, "__code__", type(function))),
        tuple((id(module), module.training) for module in modules),
        tuple((part.dtype, part.shape) for module in outer for part in module.parameters()),
        str(spec),
        tuple(described),
        torch.is_grad_enabled(),
        tuple(autocast),
    )


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


def _bytes(tensors: Iterable[Tensor]) -> int:
    sizes: dict[int, int] = {}  # shared memory counts once
    for tensor in tensors:
        if tensor.layout == torch.strided:
            sizes[storage_of(tensor)] = max(sizes.get(storage_of(tensor), 0), tensor.nbytes)
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
