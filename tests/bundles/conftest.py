"""Runs the bundles' configs in this process, on phantoms, with the shipped weights."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from maisi_tools.errors import find_input_error
from maisi_tools.masks.phantom import flat_ct, make_phantom

SIZE, SPACING = (48, 48, 48), (5.0, 5.0, 3.4)


@pytest.fixture(scope="session")
def bundles(repo_root: Path) -> Path:
    return repo_root / "bundles"


@pytest.fixture(scope="session")
def open_bundle(bundles: Path) -> Callable[..., ConfigWorkflow]:
    """``open_bundle("maisi_vae", "inference.json", key=value, ...)`` returns a config's workflow, ready to run."""

    def ready(bundle: str, config: str | list[str], kind: str | None = None, **overrides: Any) -> ConfigWorkflow:
        root = bundles / bundle
        files = [str(root / "configs" / name) for name in ([config] if isinstance(config, str) else config)]
        workflow = ConfigWorkflow(
            config_file=files,
            meta_file=str(root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type=kind,
            bundle_root=str(root),
            **{"device": "$torch.device('cpu')", **overrides},
        )
        workflow.initialize()
        return workflow

    return ready


@pytest.fixture(scope="session")
def run_bundle(open_bundle: Callable[..., ConfigWorkflow]) -> Callable[..., ConfigWorkflow]:
    """``run_bundle("maisi_vae", "inference.json", key=value, ...)`` runs a config to its end, returns the workflow."""

    def run(bundle: str, config: str | list[str], **overrides: Any) -> ConfigWorkflow:
        workflow = open_bundle(bundle, config, **overrides)
        workflow.run()
        workflow.finalize()
        return workflow

    return run


@pytest.fixture(scope="session")
def run_on_two_ranks(torchrun: Callable[..., Any], bundles: Path) -> Callable[..., None]:
    """``run_on_two_ranks("maisi_ldm", ["train.json", ...], key=value, ...)`` runs configs under torchrun."""

    def run(bundle: str, configs: list[str], **overrides: Any) -> None:
        files = repr([f"configs/{name}" for name in configs])
        given = [f"--{key}={value}" for key, value in overrides.items()]
        torchrun("monai.bundle", "run", "--config_file", files, "--bundle_root", ".", *given, cwd=bundles / bundle)

    return run


@pytest.fixture(scope="session")
def phantom_labels() -> np.ndarray:
    return make_phantom("head_neck", size=SIZE, spacing=SPACING, seed=3)


@pytest.fixture(scope="session")
def phantom_ct(phantom_labels: np.ndarray) -> np.ndarray:
    """A CT in HU with flat tissues and a little noise."""
    noise = np.random.default_rng(0).normal(0, 10, phantom_labels.shape)
    return (flat_ct(phantom_labels) + noise * (phantom_labels > 0)).clip(-1000, 1000).astype(np.int16)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves an array under ``tmp_path/in``, returns the path; the default affine is RAS with the phantom's spacing."""

    def save(array: np.ndarray, name: str, affine: np.ndarray | None = None) -> Path:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        image = nib.Nifti1Image(array, np.diag([*SPACING, 1.0]) if affine is None else affine)
        nib.save(image, folder / name)
        return folder / name

    return save


@pytest.fixture
def mask_file(save: Callable[..., Path], phantom_labels: np.ndarray) -> Path:
    return save(phantom_labels, "phantom.nii.gz")


@pytest.fixture
def ct_file(save: Callable[..., Path], phantom_ct: np.ndarray) -> Path:
    return save(phantom_ct, "head_ct.nii.gz")


@pytest.fixture(scope="session")
def cause() -> Callable[[BaseException], BaseException]:
    """The InputError in an exception's chain: MONAI's config parser wraps what its components raise."""

    def cause(error: BaseException) -> BaseException:
        found = find_input_error(error)
        assert found is not None, "no InputError in the chain"
        return found

    return cause


@pytest.fixture(scope="session")
def bare_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``bare_python(folder, "-m", ...)`` runs Python in a folder, without what pip installed in editable mode.

    A .pth file tells of that; `-S` leaves it unread. With ``started=python``, see preloaded.py, MONAI is imported
    already, and this package's own folder comes later in the path: one in `folder` is taken whole in its place.
    """

    def run(folder: Path, *arguments: str, started: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
        command = [started, *arguments] if started else [sys.executable, "-S", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250, check=False
        )

    return run
