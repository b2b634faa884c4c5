"""Reading a CT, a mask or a latent; whatever is wrong with the file is an InputError that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
from monai.config import KeysCollection
from monai.data import ImageReader, MetaTensor, NibabelReader, NrrdReader
from monai.transforms import EnsureChannelFirst, MapTransform, Orientation
from monai.utils import ImageMetaKey, MetaKeys

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import (
    check_affine,
    check_ct_intensities,
    check_finite,
    check_mask_values,
    check_shape,
)
from maisi_tools.volumes.grid import same_grid
from maisi_tools.volumes.inputs import SUFFIXES, holds_dicom, is_zip, stem_of
from maisi_tools.volumes.latents import checked_sidecar
from maisi_tools.volumes.series import SeriesReader

KINDS = ("ct", "mask", "latent")

NRRD_SPACES = ("left-posterior-superior", "right-anterior-superior")
"""The NRRD spaces that MONAI brings to RAS; it would take any other for RAS unseen."""


def read_volume(
    path: str | os.PathLike, kind: str, intensity_check: bool = True, series_uid: str | None = None
) -> MetaTensor:
    """Read one volume and check it.

    Args:
        path: .nii, .nii.gz or .nrrd; for kind "ct" also a folder or zip file of one DICOM series.
        kind: "ct" (HU), "mask" (label values) or "latent" (four channels on the file's last axis).
        intensity_check: whether values of a CT must look like HU.
        series_uid: Series Instance UID to take where a folder or zip file holds several.

    Returns:
        MetaTensor (C, X, Y, Z), float32, C = 1 or, for a latent, 4; affine (4, 4) from voxels to RAS in mm, the axes
        as in the file; ``meta["filename_or_obj"]`` is the path. A latent's ``meta["sidecar"]`` is the dict of its JSON
        sidecar, without entries that are null, which MONAI's collation could not carry; its "factor" is
        :data:`~maisi_tools.volumes.checks.UNRECORDED_FACTOR` where the file has none.

    Raises:
        InputError: the file is missing, damaged, or not a volume of that kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    path = Path(path).expanduser()
    reader = _reader_for(path, kind, series_uid)
    try:
        if isinstance(reader, NibabelReader):
            _check_nifti_header(path)
        elif isinstance(reader, NrrdReader):
            _check_nrrd_header(path)
        values, meta = reader.get_data(reader.read(str(path)))
        values = values.astype(np.float32)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes the libraries raise nearly anything
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}); allowed is an intact NIfTI, NRRD or DICOM "
            "series: copy or export the file again"
        ) from error
    axes = 4 if kind == "latent" else 3
    while values.ndim > axes and values.shape[-1] == 1:
        values = values[..., 0]
    check_shape(values.shape, kind, str(path))
    check_affine(meta[MetaKeys.AFFINE], str(path))
    check_finite(values, str(path))
    if kind == "ct" and intensity_check:
        check_ct_intensities(values, str(path))
    if kind == "mask":
        check_mask_values(values, str(path))
    if kind == "latent":
        sidecar = {name: value for name, value in read_sidecar(path).items() if value is not None}
        meta["sidecar"] = checked_sidecar(sidecar, values.shape[:3], meta[MetaKeys.AFFINE], str(path))
    meta[ImageMetaKey.FILENAME_OR_OBJ] = str(path)
    # Not by LoadImage, which makes every reader MONAI has, and these warn of decoders that are not installed.
    volume = MetaTensor.ensure_torch_and_prune_meta(values, meta)
    channel_first: Any = EnsureChannelFirst(channel_dim=-1 if kind == "latent" else "no_channel")(volume)
    return channel_first.contiguous()


