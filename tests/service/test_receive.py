from __future__ import annotations

import os
from pathlib import Path

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage

from maisi_tools.service.jobs import JobQueue
from maisi_tools.service.receive import queue_whole_studies
from maisi_tools.service.settings import read_settings


def keep_segmentation(folder: Path, uid: str) -> None:
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SegmentationStorage, uid
    ds.SeriesInstanceUID, ds.Modality = f"{uid}.1", "SEG"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uid}"
    ds.save_as(part, enforce_file_format=True)
    os.utime(part, (0, 0))  # arrived long ago
    part.replace(folder / f"{uid}.dcm")


def test_a_study_is_queued_once_and_again_when_something_is_added(write_settings, tmp_path, monkeypatch):
    settings = read_settings(write_settings(4242)[0])
    incoming, queue = tmp_path / "incoming", JobQueue(tmp_path / "q.sqlite")
    queued: dict[str, int] = {}

    def look() -> int:
        return queue_whole_studies(settings, incoming, queue, queued)

    keep_segmentation(incoming / "1.2", "1.2.3")
    assert look() == 1
    assert look() == 0 and set(queued) == {"1.2"}
    listed = []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: listed.append(self) or iter(()))
    assert look() == 0 and not listed  # the files of a study that did not change are not looked at
    monkeypatch.undo()
    keep_segmentation(incoming / "1.2", "1.2.4")
    assert look() == 1
    assert queue_whole_studies(settings, incoming, queue, {}) == 0  # after a restart
    assert queue.counts()["waiting"] == 2
