from __future__ import annotations

import pytest
import torch

from maisi_tools.bundles.footprint import footprints
from maisi_tools.errors import InputError


@pytest.fixture
def configs(repo_root):
    def configs(bundle: str, *overlays: str) -> list:
        return [repo_root / "bundles" / bundle / "configs" / name for name in ("inference.json", *overlays)]

    return configs


@pytest.mark.parametrize(
    ("bundle", "overlays", "stages"),
    [
        ("maisi_vae", ["full.json"], ["encoder", "decoder"]),
        ("maisi_ldm", ["full_rflow.json"], ["U-Net, each step", "decoder"]),
        ("maisi_ldm", [], ["U-Net, each step", "decoder"]),
        ("maisi_ldm", ["full_rflow.json", "full_ddpm.json"], ["U-Net, each step", "decoder"]),
        (
            "maisi_controlnet",
            ["full_rflow.json"],
            ["mask embedding, once", "U-Net and ControlNet, each step", "decoder"],
        ),
    ],
)
def test_every_network_of_a_bundle_is_planned_without_its_weights(configs, bundle, overlays, stages):
    limit = 8 * 2**30
    found = footprints(configs(bundle, *overlays), (512, 512, 256), memory_limit=limit, device="cuda")
    assert [footprint.stage for footprint in found] == stages
    for footprint in found:
        assert footprint.plan is not None and 0 < footprint.plan.peak <= limit


def test_flop_of_the_full_size_autoencoder(configs):
    """The feasibility study counted 3.236 MFLOP a voxel for the decoder and 1.514 for the encoder."""
    size = (128, 128, 96)
    found = {f.stage: f.plan.flop for f in footprints(configs("maisi_vae", "full.json"), size, device="cuda")}
    voxels = torch.Size(size).numel()
    assert found["decoder"] / voxels == pytest.approx(3.236e6, rel=0.01)
    assert found["encoder"] / voxels == pytest.approx(1.514e6, rel=0.01)


def test_a_limit_out_of_reach_is_said_with_the_least_that_would_do(configs):
    found = footprints(configs("maisi_vae"), (256, 256, 256), memory_limit="1MiB")
    assert all(footprint.plan is None and "the least that would do is" in footprint.refusal for footprint in found)


def test_a_size_the_networks_cannot_take_is_refused(configs):
    with pytest.raises(InputError, match="multiples of 32: change z 100 -> 96 or 128"):
        footprints(configs("maisi_ldm", "full_rflow.json"), (512, 512, 100))
