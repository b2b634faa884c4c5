"""Recording: a tensor handle that stands for a volume, so that an unmodified network writes down what it computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.nodes import Constants, Node, arranged, gathered, source, split
from maisi_tools.tsp.rules import MIXED, RULES

_PROPERTIES = frozenset(
    """
    shape dtype device layout ndim requires_grad is_cuda is_cpu is_mps is_xpu is_leaf is_meta is_sparse is_quantized
    is_mkldnn is_nested names itemsize nbytes grad grad_fn retains_grad size dim numel nelement ndimension element_size
    is_floating_point is_complex is_contiguous is_inference is_conj is_neg is_signed is_pinned is_shared stride
    storage_offset get_device len hash repr str format sizeof is_same_size is_tensor
    """.split()
)
"""What the handle answers by itself, from shape, type and device."""

_VALUES = frozenset(("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__"))
"""What Python asks a tensor's value with; without underscores some of these are names of casts."""

_VIEWS = frozenset(
    """
    getitem narrow select split chunk tensor_split unbind split_with_sizes permute transpose swapaxes swapdims movedim
    moveaxis t T mT unsqueeze squeeze reshape view flatten unflatten view_as reshape_as expand expand_as broadcast_to
    detach alias data real
    """.split()
)
"""Operations whose result shares its memory with the input in torch."""

_FORGETFUL = frozenset("contiguous to type float half bfloat16 double type_as cuda cpu requires_grad".split())
"""Operations that return the very same tensor where nothing is to be done."""

_MOVES = frozenset(("to", "cpu", "cuda"))

_DRAWN = frozenset(
    "rand_like randn_like randint_like empty_like new_empty new_zeros new_ones new_full new_tensor".split()
)
"""Operations that read nothing but shape, type and device of their input."""

_LIKENESSES = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as"))
"""Operations on a plain tensor that read nothing but shape, type and device of a volume."""

_INPLACE_OPERATORS = {
    f"__i{name}__": f"__{name}__" for name in "add sub mul truediv floordiv pow and or xor mod".split()
}


class Volume(Tensor):
    """Stands for a tensor that is not computed yet; every operation on it is recorded as a node.

    It has the shape, type and device of the tensor it stands for. Where the values themselves are asked for
    (``item``, ``bool``, ``numpy``, an operation on a plain tensor in place), what they depend on is computed.
    """

    node: Node
    recorder: Recorder
    base: weakref.ref[Volume] | None
    views: weakref.WeakSet[Volume]

    @staticmethod
    def __new__(cls, node: Node, recorder: Recorder) -> Volume:
        handle = Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=recorder.device)
        handle.node, handle.recorder = node, recorder
        handle.base, handle.views = None, weakref.WeakSet()
        return handle

    def __init__(self, node: Node, recorder: Recorder) -> None:
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
        return _recorder(args, kwargs or {}).now(func, str(func), args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Volume({self.node})"


def _recorder(args: Any, kwargs: Any) -> Recorder:
    return next(leaf.recorder for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Volume))


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__"):  # of a property
        name = func.__self__.__name__ + ("=" if name == "__set__" else "")  # type: ignore[attr-defined]
    return name.strip("_")


