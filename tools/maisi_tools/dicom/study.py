"""Whole studies: a CT with its mask written as DICOM, and what a user has read as CT or mask."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import shutil
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import ArrayLike
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filewriter import correct_ambiguous_vr
from scipy import ndimage

from maisi_tools.dicom.ct import enhanced_ct, refer_to_sources, slice_headers, stored_values, to_lps, with_pixels
from maisi_tools.dicom.objects import KEPT_TAGS, MANUFACTURER, digest, new_study
from maisi_tools.dicom.painting import WITH_ITS_SERIES, paint
from maisi_tools.dicom.references import SERIES_TAGS, drawn_on, frames_of, scans_of, series_named
from maisi_tools.dicom.segmentation import segmentation, segments
from maisi_tools.dicom.structures import structure_set, structures
from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.masks.codes import read_roi_table
from maisi_tools.volumes.dicom_files import list_dicom, reading
from maisi_tools.volumes.grid import straight_grid
from maisi_tools.volumes.inputs import SUFFIXES, is_dicom, is_zip, study_dir
from maisi_tools.volumes.reading import sidecar_if_any
from maisi_tools.volumes.series import frame_of_reference, read_slices, series_files, slice_affine

logger = logging.getLogger(__name__)

STUDY_FILES = {"CT", "CT.dcm", "SEG.dcm", "RTSTRUCT.dcm"}
"""What a study's folder holds; of a folder with anything else, or with objects of others, nothing is ever replaced."""

PART = ".part-"
"""What the name of a folder begins with that is being written, or that a run left that was stopped."""


def write_study(
    folder: str | os.PathLike,
    hu: np.ndarray,
    affine: ArrayLike,
    mask: np.ndarray | None = None,
    source: str | os.PathLike | None = None,
    seed: int | None = None,
    conditions: Mapping[str, Any] | None = None,
    enhanced: bool = False,
    created: datetime.datetime | None = None,
    replace: bool = False,
    from_scan: bool = False,
    region: Sequence[Sequence[float]] = (),
) -> list[Path]:
    """Write a generated CT, and its mask, as a DICOM study.

    The CT goes to ``folder/CT/0001.dcm`` and so on (``folder/CT.dcm`` as Enhanced CT), the mask to ``SEG.dcm`` and
    ``RTSTRUCT.dcm``. They appear when all is written.

    Args:
        folder: to write; it must not exist, or be empty.
        hu: (X, Y, Z) in HU, in any orientation; stored as whole int16 numbers.
        affine: (4, 4) from voxels to RAS in mm.
        mask: (X, Y, Z) in MAISI's vocabulary, on the same grid.
        source: a CT series (folder, zip file, or the file of an Enhanced CT) whose patient, study and frame of
            reference the objects join. Without it they belong to a new, invented patient, and nothing of any other
            patient is in them.
        seed: of the volume, to be recorded.
        conditions: of the volume, to be recorded; JSON-able, and free of names of files and persons.
        enhanced: one Enhanced CT object instead of a series of slices.
        created: date and time to write, by default now. The UIDs follow from it and from the content, so that writing
            the same again for the same time gives the same bytes.
        replace: whether a study that this function wrote into `folder` before, and it alone, may be replaced.
        from_scan: whether the CT was computed from a patient's scan (reconstructed, edited), not from a mask or from
            noise. Then it needs `source`, and the objects do not say that they were not acquired from a patient.
        region: of an edited scan, on the scan's grid: two corners (RAS, mm) of the box outside of which all is as in
            `source`. The objects then say that they are partly synthetic, and where; slices name their sources.

    Returns:
        The files, CT first.

    Raises:
        InputError: a folder that is in use, a mask on another grid, values or axes that DICOM cannot hold, a source
            that is no CT series, or none where it is needed, or not the scan that the CT was computed from.
    """
    target = expanded(folder).resolve()  # of a link, what it leads to
    inside = _check_free(expanded(folder), replace)
    if mask is not None and mask.shape != hu.shape:
        raise InputError(f"the mask has the shape {mask.shape} and the CT {hu.shape}; allowed are both on one grid")
    turned, grid = to_lps(hu, affine)
    stored = stored_values(turned)
    labels = None if mask is None else to_lps(mask.astype(np.uint8), affine)[0]
    slices = None if source is None else read_slices(_check_series(source), pixels=False, tags=KEPT_TAGS)
    if from_scan and slices is not None:
        _check_place(hu, affine, slices)
    content = digest(stored, np.asarray(grid.affine), *(() if labels is None else (labels,)))
    created = (created or datetime.datetime.now()).replace(microsecond=0)
    with reading(str(source)):  # whose elements are read when they are asked for
        study = new_study(content, created, seed, conditions, slices, from_scan, region)

    # A folder that is there stays, since it may be the working directory or a disk of its own: it is written into.
    exists = target.exists()
    part = target / f"{PART}{os.getpid()}" if exists else target.with_name(f"{PART}{os.getpid()}-{target.name}")
    try:
        part.mkdir(parents=True)
        files = {}
        if enhanced:
            images = [enhanced_ct(stored, grid, study)]
            files["CT.dcm"] = images[0]
            _save(images[0], part / "CT.dcm")
        else:
            images = slice_headers(grid, study)
            if region and slices is not None:
                refer_to_sources(images, slices)
            (part / "CT").mkdir()
            for number, ds in enumerate(with_pixels(images, stored), start=1):
                files[f"CT/{number:04d}.dcm"] = images[number - 1]
                _save(ds, part / "CT" / f"{number:04d}.dcm")
        if labels is not None:
            files["SEG.dcm"] = segmentation(labels, images, study)
            files["RTSTRUCT.dcm"] = structure_set(labels, grid, images, study)
            for name in ("SEG.dcm", "RTSTRUCT.dcm"):
                _save(files[name], part / name)
        if exists:
            _clear(inside)
            for new in part.iterdir():
                new.rename(target / new.name)
        else:
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [expanded(folder) / name for name in files]


