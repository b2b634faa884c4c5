"""How close a reconstructed CT is to the original: PSNR and SSIM, whole volume and inside the body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import ScaleIntensityRange, Transform
from monai.utils import convert_to_numpy
from scipy.ndimage import gaussian_filter

from maisi_tools.masks.body import body_envelope
from maisi_tools.volumes.normalise import HU_RANGE, intensity_of

WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window and its standard deviation, in voxels (Wang et al. 2004, section III.B)."""

K1, K2 = 0.01, 0.03
"""SSIM's stability constants (Wang et al. 2004, section III.B)."""


def psnr(image: np.ndarray, reconstruction: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays in HU, clipped to :data:`HU_RANGE`, its width as the peak.

    Infinite for equal arrays, NaN for empty ones.
    """
    if image.size == 0:
        return float("nan")
    difference = np.clip(image, *HU_RANGE).astype(np.float32) - np.clip(reconstruction, *HU_RANGE)
    mse = float(np.mean(np.square(difference, dtype=np.float32), dtype=np.float64))
    return float(10 * np.log10((HU_RANGE[1] - HU_RANGE[0]) ** 2 / mse)) if mse > 0 else float("inf")


def ssim_map(image: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004, equation 13) at each voxel, with a 3D Gaussian window.

    MONAI's SSIMMetric has the same values wherever the window fits; its one dense 11 x 11 x 11 convolution takes
    many times longer on a CPU than the three 1D ones here.

    Args:
        image: (X, Y, Z) in HU, clipped to :data:`HU_RANGE`.
        reconstruction: the same shape.

    Returns:
        (X, Y, Z), float32. Nearer than 5 voxels to the border the window sees the volume mirrored.
    """

    def smooth(array: np.ndarray) -> np.ndarray:
        return gaussian_filter(array, SIGMA, mode="reflect", radius=WINDOW // 2)

    low, high = HU_RANGE
    x, y = ((np.clip(array, low, high) - low).astype(np.float32) / (high - low) for array in (image, reconstruction))
    c1, c2 = np.float32(K1**2), np.float32(K2**2)  # the data range is 1 after scaling
    mean_x, mean_y = smooth(x), smooth(y)
    contrast = 2 * (smooth(x * y) - mean_x * mean_y) + c2
    contrast /= smooth(x * x) + smooth(y * y) - mean_x**2 - mean_y**2 + c2
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * contrast


def reconstruction_metrics(
    image_hu: np.ndarray, reconstruction_hu: np.ndarray, spacing: Sequence[float]
) -> dict[str, float]:
    """PSNR (dB) and SSIM over HU [-1000, 1000], of the whole volume and inside the body.

    Args:
        image_hu: the original, (X, Y, Z) in HU.
        reconstruction_hu: the same shape.
        spacing: mm along x, y, z, for finding the body (:func:`maisi_tools.masks.body.body_envelope` of the original).

    Returns:
        "psnr", "ssim", "psnr_body", "ssim_body". SSIM is averaged over voxels whose whole window lies in the volume, so
        5 voxels along the border are left out (as MONAI's SSIMMetric does), but not along an axis shorter than the
        window. PSNR leaves out none and is infinite for equal volumes. Without a body the latter two are NaN.

    Raises:
        ValueError: different shapes, or not three axes.
    """
    if image_hu.shape != reconstruction_hu.shape or image_hu.ndim != 3:
        raise ValueError(
            f"image and reconstruction have the shapes {image_hu.shape} and {reconstruction_hu.shape}; allowed are two "
            "equal ones (X, Y, Z)"
        )
    body = np.asarray(body_envelope(image_hu, spacing), dtype=bool)
    interior = _interior(image_hu.shape)
    similarity = ssim_map(image_hu, reconstruction_hu)[interior]
    similarity_body = similarity[body[interior]]
    return {
        "psnr": psnr(image_hu, reconstruction_hu),
        "ssim": float(similarity.mean(dtype=np.float64)),
        "psnr_body": psnr(image_hu[body], reconstruction_hu[body]),
        "ssim_body": float(similarity_body.mean(dtype=np.float64)) if similarity_body.size else float("nan"),
    }


def whole_metrics(image_hu: np.ndarray, reconstruction_hu: np.ndarray) -> dict[str, float]:
    """ "psnr" and "ssim" alone, as :func:`reconstruction_metrics` has them."""
    similarity = ssim_map(image_hu, reconstruction_hu)[_interior(image_hu.shape)]
    return {"psnr": psnr(image_hu, reconstruction_hu), "ssim": float(similarity.mean(dtype=np.float64))}


def _interior(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where SSIM's window fits; all of an axis that is shorter than it."""
    border = WINDOW // 2
    return tuple(slice(border, n - border) if n >= WINDOW else slice(None) for n in shape)


class ReconstructionMetricsd(Transform):
    """MONAI dict transform: :func:`reconstruction_metrics` of two entries, rounded to 4 decimals.

    Of an MR, whose body no threshold tells, PSNR and SSIM of the whole volume alone, over what its 0 and 1 stand for.

    Args:
        image_key: the original, MetaTensor (1, X, Y, Z) in HU, or an MR with ``meta["intensity"]``.
        pred_key: the reconstruction, the same shape.
        output_key: where the dict of metrics goes.
    """

    def __init__(self, image_key: str, pred_key: str, output_key: str = "metrics") -> None:
        self.image_key, self.pred_key, self.output_key = image_key, pred_key, output_key

    def __call__(self, data: Mapping[Any, Any]) -> dict:
        """The item with the metrics added."""
        image, prediction = data[self.image_key], data[self.pred_key]
        low, high = intensity_of(image)
        if (low, high) != HU_RANGE:
            as_hu = ScaleIntensityRange(low, high, *HU_RANGE)
            one, other = (convert_to_numpy(as_hu(volume))[0] for volume in (image, prediction))
            return {**data, self.output_key: _rounded(whole_metrics(one, other))}
        found = reconstruction_metrics(
            convert_to_numpy(image)[0], convert_to_numpy(prediction)[0], [float(mm) for mm in image.pixdim]
        )
        return {**data, self.output_key: _rounded(found)}


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items()}
