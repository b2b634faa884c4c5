"""A folder with one CT series in DICOM, read by MONAI and checked where MONAI only warns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.data import PydicomReader

from maisi_tools.errors import InputError
from maisi_tools.volumes.inputs import is_dicom

MAX_GAP_DEVIATION = 0.01
"""Largest deviation of one slice distance from the median one, as a share of it."""

MAX_GAP_ROUNDING_MM = 0.02
"""Deviation in mm that is always accepted: many scanners write positions with two decimals."""

GEOMETRY_TAGS = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")
SCANNED_TAGS = (*GEOMETRY_TAGS, "ImagePositionPatient", "Modality", "SeriesInstanceUID", "SeriesDescription")


class SeriesReader(PydicomReader):
    """MONAI's PydicomReader for a folder that holds exactly one complete CT series.

    Slices are put in the order of their position, whatever their InstanceNumber says; files that are not image slices
    (reports, structure sets, DICOMDIR) are passed over. Values come out in HU (rescale slope and intercept applied),
    the affine in RAS and mm.
    """

    def read(self, data: Any, **kwargs: Any) -> list:
        """Read the datasets of the folder `data`, in order of position.

        Raises:
            InputError: the folder is not one complete CT series.
        """
        folder = Path(data if isinstance(data, (str, Path)) else data[0])
        files = sorted(entry for entry in folder.iterdir() if is_dicom(entry))
        headers = [pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(SCANNED_TAGS)) for file in files]
        order = slice_order(folder, headers)
        slices = [pydicom.dcmread(files[index]) for index in order]
        for number, dataset in enumerate(slices, start=1):
            dataset.InstanceNumber = number  # the reader stacks by InstanceNumber
        self.has_series = True
        self.filenames: list[Any] = [[str(files[index]) for index in order]]
        return slices


def slice_order(folder: Path, headers: Sequence[Any]) -> list[int]:
    """Indices of the image slices among `headers` (pydicom datasets), sorted along the slice normal.

    Raises:
        InputError: no image slices, several series, another modality than CT, slices of unlike geometry, fewer than two
            slices, two slices in one place, or slice distances that differ (a missing slice).
    """
    found = [index for index, header in enumerate(headers) if "ImagePositionPatient" in header and "Rows" in header]
    if not found:
        raise InputError(
            f"{folder} holds {len(headers)} DICOM files and no image slice with a position; allowed is one CT series "
            "with one file per slice: convert multi-frame DICOM to NIfTI first"
        )
    series: dict[str, list[int]] = {}
    for index in found:
        series.setdefault(str(headers[index].get("SeriesInstanceUID", "without UID")), []).append(index)
    if len(series) > 1:
        listing = "; ".join(
            f"{uid} ({headers[members[0]].get('SeriesDescription', 'no description')}, {len(members)} slices)"
            for uid, members in series.items()
        )
        raise InputError(
            f"{folder} holds {len(series)} DICOM series: {listing}; allowed is one: put each into a folder of its own"
        )
    modality = headers[found[0]].get("Modality", "CT")
    if modality != "CT":
        raise InputError(f"{folder} holds a DICOM series of modality {modality}; allowed is CT: choose another series")
    for tag in GEOMETRY_TAGS:
        values = {str(headers[index].get(tag)) for index in found}
        if len(values) > 1 or values == {"None"}:
            raise InputError(
                f"{folder} holds slices whose {tag} is {', '.join(sorted(values)[:3])}; allowed is one value for the "
                "whole series: take localizers and reformats out of the folder"
            )
    if len(found) < 2:
        raise InputError(f"{folder} holds one DICOM slice; allowed is a series of at least two: give the whole series")
    row, column = np.asarray(headers[found[0]].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(row, column)
    positions = np.array([np.dot(np.asarray(headers[i].ImagePositionPatient, dtype=float), normal) for i in found])
    if not np.isfinite(positions).all():
        raise InputError(f"{folder} holds slices whose position is not finite; allowed are positions in mm")
    order = np.argsort(positions, kind="stable")
    _check_gaps(folder, positions[order])
    return [found[index] for index in order]


def _check_gaps(folder: Path, positions: np.ndarray) -> None:
    """Refuse sorted slice positions (mm) whose distances differ."""
    gaps = np.diff(positions)
    spacing = float(np.median(gaps))
    worst = int(np.argmax(np.abs(gaps - spacing)))
    if gaps.min() <= MAX_GAP_ROUNDING_MM / 2:
        at = positions[int(np.argmin(gaps))]
        raise InputError(
            f"{folder} holds two DICOM slices at the position {at:.2f} mm; allowed is one slice per position: "
            "take the copies (or the second phase) out of the folder"
        )
    if abs(gaps[worst] - spacing) > max(MAX_GAP_DEVIATION * spacing, MAX_GAP_ROUNDING_MM):
        raise InputError(
            f"{folder} has a gap of {gaps[worst]:.2f} mm between the DICOM slices at {positions[worst]:.2f} and "
            f"{positions[worst + 1]:.2f} mm, the others are {spacing:.2f} mm apart; allowed are equal distances (within"
            f" {MAX_GAP_DEVIATION:.0%}): add the missing slice, or resample the series and give it as NIfTI"
        )
