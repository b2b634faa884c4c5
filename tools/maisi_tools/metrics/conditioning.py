"""Does a generated CT have the anatomy of the mask it was made from? Dice by a network, and by thresholds."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from tqdm import tqdm

from maisi_tools.datasets.complete import check_cts, ct_of
from maisi_tools.errors import InputError
from maisi_tools.files import check_own_table, expanded, write_csv
from maisi_tools.masks.body import body_envelope, label_from_ct, labels_of_more
from maisi_tools.masks.edits import volumes_ml
from maisi_tools.masks.vocabulary import BODY, labels_in_group
from maisi_tools.metrics.overlap import Row, channel_of, check_references, dice, structure_dice
from maisi_tools.metrics.segmenters import labels_on_grid, map_of_classes
from maisi_tools.volumes.grid import same_grid
from maisi_tools.volumes.inputs import find_inputs, fingerprint_input, stem_of
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.reading import read_ras, read_sidecar
from maisi_tools.volumes.writing import write_sidecar

logger = logging.getLogger(__name__)

SMALL_ML = 20.0
"""A structure with less volume is small: of OpenKBP's, most esophagi and half of the larynges (medians of 55 patients:
11 and 20 ml; brain stem, spinal cord and parotids 25 to 27, mandible 63)."""

TISSUES = ("bone", "airway", "lung")
"""Groups of labels that intensity alone tells, see :func:`maisi_tools.masks.body.label_from_ct`."""

TABLE = "conditioning.csv"
COLUMNS = ("structure", "ml", "cases", "generated", "real", "ratio")


def tissue_dice(ct: np.ndarray, mask: np.ndarray, spacing: Sequence[float]) -> Row:
    """Dice of bone, airway, lung and body, found in a CT by their HU, against its mask.

    They are found as :func:`maisi_tools.masks.body.label_from_ct` finds them in a real CT: by its thresholds, inside
    the body, outside the mask's organs. Bone of the mask includes marrow where a bone was labelled by hand.

    Args:
        ct: (X, Y, Z) in HU.
        mask: the same shape, in the vocabulary, with the body label.
        spacing: mm along x, y, z.

    Returns:
        ``bone``, ``airway``, ``lung``, ``body``; a tissue that the mask does not have is left out. Body is all that
        lies inside the skin of the CT, whatever the mask's organs say.
    """
    members = {tissue: labels_in_group(tissue) for tissue in TISSUES}
    open_labels = [BODY, *(label for labels in members.values() for label in labels)]
    organs = np.where(np.isin(mask, open_labels), 0, mask)
    body = body_envelope(ct, spacing)
    found = label_from_ct(ct, organs, spacing, body)
    dices = {name: dice(np.isin(found, labels), np.isin(mask, labels)) for name, labels in members.items()}
    dices["body"] = dice(body, mask > 0)
    return {name: round(value, 4) for name, value in dices.items() if not np.isnan(value)}


def pair_masks(cases: Sequence[Mapping[str, str]], masks_dir: str | Path) -> list[dict[str, str]]:
    """The items that ``maisi_controlnet``'s evaluate.json takes: masks, with the CTs and labels they came from.

    Args:
        cases: ``image`` (CT) and, where there is one, ``label``, as `maisi prepare` lists them.
        masks_dir: has ``<stem of the CT>_mask.nii.gz`` for each, as `maisi complete_masks` writes them.

    Returns:
        ``{"image": mask, "ct": CT, "label": labels}``.

    Raises:
        InputError: a mask is missing, or was completed from another CT than the one of its name.
    """
    folder = expanded(masks_dir)
    items = []
    for case in cases:
        mask = folder / f"{stem_of(case['image'])}_mask.nii.gz"
        if not mask.is_file():
            raise InputError(f"{mask} does not exist; make the masks of these CTs with `maisi complete_masks` first")
        label = {"label": str(case["label"])} if "label" in case else {}
        items.append({"image": str(mask), "ct": str(case["image"]), **label})
    # Of a user's own masks, and of CTs that the door will miss, nothing is read.
    told = [item for item in items if ct_of(item["image"]) and Path(item["ct"]).exists()]
    check_cts((item["image"], fingerprint_input(item["ct"])) for item in told)
    return find_inputs(items, "image")


def check_numbering(output_labels: str) -> None:
    """Refuse masks in another numbering than the vocabulary's, in which :func:`score_generated` reads them.

    Raises:
        InputError: `output_labels` is not "vocabulary".
    """
    if output_labels != "vocabulary":
        raise InputError(f"output_labels is {output_labels!r}; allowed in an evaluation is 'vocabulary': leave it out")


def check_conditioning(output_dir: str | Path) -> None:
    """Refuse to write over a ``conditioning.csv`` that no evaluation wrote.

    Raises:
        InputError: there is one with other columns.
    """
    check_own_table(expanded(output_dir) / TABLE, COLUMNS, "evaluation", "output_dir")


def check_structures(
    items: Sequence[Mapping[str, str]], classes: Mapping[str, int], structures: Mapping[str, int] | None = None
) -> None:
    """Refuse structures that :func:`score_generated` could not compare with what they are meant to be.

    Raises:
        InputError: `structures` names a class that the network does not have, or is one numbering for references of
            two; or it is None, and the network's classes have no names by which a mask can be read, or those of bones
            alone.
    """
    labelled = ["label" in item for item in items]
    if structures is None:
        if not all(labelled):
            if not _in_mask(classes):
                raise InputError(
                    f"the segmentation network has the classes {', '.join(classes)}, all bones, of which a mask may "
                    "have more under one label; give structures, such as {skull: 120}, or cases with labels"
                )
        return
    if unknown := structures.keys() - classes.keys():
        raise InputError(
            f"structures {', '.join(sorted(unknown))} are no classes of the segmentation network; allowed are "
            f"{', '.join(classes)}"
        )
    if any(labelled) and not all(labelled):
        raise InputError(
            f"structures is one numbering, and {sum(labelled)} of {len(labelled)} cases have labels, the others the "
            "mask itself; leave structures out, or evaluate cases with and without labels apart"
        )


def check_cases(
    items: Sequence[Mapping[str, str]], segmenter: Any = None, structures: Mapping[str, int] | None = None
) -> None:
    """Refuse, before a CT is made, what :func:`score_generated` would refuse after all are.

    Args:
        items, segmenter, structures: see there.

    Raises:
        InputError: as :func:`check_structures` and :func:`maisi_tools.metrics.overlap.check_references`.
    """
    if segmenter is not None:
        check_structures(items, segmenter.classes, structures)
    check_references(items, "ct")


def score_generated(
    items: Sequence[Mapping[str, str]],
    output_dir: str | Path,
    segmenter: Any = None,
    structures: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Add the Dice of generated CTs to the ``metrics`` of their sidecars, and write :data:`TABLE`.

    The real CT of the same patient is measured in the same way, where it is given: what a network or a threshold does
    not find in a real CT, it cannot be expected to find in a generated one.

    Args:
        items: ``image`` (the mask), optionally ``ct`` (the real CT) and ``label`` (labels of its structures, on its
            grid; without it the mask itself is the reference). Where the mask has another grid, the labels follow the
            generated CT by nearest neighbour, and the real CT's tissues are found on the mask's grid.
        output_dir: has ``NAME_ct.nii.gz``, its sidecar and ``NAME_mask.nii.gz`` of every mask NAME.
        segmenter: CT file -> labels, with ``classes`` (name -> label), such as
            :class:`maisi_tools.metrics.segmentation.BundleSegmenter`; None for thresholds alone.
        structures: name -> label in the reference; None where labels have the segmenter's numbering (in a mask its
            classes are looked for by their names, but for those of which a mask may have more under one label: see
            :func:`maisi_tools.masks.body.labels_of_more`).

    Returns:
        Rows of the table, see :func:`conditioning_table`. Where a structure of the network is called as a tissue
        found by threshold is, the tissue's row is ``NAME by threshold``.

    Raises:
        InputError: a CT was not generated, a real CT and its labels have different grids, or as
            :func:`check_structures` and :func:`check_conditioning`.
    """
    folder = expanded(output_dir)
    check_conditioning(folder)
    if segmenter is not None:
        check_structures(items, segmenter.classes, structures)
    cases = []
    left_out: set[str] = set()
    for item in tqdm(items, desc="measuring anatomy", unit="case", delay=2):
        stem = stem_of(item["image"])
        generated = folder / f"{stem}_ct.nii.gz"
        paths = {"generated": generated} | ({"real": Path(item["ct"])} if "ct" in item else {})
        mask = read_ras(folder / f"{stem}_mask.nii.gz", "mask")
        wanted: Mapping[str, int] = {}
        if segmenter is not None:
            wanted = segmenter.classes if structures is None else structures
            if structures is None and "label" not in item:
                wanted = _in_mask(segmenter.classes, np.unique(channel_of(mask)))
                left_out |= segmenter.classes.keys() - wanted.keys()
        volumes = {"generated": read_ras(generated, "ct", like=mask)}
        volumes |= {kind: read_ras(path, "ct") for kind, path in paths.items() if kind != "generated"}
        case: dict[str, Any] = {kind: {} for kind in ("ml", *paths)}
        for kind, ct in volumes.items():
            on_mask = channel_of(_on_grid(ct, mask, "bilinear", outside=HU_RANGE[0]))
            found = tissue_dice(on_mask, channel_of(mask).astype(np.uint8), [float(mm) for mm in mask.pixdim])
            # By the names of the network, not by what it has in this case: a row has one measure in all cases.
            case[kind] |= {f"{name} by threshold" if name in wanted else name: value for name, value in found.items()}
        case["ml"] |= {tissue: np.inf for tissue in case["generated"]}
        if segmenter is not None:
            reference = read_ras(item["label"], "mask", like=volumes.get("real")) if "label" in item else mask
            case["ml"] |= _volumes(reference, wanted)
            for kind, path in paths.items():
                predicted = labels_on_grid(segmenter(path), volumes[kind])
                labels = _on_grid(reference, volumes[kind], "nearest", outside=0)
                case[kind] |= structure_dice(channel_of(predicted), channel_of(labels), segmenter.classes, wanted)
        _add_metrics(generated, case)
        cases.append(case)
    if left_out:
        logger.warning(
            "not compared, or not in all cases, as the masks are the reference: %s; they have no name of the "
            "vocabulary, or a mask may have more under their label, such as all bone: give structures, or cases with "
            "labels",
            ", ".join(sorted(left_out)),
        )
    rows = conditioning_table(cases)
    _write_table(folder / TABLE, rows)
    return rows


