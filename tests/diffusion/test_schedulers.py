from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler

from maisi_tools.diffusion.schedulers import ddim, ddpm, rectified_flow, shared_settings
from maisi_tools.errors import InputError


def test_the_releases_betas():
    """Of the release: the square roots of the betas go from 0.0015 to 0.0195 in even steps."""
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    for made, kind in ((ddpm(), DDPMScheduler), (ddim(), DDIMScheduler)):
        assert type(made) is kind and made.num_train_timesteps == 1000 and made.clip_sample is False
        np.testing.assert_allclose(made.betas.numpy(), betas, rtol=1e-4)
    assert ddpm(clip_sample=True).clip_sample is True


@pytest.mark.parametrize(
    ("scheduler", "process"),
    [
        (rectified_flow(32), "rectified flow"),
        (rectified_flow(9, use_timestep_transform=True, sample_method="logit-normal"), "rectified flow"),
        (ddpm(), "ddpm, epsilon"),
        (ddim(), "ddpm, epsilon"),
        (ddpm(prediction_type="v_prediction"), "ddpm, v_prediction"),
        (PNDMScheduler(), "PNDMScheduler"),
    ],
)
def test_the_process_that_a_network_learns(scheduler, process):
    assert shared_settings(scheduler, condition_scale=1.0) == {"process": process, "condition_scale": 1.0}


def test_a_way_to_draw_timesteps_that_there_is_not_is_refused():
    with pytest.raises(InputError, match="timestep_sampling is 'foo'; allowed are uniform and logit-normal"):
        rectified_flow(32, sample_method="foo")


def test_rectified_flow_shifts_timesteps_for_larger_latents_alone():
    """The timestep transform of MONAI: s = r t / (1 + (r - 1) t), r the cube root of the ratio of sizes."""
    plain = rectified_flow(base_img_size_numel=4096)
    shifted = rectified_flow(base_img_size_numel=4096, use_timestep_transform=True)
    assert type(plain) is RFlowScheduler and not plain.use_discrete_timesteps
    plain.set_timesteps(4, input_img_size_numel=8 * 4096)
    shifted.set_timesteps(4, input_img_size_numel=8 * 4096)
    t = torch.as_tensor(plain.timesteps).float() / 1000
    torch.testing.assert_close(torch.as_tensor(shifted.timesteps).float() / 1000, 2 * t / (1 + t), atol=2e-3, rtol=0)
    assert rectified_flow(4096, sample_method="logit-normal").sample_method == "logit-normal"
