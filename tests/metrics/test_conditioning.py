from __future__ import annotations

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor

from maisi_tools.datasets.complete import complete_masks
from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import labels_in_group
from maisi_tools.metrics.conditioning import (
    check_cases,
    check_structures,
    conditioning_table,
    pair_masks,
    score_generated,
    tissue_dice,
)
from maisi_tools.volumes.reading import read_volume

SIZE, SPACING = (48, 48, 40), (5.0, 5.0, 4.0)
HU = {"bone": 600, "airway": -990, "lung": -800}


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return make_phantom("head_neck", size=SIZE, spacing=SPACING, seed=3)


def paint(mask: np.ndarray) -> np.ndarray:
    """A CT in which every tissue has its HU."""
    hu = np.where(mask > 0, 40, -1000).astype(np.int16)
    for group, value in HU.items():
        hu[np.isin(mask, labels_in_group(group))] = value
    return hu


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1.0])), path)
    return path


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_tissues_of_a_ct_that_follows_its_mask(mask):
    found = tissue_dice(paint(mask), mask, SPACING)
    assert found.keys() >= {"bone", "airway", "body"}
    assert found["bone"] > 0.97 and found["body"] > 0.97 and found["airway"] > 0.8


def test_tissue_that_is_missing_or_moved(mask):
    soft = paint(np.where(np.isin(mask, labels_in_group("bone")), 200, mask))
    assert tissue_dice(soft, mask, SPACING)["bone"] == 0
    moved = np.roll(paint(mask), 2, axis=0)
    found = tissue_dice(moved, mask, SPACING)
    # No part of bone is small enough to be left out: the independent computation is a threshold and a formula.
    bone, wanted = moved > 250, np.isin(mask, labels_in_group("bone"))
    organs = np.isin(mask, [0, 200, *(n for group in HU for n in labels_in_group(group))])
    bone &= organs
    expected = 2 * np.count_nonzero(bone & wanted) / (bone.sum() + wanted.sum())
    assert found["bone"] == pytest.approx(expected, abs=0.03) and found["bone"] < 0.9


def test_organs_of_the_mask_are_no_body_of_the_ct(mask):
    """A CT of air has none, and one beside its mask as much of it as lies there; by a threshold of its own."""
    assert tissue_dice(np.full(SIZE, -1000), mask, SPACING)["body"] == 0
    moved = np.roll(paint(mask), 8, axis=0)
    there = np.roll(mask > 0, 8, axis=0)
    expected = 2 * np.count_nonzero(there & (mask > 0)) / (2 * np.count_nonzero(there))
    assert tissue_dice(moved, mask, SPACING)["body"] == pytest.approx(expected, abs=0.02) and expected < 0.8


def test_tissue_that_the_mask_lacks_is_left_out(mask):
    assert "lung" not in tissue_dice(paint(mask), np.where(np.isin(mask, labels_in_group("lung")), 200, mask), SPACING)


# --- the table --------------------------------------------------------------------------------------------------------


def test_groups_by_size_and_ratio_of_means():
    cases = [
        {
            "generated": {"cord": 0.6, "esophagus": 0.2, "bone": 0.9},
            "real": {"cord": 0.8, "esophagus": 0.5, "bone": 0.95},
            "ml": {"cord": 25.0, "esophagus": 8.0, "bone": np.inf},
        },
        {"generated": {"cord": 0.4}, "real": {"cord": 0.7}, "ml": {"cord": 12.0}},
    ]
    rows = {row["structure"]: row for row in conditioning_table(cases)}
    assert rows["cord"] == {
        "structure": "cord",
        "ml": 18.5,
        "cases": 2,
        "generated": 0.5,
        "real": 0.75,
        "ratio": pytest.approx(2 / 3, abs=1e-4),
    }
    assert rows["small structures (< 20 ml)"]["generated"] == pytest.approx((0.2 + 0.4) / 2)
    assert rows["small structures (< 20 ml)"]["ratio"] == pytest.approx(0.6 / 1.2)
    assert rows["large structures (>= 20 ml)"]["cases"] == 1
    assert rows["all structures"]["generated"] == pytest.approx(0.4)  # bone, found by threshold, is in no group
    assert rows["bone"]["ml"] == ""


