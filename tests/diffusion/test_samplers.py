from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from maisi_tools.diffusion.samplers import (
    check_interval,
    check_sampling,
    data_and_noise,
    guided,
    known_outside,
    sample,
    signal_and_noise,
)
from maisi_tools.diffusion.schedulers import ddim
from maisi_tools.errors import InputError

MEAN, SPREAD = 0.7, 0.4
"""Of the Gaussian data that samplers have to arrive at."""


def flow_of_gaussian(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Velocity of rectified flow, E[data - noise | x], for data N(MEAN, SPREAD^2); exact: x(t) keeps its quantile."""
    t = (t / 1000).view(-1, 1, 1, 1, 1).to(x)
    off = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * SPREAD**2 + t**2)
    return MEAN + (1 - t) * SPREAD**2 * off - t * off


def prediction_of_gaussian(scheduler, kind: str = "epsilon"):
    """What the exact network predicts of data N(MEAN, SPREAD^2) under a scheduler's noise."""

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = scheduler.alphas_cumprod[t.long()].view(-1, 1, 1, 1, 1).to(x)
        off = (x - alpha.sqrt() * MEAN) / (alpha * SPREAD**2 + 1 - alpha)
        noise, data = (1 - alpha).sqrt() * off, MEAN + alpha.sqrt() * SPREAD**2 * off
        return {"epsilon": noise, "sample": data, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * data}[
            kind
        ]

    return denoiser


def full_ddpm(repo_root, key: str):
    """A scheduler of full_ddpm.json."""
    config = json.loads((repo_root / "bundles" / "maisi_ldm" / "configs" / "full_ddpm.json").read_text())
    return ConfigParser({"scheduler": config[key]}).get_parsed_content("scheduler")


def flow(**settings) -> RFlowScheduler:
    return RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, **settings)


@pytest.mark.parametrize("again", [0, 1])
def test_progress_can_be_told_to_a_function(again):
    told, called = [], []

    def denoiser(x, t):
        called.append(len(told))
        return torch.zeros_like(x)

    noise = torch.randn(1, 4, 8, 8, 8)
    generator = torch.Generator().manual_seed(0)
    sample(denoiser, noise, flow(), 3, generator, lambda *done: told.append(done), resample_steps=again)
    steps = 3 * (1 + again)
    assert told == [(number, steps) for number in range(steps + 1)]
    assert called == list(range(1, steps + 1))  # each was told before it was taken


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


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_solvers_reach_a_gaussian_with_their_order(solver, order, transform):
    """Halving the steps' length divides the error by 2 to the power of the order, on the uneven grid too."""
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = flow(use_timestep_transform=transform, base_img_size_numel=150)
    errors = []
    for steps in (20, 40, 80):
        result = sample(flow_of_gaussian, noise, scheduler, steps, progress=False, solver=solver)
        errors.append((result - (MEAN + SPREAD * noise)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < {1: 0.04, 2: 1.5e-3}[order]


def test_ab2_is_exact_for_a_linear_velocity_on_an_uneven_grid():
    """But for the first step, which is Euler's: its error is half the velocity's change over it, times its length."""
    noise = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    scheduler = flow(use_timestep_transform=True, base_img_size_numel=8)
    result = sample(lambda x, t: torch.full_like(x, 3 + 2 * t.item() / 1000), noise, scheduler, 6, solver="ab2")
    first = (1000 - scheduler.timesteps[1].item()) / 1000
    torch.testing.assert_close(result, noise + 3 + 1 + 2 * first**2 / 2, atol=1e-6, rtol=0)


def test_ab2_takes_timesteps_that_coincide():
    """At the finest grid of a large volume float16 timesteps do: such a step goes nowhere."""
    noise = torch.randn(1, 4, 8, 8, 8, dtype=torch.float64)
    scheduler = flow(use_timestep_transform=True, base_img_size_numel=4)
    result = sample(flow_of_gaussian, noise, scheduler, 1000, progress=False, solver="ab2")
    assert (scheduler.timesteps.diff() == 0).any()
    torch.testing.assert_close(result, MEAN + SPREAD * noise, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 7), ("heun", 13), ("ab2", 7)])
