from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.losses import DiceCELoss
from monai.transforms import Compose

from maisi_tools.bundles.scripts import bundle_script
from maisi_tools.errors import InputError, find_input_error

ROOT = Path(__file__).resolve().parents[2] / "evaluation" / "segmentation"
SCRIPT = bundle_script(ROOT, "partial_labels")


@pytest.fixture
def logits():
    return torch.randn(2, 4, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def label():
    return torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(1))


def test_where_all_is_labelled_it_is_the_plain_loss(logits, label):
    plain = DiceCELoss(to_onehot_y=True, softmax=True)(logits, label)
    loss = SCRIPT.MarginalDiceCELoss()(logits, (label, torch.ones(2, 4, dtype=torch.bool)))
    torch.testing.assert_close(loss, plain)


def test_unlabelled_classes_count_as_background(logits, label):
    """Against cross entropy and Dice by hand, on probabilities of which class 2 is added to the background."""
    label[label == 2] = 0
    labelled = torch.tensor([[True, True, False, True]] * 2)
    chance = np.exp(logits.numpy())
    chance /= chance.sum(axis=1, keepdims=True)
    chance[:, 0] += chance[:, 2]
    chance[:, 2] = 0
    onehot = np.stack([label[:, 0].numpy() == k for k in range(4)], axis=1).astype(float)
    entropy = -np.log((chance * onehot).sum(axis=1)).mean()
    axes = (2, 3, 4)
    overlap, sizes = (chance * onehot).sum(axes), chance.sum(axes) + onehot.sum(axes)
    dice = (1 - (2 * overlap + 1e-5) / (sizes + 1e-5)).mean()
    loss = SCRIPT.MarginalDiceCELoss()(logits, (label, labelled))
    assert loss.item() == pytest.approx(entropy + dice, rel=1e-9)


def test_finding_an_unlabelled_structure_costs_nothing(label):
    """Logits that call background voxels class 2 are as good as those that call them background."""
    label[label == 2] = 0
    labelled = torch.tensor([[True, True, False, True]] * 2)
    right = 20.0 * torch.nn.functional.one_hot(label[:, 0], 4).movedim(-1, 1)
    found = right.clone()
    found[:, 2], found[:, 0] = right[:, 0], right[:, 2]
    found.requires_grad_()
    loss = SCRIPT.MarginalDiceCELoss()
    assert loss(found, (label, labelled)).item() == pytest.approx(loss(right, (label, labelled)).item(), abs=1e-6)
    assert loss(found, (label, torch.ones_like(labelled))).item() > 1
    loss(found, (label, labelled)).backward()
    assert found.grad is not None and found.grad.isfinite().all()


def test_labelled_classes_are_those_of_the_whole_case():
    label = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    label[0, 0, 0, 0], label[0, 3, 3, 3] = 3, 1
    case = SCRIPT.LabelledClassesd("label", 5)({"label": label, "image": label.float()})
    assert case["labelled"].tolist() == [True, True, False, True, False]
    image, (labels, labelled) = SCRIPT.partial_batch({name: value[None] for name, value in case.items()}, "cpu")
    assert image.shape == labels.shape == (1, 1, 4, 4, 4) and labelled.shape == (1, 5)


@pytest.mark.parametrize(
    ("moved_mm", "label", "words"),
    [
        (0, 7, None),
        (80, 7, r"seg\.nii\.gz lies on another grid than .*ct\.nii\.gz .*origin"),
        (0, 9, r"seg\.nii\.gz has the labels \[9\]; allowed are 0 to 7"),
        (0, 257, r"seg\.nii\.gz has the labels \[257\]; allowed are 0 to 7"),  # which as uint8 is 1
    ],
)
def test_cases_are_checked_as_they_are_read(tmp_path, moved_mm, label, words):
    """The CT and its labels may be stored in different orientations."""
    spacing = (3.9, 3.9, 2.5)
    affine, turned = np.diag([*spacing, 1.0]), np.diag([-spacing[0], *spacing[1:], 1.0])
    turned[0, 3] = 7 * spacing[0]
    affine[2, 3] = turned[2, 3] = 10
    turned[2, 3] += moved_mm
    hu, labels = np.full((8, 8, 8), -1000, np.int16), np.zeros((8, 8, 8), np.int16)
    hu[2:6, 2:6, 2:6], labels[2, 3, 4] = 40, label
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    nib.save(nib.Nifti1Image(labels[::-1], turned), tmp_path / "seg.nii.gz")
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "train.json"))
    parser["bundle_root"] = str(ROOT)
    load = parser.get_parsed_content("load")
    item = {"image": str(tmp_path / "ct.nii.gz"), "label": str(tmp_path / "seg.nii.gz")}
    if words is None:
        assert torch.nonzero(Compose(load)(item)["label"]).tolist() == [[0, 2, 3, 4]]
        return
    with pytest.raises(RuntimeError) as raised:
        Compose(load)(item)
    assert re.search(words, str(find_input_error(raised.value)))


def test_a_bundles_script_is_found_from_anywhere_and_loaded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    assert bundle_script("segmentation", "partial_labels") is SCRIPT
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "partial_labels.py").write_text("NAME = 'another bundle'")
    assert bundle_script(tmp_path, "partial_labels").NAME == "another bundle"
    with pytest.raises(InputError, match="no_such.py does not exist"):
        bundle_script(ROOT, "no_such")