def test_without_real_cts_there_is_no_ratio():
    rows = conditioning_table([{"generated": {"cord": 0.5}, "ml": {"cord": 25.0}}])
    assert rows[0]["generated"] == 0.5 and rows[0]["real"] == "" and rows[0]["ratio"] == ""
    assert (
        conditioning_table([{"generated": {"cord": 0.5}, "real": {"cord": 0.0}, "ml": {"cord": 25.0}}])[0]["ratio"]
        == ""
    )


# --- a folder of generated CTs ----------------------------------------------------------------------------------------


class Threshold:
    """A segmentation network for which bone is class 1 and airway is class 2."""

    classes = {"bones": 1, "air": 2}

    def __call__(self, path):
        ct = read_volume(path, "ct")
        return MetaTensor((ct > 300).float() + 2 * (ct < -900), affine=ct.affine)


@pytest.fixture
def run(tmp_path, mask):
    """Items and the output folder of one case; the generated CT has half of the bone."""
    half = paint(mask)
    half[: SIZE[0] // 2][half[: SIZE[0] // 2] > 300] = 40
    out = tmp_path / "out"
    save(out / "p_ct_mask_ct.nii.gz", half)
    save(out / "p_ct_mask_mask.nii.gz", mask)
    (out / "p_ct_mask_ct.json").write_text(json.dumps({"metrics": {"hu_bone": 300.0}, "seed": 4}))
    label = np.isin(mask, labels_in_group("bone")).astype(np.uint8)
    case = {
        "image": str(save(tmp_path / "p_ct.nii.gz", paint(mask))),
        "label": str(save(tmp_path / "p_seg.nii.gz", label)),
    }
    save(tmp_path / "masks" / "p_ct_mask.nii.gz", mask)
    return pair_masks([case], tmp_path / "masks"), out, label.astype(bool), half


def test_scores_of_a_folder(run):
    items, out, label, half = run
    rows = {row["structure"]: row for row in score_generated(items, out, Threshold())}
    bone = half > 300
    expected = 2 * np.count_nonzero(bone & label) / (bone.sum() + label.sum())
    assert rows["bones"]["generated"] == pytest.approx(expected, abs=1e-4)
    assert rows["bones"]["real"] == 1 and rows["bones"]["ratio"] == pytest.approx(expected, abs=1e-4)
    assert rows["bones"]["ml"] == pytest.approx(label.sum() * 0.1, abs=0.06)  # 5 x 5 x 4 mm
    assert rows["bone"]["generated"] < 0.8 < rows["bone"]["real"]
    assert "air" not in rows  # the reference has none
    with open(out / "conditioning.csv") as file:
        assert [row["structure"] for row in csv.DictReader(file)] == list(rows)
    sidecar = json.loads((out / "p_ct_mask_ct.json").read_text())
    assert sidecar["seed"] == 4 and sidecar["metrics"]["hu_bone"] == 300
    assert sidecar["metrics"]["dice_bones"] == pytest.approx(expected, abs=1e-4)
    assert sidecar["metrics"]["real_dice_bones"] == 1


def test_a_class_called_as_a_tissue_has_a_row_of_its_own(run, tmp_path, mask):
    """In all cases: a second one, whose reference has no bone, has the threshold's Dice of it alone."""
    items, out, _, half = run
    for suffix, array in (("ct", half), ("mask", mask)):
        save(out / f"q_ct_mask_{suffix}.nii.gz", array)
    (out / "q_ct_mask_ct.json").write_text("{}")
    second = {"image": str(save(tmp_path / "masks" / "q_ct_mask.nii.gz", mask)), "ct": items[0]["ct"]}
    second["label"] = str(save(tmp_path / "q_seg.nii.gz", np.zeros_like(mask)))
    both = [*items, second]

    class Named(Threshold):
        classes = {"bone": 1, "air": 2}

    def rows(segmenter=None):
        return {row.pop("structure"): row for row in score_generated(both, out, segmenter)}

    alone, other, named = rows(), rows(Threshold()), rows(Named())
    assert named["bone"] == other["bones"] and named["bone"]["cases"] == 1
    assert named["bone by threshold"] == alone["bone"] and alone["bone"]["cases"] == 2
    assert named["bone"]["generated"] != alone["bone"]["generated"]
    assert named["all structures"] == other["all structures"]
    assert list(other) == [*alone, *(name for name in other if name not in alone)]  # no collision, the usual names
    metrics = json.loads((out / "p_ct_mask_ct.json").read_text())["metrics"]
    assert metrics["dice_bone"] == named["bone"]["generated"]
    assert metrics["real_dice_bone_by_threshold"] == alone["bone"]["real"]


def test_the_mask_itself_is_the_reference_without_labels(run, mask):
    items, out, _, half = run
    bare = [{"image": items[0]["image"]}]
    rows = {row["structure"]: row for row in score_generated(bare, out, Threshold(), {"bones": 120})}
    skull = mask == 120
    expected = 2 * np.count_nonzero((half > 300) & skull) / (np.count_nonzero(half > 300) + skull.sum())
    assert rows["bones"]["generated"] == pytest.approx(expected, abs=1e-4) and rows["bones"]["real"] == ""


def test_a_mask_on_another_grid_than_the_real_ct(run, mask):
    """As `maisi complete_masks --spacing` makes them: the labels follow the generated CT."""
    items, out, label, half = run
    affine = np.diag([2 * SPACING[0], SPACING[1], SPACING[2], 1.0])
    for array, suffix in ((half, "ct"), (mask, "mask")):
        nib.save(nib.Nifti1Image(array[::2], affine), out / f"p_ct_mask_{suffix}.nii.gz")
    rows = {row["structure"]: row for row in score_generated(items, out, Threshold())}
    bone, wanted = half[::2] > 300, label[::2]
    expected = 2 * np.count_nonzero(bone & wanted) / (bone.sum() + wanted.sum())
    assert rows["bones"]["generated"] == pytest.approx(expected, abs=1e-4) and rows["bones"]["real"] == 1
    assert rows["body"]["real"] > 0.9


def test_nothing_is_labelled_where_the_real_ct_and_its_labels_do_not_reach(run, mask):
    """A mask on a larger field of view, as `--output_size` makes it: air around both, not their border drawn out."""
    items, out, label, half = run
    affine = np.diag([*SPACING, 1.0])
    affine[2, 3] = -10 * SPACING[2]
    for array, suffix, outside in ((half, "ct", -1000), (mask, "mask", 0)):
        padded = np.pad(array, ((0, 0), (0, 0), (10, 10)), constant_values=outside)
        nib.save(nib.Nifti1Image(padded, affine), out / f"p_ct_mask_{suffix}.nii.gz")
    rows = {row["structure"]: row for row in score_generated(items, out, Threshold())}
    assert label[:, :, -1].any() or label[:, :, 0].any()  # the border would grow
    bone = half > 300
    expected = 2 * np.count_nonzero(bone & label) / (bone.sum() + label.sum())
    assert rows["bones"]["generated"] == pytest.approx(expected, abs=1e-4) and rows["bones"]["real"] == 1
    assert rows["body"]["real"] > 0.97


def test_a_mask_without_labels_is_read_by_the_names_of_the_classes(run, mask):
    """Class 2 is no id 2: a network that finds the cord and the brainstem is right about both."""
    items, out, *_ = run

    class Perfect:
        classes = {"brainstem": 1, "spinal_cord": 2, "something else": 3}

        def __call__(self, path):
            ct = read_volume(path, "ct")
            return MetaTensor(np.where(mask == 2, 1, np.where(mask == 121, 2, 0))[None], affine=ct.affine)

    assert (mask == 2).any() and (mask == 121).any()
    bare = [{"image": items[0]["image"]}]
    rows = {row["structure"]: row for row in score_generated(bare, out, Perfect())}
    assert rows["brainstem"]["generated"] == rows["spinal_cord"]["generated"] == 1 and "something else" not in rows
    with pytest.raises(InputError, match="the segmentation network has the classes bones, air, and the vocabulary"):
        check_structures(bare, Threshold.classes)
    with pytest.raises(InputError, match="structures is one numbering, and 1 of 2 cases have labels"):
        check_structures([*items, *bare], Perfect.classes, {"brainstem": 1})
    check_structures([*items, *bare], Perfect.classes)


def test_what_a_mask_may_have_more_of_is_not_compared_with_it(run, mask, caplog):
    """A completed mask has all bone as skull, and all lung as one lobe: of a network that is right about a part of
    either the Dice would be low. With structures, or with labels, it is compared."""
    items, out, *_ = run
    cord, part = mask == 121, mask == 120
    part[: SIZE[0] // 2] = False

    class Right:
        classes = {"spinal cord": 1, "mandible": 2, "left lung upper lobe": 3, "uterus": 4}

        def __call__(self, path):
            ct = read_volume(path, "ct")
            return MetaTensor(np.where(cord, 1, np.where(part, 2, 0))[None], affine=ct.affine)

    lung = np.isin(mask, labels_in_group("lung"))
    assert cord.any() and part.any() and lung.any()
    save(out / "p_ct_mask_mask.nii.gz", np.where(lung, 28, mask))
    bare = [{"image": items[0]["image"]}]
    rows = {row["structure"]: row for row in score_generated(bare, out, Right())}
    assert rows["spinal cord"]["generated"] == rows["all structures"]["generated"] == 1
    assert not {"mandible", "left lung upper lobe"} & rows.keys()
    assert "left lung upper lobe, mandible, uterus; they have no name of the vocabulary, or a mask" in caplog.text
    rows = {row["structure"]: row for row in score_generated(bare, out, Right(), {"mandible": 120})}
    expected = 2 * part.sum() / (part.sum() + (mask == 120).sum())
    assert rows["mandible"]["generated"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="has the classes mandible, all bones.*give structures"):
        check_structures(bare, {"mandible": 5})
    check_structures(bare, {"mandible": 5}, {"mandible": 120})
    check_structures(items, {"mandible": 5})


def test_a_bundle_need_not_undo_its_resampling(run):
    """Labels of twice the voxels along each axis, turned, say the same of every voxel of the CT."""
    items, out, label, half = run

    class Resampled(Threshold):
        def __call__(self, path):
            found = super().__call__(path)
            fine = np.repeat(np.repeat(np.asarray(found), 2, axis=1), 2, axis=2)[:, ::-1].copy()
            affine = np.diag([-SPACING[0] / 2, SPACING[1] / 2, SPACING[2], 1.0])
            affine[:2, 3] = (fine.shape[1] - 1.5) * SPACING[0] / 2, -SPACING[1] / 4
            return MetaTensor(fine, affine=affine)

    plain, resampled = (score_generated(items, out, network()) for network in (Threshold, Resampled))
    assert resampled == plain


def test_thresholds_alone(run):
    items, out, *_ = run
    rows = {row["structure"] for row in score_generated(items, out)}
    assert "bone" in rows and "bones" not in rows and "all structures" not in rows


def test_a_mask_of_a_ct_that_was_replaced_is_refused(tmp_path, mask):
    case, masks = {"image": str(save(tmp_path / "p_ct.nii.gz", paint(mask)))}, tmp_path / "masks"
    complete_masks([case], masks, "maisi")
    (item,) = pair_masks([case], masks)
    assert item == {"image": str(masks / "p_ct_mask.nii.gz"), "ct": case["image"]}
    (tmp_path / "moved").mkdir()
    moved = {"image": str(shutil.move(case["image"], tmp_path / "moved"))}
    assert len(pair_masks([moved], masks)) == len(pair_masks([case], masks)) == 1  # without a CT the door refuses
    save(tmp_path / "moved" / "p_ct.nii.gz", np.roll(paint(mask), 6, axis=0))
    with pytest.raises(InputError, match=r"1 masks .*p_ct_mask\.nii\.gz; .*run `maisi complete_masks` again"):
        pair_masks([moved], masks)
    (masks / "p_ct_mask.json").unlink()  # a user's own mask does not say
    assert len(pair_masks([moved], masks)) == 1


def test_what_is_refused(run, tmp_path):
    items, out, *_ = run
    (out / "conditioning.csv").write_text("structure,dice\n")
    with pytest.raises(InputError, match=r"conditioning\.csv would be written over, and no evaluation wrote it"):
        score_generated(items, out)
    (out / "conditioning.csv").unlink()
    check_cases(items, Threshold())
    check_cases([{"image": items[0]["image"]}])
    for check in (check_cases, lambda items, *given: score_generated(items, out, *given)):
        with pytest.raises(InputError, match="structures liver are no classes of the segmentation network"):
            check(items, Threshold(), {"liver": 1})
    with pytest.raises(InputError, match="maisi complete_masks"):
        pair_masks([{"image": str(tmp_path / "q_ct.nii.gz")}], tmp_path / "masks")
    save(tmp_path / "p_ct.nii.gz", paint(make_phantom("head_neck", size=(48, 48, 32), spacing=SPACING)))
    with pytest.raises(InputError, match="another grid"):
        score_generated(items, out, Threshold())
    with pytest.raises(InputError, match="p_seg.nii.gz lies on another grid than .*p_ct.nii.gz"):
        check_cases(items)
    (out / "p_ct_mask_ct.nii.gz").unlink()
    with pytest.raises(InputError, match="p_ct_mask_ct.nii.gz does not exist"):
        score_generated(items, out)
