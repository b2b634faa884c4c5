"""Runs one job: DICOM in, the chain of bundles, a DICOM study out."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset

from maisi_tools.bundles.stage import Stage
from maisi_tools.dicom.objects import recordable
from maisi_tools.dicom.references import Scan
from maisi_tools.dicom.study import PART, edited_region, read_mask, remove_study, write_study
from maisi_tools.dicom.uids import is_uid, uid_name
from maisi_tools.errors import InputError
from maisi_tools.service.association import (
    OUT_OF_RESOURCES,
    STORED_WITH_WARNING,
    SUCCESS,
    ArchiveAway,
    ArchiveRefuses,
    association,
)
from maisi_tools.service.jobs import Job
from maisi_tools.service.receive import TRIGGER_TAGS, is_slice, needed_series
from maisi_tools.service.settings import Chain, Node, Step
from maisi_tools.service.troubles import printable
from maisi_tools.volumes.grid import straighten
from maisi_tools.volumes.inputs import is_dicom
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)


class Made(NamedTuple):
    """A result: its files, the CT first, and the CT's Series Instance UID."""

    files: list[Path]
    series: str


def run_job(job: Job, chain: Chain, work: Path, device: str = "cpu") -> Made:
    """Make a job's result, the files of a DICOM study, in the folder `work`, which is emptied first.

    Args:
        job: what came in.
        chain: the bundles to run.
        work: the study goes to ``study`` in it, intermediate volumes beside that.
        device: for the networks.

    Raises:
        InputError: what came in cannot be used, or the chain refuses it.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    volume, series = _volume(job, chain, work)
    if chain.keep_patient and series is None:
        raise InputError(f"study {job.study} has no CT series, whose patient the result could join; send it, too")
    ran: dict[str, Any] = {}
    for number, step in enumerate(chain.steps):
        bundle = Path(step.bundle)
        out = work / f"step{number}"
        given = {"input": str(volume), **_filled(step.settings, str(volume), series)}
        Stage(bundle, step.config, device, output_dir=str(out), **given).run()
        before = sum(Path(each.bundle).name == bundle.name for each in chain.steps[:number])
        ran[f"{bundle.name} {before + 1}" if before else bundle.name] = recordable(step.settings)
        made = sorted(out.glob(f"*{step.result}"))
        if len(made) != 1:
            raise InputError(
                f"{bundle.name} wrote {len(made)} files *{step.result}; correct result of the chain's step"
            )
        volume = made[0]
    ct: Any = nib.load(volume)
    mask_file = volume.with_name(volume.name.replace(chain.steps[-1].result, "_mask.nii.gz"))
    mask = np.asarray(nib.load(mask_file).dataobj) if mask_file.is_file() else None  # type: ignore[attr-defined]
    region = edited_region(volume)
    if job.replaces:
        ran["replaces"] = job.replaces
    files = write_study(
        work / "study",
        np.asarray(ct.dataobj),
        ct.affine,
        mask,
        source=series if chain.keep_patient else None,
        conditions=ran,
        created=datetime.datetime.fromisoformat(job.received),
        from_scan=chain.when == "CT" or bool(region) or any("{series}" in str(step.settings) for step in chain.steps),
        region=region,
    )
    return Made(files, str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID))


def _filled(value: Any, volume: str, series: Path | None) -> Any:
    """Settings with "{input}" replaced by the volume's path, and "{series}" by that of the CT series it belongs to."""
    if isinstance(value, str):
        if "{series}" in value and series is None:
            raise InputError("a step's settings name {series}, and the study has no CT series; send it, too")
        return value.replace("{input}", volume).replace("{series}", str(series))
    if isinstance(value, Mapping):
        return {key: _filled(one, volume, series) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(one, volume, series) for one in value]
    return value


