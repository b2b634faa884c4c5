"""Checks at the door, on plain arrays and numbers: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike

from maisi_tools.errors import InputError

logger = logging.getLogger(__name__)

UNRECORDED_FACTOR = 4
"""Image voxels per latent voxel along each axis where a file does not say: that of MAISI's released networks (paper
section 3.1), and of all that this project wrote before an autoencoder could have another."""

LATENT_CHANNELS = 4
"""Channels of a MAISI latent (arXiv 2409.11169 section 3.1)."""

MOST_PADDING = 128
"""Voxels by which an image may have been padded before encoding; no network, released ones included, needs more."""

LEAST_HU = -1024
"""What CTs are clipped to below: no tissue and no air is less."""

TISSUE_HU, SOFT_HU, LEAST_SOFT = -300, 150, 0.5
"""Of what is above the first value, soft tissue (so near to 0 HU) is more than the last: at least 0.69 in 248 real CTs.
Where their intercept is added twice, bone and metal lie there; of 94 % of them less than 0.5 is like soft tissue."""

LUNG_HU, MUCH_LUNG = -900, 0.15
"""With so much above the value a CT is not mostly air, and may be a crop of bone, or of lung with few vessels in it."""

LEAST_STEPS = 32
"""Whole numbers that an image needs between its lowest and its highest value: what has fewer was none of them."""

SAMPLED = 1_000_000
"""Voxels on which shares are counted: of a larger volume every n-th along each axis, which takes no seconds."""

BULK = (0.1, 99.9)
"""Percentiles between which a CT's values count: what resampling overshoots, and a few odd voxels, lie outside."""

NONE = 1e-4
"""A share below it is none."""

STORED_WATER, NEAR, MUCH_STORED = 1024, 150, 0.05
"""Of what is above :data:`TISSUE_HU`, less than the last is so near to the first: at most 0.035 in 248 real CTs, and at
least 0.067 where 1024, as scanners add it, is not subtracted. What is clipped at 1000 HU says nothing."""

PLAUSIBLE_HU, MUCH_BEYOND = (-2100, 4000), 0.05
"""Of a CT without its padding, less than the last is beyond these; where HU are multiplied by 10, at least 0.14."""

PICTURE_BOTTOM, PICTURE_TOP, MUCH_CLIPPED = (-64, 1), (128, 320), 0.2
"""Between which a resampled 8-bit picture begins and ends, and the share of it that is at 0 or 255, clipped: at least
0.28, and of real crops within soft tissue at most 0.19."""

HU_HINT = "allowed is a CT in Hounsfield units (air near -1000, water 0)"


def check_shape(shape: Sequence[int], kind: str, name: str) -> None:
    """Refuse an array shape (as in the file, channels last) that is not a volume of its kind.

    Kinds are "ct", "mask", "latent", and "picture": what is only looked at may be one voxel thin.

    Raises:
        InputError: an empty axis, another number of axes, an axis of one voxel (ct, mask), or another number of
            channels than :data:`LATENT_CHANNELS` (latent).
    """
    shape = tuple(int(n) for n in shape)
    if min(shape, default=0) < 1:
        raise InputError(
            f"{name} has the shape {shape}, with an empty axis; allowed is at least one voxel: write it anew"
        )
    if kind == "latent":
        if len(shape) != 4 or shape[-1] != LATENT_CHANNELS:
            raise InputError(
                f"{name} has the shape {shape}; allowed for a latent is (x, y, z, {LATENT_CHANNELS}), that is "
                f"{LATENT_CHANNELS} channels on the last axis: give the file that the encode config wrote"
            )
        return
    if len(shape) != 3 or (1 in shape and kind != "picture"):
        advice = "give the whole series" if len(shape) <= 3 else "split it into one file per time point or channel"
        raise InputError(
            f"{name} is a {len(shape)}D image of shape {shape}; allowed is a 3D volume with at least two voxels on "
            f"each axis: {advice}"
        )


