"""Batches of the diffusion stages against the formulae of rectified flow and DDPM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from maisi_tools.errors import InputError
from maisi_tools.training.diffusion import (
    CONDITIONS,
    ConditionTensorsd,
    DiffusionBatch,
    body_scale_factor,
    latent_scale_factor,
)

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
        "draw": torch.arange(size),
        "mask": torch.randint(1, 5, (size, 1, *(4 * n for n in grid))).float(),
    }


@pytest.mark.parametrize("scheduler", [flow(), flow(use_timestep_transform=True, base_img_size_numel=4096)])
def test_rectified_flow_interpolates_and_asks_for_the_velocity(scheduler):
    given = batch(64)
    noisy, target, args, keywords = DiffusionBatch(scheduler, 1.5, seed=0)(given, CPU)
    data = 1.5 * given["latent"].numpy()
    noise = data - target.numpy()
    share = keywords["timesteps"].numpy().reshape(-1, 1, 1, 1, 1) / 1000
    np.testing.assert_allclose(noisy.numpy(), (1 - share) * data + share * noise, atol=1e-5)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert args == () and 0 <= share.min() < 0.2 and 0.8 < share.max() <= 1


def test_ddpm_adds_noise_by_its_schedule_and_asks_for_it():
    given = batch(64)
    scheduler = DDPMScheduler(num_train_timesteps=1000, **BETAS)
    noisy, noise, _, keywords = DiffusionBatch(scheduler, 0.5, seed=0)(given, CPU)
    timesteps = keywords["timesteps"].numpy()
    assert timesteps.dtype == np.int64 and 0 <= timesteps.min() < 200 and 800 < timesteps.max() < 1000
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[timesteps].reshape(-1, 1, 1, 1, 1)
    data = 0.5 * given["latent"].numpy()
    np.testing.assert_allclose(noisy.numpy(), kept**0.5 * data + (1 - kept) ** 0.5 * noise.numpy(), atol=1e-4)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_a_sample_follows_the_seed_and_its_number_and_leaves_all_else_alone():
    given = batch(4)
    before = {name: value.clone() for name, value in given.items()}
    state = torch.get_rng_state()
    whole = DiffusionBatch(flow(), 2.0, seed=5)(given, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(given[name], before[name]) for name in before)
    half = DiffusionBatch(flow(), 2.0, seed=5)({name: value[2:] for name, value in given.items()}, CPU)
    assert torch.equal(half[0], whole[0][2:]) and torch.equal(half[3]["timesteps"], whole[3]["timesteps"][2:])
    other = DiffusionBatch(flow(), 2.0, seed=6)(given, CPU)
    renumbered = DiffusionBatch(flow(), 2.0, seed=5)({**given, "draw": given["draw"] + 1}, CPU)
    assert not torch.equal(other[0], whole[0]) and not torch.equal(renumbered[0], whole[0])
    noise = whole[1] - 2 * given["latent"]
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.3  # each sample has its own


def test_logit_normal_timesteps_have_their_distribution():
    """Esser et al. 2024, section 3.1: logit(t) is normal, so t has median 1/2 and quartiles 1 / (1 + exp(-+0.6745))."""
    prepare = DiffusionBatch(flow(sample_method="logit-normal"), 1.0, seed=0)
    share = prepare(batch(2000, (1, 1, 1)), CPU)[3]["timesteps"] / 1000
    quartiles = np.quantile(share.numpy(), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.3375, 0.5, 0.6625], atol=0.025)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weights_in_closed_form(kind):
    """Hang et al. 2023: min(SNR, g) on the sample is min(SNR, g) / SNR on the noise, / (SNR + 1) on v."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=kind, **BETAS)
    given = batch(64, (1, 2, 1))
    _, target, _, keywords = DiffusionBatch(scheduler, 1.0, seed=0, min_snr_gamma=5)(given, CPU)
    kept = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)[keywords["timesteps"].numpy()]
    snr = kept / (1 - kept)
    clipped = np.minimum(snr, 5)
    assert (clipped < snr).any() and (clipped == snr).any()
    expected = {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[kind]
    assert target.weight.shape == (64, 1, 1, 1, 1)
    np.testing.assert_allclose(target.weight.flatten().numpy(), expected, rtol=1e-3)
    if kind == "sample":
        assert torch.equal(target.value, given["latent"])


def test_min_snr_is_refused_for_rectified_flow():
    with pytest.raises(InputError, match="min_snr_gamma is 5, but rectified flow .* logit-normal"):
        DiffusionBatch(flow(), 1.0, seed=0, min_snr_gamma=5)


def test_modalities_become_more_general_or_unknown():
    given = batch(10, (1, 1, 1)) | {"class_labels": torch.tensor([1, 2, 3, 4, 8, 9, 29, 33, 34, 127])}
    labels = DiffusionBatch(flow(), 1.0, seed=0, modality_coarsening=1)(given, CPU)[3]["class_labels"]
    assert labels.tolist() == [1, 1, 1, 4, 8, 8, 8, 8, 34, 127] and labels.dtype == torch.int64
    keywords = DiffusionBatch(flow(), 1.0, seed=0, modality_dropout=1)(given, CPU)[3]
    assert not keywords["class_labels"].any() and torch.equal(keywords["spacing_tensor"], given["spacing_tensor"])
    many = batch(1000, (1, 1, 1)) | {"class_labels": torch.full((1000,), 3)}
    labels = DiffusionBatch(flow(), 1.0, seed=0, modality_coarsening=0.1, modality_dropout=0.1)(many, CPU)[3]
    shares = labels["class_labels"].bincount(minlength=4) / 1000
    np.testing.assert_allclose(shares, [0.1, 0.09, 0, 0.81], atol=0.04)


def test_conditions_are_kept_dropped_or_dropped_together():
    given = batch(40)
    kept = DiffusionBatch(flow(), 1.0, seed=0, condition_dropout=0.0)(given, CPU)[3]
    dropped = DiffusionBatch(flow(), 1.0, seed=0, condition_dropout=1.0)(given, CPU)[3]
    half = DiffusionBatch(flow(), 1.0, seed=0, condition_dropout=0.5)(given, CPU)[3]
    rows = half["class_labels"] > 0
    assert 5 < int(rows.sum()) < 35
    for name in CONDITIONS:
        assert kept[name].dtype == dropped[name].dtype == given[name].dtype
        assert torch.equal(kept[name], given[name]) and not dropped[name].any()
        assert torch.equal(half[name][rows], given[name][rows]) and not half[name][~rows].any()


def test_with_a_mask_the_noisy_latent_is_a_keyword():
    given = batch()
    noisy, target, _, plain = DiffusionBatch(flow(), 1.0, seed=0)(given, CPU)
    mask, same_target, args, keywords = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask")(given, CPU)
    assert torch.equal(mask, given["mask"]) and args == ()
    assert torch.equal(keywords["latent"], noisy) and torch.equal(same_target, target)
    assert set(keywords) == {*plain, "latent"}


def test_masks_are_dropped_as_a_whole():
    given = batch(40, (1, 1, 1))
    mask = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask", mask_dropout=0.5)(given, CPU)[0]
    kept = mask.flatten(1).any(1)
    assert 5 < int(kept.sum()) < 35 and torch.equal(mask[kept], given["mask"][kept])


def test_what_is_dropped_is_drawn_each_for_itself():
    """Conditions, modality, coarsening, mask and control: no two of them by the same number."""
    given = batch(1000, (1, 1, 1)) | {"class_labels": torch.full((1000,), 3)}
    chances = {"condition_dropout": 0.5, "modality_coarsening": 0.5, "mask_dropout": 0.5, "control_dropout": 0.5}

    def dropped(**chance: float) -> dict[str, torch.Tensor]:
        mask, _, _, keywords = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask", **chance)(given, CPU)
        labels, kept = keywords["class_labels"], torch.ones(1000)
        return {
            "condition_dropout": keywords["spacing_tensor"].any(1) == 0,
            "modality_coarsening": labels == 1,
            "modality_dropout": labels == 0,
            "mask_dropout": mask.flatten(1).any(1) == 0,
            "control_dropout": keywords.get("conditioning_scale", kept).flatten() == 0,
        }

    alone = {name: dropped(**{name: chance})[name] for name, chance in chances.items()}
    alone["modality_dropout"] = dropped(modality_dropout=0.5)["modality_dropout"]
    together = torch.stack(list(alone.values())).double()
    assert together.mean(1).tolist() == pytest.approx([0.5] * 5, abs=0.05)
    assert together.corrcoef().fill_diagonal_(0).abs().max() < 0.115  # 3.6 standard deviations of chance
    all_at_once = dropped(**chances)
    for name in ("condition_dropout", "mask_dropout", "control_dropout"):
        assert torch.equal(all_at_once[name], alone[name]), name


def test_a_batch_with_a_contrast_label_is_doubled_with_the_label_replaced():
    given = batch(2, (2, 2, 2))
    given["mask"][:] = 1
    given["mask"][0, 0, 5, 1, 2] = 26
    prepare = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask", contrast_labels={"26": 1})
    mask, target, _, keywords = prepare(given, CPU)
    assert torch.equal(mask[:2], given["mask"]) and (mask[2:] == 1).all() and len(mask) == 4
    assert all(torch.equal(value[:2], value[2:]) for value in keywords.values())
    assert target.region.nonzero().tolist() == [[0, 0, 1, 0, 0]] and (target.weight == 1).all()
    given["mask"][:] = 1
    mask, target, _, _ = prepare(given, CPU)
    assert len(mask) == 2 and isinstance(target, torch.Tensor)


def test_labels_of_weights_and_contrasts_may_have_names():
    named = {"label_weights": {"liver": 2, "26": 100}, "contrast_labels": {"hepatic tumor": "liver"}}
    prepare = DiffusionBatch(flow(), 1.0, 0, mask_key="mask", **named)
    assert prepare.label_weights == {1: 2.0, 26: 100.0} and prepare.contrast_labels == {26: 1}
    for weight in ("much", None, -1, float("nan")):
        with pytest.raises(InputError, match="label_weights of liver is .*; allowed is a number from 0 on"):
            DiffusionBatch(flow(), 1.0, 0, mask_key="mask", label_weights={"liver": weight})


def test_label_weights_are_averaged_over_a_latent_voxel():
    given = batch(2, (2, 3, 2))
    prepare = DiffusionBatch(
        flow(), 1.0, seed=0, mask_key="mask", label_weights={"3": 100, 4: 0.5}
    )  # JSON keys are text
    target, weight, region = prepare(given, CPU)[1]
    voxels = np.select([given["mask"] == 3, given["mask"] == 4], [100.0, 0.5], 1.0)
    expected = voxels.reshape(2, 1, 2, 4, 3, 4, 2, 4).mean(axis=(3, 5, 7))
    assert target.shape == given["latent"].shape and region is None
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5)


