"""When the mask generator draws again, and what it keeps; with a network whose one organ comes out too small."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import RFlowScheduler

from maisi_tools.mask_generator.sampler import MaskSampler
from maisi_tools.mask_generator.sizes import AskedSizes

ORGANS = {"left parotid": {"label": 18, "range": [0, 100]}}
SPACING = (5.0, 5.0, 8.0)
SHAPE = (20, 25, 10)
"""5000 voxels of 0.2 ml."""


class Drawing:
    """One step draws a parotid of `share` of the ml asked for; remembers what it was asked and from which noise."""

    def __init__(self, *shares: float) -> None:
        self.shares, self.asked, self.noises = shares, [], []

    def __call__(self, latent: torch.Tensor, timesteps: torch.Tensor, organ_sizes: torch.Tensor) -> torch.Tensor:
        self.asked.append(organ_sizes[0, 0].item())
        self.noises.append(latent.clone())
        share = self.shares[min(len(self.asked), len(self.shares)) - 1]
        return share * organ_sizes[0, 0] - latent  # the velocity that ends in this value everywhere


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Logits of body and parotid; a latent of 1 is a parotid of 100 ml."""
    parotid = torch.arange(5000.0).reshape(SHAPE) < latent.mean() * 500
    return torch.stack([~parotid, parotid])[None].float()


def draw(network: Drawing, ml: float | None, redraws: int = 3, seed: int = 0) -> float:
    """The parotid's ml in the mask for `ml`."""
    asked = AskedSizes(ORGANS, {} if ml is None else {"left parotid": ml}, SPACING)
    flow = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
    sampler = MaskSampler(decode, flow, 1, asked, [200, 18], redraws=redraws, progress=False)
    noise = torch.randn(1, 4, 5, 5, 4, generator=torch.Generator().manual_seed(seed))
    mask = sampler(MetaTensor(noise, meta={"seed": seed}), network)
    return (mask == 18).sum().item() * 0.2


@pytest.mark.parametrize("ml", [None, 40])
def test_what_is_as_asked_for_is_drawn_once(ml):
    network = Drawing(0.95)
    draw(network, ml)
    assert len(network.asked) == 1


def test_the_second_draw_asks_for_more_of_what_the_first_lacked_from_the_same_noise():
    network = Drawing(0.5, 0.66)
    # 20 ml instead of 40, so 60 are asked for, and two thirds of them come
    assert draw(network, 40) == pytest.approx(0.66 * 60, abs=0.2)
    assert network.asked == pytest.approx([0.4, 0.6], abs=0.01) and torch.equal(*network.noises)


def test_the_third_draw_is_from_another_noise_and_the_nearest_of_all_is_kept():
    network = Drawing(0.5, 0.5, 0.7, 0.2)
    assert draw(network, 40) == pytest.approx(30, abs=0.2)  # of 20, 30, 28 and 10.4 ml
    assert network.asked == pytest.approx([0.4, 0.6, 0.4, 0.52], abs=0.01)
    first, second, third, fourth = network.noises
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(first, third)
    assert third.std().item() == pytest.approx(1, abs=0.2)


def test_draws_again_are_the_same_each_time_and_no_other_seeds():
    runs = [Drawing(0.5) for _ in range(3)]
    for network, seed in zip(runs, (0, 0, 1), strict=True):
        draw(network, 40, redraws=2, seed=seed)
    noises = [network.noises[-1] for network in runs]
    assert len(runs[0].noises) == 3
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0], runs[2].noises[0])
