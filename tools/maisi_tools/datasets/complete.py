"""The masks that stage 3 trains on: a data set's own labels, completed by what the CT's intensities say."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Orientation, Spacing

from maisi_tools.datasets.workers import in_order
from maisi_tools.errors import InputError, first_few
from maisi_tools.files import canonical_json, check_own_json, write_json
from maisi_tools.masks.body import label_from_ct
from maisi_tools.masks.class_folder import read_numbers
from maisi_tools.masks.edits import twins
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap, ReadLabelsd, read_label_map
from maisi_tools.masks.vocabulary import (
    PLACEHOLDER_NAMES,
    VOCABULARY,
    checked_regions,
    display_name,
    label_id,
    labels_in_group,
    region_of,
)
from maisi_tools.volumes.grid import grid_difference
from maisi_tools.volumes.inputs import (
    check_output_dir,
    check_targets,
    fingerprint_input,
    of_a_run,
    sidecar_path,
    stem_of,
)
from maisi_tools.volumes.orientation import RestoreOrientationd
from maisi_tools.volumes.reading import read_ras, read_sidecar, read_volume, sidecar_if_any
from maisi_tools.volumes.writing import write_sidecar, write_volume

logger = logging.getLogger(__name__)

MASK = "_mask"
"""What a mask's file name has after the CT's stem."""

TWINS = "twins"
"""In a mask's JSON, where its label map has placeholders: [id, the id that a left/right flip makes of it] of these."""

OWN = "own_labels"
"""In a mask's JSON: the ids among its labels that the case's own labels have."""

CASES = "cases.json"
"""The datalist of CTs, regions and modalities that ``maisi_vae``'s encode.json takes as its input."""

_LISTED = {"image", "region", "modality"}  # what an entry of it has


def complete_masks(
    items: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    label_map: str | Path,
    spacing: Sequence[float] | None = None,
    workers: int = 0,
) -> list[Path]:
    """Write ``<stem of the CT>_mask.nii.gz`` for every case, in the MAISI vocabulary and on the CT's grid.

    A case's own labels stay; body, airway, lung and bone that they leave open are added from the CT
    (:func:`maisi_tools.masks.body.label_from_ct`). A case without a mask gets the latter alone. Labels that are too
    small for the `spacing` are left out, with a warning. A JSON beside each mask
    says what it was made from, and which of its placeholders are a left and a right one (:func:`twins_of`); masks that
    are up to date are skipped, so an interrupted run can be started again, and a mask without such a JSON is the user's
    own and stays. At the end :data:`CASES` lists the CTs with their body regions: those of the item, or else those that
    the mask shows. Bone that the CT's intensities show tells no region; which CTs have none is said.

    Args:
        items: cases with ``image`` and, where there is one, ``label``; ``region`` where it is known.
        label_map: how the labels are to be read, see :func:`maisi_tools.masks.label_maps.read_label_map`.
        spacing: mm along x, y, z (RAS): the CTs are resampled to it first (linear, own labels by nearest neighbour),
            and the masks lie on that grid. Give what the latents are encoded at: an airway two voxels wide loses half
            of its air in the resampling, and a mask of the original CT would still call all of it airway.
        workers: processes that work beside one another; what is written does not depend on it.

    Raises:
        InputError: no items; a file cannot be read, has no label or one that the map does not know, or lies on another
            grid than its CT; two CTs of one stem; a spacing that is not three positive numbers; a :data:`CASES` in the
            folder that no earlier run wrote.
    """
    if not items:
        raise InputError("no case is given; allowed is at least one CT: see what `maisi prepare` writes of a data set")
    folder = check_output_dir(output_dir)
    check_own_json(folder / CASES, _is_cases, "`maisi complete_masks`", "output_dir")
    _regrid(spacing, "nearest")  # a bad one is refused before any work
    mapping = read_label_map(label_map)
    stems = [stem_of(item["image"]) for item in items]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(f"several CTs have the name {', '.join(twice)}; masks are named by it: rename one")
    targets = [folder / f"{stem}{MASK}.nii.gz" for stem in stems]
    ours = [path for path in targets if of_a_run(path)]
    check_targets([item[key] for item in items for key in ("image", "label") if key in item], ours, folder)
    named = sorted(twins(mapping).items() - twins(LABEL_MAPS["maisi"]).items())
    says = {TWINS: [list(pair) for pair in named]} if mapping.placeholders else {}
    complete = functools.partial(_complete, folder=folder, mapping=mapping, spacing=spacing, says=says)
    regions = list(in_order(complete, items, workers, "completing masks"))
    cases = [
        {"image": os.path.abspath(item["image"]), "region": region}
        | ({"modality": item["modality"]} if "modality" in item else {})
        for item, region in zip(items, regions, strict=True)
    ]
    write_json(folder / CASES, cases)
    if unknown := [case["image"] for case in cases if not case["region"]]:
        logger.warning(
            "nothing tells the body region of %d of %d CTs, such as %s; they are encoded as of an unknown one: give "
            "their `region` in the datalist, such as ['chest', 'abdomen']",
            len(unknown),
            len(cases),
            unknown[0],
        )
    return targets


