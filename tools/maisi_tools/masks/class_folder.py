"""A folder with one file a class, as TotalSegmentator writes it, read as one mask."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation

from maisi_tools.errors import InputError, first_few
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap, ReadLabelsd
from maisi_tools.masks.slicer import is_segmentation, read_segmentation
from maisi_tools.volumes.grid import grid_difference
from maisi_tools.volumes.inputs import find_inputs, is_volume, stem_of
from maisi_tools.volumes.reading import read_volume

logger = logging.getLogger(__name__)


def is_class_folder(path: str | os.PathLike, label_map: LabelMap) -> bool:
    """Whether more than half of the volume files in a folder are named like classes of `label_map`."""
    names = _names(path)
    return 2 * _known(names, label_map) > len(names)


def is_one_mask(path: str | os.PathLike, label_map: LabelMap) -> bool:
    """Whether a folder is no folder of masks, but one with a file a class.

    So it is where it is a class folder of `label_map` or of another that has a name, or two of its files at least are
    named like classes of `label_map`. Its files by themselves would all be the one class that has the number 1.
    """
    names = _names(path)
    return is_class_folder(path, label_map) or _known(names, label_map) > 1 or _other_map(names) is not None


def find_masks(input: Any, label_map: LabelMap, sections: Sequence[str] = ()) -> list[dict[str, str]]:
    """The masks that an input names, files and class folders, as :func:`~maisi_tools.volumes.inputs.find_inputs`.

    Raises:
        InputError: what `find_inputs` refuses, or files of a class folder that are no class of `label_map`.
    """
    items = find_inputs(input, "image", lambda folder: is_one_mask(folder, label_map), sections)
    for item in items:
        if Path(item["image"]).is_dir():
            _files_of(Path(item["image"]), label_map)
    return items


def read_class_folder(path: str | os.PathLike, label_map: LabelMap) -> MetaTensor:
    """One mask of a folder that holds ``CLASS.nii.gz`` for every class: 0 outside, one other value inside.

    Where classes overlap, the smaller one (fewer voxels) stays, as a tumor in its organ; a warning says which did.

    Args:
        path: the folder.
        label_map: its classes give the files their labels.

    Returns:
        MetaTensor (1, X, Y, Z), float32, in the numbering of `label_map`; ``meta["filename_or_obj"]`` is the folder.

    Raises:
        InputError: a file that is no class of `label_map`, has several values, or lies on another grid.
    """
    folder = Path(path)
    files = _files_of(folder, label_map)
    mask = None
    sizes: dict[int, int] = {}
    overlaps: dict[tuple[int, int], int] = {}
    for label, file in sorted(files.items()):
        part = read_volume(file, "mask")
        inside = part.as_tensor() > 0
        if inside.any() and (several := torch.unique(part.as_tensor()[inside])).numel() > 1:
            raise InputError(
                f"{file} has the labels {[int(value) for value in several[:5]]}; allowed in a file of one class are 0 "
                "and one other value: give a multi-label file by itself, not in a folder"
            )
        if mask is None:
            mask, values, first = part, torch.zeros_like(part.as_tensor()), file
        elif difference := grid_difference(part, mask):
            raise InputError(
                f"{file} and {first} lie on different grids ({difference}); allowed is one grid for all files of a mask"
            )
        under = values[inside]
        sizes[label] = under.numel()
        others, counts = under[under > 0].unique(return_counts=True)
        overlaps |= {(int(other), label): int(count) for other, count in zip(others, counts, strict=True)}
        smaller = torch.tensor([other for other, size in sizes.items() if size < sizes[label]])
        values[inside] = torch.where(torch.isin(under, smaller), under, label)
    assert mask is not None
    if overlaps:
        logger.warning("%s: classes overlap, and the smaller one stays: %s", folder, _shown(overlaps, label_map))
    return MetaTensor(values, meta={**mask.meta, "filename_or_obj": str(folder)})


def _files_of(folder: Path, label_map: LabelMap) -> dict[int, Path]:
    """Label -> the file of its class, see :func:`read_class_folder`."""
    files: dict[int, Path] = {}
    unknown = []
    for file in _volumes(folder):
        label = label_map.label_of(stem_of(file))
        if label is None:
            unknown.append(file.name)
        elif label in files:
            raise InputError(f"{folder} holds {files[label].name} and {file.name}, one class twice: remove one of them")
        else:
            files[label] = file
    if unknown or not files:
        other = _other_map(_names(folder))
        own = other in (None, label_map.name)
        advice = "rename or remove it, or give another label_map" if own else f"give --label_map {other}"
        raise InputError(
            f"{folder} is read as one mask with a file for each class, but {first_few(unknown) or 'it holds no volume'}"
            f" is no class of {label_map.name}; allowed are names such as "
            f"{', '.join(list(label_map.classes.values())[:3])}: {advice}"
        )
    return files


def _names(folder: str | os.PathLike) -> list[str]:
    """What the volume files in a folder are called; nothing where there is no folder."""
    return [stem_of(file) for file in _volumes(Path(folder))] if Path(folder).is_dir() else []


def _known(names: Sequence[str], label_map: LabelMap) -> int:
    return sum(label_map.label_of(name) is not None for name in names)


def _other_map(names: Sequence[str]) -> str | None:
    """The name of the label map whose classes most of the names are, two at least; None where there is none."""
    counts = {name: _known(names, known) for name, known in LABEL_MAPS.items()}
    name = max(counts, key=lambda one: counts[one])
    return name if counts[name] > max(1, len(names) / 2) else None


def _warn_misread(mask: MetaTensor, path: str | os.PathLike, label_map: LabelMap) -> None:
    """Log a warning where a file is named like one class and its only label stands for another."""
    stem = stem_of(path)
    named = next((known for known in (label_map, *LABEL_MAPS.values()) if known.label_of(stem) is not None), None)
    if named is None:
        return
    labels = [int(label) for label in mask.as_tensor().unique() if label]
    if len(labels) == 1 and label_map.get(labels[0]) != named.get(named.label_of(stem) or 0):
        logger.warning(
            "%s is named like a class, and its only label, %d, is %s in %s, as which it is read; of files of one class "
            "give their folder, of others the label_map that says what %d is",
            *(path, labels[0], label_map.classes.get(labels[0], "none"), label_map.name, labels[0]),
        )


def _shown(overlaps: Mapping[tuple[int, int], int], label_map: LabelMap) -> str:
    """The largest overlaps of two classes, in words."""
    largest = sorted(overlaps.items(), key=lambda one: -one[1])
    named = [f"{label_map.classes[a]} and {label_map.classes[b]} ({count} voxels)" for (a, b), count in largest[:5]]
    return ", ".join(named) + (f" and {len(largest) - 5} more pairs" if len(largest) > 5 else "")


def read_numbers(path: str | os.PathLike, label_map: LabelMap) -> MetaTensor:
    """A mask, of whatever form, as (1, X, Y, Z), float32, in the numbering of `label_map`.

    Args:
        path: a volume file, a segmentation of 3D Slicer, or a class folder.
        label_map: how its labels are read.

    Raises:
        InputError: see :func:`~maisi_tools.volumes.reading.read_volume`, :func:`read_class_folder` and
            :func:`~maisi_tools.masks.slicer.read_segmentation`.
    """
    if Path(path).is_dir():
        return read_class_folder(path, label_map)
    if is_segmentation(path):
        return read_segmentation(path, label_map)
    mask = read_volume(path, "mask")
    _warn_misread(mask, path, label_map)
    return mask


class ReadMaskd(MapTransform):
    """MONAI dict transform: replaces the path of a mask by the mask, see :func:`read_numbers`."""

    def __init__(self, keys: KeysCollection, label_map: LabelMap) -> None:
        super().__init__(keys)
        self.label_map = label_map

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = read_numbers(items[key], self.label_map)
        return items


def read_mask(path: str | os.PathLike, label_map: LabelMap) -> MetaTensor:
    """A mask, of whatever form, as (1, X, Y, Z), uint8, in the vocabulary, RAS.

    Raises:
        InputError: see :class:`ReadMaskd` and
            :func:`~maisi_tools.masks.label_maps.apply_label_map`.
    """
    item = ReadLabelsd("mask", label_map)(ReadMaskd("mask", label_map)({"mask": str(path)}))
    turned: MetaTensor = Orientation(axcodes="RAS", labels=None)(item["mask"])  # type: ignore[assignment]
    return turned


def _volumes(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if is_volume(file))
