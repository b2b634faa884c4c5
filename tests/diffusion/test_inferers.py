"""Stages 1 to 3 as inferers, with the smallest real networks, against their formulae written out."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler

from maisi_tools.diffusion.autoencoder import DecodeInferer, EncodeInferer, LatentDecoder
from maisi_tools.diffusion.conditions import Conditions
from maisi_tools.diffusion.inferers import LatentSampler, MaskToCT
from maisi_tools.diffusion.noise import DrawNoised
from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import BODY, label_id
from maisi_tools.tsp import MemoryLimitError
from maisi_tools.tsp.inferer import TSPInferer

STEPS = 2
TIMES = (1000.0, 500.0)
SKULL, LUNG, LIVER, TUMOR = map(label_id, ("skull", "left lung upper lobe", "liver", "hepatic tumor"))


def flow() -> RFlowScheduler:
    return RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)


def ddpm() -> DDPMScheduler:
    settings = {"schedule": "scaled_linear_beta", "beta_start": 0.01, "beta_end": 0.3, "clip_sample": False}
    return DDPMScheduler(num_train_timesteps=STEPS, **settings)


@pytest.fixture
def decoder(tiny_autoencoder) -> LatentDecoder:
    return LatentDecoder(tiny_autoencoder, scale_factor=0.8)


@pytest.fixture
def steering(tiny_controlled):
    """A controlled network as after some training: its zero convolutions are no longer zero."""
    for name, parameter in tiny_controlled.controlnet.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(parameter, std=0.3)
    return tiny_controlled


class Watched:
    """A controlled network that notes what it is asked for."""

    def __init__(self, network) -> None:
        self.network, self.factor = network, network.factor
        self.masks, self.embeddings, self.conditions = [], [], []

    def embed(self, mask):
        self.masks.append(mask)
        return self.network.embed(mask)

    def denoise(self, latent, embedding, timesteps, scale, **conditions):
        self.embeddings.append(embedding)
        self.conditions.append(conditions)
        return self.network.denoise(latent, embedding, timesteps, scale, **conditions)


# Stage 1


def test_encoder_sees_the_edge_padded_image(tiny_autoencoder):
    image = torch.rand(2, 1, 10, 16, 5)
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), (0, 6), (0, 0), (0, 11)], "edge"))
    with torch.no_grad():
        torch.testing.assert_close(EncodeInferer(16)(image, tiny_autoencoder), tiny_autoencoder.encode(padded)[0])
    assert EncodeInferer()(image, tiny_autoencoder).shape == (2, 4, 3, 4, 2)


def test_decoders_divide_by_the_scale_factor(tiny_autoencoder, decoder):
    latent = torch.randn(2, 4, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(decoder(latent), tiny_autoencoder.decode(latent / 0.8))
        torch.testing.assert_close(DecodeInferer()(latent, tiny_autoencoder), tiny_autoencoder.decode(latent))


# Stage 2


def sampler(decoder, scheduler=None, **settings) -> LatentSampler:
    conditions = Conditions(size=(16, 8, 24), spacing=(1.0, 1.5, 2.0), region="chest", modality="ct_contrast")
    settings = {"condition_scale": 10.0, "progress": False, **settings}
    return LatentSampler(decoder, scheduler or flow(), STEPS, conditions, **settings)


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_latent_sampler_is_euler_steps_and_a_decoder(tiny_unet, tiny_autoencoder, decoder, guidance_scale):
    noise = torch.randn(1, 4, 4, 2, 6)
    output = sampler(decoder, guidance_scale=guidance_scale, return_latent=True)(noise, tiny_unet)
    given = {
        "top_region_index_tensor": torch.tensor([[0.0, 10, 0, 0]]),
        "spacing_tensor": torch.tensor([[10.0, 15, 20]]),
    }
    expected = noise
    with torch.no_grad():
        for time in TIMES:
            velocity = tiny_unet(expected, torch.tensor([time]), **given, class_labels=torch.tensor([3]))
            if guidance_scale:
                base = tiny_unet(expected, torch.tensor([time]), **given, class_labels=torch.tensor([0]))
                velocity = base + guidance_scale * (velocity - base)
            expected = expected + velocity / STEPS
        torch.testing.assert_close(output["latent"], expected)
        torch.testing.assert_close(output["ct"], tiny_autoencoder.decode(expected / 0.8))
        assert torch.equal(sampler(decoder, guidance_scale=guidance_scale)(noise, tiny_unet), output["ct"])


@pytest.mark.parametrize("scheduler", [flow, ddpm])
def test_samples_do_not_depend_on_their_batch(tiny_unet, decoder, scheduler):
    noise = torch.randn(2, 4, 4, 2, 6)
    inferer = sampler(decoder, scheduler())
    together = inferer(noise, tiny_unet, seeds=[4, 5])
    for i, seed in enumerate((4, 5)):
        assert torch.equal(together[i : i + 1], inferer(noise[i : i + 1], tiny_unet, seeds=[seed]))
    affine = torch.eye(4, dtype=torch.float64)
    batch = list_data_collate([MetaTensor(one, affine=affine) for one in noise])
    from_meta = inferer(batch, tiny_unet, seeds=torch.tensor([4, 5]))
    assert type(from_meta) is torch.Tensor and torch.equal(from_meta, together)


def test_seeds_feed_ddpm_alone(tiny_unet, decoder):
    noise = torch.randn(1, 4, 4, 2, 6)
    for scheduler, matters in ((flow, False), (ddpm, True)):
        first, other = (sampler(decoder, scheduler())(noise, tiny_unet, seeds=[seed]) for seed in (1, 2))
        assert torch.equal(first, other) is not matters
    assert torch.equal(
        sampler(decoder, ddpm())(noise, tiny_unet), sampler(decoder, ddpm())(noise, tiny_unet, seeds=[0])
    )


def test_ddpm_does_not_add_the_initial_noise_again(decoder):
    """With a network that predicts no noise, the first step adds to the initial noise something independent of it."""
    noise = Conditions(size=(64, 64, 64), spacing=(1, 1, 1), seed=5).noise(4)[None]
    seen = []

    def network(x, t, **conditions):
        seen.append(x.flatten())
        return torch.zeros_like(x)

    sampler(decoder, ddpm())(noise, network, seeds=[5])
    share = seen[1] @ seen[0] / (seen[0] @ seen[0])
    assert (seen[1] - share * seen[0]).std() > 0.05  # rounding alone, were it the initial noise


def test_the_coarse_ct_and_the_steps_are_of_the_noises_own_seed(tiny_unet, decoder):
    """Collated, sliced or alone, without being told; noise that has no seed takes the conditions'."""
    drawn = []
    inferer = sampler(decoder, ddpm(), coarse=lambda conditions, seed: drawn.append(seed) or torch.zeros(1, 1, 4, 4, 4))
    network = lambda x, t, **conditions: tiny_unet(x[:, :4], t, **conditions)  # noqa: E731
    draw = DrawNoised("image", inferer.conditions, 1.0, 4)
    items = [draw({"name": name, "seed": seed})["image"] for name, seed in (("a", 4), ("b", 2**62))]
    batch = list_data_collate(items)
    told = inferer(batch, network, seeds=[4, 2**62])
    assert torch.equal(inferer(batch, network), told)
    for i in range(2):
        assert torch.equal(inferer(batch[i : i + 1], network), told[i : i + 1])
        assert torch.equal(inferer(items[i][None], network), told[i : i + 1])
    inferer(batch.as_tensor(), network)
    inferer.seed = 7
    inferer(MetaTensor(batch.as_tensor()), network)
    assert drawn == [4, 2**62] * 2 + [4, 4, 2**62, 2**62, 0, 0, 7, 7]


