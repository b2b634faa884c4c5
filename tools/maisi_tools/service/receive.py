"""How objects come in, by a C-STORE SCP; and when a study is whole."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import io
import ipaddress
import logging
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.pixels import iter_pixels
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from maisi_tools.dicom.references import REFERENCE_TAGS, Scan, drawn_on
from maisi_tools.dicom.uids import is_uid, uid_name
from maisi_tools.errors import InputError
from maisi_tools.files import part_of, sha256, sync
from maisi_tools.service.association import SUCCESS
from maisi_tools.service.jobs import CONTENT_LETTERS, JobQueue
from maisi_tools.service.server import MAX_ASSOCIATIONS, Server
from maisi_tools.service.settings import Listen, Settings
from maisi_tools.service.troubles import Troubles, printable
from maisi_tools.volumes.dicom_files import DicomFile, is_system_error
from maisi_tools.volumes.limits import check_limit

logger = logging.getLogger(__name__)

REFUSED, CANNOT_UNDERSTAND = 0xA700, 0xC000
"""C-STORE status codes of failure (DICOM PS3.4 table B.2-1)."""

PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
"""Transfer syntaxes that are offered without compression. Not the deflated one: a megabyte may hold a gigabyte."""

COMPRESSED = (
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.5",  # RLE
)

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
"""Objects of the modality CT that are slices of one; captures of screens and of dose reports have it, too."""

TRIGGER_TAGS = [
    *("Modality", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ImageType"),
    "SyntheticData",
]
"""What tells whether an object is to be worked on, and to which series it belongs."""

IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
"""What an object must have to be taken: all of it ends in the names of files, or in the queue's keys."""

COUNT_SECONDS = 600.0
"""How long a series waits for the instances that the archive counts beyond those that came."""

CHANGING = threading.Lock()
"""Held while files enter or leave the spool: what was acknowledged may not go with what is moved or removed."""


class NotTaken(ValueError):
    """An object that is not taken over; the message says why."""


def start_receiver(settings: Listen, incoming: Path, troubles: Troubles) -> Server:
    """Start the C-STORE and C-ECHO SCP; an object is acknowledged when it is on the disk.

    Args:
        settings: who may send, and to what address.
        incoming: gets ``STUDY/INSTANCE.dcm``.
        troubles: get what could not be taken.
    """
    ae = AE(settings.ae_title)
    ae.require_called_aet = True
    ae.maximum_associations = 10_000  # which counts the pending, too; `check` counts the known
    ae.add_supported_context(Verification)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax or "", [*PLAIN, *COMPRESSED])
    known = {(node.ae_title.strip(), address) for node in settings.allowed for address in _addresses(node.host)}
    smallest = int(settings.min_free_gigabytes * 1e9)

    def check(event: Any) -> None:
        requestor = event.assoc.requestor
        caller = (requestor.primitive.calling_ae_title.strip(), _plain(requestor.address))
        if caller not in known:
            logger.warning("refused %s at %s, which is not in listen.allowed", *map(printable, caller))
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, by the user, calling AE title not recognised
            event.assoc.kill()
        elif server.known() >= MAX_ASSOCIATIONS:
            logger.warning("refused %s at %s, there are %d associations", *caller, MAX_ASSOCIATIONS)
            event.assoc.acse.send_reject(0x02, 0x03, 0x02)  # transient, by the provider, local limit exceeded
            event.assoc.kill()

    def store(event: Any) -> int:
        event.assoc.received = 0
        try:
            content = event.encoded_dataset()
            if shutil.disk_usage(incoming).free - len(content) < smallest:
                raise OSError(errno.ENOSPC, f"less than {settings.min_free_gigabytes:g} GB are free in {incoming}")
            head = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=list(IDENTITY))
            with server.storing():
                keep(head, incoming, lambda part: part.write_bytes(content))
        except Exception as error:  # whatever is wrong with one object
            if is_system_error(error):
                troubles.add("store", f"an object cannot be stored: {error}")
                return REFUSED
            troubles.add("object", f"an object of {event.assoc.requestor.address} is not taken: {printable(error)}")
            return CANNOT_UNDERSTAND
        return SUCCESS

    handlers: list[Any] = [(evt.EVT_REQUESTED, check), (evt.EVT_C_STORE, store)]
    address = (settings.host, settings.port)
    server: Any = ae.make_server(
        address,
        evt_handlers=handlers,
        ssl_context=settings.tls(),
        server_class=Server,  # type: ignore[arg-type]
    )
    server.max_object = settings.max_megabytes * 1_000_000
    ae._servers.append(server)  # as AE.start_server does, which knows no other class of servers; shutdown removes it
    threading.Thread(target=server.serve_forever, name="dicom", daemon=True).start()
    return server


