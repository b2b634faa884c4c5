"""The evaluate.json of stages 2 and 3 give the tables of the model cards."""

from __future__ import annotations

import csv
import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from maisi_tools.weights import save_weights


@pytest.fixture
def segmentation(repo_root, tmp_path):
    """The segmentation bundle's inference config, and random weights for it."""
    config = repo_root / "evaluation" / "segmentation" / "configs" / "inference.json"
    parser = ConfigParser()
    parser.read_config(str(config))
    save_weights(tmp_path / "segmentation.pt", parser.get_parsed_content("network_def").state_dict())
    return str(config), str(tmp_path / "segmentation.pt")


@pytest.fixture
def datalist(save, phantom_ct, phantom_labels, tmp_path):
    """Three cases, the last one kept out, with masks; labels are numbered as OpenKBP numbers them."""
    numbering = np.zeros(201, np.uint8)
    numbering[[2, 121, 18, 20]] = 1, 2, 6, 7
    cases = []
    for i, name in enumerate(("p1", "p2", "p3")):
        part = slice(i, i + 40)
        ct, label = (
            save(phantom_ct[part], f"{name}_ct.nii.gz"),
            save(numbering[phantom_labels[part]], f"{name}_seg.nii.gz"),
        )
        save(phantom_labels[part], f"{name}_ct_mask.nii.gz")
        cases.append({"image": str(ct), "label": str(label)})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": cases[:2], "validation": cases[2:]}))
    return tmp_path / "datalist.json"


@pytest.fixture
def evaluate(run_bundle, segmentation, datalist, tmp_path):
    """``evaluate(key=value, ...)``: ControlNet's evaluate.json on the kept-out case, with the segmentation network."""

    def run(**overrides) -> None:
        given = {"datalist": str(datalist), "masks_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
        configs = ["inference.json", "evaluate.json"]
        run_bundle("maisi_controlnet", configs, **given, segmenter_config=segmentation[0], **overrides)

    return run


def test_segmentation_trains_on_cases_with_some_of_their_labels(repo_root, datalist, tmp_path):
    """Ten steps, fewest that the learning rate's cycle has; the phantoms lack a mandible, larynx and esophagus."""
    root = repo_root / "evaluation" / "segmentation"
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / "train.json"),
        meta_file=str(root / "configs" / "metadata.json"),
        workflow_type="train",
        logging_file=False,
        bundle_root=str(root),
        datalist=str(datalist),
        ckpt_dir=str(tmp_path / "segmentation"),
        max_epochs=1,
        epoch_length=10,
        val_interval=1,
        patch_size=[24, 24, 24],
        **{"network_def#channels": [4, 8], "network_def#strides": [2], "device": "$torch.device('cpu')"},
    )
    workflow.initialize()
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 10 and np.isfinite(trainer.state.output["loss"].item())
    labelled = trainer.state.batch["labelled"]
    assert labelled[0].tolist() == [True, True, True, False, False, False, True, True]
    saved = torch.load(tmp_path / "segmentation" / "model.pt", weights_only=True)["model"]
    assert saved.keys() == workflow.parser.get_parsed_content("network_def").state_dict().keys()


def test_controlnet(evaluate, segmentation, tmp_path):
    evaluate(segmenter_ckpt=segmentation[1], num_inference_steps=2, progress=False)
    with open(tmp_path / "out" / "conditioning.csv") as file:
        rows = {row["structure"]: row for row in csv.DictReader(file)}
    assert {"bone", "airway", "body", "brainstem", "spinal cord", "left parotid", "all structures"} <= rows.keys()
    assert "mandible" not in rows and float(rows["body"]["generated"]) > 0.8
    assert float(rows["bone"]["real"]) > float(rows["bone"]["generated"]) > 0.8
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["dice_bone"]["mean"] == float(rows["bone"]["generated"])
    assert summary["real_dice_spinal_cord"]["cases"] == summary["hu_bone"]["cases"] == 1
    with open(tmp_path / "out" / "metrics.csv") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["p3_ct_mask_ct"]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["settings"]["segmenter_config"] == segmentation[0] and run["settings"]["structures"] is None
    assert run["settings"]["segmenter_ckpt"] == segmentation[1] and run["settings"]["judge"] is None
    assert list(run["weights"]) == ["model.pt", "autoencoder.pt", "segmentation.pt"]
    assert run["weights"]["segmentation.pt"] == sha256(Path(segmentation[1]).read_bytes()).hexdigest()


