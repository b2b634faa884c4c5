"""Settings of a run: misspelt keys and devices that are not there are refused, paths stay the text that was typed."""

from __future__ import annotations

import sys

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from maisi_tools.bundles.ranks import join_ranks, of_torchrun
from maisi_tools.bundles.settings import (
    check_keys,
    check_parts,
    check_preset,
    check_samples,
    check_values,
    is_path,
    typed,
)
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


def test_none_on_the_command_line_is_refused_where_it_would_change_nothing(workflow, monkeypatch, tmp_path):
    command = str(tmp_path / "monai" / "bundle" / "__main__.py")
    for words, key, value in [
        (["--steps", "None"], "steps", "3"),
        (["--displayable_configs#num_inference_steps=None"], "displayable_configs#num_inference_steps", "3"),
        (["--output-dir=None"], "output_dir", "'eval'"),
    ]:
        monkeypatch.setattr(sys, "argv", [command, "run", *words])
        with pytest.raises(Exception) as raised:
            workflow().initialize()
        words = f"{key} is None on the command line, which MONAI takes for not given: it would stay {value}. Give"
        assert words in str(find_input_error(raised.value))
    for program, words in [
        (command, ["--unused", "'None'", "--logging_file", "None", "--none=None", "--judge", "None"]),
        ("bin/maisi", ["--steps", "None"]),
    ]:
        monkeypatch.setattr(sys, "argv", [program, "run", *words])
        workflow(none=None, judge="$None", report="$str((@none, @judge))").initialize()


def test_configs_in_yaml_and_files_that_are_none_beside_them(workflow, tmp_path):
    import json

    (tmp_path / "datalist.json").write_text("[]")
    (tmp_path / "notes.yaml").write_text("a: [")
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    workflow().initialize()
    (tmp_path / "config.yaml").write_text(json.dumps({**CONFIG, "alternative": 1}))  # JSON is YAML
    (tmp_path / "config.json").unlink(missing_ok=True)
    ConfigWorkflow(str(tmp_path / "config.yaml"), meta_file=False, logging_file=False).initialize()


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


def test_displayable_configs_are_not_given_in_part(workflow):
    with pytest.raises(Exception) as raised:
        workflow(displayable_configs={"seed": 5}).initialize()
    found = str(find_input_error(raised.value))
    assert "is {'seed': 5}, without num_inference_steps;" in found and found.endswith("such as --seed")


def test_a_folder_of_data_that_nothing_reads_is_refused(configs):
    files = configs("maisi_vae")
    check_keys({"input": "a", "dataset_dir": "@input", "run": ["$@input"]}, files)
    check_keys({"dataset_dir": "data", "run": ["$@dataset_dir"]}, files)
    with pytest.raises(InputError, match="no use for the key dataset_dir"):
        check_keys({"input": "a", "dataset_dir": "data", "run": ["$@input"]}, files)


@pytest.mark.parametrize("value", ["@spacing", "$1 + 1", {"_target_": "torch.nn.ReLU"}])
def test_a_misspelt_key_is_refused_whatever_its_value(workflow, value):
    with pytest.raises(Exception) as raised:
        workflow(network_deff=value).initialize()
    assert "no use for the key network_deff (nearest: network_def)" in str(find_input_error(raised.value))
    run = workflow(other="$json.dump(1, open(@report, 'w'))")
    run.run_id = "other"
    run.initialize()


def test_keys_of_the_config_and_new_ones_that_are_referred_to_pass(workflow):
    workflow(spacing=[2, 2, 2], steps=4, more=5, report="$str(@more)").initialize()


