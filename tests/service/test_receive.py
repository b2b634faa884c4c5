from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from maisi_tools.dicom.references import Scan
from maisi_tools.service import chain, receive
from maisi_tools.service.jobs import JobQueue
from maisi_tools.service.receive import (
    COUNT_SECONDS,
    Intake,
    NotTaken,
    came,
    forget_old_studies,
    keep,
    needed_series,
    queue_whole_studies,
)
from maisi_tools.service.settings import read_settings
from maisi_tools.service.troubles import Troubles


class Clock:
    """In place of the module time of the receiver: `now` is the monotonic clock, `wall` the one that can be set."""

    def __init__(self) -> None:
        self.now, self.wall = 1000.0, time.time()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(receive, "time", clock)
    return clock


def make(uid: str, modality: str = "SEG", series: str | None = None, study: str = "1.2") -> pydicom.Dataset:
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CTImageStorage if modality == "CT" else SegmentationStorage
    ds.SOPInstanceUID, ds.StudyInstanceUID = uid, study
    ds.SeriesInstanceUID, ds.Modality = series or f"{uid}.1", modality
    if modality == "CT":
        ds.FrameOfReferenceUID = "5.5"
    return ds


@pytest.fixture
def spool(write_settings, tmp_path, clock):
    """A spool that is looked at by hand: ``spool.look(count)``, with CT and SEG chains, quiet for 10 s."""

    class Spool:
        def __init__(self) -> None:
            path, content = write_settings(4242)
            step = content["chains"][0]["steps"][0]
            listen = {**content["listen"], "quiet_seconds": 10.0}
            chains = [{"when": kind, "steps": [step]} for kind in ("SEG", "CT")]
            self.settings = read_settings(write_settings(4242, chains=chains, listen=listen, keep_hours=1.0)[0])
            self.incoming, self.dead = tmp_path / "incoming", tmp_path / "dead"
            self.incoming.mkdir()
            self.queue, self.intake, self.troubles = JobQueue(tmp_path / "q.sqlite"), Intake(), Troubles()

        def look(self, count=None, after: float = 0.0) -> int:
            clock.now += after
            arguments = self.settings, self.incoming, self.queue, self.intake, self.troubles, self.dead
            return queue_whole_studies(*arguments, count)

        def waits(self) -> list[str]:
            return [job.key for state, job in self.queue.listed() if state == "waiting"]

    return Spool()


def test_a_study_is_queued_once_and_again_when_something_is_added(spool, monkeypatch):
    keep(make("1.2.3"), spool.incoming)
    assert spool.look() == 0 and spool.look(after=9) == 0
    assert spool.look(after=2) == 1
    listed = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda self, pattern: listed.append(self) or iter(()))
        assert spool.look(after=20) == 0 and not listed  # the files of a study that did not change are not looked at
    keep(make("1.2.4"), spool.incoming)
    assert spool.look() == 0 and spool.look(after=11) == 1
    spool.intake = Intake()  # after a restart
    assert spool.look() == 0 and spool.look(after=11) == 0
    assert spool.waits() == ["1.2.3", "1.2.4"]


@pytest.mark.parametrize(
    "change",
    [
        {"StudyInstanceUID": ".."},
        {"StudyInstanceUID": "."},
        {"StudyInstanceUID": "1..2"},
        {"StudyInstanceUID": "../../../x"},
        {"StudyInstanceUID": "/tmp/x"},
        {"SOPInstanceUID": "../../../x"},
        {"SOPInstanceUID": "1" * 300},
        {"SOPInstanceUID": "1.2\0"},
        {"SeriesInstanceUID": "../../../x"},
        {"SeriesInstanceUID": None},
        {"StudyInstanceUID": None},
    ],
)
def test_an_object_without_uids_is_not_taken(tmp_path, change):
    (tmp_path / "a" / "incoming").mkdir(parents=True)
    ds = make("1.2.3")
    for keyword, value in change.items():
        ds[keyword]._value = value  # past pydicom's own checks, as it comes from a network
    with pytest.raises(NotTaken, match=next(iter(change))):
        keep(ds, tmp_path / "a" / "incoming")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "incoming"]