def remove_study(folder: str | os.PathLike) -> None:
    """Remove a study that :func:`write_study` wrote, and it alone; of a link, or a disk of its own, the folder stays.

    Raises:
        InputError: something else is in the folder.
    """
    folder = expanded(folder)
    _clear(_check_free(folder, replace=True))
    with contextlib.suppress(OSError):
        folder.rmdir()


def _clear(entries: Iterable[Path]) -> None:
    for old in entries:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def check_studies(items: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike, key: str = "image") -> None:
    """Refuse, before anything is computed, to write a study where something else is than a study of an earlier run.

    Args:
        items: inputs, see :func:`maisi_tools.volumes.inputs.find_inputs`.
        output_dir: where the studies go, see :func:`~maisi_tools.volumes.inputs.study_dir`.
        key: the entry of an item that holds the path.

    Raises:
        InputError: with the folder, and what is in it.
    """
    for item in items:
        _check_free(study_dir(item[key], output_dir), replace=True)


def _check_free(folder: Path, replace: bool) -> list[Path]:
    """What a new study in a folder takes the place of: nothing, or what an earlier run wrote or left half-written.

    Raises:
        InputError: something else is there.
    """
    if not folder.exists():
        return []
    inside = list(folder.iterdir()) if folder.is_dir() else []
    present = [entry for entry in inside if not entry.name.startswith(PART)]
    if not folder.is_dir() or (present and not replace):
        raise InputError(f"{folder} is there already; allowed is a new or empty folder: give another one")
    objects = [each for entry in present for each in (entry.iterdir() if entry.is_dir() else (entry,))]
    others = [entry for entry in present if entry.name not in STUDY_FILES] or [
        entry for entry in objects if not _is_ours(entry)
    ]
    if others:
        raise InputError(
            f"{others[0]} would have to make room for a study, and no earlier run wrote it; allowed is a folder that "
            "is new or empty, or has a study of an earlier run alone: move it away, or give another output_dir"
        )
    return inside


def _is_ours(path: Path) -> bool:
    """Whether a file is a DICOM object that :func:`write_study` wrote."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Manufacturer"])
    except (OSError, InvalidDicomError):
        return False
    return header.get("Manufacturer") == MANUFACTURER


SCANS = ("_recon.nii.gz", "_latent_ct.nii.gz")
"""Ends of the names of what maisi_vae makes of scans: reconstructions, and decoded latents of them."""


def is_of_scan(ct: str | os.PathLike) -> bool:
    """Whether a CT's file was computed from a scan, by what lies beside it, or else by its name."""
    said = sidecar_if_any(ct).get("from_scan")
    if isinstance(said, bool):
        return said
    name = os.fspath(ct).lower()
    return name.endswith(SCANS) or bool(edited_region(ct)) or not name.endswith(SUFFIXES)


def edited_region(ct: str | os.PathLike) -> list[list[float]]:
    """Of an edited scan's file the box that its sidecar names, see :func:`write_study`; empty for any other CT."""
    region = sidecar_if_any(ct).get("region")
    return region.get("box_ras_mm", []) if isinstance(region, dict) else []