def test_as_many_seeds_as_samples(tiny_unet, decoder):
    noise = torch.randn(2, 4, 4, 2, 6)
    with pytest.raises(ValueError, match="2 samples have 1 seeds; collate with MONAI's list_data_collate"):
        sampler(decoder)(noise, tiny_unet, seeds=[1])
    with pytest.raises(ValueError, match="2 samples have 1 seeds"):  # as torch.stack leaves the first one's meta
        sampler(decoder)(MetaTensor(noise, meta={"seed": 1}), tiny_unet)


# Stage 3


def mask_of(size=(16, 24, 8), label=SKULL, spacing=(1.0, 2.0, 3.0)) -> MetaTensor:
    """A block of body with a smaller block of `label` in it, one voxel of air around: (1, 1, *size)."""
    mask = torch.zeros(1, 1, *size)
    mask[..., 1:-1, 1:-1, 1:-1] = BODY
    mask[..., 3:-3, 3:-3, 2:-2] = label
    return MetaTensor(mask, affine=torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)))


def mask_to_ct(decoder, **settings) -> MaskToCT:
    return MaskToCT(decoder, flow(), STEPS, **{"multiple": 8, "condition_scale": 10.0, "progress": False, **settings})


def test_mask_to_ct_is_euler_steps_of_the_controlled_network(steering, tiny_autoencoder, decoder):
    mask = mask_of()
    ct = mask_to_ct(decoder, seed=11, control_scale=0.7)(mask, steering)
    latent = torch.randn(4, 4, 6, 2, generator=torch.Generator().manual_seed(11))[None]
    given = {
        "top_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),  # the skull shows the head
        "spacing_tensor": torch.tensor([[10.0, 20, 30]]),
        "class_labels": torch.tensor([1]),
    }
    plain = mask.as_tensor()
    with torch.no_grad():
        for time in TIMES:
            velocity = steering(plain, latent, torch.tensor([time]), conditioning_scale=0.7, **given)
            latent = latent + velocity / STEPS
        expected = tiny_autoencoder.decode(latent / 0.8)
    assert type(ct) is torch.Tensor
    torch.testing.assert_close(ct, torch.where(plain == 0, 0.0, expected))


