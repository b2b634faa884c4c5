"""Opening a bundle: a tiny one, whose network adds noise of a seed to its input and whose postprocessing writes it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate

from maisi_tools.bundles.stage import Stage
from maisi_tools.errors import InputError

SCRIPT = """
from pathlib import Path

import torch

LOADED = []


def network():
    LOADED.append(1)
    return torch.nn.Identity()


class AddNoise:
    def __init__(self, seed, scale):
        self.seed, self.scale = seed, scale

    def __call__(self, inputs, network):
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(self.seed))
        return network(inputs) + self.scale * noise


class Write:
    def __init__(self, output_dir):
        self.output_dir = Path(output_dir)

    def __call__(self, data):
        self.output_dir.mkdir(parents=True, exist_ok=True)
        torch.save(torch.as_tensor(data["pred"]), self.output_dir / f"{data['name']}.pt")
        return data
"""
CONFIG = {
    "imports": ["$from maisi_tools.bundles.scripts import bundle_script"],
    "bundle_root": ".",
    "output_dir": "out",
    "device": "cpu",
    "seed": 0,
    "scale": 1.0,
    "progress": True,
    "parts": "$bundle_script(@bundle_root, 'parts')",
    "network": "$@parts.network()",
    "preprocessing": {"_target_": "Identityd", "keys": "image"},
    "inferer": "$@parts.AddNoise(@seed, @scale)",
    "postprocessing": "$@parts.Write(@output_dir)",
    "items": [],
    "run": ["$[@postprocessing({**x, 'pred': @inferer(torch.as_tensor(x['image']), @network)}) for x in @items]"],
}


@pytest.fixture
def bundle(tmp_path):
    root = tmp_path / "tiny"
    (root / "configs").mkdir(parents=True)
    (root / "scripts").mkdir()
    (root / "scripts" / "parts.py").write_text(SCRIPT)
    (root / "configs" / "inference.json").write_text(json.dumps(CONFIG))
    (root / "configs" / "louder.json").write_text('{"scale": 10.0}')
    (root / "configs" / "metadata.json").write_text("{}")
    return root


def test_a_stage_loads_once_and_draws_by_its_seed(bundle, tmp_path):
    stage = Stage(bundle, device="cpu", output_dir=str(tmp_path / "out"))
    item = {"image": torch.zeros(1, 4), "name": "a"}
    drawn = [torch.as_tensor(stage(item, seed)["pred"]) for seed in (3, 4, 3)]
    assert torch.equal(drawn[0], torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(3))[0])
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.as_tensor(stage(item)["pred"]), drawn[2])  # the seed stays
    assert stage.parser.get_parsed_content("parts").LOADED == [1]


def test_run_is_the_whole_config(bundle, tmp_path):
    items = [{"image": [[0.0, 0.0]], "name": "a"}]
    Stage(bundle, ["inference.json", "louder.json"], output_dir=str(tmp_path / "a#b"), seed=3, items=items).run()
    expected = 10 * torch.randn(1, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.load(tmp_path / "a#b" / "a.pt"), expected)


def test_settings_from_a_file_are_values_of_the_configs_keys(bundle):
    assert Stage(bundle, settings={"scale": 2.0}).inferer.scale == 2.0
    assert Stage(bundle, scale="$1 + 1").inferer.scale == 2  # the caller's own are evaluated
    for settings, words in (
        ({"scale": "$1 + 1"}, "scale"),
        ({"sale": 2.0}, "did you mean scale"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(InputError, match=words):
            Stage(bundle, settings=settings, seed=0)


def test_settings_that_an_overlay_leaves_without_use_are_refused(bundle):
    (bundle / "configs" / "silent.json").write_text('{"inferer": "$@parts.AddNoise(@seed, 0)"}')
    assert Stage(bundle, settings={"scale": 2.0, "seed": 1}).inferer.scale == 2.0
    with pytest.raises(InputError, match="no use for the key scale; allowed are .*seed"):
        Stage(bundle, ["inference.json", "silent.json"], settings={"scale": 2.0, "seed": 1})


def test_a_config_that_is_not_there_is_named(bundle):
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        Stage(bundle, "nothing.json")


@pytest.mark.parametrize(
    ("config", "suffix", "own"),
    [
        ("inference.json", "", {"output_size": [32, 32, 32], "num_inference_steps": 1}),
        ("mask_inference.json", "_mask", {"num_inference_steps": 1}),
    ],
)
def test_a_sample_is_the_same_by_run_by_stage_and_by_hand(tiny_bundles, tmp_path, config, suffix, own):
    def volume(name):
        return np.asarray(nib.load(tmp_path / f"{name}{suffix}.nii.gz").dataobj)

    own = {**own, "progress": False, "output_dir": str(tmp_path), "input": [{"name": "whole", "seed": 1}]}
    stage = Stage(tiny_bundles / "maisi_ldm", config, "cpu", **own)
    stage.run()
    expected = volume("whole")
    batch = list_data_collate([stage.preprocessing({"name": "hand", "seed": seed}) for seed in (0, 1)])
    pred = stage.inferer(batch["image"], stage.network)
    stage.postprocessing(decollate_batch({**batch, "pred": pred})[1])
    np.testing.assert_array_equal(volume("hand"), expected)
    for item, seed in (({"name": "a", "seed": 1}, None), ({"name": "b", "seed": 5}, None), ({"name": "c"}, 1)):
        stage(item, seed)
        assert np.array_equal(volume(item["name"]), expected) is (item["name"] != "b")
    assert json.loads((tmp_path / f"c{suffix}.json").read_text())["seed"] == 1
