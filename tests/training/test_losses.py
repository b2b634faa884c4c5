"""The losses against sums written out in numpy and against torch.distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from maisi_tools.errors import InputError
from maisi_tools.training.diffusion import Target
from maisi_tools.training.losses import AutoencoderLoss, RegionContrastiveLoss, SizeVelocityLoss, WeightedVelocityLoss


@pytest.mark.parametrize("kl_weight", [0.0, 1e-7, 0.5])
def test_autoencoder_loss_is_l1_plus_kl_summed_over_a_latent(kl_weight):
    image, reconstruction = torch.rand(3, 1, 8, 4, 4), torch.rand(3, 1, 8, 4, 4)
    mean, sigma = torch.randn(3, 4, 2, 1, 1), torch.rand(3, 4, 2, 1, 1) + 0.1
    loss = AutoencoderLoss(kl_weight)((reconstruction, mean, sigma), image)
    kl = kl_divergence(Normal(mean.double(), sigma.double()), Normal(0.0, 1.0)).sum() / 3
    l1 = np.abs(image.numpy().astype(float) - reconstruction.numpy()).mean()
    assert loss.item() == pytest.approx(l1 + kl_weight * kl.item(), rel=1e-5)


def test_kl_in_closed_form():
    """N(1, 1) is 1/2 nat from N(0, 1), in each of the 4 x 2 x 2 x 2 elements, whatever the batch."""
    image = torch.rand(2, 1, 8, 8, 8)
    ones = torch.ones(2, 4, 2, 2, 2)
    assert AutoencoderLoss(1.0)((image, ones, ones), image).item() == pytest.approx(16)
    assert AutoencoderLoss(1.0)((image, 0 * ones, ones), image).item() == 0


def test_collapsed_posterior_gives_a_finite_gradient():
    mean, sigma = torch.zeros(1, 4, 2, 2, 2, requires_grad=True), torch.zeros(1, 4, 2, 2, 2, requires_grad=True)
    image = torch.zeros(1, 1, 8, 8, 8)
    AutoencoderLoss(1e-7)((image, mean, sigma), image).backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(sigma.grad).all()


def test_half_precision_is_summed_in_single():
    """A KL of 4 * 32^3 * 450 overflows float16 and is far off in bfloat16's sums."""
    image, mean = torch.zeros(1, 1, 4, 4, 4), torch.full((1, 4, 32, 32, 32), 30.0)
    for dtype in (torch.float16, torch.bfloat16):
        prediction = tuple(part.to(dtype) for part in (image, mean, torch.ones_like(mean)))
        assert AutoencoderLoss(1.0)(prediction, image).item() == pytest.approx(4 * 32**3 * 450, rel=1e-5)


class Judge:
    """An adversary that says a number."""

    def __init__(self, active):
        self.active = active

    def generator_loss(self, reconstruction):
        return (reconstruction**2).sum()


@pytest.mark.parametrize("active", [False, True])
def test_all_terms_are_weighted_and_reported_by_name(active):
    image, reconstruction, mean = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8), torch.randn(1, 4, 2, 2, 2)
    loss = AutoencoderLoss(
        1e-3, perceptual=torch.nn.MSELoss(), perceptual_weight=0.3, adversary=Judge(active), adversarial_weight=0.1
    )
    total = loss((reconstruction, mean, torch.ones_like(mean)), image).item()
    x, y = image.double().numpy(), reconstruction.double().numpy()
    expected = {"l1": np.abs(x - y).mean(), "kl": 0.5 * (mean.double() ** 2).sum().item()}
    expected["perceptual"] = ((x - y) ** 2).mean()
    weights = {"l1": 1, "kl": 1e-3, "perceptual": 0.3, "adversarial": 0.1}
    if active:
        expected["adversarial"] = (y**2).sum()
    assert total == pytest.approx(sum(weights[name] * value for name, value in expected.items()), rel=1e-5)
    expected["scale_factor"] = 1 / mean.double().numpy().std(ddof=1)
    assert {name: value.item() for name, value in loss.terms.items()} == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_zero_does_not_ask():
    image, mean = torch.rand(1, 1, 8, 8, 8), torch.randn(1, 4, 2, 2, 2)
    loss = AutoencoderLoss(1e-7, perceptual=None, perceptual_weight=0.0, adversary=Judge(True), adversarial_weight=0.0)
    loss((image, mean, torch.ones_like(mean)), image)
    assert loss.terms.keys() == {"l1", "kl", "scale_factor"}


def test_l1_by_ranges_of_intensity():
    """Each image by hand: weight 6 up to 0.3, 3 from 0.25 up to 0.28 (the later range counts), 1 above."""
    image = torch.tensor([[0.0, 0.26, 0.3, 0.9], [0.5, 0.6, 0.7, 0.8]]).reshape(2, 1, 1, 1, 4)
    reconstruction = image + torch.tensor([0.1, -0.2, 0.3, 0.4])
    zeros = torch.zeros(2, 4, 1, 1, 1)
    loss = AutoencoderLoss(0.0, intensity_weights=[[0.0, 0.3, 6.0], [0.25, 0.28, 3.0]])
    first = (6 * 0.1 + 3 * 0.2 + 6 * 0.3 + 0.4) / (6 + 3 + 6 + 1)
    assert loss((reconstruction, zeros, zeros), image).item() == pytest.approx((first + 0.25) / 2, rel=1e-5)


