"""Each operation's rule against the operation itself, over random sizes, splits and axes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from bounds import check

from maisi_tools.tsp.errors import TSPError
from maisi_tools.tsp.inferer import TSPInferer
from thorough import examples


class Function(nn.Module):
    """A function as a network in evaluation mode, with a 4 -> 4 convolution before it, so that it reads slabs."""

    def __init__(self, function, channels: int = 4, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Conv3d(channels, channels, 3, padding=1)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)
        self.eval()

    def forward(self, x):
        return self.function(self, self.before(x))


def functions():
    """Name -> network of one operation (after a convolution)."""
    seed = torch.manual_seed(5)
    made: dict[str, Function] = {}
    running = nn.InstanceNorm3d(4, track_running_stats=True).eval()
    before = running.running_mean._version
    running(torch.ones(1, 4, 2, 2, 2))
    if running.running_mean._version == before:  # torch 2.8 writes them back, which is refused
        made["instance norm with running statistics"] = Function(lambda self, x: self.inner(x), inner=running)
    for name, conv in {
        "stride 2": nn.Conv3d(4, 6, 3, stride=2, padding=1),
        "stride 3, even kernel": nn.Conv3d(4, 6, 4, stride=3, padding=(2, 1, 0)),
        "stride longer than kernel": nn.Conv3d(4, 6, 1, stride=2),
        "dilated": nn.Conv3d(4, 4, 3, dilation=2, padding=2, groups=2),
        "dilated and unpadded": nn.Conv3d(4, 4, (3, 2, 1), dilation=(1, 2, 3)),
        "padded the same": nn.Conv3d(4, 5, (4, 3, 2), padding="same"),
        "reflecting": nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"),
        "circular": nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"),
        "transposed": nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1),
        "transposed, kernel shorter than stride": nn.ConvTranspose3d(4, 4, 2, stride=3, output_padding=1, groups=2),
        "transposed and dilated": nn.ConvTranspose3d(4, 4, 3, stride=2, padding=2, dilation=2),
        "group norm": nn.GroupNorm(2, 4, eps=1e-6),
        "instance norm": nn.InstanceNorm3d(4, affine=True),
        "batch norm": nn.BatchNorm3d(4),
        "max pool": nn.MaxPool3d(3, stride=2, padding=1),
        "max pool, dilated": nn.MaxPool3d(2, stride=1, dilation=2),
        "average pool": nn.AvgPool3d(2),
        "average pool, padded": nn.AvgPool3d(3, stride=2, padding=1),
        "average pool without the border": nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False),
        "average pool by a divisor": nn.AvgPool3d(3, stride=2, padding=1, divisor_override=5),
        "adaptive pool": nn.AdaptiveAvgPool3d(1),
        "prelu": nn.PReLU(4),
        "rrelu": nn.RReLU(0.1, 0.7),
        "in-place relu": nn.ReLU(inplace=True),
        "dropout": nn.Dropout3d(0.5, inplace=True),
        "silu after norm": nn.Sequential(nn.GroupNorm(4, 4), nn.SiLU(inplace=True), nn.Conv3d(4, 4, 3, padding=1)),
    }.items():
        made[name] = Function(lambda self, x: self.inner(x), inner=conv)
    for name, function in {
        "nearest by factor": lambda self, x: functional.interpolate(x, scale_factor=2.0),
        "nearest by odd factor": lambda self, x: functional.interpolate(x, scale_factor=(1.5, 2.3, 0.7)),
        "nearest-exact by size": lambda self, x: functional.interpolate(x, size=(9, 13, 11), mode="nearest-exact"),
        "trilinear by factor": lambda self, x: functional.interpolate(x, scale_factor=2.0, mode="trilinear"),
        "trilinear by size": lambda self, x: functional.interpolate(x, (7, 12, 19), mode="trilinear"),
        "trilinear, corners aligned": lambda self, x: functional.interpolate(
            x, size=[11, 9, 14], mode="trilinear", align_corners=True
        ),
        "asymmetric padding": lambda self, x: functional.pad(x, (0, 1, 2, 0, 1, 3)),
        "constant padding": lambda self, x: functional.pad(x, (1, 1, -1, 2, 1, 1, 0, 1), value=2.5),
        "replicated border": lambda self, x: functional.pad(input=x, pad=(2, 1, 0, 1, 1, 2), mode="replicate"),
        "mirrored border": lambda self, x: functional.pad(x, (2, 1, 1, 2, 1, 0), mode="reflect"),
        "channels joined": lambda self, x: torch.cat([x, x.tanh(), x[:, :1] * 2], dim=1),
        "rows joined": lambda self, x: torch.cat((x, 2 * x[:, :, 1:], x.flip(2)), 2),
        "norm of joined channels": lambda self, x: functional.group_norm(torch.cat([x, x * x], 1), num_groups=4),
        "norm of a sum": lambda self, x: functional.instance_norm(x + x.sigmoid() * 3),
        "slices": lambda self, x: x[:, 1:3, ::2, 1:-1, None][..., 0, :, 1:],
        "single rows dropped": lambda self, x: x.narrow(3, 1, 3).unsqueeze(2).squeeze(2),
        "pieces": lambda self, x: x.chunk(2, dim=1)[1] + x.split([1, 2, 1], dim=1)[1],
        "rows in pieces": lambda self, x: [part * 2 for part in x.chunk(3, dim=2)],
        "permuted": lambda self, x: (x.permute(0, 2, 3, 4, 1) @ torch.eye(4).to(x)).movedim(-1, 1).transpose(2, 3),
        # An eps of 1, for four values that are nearly equal make rounding errors large in any order of the sums.
        "tokens": lambda self, x: functional.layer_norm(x.flatten(2).transpose(1, 2), (4,), eps=1.0),
        "shuffled voxels": lambda self, x: x.reshape(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        "repeated": lambda self, x: x.repeat(1, 2, 2, 1, 2).expand(-1, -1, -1, -1, -1),
        "rolled": lambda self, x: torch.roll(x, shifts=(2, -1, 3), dims=(2, 3, 4)),
        "stacked": lambda self, x: torch.stack([x, -x], dim=2).amax(dim=2),
        "sums of channels": lambda self, x: x.softmax(dim=1).mean(dim=1, keepdim=True) + x.std(1, keepdim=True),
        "statistics of the batch": lambda self, x: functional.batch_norm(x, None, None, training=True),
        "broadcast along rows": lambda self, x: x * torch.arange(x.shape[2]).to(x).view(-1, 1, 1) + x[:, :, :1],
        "squeeze and excitation": lambda self, x: x * functional.adaptive_avg_pool3d(x, 1).sigmoid(),
        "conditions": lambda self, x: torch.where(x > 0, x, x.exp()).masked_fill(x < -1, 0.0),
        "other types": lambda self, x: ((x * 10).to(torch.int32) % 7).bool() & (x > 0),
        "in place": lambda self, x: x.clone().add_(1).mul_(x).clamp_(min=-2),
        "in place by operator": lambda self, x: _in_place(x),
        "no rule along the rows": lambda self, x: x.cumsum(2),
        "no rule at all": lambda self, x: torch.fft.fftn(x, dim=(2, 3, 4)).real,
        "values asked for": lambda self, x: x * 2 if x.mean() > 1e9 else x / (1 + x.abs().max().item()),
        "attention": lambda self, x: _attention(x, functional.scaled_dot_product_attention),
        "attention to the past": lambda self, x: _attention(
            x, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        ),
        "attention with a scale": lambda self, x: _attention(
            x, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, scale=3.0)
        ),
        "attention with a mask": lambda self, x: _attention(
            x, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, torch.arange(k.shape[1]) % 3 > 0)
        ),
        "attention by einsum": lambda self, x: _attention(
            x, lambda q, k, v: torch.einsum("bxy,byd->bxd", torch.einsum("bxd,byd->bxy", q, k).softmax(-1), v)
        ),
        "attention by product": lambda self, x: _attention(x, lambda q, k, v: (q @ k.mT).softmax(dim=-1).matmul(v)),
    }.items():
        made[name] = Function(function)
    for network in made.values():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                nn.init.normal_(module.running_mean, generator=seed)
                nn.init.uniform_(module.running_var, 0.5, 2, generator=seed)
            if getattr(module, "affine", False):
                nn.init.normal_(module.weight, generator=seed)
                nn.init.normal_(module.bias, generator=seed)
    return made


def _in_place(x):
    y = x * 1
    y += x
    y *= 2
    y[:, 0] = 3.0
    y -= x.mean(dim=1, keepdim=True)
    return y


def _attention(x, product):
    tokens = x.flatten(2).transpose(1, 2)
    return product(tokens, tokens * 0.5, tokens + 1).transpose(1, 2).reshape(x.shape) + x


FUNCTIONS = functions()
GATHERED = {
    "adaptive pool": {"adaptive_avg_pool3d"},
    "average pool without the border": {"avg_pool3d"},
    "average pool by a divisor": {"avg_pool3d"},
    "statistics of the batch": {"batch_norm"},
    "attention to the past": {"scaled_dot_product_attention"},
    "attention with a mask": {"scaled_dot_product_attention"},
    "squeeze and excitation": {"adaptive_avg_pool3d"},
    "in place by operator": {"setitem"},
    "no rule at all": {"fft_fftn", "real"},
    "no rule along the rows": {"cumsum"},
    "values asked for": {"mean", "max", "item", "__bool__", "gt", "abs"},
}
"""What has to run on the gathered tensor; attention gathers tokens whose first dimension the rows are not."""


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=examples(4), deadline=None, derandomize=True)
@given(data=st.data())
def test_rows_of_the_result_are_those_of_the_whole(name, data):
    size = [data.draw(st.integers(5, 9)) for _ in range(3)]
    torch.manual_seed(data.draw(st.integers(0, 9)))
    volume = torch.randn(data.draw(st.integers(1, 2)), 4, *size) * 2 + data.draw(st.sampled_from([0.0, 5.0]))
    inferer = check(FUNCTIONS[name], (volume,), splits=data.draw(st.integers(1, 16)), axis=data.draw(st.integers(0, 2)))
    assert inferer.report is not None
    tokens = {"flatten", "reshape"} if "attention" in name or name in ("tokens", "shuffled voxels") else set()
    assert inferer.report.gathered.keys() <= GATHERED.get(name, set()) | tokens | {"getitem"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: functional.rrelu(x, training=True), "rrelu is random in training mode"),
        (lambda x: functional.batch_norm(x, torch.zeros(2), torch.ones(2), training=True), "batch norm is in training"),
    ],
)
def test_what_only_training_does_is_refused(function, message):
    with pytest.raises(TSPError, match=message):
        TSPInferer(splits=2)(torch.randn(1, 2, 6, 5, 4), function)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_two_dimensions_and_one(splits):
    flat = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 1, 1)
    ).eval()
    check(flat, (torch.randn(2, 1, 11, 14),), splits=splits)
    line = nn.Sequential(nn.Conv1d(2, 4, 5, stride=2), nn.GroupNorm(2, 4), nn.GELU()).eval()
    check(line, (torch.randn(1, 2, 33),), splits=splits)


def test_several_volumes_of_different_size_and_results_of_any_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3, padding=1)

        def forward(self, fine, coarse, scale):
            x = self.conv(fine) + functional.interpolate(self.conv(coarse), scale_factor=2) * scale
            return {"sum": x, "parts": (x[:, :1], (x > 0).long())}

    torch.manual_seed(0)
    check(
        Two().eval(),
        (torch.randn(1, 1, 8, 12, 6), torch.randn(1, 1, 4, 6, 3), torch.tensor(0.5)),
        splits=5,
    )
