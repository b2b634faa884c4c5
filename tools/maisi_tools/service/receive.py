"""How objects come in, by a C-STORE SCP; and when a study is whole."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.presentation import DEFAULT_TRANSFER_SYNTAXES
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from maisi_tools.atomic import replacing
from maisi_tools.service.association import SUCCESS
from maisi_tools.service.jobs import JobQueue
from maisi_tools.service.settings import Listen, Settings

logger = logging.getLogger(__name__)

REFUSED, CANNOT_UNDERSTAND = 0xA700, 0xC000
"""C-STORE status codes of failure (DICOM PS3.4 table B.2-1)."""

COMPRESSED = (
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.5",  # RLE
)


def start_receiver(settings: Listen, incoming: Path) -> Any:
    """Start the C-STORE and C-ECHO SCP; an object is acknowledged when it is on the disk.

    Args:
        settings: who may send, and to what address.
        incoming: gets ``STUDY/INSTANCE.dcm``.

    Returns:
        pynetdicom's server, with ``shutdown()``.
    """
    ae = AE(settings.ae_title)
    ae.require_called_aet = True
    ae.add_supported_context(Verification)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax or "", [*DEFAULT_TRANSFER_SYNTAXES, *COMPRESSED])
    known = {(node.ae_title.strip(), _address(node.host)) for node in settings.allowed}

    def check(event: Any) -> None:
        caller = (event.assoc.requestor.primitive.calling_ae_title.strip(), event.assoc.requestor.address)
        if caller not in known:
            logger.warning("refused %s at %s, which is not in listen.allowed", *caller)
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, by the user, calling AE title not recognised
            event.assoc.kill()

    def store(event: Any) -> int:
        try:
            ds = event.dataset
            ds.file_meta = event.file_meta
            keep(ds, incoming)
        except OSError as error:
            logger.error("an object cannot be stored: %s", error)
            return REFUSED
        except Exception as error:  # whatever is wrong with one object
            logger.error("an object cannot be understood: %s", error)
            return CANNOT_UNDERSTAND
        return SUCCESS

    handlers = [(evt.EVT_REQUESTED, check), (evt.EVT_C_STORE, store)]
    address = (settings.host, settings.port)
    return ae.start_server(address, block=False, evt_handlers=handlers, ssl_context=settings.tls())  # type: ignore


def keep(ds: Dataset, incoming: Path) -> Path:
    """Write an object to the spool, complete or not at all, and to the disk before this returns."""
    folder = incoming / _name(ds.StudyInstanceUID)
    path = folder / f"{_name(ds.SOPInstanceUID)}.dcm"
    with replacing(path) as part:
        ds.save_as(part, enforce_file_format=True)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
    return path


def queue_whole_studies(settings: Settings, incoming: Path, queue: JobQueue, queued: dict[str, int]) -> int:
    """Queue a job for what a chain waits for in every study that nothing has been added to for a while.

    The studies lie on the disk, so this sees after a restart what was there before. What is synthetic is passed over:
    our own results come back from some archives.

    Args:
        settings: the chains, and how long a study must have been quiet.
        incoming: the spool.
        queue: where jobs go.
        queued: study -> when its folder last changed, of those that need no look at their files until it changes
            again; kept up to date here.

    Returns:
        Jobs that are new.
    """
    quiet = settings.listen.quiet_seconds if settings.listen is not None else 0.0
    new = 0
    for folder in sorted(incoming.iterdir()):
        changed = folder.stat().st_mtime_ns  # before the files are listed: one that comes later changes it
        if queued.get(folder.name) == changed:
            continue
        files = [path for path in folder.glob("*.dcm") if not path.name.startswith(".")] if folder.is_dir() else []
        if not files or time.time() - max(path.stat().st_mtime for path in files) < quiet:
            continue
        mark = folder / ".queued"
        names = "\n".join(sorted(path.name for path in files))
        if mark.is_file() and mark.read_text() == names:
            queued[folder.name] = changed
            continue
        for key, kind in _triggers(files, settings).items():
            added = queue.add(key, kind, folder.name, folder)
            new += added
            if added:
                logger.info("queued %s %s of study %s", kind, key, folder.name)
        with replacing(mark) as part:
            part.write_text(names)
    return new


def _triggers(files: list[Path], settings: Settings) -> dict[str, str]:
    """UID -> modality of what a chain waits for."""
    found: dict[str, str] = {}
    tags = ["Modality", "SOPInstanceUID", "SeriesInstanceUID", "SyntheticData"]
    for path in files:
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        kind = str(ds.get("Modality", ""))
        if settings.chain(kind) is None or ds.get("SyntheticData") == "YES":
            continue
        found[str(ds.SeriesInstanceUID if kind == "CT" else ds.SOPInstanceUID)] = kind
    return found


def _name(uid: Any) -> str:
    """A UID as a file name.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"[0-9.]{1,64}", str(uid)):
        raise ValueError(f"{uid!r} is no UID")
    return str(uid)


def _address(host: str) -> str:
    return socket.gethostbyname(host)
