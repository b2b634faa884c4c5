"""The edit of a real scan: the commands of docs/editing.md, DICOM, and a listener's chain."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.errors import find_input_error
from maisi_tools.masks.label_maps import read_label_map

CONFIGS = ["inference.json", "edit.json"]
FAST = {"num_inference_steps": 2, "progress": False}
AFFINE = np.diag([5.0, 5.0, 3.4, 1.0])
PAROTID, CORD = 6, 2  # in OpenKBP's numbering


@pytest.fixture
def scan(save, phantom_labels, phantom_ct) -> dict[str, Path]:
    """A phantom's CT and its organs in OpenKBP's numbering."""
    ours = sum(number * (phantom_labels == label) for number, label in read_label_map("openkbp").items())
    return {"ct": save(phantom_ct, "scan.nii.gz"), "mask": save(ours.astype(np.uint8), "labels.nii.gz")}


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def check_untouched(out: Path, scan: dict[str, Path], name: str = "scan") -> np.ndarray:
    """Nothing is new where the weight is 0, and something where it is 1; returns the weight."""
    weight = voxels(out / f"{name}_weight.nii.gz")
    before, after = voxels(scan["ct"]), voxels(out / f"{name}_ct.nii.gz")
    np.testing.assert_array_equal(after[weight == 0], before[weight == 0])
    assert 0 < (weight == 1).sum() < 0.05 * weight.size and (after != before)[weight == 1].mean() > 0.5
    return weight


def test_an_organ_shrinks_in_its_scan(run_bundle, scan, phantom_labels, tmp_path):
    out = tmp_path / "out"
    run_bundle(
        "maisi_controlnet",
        CONFIGS,
        input=str(scan["ct"]),
        mask=str(scan["mask"]),
        label_map="openkbp",
        edits={"resize": {"left parotid gland": 0.7}},
        output_dir=str(out),
        **FAST,
    )
    weight = check_untouched(out, scan)
    before, after = voxels(scan["mask"]), voxels(out / "scan_mask.nii.gz")
    np.testing.assert_array_equal(after != before, weight == 1)
    kept = np.count_nonzero(after == PAROTID) / np.count_nonzero(before == PAROTID)
    assert kept == pytest.approx(0.7, abs=0.01) and set(after[after != before]) == {0}
    record = json.loads((out / "scan_ct.json").read_text())
    assert record["margin_mm"] == 8.0 and record["seed"] == 0 and record["solver"] == "ab2"
    assert json.loads((out / "run.json").read_text())["settings"]["edits"] == {"resize": {"left parotid gland": 0.7}}
    # The same seed, the same bytes; from the scan itself, less changes.
    changed = np.abs(voxels(out / "scan_ct.nii.gz").astype(int) - voxels(scan["ct"]))
    for folder, more in (("again", {}), ("near", {"strength": 0.2}), ("repaint", {"resample_steps": 1})):
        run_bundle(
            "maisi_controlnet",
            CONFIGS,
            input=[{"image": str(scan["ct"]), "label": str(scan["mask"])}],
            label_map="openkbp",
            edits={"resize": {"left parotid gland": 0.7}},
            output_dir=str(tmp_path / folder),
            **{**FAST, "num_inference_steps": 5 if folder == "near" else 2, **more},
        )
        check_untouched(tmp_path / folder, scan)
    assert (tmp_path / "again" / "scan_ct.nii.gz").read_bytes() == (out / "scan_ct.nii.gz").read_bytes()
    near = np.abs(voxels(tmp_path / "near" / "scan_ct.nii.gz").astype(int) - voxels(scan["ct"]))
    assert near[weight == 1].mean() < changed[weight == 1].mean()
    assert (voxels(tmp_path / "repaint" / "scan_ct.nii.gz") != voxels(out / "scan_ct.nii.gz")).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edits": None}, ["edits are None"]),
        ({"mask": None}, ["mask is None", "image and label"]),
        ({"edits": {"insert": {"hepatic tumor": 20}}}, ["grows in liver"]),
        ({"strength": 0}, ["strength is 0"]),
        ({"margin_mm": -1}, ["margin_mm is -1"]),
        ({"new_mask": "x.nii.gz"}, ["edits and new_mask"]),
    ],
)
def test_wrong_edits_are_refused(run_bundle, scan, tmp_path, change, words):
    given = {"mask": str(scan["mask"]), "edits": {"redraw": "spinal cord"}, "label_map": "openkbp"}
    with pytest.raises(Exception) as raised:
        run_bundle(
            "maisi_controlnet", CONFIGS, input=str(scan["ct"]), output_dir=str(tmp_path), **FAST, **given | change
        )
    error = find_input_error(raised.value)
    assert error is not None and all(word in str(error) for word in words), error


@pytest.mark.parametrize("overlay", ["full_rflow.json", "full_ddpm.json"])
def test_the_released_networks_can_edit(bundles, overlay):
    """The overlay between the two configs: its networks, its spacing and its field of view, no completed masks."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(bundles / "maisi_controlnet" / "configs" / name) for name in
                        ("inference.json", overlay, "edit.json")])  # fmt: skip
    parser["autoencoder"] = None
    assert parser.get_parsed_content("complete_mask") is False
    assert parser["inferer"]["spacing_range"] == "@spacing_range"
    assert parser.get_parsed_content("smallest_field_of_view") == [330, 330, 151]
    with torch.device("meta"):
        assert parser.get_parsed_content("network_def").unet.levels["num_channels"] == [64, 128, 256, 512]


