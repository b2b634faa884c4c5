"""The segmentation bundle of evaluation/, and any other one, as a function from a CT's file to its labels."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from maisi_tools.errors import InputError, find_input_error
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.metrics.segmentation import BundleSegmenter, read_classes
from maisi_tools.weights import save_weights

SPACING = (5.0, 5.0, 4.0)


@pytest.fixture(scope="module")
def bundle(repo_root):
    return repo_root / "evaluation" / "segmentation"


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Numbered as OpenKBP numbers brain stem, spinal cord and parotids."""
    phantom = make_phantom("head_neck", size=(40, 40, 36), spacing=SPACING, seed=3)
    found = np.zeros_like(phantom)
    for ours, theirs in ((1, 2), (2, 121), (6, 18), (7, 20)):
        found[phantom == theirs] = ours
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory, labels):
    """A CT, in which every label has its own HU, and its labels; x runs from right to left in the files."""
    folder = tmp_path_factory.mktemp("data")
    affine = np.array([[-5.0, 0, 0, 90], [0, 5, 0, -80], [0, 0, 4, -70], [0, 0, 0, 1]])
    noise = np.random.default_rng(0).normal(0, 10, labels.shape)
    ct = np.where(labels > 0, 60 * labels, -200) + noise
    ct[:, :4] = -1000
    paths = folder / "a_ct.nii.gz", folder / "a_seg.nii.gz"
    nib.save(nib.Nifti1Image(ct.astype(np.int16), affine), paths[0])
    nib.save(nib.Nifti1Image(labels, affine), paths[1])
    return paths


def run(bundle, *configs, **overrides) -> None:
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) for name in configs],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        **{"device": "$torch.device('cpu')", **overrides},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def train(bundle, files, folder, **overrides):
    """Train for two steps on one case; the kept-out one is no file at all, so reading it would raise."""
    image, label = map(str, files)
    folder.mkdir(parents=True, exist_ok=True)
    case = {"image": image, "label": label}
    kept_out = case if "val_interval" in overrides else {"image": "none_ct.nii.gz", "label": "none_seg.nii.gz"}
    (folder / "datalist.json").write_text(json.dumps({"training": [case], "validation": [kept_out]}))
    settings = {"max_epochs": 1, "epoch_length": 2, "val_interval": 2, "patch_size": [16, 16, 16], "cache_rate": 0.0}
    run(bundle, "train.json", datalist=str(folder / "datalist.json"), ckpt_dir=str(folder), **(settings | overrides))
    return folder / "model.pt"


@pytest.fixture(scope="module")
def weights(bundle, files, tmp_path_factory):
    return train(bundle, files, tmp_path_factory.mktemp("trained"))


# --- the bundle of evaluation/ ----------------------------------------------------------------------------------------


def test_training_depends_on_its_seed_alone(bundle, files, weights, tmp_path):
    same, other = (train(bundle, files, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    first, again, differs = (torch.load(path, weights_only=True)["model"] for path in (weights, same, other))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], differs[name]) for name in first)


def test_training_measures_the_kept_out_cases(bundle, files, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(bundle, files, tmp_path, val_interval=1)
    assert "dice" in caplog.text


def test_configs_agree(bundle):
    configs = {}
    for name in ("train.json", "inference.json"):
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / name))
        configs[name] = parser
    for key in ("spacing", "window", "patch_size"):
        assert configs["train.json"][key] == configs["inference.json"][key]
    networks = [parser.get_parsed_content("network_def").state_dict() for parser in configs.values()]
    assert {k: v.shape for k, v in networks[0].items()} == {k: v.shape for k, v in networks[1].items()}
    classes = read_classes(bundle / "configs" / "metadata.json")
    assert list(classes) == configs["train.json"]["structures"] and list(classes.values()) == list(range(1, 8))


def test_segmenter_equals_the_bundles_own_run(bundle, files, labels, weights, tmp_path):
    run(bundle, "inference.json", input=str(files[0]), output_dir=str(tmp_path), ckpt_path=str(weights))
    written = nib.load(tmp_path / "a_ct_seg.nii.gz")
    found = BundleSegmenter(bundle / "configs" / "inference.json", weights)(files[0])
    turned = nib.as_closest_canonical(written)
    assert tuple(found.shape[1:]) == turned.shape == labels.shape
    ours = nib.as_closest_canonical(nib.Nifti1Image(found[0].numpy().astype(np.uint8), found.affine.numpy()))
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(turned.dataobj))
    np.testing.assert_allclose(ours.affine, turned.affine, atol=1e-4)
    assert found.max() <= 7 and not list(tmp_path.glob("**/*_trans*"))


