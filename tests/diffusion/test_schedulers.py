from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler

from maisi_tools.diffusion.schedulers import ddim, ddpm, rectified_flow, shared_settings
from maisi_tools.errors import InputError
from maisi_tools.weights import check_shared, save_weights


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
        (rectified_flow(32), "rectified flow, 1000 timesteps"),
        (
            rectified_flow(9, use_timestep_transform=True, sample_method="logit-normal"),
            "rectified flow, 1000 timesteps",
        ),
        (rectified_flow(9, num_train_timesteps=10), "rectified flow, 10 timesteps"),
        (ddpm(), "ddpm, epsilon, 1000 timesteps, betas 0.0015, 0.00796, 0.0195"),
        (ddim(), "ddpm, epsilon, 1000 timesteps, betas 0.0015, 0.00796, 0.0195"),
        (ddpm(schedule="linear_beta"), "ddpm, epsilon, 1000 timesteps, betas 0.0015, 0.0105, 0.0195"),
        (
            ddpm(prediction_type="v_prediction", beta_end=0.03),
            "ddpm, v_prediction, 1000 timesteps, betas 0.0015, 0.0112, 0.03",
        ),
        (PNDMScheduler(), "PNDMScheduler"),
    ],
)
def test_the_process_that_a_network_learns(scheduler, process):
    assert shared_settings(scheduler, condition_scale=1.0) == {"process": process, "condition_scale": 1.0}


def test_shared_settings_are_as_a_file_has_them(tmp_path):
    """A checkpoint with anything else cannot be read again."""
    given = {"keep_labels": range(3, 0, -1), "merge_labels": {"bone": np.int64(120)}, "organs": [(1, np.float32(0.5))]}
    shared = shared_settings(rectified_flow(32), **given)
    save_weights(tmp_path / "x.pt", {"a": torch.ones(1)}, shared=shared)
    check_shared(tmp_path / "x.pt", {"keep_labels": [1, 2, 3], "merge_labels": {"bone": 120}, "organs": [[1, 0.5]]})
    assert shared_settings(rectified_flow(32), keep_labels=None)["keep_labels"] is None


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