def test_solvers_call_the_network_as_often_as_they_say(solver, calls):
    seen = []

    def denoiser(x, t):
        seen.append(t.item())
        return x

    sample(denoiser, torch.randn(1, 4, 4, 4, 4), flow(), 7, progress=False, solver=solver)
    assert len(seen) == calls and seen[0] == 1000 and min(seen) == pytest.approx(1000 / 7, abs=0.1)


@pytest.mark.parametrize("solver", ["euler", "ab2", "heun"])
def test_the_last_step_ends_at_what_the_network_expects(solver):
    """Timesteps below it are left out; from the first at or below it straight along the velocity there."""
    seen: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    def denoiser(x, t):
        seen.append((float(t[0]), x, torch.sin(3 * x) * float(t[0]) / 1000))
        return seen[-1][2]

    noise = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    found = sample(denoiser, noise, flow(), 10, progress=False, solver=solver, last_step=0.3)
    timesteps = sorted({round(t) for t, _, _ in seen}, reverse=True)
    assert timesteps == [1000, 900, 800, 700, 600, 500, 400, 300]
    _, latent, velocity = seen[-1]
    torch.testing.assert_close(found, latent + 0.3 * velocity)
    whole = sample(denoiser, noise, flow(), 10, progress=False, solver=solver)
    assert torch.equal(whole, sample(denoiser, noise, flow(), 10, progress=False, solver=solver, last_step=0.0))
    assert not torch.equal(whole, found)
    few = sample(denoiser, noise, flow(), 2, progress=False, solver=solver, last_step=0.3)  # from 0.5 to the data
    assert torch.isfinite(few).all()


def test_a_last_step_that_is_none_is_refused(repo_root):
    for wrong in (1.0, -0.1, math.nan, "0.3", None):
        with pytest.raises(InputError, match="last_step is .*; allowed is a share"):
            check_sampling(flow(), 10, "euler", wrong)
    with pytest.raises(InputError, match="last_step 0.3 with DDIMScheduler, which steps itself.*--last_step 0"):
        check_sampling(full_ddpm(repo_root, "ddim"), 10, "euler", 0.3)


@pytest.mark.parametrize("steps", [1, 10, 20, 50, 1000])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_on_a_gaussian_is_the_closed_form(repo_root, steps, kind, to_one):
    """With the exact network a step multiplies the deviation from the mean by a number; here all of them in numpy."""
    settings = json.loads((repo_root / "bundles/maisi_ldm/configs/full_ddpm.json").read_text())["ddim"]
    assert settings.pop("_target_") == "maisi_tools.diffusion.schedulers.ddim"
    scheduler = ddim(**settings, prediction_type=kind, set_alpha_to_one=to_one)
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = sample(prediction_of_gaussian(scheduler, kind), noise, scheduler, steps, progress=False)

    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    path = alphas[np.round(np.linspace(999, 0, steps)).astype(int)]
    path = np.append(path, 1.0 if to_one else alphas[0])
    signal, spread = np.sqrt(path), np.sqrt(1 - path)
    scale = np.sqrt(path * SPREAD**2 + 1 - path)  # of the deviation, at each noise level
    turns = (signal[1:] * signal[:-1] * SPREAD**2 + spread[1:] * spread[:-1]) / (scale[1:] * scale[:-1])
    off = scale[-1] * np.prod(turns) * (noise.numpy() - signal[0] * MEAN) / scale[0]
    np.testing.assert_allclose(result.numpy(), signal[-1] * MEAN + off, atol=1e-4)
    if steps == 1000 and to_one:  # and so many steps are at the data's own distribution
        np.testing.assert_allclose(result.numpy(), MEAN + SPREAD * (noise.numpy() - signal[0] * MEAN), atol=0.02)


def test_ddim_clips_the_data_it_predicts():
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=True, clip_sample_min=-0.5, clip_sample_max=0.25)
    result = sample(lambda x, t: torch.zeros_like(x), torch.randn(1, 4, 8, 8, 8), scheduler, 5, progress=False)
    assert result.min() == -0.5 and result.max() == 0.25


