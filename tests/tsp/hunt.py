"""Random small networks, and whether a run in slabs is the plain network.

A *program* is a list of instructions over the tensors made so far: operations, views, writes in place, copies, casts,
draws, autocast, weights that change half-way. It runs twice, on the tensor itself and through
:class:`~maisi_tools.tsp.inferer.TSPInferer`, and :func:`judge` says which of four things happened.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from maisi_tools.tsp import whole
from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.inferer import TSPInferer

EQUAL, REFUSED, DIFFERENT, RAW = "equal", "refused", "silently different", "raw exception"

Instruction = tuple[str, int, int, int]
"""An operation's name, two numbers that choose tensors, and one that chooses a variant."""

MOST = 200_000
"""Elements up to which a tensor is made larger."""

_STATE = ("scratch", "accumulator", "weight")


@dataclass
class Result:
    """What a network may return beside tuples."""

    first: Any
    rest: Any = None


class Program(nn.Module):
    """A network that follows instructions.

    Args:
        instructions: what to do, in order.
        returned: numbers that choose what is returned beside the last tensor.
        form: of the result: 0 a tuple, 1 a dictionary, 2 a dataclass.
    """

    def __init__(self, instructions: Sequence[Instruction], returned: Sequence[int] = (), form: int = 0) -> None:
        super().__init__()
        self.instructions, self.returned, self.form = list(instructions), list(returned), form
        made = torch.Generator().manual_seed(3)
        self.register_buffer("scratch", torch.ones(1))
        self.register_buffer("accumulator", torch.zeros(2))
        self.weight = nn.Parameter(torch.rand(2, 2, 3, 3, 3, generator=made) * 0.2)
        self.wide = nn.Parameter(torch.rand(4, 2, 2, 3, 1, generator=made) * 0.3)
        self.up = nn.Parameter(torch.rand(2, 2, 2, 3, 2, generator=made) * 0.3)
        self.scale = nn.Parameter(torch.rand(2, generator=made) + 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        values: list[Tensor] = [x]
        seen: list[Any] = []
        with contextlib.ExitStack() as stack:
            for name, a, b, variant in self.instructions:
                v, w = values[-1 - a % len(values)], values[-1 - b % len(values)]
                if v.numel() > MOST:
                    continue
                if name == "autocast":
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=variant % 2 == 0))
                    continue
                made = OPERATIONS[name](self, v, w, variant)
                for part in made if isinstance(made, (tuple, list)) else (made,):
                    (values if isinstance(part, Tensor) else seen).append(part)
        chosen = [values[-1], *(values[-1 - place % len(values)] for place in self.returned)]
        seen = [part for part in seen if part is not None]
        if self.form == 2:
            return Result(chosen[0], (chosen[1:], seen))
        return {"first": chosen[0], "rest": chosen[1:], "seen": seen} if self.form == 1 else (*chosen, seen)


OPERATIONS: dict[str, Callable[[Program, Tensor, Tensor, int], Any]] = {}


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    OPERATIONS[function.__name__] = function
    return function


def _pick(variant: int, choices: Sequence[Any]) -> Any:
    return choices[variant % len(choices)]


def _volume(v: Tensor) -> bool:
    return v.ndim == 5 and v.shape[1] == 2


# --- elements ---------------------------------------------------------------------------------------------------------


@operation
def pointwise(p, v, w, n):
    return _pick(
        n,
        [
            lambda: torch.tanh(v),
            lambda: functional.silu(v),
            lambda: v * 2 - 1,
            lambda: -v,
            lambda: +v,
            lambda: v.clamp(min=-1, max=1),
            lambda: torch.clamp(input=v, min=-0.5),
            lambda: functional.gelu(input=v, approximate="tanh"),
            lambda: functional.rrelu(v, 0.1, 0.5),
            lambda: torch.where(v > 0, v, 0),
            lambda: v.masked_fill(v < 0, 0),
            lambda: 1 - v,
            lambda: v / 3,
            lambda: v // 2,
            lambda: torch.sigmoid(v),
            lambda: v.sign(),
            lambda: functional.prelu(v, p.scale[:1]),
            lambda: functional.softplus(v),
            lambda: torch.nan_to_num(v, nan=0.5),
            lambda: functional.logsigmoid(v),
            lambda: torch.exp(-v.abs()),
            lambda: v.abs() ** 0.5,
            lambda: functional.threshold(v, 0.1, 2.0),
        ],
    )()


