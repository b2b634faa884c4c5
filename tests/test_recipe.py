"""The recipe of the small weights runs from end to end, on phantoms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.masks.phantom import make_phantom

CLASSES = {1: 2, 2: 121, 3: 11, 4: 16}
"""Labels of OpenKBP and what they are in the vocabulary."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four small head-and-neck patients, named as OpenKBP's."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(1, 5):
        labels = make_phantom("head_neck", (40, 36, 40), (8.0, 8.0, 8.0), seed=number)
        rng = np.random.default_rng(number)
        ct = np.where(labels > 0, 40 + 20 * rng.normal(size=labels.shape), -1000).astype(np.int16)
        ct[np.isin(labels, (120,))] = 700
        own = sum(np.where(labels == theirs, ours, 0) for ours, theirs in CLASSES.items()).astype(np.uint8)
        affine = np.diag([8.0, 8.0, 8.0, 1.0])
        nib.save(nib.Nifti1Image(ct, affine), folder / f"pt_{number}_ct.nii.gz")
        nib.save(nib.Nifti1Image(own, affine), folder / f"pt_{number}_seg.nii.gz")
    (folder / "split.json").write_text(json.dumps({"held_out": ["pt_4"], "validation": ["pt_3"]}))
    return folder


def run(repo_root: Path, data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "recipes" / "small" / "run.py"), str(data), "--out", str(out)]
    return subprocess.run(
        [*command, "--split", str(data / "split.json"), *more], capture_output=True, text=True, check=False
    )


def test_quick_makes_every_stage_and_a_second_run_keeps_them(repo_root, data, tmp_path):
    made = run(repo_root, data, tmp_path, "--quick")
    assert made.returncode == 0, made.stderr[-2000:]
    lists = json.loads((tmp_path / "datalist.json").read_text())
    names = {
        section: sorted(Path(item["image"]).name for item in lists[section]) for section in ("training", "validation")
    }
    assert names["training"] == ["pt_1_ct.nii.gz", "pt_2_ct.nii.gz"] and names["validation"] == ["pt_3_ct.nii.gz"]
    assert not list(tmp_path.rglob("*pt_4*"))
    sidecar = json.loads((tmp_path / "latents" / "pt_1_ct_latent.json").read_text())
    assert sidecar["factor"] == 2
    files = [tmp_path / "autoencoder" / "model.pt", *(tmp_path / "controlnet" / f"{n}.pt" for n in ("model", "unet"))]
    weights = [torch.load(path, weights_only=True) for path in files]
    assert [each.get("factor") for each in weights[1:]] == [2, 2]
    whole, unet = weights[1]["model"], weights[2]["model"]
    assert unet and all(torch.equal(whole[f"unet.{name}"], value) for name, value in unet.items())
    times = [path.stat().st_mtime_ns for path in files]
    assert run(repo_root, data, tmp_path, "--quick").returncode == 0
    assert [path.stat().st_mtime_ns for path in files] == times


def test_what_cannot_work_is_refused_at_once(repo_root, data, tmp_path):
    short = run(repo_root, data, tmp_path, "--minutes", "1")
    assert short.returncode == 1 and "--minutes is 1; allowed are 5 and more" in short.stderr
    (data / "few.json").write_text(json.dumps({"held_out": ["pt_1", "pt_2"], "validation": ["pt_3"]}))
    few = run(repo_root, data, tmp_path, "--split", str(data / "few.json"))
    assert few.returncode == 1 and "has 1 patients to train on and 1 to validate with" in few.stderr
