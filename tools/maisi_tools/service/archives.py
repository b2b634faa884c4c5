"""Archives that are asked for what is new: by DICOMweb, or by C-FIND and C-MOVE."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from pydicom.dataset import Dataset
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from maisi_tools.service.association import PENDING, SUCCESS, association
from maisi_tools.service.receive import keep
from maisi_tools.service.settings import Poll, Query

logger = logging.getLogger(__name__)


class Archive(Protocol):
    """Where series are looked for and fetched from."""

    def search(self, kind: str, study: str | None = None) -> list[tuple[str, str]]:
        """(Study, Series Instance UID) of the series of a modality, of one study where it is given."""

    def fetch(self, study: str, series: str) -> None:
        """Bring a series into the spool.

        Raises:
            Exception: it did not come, or not all of it.
        """


class DicomWebArchive:
    """An archive that speaks DICOMweb: QIDO-RS and WADO-RS.

    Args:
        settings: its address.
        incoming: the spool.
    """

    def __init__(self, settings: Poll, incoming: Path) -> None:
        from dicomweb_client.api import DICOMwebClient
        from dicomweb_client.session_utils import create_session_from_user_pass

        session = None
        if settings.user is not None:
            session = create_session_from_user_pass(settings.user, os.environ.get(settings.password_variable, ""))
        self.client = DICOMwebClient(settings.url, session=session)
        self.incoming = incoming

    def search(self, kind: str, study: str | None = None) -> list[tuple[str, str]]:
        """See :class:`Archive`."""
        found = map(Dataset.from_json, self.client.search_for_series(study, search_filters={"Modality": kind}))
        return [(str(series.StudyInstanceUID), str(series.SeriesInstanceUID)) for series in found]

    def fetch(self, study: str, series: str) -> None:
        """See :class:`Archive`."""
        for ds in self.client.retrieve_series(study, series):
            keep(ds, self.incoming)


class DimseArchive:
    """An archive that answers C-FIND and, for C-MOVE, stores into our own C-STORE SCP.

    It is asked as every archive has to understand it: for studies first, then for the series of each (the hierarchical
    search of DICOM PS3.4 section C.4.1.3.1), and moves by SERIES.

    Args:
        settings: its address, and how far back to look.
        ae_title: ours; the archive has to know at which host and port it is to be found.
    """

    def __init__(self, settings: Query, ae_title: str) -> None:
        self.settings, self.ae_title = settings, ae_title

    def search(self, kind: str, study: str | None = None) -> list[tuple[str, str]]:
        """See :class:`Archive`."""
        if study is None:
            first = datetime.date.today() - datetime.timedelta(days=self.settings.days)
            wanted = {"StudyDate": f"{first:%Y%m%d}-", "ModalitiesInStudy": kind}
            studies = [found.StudyInstanceUID for found in self._find("STUDY", StudyInstanceUID="", **wanted)]
        else:
            studies = [study]
        wanted = {"Modality": kind, "SeriesInstanceUID": ""}
        return [
            (str(one), str(found.SeriesInstanceUID))
            for one in studies
            for found in self._find("SERIES", StudyInstanceUID=one, **wanted)
            if found.get("Modality") == kind  # an archive may match by less than it was asked
        ]

    def fetch(self, study: str, series: str) -> None:
        """See :class:`Archive`."""
        wanted = Dataset()
        wanted.QueryRetrieveLevel = "SERIES"
        wanted.StudyInstanceUID, wanted.SeriesInstanceUID = study, series
        model = StudyRootQueryRetrieveInformationModelMove
        with association(self.settings, self.ae_title, [(model,)]) as opened:
            answers = [answer for answer, _ in opened.send_c_move(wanted, self.ae_title, model)]
        if not answers or not answers[-1] or answers[-1].Status != SUCCESS:
            raise ConnectionError(f"{self.settings.ae_title} does not send series {series} here: {_said(answers)}")

    def _find(self, level: str, **keys: str) -> Iterator[Dataset]:
        asked = Dataset()
        asked.QueryRetrieveLevel = level
        for name, value in keys.items():
            setattr(asked, name, value)
        model = StudyRootQueryRetrieveInformationModelFind
        with association(self.settings, self.ae_title, [(model,)]) as opened:
            answers = list(opened.send_c_find(asked, model))
        if not answers or not answers[-1][0] or answers[-1][0].Status != SUCCESS:
            raise ConnectionError(f"{self.settings.ae_title} does not answer: {_said([a for a, _ in answers])}")
        return (found for answer, found in answers if answer.Status in PENDING and found is not None)


def fetch_new(archive: Archive, kinds: Mapping[str, bool], seen: set[str]) -> int:
    """Fetch what is new in an archive; a structure set is fetched with the CT of its study.

    Args:
        archive: whom to ask.
        kinds: modality -> whether the study's CT is needed, too.
        seen: series that were fetched before; those fetched now are added.

    Returns:
        Series fetched.
    """
    fetched = 0
    for kind, needs_ct in kinds.items():
        for study, series in archive.search(kind):
            if series in seen:
                continue
            try:
                for with_it in [uid for _, uid in archive.search("CT", study)] if needs_ct else []:
                    archive.fetch(study, with_it)
                archive.fetch(study, series)
            except Exception as error:  # the next series may come; this one is asked for again
                logger.warning("series %s cannot be fetched: %s", series, error)
                continue
            seen.add(series)
            fetched += 1
    return fetched


def _said(answers: list[Dataset]) -> str:
    return f"status {answers[-1].Status:#06x}" if answers and answers[-1] else "no answer"
