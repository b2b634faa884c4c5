from __future__ import annotations

import pytest
import torch

from maisi_tools.autocast import AutocastInferer, fastest_dtype, on_device


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_network_runs_in_the_dtype(dtype):
    network, x = torch.nn.Linear(16, 8), torch.randn(2, 16)
    output = AutocastInferer(dtype)(x, network)
    assert output.dtype == getattr(torch, dtype)
    assert network.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    expected = x.numpy() @ network.weight.detach().numpy().T + network.bias.detach().numpy()
    tolerance = {"bfloat16": 3e-2, "float16": 3e-3, "float32": 1e-6}[dtype]
    torch.testing.assert_close(output.detach().float(), torch.from_numpy(expected), atol=tolerance, rtol=tolerance)


def test_arguments_are_passed_on():
    output = AutocastInferer()(torch.ones(3), lambda x, gain, offset=0: gain * x + offset, 2, offset=5)
    assert output.tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", ["bf16", "float64", ""])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="allowed are 'bfloat16', 'float16' and 'float32'"):
        AutocastInferer(dtype)


def test_fastest_dtype_on_this_cpu():
    with open("/proc/cpuinfo") as file:
        flags = set(next((line for line in file if line.startswith("flags")), "").split())
    expected = "bfloat16" if flags & {"amx_tile", "avx512_bf16"} else "float32"
    assert fastest_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_have_their_channels_last_on_a_gpu_in_half_precision(device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    network = torch.nn.Sequential(torch.nn.Conv3d(8, 16, 3, padding=1), torch.nn.GroupNorm(4, 16))
    x, parameters = torch.randn(1, 8, 6, 6, 6), list(network.parameters())
    expected = network(x).detach()
    moved = on_device(network, device, dtype)
    last = moved[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert last == (device == "cuda" and dtype == "bfloat16")
    assert all(one is other for one, other in zip(parameters, moved.parameters(), strict=True))
    torch.testing.assert_close(moved(x.to(device)).cpu(), expected, atol=1e-2, rtol=1e-2)
