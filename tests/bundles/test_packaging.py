"""The bundles as downloads: from a real HTTP server, by MONAI's own command, without this package installed."""

from __future__ import annotations

import ast
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, download, load
from packaging.requirements import Requirement
from packaging.version import Version

from maisi_tools.bundles.packaging import needed_files, package_bundle, shipped_files
from maisi_tools.cli import main
from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.weights import read_weights

NAMES = ("maisi_vae", "maisi_ldm", "maisi_controlnet")
SPACING = (5.0, 5.0, 3.4)


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


@pytest.mark.parametrize("name", NAMES)
def test_downloaded_bundle_runs_by_itself(bare_python, python, name, dist, url, repo_root, tmp_path):
    """The autoencoder in a real Python without this package, the others in one that has imported MONAI already."""
    (archive,) = dist.glob(f"{name}_v*.zip")
    download(name=name, bundle_dir=str(tmp_path), url=f"{url}/{archive.name}", progress=False)
    root = tmp_path / name
    labels = make_phantom("head_neck", (48, 48, 48), SPACING, 0)
    given = {"maisi_vae": flat_ct(labels)[12:36, 12:36, 12:36], "maisi_controlnet": labels}
    started = None if name == "maisi_vae" else python
    options = ["--output_dir", "out"]
    if name in given:
        nib.save(nib.Nifti1Image(given[name], np.diag([*SPACING, 1.0])), tmp_path / "volume.nii.gz")
        options += ["--input", str(tmp_path / "volume.nii.gz")]
    if name != "maisi_vae":
        options += ["--num_inference_steps", "1"]
    if name == "maisi_ldm":
        options += ["--output_size", "[48,48,64]"]

    where = bare_python(root, "-c", "import maisi_tools; print(maisi_tools.__file__)", started=started)
    assert where.stdout.strip() == str(root / "maisi_tools" / "__init__.py"), where.stderr
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *options]
    done = bare_python(root, *command, started=started)
    assert done.returncode == 0, done.stderr
    (written,) = [path for path in (root / "out").glob("*.nii.gz") if not path.name.endswith("_mask.nii.gz")]
    assert nib.load(written).shape == ((48, 48, 64) if name == "maisi_ldm" else given[name].shape)
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


@pytest.mark.parametrize("name", NAMES)
def test_monai_loads_the_weights_by_their_key(name, tiny_bundles):
    parser = ConfigParser(ConfigParser.load_config_file(tiny_bundles / name / "configs" / "inference.json"))
    loaded = load(name, parser.get_parsed_content("network_def"), bundle_dir=str(tiny_bundles), key_in_ckpt="model")
    weights = read_weights(tiny_bundles / name / "models" / "model.pt")
    state = loaded.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key].float()) for key in weights)


DISTRIBUTIONS = {"ignite": "pytorch-ignite", "nrrd": "pynrrd", "yaml": "pyyaml"}
"""Of modules that are called otherwise."""

OPTIONAL = {
    "dicom": {"highdicom", "matplotlib", "contourpy"},
    "metrics": {"totalsegmentator"},
    "weights.py": {"safetensors"},
}
"""Folder -> what its modules may import beside what the metadata list; outside, only functions import them."""


def test_the_metadata_list_what_the_modules_of_a_download_import(repo_root):
    metadata = [json.loads((repo_root / "bundles" / name / "configs" / "metadata.json").read_text()) for name in NAMES]
    listed = {"monai", "torch", "numpy", *metadata[0]["required_packages_version"]}
    assert all(one["required_packages_version"].keys() == listed - {"monai", "torch", "numpy"} for one in metadata)
    source = repo_root / "tools" / "maisi_tools"
    seen = set()
    for path in needed_files((repo_root / "bundles").glob("*/configs/*.json")):
        if path.suffix != ".py":
            continue
        room, tree = path.relative_to(source).parts[0], ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in names:
                top = module.split(".")[0]
                if module.startswith("maisi_tools.dicom"):
                    assert room == "dicom" or node not in tree.body, f"{path} imports {module} for all"
                elif top not in {*sys.stdlib_module_names, "maisi_tools"}:
                    package = DISTRIBUTIONS.get(top, top)
                    assert package in listed or top in OPTIONAL.get(room, ()), f"{path} imports {module}"
                    assert package in listed or room == "dicom" or node not in tree.body, f"{path} imports {module}"
                    seen.add(package)
    assert {"pyyaml", "nibabel", "pynrrd", "highdicom"} <= seen


def test_what_others_put_beside_the_weights_is_not_shipped(repo_root, tmp_path, caplog):
    """Released weights under another licence, also as links, a broken download, caches: MR's page puts them there."""
    root = tmp_path / "maisi_ldm"
    own = shutil.copytree(repo_root / "bundles" / "maisi_ldm", root, copy_function=os.symlink) and shipped_files(root)
    (tmp_path / "released.pt").write_bytes(b"released")
    for name in ("diff_unet_3d_rflow-mr.pt", "autoencoder_v2.pt", "autoencoder_v1.pt.part"):
        (root / "models" / name).write_bytes(b"theirs")
    (root / "models" / "diff_unet_3d_rflow-ct.pt").symlink_to(tmp_path / "released.pt")
    for name in ("docs/.ipynb_checkpoints/README.md", "scripts/__pycache__/a.pyc"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"left behind")
    assert shipped_files(root).keys() == own.keys()
    assert {"models/coarse.pt", "models/mask_model.pt", "models/model.pt"} < own.keys()
    assert "models/autoencoder_v2.pt of maisi_ldm is left out" in caplog.text and "rflow-ct" not in caplog.text


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


def test_the_oldest_versions_that_are_tried_are_those_that_are_allowed(repo_root):
    project = (repo_root / "pyproject.toml").read_text()
    listed = [Requirement(found) for found in re.findall(r'"([\w-]+(?:>=|==)[^"]+)"', project)]
    tried = dict(re.findall(r"^([\w-]+)==(\S+)", (repo_root / "constraints-oldest.txt").read_text(), re.MULTILINE))
    least = {"torch": "2.8", "torchvision": "0.23"}  # MONAI's
    for package, version in tried.items():
        bounds = [r.specifier for r in listed if r.name == package]
        assert all(bound.contains(version) for bound in bounds), package
        lowest = max(Version(one.version) for bound in bounds for one in bound if one.operator == ">=")
        oldest = least.get(package, str(lowest))
        assert version == oldest or version.startswith(f"{oldest}."), package


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
