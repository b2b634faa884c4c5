"""PSNR and SSIM against sums written out in numpy and against MONAI's SSIMMetric."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import SSIMMetric

from maisi_tools.masks.body import body_envelope
from maisi_tools.metrics.reconstruction import ReconstructionMetricsd, psnr, reconstruction_metrics, ssim_map

SPACING = (3.0, 3.0, 4.0)


@pytest.fixture(scope="module")
def pair():
    """A body, an elliptic cylinder of 40 HU with texture in air of -1000, and a noisy copy of it: (40, 44, 24)."""
    rng = np.random.default_rng(0)
    x, y, _ = np.meshgrid(np.arange(40) - 20, np.arange(44) - 22, np.arange(24), indexing="ij")
    inside = (x / 15) ** 2 + (y / 17) ** 2 < 1
    image = np.where(inside, 40 + 30 * rng.standard_normal(inside.shape), -1000).astype(np.float32)
    return image, image + 50 * rng.standard_normal(inside.shape).astype(np.float32)


def ssim_at(image, reconstruction, centre):
    """SSIM of the window of 11^3 voxels about `centre`, by the definition in double precision."""
    window = tuple(slice(c - 5, c + 6) for c in centre)
    x, y = (np.clip(array[window].astype(np.float64), -1000, 1000) + 1000 for array in (image, reconstruction))
    gauss = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = gauss[:, None, None] * gauss[None, :, None] * gauss[None, None, :]
    weights /= weights.sum()
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy, cov = (
        (weights * (x - mx) ** 2).sum(),
        (weights * (y - my) ** 2).sum(),
        (weights * (x - mx) * (y - my)).sum(),
    )
    c1, c2 = (0.01 * 2000) ** 2, (0.03 * 2000) ** 2
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def test_psnr_is_that_of_a_known_error():
    image = np.zeros((4, 5, 6), dtype=np.int16)
    assert psnr(image, image + 20) == pytest.approx(40.0)  # 20 log10(2000 / 20)
    assert psnr(image - 3000, image - 1000) == math.inf  # equal once clipped
    assert psnr(image + 2000, image + 980) == pytest.approx(40.0)
    assert math.isnan(psnr(image[:0], image[:0]))


def test_ssim_map_is_the_definition_in_the_interior(pair):
    similarity = ssim_map(*pair)
    assert similarity.shape == pair[0].shape and similarity.dtype == np.float32
    for centre in [(5, 5, 5), (20, 22, 12), (34, 38, 18), (7, 22, 10)]:
        assert similarity[centre] == pytest.approx(ssim_at(*pair, centre), abs=1e-4)


def test_whole_volume_is_monai_ssim_and_the_body_is_its_mask(pair):
    image, reconstruction = pair
    found = reconstruction_metrics(image, reconstruction, SPACING)
    clipped = [torch.from_numpy(array.clip(-1000, 1000) + 1000)[None, None] for array in (reconstruction, image)]
    assert found["ssim"] == pytest.approx(float(SSIMMetric(3, data_range=2000.0)(*clipped)), abs=1e-4)
    body = np.asarray(body_envelope(image, SPACING), dtype=bool)
    assert 0.3 < body.mean() < 0.8  # the ellipse fills 46 %
    squared = (image.clip(-1000, 1000).astype(np.float64) - reconstruction.clip(-1000, 1000)) ** 2
    assert found["psnr"] == pytest.approx(10 * np.log10(2000**2 / squared.mean()), abs=1e-3)
    assert found["psnr_body"] == pytest.approx(10 * np.log10(2000**2 / squared[body].mean()), abs=1e-3)
    centres = [c for c in np.argwhere(body) if all(5 <= i < n - 5 for i, n in zip(c, body.shape, strict=True))][::97]
    sampled = np.mean([ssim_at(image, reconstruction, c) for c in centres])
    assert found["ssim_body"] == pytest.approx(sampled, abs=0.02)  # a sample of its voxels


def test_equal_volumes_and_no_body(pair):
    image, _ = pair
    same = reconstruction_metrics(image, image, SPACING)
    assert same["psnr"] == same["psnr_body"] == math.inf
    assert same["ssim"] == pytest.approx(1) and same["ssim_body"] == pytest.approx(1)
    air = np.full((12, 12, 12), -1000, dtype=np.float32)
    none = reconstruction_metrics(air, air, SPACING)
    assert none["ssim"] == pytest.approx(1)
    assert math.isnan(none["psnr_body"]) and math.isnan(none["ssim_body"])


def test_fewer_slices_than_the_window(pair):
    thin = [array[:, :, :7] for array in pair]
    found = reconstruction_metrics(*thin, SPACING)
    mirrored = [np.pad(array, ((0, 0), (0, 0), (5, 5)), "symmetric") for array in thin]
    assert found["ssim"] == pytest.approx(float(ssim_map(*mirrored)[5:-5, 5:-5, 5:-5].mean()), abs=1e-5)


def test_shapes_must_agree(pair):
    with pytest.raises(ValueError, match=r"shapes \(40, 44, 24\) and \(39, 44, 24\); allowed are two equal ones"):
        reconstruction_metrics(pair[0], pair[1][1:], SPACING)


def test_transform_rounds_and_takes_the_spacing_from_the_image(pair):
    affine = torch.diag(torch.tensor([*SPACING, 1.0]))
    image, prediction = (MetaTensor(torch.from_numpy(array)[None], affine=affine) for array in pair)
    item = ReconstructionMetricsd("image", "pred")({"image": image, "pred": prediction, "name": "a"})
    expected = reconstruction_metrics(*pair, SPACING)
    assert item["metrics"] == {name: round(value, 4) for name, value in expected.items()}
    assert item["name"] == "a" and item["image"] is image
