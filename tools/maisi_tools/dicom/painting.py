"""Structures that may overlap become one mask of labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from maisi_tools.errors import InputError

logger = logging.getLogger(__name__)


class Structure(NamedTuple):
    """A named structure of a file: its label in the vocabulary, and a function that draws it (boolean volume)."""

    name: str
    label: int
    draw: Callable[[], np.ndarray]


def paint(structures: Sequence[Structure], unknown: Sequence[str], name: str) -> np.ndarray:
    """Paint structures into one mask; where they overlap, the smaller one (fewer voxels) is on top.

    So a tumour is seen in its organ, and organs in the body, whatever order the file has them in. Of equally large
    ones, the lower label is on top. Structures are drawn twice, one at a time, to keep memory at one volume.

    Args:
        structures: at least one, all on one grid.
        unknown: names of structures that no label is known for, for the messages.
        name: of the file, for the messages.

    Returns:
        uint8 volume of labels.

    Raises:
        InputError: no structure, or none that covers a voxel.
    """
    advice = 'name them in a JSON table, {"NAME": "liver", "OTHER": 0}, and give it with --names'
    if unknown:
        logger.warning("%s has structures that are left out: %s; to use them, %s", name, ", ".join(unknown), advice)
    if not structures:
        raise InputError(
            f"{name} has no structure of MAISI's vocabulary (it has: {', '.join(unknown) or 'none'}); allowed is at "
            f"least one: {advice}"
        )
    counts = [int(np.count_nonzero(structure.draw())) for structure in structures]
    order = sorted(range(len(structures)), key=lambda i: (-counts[i], -structures[i].label))
    mask: np.ndarray | None = None
    covered = 0
    for index in order:
        inside = structures[index].draw()
        if mask is None:
            mask = np.zeros(inside.shape, np.uint8)
        covered += int(np.count_nonzero(mask[inside]))
        mask[inside] = structures[index].label
        if not counts[index]:
            logger.warning("%s: the structure %s covers no voxel", name, structures[index].name)
    if mask is None or not mask.any():
        raise InputError(f"{name} covers no voxel of the series; allowed is a file that belongs to it")
    if covered:
        logger.info("%s: structures overlap in %d voxels; the smaller one was taken", name, covered)
    return mask