@operation
def two(p, v, w, n):
    try:
        torch.broadcast_shapes(v.shape, w.shape)
    except RuntimeError:
        return None
    return _pick(
        n,
        [
            lambda: v + w,
            lambda: v * w,
            lambda: torch.sub(input=v, other=w, alpha=2),
            lambda: torch.maximum(v, w),
            lambda: torch.where(v > w, v, w),
            lambda: torch.lerp(v, w, 0.25),
            lambda: torch.addcmul(v, w, w, value=0.5),
            lambda: torch.broadcast_tensors(v, w),
            lambda: (v >= w) & (w > 0),
            lambda: torch.stack(torch.broadcast_tensors(v, w), 1).mean(1),
        ],
    )()


@operation
def scalars(p, v, w, n):
    return _pick(
        n,
        [
            lambda: v * v.mean() if v.is_floating_point() else None,
            lambda: f"{v.float().mean():.1f}" if v.numel() else None,
            lambda: round(float(v.float().abs().sum()), 1) > 5,
            lambda: v + torch.tensor(2.0, dtype=torch.float64),
            lambda: v + torch.ones(1, dtype=torch.float64),
            lambda: v * torch.arange(v.shape[-1]) if v.ndim else None,
            lambda: v * torch.arange(v.shape[2]).view(-1, 1, 1) if v.ndim > 3 else None,
            lambda: bool((v > 0).any()),
            lambda: float(v.sum()) if v.is_floating_point() else int(v.sum()),
            lambda: v.float().quantile(0.5),
        ],
    )()


# --- views, copies, writes --------------------------------------------------------------------------------------------


@operation
def view(p, v, w, n):
    if v.ndim < 2:
        return v.view(-1)
    return _pick(
        n,
        [
            lambda: v[:, :1],
            lambda: v[..., 1:],
            lambda: v[..., ::2],
            lambda: v.narrow(v.ndim - 1, 0, 1),
            lambda: v.select(0, 0) if v.shape[0] else None,
            lambda: v.diagonal(dim1=-1, dim2=-2),
            lambda: v.as_strided(tuple(v.shape), tuple(v.stride())),
            lambda: v.as_strided((2, 2), (1, 2)) if v.numel() > 4 else None,
            lambda: v.ravel(),
            lambda: v.unfold(v.ndim - 1, 2, 1) if v.shape[-1] > 1 else None,
            lambda: v.hsplit([1]),
            lambda: v.dsplit([1]) if v.ndim > 2 else None,
            lambda: v.conj(),
            lambda: v.adjoint(),
            lambda: v.mH,
            lambda: v.mT,
            lambda: torch.atleast_3d(v),
            lambda: v.permute(0, *range(2, v.ndim), 1),
            lambda: v.transpose(1, -1),
            lambda: v.movedim(1, -1),
            lambda: v.unsqueeze(2).squeeze(2),
            lambda: v.reshape(v.shape[0], -1),
            lambda: v.flatten(1) if v.ndim > 1 else None,
            lambda: v.view(v.shape[0], -1),
            lambda: v.expand(*v.shape),
            lambda: v[:1].expand(3, *v.shape[1:]) if v.shape[0] else None,
            lambda: v.chunk(2, -1),
            lambda: v.split(1, 1)[0],
            lambda: torch.unbind(v, 1)[0],
            lambda: v.detach(),
            lambda: v.real,
            lambda: v.view(v.dtype),
            lambda: torch.ones_like(v).view(torch.int32) if v.dtype == torch.float32 else None,
            lambda: v.swapaxes(0, -1),
            lambda: torch.transpose(input=v, dim0=0, dim1=1),
            lambda: torch.permute(input=v, dims=tuple(range(v.ndim))[::-1]),
            lambda: v.T if v.ndim == 2 else None,
            lambda: v.squeeze(),
            lambda: v[None],
            lambda: v[:, [0]],
            lambda: v[0],
            lambda: torch.tensor_split(v, 2, dim=-1),
        ],
    )()


