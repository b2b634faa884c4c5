"""Convolutions by oneDNN: their values and gradients, and the calls that stay PyTorch's own."""

from __future__ import annotations

import platform
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from maisi_tools import convolution
from maisi_tools.convolution import Conv3d, conv3d, conv_transpose3d
from maisi_tools.mask_generator.network import MaskUNet
from maisi_tools.networks import Autoencoder, ControlledUNet

needs_onednn = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN's kernels for x86 are not in this build",
)


@pytest.fixture
def by_onednn(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that were convolved by oneDNN's own entry."""
    shapes: list[tuple[int, ...]] = []
    own = torch.mkldnn_convolution

    def noted(input: Tensor, *args, **kwargs) -> Tensor:
        shapes.append(tuple(input.shape))
        return own(input, *args, **kwargs)

    monkeypatch.setattr(torch, "mkldnn_convolution", noted)
    return shapes


def arguments(channels: int = 8, out: int = 6, size=(5, 6, 7), kernel=(3, 3, 3), dtype=torch.float32, batch: int = 1):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, channels, *size, generator=generator, dtype=dtype),
        torch.randn(out, channels, *kernel, generator=generator, dtype=dtype),
        torch.randn(out, generator=generator, dtype=dtype),
    )


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 20),
    out=st.integers(1, 20),
    size=st.tuples(*[st.integers(4, 9)] * 3),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_values_and_gradients_are_those_of_float64(channels, out, size, kernel, stride, padding, bias, last):
    torch.manual_seed(channels * 100 + out)
    exact = [torch.randn(1, channels, *size), torch.randn(out, channels, *kernel), torch.randn(out)]
    single = [t.clone() for t in exact]
    if last:
        single[0] = single[0].contiguous(memory_format=torch.channels_last_3d)
    exact = [t.double() for t in exact]
    results = []
    for run, (x, w, b) in ((functional.conv3d, exact), (conv3d, single)):
        leaves = [x.requires_grad_(), w.requires_grad_(), *([b.requires_grad_()] if bias else [])]
        y = run(x, w, b if bias else None, stride, padding)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
        with torch.no_grad():
            torch.testing.assert_close(run(x, w, b if bias else None, stride, padding), y, rtol=0, atol=1e-5)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5 * (1 + float(expected.abs().max())))


STRIDED = {
    "strided": lambda: torch.randn(12)[::2],
    "column": lambda: torch.randn(6, 3)[:, 1],
    "row of a transposed": lambda: torch.randn(6, 4).t()[2],
    "expanded": lambda: torch.randn(1).expand(6),
    "offset": lambda: torch.randn(12)[3:9],
}
"""Biases that are parts of other tensors: each but the last is not contiguous."""


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("bias", STRIDED)
def test_a_bias_may_be_part_of_another_tensor(bias, wanted):
    """oneDNN's own entry reads it as if it were contiguous."""
    torch.manual_seed(0)
    x, w, b = *arguments()[:2], STRIDED[bias]()
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    single = [t.requires_grad_(wanted) for t in (x, w, b)]
    y, expected = conv3d(*single, padding=1), functional.conv3d(*exact, padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-4)
    if wanted:
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        gradients = torch.autograd.grad((y * weights).sum(), single)
        for got, right in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@needs_onednn