def test_controlnet_of_masks_alone(run_bundle, mask_file, tmp_path):
    run_bundle(
        "maisi_controlnet",
        ["inference.json", "evaluate.json"],
        input=str(mask_file),
        output_dir=str(tmp_path / "out"),
        num_inference_steps=2,
        progress=False,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"hu_bone", "dice_bone", "dice_body"} <= summary.keys() and "real_dice_bone" not in summary


def test_wrong_segmentation_weights_stop_before_a_ct_is_made(cause, evaluate, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(Exception) as raised:
        evaluate(segmenter_ckpt=str(tmp_path / "model.pt"))
    assert "model.pt" in str(cause(raised.value)) and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("key", ["label", "image"])
def test_what_cannot_be_compared_stops_before_a_ct_is_made(cause, evaluate, datalist, save, phantom_ct, tmp_path, key):
    """Labels on another grid than their CT, found from either side."""
    case = json.loads(datalist.read_text())["validation"][0]
    other = save((phantom_ct[:, :-2] if key == "image" else phantom_ct[:, :-2] * 0).astype(np.int16), "other.nii.gz")
    shutil.copy(other, case[key])
    with pytest.raises(Exception) as raised:
        evaluate()
    assert "p3_seg.nii.gz lies on another grid than" in str(cause(raised.value))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["metrics.csv", "summary.json", "conditioning.csv"])
def test_a_table_of_somebody_else_is_not_written_over(cause, evaluate, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("case,dice\n")
    with pytest.raises(Exception) as raised:
        evaluate()
    assert f"{name} would be written over, and no evaluation wrote it" in str(cause(raised.value))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "case,dice\n"


@pytest.mark.parametrize(
    ("folder", "first"),
    [("bundles/maisi_vae", "inference"), ("bundles/maisi_ldm", "train"), ("evaluation/segmentation", "inference")],
)
def test_each_evaluation_looks_before_it_begins(cause, repo_root, tmp_path, folder, first):
    configs = repo_root / folder / "configs"

    def look() -> None:
        parser = ConfigParser()
        parser.read_config([str(configs / f"{name}.json") for name in (first, "evaluate")])
        parser["output_dir"] = parser["samples_dir"] = str(tmp_path)
        step = next(place for place, step in enumerate(parser["initialize"]) if "check_tables" in step)
        parser.get_parsed_content(f"initialize#{step}")

    look()
    (tmp_path / "metrics.csv").write_text("case,dice\n")
    with pytest.raises(Exception) as raised:
        look()
    assert "metrics.csv would be written over" in str(cause(raised.value))


def test_masks_in_the_inputs_numbering_are_not_evaluated(cause, evaluate, tmp_path):
    with pytest.raises(Exception) as raised:
        evaluate(output_labels="input")
    assert "allowed in an evaluation is 'vocabulary'" in str(cause(raised.value))
    assert not (tmp_path / "out").exists()


def test_ldm_samples_against_the_training_set(cause, run_bundle, datalist, save, phantom_ct, tmp_path):
    cts = json.loads(datalist.read_text())
    run_bundle(
        "maisi_vae",
        "encode.json",
        coarse_size=[16, 16, 16],
        input=[case["image"] for section in cts.values() for case in section],
        output_dir=str(tmp_path / "latents"),
        multiple=16,
    )
    (tmp_path / "samples").mkdir()
    save(phantom_ct[1:41], "copy.nii.gz").rename(tmp_path / "samples" / "copy.nii.gz")
    workflow = run_bundle(
        "maisi_ldm",
        ["train.json", "evaluate.json"],
        dataset_dir=str(tmp_path / "latents"),
        held_out=["p3"],
        datalist=str(datalist),
        samples_dir=str(tmp_path / "samples"),
        output_dir=str(tmp_path / "out"),
        cache_rate=0.0,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["ratio"] == {"mean": 0.0, "std": 0.0, "min": 0.0, "max": 0.0, "cases": 1}
    assert summary["kept_out_distance_hu"]["mean"] > 0
    evaluator = workflow.parser.get_parsed_content("validate#evaluator")
    assert np.isfinite(evaluator.state.metrics["L1"])
    weights = torch.load(workflow.parser.get_parsed_content("ckpt_path"), weights_only=True)
    torch.save({**weights, "shared": {"condition_scale": 100.0}}, tmp_path / "other.pt")
    with pytest.raises(Exception) as raised:
        run_bundle(
            *("maisi_ldm", ["train.json", "evaluate.json"]),
            dataset_dir=str(tmp_path / "latents"),
            held_out=["p3"],
            ckpt_path=str(tmp_path / "other.pt"),
        )
    assert "condition_scale is 1.0, they were trained with 100.0" in str(cause(raised.value))