def twins_of(mask: Any) -> dict[int, int]:
    """What a left/right flip makes of each id of a mask; see :func:`maisi_tools.masks.edits.twins`.

    The sides of placeholders are those that the JSON beside its file says, where it does, else OpenKBP's.

    Args:
        mask: ``MetaTensor`` with the name of its file.

    Raises:
        InputError: what the JSON says is no such table.
    """
    file = mask.meta.get("filename_or_obj")
    said = sidecar_if_any(file).get(TWINS) if file else None
    if said is None:
        return twins()
    try:
        pairs = {int(id): int(twin) for id, twin in said}
    except (TypeError, ValueError):
        pairs = {0: 0}
    if not {*pairs, *pairs.values()} <= VOCABULARY.keys():
        raise InputError(
            f"{sidecar_path(file)} has {TWINS} {said!r:.80}; allowed are pairs of ids of the vocabulary: delete both "
            "files, and let `maisi complete_masks` make them again"
        )
    return twins(LABEL_MAPS["maisi"]) | pairs


def ct_of(mask: str | Path) -> str | None:
    """Fingerprint of the CT that a mask was completed from; None of a user's own mask, whose JSON does not say it."""
    sources = sidecar_if_any(mask).get("sources")
    return str(sources[0]) if isinstance(sources, list) and sources else None


def check_cts(pairs: Iterable[tuple[str, str | None]]) -> None:
    """Refuse masks that were completed from another CT than the one they are paired with by their names.

    Args:
        pairs: mask's file and fingerprint of that CT (:func:`~maisi_tools.volumes.inputs.fingerprint_input`), None
            where it is not known.

    Raises:
        InputError: with the masks.
    """
    if others := sorted({mask for mask, ct in pairs if ct is not None and ct_of(mask) not in (None, ct)}):
        raise InputError(
            f"{len(others)} masks were completed from other CTs than they are paired with: {first_few(others)}; "
            "allowed are masks of the same CTs, by the content of their files: run `maisi complete_masks` again, and "
            "encode again where latents are of the older CTs"
        )


def _is_cases(found: Any) -> bool:
    return all({"image", "region"} <= case.keys() <= _LISTED for case in found)


