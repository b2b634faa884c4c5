from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from maisi_tools.diffusion.samplers import guided, sample
from maisi_tools.errors import InputError


def flow(**settings) -> RFlowScheduler:
    return RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, **settings)


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("transform", [False, True])
def test_straight_flow_is_integrated_exactly(steps, transform):
    """With the true constant velocity (data - noise), Euler steps must end at the data, whatever the timesteps."""
    data, noise = torch.randn(2, 4, 8, 8, 8), torch.randn(2, 4, 8, 8, 8)
    scheduler = flow(use_timestep_transform=transform, base_img_size_numel=64)
    result = sample(lambda x, t: data - noise, noise, scheduler, steps, progress=False)
    torch.testing.assert_close(result, data, atol=1e-5, rtol=1e-5)


def test_denoiser_sees_descending_timesteps_and_the_interpolated_latent():
    data, noise, seen = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 4, 4, 4, 4), []

    def denoiser(x, t):
        seen.append(t.item())
        weight = t.item() / 1000
        torch.testing.assert_close(x, weight * noise + (1 - weight) * data, atol=1e-3, rtol=1e-3)
        return data - noise

    sample(denoiser, noise, flow(), 10, progress=False)
    assert seen == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


def test_ddpm_and_ddim_recover_data_from_the_true_noise():
    """With the exact noise prediction for one data point, both schedulers end at the data."""
    data = torch.randn(1, 4, 4, 4, 4)
    settings = {"num_train_timesteps": 50, "schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.4}
    settings["clip_sample"] = False
    for scheduler, steps in ((DDPMScheduler(**settings), 50), (DDIMScheduler(**settings), 10)):

        def true_noise(x, t, scheduler=scheduler):
            alpha = scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1, 1)
            return (x - alpha.sqrt() * data) / (1 - alpha).sqrt()

        generator = torch.Generator().manual_seed(0)
        result = sample(true_noise, torch.randn(1, 4, 4, 4, 4), scheduler, steps, generator, progress=False)
        torch.testing.assert_close(result, data, atol=1e-3, rtol=1e-3)


def test_ddpm_noise_comes_from_the_generator():
    scheduler, noise = DDPMScheduler(num_train_timesteps=5), torch.randn(1, 4, 4, 4, 4)
    draws = [
        sample(lambda x, t: x, noise, scheduler, 5, torch.Generator().manual_seed(seed), progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_wrong_numbers_of_steps_are_refused():
    noise = torch.randn(1, 4, 4, 4, 4)
    with pytest.raises(InputError, match="1000 steps"):
        sample(lambda x, t: x, noise, DDPMScheduler(num_train_timesteps=1000), 50, progress=False)
    for steps in (0, 1001):
        with pytest.raises(InputError, match="1 to 1000"):
            sample(lambda x, t: x, noise, flow(), steps, progress=False)


def test_guidance_formula_and_cost():
    calls = []

    def conditional(x, t):
        calls.append("c")
        return x * 3

    def unconditional(x, t):
        calls.append("u")
        return x

    x, t = torch.ones(1), torch.zeros(1)
    assert guided(conditional, unconditional, 0)(x, t).item() == 3 and calls == ["c"]
    assert guided(conditional, unconditional, 1)(x, t).item() == 3
    assert guided(conditional, unconditional, 5)(x, t).item() == 1 + 5 * 2
