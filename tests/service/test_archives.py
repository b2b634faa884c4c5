"""What is new in an archive, and what comes of one that fails."""

from __future__ import annotations

import re
import time

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from maisi_tools.service import archives, association, receive
from maisi_tools.service.archives import (
    FIND,
    MOVE,
    DicomWebArchive,
    DimseArchive,
    Found,
    Seen,
    fetch_new,
    read_seen,
    watch_again,
    write_seen,
)
from maisi_tools.service.receive import keep
from maisi_tools.service.settings import Poll, Query
from maisi_tools.service.troubles import Troubles


class Shelf:
    """An archive of (modality, study, series, instances)."""

    def __init__(self, *series: tuple[str, str, str, int]) -> None:
        self.series, self.fetched, self.broken = list(series), [], set()

    def search(self, kind, study=None, series=None):
        return [
            Found(of, uid, count)
            for modality, of, uid, count in self.series
            if modality == kind and study in (None, of) and series in (None, uid)
        ]

    def fetch(self, one):
        if one.series in self.broken:
            raise ConnectionError(one.series)
        self.fetched.append(one.series)

    def move(self, series, study):
        """To another study, as a merge of patients does."""
        self.series = [(kind, study if uid == series else of, uid, count) for kind, of, uid, count in self.series]


@pytest.fixture
def fetch():
    """``fetch(shelf, kinds)`` fetches what is new since the last call."""
    seen: Seen = {}
    watched: dict[tuple[str, str], float] = {}
    troubles = Troubles()

    def again(shelf, kinds):
        return fetch_new(shelf, kinds, seen, watched, troubles)

    again.troubles = troubles
    return again


def test_a_structure_set_comes_with_the_ct_of_its_study_once(fetch):
    shelf = Shelf(("CT", "1", "1.1", 12), ("CT", "2", "2.1", 12), ("RTSTRUCT", "2", "2.2", 1))
    assert fetch(shelf, {"RTSTRUCT": True}) == 1
    assert shelf.fetched == ["2.1", "2.2"]
    assert fetch(shelf, {"RTSTRUCT": True}) == 0
    assert fetch(shelf, {"CT": False}) == 1 and shelf.fetched[2:] == ["1.1"]  # the other one is here already


def test_a_series_that_fails_holds_up_no_other_and_is_asked_for_again(fetch, caplog):
    shelf = Shelf(("SEG", "1", "1.1", 1), ("SEG", "2", "2.1", 1))
    shelf.broken = {"1.1"}
    assert fetch(shelf, {"SEG": True}) == 1 and shelf.fetched == ["2.1"]
    assert "1.1 cannot be fetched" in caplog.text and fetch.troubles.counts()["archive"] == 1
    shelf.broken = set()
    assert fetch(shelf, {"SEG": True}) == 1 and shelf.fetched == ["2.1", "1.1"]


def test_what_has_grown_is_fetched_again(fetch, monkeypatch):
    """A CT by its own number of instances; that of a structure set for an hour after it was fetched."""
    shelf = Shelf(("CT", "1", "1.1", 6), ("SEG", "1", "1.2", 1))
    assert fetch(shelf, {"SEG": True}) == 1 and shelf.fetched == ["1.1", "1.2"]
    shelf.series[0] = ("CT", "1", "1.1", 12)
    assert fetch(shelf, {"SEG": True}) == 1 and shelf.fetched[2:] == ["1.1"]
    assert fetch(shelf, {"SEG": True, "CT": False}) == 0
    shelf.series[0] = ("CT", "1", "1.1", 13)
    monkeypatch.setattr(archives, "GROWTH_SECONDS", 0.0)
    assert fetch(shelf, {"SEG": True}) == 0
    assert fetch(shelf, {"CT": False}) == 1 and shelf.fetched[3:] == ["1.1"]
    shelf.series.append(("SEG", "1", "1.3", 1))  # a new structure needs the CT, though that was fetched long ago
    assert fetch(shelf, {"SEG": True}) == 1 and shelf.fetched[4:] == ["1.1", "1.3"]


