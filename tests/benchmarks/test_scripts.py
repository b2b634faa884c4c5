"""The benchmark scripts run, at sizes at which their figures mean nothing: every row is there, and results agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet

from maisi_tools.autocast import fastest_dtype

Run = Callable[..., str]
Gpu = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(python: str, repo_root: Path) -> Run:
    """``run("tsp_cpu.py", "--quick")`` returns what a script prints."""

    def run(script: str, *options: str) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [python, str(repo_root / "benchmarks" / script), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables' rows, without heads and rules."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [
        row for k, row in enumerate(cells) if row[0][:1] != "-" and (k + 1 == len(cells) or cells[k + 1][0][:2] != "--")
    ]


def test_the_cpu_comparison_has_all_rows_and_equal_results(run: Run) -> None:
    found = rows(run("tsp_cpu.py", "--quick", "--threads", "1"))
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


def test_a_volume_of_ones_has_no_seams(run: Run) -> None:
    found = dict(row for row in rows(run("tsp_cpu.py", "--quick", "--ones", "--threads", "1")) if len(row) == 2)
    rounding = float(found["one rounding of the largest value"])
    assert int(found["slab boundaries looked at"]) > 0
    for step in ("largest step across a boundary", "largest step elsewhere"):
        assert float(found[step]) <= 8 * rounding


def test_the_gpu_comparison_runs_on_a_cpu_too(run: Run, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--sizes", "24x24x24", "--channels", "small", "--directions", "decode"]
    options += ["--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
    found = rows(run("tsp_cuda.py", *options, "--variants", "TSP;MONAI, 2 splits;windows"))
    assert [row[:3] for row in found] == [
        ["decode", "24x24x24", name] for name in ("TSP", "MONAI, 2 splits", "windows")
    ]
    for row in found:
        assert float(row[7]) <= 0.1, row  # in bfloat16, of values up to 1.5
    assert {path.name for path in tmp_path.iterdir()} == {"tsp-cuda.json", "tsp-cuda.md"}


def test_without_a_gpu_it_says_so(run: Run, gpu: Gpu) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run("tsp_cuda.py", "--sizes", "24x24x24").startswith("skipped: ")
    assert run("sampling_cuda.py", "--quick").startswith("skipped: ")
    done = gpu({})
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr and not done.stdout


def test_a_mask_becomes_the_same_ct_by_monais_loop_and_by_the_bundle(run: Run) -> None:
    found = rows(run("sampling_cpu.py", "--quick", "--threads", "1"))
    ways = ["MONAI, euler 3", "MONAI, euler 3, windows", None, "bundle, euler 3", "bundle, euler 3, limit"]
    guided, *_ = (row for row in found if row[0].endswith(", guided"))
    found.remove(guided)
    assert float(guided[7]) > 10
    half = [row for row in found if row[0].endswith(", bfloat16")]  # where the CPU computes in it
    assert len(half) == (0 if fastest_dtype("cpu") == "float32" else 1)
    assert all(float(row[7]) > 1 for row in half)
    found = [row for row in found if row not in half]
    expected = [*ways, ways[0], ways[3]]  # small weights; half width, of which a quick run has these two
    for row, way in zip(found, expected, strict=True):
        name, seconds, share, _, loading, peak, _, greatest, _, mean = row
        assert way is None or name == way
        assert float(seconds) > 0 and float(share) > 0 and float(loading) > 0 and float(peak) > 0
        assert float(mean) <= float(greatest)
        if way in ways[3:]:  # the same integration of the same networks
            assert 0 < float(greatest) < 1, row
        elif way == ways[1]:  # other windows, other statistics
            assert float(greatest) > 100, row


@pytest.fixture
def gpu(python: str, repo_root: Path) -> Gpu:
    """``gpu({"OUT": folder}, "--quick")`` runs gpu.sh with an environment."""

    def run(environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(repo_root / "benchmarks" / "gpu.sh"), *options]
        environment = os.environ | {"PYTHON": python} | environment
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_all_that_wants_a_gpu_runs_without_one(gpu: Gpu, repo_root: Path, tmp_path: Path) -> None:
    done = gpu({"OUT": str(tmp_path)}, "--quick", "--device", "cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    script = (repo_root / "benchmarks" / "gpu.sh").read_text()
    named = re.findall(r"tests/[\w/]+\.py", script)
    assert len(named) > 2 and all((repo_root / name).is_file() for name in named)
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in summary] == ["tests: done", "tsp: done", "sampling: done"]
    tests = (tmp_path / "tests.txt").read_text()
    assert " passed" in tests and " failed" not in tests and "[cpu" in tests and " skipped" not in tests
    tsp = rows((tmp_path / "tsp.txt").read_text())
    ways = ["TSP", "TSP 16GiB", "TSP 8GiB", "MONAI, 2 splits", "MONAI, 8 splits", "windows"]
    assert [row[2] for row in tsp] == ways * 2
    sampling = rows((tmp_path / "sampling.txt").read_text())
    assert len(sampling) == 4
    for row in [*tsp, *sampling]:
        assert float(row[-1]) >= 0, row  # a figure, and no message in the place of seconds
    names = {"summary.txt", "tests.txt", "tsp.txt", "tsp-cuda.json", "tsp-cuda.md", "sampling.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"sampling-cuda.json", "sampling-cuda.md"}


def test_a_part_that_fails_or_runs_out_of_time_does_not_stop_the_next(gpu: Gpu, tmp_path: Path) -> None:
    done = gpu({"OUT": str(tmp_path / "a"), "PYTHON": "false"}, "--quick", "--device", "cpu")
    failed = "tests: FAILED: exit status 1, tsp: FAILED: exit status 1, sampling: FAILED: exit status 1"
    assert done.returncode == 3
    assert ", ".join(re.sub(r", \d+ s", "", (tmp_path / "a" / "summary.txt").read_text()).splitlines()) == failed
    late = tmp_path / "timeout"  # in the place of the system's: the time is over at once
    late.write_text("#!/bin/sh\nexit 124\n")
    late.chmod(0o755)
    environment = {"OUT": str(tmp_path / "b"), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert gpu(environment, "--quick", "--device", "cpu").returncode == 3
    assert (tmp_path / "b" / "summary.txt").read_text().count("FAILED: out of time") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "--device is 'tpu'; give cuda or cpu"),
        (["--fast"], "--fast is unknown; give --quick, --device cuda or --device cpu"),
    ],
)
def test_options_of_the_gpu_script(gpu: Gpu, options: list[str], message: str) -> None:
    done = gpu({}, *options)
    assert done.returncode == 2 and message in done.stderr


def test_the_training_of_each_stage_is_timed(run: Run) -> None:
    found = rows(run("training.py", "--quick", "--device", "cpu", "--threads", "1"))
    assert [row[0] for row in found] == ["VAE", "LDM", "ControlNet"]
    for _, steps, voxels, waiting, size in found:
        a_step = int(size.replace(",", ""))
        assert float(voxels) == pytest.approx(float(steps) * a_step, rel=0.02) and 0 <= float(waiting[:-2]) < 100
    assert [row[4] for row in found[1:]] == ["32,768"] * 2  # 32^3 image voxels; the patches of the VAE vary


def test_two_checkouts_train_in_turns(run: Run, python: str, repo_root: Path) -> None:
    options = ["--quick", "--device", "cpu", "--threads", "1", "--stages", "maisi_ldm", "--rounds", "1"]
    found = rows(run("training.py", *options, "--against", str(repo_root)))
    assert [row[0] for row in found] == ["LDM"]
    before, now, _, _, ratio = map(float, [*found[0][1:4], found[0][4][:-2], found[0][5]])
    low, high = map(float, found[0][6].split(" - "))
    assert before > 0 and now > 0 and low <= ratio <= high
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [python, str(repo_root / "benchmarks" / "training.py"), "--against", str(repo_root / "docs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "allowed is a checkout" in done.stderr


def test_solvers_are_compared_with_many_steps(run: Run, tmp_path: Path) -> None:
    network = UNet(3, 1, 8, channels=[32, 64, 96, 96], strides=[2, 2, 2], num_res_units=2)  # that of evaluation/
    torch.save(network.state_dict(), tmp_path / "untrained.pt")
    options = ["--quick", "--threads", "1", "--segmentation", str(tmp_path / "untrained.pt")]
    found = {row[0]: row[1:] for row in rows(run("solvers.py", *options))}
    calls = {name: int(row[0]) for name, row in found.items()}
    assert calls == {"euler 2": 2, "euler 6": 6, "heun 3": 5, "ab2 6": 6, "heun 8 (reference)": 15}
    error = {name: float(row[1]) for name, row in found.items()}
    assert error["heun 8 (reference)"] == 0 < error["ab2 6"] < error["euler 6"] < error["euler 2"]
    for mean, highest, high, bone, airway, _, body, structures, seconds in (row[1:] for row in found.values()):
        assert mean == highest and float(mean) <= float(high) and float(seconds) > 0
        assert float(body) > 0.5 and all(0 <= float(dice) <= 1 for dice in (bone, airway, structures))


def test_solvers_need_masks(python: str, repo_root: Path, tmp_path: Path) -> None:
    for options, words in (([], "--masks is missing"), (["--masks", str(tmp_path / "none")], "none")):
        command = [python, str(repo_root / "benchmarks" / "solvers.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_the_edit_has_both_scans_and_one_size_of_crop(run: Run) -> None:
    found = rows(run("editing.py", "--quick"))
    assert [row[0] for row in found] == ["64x64x32", "64x64x128"]
    assert all(float(figure) >= 0 for row in found for figure in row[1:])
