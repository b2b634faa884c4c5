from __future__ import annotations

import pytest
import torch

from maisi_tools.mask_generator.network import MaskUNet
from maisi_tools.tsp.inferer import TSPInferer

MASK_UNET = {
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 3,
}


def test_embedded_sizes_start_as_no_change_and_the_releases_names_stay():
    """What is added to the release's mask network is named ``class_embedding`` and adds nothing until it is trained."""
    torch.manual_seed(0)
    plain = MaskUNet(**MASK_UNET).eval()
    for parameter in plain.parameters():  # MONAI starts the ends of residual blocks with zeros
        torch.nn.init.normal_(parameter, std=0.1)
    embedding = MaskUNet(**MASK_UNET, embed_sizes=True).eval()
    missing, unexpected = embedding.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"class_embedding"}
    x, timesteps, sizes = torch.randn(2, 4, 8, 8, 8), torch.tensor([100.0, 900.0]), torch.rand(2, 3)
    with torch.no_grad():
        before = embedding(x, timesteps, organ_sizes=sizes)
        torch.testing.assert_close(before, plain(x, timesteps, organ_sizes=sizes))
        torch.nn.init.normal_(embedding.class_embedding[2].weight)
        assert not torch.allclose(embedding(x, timesteps, organ_sizes=sizes), before, atol=1e-3)
        assert embedding(x).shape == x.shape


@pytest.fixture
def mask_unet() -> MaskUNet:
    """With a prior of noise around 2, in a canvas of 8 x 4 x 8."""
    torch.manual_seed(0)
    network = MaskUNet(**MASK_UNET, embed_sizes=True, prior_components=2, prior_until=0.8, latent_size=[8, 4, 8])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    samples = [{"latent": torch.randn(4, 8, 4, 8) + 2, "organ_sizes": torch.rand(3)} for _ in range(6)]
    return network.fit_prior(samples, 1.0).eval()


def test_above_its_share_of_noise_the_priors_velocity_is_taken(mask_unet):
    x, sizes = torch.randn(3, 4, 8, 4, 8), torch.rand(3, 3)
    with torch.no_grad():
        velocity = mask_unet(x, torch.tensor([950.0, 500.0, 810.0]), organ_sizes=sizes)
        for i, share in ((0, 0.95), (2, 0.81)):
            expected = mask_unet.prior(x[i : i + 1], torch.tensor([share]), sizes[i : i + 1])
            # to x + share * velocity the flow would go in one step: what is expected under the noise
            torch.testing.assert_close(x[i : i + 1] + share * velocity[i : i + 1], expected, atol=1e-4, rtol=1e-4)
            alone = mask_unet(x[i : i + 1], torch.tensor([share * 1000]), organ_sizes=sizes[i : i + 1])
            torch.testing.assert_close(alone, velocity[i : i + 1], atol=1e-4, rtol=1e-4)
        middle = mask_unet(x[1:2], torch.tensor([500.0]), organ_sizes=sizes[1:2])
        torch.testing.assert_close(middle, velocity[1:2], atol=1e-4, rtol=1e-4)
        trained = mask_unet.train()(x[:1], torch.tensor([950.0]), organ_sizes=sizes[:1])
        assert not torch.allclose(trained, velocity[:1], atol=1e-2)


@pytest.mark.parametrize("timestep", [950.0, 500.0])
def test_the_mask_unet_with_its_prior_in_slabs(mask_unet, timestep):
    x, sizes, timesteps = torch.randn(1, 4, 8, 4, 8), torch.rand(1, 3), torch.tensor([timestep])
    with torch.no_grad():
        whole = mask_unet(x, timesteps, organ_sizes=sizes)
        torch.testing.assert_close(
            TSPInferer(splits=2)(x, mask_unet, timesteps, organ_sizes=sizes), whole, atol=1e-4, rtol=1e-4
        )
        half = TSPInferer(splits=2, dtype="bfloat16")(x, mask_unet, timesteps, organ_sizes=sizes)
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()


def test_a_prior_is_kept_with_the_weights(mask_unet):
    other = MaskUNet(**MASK_UNET, embed_sizes=True, prior_components=2, prior_until=0.8, latent_size=[8, 4, 8]).eval()
    other.load_state_dict(mask_unet.state_dict())
    x = torch.randn(1, 4, 8, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x, torch.tensor([900.0])), mask_unet(x, torch.tensor([900.0])))
