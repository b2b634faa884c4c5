"""maisi dicom_read and maisi dicom_write, as a user calls them."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest

from maisi_tools.cli import main
from maisi_tools.volumes.writing import write_volume

from .conftest import oblique_affine


@pytest.fixture
def files(tmp_path, hu, mask):
    write_volume(tmp_path / "ct.nii.gz", hu, oblique_affine())
    write_volume(tmp_path / "mask.nii.gz", mask, oblique_affine(), np.uint8)
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def at(image, place):
    voxel = np.rint(np.linalg.inv(image.affine) @ [*place, 1]).astype(int)[:3]
    return np.asanyarray(image.dataobj)[tuple(voxel)]


def test_there_and_back(files, hu, mask, capsys):
    out = files / "study"
    options = ("--seed", 3, "--conditions", "{'steps': 30}", "--created", "2026-01-31T12:00:00")
    assert run("dicom_write", files / "ct.nii.gz", files / "mask.nii.gz", "-o", out, *options) == 0
    assert run("dicom_read", out / "CT", "-o", files / "back.nii.gz") == 0
    assert run("dicom_read", out / "RTSTRUCT.dcm", "-o", files / "rt.nii.gz", "--series", out / "CT") == 0
    assert run("dicom_read", out / "SEG.dcm", "-o", files / "seg.nii") == 0
    shutil.make_archive(str(files / "rt"), "zip", out, "RTSTRUCT.dcm")
    assert run("dicom_read", files / "rt.zip", "-o", files / "zipped.nii.gz", "--series", out / "CT") == 0
    assert (files / "zipped.nii.gz").read_bytes() == (files / "rt.nii.gz").read_bytes()
    assert capsys.readouterr().out.splitlines()[0] == f"{out}: 20 files"
    ds = pydicom.dcmread(out / "CT" / "0001.dcm")
    assert json.loads(ds.DerivationDescription[ds.DerivationDescription.index("{") :]) == {"seed": 3, "steps": 30}
    assert ds.StudyDate == "20260131"
    ct, rt, seg = (nib.load(files / name) for name in ("back.nii.gz", "rt.nii.gz", "seg.nii"))
    rng = np.random.default_rng(0)
    for _ in range(50):
        voxel = tuple(int(rng.integers(0, n)) for n in hu.shape)
        place = (oblique_affine() @ [*voxel, 1])[:3]
        assert at(ct, place) == hu[voxel] and at(rt, place) == at(seg, place) == mask[voxel]


def test_a_patients_scan_does_not_leave_as_an_invented_patient(files, capsys):
    """An edited scan, whose JSON says what of it is synthetic, and a series; each joins its study, or is refused."""
    assert run("dicom_write", files / "ct.nii.gz", "-o", files / "scan") == 0
    for path in (files / "scan" / "CT").iterdir():
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        ds.PatientID, ds.ImageType = "1234", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.save_as(path)
    box = [[-40.0, -40.0, -40.0], [40.0, 40.0, 40.0]]
    (files / "ct.json").write_text(json.dumps({"region": {"box_ras_mm": box}}))
    for given in (files / "ct.nii.gz", files / "scan" / "CT"):
        assert run("dicom_write", given, "-o", files / "out") == 2
        assert "give the scan's series as source" in capsys.readouterr().err and not (files / "out").exists()
    assert run("dicom_write", files / "ct.nii.gz", "-o", files / "out", "--source", files / "scan" / "CT") == 0
    ds = pydicom.dcmread(next((files / "out" / "CT").iterdir()))
    assert ds.PatientID == "1234" and ds.ImageType[-1] == "PARTLY_SYNTHETIC" and "between (" in ds.DerivationDescription


def test_a_series_is_chosen_for_a_mask_too(files, capsys):
    """Where a folder has two of the mask's frame of reference and the mask names neither, nor its slices."""
    for name in ("a", "b"):
        options = ("--created", "2026-01-31T12:00:00", "--source", files / "a" / "CT") if name == "b" else ()
        assert run("dicom_write", files / "ct.nii.gz", files / "mask.nii.gz", "-o", files / name, *options) == 0
    for path in (files / "b" / "CT").iterdir():
        shutil.copy(path, files / "a" / "CT" / f"b{path.name}")
    ds = pydicom.dcmread(files / "a" / "RTSTRUCT.dcm")
    referenced = ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    own, referenced.SeriesInstanceUID = referenced.SeriesInstanceUID, "1.2.3.4"
    for roi in ds.ROIContourSequence:
        for contour in roi.ContourSequence:
            del contour.ContourImageSequence
    ds.save_as(files / "rt.dcm")
    command = ("dicom_read", files / "rt.dcm", "-o", files / "rt.nii.gz", "--series", files / "a" / "CT")
    assert run(*command) == 2 and "holds 2 DICOM series" in capsys.readouterr().err
    assert run(*command, "--series_uid", own) == 0
    assert run(*command[:4], "--series_uid", own) == 2 and "give the folder of its CT" in capsys.readouterr().err


