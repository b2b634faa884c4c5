"""Dice of segmentations against labels, structure by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from tqdm import tqdm

from maisi_tools.errors import InputError, first_few
from maisi_tools.files import expanded
from maisi_tools.metrics.summary import tabulate
from maisi_tools.volumes.inputs import check_stems, stem_of
from maisi_tools.volumes.reading import read_ras

Row = dict[str, float]
"""Figures of one case: name -> value."""


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two boolean arrays of one shape; NaN where the reference is empty."""
    one, other = (torch.from_numpy(np.ascontiguousarray(array))[None, None] for array in (prediction, reference))
    return float(compute_dice(one.float(), other.float(), include_background=True, ignore_empty=True))


def structure_dice(
    prediction: np.ndarray, reference: np.ndarray, classes: Mapping[str, int], structures: Mapping[str, int]
) -> Row:
    """Dice of every structure that the reference has.

    Args:
        prediction: labels of a network, (X, Y, Z).
        reference: labels of the mask, the same shape.
        classes: name -> label in the prediction.
        structures: name -> label in the reference; names that `classes` lacks are passed over.
    """
    found = {
        name: dice(prediction == classes[name], reference == label)
        for name, label in structures.items()
        if name in classes and (reference == label).any()
    }
    return {name: round(value, 4) for name, value in found.items()}


def check_references(cases: Sequence[Mapping[str, str]], ct_key: str = "image") -> None:
    """Read the CTs and labels that a run will be compared with, and refuse those that cannot be.

    Args:
        cases: a CT and, where there are any, its ``label``; a case without CT is passed over.
        ct_key: the entry of a case that holds the CT.

    Raises:
        InputError: a file that is no CT or has no labels, or labels on another grid than their CT.
    """
    for case in tqdm(cases, desc="checking labels", unit="case", delay=2):
        ct = read_ras(case[ct_key], "ct") if ct_key in case else None
        if "label" in case:
            read_ras(case["label"], "mask", like=ct)


def check_labelled(cases: Sequence[Mapping[str, str]]) -> None:
    """Refuse, before a CT is segmented, what :func:`score_segmentations` would refuse after all are.

    Args:
        cases: see there.

    Raises:
        InputError: a case without ``label``, two cases of one stem, or as :func:`check_references`.
    """
    _check_cases(cases)
    check_references(cases)


def _check_cases(cases: Sequence[Mapping[str, str]]) -> None:
    check_stems(case["image"] for case in cases)
    if without := [case["image"] for case in cases if "label" not in case]:
        raise InputError(
            f"{first_few(without)} has no label in the datalist; Dice needs one: add it, or take the case out"
        )


def score_segmentations(
    cases: Sequence[Mapping[str, str]],
    output_dir: str | Path,
    classes: Mapping[str, int],
    structures: Mapping[str, int] | None = None,
) -> dict[str, dict[str, float]]:
    """Dice of the segmentations in a folder against labels, as ``metrics.csv`` and ``summary.json`` there.

    Args:
        cases: ``image`` (the CT that was segmented) and ``label``.
        output_dir: has ``<stem of the CT>_seg.nii.gz`` of every case.
        classes: name -> label in the segmentations.
        structures: name -> label in the labels; None where they have the same numbering.

    Returns:
        The summary of ``dice_NAME`` of every structure and of ``dice_mean``, a case's mean over what it has.

    Raises:
        InputError: a case without ``label``, a file that is missing, two grids, or two cases of one stem.
    """
    folder = expanded(output_dir)
    _check_cases(cases)
    rows: dict[str, Row] = {}
    for case in tqdm(cases, desc="measuring", unit="case", delay=2):
        stem = stem_of(case["image"])
        reference = read_ras(case["label"], "mask")
        prediction = read_ras(folder / f"{stem}_seg.nii.gz", "mask", like=reference)
        found = structure_dice(
            channel_of(prediction), channel_of(reference), classes, classes if structures is None else structures
        )
        rows[stem] = {f"dice_{name.replace(' ', '_')}": value for name, value in found.items()}
        if found:
            rows[stem]["dice_mean"] = round(float(np.mean(list(found.values()))), 4)
    return tabulate(folder, rows)


def channel_of(volume: MetaTensor) -> np.ndarray:
    """The one channel of a volume (1, X, Y, Z) as an array (X, Y, Z)."""
    return volume.as_tensor()[0].cpu().numpy()