def test_control_dropout_leaves_the_residuals_out_and_changes_nothing_else():
    given = batch(200, (2, 2, 2))
    _, target, _, keywords = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask")(given, CPU)
    assert "conditioning_scale" not in keywords
    _, same, _, dropped = DiffusionBatch(flow(), 1.0, seed=0, mask_key="mask", control_dropout=0.25)(given, CPU)
    scale = dropped.pop("conditioning_scale")
    assert scale.shape == (200, 1, 1, 1, 1) and set(scale.unique().tolist()) == {0.0, 1.0}
    assert (scale == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(target, same) and all(torch.equal(keywords[name], value) for name, value in dropped.items())


def test_conditions_are_read_from_the_sidecar():
    sidecar = {"factor": 2, "spacing": [0.75, 0.75, 3.0], "region": ["chest", "abdomen"], "modality": "ct_contrast"}
    latent = MetaTensor(torch.zeros(4, 4, 4, 4), meta={"sidecar": sidecar})
    data = ConditionTensorsd("latent", condition_scale=100)({"latent": latent, "other": 1})
    assert data["top_region_index_tensor"].tolist() == [0, 100, 0, 0]
    assert data["bottom_region_index_tensor"].tolist() == [0, 0, 100, 0]
    assert data["spacing_tensor"].tolist() == [75, 75, 300]
    assert int(data["class_labels"]) == 3 and data["other"] == 1 and data["latent"] is latent


def test_the_region_of_what_is_drawn_from_a_mask_is_the_masks():
    """As drawing has it (MaskToCT), of the labels that the network sees, whatever the sidecar says."""
    sidecar = {"factor": 2, "spacing": [1, 1, 1], "region": ["chest", "abdomen"]}
    mask = torch.zeros(1, 8, 8, 8)
    mask[0, 0], mask[0, 1] = 200, 120
    given = {"latent": MetaTensor(torch.zeros(4, 4, 4, 4), meta={"sidecar": sidecar}), "mask": mask}
    data = ConditionTensorsd("latent", 1.0, mask_key="mask")(given)
    assert data["top_region_index_tensor"].tolist() == data["bottom_region_index_tensor"].tolist() == [1, 0, 0, 0]
    mask[0, 2] = 28  # a lung
    data = ConditionTensorsd("latent", 1.0, mask_key="mask")(given)
    assert data["bottom_region_index_tensor"].tolist() == [0, 1, 0, 0]


def test_sidecar_without_region_and_modality_is_an_unknown_region_of_a_ct():
    latent = MetaTensor(torch.zeros(4, 4, 4, 4), meta={"sidecar": {"factor": 4, "spacing": [1, 1, 1]}})
    data = ConditionTensorsd("latent", 1.0)({"latent": latent})
    assert not data["top_region_index_tensor"].any() and not data["bottom_region_index_tensor"].any()
    assert int(data["class_labels"]) == 1
    latent.meta["sidecar"]["spacing"] = [1, 0, 1]
    with pytest.raises(InputError, match="spacing"):
        ConditionTensorsd("latent", 1.0)({"latent": latent})


def test_scale_factor_inside_the_body_leaves_out_air_and_the_channels_means():
    rng = np.random.default_rng(0)
    mask = np.zeros((1, 20, 16, 12))
    mask[:, 4:17, 2:14, 2:10] = 200  # in cells of two voxels 2 to 7 along the first axis; the last one is half body
    latent = rng.normal(size=(4, 10, 8, 6)) * 2.5 + np.array([5, 0, -3, 1]).reshape(4, 1, 1, 1)
    latent[0, :2] = -40
    inside = latent[:, 2:8, 1:7, 1:5].reshape(4, -1)
    sample = {"latent": torch.as_tensor(latent), "mask": torch.as_tensor(mask)}
    assert body_scale_factor([sample]) == pytest.approx(1 / np.sqrt(inside.var(1).mean()), rel=1e-6)
    assert body_scale_factor([sample, sample]) == pytest.approx(body_scale_factor([sample]), rel=1e-9)
    with pytest.raises(InputError, match="no cell of the latents lies in a body"):
        body_scale_factor([{**sample, "mask": torch.zeros(1, 20, 16, 12)}])


def test_scale_factor_is_one_over_the_standard_deviation():
    """Of all voxels together, also of latents of different sizes and far from zero, where single precision cancels."""
    rng = np.random.default_rng(0)
    arrays = [(rng.normal(1000 + i, 0.3, (4, 3 + i, 5, 6))).astype(np.float32) for i in range(4)]
    expected = 1 / np.concatenate([array.astype(float).ravel() for array in arrays]).std()
    assert latent_scale_factor([torch.from_numpy(array) for array in arrays]) == pytest.approx(expected, rel=1e-9)
    assert latent_scale_factor([torch.tensor([-2.0, 2.0])]) == 0.5
