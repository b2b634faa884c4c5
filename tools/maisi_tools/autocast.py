"""Mixed precision as an inferer, because MONAI's trainers know autocast on CUDA only."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import nn

from maisi_tools.errors import InputError


def fastest_dtype(device: torch.device | str) -> str:
    """The dtype to train in: "bfloat16" where the hardware computes in it, else "float16" on CUDA, "float32" on a CPU.

    float16 needs a gradient scaler: give the trainer ``amp: true``. A CPU computes in bfloat16 with AMX or AVX512-BF16
    (there with float32 gradients of weights, see :mod:`maisi_tools.convolution`). With AVX512 alone it is slower than
    float32 (measured: a convolution of 32 channels 0.32 s against 0.20 s).
    """
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    computes = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if torch.backends.mkldnn.is_available() and computes else "float32"


def on_device(network: nn.Module, device: torch.device | str, dtype: str) -> nn.Module:
    """Move a network to where it is trained, and return it.

    On CUDA in half precision the kernels of 3D convolutions get their channels last, and cuDNN then computes in that
    layout, whatever the input's: its tensor cores read it without a copy.

    Args:
        network: changed in place; the parameters stay the same objects.
        device: any.
        dtype: it is trained in, see :class:`AutocastInferer`.
    """
    network = network.to(device)
    if torch.device(device).type == "cuda" and dtype != "float32":
        for parameter in network.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return network


class AutocastInferer(SimpleInferer):
    """Runs the network under ``torch.autocast`` on whatever device the input is on.

    Args:
        dtype: "bfloat16", "float16" or "float32" (no autocast). bfloat16 needs no loss scaling.

    Raises:
        InputError: another dtype.
    """

    def __init__(self, dtype: str = "bfloat16") -> None:
        if dtype not in ("bfloat16", "float16", "float32"):
            raise InputError(f"amp_dtype is {dtype!r}; allowed are 'bfloat16', 'float16' and 'float32'")
        self.dtype = getattr(torch, dtype)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(inputs, *args, **kwargs)