@pytest.mark.parametrize("ranges", [[[0.0, 0.3]], [[0.3, 0.0, 2.0]], [[0.0, 0.3, 0.0]], [["0", 0.3, 2.0]], 6.0])
def test_wrong_ranges_are_refused(ranges):
    with pytest.raises(InputError, match="intensity_weights"):
        AutoencoderLoss(0.0, intensity_weights=ranges)


def test_velocity_loss_weights_voxels():
    prediction, target = torch.randn(2, 4, 3, 2, 5), torch.randn(2, 4, 3, 2, 5)
    weight = torch.rand(2, 1, 3, 2, 5) * 100
    expected = (np.abs(prediction.numpy().astype(float) - target.numpy()) * weight.numpy()).mean()
    assert WeightedVelocityLoss()(prediction, Target(target, weight)).item() == pytest.approx(expected, rel=1e-5)


def test_velocity_loss_without_weights_is_l1():
    prediction, target = torch.randn(2, 4, 3, 2, 5).bfloat16(), torch.randn(2, 4, 3, 2, 5)
    expected = torch.nn.functional.l1_loss(prediction.float(), target)
    for wanted in (target, Target(target, torch.ones(2, 1, 3, 2, 5))):
        loss = WeightedVelocityLoss()(prediction, wanted)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)


def test_what_would_be_broadcast_is_refused():
    """The doubled batch of a contrast against its one target, and a VAE's output of another size."""
    doubled, value = torch.randn(2, 4, 3, 2, 5), torch.randn(1, 4, 3, 2, 5)
    target = Target(value, torch.ones(1, 1, 3, 2, 5), torch.ones(1, 1, 3, 2, 5))
    size = SizeVelocityLoss(torch.ones(1, 4, 3, 2, 5), 1.0)
    for loss, wanted in ((WeightedVelocityLoss(2), target), (size, target), (RegionContrastiveLoss(0.01, 2), value)):
        with pytest.raises(InputError, match=r"\(2, 4, 3, 2, 5\), its target \(1, 4, 3, 2, 5\); .*contrast_labels"):
            loss(doubled, wanted)
    RegionContrastiveLoss(0.01, 2)(doubled, target)
    image = torch.rand(2, 1, 2, 2, 4)
    with pytest.raises(InputError, match="the prediction has the shape"):
        AutoencoderLoss(1e-7)((image[:1], doubled, doubled.exp()), image)


@pytest.mark.parametrize(("inside", "expected"), [(0.5, 0.25 - 0.5), (3.0, 0.25 - 2.0)])
def test_contrast_by_hand(inside, expected):
    """Sample 0 differs by `inside` in one voxel, by 9 next to it, by 0.25 further out; sample 1 has no region."""
    value = torch.zeros(2, 4, 1, 1, 6)
    region = torch.zeros(2, 1, 1, 1, 6)
    region[0, 0, 0, 0, 0] = 1
    other = value.clone()
    other[0] = torch.tensor([inside, 9, 0.25, -0.25, 0.25, -0.25])
    prediction = torch.cat([value, other]).requires_grad_()
    loss = RegionContrastiveLoss(contrast_weight=0.01, limit=2)
    target = Target(value + 1, torch.ones(2, 1, 1, 1, 1), region)
    result = loss(prediction, target)
    assert loss.terms["l1"].item() == 1 and loss.terms["contrast"].item() == pytest.approx(expected / 2)
    assert result.item() == pytest.approx(1 + 0.01 * expected / 2)
    result.backward()
    gradient = prediction.grad[2, 0, 0, 0]  # of the sample whose label was replaced
    assert (gradient[0] < 0) == (inside < 2) and gradient[1] == 0 and gradient[2] > 0


def test_contrast_without_a_region_is_the_l1():
    prediction, target = torch.randn(2, 4, 1, 2, 3), torch.randn(2, 4, 1, 2, 3)
    loss = RegionContrastiveLoss(contrast_weight=0.01, limit=2)
    assert loss(prediction, target) == torch.nn.functional.l1_loss(prediction, target)
    assert loss.terms["contrast"] == 0


def test_the_squared_term_and_a_mean_of_the_kl():
    """By hand, weights as for L1; the KL per value does not grow with the image."""
    image = torch.tensor([0.0, 0.26, 0.5, 0.9]).reshape(1, 1, 1, 1, 4)
    error = torch.tensor([0.1, -0.2, 0.3, 0.4])
    mean, sigma = torch.randn(1, 4, 1, 1, 2), torch.rand(1, 4, 1, 1, 2) + 0.1
    loss = AutoencoderLoss(0.5, intensity_weights=[[0.0, 0.05, 0.1]], l1_weight=2.0, mse_weight=8.0, kl_per_value=True)
    l1 = (0.1 * 0.1 + 0.2 + 0.3 + 0.4) / 3.1
    mse = (0.1 * 0.01 + 0.04 + 0.09 + 0.16) / 3.1
    kl = kl_divergence(Normal(mean.double(), sigma.double()), Normal(0.0, 1.0)).mean().item()
    value = loss((image + error, mean, sigma), image).item()
    assert value == pytest.approx(2 * l1 + 8 * mse + 0.5 * kl, rel=1e-5)
    assert loss.terms["mse"].item() == pytest.approx(mse, rel=1e-5)
    wide = loss((image + error, mean.repeat(1, 1, 1, 9, 1), sigma.repeat(1, 1, 1, 9, 1)), image).item()
    assert wide == pytest.approx(value, rel=1e-5)