def keep(ds: Dataset, incoming: Path, write: Callable[[Path], Any] | None = None) -> Path:
    """Write an object to the spool, complete or not at all, and to the disk before this returns.

    One that is there already keeps its file and date, so that it starts nothing. One that lies in another study leaves
    that: it is the same by its UID, and what came last is right, as after a merge of patients.

    Args:
        ds: the object, or of it at least :data:`IDENTITY`.
        incoming: the spool.
        write: writes it to a path; by default `ds` is saved.

    Raises:
        NotTaken: it has no identity.
    """
    for keyword in IDENTITY:
        if not is_uid(uid := ds.get(keyword) or ""):
            raise NotTaken(f"its {keyword} is {printable(repr(str(uid)))[:100]}, which is no UID")
    path = incoming / uid_name(ds.StudyInstanceUID) / f"{uid_name(ds.SOPInstanceUID)}.dcm"
    part = part_of(incoming / path.name)  # where no study is removed with it
    try:
        if write is None:
            ds.save_as(part, enforce_file_format=True)
        else:
            write(part)
        sync(part)  # not while it is held: the disk writes those of several callers at once
        with CHANGING:
            if _is_same(part, path):
                os.utime(path.parent)  # says that something came
            else:
                path.parent.mkdir(exist_ok=True)
                part.replace(path)
            for other in [each for each in incoming.glob(f"*/{path.name}") if each.parent != path.parent]:
                sync(path.parent)
                sync(incoming)
                other.unlink()
        sync(path.parent)
        sync(incoming)
    finally:
        part.unlink(missing_ok=True)
    return path


def count_instances(folder: Path, series: str) -> int:
    """How many objects of a series are in a study's folder."""
    count = 0
    for path in folder.glob("*.dcm"):
        with contextlib.suppress(Exception):  # one that cannot be read, or that is moved away, is none
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            count += ds.get("SeriesInstanceUID") == series
    return count


def _is_same(new: Path, old: Path) -> bool:
    """Whether two files hold the same object, whatever their transfer syntax, private elements and file meta
    information say: an archive may answer by one way in another syntax, and without what it does not know."""
    if not old.is_file():
        return False
    try:
        if filecmp.cmp(new, old, shallow=False):
            return True
        (one, pixels), (other, pixels_before) = _parts(new), _parts(old)
        return one == other and (pixels == pixels_before or _same_pixels(new, old))
    except Exception:  # one that cannot be read is another
        return False


def _parts(path: Path) -> tuple[Dataset, bytes | None]:
    """What the standard elements of an object say, however they are encoded; and its pixels, as they are encoded."""
    ds = pydicom.dcmread(path)
    pixels = ds.get("PixelData")
    ds.remove_private_tags()
    correct_ambiguous_vr(ds, ds.original_encoding[1] is not False)  # numbers whose kind Implicit VR does not say
    for keyword in ("PixelData", "SpecificCharacterSet"):  # texts are decoded
        ds.pop(keyword, None)
    return ds, pixels


def _same_pixels(new: Path, old: Path) -> bool:
    """Whether two images that say the same of themselves have the same decompressed pixels.

    Raises:
        InputError: they claim more of them than a volume may have, or than their files can hold.
    """
    for path in (new, old):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        voxels = int(ds.Rows) * int(ds.Columns) * int(ds.get("NumberOfFrames") or 1)
        check_limit("MAISI_MAX_VOXELS", voxels, f"{path} has {voxels} pixels")
        DicomFile(path).check_claim(ds)
    frames = zip(iter_pixels(new, raw=True), iter_pixels(old, raw=True), strict=True)
    return all(np.array_equal(one, other) for one, other in frames)


@dataclass
class Intake:
    """What is known of the studies in the spool, from one look to the next; times are those of a clock that cannot be
    set.

    Attributes:
        seen: study -> (digest of the names and dates of its files, when they last changed).
        stamps: study -> date of its folder when its files were last listed.
        queued: studies whose files have not changed since their jobs were queued.
        waiting: series -> since when it waits for instances that the archive counts.
        aside: objects that were set aside -> when.
        looked: when a study was last looked at; many, after a restart, take their time.
    """

    seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    stamps: dict[str, int] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    waiting: dict[str, float] = field(default_factory=dict)
    aside: dict[Path, float] = field(default_factory=dict)
    looked: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Trigger:
    """What a chain waits for.

    Attributes:
        key: the job's.
        kind: its modality.
        content: short digests of all files that the job will read; a new one makes it a job again.
        series: Series Instance UID of the CT it needs, and how many instances of that are here; None for no CT.
    """

    key: str
    kind: str
    content: str
    series: tuple[str, int] | None