@pytest.fixture
def series(scan, phantom_labels, phantom_ct, tmp_path) -> Path:
    """The scan as a hospital would send it: a CT series, with its Segmentation beside."""
    pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
    import pydicom

    from maisi_tools.dicom.study import write_study

    folder = tmp_path / "study"
    created = datetime.datetime(2026, 1, 2)
    for path in write_study(folder, phantom_ct, AFFINE, phantom_labels, created=created):
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        ds.PatientName, ds.PatientID = "Doe^Jane", "1234"
        if ds.Modality == "CT":
            ds.ImageType, ds.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "Neck"
        ds.save_as(path)
    return folder


def slices_of(folder: Path) -> dict[float, object]:
    import pydicom

    found = [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]
    return {round(float(ds.ImagePositionPatient[2]), 3): ds for ds in found}


def check_study(made: Path, source: Path, changed_slices: set[float]) -> None:
    """A derived series of the same study, whose pixels differ in some slices alone; it says where."""
    old, new = slices_of(source), slices_of(made)
    assert old.keys() == new.keys()
    for place, ds in new.items():
        was = old[place]
        assert (ds.PatientID, ds.StudyInstanceUID, ds.FrameOfReferenceUID) == (
            was.PatientID,
            was.StudyInstanceUID,
            was.FrameOfReferenceUID,
        )
        assert ds.SeriesInstanceUID != was.SeriesInstanceUID and ds.SyntheticData == "YES"
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "PARTLY_SYNTHETIC"]
        assert ds.SeriesDescription == "Partly synthetic CT, edited scan"
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == was.SOPInstanceUID
        hu, before = (one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in (ds, was))
        assert (hu != before).any() == (place in changed_slices), place
        corners = re.search(r"between \((.*?)\) and \((.*?)\), mm", ds.DerivationDescription)
        low, high = (np.array([float(mm) for mm in corner.split(",")]) for corner in corners.groups())
        for column, row in np.argwhere((hu != before).T):
            at = np.array(ds.ImagePositionPatient, float) + [column * 5.0, row * 5.0, 0]
            assert (at >= np.minimum(low, high) - 0.01).all() and (at <= np.maximum(low, high) + 0.01).all()