def check_finite(array: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite voxels.

    Raises:
        InputError: with the numbers of both.
    """
    if np.isfinite(array).all():
        return
    nans, infs = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    raise InputError(
        f"{name} has {nans} NaN and {infs} infinite voxels of {array.size}; allowed are finite values: replace them, "
        "in a CT for instance by -1000 HU (air)"
    )


def check_ct_intensities(array: np.ndarray, name: str) -> None:
    """Refuse values that cannot be Hounsfield units. A CT of a body has voxels below 0 HU: fat, lung or air.

    Clipped CTs, and crops within soft tissue or lung, pass. The lowest value, where it is below :data:`LEAST_HU`, may
    be the scanner's padding outside of its field of view, such as -3024, and says nothing of the others; nor do a few
    voxels (:data:`BULK`, :data:`NONE`). What only looks unlike a CT is named in a warning: values like those that are
    stored before the rescale intercept is added, or as where it was added twice, a resampled 8-bit picture, and HU that
    were multiplied.

    Raises:
        InputError: a constant volume, a normalised one (-1..1, z-scores, HU / 1000), an 8-bit one (0..255, or that with
            an intercept), or one without values below 0, as stored by scanners before the rescale intercept is added.
    """
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputError(f"{name} has the value {low:g} everywhere; {HU_HINT}: check the file's export")
    found = f"{name} has values from {low:g} to {high:g}"
    sample = _sampled(array)
    if low < LEAST_HU:
        padding, low = low, float(array.min(where=array > low, initial=high))
        found = f"{name} has values from {low:g} to {high:g} beside {padding:g}"
        inside = sample[sample > padding]
        sample = inside if inside.size else array[array > padding]
    bottom, top = np.percentile(sample, BULK)
    # A CT of water is of whole numbers or, resampled, has noise.
    tiny = -LEAST_STEPS / 2 < bottom and top < LEAST_STEPS / 2 and bool(np.any(sample % 1))
    if tiny or (low >= -1 and high <= 1):
        raise InputError(f"{found}, as after normalisation; {HU_HINT}: give the volume as it was before normalising")
    nonnegative = low >= 0 or _share(sample < 0) < NONE
    if nonnegative and top <= 255:
        raise InputError(f"{found}, as in an 8-bit picture; {HU_HINT}: export the CT itself, not a windowed picture")
    if nonnegative:
        raise InputError(
            f"{found} and {'none' if low >= 0 else 'hardly any'} below 0; {HU_HINT}: apply the DICOM rescale intercept "
            "(often -1024), or give a CT if this is another modality"
        )
    if high < TISSUE_HU and high - low <= 255:
        raise InputError(
            f"{found}, as in an 8-bit picture with an intercept; {HU_HINT}: export the CT itself, not a windowed one"
        )
    _warn_unlike_ct(sample, bottom, top, found)


def _warn_unlike_ct(sample: np.ndarray, bottom: float, top: float, found: str) -> None:
    """Log a warning where values may be HU, as in a narrow crop, and look like something else."""
    tissue = sample[sample > TISSUE_HU]
    soft, stored = (_share(np.abs(tissue - water) < near) for water, near in ((0, SOFT_HU), (STORED_WATER, NEAR)))
    beyond = _share((sample < PLAUSIBLE_HU[0]) | (sample > PLAUSIBLE_HU[1]))
    if beyond > MUCH_BEYOND:
        logger.warning(
            "%s, and %.0f %% of them are below %d or above %d HU, where no tissue is; if they were multiplied, as by "
            "10, divide them",
            *(found, 100 * beyond, *PLAUSIBLE_HU),
        )
    elif stored > MUCH_STORED and top > STORED_WATER + NEAR:  # a crop of bone may be so, too
        logger.warning(
            "%s, and of what is above %d HU %.0f %% is within %d of %d, where a body has less than %.0f %%; if this is "
            "no crop of bone, apply the DICOM rescale intercept (often -1024)",
            *(found, TISSUE_HU, 100 * stored, NEAR, STORED_WATER, 100 * MUCH_STORED),
        )
    elif _share(sample > LUNG_HU) < MUCH_LUNG and soft <= LEAST_SOFT:  # a narrow crop may be so, too
        logger.warning(
            "%s, and of what is above %d HU %.0f %% is within %d HU of water, where a body has more than %.0f %%; "
            "if the rescale intercept was added twice, set it to 0",
            *(found, TISSUE_HU, 100 * soft, SOFT_HU, 100 * LEAST_SOFT),
        )
    elif PICTURE_BOTTOM[0] < bottom < PICTURE_BOTTOM[1] and PICTURE_TOP[0] < top < PICTURE_TOP[1]:
        clipped = max(_share(np.abs(sample - end) < 2) for end in (0, 255))
        if clipped > MUCH_CLIPPED:
            logger.warning(
                "%s, as in a resampled 8-bit picture: %.0f %% are clipped; if it is one, export the CT itself",
                *(found, 100 * clipped),
            )


def _sampled(array: np.ndarray) -> np.ndarray:
    """Values (N,) of about :data:`SAMPLED` voxels of a volume (..., X, Y, Z), evenly spread; of a small one, of all."""
    step = max(1, math.ceil((array.size / SAMPLED) ** (1 / 3)))
    return array[..., ::step, ::step, ::step].reshape(-1)


def _share(chosen: np.ndarray) -> float:
    """Of the voxels, how many; 0 of none."""
    return np.count_nonzero(chosen) / max(chosen.size, 1)


def check_stored_type(dtype: np.dtype, name: str) -> None:
    """Refuse voxels that are no plain numbers, such as colours and complex values.

    Raises:
        InputError: with the type.
    """
    if dtype.kind not in "biuf":
        what = "colours" if dtype.fields else str(dtype)
        raise InputError(
            f"{name} has voxels of the type {what}; allowed are whole or floating-point numbers, one a voxel: export "
            "the volume itself"
        )


LABEL_ROUNDING = 0.01
"""Labels stored as floating-point numbers, or as integers with a slope, come back this near to a whole number."""


def whole_labels(array: np.ndarray, name: str) -> np.ndarray:
    """Labels as the whole numbers that they were before a file rounded them.

    Args:
        array: label values, any shape and type.
        name: of the file, for the message.

    Returns:
        The array, each value within :data:`LABEL_ROUNDING` of a whole number replaced by it.

    Raises:
        InputError: fractions, with how many and up to five of them.
    """
    if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
        return array
    whole = np.rint(array)
    # As nearly all are, and then three passes over large volumes are saved.
    exact = (whole == array).all() and np.isfinite(array).all()
    if not exact and (fractional := array[~(np.abs(array - whole) <= LABEL_ROUNDING)]).size:
        raise InputError(
            f"{name} has {fractional.size} voxels that are no whole number, for instance {_some(fractional)}; allowed "
            "in a mask are label values: resample it with nearest neighbour, and give no probability map"
        )
    whole += 0.0  # -0.001 becomes 0, not -0
    return whole


def check_labels(array: np.ndarray, name: str) -> None:
    """Refuse negative labels; which labels exist is the label map's matter.

    Raises:
        InputError: with how many, and up to five of them.
    """
    negative = array[array < 0]
    if negative.size:
        raise InputError(
            f"{name} has {negative.size} negative voxels: {_some(negative)}; allowed in a mask are labels from 0 on: "
            "set the background to 0"
        )


def check_affine(affine: np.ndarray, name: str) -> None:
    """Refuse a voxel-to-world matrix (4, 4) in mm that spans no volume.

    Raises:
        InputError: a value that is not finite, an axis of length zero, or axes in one plane.
    """
    columns = np.asarray(affine, dtype=float)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if np.isfinite(affine).all() and (lengths > 0).all() and abs(np.linalg.det(columns / lengths)) > 1e-3:
        return
    raise InputError(
        f"{name} has the spacing {_mm(lengths)} and the axes {np.round(columns.T, 4).tolist()}; allowed are three "
        "independent axes of positive length in mm: correct the header (sform, or space directions)"
    )


AGREES = 0.1
"""Voxels that two grids may be apart and still are one: files round their affines, a real shift is larger."""


def distance_in_voxels(one: ArrayLike, other: ArrayLike, shape: Sequence[int]) -> float:
    """How far the voxels of two grids of one shape are apart at most.

    Args:
        one, other: affines (4, 4) from voxels to the world.
        shape: voxels along x, y, z; of two affine maps the largest distance is at a corner.

    Returns:
        The largest distance along any axis, in voxels of `other`.
    """
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], dtype=float).T
    apart = np.linalg.solve(np.asarray(other, dtype=float), np.asarray(one, dtype=float) @ corners) - corners
    return float(np.abs(apart).max())


SHEAR_DEGREES = 0.5
"""From here on a grid is said to be sheared; files round right angles by less."""


def warn_sheared(affine: np.ndarray, name: str) -> None:
    """Log a warning where the axes of a grid are no right angles: it is kept, but networks take it for straight."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    worst = float(np.degrees(np.arcsin(min(1.0, np.abs(np.triu(axes.T @ axes, 1)).max()))))
    if worst > SHEAR_DEGREES:
        logger.warning(
            "%s is sheared: its axes are %.1f degrees off right angles; its grid is kept as it is", name, worst
        )


def nearest_spacing(spacing: Sequence[float], allowed: Sequence[Sequence[float]]) -> list[float]:
    """The spacing within (lowest, highest) mm of each axis that is nearest to this one; itself where it is within."""
    return [
        float(mm) if _within(mm, low, high) else float(min(max(mm, low), high))
        for mm, (low, high) in zip(spacing, allowed, strict=True)
    ]


def check_spacing(
    spacing: Sequence[float],
    allowed: Sequence[Sequence[float]],
    what: str,
    factor: float | None = None,
    advice: str = "give --spacing to resample, or use weights for it",
) -> None:
    """Refuse a spacing that the weights were not trained for.

    Args:
        spacing: mm along x, y, z.
        allowed: (lowest, highest) in mm for x, y and z.
        what: what the message calls it: "spacing", or "the spacing of" a file.
        factor: how far from the range a mask may be to be resampled, for the message.
        advice: what to do, for the message.

    Raises:
        InputError: not three positive numbers, or one outside its range.
    """
    spacing = three_positive(spacing, what, "numbers in mm")
    names = "xyz"
    outside = [
        i for i, (mm, (low, high)) in enumerate(zip(spacing, allowed, strict=True)) if not _within(mm, low, high)
    ]
    if outside:
        further = f", and up to {factor:g} times beyond it for a mask" if factor else ""
        ranges = ", ".join(f"{axis} {low:g}..{high:g}" for axis, (low, high) in zip(names, allowed, strict=True))
        raise InputError(
            f"{what} is {_mm(spacing)}, outside along {', '.join(names[i] for i in outside)}; allowed "
            f"is {ranges} mm, the range these weights were trained for{further}: {advice}"
        )


def check_latent_size(latent: Sequence[int], size: Sequence[int], factor: int, name: str) -> None:
    """Refuse a latent that cannot stand for the image that its sidecar describes.

    Args:
        latent: its voxels (d, h, w).
        size: voxels of the image.
        factor: image voxels per latent voxel along each axis.
        name: of the file.

    Raises:
        InputError: a size that is not three positive whole numbers, a factor that is no whole number from 1 on, or a
            latent smaller than its image, or larger by more than any padding (:data:`MOST_PADDING`).
    """
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 3 or not all(map(_is_count, size)):
        raise InputError(
            f"the sidecar of {name} has the size {size!r}; allowed are three positive whole numbers, voxels along x, "
            "y, z of the image: encode it again"
        )
    if not isinstance(factor, int) or isinstance(factor, bool) or factor < 1:
        raise InputError(f"the sidecar of {name} has the factor {factor!r}; allowed is a whole number such as 2 or 4")
    if any(not want <= factor * have < want + MOST_PADDING for have, want in zip(latent, size, strict=True)):
        raise InputError(
            f"latent {name} has {tuple(latent)} voxels, which with its factor {factor} cover "
            f"{tuple(factor * n for n in latent)} voxels of an image; its sidecar says {tuple(size)}, and allowed is "
            f"at most that, and less by {MOST_PADDING} at most: encode it again"
        )


def checked_scale_factor(value: object, name: str, do: str) -> float:
    """The factor that latents are multiplied by, as a number.

    Args:
        value: a number, or a tensor or array of one.
        name: of what it stands in.
        do: advice for the message.

    Raises:
        InputError: no finite number above 0.
    """
    try:
        number = float("nan") if isinstance(value, (str, bytes, bool)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last one is torch's, for more or other than one real number
        number = float("nan")
    if not 0 < number < math.inf:
        raise InputError(f"{name} has scale_factor {value!r}; allowed is a finite number above 0: {do}")
    return number


def check_output_size(size: Sequence[int], multiple: int, what: str = "output_size") -> tuple[int, int, int]:
    """The output size in voxels along x, y, z, as ints; a message calls it `what`.

    Raises:
        InputError: not three positive whole numbers, or one that `multiple` does not divide (the message names
            the nearest legal ones).
    """
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 3 or not all(map(_is_count, size)):
        raise InputError(f"{what} is {size!r}; allowed are three positive whole numbers, voxels along x, y, z")
    wrong = {axis: int(n) for axis, n in zip("xyz", size, strict=True) if n % multiple}
    if wrong:
        below = {axis: n // multiple * multiple for axis, n in wrong.items()}
        advice = ", ".join(
            f"{axis} {n} -> " + (f"{below[axis]} or " if below[axis] else "") + f"{below[axis] + multiple}"
            for axis, n in wrong.items()
        )
        raise InputError(f"{what} is {[int(n) for n in size]}; allowed are multiples of {multiple}: change {advice}")
    x, y, z = (int(n) for n in size)
    return x, y, z


def warn_field_of_view(size: Sequence[int], spacing: Sequence[float], smallest_mm: Sequence[float]) -> None:
    """Log a warning when the field of view, `size` (voxels) times `spacing` (mm), is smaller than trained on.

    Raises:
        InputError: the smallest one is no three numbers.
    """
    if len(smallest_mm) != 3:
        raise InputError(f"smallest_field_of_view is {smallest_mm!r}; allowed are three numbers, mm along x, y, z")
    extent = [n * mm for n, mm in zip(size, spacing, strict=True)]
    if not all(
        extent_within(mm, low, math.inf, step) for mm, low, step in zip(extent, smallest_mm, spacing, strict=True)
    ):
        logger.warning(
            "field of view %s is smaller than the smallest one trained on, %s; the volume may look wrong: "
            "use a larger size or spacing",
            _mm(extent),
            _mm(smallest_mm),
        )


def extent_within(mm: float, low: float, high: float, step: float) -> bool:
    """Whether an extent along an axis lies between two others; all in mm, `step` is the axis's spacing."""
    slack = 0.1 * step  # spacings such as 1/3 mm leave rounding errors in the product
    return low - slack <= mm <= high + slack


def three_positive(values: Sequence[float], what: str, unit: str) -> tuple[float, ...]:
    """The three values as floats.

    Raises:
        InputError: not three positive finite numbers; the message calls them `what`.
    """
    try:
        numbers = () if isinstance(values, str) else tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise InputError(f"{what} is {values!r}; allowed are three positive {unit}, along x, y, z")
    return numbers


def _within(value: float, low: float, high: float) -> bool:
    # NIfTI keeps spacings in float32: 0.5 mm computed from an oblique affine may come back as 0.49999998.
    return low * (1 - 1e-4) <= value <= high * (1 + 1e-4)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _mm(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.4g}" for value in values) + " mm"


def _some(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in np.unique(values)[:5])
