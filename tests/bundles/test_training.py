"""Every train.json runs from end to end on phantoms, in one process and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.weights import read_scale_factor

NAMES = ("p1", "p2", "p3")


@pytest.fixture(scope="module")
def cases(tmp_path_factory, phantom_labels, phantom_ct) -> Path:
    """Three phantom cases (p3 kept out) with their datalist."""
    folder = tmp_path_factory.mktemp("cases")
    affine = np.diag([5.0, 5.0, 3.4, 1.0])
    for i, name in enumerate(NAMES):
        crop = (slice(i, i + 32), slice(4, 36), slice(8, 40))
        nib.save(nib.Nifti1Image(phantom_ct[crop], affine), folder / f"{name}_ct.nii.gz")
        nib.save(nib.Nifti1Image(phantom_labels[crop], affine), folder / f"{name}_ct_mask.nii.gz")
    items = [{"image": str(folder / f"{name}_ct.nii.gz")} for name in NAMES]
    (folder / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}))
    return folder


@pytest.fixture(scope="module")
def latents(cases, bundles, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/encode.json"]
        + ["--input", f"{cases}/*_ct.nii.gz", "--output_dir", str(folder), "--multiple", "16"],
        cwd=bundles / "maisi_vae",
        check=True,
        capture_output=True,
    )
    return folder


def overrides(stage: str, cases: Path, latents: Path, bundles: Path, out: Path) -> dict:
    common = {"max_epochs": 2, "val_interval": 1, "ckpt_dir": str(out), "cache_rate": 0.0}
    if stage == "maisi_vae":
        # no perceptual loss: its backbone is a download (test_vae_training.py has all terms)
        small = {"max_patch_size": [32, 32, 32], "perceptual_weight": 0, "adversarial_start": 1}
        return {**common, "datalist": str(cases / "datalist.json"), **small}
    held_out = ["p3"]
    if stage == "maisi_ldm":
        return {**common, "dataset_dir": str(latents), "held_out": held_out}
    unet = str(bundles / "maisi_ldm" / "models" / "model.pt")
    return {
        **common,
        "dataset_dir": str(latents),
        "masks_dir": str(cases),
        "held_out": held_out,
        "unet_ckpt_path": unet,
    }


@pytest.mark.parametrize("stage", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_train_config(run_bundle, stage, cases, latents, bundles, tmp_path):
    workflow = run_bundle(stage, "train.json", **overrides(stage, cases, latents, bundles, tmp_path / "out"))
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 2 and trainer.state.iteration == 4
    assert np.isfinite(trainer.state.output["loss"].item())
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert saved["model"].keys() == workflow.parser.get_parsed_content("network_def").state_dict().keys()
    if stage != "maisi_vae":
        assert read_scale_factor(tmp_path / "out" / "model.pt") > 0
    # what was saved is what inference loads
    network = run_free_network(stage, bundles, tmp_path / "out" / "model.pt")
    assert not network.training


def run_free_network(stage: str, bundles: Path, weights: Path) -> torch.nn.Module:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(bundles / stage / "configs" / "inference.json"))
    parser["ckpt_path"] = str(weights)
    parser["device"] = "$torch.device('cpu')"
    return parser.get_parsed_content("network")


@pytest.mark.parametrize("stage", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_two_ranks_on_the_cpu(stage, cases, latents, bundles, tmp_path):
    files = "['configs/train.json','configs/multi_gpu_train.json']"
    arguments = [f"--{key}={value}" for key, value in overrides(stage, cases, latents, bundles, tmp_path).items()]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "monai.bundle",
            "run",
        ]
        + ["--config_file", files, "--bundle_root", ".", *arguments, "--max_epochs=2"],
        cwd=bundles / stage,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.isfinite(value.float()).all() for value in saved["model"].values())
    assert not any(name.startswith("module.") for name in saved["model"])