def _check_place(hu: np.ndarray, affine: ArrayLike, slices: Sequence[Dataset]) -> None:
    """Refuse a CT that lies outside of the scan, as it is or straightened, that it is said to be computed from.

    Raises:
        InputError: with the two boxes.
    """
    shape, grid = (int(slices[0].Columns), int(slices[0].Rows), len(slices)), slice_affine(slices)
    own, (as_is, straight) = (
        _box(np.asarray(affine, dtype=float), hu.shape),
        (_box(grid, shape), _box(*straight_grid(grid, shape))),
    )
    scan = np.stack([np.minimum(as_is[0], straight[0]), np.maximum(as_is[1], straight[1])])
    voxel = max(np.linalg.norm(part[:3, :3], axis=0).max() for part in (np.asarray(affine), grid))
    if (own[0] < scan[0] - voxel).any() or (own[1] > scan[1] + voxel).any():
        words = " and ".join(f"from {box[0].round(1).tolist()} to {box[1].round(1).tolist()}" for box in (own, scan))
        raise InputError(
            f"the CT and the source series reach {words} (RAS, mm); allowed as source is the scan that the CT was "
            "computed from, in which it lies"
        )


def _box(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The two corners, RAS in mm, of the box about the centres of a grid's voxels."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in shape))))
    placed = corners @ affine[:3, :3].T + affine[:3, 3]
    return np.stack([placed.min(0), placed.max(0)])


def read_mask(
    path: str | os.PathLike,
    series: str | os.PathLike | None = None,
    names: str | os.PathLike | None = None,
    series_uid: str | None = None,
) -> MetaTensor:
    """Read a DICOM Segmentation or RT Structure Set as a mask in MAISI's vocabulary.

    Segments are known by their SNOMED CT code, else by their name; ROIs by their name. Where structures overlap, the
    smaller one is taken; those that are unknown are listed in the log and left out.

    Args:
        path: the file, or a folder or zip file that holds it alone.
        series: the CT series (folder, zip file, or the file of an Enhanced CT) it was drawn on, whose grid the mask
            gets. A structure set needs it; a segmentation without it keeps its own grid.
        series_uid: of that series, where there are several and the file names none of them.
        names: JSON table of names, see :func:`maisi_tools.masks.codes.read_roi_table`.

    Returns:
        MetaTensor (1, X, Y, Z), uint8, with its affine to RAS in mm.

    Raises:
        InputError: another kind of file, another frame of reference than the series', or no known structure.
    """
    ds = read_single(path)
    table = {} if names is None else read_roi_table(names)
    with reading(str(path)):
        slices = None if series is None else _referenced_slices(ds, _check_series(series), series_uid, str(path))
        return _read_mask(ds, path, slices, table)


def _read_mask(
    ds: Dataset, path: str | os.PathLike, slices: Sequence[Dataset] | None, table: Mapping[str, int]
) -> MetaTensor:
    if ds.Modality == "SEG":
        found, affine, shape, unknown = segments(ds, table, slices)
        mask = paint(found, shape, unknown, str(path))
        if slices is not None:
            grid = slice_affine(slices)
            mask = _on_grid(mask, affine, grid, (int(slices[0].Columns), int(slices[0].Rows), len(slices)), str(path))
            affine = grid
    else:
        if slices is None:
            raise InputError(f"{path} is a structure set, which has contours and no grid; {WITH_ITS_SERIES}")
        found, unknown, undrawn = structures(ds, slices, table)
        shape = int(slices[0].Columns), int(slices[0].Rows), len(slices)
        mask, affine = paint(found, shape, unknown, str(path), undrawn), slice_affine(slices)
    meta = {"filename_or_obj": str(path)}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(mask))[None], affine=torch.as_tensor(affine), meta=meta)


def is_mask(path: str | os.PathLike) -> bool:
    """Whether `path` is a DICOM file that holds a mask, or a folder with nothing but one.

    Raises:
        InputError: there is no such file.
    """
    _check_exists(path)
    try:
        read_single(path)
    except InputError:
        return False
    return True


def _check_exists(path: str | os.PathLike) -> Path:
    file = expanded(path)
    if not file.exists():
        raise InputError(f"{file} does not exist; correct the path")
    return file


def _check_series(path: str | os.PathLike) -> Path:
    """Refuse what holds no DICOM by its kind.

    Raises:
        InputError: it is not there, or is another file.
    """
    series = _check_exists(path)
    if not series.is_dir() and not is_zip(series) and not is_dicom(series):
        raise InputError(
            f"{series} is no DICOM; allowed is the folder of a CT series, a zip file of it, or the file of an Enhanced "
            "CT"
        )
    return series


def read_single(path: str | os.PathLike) -> Dataset:
    """The Segmentation or RT Structure Set in a file, or in a folder or zip file that holds one DICOM file.

    Raises:
        InputError: there is none.
    """
    file = _check_exists(path)
    files = list_dicom(file)
    head = files[0].read(stop_before_pixels=True) if len(files) == 1 else None
    if head is None or head.get("Modality") not in ("SEG", "RTSTRUCT"):
        raise InputError(f"{file} is no DICOM Segmentation and no RT Structure Set; allowed is one of these")
    if head.Modality == "RTSTRUCT":
        return head
    files[0].check_claim(head)
    return files[0].read()