@pytest.mark.parametrize("key", ["scheduler", "ddim"])
def test_the_schedulers_of_full_ddpm_reach_a_gaussian(repo_root, key):
    """In all their steps, by the exact network: mean and variance of 65,536 draws."""
    scheduler = full_ddpm(repo_root, key)
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 16, 32, 32, generator=source)
    result = sample(prediction_of_gaussian(scheduler), noise, scheduler, 1000, source, progress=False)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert result.std().item() == pytest.approx(SPREAD, rel=0.02)


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


def test_solvers_that_do_not_fit_are_refused(repo_root):
    noise = torch.randn(1, 4, 4, 4, 4)
    with pytest.raises(InputError, match="'rk4'; allowed are euler, heun, ab2"):
        sample(lambda x, t: x, noise, flow(), 5, progress=False, solver="rk4")
    for key, name in (("scheduler", "DDPMScheduler"), ("ddim", "DDIMScheduler")):
        for solver in ("heun", "ab2"):
            with pytest.raises(InputError, match=f"'{solver}' and last_step 0 with {name}.*--solver euler"):
                sample(lambda x, t: x, noise, full_ddpm(repo_root, key), 1000, progress=False, solver=solver)


@pytest.mark.parametrize(
    "interval", [(-0.1, 0.5), (0.2, 1.1), (0.6, 0.5), (0.1,), (0, 0.5, 1), 0.3, None, "all", (float("nan"), 1)]
)
def test_intervals_outside_0_to_1_are_refused(interval):
    with pytest.raises(InputError, match="two numbers within 0 to 1"):
        guided(lambda x, t: x, lambda x, t: x, 2.0, flow(), interval)


def test_intervals_within_0_to_1_are_taken():
    assert check_interval([0, 1]) == (0.0, 1.0) and check_interval((0.5, 0.5)) == (0.5, 0.5)


def test_guidance_stays_within_its_interval():
    """Both ends belong to it; outside it the conditional network runs alone."""
    seen = {"c": [], "u": []}

    def network(name, value):
        def denoiser(x, t):
            seen[name].append(t.item() / 500)
            return torch.full_like(x, value)

        return denoiser

    scheduler = RFlowScheduler(num_train_timesteps=500, use_discrete_timesteps=False)
    denoiser = guided(network("c", 3.0), network("u", 1.0), 5, scheduler, (0.4, 0.8))
    noise = torch.zeros(1, 4, 4, 4, 4)
    result = sample(denoiser, noise, scheduler, 5, progress=False)
    assert seen == {"c": [1.0, 0.8, 0.6, 0.4, 0.2], "u": [0.8, 0.6, 0.4]}
    torch.testing.assert_close(result, noise + (3 * 2 + (1 + 5 * 2) * 3) / 5)