def test_paths_that_fire_made_numbers_of_are_the_text_again(workflow, monkeypatch, tmp_path):
    for value, words, text in [
        (20260101, ["--output_dir", "20260101"], "20260101"),
        (1000, ["--steps", "1000", "--output_dir", "1_000"], "1_000"),
        (1e5, ["--output-dir=1e5"], "1e5"),
        (2027, [], "2027"),
        ("run", ["--output_dir", "run#2"], "run#2"),
        ("run", ["--output_dir", "a", "--output_dir=run#2"], "run#2"),
        ("a@b 'c#d", ["--output_dir", "a@b 'c#d"], "a@b 'c#d"),
        ("old", ["--output_dir", "(old)"], "(old)"),
        ("out", ["--output_dir", "out "], "out "),
        ("run#2", ["--output_dir", "'run#2'"], "run#2"),
        ("run/stage", ["--output_dir", "run#2"], "run/stage"),  # a command's own option
    ]:
        monkeypatch.setattr(sys, "argv", ["bundle", *words])
        run = workflow(output_dir=value)
        run.initialize()
        run.run()
        assert (tmp_path / "x").read_text() == f'["{text}", 3]'
    assert typed("label_map", 7, ["--seed", "7"]) == "7"
    assert is_path("ckpt_path") and is_path("masks_dir") and not is_path("seed")


@pytest.fixture(scope="module")
def configs(repo_root):
    """``configs("maisi_ldm")``: the contents of a bundle's configs."""

    def read(bundle):
        return [ConfigParser.load_config_file(file) for file in (repo_root / "bundles" / bundle).glob("configs/*.json")]

    return read


@pytest.mark.parametrize(
    ("bundle", "key", "value", "words"),
    [
        ("maisi_ldm", "seed", "abc", "seed is 'abc'; allowed is a number, such as 0"),
        ("maisi_ldm", "seed", 1.5, "seed is 1.5; allowed is a whole number from 0 to 4611686018427387904"),
        ("maisi_ldm", "seed", None, "seed is None"),
        ("maisi_ldm", "num_samples", 1.9, "num_samples is 1.9; allowed is a whole number from 1 on"),
        ("maisi_ldm", "num_inference_steps", True, "num_inference_steps is True"),
        ("maisi_ldm", "guidance_scale", float("nan"), "guidance_scale is nan"),
        ("maisi_ldm", "guidance_scale", -1, "guidance_scale is -1; allowed is a number from 0 to 50"),
        ("maisi_controlnet", "guidance_scale", 51, "guidance_scale is 51; allowed is a number from 0 to 50"),
        ("maisi_controlnet", "control_scale", -0.5, "control_scale is -0.5; allowed is a number from 0 to 10"),
        ("maisi_ldm", "output_size", 48, "output_size is 48; allowed is a list, such as"),
        ("maisi_ldm", "spacing", [4, "x", 4], "spacing is"),
        ("maisi_ldm", "modality", ["ct"], "modality is .'ct'.; allowed is text"),
        ("maisi_ldm", "trained_regions", "head", "trained_regions is 'head'; allowed is a list"),
        ("maisi_ldm", "save_latents", "no", "save_latents is 'no'; allowed is true or false"),
        ("maisi_ldm", "tensorboard", "no", "tensorboard is 'no'"),
        ("maisi_ldm", "splits", 1.5, "splits is 1.5; allowed is a whole number"),
        ("maisi_ldm", "splits", "two", "splits is 'two'"),
        ("maisi_ldm", "dtype", "int8", "dtype is 'int8'; allowed are float32, bfloat16"),
        ("maisi_ldm", "learning_rate", "fast", "learning_rate is 'fast'"),
        ("maisi_ldm", "learning_rate", -1, "learning_rate is -1; allowed is a number from 0 on"),
        ("maisi_ldm", "max_epochs", 0, "max_epochs is 0; allowed is a whole number from 1 on"),
        ("maisi_ldm", "condition_dropout", 3, "condition_dropout is 3; allowed is a number from 0 to 1"),
        ("maisi_ldm", "minutes", "ten", "minutes is 'ten'"),
        ("maisi_controlnet", "control_scale", "big", "control_scale is 'big'"),
        ("maisi_controlnet", "hu_ranges", 3, "hu_ranges is 3; allowed is a mapping"),
        ("maisi_vae", "multiple", "x", "multiple is 'x'"),
        ("maisi_vae", "num_workers", -1, "num_workers is -1; allowed is a whole number from 0 on"),
        ("maisi_vae", "sigma", 1, "sigma is 1; allowed is true or false"),
        ("maisi_vae", "suffix", None, "suffix is None; allowed is text, such as '_ct'"),
        ("maisi_ldm", "seed", 2**63, "seed is 9223372036854775808; allowed is a whole number from 0 to"),
        ("maisi_vae", "output_dtype", None, "output_dtype is None; allowed is text"),
        ("maisi_ldm", "guided_conditions", None, "guided_conditions is None; allowed is a list"),
        ("maisi_ldm", "output_dir", None, "output_dir is None; allowed is a path, as text"),
        ("maisi_ldm", "ckpt_path", ["x.pt"], "ckpt_path is .'x.pt'.; allowed is a path, as text"),
    ],
)
def test_values_of_another_kind_are_refused(configs, bundle, key, value, words):
    for given in ({key: value}, {"displayable_configs": {key: value}}):
        with pytest.raises(InputError, match=words):
            check_values(given, configs(bundle))


