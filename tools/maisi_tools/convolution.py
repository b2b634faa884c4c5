"""How a 3D convolution runs on a CPU: by oneDNN whatever its size, and with right gradients in bfloat16.

PyTorch (``aten/src/ATen/native/Convolution.cpp``, ``use_mkldnn``) sends a float32 convolution of one volume to oneDNN
only if channels x depth x height > 20480, which forgets the width, or if the kernel is wider than 3. A smaller one
takes ``slow_conv3d``, forwards and backwards. Measured on two cores of an AVX512 CPU, 64 -> 64 channels at 16^3:
3.9 ms against 13.1, and 8.3 against 26.8 for the gradients. When PyTorch counts the width, this can go.

Under autocast a CPU with AVX512-BF16 computes in bfloat16, twice as fast. But oneDNN 3.13 leaves memory unset in the
weight's gradient of small volumes: seen for kernel 3 on 2 rows and kernel 4 on 3, and one search over such sizes ended
in a bus error. So there the gradients of weights, and they alone, are computed in float32.

A CPU without AVX512 has no bfloat16 at all: PyTorch takes ``slow_conv3d``, element by element (measured on AVX2, one
core, decoding 16^3 latents: 31 s; in float32 0.4 s). There values are those of bfloat16, half the memory between
operations, and a convolution computes in float32 (0.4 s as well).

It stands at the ground of the package and needs torch alone.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import has_torch_function

_X86 = platform.machine() in ("x86_64", "AMD64")
"""oneDNN's own kernels are for x86; elsewhere it stands on other libraries, which were not measured."""

_AMX = torch.cpu._is_amx_tile_supported()
"""With AMX other kernels of oneDNN compute in bfloat16."""