def test_guidance_formula_and_cost():
    calls = []

    def conditional(x, t):
        calls.append("c")
        return x * 3

    def unconditional(x, t):
        calls.append("u")
        return x

    x, t = torch.ones(1), torch.zeros(1)
    assert guided(conditional, unconditional, 0, flow())(x, t).item() == 3 and calls == ["c"]
    assert guided(conditional, unconditional, 1, flow())(x, t).item() == 3
    assert guided(conditional, unconditional, 5, flow())(x, t).item() == 1 + 5 * 2


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "sample", "v_prediction"])
def test_guidance_without_its_parallel_part_turns_the_predicted_data_and_lengthens_none(kind):
    """By the definition, cell for cell: of the data's change, what lies along the conditional prediction is gone."""
    scheduler = flow() if kind == "velocity" else ddim(prediction_type=kind)
    latent, output, base = torch.randn(3, 2, 4, 3, 2, 2, dtype=torch.float64)
    t = torch.full((2,), 400.0)
    signal, spread = signal_and_noise(scheduler, 400.0)

    def data(prediction):
        return data_and_noise(scheduler, latent, prediction, signal, spread)[0]

    def run(parallel):
        return guided(lambda x, t: output, lambda x, t: base, 3.0, scheduler, parallel=parallel)(latent, t)

    torch.testing.assert_close(run(1.0), base + 3 * (output - base))
    change, whole = data(run(0.0)) - data(output), data(run(1.0)) - data(output)
    assert change.abs().min() > 1e-6
    torch.testing.assert_close((change * data(output)).sum(1), torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    share = (whole * data(output)).sum(1, keepdim=True) / (data(output) ** 2).sum(1, keepdim=True)
    torch.testing.assert_close(whole - change, share * data(output))
    torch.testing.assert_close(run(0.25), 0.75 * run(0.0) + 0.25 * run(1.0))


def test_guidance_where_no_data_are_predicted_is_all_kept():
    """A cell of zeros has no direction."""
    guide = guided(lambda x, t: x * 0, lambda x, t: x * 0 - 1, 3.0, flow(), parallel=0.0)
    assert torch.equal(guide(torch.zeros(1, 4, 2, 2, 2), torch.tensor([500.0])), torch.full((1, 4, 2, 2, 2), 2.0))


@pytest.mark.parametrize("parallel", [-0.1, 1.5, float("nan"), None, "half", True])
def test_a_parallel_part_that_is_none_is_refused(parallel):
    with pytest.raises(InputError, match="guidance_parallel is .*; allowed is a number from 0 to 1"):
        guided(lambda x, t: x, lambda x, t: x, 2.0, flow(), parallel=parallel)


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "sample", "v_prediction"])
def test_a_prediction_is_split_into_the_data_and_noise_that_it_was_made_of(kind):
    scheduler = flow() if kind == "velocity" else ddim(prediction_type=kind)
    data, noise = torch.randn(2, 1, 4, 2, 2, 2, dtype=torch.float64)
    signal, spread = signal_and_noise(scheduler, 300.0)
    outputs = {
        "velocity": data - noise,
        "epsilon": noise,
        "sample": data,
        "v_prediction": signal * noise - spread * data,
    }
    found = data_and_noise(scheduler, signal * data + spread * noise, outputs[kind], signal, spread)
    torch.testing.assert_close(found, (data, noise))


@pytest.mark.parametrize("channels", [1, 4])
def test_timesteps_follow_the_latents_voxels_and_not_its_channels(channels):
    """Shifted by (voxels / base) ** (1/3), as rectified flow's scheduler was trained: t' = r t / (1 + (r - 1) t)."""
    size, base, steps = (4, 6, 10), 30, 5
    seen = []

    def denoiser(latent, timesteps):
        seen.append(timesteps[0].item())
        return torch.zeros_like(latent)

    scheduler = flow(use_timestep_transform=True, base_img_size_numel=base)
    sample(denoiser, torch.randn(1, channels, *size), scheduler, steps, progress=False)
    even = 1 - np.arange(steps) / steps
    ratio = (np.prod(size) / base) ** (1 / 3)
    np.testing.assert_allclose(seen, 1000 * ratio * even / (1 + (ratio - 1) * even), rtol=1e-3)  # float16 in MONAI


def test_guidance_is_on_at_both_ends_of_its_interval():
    guide = guided(lambda x, t: x * 0 + 1, lambda x, t: x * 0, 3.0, flow(), (0.25, 0.75))
    found = [guide(torch.zeros(1), torch.tensor([time])).item() for time in (249.0, 250.0, 500.0, 750.0, 751.0)]
    assert found == [1, 3, 3, 3, 1]


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_ends_at_the_alpha_that_its_scheduler_names(set_alpha_to_one):
    """The data itself (1), or that of the first timestep."""
    scheduler = DDIMScheduler(num_train_timesteps=10, set_alpha_to_one=set_alpha_to_one, clip_sample=False)
    noise = torch.randn(1, 1, 2, 2, 2)
    found = sample(lambda x, t: torch.full_like(x, 0.3), noise, scheduler, 1, progress=False)
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
    data = (noise - (1 - alpha).sqrt() * 0.3) / alpha.sqrt()
    end = torch.tensor(1.0) if set_alpha_to_one else scheduler.alphas_cumprod[0]
    torch.testing.assert_close(found, end.sqrt() * data + (1 - end).sqrt() * 0.3)


