"""Where a 3D convolution on a CPU runs: by oneDNN whatever its size.

PyTorch (``aten/src/ATen/native/Convolution.cpp``, ``use_mkldnn``) sends a float32 convolution of one volume to oneDNN
only if channels x depth x height > 20480, which forgets the width, or if the kernel is wider than 3. A smaller one
takes ``slow_conv3d``, forwards and backwards. Measured on two cores of an AVX512 CPU, 64 -> 64 channels at 16^3:
3.9 ms against 13.1, and 8.3 against 26.8 for the gradients. When PyTorch counts the width, this module can go.

It stands at the ground of the package and needs torch alone.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import has_torch_function

_X86 = platform.machine() in ("x86_64", "AMD64")
"""oneDNN's own kernels are for x86; elsewhere it stands on other libraries, which were not measured."""

_SMALL = 20480
"""Channels x depth x height up to which PyTorch leaves oneDNN aside."""


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`torch.nn.functional.conv3d`, by oneDNN where PyTorch would take its slow path; equal to rounding.

    Gradients are oneDNN's too; a gradient that is itself differentiated is PyTorch's. Every other call is PyTorch's
    own: larger convolutions and batches, which it sends to oneDNN itself, 1x1 kernels, which are as fast either way,
    other devices and dtypes, autocast, tensor subclasses, and whatever watches or transforms the call (modes of
    ``torch.overrides`` and ``torch.utils._python_dispatch``, ``torch.func``, tracing, compiling, exporting).

    Args:
        input: (1, C, D, H, W), float32, on the CPU, for the path by oneDNN.
        weight: (O, C, kD, kH, kW).
        bias: (O,).
        stride, padding, dilation, groups: as PyTorch has them.

    Returns:
        (1, O, D', H', W').

    Raises:
        RuntimeError: shapes or values that PyTorch refuses.
    """
    if groups != 1 or isinstance(padding, str) or not _takes_slow_path(input, weight, bias):
        return functional.conv3d(input, weight, bias, stride, padding, dilation, groups)
    padding, stride, dilation = _three(padding), _three(stride), _three(dilation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _Convolution.apply(input, weight, bias, padding, stride, dilation)
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, 1)


class Conv3d(nn.Conv3d):
    """A plain convolution (B, C, D, H, W) -> (B, O, D', H', W') that runs by :func:`conv3d`.

    It has no state of its own, so a plain layer becomes one by ``layer.__class__ = Conv3d``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _takes_slow_path(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch would run this call without oneDNN though oneDNN can run it."""
    given = [input, weight] if bias is None else [input, weight, bias]
    return (
        not _watched(given)
        and all(
            type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in given
        )
        and all(t.layout == torch.strided and t.numel() > 0 for t in given)
        and input.ndim == weight.ndim == 5
        and len(input) == 1
        and input.shape[1] == weight.shape[1]
        and input.shape[1] * input.shape[2] * input.shape[3] <= _SMALL
        and tuple(weight.shape[3:]) != (1, 1)
        and not min(weight.shape[3:]) > 3
        and _X86
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def _watched(given: list[Tensor]) -> bool:
    """Whether something expects to see the ordinary call: autocast, a mode, a transform, a tracer, a compiler."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or has_torch_function(given)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or torch.compiler.is_compiling()
    )


def _three(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 3 if len(values) == 1 else values


class _Convolution(torch.autograd.Function):
    """``torch.mkldnn_convolution`` with oneDNN's gradients.

    PyTorch's derivative of it asks ``use_mkldnn`` again, and would take the slow path backwards. The rule always says
    yes to tensors in oneDNN's layout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: list[int],
        stride: list[int],
        dilation: list[int],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings, ctx.bias_sizes = (stride, padding, dilation), None if bias is None else list(bias.shape)
        return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():  # else it is differentiated itself, which oneDNN's layout does not allow
            grad, input = grad.to_mkldnn(), input.to_mkldnn()
        wanted = [*ctx.needs_input_grad[:3]]
        gradients = torch.ops.aten.convolution_backward(
            grad, input, weight, ctx.bias_sizes, *ctx.settings, False, [0, 0, 0], 1, wanted
        )
        dense = [g.to_dense() if g is not None and g.is_mkldnn else g for g in gradients]
        return *(g if w else None for g, w in zip(dense, wanted, strict=True)), None, None, None