def test_tilted_series_come_out_straight(files, hu, capsys):
    tilted = np.diag([-6.0, -7.0, 5.0, 1.0])
    tilted[1, 2] = 2.0
    write_volume(files / "tilted.nii.gz", hu, tilted)
    assert run("dicom_write", files / "tilted.nii.gz", "-o", files / "t") == 0
    assert run("dicom_read", files / "t" / "CT", "-o", files / "straight.nii.gz") == 0
    image = nib.load(files / "straight.nii.gz")
    assert np.allclose(image.affine[:3, :3], np.diag([-6, -7, 5]), atol=1e-4)
    assert image.shape == (hu.shape[0], hu.shape[1] + 5, hu.shape[2])  # 17 * 2 mm of 7 mm voxels
    assert at(image, (tilted @ [20, 18, 0, 1])[:3]) == hu[20, 18, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dicom_write", "none.nii.gz"], "does not exist"),
        (["dicom_write", "ct.nii.gz", "--seed", "x"], "seed 'x' is not usable"),
        (["dicom_write", "ct.nii.gz", "--conditions", "x"], "conditions 'x' are not usable"),
        (["dicom_write", "ct.nii.gz", "--created", "yesterday"], "created 'yesterday' is not usable"),
        (
            ["dicom_write", "ct.nii.gz", "--conditions", "{'mask': '/home/jane/doe.nii.gz'}"],
            "may name a file or a person",
        ),
        (["dicom_write", "x_recon.nii.gz"], "give the scan's series as source"),
        (["dicom_write", "ct.nii.gz", "--from_scan", "True"], "give the scan's series as source"),
        (["dicom_write", "ct.nii.gz", "small.nii.gz"], "not on the grid"),
        (["dicom_write", "ct.nii.gz", "ct.nii.gz"], "mask"),
        (["dicom_write", "ct.nii.gz", "-o", "."], "is there already"),
        (["dicom_read", "none", "-o", "x.nii.gz"], "does not exist"),
        (["dicom_read", "none", "-o", "x.nii.gz", "--series", "."], "does not exist"),
        (["dicom_read", "ct.nii.gz", "-o", "x.png"], "is no NIfTI file"),
        (["dicom_write", "ct.nii.gz", "--source", "none"], "none does not exist"),
        (["dicom_write", "ct.nii.gz", "--source", "mask.nii.gz"], "is no DICOM; allowed is the folder of a CT series"),
        (["dicom_read", "ct.nii.gz", "-o", "x.nii.gz", "--names", "n.json"], "--names was given and"),
    ],
)
def test_wrong_use_is_one_line(files, mask, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    write_volume("small.nii.gz", mask[1:], oblique_affine(), np.uint8)
    (files / "x_recon.nii.gz").write_bytes((files / "ct.nii.gz").read_bytes())
    before = sorted(files.iterdir())
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(files.iterdir()) == before
