from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.sizes import (
    UNKNOWN,
    AskedSizes,
    MeasureLabelsd,
    MeasureOrgansd,
    OrganSizes,
    labels_of_channels,
)
from maisi_tools.masks.edits import volumes_ml

ORGANS = {"left parotid": {"label": 18, "range": [10, 50]}, "body": {"label": 200, "range": [1000, 5000]}}


def test_ml_become_0_to_1_and_what_is_not_asked_for_is_unknown():
    sizes = OrganSizes(ORGANS)
    assert sizes.vector({"Left Parotid": 20}).tolist() == [0.25, UNKNOWN]
    assert sizes.vector(None).tolist() == [UNKNOWN, UNKNOWN]
    assert sizes.vector({"body": 5000, "left parotid": 10}).tolist() == [0.0, 1.0]


def test_volumes_beyond_the_range_count_as_its_end():
    sizes = OrganSizes(ORGANS)
    assert sizes.of_volumes({18: 30.0, 200: 9000.0}).tolist() == [0.5, 1.0]
    assert sizes.of_volumes({18: 3.0}).tolist() == [0.0, UNKNOWN]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"spleen": 3}, "spleen.*left parotid, body"),
        ({"left parotid": 51}, "51.*10 to 50 ml"),
        ({"left parotid": "big"}, "left parotid: 'big'; allowed are 10 to 50 ml"),
        ({"left parotid": float("nan")}, "left parotid: nan; allowed are 10 to 50 ml"),
        ([1, 2], "organ -> ml"),
        ({"left parotid": 20, "Left Parotid": 30}, "one organ twice"),
    ],
)
def test_wrong_sizes_are_refused(asked, words):
    with pytest.raises(InputError, match=words):
        OrganSizes(ORGANS).vector(asked)


@pytest.mark.parametrize("organ", [{"label": 999, "range": [0, 1]}, {"label": 1, "range": [2, 1]}])
def test_wrong_organs_are_refused(organ):
    with pytest.raises(InputError, match="organ 'thing' has .*; allowed are a label of the vocabulary and a range"):
        OrganSizes({"thing": organ})