def test_only_what_pytorch_runs_slowly_is_taken(by_onednn):
    x, w, b = arguments()
    conv3d(x, w, b, padding=1)
    conv3d(x, w, None, stride=[2, 1, 1], padding=(1, 1, 0), dilation=(1, 2, 1))
    conv3d(x, w[:, :, :, :1], b)
    assert by_onednn == [(1, 8, 5, 6, 7)] * 3
    by_onednn.clear()
    conv3d(*arguments(channels=32, size=(32, 20, 4)))  # one row less than PyTorch's rule asks for
    assert len(by_onednn) == 1
    by_onednn.clear()
    for ordinary in (
        arguments(channels=32, size=(32, 21, 4)),  # 21504, which PyTorch sends to oneDNN
        arguments(batch=2),
        arguments(kernel=(1, 1, 1)),
        arguments(kernel=(1, 4, 4)),
        arguments(dtype=torch.float64),
        arguments(dtype=torch.complex64),
    ):
        assert torch.equal(conv3d(*ordinary), functional.conv3d(*ordinary))
    x, w, b = arguments()
    assert torch.equal(conv3d(x, w, b, padding="same"), functional.conv3d(x, w, b, padding="same"))
    assert torch.equal(conv3d(x, w[:, :4], b, groups=2), functional.conv3d(x, w[:, :4], b, groups=2))
    assert torch.equal(conv3d(x[0], w, b), functional.conv3d(x[0], w, b))
    assert conv3d(x[:0], w, b).shape == (0, 6, 3, 4, 5)
    assert conv3d(x.to("meta"), w.to("meta"), b.to("meta")).shape == (1, 6, 3, 4, 5)
    with torch.backends.mkldnn.flags(enabled=False):
        conv3d(x, w, b)
    assert not by_onednn


