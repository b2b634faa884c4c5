"""The checks on arrays and numbers, each at both sides of its border."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import (
    check_affine,
    check_ct_intensities,
    check_finite,
    check_labels,
    check_output_size,
    check_shape,
    check_spacing,
    warn_field_of_view,
    whole_labels,
)

SMALL = ((0.7, 2.5), (0.7, 2.5), (1, 5))


def between(low, high):
    return np.linspace(low, high, 60, dtype=np.float32).reshape(3, 4, 5)


def padded(values, value):
    """With the scanner's padding along an edge."""
    values[:, -1, 0] = value
    return values


@pytest.mark.parametrize(
    "values",
    [between(*limits) for limits in ((-1000, 1000), (-3024, 3071), (-100, 80), (-1000, 0), (-17, 9), (-20, 200))]
    + [padded(between(-1000, 1000), -3024), padded(between(-20, 80), -2000), padded(between(0, 80), -1024)],
)
def test_hounsfield_units_pass(values):
    check_ct_intensities(values, "x.nii")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (between(0, 1), r"x\.nii has values from 0 to 1, as after normalisation; allowed is a CT in Houns.*: give"),
        (between(-1, 1), "from -1 to 1, as after normalisation"),
        (between(-1.5, 1), "from -1.5 to 1, as after normalisation"),
        (between(-15, 15), "as after normalisation"),
        (between(0, 255), r"from 0 to 255, as in an 8-bit picture; allowed is .*: export the CT"),
        (between(3, 250), "8-bit"),
        (between(0, 4095), r"from 0 to 4095 and none below 0; allowed is .* rescale intercept \(often -1024\)"),
        (between(0, 700), "none below 0"),
        (padded(between(0, 4095), -2000), r"from 0 to 4095 beside -2000 and none below 0; .* rescale intercept"),
        (padded(between(24, 3000), -32768), "from 24 to 3000 beside -32768 and none below 0"),
        (padded(between(0, 255), -3024), "8-bit"),
        (padded(between(0, 1), -3024), "as after normalisation"),
        (between(-1000, -1000), r"has the value -1000 everywhere; allowed is .*: check"),
    ],
)
def test_other_intensities_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        check_ct_intensities(values, "x.nii")


