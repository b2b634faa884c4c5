"""NIfTI files: where the header becomes a grid in mm, in one place, and the voxels are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import (
    AGREES,
    check_affine,
    check_shape,
    check_stored_type,
    distance_in_voxels,
    warn_sheared,
)
from maisi_tools.volumes.stored import check_memory, read_end, read_voxels, skip, without_single_axes

logger = logging.getLogger(__name__)

UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""xyzt_units & 7 -> mm: NIFTI_UNITS_UNKNOWN (taken for mm), _METER, _MM, _MICRON."""

XFORM_CODES = range(6)
"""qform_code and sform_code of NIfTI: unknown, scanner, aligned, Talairach, MNI 152, other template."""


def read_nifti(path: str | os.PathLike, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI file (1 or 2; .nii or .nii.gz) and check what its header claims before anything is allocated.

    Args:
        path: of the file.
        kind: "ct", "mask" or "latent", see :func:`~maisi_tools.volumes.checks.check_shape`.

    Returns:
        Values (X, Y, Z), or (X, Y, Z, C) for a latent, float32, and the affine (4, 4) to RAS in mm. Further axes of one
        voxel are dropped.

    Raises:
        InputError: the header is not of a volume of that kind, or claims more than the file holds.
        Exception: what nibabel and the decompressors raise for a damaged file.
    """
    image, values, affine = read_stored_nifti(path, kind)
    stored: Any = image.dataobj
    if (stored.slope, stored.inter) != (1, 0):
        values = values * float(stored.slope) + float(stored.inter)
    return values.astype(np.float32), affine


def read_stored_nifti(path: str | os.PathLike, kind: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """As :func:`read_nifti`, with nibabel's image before the voxels, and these as they are stored: in the file's type,
    without its slope and intercept."""
    name = str(path)
    shape, affine = read_nifti_grid(path, kind)
    image: Any = nib.load(path)
    stored: Any = image.dataobj
    if stored.offset < (least := int(image.header["sizeof_hdr"])):
        raise InputError(
            f"{name} says that its voxels begin at byte {stored.offset}, inside its header of {least}; allowed is a "
            "NIfTI file as the standard has it: write it anew"
        )
    check_stored_type(stored.dtype, name)
    check_memory(shape, name)
    opened: Any = nib.openers.ImageOpener(name)
    with opened as file:
        skip(file, int(stored.offset))
        values = read_voxels(file, shape, stored.dtype, name)
        read_end(file, values.nbytes, name)
    return image, values, affine


def read_nifti_grid(path: str | os.PathLike, kind: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a NIfTI file, from its header alone; see :func:`read_nifti`."""
    image: Any = nib.load(path)
    header_class: Any = type(image.header)
    with nib.openers.ImageOpener(str(path)) as file:
        header = header_class.from_fileobj(file, check=False)  # nib.load repairs what it finds wrong, without a word
    shape = without_single_axes(image.shape)
    check_shape(shape, kind, str(path))
    return shape, nifti_affine(header, shape, str(path))


def nifti_affine(header: Any, shape: Sequence[int], name: str) -> np.ndarray:
    """The affine (4, 4) of a NIfTI header from voxels to RAS in mm, as the standard has it (nifti1.h).

    The sform where its code is above 0, else the qform where its code is, else the spacing alone (method 1), with a
    warning. Where both are set and lie further apart than :data:`~maisi_tools.volumes.checks.AGREES` anywhere in the
    volume, a warning names both.

    Args:
        header: as it is in the file (``from_fileobj(file, check=False)``).
        shape: voxels along x, y, z (further axes are not looked at).
        name: of the file.

    Raises:
        InputError: an unknown code or unit, a spacing that is none, or axes that span no volume.
    """
    qform_code, sform_code = int(header["qform_code"]), int(header["sform_code"])
    for field, code in (("qform_code", qform_code), ("sform_code", sform_code)):
        if code not in XFORM_CODES:
            raise InputError(
                f"{name} has the {field} {code}; allowed are 0 to {XFORM_CODES[-1]}: correct the header, with nibabel "
                "by img.set_sform(affine, code=1)"
            )
    unit = int(header["xyzt_units"]) & 7
    if unit not in UNIT_MM:
        raise InputError(
            f"{name} has the spatial unit {unit} (xyzt_units); allowed are 1 (metre), 2 (mm), 3 (micron) and 0, which "
            "is taken for mm: correct the header, with nibabel by img.header.set_xyzt_units('mm')"
        )
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise InputError(
            f"{name} has the spacing {' x '.join(f'{mm:g}' for mm in pixdim)} mm in its header (pixdim); allowed are "
            "positive finite values: correct the header, with nibabel by img.header.set_zooms"
        )
    sform = np.vstack([header["srow_x"], header["srow_y"], header["srow_z"], [0, 0, 0, 1]]).astype(float)
    if sform_code:
        affine = sform
    elif qform_code:
        affine = _qform(header, name)
    else:
        logger.warning(
            "%s has neither sform nor qform: where it lies and which way it looks is not known; its axes are taken for "
            "right, anterior, superior, and its first voxel for the origin",
            name,
        )
        affine = np.diag([*pixdim, 1.0])
    check_affine(affine, name)
    warn_sheared(affine, name)
    if sform_code and qform_code:
        _compare(sform, header, shape, name)
    return np.diag([UNIT_MM[unit]] * 3 + [1.0]) @ affine


def _compare(sform: np.ndarray, header: Any, shape: Sequence[int], name: str) -> None:
    try:
        qform = _qform(header, name)
    except InputError as error:
        logger.warning("%s; its sform is used", error)
        return
    if (apart := distance_in_voxels(qform, sform, shape[:3])) > AGREES:
        logger.warning(
            "%s: its qform %s and its sform %s lie up to %.3g voxels apart; the sform is used",
            name,
            np.round(qform[:3], 4).tolist(),
            np.round(sform[:3], 4).tolist(),
            apart,
        )


def _qform(header: Any, name: str) -> np.ndarray:
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # nifti1.h: another value means 1
    try:
        qform = np.asarray(header.get_qform(coded=False), dtype=float)
    except (ValueError, HeaderDataError) as error:
        raise InputError(
            f"{name} has a qform that is no rotation ({error}); allowed are quaternions of length 1: correct the header"
        ) from error
    if not np.isfinite(qform).all():
        raise InputError(f"{name} has a qform that is not finite; allowed are finite numbers: correct the header")
    return qform