@pytest.mark.parametrize("size", [(28, 20, 28), (16, 16, 24), (64, 64, 32)])
@pytest.mark.parametrize("transform", [False, True])
def test_thirty_steps_end_at_the_data_where_monais_own_overshoot(size, transform):
    """Along a velocity of 1 the way is 1; what sample()'s docstring says of MONAI's step."""
    scheduler = flow(use_timestep_transform=transform, base_img_size_numel=4096)
    noise = torch.zeros(1, 1, *size)
    found = sample(lambda x, t: torch.ones_like(x), noise, scheduler, 30, progress=False)
    assert found.flatten()[0].item() == pytest.approx(1, abs=1e-3)
    theirs = torch.zeros(1)
    times = [*scheduler.timesteps.tolist(), 0.0]
    for now, then in zip(times, times[1:], strict=False):
        theirs, _ = scheduler.step(torch.ones(1), now, theirs, then)
    assert 0.007 < theirs.item() - 1 < 0.011


def schedulers(repo_root):
    ddpm, ddim = (full_ddpm(repo_root, key) for key in ("scheduler", "ddim"))
    return [
        (flow(), 12, "euler"),
        (flow(), 12, "heun"),
        (flow(), 12, "ab2"),
        (ddim, 100, "euler"),
        (ddpm, 1000, "euler"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_what_is_known_stays_and_the_rest_is_drawn_beside_it(repo_root, number):
    """Outside the region the known latent is there at each step's noise and in the end; inside, the data's spread."""
    scheduler, steps, solver = schedulers(repo_root)[number]
    rectified = number < 3
    network = flow_of_gaussian if rectified else prediction_of_gaussian(scheduler)
    torch.manual_seed(0)
    known, noise = torch.randn(2, 1, 1, 12, 12, 12).double()
    region = torch.zeros(1, 1, 12, 12, 12, dtype=torch.bool)
    region[..., 4:] = True
    outside = ~region
    seen = []

    def watched(latent, timesteps):
        signal, spread = signal_and_noise(scheduler, float(timesteps[0]))
        seen.append(((latent - signal * known) / spread)[outside])
        return network(latent, timesteps)

    denoiser = known_outside(watched, known, region, scheduler)
    generator = torch.Generator().manual_seed(1)
    result = sample(denoiser, noise, scheduler, steps, generator, False, solver)
    torch.testing.assert_close(result[outside], known[outside], atol=2e-3, rtol=0)
    if rectified:  # the very noise that it began with, at each step
        for one in seen:
            torch.testing.assert_close(one, noise[outside], atol=1e-6, rtol=1e-6)
    else:  # of DDPM, noise as standard
        assert 0.9 < seen[steps // 2].std() < 1.1
    drawn = sample(network, noise, scheduler, steps, torch.Generator().manual_seed(1), False, solver)
    torch.testing.assert_close(result[region], drawn[region])
    assert abs(float(result[region].mean()) - MEAN) < 0.05 and abs(float(result[region].std()) - SPREAD) < 0.08


@pytest.mark.parametrize("number", [0, 2, 3, 4])
def test_a_start_from_data_keeps_the_share_of_it(repo_root, number):
    """With a network that knows the one data point, any start ends there; only the steps below the level are taken."""
    scheduler, steps, solver = schedulers(repo_root)[number]
    data, noise, seen = torch.randn(1, 1, 4, 4, 4), torch.randn(1, 1, 4, 4, 4), []

    def watched(latent, timesteps):
        seen.append((float(timesteps[0]), latent.clone()))
        return latent

    everywhere = known_outside(watched, data, torch.zeros_like(data, dtype=torch.bool), scheduler)
    generator = torch.Generator().manual_seed(0)
    result = sample(everywhere, noise, scheduler, steps, generator, False, solver, data, 0.5)
    first, start = seen[0]
    signal, spread = signal_and_noise(scheduler, first)
    torch.testing.assert_close(start, signal * data + spread * noise)
    assert first == 500 if number < 3 else 490 <= first <= 500
    assert abs(len(seen) - steps / 2) <= 1
    torch.testing.assert_close(result, data, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("strength", "left"),
    [
        (0.99, [990, *range(900, 0, -100)]),
        (0.95, [950, *range(900, 0, -100)]),  # half a step ahead of the next timestep
        (0.93, [930, *range(800, 0, -100)]),  # so near to it that it takes its place
        (0.5, [500, 400, 300, 200, 100]),
        (0.05, [50]),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_rectified_flow_starts_at_the_very_strength(strength, left, solver):
    """Of a Gaussian's flow the start's mean and spread are known; so is where Euler's steps take it."""
    data, noise = torch.randn(2, 1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    seen = []

    def watched(latent, timesteps):
        seen.append((float(timesteps[0]), latent))
        return flow_of_gaussian(latent, timesteps)

    result = sample(watched, noise, flow(), 10, None, False, solver, data, strength)
    assert sorted({round(time, 3) for time, _ in seen}, reverse=True) == left
    torch.testing.assert_close(seen[0][1], (1 - strength) * data + strength * noise, atol=1e-6, rtol=1e-6)
    if solver == "euler":
        expected = (1 - strength) * data + strength * noise
        for now, then in itertools.pairwise([*left, 0]):
            expected = expected + flow_of_gaussian(expected, torch.tensor([now])) * (now - then) / 1000
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_a_strength_of_1_takes_the_steps_as_they_are():
    noise, data = torch.randn(2, 1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = sample(flow_of_gaussian, noise, flow(), 10, progress=False, solver="ab2")
    assert torch.equal(sample(flow_of_gaussian, noise, flow(), 10, None, False, "ab2", data, 1.0), plain)


@pytest.mark.parametrize("kind", ["ddim", "discrete flow"])
@pytest.mark.parametrize("strength", [0.999, 0.99, 0.5, 0.444, 0.05])
def test_where_levels_are_discrete_the_start_is_none_above_and_is_told(repo_root, caplog, kind, strength):
    scheduler = full_ddpm(repo_root, "ddim")
    if kind != "ddim":
        scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=True)
    noise, seen = torch.randn(1, 1, 4, 4, 4), []

    def watched(latent, timesteps):
        seen.append(float(timesteps[0]))
        return torch.zeros_like(latent)

    sample(watched, noise, scheduler, 10, None, False, "euler", noise, strength)
    levels = scheduler.timesteps.tolist()
    first = max((level for level in levels if level <= 1000 * strength), default=min(levels))
    assert seen == [level for level in levels if level <= first]
    assert (f"can begin at is {first / 1000:g}" in caplog.text) == (first != 1000 * strength)


@pytest.mark.parametrize(("number", "calls"), [(0, 36), (1, 69), (2, 36), (3, 300)])
def test_steps_taken_back_keep_the_distribution(repo_root, number, calls):
    """Each step three times; what is noised again and drawn again has the data's mean and spread."""
    scheduler, steps, solver = schedulers(repo_root)[number]
    network = flow_of_gaussian if number < 3 else prediction_of_gaussian(scheduler)
    seen = []

    def counted(latent, timesteps):
        seen.append(float(timesteps[0]))
        return network(latent, timesteps)

    noise = torch.randn(1, 1, 24, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    result = sample(counted, noise, scheduler, steps, generator, False, solver, resample_steps=2)
    assert len(seen) == calls and sorted(seen, reverse=True)[:3] == [seen[0]] * 3
    assert abs(float(result.mean()) - MEAN) < 0.02 and abs(float(result.std()) - SPREAD) < 0.1
    plain = sample(network, noise, scheduler, steps, generator, False, solver)
    assert abs(torch.corrcoef(torch.stack([result.flatten(), plain.flatten()]))[0, 1]) < 0.9


@pytest.mark.parametrize(
    "wrong", [{"strength": 0}, {"strength": 1.5}, {"strength": True}, {"resample_steps": -1}, {"resample_steps": 1.5}]
)
def test_starts_that_are_none_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        sample(flow_of_gaussian, torch.randn(1, 1, 4, 4, 4), flow(), 2, progress=False, **wrong)
    with pytest.raises(InputError, match="without a latent"):
        sample(flow_of_gaussian, torch.randn(1, 1, 4, 4, 4), flow(), 2, progress=False, strength=0.5)
