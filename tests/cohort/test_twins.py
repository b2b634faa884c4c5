"""maisi twin, as a user calls it: thresholds, a bundle made here, resume, bad files, DICOM."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.cli import main
from maisi_tools.cohort.twins import make_twins, twin_mask
from maisi_tools.errors import InputError
from maisi_tools.files import held
from maisi_tools.masks.label_maps import LABEL_MAPS
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.metrics.segmenters import map_of_classes, open_segmenter

SIZE, SPACING = (48, 40, 32), (5.0, 5.0, 3.4)
LPS = np.diag([-5.0, -5.0, 3.4, 1.0])
LPS[:3, 3] = 110, 90, -40
QUICK = "{'num_inference_steps': 1}"
BONE = 120


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return make_phantom("head_neck", SIZE, SPACING, seed=3)


@pytest.fixture(scope="module")
def hu(labels) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 10, SIZE)
    return (flat_ct(labels) + noise * (labels > 0)).clip(-1000, 1000).astype(np.int16)


@pytest.fixture
def scans(tmp_path, hu) -> Path:
    """A folder with a CT, another one in LPS, and a file that is no volume at all."""
    folder = tmp_path / "scans"
    folder.mkdir()
    nib.save(nib.Nifti1Image(hu, np.diag([*SPACING, 1.0])), folder / "a.nii.gz")
    nib.save(nib.Nifti1Image(hu[::-1, ::-1], LPS), folder / "b.nii.gz")
    (folder / "bad.nii.gz").write_bytes(b"no volume")
    return folder


def twin(*arguments: object) -> int:
    return main(["twin", *map(str, arguments), "--settings", QUICK])


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_bad_file_and_again(scans, hu, tmp_path, bundles, capsys, monkeypatch):
    """One bad file stops nothing; what is done is passed over, what is gone, changed or failed is made."""
    monkeypatch.chdir(bundles.parent)
    out = tmp_path / "out"
    assert twin(scans, "--output_dir", out) == 2
    said = capsys.readouterr()
    assert "2 twins made, 0 were there" in said.out and "1 of them failed: bad" in said.err
    record = json.loads((out / "bad_twin.json").read_text())
    assert record["status"] == "failed" and "bad.nii.gz" in record["error"]

    first, turned = nib.load(out / "a_ct.nii.gz"), nib.load(out / "b_ct.nii.gz")
    assert first.shape == SIZE and np.allclose(turned.affine, LPS)
    mask = voxels(out / "a_mask.nii.gz")
    np.testing.assert_array_equal(voxels(out / "b_mask.nii.gz")[::-1, ::-1], mask)
    np.testing.assert_array_equal(np.asarray(turned.dataobj)[::-1, ::-1], np.asarray(first.dataobj))
    inside = hu > -300  # a phantom's head: filled, it is the body
    assert (mask[inside] > 0).mean() > 0.99 and (mask == BONE).sum() == pytest.approx((hu > 250).sum(), rel=0.02)
    assert (np.asarray(first.dataobj)[mask == 0] == -1000).all()

    made = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "b_mask.nii.gz").unlink()
    (scans / "bad.nii.gz").unlink()
    os.link(scans / "a.nii.gz", scans / "c.nii.gz")
    nib.save(nib.Nifti1Image(hu[:, :, ::-1].copy(), np.diag([*SPACING, 1.0])), scans / "a.nii.gz")
    assert twin(scans, "--output_dir", out) == 0
    assert "3 twins made, 0 were there" in capsys.readouterr().out
    assert (out / "a_ct.nii.gz").stat().st_mtime_ns > made["a_ct.nii.gz"]
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("[abc]*")}
    assert twin(scans, "--output_dir", out) == 0
    assert "0 twins made, 3 were there" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("[abc]*")} == made

    with held(out, "another run"):
        assert twin(scans, "--output_dir", out) == 2
    assert "another run makes twins in" in capsys.readouterr().err
    assert twin(scans, "--output_dir", out, "--seed", 1) == 2
    assert "was made with another seed" in capsys.readouterr().err


def test_a_cut_run_goes_on(scans, tmp_path, bundles, monkeypatch, capsys):
    """Killed between the files and the record: the twin is made again, with the same bytes."""
    monkeypatch.chdir(bundles.parent)
    out = tmp_path / "out"
    assert twin(scans / "a.nii.gz", "--output_dir", out) == 0
    before = (out / "a_ct.nii.gz").read_bytes()
    record = (out / "a_twin.json").read_text()
    (out / "a_twin.json").write_text(record[: len(record) // 2])
    assert twin(scans / "a.nii.gz", "--output_dir", out) == 0
    assert "1 twins made" in capsys.readouterr().out.splitlines()[-1]
    assert (out / "a_ct.nii.gz").read_bytes() == before and (out / "a_twin.json").read_text() == record


def test_what_no_run_wrote_is_not_written_over(scans, tmp_path, bundles, monkeypatch, capsys):
    monkeypatch.chdir(bundles.parent)
    mine = tmp_path / "out" / "a_ct.nii.gz"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert twin(scans / "a.nii.gz", "--output_dir", mine.parent) == 2
    assert "a_ct.nii.gz would be written over, and no earlier run wrote it" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"


def test_no_twin_of_an_earlier_ct_stays(scans, hu, tmp_path, bundles, monkeypatch, capsys):
    """Where the new CT is bad; of the same CT, and of what no record lists, all stays."""
    monkeypatch.chdir(bundles.parent)
    out, scan = tmp_path / "out", scans / "a.nii.gz"

    def go_on(status: int) -> dict:
        assert twin(scan, "--output_dir", out) == status
        return json.loads((out / "a_twin.json").read_text())

    good = scan.read_bytes()
    assert go_on(0)["files"] == ["a_ct.nii.gz", "a_mask.nii.gz"]
    mine = [out / name for name in ("a_mine.nii.gz", "a_dicom", "b_ct.nii.gz")]
    for path in mine:
        path.write_bytes(b"mine")

    def fail(*_):
        raise InputError("no reader today")

    with monkeypatch.context() as broken:  # the same CT, whose mask was lost, and which cannot be made again now
        (out / "a_mask.nii.gz").unlink()
        broken.setattr("maisi_tools.cohort.twins.read_volume", fail)
        record = go_on(2)
    assert record["status"] == "failed" and "no reader" in record["error"]
    assert record["files"] == ["a_ct.nii.gz", "a_mask.nii.gz"]  # still those of this CT, also by a later run
    assert (out / "a_ct.nii.gz").is_file()

    for bad in (np.full_like(hu, -1000), None):  # nobody in it; no volume at all
        if bad is None:
            scan.write_bytes(b"no volume")
        else:
            nib.save(nib.Nifti1Image(bad, np.diag([*SPACING, 1.0])), scan)
        record = go_on(2)
        assert (record["status"], record["files"]) == ("failed", [])
        assert {path.name for path in out.glob("a_*")} == {"a_twin.json", "a_mine.nii.gz", "a_dicom"}
        scan.write_bytes(good)
        assert go_on(0)["files"] == ["a_ct.nii.gz", "a_mask.nii.gz"]
    record = go_on(0) | {"files": ["../scans/b.nii.gz", "b_ct.nii.gz", "a_mask.nii.gz"]}  # of others, by whatever hand
    (out / "a_twin.json").write_text(json.dumps(record))
    scan.write_bytes(b"no volume")
    go_on(2)
    assert (scans / "b.nii.gz").is_file() and (out / "a_ct.nii.gz").is_file()
    assert not (out / "a_mask.nii.gz").exists()
    assert all(path.read_bytes() == b"mine" for path in mine)


def test_twins_of_a_datalist_are_those_of_its_training_section(scans, tmp_path, bundles, monkeypatch, capsys):
    """`maisi prepare` writes both; a list of held-out ones alone has to be named file by file."""
    monkeypatch.chdir(bundles.parent)
    made: list[str] = []
    monkeypatch.setattr(
        "maisi_tools.cohort.twins._make", lambda items, *_: made.extend(i["image"] for i in items) or {}
    )
    (scans / "list.json").write_text(json.dumps({"training": ["b.nii.gz"], "validation": ["a.nii.gz"]}))
    make_twins(scans / "list.json", tmp_path / "out", "thresholds", bundles / "maisi_controlnet")
    assert made == [str(scans / "b.nii.gz")]
    (scans / "list.json").write_text(json.dumps({"validation": ["a.nii.gz"]}))
    assert twin(scans / "list.json", "--output_dir", tmp_path / "out") == 2
    assert "cases under 'validation' alone, which are kept out" in capsys.readouterr().err


def test_another_config_is_noticed(scans, bundle, tmp_path, bundles, monkeypatch, capsys):
    """By what an overlay, the stage's config or the segmenter's says; an earlier version recorded names alone."""
    bundles = shutil.copytree(bundles, tmp_path / "copy" / "bundles")
    monkeypatch.chdir(bundles.parent)
    overlay = bundles / "maisi_controlnet" / "configs" / "mine.json"
    overlay.write_text('{"control_scale": 0.5}')
    out = tmp_path / "out"
    given = (scans / "a.nii.gz", "--segmenter", bundle, "--overlay", "mine.json", "--output_dir", out)
    assert twin(*given) == 0
    own, segmenter = overlay.with_name("inference.json"), bundle / "configs" / "inference.json"
    for path, old, new, what in (
        (overlay, "0.5", "0.25", "config"),
        (own, '"guidance_scale": 2.0', '"guidance_scale": 1.5', "config"),
        (segmenter, "[15.0, 15.0, 3.4]", "[10.0, 10.0, 3.4]", "segmenter_config"),
    ):
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
        assert twin(*given) == 2
        assert f"was made with another {what}; give" in capsys.readouterr().err
        path.write_text(before)
    record = json.loads((out / "a_twin.json").read_text())
    del record["how"]["config"], record["how"]["segmenter_config"]
    (out / "a_twin.json").write_text(json.dumps(record))
    assert twin(*given) == 0
    assert "0 twins made, 1 were there" in capsys.readouterr().out


def test_a_bundle_segments(scans, bundle, hu, tmp_path, bundles, monkeypatch):
    """Its bone is in the mask, and what completion by HU adds."""
    monkeypatch.chdir(bundles.parent)
    out = tmp_path / "out"
    assert twin(scans / "b.nii.gz", "--segmenter", bundle, "--output_dir", out) == 0
    record = json.loads((out / "b_twin.json").read_text())
    assert "skull" in record["labels"] and record["how"]["segmenter"] == str(bundle)
    mask = voxels(out / "b_mask.nii.gz")[::-1, ::-1]
    assert (mask[hu > 250] == BONE).mean() > 0.97  # specks are left out
    assert (mask == BONE).sum() > 1.1 * (hu > 250).sum()  # coarse as the bundle sees it


def test_dicom_in_dicom_out(hu, tmp_path, bundles, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
    from maisi_tools.dicom.study import write_study

    monkeypatch.chdir(bundles.parent)
    write_study(tmp_path / "study", hu[::-1, ::-1], LPS)
    series = (tmp_path / "study" / "CT").rename(tmp_path / "SERIES")
    given = pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True)
    for name, keep in (("kept", True), ("invented", False)):
        assert twin(series, "--output_dir", tmp_path / name, "--keep_patient", keep) == 0
        study = tmp_path / name / "SERIES_dicom"
        assert {path.name for path in study.iterdir()} == {"CT", "SEG.dcm", "RTSTRUCT.dcm"}
        made = pydicom.dcmread(study / "CT" / "0001.dcm")
        if keep:  # a study that is gone is made again
            shutil.rmtree(study)
            assert twin(series, "--output_dir", tmp_path / name, "--keep_patient", keep) == 0 and study.is_dir()
        assert (made.PatientID == given.PatientID) == keep == (made.StudyInstanceUID == given.StudyInstanceUID)
        assert made.SeriesInstanceUID != given.SeriesInstanceUID
        assert made.DerivationDescription.startswith("Synthetic") and "thresholds" in made.DerivationDescription
        assert made[0x0008, 0x001C].value == "YES" and len(list((study / "CT").iterdir())) == SIZE[2]

    # A series that is replaced by a bad CT: its study goes, but not with what others put into it.
    series.rename(tmp_path / "away")
    (tmp_path / "SERIES.nii.gz").write_bytes(b"no volume")
    out, note = tmp_path / "kept", tmp_path / "kept" / "SERIES_dicom" / "note.txt"
    note.write_text("mine")
    for there in (True, False):
        assert twin(tmp_path / "SERIES.nii.gz", "--output_dir", out) == 2
        record = json.loads((out / "SERIES_twin.json").read_text())
        assert record["status"] == "failed" and ("note.txt" in record["error"]) == there
        assert bool(record["files"]) == note.exists() == (out / "SERIES_ct.nii.gz").exists() == there
        note.unlink(missing_ok=True)
    assert not (out / "SERIES_dicom").exists()


# --- masks ------------------------------------------------------------------------------------------------------------


def as_ct(hu: np.ndarray) -> MetaTensor:
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(hu.astype(np.float32))[None], affine=affine)


def test_labels_stay_the_couch_goes_and_the_body_is_filled():
    """A cylinder on a hollow block, with a label that reaches into the block."""
    x, y, _ = np.ix_(*((np.arange(n) - n / 2) * mm for n, mm in zip(SIZE, SPACING, strict=True)))
    trunk = np.broadcast_to((x**2 / 90**2 + (y - 20) ** 2 / 60**2 <= 1) & (y > -30), SIZE)
    block = np.broadcast_to((np.abs(x) < 110) & (y <= -30) & (y > -80), SIZE)
    hull = np.broadcast_to((np.abs(x) < 100) & (y <= -40) & (y > -70), SIZE)
    hu = np.where(trunk, 40.0, np.where(hull, -950.0, np.where(block, 0.0, -1000.0)))
    labels = np.zeros(SIZE, np.uint8)
    labels[20:28, :, 10:20] = 121 * (trunk | block)[20:28, :, 10:20]
    for complete in (False, True):
        mask, ml = twin_mask(as_ct(hu), labels, complete)
        assert set(np.unique(mask)) == {0, 121, 200}
        np.testing.assert_array_equal(mask[trunk & (labels > 0)], 121)
        assert np.count_nonzero((mask > 0) != trunk) < 0.03 * np.count_nonzero(trunk)
        assert ml["couch"] == pytest.approx(np.count_nonzero(block) * 0.085, rel=0.1)


def test_labels_in_the_air_beside_the_body_are_left_out():
    """A segmenter's slip far away goes, whatever its label; what reaches over the skin stays whole."""
    x, y, _ = np.ix_(*((np.arange(n) - n / 2) * mm for n, mm in zip(SIZE, SPACING, strict=True)))
    trunk = np.broadcast_to(x**2 / 80**2 + y**2 / 60**2 <= 1, SIZE)
    skin = int(np.argmax(trunk[:, SIZE[1] // 2, 0]))
    labels = np.zeros(SIZE, np.uint8)
    labels[skin - 3 : skin + 3, 20:28, 10:20] = 121
    labels[skin + 8 : skin + 12, 20:28, 10:20] = 3
    slip = np.zeros(SIZE, bool)
    slip[:3, :3, 10:14] = slip[-4:, -4:, :2] = True
    given = np.where(slip, 3, labels).astype(np.uint8)
    for complete in (False, True):
        mask, _ = twin_mask(as_ct(np.where(trunk, 40.0, -1000.0)), given, complete)
        assert not mask[slip].any()
        np.testing.assert_array_equal(np.where(mask == 200, 0, mask), labels)


def test_a_ct_without_body_is_refused():
    with pytest.raises(InputError, match="no body in x.nii.gz"):
        twin_mask(as_ct(np.full(SIZE, -1000.0)), np.zeros(SIZE, np.uint8), True, "x.nii.gz")


# --- segmenters -------------------------------------------------------------------------------------------------------


def test_labels_come_back_from_a_bundles_grid(bundle, tmp_path):
    """Two blocks that fill its 15 mm voxels come back to the voxel, on the CT's grid and axes."""
    hu = np.full(SIZE, -1000.0)
    hu[4:13, 8:14, 3:9], hu[31:34, 20:29, 20:22] = 900, 700
    ct = as_ct(hu)
    nib.save(nib.Nifti1Image(hu.astype(np.float32), ct.affine.numpy()), tmp_path / "scan.nii.gz")
    found = open_segmenter(str(bundle))(tmp_path / "scan.nii.gz", ct)
    np.testing.assert_array_equal(found, np.where(hu > 250, BONE, 0))


def test_classes_by_their_names():
    """Of the vocabulary, of TotalSegmentator, of data sets; one that several read differently is not guessed."""
    found = map_of_classes("x", {"liver": 5, "kidney_left": 1, "brainstem": 2, "mandible": 9, "uterus": 3})
    assert dict(found) == {5: 1, 1: 14, 2: 2, 9: BONE} and found.classes[3] == "uterus"
    assert found.label_of("uterus") == 3
    with pytest.raises(InputError, match="--label_map"):
        map_of_classes("x", {"uterus": 1})


def test_all_classes_of_the_shipped_judge_are_read(repo_root, caplog):
    """As the label map of the data set that it was trained on reads them."""
    judge = open_segmenter(str(repo_root / "evaluation" / "segmentation"))
    assert dict(judge.label_map) == dict(LABEL_MAPS["openkbp"]) and len(judge.label_map) == 7
    assert "are not found" not in caplog.text


def test_classes_that_cannot_be_read_are_named(bundle, tmp_path, caplog):
    open_segmenter(str(bundle))
    assert "the classes mystery have no name of the vocabulary and are not found" in caplog.text
    caplog.clear()
    label_map = tmp_path / "map.json"
    label_map.write_text('{"1": "skull", "2": 0}')
    open_segmenter(str(bundle), str(label_map))
    assert "are not found" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CT was given"),
        (["none.nii.gz"], "none.nii.gz does not exist"),
        (["a.nii.gz", "--segmenter", "nobody"], "'nobody' has no nobody/configs/inference.json"),
        (["a.nii.gz", "--label_map", "openkbp"], "thresholds has its own"),
        (["a.nii.gz", "--settings", "3"], "settings 3 is not usable"),
        (["a.nii.gz", "--settings", "{'label_map': 'openkbp'}"], "which is set for you"),
        (["a.nii.gz", "--settings", "{'solvr': 'ab2'}"], "did you mean solver?"),
        (["a.nii.gz", "--device", "cuda:77"], "device cuda:77 cannot be used"),
        (["a.nii.gz", "a_ct.nii.gz", "--output_dir", "."], "would be written over"),
    ],
)
def test_wrong_use_is_one_line(scans, bundles, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(scans)
    os.link("a.nii.gz", "a_ct.nii.gz")
    before = sorted(scans.rglob("*"))
    assert main(["twin", *arguments, "--bundles", str(bundles)]) == 2
    assert message in capsys.readouterr().err
    assert [path for path in sorted(scans.rglob("*")) if path.is_file()] == before


def test_totalsegmentator_is_asked_for_where_it_is_missing():
    pytest.importorskip("monai")
    try:
        import totalsegmentator  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install TotalSegmentator"):
            open_segmenter("totalsegmentator")
    else:
        pytest.skip("TotalSegmentator is installed")