def conditioning_table(cases: Sequence[Mapping[str, Row]]) -> list[dict[str, Any]]:
    """One row a structure, and one for small, for large and for all structures of the network together.

    Args:
        cases: ``generated`` and optionally ``real`` (structure -> Dice), ``ml`` (structure -> volume in the reference;
            infinite for tissues found by threshold, which enter no group).

    Returns:
        Rows with ``structure``, ``ml`` (median), ``cases``, ``generated`` and ``real`` (mean Dice), ``ratio`` (of the
        two means, over the cases that have both). A group's row is the mean over all its structures in all cases.
    """
    entries = [
        (name, case["ml"][name], value, case.get("real", {}).get(name))
        for case in cases
        for name, value in case["generated"].items()
    ]
    names = list(dict.fromkeys(name for name, *_ in entries))
    rows = [_row(name, [entry for entry in entries if entry[0] == name]) for name in names]
    of_network = [entry for entry in entries if np.isfinite(entry[1])]
    groups = {
        f"small structures (< {SMALL_ML:g} ml)": [entry for entry in of_network if entry[1] < SMALL_ML],
        f"large structures (>= {SMALL_ML:g} ml)": [entry for entry in of_network if entry[1] >= SMALL_ML],
        "all structures": of_network,
    }
    return rows + [_row(name, group) for name, group in groups.items() if group]