def test_organs_are_measured_in_ml():
    labels = np.zeros((1, 10, 10, 10), dtype=np.uint8)
    labels[0, :5] = 18
    mask = MetaTensor(torch.from_numpy(labels), affine=torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
    assert MeasureOrgansd("mask", ORGANS)({"mask": mask})["organ_ml"] == {"left parotid": 10.0, "body": 0.0}
    assert MeasureLabelsd("mask", [18, 20])({"mask": mask})["label_ml"] == {"18": 10.0, "20": 0.0}


HEAD = {
    "left parotid": {"label": 18, "range": [10, 50]},
    "lung": {"label": 28, "range": [10, 500]},
    "body": {"label": 200, "range": [500, 9000]},
}
SPACING = (4.0, 4.0, 4.0)


def head() -> np.ndarray:
    """Body with 32 ml of parotid beside 110.6 ml of lung, in 64 mm3 voxels."""
    labels = np.zeros((40, 30, 30), dtype=np.uint8)
    labels[2:38, 2:28, 2:28] = 200
    labels[5:15, 5:15, 5:10] = 18
    labels[5:17, 5:17, 10:22] = 28
    return labels


def test_organs_are_resized_to_what_is_asked_for():
    asked = AskedSizes(HEAD, {"lung": 90, "Left Parotid": 40}, SPACING, max_resize=1.5)
    assert set(asked.misses(head())) == {"lung", "left parotid"}
    resized = asked.resize(head())
    got = volumes_ml(resized, SPACING)
    # to a voxel, although the gland has grown into the lung: what yields is resized last
    assert got[18] == pytest.approx(40, abs=0.064) and got[28] == pytest.approx(90, abs=0.064)
    assert asked.misses(resized) == {} and asked.distance(resized) < 0.002 < asked.distance(head())
    assert np.array_equal(resized == 0, head() == 0)


def test_resizing_has_its_limits():
    """By the factor at most, not the body, not an organ that is not there; and with 1 nothing."""
    labels = head()
    asked = AskedSizes(HEAD, {"left parotid": 15, "body": 700}, SPACING, max_resize=1.25)
    resized = asked.resize(labels)
    assert volumes_ml(resized, SPACING)[18] == pytest.approx(32 / 1.25, abs=0.07)
    assert asked.misses(resized) == {"left parotid": 25.6, "body": asked.misses(resized)["body"]}
    assert np.array_equal(AskedSizes(HEAD, {"left parotid": 15}, SPACING).resize(labels), labels)
    absent = np.where(labels == 18, 200, labels).astype(np.uint8)
    assert np.array_equal(asked.resize(absent), absent)
    assert asked.misses(absent)["left parotid"] == 0 and asked.distance(absent) > 0.9


def test_half_and_twice_the_size_are_as_far_off():
    """And an organ that is missing counts as a single voxel, so that a draw without it hardly ever wins."""
    whole = AskedSizes(HEAD, {"left parotid": 32, "lung": 110.592}, SPACING)
    assert whole.distance(head()) == pytest.approx(0, abs=1e-3)
    larger, smaller = (AskedSizes(HEAD, {"left parotid": ml}, SPACING).distance(head()) for ml in (16, 48))
    assert larger == pytest.approx(math.log(2), abs=1e-3) and smaller == pytest.approx(math.log(1.5), abs=1e-3)
    absent = np.where(head() == 18, 200, head()).astype(np.uint8)
    assert AskedSizes(HEAD, {"left parotid": 32}, SPACING).distance(absent) == pytest.approx(math.log(32 / 0.064))
    assert AskedSizes(HEAD, {}, SPACING).distance(head()) == 0


def test_another_draw_is_asked_for_what_the_last_one_lacked():
    asked = AskedSizes(HEAD, {"left parotid": 40, "lung": 59}, SPACING)
    again = asked.corrected(asked.vector, head())
    assert asked.vector.tolist() == pytest.approx([0.75, 0.1, UNKNOWN])
    # 32 ml of parotid, so 8 of 40 more; 110.6 ml of lung, so 51.6 of 490 less
    assert again.tolist() == pytest.approx([0.75 + 8 / 40, 0.1 - 51.592 / 490, UNKNOWN], abs=1e-3)
    for _ in range(20):
        again = asked.corrected(again, head())
    assert again[0] == 1.75 and again[1] == -0.75  # beyond the range, but not without end, and never "unknown"


def test_what_is_completed_is_asked_for_too():
    asked = AskedSizes(HEAD, {"lung": 59}, SPACING, max_resize=1.5)
    full = asked.completed(torch.tensor([0.5, 0.1, 0.0]))
    assert full.ml == pytest.approx({28: 59, 18: 30}) and asked.ml == {28: 59}
    assert full.vector[2] == 0  # the network is asked for the body's size, too, but nothing is drawn again for it
    assert AskedSizes(HEAD, {"body": 600}, SPACING).completed(torch.tensor([0.5, 0.1, 0.2])).ml[200] == 600
    assert volumes_ml(full.resize(head()), SPACING)[18] == pytest.approx(30, abs=0.064)


def test_without_room_an_organ_keeps_its_size():
    labels = np.full((6, 6, 6), 120, dtype=np.uint8)
    labels[2:4, 2:4, 2:4] = 18
    asked = AskedSizes({"left parotid": {"label": 18, "range": [0.1, 50]}}, {"left parotid": 0.7}, SPACING, 1.5)
    assert np.array_equal(asked.resize(labels), labels)


def test_sizes_that_are_not_in_ml_change_nothing():
    asked = AskedSizes(HEAD, {"left parotid": 15}, SPACING, max_resize=1.5, in_ml=False)
    assert asked.vector[0] == 0.125
    assert np.array_equal(asked.resize(head()), head()) and asked.misses(head()) == {} and asked.distance(head()) == 0


@pytest.mark.parametrize("factor", [0.5, float("inf"), True, "1.5", None])
def test_wrong_factors_are_refused(factor):
    with pytest.raises(InputError, match="max_resize"):
        AskedSizes(HEAD, {}, SPACING, max_resize=factor)


def test_channels_of_the_release_are_read_from_its_file(tmp_path):
    path = tmp_path / "label_dict_124_to_132.json"
    path.write_text(json.dumps({"liver": [1, 1], "body": [3, 200], "spleen": [2, 3]}))
    assert labels_of_channels(str(path)) == [0, 1, 3, 200]
    path.write_text(json.dumps({"liver": [1, 1], "body": [3, 200]}))
    with pytest.raises(InputError, match="gaps"):
        labels_of_channels(str(path))
    with pytest.raises(InputError, match="label_dict_124_to_132"):
        labels_of_channels(str(tmp_path / "absent.json"))
    assert labels_of_channels([0, 5]) == [0, 5]
