"""Changing a mask: lesions put in, varied and taken out, organs resized, sides flipped, another field of view.

Every edit is label-exact: it hands voxels from one label of the mask to another and never mixes values. Which voxels
change hands is a matter of rank, the N nearest to a (deformed) surface, so that volumes come out as asked to a voxel.
Randomness comes from the generator that is given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import ResizeWithPadOrCrop, SpatialCrop
from monai.utils import convert_to_dst_type
from scipy import ndimage
from scipy.spatial.transform import Rotation

from maisi_tools.errors import InputError
from maisi_tools.masks.body import add_body, checked_spacing
from maisi_tools.masks.class_folder import read_mask
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap
from maisi_tools.masks.vocabulary import (
    ALLOWED,
    BODY,
    HOSTS,
    OTHER_SIDE,
    VOCABULARY,
    Array,
    display_name,
    hosts_of,
    label_id,
    labels_in_group,
    name_and_side,
)
from maisi_tools.volumes.grid import regrid_mask
from maisi_tools.volumes.inputs import check_targets
from maisi_tools.volumes.orientation import RestoreOrientationd
from maisi_tools.volumes.regions import box_of
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)

YIELDING = ("body", "lung", "bowel", "muscle")
"""Groups that make room for an organ that grows; bone, vessels, nerves and other organs stay as they are."""

FILLING = ("body", "lung")
"""Groups that take the room of an organ that shrinks."""

LARGEST_SHARE = 0.5
"""A new lesion takes no more than this share of its organ."""

KEPT_SHARE = 0.9
"""A wanted organ has to keep this share of its volume in a new field of view."""

VERBS = ("remove", "resize", "insert", "augment", "redraw")
"""What an edit of a scan may do, see :func:`apply_edits`; done in this order."""

_PLACEHOLDERS = labels_in_group("placeholder")

_ROUGHNESS = 0.2
"""Standard deviation of a new lesion's radius over its surface, as a share."""


def volumes_ml(labels: np.ndarray, spacing: Sequence[float]) -> dict[int, float]:
    """The volume of every label but the background, in ml."""
    voxel_ml = float(np.prod(checked_spacing(labels.shape, spacing))) / 1000
    found, counts = np.unique(labels, return_counts=True)
    return {int(label): int(count) * voxel_ml for label, count in zip(found, counts, strict=True) if label}


def remove_lesion(labels: np.ndarray, spacing: Sequence[float], lesion: int) -> np.ndarray:
    """The mask without a lesion: its voxels get the label of the nearest of the organs it may lie in.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        spacing: mm along x, y, z.
        lesion: one of :data:`~maisi_tools.masks.vocabulary.HOSTS`, as an id.

    Returns:
        A new array.

    Raises:
        InputError: no lesion, none in the mask, or several organs it may lie in and none of them in the mask.
    """
    mm = checked_spacing(labels.shape, spacing)
    _check_labels(labels)
    hosts = hosts_of(lesion)
    inside = _present(labels, lesion)
    organs = np.isin(labels, hosts)
    if not organs.any():
        if len(hosts) > 1:
            raise InputError(
                f"the mask has {VOCABULARY[lesion].name}, but none of the organs it may lie in; allowed is a mask with "
                f"{' or '.join(HOSTS[VOCABULARY[lesion].name][:5])}: segment the organ, too"
            )
        return np.where(inside, hosts[0], labels).astype(labels.dtype)
    result = labels.copy()
    box = box_of(inside | organs)
    result[box][inside[box]] = _nearest(labels[box], organs[box], mm)[inside[box]]
    return result