def body(tissue=0.3, lung=0.0, shape=(20, 20, 20)):
    """Air with noise, and shares of soft tissue and lung."""
    values = np.random.default_rng(0).normal(-1000, 8, shape).reshape(-1)
    count, more = round(tissue * values.size), round(lung * values.size)
    values[:count] += 1040
    values[: count // 40] += 800  # bone
    values[count : count + more] += 150
    values[: more // 500] = 0  # a vessel
    return values.reshape(shape)


@pytest.mark.parametrize(("tissue", "lung"), [(0.3, 0.0), (0.005, 0.0), (0.0, 0.9), (0.0, 0.2), (0.005, 0.3)])
def test_little_tissue_and_pure_lung_pass(tissue, lung, caplog):
    check_ct_intensities(body(tissue, lung), "x.nii")
    assert not caplog.text


@pytest.mark.parametrize(
    ("values", "soft"),
    [
        (np.maximum(body(), -1000) - 1024, 0),
        (np.maximum(body() - 1024, -1024), 0),
        (np.where(body(0.1) > -500, 900, body(0.1)), 0),
        (np.where(body(0.02) > -500, np.arange(8000).reshape(20, 20, 20) % 4 * 100, body(0.02)), 50),
    ],
)
def test_air_with_hardly_any_soft_tissue_in_it_is_named(values, soft, caplog):
    """An intercept added twice to what is clipped at air; a narrow crop may look like it, so it goes on."""
    check_ct_intensities(values, "x.nii")
    assert f"of what is above -300 HU {soft} % is within 150 HU of water" in caplog.text and "twice" in caplog.text


@pytest.mark.parametrize(
    "values",
    [np.clip((body() + 160) / 400 * 255, 0, 255).round() - 1024, padded(between(-1024, -769), -2000)],
)
def test_an_8_bit_picture_with_an_intercept_is_refused(values):
    with pytest.raises(InputError, match="as in an 8-bit picture with an intercept"):
        check_ct_intensities(values, "x.nii")


def anatomy(shape=(32, 32, 32)):
    """HU with the shares of a CT: air, lung, fat, soft tissue and bone, with noise of 10 HU."""
    count = math.prod(shape)
    values = np.repeat([-1000.0, -850.0, -100.0, 40.0, 600.0], np.multiply([50, 10, 15, 22, 3], count) // 100)
    noise = np.random.default_rng(0).normal(0, 10, count)
    return (noise + np.pad(values, (0, noise.size - values.size), constant_values=40)).round().reshape(shape)


def outlier(values, value):
    values = values.copy()
    values[0, 0, 0] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        *(anatomy(), np.clip(anatomy(), -1000, 1000), np.where(anatomy() > 500, 1000, anatomy()), anatomy()[16:, :8]),
        np.pad(anatomy(), 4, constant_values=-3024),
        np.where(anatomy() > 500, 3000, anatomy()),  # metal
        np.where(anatomy() > 0, 350, anatomy()),  # contrast medium
        np.arange(-4, 4).repeat(64).reshape(8, 8, 8),  # water
    ],
)
def test_bodies_and_crops_pass_without_a_word(values, caplog):
    check_ct_intensities(values, "x.nii")
    assert not caplog.text


def test_one_odd_voxel_does_not_make_other_numbers_hounsfield_units():
    """Each was taken for a CT, for the one voxel beyond the others or for those beyond 0 to 1."""
    hu, normal = anatomy(), "as after normalisation"
    stored = np.maximum(hu, -1024) + 1024
    for values, message in (
        ((hu - hu.mean()) / hu.std(), normal),
        (hu / 1000, normal),
        (outlier(np.clip(hu / 2000 + 0.5, 0, 1), -40), normal),
        (outlier(np.clip(hu / 1000, -1, 1), 70), normal),
        (np.pad(hu / 1000, 4, constant_values=-3024), "beside -3024, as after normalisation"),
        (outlier(np.clip(hu / 2 + 40, 0, 255).round(), -1), "from -1 to 255, as in an 8-bit picture"),
        (outlier(np.clip(hu / 2 + 40, 0, 255).round(), 300), "from 0 to 300, as in an 8-bit picture"),
        (outlier(stored, -1), "and hardly any below 0; .* rescale intercept"),
    ):
        with pytest.raises(InputError, match=message):
            check_ct_intensities(values, "x.nii")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.where(anatomy() < -990, -976, anatomy() + 1024), "within 150 of 1024, where a body has less than 5 %; if"),
        (anatomy() * 10, "of them are below -2100 or above 4000 HU, where no tissue is; if they were multiplied"),
        (np.clip(anatomy() * 0.6375 + 102, 0, 255) + np.sin(np.arange(32)), "as in a resampled 8-bit picture: "),
    ],
)
def test_what_looks_unlike_a_ct_is_named(values, message, caplog):
    check_ct_intensities(values, "x.nii")
    assert caplog.text.count("WARNING") == 1 and message in caplog.text and "x.nii has values from" in caplog.text


def test_nan_and_inf_are_counted():
    values = between(-1000, 1000)
    check_finite(values, "x.nii")
    values[0, 0, :3], values[1, 1, 1], values[2, 2, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(InputError, match=r"x\.nii has 3 NaN and 2 infinite voxels of 60; allowed are finite.*replace"):
        check_finite(values, "x.nii")


@pytest.mark.parametrize(("shape", "kind"), [((2, 3, 4), "ct"), ((2, 3, 4), "mask"), ((1, 3, 4, 4), "latent")])
def test_shapes_pass(shape, kind):
    check_shape(shape, kind, "x.nii")


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((8, 9), "ct", r"x\.nii is a 2D image of shape \(8, 9\); allowed is a 3D volume.*: give the whole series"),
        ((8, 9, 1), "ct", r"shape \(8, 9, 1\); allowed is a 3D volume with at least two voxels"),
        ((8, 9, 7, 5), "mask", r"is a 4D image of shape \(8, 9, 7, 5\); allowed is a 3D volume.*: split it"),
        ((8, 0, 7), "ct", r"shape \(8, 0, 7\), with an empty axis; allowed is"),
        ((8, 9, 7), "latent", r"shape \(8, 9, 7\); allowed for a latent is \(x, y, z, 4\).*: give the file"),
        ((8, 9, 7, 3), "latent", r"4 channels on the last axis"),
        ((4, 8, 9, 7), "latent", r"4 channels on the last axis"),
    ],
)
def test_shapes_are_refused(shape, kind, message):
    with pytest.raises(InputError, match=message):
        check_shape(shape, kind, "x.nii")


