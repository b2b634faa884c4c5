"""Recording: a tensor handle that stands for a volume, so that an unmodified network writes down what it computes.

What an operation does is not guessed from its name: it runs on shadows first (:mod:`~maisi_tools.tsp.shadow`). Then

- what draws random numbers, or asks for values, is computed at once, in the network's own order;
- what writes into a handle makes this one stand for the result; where the memory is shared with another tensor in use,
  it is refused;
- what has a rule whose result has the shape and type that torch's would have becomes that rule's node;
- all else becomes a node that runs torch's own operation on the gathered tensor.

Plain tensors, such as weights and buffers, count as they are at the moment of recording: one that is written into later
is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.nodes import Constants, Node, arranged, gathered, source, split, storage_of
from maisi_tools.tsp.opened import closed, leaves_of, opened
from maisi_tools.tsp.rules import MIXED, RULES
from maisi_tools.tsp.shadow import Holdings, Memory, Seen, Shadow, Shadows, Watch

_PROPERTIES = frozenset(
    """
    shape dtype device layout ndim requires_grad is_cuda is_cpu is_mps is_xpu is_leaf is_meta is_sparse is_quantized
    is_mkldnn is_nested names itemsize nbytes grad grad_fn retains_grad size dim numel nelement ndimension element_size
    is_floating_point is_complex is_contiguous is_inference is_signed is_pinned is_shared stride
    storage_offset get_device len hash repr str sizeof is_same_size is_tensor
    """.split()
)
"""What the handle answers by itself, from shape, strides, type and device."""

_VALUES = frozenset(("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__format__"))
"""What Python asks a tensor's value with; without underscores some of these are names of casts."""

_MOVES = frozenset(("to", "cpu", "cuda"))

_CASTS = frozenset("to type float half bfloat16 double type_as".split())

_DRAWN = frozenset(
    "rand_like randn_like randint_like empty_like new_empty new_zeros new_ones new_full new_tensor".split()
)
"""Operations that read nothing but shape, type and device of their input."""

_LIKENESSES = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as"))
"""Operations on a plain tensor that read nothing but shape, type and device of a volume."""

_BY_STRIDE = frozenset(("as_strided", "as_strided_copy", "as_strided_scatter"))
"""Operations that read memory in its order."""

_BITS = frozenset(("is_conj", "is_neg"))
"""What shadows know by themselves."""

_INPLACE_OPERATORS = {
    f"__i{name}__": f"__{name}__"
    for name in "add sub mul truediv floordiv pow and or xor mod lshift rshift matmul".split()
}


class Volume(Tensor):
    """Stands for a tensor that is not computed yet; every operation on it is recorded as a node.

    It has the shape, strides, type and device of the tensor it stands for. Where the values themselves are asked for
    (``item``, ``bool``, ``numpy``, an operation on a plain tensor in place), what they depend on is computed.
    """

    node: Node
    recorder: Recorder
    shadow: Shadow

    @staticmethod
    def __new__(cls, node: Node, recorder: Recorder, shadow: Shadow) -> Volume:
        handle = Tensor._make_wrapper_subclass(
            cls,
            shadow.shape,
            strides=shadow.stride,
            storage_offset=shadow.offset,
            dtype=shadow.dtype,
            device=recorder.device,
        )
        handle.node, handle.recorder, handle.shadow = node, recorder, shadow
        return handle

    def __init__(self, node: Node, recorder: Recorder, shadow: Shadow) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _PROPERTIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _recorder(args, kwargs).record(func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        recorder = _recorder(args, kwargs or {})
        if func in (torch.ops.aten.alias.default, torch.ops.aten.detach.default):  # of torch.as_tensor
            return recorder.record(Tensor.detach, "detach", args, {})
        return recorder.now(func, str(func), args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Volume({self.node})"


def _recorder(args: Any, kwargs: Any) -> Recorder:
    """The recorder of a call's handles.

    Raises:
        TSPError: one was kept from an earlier call.
    """
    found = {leaf.recorder for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Volume)}
    if len(found) > 1 or any(recorder.closed for recorder in found):
        raise TSPError(
            "a tensor was kept from an earlier call in slabs; such a network cannot be split: clone it first"
        )
    return found.pop()


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):  # of a property
        name = func.__self__.__name__ + ("=" if name == "__set__" else "")  # type: ignore[attr-defined]
    return name.strip("_")


