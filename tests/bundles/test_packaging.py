"""The bundles as downloads: from a real HTTP server, by MONAI's own command, without this package installed."""

from __future__ import annotations

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import download
from packaging.requirements import Requirement

from maisi_tools.bundles.packaging import needed_files, package_bundle
from maisi_tools.cli import main
from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import flat_ct, make_phantom

NAMES = ("maisi_vae", "maisi_ldm", "maisi_controlnet")
SIZE, SPACING = (48, 48, 48), (5.0, 5.0, 3.4)
CROP = (slice(12, 36),) * 3


@pytest.fixture(scope="module")
def dist(repo_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    assert main(["package", "--output_dir", str(folder), "--bundles", str(repo_root / "bundles")]) == 0
    return folder


@pytest.fixture(scope="module")
def url(dist):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=dist)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def ran(bare_python, dist, url, tmp_path_factory) -> dict[str, Path]:
    """Bundle -> its folder, downloaded, where MONAI's command has run it; its code and modules are in ``ended.json``.

    All from one Python that has imported MONAI, and no maisi_tools; each in a process of its own.
    """
    folder = tmp_path_factory.mktemp("ran")
    labels = make_phantom("head_neck", SIZE, SPACING, 0)
    options: dict[str, list[str]] = {name: ["--output_dir", "out"] for name in NAMES}
    for name, volume in (("maisi_vae", flat_ct(labels)[CROP]), ("maisi_controlnet", labels)):
        nib.save(nib.Nifti1Image(volume, np.diag([*SPACING, 1.0])), folder / f"{name}.nii.gz")
        options[name] += ["--input", str(folder / f"{name}.nii.gz")]
    for name in ("maisi_ldm", "maisi_controlnet"):
        options[name] += ["--num_inference_steps", "1"]
    options["maisi_ldm"] += ["--output_size", "[48,48,64]"]
    for name in NAMES:
        (archive,) = dist.glob(f"{name}_v*.zip")
        download(name=name, bundle_dir=str(folder), url=f"{url}/{archive.name}", progress=False)
    done = bare_python(folder, "-c", f"options = {options}\n{COMMANDS}")
    assert done.returncode == 0, done.stderr
    return {name: folder / name for name in NAMES}


COMMANDS = """
import json, os, runpy, sys, traceback, monai.bundle
assert "maisi_tools" not in sys.modules
for name, given in options.items():
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.chdir(name)
    said = open("said.txt", "w")
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    sys.argv = ["monai.bundle", "run", "--config_file", "configs/inference.json", *given]
    code = 1
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    modules = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "maisi_tools"]
    with open("ended.json", "w") as file:
        json.dump([code, modules], file)
    os._exit(0)
"""
"""As ``python -m monai.bundle run --config_file configs/inference.json OPTION ...`` in each bundle's folder."""


@pytest.mark.parametrize("name", NAMES)
def test_downloaded_bundle_runs_by_itself(name, ran, repo_root):
    root = ran[name]
    code, modules = json.loads((root / "ended.json").read_text())
    assert code == 0, (root / "said.txt").read_text()[-3000:]
    assert str(root / "maisi_tools" / "__init__.py") in modules
    assert all(Path(module).is_relative_to(root / "maisi_tools") for module in modules)
    (written,) = [path for path in (root / "out").glob("*.nii.gz") if not path.name.endswith("_mask.nii.gz")]
    shapes = {"maisi_vae": (24, 24, 24), "maisi_ldm": (48, 48, 64), "maisi_controlnet": SIZE}
    assert nib.load(written).shape == shapes[name]
    assert not list((repo_root / "bundles" / name).glob("maisi_tools"))  # vendored in the zip alone


def test_same_bytes_a_second_time_and_no_output_in_them(dist, repo_root, tmp_path):
    for archive in dist.glob("*.zip"):
        name = archive.name.rsplit("_v", 1)[0]
        again = package_bundle(repo_root / "bundles" / name, tmp_path)
        assert again.name == archive.name and again.read_bytes() == archive.read_bytes()
        with zipfile.ZipFile(archive) as content:
            names = content.namelist()
        assert all(entry.startswith(f"{name}/") for entry in names)
        tops = {entry.split("/")[1] for entry in names}
        assert tops == {"LICENSE", "configs", "docs", "large_files.yml", "maisi_tools", "models"}
        assert {f"{name}/maisi_tools/tsp/inferer.py", f"{name}/models/model.pt"} <= set(names)


def test_only_what_is_needed_is_in_it(tmp_path):
    (tmp_path / "c.json").write_text('{"a": "$from maisi_tools.masks.label_maps import LABEL_MAPS"}')
    found = {path.name for path in needed_files([tmp_path / "c.json"])}
    assert {"label_maps.py", "vocabulary.py", "roi_names.json", "errors.py"} <= found
    assert not found & {"options.py", "networks.py", "viewer.js", "inferer.py"}


def test_what_is_no_bundle_is_refused(repo_root, tmp_path, capsys):
    with pytest.raises(InputError, match=r"metadata\.json"):
        package_bundle(tmp_path, tmp_path)
    (tmp_path / "b" / "configs").mkdir(parents=True)
    (tmp_path / "b" / "configs" / "metadata.json").write_text('{"version": "1"}')
    with pytest.raises(InputError, match="no weights"):
        package_bundle(tmp_path / "b", tmp_path)
    assert main(["package", "maisi_nothing", "--bundles", str(repo_root / "bundles")]) == 2
    assert "maisi_vae" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_true(name, repo_root):
    """Versions are those the tests run with, within what pyproject.toml allows; the changelog is the project's."""
    metadata = json.loads((repo_root / "bundles" / name / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    assert re.search(rf"^## {re.escape(metadata['version'])}\b", (repo_root / "CHANGELOG.md").read_text(), re.MULTILINE)
    project = (repo_root / "pyproject.toml").read_text()
    assert f'\nversion = "{metadata["version"]}"' in project
    (listed,) = re.findall(r"^dependencies = \[$(.*?)^\]$", project, re.MULTILINE | re.DOTALL)
    allowed = {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', listed))}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (repo_root / "constraints.txt").read_text(), re.MULTILINE))
    given = {
        **metadata["required_packages_version"],
        **{
            package: metadata[f"{key}_version"]
            for package, key in (("monai",) * 2, ("torch", "pytorch"), ("numpy",) * 2)
        },
    }
    for package, version in given.items():
        assert pinned[package] == version, package
        assert allowed[package].specifier.contains(version), package


def test_a_wheel_has_the_data_files(repo_root, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    made = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=250, check=False)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    source = repo_root / "tools"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "maisi_tools").rglob("*")
        if path.suffix in (".py", ".json", ".csv", ".css", ".js")
    }
    assert expected <= names