def run_folder(source: Path, target: Path, steps: Sequence[Step]) -> list[Path]:
    """Make the result of a folder with one SEG or RTSTRUCT, the latter with its CT, as a study in another folder.

    A study of an earlier run that is there is removed first: it would be taken for the result of this one.

    Args:
        source: what :func:`gather` takes.
        target: gets the study; made if missing.
        steps: the chain's.

    Returns:
        The study's files.

    Raises:
        InputError: the source has no SEG and no RTSTRUCT, or several; the target has something else in it; or see
            :func:`run_job`.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "incoming").mkdir()
        found = gather(source, work / "incoming")
        masks = [(kind, uid) for kind in ("SEG", "RTSTRUCT") for uid in found.get(kind, ())]
        if len(masks) != 1:
            named = ", ".join(f"{found[kind][uid]} ({kind})" for kind, uid in masks)
            raise InputError(
                f"{source} holds {named or 'no SEG and no RTSTRUCT that is not synthetic'}; allowed is one SEG, or one "
                "RTSTRUCT with its CT"
            )
        remove_study(target)
        kind, uid = masks[0]
        now = datetime.datetime.now().isoformat(timespec="seconds")
        run_job(Job(uid, kind, "", str(work / "incoming"), now), Chain(kind, steps), work / "run")
        part = target / f"{PART}{os.getpid()}"  # the next run removes what a stopped one leaves of it
        shutil.copytree(work / "run" / "study", part)
    for new in part.iterdir():
        new.rename(target / new.name)
    part.rmdir()
    return sorted(path for path in target.rglob("*") if path.is_file())


def gather(source: Path, incoming: Path) -> dict[str, dict[str, Path]]:
    """Copy the DICOM files of a folder, at any depth, as the listener's spool holds those of a study.

    Args:
        source: the folder; files that are no DICOM objects with UIDs are passed over, and what is synthetic.
        incoming: gets ``INSTANCE.dcm``.

    Returns:
        Modality -> SOP Instance UID -> the file that was copied.
    """
    found: dict[str, dict[str, Path]] = {}
    tags = ["Modality", "SOPInstanceUID", "SyntheticData"]
    for path in sorted(source.rglob("*")):
        if not is_dicom(path):
            continue
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            uid, kind = str(ds.get("SOPInstanceUID", "")), str(ds.get("Modality", ""))
        except Exception as error:  # one bad file must not stop the others
            logger.warning("%s is passed over, it cannot be read: %s", path, printable(error))
            continue
        if not is_uid(uid):
            logger.warning("%s is passed over, its SOP Instance UID %s is none", path, printable(repr(uid)))
            continue
        if ds.get("SyntheticData") == "YES":
            logger.info("%s is passed over, it is synthetic", path)
            continue
        shutil.copy(path, incoming / f"{uid_name(uid)}.dcm")
        found.setdefault(kind, {})[uid] = path
    return found


def send(files: list[Path], node: Node, calling: str) -> None:
    """Store files in an archive with C-STORE; none where it does not take all their kinds.

    Raises:
        ArchiveAway: it cannot be reached, or has no room now.
        ArchiveRefuses: it does not take one of them.
    """
    datasets = [pydicom.dcmread(path) for path in files]
    warned: set[str] = set()
    with association(node, calling, {str(ds.SOPClassUID) for ds in datasets}) as opened:
        for ds in datasets:
            status: Dataset = opened.send_c_store(ds)
            if not status or status.Status not in (SUCCESS, *STORED_WITH_WARNING):
                code = f"status {status.Status:#06x}" if status else "no answer"
                passing = not status or status.Status >> 8 == OUT_OF_RESOURCES
                kind = ArchiveAway if passing else ArchiveRefuses
                raise kind(f"{node.ae_title} does not take {ds.SOPInstanceUID}: {code}")
            if status.Status != SUCCESS:
                warned.add(f"{status.Status:#06x}")
    if warned:
        logger.warning("%s stored the result with a warning: %s", node.ae_title, ", ".join(sorted(warned)))


def sop_classes(files: list[Path]) -> set[str]:
    """Of DICOM files."""
    tags = ["SOPClassUID"]
    return {str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags).SOPClassUID) for path in files}


def check_reachable(node: Node, calling: str, classes: Iterable[str]) -> None:
    """Make sure that an archive would take a result of some SOP classes, before one is computed.

    Raises:
        ArchiveAway: it cannot be reached, or refuses us.
        ArchiveRefuses: it does not take one of the classes.
    """
    with association(node, calling, classes):
        pass


def _volume(job: Job, chain: Chain, work: Path) -> tuple[Path, Path | None]:
    """The first step's input as a NIfTI file, and the folder of the CT series it belongs to."""
    series = _series(job, work)
    if job.kind == "CT":
        ct: Any = read_volume(series, "ct") if series else None
        if ct is None:
            raise InputError(f"series {job.key} is not in the study any more")
        path = work / "scan.nii.gz"
        ct = straighten(ct, "bilinear", -1000)
        write_volume(path, ct[0].numpy(), ct.affine.numpy(), np.int16)
        return path, series
    if job.kind == "RTSTRUCT" and series is None:
        raise InputError(
            f"RTSTRUCT {job.key} has contours and no grid, and the study has no CT series; send its CT, too"
        )
    path = work / "drawn.nii.gz"
    drawn: Any = read_mask(_object(job), series, chain.names)
    drawn = straighten(drawn, "nearest", 0)
    write_volume(path, drawn[0].numpy(), drawn.affine.numpy(), np.uint8)
    return path, series


def _series(job: Job, work: Path) -> Path | None:
    """A folder with the CT series of a job alone, linked from the study; None where the study has none."""
    found: dict[str, list[Path]] = {}
    scans: dict[str, Scan] = {}
    for path in sorted(Path(job.folder).glob("*.dcm")):
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TRIGGER_TAGS)
        except Exception as error:  # it came after the study was looked at, and the next look sets it aside
            logger.warning("%s is passed over, it cannot be read: %s", path, printable(error))
            continue
        if is_slice(ds):
            uid = str(ds.get("SeriesInstanceUID", ""))
            found.setdefault(uid, []).append(path)
            scans.setdefault(uid, Scan()).add(ds)
    wanted = job.key if job.kind == "CT" else needed_series(_object(job), scans)
    if wanted not in found:
        return None
    folder = work / "series"
    folder.mkdir()
    for path in found[wanted]:
        (folder / path.name).hardlink_to(path)
    return folder


def _object(job: Job) -> Path:
    """The SEG or RTSTRUCT of a job.

    Raises:
        InputError: it is not there any more.
    """
    path = Path(job.folder) / f"{uid_name(job.key)}.dcm"
    if not path.is_file():
        raise InputError(f"{job.kind} {job.key} is not in the spool any more; send it again")
    return path