@needs_onednn
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("ours", [conv3d, conv_transpose3d])
def test_a_cpu_without_bfloat16_sums_in_float32(monkeypatch, ours, autocast):
    """The values that go in and come out are rounded to bfloat16, what is between is not; gradients likewise."""
    monkeypatch.setattr(convolution, "_BFLOAT16", False)
    monkeypatch.setattr(functional, ours.__name__, _in_bfloat16_no_more(getattr(functional, ours.__name__)))
    monkeypatch.setattr(convolution, "_AMX", False)
    theirs = {"conv3d": torch.conv3d, "conv_transpose3d": torch.conv_transpose3d}[ours.__name__]
    x, w, b = arguments(channels=6)
    x, w, b = (t.bfloat16() for t in (x, w, b))
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    given = [(t.float() if autocast else t).requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = ours(*given, 2, 1)
    wanted = theirs(*exact, 2, 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)
    seed = torch.linspace(-1, 1, got.numel()).reshape(got.shape).bfloat16()
    gradients = torch.autograd.grad(got, given, seed)
    for one, other in zip(gradients, torch.autograd.grad(wanted, exact, seed.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-5 * float(other.abs().max()))


def _in_bfloat16_no_more(convolve):
    """The same, which fails where it is given bfloat16: what would take minutes there."""

    def run(input, *args, **kwargs):
        assert input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return convolve(input, *args, **kwargs)

    return run


@needs_onednn
def test_without_onednn_for_this_machine_the_call_is_pytorchs(by_onednn, monkeypatch):
    monkeypatch.setattr(convolution, "_X86", False)
    x, w, b = arguments()
    assert torch.equal(conv3d(x, w, b), functional.conv3d(x, w, b)) and not by_onednn


class Named(Tensor):
    """A tensor that notes the functions it is given to."""

    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@needs_onednn
def test_what_watches_a_call_sees_an_ordinary_convolution(by_onednn):
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    x, w, b = arguments()
    Named.seen.clear()
    conv3d(x.as_subclass(Named), w, b)
    assert Named.seen == ["conv3d"]

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            Named.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    Named.seen.clear()
    with Watching():
        conv3d(x, w, b)
    assert "conv3d" in Named.seen
    with FlopCounterMode(display=False) as counter:
        y = conv3d(x, w, b)
    assert counter.get_total_flops() == 2 * 8 * 27 * y.numel()
    batched = torch.func.vmap(lambda one: conv3d(one[None], w, b)[0])(torch.cat([x, 2 * x]))
    torch.testing.assert_close(batched, functional.conv3d(torch.cat([x, 2 * x]), w, b))
    traced = torch.jit.trace(lambda one: conv3d(one, w, b), (x,), check_trace=False)
    assert "_convolution" in str(traced.graph) and "mkldnn" not in str(traced.graph)
    layer = Conv3d(8, 6, 3)
    graph = torch.export.export(layer, (x,)).graph
    assert any("conv3d" in str(node.target) for node in graph.nodes)
    assert not by_onednn
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3d(x, w, b).dtype == torch.bfloat16


@needs_onednn
def test_a_gradient_can_be_differentiated():
    w = arguments(channels=3, out=2, size=(4, 4, 4))[1]
    results = []
    for run, dtype in ((functional.conv3d, torch.float64), (conv3d, torch.float32)):
        x, weight = arguments(channels=3, size=(4, 4, 4))[0].to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(run(x, weight, None, 1, 1).pow(2).sum(), x, create_graph=True)
        results.append([slope, *torch.autograd.grad(slope.pow(2).sum(), (x, weight))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


@needs_onednn
def test_only_the_gradients_that_are_wanted_are_computed(by_onednn):
    x, w, b = arguments()
    conv3d(x, w.requires_grad_(), b).sum().backward()
    assert x.grad is None and b.grad is None and by_onednn
    torch.testing.assert_close(w.grad[0], x.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).sum((0, 2, 3, 4)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, w, b: conv3d(x[:, :5], w, b),
        lambda x, w, b: conv3d(x, w, b[:3]),
        lambda x, w, b: conv3d(x[:, :, :2], w, b),
        lambda x, w, b: conv3d(x, w, b, stride=0),
        lambda x, w, b: conv3d(x, w, b, padding=-1),
        lambda x, w, b: conv3d(x, w, b, dilation=0),
        lambda x, w, b: conv3d(x, w, b, stride=(1, 1)),
    ],
)
def test_what_pytorch_refuses_is_refused(wrong, monkeypatch):
    given = arguments()
    with pytest.raises(RuntimeError, match=r"expected|Expected|positive|negative|Kernel size|bias"):
        wrong(*given)
    monkeypatch.setattr(convolution, "_X86", False)
    with pytest.raises(RuntimeError):
        wrong(*given)


def test_a_layer_keeps_its_state_and_its_padding_mode():
    plain = nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate")
    layer = deepcopy(plain)
    layer.__class__ = Conv3d
    x = torch.randn(1, 3, 5, 5, 5)
    assert layer.state_dict().keys() == plain.state_dict().keys() and torch.equal(layer(x), plain(x))


@needs_onednn
def test_all_networks_run_by_it(by_onednn, tiny_settings, tiny_controlled):
    mask_unet = MaskUNet(
        spatial_dims=3,
        in_channels=4,
        out_channels=4,
        channels=[8, 16],
        attention_levels=[False, True],
        num_head_channels=[0, 8],
        num_res_blocks=1,
        norm_num_groups=4,
        cross_attention_dim=3,
    ).eval()
    mask = torch.ones(1, 1, 16, 16, 16)
    calls = [
        (Autoencoder(**tiny_settings["vae"]).eval(), (mask,)),
        (mask_unet, (torch.randn(1, 4, 8, 8, 8),)),
        (tiny_controlled.eval(), (mask, torch.randn(1, 4, 4, 4, 4))),
    ]
    for network, inputs in calls:
        kinds = {type(layer) for layer in network.modules()}
        assert nn.Conv3d not in kinds and Conv3d in kinds
        by_onednn.clear()
        with torch.no_grad():
            got = network(*inputs)
            assert by_onednn
            by_onednn.clear()
            with torch.backends.mkldnn.flags(enabled=False):
                expected = network(*inputs)
        assert not by_onednn
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(tiny_controlled, ControlledUNet)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(2, 3, 1), (1, 3, 2), (3, 4, 1), (9, 3, 1), (2, 1, 1)])
def test_weights_have_right_gradients_in_bfloat16(size, kernel, stride, dtype):
    """oneDNN's own in bfloat16 are memory that was never set, for the first three."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, size, 9, 9).to(dtype).requires_grad_()
    layer = Conv3d(16, 8, kernel, stride, padding=kernel // 2 if kernel != 4 else 1)
    exact = deepcopy(layer).double()
    for parameter in exact.parameters():  # what the layer computes with
        parameter.data = parameter.data.bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    weights = torch.randn_like(y)
    z = x.detach().bfloat16().double().requires_grad_()
    expected = exact(z)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    y.backward(weights)
    expected.backward(weights.double())
    assert x.grad.dtype == dtype and layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    largest = float(z.grad.abs().max())
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-2, atol=1e-2 * largest)
    for got, wanted in ((layer.weight.grad, exact.weight.grad), (layer.bias.grad, exact.bias.grad)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
