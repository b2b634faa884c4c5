"""`maisi listen` in a process of its own, with pynetdicom as the PACS."""

from __future__ import annotations

import ssl
import subprocess
import time
import urllib.error

import pydicom
import pytest
from pynetdicom import AE, AllStoragePresentationContexts, evt

from maisi_tools.cli import main
from preloaded import WAITS


class Archive:
    """Takes what is stored, unless it is closed."""

    def __init__(self, port: int) -> None:
        self.port, self.objects, self.stores = port, {}, 0
        self.open()

    def open(self) -> None:
        ae = AE("ARCHIVE")
        ae.supported_contexts = AllStoragePresentationContexts
        self.server = ae.start_server(("127.0.0.1", self.port), False, evt_handlers=[(evt.EVT_C_STORE, self._store)])

    def close(self) -> None:
        self.server.shutdown()

    status = 0
    """With which it stores."""

    def _store(self, event) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        self.objects[ds.SOPInstanceUID] = ds
        self.stores += 1
        return self.status


@pytest.fixture
def archive(free_port):
    found = Archive(free_port())
    yield found
    found.close()


def store(files, port: int, title: str = "ARCHIVE", tls=None) -> bool:
    """Send files; whether they were taken."""
    datasets = [pydicom.dcmread(path) for path in files]
    ae = AE(title)
    for kind in {ds.SOPClassUID for ds in datasets}:
        ae.add_requested_context(kind)
    association = ae.associate("127.0.0.1", port, ae_title="MAISI", tls_args=tls)
    if not association.is_established:
        return False
    good = all(association.send_c_store(ds).Status == 0 for ds in datasets)
    association.release()
    return good


def test_a_segmentation_comes_back_as_a_ct(listen, archive, real_study, tmp_path):
    listener = listen(archive.port, real=True)
    files = real_study(tmp_path / "study", 1)
    assert store(files, listener.settings["listen"]["port"])
    listener.wait(lambda: listener.health().get("done") == 1)
    modalities = [ds.Modality for ds in archive.objects.values()]
    assert sorted(set(modalities)) == ["CT", "RTSTRUCT", "SEG"] and modalities.count("CT") == 48
    source = pydicom.dcmread(files[0])
    for ds in archive.objects.values():
        assert ds.SyntheticData == "YES" and ds.PatientID != source.PatientID
        assert ds.StudyInstanceUID != source.StudyInstanceUID
    metrics = listener.get("/metrics")
    assert 'maisi_jobs{state="done"} 1' in metrics and "maisi_job_seconds_total" in metrics
    with pytest.raises(urllib.error.HTTPError):
        listener.get("/other")
    # What is synthetic is not done once more, nor what was done.
    before = archive.stores
    assert store(files, listener.settings["listen"]["port"])
    for number, ds in enumerate(list(archive.objects.values())[-3:]):
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    assert store(tmp_path.glob("*.dcm"), listener.settings["listen"]["port"])
    time.sleep(4)
    assert archive.stores == before and listener.health()["done"] == 1


def test_strangers_are_refused(listen, archive, real_study, tmp_path):
    listener = listen(archive.port)
    files = real_study(tmp_path / "study", 1)[:1]
    assert not store(files, listener.settings["listen"]["port"], "STRANGER")
    assert "STRANGER" in listener.log.read_text()
    assert not list((tmp_path / "spool" / "incoming").iterdir())


def test_with_a_certificate_it_speaks_tls_alone(listen, archive, free_port, real_study, tmp_path, pem_files):
    allowed = [{"ae_title": "ARCHIVE", "host": "127.0.0.1"}]
    listen_at = {"port": free_port(), "host": "127.0.0.1", "quiet_seconds": 1.0, "allowed": allowed, **pem_files}
    listener = listen(archive.port, listen=listen_at)
    files = [path for path in real_study(tmp_path / "study", 1) if path.name == "SEG.dcm"]
    assert not store(files, listen_at["port"])
    context = ssl.create_default_context(cafile=pem_files["certificate"])
    assert store(files, listen_at["port"], tls=(context, "127.0.0.1"))
    assert len(list((tmp_path / "spool" / "incoming").glob("*/*.dcm"))) == 1
    assert listener.health()["status"] == "ok"


def test_what_cannot_be_used_is_a_dead_letter_with_the_reason(listen, archive, real_study, tmp_path, capsys):
    listener = listen(archive.port)
    files = real_study(tmp_path / "study", 1)
    path = next(path for path in files if path.name == "SEG.dcm")
    ds = pydicom.dcmread(path)
    for number, item in enumerate(ds.SegmentSequence):
        item.SegmentLabel = item.SegmentDescription = f"thing {number}"
        item.SegmentedPropertyTypeCodeSequence[0].CodeValue = f"{number}"
        item.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator = "99NONE"
        item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning = f"thing {number}"
    ds.save_as(path)
    assert store([path], listener.settings["listen"]["port"])
    listener.wait(lambda: listener.health().get("dead") == 1)
    (reason,) = (tmp_path / "spool" / "dead").glob("*/reason.txt")
    assert "thing" in reason.read_text() and reason.parent.name == ds.SOPInstanceUID
    assert not archive.objects
    assert main(["jobs", str(listener.config)]) == 0
    assert "dead" in capsys.readouterr().out
    assert main(["jobs", str(listener.config), "--revive", "1.2.3"]) == 2


def test_an_archive_that_is_away_is_tried_again(listen, archive, real_study, tmp_path):
    """However often; its own way of saying that it coerced an element is no failure. A second listener keeps off."""
    listener = listen(archive.port, attempts=1, retry_seconds=0.5)
    archive.close()
    files = real_study(tmp_path / "study", 2)
    assert store([path for path in files if path.name == "SEG.dcm"], listener.settings["listen"]["port"])
    listener.wait(lambda: "again in 2 s" in listener.log.read_text())
    command = [listener.python, "-m", "maisi_tools.cli", "listen", str(listener.config)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAITS)
    assert second.returncode == 2 and "another listener works on the spool" in second.stderr
    archive.status = 0xB000
    archive.open()
    listener.wait(lambda: listener.health().get("done") == 1)
    assert len(archive.objects) == archive.stores == 50
    assert "stored the result with a warning: 0xb000" in listener.log.read_text()


def test_two_bundles_one_after_another_for_a_ct(listen, archive, free_port, real_study, tiny_bundles, tmp_path):
    """A CT through the autoencoder twice, and the result in the source's study."""
    allowed = [{"ae_title": "ARCHIVE", "host": "127.0.0.1"}]
    # On a busy machine a slice can come more than a second after the one before.
    listen_at = {"port": free_port(), "host": "127.0.0.1", "quiet_seconds": 4.0, "allowed": allowed}
    step = {
        "bundle": str(tiny_bundles / "maisi_vae"),
        "result": "_recon.nii.gz",
        "settings": {"data": [{"image": "{input}"}]},
    }
    chain = {"when": "CT", "steps": [step, step], "keep_patient": True}
    listener = listen(archive.port, listen=listen_at, chains=[chain])
    files = real_study(tmp_path / "study", 3)
    assert store([path for path in files if "CT" in path.parent.name], listener.settings["listen"]["port"])
    listener.wait(lambda: listener.health().get("done") == 1)
    source = pydicom.dcmread(files[0])
    assert len(archive.objects) == 48
    for ds in archive.objects.values():
        assert ds.PatientID == source.PatientID and ds.StudyInstanceUID == source.StudyInstanceUID
        assert ds.SeriesInstanceUID != source.SeriesInstanceUID and ds.SyntheticData == "YES"