def _writes_by_name(own: str, kwargs: Mapping[str, Any]) -> bool:
    return (
        own in _INPLACE_OPERATORS
        or own == "__setitem__"
        or (own.endswith("_") and not own.startswith("__"))
        or kwargs.get("inplace") is True
    )


def _out_of_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that returns what ``func``, without ``inplace``, would write into its first argument."""
    own = getattr(func, "__name__", "")
    if kwargs.get("inplace") is True:
        return func
    other = _INPLACE_OPERATORS.get(own, own[:-1] if own.endswith("_") and not own.startswith("__") else "")
    if other.strip("_") in RULES:  # elsewhere names may mean something else, as torch.normal
        for home in (Tensor, torch, torch.nn.functional):
            if hasattr(home, other):
                return getattr(home, other)
    return _on_a_copy(func)


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    def changed(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = tensor.clone()
        func(copy, *args, **kwargs)
        return copy

    changed.__name__ = getattr(func, "__name__", "").strip("_")
    return changed


class Recorder:
    """Writes down one call of a network as a graph of nodes.

    Args:
        axis: dimension along which volumes are split.
        ndim: dimensions of the volume that the axis is counted in.
        device: of the handles.
        kind: type of the device that computes: handles on "meta" stand for those of one.
        execute: computes nodes' values; called where the network asks for values while it is being recorded.
        dtype: floating type to compute in; None keeps the network's own, and autocast's.

    Attributes:
        expected: shadows of what the operation being recorded returns, for its rule; a list where it is several.
        watch: sees what happens to plain tensors; to be entered while the network is recorded.
        holdings: what the network would hold at once if it ran unsplit.
    """

    expected: Any

    def __init__(
        self,
        axis: int,
        ndim: int,
        device: torch.device,
        kind: str,
        execute: Callable[[Sequence[Node]], list[Any]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.axis = axis
        self.back = ndim - axis
        self.device = device
        self.kind = kind
        self.dtype = dtype
        self.constants = Constants()
        self.shadows = Shadows(device, dtype)
        self.watch = Watch(self._plain_is_written)
        self.holdings = Holdings()
        self.gathered: dict[str, int] = {}
        """Operations without a rule -> how often they ran on a gathered tensor."""
        self.doubtful: list[Node] = []
        """What torch may refuse when it is computed: to be computed even where nothing reads it."""
        self._execute = execute
        self.closed = False

    # What rules ask for.

    @staticmethod
    def is_volume(value: Any) -> bool:
        """Whether ``value`` is a handle."""
        return isinstance(value, Volume)

    def volume(self, handle: Any, dims: int | None = None, plain: Sequence[Any] = (), lift: bool = True) -> Node | None:
        """Return the node of a handle as one with rows, or None where there is none.

        Args:
            dims: spatial dimensions it has to have, one of which has to be its axis; None for any.
            plain: parameters, which may not be volumes.
            lift: give the result of a gathered operation rows again.
        """
        if not isinstance(handle, Volume) or any(isinstance(part, Volume) for part in plain):
            return None
        node = handle.node
        ndim = len(node.shape)
        if dims is not None and ndim != dims + 2:
            return None
        if node.axis is None:
            if not lift or ndim < 3:
                return None
            node = split(node, self.axis if self.axis < ndim else ndim - 1)
        return node if dims is None or (node.axis is not None and node.axis >= 2) else None

    def source(self, tensor: Tensor, axis: int | None) -> Node:
        """Return the node of a plain tensor: of that itself, so that it is copied where it is written into later."""
        return source(arranged(tensor, self.dtype if tensor.is_floating_point() else None), axis)

    def constant(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """Return a plain tensor on ``device``, as ``dtype`` or else in the type computed in."""
        cast = self.dtype if tensor.is_floating_point() else None
        return self.constants.get(tensor, device, dtype or cast)

    def cast(self, *operands: Node | Tensor | None) -> torch.dtype | None:
        """The type that autocast casts an operation's operands to; None where it does not."""
        kind = self.shadows.device.type
        if self.dtype is not None or not torch.is_autocast_enabled(kind):
            return None
        lower = torch.get_autocast_dtype(kind)
        eligible = all(o is None or (o.dtype.is_floating_point and o.dtype != torch.float64) for o in operands)
        return lower if eligible and self.expected.dtype == lower else None

    def kept(self, new: torch.dtype, old: torch.dtype) -> torch.dtype:
        """Return the type of a result: the one torch would give, or, between floating types, the one computed in."""
        if self.dtype is not None and new.is_floating_point:
            return self.dtype
        return new

    def widened(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; one that torch has not in the half precision asked for, in float32."""
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if self.dtype not in (torch.float16, torch.bfloat16):
                raise
        leaves: list[Any] = []
        form = opened((args, kwargs), leaves)
        wide = [leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == self.dtype else leaf for leaf in leaves]
        args, kwargs = closed(form, iter(wide))
        return func(*args, **kwargs)

    # Recording.

    def handle(self, node: Node, shadow: Shadow) -> Volume:
        """Return a new handle of a node."""
        handle = Volume(node, self, shadow)
        shadow.memory.enter(handle)
        return handle

    def close(self) -> None:
        """Refuse every operation from here on: the call is over."""
        self.closed = True

    def record(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record one operation and return its result's handle (or handles)."""
        self._refuse_gradients(args, kwargs)
        if name.endswith("="):
            raise TSPError(f"a network that sets the attribute {name[:-1]!r} of a tensor cannot be split")
        own = getattr(func, "__name__", "")
        if own in _VALUES:
            return self.now(func, own, args, kwargs)
        if name in ("requires_grad", "detach") and own.endswith("_"):
            return args[0]
        if not args and "input" in kwargs and name in RULES and name not in MIXED:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        if name in ("getitem", "setitem"):
            args = (args[0], _numbers(args[1]), *args[2:])
        if name in _MOVES and isinstance(args[0], Volume) and self._elsewhere(args, kwargs, name):
            return self.now(func, name, args, kwargs)
        if name in _LIKENESSES and args and not isinstance(args[0], Volume):
            likenesses = {key: _likeness(value) for key, value in kwargs.items()}
            return func(args[0], *map(_likeness, args[1:]), **likenesses)
        if name in _DRAWN and args and not any(isinstance(leaf, Volume) for leaf in leaves_of((args[1:], kwargs))):
            return func(_likeness(args[0]), *args[1:], **kwargs)
        self.watch.paused = True
        try:
            return self._record(func, name, own, args, kwargs)
        finally:
            self.watch.paused = False

    def _record(
        self, func: Callable[..., Any], name: str, own: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        call = func, name, args, kwargs
        leaves: list[Any] = []
        form = opened((args, kwargs), leaves)
        try:
            held = [self._held(leaf) for leaf in leaves]
            shadows = [self._shadow(leaf) for leaf in held]
        except TypeError:  # a plain tensor that is sparse, quantised or a subclass
            return self.now(*call)
        args, kwargs = closed(form, iter(held))
        seen = self.shadows.run(func, name, shadows, form)
        written = {shadows[place].memory for place in seen.written}
        if seen.failed and not written and _writes_by_name(own, kwargs) and isinstance(shadows[0], Shadow):
            written = {shadows[0].memory}
        if written:
            return self._written(call, args, kwargs, own, seen, written)
        if name in _BITS:
            return seen.value
        if seen.failed or not seen.parts:
            return self.now(*call)
        if all(part.given is not None for part in seen.parts):  # torch returns the very same tensors
            return closed(seen.form, iter([leaves[part.given] for part in seen.parts]))  # type: ignore[index]
        expected = self.shadows.results(seen, shadows)
        if name in _BY_STRIDE:
            _refuse_beyond(name, shadows[0], expected[0])
        if self.dtype is not None:
            if name in _CASTS and not kwargs.get("copy") and isinstance(args[0], Volume):
                if args[0].is_floating_point() and expected[0].dtype.is_floating_point:
                    return args[0]
            expected = [
                shadow.as_type(self.dtype) if shadow.dtype.is_floating_point and shadow.dtype != self.dtype else shadow
                for shadow in expected
            ]
        inputs = [shadow for shadow in shadows if isinstance(shadow, Shadow)]
        given = [leaf.node for leaf in held if isinstance(leaf, Volume)]
        args, kwargs = closed(form, iter([self._stand_in(leaf) for leaf in held]))
        nodes = self._nodes(func, name, args, kwargs, given, inputs, expected, seen)
        if nodes is None:
            return self.now(*call)
        handles = [
            self.handle(node, shadow) if part.given is None else leaves[part.given]
            for part, node, shadow in zip(seen.parts, nodes, expected, strict=True)
        ]
        for part, handle, shadow in zip(seen.parts, handles, expected, strict=True):
            if part.given is None:
                self.holdings.enter(handle, shadow, fresh=part.memory[0] == "new")
        # A convolution library copies both sides into a layout of its own.
        computed = [leaf.shadow for leaf in held if isinstance(leaf, Volume) and leaf.node.value is None]
        costly = any(node.cost for node in nodes)
        copied = sum(shadow.nbytes for shadow in (*computed, *expected)) if costly else 0
        self.holdings.passing(copied if all(node.ruled for node in nodes) else seen.room)
        return closed(seen.form, iter(handles))

    def _held(self, value: Any) -> Any:
        """A plain tensor as it is now."""
        if isinstance(value, Tensor) and not isinstance(value, Volume):
            return self.constants.hold(value)
        return value

    def _shadow(self, value: Any) -> Any:
        if isinstance(value, Volume):
            return value.shadow
        if isinstance(value, Tensor):
            shadow = self.shadows.of(value)
            shadow.memory.plain = True
            return shadow
        if isinstance(value, torch.device) and value.type == "meta":
            return self.shadows.device
        return value

    def _stand_in(self, value: Any) -> Any:
        """For a result another handle, which what is recorded may keep: the network's own says how long it holds it."""
        if isinstance(value, Volume) and self.holdings.knows(value.shadow):
            return Volume(value.node, self, value.shadow)
        return value

    def _plain_is_written(self, tensor: Tensor) -> None:
        """Keep what was recorded of a plain tensor that is about to be written into."""
        if isinstance(tensor, Volume) or tensor.layout != torch.strided:
            return
        memory = self.shadows.memory(tensor)
        if memory is None:
            return
        if memory.in_use():
            raise TSPError(
                f"a tensor of shape {tuple(tensor.shape)} is written into while a view of it, or the same tensor, is "
                "recorded; such a network cannot be split: clone it first"
            )
        self.constants.written(tensor)

    def _elsewhere(self, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> bool:
        named = [*args[1:], kwargs.get("device"), name if name in ("cpu", "cuda") else None]
        for value in named:
            if isinstance(value, Tensor):
                value = value.device
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
                if device.type != self.device.type or device.index not in (None, self.device.index):
                    return True
        return False

    def _written(
        self,
        call: tuple[Callable[..., Any], str, Sequence[Any], Mapping[str, Any]],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        own: str,
        seen: Seen,
        written: set[Memory],
    ) -> Any:
        """Record an operation that writes into a handle, or run one that writes into a plain tensor."""
        func, name = call[:2]
        target = args[0] if args else None
        if kwargs.get("out") is not None:
            raise TSPError(f"{name}(..., out=tensor) cannot be split; let the operation return its result")
        if not isinstance(target, Volume):
            if all(memory.plain and not memory.in_use() for memory in written):
                return self.now(*call)
            raise TSPError(f"{name} writes into another tensor than its first; such a network cannot be split")
        memory = target.shadow.memory
        if written != {memory} or memory.plain:
            raise TSPError(f"{name} writes into several tensors, or a view of a plain one; it cannot be split")
        if memory.in_use() > 1:
            raise TSPError(
                f"{name} writes into a tensor of shape {tuple(target.shape)} that shares its memory with another one "
                "in use; such a network cannot be split: clone the view, or write out of place"
            )
        if seen.reshaped:
            raise TSPError(f"{name} changes a tensor's shape in place; use the operation that returns its result")
        if any(step == 0 and size > 1 for step, size in zip(target.stride(), target.shape, strict=True)):
            raise TSPError(f"{name} writes into an expanded tensor; clone it first")
        result = None
        if not seen.failed and not seen.drew:
            other = _out_of_place(func, kwargs)
            kept = {key: value for key, value in kwargs.items() if key != "inplace"}
            result = self._record(other, _name(other), _name(other), args, kept)
            if result.dtype != target.dtype:
                castable = torch.can_cast(result.dtype, target.dtype)
                result = self._record(Tensor.to, "to", "to", (result, target.dtype), {}) if castable else None
        if result is None:
            result = self.now(_on_a_copy(func), name, args, kwargs)
        target.node = result.node if isinstance(result, Volume) else self.source(result, None)
        return None if own == "__setitem__" else target

    def _nodes(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: list[Node],
        inputs: list[Shadow],
        expected: list[Shadow],
        seen: Seen,
    ) -> list[Node] | None:
        """The nodes of an operation's results: its rule's, if they are what torch would return.

        None where it draws random numbers.
        """
        first = args[0] if args else next(iter(kwargs.values()), None)
        made = None
        if (
            name in RULES
            and (isinstance(first, Volume) or name in MIXED)
            and not any(0 in shadow.shape for shadow in (*inputs, *expected))
        ):
            self.expected = expected if len(expected) > 1 else expected[0]
            try:
                with torch._C.DisableTorchFunctionSubclass():  # what a rule asks of a handle, this answers by itself
                    made = RULES[name](self, func, args, kwargs)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                if isinstance(error, TSPError):
                    raise
                made = None  # a spelling of the arguments that the rule does not know
        nodes = [made] if isinstance(made, Node) else list(made or ())
        if [(node.shape, node.dtype) for node in nodes] != [(shadow.shape, shadow.dtype) for shadow in expected]:
            if seen.drew:
                return None
            nodes = self._opaque(func, name, args, kwargs, expected, seen.room)
        odd = self.dtype is None and self._odd({shadow.dtype for shadow in inputs})
        for node, shadow in zip(nodes, expected, strict=True):
            if node not in given:
                self._as_recorded(node)
                if odd and name not in _CASTS and all(shadow.memory is not one.memory for one in inputs):
                    self.doubtful.append(node)
        return nodes

    def _odd(self, types: set[torch.dtype]) -> bool:
        """Whether torch may have no such operation for these types, which shadows do not tell."""
        if torch.is_autocast_enabled(self.shadows.device.type):
            return bool(types - {torch.float32})
        return len(types) > 1 or bool(types - {torch.float32, torch.float64})

    def _as_recorded(self, node: Node) -> None:
        """Let a node compute under the autocast of this moment; the executor computes without."""
        kind = self.shadows.device.type
        if self.dtype is not None or not torch.is_autocast_enabled(kind) or not node.inputs:
            return
        dtype, compute = torch.get_autocast_dtype(kind), node.compute

        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(kind, dtype):
                return compute(*args, **kwargs)

        node.compute = cast

    def _opaque(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        expected: list[Shadow],
        room: int,
    ) -> list[Node]:
        """The nodes of an operation that needs all of its inputs at once, and so much room on the way."""
        if name in ("view", "view_as") and not any(isinstance(arg, torch.dtype) for arg in args):
            func = Tensor.reshape if name == "view" else Tensor.reshape_as  # a computed slab may have other strides
        leaves: list[Any] = []
        form = opened((args, kwargs), leaves)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Volume)]
        inputs = [leaves[i].node for i in places]
        strides = [leaves[i].stride() if name in _BY_STRIDE else None for i in places]
        leaves = [None if isinstance(leaf, Volume) else leaf for leaf in leaves]

        def compute(slabs: list[Tensor], a: int, b: int) -> Any:
            values = [
                self.constant(leaf, slabs[0].device) if isinstance(leaf, Tensor) and leaf.ndim else leaf
                for leaf in leaves
            ]
            for i, slab, stride in zip(places, slabs, strides, strict=True):
                values[i] = slab if stride is None else _strided(slab, stride)
            arguments, keywords = closed(form, iter(values))
            results = leaves_of(self.widened(func, arguments, keywords))
            results = [result.to(shadow.dtype) for result, shadow in zip(results, expected, strict=True)]
            return results if len(results) > 1 else results[0]

        if any(node.axis is not None for node in inputs):
            self.gathered[name] = self.gathered.get(name, 0) + 1
        return gathered(
            name,
            inputs,
            [shadow.shape for shadow in expected],
            [shadow.dtype for shadow in expected],
            compute,
            room,
        )

    def now(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that needs values at once, on computed tensors; its results are plain."""
        self.gathered[name] = self.gathered.get(name, 0) + 1
        leaves: list[Any] = []
        form = opened((args, kwargs), leaves)
        handles = [leaf for leaf in leaves if isinstance(leaf, Volume)]
        found = [_strided(v, h.stride()) for v, h in zip(self.values(handles), handles, strict=True)]
        values = dict(zip(map(id, handles), found, strict=True))
        leaves = [values.get(id(leaf), leaf) for leaf in leaves]
        arguments, keywords = closed(form, iter(leaves))
        paused, self.watch.paused = self.watch.paused, False
        own = {storage_of(value) for value in found}
        written, self.watch.written = self.watch.written, lambda tensor: self._now_written(tensor, own, name)
        try:
            result = func(*arguments, **keywords)
        finally:
            self.watch.paused, self.watch.written = paused, written
        for leaf in leaves_of(result):
            if isinstance(leaf, np.ndarray):
                leaf.flags.writeable = False  # it may be memory that other handles stand for
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and storage_of(leaf) in own:
                raise TSPError(f"{name} returns a view of a tensor that is run in slabs; clone it first")
        return result

    def _now_written(self, tensor: Tensor, own: set[int], name: str) -> None:
        if not isinstance(tensor, Volume) and tensor.layout == torch.strided and storage_of(tensor) in own:
            raise TSPError(f"{name} writes into a tensor in a way that cannot be split; write out of place")
        self._plain_is_written(tensor)

    def values(self, handles: Sequence[Volume]) -> list[Tensor]:
        """Compute what the handles stand for."""
        nodes = [handle.node for handle in handles]
        missing = list(dict.fromkeys(node for node in nodes if node.value is None))
        with _disable_current_modes():
            for node, value in zip(missing, self._execute(missing) if missing else (), strict=True):
                node.value = value
        return [node.value for node in nodes if node.value is not None]

    @staticmethod
    def _refuse_gradients(args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for leaf in leaves_of((args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, Volume) and leaf.requires_grad:
                raise TSPError(
                    "gradients are wanted, but a network is run in slabs without them; call it under torch.no_grad() "
                    "or torch.inference_mode(), or train on the network itself"
                )


def _numbers(index: Any) -> Any:
    """An index whose slices hold numbers, no tensors."""
    if isinstance(index, tuple):
        return tuple(map(_numbers, index))
    if not isinstance(index, slice):
        return index
    ends = (index.start, index.stop, index.step)
    return slice(*(int(end) if isinstance(end, Tensor) else end for end in ends))


def _strided(value: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor with these strides, as far as they are those of a tensor without overlaps."""
    if value.stride() == tuple(stride) or not value.numel():
        return value
    if any(step == 0 and size > 1 for step, size in zip(stride, value.shape, strict=True)):
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _refuse_beyond(name: str, given: Shadow, result: Shadow) -> None:
    """Refuse to read memory in its order where it is not all the tensor's own."""
    reach, own = (
        t.offset + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride, strict=True)) for t in (result, given)
    )
    if given.offset or own != given.shape.numel() or reach > own:
        raise TSPError(f"{name} of a view cannot be split, for it may reach beyond; clone the view first")


def _likeness(value: Any) -> Any:
    """A tensor of a volume's shape, strides, type and device that takes no memory."""
    if isinstance(value, Volume):
        dense = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if value.device.type == "meta" or dense.is_contiguous():
            return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value
