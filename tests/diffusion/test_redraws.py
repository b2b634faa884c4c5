from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch

from maisi_tools.diffusion.noise import STRIDE
from maisi_tools.diffusion.redraws import CheckedCT, SplitCheckedd
from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import LabelMap, read_label_map
from maisi_tools.metrics.judge import Judge, open_judge, weights_of
from maisi_tools.metrics.segmenters import Segmenter

SKULL, CORD = 120, 121


class Drawn:
    """Stands for a stage that draws, from each seed, a CT whose skull and cord have the HU given for that seed."""

    seed, modality = 5, "ct"

    def __init__(self, hu: dict[int, tuple[float, float]]) -> None:
        self.hu = hu
        self.asked: list[int] = []

    def draws(self, masks, network):
        for mask in masks.split(1):
            yield lambda seed, mask=mask: self._draw(mask, seed)

    def _draw(self, mask, seed):
        self.asked.append(seed)
        skull, cord = self.hu[seed]
        values = torch.where(mask == SKULL, skull, torch.where(mask == CORD, cord, -1000.0))
        return (torch.as_tensor(values) + 1000) / 2000


@pytest.fixture
def mask() -> MetaTensor:
    labels = torch.zeros(1, 1, 10, 10, 10)
    labels[..., :5, :, :], labels[..., 7:, :, :] = SKULL, CORD
    return MetaTensor(labels)


def draw(mask, hu, **settings):
    drawn = Drawn(hu)
    output = CheckedCT(drawn, ranges={"spinal cord": [-50, 100]}, **settings)(mask, None)
    item = decollate_batch({"image": mask, "pred": output})[0]
    return SplitCheckedd("pred")(item), drawn.asked


def test_a_good_draw_is_kept(mask):
    data, asked = draw(mask, {5: (400, 30)}, redraws=3)
    assert asked == [5] and data["draws"] == {"seed": 5, "tried": [{"seed": 5, "implausible": {}}]}
    assert data["pred"].shape == (1, 10, 10, 10) and data["pred"].max().item() == pytest.approx(0.7)


def test_it_is_drawn_again_until_all_is_plausible(mask):
    hu = {5: (0, 300), 5 + STRIDE: (400, 300), 5 + 2 * STRIDE: (400, 30)}
    data, asked = draw(mask, hu, redraws=3)
    assert asked == [5, 5 + STRIDE, 5 + 2 * STRIDE] and data["draws"]["seed"] == asked[-1]
    first = data["draws"]["tried"][0]["implausible"]
    assert first["skull"] == {"median": 0.0, "lowest": 71.0, "highest": 1000.0}
    assert first["spinal cord"]["median"] == pytest.approx(300, abs=0.1)


def test_the_best_draw_is_kept_when_none_is_good(mask):
    hu = {5: (0, 300), 5 + STRIDE: (400, 300), 5 + 2 * STRIDE: (0, 30)}
    data, asked = draw(mask, hu, redraws=2)
    assert len(asked) == 3 and data["draws"]["seed"] == 5 + STRIDE
    assert data["pred"].max().item() == pytest.approx(0.7)


def test_without_redraws_the_check_is_recorded(mask):
    data, asked = draw(mask, {5: (0, 30)})
    assert asked == [5] and list(data["draws"]["tried"][0]["implausible"]) == ["skull"]


def test_each_mask_of_a_batch_has_its_record(mask):
    both = MetaTensor(torch.cat([mask.as_tensor(), torch.zeros_like(mask.as_tensor())]))
    output = CheckedCT(Drawn({5: (0, 30), 5 + STRIDE: (400, 30)}), redraws=1)(both, None)
    items = [SplitCheckedd("pred")(item) for item in decollate_batch({"image": both, "pred": output})]
    assert [len(item["draws"]["tried"]) for item in items] == [2, 1]