@operation
def copy(p, v, w, n):
    last = torch.channels_last_3d
    return _pick(
        n,
        [
            lambda: v.clone(),
            lambda: v.contiguous(),
            lambda: v.contiguous(memory_format=last) if v.ndim == 5 else None,
            lambda: v.to(memory_format=last) if v.ndim == 5 else None,
            lambda: v.to(v.dtype, copy=True),
            lambda: v.to(v.dtype),
            lambda: v.to(v.device),
            lambda: v.to(w),
            lambda: v.type_as(w),
            lambda: v.float(),
            lambda: v.double(),
            lambda: v.to(torch.int32),
            lambda: v.to(torch.bfloat16),
            lambda: v.clone(memory_format=torch.contiguous_format),
            lambda: functional.dropout(v, 0.5, False),
            lambda: nn.Dropout3d().eval()(v),
            lambda: nn.Identity()(v),
            lambda: torch.clone(input=v),
            lambda: torch.empty_like(v).copy_(v),
            lambda: torch.zeros_like(v),
            lambda: v.new_ones(v.shape),
            lambda: torch.positive(v) if v.dtype != torch.bool else None,
            lambda: v.cpu(),
            lambda: v.bool(),
        ],
    )()


@operation
def write(p, v, w, n):
    return _pick(
        n,
        [
            lambda: v.add_(1),
            lambda: v.mul_(2),
            lambda: functional.relu(v, inplace=True),
            lambda: torch.relu_(v),
            lambda: v.clamp_(min=-0.5),
            lambda: v.zero_(),
            lambda: v.fill_(2),
            lambda: v.copy_(w) if v.shape == w.shape else None,
            lambda: v.add_(w) if v.shape == w.shape and v.dtype == w.dtype else None,
            lambda: nn.LeakyReLU(0.2, inplace=True)(v),
            lambda: functional.dropout(v, 0.5, False, inplace=True),
            lambda: v.masked_fill_(v > 0, 1),
            lambda: v.sub_(v.mean(dim=-1, keepdim=True)) if v.is_floating_point() and v.ndim else None,
            lambda: torch.neg(v, out=v),
            lambda: v.t_() if v.ndim == 2 else v.unsqueeze_(0),
            lambda: v.index_fill_(0, torch.tensor([0]), 3) if v.ndim and len(v) else None,
            lambda: v.cumsum_(-1) if v.ndim and v.dtype != torch.bool else None,
            lambda: v.exponential_() if v.is_floating_point() else None,
        ],
    )()


@operation
def assign(p, v, w, n):
    if not v.ndim or not v.shape[0]:
        return None
    if n % 5 == 0:
        v[0] = 1
    elif n % 5 == 1:
        v[..., :1] *= 2
    elif n % 5 == 2:
        v += 1
    elif n % 5 == 3 and v.shape == w.shape:
        v[v > 0] = 0
    elif v.dtype == w.dtype and v.shape[1:] == w.shape[1:] and v.ndim > 1:
        v[:1] = w[:1]
    return None


@operation
def queries(p, v, w, n):
    return _pick(
        n,
        [
            lambda: v.is_contiguous(),
            lambda: tuple(v.stride()),
            lambda: v.storage_offset(),
            lambda: str(v.dtype),
            lambda: tuple(v.shape),
            lambda: v.is_contiguous(memory_format=torch.channels_last_3d) if v.ndim == 5 else None,
            lambda: v is w,
            lambda: v.is_floating_point(),
            lambda: len(v) if v.ndim else None,
            lambda: v.tolist() if 0 < v.numel() < 4 else None,
            lambda: float(v.numpy().sum()) if v.dtype == torch.float64 else None,
        ],
    )()


# --- state, draws, autocast -------------------------------------------------------------------------------------------