Count = Callable[[str, str], "int | None"]
"""(Study, Series Instance UID) -> instances that the archive has, None where it cannot say."""


def queue_whole_studies(
    settings: Settings,
    incoming: Path,
    queue: JobQueue,
    intake: Intake,
    troubles: Troubles,
    dead: Path,
    count: Count | None = None,
) -> int:
    """Queue a job for what a chain waits for in every study that nothing has been added to for a while.

    The studies lie on the disk, so this sees after a restart what was there before. What is synthetic is passed over:
    our own results come back from some archives. What is wrong with one study or file does not hold up the others.

    Args:
        settings: the chains, and how long a study must have been quiet.
        incoming: the spool.
        queue: where jobs go.
        intake: from the look before; kept up to date here.
        troubles: get what is wrong with a study.
        dead: where files go that cannot be read.
        count: asks the archive how many instances a series has.

    Returns:
        Jobs that are new, or to be done anew.
    """
    new = 0
    for folder in sorted(entry for entry in incoming.iterdir() if entry.is_dir()):
        try:
            new += _look_at(folder, settings, queue, intake, troubles, dead, count)
        except Exception as error:  # the next study may be all right
            troubles.add("study", f"study {folder.name} cannot be queued: {printable(error)}")
        intake.looked = time.monotonic()
    return new


def forget_old_studies(settings: Settings, incoming: Path, queue: JobQueue, intake: Intake) -> None:
    """Remove studies that no job needs and that nothing was added to for `keep_hours`, see :class:`Intake`; and objects
    that were set aside so long ago, whose reasons stay."""
    now = time.monotonic()
    for path, since in list(intake.aside.items()):
        if now - since > settings.keep_hours * 3600:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                del intake.aside[path]
    for name, (_, changed) in list(intake.seen.items()):
        folder = incoming / name
        if now - changed <= settings.keep_hours * 3600 or name not in intake.queued or queue.in_use(name):
            continue
        with CHANGING, contextlib.suppress(OSError):
            if folder.stat().st_mtime_ns != intake.stamps.get(name):  # something came since it was looked at
                continue
            shutil.rmtree(folder, ignore_errors=True)
        queue.forget(name)
        intake.seen.pop(name)
        intake.stamps.pop(name, None)
        intake.queued.discard(name)


def _look_at(
    folder: Path,
    settings: Settings,
    queue: JobQueue,
    intake: Intake,
    troubles: Troubles,
    dead: Path,
    count: Count | None,
) -> int:
    stamp = folder.stat().st_mtime_ns  # before the files are listed: one that comes later changes it
    if folder.name in intake.queued and intake.stamps.get(folder.name) == stamp:
        return 0
    intake.stamps[folder.name] = stamp
    files = sorted(path for path in folder.glob("*.dcm") if not path.name.startswith("."))
    names, now = _digest(f"{path.name} {path.stat().st_mtime_ns}" for path in files), time.monotonic()
    before, changed = intake.seen.get(folder.name, (None, 0.0))
    if names != before:
        changed = came(files) if files and before is None else now  # what lay there before this process came
        intake.seen[folder.name] = names, changed
        intake.queued.discard(folder.name)
    if folder.name in intake.queued or now - changed < settings.quiet_seconds:
        return 0
    new, whole = 0, True
    for trigger in _triggers(files, settings, intake, troubles, dead):
        if count is not None and trigger.series is not None and not _all_here(folder.name, trigger, count, intake):
            whole = False
            continue
        outcome = queue.add(trigger.key, trigger.kind, folder.name, folder, trigger.content)
        if outcome:
            new += 1
            logger.info("%s %s %s of study %s", outcome, trigger.kind, trigger.key, folder.name)
    if whole:
        intake.queued.add(folder.name)
    else:  # asked again when it has been quiet for as long once more
        intake.seen[folder.name] = names, now
    return new


def _all_here(study: str, trigger: Trigger, count: Count, intake: Intake) -> bool:
    """Whether a series has as many instances as the archive counts, or has waited for them long enough."""
    assert trigger.series is not None
    uid, here = trigger.series
    there = count(study, uid)
    if there is None or here >= there:
        intake.waiting.pop(uid, None)
        return True
    since = intake.waiting.setdefault(uid, time.monotonic())
    if time.monotonic() - since < COUNT_SECONDS:
        logger.info("series %s has %d of %d instances; it waits for the others", uid, here, there)
        return False
    logger.warning("series %s has %d of %d instances; it is queued without the others", uid, here, there)
    return True


