"""Archives that are asked for what is new: by DICOMweb, or by C-FIND and C-MOVE."""

from __future__ import annotations

import datetime
import json
import logging
import os
import queue
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydicom.dataset import Dataset
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as FIND  # type: ignore[attr-defined]
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelMove as MOVE  # type: ignore[attr-defined]

from maisi_tools.dicom.uids import uid_name
from maisi_tools.files import write_json
from maisi_tools.service.association import PENDING, SUCCESS, association
from maisi_tools.service.receive import count_instances, keep
from maisi_tools.service.settings import Poll, Query
from maisi_tools.service.troubles import Troubles, printable
from maisi_tools.volumes.dicom_files import is_system_error

logger = logging.getLogger(__name__)

GROWTH_SECONDS = 3600.0
"""For which the CT of a structure set that was fetched may still be growing in the archive."""


Place = tuple[str, str]
"""Study and Series Instance UID: where an archive has a series, which it may move to another study."""

Seen = dict[Place, int]
"""Series that were fetched -> how many instances the archive had of them then (0 for unknown)."""


class Found(NamedTuple):
    """A series of an archive: its study, its UID, how many instances the archive has (None where it does not say)."""

    study: str
    series: str
    instances: int | None = None

    @property
    def place(self) -> Place:
        """Of the series."""
        return self.study, self.series


class Archive(Protocol):
    """Where series are looked for and fetched from."""

    def search(self, kind: str, study: str | None = None, series: str | None = None) -> list[Found]:
        """The series of a modality, of one study, or that one series, where they are given."""

    def fetch(self, one: Found) -> None:
        """Bring a series into the spool.

        Raises:
            Exception: it did not come, or not all of it.
        """


class DicomWebArchive:
    """An archive that speaks DICOMweb: QIDO-RS and WADO-RS.

    Args:
        settings: its address.
        incoming: the spool.
        troubles: get the objects that are not taken.
    """

    def __init__(self, settings: Poll, incoming: Path, troubles: Troubles) -> None:
        from dicomweb_client.api import DICOMwebClient
        from dicomweb_client.session_utils import create_session_from_user_pass

        session = None
        if settings.user is not None:
            session = create_session_from_user_pass(settings.user, os.environ.get(settings.password_variable, ""))
        self.client = DICOMwebClient(settings.url, session=session)
        self.incoming, self.troubles, self.days = incoming, troubles, settings.days

    def search(self, kind: str, study: str | None = None, series: str | None = None) -> list[Found]:
        """See :class:`Archive`."""
        filters = {"Modality": kind} if series is None else {"Modality": kind, "SeriesInstanceUID": series}
        if study is None and self.days is not None:
            filters["StudyDate"] = f"{since(self.days):%Y%m%d}-"
        found: dict[Place, Found] = {}
        while True:  # an archive answers with as many as it likes, and the others are asked for then
            page = self.client.search_for_series(
                study,
                search_filters=filters,
                fields=["NumberOfSeriesRelatedInstances"],
                offset=len(found) or None,
            )
            answered = [_found(one, study or one.StudyInstanceUID) for one in map(Dataset.from_json, page)]
            before = len(found)
            found |= {one.place: one for one in answered if one.place not in found}
            if len(found) == before or series is not None:
                return list(found.values())

    def fetch(self, one: Found) -> None:
        """See :class:`Archive`."""
        for ds in self.client.iter_series(one.study, one.series):
            try:
                keep(ds, self.incoming)
            except Exception as error:  # the other objects may be all right
                if is_system_error(error):
                    raise
                self.troubles.add("object", f"an object of series {one.series} is not taken: {printable(error)}")


class DimseArchive:
    """An archive that answers C-FIND and, for C-MOVE, stores into our own C-STORE SCP.

    It is asked as every archive has to understand it: for studies first, then for the series of each (the hierarchical
    search of DICOM PS3.4 section C.4.1.3.1), and moves by SERIES.

    Args:
        settings: its address, and how far back to look.
        ae_title: ours; the archive has to know at which host and port it is to be found.
        incoming: the spool, to which what is moved comes by our SCP.
    """

    def __init__(self, settings: Query, ae_title: str, incoming: Path) -> None:
        self.settings, self.ae_title, self.incoming = settings, ae_title, incoming

    def search(self, kind: str, study: str | None = None, series: str | None = None) -> list[Found]:
        """See :class:`Archive`."""
        wanted = {"StudyDate": f"{since(self.settings.days):%Y%m%d}-", "ModalitiesInStudy": kind}
        keys = {"Modality": kind, "SeriesInstanceUID": series or "", "NumberOfSeriesRelatedInstances": None}
        with association(self.settings, self.ae_title, [FIND]) as opened:
            studies = [study]
            if study is None:
                found_studies = self._find(opened, "STUDY", StudyInstanceUID="", **wanted)
                studies = [found.StudyInstanceUID for found in found_studies]
            return [
                _found(found, one)
                for one in studies
                for found in self._find(opened, "SERIES", StudyInstanceUID=one, **keys)
                if found.get("Modality") == kind  # an archive may match by less than it was asked
            ]

    def fetch(self, one: Found) -> None:
        """See :class:`Archive`; what came without a good last word, but whole, has come."""
        wanted, folder = Dataset(), self.incoming / uid_name(one.study)
        wanted.QueryRetrieveLevel = "SERIES"
        wanted.StudyInstanceUID, wanted.SeriesInstanceUID = one.place
        with association(self.settings, self.ae_title, [MOVE]) as opened:
            _be_patient(opened, folder)
            answers = [answer for answer, _ in opened.send_c_move(wanted, self.ae_title, MOVE)]
        if answers and answers[-1] and answers[-1].Status == SUCCESS:
            return
        here = count_instances(folder, one.series)
        if not one.instances or here < one.instances:
            came = f"{here} of {one.instances or '?'} instances came"
            raise ConnectionError(
                f"{self.settings.ae_title} does not send series {one.series} here: {_said(answers)}, {came}"
            )

    def _find(self, opened: Association, level: str, **keys: str | None) -> Iterator[Dataset]:
        asked = Dataset()
        asked.QueryRetrieveLevel = level
        for name, value in keys.items():
            setattr(asked, name, value)
        answers = list(opened.send_c_find(asked, FIND))
        if not answers or not answers[-1][0] or answers[-1][0].Status != SUCCESS:
            raise ConnectionError(f"{self.settings.ae_title} does not answer: {_said([a for a, _ in answers])}")
        return (found for answer, found in answers if answer.Status in PENDING and found is not None)


