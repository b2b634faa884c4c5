from __future__ import annotations

import pytest
import torch

from maisi_tools.diffusion.conditions import (
    MODALITIES,
    Conditions,
    batch_tensors,
    check_conditions,
    check_modality,
    without_conditions,
)
from maisi_tools.errors import InputError

OK = {"size": (64, 48, 32), "spacing": (1.0, 1.0, 2.5)}
LIMITS = ([[0.5, 3.0], [0.5, 3.0], [0.5, 5.0]], [10, 10, 10], ["head", "chest"], ["unknown", "ct"])


def test_tensors_are_what_the_networks_were_trained_with():
    tensors = Conditions(**OK, region=("head", "chest"), modality="ct_contrast").tensors(scale=100)
    assert tensors["top_region_index_tensor"].tolist() == [100, 0, 0, 0]
    assert tensors["bottom_region_index_tensor"].tolist() == [0, 100, 0, 0]
    assert tensors["spacing_tensor"].tolist() == [100, 100, 250]
    assert tensors["class_labels"].item() == 3


def test_unknown_region_is_zero_and_order_does_not_matter():
    assert Conditions(**OK).tensors(1)["top_region_index_tensor"].tolist() == [0, 0, 0, 0]
    assert Conditions(**OK, region=("chest", "head")) == Conditions(**OK, region=("head", "chest"))
    assert Conditions(**OK, region="abdomen").region == ("abdomen",)


def test_modalities_are_the_releases_codes():
    codes = {name: Conditions(**OK, modality=name).tensors(1)["class_labels"].item() for name in MODALITIES}
    contrasts = ("t1", "t2", "flair", "pd", "dwi", "adc", "ssfp", "mra", "t1c")
    stripped = ("t1", "t2", "flair", "swi", "mra")
    assert codes == {
        **{"unknown": 0, "ct": 1, "ct_wo_contrast": 2, "ct_contrast": 3, "mri": 8, "mri_swi": 20},
        **{f"mri_{name}": 9 + number for number, name in enumerate(contrasts)},
        **{f"mri_{name}_skull_stripped": 29 + number for number, name in enumerate(stripped)},
    }
    assert Conditions(**OK, modality="MRI").tensors(1)["class_labels"].item() == 8
    assert Conditions(**OK, modality=127).tensors(1)["class_labels"].item() == 127


def test_what_guidance_goes_without_is_zero_and_the_rest_stays():
    tensors = batch_tensors([Conditions(**OK, region="chest", modality="mri")], 100, torch.device("cpu"))
    without = without_conditions(tensors, ("class_labels", "spacing_tensor"))
    assert without["class_labels"].tolist() == [0] and without["class_labels"].dtype == torch.int64
    assert without["spacing_tensor"].tolist() == [[0, 0, 0]]
    for name in ("top_region_index_tensor", "bottom_region_index_tensor"):
        assert without[name].tolist() == [[0, 100, 0, 0]]
    assert tensors["class_labels"].tolist() == [8] and tensors["spacing_tensor"].tolist() == [[100, 100, 250]]


def test_batch_stacks():
    batch = batch_tensors([Conditions(**OK), Conditions(size=(4, 4, 4), spacing=(2, 2, 2))], 1, torch.device("cpu"))
    assert batch["spacing_tensor"].tolist() == [[1, 1, 2.5], [2, 2, 2]] and batch["class_labels"].shape == (2,)


def test_noise_depends_on_the_seed_alone():
    first, again, other = (Conditions(**OK, seed=seed).noise(4) for seed in (1, 1, 2))
    assert first.shape == (4, 16, 12, 8) and Conditions(**OK).noise(2).shape == (4, 32, 24, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(first.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"region": ("head", "abdomen")}, "has a gap; give neighbouring regions, here .'head', 'chest', 'abdomen'."),
        ({"region": ("foot",)}, "region 'foot' is not known; allowed are head, chest, abdomen, lower"),
        ({"spacing": (1, 0, 1)}, "spacing is .1, 0, 1.; allowed are three positive numbers in mm"),
        ({"spacing": (1, float("nan"), 1)}, "spacing is .1, nan, 1."),
        ({"spacing": (1, 1)}, "spacing is .1, 1."),
        ({"size": (0, 4, 4)}, "size is .0, 4, 4.; allowed are three positive whole numbers"),
        ({"size": (48.9, 4, 4)}, "size is .48.9, 4, 4."),
        ({"size": 48}, "size is 48"),
        ({"spacing": 4}, "spacing is 4"),
        ({"modality": 1.5}, "modality is 1.5"),
        ({"modality": True}, "modality is True"),
        ({"modality": ["ct"]}, r"modality is \['ct'\]"),
        ({"modality": "pet"}, "modality is 'pet'; allowed are unknown, ct"),
        ({"modality": 128}, "modality is 128; allowed are .* 0..127"),
    ],
)
def test_impossible_conditions_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        Conditions(**{**OK, **change})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": (60, 48, 32)}, "output_size is .60, 48, 32.; allowed are multiples of 16: change x 60 -> 48 or 64"),
        (
            {"spacing": (0.4, 1, 1)},
            "spacing is 0.4 x 1 x 1 mm, outside along x; allowed is x 0.5..3, y 0.5..3, z 0.5..5",
        ),
        ({"region": "lower"}, "region lower was not in these weights' training data; allowed are head, chest"),
        ({"modality": "mri"}, "modality is .mri., .* allowed are unknown, ct"),
        ({"modality": 3}, "modality is 3"),
    ],
)
def test_limits_of_the_weights(change, word):
    check_conditions(Conditions(**OK, region="head"), 16, *LIMITS)
    with pytest.raises(InputError, match=word):
        check_conditions(Conditions(**{**OK, **change}), 16, *LIMITS)


def test_any_modality_where_none_is_named():
    check_modality("mri", None)
    with pytest.raises(InputError, match="modality is 'pet'; allowed are unknown, ct"):
        check_modality("pet", None)