def test_one_bad_file_or_study_holds_up_no_other(spool, monkeypatch):
    """What an older version, or another program, has left in the spool."""
    for study, bad in (("1.1", b"no DICOM at all"), ("1.2", b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0")):
        keep(make(f"{study}.5", study=study), spool.incoming)
        (spool.incoming / study / "1.9.dcm").write_bytes(bad)
    nameless = make("1.2.7", "CT")
    del nameless.SeriesInstanceUID
    nameless.save_as(spool.incoming / "1.2" / "1.2.7.dcm", enforce_file_format=True)
    (spool.incoming / "a file").write_text("")
    spool.look()
    assert spool.look(after=11) == 2 and spool.waits() == ["1.1.5", "1.2.5"]
    assert sorted(path.name for path in spool.dead.iterdir()) == ["1.2.7", "1.9"]
    assert "no UID of its series" in (spool.dead / "1.2.7" / "reason.txt").read_text()
    assert spool.troubles.counts()["object"] == 3
    keep(make("1.3.5", study="1.3"), spool.incoming)
    keep(make("1.4.5", study="1.4"), spool.incoming)
    real = JobQueue.add

    def add(self, key, *arguments):
        if key == "1.3.5":
            raise OSError("no space left")
        return real(self, key, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(JobQueue, "add", add)
        spool.look()
        assert spool.look(after=11) == 1 and "no space left" in spool.troubles.recent()["study"]
    assert spool.look() == 1 and len(spool.waits()) == 4  # what failed is tried again


def test_what_is_set_aside_is_removed_as_studies_are(spool, clock):
    """Its reason stays. What an earlier process set aside is as old as its date says, unless that is in the future."""
    (spool.incoming / "1.2").mkdir()
    for name in ("1.7", "1.8", "1.9"):
        (spool.incoming / "1.2" / f"{name}.dcm").write_bytes(b"no DICOM at all")
    spool.look()
    spool.look(after=11)

    def left(after: float) -> list[str]:
        clock.now += after
        forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
        return sorted(path.stem for path in spool.dead.glob("*/*.dcm"))

    assert left(3500) == ["1.7", "1.8", "1.9"]
    for name, age in (("1.7", 3000.0), ("1.8", -1e7), ("1.9", 1e7)):
        path = spool.dead / name / f"{name}.dcm"
        os.utime(path, (clock.wall - age, clock.wall - age))
    spool.intake = Intake(aside={path: came([path]) for path in spool.dead.glob("*/*.dcm")})
    assert [left(after) for after in (0.0, 700.0, 3000.0)] == [["1.7", "1.8"], ["1.8"], []]
    assert len(list(spool.dead.glob("*/reason.txt"))) == 3


def test_a_clock_that_is_set_stops_nothing(spool, clock, tmp_path):
    keep(make("1.2.3"), spool.incoming)
    for path in [spool.incoming / "1.2", *(spool.incoming / "1.2").iterdir()]:
        os.utime(path, (clock.wall + 1e7, clock.wall + 1e7))  # it came before the clock was set back
    spool.look()
    assert spool.look(after=11) == 1
    job = spool.queue.take()
    clock.wall -= 1e8
    spool.queue.fail(job, "no connection", 0.0)
    assert spool.queue.take().attempts == 2
    spool.queue.finish(job, 1.0)
    clock.wall += 1e9
    forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
    assert (spool.incoming / "1.2").is_dir()  # set forward, it is not older either
    clock.now += 3600
    forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
    assert not (spool.incoming / "1.2").exists()


def test_what_is_no_scan_of_the_ct_is_no_job(spool, tmp_path):
    """Scouts, and captures of the modality CT; they and the scan are removed together when they are old."""
    scout, capture = make("1.3.1", "CT", "9.1"), make("1.3.2", "CT", "9.2")
    scout.ImageType, capture.SOPClassUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], SecondaryCaptureImageStorage
    mask = make("1.3.0")  # which names no series
    mask.FrameOfReferenceUID = "5.5"
    for ds in (mask, scout, capture, make("1.3.3", "CT", "9.3")):
        keep(ds, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 2 and spool.waits() == ["1.3.0", "9.3"]
    (tmp_path / "work").mkdir()
    for job in (spool.queue.take(), spool.queue.take()):
        folder = tmp_path / "work" / job.kind
        folder.mkdir()
        series = chain._series(job, folder)
        assert [path.name for path in series.iterdir()] == ["1.3.3.dcm"]
        if job.kind == "SEG":
            spool.queue.finish(job, 1.0)
    spool.queue.fail(job, "one slice", None)
    late = make("1.3.4", "CT", "9.3")
    spool.look(after=3700)
    keep(late, spool.incoming)  # while other studies are looked at
    forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
    assert len(list((spool.incoming / "1.2").iterdir())) == 5
    spool.look()
    assert spool.look(after=11) == 2
    spool.queue.finish(spool.queue.take(), 1.0)
    spool.queue.fail(spool.queue.take(), "two slices", None)
    spool.look(after=3700)
    forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
    assert not (spool.incoming / "1.2").exists()


def test_a_mask_needs_the_ct_that_it_was_drawn_on(tmp_path):
    """Not one beside an MR; a structure set, which has no grid, gets one in any case."""
    present = {"9.1": Scan("5.1"), "9.2": Scan("5.2")}
    for kind, frame, named, expected in (
        ("SEG", "5.2", None, "9.2"),
        ("SEG", "5.3", None, ""),
        ("SEG", "5.3", "9.2", "9.2"),
        ("SEG", None, None, ""),
        ("RTSTRUCT", "5.3", None, "9.1"),
        ("RTSTRUCT", "5.2", "9.1", "9.1"),
    ):
        ds = make("1.7.1", kind)
        if frame:
            ds.FrameOfReferenceUID = frame
        if named:
            item = pydicom.Dataset()
            item.SeriesInstanceUID = named
            ds.ReferencedSeriesSequence = [item]
        ds.save_as(tmp_path / "mask.dcm", enforce_file_format=True)
        assert needed_series(tmp_path / "mask.dcm", present) == expected, (kind, frame, named)


def test_a_series_that_grows_after_its_job_is_done_anew(spool):
    """6 of 12 slices, a pause, the rest; and a SEG on that series, whose CT is not the same any more."""
    for number in range(6):
        keep(make(f"1.2.{number}", "CT", "9.9"), spool.incoming)
    mask = make("1.7.1")
    mask.FrameOfReferenceUID = "5.5"
    keep(mask, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 2
    done = [spool.queue.take(), spool.queue.take()]
    for job in done:
        spool.queue.finish(job, 1.0, f"8.{job.key}")
    for number in range(6, 12):
        keep(make(f"1.2.{number}", "CT", "9.9"), spool.incoming)
    spool.look()
    assert spool.look(after=11) == 2
    counts = spool.queue.counts()
    assert (counts["waiting"], counts["done"], spool.queue.superseded()) == (2, 0, 2)
    again = {job.key: job for job in (spool.queue.take(), spool.queue.take())}
    assert again["9.9"].replaces == "8.9.9" and again["1.7.1"].replaces == "8.1.7.1"
    assert {state for state, job in spool.queue.listed()} == {"running", "superseded"}
    assert spool.look(after=11) == 0


def test_a_series_waits_for_what_the_archive_counts(spool, caplog):
    asked = []
    keep(make("1.2.1", "CT", "9.9"), spool.incoming)

    def count(study, series):
        asked.append((study, series))
        return 2

    spool.look(count)
    assert spool.look(count, after=11) == 0 and asked == [("1.2", "9.9")]
    keep(make("1.2.2", "CT", "9.9"), spool.incoming)
    spool.look(count)
    assert spool.look(count, after=11) == 1 and spool.waits() == ["9.9"]
    keep(make("1.5.1", "CT", "9.8", "1.5"), spool.incoming)  # of which the second one never comes
    spool.look(count)
    assert spool.look(count, after=11) == 0 and spool.look(count, after=COUNT_SECONDS) == 1
    assert "has 1 of 2 instances; it is queued without the others" in caplog.text
    keep(make("1.6.1", "CT", "9.7", "1.6"), spool.incoming)
    spool.look(lambda *_: None)
    assert spool.look(lambda *_: None, after=11) == 1  # an archive that cannot say


def finish_all(queue) -> list:
    """Jobs that were waiting, which are done now."""
    done = []
    while (job := queue.take()) is not None:
        queue.finish(job, 1.0, f"8.{job.key}")
        done.append(job)
    return done


def test_what_is_corrected_under_its_uid_is_done_anew_and_what_comes_again_is_not(spool):
    """A structure drawn anew, slices of the right patient; the same bytes, the same by another transfer syntax."""
    slices = [make(f"1.2.{number}", "CT", "9.9") for number in range(3)]
    mask = make("1.7.1")
    for ds in (*slices, mask):
        ds.PatientID = "wrong"
        keep(ds, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 2 and len(finish_all(spool.queue)) == 2

    def look_again() -> list[str]:
        assert spool.look() == 0
        spool.look(after=11)
        return [job.key for job in finish_all(spool.queue)]

    before = {path: path.stat().st_mtime_ns for path in spool.incoming.rglob("*.dcm")}
    keep(slices[0], spool.incoming)
    slices[1].file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    keep(slices[1], spool.incoming)
    assert before == {path: path.stat().st_mtime_ns for path in spool.incoming.rglob("*.dcm")}
    assert look_again() == []
    mask.PatientID = "right"
    keep(mask, spool.incoming)
    assert look_again() == ["1.7.1"]
    for ds in slices:
        ds.PatientID = "right"
        keep(ds, spool.incoming)
    assert look_again() == ["9.9"]
    slices[0].PatientID = "wrong"  # back again is a change, too
    keep(slices[0], spool.incoming)
    assert look_again() == ["9.9"] and spool.queue.superseded() == 3
    for path in spool.incoming.rglob("*.dcm"):
        path.unlink()
    assert look_again() == []
    for ds in (*slices[:1], mask):  # what was removed long ago
        keep(ds, spool.incoming)
    assert look_again() == []


def scan() -> pydicom.Dataset:
    """A slice with numbers whose kind Implicit VR does not say, private elements, and a name that needs a charset."""
    ds = make("1.2.3", "CT")
    ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Dö^J"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 8, 8, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    item = pydicom.Dataset()
    for one in (ds, item):
        one.add_new("PixelPaddingValue", "SS", -2000)
        one.private_block(0x0029, "ACME", create=True).add_new(1, "DS", "1.5")
    ds.ReferencedImageSequence = [item]
    ds.PixelData = np.arange(64, dtype="<i2").tobytes()
    return ds


def compressed(ds: pydicom.Dataset, syntax: str) -> pydicom.Dataset:
    ds.compress(syntax, generate_instance_uid=False)
    return ds


def test_an_object_is_the_same_by_whatever_way_it_comes(spool):
    def bare(ds):
        ds.remove_private_tags()
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        return ds

    def in_utf_8(ds):
        ds.SpecificCharacterSet = "ISO_IR 192"
        return ds

    def changed(ds):
        ds.PixelData = np.arange(1, 65, dtype="<i2").tobytes()
        return ds

    def vast(ds):  # whose pixels are not even tried
        ds.Rows = ds.Columns = 65535
        return ds

    path = keep(bare(scan()), spool.incoming)
    before = path.stat().st_mtime_ns
    for same in (scan(), compressed(scan(), RLELossless), compressed(scan(), JPEGLSLossless), in_utf_8(scan())):
        keep(same, spool.incoming)
        assert path.stat().st_mtime_ns == before
    vast_rle = vast(compressed(scan(), RLELossless))
    for other in (changed(scan()), compressed(scan(), RLELossless), compressed(changed(scan()), RLELossless), vast_rle):
        keep(other, spool.incoming)
        assert path.stat().st_mtime_ns > before
        before = path.stat().st_mtime_ns
    keep(vast(compressed(scan(), JPEGLSLossless)), spool.incoming)
    assert path.stat().st_mtime_ns > before


def test_what_is_moved_to_another_study_is_read_from_there(spool, tmp_path):
    """A merge in the archive: Series and SOP Instance UIDs are kept. The old study starts nothing after a restart."""
    slices, mask = [make(f"1.2.{number}", "CT", "9.9", "1.5") for number in range(3)], make("1.7.1", study="1.5")
    mask.FrameOfReferenceUID = "5.5"
    for ds in (*slices, mask):
        keep(ds, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 2 and len(finish_all(spool.queue)) == 2
    for ds in slices:
        ds.StudyInstanceUID = "1.4"
        keep(ds, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 1
    (job,) = finish_all(spool.queue)
    assert (job.key, job.study, job.folder, job.replaces) == ("9.9", "1.4", str(spool.incoming / "1.4"), "8.9.9")
    assert [path.name for path in (spool.incoming / "1.5").iterdir()] == ["1.7.1.dcm"]
    (tmp_path / "work").mkdir()
    assert len(list(chain._series(job, tmp_path / "work").iterdir())) == 3
    spool.intake = Intake()
    spool.look()
    assert spool.look(after=11) == 0
    mask.StudyInstanceUID = "1.4"
    keep(mask, spool.incoming)
    spool.look()
    assert spool.look(after=11) == 1 and finish_all(spool.queue)[0].study == "1.4"
    spool.look(after=3700)
    forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
    assert not list(spool.incoming.iterdir())  # the empty one, too


def test_an_object_that_comes_under_two_studies_at_once_is_kept_once(spool, monkeypatch):
    monkeypatch.setattr(receive, "sync", lambda path: None)  # a disk is slow, and the same
    both = [make("1.2.3", study=study) for study in ("1.5", "1.6")]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(40):
            list(pool.map(lambda ds: keep(ds, spool.incoming), both))
            assert len(list(spool.incoming.glob("*/*.dcm"))) == 1


@pytest.mark.parametrize("name", ["rmtree", "set_aside"])
def test_what_comes_while_others_go_stays(spool, monkeypatch, name):
    """While its study is removed, or while a damaged file of its name is set aside."""
    keep(make("1.2.3"), spool.incoming)
    spool.look()
    assert spool.look(after=11) == 1
    finish_all(spool.queue)
    late = make("1.2.4" if name == "rmtree" else "1.2.9")
    module = receive.shutil if name == "rmtree" else receive
    real, coming = getattr(module, name), []

    def slowly(*arguments, **options):
        coming.append(pool.submit(keep, late, spool.incoming))
        wait(coming, 0.1)
        real(*arguments, **options)

    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(module, name, slowly)
        if name == "rmtree":
            spool.look(after=3700)
            forget_old_studies(spool.settings, spool.incoming, spool.queue, spool.intake)
        else:
            (spool.incoming / "1.2" / "1.2.9.dcm").write_bytes(b"no DICOM at all")
            spool.look()
            spool.look(after=11)
        (path,) = [one.result() for one in coming]
        assert path.is_file()
