"""Networks of MONAI and of MAISI, unmodified, in slabs of any number along any axis."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks import nets
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from bounds import check

from maisi_tools.networks import Autoencoder
from maisi_tools.tsp.inferer import TSPInferer
from thorough import examples

# name -> (makes the network, input channels, what divides the size, smallest size along x and along y and z)
NETWORKS = {
    "SegResNet": (lambda: nets.SegResNet(spatial_dims=3, init_filters=8, in_channels=2, out_channels=2), 2, 8, (8, 8)),
    "UNet": (lambda: nets.UNet(3, 2, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2), 2, 4, (8, 8)),
    "BasicUNet": (lambda: nets.BasicUNet(3, 2, 2, features=(4, 4, 8, 8, 16, 4)), 2, 1, (32, 17)),
    "VNet": (lambda: nets.VNet(spatial_dims=3, in_channels=1, out_channels=2), 1, 16, (16, 16)),
    "DynUNet": (lambda: nets.DynUNet(3, 2, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16]), 2, 4, (8, 8)),
    "AttentionUnet": (lambda: nets.AttentionUnet(3, 2, 2, (4, 8, 16), (2, 2)), 2, 4, (8, 8)),
    "HighResNet": (lambda: nets.HighResNet(spatial_dims=3, in_channels=2, out_channels=2), 2, 1, (3, 3)),
    "UNETR": (
        lambda: nets.UNETR(2, 2, img_size=32, feature_size=4, hidden_size=24, mlp_dim=32, num_heads=4),
        2,
        32,
        (32, 32),
    ),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(in_channels=2, out_channels=2, feature_size=12, num_heads=(3, 3, 3, 3)),
        2,
        32,
        (64, 32),
    ),
    "AutoencoderKL": (
        lambda: nets.AutoencoderKL(
            3, 1, 1, (1, 1, 1), (8, 8, 16), attention_levels=(False, False, True), norm_num_groups=4
        ),
        1,
        4,
        (8, 8),
    ),
    "DiffusionModelUNet": (
        lambda: nets.DiffusionModelUNet(
            3, 2, 2, (1, 1, 1), (8, 8, 16), (False, False, True), norm_num_groups=4, num_head_channels=4
        ),
        2,
        4,
        (8, 8),
    ),
}

# Attention makes tokens of all dimensions; where rows are not the first of these, the tokens are gathered. In
# SwinUNETR, whose volumes have their channels last, rows can then be channels, which a layer norm needs all of.
TOKENS = {"reshape", "flatten", "view", "layer_norm"}


@cache
def network_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    network = NETWORKS[name][0]().eval()
    for parameter in network.parameters():
        if not parameter.any() and parameter.ndim > 1:  # layers that begin as zeros would hide what is before them
            nn.init.normal_(parameter, std=0.1)
    return network


@st.composite
def runs(draw, names):
    """A network's name, an input for it, and how to split it."""
    name = draw(st.sampled_from(names))
    _, channels, divisor, least = NETWORKS[name]
    steps = st.integers(0, 8 if divisor == 1 else 2 if divisor <= 8 else 1 if divisor == 16 else 0)
    size = [smallest + divisor * draw(steps) for smallest in (least[0], least[1], least[1])]
    torch.manual_seed(draw(st.integers(0, 99)))
    volume = torch.randn(draw(st.integers(1, 2)), channels, *size) + draw(st.sampled_from([0.0, 3.0]))
    return name, volume, {"splits": draw(st.integers(1, 16)), "axis": draw(st.integers(0, 2))}


def compare(run) -> None:
    name, volume, how = run
    network = network_of(name)
    if name == "AutoencoderKL":
        inferer = check(network, (volume,), lambda n: lambda x: n.decode(n.encode(x)[0]), **how)
    elif name == "DiffusionModelUNet":
        inferer = check(network, (volume, torch.tensor([7] * len(volume))), **how)
    else:
        inferer = check(network, (volume,), **how)
    assert inferer.report is not None and inferer.report.gathered.keys() <= TOKENS


