"""Batches of the diffusion stages against the formulae of rectified flow and DDPM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from maisi_tools.errors import InputError
from maisi_tools.training.diffusion import CONDITIONS, ConditionTensorsd, DiffusionBatch, latent_scale_factor

CPU = torch.device("cpu")
BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}


def flow(**settings) -> RFlowScheduler:
    return RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, **settings)


def batch(size: int = 3, grid: tuple[int, int, int] = (4, 6, 2)) -> dict[str, torch.Tensor]:
    """Latents of `size` samples with conditions that are nowhere zero, and a mask of labels 1 to 4."""
    return {
        "latent": torch.randn(size, 4, *grid),
        "top_region_index_tensor": torch.rand(size, 4) + 1,
        "bottom_region_index_tensor": torch.rand(size, 4) + 1,
        "spacing_tensor": torch.rand(size, 3) + 1,
        "class_labels": torch.arange(1, size + 1),
        "mask": torch.randint(1, 5, (size, 1, *(4 * n for n in grid))).float(),
    }


@pytest.mark.parametrize("scheduler", [flow(), flow(use_timestep_transform=True, base_img_size_numel=4096)])
def test_rectified_flow_interpolates_and_asks_for_the_velocity(scheduler):
    given = batch(64)
    noisy, target, args, keywords = DiffusionBatch(scheduler, scale_factor=1.5)(given, CPU)
    data = 1.5 * given["latent"].numpy()
    noise = data - target.numpy()
    share = keywords["timesteps"].numpy().reshape(-1, 1, 1, 1, 1) / 1000
    np.testing.assert_allclose(noisy.numpy(), (1 - share) * data + share * noise, atol=1e-5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert args == () and 0 <= share.min() < 0.2 and 0.8 < share.max() <= 1


def test_ddpm_adds_noise_by_its_schedule_and_asks_for_it():
    given = batch(64)
    scheduler = DDPMScheduler(num_train_timesteps=1000, **BETAS)
    noisy, noise, _, keywords = DiffusionBatch(scheduler, scale_factor=0.5)(given, CPU)
    timesteps = keywords["timesteps"].numpy()
    assert timesteps.dtype == np.int64 and 0 <= timesteps.min() < 200 and 800 < timesteps.max() < 1000
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[timesteps].reshape(-1, 1, 1, 1, 1)
    data = 0.5 * given["latent"].numpy()
    np.testing.assert_allclose(noisy.numpy(), kept**0.5 * data + (1 - kept) ** 0.5 * noise.numpy(), atol=1e-4)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_a_batch_follows_the_seed_and_leaves_its_input_alone():
    given = batch()
    before = {name: value.clone() for name, value in given.items()}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(DiffusionBatch(flow(), 2.0)(given, CPU)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_conditions_are_kept_dropped_or_dropped_together():
    given = batch(40)
    kept = DiffusionBatch(flow(), 1.0, condition_dropout=0.0)(given, CPU)[3]
    dropped = DiffusionBatch(flow(), 1.0, condition_dropout=1.0)(given, CPU)[3]
    half = DiffusionBatch(flow(), 1.0, condition_dropout=0.5)(given, CPU)[3]
    rows = half["class_labels"] > 0
    assert 5 < int(rows.sum()) < 35
    for name in CONDITIONS:
        assert kept[name].dtype == dropped[name].dtype == given[name].dtype
        assert torch.equal(kept[name], given[name]) and not dropped[name].any()
        assert torch.equal(half[name][rows], given[name][rows]) and not half[name][~rows].any()


def test_with_a_mask_the_noisy_latent_is_a_keyword():
    given = batch()
    torch.manual_seed(1)
    noisy, target, _, plain = DiffusionBatch(flow(), 1.0)(given, CPU)
    torch.manual_seed(1)
    mask, same_target, args, keywords = DiffusionBatch(flow(), 1.0, mask_key="mask")(given, CPU)
    assert torch.equal(mask, given["mask"]) and args == ()
    assert torch.equal(keywords["latent"], noisy) and torch.equal(same_target, target)
    assert set(keywords) == {*plain, "latent"}


def test_label_weights_are_averaged_over_a_latent_voxel():
    given = batch(2, (2, 3, 2))
    prepare = DiffusionBatch(flow(), 1.0, mask_key="mask", label_weights={"3": 100, 4: 0.5})  # JSON keys are text
    target, weight = prepare(given, CPU)[1]
    voxels = np.select([given["mask"] == 3, given["mask"] == 4], [100.0, 0.5], 1.0)
    expected = voxels.reshape(2, 1, 2, 4, 3, 4, 2, 4).mean(axis=(3, 5, 7))
    assert target.shape == given["latent"].shape
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5)


def test_conditions_are_read_from_the_sidecar():
    sidecar = {"spacing": [0.75, 0.75, 3.0], "region": ["chest", "abdomen"], "modality": "ct_contrast"}
    latent = MetaTensor(torch.zeros(4, 4, 4, 4), meta={"sidecar": sidecar})
    data = ConditionTensorsd("latent", condition_scale=100)({"latent": latent, "other": 1})
    assert data["top_region_index_tensor"].tolist() == [0, 100, 0, 0]
    assert data["bottom_region_index_tensor"].tolist() == [0, 0, 100, 0]
    assert data["spacing_tensor"].tolist() == [75, 75, 300]
    assert int(data["class_labels"]) == 3 and data["other"] == 1 and data["latent"] is latent


def test_sidecar_without_region_and_modality_is_an_unknown_region_of_a_ct():
    latent = MetaTensor(torch.zeros(4, 4, 4, 4), meta={"sidecar": {"spacing": [1, 1, 1]}})
    data = ConditionTensorsd("latent", 1.0)({"latent": latent})
    assert not data["top_region_index_tensor"].any() and not data["bottom_region_index_tensor"].any()
    assert int(data["class_labels"]) == 1
    latent.meta["sidecar"]["spacing"] = [1, 0, 1]
    with pytest.raises(InputError, match="spacing"):
        ConditionTensorsd("latent", 1.0)({"latent": latent})


def test_scale_factor_is_one_over_the_standard_deviation():
    """Of all voxels together, also of latents of different sizes and far from zero, where single precision cancels."""
    rng = np.random.default_rng(0)
    arrays = [(rng.normal(1000 + i, 0.3, (4, 3 + i, 5, 6))).astype(np.float32) for i in range(4)]
    expected = 1 / np.concatenate([array.astype(float).ravel() for array in arrays]).std()
    assert latent_scale_factor([torch.from_numpy(array) for array in arrays]) == pytest.approx(expected, rel=1e-9)
    assert latent_scale_factor([torch.tensor([-2.0, 2.0])]) == 0.5
