"""The Gaussian of mask latents and organ sizes, against the textbook's formulas on small arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.prior import ShapePrior, stacked
from maisi_tools.mask_generator.sizes import UNKNOWN

SHAPE = (2, 3, 2, 2)


def samples_of(count: int, seed: int = 0) -> list[dict]:
    """Latents with two ways to vary; the first size is the first of them, the second size the sum of both."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.linalg.qr(torch.randn(24, 2, generator=torch.Generator().manual_seed(9)))[0].T * torch.tensor(
        [[6.0], [4.0]]
    )
    drawn = torch.randn(count, 2, generator=generator)
    latents = 1 + drawn @ ways + 0.05 * torch.randn(count, 24, generator=generator)
    sizes = 0.5 + 0.1 * torch.stack([drawn[:, 0], drawn.sum(1)], 1)
    return [{"latent": z.reshape(SHAPE), "organ_sizes": s} for z, s in zip(latents, sizes, strict=True)]


@pytest.fixture(scope="module")
def prior() -> ShapePrior:
    prior = ShapePrior(2, 2, SHAPE[1:], 2)
    prior.fit(samples_of(400), 1.0)
    return prior


def test_components_are_those_of_the_data(prior):
    latents = torch.stack([one["latent"] for one in samples_of(400)]).flatten(1).double().numpy()
    values = np.linalg.svd(latents - latents.mean(0), compute_uv=False)[:2] ** 2 / 400
    assert prior.directions.flatten(1).square().sum(1).numpy() == pytest.approx(values, rel=1e-4)
    assert np.allclose(prior.mean.flatten(), latents.mean(0), atol=1e-5)


def test_the_mean_under_the_noise_is_that_of_the_gaussian(prior):
    """Of a joint Gaussian of latent, noisy latent and sizes, conditioned as textbooks do, with the full covariance."""
    d = prior.directions.flatten(1).double().numpy()
    b, r = prior.size_slopes.double().numpy(), np.diag(prior.size_noise.double().numpy())
    mean, middle = prior.mean.flatten().double().numpy(), prior.size_mean.double().numpy()
    t, x, sizes = 0.7, np.random.default_rng(0).normal(size=24), np.array([0.7, 0.4])
    covariance = d.T @ d
    seen = np.block(
        [
            [(1 - t) ** 2 * covariance + t**2 * np.eye(24), (1 - t) * d.T @ b.T],
            [(1 - t) * b @ d, b @ b.T + r],
        ]
    )
    cross = np.hstack([(1 - t) * covariance, d.T @ b.T])
    wanted = mean + cross @ np.linalg.solve(seen, np.concatenate([x - (1 - t) * mean, sizes - middle]))
    got = prior(
        torch.tensor(x).float().reshape(1, *SHAPE), torch.tensor([t]), torch.tensor(sizes).float()[None]
    ).flatten()
    assert np.allclose(got.numpy(), wanted, atol=1e-3)


def test_sizes_decide_where_there_is_only_noise(prior):
    """The first size is the first way to vary: the expected latent moves along it, and unknown sizes move nothing."""
    noise, share = torch.randn(3, *SHAPE), torch.ones(3)
    sizes = torch.tensor([[0.6, UNKNOWN], [0.4, UNKNOWN], [UNKNOWN, UNKNOWN]])
    large, small, unknown = prior(noise, share, sizes)
    assert torch.allclose(unknown, prior.mean, atol=1e-4)
    moved = (large - small).flatten()
    samples = samples_of(400)
    first = torch.stack([one["organ_sizes"][0] for one in samples])
    latents = torch.stack([one["latent"].flatten() for one in samples])
    along = ((first - first.mean())[:, None] * (latents - latents.mean(0))).mean(0)
    assert torch.nn.functional.cosine_similarity(moved, along, dim=0) > 0.99


def test_unknown_sizes_are_drawn_from_what_goes_with_the_known(prior):
    """The second size is the first plus as much of its own: given the first, its mean and spread are known."""
    asked = torch.tensor([0.6, UNKNOWN])
    drawn = torch.stack([prior.complete(asked, torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert (drawn[:, 0] == 0.6).all() and drawn[:, 1].mean().item() == pytest.approx(0.6, abs=0.03)
    assert drawn[:, 1].std().item() == pytest.approx(0.1, rel=0.3)
    free = torch.stack(
        [prior.complete(torch.full((2,), UNKNOWN), torch.Generator().manual_seed(i)) for i in range(400)]
    )
    assert free.mean(0).numpy() == pytest.approx([0.5, 0.5], abs=0.03)
    assert torch.corrcoef(free.T)[0, 1].item() == pytest.approx(0.5**0.5, abs=0.2)
    assert torch.equal(drawn[3], prior.complete(asked, torch.Generator().manual_seed(3)))
    assert 0 <= prior.complete(torch.tensor([30.0, UNKNOWN]))[1] <= 1
    assert torch.equal(prior.complete(torch.tensor([0.2, 0.9])), torch.tensor([0.2, 0.9]))


def test_without_noise_the_latent_is_found_again(prior):
    latents = torch.stack([one["latent"] for one in samples_of(5, seed=3)])
    found = prior(latents, torch.zeros(5), torch.full((5, 2), UNKNOWN))
    assert (found - latents).abs().mean() < 0.06  # but for what the components leave out


def test_fewer_samples_than_components():
    prior = ShapePrior(2, 2, SHAPE[1:], 8)
    prior.fit(samples_of(3), 2.0)
    assert (prior.directions.flatten(1).abs().amax(1) > 1e-4).sum() == 2
    assert torch.isfinite(prior(torch.randn(1, *SHAPE), torch.tensor([0.9]), torch.tensor([[0.5, 0.5]]))).all()


def test_one_sample_is_its_own_mean_and_varies_in_nothing():
    one = samples_of(1)
    prior = ShapePrior(2, 2, SHAPE[1:], 2)
    prior.fit(one, 1.0)
    assert torch.equal(prior.mean, one[0]["latent"]) and not prior.directions.any() and not prior.size_slopes.any()


def test_other_canvases_are_refused(prior):
    with pytest.raises(InputError, match=r"\(2, 3, 2, 4\); these weights know \(2, 3, 2, 2\)"):
        prior(torch.zeros(1, 2, 3, 2, 4), torch.ones(1), torch.zeros(1, 2))
    with pytest.raises(InputError, match="canvas"):
        ShapePrior(2, 2, (3, 2, 4), 2).fit(samples_of(3), 1.0)
    with pytest.raises(InputError, match="shapes"):
        stacked([*samples_of(1), {"latent": torch.zeros(2, 1, 1, 1), "organ_sizes": torch.zeros(2)}], 1.0)
