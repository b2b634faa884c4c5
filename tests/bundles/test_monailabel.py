"""The edit as a bundle of its own, called as MONAI Label calls it; tests/monailabel has the server itself."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

from maisi_tools.bundles.monailabel import EditedScand, RequestedMaskd, read_edits
from maisi_tools.bundles.packaging import package_bundle
from maisi_tools.bundles.stage import Stage
from maisi_tools.cli import main
from maisi_tools.errors import InputError

OVERLAYS = ["edit.json", "monailabel_edit.json"]
EDITS = {"resize": {"spinal cord": 0.7}}


@pytest.fixture(scope="module")
def edit_bundle(bundles, tmp_path_factory) -> Path:
    """The folder that the documented command makes."""
    folder = tmp_path_factory.mktemp("dist")
    command = ["package", "maisi_controlnet", "--overlay", ",".join(OVERLAYS), "--name", "maisi_edit"]
    assert main([*command, "--output_dir", str(folder), "--bundles", str(bundles)]) == 0
    (archive,) = folder.iterdir()
    with zipfile.ZipFile(archive) as content:
        content.extractall(folder)
    return folder / "maisi_edit"


def test_its_inference_json_is_what_monai_merges_and_all_else_is_the_bundles(edit_bundle, bundles):
    configs = bundles / "maisi_controlnet" / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / name) for name in ("inference.json", *OVERLAYS)])
    merged = json.loads((edit_bundle / "configs" / "inference.json").read_text())
    assert merged == {key: value for key, value in parser.get().items() if key != "_meta_"}
    assert merged["preprocessing"]["_target_"] == "Compose"
    for path in edit_bundle.rglob("*"):
        kept = bundles / "maisi_controlnet" / path.relative_to(edit_bundle)
        if path.is_file() and path.name != "inference.json" and "maisi_tools" not in path.parts:
            assert path.read_bytes() == kept.read_bytes(), path
    assert (edit_bundle / "maisi_tools" / "bundles" / "monailabel.py").is_file()


def test_it_answers_with_what_the_two_configs_write(
    edit_bundle, run_bundle, save, phantom_labels, phantom_ct, tmp_path
):
    """The settings as a form's texts, the labels as they were submitted; the scan's axes turned."""
    affine = np.array([[0, -5.0, 0, 30], [0, 0, 3.4, -20], [-5.0, 0, 0, 10], [0, 0, 0, 1]])
    ct, drawn = save(phantom_ct, "scan.nii.gz", affine), save(phantom_labels, "drawn.nii.gz", affine)
    mask = ct.parent / "labels" / "final" / "scan.nii.gz"
    mask.parent.mkdir(parents=True)
    drawn.rename(mask)
    fast = {"num_inference_steps": 2, "progress": False}
    run_bundle("maisi_controlnet", ["inference.json", "edit.json"], input=str(ct), mask=str(mask), edits=EDITS,
               output_dir=str(tmp_path / "out"), **fast)  # fmt: skip
    own = {f"displayable_configs#{key}": value for key, value in {"edits": json.dumps(EDITS), "mask": ""}.items()}
    stage = Stage(edit_bundle, "inference.json", "cpu", output_dir=str(tmp_path / "eval"), **own, **fast)
    answer = stage({"image": str(ct), "mask": ""})
    assert answer["pred"].shape == (1, *phantom_ct.shape) and answer["pred"].array.dtype == np.int16
    np.testing.assert_allclose(answer["pred"].affine, affine, atol=1e-5)
    expected = nib.load(tmp_path / "out" / "scan_ct.nii.gz")
    np.testing.assert_array_equal(answer["pred"].array[0], np.asarray(expected.dataobj))
    assert answer["result"]["edits"] == EDITS and answer["result"]["source"] == str(ct)


@pytest.mark.parametrize(
    "given", ['{"redraw": "liver", "seed": 3}', "{redraw: liver, seed: 3}", "redraw: liver\nseed: 3"]
)
def test_edits_of_a_form_are_text(given):
    assert read_edits(given) == {"redraw": "liver", "seed": 3}


def test_edits_as_they_are_and_none():
    assert read_edits([EDITS]) == [EDITS] and read_edits("") is None and read_edits(None) is None
    with pytest.raises(InputError, match="no JSON or YAML"):
        read_edits("{redraw: ")


def test_which_labels_a_request_means(tmp_path):
    """By path, uploaded, submitted, in this order; of those that were submitted the newest."""
    image = tmp_path / "a.b.nii.gz"
    find = RequestedMaskd(["mask", "new_mask"], "image")
    with pytest.raises(InputError, match="there are no labels of"):
        find({"image": str(image), "mask": ""})
    final = tmp_path / "labels" / "final"
    final.mkdir(parents=True)
    for age, name in enumerate(["a.b.seg.nrrd", "a.b.nii.gz", "a.nii.gz"]):
        (final / name).touch()
        os.utime(final / name, (1000 - age, 1000 - age))
    item = {"image": str(image), "mask": "", "new_mask": None}
    assert find(item) == {"image": str(image), "mask": str(final / "a.b.seg.nrrd")}
    os.utime(final / "a.b.nii.gz", (2000, 2000))
    assert find(item)["mask"] == str(final / "a.b.nii.gz")
    item |= {"label": "/tmp/uploaded.nii.gz"}
    assert find(item)["mask"] == "/tmp/uploaded.nii.gz"
    found = find(item | {"mask": "m.nii.gz", "new_mask": "/elsewhere/n.nii.gz"})
    assert (found["mask"], found["new_mask"]) == (str(tmp_path / "m.nii.gz"), "/elsewhere/n.nii.gz")


def test_the_answer_of_a_scaled_scan_is_hu(tmp_path):
    affine = np.array([[0, 0, 2.0, -3], [-1.5, 0, 0, 8], [0, 1.25, 0, 9], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint16).reshape(2, 3, 4), affine)
    image.header.set_slope_inter(0.5, -1000)
    nib.save(image, tmp_path / "x_ct.nii.gz")
    (tmp_path / "x_ct.json").write_text('{"seed": 3}')
    made = EditedScand("pred")({"ct_path": str(tmp_path / "x_ct.nii.gz"), "pred": None})
    np.testing.assert_array_equal(made["pred"].array[0], np.arange(24).reshape(2, 3, 4) / 2 - 1000)
    assert made["pred"].array.dtype == np.float32 and np.array_equal(made["pred"].affine, affine)
    assert made["result"] == {"seed": 3}


@pytest.mark.parametrize(
    ("overlays", "name", "words"),
    [
        (["edit.json"], None, "the overlays edit.json and the name 'maisi_vae'"),
        ([], "other", "the overlays none and the name 'other'"),
        (["edit.json"], "../x", "letters, digits"),
        (["edit.json"], "other", "no config edit.json; allowed as overlay are .*mr.json"),
        (["../../maisi_ldm/configs/full_rflow.json"], "other", "no config full_rflow.json"),
    ],
)
def test_wrong_overlays_and_names_are_refused(bundles, tmp_path, overlays, name, words):
    with pytest.raises(InputError, match=words):
        package_bundle(bundles / "maisi_vae", tmp_path, overlays, name)
    assert not list(tmp_path.iterdir())


def test_overlays_are_of_one_bundle(bundles, capsys):
    assert main(["package", "--overlay", "mr.json", "--name", "x", "--bundles", str(bundles)]) == 2
    assert "given with 0 bundles" in capsys.readouterr().err