def remove_lesions(labels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The mask without any lesion, see :func:`remove_lesion`; the array itself where there is none."""
    for lesion in map(label_id, HOSTS):
        if (labels == lesion).any():
            labels = remove_lesion(labels, spacing, lesion)
    return labels


def insert_lesion(
    labels: np.ndarray,
    spacing: Sequence[float],
    lesion: int,
    diameter_mm: float,
    rng: np.random.Generator,
    host: int | None = None,
) -> np.ndarray:
    """The mask with one more lesion, an irregular ellipsoid inside one organ.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        spacing: mm along x, y, z.
        lesion: one of :data:`~maisi_tools.masks.vocabulary.HOSTS`, as an id.
        diameter_mm: of the sphere that has the lesion's volume.
        rng: draws organ, place and shape; the lesion is one piece, where the organ is.
        host: the organ; by default drawn among those that are large enough, by volume.

    Returns:
        A new array.

    Raises:
        InputError: no lesion, an organ it does not grow in, or no organ that is large enough.
    """
    mm = checked_spacing(labels.shape, spacing)
    _check_labels(labels)
    name, hosts = VOCABULARY[lesion].name if lesion in VOCABULARY else str(lesion), hosts_of(lesion)
    if host is not None and host not in hosts:
        raise InputError(f"a {name} does not grow in {_name(host)}; allowed are {', '.join(map(_name, hosts))}")
    count = round(float(np.pi / 6 * _positive("diameter", diameter_mm) ** 3 / np.prod(mm)))
    if count < 1:
        raise InputError(f"a {name} of {diameter_mm:g} mm is smaller than a voxel of {_mm(mm)}; give a larger one")
    sizes = {organ: int(np.count_nonzero(labels == organ)) for organ in (hosts if host is None else (host,))}
    large = [organ for organ, size in sizes.items() if LARGEST_SHARE * size >= count]
    if not any(sizes.values()):
        raise InputError(
            f"a {name} grows in {' or '.join(map(_name, list(sizes)[:5]))}, and the mask has "
            f"{'none of them' if len(sizes) > 1 else 'none'}; allowed is a mask with the organ: segment it, too"
        )
    if not large:
        most = max(sizes.values()) * LARGEST_SHARE * float(np.prod(mm))
        raise InputError(
            f"no organ in the mask has room for a {name} of {diameter_mm:g} mm; allowed are up to "
            f"{np.cbrt(6 / np.pi * most):.3g} mm (half of the largest organ it may lie in): give a smaller diameter"
        )
    weights = np.array([sizes[organ] for organ in large], dtype=float)
    organ = labels == large[rng.choice(len(large), p=weights / weights.sum())]
    box = box_of(organ)
    part, _ = ndimage.label(organ[box])
    largest = part == np.bincount(part[part > 0]).argmax()
    if np.count_nonzero(largest) < count:
        largest = organ[box]
    depth = ndimage.distance_transform_edt(np.pad(largest, 1), sampling=mm)[1:-1, 1:-1, 1:-1]
    radius = diameter_mm / 2
    places = np.argwhere(depth >= min(radius, 0.8 * depth.max()))
    start = places[rng.integers(len(places))]
    center = start * mm

    axes = rng.uniform(0.75, 1.3, 3)
    turned = Rotation.random(random_state=int(rng.integers(2**32))).as_matrix() / (axes / np.cbrt(axes.prod()))[:, None]
    x, y, z = (
        ((index * step - middle).astype(np.float32))
        for index, step, middle in zip(np.ogrid[tuple(map(slice, largest.shape))], mm, center, strict=True)
    )
    distance = np.sqrt(sum((a * x + b * y + c * z) ** 2 for a, b, c in turned.astype(np.float32)))
    score = distance * (1 + _ROUGHNESS * _smooth_noise(largest.shape, radius / 2 / mm, rng))
    result = labels.copy()
    result[box][_lowest(score, _piece(score, largest, start, count), count)] = lesion
    return result


def augment_lesion(
    labels: np.ndarray,
    spacing: Sequence[float],
    lesion: int,
    rng: np.random.Generator,
    zoom: float = 1.0,
    shift_mm: float = 0.0,
    elastic_mm: float = 0.0,
) -> np.ndarray:
    """The mask with its lesions zoomed, shifted and deformed, each connected one for itself and inside its organ.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        spacing: mm along x, y, z.
        lesion: one of :data:`~maisi_tools.masks.vocabulary.HOSTS`, as an id.
        rng: draws directions and deformations.
        zoom: factor of the diameter; the volume grows by its cube.
        shift_mm: how far each lesion is moved, in a direction drawn at random.
        elastic_mm: standard deviation of a smooth displacement, in mm; waves are about as long as the lesion's radius.

    Returns:
        A new array.

    Raises:
        InputError: as :func:`remove_lesion`, or an organ that is too small for its lesion's new size.
    """
    mm = checked_spacing(labels.shape, spacing)
    _positive("zoom", zoom)
    for what, value in (("shift", shift_mm), ("elastic", elastic_mm)):
        if not isinstance(value, (int, float)) or not 0 <= value < np.inf:
            raise InputError(f"{what} is {value!r}; allowed is a number of mm from 0 on")
    parts, number = ndimage.label(labels == lesion, np.ones((3, 3, 3)))
    healthy = remove_lesion(labels, spacing, lesion)
    result = healthy.copy()
    for index in range(1, number + 1):
        old = parts == index
        hosts = np.unique(healthy[old])  # a lesion that was moved here before is none
        box = box_of(np.isin(result, hosts) | old)
        inside, room = old[box], np.isin(result[box], hosts)
        count = max(1, round(np.count_nonzero(inside) * zoom**3))
        if count > np.count_nonzero(room):
            raise InputError(
                f"a {_name(lesion)} of {count} voxels does not fit into {', '.join(map(_name, hosts))} with "
                f"{np.count_nonzero(room)} voxels; give a smaller zoom than {zoom:g}"
            )
        radius = float(np.cbrt(3 / 4 / np.pi * np.count_nonzero(inside) * np.prod(mm)))
        direction = rng.normal(size=3)
        center = np.argwhere(inside).mean(axis=0)
        moved = center + shift_mm * direction / np.linalg.norm(direction) / mm
        source = [
            (grid - moved[axis]) / zoom
            + center[axis]
            + (elastic_mm / mm[axis] * _smooth_noise(inside.shape, radius / mm, rng) if elastic_mm else 0.0)
            for axis, grid in enumerate(np.indices(inside.shape, dtype=np.float32))
        ]
        score = ndimage.map_coordinates(_signed_distance(inside, mm), source, order=1, mode="nearest")
        result[box][_lowest(score, room, count)] = lesion
    return result


def resize_organ(labels: np.ndarray, spacing: Sequence[float], organ: int, factor: float) -> np.ndarray:
    """The mask with an organ of another volume: its surface is moved outwards or inwards, everywhere alike.

    The volume is that of the organ with the lesions in it. An organ that grows takes room from what yields (body,
    lung, bowel, muscle), one that shrinks leaves its room to body or lung, whichever is nearer. Bone, vessels, nerves
    and other organs stay. What the volume cuts goes on beyond it: that is no surface, and stays at its border.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        spacing: mm along x, y, z.
        organ: its id.
        factor: new volume over old.

    Returns:
        A new array.

    Raises:
        InputError: the organ is not in the mask or a lesion, the mask has no body, there is no room, or another
            structure (or a lesion in the organ) would vanish.
    """
    mm = checked_spacing(labels.shape, spacing)
    _check_labels(labels)
    if organ not in VOCABULARY or organ == BODY or VOCABULARY[organ].name in HOSTS:
        raise InputError(f"{_name(organ)} is no organ to resize; a lesion is resized by augmentation with a zoom")
    _positive("factor", factor)
    _present(labels, organ)
    if not (labels == BODY).any():  # the organ's rim would be all there is of it
        raise InputError(
            f"the mask has no body, which {_name(organ)} takes room from or leaves room to; allowed is a mask with the "
            f"label {BODY} around its organs: maisi_tools.masks.body.add_body draws it"
        )
    healthy = labels
    for lesion in np.intersect1d(labels, [label_id(name) for name in HOSTS]):
        if organ in hosts_of(int(lesion)):
            healthy = remove_lesion(healthy, spacing, int(lesion))
    whole = healthy == organ
    size = int(np.count_nonzero(whole))
    count = max(1, round(size * factor))
    result = labels.copy()
    if count < size:
        _shrink(result, whole, count, mm)
    elif count > size:
        _grow(result, whole, count, mm, organ)
    if lost := np.setdiff1d(labels, result).tolist():
        raise InputError(
            f"with {_name(organ)} {factor:g} times as large, {', '.join(map(_name, lost))} would vanish; give a factor "
            "nearer to 1"
        )
    return result


def _grow(labels: np.ndarray, whole: np.ndarray, count: int, mm: np.ndarray, organ: int) -> None:
    """Give an organ the nearest voxels of what yields, in place."""
    size = int(np.count_nonzero(whole))
    for box, reach in _boxes(whole, mm):
        depth = _signed_distance(whole[box], mm)
        room = np.isin(labels[box], _in_groups(YIELDING)) & ~whole[box]
        if np.count_nonzero(room & (depth <= reach)) >= count - size:
            labels[box][_lowest(depth, room, count - size)] = organ
            return
    raise InputError(
        f"{_name(organ)} has no room to grow by a factor of {count / size:.3g}; allowed are up to "
        f"{1 + np.count_nonzero(room) / size:.3g}"
    )


def _shrink(labels: np.ndarray, whole: np.ndarray, count: int, mm: np.ndarray) -> None:
    """Leave an organ's outermost voxels to what fills its room, whichever is nearer, in place."""
    for box, reach in _boxes(whole, mm):
        inside = whole[box]
        vacated = inside & ~_lowest(_signed_distance(inside, mm, goes_on=not inside.all()), inside, count)
        fills = np.isin(labels[box], _in_groups(FILLING)) & ~inside
        if fills.any() and ndimage.distance_transform_edt(~fills, sampling=mm)[vacated].max() <= reach:
            labels[box][vacated] = _nearest(labels[box], fills, mm)[vacated]
            return


def _boxes(inside: np.ndarray, mm: np.ndarray) -> Iterator[tuple[tuple[slice, ...], float]]:
    """Boxes around the true voxels, ever larger up to the whole: (slices, mm that they reach in all directions).

    What lies within that reach is found in the box as in the whole, in a fraction of the time.
    """
    box, reach = box_of(inside), 4 * float(mm.max())
    while True:
        margins = np.ceil(reach / mm).astype(int)
        larger = tuple(
            slice(max(side.start - margin, 0), min(side.stop + margin, length))
            for side, margin, length in zip(box, margins, inside.shape, strict=True)
        )
        if all(side == slice(0, length) for side, length in zip(larger, inside.shape, strict=True)):
            yield larger, np.inf
            return
        yield larger, reach
        reach *= 2


def twins(label_map: LabelMap = LABEL_MAPS["openkbp"]) -> dict[int, int]:
    """Every id that a left/right flip changes -> the id it becomes.

    Sides come from the vocabulary's names and, for placeholders, from the names that `label_map` gives its classes,
    however these say a side ("Parotid_L", "Lt Parotid"; by default OpenKBP's left and right parotid gland, which the
    shipped weights know). A warning names classes of one side whose twin has no id of its own. The left lung has no
    middle lobe: the right one becomes a part of the left upper lobe, as the lingula is.
    """
    middle, upper = label_id("right lung middle lobe"), label_id("left lung upper lobe")
    paired = {label.id: label.name for label in VOCABULARY.values() if label.side and label.id != middle}
    pairs, _ = _opposite(paired)
    placed = {id: name for label, name in label_map.classes.items() if (id := label_map.get(label)) in _PLACEHOLDERS}
    named, alone = _opposite(placed)
    if alone:
        logger.warning(
            "%s has no class for the other side of %s: where left and right change, they keep their names",
            label_map.name,
            ", ".join(alone),
        )
    return {**pairs, middle: upper, **named}


def _opposite(names: Mapping[int, str]) -> tuple[dict[int, int], list[str]]:
    """Of ids with their names, id -> that of the other side, and the names of one side whose other is missing."""
    ids = {name_and_side(name): id for id, name in names.items()}
    pairs, alone = {}, []
    for (rest, side), id in ids.items():
        if side in OTHER_SIDE:
            twin = ids.get((rest, OTHER_SIDE[side]))
            if twin is None:
                alone.append(names[id])
            else:
                pairs[id] = twin
    return pairs, alone


def swap_sides(labels: Array, pairs: Mapping[int, int] | None = None) -> Array:
    """Name every left structure right and every right one left, as the mask of a mirrored body needs it.

    Args:
        labels: in the vocabulary, any shape, array or tensor (also floating point).
        pairs: id -> the id it becomes; None for :func:`twins` with the placeholders of OpenKBP.

    Returns:
        Same type, shape and dtype.
    """
    table = torch.arange(BODY + 1)
    for id, twin in (twins() if pairs is None else pairs).items():
        table[id] = twin
    values = torch.as_tensor(labels).as_subclass(torch.Tensor).long()
    return convert_to_dst_type(table.to(values.device)[values], dst=labels)[0]


def flip_sides(labels: np.ndarray, label_map: LabelMap = LABEL_MAPS["openkbp"]) -> np.ndarray:
    """The mirror image of a patient: the first axis reversed, and every left structure named right.

    Single organs change sides too (the liver comes to lie on the left), as in situs inversus.

    Args:
        labels: (X, Y, Z) in the vocabulary, RAS axes.
        label_map: tells the sides of its placeholders, see :func:`twins`; without any, placeholders are OpenKBP's.
    """
    _check_labels(labels)
    named = label_map if label_map.placeholders else LABEL_MAPS["openkbp"]
    return swap_sides(np.ascontiguousarray(labels[::-1]), twins(named))


def fit_field_of_view(
    mask: MetaTensor,
    spacing: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    organs: Iterable[int] = (),
    kept: float = KEPT_SHARE,
) -> MetaTensor:
    """A mask on another grid, which is laid about the wanted organs and must hold them.

    Args:
        mask: (1, X, Y, Z) in the vocabulary with its affine, RAS.
        spacing: mm along x, y, z to resample to (nearest label); None keeps it.
        size: voxels along x, y, z to crop or pad to; None keeps the field of view.
        organs: ids that must survive; the new grid is centred on their box, as far as the mask reaches, and on the
            mask's centre without any.
        kept: least share of each organ's volume.

    Raises:
        InputError: an organ is not in the mask, or too little of it is left; the message has the shares. Or a spacing
            or size that is not three positive numbers.
    """
    if spacing is not None:
        checked_spacing(tuple(mask.shape[1:]), spacing)
    if size is not None and (len(size) != 3 or not all(int(n) == n > 0 for n in size)):
        raise InputError(f"size is {tuple(size)}; allowed are three whole numbers of voxels from 1 up, along x, y, z")
    wanted = [int(organ) for organ in organs]
    before = volumes_ml(mask.as_tensor()[0].numpy(), [float(mm) for mm in mask.pixdim])
    for organ in wanted:
        if organ not in before:
            raise InputError(f"{_name(organ)} is not in the mask; allowed are {', '.join(map(_name, before))}")
    fitted = regrid_mask(mask, spacing) if spacing is not None else mask
    if size is not None:
        shape = np.array(fitted.shape[1:])
        inside = np.isin(fitted.as_tensor()[0].numpy(), wanted)
        center = shape // 2
        if inside.any():
            half = np.minimum(np.asarray(size), shape) / 2
            middle = np.array([(part.start + part.stop) / 2 for part in box_of(inside)])
            center = np.clip(middle, half, shape - half).astype(int)
        cropped = SpatialCrop(roi_center=center.tolist(), roi_size=[int(n) for n in np.minimum(size, shape)])(fitted)
        fitted = ResizeWithPadOrCrop([int(n) for n in size], mode="constant", value=0)(cropped)  # type: ignore[assignment]
    after = volumes_ml(fitted.as_tensor()[0].numpy(), [float(mm) for mm in fitted.pixdim])
    shares = {organ: after.get(organ, 0.0) / before[organ] for organ in wanted}
    if cut := {_name(organ): f"{share:.0%}" for organ, share in shares.items() if share < kept}:
        listed = ", ".join(f"{name} {share}" for name, share in cut.items())
        raise InputError(
            f"the new field of view keeps of {listed} only; allowed is at least {kept:.0%} of each wanted organ: give "
            "a larger size or a finer spacing"
        )
    return fitted


def apply_edits(
    labels: np.ndarray,
    spacing: Sequence[float],
    edits: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    seed: int = 0,
    label_map: LabelMap = LABEL_MAPS["maisi"],
) -> tuple[np.ndarray, np.ndarray | None]:
    """The mask after one or several edits, and what is to be drawn anew although its labels stay.

    Args:
        labels: (X, Y, Z) in the vocabulary; to resize an organ, with a body.
        spacing: mm along x, y, z.
        edits: one, or several that are done one after another, each with some of

            - ``remove``: a lesion, or a list of them;
            - ``resize``: organ -> factor of its volume;
            - ``insert``: lesion -> diameter in mm, or a list of diameters for as many lesions;
            - ``augment``: lesion -> factor of its diameter, with ``shift_mm`` and ``elastic_mm``;
            - ``redraw``: a structure, or a list of them, whose labels stay;
            - ``seed``: of what is drawn; by default `seed` for the first edit, one more for each further one.
        seed: see there.
        label_map: whose names structures may have, too, see :func:`structure_id`.

    Returns:
        A new array, and where structures are drawn anew (boolean, or None for nowhere).

    Raises:
        InputError: something else than such edits, none at all, or as the edits themselves.
    """
    several = [edits] if isinstance(edits, Mapping) else edits
    keys = (*VERBS, "shift_mm", "elastic_mm", "seed")
    good = isinstance(several, Sequence) and not isinstance(several, str) and several
    if not good or not all(isinstance(one, Mapping) and set(one) & set(VERBS) for one in several):
        raise InputError(
            f"edits are {edits!r}; allowed is one or a list of {{verb: ...}} with {', '.join(VERBS)}, such as "
            "{'insert': {'lung tumor': 20}, 'seed': 0}"
        )
    result, anew = labels.copy(), None
    for number, one in enumerate(several):
        if unknown := [str(key) for key in one if key not in keys]:
            raise InputError(f"an edit has {', '.join(unknown)}; allowed are {', '.join(keys)}")
        own = one.get("seed", seed + number)
        if not isinstance(own, int) or isinstance(own, bool) or own < 0:
            raise InputError(f"the seed of an edit is {own!r}; allowed is a whole number from 0 on")
        shift, elastic = one.get("shift_mm", 0.0), one.get("elastic_mm", 0.0)
        result = _edited(
            result,
            spacing,
            np.random.default_rng(own),
            _names("remove", one),
            _amounts("resize", one),
            _amounts("insert", one),
            _amounts("augment", one),
            shift,
            elastic,
            label_map,
        )
        for name in _names("redraw", one):
            inside = _present(result, structure_id(name, label_map))
            anew = inside if anew is None else anew | inside
    return result, anew


def _edited(
    labels: np.ndarray,
    spacing: Sequence[float],
    rng: np.random.Generator,
    remove: Sequence[str],
    resize: Mapping[str, Any],
    insert: Mapping[str, Any],
    augment: Mapping[str, Any],
    shift_mm: float,
    elastic_mm: float,
    label_map: LabelMap,
) -> np.ndarray:
    """Edits of each kind, in the order of the arguments."""
    if (shift_mm or elastic_mm) and not augment:
        raise InputError(
            "shift and elastic move the lesions that augment names, and it names none; allowed is, for instance, "
            "augment {hepatic tumor: 1}, which keeps their size"
        )
    for name in remove:
        labels = remove_lesion(labels, spacing, structure_id(name, label_map))
    for name, factor in resize.items():
        labels = resize_organ(labels, spacing, structure_id(name, label_map), factor)
    for name, diameters in insert.items():
        for diameter in diameters if isinstance(diameters, (list, tuple)) else [diameters]:
            labels = insert_lesion(labels, spacing, structure_id(name, label_map), diameter, rng)
    for name, zoom in augment.items():
        labels = augment_lesion(labels, spacing, structure_id(name, label_map), rng, zoom, shift_mm, elastic_mm)
    return labels


def structure_id(name: str, label_map: LabelMap) -> int:
    """The id of a structure by its name in a label map, which may have placeholders, else in the vocabulary.

    Raises:
        InputError: neither has the name.
    """
    label = label_map.label_of(name)
    return label_map.get(label, 0) or label_id(name) if label is not None else label_id(name)


def _names(verb: str, edit: Mapping[str, Any]) -> list[str]:
    value = edit.get(verb) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{verb} is {value!r}; allowed is a name, or a list of them")
    return list(names)


def _amounts(verb: str, edit: Mapping[str, Any]) -> Mapping[str, Any]:
    value = edit.get(verb) or {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{verb} is {value!r}; allowed is name -> number, such as {{'lung tumor': 20}}")
    return value


def edit_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    label_map: LabelMap,
    *,
    remove: Sequence[str] = (),
    resize: Mapping[str, float] | None = None,
    insert: Mapping[str, float | Sequence[float]] | None = None,
    augment: Mapping[str, float] | None = None,
    shift_mm: float = 0.0,
    elastic_mm: float = 0.0,
    flip: bool = False,
    spacing: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    organs: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Edit a mask file, in the order of the arguments, and write it in the vocabulary.

    A mask without a body gets one before an organ is resized, since that takes room from it or leaves room to it.

    Args:
        path: a mask, or a folder of one file a class.
        output: NIfTI file to write, in the mask's orientation.
        label_map: how the labels are read.
        remove: lesions.
        resize: organ -> factor of its volume.
        insert: lesion -> diameter in mm, or several.
        augment: lesion -> factor of its diameter.
        shift_mm: of :func:`augment_lesion`.
        elastic_mm: of :func:`augment_lesion`.
        flip: exchange left and right.
        spacing: mm along x, y, z (RAS) of the new grid.
        size: voxels along x, y, z (RAS) of the new grid.
        organs: what the new grid must hold.
        seed: of all that is drawn.

    Returns:
        Structure -> its volume before and after in ml, of all that changed.

    Raises:
        InputError: as the edits, or a name that is no label, or `output` is no NIfTI name or the mask itself, or a
            shift or deformation of no lesion.
    """
    target = Path(output)
    if not target.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"output {output} has no NIfTI name; allowed are .nii and .nii.gz: name it {output}.nii.gz")
    check_targets([path], [target])
    mask = read_mask(path, label_map)
    mm = [float(value) for value in mask.pixdim]
    labels, rng = mask.as_tensor()[0].numpy(), np.random.default_rng(seed)
    if resize:
        labels = add_body(labels, mm)
    before = volumes_ml(labels, mm)
    labels = _edited(
        labels, mm, rng, remove, resize or {}, insert or {}, augment or {}, shift_mm, elastic_mm, label_map
    )
    if flip:
        labels = flip_sides(labels, label_map)
    edited = MetaTensor(torch.from_numpy(labels)[None], meta=mask.meta, applied_operations=mask.applied_operations)
    edited = fit_field_of_view(edited, spacing, size, [structure_id(name, label_map) for name in organs])
    after = volumes_ml(edited.as_tensor()[0].numpy(), [float(value) for value in edited.pixdim])
    restored = RestoreOrientationd("mask", "reference")({"mask": edited, "reference": edited})["mask"]
    write_volume(target, restored.as_tensor()[0].numpy(), restored.affine, np.uint8)
    changes = {id: (before.get(id, 0.0), after.get(id, 0.0)) for id in sorted({*before, *after})}
    return {_name(id): pair for id, pair in changes.items() if pair[0] != pair[1]}


def _lowest(score: np.ndarray, room: np.ndarray, count: int) -> np.ndarray:
    """The `count` voxels of `room` with the lowest score, as a boolean array."""
    chosen = np.zeros(room.shape, dtype=bool)
    places = np.flatnonzero(room)
    if count < len(places):
        places = places[np.argpartition(score.ravel()[places], count)[:count]]
    chosen.ravel()[places] = True
    return chosen


def _piece(score: np.ndarray, room: np.ndarray, start: np.ndarray, count: int) -> np.ndarray:
    """What of `room` hangs together with `start` below the lowest score at which that is `count` voxels, or all."""

    def below(threshold: float) -> np.ndarray:
        parts, _ = ndimage.label(room & (score <= threshold))
        return parts == parts[tuple(start)]

    low, high = float(score[tuple(start)]), float(score[room].max())
    if np.count_nonzero(below(high)) < count:
        return room
    for _ in range(20):  # halvings: a millionth of the range is far less than a voxel
        middle = (low + high) / 2
        low, high = (low, middle) if np.count_nonzero(below(middle)) >= count else (middle, high)
    return below(high)


def _signed_distance(inside: np.ndarray, spacing: np.ndarray, goes_on: bool = False) -> np.ndarray:
    """Mm to the surface of a solid, negative inside; where the volume cuts it, it ends or `goes_on`."""
    padded = np.pad(inside, 1, "edge" if goes_on else "constant")
    within = ndimage.distance_transform_edt(padded, sampling=spacing)[1:-1, 1:-1, 1:-1]
    return ndimage.distance_transform_edt(~inside, sampling=spacing) - within


def _nearest(labels: np.ndarray, sources: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """At every voxel the label of the nearest one of `sources`."""
    places = ndimage.distance_transform_edt(~sources, sampling=spacing, return_distances=False, return_indices=True)
    return labels[tuple(places)]


def _smooth_noise(shape: Sequence[int], sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random field with mean 0 and standard deviation 1, smooth over `sigma` voxels."""
    noise = ndimage.gaussian_filter(rng.normal(size=tuple(shape)).astype(np.float32), sigma, mode="wrap")
    spread = float(noise.std())
    return (noise - noise.mean()) / spread if spread > 0 else noise


def _present(labels: np.ndarray, label: int) -> np.ndarray:
    inside = labels == label
    if not inside.any():
        found = ", ".join(_name(int(id)) for id in np.unique(labels) if id)
        raise InputError(f"{_name(label)} is not in the mask; allowed are {found}")
    return inside


def _in_groups(groups: Sequence[str]) -> list[int]:
    return [label for group in groups for label in labels_in_group(group)]


def _check_labels(labels: np.ndarray) -> None:
    if unknown := [int(label) for label in np.unique(labels) if label and label not in VOCABULARY]:
        raise InputError(f"the mask has the labels {unknown}; {ALLOWED}")


def _positive(what: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not np.isfinite(value) or value <= 0:
        raise InputError(f"{what} is {value!r}; allowed is a positive number")
    return value


def _name(label: int) -> str:
    return display_name(int(label)) if int(label) in VOCABULARY else f"label {int(label)}"


def _mm(spacing: np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in spacing) + " mm"
