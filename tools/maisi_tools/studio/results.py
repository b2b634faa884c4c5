"""What a finished job gives: volumes for the page, files, a picture, DICOM."""

from __future__ import annotations

import gzip
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Orientation

from maisi_tools.errors import InputError
from maisi_tools.files import replacing
from maisi_tools.report.preview import load_image, preview
from maisi_tools.report.run_report import viewer_labels
from maisi_tools.studio.folders import JOB
from maisi_tools.volumes.reading import check_voxels, read_volume

TYPES = {"ct": (np.int16, np.float32), "mask": (np.uint8,), "before": (np.int16, np.float32)}
"""Of a volume's values for the page: the first that holds them."""


def raw(path: Path, what: str) -> tuple[dict[str, Any], bytes]:
    """A volume as the page takes it: what ``X-Volume`` says, and its values, packed by gzip, x fastest, in RAS.

    Args:
        path: of a NIfTI file; of "before" of whatever was uploaded.
        what: one of :data:`TYPES`.

    Raises:
        InputError: it cannot be read.
    """
    check_voxels(path)
    volume: Any = Orientation(axcodes="RAS", labels=None)(read_volume(path, "mask" if what == "mask" else "ct"))
    values = volume[0].numpy()
    kind = next((kind for kind in TYPES[what] if np.array_equal(values.astype(kind), values)), TYPES[what][-1])
    shown: dict[str, Any] = {
        "size": list(values.shape),
        "spacing": [round(float(mm), 6) for mm in volume.pixdim],
        "type": np.dtype(kind).name,
        "labels": {},
    }
    if what == "mask":
        shown["labels"] = viewer_labels(values)
    return shown, gzip.compress(values.astype(kind).tobytes(order="F"), 1, mtime=0)


def files_of(folder: Path) -> list[Path]:
    """The files of a job that can be downloaded; none where its folder was removed."""
    return sorted(path for path in folder.glob("*") if path.is_file() and path.name[0] != "." and path.name != JOB)


def picture(folder: Path, volumes: Mapping[str, Path]) -> Path:
    """Three planes of a job's CT as PNG; drawn once.

    Raises:
        InputError: there is no CT.
    """
    path = folder / ".picture.png"
    if "ct" not in volumes:
        raise InputError("this job made a mask; there is a picture of a CT only")
    return path if path.is_file() else preview(volumes["ct"], volumes["mask"], path)


def without_dicom(folder: Path, volumes: Collection[str], request: Mapping[str, Any]) -> str | None:
    """Why there is no DICOM of a job, in plain words; None where there is.

    An edited scan that came as DICOM stays with its patient; one that came otherwise has no patient to stay with.
    """
    if "ct" not in volumes:
        return "this job made a mask; there is DICOM of a CT only"
    if request["source"]["kind"] == "ct" and not any(folder.glob("*_dicom")):
        return "the edited scan shows a patient and was no DICOM, so there is none to join; upload its series"
    return None


def dicom(folder: Path, volumes: Mapping[str, Path], request: Mapping[str, Any], finished: str) -> Path:
    """A zip file with a job's CT and its mask as DICOM, marked synthetic; written once.

    Raises:
        InputError: there is none, see :func:`without_dicom`.
    """
    path = folder / ".dicom.zip"
    if path.is_file():
        return path
    if (why := without_dicom(folder, volumes, request)) is not None:
        raise InputError(why)
    if studies := list(folder.glob("*_dicom")):
        _zip(path, lambda archive: _add(archive, studies[0]))
        return path
    import datetime

    from maisi_tools.dicom.objects import recordable
    from maisi_tools.dicom.study import write_study

    ct, mask = (load_image(volumes[what], what) for what in ("ct", "mask"))
    with tempfile.TemporaryDirectory(prefix="maisi-") as scratch:
        study = Path(scratch) / "dicom"
        conditions = {name: value for name, value in request["settings"].items() if name not in ("seed", "device")}
        write_study(
            study,
            np.asarray(ct.dataobj),
            ct.affine,
            np.asarray(mask.dataobj),
            seed=request["settings"]["seed"],
            conditions=recordable({"bundle": "maisi_controlnet", **conditions}),
            created=datetime.datetime.fromisoformat(finished).replace(tzinfo=None),
        )
        _zip(path, lambda archive: _add(archive, study))
    return path


def pairs(path: Path, jobs: Mapping[str, Mapping[str, Path]], image: str, label: str) -> None:
    """Write a zip file with the CT and the mask of each job, NIfTI with the endings that are asked for.

    Args:
        path: of the zip file.
        jobs: id -> volumes.
        image, label: ".nii.gz" or ".nii".
    """

    def write(archive: zipfile.ZipFile) -> None:
        for id, volumes in jobs.items():
            for what, ending, name in (("ct", image, "image"), ("mask", label, "label")):
                content = volumes[what].read_bytes()
                archive.writestr(
                    f"sample_{id}_{name}{ending}", content if ending == ".nii.gz" else gzip.decompress(content)
                )

    _zip(path, write)


def _zip(path: Path, write: Callable[[zipfile.ZipFile], None]) -> None:
    with replacing(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        write(archive)


def _add(archive: zipfile.ZipFile, folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            archive.write(file, file.relative_to(folder))