def _out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function that returns what ``func`` would write into its first argument."""
    name = func.__name__
    other = _INPLACE_OPERATORS.get(name, name.rstrip("_") if not name.startswith("__") else "")
    for home in (Tensor, torch, torch.nn.functional):
        if other and hasattr(home, other) and other != "set":
            return getattr(home, other)

    def changed(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = tensor.clone()
        func(copy, *args, **kwargs)
        return copy

    changed.__name__ = name.strip("_")
    return changed


class Recorder:
    """Writes down one call of a network as a graph of nodes.

    Args:
        axis: dimension along which volumes are split.
        ndim: dimensions of the volume that the axis is counted in.
        device: of the handles.
        execute: computes nodes' values; called where the network asks for values while it is being recorded.
        dtype: floating type to compute in; None keeps the network's own.
    """

    def __init__(
        self,
        axis: int,
        ndim: int,
        device: torch.device,
        execute: Callable[[Sequence[Node]], list[Any]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.axis = axis
        self.back = ndim - axis
        self.device = device
        self.dtype = dtype
        self.constants = Constants()
        self.gathered: dict[str, int] = {}
        """Operations without a rule -> how often they ran on a gathered tensor."""
        self._execute = execute

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
        """Return the node of a plain tensor."""
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return source(arranged(tensor.detach()), axis)

    def constant(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a plain tensor on ``device``, in the type computed in."""
        cast = self.dtype if tensor.is_floating_point() else None
        return self.constants.get(tensor, device, cast)

    def kept(self, new: torch.dtype, old: torch.dtype) -> torch.dtype:
        """Return the type of a result: the one torch would give, or, between floating types, the one computed in."""
        if self.dtype is not None and new.is_floating_point:
            return self.dtype
        return new

    def infer(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return ``func``'s result on the meta device: shapes and types, no values."""
        return func(*tree_map(_meta, args), **tree_map(_meta, kwargs))

    @staticmethod
    def infer_shape(node: Node, func: Callable[[Tensor], Any]) -> Any:
        """Return ``func``'s result for a tensor like the node's, on the meta device."""
        return func(torch.empty(node.shape, dtype=node.dtype, device="meta"))

    # Recording.

    def handle(self, node: Node) -> Volume:
        """Return a new handle of a node."""
        return Volume(node, self)

    def record(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record one operation and return its result's handle (or handles)."""
        self._refuse_gradients(args, kwargs)
        if kwargs.get("out") is not None:
            raise TSPError(f"{name}(..., out=tensor) cannot be split; let the operation return its result")
        if name.endswith("="):
            raise TSPError(f"a network that sets the attribute {name[:-1]!r} of a tensor cannot be split")
        if name in _MOVES and self._elsewhere(args, kwargs, name):
            return self.now(func, name, args, kwargs)
        if name in _LIKENESSES and not isinstance(args[0], Volume):
            return func(args[0], *(_likeness(arg) for arg in args[1:]), **tree_map(_likeness, kwargs))
        if name in _DRAWN:
            like = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            return func(like, *args[1:], **kwargs)
        target = args[0] if args else None
        own = getattr(func, "__name__", "")
        if own in _VALUES:
            return self.now(func, own, args, kwargs)
        writes = (
            own in _INPLACE_OPERATORS
            or own in ("__setitem__", "__delitem__")
            or (own.endswith("_") and not own.startswith("__") and name != "requires_grad")
            or kwargs.get("inplace") is True
        )
        if not writes:
            return self._out(func, name, args, kwargs)
        if not isinstance(target, Volume):
            return self.now(func, name, args, kwargs)
        if own.endswith("_"):
            func = _out_of_place(func)
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        result = self._out(func, _name(func), args, kwargs)
        return self._repoint(target, result, name)

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

    def _repoint(self, target: Volume, result: Volume, name: str) -> Volume:
        if (target.base is not None and target.base() is not None) or len(target.views):
            raise TSPError(
                f"{name} writes into a tensor of shape {tuple(target.shape)} that shares its memory with another one "
                "in use; such a network cannot be split: clone the view, or write out of place"
            )
        if result.shape != target.shape:
            raise TSPError(f"{name} changes a tensor's shape in place; use the operation that returns its result")
        if result.dtype != target.dtype:
            result = self._out(Tensor.to, "to", (result, target.dtype), {})
        target.node = result.node
        return target

    def _out(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        made = None
        first = args[0] if args else next(iter(kwargs.values()), None)
        if name in RULES and (isinstance(first, Volume) or name in MIXED):
            try:
                made = RULES[name](self, func, args, kwargs)
            except KeyError:  # a spelling of the arguments that the rule does not know
                made = None
        if made is None:
            return self._opaque(func, name, args, kwargs)
        if name in _FORGETFUL and isinstance(args[0], Volume) and made is args[0].node:
            return args[0]
        if isinstance(made, Node):
            return self._seen(self.handle(made), name, args)
        return tuple(self._seen(self.handle(node), name, args) for node in made)

    @staticmethod
    def _seen(result: Volume, name: str, args: Sequence[Any]) -> Volume:
        if name in _VIEWS and isinstance(args[0], Volume):
            owner = args[0].base() if args[0].base is not None else args[0]
            if owner is not None:
                result.base = weakref.ref(owner)
                owner.views.add(result)
        return result

    def _opaque(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record an operation that needs all of its inputs at once."""
        try:
            shapes, form = tree_flatten(self.infer(func, args, kwargs))
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError):
            return self.now(func, name, args, kwargs)
        if not all(isinstance(shape, Tensor) for shape in shapes):
            return self.now(func, name, args, kwargs)
        if name in ("view", "view_as") and not any(isinstance(arg, torch.dtype) for arg in args):
            func = Tensor.reshape if name == "view" else Tensor.reshape_as  # a computed slab may have other strides
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Volume)]
        inputs = [leaves[i].node for i in places]
        leaves = [None if isinstance(leaf, Volume) else leaf for leaf in leaves]

        def compute(slabs: list[Tensor], a: int, b: int) -> Any:
            values = [
                self.constant(leaf, slabs[0].device) if isinstance(leaf, Tensor) and leaf.ndim else leaf
                for leaf in leaves
            ]
            for i, slab in zip(places, slabs, strict=True):
                values[i] = slab
            arguments, keywords = tree_unflatten(values, spec)
            results = tree_flatten(func(*arguments, **keywords))[0]
            return results if len(results) > 1 else results[0]

        if any(node.axis is not None for node in inputs):
            self.gathered[name] = self.gathered.get(name, 0) + 1
        nodes = gathered(
            name,
            inputs,
            [shape.shape for shape in shapes],
            [self.kept(shape.dtype, inputs[0].dtype) for shape in shapes],
            compute,
        )
        handles = [self._seen(self.handle(node), name, args) for node in nodes]
        return tree_unflatten(handles, form)

    def now(self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that needs values at once, on computed tensors; its results are plain."""
        self.gathered[name] = self.gathered.get(name, 0) + 1
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        handles = [leaf for leaf in leaves if isinstance(leaf, Volume)]
        values = dict(zip(map(id, handles), self.values(handles), strict=True))
        leaves = [values.get(id(leaf), leaf) for leaf in leaves]
        arguments, keywords = tree_unflatten(leaves, spec)
        return func(*arguments, **keywords)

    def values(self, handles: Sequence[Volume]) -> list[Tensor]:
        """Compute what the handles stand for."""
        nodes = [handle.node for handle in handles]
        missing = list(dict.fromkeys(node for node in nodes if node.value is None))
        for node, value in zip(missing, self._execute(missing) if missing else (), strict=True):
            node.value = value
        return [node.value for node in nodes if node.value is not None]

    @staticmethod
    def _refuse_gradients(args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for leaf in tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor) and not isinstance(leaf, Volume) and leaf.requires_grad:
                raise TSPError(
                    "gradients are wanted, but a network is run in slabs without them; call it under torch.no_grad() "
                    "or torch.inference_mode(), or train on the network itself"
                )


def _likeness(value: Any) -> Any:
    """A tensor of a volume's shape, type and device that takes no memory."""
    if isinstance(value, Volume):
        return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
    return value


def _meta(value: Any) -> Any:
    if isinstance(value, Volume):
        return torch.empty(value.node.shape, dtype=value.node.dtype, device="meta")
    if isinstance(value, Tensor) and value.device.type != "meta":
        # Scalar tensors keep their value: an operation may read it, and type promotion treats them apart.
        return value if value.ndim == 0 else torch.empty_like(value, device="meta")
    return value
