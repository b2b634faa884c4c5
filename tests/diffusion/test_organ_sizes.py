from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.diffusion.organ_sizes import UNKNOWN, MeasureLabelsd, MeasureOrgansd, OrganSizes, labels_of_channels
from maisi_tools.errors import InputError

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
        ({"left parotid": "big"}, "big"),
        ({"left parotid": float("nan")}, "nan"),
        ([1, 2], "organ -> ml"),
    ],
)
def test_wrong_sizes_are_refused(asked, words):
    with pytest.raises(InputError, match=words):
        OrganSizes(ORGANS).vector(asked)


@pytest.mark.parametrize("organ", [{"label": 999, "range": [0, 1]}, {"label": 1, "range": [2, 1]}])
def test_wrong_organs_are_refused(organ):
    with pytest.raises(InputError, match="thing"):
        OrganSizes({"thing": organ})


def test_organs_are_measured_in_ml():
    labels = np.zeros((1, 10, 10, 10), dtype=np.uint8)
    labels[0, :5] = 18
    mask = MetaTensor(torch.from_numpy(labels), affine=torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0])))
    assert MeasureOrgansd("mask", ORGANS)({"mask": mask})["organ_ml"] == {"left parotid": 10.0, "body": 0.0}
    assert MeasureLabelsd("mask", [18, 20])({"mask": mask})["label_ml"] == {"18": 10.0, "20": 0.0}


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