def test_a_series_that_the_archive_moves_is_fetched_from_there(fetch):
    """And once more where it is moved back; one that is in two studies is fetched from each, once."""
    shelf = Shelf(("CT", "1", "1.1", 6), ("CT", "2", "2.1", 6))
    assert fetch(shelf, {"CT": False}) == 2
    for study in ("2", "1"):
        shelf.move("1.1", study)
        assert fetch(shelf, {"CT": False}) == 1 and shelf.fetched[-1] == "1.1"
        assert fetch(shelf, {"CT": False}) == 0
    shelf.series.append(("CT", "2", "1.1", 6))
    assert [fetch(shelf, {"CT": False}) for _ in range(3)] == [1, 0, 0]


def test_after_a_restart_the_ct_of_a_structure_set_is_still_watched(tmp_path):
    """Where its study is in the spool still."""
    path, incoming = tmp_path / "polled.json", tmp_path / "incoming"
    shelf = Shelf(("CT", "1", "1.1", 6), ("SEG", "1", "1.2", 1), ("CT", "2", "2.1", 6), ("SEG", "2", "2.2", 1))
    seen: Seen = {}
    assert fetch_new(shelf, {"SEG": True}, seen, {}, Troubles()) == 2
    write_seen(path, seen)
    (incoming / "1").mkdir(parents=True)
    shelf.series[0], shelf.series[2] = ("CT", "1", "1.1", 12), ("CT", "2", "2.1", 12)
    seen = read_seen(path)
    assert fetch_new(shelf, {"SEG": True}, seen, watch_again(seen, incoming), Troubles()) == 1
    assert shelf.fetched[4:] == ["1.1"]


def test_a_list_of_what_was_fetched_that_is_damaged_stops_nothing(tmp_path, caplog):
    path = tmp_path / "polled.json"
    assert read_seen(path) == {}
    seen = {("1", "1.1"): 3, ("1", "1.2"): 1, ("2", "1.1"): 0}
    write_seen(path, seen)
    assert read_seen(path) == seen and not caplog.text
    for damaged in ("{", "[1]", '{"1": {"1.1": "x"}}', '{"1.1": 3}'):  # the last one of an earlier version
        path.write_text(damaged)
        assert read_seen(path) == {} and "fetched anew" in caplog.text
        caplog.clear()


def test_series_beyond_the_first_page_are_seen(tmp_path, monkeypatch):
    """Of an archive that answers with two at a time, and of one that knows no offset and repeats itself."""
    uids = [f"1.2.{number}" for number in range(5)]
    for pages in (True, False):
        asked = []

        def search(study, search_filters, fields, offset, pages=pages, asked=asked):
            asked.append((search_filters, offset))
            first = (offset or 0) if pages else 0
            return [
                {"0020000D": {"vr": "UI", "Value": ["1.1"]}, "0020000E": {"vr": "UI", "Value": [uid]}}
                for uid in uids[first : first + 2]
            ]

        archive = DicomWebArchive(Poll("http://127.0.0.1/dicom-web", days=3), tmp_path, Troubles())
        monkeypatch.setattr(archive.client, "search_for_series", search)
        found = archive.search("SEG")
        assert [one.series for one in found] == (uids if pages else uids[:2]) and len(asked) == (4 if pages else 2)
        assert re.fullmatch(r"\d{8}-", asked[0][0]["StudyDate"])
        archive.search("CT", "1.1", "1.2.0")
        assert asked[-1] == ({"Modality": "CT", "SeriesInstanceUID": "1.2.0"}, None)