def bone_finder(path) -> MetaTensor:
    """Label 4 is denser than 200 HU, which it has read from the file; the affine is the file's."""
    image = nib.load(path)
    return MetaTensor((np.asarray(image.dataobj) > 200)[None] * 4, affine=image.affine)


SEGMENTER = Segmenter("bones", bone_finder, LabelMap("bones", {4: SKULL}))


def test_it_is_drawn_again_until_a_judge_sees_the_organ(mask):
    """Skull at 150 HU is plausible, but no bone to the judge; with the cord at 300 as well, half of what it sees is."""
    mask.affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    hu = {5: (150, 30), 5 + STRIDE: (400, 300), 5 + 2 * STRIDE: (400, 30)}
    everything = {"redraws": 2, "judge": Judge(SEGMENTER, {"skull": 0.9})}
    data, asked = draw(mask, hu, **everything)
    assert asked == [5, 5 + STRIDE, 5 + 2 * STRIDE] and data["draws"]["seed"] == asked[-1]
    found = [(one["dice"], one["not_shown"], list(one["implausible"])) for one in data["draws"]["tried"]]
    assert found == [
        ({"skull": 0.0}, ["skull"], []),
        ({"skull": round(2 * 5 / (5 + 8), 4)}, ["skull"], ["spinal cord"]),  # 5 layers, of 8 that are found
        ({"skull": 1.0}, [], []),
    ]
    data, asked = draw(mask, hu, redraws=2, judge=Judge(SEGMENTER, {"skull": 0.7}))
    assert len(asked) == 3
    hu[5 + STRIDE] = (400, 90)
    assert len(draw(mask, hu, **everything)[1]) == 2


def test_a_judge_is_not_asked_for_organs_that_are_not_there(mask):
    data, asked = draw(
        torch.where(mask == SKULL, 0, mask), {5: (0, 30)}, redraws=1, judge=Judge(SEGMENTER, {"skull": 0.9})
    )
    assert asked == [5] and data["draws"]["tried"][0]["not_shown"] == []


def test_a_limit_for_all_leaves_bones_out_and_knows_placeholders():
    """OpenKBP's mandible reads as skull, of which a mask may have all; its larynx has a placeholder's number."""
    openkbp = Segmenter("judge", bone_finder, read_label_map("openkbp"))
    limits = Judge(openkbp, 0.4).min_dice
    assert SKULL not in limits and limits[CORD] == 0.4 and len(limits) == 6
    assert sorted(Judge(openkbp, {"larynx": 0.3, "skull": 0.2}).min_dice.values()) == [0.2, 0.3]


def test_a_limit_for_all_leaves_out_a_lobe_that_stands_for_all_lung(mask):
    """A judge that is right about every lobe finds the upper left one in a part of it: here in half."""

    def upper_lobe(path):
        image = nib.load(path)
        found = np.where(np.asarray(image.dataobj) < -500, 28, 0)
        found[:, :5] = 0
        return MetaTensor(found[None], affine=image.affine)

    lobes = Segmenter("lobes", upper_lobe, read_label_map("maisi"))
    lung = torch.where(mask == SKULL, 28, 0)[0]
    both = lung.clone()
    both[:, :, :5] = torch.where(both[:, :, :5] == 28, 29, 0)
    hu = np.where(lung[0] > 0, -800, 30)
    assert Judge(lobes)(hu, lung) == {"dice": {}, "not_shown": []}
    assert Judge(lobes)(hu, both)["dice"] == {"left lung upper lobe": 1, "left lung lower lobe": 0}
    assert Judge(lobes, {"left lung upper lobe": 0.9})(hu, lung) == {
        "dice": {"left lung upper lobe": round(2 / 3, 4)},
        "not_shown": ["left lung upper lobe"],
    }


