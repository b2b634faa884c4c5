"""The listener beside a real Orthanc: what is sent to it comes back, whatever happens in between."""

from __future__ import annotations

import base64
import datetime
import io
import json
import random
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.masks.vocabulary import label_id

pytestmark = [
    pytest.mark.orthanc,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("Orthanc") is None, reason="needs Orthanc (make test-orthanc)"),
]

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Orthanc:
    def __init__(self, folder: Path, http: int, dicom: int, listener: int) -> None:
        self.http, self.dicom = http, dicom
        settings = {
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "HttpPort": http,
            "DicomPort": dicom,
            "DicomAet": "ORTHANC",
            "DicomModalities": {"maisi": ["MAISI", "127.0.0.1", listener]},
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"me": "secret"},
            "DicomAlwaysAllowStore": True,
            "Plugins": [str(PLUGIN)] if PLUGIN.exists() else [],
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.log = open(folder / "orthanc.log", "w")
        self.process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=self.log, stderr=self.log)
        for _ in range(100):
            try:
                self.rest("/system")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((folder / "orthanc.log").read_text())

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", body)
        request.add_header("Authorization", "Basic " + base64.b64encode(b"me:secret").decode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def rest(self, path: str, body: bytes | None = None):
        return json.loads(self.ask(path, body))

    def send_all(self) -> list[str]:
        """Store all instances in the listener; returns their names in Orthanc."""
        instances = self.rest("/instances")
        self.rest("/modalities/maisi/store", json.dumps(instances).encode())
        return instances

    def series(self) -> dict[tuple[str, str], list[pydicom.Dataset]]:
        """(modality, Series Instance UID) -> its objects, slices from the feet up."""
        found: dict[tuple[str, str], list[pydicom.Dataset]] = {}
        for name in self.rest("/instances"):
            ds = pydicom.dcmread(io.BytesIO(self.ask(f"/instances/{name}/file")))
            found.setdefault((ds.Modality, ds.SeriesInstanceUID), []).append(ds)
        return {
            key: sorted(some, key=lambda ds: float(ds.get("ImagePositionPatient", [0, 0, 0])[2]))
            for key, some in found.items()
        }

    def studies(self) -> list[dict]:
        return [self.rest(f"/studies/{one}") for one in self.rest("/studies")]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def setup(listen, free_port, tmp_path):
    """``setup(**changes)`` starts Orthanc and a listener that sends to it."""
    started = []

    def start(**changes):
        ports = free_port(), free_port(), free_port()
        orthanc = Orthanc(tmp_path, *ports)
        started.append(orthanc)
        common = {
            "send": {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": orthanc.dicom},
            "listen": {
                "port": ports[2],
                "host": "127.0.0.1",
                "quiet_seconds": 1.0,
                "allowed": [{"ae_title": "ORTHANC", "host": "127.0.0.1"}],
            },
        }
        if "query" in changes:
            changes["query"]["port"] = orthanc.dicom
        return orthanc, listen(orthanc.dicom, real=True, **{**common, **changes})

    yield start
    for orthanc in started:
        orthanc.close()


def test_20_studies_in_20_results_back_though_the_listener_is_killed(setup, real_study, tmp_path, capsys):
    orthanc, listener = setup()
    sources = set()
    for seed in range(20):
        (path,) = [path for path in real_study(tmp_path / f"s{seed}", seed) if path.name == "SEG.dcm"]
        sources.add(pydicom.dcmread(path, stop_before_pixels=True).StudyInstanceUID)
        orthanc.rest("/instances", path.read_bytes())
    start = time.time()
    assert len(orthanc.send_all()) == 20
    chance, kills = random.Random(1), 0
    while listener.health().get("done", 0) < 20:
        time.sleep(chance.uniform(3, 15))
        if kills < 5:
            listener.kill()
            kills += 1
            listener.start()
        assert time.time() - start < 1200, listener.log.read_text()[-3000:]
    seconds = time.time() - start
    studies = orthanc.studies()
    assert len(studies) == 40
    results = [study for study in studies if study["MainDicomTags"]["StudyInstanceUID"] not in sources]
    assert len(results) == 20
    for study in results:
        series = [orthanc.rest(f"/series/{one}") for one in study["Series"]]
        found = sorted((one["MainDicomTags"]["Modality"], len(one["Instances"])) for one in series)
        assert found == [("CT", 48), ("RTSTRUCT", 1), ("SEG", 1)]
    assert listener.health() == {"status": "ok", "waiting": 0, "running": 0, "done": 20, "dead": 0}
    with capsys.disabled():
        print(f"\n20 studies, {kills} kills: {seconds:.0f} s, {3600 * 20 / seconds:.0f} studies an hour")


@pytest.mark.skipif(not PLUGIN.exists(), reason="needs Orthanc's DICOMweb plugin")
def test_an_archive_is_asked_by_dicomweb(listen, real_study, free_port, repo_root, tmp_path):
    """With basic authentication; structure sets, which need the CT of their study."""
    fast = {"num_inference_steps": 1, "progress": False}
    step = {"bundle": str(repo_root / "bundles" / "maisi_controlnet"), "settings": fast}
    http = free_port()
    web = {"url": f"http://127.0.0.1:{http}/dicom-web", "every_seconds": 2, "user": "me"}
    orthanc = Orthanc(tmp_path, http, free_port(), free_port())
    try:
        for path in real_study(tmp_path / "s", 3):
            if path.name != "SEG.dcm":
                orthanc.rest("/instances", path.read_bytes())
        from_web = {"poll": web, "listen": None, "chains": [{"when": "RTSTRUCT", "steps": [step]}]}
        listener = listen(orthanc.dicom, real=True, **from_web)
        listener.wait(lambda: listener.health().get("done") == 1, 180)
        assert len(orthanc.studies()) == 2
        time.sleep(6)  # the result, a structure set among it, is not done once more
        assert listener.health()["done"] == 1 and listener.health()["waiting"] == 0
    finally:
        orthanc.close()


def test_an_archive_is_asked_by_c_find_and_sends_by_c_move(setup, real_study, repo_root, tmp_path):
    """Structure sets, with the CT of their study; studies of other days are left where they are."""
    fast = {"num_inference_steps": 1, "progress": False}
    step = {"bundle": str(repo_root / "bundles" / "maisi_controlnet"), "settings": fast}
    today, old = real_study(tmp_path / "today", 3), real_study(tmp_path / "old", 4)
    for path in today:
        ds = pydicom.dcmread(path)
        ds.StudyDate = f"{datetime.date.today():%Y%m%d}"
        ds.save_as(path)
    query = {"ae_title": "ORTHANC", "host": "127.0.0.1", "every_seconds": 2, "days": 1}
    orthanc, listener = setup(query=query, chains=[{"when": "RTSTRUCT", "steps": [step]}])
    for path in (*today, *old):
        if path.name != "SEG.dcm":
            orthanc.rest("/instances", path.read_bytes())
    listener.wait(lambda: listener.health().get("done") == 1, 180)
    assert len(orthanc.studies()) == 3
    incoming = [
        pydicom.dcmread(path, stop_before_pixels=True) for path in (tmp_path / "spool").glob("incoming/*/*.dcm")
    ]
    source = pydicom.dcmread(today[0], stop_before_pixels=True).StudyInstanceUID
    assert {ds.Modality for ds in incoming if ds.StudyInstanceUID == source} == {"CT", "RTSTRUCT"}
    time.sleep(6)
    assert listener.health()["done"] == 1 and listener.health()["waiting"] == 0


@pytest.mark.parametrize("kind", ["RTSTRUCT", "SEG"])
def test_an_edited_scan_joins_its_study_and_is_not_edited_again(setup, real_study, repo_root, tmp_path, kind):
    """As docs/editing.md has it: structures come, and the scan that they were drawn on goes back with a new cord."""
    settings = {"input": "{series}", "mask": "{input}", "edits": {"redraw": "spinal cord"}, "margin_mm": 8.0}
    step = {
        "bundle": str(repo_root / "bundles" / "maisi_controlnet"),
        "config": ["inference.json", "edit.json"],
        "settings": {**settings, "num_inference_steps": 2, "progress": False},
    }
    orthanc, listener = setup(chains=[{"when": kind, "keep_patient": True, "steps": [step]}])
    for path in real_study(tmp_path / "s", 3):
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.PatientID = "Doe^Jane", "1234"
        if ds.Modality == "CT":
            ds.ImageType, ds.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "Neck"
        ds.save_as(path)
        if ds.Modality in ("CT", kind):
            orthanc.rest("/instances", path.read_bytes())
    (scan,) = (some for (modality, _), some in orthanc.series().items() if modality == "CT")
    sent = orthanc.send_all()
    listener.wait(lambda: listener.health().get("done") == 1, 300)

    (study,) = orthanc.studies()
    assert study["PatientMainDicomTags"]["PatientID"] == "1234"
    made = {key: some for key, some in orthanc.series().items() if some[0].get("SyntheticData") == "YES"}
    found = sorted((modality, len(some)) for (modality, _), some in made.items())
    assert found == [("CT", len(scan)), ("RTSTRUCT", 1), ("SEG", 1)]
    (edited,) = (some for (modality, _), some in made.items() if modality == "CT")
    for ds, was in zip(edited, scan, strict=True):
        assert (ds.StudyInstanceUID, ds.FrameOfReferenceUID) == (was.StudyInstanceUID, was.FrameOfReferenceUID)
        np.testing.assert_allclose(ds.ImagePositionPatient, was.ImagePositionPatient, atol=1e-5)
        np.testing.assert_allclose(ds.PixelSpacing, was.PixelSpacing, atol=1e-5)
        assert ds.PatientName == was.PatientName and ds.SeriesInstanceUID != was.SeriesInstanceUID
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "PARTLY_SYNTHETIC"]
        assert ds.SeriesDescription == "Partly synthetic CT, edited scan"
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == was.SOPInstanceUID

    # Rows of a slice run to the left and columns to the back, so (x, y, z) of RAS is [z, -y, -x] of the stack.
    spacing = (5.0, 5.0, 3.4)
    labels = make_phantom("head_neck", (48, 48, 48), spacing, 3)
    cord = np.flip(labels.T == label_id("spinal cord"), (1, 2))
    before, after = (np.stack([ds.pixel_array for ds in some]) for some in (scan, edited))
    np.testing.assert_array_equal(before, np.flip(flat_ct(labels).T, (1, 2)))
    distance = ndimage.distance_transform_edt(~cord, sampling=spacing[::-1])
    np.testing.assert_array_equal(after[distance >= 8.0], before[distance >= 8.0])
    assert (after != before)[cord].mean() > 0.5

    everything = orthanc.send_all()  # the listener gets its own results, and what they were made of once more
    assert len(everything) == len(sent) + len(scan) + 2
    incoming = tmp_path / "spool" / "incoming"
    listener.wait(lambda: len(list(incoming.glob("*/*.dcm"))) == len(everything), 60)
    time.sleep(6)
    assert listener.health() == {"status": "ok", "waiting": 0, "running": 0, "done": 1, "dead": 0}
    assert sorted(orthanc.rest("/instances")) == sorted(everything)
