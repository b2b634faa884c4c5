"""Reading a CT, a mask or a latent; whatever is wrong with the file is an InputError that names it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys

from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.volumes.checks import (
    check_affine,
    check_ct_intensities,
    check_finite,
    check_labels,
    check_shape,
    whole_labels,
)
from maisi_tools.volumes.dicom_files import reading
from maisi_tools.volumes.grid import grid_difference
from maisi_tools.volumes.inputs import SUFFIXES, holds_dicom, is_dicom, is_zip, sidecar_path
from maisi_tools.volumes.latents import checked_sidecar
from maisi_tools.volumes.limits import check_limit
from maisi_tools.volumes.nifti import read_nifti
from maisi_tools.volumes.nrrd_file import read_header, read_nrrd
from maisi_tools.volumes.series import SeriesReader
from maisi_tools.volumes.stored import last_axis_fastest, read_whole, without_single_axes

KINDS = ("ct", "mask", "latent")


def read_volume(
    path: str | os.PathLike,
    kind: str,
    intensity_check: bool = True,
    series_uid: str | None = None,
    modalities: Sequence[str] | None = None,
) -> MetaTensor:
    """Read one volume and check it.

    Args:
        path: .nii, .nii.gz or .nrrd; for kind "ct" also a folder or zip file of one DICOM series, or the file of an
            Enhanced CT or MR.
        kind: "ct" (HU), "mask" (label values) or "latent" (four channels on the file's last axis).
        intensity_check: whether it must be a CT, with values that look like HU; else it may be an MR.
        series_uid: Series Instance UID to take where a folder or zip file holds several.
        modalities: that a DICOM series may have; by default "CT", without `intensity_check` also "MR".

    Returns:
        MetaTensor (C, X, Y, Z), float32, C = 1 or, for a latent, 4; affine (4, 4) from voxels to RAS in mm, the axes
        as in the file; ``meta["filename_or_obj"]`` is the path. A latent's ``meta["sidecar"]`` is the dict of its JSON
        sidecar, without entries that are null, which MONAI's collation could not carry; its "factor" is
        :data:`~maisi_tools.volumes.checks.UNRECORDED_FACTOR` where the file has none.

    Raises:
        InputError: the file is missing, damaged, or not a volume of that kind.
        OSError: the disk failed while it was read (EIO, ESTALE; of DICOM, whatever the system reports).
        MemoryError: a DICOM series did not fit into it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    path = expanded(path)
    values, affine = _read(path, kind, series_uid, modalities or (("CT",) if intensity_check else ("CT", "MR")))
    check_shape(values.shape, kind, str(path))
    check_affine(affine, str(path))
    check_finite(values, str(path))
    if kind == "ct" and intensity_check:
        check_ct_intensities(values, str(path))
    if kind == "mask":
        values = whole_labels(values, str(path))
        check_labels(values, str(path))
    meta: dict[str, Any] = {}
    if kind == "latent":
        sidecar = {name: value for name, value in read_sidecar(path).items() if value is not None}
        meta["sidecar"] = checked_sidecar(sidecar, values.shape[:3], affine, str(path))
    return as_volume(np.moveaxis(values, -1, 0) if kind == "latent" else values[None], affine, path, meta)


def check_voxels(path: Path) -> None:
    """Refuse a NIfTI or NRRD file by its header alone, as the reader of DICOM does a series.

    Raises:
        InputError: the header cannot be read, or claims more voxels than MAISI_MAX_VOXELS.
    """
    if path.is_dir() or is_zip(path) or is_dicom(path):
        return

    def claimed() -> list[int]:
        if path.name.lower().endswith(".nrrd"):
            return [int(n) for n in read_header(path)[0]["sizes"]]
        image: Any = nib.load(path)
        return [int(n) for n in image.shape]

    shape = read_whole(path, claimed)
    check_limit("MAISI_MAX_VOXELS", math.prod(shape), f"{path} has {' x '.join(map(str, shape))} voxels")


def as_volume(
    values: np.ndarray, affine: np.ndarray, path: str | os.PathLike, meta: Mapping[str, Any] | None = None
) -> MetaTensor:
    """Values (C, X, Y, Z) of a file, its affine (4, 4) to RAS in mm, and its path, as MONAI's transforms want them."""
    known = {
        MetaKeys.ORIGINAL_AFFINE: np.array(affine, dtype=float),
        MetaKeys.SPATIAL_SHAPE: np.array(values.shape[1:]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        ImageMetaKey.FILENAME_OR_OBJ: str(path),
    }
    tensor = torch.from_numpy(last_axis_fastest(values))
    return MetaTensor(tensor, affine=torch.as_tensor(np.array(affine, dtype=float)), meta={**known, **(meta or {})})


class ReadVolumed(MapTransform):
    """MONAI dict transform: replaces the path under each key by the volume, see :func:`read_volume`."""

    def __init__(
        self,
        keys: KeysCollection,
        kind: str,
        intensity_check: bool = True,
        allow_missing_keys: bool = False,
        modalities: Sequence[str] | None = None,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
        self.kind, self.intensity_check, self.modalities = kind, intensity_check, modalities

    def __call__(self, data: Mapping[Any, Any]) -> dict:
        """Read the keys of one item.

        Raises:
            InputError: see :func:`read_volume`.
        """
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = read_volume(items[key], self.kind, self.intensity_check, modalities=self.modalities)
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
    if like is not None:
        check_same_grid(path, volume, like)
    return volume


def check_same_grid(path: str | os.PathLike, volume: MetaTensor, like: MetaTensor) -> None:
    """Refuse a volume, read from `path`, that is not on the grid of another; both in RAS.

    Raises:
        InputError: it is on another one.
    """
    if difference := grid_difference(volume, like):
        raise InputError(
            f"{path} lies on another grid than {like.meta.get('filename_or_obj', 'the volume it is compared with')} "
            f"(in RAS: {difference}); allowed is one grid for both: resample one to the other"
        )


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


def sidecar_if_any(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON sidecar of the volume file `path`; nothing where there is none, or somebody's own beside a CT."""
    try:
        return read_sidecar(path)
    except InputError:
        return {}


def _read(path: Path, kind: str, series_uid: str | None, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values (X, Y, Z), or (X, Y, Z, C) for a latent, float32, and the affine, of any format."""
    allowed = ".nii or .nii.gz" if kind == "latent" else ", ".join(SUFFIXES)
    allowed += ", or a folder or zip file of one DICOM series, or the file of an Enhanced CT" if kind == "ct" else ""
    if not path.exists():
        raise InputError(f"{path} does not exist; allowed is {allowed}: correct the path")
    name = path.name.lower()
    if path.is_dir() or is_zip(path) or is_dicom(path):
        if kind != "ct" and is_dicom(path):
            raise InputError(
                f"{path} is a DICOM file; allowed as {kind} is {allowed}: make one of it with maisi dicom_read"
            )
        if kind != "ct" or not holds_dicom(path):
            what = "folder" if path.is_dir() else "zip file"
            raise InputError(f"{path} is a {what} and holds no DICOM series; allowed as {kind} is {allowed}")
        with reading(path):  # which leaves what the disk or the memory lacks as it is: another try may succeed
            return _series(SeriesReader(series_uid, modalities), path)
    if name.endswith((".nii", ".nii.gz")):
        return read_whole(path, lambda: read_nifti(path, kind))
    if name.endswith(".nrrd") and kind != "latent":
        values, affine = read_whole(path, lambda: read_nrrd(path))
        return values.reshape(without_single_axes(values.shape), order="F"), affine
    raise InputError(f"{path} has an unsupported file type; allowed as {kind} is {allowed}: convert it to NIfTI")


def _series(reader: SeriesReader, path: Path) -> tuple[np.ndarray, np.ndarray]:
    values, meta = reader.get_data(reader.read(str(path)))
    return values.astype(np.float32), np.asarray(meta[MetaKeys.AFFINE], dtype=float)