def since(days: int) -> datetime.date:
    """The day so many days ago."""
    return datetime.date.today() - datetime.timedelta(days=days)


def fetch_new(
    archive: Archive, kinds: Mapping[str, bool], seen: Seen, watched: dict[Place, float], troubles: Troubles
) -> int:
    """Fetch what is new in an archive, or moved, or has grown; a structure set is fetched with the CT of its study.

    Args:
        archive: whom to ask.
        kinds: modality -> whether the study's CT is needed, too.
        seen: what was fetched before; what is fetched now is added, and what is in its study no more is left out.
        watched: series with a CT -> when they were fetched; for :data:`GROWTH_SECONDS` that CT is looked at again. Kept
            up to date here.
        troubles: get what could not be fetched.

    Returns:
        Series fetched.
    """
    fetched, now = 0, time.monotonic()
    for kind, needs_ct in kinds.items():
        found = archive.search(kind)
        places = {one.place for one in found}
        moved = {series for _, series in places}
        for place in [each for each in seen if each[1] in moved and each not in places]:
            del seen[place]  # it may be moved back
        for one in found:
            new = one.place not in seen
            try:
                wanted = [one]
                if needs_ct and (new or now - watched.get(one.place, -GROWTH_SECONDS) < GROWTH_SECONDS):
                    wanted = [*archive.search("CT", one.study), one]
                wanted = [each for each in wanted if new or (each.instances or 0) > seen.get(each.place, 0)]
                for each in wanted:
                    archive.fetch(each)
            except Exception as error:  # the next series may come; this one is asked for again
                troubles.add("archive", f"series {printable(one.series)} cannot be fetched: {printable(error)}")
                continue
            if wanted:
                seen |= {each.place: each.instances or 0 for each in wanted}
                watched[one.place] = now
                fetched += 1
    return fetched


def watch_again(seen: Seen, incoming: Path) -> dict[Place, float]:
    """What :func:`fetch_new` is to watch after a restart: of what it had seen all whose study is still in the spool.

    When they were fetched is not known any more, since the clock of the day tells no time here.
    """
    now = time.monotonic()
    return {place: now for place in seen if (incoming / uid_name(place[0])).is_dir()}


def read_seen(path: Path) -> Seen:
    """What :func:`write_seen` wrote; nothing of a file that is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        return {(study, uid): int(count) for study, series in content.items() for uid, count in series.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s cannot be read (%s); what the archive has is fetched anew", path, error)
        return {}


def write_seen(path: Path, seen: Seen) -> None:
    """Write what :func:`fetch_new` has seen: study -> series -> instances."""
    studies: dict[str, dict[str, int]] = {}
    for (study, series), count in seen.items():
        studies.setdefault(study, {})[series] = count
    write_json(path, studies, durable=True)


def _found(found: Dataset, study: Any) -> Found:
    count = found.get("NumberOfSeriesRelatedInstances")
    return Found(str(study), str(found.SeriesInstanceUID), None if count in (None, "") else int(count))


def _be_patient(opened: Any, folder: Path) -> None:
    """Let an association wait for the last answer for as long as something comes into a folder.

    Answers in between are optional (DICOM PS3.4 section C.4.2.3.1), so a large series may come without a word.
    """

    def get_msg(block: bool = False) -> tuple[Any, Any]:
        while True:
            before = _changed(folder)
            try:
                return opened.dimse.msg_queue.get(block, opened.dimse.dimse_timeout)
            except queue.Empty:
                if not block or _changed(folder) == before:
                    return None, None

    opened.dimse.get_msg = get_msg


def _changed(folder: Path) -> int | None:
    return folder.stat().st_mtime_ns if folder.is_dir() else None


def _said(answers: list[Dataset]) -> str:
    return f"status {answers[-1].Status:#06x}" if answers and answers[-1] else "no answer"
