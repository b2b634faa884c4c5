"""Settings of a run: misspelt keys and devices that are not there are refused, paths stay the text that was typed."""

from __future__ import annotations

import sys

import pytest
import torch
from monai.bundle import ConfigWorkflow

from maisi_tools.bundles.settings import check_keys, is_path, typed
from maisi_tools.errors import InputError, find_input_error
from maisi_tools.settings import check_device

CONFIG = {
    "imports": ["$from maisi_tools.bundles.settings import check_settings", "$import json"],
    "displayable_configs": {"num_inference_steps": 3},
    "steps": "@displayable_configs#num_inference_steps",
    "spacing": [1, 1, 1],
    "output_dir": "eval",
    "network_def": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": "@steps"},
    "unused": {"_target_": "torch.nn.ReLU"},
    "made": "$(@spacing, @steps, @network_def)",
    "initialize": ["$check_settings()"],
    "run": ["$json.dump([@output_dir, @steps], open(@report, 'w'))"],
    "report": "report.json",
}


@pytest.fixture
def workflow(tmp_path):
    def ready(**overrides):
        import json

        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG))
        return ConfigWorkflow(
            str(path), meta_file=False, logging_file=False, **{"report": str(tmp_path / "x"), **overrides}
        )

    return ready


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("spacings", "spacing"),
        ("outputdir", "output_dir"),
        ("displayable_configs#num_inference_step", "num_inference_steps"),
        ("num_inference_step", "num_inference_steps"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(workflow, key, nearest):
    with pytest.raises(Exception) as raised:
        workflow(**{key: 4}).initialize()
    found = find_input_error(raised.value)
    assert f"the config has no use for the key {key.split('#')[-1]} (nearest: {nearest})" in str(found)
    assert "allowed are num_inference_steps, output_dir, report, spacing and" in str(found)


def test_a_value_that_an_overlay_left_without_use_passes_and_another_does_not():
    files = [{"resume": False, "run": []}]
    check_keys({"resume": False, "run": []}, files)
    with pytest.raises(InputError, match="no use for the key resume"):
        check_keys({"resume": True, "run": []}, files)


def test_keys_of_the_config_and_new_ones_that_are_referred_to_pass(workflow):
    workflow(spacing=[2, 2, 2], steps=4, more=5, report="$str(@more)").initialize()


def test_paths_that_fire_made_numbers_of_are_the_text_again(workflow, monkeypatch, tmp_path):
    for value, words, text in [
        (20260101, ["--output_dir", "20260101"], "20260101"),
        (1000, ["--steps", "1000", "--output_dir", "1_000"], "1_000"),
        (1e5, ["--output-dir=1e5"], "1e5"),
        (2027, [], "2027"),
    ]:
        monkeypatch.setattr(sys, "argv", ["bundle", *words])
        run = workflow(output_dir=value)
        run.initialize()
        run.run()
        assert (tmp_path / "x").read_text() == f'["{text}", 3]'
    assert typed("label_map", 7, ["--seed", "7"]) == "7"
    assert is_path("ckpt_path") and is_path("masks_dir") and not is_path("seed")


def test_devices_that_are_not_there_are_refused():
    assert check_device("cpu") == torch.device("cpu") == check_device(torch.device("cpu"))
    for wrong in ("cuda:99", "gpu", "cuda:x", 3.5):
        with pytest.raises(InputError, match=rf"device {wrong} cannot be used \(.*\); allowed is cpu"):
            check_device(wrong)


def test_every_config_passes_with_its_overlays(repo_root):
    """What a config does not refer to itself would be refused from every user."""
    from monai.bundle import ConfigParser

    bases = {"encode": "encode.json", "decode": "decode.json", "mask_inference": "mask_inference.json"}
    seen = 0
    for path in sorted([*repo_root.glob("bundles/*/configs/*.json"), *repo_root.glob("evaluation/*/configs/*.json")]):
        if path.name == "metadata.json":
            continue
        base = next((name for part, name in bases.items() if part in path.stem), "inference.json")
        base = "mask_inference.json" if path.stem == "full_mask" else base
        over_training = "train" in path.stem or path.stem in ("sharpen_decoder", "converge")
        if over_training or (path.stem, path.parts[-3]) == ("evaluate", "maisi_ldm"):
            base = "train.json"
        files = [path.parent / base] + ([path] if path.name != base else [])
        parser = ConfigParser()
        parser.read_config([str(file) for file in files if file.is_file()])
        try:
            check_keys(parser.get(), [ConfigParser.load_config_file(file) for file in path.parent.glob("*.json")])
        except InputError as error:
            pytest.fail(f"{path}: {error}")
        assert "$begin(@seed)" in parser["initialize"] or "$check_settings()" in parser["initialize"], path
        seen += 1
    assert seen > 30