def test_a_decoder_that_cannot_keep_to_its_limit_is_refused_before_a_step(tiny_controlled, tiny_autoencoder):
    called = []
    tiny_controlled.unet.register_forward_hook(lambda *_: called.append(1))
    noise, mask = torch.randn(1, 4, 4, 2, 6), mask_of()
    for limit, steps in (("1KiB", 0), ("8GiB", STEPS)):
        decoder = LatentDecoder(tiny_autoencoder, 0.8, TSPInferer(memory_limit=limit))
        for stage, inputs, network in ((sampler, noise, tiny_controlled.unet), (mask_to_ct, mask, tiny_controlled)):
            called.clear()
            with contextlib.nullcontext() if steps else pytest.raises(MemoryLimitError, match="limit of 1.0 KiB"):
                stage(decoder)(inputs, network)
            assert len(called) == steps


def test_mask_to_ct_takes_a_solver_and_guides_in_an_interval(steering, tiny_autoencoder, decoder):
    """Two Heun steps, at the timesteps 1000, 500 and 500 again: the first is guided, the others are not."""
    mask = mask_of()
    settings = {"solver": "heun", "guidance_scale": 3.0, "guidance_interval": (0.6, 1.0), "condition_scale": 10.0}
    ct = mask_to_ct(decoder, seed=11, **settings)(mask, steering)
    given = {
        "top_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),
        "spacing_tensor": torch.tensor([[10.0, 20, 30]]),
    }
    plain = mask.as_tensor()

    def velocity(latent, time, modality=1):
        classes = torch.tensor([modality])
        return steering(plain, latent, torch.tensor([time]), conditioning_scale=1.0, class_labels=classes, **given)

    latent = torch.randn(4, 4, 6, 2, generator=torch.Generator().manual_seed(11))[None]
    with torch.no_grad():
        without = velocity(latent, 1000.0, modality=0)
        start = without + 3 * (velocity(latent, 1000.0) - without)
        latent = latent + (start + velocity(latent + start / 2, 500.0)) / 4
        latent = latent + velocity(latent, 500.0) / 2
        expected = tiny_autoencoder.decode(latent / 0.8)
    torch.testing.assert_close(ct, torch.where(plain == 0, 0.0, expected))


