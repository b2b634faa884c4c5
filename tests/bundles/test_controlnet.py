"""Stage 3: a mask in, a CT with its geometry out."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import find_input_error
from maisi_tools.masks.phantom import make_phantom

FAST = {"num_inference_steps": 2, "progress": False}


def test_ct_has_the_masks_geometry_and_air_outside_the_body(run_bundle, save, phantom_labels, tmp_path):
    odd = phantom_labels[1:, :-3, 2:]
    affine = np.array([[-5.0, 0, 0, 90], [0, -5.0, 0, 80.5], [0, 0, 3.4, -70.25], [0, 0, 0, 1]])
    path = save(odd, "case7.nii.gz", affine)
    run_bundle("maisi_controlnet", "inference.json", input=str(path), output_dir=str(tmp_path / "out"), **FAST)

    ct, mask = (nib.load(tmp_path / "out" / f"case7_{what}.nii.gz") for what in ("ct", "mask"))
    np.testing.assert_array_equal(ct.affine, nib.load(path).affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), odd)
    hu = np.asarray(ct.dataobj)
    assert hu.shape == odd.shape and (hu[odd == 0] == -1000).all()
    metrics = json.loads((tmp_path / "out" / "case7_ct.json").read_text())["metrics"]
    assert metrics["hu_outside"] == -1000
    assert metrics["hu_airway"] < metrics["hu_soft_tissue"] < metrics["hu_bone"]
    draws = json.loads((tmp_path / "out" / "case7_ct.json").read_text())["draws"]
    assert draws["seed"] == 0 and len(draws["tried"]) == 1


def test_same_seed_same_bytes_alone_or_among_others(run_bundle, save, phantom_labels, tmp_path):
    paths = [save(phantom_labels[:32, :32, :32], name) for name in ("a.nii.gz", "b.nii.gz")]
    run_bundle(
        "maisi_controlnet", "inference.json", input=[str(p) for p in paths], output_dir=str(tmp_path / "two"), **FAST
    )
    run_bundle("maisi_controlnet", "inference.json", input=str(paths[1]), output_dir=str(tmp_path / "one"), **FAST)
    run_bundle(
        "maisi_controlnet", "inference.json", input=str(paths[1]), output_dir=str(tmp_path / "seed"), seed=1, **FAST
    )
    among, alone, other = (
        np.asarray(nib.load(tmp_path / folder / "b_ct.nii.gz").dataobj) for folder in ("two", "one", "seed")
    )
    np.testing.assert_array_equal(among, alone)
    assert (alone != other).any()


def test_missing_body_label_is_added(run_bundle, save, phantom_labels, tmp_path):
    bare = np.where(phantom_labels == 200, 0, phantom_labels)
    path = save(bare, "bare.nii.gz")
    run_bundle("maisi_controlnet", "inference.json", input=str(path), output_dir=str(tmp_path / "out"), **FAST)
    used = np.asarray(nib.load(tmp_path / "out" / "bare_mask.nii.gz").dataobj)
    np.testing.assert_array_equal(used[bare > 0], bare[bare > 0])
    assert (used[bare == 0] == 200).sum() > 1000


def test_label_map_file_and_new_grid(run_bundle, save, phantom_labels, tmp_path):
    ours = np.where(phantom_labels == 120, 7, np.where(phantom_labels > 0, 3, 0)).astype(np.uint8)
    path = save(ours, "ours.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"7": 120, "3": "body"}))
    run_bundle(
        "maisi_controlnet",
        "inference.json",
        input=str(path),
        output_dir=str(tmp_path / "out"),
        label_map=str(tmp_path / "map.json"),
        output_size=[64, 48, 48],
        **FAST,
    )
    ct = nib.load(tmp_path / "out" / "ours_ct.nii.gz")
    assert ct.shape == (64, 48, 48)
    np.testing.assert_allclose(ct.header.get_zooms(), [5.0 * 48 / 64, 5.0, 3.4], rtol=1e-5)
    used = np.asarray(nib.load(tmp_path / "out" / "ours_mask.nii.gz").dataobj)
    assert set(np.unique(used)) == {0, 120, 200}


def test_class_folder_in_and_its_labels_out(run_bundle, tmp_path):
    """One file a class, as TotalSegmentator writes them; a class that MAISI lacks has a placeholder and comes back."""
    folder = tmp_path / "case7"
    folder.mkdir()
    labels = make_phantom("torso", size=(48, 48, 48), spacing=(5.0, 5.0, 3.4), seed=3)
    given = {"liver": (labels == 1, 5), "sacrum": (labels == 97, 92), "face": (labels == 3, 93)}
    for name, (inside, _) in given.items():
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), np.diag([5.0, 5.0, 3.4, 1])), folder / f"{name}.nii.gz")
    run_bundle(
        "maisi_controlnet",
        "inference.json",
        input=str(folder),
        output_dir=str(tmp_path / "out"),
        label_map="totalsegmentator_v1",
        placeholders="auto",
        output_labels="input",
        **FAST,
    )
    expected = sum(number * inside.astype(int) for inside, number in given.values())
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out" / "case7_mask.nii.gz").dataobj), expected)
    record = json.loads((tmp_path / "out" / "case7_mask.json").read_text())["labels"]
    assert record["placeholders"] == {"pulmonary_artery": 21, "face": 129} and record["numbering"] == "input"
    assert set(record["without_counterpart"]) == {"body"}
    assert nib.load(tmp_path / "out" / "case7_ct.nii.gz").shape == labels.shape


@pytest.mark.parametrize(
    ("change", "override", "words"),
    [
        (lambda m: np.where(m == 120, 199, m), {}, ["199", "JSON"]),
        (lambda m: np.zeros_like(m), {}, ["empty"]),
        (lambda m: m[..., 0], {}, ["3D"]),
        (lambda m: np.stack([m, m], -1), {}, ["4D"]),
        (lambda m: m, {"output_size": [100, 48, 48]}, ["100", "96", "112"]),
        (lambda m: m, {"spacing": [1.0, 1.0, 1.0]}, ["1", "2.5"]),
        (lambda m: m, {"modality": "mri"}, ["modality is 'mri'", "allowed are unknown, ct"]),
        (lambda m: m, {"modality": 9}, ["modality is 9", "allowed are unknown, ct"]),
        (lambda m: m, {"num_inference_step": 4}, ["num_inference_step", "num_inference_steps"]),
        (lambda m: m, {"device": "cuda:99"}, ["device cuda:99", "allowed is cpu"]),
        (lambda m: m, {"label_map": "nothing_like_it"}, ["nothing_like_it", "totalsegmentator"]),
        (lambda m: m, {"output_labels": "maisi"}, ["output_labels", "vocabulary and input"]),
        (lambda m: m, {"placeholders": {"liver": 2}}, ["liver", "reads as 1"]),
    ],
)
def test_bad_masks_are_refused(cause, run_bundle, save, phantom_labels, tmp_path, change, override, words):
    path = save(change(phantom_labels).astype(np.uint8), "bad.nii.gz")
    with pytest.raises(Exception) as raised:
        run_bundle(
            "maisi_controlnet", "inference.json", input=str(path), output_dir=str(tmp_path / "out"), **FAST, **override
        )
    message = str(cause(raised.value))
    assert all(word in message for word in words), message
    assert not list((tmp_path / "out").glob("*"))


def test_a_mask_outside_the_spacing_range_gets_a_ct_on_its_own_grid(run_bundle, save, phantom_labels, tmp_path, caplog):
    affine = np.array([[-5.6, 0, 0, 90], [0, -5.6, 0, 80.5], [0, 0, 3.4, -70.25], [0, 0, 0, 1]])
    path = save(phantom_labels, "coarse.nii.gz", affine)
    run_bundle("maisi_controlnet", "inference.json", input=str(path), output_dir=str(tmp_path / "out"), **FAST)
    ct, mask = (nib.load(tmp_path / "out" / f"coarse_{what}.nii.gz") for what in ("ct", "mask"))
    np.testing.assert_array_equal(ct.affine, nib.load(path).affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), phantom_labels)
    hu = np.asarray(ct.dataobj)
    assert hu.shape == phantom_labels.shape and (hu[phantom_labels == 0] == -1000).all()
    metrics = json.loads((tmp_path / "out" / "coarse_ct.json").read_text())["metrics"]
    assert metrics["hu_airway"] < metrics["hu_soft_tissue"] < metrics["hu_bone"]
    said = [record.getMessage() for record in caplog.records if "brought back" in record.message]
    assert len(said) == 1 and "5.6 x 5.6 x 3.4 mm" in said[0] and "5.2 x 5.2 x 3.4 mm" in said[0]


def test_small_field_of_view_only_warns(run_bundle, save, phantom_labels, tmp_path, caplog):
    path = save(phantom_labels[:16, :16, :16], "tiny.nii.gz")
    run_bundle("maisi_controlnet", "inference.json", input=str(path), output_dir=str(tmp_path / "out"), **FAST)
    assert any("field of view" in record.message for record in caplog.records)
    assert (tmp_path / "out" / "tiny_ct.nii.gz").exists()


def test_dicom_overlay_writes_a_study_beside_the_volume(run_bundle, save, phantom_labels, tmp_path):
    pydicom = pytest.importorskip("pydicom", minversion="3")
    pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
    from maisi_tools.dicom.study import read_mask
    from maisi_tools.volumes.reading import read_volume

    path = save(phantom_labels[:32, :32, :32], "case.nii.gz")
    for seed in (0, 4):  # a second run replaces the first one's study
        run_bundle(
            "maisi_controlnet",
            ["inference.json", "dicom.json"],
            input=str(path),
            output_dir=str(tmp_path),
            seed=seed,
            **FAST,
        )
    study = tmp_path / "case_dicom"
    written, volume = nib.load(tmp_path / "case_ct.nii.gz"), read_volume(study / "CT", "ct")
    mask = read_mask(study / "RTSTRUCT.dcm", study / "CT")
    for index in ((3, 4, 5), (20, 30, 8)):
        found = np.rint(np.linalg.inv(np.asarray(volume.affine)) @ written.affine @ [*index, 1]).astype(int)[:3]
        assert volume[(0, *found)] == np.asarray(written.dataobj)[index]
        assert mask[(0, *found)] == np.asarray(nib.load(tmp_path / "case_mask.nii.gz").dataobj)[index]
    text = pydicom.dcmread(next((study / "CT").iterdir())).DerivationDescription
    recorded = json.loads(text[text.index("{") :])
    assert recorded["seed"] == 4 and recorded["num_inference_steps"] == 2
    assert recorded["solver"] == "ab2"
    note = study / "CT" / "notes.txt"  # of the user, who would lose it
    note.write_text("mine")
    (tmp_path / "case_ct.nii.gz").unlink()
    with pytest.raises(Exception) as caught:
        run_bundle(
            "maisi_controlnet", ["inference.json", "dicom.json"], input=str(path), output_dir=str(tmp_path), **FAST
        )
    assert "notes.txt would have to make room for a study" in str(find_input_error(caught.value))
    assert note.read_text() == "mine" and not (tmp_path / "case_ct.nii.gz").exists()


def test_dicom_overlay_refuses_masks_in_the_inputs_numbering(run_bundle, save, phantom_labels, tmp_path):
    pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
    path = save(phantom_labels[:32, :32, :32], "case.nii.gz")
    files, out = ["inference.json", "dicom.json"], tmp_path / "out"
    with pytest.raises(Exception) as caught:
        run_bundle("maisi_controlnet", files, input=str(path), output_dir=str(out), output_labels="input", **FAST)
    assert "allowed with DICOM output is 'vocabulary'" in str(find_input_error(caught.value))
    assert not list(out.iterdir())
