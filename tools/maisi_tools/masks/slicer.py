"""Segmentations of 3D Slicer (.seg.nrrd): the header says what each segment is, and which layer and value it has."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.masks.codes import SNOMED, label_of_name, label_of_structure, side_of_codes
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap
from maisi_tools.volumes.checks import check_affine, check_labels, check_shape, whole_labels
from maisi_tools.volumes.nrrd_file import Header, read_header, read_nrrd
from maisi_tools.volumes.reading import as_volume
from maisi_tools.volumes.stored import read_whole

logger = logging.getLogger(__name__)

_FIELD = re.compile(r"Segment(\d+)_(\w+)")


@dataclass(frozen=True)
class Segment:
    """A segment as a header describes it.

    Attributes:
        name: as the user sees it.
        value: of its voxels.
        layer: that they are in; segments that overlap are in several.
        meaning: id in the vocabulary, by its terminology code or else its name; None where neither is known.
    """

    name: str
    value: int
    layer: int
    meaning: int | None


def read_segments(header: Header, layers: int) -> list[Segment]:
    """The segments that the header of an NRRD file describes; none where it is no segmentation of 3D Slicer.

    Args:
        header: see :func:`~maisi_tools.volumes.nrrd_file.read_header`.
        layers: of the array. Files from before Slicer 4.11 have one for each segment, and do not say so.

    Raises:
        InputError: a value or layer that is no number, or that there is not.
    """
    fields: dict[int, dict[str, str]] = {}
    for key, value in header.items():
        if match := _FIELD.fullmatch(key):
            fields.setdefault(int(match[1]), {})[match[2]] = str(value)
    segments = []
    for number, field in sorted(fields.items()):
        name = field.get("Name") or field.get("ID") or f"segment {number}"
        try:
            value = int(field.get("LabelValue", 1))
            layer = int(field.get("Layer", number if layers > 1 else 0))
        except ValueError as error:
            raise InputError(f"segment {name} has a layer or value that is no whole number ({error})") from error
        if value < 1 or not 0 <= layer < layers:
            raise InputError(
                f"segment {name} has the value {value} in layer {layer}; allowed are values from 1 on and the layers 0 "
                f"to {layers - 1} that the file has: save the segmentation again"
            )
        segments.append(Segment(name, value, layer, _meaning(field.get("Tags", ""), name)))
    return segments


def is_segmentation(path: str | os.PathLike) -> bool:
    """Whether a file is an NRRD whose header describes segments."""
    if not str(path).lower().endswith(".nrrd") or not Path(path).is_file():
        return False
    header, _ = read_whole(path, lambda: read_header(path))
    return any(_FIELD.fullmatch(key) for key in header)


def read_segmentation(path: str | os.PathLike, label_map: LabelMap) -> MetaTensor:
    """A segmentation of 3D Slicer as one mask in the numbering of `label_map`.

    A label map that is known by name is a vocabulary: segments are found in it by their terminology code or their
    name, whatever their values, which Slicer deals out anew on saving. A label map from a JSON file is about this
    file's own values, and these are then taken as they are. Where segments overlap, the smaller one is taken.

    Returns:
        MetaTensor (1, X, Y, Z), float32, see :func:`~maisi_tools.volumes.reading.read_volume`.

    Raises:
        InputError: the file cannot be read, has no segment that is known, or one value twice (with a JSON).
    """
    header, _ = read_whole(path, lambda: read_header(path))
    values, affine = read_whole(path, lambda: read_nrrd(path))
    array = values.reshape(*values.shape[:3], -1)
    check_shape(array.shape[:3], "mask", str(path))
    check_affine(affine, str(path))
    array = whole_labels(array, str(path))
    check_labels(array, str(path))
    try:
        segments = read_segments(header, array.shape[3])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    named = label_map.name in LABEL_MAPS
    if not named:
        _check_values_differ(segments, str(path))
    parts, unknown = [], []
    for segment in segments:
        inside = array[..., segment.layer] == segment.value
        count = int(np.count_nonzero(inside))
        number = _number(segment, label_map) if named else segment.value
        if count and number is None:
            unknown.append(f"{segment.name} ({count} voxels)")
        elif count:
            parts.append((count, number, segment))
    for layer in range(array.shape[3]):
        known = [0, *(segment.value for segment in segments if segment.layer == layer)]
        rest = array[..., layer][~np.isin(array[..., layer], known)]
        unknown += [f"value {value:g} ({np.count_nonzero(rest == value)} voxels)" for value in np.unique(rest)]
    advice = 'rename them in 3D Slicer, or give a JSON label_map of all its values, such as {"1": "liver", "2": 120}'
    if not parts:
        raise InputError(
            f"{path} has no segment that {label_map.name} knows by its terminology code or its name (it has: "
            f"{', '.join(unknown) or 'none with a voxel'}); allowed is at least one: {advice}"
        )
    if unknown:
        left_out = ", ".join(unknown)
        logger.warning("%s: what is left out, so that it counts as body: %s; to use it, %s", path, left_out, advice)
    mask = np.zeros(array.shape[:3], dtype=np.float32)
    for _, number, segment in sorted(parts, key=lambda part: -part[0]):
        mask[array[..., segment.layer] == segment.value] = number
    return as_volume(mask[None], affine, path)


def _number(segment: Segment, label_map: LabelMap) -> int | None:
    """The label that stands for a segment in the numbering of `label_map`."""
    number = label_map.inverse.get(segment.meaning) if segment.meaning else None
    return label_map.label_of(segment.name) if number is None else number


def _meaning(tags: str, name: str) -> int | None:
    """The id that a terminology entry says, else the name.

    An entry is ``list~category~type~modifier~region list~region~region modifier``, each a code as
    ``scheme^value^meaning``.
    """
    for tag in tags.split("|"):
        kind, _, entry = tag.partition(":")
        codes = [part.split("^") for part in entry.split("~")]
        if kind.strip() != "TerminologyEntry" or len(codes) < 3 or len(codes[2]) < 2:
            continue
        value = {place: code[1] for place, code in enumerate(codes) if len(code) > 1}
        side = side_of_codes(value.get(place, "") for place in (3, 6))
        code = value[2] if codes[2][0] in (SNOMED, "SNOMED") else ""
        return label_of_structure(name, code, side, value.get(5, ""), value.get(1, ""))
    return label_of_name(name)


def _check_values_differ(segments: Sequence[Segment], name: str) -> None:
    seen: dict[int, Segment] = {}
    for segment in segments:
        if segment.value in seen:
            raise InputError(
                f"{name} has the value {segment.value} for {seen[segment.value].name} and, in another layer, for "
                f"{segment.name}; allowed with a JSON label_map is one value a segment: leave label_map out, so that "
                "their names are read"
            )
        seen[segment.value] = segment
