"""The benchmark scripts run, at sizes at which their figures mean nothing: every row is there, and results agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(repo_root: Path, script: str, *options: str) -> str:
    """Return what the script prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(repo_root / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables' rows, without heads and rules."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [
        row for k, row in enumerate(cells) if row[0][:1] != "-" and (k + 1 == len(cells) or cells[k + 1][0][:2] != "--")
    ]


def test_the_cpu_comparison_has_all_rows_and_equal_results(repo_root: Path) -> None:
    found = rows(run(repo_root, "tsp_cpu.py", "--quick", "--threads", "1"))
    names = [
        "MONAI, 1 split",
        "MONAI, 4 splits",
        "windows",
        "TSP fp32",
        "TSP fp32, 8 slabs",
        "TSP bf16",
        "TSP fp32, limit",
    ]
    assert [row[0] for row in found] == names * 2  # decode, encode
    largest = {
        "MONAI, 1 split": 0.0,
        "MONAI, 4 splits": 2e-5,
        "TSP fp32": 2e-5,
        "TSP fp32, 8 slabs": 2e-5,
        "TSP fp32, limit": 2e-5,
        "TSP bf16": 0.2,
    }
    for name, seconds, *_, peak, _, _, difference in found:
        assert float(seconds) > 0
        assert float(peak) > 0
        if name in largest:
            assert float(difference) <= largest[name], name


def test_a_volume_of_ones_has_no_seams(repo_root: Path) -> None:
    found = dict(
        row for row in rows(run(repo_root, "tsp_cpu.py", "--quick", "--ones", "--threads", "1")) if len(row) == 2
    )
    rounding = float(found["one rounding of the largest value"])
    assert int(found["slab boundaries looked at"]) > 0
    for step in ("largest step across a boundary", "largest step elsewhere"):
        assert float(found[step]) <= 8 * rounding


def test_the_gpu_comparison_runs_on_a_cpu_too(repo_root: Path, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--sizes", "24x24x24", "--channels", "small", "--directions", "decode"]
    options += ["--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    found = rows(run(repo_root, "tsp_cuda.py", *options, "--variants", "TSP;MONAI, 2 splits;windows"))
    assert [row[:3] for row in found] == [
        ["decode", "24x24x24", name] for name in ("TSP", "MONAI, 2 splits", "windows")
    ]
    for row in found:
        assert float(row[7]) <= 0.01, row
    assert {path.name for path in tmp_path.iterdir()} == {"tsp-cuda.json", "tsp-cuda.md"}


def test_without_a_gpu_it_says_so(repo_root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(repo_root, "tsp_cuda.py", "--sizes", "24x24x24").startswith("skipped: ")


def test_the_training_of_each_stage_is_timed(repo_root: Path) -> None:
    found = rows(run(repo_root, "training.py", "--quick", "--device", "cpu", "--threads", "1"))
    assert [row[0] for row in found] == ["VAE", "LDM", "ControlNet"]
    for _, steps, voxels, waiting, size in found:
        a_step = int(size.replace(",", ""))
        assert float(voxels) == pytest.approx(float(steps) * a_step, rel=0.02) and 0 <= float(waiting[:-2]) < 100
    assert [row[4] for row in found[1:]] == ["32,768"] * 2  # 32^3 image voxels; the patches of the VAE vary
