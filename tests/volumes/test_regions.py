from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from maisi_tools.volumes.regions import CONTEXT_MM, blend_weight, box_of, extended, grown, window_around, windows

SPACINGS = st.tuples(*[st.sampled_from([0.7, 1.0, 2.5, 4.0])] * 3)


@settings(max_examples=25, deadline=None)
@given(spacing=SPACINGS, margin=st.sampled_from([0.0, 2.0, 8.0, 30.0]), seed=st.integers(0, 1000))
def test_the_weight_is_a_cosine_of_the_distance(spacing, margin, seed):
    """Against the distance to every changed voxel, looked up in a tree."""
    random = np.random.default_rng(seed)
    changed = np.zeros((9, 12, 10), dtype=bool)
    changed[tuple(random.integers(0, changed.shape, (4, 3)).T)] = True
    places = np.argwhere(np.ones_like(changed)) * spacing
    distance = cKDTree(np.argwhere(changed) * spacing).query(places)[0].reshape(changed.shape)
    expected = np.where(distance < margin, (1 + np.cos(np.pi * distance / max(margin, 1e-9))) / 2, 0)
    expected[changed] = 1
    weight = blend_weight(changed, spacing, margin)
    np.testing.assert_allclose(weight, expected, atol=1e-6)
    assert (weight[distance >= max(margin, 1e-9) * (1 + 1e-6)] == 0).all()


def test_boxes():
    inside = np.zeros((5, 6, 7), dtype=bool)
    inside[1, 2, 3] = inside[2, 5, 3] = True
    assert box_of(inside) == (slice(1, 3), slice(2, 6), slice(3, 4))
    assert grown(box_of(inside), inside.shape, [2, 1, 1]) == (slice(0, 5), slice(1, 6), slice(2, 5))


@settings(max_examples=50, deadline=None)
@given(
    first=st.tuples(*[st.integers(0, 99)] * 3),
    size=st.tuples(*[st.integers(1, 60)] * 3),
    spacing=SPACINGS,
    view=st.tuples(*[st.sampled_from([20.0, 90.0, 400.0])] * 3),
)
def test_a_window_has_the_field_of_view_and_the_context(first, size, spacing, view):
    shape = (100, 110, 90)
    start = [min(n, length - 1) for n, length in zip(first, shape, strict=True)]
    box = tuple(slice(a, min(a + n, length)) for a, n, length in zip(start, size, shape, strict=True))
    for side, window, length, mm, wanted in zip(
        box, window_around(box, shape, spacing, view), shape, spacing, view, strict=True
    ):
        assert 0 <= window.start <= side.start and side.stop <= window.stop <= length
        extent = (window.stop - window.start) * mm
        assert extent >= min(wanted, length * mm) - 1e-6
        # The context is there, or the volume ends.
        assert window.start == 0 or (side.start - window.start + 1) * mm >= CONTEXT_MM or window.stop == length
        assert extent < max(wanted, (side.stop - side.start) * mm + 2 * (CONTEXT_MM + mm)) + mm


def test_near_regions_share_a_window_and_far_ones_do_not():
    shape, spacing, view = (300, 100, 100), (1.0, 1.0, 1.0), (60.0, 60.0, 60.0)

    def cube(x):
        return (slice(x, x + 10), slice(40, 50), slice(40, 50))

    assert [members for members, _ in windows([cube(30), cube(250)], shape, spacing, view)] == [[0], [1]]
    assert [members for members, _ in windows([cube(250), cube(30), cube(60)], shape, spacing, view)] == [[0], [1, 2]]
    (_, one), *_ = windows([cube(30), cube(60)], shape, spacing, view)
    assert one == (slice(0, 100), slice(10, 80), slice(10, 80))


def test_a_residual_goes_on_smoothly():
    """A constant stays one in regions of any size, a step ends half-way, and nothing is what nothing gives."""
    where = np.ones((40, 40, 40), dtype=bool)
    where[5:35, 5:35, 5:35] = False
    field = extended(np.where(where, 7.0, 1e6), where, (2.0, 2.0, 2.0))
    np.testing.assert_allclose(field, 7.0, rtol=1e-3)
    ramp = np.broadcast_to(np.where(np.arange(40) < 20, -1.0, 1.0)[:, None, None], where.shape)
    field = extended(ramp, where, (2.0, 2.0, 2.0))
    assert field[4, 20, 20] == pytest.approx(-1, abs=0.05) and field[35, 20, 20] == pytest.approx(1, abs=0.05)
    assert abs(field[19:21, 20, 20].mean()) < 0.02 and np.abs(np.diff(field[:, 20, 20])).max() < 0.3
    assert (extended(ramp, np.zeros_like(where), (1.0, 1.0, 1.0)) == 0).all()
