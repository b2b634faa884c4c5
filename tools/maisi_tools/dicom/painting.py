"""Structures that may overlap become one mask of labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from maisi_tools.errors import InputError

logger = logging.getLogger(__name__)

WITH_ITS_SERIES = (
    "give the CT series it was drawn on, too (on the command line as --series FOLDER, to the listener in the same "
    "study)"
)
"""What to do, for messages."""

MAX_STRUCTURES = 1000
"""Of one file, that are drawn; the vocabulary has 132 labels."""

Place = tuple[slice, slice, slice]
EVERYWHERE: Place = (slice(None), slice(None), slice(None))


class Structure(NamedTuple):
    """A named structure of a file.

    Attributes:
        name: of the file.
        label: in the vocabulary.
        draw: draws it, as a boolean volume of the size of `place`.
        place: the part of the grid outside of which it is not.
    """

    name: str
    label: int
    draw: Callable[[], np.ndarray]
    place: Place = EVERYWHERE


def paint(
    structures: Sequence[Structure],
    shape: tuple[int, int, int],
    unknown: Sequence[str],
    name: str,
    undrawn: Sequence[str] = (),
) -> np.ndarray:
    """Paint structures into one mask; where they overlap, the smaller one (fewer voxels) is on top.

    So a tumour is seen in its organ, and organs in the body, whatever order the file has them in. Of equally large
    ones, the lower label is on top. Structures are drawn twice, one at a time, to keep memory at one volume.

    Args:
        structures: at least one, all on one grid.
        shape: of the grid.
        unknown: names of structures that no label is known for, for the messages.
        name: of the file, for the messages.
        undrawn: structures that cannot be drawn, with the reason, for the messages.

    Returns:
        uint8 volume of labels.

    Raises:
        InputError: no structure, or none that covers a voxel.
    """
    advice = 'name them in a JSON table, {"NAME": "liver", "OTHER": 0}, and give it as names (--names NAMES)'
    if unknown:
        logger.warning("%s has structures that are left out: %s; to use them, %s", name, ", ".join(unknown), advice)
    if undrawn:
        logger.warning("%s has structures that cannot be drawn: %s", name, ", ".join(undrawn))
    if len(structures) > MAX_STRUCTURES:
        raise InputError(f"{name} has {len(structures)} structures; allowed are {MAX_STRUCTURES}: leave some out")
    if not structures and undrawn and not unknown:
        raise InputError(
            f"{name} has no structure that can be drawn (it has: {', '.join(undrawn)}); allowed is at least one, with "
            f"closed contours in the series' frame of reference: {WITH_ITS_SERIES}"
        )
    if not structures:
        raise InputError(
            f"{name} has no structure of MAISI's vocabulary (it has: {', '.join([*unknown, *undrawn]) or 'none'}); "
            f"allowed is at least one: {advice}"
        )
    counts = [int(np.count_nonzero(structure.draw())) for structure in structures]
    order = sorted(range(len(structures)), key=lambda i: (-counts[i], -structures[i].label))
    mask = np.zeros(shape, np.uint8)
    covered = 0
    for index in order:
        inside, part = structures[index].draw(), mask[structures[index].place]
        covered += int(np.count_nonzero(part[inside]))
        part[inside] = structures[index].label
        if not counts[index]:
            logger.warning("%s: the structure %s covers no voxel", name, structures[index].name)
    if not mask.any():
        raise InputError(f"{name} covers no voxel of the series; allowed is a file that belongs to it")
    if covered:
        logger.info("%s: structures overlap in %d voxels; the smaller one was taken", name, covered)
    return mask
