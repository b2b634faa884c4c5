"""Writing volumes and their sidecars: under a temporary name first, so that no half-written file is ever left."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from numpy.typing import ArrayLike, DTypeLike
from torch import distributed

from maisi_tools.errors import InputError
from maisi_tools.files import expanded, replacing
from maisi_tools.volumes.checks import LEAST_STEPS
from maisi_tools.volumes.inputs import of_a_run, sidecar_path, stem_of
from maisi_tools.volumes.normalise import intensity_of

logger = logging.getLogger(__name__)

SCANNER = 1
"""NIfTI code of a transform to scanner coordinates (NIFTI_XFORM_SCANNER_ANAT)."""


def write_volume(path: str | os.PathLike, array: np.ndarray, affine: ArrayLike, dtype: DTypeLike = np.int16) -> Path:
    """Write a NIfTI file whose bytes depend on the arguments alone.

    Args:
        path: file to write, .nii.gz or .nii.
        array: (X, Y, Z) or (X, Y, Z, C); for an integer `dtype` rounded and clipped to its range.
        affine: (4, 4), from voxels to RAS in mm; stored in sform and, where a quaternion can express it, in qform.
        dtype: type of the stored voxels.

    Raises:
        ValueError: another number of axes, or voxels that are not finite under an integer `dtype`.
        OSError: the file cannot be written.
    """
    if array.ndim not in (3, 4):
        raise ValueError(f"array has the shape {array.shape}; allowed is (X, Y, Z) or (X, Y, Z, C)")
    image = _nifti(_stored(array, dtype, path), affine)
    with replacing(path) as temporary:
        nib.save(image, temporary)
    return Path(path)


def write_shard(
    path: str | os.PathLike,
    array: np.ndarray,
    first: int,
    axis: int,
    shape: Sequence[int],
    affine: ArrayLike,
    dtype: DTypeLike = np.int16,
    group: distributed.ProcessGroup | None = None,
) -> Path:
    """Write one rank's part of a volume into a NIfTI file that all ranks write together; none holds all of it.

    Every rank of the process group calls this; the file appears under its name when all parts are in it.

    Args:
        path: file to write, .nii (parts cannot be put into a compressed file), on storage that all ranks see.
        array: this rank's voxels, of ``shape`` but for ``axis``; may be empty.
        first: where they begin along ``axis``.
        axis: 0, 1 or 2.
        shape: (X, Y, Z) of the whole volume.
        affine, dtype: as in :func:`write_volume`.

    Raises:
        ValueError: a compressed file is asked for, or the part does not fit the volume.
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".nii":
        raise ValueError(f"{path}: ranks can write together into an uncompressed file alone; name it .nii")
    wanted = [n if d != axis else array.shape[axis] for d, n in enumerate(shape)]
    if list(array.shape) != wanted or not 0 <= first <= shape[axis] - array.shape[axis]:
        raise ValueError(
            f"{path}: a part of shape {array.shape} from {first} on along axis {axis} does not fit {tuple(shape)}"
        )
    stored = _stored(array, dtype, path)
    part = target.with_name(f"{target.name}.part")
    leads = distributed.get_rank(group) == 0
    if leads:
        header = _nifti(np.broadcast_to(np.zeros((), stored.dtype), shape), affine).header
        header.set_data_offset(header.single_vox_offset)
        with open(part, "wb") as file:
            header.write_to(file)
            file.truncate(header.single_vox_offset + math.prod(shape) * stored.dtype.itemsize)
    distributed.barrier(group)
    if stored.size:
        offset = nib.Nifti1Header.single_vox_offset
        whole = np.memmap(part, stored.dtype, "r+", offset=offset, shape=tuple(shape), order="F")
        place = [slice(None)] * len(shape)
        place[axis] = slice(first, first + stored.shape[axis])
        whole[tuple(place)] = stored
        whole.flush()
        del whole
    distributed.barrier(group)
    if leads:
        os.replace(part, target)
    distributed.barrier(group)
    return target


def _stored(array: np.ndarray, dtype: DTypeLike, path: str | os.PathLike) -> np.ndarray:
    """The voxels in the type they are stored in, rounded and clipped where that is an integer."""
    dtype = np.dtype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.can_cast(array.dtype, dtype):
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: voxels that are not finite cannot be stored as {dtype}")
        limits = np.iinfo(dtype)
        # The float type holds both limits exactly, which numpy's clip needs.
        exact = array.astype(np.float32 if dtype.itemsize <= 2 else np.float64, copy=False)
        array = np.clip(np.rint(exact), limits.min, limits.max)
    return array.astype(dtype)


def _voxel_type(dtype: DTypeLike) -> np.dtype:
    try:
        found = np.dtype(dtype)
        nib.Nifti1Header().set_data_dtype(found)
        if found.kind in "iuf":
            return found
    except (TypeError, nib.spatialimages.HeaderDataError):
        pass
    raise InputError(
        f"the type of the stored voxels is {dtype!r}; allowed are types of numbers that NIfTI has, such as int16, "
        "uint8 and float32"
    )