class ReadVolumed(MapTransform):
    """MONAI dict transform: replaces the path under each key by the volume, see :func:`read_volume`."""

    def __init__(
        self, keys: KeysCollection, kind: str, intensity_check: bool = True, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
        self.kind, self.intensity_check = kind, intensity_check

    def __call__(self, data: Mapping[Any, Any]) -> dict:
        """Read the keys of one item.

        Raises:
            InputError: see :func:`read_volume`.
        """
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = read_volume(items[key], self.kind, self.intensity_check)
        return items


def read_ras(path: str | os.PathLike, kind: str, like: MetaTensor | None = None) -> MetaTensor:
    """Read a volume (1, X, Y, Z), turn it to RAS, and make sure that it lies on the grid of another.

    Args:
        path: see :func:`read_volume`.
        kind: "ct" or "mask".
        like: a volume in RAS.

    Raises:
        InputError: the file cannot be read as that kind, or its grid is not that of `like`.
    """
    volume: Any = Orientation(axcodes="RAS", labels=None)(read_volume(path, kind))
    if like is not None and not same_grid(volume, like):
        raise InputError(
            f"{path} lies on another grid than {like.meta.get('filename_or_obj', 'the volume it is compared with')} "
            f"({tuple(volume.shape[1:])} and {tuple(like.shape[1:])} voxels, in RAS); allowed is one grid for both: "
            "resample one to the other"
        )
    return volume


def sidecar_path(path: str | os.PathLike) -> Path:
    """Where a volume's JSON sidecar lies: beside it, same stem, suffix .json."""
    return Path(path).with_name(stem_of(path) + ".json")


def read_sidecar(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON sidecar of the volume file `path`.

    Raises:
        InputError: it is missing or holds no JSON object.
    """
    beside = sidecar_path(path)
    do = "keep the .json that the encode config wrote beside the volume, under the same name"
    try:
        content = json.loads(beside.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} has no sidecar {beside.name} beside it; a latent needs one: {do}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"sidecar {beside} cannot be read as JSON ({error}); allowed is a JSON object: {do}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"sidecar {beside} holds a {type(content).__name__}; allowed is a JSON object: {do}")
    return content


def _reader_for(path: Path, kind: str, series_uid: str | None) -> ImageReader:
    allowed = ".nii or .nii.gz" if kind == "latent" else ", ".join(SUFFIXES)
    allowed += " or a folder or zip file of one DICOM series" if kind == "ct" else ""
    if not path.exists():
        raise InputError(f"{path} does not exist; allowed is {allowed}: correct the path")
    name = path.name.lower()
    if path.is_dir() or is_zip(path):
        if kind == "ct" and holds_dicom(path):
            return SeriesReader(series_uid)
        what = "folder" if path.is_dir() else "zip file"
        raise InputError(f"{path} is a {what} and holds no DICOM series; allowed as {kind} is {allowed}")
    if name.endswith((".nii", ".nii.gz")):
        return NibabelReader()
    if name.endswith(".nrrd") and kind != "latent":
        return NrrdReader(dtype=np.float32)  # its default, int64, would cut fractions and turn NaN into a number
    raise InputError(f"{path} has an unsupported file type; allowed as {kind} is {allowed}: convert it to NIfTI")


def _check_nifti_header(path: Path) -> None:
    """Refuse the spacings that nibabel would repair silently on loading (zero to 1 mm, negative to positive)."""
    header_class: Any = type(nib.load(path).header)
    with nib.openers.ImageOpener(str(path)) as file:
        header = header_class.from_fileobj(file, check=False)
    axes = min(3, int(header["dim"][0]))
    pixdim = np.asarray(header["pixdim"][1 : 1 + axes], dtype=float)
    if not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise InputError(
            f"{path} has the spacing {' x '.join(f'{mm:g}' for mm in pixdim)} mm in its header (pixdim); allowed are "
            "positive finite values: correct the header, with nibabel by img.header.set_zooms"
        )
    if int(header["sform_code"]) > 0 and axes == 3:
        check_affine(np.vstack([header["srow_x"], header["srow_y"], header["srow_z"], [0, 0, 0, 1]]), str(path))


def _check_nrrd_header(path: Path) -> None:
    """Refuse headers whose geometry MONAI cannot turn into an affine, or would take for another one."""
    header = nrrd.read_header(str(path))
    if missing := [field for field in ("space directions", "space origin") if field not in header]:
        raise InputError(
            f"{path} has no {' and no '.join(missing)} in its header; allowed is an NRRD with both: export it from a "
            "program that knows the patient's position, or convert it to NIfTI"
        )
    if header.get("space", NRRD_SPACES[0]) not in NRRD_SPACES:
        raise InputError(
            f"{path} has the space {header['space']!r}; allowed are {' and '.join(NRRD_SPACES)}: convert it to NIfTI"
        )