class WriteStudyd(MapTransform):
    """MONAI dict transform: writes a generated CT as a DICOM study, see :func:`write_study`.

    Args:
        keys: of the CT (1, X, Y, Z) in HU; the study goes to :func:`~maisi_tools.volumes.inputs.study_dir`, in
            place of one written before.
        output_dir: folder, made if missing.
        mask_key: of the mask (1, X, Y, Z) in the vocabulary, on the CT's grid; None for none.
        seed, conditions: to be recorded.
        source_key: of the item's entry with the source series' path; None for a new patient.
        enhanced: one Enhanced CT object instead of slices.
        numbering: of the mask when it comes here; DICOM's codes are those of the vocabulary.
        from_scan: whether the CT was computed from the scan under `source_key`.

    Raises:
        InputError: another numbering than "vocabulary".
    """

    def __init__(
        self,
        keys: str,
        output_dir: str | os.PathLike,
        mask_key: str | None = None,
        seed: int | None = None,
        conditions: Mapping[str, Any] | None = None,
        source_key: str | None = None,
        enhanced: bool = False,
        numbering: str = "vocabulary",
        from_scan: bool = False,
    ) -> None:
        super().__init__(keys)
        if numbering != "vocabulary":
            raise InputError(
                f"output_labels is {numbering!r}; allowed with DICOM output is 'vocabulary', which has codes"
            )
        self.output_dir, self.mask_key, self.source_key = expanded(output_dir), mask_key, source_key
        self.seed, self.conditions, self.enhanced, self.from_scan = seed, conditions, enhanced, from_scan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the study of one item.

        Raises:
            InputError: see :func:`write_study`.
        """
        for key in self.key_iterator(data):
            volume = data[key]
            mask = None if self.mask_key is None else data[self.mask_key][0].cpu().numpy()
            source = None if self.source_key is None else data[self.source_key]
            write_study(
                study_dir(volume.meta["filename_or_obj"], self.output_dir),
                volume[0].float().cpu().numpy(),
                volume.affine.cpu().numpy(),
                mask,
                source,
                self.seed,
                self.conditions,
                self.enhanced,
                replace=True,
                from_scan=self.from_scan,
            )
        return dict(data)


def _save(ds: Dataset, path: Path) -> None:
    ds = correct_ambiguous_vr(ds, is_little_endian=True)
    # As if it had been read like this, so that pydicom writes a source's texts as they are stored.
    ds.set_original_encoding(False, True, convert_encodings(ds.get("SpecificCharacterSet") or default_encoding))
    ds.save_as(path, enforce_file_format=True)


def _referenced_slices(ds: Dataset, series: Path, series_uid: str | None, name: str) -> Sequence[Dataset]:
    """The slices of the series that a mask was drawn on.

    Args:
        ds: the mask's header.
        series: folder or zip file.
        series_uid: to take where it names none of those in it.
        name: of the mask's file, for messages.

    Raises:
        InputError: another frame of reference, or several series of which none is named.
    """
    uids, tags = series_named(ds), list(SERIES_TAGS)
    heads = [file.read(stop_before_pixels=True, specific_tags=tags) for file in series_files(series)]
    chosen, is_named = drawn_on(ds, scans_of(heads))
    slices = read_slices(series, series_uid or (chosen if is_named else None), pixels=False)
    if uids and not is_named:
        logger.warning(
            "%s was drawn on the series %s, and %s has others: it is taken for one of the same frame of reference",
            *(name, ", ".join(uids), series),
        )
    theirs, own = frame_of_reference(slices), frames_of(ds)
    if theirs not in own:
        raise InputError(
            f"the mask lies in the frame of reference {', '.join(sorted(own))} and {series} in {theirs}; "
            "allowed is the series that it was drawn on"
        )
    return slices


def _on_grid(
    mask: np.ndarray, affine: np.ndarray, grid: np.ndarray, shape: tuple[int, int, int], name: str
) -> np.ndarray:
    """The mask on another grid, each voxel with the label nearest to it; what lies outside of it is said."""
    to_mask = np.round(np.linalg.inv(affine) @ grid, 6)
    if mask.shape == shape and np.allclose(to_mask, np.eye(4), atol=1e-3):
        return mask
    drawn = np.argwhere(mask) @ np.linalg.inv(to_mask)[:3, :3].T + np.linalg.inv(to_mask)[:3, 3]
    outside = np.count_nonzero(((drawn < -0.5) | (drawn > np.array(shape) - 0.5)).any(axis=1))
    if outside:
        logger.warning("%s: %.0f %% of what it draws lies outside of the series", name, 100 * outside / len(drawn))
    return ndimage.affine_transform(mask, to_mask[:3, :3], to_mask[:3, 3], shape, order=0, mode="grid-constant")
