"""What a job reads and what its result says, without a bundle's networks."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

from maisi_tools.dicom.objects import recordable
from maisi_tools.dicom.study import write_study
from maisi_tools.errors import InputError
from maisi_tools.service import chain as chain_module
from maisi_tools.service.chain import gather, run_folder, run_job
from maisi_tools.service.jobs import Job
from maisi_tools.service.settings import Chain, Step
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import write_volume


@pytest.fixture
def job(real_study, tmp_path):
    """A study in the spool, and ``job(kind)``, the job of its CT series or SEG."""
    spool = tmp_path / "spool"
    (tmp_path / "files").mkdir()
    files = real_study(tmp_path / "study", 3)
    gathered = gather(tmp_path / "study", spool_folder(spool))
    series = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)

    def of(kind: str) -> Job:
        return Job(series if kind == "CT" else next(iter(gathered[kind])), kind, "1", str(spool), "2026-02-03T04:05:06")

    return of


def spool_folder(path):
    path.mkdir()
    return path


class Copies:
    """A bundle that writes its input plus 1 HU (a mask as it is) as NAME_ct.nii.gz."""

    def __init__(self, bundle, config, device, input, output_dir, **_):
        self.input, self.output_dir = input, output_dir

    def run(self):
        volume = read_volume(self.input, "mask" if "drawn" in self.input else "ct", intensity_check=False)
        write_volume(f"{self.output_dir}/x_ct.nii.gz", volume[0].numpy() + 1, volume.affine.numpy(), np.int16)


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.setattr(chain_module, "Stage", Copies)


def read(made):
    return [pydicom.dcmread(path) for path in made.files]


def test_what_is_made_of_a_scan_keeps_its_patient_and_says_no_untruth(job, copies, tmp_path):
    settings = {
        "solver": "ab2",
        "num_inference_steps": 3,
        "ckpt": "models/a.pt",
        "note": "/home/jane/doe",
        "x": "{input}",
    }
    step = Step("bundles/maisi_vae", settings=settings)
    made = run_job(job("CT"), Chain("CT", (step,)), tmp_path / "work")
    source = pydicom.dcmread(next((tmp_path / "spool").glob("*.dcm")))
    for ds in read(made):
        assert ds.PatientID == source.PatientID and ds.StudyInstanceUID == source.StudyInstanceUID
        text = ds.DerivationDescription
        assert "not acquired from a patient" not in str(ds) and text.startswith("Computed from a scan of this patient")
        assert json.loads(text[text.index("{") :]) == {"maisi_vae": {"solver": "ab2", "num_inference_steps": 3}}
        assert "SYNTHETIC" not in ds.ImageType and "ynthetic" not in ds.SeriesDescription
        assert ds[0x0008001C].value == "YES"  # some of its content was made (DICOM PS3.3 table C.12-1)
        assert made.series == ds.SeriesInstanceUID
    later = dataclasses.replace(job("CT"), replaces="1.2.3.4")
    (first, *_) = read(run_job(later, Chain("CT", (step,)), tmp_path / "work"))
    assert json.loads(first.DerivationDescription[text.index("{") :])["replaces"] == "1.2.3.4"
    with pytest.raises(InputError, match="shows that patient"):
        Chain("CT", (step,), keep_patient=False)


def test_what_is_made_of_a_mask_is_of_nobody(job, copies, tmp_path):
    made = run_job(job("SEG"), Chain("SEG", (Step("bundles/maisi_controlnet"),)), tmp_path / "work")
    for ds in read(made):
        assert ds.PatientID.startswith("SYN-") and "not acquired from a patient" in ds.DerivationDescription
        assert ds.ImageType[3] == "SYNTHETIC"


def test_a_structure_set_without_its_ct_says_what_to_send(job, copies, tmp_path):
    """Not to give the option of a command."""
    given = job("RTSTRUCT")
    for path in (tmp_path / "spool").glob("*.dcm"):
        if pydicom.dcmread(path, specific_tags=["Modality"]).Modality == "CT":
            path.unlink()
    with pytest.raises(InputError, match="the study has no CT series; send its CT, too"):
        run_job(given, Chain("RTSTRUCT", (Step("bundles/maisi_controlnet"),)), tmp_path / "work")


def test_each_step_is_recorded_where_several_are_of_one_bundle(job, copies, tmp_path):
    steps = [Step(f"{folder}/maisi_vae", settings={"seed": seed}) for seed, folder in enumerate("abb")]
    (first, *_) = read(run_job(job("CT"), Chain("CT", steps), tmp_path / "work"))
    recorded = json.loads(first.DerivationDescription[first.DerivationDescription.index("{") :])
    assert recorded == {"maisi_vae": {"seed": 0}, "maisi_vae 2": {"seed": 1}, "maisi_vae 3": {"seed": 2}}


def test_a_study_of_a_scan_without_its_patient_is_refused(tmp_path):
    with pytest.raises(InputError, match="join that patient's study, not an invented one"):
        write_study(tmp_path / "s", np.zeros((4, 4, 4)), np.eye(4), from_scan=True)
    assert not (tmp_path / "s").exists()


def test_settings_are_recorded_without_paths_and_names():
    given = {
        **{"steps": 10, "scale": 1.5, "progress": False, "solver": "ab2", "none": None},
        **{"spacing": (5.0, 5.0, 3.4), "regions": ["head", "a b"], "bundle_root": "x", "label_file": "x"},
        **{"input": "x", "weights": "../a.pt", "nested": {"data": [{"image": "{input}"}], "keep": 2}},
    }
    assert recordable(given) == {
        **{"steps": 10, "scale": 1.5, "progress": False, "solver": "ab2"},
        **{"spacing": [5.0, 5.0, 3.4], "regions": ["head"], "nested": {"data": [{}], "keep": 2}},
    }


def test_files_are_gathered_under_their_uids_alone(real_study, tmp_path):
    """Of the MONAI Deploy application's input: a SOP Instance UID that is a path becomes none."""
    files = real_study(tmp_path / "in", 2)
    for path, uid in zip(files, ("../../outside", "/tmp/maisi-outside", "9" * 300), strict=False):
        ds = pydicom.dcmread(path)
        ds["SOPInstanceUID"]._value = uid
        ds.save_as(path)
    (tmp_path / "in" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0")
    (tmp_path / "in" / "note.txt").write_text("no DICOM")
    spool = spool_folder(tmp_path / "a_spool")
    before = {path for path in tmp_path.rglob("*")}
    found = gather(tmp_path / "in", spool)
    made = {path for path in tmp_path.rglob("*")} - before
    assert len(made) == len(files) - 3 and all(path.parent == spool for path in made)
    assert set(found) == {"CT", "SEG", "RTSTRUCT"}
    ((uid, path),) = found["SEG"].items()
    assert path == tmp_path / "in" / "SEG.dcm" and (spool / f"{uid}.dcm").is_file()


def test_a_folder_gets_the_study_of_its_run_alone(real_study, copies, tmp_path):
    """The MONAI Deploy application: no slices of an earlier run, no other's files; one mask, no earlier result."""
    real_study(tmp_path / "made", 3)
    source, target, step = tmp_path / "in", tmp_path / "out", Step("bundles/maisi_controlnet")
    source.mkdir()
    shutil.copy(tmp_path / "made" / "SEG.dcm", source)
    first = run_folder(source, target, (step,))
    assert {path.name for path in target.iterdir()} == {"CT"} and len(first) == 48
    extra = target / "CT" / "0049.dcm"  # of an earlier run, of a taller mask
    shutil.copy(first[0], extra)
    (target / ".part-1").mkdir()  # of one that was stopped
    shutil.copytree(target, source / "result")
    assert run_folder(source, target, (step,)) == first and not (target / ".part-1").exists()
    (target / "note.txt").write_text("mine")
    with pytest.raises(InputError, match=r"note\.txt would have to make room"):
        run_folder(source, target, (step,))
    assert extra.parent.is_dir() and (target / "note.txt").is_file()
    shutil.copy(tmp_path / "made" / "RTSTRUCT.dcm", source / "b.dcm")
    with pytest.raises(InputError, match=r"in/SEG\.dcm \(SEG\), .*in/b\.dcm \(RTSTRUCT\); allowed is one"):
        run_folder(source, tmp_path / "new", (step,))
    (source / "SEG.dcm").unlink()
    (source / "b.dcm").unlink()
    with pytest.raises(InputError, match="holds no SEG and no RTSTRUCT that is not synthetic"):
        run_folder(source, tmp_path / "new", (step,))
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_read_is_passed_over(job, copies, tmp_path):
    wanted = job("CT")
    (tmp_path / "spool" / "1.9.dcm").write_bytes(b"no DICOM at all")
    assert len(run_job(wanted, Chain("CT", (Step("bundles/maisi_vae"),)), tmp_path / "work").files) == 48


@pytest.mark.parametrize("key", ["../../../x", "1.2.3.4"])
def test_a_job_whose_object_is_gone_is_refused_in_words(job, tmp_path, key):
    gone = dataclasses.replace(job("SEG"), key=key)
    with pytest.raises(InputError, match="is not in the spool any more"):
        run_job(gone, Chain("SEG", (Step("bundles/maisi_controlnet"),)), tmp_path / "work")