def test_a_series_comes_back_as_a_series(run_bundle, scan, series, tmp_path):
    from maisi_tools.dicom.study import read_mask

    out = tmp_path / "out"
    run_bundle(
        "maisi_controlnet",
        CONFIGS,
        input=str(series / "CT"),
        mask=str(scan["mask"]),
        label_map="openkbp",
        edits={"resize": {"left parotid gland": 0.7}},
        output_dir=str(out),
        **FAST,
    )
    ct = nib.load(out / "CT_ct.nii.gz")
    canonical = np.asarray(nib.as_closest_canonical(ct).dataobj)
    changed = np.flatnonzero((canonical != voxels(scan["ct"])).any(axis=(0, 1)))
    check_study(out / "CT_dicom" / "CT", series / "CT", {round(k * 3.4, 3) for k in changed})
    mask = read_mask(out / "CT_dicom" / "SEG.dcm", series / "CT")
    assert np.count_nonzero(mask[0].numpy() == read_label_map("openkbp")[PAROTID]) == np.count_nonzero(
        voxels(out / "CT_mask.nii.gz") == PAROTID
    )


def test_the_listener_edits_the_scan_that_structures_were_drawn_on(bundles, series, tmp_path):
    pytest.importorskip("pynetdicom", reason="needs the extra 'dicom'")
    import pydicom

    from maisi_tools.errors import InputError
    from maisi_tools.service.chain import gather, run_job
    from maisi_tools.service.jobs import Job
    from maisi_tools.service.settings import Chain, Step

    incoming = tmp_path / "incoming"
    incoming.mkdir()
    (key,) = gather(series, incoming)["SEG"]
    study = str(pydicom.dcmread(series / "SEG.dcm").StudyInstanceUID)
    settings = {"input": "{series}", "mask": "{input}", "edits": {"redraw": "spinal cord"}, **FAST}
    step = Step(str(bundles / "maisi_controlnet"), CONFIGS, settings)
    job = Job(key, "SEG", study, str(incoming), "2026-01-03T10:00:00")
    made = run_job(job, Chain("SEG", (step,), keep_patient=True), tmp_path / "work")
    folder = made.files[0].parent
    old, new = slices_of(series / "CT"), slices_of(folder)
    differing = {place for place in old if (old[place].pixel_array != new[place].pixel_array).any()}
    assert 0 < len(differing)
    check_study(folder, series / "CT", differing)
    with pytest.raises(InputError, match="keep_patient: true"):  # a patient's scan is no invented patient's
        Chain("SEG", (step,), keep_patient=False)


def commands(page: str) -> list[str]:
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]


@pytest.mark.timeout(600)
def test_the_commands_of_the_page(python, repo_root, tiny_bundles, scan, series, tmp_path):
    """As they stand in docs/editing.md but for the sampler's steps, in a folder that has the files they name."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "bundles").symlink_to(tiny_bundles)
    (work / "scan.nii.gz").symlink_to(scan["ct"])
    (work / "labels.nii.gz").symlink_to(scan["mask"])
    (work / "SERIES").symlink_to(series / "CT")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, what in (("python", ""), ("maisi", " -m maisi_tools.cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{python}"{what} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    found = commands((repo_root / "docs" / "editing.md").read_text())
    assert len(found) == 3
    for block in found:
        quick = block.replace("--input scan", "--num_inference_steps 2 --input scan")
        done = subprocess.run(["bash", "-ec", quick], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for folder, name in (("out", "scan"), ("out_edited", "scan"), ("out_dicom", "SERIES")):
        made = {path.name for path in (work / folder).iterdir()}
        assert made >= {f"{name}_{what}" for what in ("ct.nii.gz", "mask.nii.gz", "weight.nii.gz", "ct.json")}
    assert (work / "out_dicom" / "SERIES_dicom" / "SEG.dcm").is_file()
    check_untouched(work / "out_edited", scan)
    grown = [np.count_nonzero(voxels(path) == PAROTID) for path in
             (scan["mask"], work / "out_edited" / "scan_mask.nii.gz")]  # fmt: skip
    assert grown[1] / grown[0] == pytest.approx(1.3, abs=0.02)