def test_values_that_are_used_pass(configs):
    """Null, expressions, whole numbers for fractions, lists of other lengths, forms' text of splits, a code, a path."""
    for bundle, given in {
        "maisi_ldm": {"guidance_scale": 3, "region": "head", "modality": 8, "trained_modalities": [1, "ct"]},
        "maisi_controlnet": {"keep_labels": None, "spacing": [4, 4, 3], "seed": "$1 + 1", "splits": "2", "edits": ""},
        "maisi_vae": {"resume": "a.pt", "frozen_layers": None, "intensity_weights": [[0, 1, 2.5]], "input": ("a", "b")},
    }.items():  # fmt: skip
        check_values(given, configs(bundle))
    for bundle in ("maisi_vae", "maisi_ldm", "maisi_controlnet"):
        for file in configs(bundle):
            check_values(file, configs(bundle))


def test_the_run_refuses_a_value_of_another_kind_before_it_is_used(workflow):
    with pytest.raises(Exception) as raised:
        workflow(steps="many").initialize()
    assert str(find_input_error(raised.value)) == "steps is 'many'; allowed is a number, such as 3"


def test_an_argument_that_a_component_does_not_take_is_refused_with_the_nearest(configs):
    parser = ConfigParser()
    tsp = {"_target_": "maisi_tools.tsp.inferer.TSPInferer", "splits": 1, "axis": 0}
    files = [{"tsp": {**tsp, "kept": 1}, "+a#b": [{"_target_": "Compose", "kept": 1}]}]
    fits = {"tsp": {**tsp, "kept": 1}, "data": {"_target_": "Dataset", "data": []}, "a": {"b": files[0]["+a#b"]}}
    check_parts(fits, files, parser.locator)
    for part, words in [
        (
            {"tsp": {**tsp, "split": 3}},
            r"tsp has no use for the key split \(nearest: splits\); allowed are splits, axis",
        ),
        ({"x": [{"_target_": "Dataset", "date": []}]}, r"x#0 has no use for the key date \(nearest: data\)"),
    ]:
        with pytest.raises(InputError, match=words):
            check_parts(part, files, parser.locator)


def test_what_a_preset_stands_for_is_refused_beside_it(configs):
    for bundle, given, words in [
        ("maisi_controlnet", {"presets": "small", "preset": "head_neck", "spacing": [4, 4, 3]}, "spacing is .4, 4, 3."),
        ("maisi_ldm", {"presets": "ct", "preset": "chest", "output_size": [64, 64, 64]}, "output_size is .64"),
        ("maisi_ldm", {"presets": "ct", "preset": "chest", "region": ["lower"]}, "region is .'lower'."),
        ("maisi_ldm", {"presets": "mr", "preset": "brain_t1", "modality": "mri_swi"}, "modality is 'mri_swi'"),
    ]:
        with pytest.raises(InputError, match=f"preset is .*, and {words}"):
            check_preset(given, configs(bundle))
    for given in [
        {"presets": "ct", "preset": "any_384mm", "region": ["lower"], "output_size": [112, 80, 112]},
        {"presets": "ct", "preset": None, "region": ["lower"]},
        {"presets": "mr_brain", "preset": "sagittal", "modality": "mri_swi"},
    ]:
        check_preset(given, configs("maisi_ldm"))


