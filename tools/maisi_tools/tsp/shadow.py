"""Shadows: what torch would return, but for the values; so nothing about an operation has to be guessed from its name.

Every handle has a *shadow*: shape, strides, type and device of the tensor it stands for, and the memory it would be on.
Each recorded operation runs on fake tensors like its shadows first (:mod:`torch._subclasses.fake_tensor`). That tells
type promotion, autocast included, which results share memory with which inputs, what is written into, and whether
random numbers are drawn. What was found is remembered, for networks do the same again, step after step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from maisi_tools.tsp.nodes import storage_of
from maisi_tools.tsp.opened import closed, leaves_of, opened

_LOG = logging.getLogger("torch._subclasses.fake_tensor")

_LAYOUTS = {"batch_norm": True, "pad": True, "roll": True, "rrelu": False, "logsigmoid": False}
"""Operations whose fakes have other strides than their results -> whether these keep the channels last, or never.

Found by comparing the strides of 150 operations on permuted, sliced and channels-last tensors, in torch 2.15.
"""

_ROOM = 2**44
"""Bytes of a fake's storage, which takes none: more than any tensor has."""

MOST = 4096
"""How many operations are remembered, the latest."""

_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


class Memory:
    """What tensors share that are views of each other.

    Attributes:
        plain: a plain tensor is on it.
    """

    def __init__(self) -> None:
        self.plain = False
        self._handles: list[weakref.ref[Any]] = []

    def enter(self, handle: Any) -> None:
        """Note a handle that is on it."""
        self._handles.append(weakref.ref(handle))

    def in_use(self) -> int:
        """How many of its handles there still are."""
        self._handles = [found for found in self._handles if found() is not None]
        return len(self._handles)


@dataclass(frozen=True)
class Shadow:
    """All of a tensor but its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    memory: Memory
    conj: bool = False

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize

    def as_type(self, dtype: torch.dtype) -> Shadow:
        """Return the shadow of a copy in another type."""
        strides = torch.empty(self.shape, device="meta").stride()
        return Shadow(self.shape, strides, 0, dtype, self.device, Memory())


class Holdings:
    """How much the results of a network's operations take while it runs unsplit.

    A result is held as long as the network's own code holds it, which is longer than it is read: a caller's variable
    keeps a block's input. While the network is recorded its handles are held, and let go, in the same way.

    Attributes:
        most: bytes at the worst moment.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._taken: dict[Memory, int] = {}

    def enter(self, handle: Any, shadow: Shadow, fresh: bool) -> None:
        """Note the handle of a result; ``fresh`` if its memory is its own, and not an argument's."""
        if fresh and shadow.memory not in self._taken:
            self._taken[shadow.memory] = shadow.nbytes
            self._now += shadow.nbytes
        if shadow.memory in self._taken:
            weakref.finalize(handle, self._leave, shadow.memory).atexit = False

    def knows(self, shadow: Shadow) -> bool:
        """Whether it is of a result that is held."""
        return shadow.memory in self._taken

    def passing(self, count: int) -> None:
        """Note what is there after an operation, and ``count`` bytes that it takes on the way."""
        self.most = max(self.most, self._now + count)

    def _leave(self, memory: Memory) -> None:
        if not memory.in_use():
            self._now -= self._taken.pop(memory, 0)


