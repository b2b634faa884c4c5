from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor, decollate_batch

from maisi_tools.diffusion.noise import STRIDE
from maisi_tools.diffusion.redraws import CheckedCT, SplitCheckedd
from maisi_tools.errors import InputError

SKULL, CORD = 120, 121


class Drawn:
    """Stands for a stage that draws, from each seed, a CT whose skull and cord have the HU given for that seed."""

    seed = 5

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


@pytest.mark.parametrize("redraws", [-1, 1.5, True, "2"])
def test_wrong_redraws_are_refused(redraws):
    with pytest.raises(InputError, match="redraws"):
        CheckedCT(Drawn({}), redraws=redraws)


def test_a_plain_ct_passes(mask):
    assert torch.equal(SplitCheckedd("pred")({"pred": mask})["pred"], mask)
