from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.diffusion.conditions import Conditions
from maisi_tools.diffusion.noise import DrawNoised, SplitSampled, list_samples, redraw_seeds
from maisi_tools.errors import InputError
from maisi_tools.volumes.grid import image_affine
from maisi_tools.volumes.latents import SIDECAR

CONDITIONS = Conditions(size=(64, 48, 32), spacing=(1.5, 2.0, 3.0), region=("head", "chest"), seed=99)


def test_no_redraw_of_a_sample_is_another_samples_draw():
    seeds = [seed for sample in range(1000) for seed in redraw_seeds(sample, 20)]
    assert len(seeds) == len(set(seeds)) == 21_000
    assert redraw_seeds(5, 0) == [5] and redraw_seeds(5, 2)[0] == 5


def test_samples_from_a_number():
    assert list_samples(None, 3, 5) == [{"name": f"sample_seed{seed}", "seed": seed} for seed in (5, 6, 7)]


def test_samples_from_a_list_or_its_file(tmp_path):
    specs = [{"seed": 4}, {"seed": 4, "name": "again"}, {"seed": 2**62, "name": 7}]
    expected = [{"name": "sample_seed4", "seed": 4}, {"name": "again", "seed": 4}, {"name": "7", "seed": 2**62}]
    (tmp_path / "samples.json").write_text(json.dumps(specs))
    assert list_samples(specs, 1, 0) == expected
    assert (
        list_samples(tmp_path / "samples.json", 1, 0) == list_samples(str(tmp_path / "samples.json"), 9, 9) == expected
    )


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([{"name": "a"}], "no integer seed"),
        ([{"seed": "1"}], "no integer seed"),
        ([{"seed": 1.5}], "no integer seed"),
        ([3], "no integer seed"),
        ([{"seed": 1}, {"seed": 1}, {"seed": 2}], "overwrite each other: sample_seed1$"),
        ([{"seed": 1, "name": "a"}, {"seed": 2, "name": "a"}], "overwrite each other: a$"),
        ([{"seed": 1, "name": "a/x"}, {"seed": 2, "name": "b/x"}], "overwrite each other: x$"),
        ([{"seed": 1, "name": "x.nii.gz"}, {"seed": 2, "name": "x"}], "overwrite each other: x$"),
        ([{"seed": 1, "name": ""}], "no name for its files"),
        ([{"seed": 1, "name": "run"}], "called run; allowed are names that are neither run.json's"),
        ([{"seed": 1, "name": "x"}, {"seed": 2, "name": "x_latent.nii"}], "called x_latent; allowed"),
        ([{"seed": True}], "no integer seed"),
        ([{"seed": 1, "spacing": [1, 1, 1], "nmae": "a"}], "has nmae, spacing; allowed are seed and name"),
        ([{"seed": -1}], r"seed of sample .* is -1; allowed is a whole number from 0 to 4611686018427387904"),
        ([{"seed": 2**62 + 1}], "allowed is a whole number from 0"),
        ([], r"input is \[\]; allowed is a list like"),
        ({"seed": 1}, "allowed is a list like"),
    ],
)
def test_bad_lists_are_refused(specs, message):
    with pytest.raises(InputError, match=message):
        list_samples(specs, 1, 0)


def test_a_name_that_is_null_is_none():
    assert list_samples([{"seed": 3, "name": None}], 1, 0) == [{"seed": 3, "name": "sample_seed3"}]
    assert len(list_samples([{"seed": 3, "name": "x_latent"}, {"seed": 4, "name": "y"}], 1, 0)) == 2


@pytest.mark.parametrize("number", [0, -2])
def test_at_least_one_sample(number):
    with pytest.raises(InputError, match=f"num_samples is {number}; give 1 or more"):
        list_samples(None, number, 0)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(InputError, match=name):
            list_samples(tmp_path / name, 1, 0)


def test_noise_has_the_seed_of_its_sample():
    draw = DrawNoised("noise", CONDITIONS, 1.0, 4)
    noise = draw({"name": "a", "seed": 3})["noise"]
    expected = torch.randn(4, 16, 12, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise.as_tensor(), expected)
    assert noise.meta["seed"] == 3
    assert not torch.equal(draw({"name": "a", "seed": 99})["noise"].as_tensor(), expected)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("size", [(64, 48, 32), (4, 4, 4), (16, 32, 4)])
def test_image_is_centred_in_patient_coordinates(size, factor):
    conditions = Conditions(size=size, spacing=(1.5, 2.0, 3.0))
    noise = DrawNoised("noise", conditions, 1.0, factor)({"name": "a", "seed": 0})["noise"]
    assert tuple(noise.shape) == (4, *(n // factor for n in size))
    affine = image_affine(noise.affine, factor)
    np.testing.assert_allclose(affine[:3, :3], np.diag([1.5, 2.0, 3.0]))
    for grid, shape in ((affine, size), (noise.affine.numpy(), noise.shape[1:])):
        centre = grid @ [*((np.array(shape) - 1) / 2), 1]
        np.testing.assert_allclose(centre[:3], 0, atol=1e-12)


def test_item_holds_what_goes_into_the_sidecar():
    item = DrawNoised("noise", CONDITIONS, 0.75, 4)({"name": "first", "seed": 3})
    expected = {
        "size": [64, 48, 32],
        "spacing": [1.5, 2.0, 3.0],
        "orientation": "RAS",
        "region": ["head", "chest"],
        "modality": "ct",
        "intensity": [-1000, 1000],
        "factor": 4,
        "scale_factor": 0.75,
    }
    assert set(expected) == set(SIDECAR)
    assert {key: item[key] for key in SIDECAR} == expected == item["noise"].meta["sidecar"]
    assert item["name"] == item["noise"].meta["filename_or_obj"] == "first"
    json.dumps(expected)


def test_an_mr_stands_for_0_to_1000():
    conditions = Conditions(size=(64, 48, 32), spacing=(1.5, 2.0, 3.0), modality="mri_flair")
    assert DrawNoised("noise", conditions, 1.0, 4)({"name": "a", "seed": 3})["intensity"] == [0, 1000]


def test_sampled_pair_is_split_and_placed():
    noise = DrawNoised("image", CONDITIONS, 1.0, 4)({"name": "first", "seed": 3})["image"]
    ct, latent = torch.rand(1, 64, 48, 32), torch.randn(4, 16, 12, 8)
    item = SplitSampled("pred", "image")({"image": noise, "pred": {"ct": ct, "latent": latent}})
    assert item["pred"] is ct
    assert isinstance(item["latent"], MetaTensor) and torch.equal(item["latent"].as_tensor(), latent)
    assert torch.equal(item["latent"].affine, noise.affine)
    assert item["latent"].meta["filename_or_obj"] == "first"


def test_a_ct_alone_passes():
    ct = torch.rand(1, 4, 4, 4)
    assert SplitSampled("pred", "image")({"image": None, "pred": ct}) == {"image": None, "pred": ct}