def _complete(
    item: Mapping[str, Any], folder: Path, mapping: LabelMap, spacing: Sequence[float] | None, says: Mapping[str, Any]
) -> list[str]:
    """Write the mask of one case unless it is up to date, its JSON with what it `says`; return the case's regions."""
    path = folder / f"{stem_of(item['image'])}{MASK}.nii.gz"
    settings = {"label_map": dict(mapping) if "label" in item else None, "spacing": spacing}
    files = [item[key] for key in ("image", "label") if key in item]
    sources = [fingerprint_input(file) for file in files if Path(file).exists()]  # reading refuses the others
    made_from = {"settings": canonical_json(settings), "sources": sources}
    found = read_sidecar(path) if path.is_file() and of_a_run(path) else {}
    if not path.is_file() or (found and {name: found.get(name) for name in made_from} != made_from):
        completed, affine, own = _completed(item, mapping, spacing)
        found = {**made_from, **says, "labels": np.unique(completed), OWN: own}
        path.unlink(missing_ok=True)  # wherever this is interrupted: where there is a mask, its JSON is about it
        write_sidecar(path, found)
        write_volume(path, completed, affine, "uint8")
    elif found and says.get(TWINS) != found.get(TWINS):  # by an earlier version, or before classes were renamed
        found = {name: value for name, value in found.items() if name != TWINS} | dict(says)
        write_sidecar(path, found)
    if item.get("region"):
        return list(checked_regions(item["region"]))
    if not found:
        return list(region_of(read_volume(path, "mask").unique().tolist()))
    return list(_region(found, "label" in item, mapping))


def _region(found: Mapping[str, Any], labelled: bool, mapping: LabelMap) -> tuple[str, ...]:
    """The regions that a mask shows by what its JSON says: bone counts where the case's own labels have it."""
    labels = {int(id) for id in found["labels"]}
    if labelled and OWN not in found:  # of an earlier version
        return region_of(labels)
    own = {int(id) for id in found.get(OWN, ())}
    labels -= set(labels_in_group("bone")) - own
    if own & PLACEHOLDER_NAMES.keys() and not mapping.placeholders:  # organs of head and neck
        labels.add(label_id("skull"))
    return region_of(labels)


def _completed(
    item: Mapping[str, Any], mapping: LabelMap, spacing: Sequence[float] | None
) -> tuple[np.ndarray, Any, list[int]]:
    """The mask (X, Y, Z) of one case in the orientation of the CT's file, its affine, and the ids of its own labels."""
    ct: Any = read_ras(item["image"], "ct")
    labels = None
    if "label" in item:
        own: Any = Orientation(axcodes="RAS", labels=None)(read_numbers(item["label"], mapping))
        if difference := grid_difference(own, ct):
            raise InputError(
                f"{item['label']} lies on another grid than its CT {item['image']} (in RAS: {difference}); allowed is "
                "one grid for both: resample the mask to the CT"
            )
        own.affine = ct.affine  # the same to a tenth of a voxel; resampled, they would differ in size
        own = ReadLabelsd("label", mapping)({"label": own})["label"]
        labels = np.asarray(_regrid(spacing, "nearest")(own)[0]).astype(np.uint8)
        if lost := np.setdiff1d(np.asarray(own), labels).tolist():
            logger.warning(
                "%s: of %s nothing is left at %s mm, and its mask goes without; give a finer spacing if that matters",
                item["label"],
                ", ".join(map(display_name, lost)),
                spacing,
            )
    ct = _regrid(spacing, "bilinear")(ct)
    if labels is None:
        labels = np.zeros(ct.shape[1:], dtype=np.uint8)
    completed = label_from_ct(np.asarray(ct[0]), labels, [float(mm) for mm in ct.pixdim])
    mask = RestoreOrientationd("mask", "ct")({"mask": torch.from_numpy(completed)[None], "ct": ct})["mask"]
    return np.asarray(mask[0]), mask.affine, np.unique(labels).tolist()


def _regrid(spacing: Sequence[float] | None, mode: str) -> Callable[[Any], Any]:
    if spacing is None:
        return Compose([])
    mm = np.asarray(spacing, dtype=object)
    if mm.shape != (3,) or not all(isinstance(n, (int, float)) and 0 < n < np.inf for n in mm):
        raise InputError(
            f"spacing is {spacing!r}; allowed are three positive numbers, mm along x, y, z: [2.0, 2.0, 2.5]"
        )
    return Spacing(pixdim=tuple(map(float, mm)), mode=mode)
