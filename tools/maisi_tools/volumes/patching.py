"""A volume's stored voxels, some of them changed and all others as they were, to the last bit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from maisi_tools.files import expanded, replacing
from maisi_tools.volumes.checks import whole_labels
from maisi_tools.volumes.nifti import read_stored_nifti
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.stored import read_whole
from maisi_tools.volumes.writing import write_volume


@dataclass
class Stored:
    """The voxels of a file as they are stored; a NIfTI's with the header that belongs to them.

    Attributes:
        values: (X, Y, Z) in the file's order and type.
        affine: (4, 4) from voxels to RAS in mm.
        slope, intercept: ``slope * value + intercept`` is what the value means.
        image: of a NIfTI, None for other files.
    """

    values: np.ndarray
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    image: Any = None

    def ras(self) -> np.ndarray:
        """The values with RAS axes; a view, so that what is written into it is written into the volume."""
        return to_ras(self.values, self.affine)

    def meant(self) -> np.ndarray:
        """What the values mean, in the first of int16, float32 and float64 that holds each of them exactly."""
        meant = self.values
        if (self.slope, self.intercept) != (1.0, 0.0):
            meant = self.slope * meant.astype(np.float64) + self.intercept
        for kind in (np.int16, np.float32):
            with np.errstate(invalid="ignore", over="ignore"):  # what does not fit is not equal
                cast = meant.astype(kind)
            if (cast == meant).all():
                return cast
        return meant.astype(np.float64)

    def stored(self, meant: np.ndarray) -> np.ndarray:
        """Values as they are stored, from what they are to mean; integers are rounded and clipped to their range."""
        values = (np.asarray(meant, dtype=np.float64) - self.intercept) / self.slope
        kind = self.values.dtype
        if np.issubdtype(kind, np.integer):
            values = np.rint(values).clip(np.iinfo(kind).min, np.iinfo(kind).max)
        return values.astype(kind)


def to_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A view of (X, Y, Z) with its axes in the order and the directions nearest to RAS."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt("RAS"))
    return apply_orientation(array, turn)


def ras_affine(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The affine of what :func:`to_ras` gives of an array of `shape`."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt("RAS"))
    return np.asarray(affine, dtype=float) @ nib.orientations.inv_ornt_aff(turn, shape)


def read_stored(path: str | os.PathLike, kind: str) -> Stored:
    """The stored voxels of a volume, for :func:`write_stored`.

    Args:
        path: NIfTI or NRRD; for kind "ct" also a DICOM series, whose HU are taken, as int16 where all are whole.
        kind: "ct" or "mask", whose values are its labels: without a slope, since between those of a slope that fills a
            type with the labels of a file there is no number for another label.

    Raises:
        InputError: see :func:`~maisi_tools.volumes.reading.read_volume`.
    """
    path = expanded(path)
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        image, values, affine = read_whole(path, lambda: read_stored_nifti(path, kind))
        slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
        stored = Stored(values, affine, slope, intercept, image)
        if kind == "ct" or (slope, intercept) == (1.0, 0.0):
            return stored
        labels = whole_labels(stored.meant(), str(path))
        fits = np.promote_types(values.dtype, np.min_scalar_type(int(labels.max())))
        return Stored(labels.astype(fits), affine, image=image)
    volume: Any = read_volume(path, kind)
    affine = np.asarray(volume.affine, dtype=float)
    read = volume[0].numpy()
    if name.endswith(".nrrd") and path.is_file():
        values = nrrd.read(str(path))[0].reshape(read.shape)
        # NIfTI has the types of NRRD but for bool; a byte order of its own is the machine's.
        return Stored(np.array(values, dtype=values.dtype.newbyteorder("=")), affine)
    limits = np.iinfo(np.int16)
    whole = (read == np.rint(read)).all() and limits.min <= read.min() and read.max() <= limits.max
    return Stored(read.astype(np.int16) if whole else read, affine)


def write_stored(path: str | os.PathLike, volume: Stored) -> Path:
    """Write what :func:`read_stored` gave as NIfTI: type, scaling and geometry as in the file it came from."""
    if volume.image is None:
        return write_volume(path, volume.values, volume.affine, volume.values.dtype)
    header = volume.image.header.copy()
    header.set_data_dtype(volume.values.dtype)
    image = type(volume.image)(volume.values, None, header)
    image.header.set_slope_inter(volume.slope, volume.intercept)
    with replacing(path) as part:
        nib.save(image, part)
    return Path(path)
