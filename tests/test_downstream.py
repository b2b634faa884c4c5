"""The experiment on what synthetic data are worth: arms, resuming, and the comparison."""

from __future__ import annotations

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.downstream import ARM, Arm, compare_arms, run_downstream
from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.training.checkpoint import Checkpointer

TINY = {
    "patch_size": [24, 24, 24],
    "network_def#channels": [4, 8],
    "network_def#strides": [2],
    "device": "$torch.device('cpu')",
}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Datalists of four real cases, one of them kept out, and two synthetic ones."""
    folder = tmp_path_factory.mktemp("cases")
    cases = []
    for seed in range(6):
        labels = make_phantom("head_neck", (32, 32, 32), (8.0, 8.0, 5.0), seed)
        numbering = np.zeros(201, np.uint8)
        numbering[[2, 121, 18, 20]] = 1, 2, 6, 7
        case = {"image": str(folder / f"p{seed}_ct.nii.gz"), "label": str(folder / f"p{seed}_seg.nii.gz")}
        for path, array in ((case["image"], flat_ct(labels)), (case["label"], numbering[labels])):
            nib.save(nib.Nifti1Image(array, np.diag([8.0, 8.0, 5.0, 1.0])), path)
        cases.append(case)
    (folder / "real.json").write_text(json.dumps({"training": cases[:3], "validation": cases[3:4]}))
    (folder / "synthetic.json").write_text(json.dumps({"training": cases[4:]}))
    return folder / "real.json", folder / "synthetic.json"


@pytest.fixture
def experiment(lists, repo_root, tmp_path):
    def run(real_counts=(2,), synthetic_counts=(2,), seeds=1, steps=10, real=lists[0], synthetic=lists[1]):
        root = repo_root / "evaluation" / "segmentation"
        return run_downstream(
            real, synthetic, tmp_path / "out", root, real_counts, synthetic_counts, seeds, steps, TINY
        )

    return run


def test_both_arms_train_and_finished_ones_are_kept(experiment, tmp_path):
    rows = experiment()
    out = tmp_path / "out"
    arms = {arm.name: json.loads((out / arm.name / ARM).read_text()) for arm in (Arm(2, 0, 0), Arm(2, 2, 0))}
    alone, mixed = (arm["settings"]["training"] for arm in arms.values())
    assert len(alone) == 2 and mixed[:2] == alone and len(mixed) == 4
    mean = {row["figure"]: row for row in rows}["dice_mean"]
    for arm, column in zip(arms.values(), ("dice_real", "dice_with_synthetic"), strict=True):
        assert list(arm["figures"]) == ["p3_ct"]
        assert arm["figures"]["p3_ct"]["dice_mean"] == mean[column]
    with open(out / "downstream.csv", newline="") as file:
        assert [row["figure"] for row in csv.DictReader(file)] == [row["figure"] for row in rows]

    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/model.pt")}
    assert len(stamps) == 2
    (out / Arm(2, 2, 0).name / ARM).unlink()  # as if it had been interrupted
    assert experiment() == rows  # trained again, to the same figures
    again = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert again == {out / Arm(2, 2, 0).name / "model.pt"}
    with pytest.raises(InputError, match="another steps"):
        experiment(steps=20)


def test_an_interrupted_training_goes_on(experiment, assert_same, tmp_path, monkeypatch):
    """Stopped after the first arm's fourth epoch; all figures and weights are those of a run that was not."""

    def weights() -> dict:
        return {path.parent.name: torch.load(path, weights_only=True) for path in (tmp_path / "out").glob("*/model.pt")}

    epochs, save = [], Checkpointer.save

    def stop_in_the_fifth(self, engine):
        save(self, engine)
        epochs.append(engine.state.epoch)
        if epochs == [1, 2, 3, 4]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save", stop_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        experiment()
    with pytest.raises(InputError, match="another steps"):
        experiment(steps=20)
    rows = experiment()
    assert epochs[:5] == [1, 2, 3, 4, 5] and not list((tmp_path / "out").glob("*/checkpoint.pt"))
    resumed = weights()
    shutil.rmtree(tmp_path / "out")
    assert experiment() == rows
    assert_same(weights(), resumed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"real_counts": (4,)}, "3 cases under 'training' and 4"),
        ({"synthetic_counts": (3,)}, "2 cases"),
        ({"steps": 15}, "multiple of 10"),
        ({"seeds": 0}, "seeds is .*0.*; allowed are whole numbers from 1 up"),
        ({"real_counts": ("many",)}, "real.* is .*many.*; allowed are whole numbers from 1 up"),
    ],
)
def test_what_cannot_be_is_refused_before_training(experiment, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        experiment(**options)
    assert not list((tmp_path / "out").glob("*/*"))


def test_cases_without_label_or_file_are_refused(experiment, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz"}]}))
    with pytest.raises(InputError, match="without label"):
        experiment(synthetic=tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}] * 2}))
    with pytest.raises(InputError, match="does not exist"):
        experiment(synthetic=tmp_path / "list.json")


def test_seeds_draw_nested_cases():
    real, synthetic = ([{"image": f"{kind}{i}"} for i in range(9)] for kind in "rs")
    few, more = Arm(3, 2, 1).draw(real, synthetic), Arm(5, 4, 1).draw(real, synthetic)
    assert more[:3] == few[:3] and more[5:7] == few[3:] and len(more) == 9
    assert few != Arm(3, 2, 2).draw(real, synthetic)


def test_comparison_is_paired_by_seed():
    """Three cases, one without the second structure; two seeds. By hand: differences 0.1 and 0.3."""
    first = {"a": {"dice_x": 0.4, "dice_y": 0.2}, "b": {"dice_x": 0.6}}
    second = {"a": {"dice_x": 0.5, "dice_y": 0.1}, "b": {"dice_x": 0.7}}
    figures = {
        Arm(10, 0, 0): first,
        Arm(10, 5, 0): second,
        Arm(10, 0, 1): first,
        Arm(10, 5, 1): {"a": {"dice_x": 0.8, "dice_y": 0.3}, "b": {"dice_x": 0.8}},
    }
    rows = {row["figure"]: row for row in compare_arms(figures)}
    assert rows["dice_x"] == {
        "real": 10,
        "synthetic": 5,
        "figure": "dice_x",
        "dice_real": 0.5,
        "dice_with_synthetic": 0.7,
        "difference": 0.2,
        "difference_sd": round(0.02**0.5, 4),
        "lowest": 0.1,
        "highest": 0.3,
        "relative": 0.4,
        "seeds": 2,
    }
    assert rows["dice_y"]["difference"] == 0.0