def _row(name: str, entries: Sequence[tuple[str, float, float, float | None]]) -> dict[str, Any]:
    volume = statistics.median(ml for _, ml, *_ in entries)
    row: dict[str, Any] = {
        "structure": name,
        "ml": round(volume, 1) if np.isfinite(volume) else "",
        "cases": len(entries),
        "generated": round(statistics.fmean(generated for _, _, generated, _ in entries), 4),
        "real": "",
        "ratio": "",
    }
    pairs = [(generated, real) for _, _, generated, real in entries if real is not None]
    if pairs:
        generated, real = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        row["real"] = round(real, 4)
        row["ratio"] = round(generated / real, 4) if real > 0 else ""
    return row


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_csv(path, rows, COLUMNS)
    for row in rows:
        logger.info("%-32s %6s ml %5d cases  generated %.4f  real %6s  ratio %6s", *row.values())


def _add_metrics(ct: Path, case: Mapping[str, Row]) -> None:
    """Write a case's Dice as ``dice_NAME`` and ``real_dice_NAME`` into its sidecar's metrics."""
    content = read_sidecar(ct)
    metrics = content.setdefault("metrics", {})
    for kind, prefix in (("generated", "dice"), ("real", "real_dice")):
        metrics |= {f"{prefix}_{name.replace(' ', '_')}": value for name, value in case.get(kind, {}).items()}
    write_sidecar(ct, content)


def _volumes(reference: MetaTensor, structures: Mapping[str, int]) -> Row:
    found = volumes_ml(channel_of(reference), [float(mm) for mm in reference.pixdim])
    return {name: found[label] for name, label in structures.items() if label in found}


def _in_mask(classes: Mapping[str, int], present: Iterable[int] = ()) -> dict[str, int]:
    """Name -> id of the classes that can be compared with a mask that has the ids `present`, in the vocabulary."""
    read, more = map_of_classes("the segmentation network", classes), labels_of_more(present)
    return {name: read[label] for name, label in classes.items() if label in read and read[label] not in more}


def _on_grid(volume: MetaTensor, like: MetaTensor, mode: str, outside: float) -> MetaTensor:
    """Resample a volume to the grid of another, unless it lies on it; `outside` where its own does not reach."""
    if same_grid(volume, like):
        return volume
    values: Any = SpatialResample(mode=mode, padding_mode="border", align_corners=False)
    reach: Any = SpatialResample(mode="nearest", padding_mode="zeros", align_corners=False)
    found = values(volume, dst_affine=like.affine, spatial_size=like.shape[1:])
    own = MetaTensor(torch.ones(volume.shape), affine=volume.affine)
    found[reach(own, dst_affine=like.affine, spatial_size=like.shape[1:]) == 0] = outside
    return found