@operation
def state(p, v, w, n):
    def accumulate():
        p.accumulator += v.float().mean()
        return p.accumulator * 1

    def load():
        p.load_state_dict({name: value + 0.25 for name, value in p.state_dict().items()})

    def scratch_add():
        p.scratch.add_(1)
        return v + p.scratch

    def remembered():
        p.last = v
        return p.last * 1

    def repoint():
        p.scale.data = p.scale.detach() * 2
        return v * p.scale[0]

    def local():
        buffer = torch.full((1,), 2.0)
        out = v * buffer
        buffer.fill_(7.0)
        return out

    return _pick(
        n,
        [
            accumulate,
            load,
            scratch_add,
            repoint,
            local,
            lambda: p.weight.mul_(1.5) if n % 2 else p.weight.data.add_(0.1),
            lambda: v * p.scratch,
            lambda: p.scratch.copy_(v.float().mean()).sum(),
            lambda: setattr(p, "weight", nn.Parameter(p.weight * 0.5, requires_grad=False)),
        ],
    )()


@operation
def draw(p, v, w, n):
    return _pick(
        n,
        [
            lambda: torch.rand(1) + v,
            lambda: v + torch.randn_like(v) if v.is_floating_point() else None,
            lambda: v * 1 + torch.rand(tuple(v.shape)) if v.is_floating_point() else None,
            lambda: (v * 1).normal_() if v.is_floating_point() else None,
            lambda: v.clone().bernoulli_(0.5),
            lambda: v.clone().random_(0, 5) if v.dtype != torch.bool else None,
            lambda: v.uniform_() if v.is_floating_point() else None,
            lambda: torch.bernoulli(v.float().sigmoid()),
            lambda: torch.normal(v, 0.5) if v.is_floating_point() else None,
            lambda: functional.gumbel_softmax(v, dim=-1) if v.is_floating_point() and v.ndim else None,
        ],
    )()


@operation
def autocast(p, v, w, n):
    """Entered, or left, for what follows; the program does it."""


# --- layers -----------------------------------------------------------------------------------------------------------


@operation
def convolution(p, v, w, n):
    if not _volume(v):
        return None
    return _pick(
        n,
        [
            lambda: functional.conv3d(v, p.weight, padding=1),
            lambda: functional.conv3d(input=v, weight=p.weight, bias=p.scale, padding=1, stride=2),
            lambda: functional.conv3d(v, p.wide, padding="same"),
            lambda: functional.conv_transpose3d(v, p.up, stride=2),
            lambda: functional.conv3d(v, p.weight, p.up[:, 0, 0, 0, 0], 1, 1),
            lambda: functional.linear(v, torch.ones(3, v.shape[-1])),
        ],
    )()


@operation
def norm(p, v, w, n):
    if not _volume(v):
        return functional.layer_norm(v, v.shape[-1:], eps=1e-1) if v.ndim and v.is_floating_point() else None
    return _pick(
        n,
        [
            lambda: functional.group_norm(v, 1, p.scale, p.scale, 1e-1),
            lambda: functional.group_norm(v, num_groups=2, eps=1e-1),
            lambda: functional.instance_norm(v, eps=1e-1),
            lambda: functional.instance_norm(v, weight=p.scale, bias=p.scale, eps=1e-1),
            lambda: functional.batch_norm(v, p.scale, p.scale.square(), eps=1e-1),
            lambda: functional.batch_norm(v, p.scale.clone(), p.scale.clone(), training=True, eps=1e-1),
            lambda: functional.batch_norm(v, None, None, training=True, eps=1e-1),
            lambda: functional.layer_norm(v, tuple(v.shape[2:]), eps=1e-1),
            lambda: functional.layer_norm(v, (v.shape[-1],), eps=1e-1),
        ],
    )()


