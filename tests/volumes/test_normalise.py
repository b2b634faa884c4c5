from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.volumes.normalise import FromHUd, NormaliseByModalityd, RestoreIntensityd, ScaleMRd, ToHUd


def item(values, **extra):
    return {
        "image": MetaTensor(torch.as_tensor(values, dtype=torch.float32)[None], meta={"filename_or_obj": "v"}),
        **extra,
    }


def test_a_ct_is_windowed_with_or_without_a_modality():
    values = np.array([-3000, -1000, -500, 0, 250, 1000, 2500.0]).reshape(7, 1, 1)
    for extra in ({}, {"modality": "ct"}, {"modality": "CT_contrast"}):
        image = NormaliseByModalityd("image")(item(values, **extra))["image"]
        assert image.flatten().tolist() == [0, 0, 0.25, 0.5, 0.625, 1, 1]


@pytest.mark.parametrize("scale", [1.0, 37.5])
def test_mr_goes_from_its_lowest_value_to_its_percentile(scale):
    values = np.random.default_rng(0).gamma(2.0, 100.0, (20, 20, 20)) * scale + 12
    image = NormaliseByModalityd("image")(item(values, modality="mri"))["image"][0].numpy()
    low, high = values.min(), np.percentile(values, 99.5)
    np.testing.assert_allclose(image, np.clip((values - low) / (high - low), 0, 1), atol=1e-5)
    assert image.min() == 0 and image.max() == 1


def test_wrong_items_are_refused():
    mr = np.random.default_rng(0).gamma(2.0, 100.0, (4, 4, 4))
    with pytest.raises(InputError, match="none below 0"):  # an MR that is not called one
        NormaliseByModalityd("image")(item(mr))
    with pytest.raises(InputError, match="modality 'pet'"):
        NormaliseByModalityd("image")(item(mr, modality="pet"))


def test_an_mr_keeps_what_it_was_scaled_by():
    """As training sees it; what goes back has the MR's values, and is cut off below alone."""
    values = np.random.default_rng(0).gamma(2.0, 100.0, (20, 20, 20)) - 30
    scaled = ScaleMRd("image")(item(values))["image"]
    trained = NormaliseByModalityd("image")(item(values, modality="mri"))["image"]
    np.testing.assert_allclose(scaled.numpy(), trained.numpy(), atol=1e-6)
    low, high = values.min(), np.percentile(values, 99.5)
    np.testing.assert_allclose(scaled.meta["intensity"], [low, high], rtol=1e-6)
    made = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5]).reshape(1, 5, 1, 1)
    back = RestoreIntensityd("pred", "image")({"image": scaled, "pred": made})["pred"].flatten()
    np.testing.assert_allclose(back, low + (high - low) * np.array([0, 0, 0.25, 1, 1.5]), rtol=1e-5)


def test_a_ct_is_clipped_at_both_ends():
    made = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5]).reshape(1, 5, 1, 1)
    back = RestoreIntensityd(["pred", "image"], "image")({**item(np.full((1, 1, 1), 0.5)), "pred": made})
    assert back["pred"].flatten().tolist() == [-1000, -1000, -500, 1000, 1000] and back["image"].item() == 0


def test_an_mr_of_air_is_refused():
    values = np.zeros((10, 10, 10))
    values[0, 0, :3] = 7
    for scale in (ScaleMRd("image"), NormaliseByModalityd("image")):
        with pytest.raises(InputError, match="v has the value 0 in more than 99.5 %"):
            scale(item(values, modality="mri"))


def test_hu_and_what_networks_see_are_each_others_inverse_within_the_window():
    values = np.array([-3000, -1000, -500, 0, 250, 1000, 2500.0]).reshape(7, 1, 1)
    seen = FromHUd("image")(item(values))["image"]
    assert seen.flatten().tolist() == [0, 0, 0.25, 0.5, 0.625, 1, 1]
    back = ToHUd("image")({"image": seen})["image"]
    assert back.flatten().tolist() == [-1000, -1000, -500, 0, 250, 1000, 1000]
    assert ToHUd("image")(item(np.array([-0.5, 1.5]).reshape(2, 1, 1)))["image"].flatten().tolist() == [-1000, 1000]
