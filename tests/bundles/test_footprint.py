from __future__ import annotations

import json
import shutil

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


def _own(folder, configs, **settings):
    """A copy of a bundle's configs, with an overlay of one's own beside them."""
    shutil.copytree(configs[0].parent, folder / "configs")
    (folder / "configs" / "own.json").write_text(json.dumps(settings))
    return [folder / "configs" / "inference.json", folder / "configs" / "own.json"]


def test_what_an_overlay_says_of_slabs_is_planned(configs, tmp_path):
    """As if it were given with the command, which goes before it."""
    size, given = (128, 96, 64), configs("maisi_vae")
    by_option = footprints(given, size, splits=7, memory_limit="300MB")
    own = _own(tmp_path, given, **{"memory_limit": "300MB", "splits": 7})
    assert [str(f.plan) for f in footprints(own, size)] == [str(f.plan) for f in by_option]
    assert all(f.plan.splits == 7 and f.plan.peak <= 300e6 for f in by_option)
    assert all(f.plan.splits == 3 for f in footprints(own, size, splits=3, memory_limit="4GB"))
    assert all("of 1.0 MiB cannot be met" in f.refusal for f in footprints(own, size, memory_limit="1MiB"))


@pytest.mark.parametrize(("key", "value"), [("axis", 2), ("offload", "none"), ("devices", ["cpu", "cpu"])])
def test_every_setting_of_the_inferer_is_planned_with(configs, tmp_path, key, value):
    size, limit = (128, 96, 64), "150MB"
    found = footprints(_own(tmp_path, configs("maisi_vae"), **{f"tsp#{key}": value}), size, memory_limit=limit)
    plain = footprints(configs("maisi_vae"), size, memory_limit=limit)
    if key == "axis":
        assert [one[-1].plan.passes[-1].targets[0].rows for one in (found, plain)] == [64, 128]
    elif key == "offload":
        assert any(f.plan is None and "offload='auto' needs less" in f.refusal for f in found)
        assert all(any(f.plan.moved) or f.plan.peak <= 150e6 for f in plain)
    else:
        assert {f.plan.devices for f in found} == {2} and {f.plan.devices for f in plain} == {1}


@pytest.mark.parametrize("overlays", [["dicom.json"], ["full_rflow.json", "dicom.json"], ["edit.json"]])
def test_an_overlay_that_adds_to_lists_changes_no_plan(configs, overlays):
    pytest.importorskip("pydicom")
    size = (128, 128, 128)
    known = footprints(configs("maisi_controlnet", *(n for n in overlays if n.startswith("full"))), size)
    found = footprints(configs("maisi_controlnet", *overlays), size)
    assert [(f.stage, str(f.plan)) for f in found] == [(f.stage, str(f.plan)) for f in known]


def test_a_limit_out_of_reach_is_said_with_the_least_that_would_do(configs):
    found = footprints(configs("maisi_vae"), (256, 256, 256), memory_limit="1MiB")
    assert all(footprint.plan is None and "the least that would do is" in footprint.refusal for footprint in found)


def test_a_size_the_networks_cannot_take_is_refused(configs):
    with pytest.raises(InputError, match="multiples of 32: change z 100 -> 96 or 128"):
        footprints(configs("maisi_ldm", "full_rflow.json"), (512, 512, 100))