@operation
def pool(p, v, w, n):
    if v.ndim != 5:
        return None
    return _pick(
        n,
        [
            lambda: functional.max_pool3d(v, 2, 1, 1),
            lambda: functional.max_pool3d(input=v, kernel_size=2),
            lambda: functional.max_pool3d(v, 3, 2, 1, ceil_mode=True),
            lambda: functional.max_pool3d(v, 2, return_indices=True)[0],
            lambda: functional.avg_pool3d(v, 3, 2, 1),
            lambda: functional.avg_pool3d(v, 3, 1, 1, count_include_pad=False),
            lambda: functional.avg_pool3d(v, 2, 1, 1, divisor_override=3),
            lambda: functional.avg_pool3d(v, 2, ceil_mode=True),
            lambda: functional.adaptive_avg_pool3d(v, 2),
        ],
    )()


@operation
def resize(p, v, w, n):
    if v.ndim != 5:
        return None
    return _pick(
        n,
        [
            lambda: functional.interpolate(v, scale_factor=2, mode="trilinear"),
            lambda: functional.interpolate(v, scale_factor=2),
            lambda: functional.interpolate(v, size=(5, 7, 6), mode="trilinear"),
            lambda: functional.interpolate(v, size=[6, 5, 8], mode="trilinear", align_corners=True),
            lambda: functional.interpolate(v, scale_factor=(1.4, 0.8, 1.0), mode="nearest"),
            lambda: functional.interpolate(v, size=4, mode="nearest-exact"),
            lambda: functional.interpolate(v, size=(5, 7, 6), mode="area"),
            lambda: functional.interpolate(v, scale_factor=1.5, mode="trilinear", recompute_scale_factor=True),
            lambda: functional.interpolate(v, scale_factor=(3, 1, 2), mode="trilinear"),
        ],
    )()


@operation
def join(p, v, w, n):
    if v.ndim != w.ndim or v.ndim < 2:
        return None
    dim = _pick(n, (1, 0, -1, 2 if v.ndim > 2 else 1))
    if any(a != b for d, (a, b) in enumerate(zip(v.shape, w.shape, strict=True)) if d != dim % v.ndim):
        return None
    return _pick(
        n // 4,
        [
            lambda: torch.cat([v, w], dim),
            lambda: torch.cat(tensors=(v, w), dim=dim),
            lambda: torch.cat([v, w.double()], dim),
            lambda: torch.cat([v, torch.ones(tuple(w.shape))], dim),
            lambda: torch.stack([v, v], dim),
            lambda: torch.concat([v, v[..., :1].expand(*v.shape)], dim),
        ],
    )()


@operation
def move(p, v, w, n):
    if v.ndim < 3:
        return None
    return _pick(
        n,
        [
            lambda: functional.pad(v, (1, 2, 0, 1)),
            lambda: functional.pad(v, (1, 0, 1, 0, 2, 1), value=2),
            lambda: functional.pad(v, (1, -1)),
            lambda: functional.pad(v, (1, 1, 1, 1, 1, 1), mode="replicate") if v.ndim == 5 else None,
            lambda: functional.pad(v, (1, 0, 0, 1, 1, 1), mode="reflect") if v.ndim == 5 else None,
            lambda: functional.pad(v, (1, 0, 0, 1, 2, 1), mode="circular") if v.ndim == 5 else None,
            lambda: v.flip(-1),
            lambda: torch.flip(input=v, dims=(2,)),
            lambda: torch.roll(v, 2, 2),
            lambda: v.roll(shifts=(1, -2), dims=(-1, 2)),
            lambda: torch.roll(v, 1),
            lambda: v.repeat(*[2] * v.ndim),
            lambda: v.tile(2),
            lambda: v.repeat_interleave(2, 2),
            lambda: v.sort(-1)[0],
            lambda: v.cumsum(2),
            lambda: torch.rot90(v, 1, (2, v.ndim - 1)) if v.ndim > 3 else None,
        ],
    )()


