"""Sampling on each device: every solver and scheduler to a known end, and both inferers as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from maisi_tools.diffusion.autoencoder import LatentDecoder
from maisi_tools.diffusion.conditions import Conditions
from maisi_tools.diffusion.inferers import LatentSampler, MaskToCT
from maisi_tools.diffusion.samplers import SOLVERS, sample, step_generator
from maisi_tools.tsp.inferer import TSPInferer

BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.4, "clip_sample": False}


def flow() -> RFlowScheduler:
    return RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 10])
def test_each_solver_ends_at_the_only_data_there_is(device, solver, steps):
    """The velocity of a flow to one point, ``(point - x) / t``, does not change along the way."""
    point, noise = torch.randn(1, 4, 4, 6, 4, device=device), torch.randn(1, 4, 4, 6, 4, device=device)

    def velocity(x, t):
        assert x.device == t.device == noise.device
        return (point - x) / (t.reshape(-1, 1, 1, 1, 1) / 1000)

    found = sample(velocity, noise, flow(), steps, progress=False, solver=solver)
    assert found.device == noise.device
    torch.testing.assert_close(found, point, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_each_scheduler_ends_at_the_only_data_there_is(device, kind):
    """With the noise that is in x for certain."""
    point, noise = torch.randn(1, 4, 4, 6, 4, device=device), torch.randn(1, 4, 4, 6, 4, device=device)
    scheduler = kind(num_train_timesteps=50, **BETAS)

    def true_noise(x, t):
        kept = scheduler.alphas_cumprod.to(device)[t.long()].reshape(-1, 1, 1, 1, 1)
        return (x - kept.sqrt() * point) / (1 - kept).sqrt()

    steps = 50 if kind is DDPMScheduler else 10
    found = sample(true_noise, noise, scheduler, steps, step_generator(noise, 3), progress=False)
    torch.testing.assert_close(found, point, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_mask_becomes_the_ct_that_the_cpu_makes(device, solver, tiny_controlled, tiny_autoencoder):
    """Plain networks on the CPU, slabs on the device."""
    for parameter in tiny_controlled.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    labels = torch.randint(0, 133, (1, 1, 16, 24, 16)).float()
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    made = []
    for where, inferer in (("cpu", None), (device, TSPInferer(splits=2))):
        decoder = LatentDecoder(copy.deepcopy(tiny_autoencoder).to(where), 0.8, inferer)
        network = copy.deepcopy(tiny_controlled).to(where)
        stage = MaskToCT(
            decoder, flow(), 3, multiple=8, condition_scale=1.0, progress=False, inferer=inferer, solver=solver
        )
        made.append(stage(MetaTensor(labels.to(where), affine=affine), network))
    assert made[1].device.type == device and made[0].std() > 0.01
    torch.testing.assert_close(made[1].cpu(), made[0], atol=1e-3, rtol=1e-3)


def test_noise_becomes_the_ct_that_the_cpu_makes(device, tiny_unet, tiny_autoencoder):
    """DDIM, with guidance, plain networks on the CPU, slabs on the device."""
    conditions = Conditions(size=(16, 8, 24), spacing=(1.0, 1.5, 2.0), region="chest", seed=5)
    made = []
    for where, inferer in (("cpu", None), (device, TSPInferer(splits=2))):
        decoder = LatentDecoder(copy.deepcopy(tiny_autoencoder).to(where), 0.8, inferer)
        scheduler = DDIMScheduler(num_train_timesteps=1000, schedule="scaled_linear_beta", clip_sample=False)
        stage = LatentSampler(
            decoder, scheduler, 4, conditions, guidance_scale=2.0, condition_scale=1.0, progress=False, inferer=inferer
        )
        made.append(stage(conditions.noise(4)[None].to(where), copy.deepcopy(tiny_unet).to(where)))
    assert made[1].device.type == device and made[0].std() > 0.01
    torch.testing.assert_close(made[1].cpu(), made[0], atol=1e-3, rtol=1e-3)
