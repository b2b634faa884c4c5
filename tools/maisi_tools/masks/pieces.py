"""Tidying a generated mask: organs in one piece, no loose bits of body, no holes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from maisi_tools.masks.vocabulary import BODY

TOUCHING = np.ones((3, 3, 3), dtype=bool)
"""Voxels that share a corner are of one piece: a spinal cord of a voxel's width runs obliquely."""


def keep_largest_pieces(labels: np.ndarray, single: Iterable[int]) -> np.ndarray:
    """The mask with one piece of body and one piece of each label in `single`.

    What is loose of an organ becomes body, what is loose of the body becomes background, and background that the body
    encloses becomes body.

    Args:
        labels: (X, Y, Z) in the vocabulary.
        single: labels of organs that a patient has in one piece.

    Returns:
        A new array.
    """
    inside = ndimage.binary_fill_holes(_largest(labels > 0))
    tidy = np.where(inside, np.where(labels > 0, labels, BODY), 0).astype(labels.dtype)
    for label in single:
        organ = tidy == label
        tidy[organ & ~_largest(organ)] = BODY
    return tidy


def count_pieces(labels: np.ndarray, label: int) -> int:
    """How many separate pieces a label has in the mask (X, Y, Z)."""
    return int(ndimage.label(labels == label, TOUCHING)[1])


def _largest(inside: np.ndarray) -> np.ndarray:
    pieces, count = ndimage.label(inside, TOUCHING)
    if count < 2:
        return inside
    return pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