def _nifti(array: np.ndarray, affine: ArrayLike) -> nib.Nifti1Image:
    affine = np.asarray(affine, dtype=float)
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)  # nibabel asks for 64-bit integers to be named
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, SCANNER)
    # A sheared grid (gantry tilt) fits no quaternion: qform is then marked unknown, so that all programs use sform.
    sheared = not np.allclose(image.get_qform(), affine, atol=1e-3)
    image.set_qform(affine, 0 if sheared else SCANNER)
    image.set_sform(affine, SCANNER)
    return image


def write_sidecar(path: str | os.PathLike, content: Mapping[str, Any]) -> Path:
    """Write a volume's JSON sidecar, keys sorted.

    Args:
        path: the volume's file, or the .json itself.
        content: JSON-able values; tensors and arrays become lists, paths become text, and numbers that are not finite
            become null.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    target = Path(path) if str(path).endswith(".json") else sidecar_path(path)
    text = json.dumps(_jsonable(dict(content)), indent=2, sort_keys=True, allow_nan=False)
    with replacing(target) as temporary:
        temporary.write_text(text + "\n")
    return target


class CheckStoredd(MapTransform):
    """Refuses a type of stored voxels that could not hold the values of what becomes of a volume.

    Args:
        keys: images or latents, see :func:`intensity_of`.
        dtype: of the voxels to be stored.

    Raises:
        InputError: an integer type that does not reach the ends of the values, or tells too few of them apart.
    """

    def __init__(self, keys: KeysCollection, dtype: DTypeLike) -> None:
        super().__init__(keys)
        self.dtype = _voxel_type(dtype)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)) if self.dtype.kind in "iu" else ():
            low, high = intensity_of(data[key])
            limits = np.iinfo(self.dtype)
            if low < limits.min or high > limits.max or high - low < LEAST_STEPS:
                raise InputError(
                    f"{data[key].meta.get('filename_or_obj')} has values from {low:g} to {high:g}, and output_dtype is "
                    f"{self.dtype}; allowed is a type that holds them: float32 (mr.json sets it)"
                )
        return dict(data)


class WriteVolumed(MapTransform):
    """MONAI dict transform: writes the volume under each key to ``output_dir/STEM + suffix + ".nii.gz"``.

    Args:
        keys: of volumes (C, X, Y, Z) with an affine; written as (X, Y, Z) if C is 1, else as (X, Y, Z, C).
        output_dir: folder, made if missing.
        suffix: what the file name has after the stem, for instance "_recon".
        dtype: type of the stored voxels, see :func:`write_volume`.
        sidecar: what goes to a JSON of the same name: keys of the item, or constant values; None for no sidecar.
        stem_key: key of the item with the path or name to take the stem from; by default the stem is that of the
            file that the volume was read from (``meta["filename_or_obj"]``).
        allow_missing_keys: pass over keys that the item does not have; with ``stem_key``, the file that an earlier run
            wrote for such a key is removed with its sidecar, since it is not of this run's volume. Of files without
            sidecar, whoever lists the items has seen to it that an earlier run wrote them.

    Raises:
        InputError: NIfTI has no such type of numbers.

    The item returned has the path written under KEY + "_path"; the volume itself is untouched.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike,
        suffix: str = "",
        dtype: DTypeLike = np.int16,
        sidecar: Sequence[str] | Mapping[str, Any] | None = None,
        stem_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir, self.suffix, self.dtype = expanded(output_dir), suffix, _voxel_type(dtype)
        self.sidecar, self.stem_key = sidecar, stem_key

    def __call__(self, data: Mapping[Any, Any]) -> dict:
        """Write the keys of one item."""
        items = dict(data)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.stem_key and any(key not in items for key in self.keys):
            stale = self.output_dir / f"{stem_of(items[self.stem_key])}{self.suffix}.nii.gz"
            if self.sidecar is None or of_a_run(stale):
                for path in (stale, sidecar_path(stale)):
                    path.unlink(missing_ok=True)
        for key in self.key_iterator(items):
            volume = items[key]
            stem = stem_of(items[self.stem_key] if self.stem_key else volume.meta["filename_or_obj"])
            path = self.output_dir / f"{stem}{self.suffix}.nii.gz"
            array = volume.detach().as_tensor().cpu()
            array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
            array = array.movedim(0, -1).numpy()
            if self.sidecar is not None:
                # In this order, wherever a run is interrupted: where there is a volume, its sidecar is about it.
                path.unlink(missing_ok=True)
                write_sidecar(path, self._sidecar_content(items))
            write_volume(path, array[..., 0] if array.shape[-1] == 1 else array, volume.affine.cpu(), self.dtype)
            logger.info("wrote %s", path)
            items[f"{key}_path"] = str(path)
        return items

    def _sidecar_content(self, items: Mapping[Any, Any]) -> Mapping[str, Any]:
        if isinstance(self.sidecar, Mapping):
            return self.sidecar
        return {name: items[name] for name in self.sidecar or ()}


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, arrays and numpy's numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