def test_labels_are_rounded_within_a_hundredth_and_fractions_are_counted():
    """float32 storage and a slope give 1.9989 and 2.0000002; a half is no label."""
    stored = np.array([0.0, 1.9989, 2.0000002, 199.991, -0.002], dtype=np.float32)
    rounded = whole_labels(stored, "m.nii")
    assert rounded.tolist() == [0, 2, 2, 200, 0] and not np.signbit(rounded).any()
    assert whole_labels(np.array([0, 3], dtype=np.uint8), "m.nii").dtype == np.uint8
    with pytest.raises(InputError, match=r"2 voxels that are no whole number, for instance 0\.5, 1\.011; allowed in"):
        whole_labels(np.array([0.0, 0.5, 1.011, 3.0001]), "m.nii")
    with pytest.raises(InputError, match=r"1 voxels that are no whole number, for instance nan"):
        whole_labels(np.array([0.0, np.nan]), "m.nii")
    with pytest.raises(InputError, match=r"m\.nii has 3 negative voxels: -1024, -1; allowed in a mask.*: set"):
        check_labels(np.array([0.0, -1, -1, -1024]), "m.nii")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_degenerate_affines_are_refused(bad):
    affine = np.diag([0.7, 0.7, 2.5, 1])
    check_affine(affine, "x.nii")
    check_affine(affine * [-1, 1, 1, 1], "x.nii")
    affine[2, 2] = bad
    with pytest.raises(InputError, match=r"the spacing 0\.7 x 0\.7 x .* mm .*; allowed are three .*: correct"):
        check_affine(affine, "x.nii")


def test_axes_in_one_plane_are_refused():
    affine = np.eye(4)
    affine[:3, 2] = [1, 1, 0]
    with pytest.raises(InputError, match="allowed are three independent axes"):
        check_affine(affine, "x.nii")


def test_spacing_range():
    check_spacing((0.7, 2.5, 5), SMALL, "x.nii")
    check_spacing(np.array([0.69999999, 1, 1]), SMALL, "x.nii")
    with pytest.raises(InputError) as error:
        check_spacing((0.5, 1, 6), SMALL, "the spacing of x.nii")
    assert "spacing of x.nii is 0.5 x 1 x 6 mm, outside along x, z" in str(error.value)
    assert "allowed is x 0.7..2.5, y 0.7..2.5, z 1..5 mm, the range these weights were trained for" in str(error.value)
    assert "give --spacing to resample, or use weights for it" in str(error.value)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, -1, 1), (1, 1, np.nan), (1, np.inf, 1), (1, 1), 1.0, "abc"])
def test_spacings_that_are_none(spacing):
    with pytest.raises(InputError, match="allowed are three positive numbers in mm"):
        check_spacing(spacing, SMALL, "the request")


@pytest.mark.parametrize(("factor", "passes"), [(1.00005, True), (1.0005, False), (0.99995, True), (0.9995, False)])
def test_a_range_allows_for_the_rounding_of_headers_alone(factor, passes):
    edge = SMALL[0][1] if factor > 1 else SMALL[0][0]
    spacing = (edge * factor, SMALL[1][0], SMALL[2][0])
    if passes:
        check_spacing(spacing, SMALL, "x.nii")
    else:
        with pytest.raises(InputError, match="outside along x"):
            check_spacing(spacing, SMALL, "x.nii")


def test_output_size():
    assert check_output_size([96, 112, np.int64(16)], 16) == (96, 112, 16)
    with pytest.raises(InputError) as error:
        check_output_size([100, 128, 5], 16)
    assert "output_size is [100, 128, 5]; allowed are multiples of 16" in str(error.value)
    assert "change x 100 -> 96 or 112, z 5 -> 16" in str(error.value)


@pytest.mark.parametrize("size", [[0, 16, 16], [-16, 16, 16], [16, 16], [16.0, 16, 16], "abc", 16, None, [True, 1, 1]])
def test_sizes_that_are_none(size):
    with pytest.raises(InputError, match="allowed are three positive whole numbers, voxels along x, y, z"):
        check_output_size(size, 16)


def test_small_field_of_view_is_only_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        warn_field_of_view((64, 64, 64), (2, 2, 3), (128, 128, 192))
        warn_field_of_view((3, 3, 3), (1 / 3, 1 / 3, 1 / 3), (1, 1, 1))
        assert not caplog.records
        warn_field_of_view((64, 64, 64), (2, 2, 2), (128, 128, 192))
    assert "128 x 128 x 128 mm is smaller than the smallest one trained on, 128 x 128 x 192 mm" in caplog.text
    assert "use a larger size or spacing" in caplog.text


def test_a_smallest_field_of_view_of_two_numbers_is_refused():
    with pytest.raises(InputError, match=r"smallest_field_of_view is \[1, 1\]; allowed are three numbers"):
        warn_field_of_view((64, 64, 64), (2, 2, 2), [1, 1])


def test_a_field_of_view_that_lacks_a_fifth_of_a_voxel_is_said(caplog):
    warn_field_of_view((64, 64, 64), (2, 2, 2), (128, 128, 128.19))
    assert not caplog.records
    warn_field_of_view((64, 64, 64), (2, 2, 2), (128, 128, 128.4))
    assert "smaller than the smallest one trained on" in caplog.text
