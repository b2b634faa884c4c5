"""Fields of view by name: the release's table, and what is said of one that no weights know."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from maisi_tools.diffusion.conditions import REGIONS, modality_code
from maisi_tools.errors import InputError
from maisi_tools.volumes.presets import FAR, PRESETS, find_preset, warn_far

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
CONFIGS = {
    "ct": "full_rflow.json",
    "mr": "full_rflow_mr.json",
    "mr_brain": "full_rflow_mr_brain.json",
    "small": "inference.json",
}


@pytest.mark.parametrize("weights", PRESETS)
def test_presets_are_within_the_limits_of_their_weights(weights):
    """Sizes that the networks take, spacings and regions that the config allows."""
    content = json.loads((BUNDLES / "maisi_ldm" / "configs" / CONFIGS[weights]).read_text())
    assert content["presets"] == weights
    multiple = 16 if weights == "small" else 32
    for name, preset in PRESETS[weights].items():
        assert all(n % multiple == 0 for n in preset.size), name
        limits = zip(preset.spacing, content["spacing_range"], strict=True)
        assert all(low <= mm <= high for mm, (low, high) in limits), name
        view = zip(preset.field_of_view, content["smallest_field_of_view"], strict=True)
        assert all(mm >= low * 0.999 for mm, low in view), name
        assert set(preset.region) <= set(content["trained_regions"])
        if preset.modality is not None:
            assert preset.modality in content["trained_modalities"] and modality_code(preset.modality) >= 8


def test_the_shares_are_the_releases(caplog):
    """REFERENCE section 6: nine fields of view with a region, 99.95 % of the training data."""
    shares = {name: preset.share for name, preset in PRESETS["ct"].items() if preset.share is not None}
    assert len(shares) == 9 and sum(shares.values()) == pytest.approx(0.9999, abs=1e-9)
    for name in shares:
        first, last = (REGIONS.index(part) for part in (name.split("_")[0], name.split("_")[-1]))
        assert PRESETS["ct"][name].region == REGIONS[first : last + 1]
    with caplog.at_level(logging.INFO):
        assert find_preset("chest_abdomen", "ct").size == (512, 512, 128)
        find_preset("head_chest", "ct")
    usual, rare = caplog.records
    assert "58.55% of the training data" in usual.getMessage() and usual.levelno == logging.INFO
    assert "0.10% of the training data" in rare.getMessage() and rare.levelno == logging.WARNING


def test_far_names_the_nearest(caplog):
    chest = PRESETS["ct"]["chest"]
    warn_far(chest.size, chest.spacing, "ct")
    assert all(math.isclose(mm, 350, abs_tol=1) for mm in chest.field_of_view[:2])
    wide = PRESETS["ct"]["head_chest_abdomen_lower"]
    warn_far(wide.size, [mm * (FAR - 0.01) for mm in wide.spacing], "ct")
    assert not caplog.records
    warn_far((64, 64, 64), (2.0, 2.0, 1.0), "ct")
    (record,) = caplog.records
    said = record.getMessage()
    assert "128 x 128 x 64 mm" in said and "nearest is preset abdomen, 512 x 512 x 128" in said


def test_unknown_names_are_refused():
    assert find_preset(None, "ct") is None and find_preset(None, None) is None
    with pytest.raises(InputError, match="preset is 'chest'; allowed for these weights are none"):
        find_preset("chest", None)
    with pytest.raises(
        InputError, match="preset is 'chest'; allowed for these weights are head_neck, head_neck_narrow"
    ):
        find_preset("chest", "small")
    with pytest.raises(InputError, match="allowed are ct, mr, mr_brain, small"):
        find_preset(None, "big")