_BFLOAT16 = not (_X86 and torch.backends.mkldnn.is_available()) or torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN has bfloat16 on this CPU; elsewhere bfloat16 is left to PyTorch."""

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

    Gradients are oneDNN's too; a gradient that is itself differentiated is PyTorch's. Under autocast to bfloat16 a
    weight is given its gradient in float32, see the module. Every other call is PyTorch's own: larger convolutions and
    batches, which it sends to oneDNN itself, 1x1 kernels, which are as fast either way, other devices and dtypes,
    tensor subclasses, and whatever watches or transforms the call (modes of ``torch.overrides`` and
    ``torch.utils._python_dispatch``, ``torch.func``, tracing, compiling, exporting).

    Args:
        input: (B, C, D, H, W); B = 1, float32, on the CPU, for the path by oneDNN.
        weight: (O, C, kD, kH, kW).
        bias: (O,).
        stride, padding, dilation, groups: as PyTorch has them.

    Returns:
        (B, O, D', H', W').

    Raises:
        RuntimeError: shapes or values that PyTorch refuses.
    """
    if not isinstance(padding, str) and _by_onednn(input, weight, bias):
        padding, stride, dilation = _three(padding), _three(stride), _three(dilation)
        differentiated = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, weight, bias)
        )
        if torch.is_autocast_enabled("cpu"):
            half = torch.get_autocast_dtype("cpu") == torch.bfloat16
            if half and differentiated and weight.requires_grad and not _AMX:
                return _HalfConvolution.apply(input, weight, bias, stride, padding, dilation, groups)
            if half and not _BFLOAT16:
                return _in_float32(conv3d, input, weight, bias, stride, padding, dilation, groups)
        elif groups == 1 and _all_float32(input, weight, bias) and _takes_slow_path(input, weight):
            if differentiated:
                return _Convolution.apply(input, weight, bias, stride, padding, dilation)
            return _convolved(input, weight, bias, stride, padding, dilation)
        elif not _BFLOAT16 and input.dtype == weight.dtype == torch.bfloat16:
            return _in_float32(conv3d, input, weight, bias, stride, padding, dilation, groups)
    return functional.conv3d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose3d`; in bfloat16 on a CPU without it by float32, as :func:`conv3d`."""
    settings = (stride, padding, output_padding, groups, dilation)
    if not _BFLOAT16 and _by_onednn(input, weight, bias):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if autocast or input.dtype == weight.dtype == torch.bfloat16:
            return _in_float32(functional.conv_transpose3d, input, weight, bias, *settings)
    return functional.conv_transpose3d(input, weight, bias, *settings)


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Whether this CPU convolves values of a type by way of float32, with copies of all that it reads and makes."""
    return dtype == torch.bfloat16 and not _BFLOAT16


def _in_float32(
    convolve: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    """A convolution of bfloat16 values, its sums in float32."""
    given = [None if t is None else t.bfloat16().float() for t in (input, weight, bias)]
    with torch.autocast("cpu", enabled=False):
        return convolve(*given, *settings).bfloat16()


class Conv3d(nn.Conv3d):
    """A plain convolution (B, C, D, H, W) -> (B, O, D', H', W') that runs by :func:`conv3d`.

    It has no state of its own, so a plain layer becomes one by ``layer.__class__ = Conv3d``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _by_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can run this call, and nothing expects to see the ordinary one: no mode, transform or tracer."""
    given = [input, weight] if bias is None else [input, weight, bias]
    return not (
        has_torch_function(given)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or torch.jit.is_scripting()
        or torch.compiler.is_compiling()
    ) and (
        _X86
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in given)
        and all(t.device.type == "cpu" and t.is_floating_point() and t.numel() > 0 for t in given)
        and input.ndim == weight.ndim == 5
    )


def _all_float32(*given: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in given)


def _takes_slow_path(input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch would run this float32 convolution in one group without oneDNN, and more slowly so."""
    return (
        len(input) == 1
        and input.shape[1] == weight.shape[1]
        and input.shape[1] * input.shape[2] * input.shape[3] <= _SMALL
        and tuple(weight.shape[3:]) != (1, 1)
        and not min(weight.shape[3:]) > 3
    )


def _three(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 3 if len(values) == 1 else values


def _convolved(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """``torch.mkldnn_convolution``, which reads a bias as if it were contiguous, be it a column or an expanded one."""
    bias = None if bias is None else bias.contiguous()
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, 1)


class _Convolution(torch.autograd.Function):
    """``torch.mkldnn_convolution`` of float32, with oneDNN's gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings, ctx.bias_sizes = (stride, padding, dilation, 1), None if bias is None else list(bias.shape)
        return _convolved(input, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        gradients = _gradients(grad, input, weight, ctx.bias_sizes, ctx.settings, ctx.needs_input_grad[:3])
        return *gradients, None, None, None


class _HalfConvolution(torch.autograd.Function):
    """A convolution in bfloat16 whose weight and bias get their gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        x, w = input.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, w)
        ctx.dtypes = [None if t is None else t.dtype for t in (input, weight, bias)]
        ctx.settings, ctx.bias_sizes = (stride, padding, dilation, groups), None if bias is None else list(bias.shape)
        return conv3d(x, w, None if bias is None else bias.bfloat16(), stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        settings = ctx.bias_sizes, ctx.settings
        single = grad.float(), x.float(), w.float()
        g, x, w = (grad, x, w) if _BFLOAT16 else single
        of_input = _gradients(g, x, w, *settings, (wanted[0], False, False))[0]
        others = _gradients(*single, *settings, (False, *wanted[1:3]))[1:]
        gradients = [
            None if g is None else g.to(dtype) for g, dtype in zip((of_input, *others), ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: list[int] | None, settings: Any, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of input, weight and bias that are wanted, by oneDNN.

    PyTorch's own backward pass asks ``use_mkldnn`` again. The rule always says yes to tensors in oneDNN's layout,
    which cannot be differentiated once more.
    """
    if not any(wanted):
        return [None, None, None]
    *settings, groups = settings
    small = groups == 1 and input.dtype == torch.float32 and _takes_slow_path(input, weight)
    if small and not torch.is_grad_enabled():
        grad, input = grad.to_mkldnn(), input.to_mkldnn()
    found = torch.ops.aten.convolution_backward(
        grad, input, weight, bias_sizes, *settings, False, [0, 0, 0], groups, list(wanted)
    )
    dense = [g.to_dense() if g is not None and g.is_mkldnn else g for g in found]
    return [g if w else None for g, w in zip(dense, wanted, strict=True)]