def came(files: Iterable[Path]) -> float:
    """When the last of some files came, by a clock that cannot be set: as long ago as its date says, or now where that
    is in the future."""
    return time.monotonic() - max(0.0, time.time() - max(path.stat().st_mtime for path in files))


def _triggers(files: list[Path], settings: Settings, intake: Intake, troubles: Troubles, dead: Path) -> list[Trigger]:
    """What a chain waits for among the files of a study."""
    series: dict[str, list[Path]] = {}
    here: Counter[str] = Counter()
    scans: dict[str, Scan] = {}
    masks: list[tuple[str, str, Path]] = []
    for path in files:
        with CHANGING:  # what is set aside is what was read, not one that came meanwhile
            try:
                ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TRIGGER_TAGS)
                kind, uid = str(ds.get("Modality", "")), str(ds.get("SeriesInstanceUID", ""))
                if not is_uid(uid) or not is_uid(ds.get("SOPInstanceUID", "")):
                    raise NotTaken("it has no UID of its series, or of its own")
            except Exception as error:
                if is_system_error(error):
                    raise
                intake.aside[set_aside(path, dead, printable(error))] = time.monotonic()
                troubles.add("object", f"{path} is set aside, it cannot be read: {printable(error)}")
                continue
        if ds.get("SyntheticData") == "YES":
            continue
        if kind == "CT":
            here[uid] += 1  # as the archive counts
            if not is_slice(ds):
                continue
            series.setdefault(uid, []).append(path)
            scans.setdefault(uid, Scan()).add(ds)
        elif settings.chain(kind) is not None:
            masks.append((str(ds.SOPInstanceUID), kind, path))
    found = []
    if settings.chain("CT") is not None:
        found = [Trigger(uid, "CT", _digests(slices), (uid, here[uid])) for uid, slices in series.items()]
    for key, kind, path in masks:
        uid = needed_series(path, scans)
        slices = series.get(uid, [])
        found.append(Trigger(key, kind, _digests([path, *slices]), (uid, here[uid]) if uid else None))
    return found


def is_slice(ds: Dataset) -> bool:
    """Whether an object, of which :data:`TRIGGER_TAGS` were read, is of a scan: no scout, no capture, not synthetic."""
    scout = "LOCALIZER" in (ds.get("ImageType") or ())
    of_a_ct = ds.get("Modality") == "CT" and str(ds.get("SOPClassUID", "")) in CT_CLASSES
    return of_a_ct and not scout and ds.get("SyntheticData") != "YES"


def needed_series(path: Path, present: Mapping[str, Scan]) -> str:
    """Which of the CT series that are present a SEG or RTSTRUCT was drawn on; "" for none.

    See :func:`~maisi_tools.dicom.references.drawn_on`. A structure set has no grid of its own, so it gets the first of
    all where there is none, and its job will say what does not fit; a segmentation may be of an MR beside that CT.

    Args:
        path: the SEG or RTSTRUCT. One that cannot be read needs none: its job will say what is wrong with it.
        present: by Series Instance UID.
    """
    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(REFERENCE_TAGS))
        chosen, _ = drawn_on(ds, present)
    except Exception:
        return ""
    return chosen or ("" if ds.get("Modality") == "SEG" else next(iter(present), ""))


def set_aside(path: Path, dead: Path, reason: str) -> Path:
    """Move a file out of the spool, beside its reason; where it is then."""
    target = dead / uid_name(path.stem) / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    (target.parent / "reason.txt").write_text(
        f"{path.name} of study {path.parent.name}: {reason}\n", errors="backslashreplace"
    )
    os.replace(path, target)
    return target


def _digests(files: Sequence[Path]) -> str:
    """One short digest a file: a study that comes again in part shows by them that nothing of it is new.

    Of the bytes: an object may be corrected and sent again under its UID.
    """
    return " ".join(sorted(sha256(path)[:CONTENT_LETTERS] for path in files))


def _digest(names: Any) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode(errors="surrogateescape")).hexdigest()[:32]


def _addresses(host: str) -> set[str]:
    """All addresses of a host, of either family."""
    try:
        return {_plain(str(found[4][0])) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise InputError(f"listen.allowed has the host {host}, which has no address ({error}); correct it") from error


def _plain(address: str) -> str:
    """An address in its one form: IPv4 comes within IPv6 to a port that is open on "::"."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(found, "ipv4_mapped", None) or found)
