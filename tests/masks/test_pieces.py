from __future__ import annotations

import numpy as np

from maisi_tools.masks.pieces import count_pieces, keep_largest_pieces


def test_loose_pieces_go_and_holes_are_filled():
    labels = np.zeros((20, 20, 20), dtype=np.uint8)
    labels[2:14, 2:14, 2:14] = 200
    labels[3:6, 3:6, 3:6] = 121
    labels[9, 9, 9] = 121  # loose
    labels[11, 11, 11] = 0  # a hole
    labels[17:19, 17:19, 17:19] = 18  # outside the body
    labels[4, 10, 4] = labels[10, 4, 4] = 120  # bone may be in pieces
    tidy = keep_largest_pieces(labels, [121, 18])
    expected = labels.copy()
    expected[9, 9, 9] = expected[11, 11, 11] = 200
    expected[17:19, 17:19, 17:19] = 0
    np.testing.assert_array_equal(tidy, expected)
    assert tidy.dtype == np.uint8 and labels[11, 11, 11] == 0


def test_corners_hold_a_piece_together():
    labels = np.zeros((6, 6, 6), dtype=np.uint8)
    for i in range(6):
        labels[i, i, i] = 121
    assert count_pieces(labels, 121) == 1 and count_pieces(labels, 18) == 0
    np.testing.assert_array_equal(keep_largest_pieces(labels, [121]), labels)


def test_an_empty_mask_stays_empty():
    assert not keep_largest_pieces(np.zeros((3, 3, 3), dtype=np.uint8), [121]).any()