@pytest.mark.parametrize("value", [30.0, float("nan"), 1e9])
def test_a_draw_that_is_no_ct_shows_nothing_and_is_drawn_again(mask, value):
    """Of one value, or none: a segmentation network's reader would refuse it, and end the run."""

    def never(path):
        raise AssertionError("a network was asked")

    judge = Judge(Segmenter("bones", never, LabelMap("bones", {4: SKULL})), {"skull": 0.0001})
    assert judge(np.full(mask.shape[2:], value), mask[0]) == {"dice": {"skull": 0.0}, "not_shown": ["skull"]}

    class Empty(Drawn):
        def _draw(self, mask, seed):
            return torch.full_like(mask, float("nan")) if seed == 5 else super()._draw(mask, seed)

    judge = Judge(SEGMENTER, {"skull": 0.9})
    drawn = Empty({5 + STRIDE: (400, 30)})
    output = CheckedCT(drawn, ranges={"skull": None}, redraws=1, judge=judge)(mask, None)
    record = json.loads(output["draws"][0])
    assert record["seed"] == 5 + STRIDE and record["tried"][0]["not_shown"] == ["skull"]
    assert output["ct"].isfinite().all()


def test_the_weights_of_those_who_judge_are_named(repo_root):
    """Where they are a bundle's; what finds organs otherwise has none."""
    folder = repo_root / "evaluation" / "segmentation"
    judge = open_judge(str(folder), None, None)
    networks = [None, judge, judge.segmenter.segment, Judge(SEGMENTER, {"skull": 0.9})]
    assert weights_of(networks) == [folder / "models" / "model.pt"] * 2


def test_a_seed_that_is_set_is_that_of_the_draw(mask):
    drawn = Drawn({5: (400, 30), 7: (400, 30)})
    checked = CheckedCT(drawn)
    checked.seed = 7
    checked(mask, None)
    assert (checked.seed, drawn.asked) == (7, [7])


@pytest.mark.parametrize(
    ("min_dice", "words"),
    [
        ({"skull": 1.5}, "min_dice is 1.5; allowed is a number from 0 to 1"),
        ({"skull": "high"}, "min_dice is 'high'"),
        ({120: True}, "min_dice is True"),
        (0.5, "bones segments bones alone; name those to look for"),
        ({"liver": 0.5}, "min_dice names liver, which bones does not segment; allowed are skull"),
        ({"livver": 0.5}, "livver"),
    ],
)
def test_limits_that_cannot_be_are_refused(min_dice, words):
    with pytest.raises(InputError, match=words):
        Judge(SEGMENTER, min_dice)


def test_a_judge_is_opened_by_its_name():
    assert open_judge(None, None, None) is None
    with pytest.raises(InputError, match="min_dice is 0.5, but there is no judge"):
        open_judge(None, None, 0.5)
    with pytest.raises(InputError, match="judge_label_map is 'maisi', but there is no judge"):
        open_judge(None, "maisi", None)
    with pytest.raises(InputError, match="thresholds finds no organs"):
        open_judge("thresholds", None, 0.5)
    with pytest.raises(InputError, match="nowhere"):
        open_judge("nowhere", None, 0.5)


@pytest.mark.parametrize("redraws", [-1, 1.5, True, "2"])
def test_wrong_redraws_are_refused(redraws):
    with pytest.raises(InputError, match="redraws"):
        CheckedCT(Drawn({}), redraws=redraws)


def test_a_plain_ct_passes(mask):
    assert torch.equal(SplitCheckedd("pred")({"pred": mask})["pred"], mask)


def test_an_mr_has_no_hu_to_be_judged_by(mask):
    drawn = Drawn({5: (0.0, 0.0)})
    drawn.modality = "mri_t1"
    record = CheckedCT(drawn, ranges={"spinal cord": [-50, 100], "skull": [300, 900]})(mask, None)["draws"][0]
    assert json.loads(record) == {"seed": 5, "tried": [{"seed": 5, "implausible": {}}]}
    with pytest.raises(InputError, match="a judge works in HU: allowed is CT"):
        CheckedCT(drawn, judge=lambda hu, mask: {})