@operation
def reduce(p, v, w, n):
    if v.ndim < 2:
        return None
    return _pick(
        n,
        [
            lambda: v.sum(1, keepdim=True),
            lambda: torch.sum(input=v, dim=-1),
            lambda: v.float().mean((2, 3)) if v.ndim > 3 else None,
            lambda: v.amax(dim=1),
            lambda: torch.max(v, dim=1)[0],
            lambda: v.max(dim=-1).values,
            lambda: v.float().std(1, keepdim=True) if v.shape[1] > 1 else None,
            lambda: torch.softmax(input=v, dim=1),
            lambda: functional.softmax(v, -1, dtype=torch.float64),
            lambda: v.float().logsumexp(-1),
            lambda: v.sum(dim=()),
            lambda: v.sum(dtype=torch.float64, dim=1),
            lambda: v.argmax(1),
            lambda: torch.norm(v, dim=1),
            lambda: v.float().var(dim=(1, -1), correction=0),
            lambda: v.topk(1, dim=1),
            lambda: v.all(dim=1),
        ],
    )()


@operation
def attention(p, v, w, n):
    if v.ndim != 5 or not 0 < v.numel() < 4000 or not v.is_floating_point():
        return None
    tokens = v.flatten(2).transpose(1, 2)
    other = tokens[:, :5] * 0.5
    attend = functional.scaled_dot_product_attention
    return _pick(
        n,
        [
            lambda: attend(tokens, tokens, tokens),
            lambda: attend(tokens, tokens, tokens, is_causal=True),
            lambda: attend(tokens, other, other, scale=2.0),
            lambda: attend(query=tokens, key=other, value=other),
            lambda: attend(tokens, other, other, attn_mask=torch.arange(5) > 2),
            lambda: torch.einsum("bxc,byc->bxy", tokens, other).softmax(-1),
            lambda: tokens @ other.mT,
            lambda: torch.bmm(input=tokens, mat2=other.mT),
            lambda: torch.baddbmm(tokens[..., :1], tokens, other.mT),
            lambda: torch.matmul(tokens, torch.ones(tokens.shape[-1])),
        ],
    )()


# --- inputs, settings, the judgement ----------------------------------------------------------------------------------

INPUTS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.randn(1, 2, 6, 5, 7),
    "float32, two": lambda: torch.randn(2, 2, 4, 5, 6),
    "double": lambda: torch.randn(1, 2, 6, 5, 4).double(),
    "bfloat16": lambda: torch.randn(1, 2, 6, 5, 4).bfloat16(),
    "int16": lambda: torch.randint(-1000, 1000, (1, 2, 6, 5, 4), dtype=torch.int16),
    "uint8": lambda: torch.randint(0, 250, (1, 2, 6, 5, 4), dtype=torch.uint8),
    "not a number": lambda: _spoilt(float("nan")),
    "infinite": lambda: _spoilt(float("inf")),
    "empty": lambda: torch.randn(0, 2, 6, 5, 4),
    "channels last": lambda: torch.randn(1, 2, 6, 5, 4).contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda: torch.randn(1, 2, 4, 5, 6).permute(0, 1, 4, 3, 2),
}


def _spoilt(value: float) -> Tensor:
    volume = torch.randn(1, 2, 6, 5, 4)
    volume[0, 0, 2:4, 3, 1] = value
    volume[0, 1, 0, 0, 3] = value
    return volume


HALF = object()
"""In place of a memory limit: half of what slabs take without one."""

SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "1": {"splits": 1},
    "2 along y": {"splits": 2, "axis": 1},
    "5": {"splits": 5, "axis": 0},
    "limit": {"memory_limit": HALF},
}


@dataclass
class Outcome:
    """What happened, and what was seen."""

    kind: str
    detail: str = ""