class Watch(TorchDispatchMode):
    """Sees every operation below Python: whether it draws random numbers, and what it is about to write into.

    Args:
        written: called with each tensor before it is written into.

    Attributes:
        drew: random numbers were drawn.
        paused: look away.
    """

    def __init__(self, written: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.written = written
        self.drew = self.paused = False
        self._foreign = False
        self._written: list[StorageWeakRef] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            # Attention is tagged for its dropout, which its rule refuses.
            if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name():
                self.drew = True
            for place, name in _writes(func):
                for tensor in leaves_of(args[place] if place < len(args) else kwargs.get(name)):
                    if isinstance(tensor, Tensor):
                        self._note(tensor)
                        self.written(tensor)
        return func(*args, **kwargs)

    def left_a_trace(self) -> bool:
        """Whether something was written into that is still there; what a call made for itself, and let go, is not."""
        return self._foreign or any(not memory.expired() for memory in self._written)

    def _note(self, tensor: Tensor) -> None:
        try:
            memory = tensor.untyped_storage()
            self._foreign |= not memory.resizable()  # numpy's or a file's, which lives on without a tensor
            self._written.append(StorageWeakRef(memory))
        except NotImplementedError:  # a sparse tensor has none
            self._foreign = True


class _Rehearsal(Watch):
    """Sees what an operation would allocate, too, while it runs on fakes.

    Args:
        given: storages of its arguments.

    Attributes:
        most: bytes that there are at once, at most, of what it makes.
    """

    def __init__(self, written: Callable[[Tensor], None], given: Collection[torch.UntypedStorage]) -> None:
        super().__init__(written)
        self.most = 0
        self._given = {memory._cdata for memory in given}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for part in leaves_of(result):
            if isinstance(part, Tensor) and part.layout == torch.strided and storage_of(part) not in self._given:
                memory = part.untyped_storage()
                self._made[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


_WRITES: dict[Any, list[tuple[int, str]]] = {}


def _writes(func: Any) -> list[tuple[int, str]]:
    """Which arguments an operation writes into, by its schema: place and name."""
    if func not in _WRITES:
        named = enumerate(func._schema.arguments)
        _WRITES[func] = [(i, given.name) for i, given in named if given.alias_info and given.alias_info.is_write]
    return _WRITES[func]


@dataclass
class _Part:
    """One result: the argument itself (``given``), or a tensor on the memory of argument or new memory ``memory``."""

    given: int | None
    memory: tuple[str, int]
    like: Shadow


@dataclass
class Seen:
    """What an operation does.

    Attributes:
        parts: its results, if all of them are tensors; otherwise empty.
        form: how they are put together.
        value: the result, where it is no tensor.
        written: places of the arguments whose memory it writes into.
        reshaped: it changes an argument's shape in place.
        drew: it draws random numbers.
        room: bytes that it takes on the way, beside its results.
        failed: it cannot run on fakes: it needs values, or torch refuses it.
    """

    parts: list[_Part] = field(default_factory=list)
    form: Hashable = None
    value: Any = None
    written: set[int] = field(default_factory=set)
    reshaped: bool = False
    drew: bool = False
    room: int = 0
    failed: bool = False


class Shadows:
    """Makes shadows, and finds out what operations do to them.

    Args:
        device: of the handles; "meta" is taken for a CPU.
        dtype: floating type to compute in, in place of the tensors' own and of autocast's; None keeps these.
    """

    _known: dict[Hashable, Seen] = {}
    """What operations do, whoever records them."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.dtype = dtype
        self._memories: dict[int, tuple[list[weakref.ref[Tensor]], Memory]] = {}
        """Plain tensors' storages -> tensors seen on each, which tell whether it is still that one, and its memory."""

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Shadow:
        """Return the shadow of a contiguous tensor with memory of its own."""
        return Shadow(shape, torch.empty(shape, device="meta").stride(), 0, dtype, self.device, Memory())

    def of(self, tensor: Tensor) -> Shadow:
        """Return the shadow of a plain strided tensor.

        Raises:
            TypeError: the tensor is sparse, quantised or a subclass.
        """
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
            raise TypeError(f"a {tensor.layout} {type(tensor).__name__} has no shadow")
        memory = self.memory(tensor)
        if memory is None:
            memory = Memory()
            self._memories[storage_of(tensor)] = [], memory
        seen = self._memories[storage_of(tensor)][0]
        if not any(found() is tensor for found in seen):
            seen.append(weakref.ref(tensor))
        dtype = self.dtype if self.dtype and tensor.is_floating_point() and tensor.ndim else tensor.dtype
        device = self.device if tensor.device.type == "meta" else tensor.device
        stride, offset = tensor.stride(), int(tensor.storage_offset())
        return Shadow(tensor.shape, stride, offset, dtype, device, memory, tensor.is_conj())

    def memory(self, tensor: Tensor) -> Memory | None:
        """The memory of a plain tensor's shadows; None where there are none."""
        seen, memory = self._memories.get(storage_of(tensor), ([], None))
        seen[:] = [found for found in seen if found() is not None]
        return memory if seen else None

    def run(self, func: Callable[..., Any], name: str, leaves: Sequence[Any], form: Hashable) -> Seen:
        """Find out what an operation does to arguments whose tensors are shadows, flattened."""
        key = self._key(func, leaves, form)
        if key is None:
            return self._run(func, name, leaves, form)
        seen = self._known.pop(key, None)
        if seen is None:
            seen = self._run(func, name, leaves, form)
        self._known[key] = seen
        if len(self._known) > MOST:
            self._known.pop(next(iter(self._known)))
        return seen

    def results(self, seen: Seen, leaves: Sequence[Any]) -> list[Shadow]:
        """Return the shadows of an operation's results."""
        new: dict[tuple[str, int], Memory] = {}
        found = []
        for part in seen.parts:
            if part.given is not None:
                found.append(leaves[part.given])
                continue
            kind, place = part.memory
            memory = leaves[place].memory if kind == "given" else new.setdefault(part.memory, Memory())
            like = part.like
            found.append(Shadow(like.shape, like.stride, like.offset, like.dtype, like.device, memory, like.conj))
        return found

    def _key(self, func: Callable[..., Any], leaves: Sequence[Any], form: Hashable) -> Hashable | None:
        """All that the outcome depends on; None where that cannot be said."""
        memories: dict[Memory, int] = {}
        parts: list[Hashable] = []
        for leaf in leaves:
            if isinstance(leaf, Shadow):
                own = memories.setdefault(leaf.memory, len(memories))
                parts.append((leaf.shape, leaf.stride, leaf.offset, leaf.dtype, leaf.device, leaf.conj, own))
            elif isinstance(leaf, _PLAIN) or leaf is Ellipsis:
                parts.append((type(leaf), str(leaf) if isinstance(leaf, float) else leaf))
            else:
                return None
        kind = self.device.type
        cast = None if self.dtype or not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)
        key = (func, form, tuple(parts), kind, self.dtype is None, cast, torch.get_default_dtype())
        try:
            hash(key)
        except TypeError:
            return None
        return key

    @functools.cached_property
    def _mode(self) -> FakeTensorMode:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.cache_enabled = False  # what was found is remembered here, by whole operations
        return mode

    def _run(self, func: Callable[..., Any], name: str, leaves: Sequence[Any], form: Hashable) -> Seen:
        seen, quiet = Seen(), _LOG.disabled
        written: set[int] = set()
        own = torch.autocast(self.device.type, enabled=False) if self.dtype else contextlib.nullcontext()
        storages: dict[Memory, torch.UntypedStorage] = {}
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad(), own:
            mode = self._mode
            fakes = {i: _fake(mode, leaf, storages) for i, leaf in enumerate(leaves) if isinstance(leaf, Shadow)}
            args, kwargs = closed(form, iter([fakes.get(i, leaf) for i, leaf in enumerate(leaves)]))
            watch = _Rehearsal(lambda tensor: written.add(storage_of(tensor)), storages.values())
            try:
                _LOG.disabled = True  # it would print the trace of what is tried again on values
                with mode, watch:
                    result = func(*args, **kwargs)
            except Exception:  # whatever it is, the operation itself will tell
                seen.failed = True
                result = None
            finally:
                _LOG.disabled = quiet
        places = {storages[leaves[i].memory]._cdata: i for i in reversed(fakes)}
        seen.drew = watch.drew
        seen.written = {places[storage] for storage in written if storage in places}
        seen.reshaped = any(
            (fake.shape, fake.stride()) != (leaves[i].shape, leaves[i].stride) for i, fake in fakes.items()
        )
        if seen.failed:
            return seen
        parts: list[Any] = []
        seen.form = opened(result, parts)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            seen.value = result if not any(isinstance(part, Tensor) for part in parts) else None
            return seen
        identities = {id(fake): i for i, fake in fakes.items()}
        new: dict[int, int] = {}
        for part in parts:
            place = places.get(storage_of(part))
            memory = ("given", place) if place is not None else ("new", new.setdefault(storage_of(part), len(new)))
            like = Shadow(
                part.shape, part.stride(), part.storage_offset(), part.dtype, part.device, _NOWHERE, part.is_conj()
            )
            given = args[0] if args and isinstance(args[0], FakeTensor) else None
            if place is None and given is not None and name in _LAYOUTS and part.ndim in (4, 5):
                layout = suggest_memory_format(given) if _LAYOUTS[name] else torch.contiguous_format
                stride = torch.empty(part.shape, device="meta", memory_format=layout).stride()
                like = Shadow(part.shape, stride, 0, part.dtype, part.device, _NOWHERE)
            seen.parts.append(_Part(identities.get(id(part)), memory, like))
        made = {part.memory: part.like.nbytes for part in seen.parts if part.memory[0] == "new"}
        seen.room = max(0, watch.most - sum(made.values()))
        return seen


_NOWHERE = Memory()


def _fake(mode: FakeTensorMode, shadow: Shadow, storages: dict[Memory, torch.UntypedStorage]) -> Tensor:
    if shadow.memory not in storages:
        storages[shadow.memory] = torch.UntypedStorage(_ROOM, device="meta")
    made = torch.empty(0, dtype=shadow.dtype, device="meta")
    made.set_(storages[shadow.memory], shadow.offset, shadow.shape, shadow.stride)
    return FakeTensor(mode, made.conj() if shadow.conj else made, shadow.device)