def test_evaluate_writes_the_dice_of_every_case(bundle, files, labels, weights, tmp_path):
    datalist = tmp_path / "list.json"
    datalist.write_text(json.dumps({"validation": [{"image": str(files[0]), "label": str(files[1])}]}))
    run(
        bundle,
        "inference.json",
        "evaluate.json",
        datalist=str(datalist),
        output_dir=str(tmp_path / "out"),
        ckpt_path=str(weights),
    )
    predicted = nib.as_closest_canonical(nib.load(tmp_path / "out" / "a_ct_seg.nii.gz"))
    reference = nib.as_closest_canonical(nib.load(files[1]))
    a, b = (np.asarray(image.dataobj) == 2 for image in (predicted, reference))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dice_spinal_cord"]["mean"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-4)
    assert "dice_mandible" not in summary and summary["dice_mean"]["cases"] == 1


def test_what_cannot_be_measured_is_refused_before_a_ct_is_segmented(bundle, files, labels, weights, tmp_path):
    other = tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(labels[:-1].astype(np.uint8), nib.load(files[1]).affine), other)
    datalist, settings = tmp_path / "list.json", {"ckpt_path": str(weights), "output_dir": str(tmp_path / "out")}
    second = shutil.copy(files[0], tmp_path / "b_ct.nii.gz")
    for case, reason in (({"label": str(other)}, "another grid"), ({}, "has no label in the datalist")):
        cases = [{"image": str(files[0]), "label": str(files[1])}, {"image": str(second), **case}]
        datalist.write_text(json.dumps({"validation": cases}))
        with pytest.raises(Exception) as error:
            run(bundle, "inference.json", "evaluate.json", datalist=str(datalist), **settings)
        assert reason in str(find_input_error(error.value))
        assert not list((tmp_path / "out").glob("*_seg.nii.gz"))


# --- a bundle as the model zoo has them -------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path):
    """Its network is a threshold at 100 HU, as a convolution with two channels; its results would go to a folder."""
    configs = tmp_path / "zoo" / "configs"
    configs.mkdir(parents=True)
    config = {
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
            ],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16]},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": str(tmp_path / "written")},
            ],
        },
    }
    channels = {"0": "background", "1": "bone"}
    (configs / "inference.json").write_text(json.dumps(config))
    (configs / "metadata.json").write_text(
        json.dumps({"network_data_format": {"outputs": {"pred": {"channel_def": channels}}}})
    )
    (tmp_path / "zoo" / "models").mkdir()
    state = {"weight": torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -100.0])}
    save_weights(tmp_path / "zoo" / "models" / "model.pt", state)
    return configs / "inference.json"


def test_a_bundle_of_the_model_zoo(zoo, files, tmp_path):
    segmenter = BundleSegmenter(zoo)
    assert segmenter.classes == {"bone": 1}
    found = segmenter(files[0])
    image = nib.load(files[0])
    np.testing.assert_array_equal(found[0].numpy(), np.asarray(image.dataobj) > 100)
    np.testing.assert_allclose(found.affine.numpy(), image.affine)
    assert not list((tmp_path / "written").glob("**/*.nii*"))


def test_bundles_that_cannot_segment(zoo, files, tmp_path):
    with pytest.raises(InputError, match="none.json does not exist"):
        BundleSegmenter(zoo.with_name("none.json"))
    with pytest.raises(InputError, match="missing.pt"):
        BundleSegmenter(zoo, tmp_path / "missing.pt")
    config = json.loads(zoo.read_text())
    zoo.with_name("partial.json").write_text(json.dumps({k: v for k, v in config.items() if k != "inferer"}))
    with pytest.raises(InputError, match="has no inferer"):
        BundleSegmenter(zoo.with_name("partial.json"))
    config["postprocessing"]["transforms"] = config["postprocessing"]["transforms"][:2]
    zoo.with_name("soft.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="one channel of labels"):
        BundleSegmenter(zoo.with_name("soft.json"))(files[0])
    metadata = zoo.with_name("metadata.json")
    metadata.write_text('{"network_data_format": {"outputs": {"pred": {"channel_def": {"0": "background"}}}}}')
    with pytest.raises(InputError, match="no class but the background"):
        BundleSegmenter(zoo)
    metadata.write_text("{}")
    with pytest.raises(InputError, match="does not say what the network's labels are"):
        BundleSegmenter(zoo)
    metadata.unlink()
    with pytest.raises(InputError, match="does not say what"):
        BundleSegmenter(zoo)


def test_training_without_a_datalist_is_refused(bundle, tmp_path):
    with pytest.raises(Exception) as raised:
        run(bundle, "train.json", datalist=str(tmp_path / "none.json"), ckpt_dir=str(tmp_path))
    assert "none.json does not exist" in str(find_input_error(raised.value))