def judge(
    instructions: Sequence[Instruction],
    returned: Sequence[int] = (),
    form: int = 0,
    volume: str = "float32",
    setting: str = "1",
    outer: bool = False,
    inference: bool = False,
) -> Outcome:
    """Run a program plainly and by TSP, and compare results, inputs, state, and the random generator afterwards.

    Args:
        instructions, returned, form: of the :class:`Program`.
        volume: a name of :data:`INPUTS`.
        setting: a name of :data:`SETTINGS`.
        outer: run both under autocast.
        inference: run both in inference mode, where tensors have no version.
    """

    def run(call: Callable[[Program, Tensor], Any]) -> tuple[Any, Any]:
        program = Program(instructions, returned, form)
        torch.manual_seed(0)
        x = INPUTS[volume]()
        mode = torch.inference_mode() if inference else torch.no_grad()
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=outer), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = call(program, x)
            except Exception as error:
                return error, None
        return result, (x, [getattr(program, name).detach() for name in _STATE], torch.get_rng_state())

    def slabs(program: Program, x: Tensor) -> Any:
        settings = dict(SETTINGS[setting])
        if settings.get("memory_limit") is HALF:
            random = torch.get_rng_state()
            fresh = Program(instructions, returned, form)
            settings["memory_limit"] = 2**40
            try:
                plan = TSPInferer(memory_limit=2**40).plan(x.clone(), fresh)
                for share in (0.5, 0.9):
                    limit = plan.base + int((plan.peak - plan.base) * share)
                    TSPInferer(memory_limit=limit).plan(x.clone(), Program(instructions, returned, form))
                    settings["memory_limit"] = limit
                    break
            except Exception:
                pass
            torch.set_rng_state(random)
        sizes = {} if setting == "whole" else {"cpu": 0}
        with patch.dict(whole.WHOLE_BYTES, sizes):
            return TSPInferer(**settings)(x, program)

    wanted, after = run(lambda program, x: program(x))
    found, left = run(slabs)
    if isinstance(found, TSPError):
        return Outcome(REFUSED, str(found))
    if isinstance(wanted, Exception):
        if isinstance(found, Exception):
            return Outcome(EQUAL, f"both raise: {wanted!s:.80}")
        return Outcome(DIFFERENT, f"the plain network raises {wanted!r:.160}")
    if isinstance(found, Exception):
        return Outcome(RAW, f"{found!r:.300}")
    rough = outer or volume == "bfloat16" or any(name == "autocast" or name == "copy" for name, *_ in instructions)
    difference = apart(wanted, found, "", rough) or apart(after[:2], left[:2], "afterwards ", rough)
    if not difference and not torch.equal(after[2], left[2]):
        difference = "the random generator is elsewhere"
    return Outcome(DIFFERENT, difference) if difference else Outcome(EQUAL)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def apart(wanted: Any, found: Any, where: str = "", rough: bool = False) -> str:
    """Say how two results differ; nothing where they are equal to rounding, ``rough`` for that of bfloat16."""
    if type(wanted) is not type(found) and not isinstance(wanted, nn.Parameter):
        return f"{where}a {type(found).__name__} in place of a {type(wanted).__name__}"
    if isinstance(wanted, Result):
        return apart((wanted.first, wanted.rest), (found.first, found.rest), where, rough)
    one, form = tree_flatten(wanted)
    other, same = tree_flatten(found)
    if form != same:
        return f"{where}another structure: {same} for {form}"
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if type(a) is not type(b) and not isinstance(a, nn.Parameter):
            return f"{where}{place}: a {type(b).__name__} in place of a {type(a).__name__}"
        if not isinstance(a, Tensor):
            a, b = _number(a), _number(b)
            near = 0.1 if rough else 1e-3
            if not (a == b or (isinstance(a, float) and np.isclose(a, b, rtol=near, atol=near, equal_nan=True))):
                return f"{where}{place}: {b!r} for {a!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{where}{place}: {tuple(b.shape)} {b.dtype} for {tuple(a.shape)} {a.dtype}"
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"{where}{place}: {int((a != b).sum())} of {a.numel()} {a.dtype} differ"
            continue
        dtype, a, b = a.dtype, a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"{where}{place}: {int((~b.isfinite()).sum())} values not finite for {int((~a.isfinite()).sum())}"
        if a[a.isfinite()].numel():
            largest = a[a.isfinite()].abs().max().item()
            allowed = 4e-2 if rough else 2e-5
            off = (a - b)[a.isfinite()].abs().max().item()
            if off > allowed * max(largest, 1.0):
                return f"{where}{place}: off by {off:.3g} of {largest:.3g} ({dtype})"
    return ""
