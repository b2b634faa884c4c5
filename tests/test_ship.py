"""What the bundles say about the data of their weights follows the weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from maisi_tools.bundles.packaging import package_bundle
from maisi_tools.errors import InputError
from maisi_tools.files import sha256

BUNDLES = ("maisi_controlnet", "maisi_ldm", "maisi_vae")
TORSO = {"lidc_idri_0314": "CC BY 3.0", "cmb_crc_msb01068": "CC BY 4.0", "ts_aorta_cta": "Apache-2.0"}


@pytest.fixture(scope="session")
def recipe(repo_root):
    spec = importlib.util.spec_from_file_location("ship", repo_root / "recipes" / "ship.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(repo_root, tmp_path) -> Path:
    """The parts of the repository that the script reads and writes."""
    shutil.copytree(repo_root / "recipes", tmp_path / "recipes")
    for bundle in BUNDLES:
        for part in ("models", "docs", "configs"):
            shutil.copytree(repo_root / "bundles" / bundle / part, tmp_path / "bundles" / bundle / part)
    return tmp_path


def pages(root: Path) -> dict[str, str]:
    files = [root / "bundles" / bundle / "docs" / "data_license.txt" for bundle in BUNDLES]
    files += [root / "bundles" / bundle / "configs" / "metadata.json" for bundle in BUNDLES]
    return {path.relative_to(root).as_posix(): path.read_text() for path in files}


def test_the_pages_are_what_the_script_writes_from_the_weights(recipe, repo_root, copy):
    recipe.write_licences(copy)
    assert pages(copy) == pages(repo_root)


def test_every_shipped_file_is_recorded_and_nothing_else(repo_root):
    record = json.loads((repo_root / "recipes" / "weights.json").read_text())
    shipped = {p.relative_to(repo_root / "bundles").as_posix(): p for p in (repo_root / "bundles").glob("*/models/*")}
    assert {name: entry["sha256"] for name, entry in record.items()} == {n: sha256(p) for n, p in shipped.items()}


def test_the_same_weights_have_the_same_data_everywhere(repo_root):
    record = json.loads((repo_root / "recipes" / "weights.json").read_text())
    by_content: dict[str, set] = {}
    for entry in record.values():
        by_content.setdefault(entry["sha256"], set()).add(tuple(entry["data"]))
    assert all(len(data) == 1 for data in by_content.values())


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_download_names_the_data_of_every_file_in_it(repo_root, tmp_path, bundle):
    record = json.loads((repo_root / "recipes" / "weights.json").read_text())
    described = json.loads((repo_root / "recipes" / "data.json").read_text())
    with zipfile.ZipFile(package_bundle(repo_root / "bundles" / bundle, tmp_path)) as archive:
        licence = archive.read(f"{bundle}/docs/data_license.txt").decode()
        source = json.loads(archive.read(f"{bundle}/configs/metadata.json"))["data_source"]
        weights = [name for name in archive.namelist() if name.endswith(".pt")]
    assert weights
    for name in weights:
        for data in record[name]["data"]:
            assert described[data]["source"] in source
            assert all(line in licence for line in described[data]["text"])
            for case, where, kind in described[data].get("cases", []):
                (row,) = [line for line in licence.splitlines() if line.startswith(f"{case} ")]
                assert where in row and row.endswith(f"  {kind}")


def test_shipping_writes_weights_record_and_pages(recipe, copy):
    described = json.loads((copy / "recipes" / "data.json").read_text())
    described["knees"] = {"source": "Knees (doi 10.1/x)", "text": ["Knees: a data set. CC0."]}
    (copy / "recipes" / "data.json").write_text(json.dumps(described))
    torch.save({"model": {"a": torch.ones(3)}}, copy / "new.pt")
    targets = ["maisi_ldm/models/autoencoder.pt", "maisi_controlnet/models/autoencoder.pt"]
    before = pages(copy)
    recipe.ship(copy / "new.pt", targets, ["knees"], copy)
    after = pages(copy)
    assert all((copy / "bundles" / target).read_bytes() == (copy / "new.pt").read_bytes() for target in targets)
    for bundle in ("maisi_ldm", "maisi_controlnet"):
        licence = after[f"bundles/{bundle}/docs/data_license.txt"]
        assert "Knees: a data set. CC0." in licence and "OpenKBP" in licence and "lidc_idri_0314" not in licence
        metadata = json.loads(after[f"bundles/{bundle}/configs/metadata.json"])
        assert metadata["data_source"] == "Knees (doi 10.1/x), OpenKBP (doi 10.1002/mp.14845)"
        old = json.loads(before[f"bundles/{bundle}/configs/metadata.json"])
        assert metadata == {**old, "data_source": metadata["data_source"]}
    for name in ("docs/data_license.txt", "configs/metadata.json"):
        assert after[f"bundles/maisi_vae/{name}"] == before[f"bundles/maisi_vae/{name}"]
    assert TORSO.items() <= {c[0]: c[2] for c in described["torso"]["cases"]}.items()


def test_what_cannot_be_attributed_is_refused(recipe, copy):
    torch.save({"model": {"a": torch.ones(3)}}, copy / "new.pt")
    with pytest.raises(InputError, match="--data has elbows; described in recipes/data.json are openkbp, torso"):
        recipe.ship(copy / "new.pt", ["maisi_vae/models/model.pt"], ["elbows"], copy)
    for target in ("maisi_mr/models/model.pt", "../x.pt", "maisi_vae/model.pt", "maisi_vae/models/../../x.pt"):
        with pytest.raises(InputError, match="allowed is BUNDLE/models/NAME.pt"):
            recipe.ship(copy / "new.pt", [target], ["openkbp"], copy)
    shutil.copy(copy / "new.pt", copy / "bundles" / "maisi_vae" / "models" / "model.pt")
    with pytest.raises(InputError, match="maisi_vae/models/model.pt is not as recorded"):
        recipe.write_licences(copy)