def test_an_answer_need_not_repeat_the_study_that_was_asked_for(tmp_path, monkeypatch):
    """Nor the number of instances (DICOM PS3.18 table 10.6.3-4)."""
    archive = DicomWebArchive(Poll("http://127.0.0.1/dicom-web"), tmp_path, Troubles())
    fetched = []

    def search(study, search_filters, **_):
        uid = "1.1.1" if search_filters["Modality"] == "CT" else "1.1.2"
        answer = {"0020000E": {"vr": "UI", "Value": [uid]}}
        return [answer if study else {**answer, "0020000D": {"vr": "UI", "Value": ["1.1"]}}]

    monkeypatch.setattr(archive.client, "search_for_series", search)
    monkeypatch.setattr(archive.client, "iter_series", lambda *place: iter(fetched.append(place) or ()))
    seen: Seen = {}
    assert fetch_new(archive, {"RTSTRUCT": True}, seen, {}, archive.troubles) == 1
    assert fetched == list(seen) == [("1.1", "1.1.1"), ("1.1", "1.1.2")]


def test_a_search_by_c_find_takes_one_association(free_port, tmp_path):
    """However many studies there are; an archive that matches by less than it was asked is sieved."""
    opened = []

    def find(event):
        for number in range(3):
            study = event.identifier.StudyInstanceUID
            if event.identifier.QueryRetrieveLevel == "SERIES" and study != f"1.{number}":
                continue
            answer = Dataset()
            answer.StudyInstanceUID, answer.SeriesInstanceUID = f"1.{number}", f"1.{number}.1"
            answer.Modality, answer.NumberOfSeriesRelatedInstances = "CT" if number == 1 else "SEG", number
            yield 0xFF00, answer
        yield 0x0000, None

    ae, port = AE("PACS"), free_port()
    ae.add_supported_context(FIND)
    handlers = [(evt.EVT_C_FIND, find), (evt.EVT_ACCEPTED, opened.append)]
    server = ae.start_server(("127.0.0.1", port), False, evt_handlers=handlers)
    try:
        found = DimseArchive(Query("PACS", "127.0.0.1", port), "MAISI", tmp_path).search("SEG")
    finally:
        server.shutdown()
    assert found == [Found("1.0", "1.0.1", 0), Found("1.2", "1.2.1", 2)] and len(opened) == 1


@pytest.mark.parametrize(
    ("sent", "again", "ends_well", "counted", "comes"),
    [
        (5, 0, True, None, True),  # slowly, in longer than an answer may take
        (5, 5, True, None, True),  # what is here already comes once more
        (2, 0, False, 2, True),  # all of it, and then a failure
        (2, 0, False, 3, False),
        (0, 0, True, 2, False),  # nothing comes, and no answer in time
    ],
)
def test_a_series_that_comes_without_a_word_has_come(
    free_port, tmp_path, monkeypatch, sent, again, ends_well, counted, comes
):
    """Pending responses of C-MOVE are optional."""
    monkeypatch.setattr(association, "ANSWER_SECONDS", 0.4)
    monkeypatch.setattr(receive, "sync", lambda path: None)  # a disk is slow, and the same

    def send(count, pause=0.0):
        for number in range(count):
            time.sleep(pause)
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.1.1.{number}"
            ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.1", "1.1.1"
            keep(ds, tmp_path)

    def move(_):
        send(sent, 0.1 if ends_well else 0.0)
        if not sent:
            time.sleep(0.5)
        yield ("127.0.0.1", 1) if ends_well else (None, None)
        yield 0

    ae, port = AE("PACS"), free_port()
    ae.add_supported_context(MOVE)
    server = ae.start_server(("127.0.0.1", port), False, evt_handlers=[(evt.EVT_C_MOVE, move)])
    try:
        send(again)
        archive = DimseArchive(Query("PACS", "127.0.0.1", port), "MAISI", tmp_path)
        if comes:
            archive.fetch(Found("1.1", "1.1.1", counted))
        else:
            words = f"(status 0xa801|no answer), {sent} of {counted} instances came"
            with pytest.raises(ConnectionError, match=words):
                archive.fetch(Found("1.1", "1.1.1", counted))
    finally:
        server.shutdown()