def test_settings_are_checked_before_any_volume(decoder):
    wrong = ({"solver": "rk4"}, {"guidance_interval": (0.5, 2)}, {"scheduler": ddpm(), "solver": "ab2"})
    for make in (sampler, mask_to_ct):
        for settings in wrong if make is sampler else wrong[:2]:
            with pytest.raises(InputError, match="solver is|guidance_interval is"):
                make(decoder, **settings)
    with pytest.raises(InputError, match="--solver euler"):
        MaskToCT(decoder, ddpm(), STEPS, solver="heun")


@pytest.mark.parametrize("size", [(9, 14, 11), (8, 8, 8), (7, 6, 17)])
def test_any_size_is_kept_and_air_is_exactly_zero(steering, decoder, size):
    mask = mask_of(size)
    ct = mask_to_ct(decoder)(mask, steering)
    assert ct.shape == mask.shape and torch.isfinite(ct).all()
    outside = mask.as_tensor() == 0
    assert (ct[outside] == 0).all() and (ct[~outside] != 0).all()
    legal = [-(-n // 8) * 8 for n in size]
    padded = torch.zeros(1, 1, *legal)
    padded[..., : size[0], : size[1], : size[2]] = mask.as_tensor()
    whole = mask_to_ct(decoder)(MetaTensor(padded, affine=mask.affine), steering)
    assert torch.equal(ct, whole[..., : size[0], : size[1], : size[2]])


def test_a_mask_that_touches_the_border_goes_on_as_it_is(steering, decoder):
    """Padded by its edge: a body that the volume cuts does not end in air at a place of the padding's choice."""
    mask = torch.full((1, 1, 9, 14, 11), float(BODY))
    mask[..., 4:, :, 3:] = SKULL
    network = Watched(steering)
    mask_to_ct(decoder)(MetaTensor(mask, affine=torch.eye(4)), network)
    widths = [(0, 0), (0, 0), (0, 7), (0, 2), (0, 5)]
    assert np.array_equal(np.asarray(network.masks[0]), np.pad(mask.numpy(), widths, "edge"))


@pytest.mark.parametrize("guidance_scale", [0.0, 2.5])
def test_both_passes_of_guidance_have_the_control(steering, tiny_autoencoder, decoder, guidance_scale):
    """The unconditional pass goes without the modality alone; the mask and its weight are in both."""
    mask = mask_of()
    settings = {"control_scale": 0.6, "guidance_scale": guidance_scale, "guided_conditions": ("class_labels",)}
    ct = mask_to_ct(decoder, seed=4, **settings)(mask, steering)
    given = {
        "top_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),
        "bottom_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),
        "spacing_tensor": torch.tensor([[10.0, 20, 30]]),
    }
    latent = torch.randn(4, 4, 6, 2, generator=torch.Generator().manual_seed(4))[None]
    plain = mask.as_tensor()
    with torch.no_grad():
        for time in TIMES:
            with_class, without = (
                steering(
                    plain,
                    latent,
                    torch.tensor([time]),
                    conditioning_scale=0.6,
                    class_labels=torch.tensor([modality]),
                    **given,
                )
                for modality in (1, 0)
            )
            velocity = without + guidance_scale * (with_class - without) if guidance_scale else with_class
            latent = latent + velocity / STEPS
        expected = tiny_autoencoder.decode(latent / 0.8)
    torch.testing.assert_close(ct, torch.where(plain == 0, 0.0, expected))


def test_masks_do_not_depend_on_their_batch(steering, decoder):
    """Two masks that differ in labels, body region and spacing."""
    masks = [mask_of(), mask_of(label=LUNG, spacing=(3.0, 1.0, 2.0))]
    batch = list_data_collate([mask[0] for mask in masks])
    together = mask_to_ct(decoder)(batch, steering)
    for i, mask in enumerate(masks):
        assert torch.equal(together[i : i + 1], mask_to_ct(decoder)(mask, steering))
    assert not torch.equal(together[0], together[1])


def test_spacing_is_read_from_any_affine_or_given(steering, decoder, caplog):
    network = Watched(steering)
    mask = mask_of()
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = torch.tensor([[0.0, -1.6, 0], [0.6, 0, -2.4], [-0.8, 0, -1.8]])  # columns of length 1, 1.6, 3
    oblique = MetaTensor(mask.as_tensor(), affine=affine)
    both = MetaTensor(torch.cat([mask.as_tensor()] * 2), affine=affine)  # one affine for two masks
    for inputs in (mask, oblique, both):
        mask_to_ct(decoder)(inputs, network)
        assert bool(caplog.records) is (inputs is both)
    assert "2 masks have one affine, and all are taken to have its spacing, 1 x 1.6 x 3 mm" in caplog.text
    mask_to_ct(decoder, spacing=(4.0, 5.0, 6.0))(mask, network)
    expected = [[10.0, 20, 30]] + 3 * [[10.0, 16, 30]] + [[40.0, 50, 60]]
    seen = torch.cat([conditions["spacing_tensor"] for conditions in network.conditions[::STEPS]])
    torch.testing.assert_close(seen, torch.tensor(expected))
    with pytest.raises(ValueError, match="no affine to read its spacing from"):
        mask_to_ct(decoder)(mask.as_tensor(), steering)


def test_a_mask_is_embedded_once_for_all_steps_passes_and_draws(steering, decoder):
    network = Watched(steering)
    inferer = mask_to_ct(decoder, guidance_scale=1.5)
    batch = torch.cat([mask_of().as_tensor(), mask_of(label=LUNG).as_tensor()])
    for draw in inferer.draws(MetaTensor(batch, affine=torch.eye(4)), network):
        assert not torch.equal(draw(0), draw(1))
    assert len(network.masks) == 2 and len(network.embeddings) == 2 * 2 * 2 * STEPS
    first, second = network.embeddings[: 4 * STEPS], network.embeddings[4 * STEPS :]
    assert all(each is first[0] for each in first) and all(each is second[0] for each in second)


def test_seeds_and_the_mask_decide(steering, decoder):
    mask = mask_of()
    first, again, other = (mask_to_ct(decoder, seed=seed)(mask, steering) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, mask_to_ct(decoder)(mask_of(label=BODY), steering))


def test_labels_the_weights_do_not_know_are_merged_for_the_network_alone(steering, decoder):
    """Liver becomes body, which tells no region; the air is still that of the mask as given."""
    keep = {"keep_labels": [SKULL, BODY], "merge_labels": {"bone": SKULL}}
    network = Watched(steering)
    mask = mask_of(label=LIVER)
    ct = mask_to_ct(decoder, **keep)(mask, network)
    assert torch.equal(torch.as_tensor(network.masks[0]), mask_of(label=BODY).as_tensor())
    assert len(network.conditions) == STEPS
    for conditions in network.conditions:
        assert conditions["top_region_index_tensor"].tolist() == [[0, 0, 0, 0]]
    assert (ct[mask.as_tensor() == 0] == 0).all()


def test_guidance_needs_conditions_that_were_dropped_in_training(decoder):
    with pytest.raises(InputError, match="guidance_scale is 2"):
        mask_to_ct(decoder, guidance_scale=2.0, guided_conditions=[])


def mask_with_lesion() -> tuple[MetaTensor, torch.Tensor]:
    """A liver with a tumour in it; and the same without."""
    mask = mask_of(label=LIVER)
    healthy = mask.as_tensor().clone()
    mask[..., 6:9, 10:14, 3:5] = TUMOR
    return mask, healthy


def test_guidance_by_lesions_is_the_difference_to_the_healthy_mask(steering, tiny_autoencoder, decoder):
    mask, healthy = mask_with_lesion()
    settings = {"guidance_scale": 3.0, "guided_conditions": ["lesions"], "condition_scale": 10.0}
    ct = mask_to_ct(decoder, seed=11, **settings)(mask, steering)
    given = {
        "top_region_index_tensor": torch.tensor([[0.0, 0, 10, 0]]),  # the liver shows the abdomen
        "spacing_tensor": torch.tensor([[10.0, 20, 30]]),
        "class_labels": torch.tensor([1]),  # the modality stays: that is another condition
    }
    latent = torch.randn(4, 4, 6, 2, generator=torch.Generator().manual_seed(11))[None]
    with torch.no_grad():
        for time in TIMES:
            velocities = [
                steering(labels, latent, torch.tensor([time]), conditioning_scale=1.0, **given)
                for labels in (mask.as_tensor(), healthy)
            ]
            assert not torch.equal(*velocities)
            latent = latent + (velocities[1] + 3 * (velocities[0] - velocities[1])) / STEPS
        expected = tiny_autoencoder.decode(latent / 0.8)
    torch.testing.assert_close(ct, torch.where(mask.as_tensor() == 0, 0.0, expected), atol=2e-5, rtol=1e-4)


def test_guidance_by_lesions_without_one_is_none(steering, decoder, caplog):
    """Also where the weights know the lesion as what is around it. One pass a step, and it is said."""
    mask, healthy = mask_with_lesion()
    plain = MetaTensor(healthy, affine=mask.affine)
    guided_by = {"seed": 11, "guidance_scale": 3.0, "guided_conditions": ["lesions"]}
    for labels, more in ((plain, {}), (mask, {"keep_labels": [BODY], "merge_labels": {}})):
        watched = Watched(steering)
        ct = mask_to_ct(decoder, **guided_by, **more)(labels, watched)
        assert len(watched.embeddings) == STEPS and "no lesion" in caplog.text
        assert torch.equal(ct, mask_to_ct(decoder, seed=11, **more)(labels, steering))
        caplog.clear()


def test_guidance_by_the_mask_is_the_difference_to_the_unet_alone(steering, tiny_autoencoder, decoder):
    mask = mask_of()
    settings = {"control_scale": 0.6, "guidance_scale": 2.5, "guided_conditions": ["mask"]}
    ct = mask_to_ct(decoder, seed=4, **settings)(mask, steering)
    given = {
        "top_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),
        "bottom_region_index_tensor": torch.tensor([[10.0, 0, 0, 0]]),
        "spacing_tensor": torch.tensor([[10.0, 20, 30]]),
        "class_labels": torch.tensor([1]),
    }
    latent = torch.randn(4, 4, 6, 2, generator=torch.Generator().manual_seed(4))[None]
    plain = mask.as_tensor()
    with torch.no_grad():
        for time in TIMES:
            steered = steering(plain, latent, torch.tensor([time]), conditioning_scale=0.6, **given)
            alone = steering.unet(latent, torch.tensor([time]), **given)
            assert not torch.equal(steered, alone)
            latent = latent + (alone + 2.5 * (steered - alone)) / STEPS
        expected = tiny_autoencoder.decode(latent / 0.8)
    torch.testing.assert_close(ct, torch.where(plain == 0, 0.0, expected), atol=2e-5, rtol=1e-4)


def test_guidance_by_the_mask_has_its_lesions(decoder):
    with pytest.raises(InputError, match="guided_conditions has mask and lesions; allowed is one of them"):
        mask_to_ct(decoder, guidance_scale=2.0, guided_conditions=["lesions", "mask"])


@pytest.mark.parametrize("of_mask", ["lesions", "mask"])
def test_stage_2_has_no_mask_to_guide_by(decoder, of_mask):
    with pytest.raises(InputError, match=f"guided_conditions has {of_mask}; allowed is a list of top_region"):
        sampler(decoder, guidance_scale=2.0, guided_conditions=[of_mask])


def test_what_guides_is_known_and_in_a_list(decoder):
    with pytest.raises(InputError, match="allowed is a list of .*class_labels, mask, lesions"):
        mask_to_ct(decoder, guidance_scale=2.0, guided_conditions=["tumors"])
    with pytest.raises(InputError, match="guided_conditions has lesions"):
        mask_to_ct(decoder, guidance_scale=2.0, guided_conditions="lesions")