def test_seeds_are_given_as_a_list_or_as_numbers(configs):
    shown = {"seed": "@displayable_configs::seed", "num_samples": "@displayable_configs::num_samples"}
    own = {**shown, "input": "seeds.json", "displayable_configs": {"seed": 0, "num_samples": 1}}
    for bundle in ("maisi_ldm", "maisi_controlnet"):
        check_samples(own, configs("maisi_ldm"))
        check_samples({**own, "input": None, "seed": 5}, configs("maisi_ldm"))
        check_samples({"input": "mask.nii.gz", "seed": 5}, configs(bundle))
    for changed, words in [
        ({"seed": 5}, "seed is 5, which"),
        ({"num_samples": 3, "seed": 5}, "seed is 5, num_samples is 3, which"),
        ({"displayable_configs": {"seed": 0, "num_samples": 3}}, "num_samples is 3, which"),
    ]:
        with pytest.raises(InputError, match=f"input is a list of samples with their seeds, and {words}"):
            check_samples({**own, **changed}, configs("maisi_ldm"))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_without_torchrun_a_multi_gpu_config_says_how_it_is_started(repo_root, monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=f"sets {name}; .* torchrun --nproc_per_node=N -m monai.bundle run"):
        of_torchrun(name)
    monkeypatch.setenv(name, "3")
    assert of_torchrun(name) == 3
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="sets RANK"):
        join_ranks("cpu")
    parser = ConfigParser()
    parser.read_config(
        [str(repo_root / "bundles/maisi_vae/configs" / file) for file in ("encode.json", "multi_gpu_encode.json")]
    )
    with pytest.raises(RuntimeError) as raised:
        parser.get_parsed_content("rank")
    assert "torchrun" in str(find_input_error(raised.value))


@pytest.mark.parametrize("bundle", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_a_config_for_several_processes_goes_over_those_that_join_them(repo_root, bundle):
    """Each config by itself that refers to no start is refused with it, and begins with it where it is taken."""
    folder, taken = repo_root / "bundles" / bundle / "configs", set()
    files = [ConfigParser.load_config_file(file) for file in folder.glob("*.json")]
    for base in sorted(folder.glob("*.json")):
        own = ConfigParser.load_config_file(base)
        if "bundle_root" not in own:
            continue
        overlay = "multi_gpu_train.json" if base.stem == "train" else "multi_gpu_inference.json"
        merged = ConfigParser.load_config_files([base, folder / overlay])
        if "@start" in own["initialize"]:
            check_keys(merged, files)
            taken.add(base.name)
            assert own["initialize"][0] == "@start" and own["start"] is None
        else:
            with pytest.raises(InputError, match="start, by which a multi_gpu config joins its processes, is nothing"):
                check_keys(merged, files)
            check_keys({**merged, "start": None}, files)
    assert taken == {"inference.json", "train.json"} | ({"decode.json"} if bundle == "maisi_vae" else set())


def test_devices_that_are_not_there_are_refused():
    assert check_device("cpu") == torch.device("cpu") == check_device(torch.device("cpu"))
    for wrong in ("cuda:99", "gpu", "cuda:x", 3.5):
        with pytest.raises(InputError, match=rf"device {wrong} cannot be used \(.*\); allowed is cpu"):
            check_device(wrong)


def test_every_config_passes_with_its_overlays(repo_root):
    """What a config does not refer to itself would be refused from every user."""
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
