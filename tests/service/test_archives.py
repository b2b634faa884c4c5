"""What is new in an archive, and what comes of one that fails."""

from __future__ import annotations

from maisi_tools.service.archives import fetch_new


class Shelf:
    """An archive of (modality, study, series)."""

    def __init__(self, *series: tuple[str, str, str]) -> None:
        self.series, self.fetched, self.broken = series, [], set()

    def search(self, kind, study=None):
        return [(of, uid) for modality, of, uid in self.series if modality == kind and study in (None, of)]

    def fetch(self, study, series):
        if series in self.broken:
            raise ConnectionError(series)
        self.fetched.append(series)


def test_a_structure_set_comes_with_the_ct_of_its_study_once():
    shelf = Shelf(("CT", "1", "1.1"), ("CT", "2", "2.1"), ("RTSTRUCT", "2", "2.2"))
    seen: set[str] = set()
    assert fetch_new(shelf, {"RTSTRUCT": True}, seen) == 1
    assert shelf.fetched == ["2.1", "2.2"]
    assert fetch_new(shelf, {"RTSTRUCT": True}, seen) == 0
    assert fetch_new(shelf, {"CT": False}, seen) == 2 and shelf.fetched[2:] == ["1.1", "2.1"]


def test_a_series_that_fails_holds_up_no_other_and_is_asked_for_again(caplog):
    shelf = Shelf(("SEG", "1", "1.1"), ("SEG", "2", "2.1"))
    shelf.broken = {"1.1"}
    seen: set[str] = set()
    assert fetch_new(shelf, {"SEG": True}, seen) == 1 and seen == {"2.1"}
    assert "1.1 cannot be fetched" in caplog.text
    shelf.broken = set()
    assert fetch_new(shelf, {"SEG": True}, seen) == 1 and shelf.fetched == ["2.1", "1.1"]