@pytest.mark.parametrize("name", NETWORKS)
def test_monai_networks_with_more_slabs_than_rows_at_the_bottom(name):
    _, channels, divisor, least = NETWORKS[name]
    torch.manual_seed(3)
    more = divisor if divisor < 32 else 0
    compare((name, torch.randn(1, channels, least[0] + more, least[1], least[1]), {"splits": 9}))


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(runs([name for name in NETWORKS if name not in ("UNETR", "SwinUNETR", "VNet")]))
def test_any_size_split_axis_and_batch(run):
    compare(run)


@settings(max_examples=examples(2), deadline=None, derandomize=True)
@given(runs(["UNETR", "SwinUNETR", "VNet"]))
def test_any_split_and_axis_of_the_larger_networks(run):
    compare(run)


MAISI = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [4, 8, 8],
    "num_res_blocks": [1, 1, 1],
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_checkpointing": False,
    "use_convtranspose": False,
    "norm_float16": False,
    "dim_split": 1,
    "save_mem": False,
}


@pytest.mark.parametrize("latent", [(16, 16, 16), (20, 16, 12), (12, 20, 20), (17, 13, 11)])
def test_the_48_cases_of_which_monais_own_splitting_gets_18_right(latent):
    """Four sizes, 2 to 16 splits and three axes; MONAI's ``num_splits`` raises in 25 and is silently wrong in 5."""
    torch.manual_seed(0)
    whole = AutoencoderKlMaisi(num_splits=1, **MAISI).eval()
    divided = AutoencoderKlMaisi(num_splits=4, **MAISI).eval()  # what it would do by itself must not be done
    divided.load_state_dict(whole.state_dict())
    z = torch.randn(1, 4, *latent)
    with torch.no_grad():
        wanted = whole.decode_stage_2_outputs(z)
        exact = Autoencoder(num_splits=1, **MAISI).eval().double()
        exact.load_state_dict(whole.state_dict())
        exact = exact.decode(z.double())
        allowed = 2 * (wanted - exact).abs().max()
        for splits in (2, 4, 8, 16):
            for axis in (0, 1, 2):
                found = TSPInferer(splits=splits, axis=axis)(z, divided.decode_stage_2_outputs)
                assert found.shape == wanted.shape
                assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("splits", [2, 5, 16])
def test_ones_through_the_encoder_show_no_seam(splits):
    """The paper digest's own check: a constant volume must come out without a step at any slab boundary."""
    torch.manual_seed(0)
    network = Autoencoder(num_splits=1, **MAISI).eval()
    with torch.no_grad():
        ones = torch.ones(1, 1, 24, 20, 64)
        whole = network.encode(ones)[0]
        found = TSPInferer(splits=splits)(ones, lambda x: network.encode(x)[0])
    rounding = 32 * torch.finfo(torch.float32).eps * whole.abs().max()
    assert (found - whole).abs().max() <= rounding
    inside = found[..., 5:-5]  # far enough from the border, whose zero padding is no constant
    assert (inside.diff(dim=-1)).abs().max() <= (whole[..., 5:-5].diff(dim=-1)).abs().max() + rounding


@pytest.mark.parametrize(("axis", "splits"), [(0, 3), (1, 16), (2, 2), (None, None)])
def test_unet_and_controlnet_in_one_graph(tiny_controlled, axis, splits):
    for parameter in tiny_controlled.parameters():
        nn.init.normal_(parameter, std=0.1)
    mask = torch.randint(0, 133, (1, 1, 32, 48, 40)).float()
    latent, time = torch.randn(1, 4, 8, 12, 10), torch.tensor([300.0])
    given = {"spacing_tensor": torch.rand(1, 3)}

    def call(network):
        return lambda m, x, t: network(m, x, t, **{k: v.to(x.dtype) for k, v in given.items()})

    inferer = check(tiny_controlled.eval(), (mask, latent, time), call, splits=splits, axis=axis)
    assert inferer.report.gathered.keys() <= TOKENS
