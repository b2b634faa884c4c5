"""The bundles' networks compute what MONAI's do, and keep their parameter names."""

from __future__ import annotations

import pytest
import torch
from maisi_tools.masks.bits import label_bits
from maisi_tools.networks import Autoencoder, ControlledUNet, DiffusionUNet
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

VAE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_channels": [8, 8, 16],
    "num_res_blocks": [1, 1, 1],
    "norm_num_groups": 4,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
    "use_checkpointing": False,
    "use_convtranspose": False,
    "norm_float16": False,
    "num_splits": 1,
    "dim_split": 1,
    "save_mem": False,
}
LEVELS = {
    "spatial_dims": 3,
    "in_channels": 4,
    "num_channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "num_res_blocks": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 128,
}
UNET = {**LEVELS, "out_channels": 4, "include_spacing_input": True, "include_top_region_index_input": True}


def controlled() -> ControlledUNet:
    torch.manual_seed(0)
    control = ControlNetMaisi(
        **LEVELS, conditioning_embedding_in_channels=8, conditioning_embedding_num_channels=[8, 8, 8]
    )
    unet = DiffusionUNet(**UNET)
    torch.nn.init.normal_(unet.out[-1].conv.weight, std=0.1)  # MONAI starts it at zero
    return ControlledUNet(unet, control)


def test_native_norms_change_nothing():
    torch.manual_seed(0)
    ours, theirs = Autoencoder(**VAE).eval(), AutoencoderKlMaisi(**VAE).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 1, 16, 20, 12) * 3 + 5
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(x)[0])
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
    reconstruction, mean, sigma = ours.train()(x)
    assert reconstruction.shape == x.shape and mean.shape == sigma.shape == (1, 4, 4, 5, 3)


def test_unet_with_all_conditions_equals_monais():
    torch.manual_seed(0)
    ours, theirs = DiffusionUNet(**UNET).eval(), DiffusionModelUNetMaisi(**UNET).eval()
    torch.nn.init.normal_(ours.out[-1].conv.weight)
    theirs.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 4, 4, 4, 4), torch.tensor([3.0, 700.0])
    given = {
        "top_region_index_tensor": torch.eye(4)[:2],
        "spacing_tensor": torch.rand(2, 3),
        "class_labels": torch.tensor([1, 8]),
    }
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, **given), theirs(x, t, **given))
        # a condition this network has no input for is ignored, one that is left out is null
        extra = torch.ones(2, 4)
        torch.testing.assert_close(ours(x, t, **given, bottom_region_index_tensor=extra), theirs(x, t, **given))
        null = {"top_region_index_tensor": torch.zeros(2, 4), "spacing_tensor": torch.zeros(2, 3)}
        expected = theirs(x, torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long), **null)
        torch.testing.assert_close(ours(x), expected)


def test_untrained_control_changes_nothing_and_trained_control_does():
    network = controlled().eval()
    mask, x, t = torch.randint(0, 256, (1, 1, 16, 16, 16)).float(), torch.randn(1, 4, 4, 4, 4), torch.tensor([500.0])
    spacing = torch.ones(1, 3)
    with torch.no_grad():
        base = network.unet(x, t, spacing_tensor=spacing)
        torch.testing.assert_close(network(mask, x, t, spacing_tensor=spacing), base)
        for parameter in network.controlnet.controlnet_down_blocks.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        steered = network(mask, x, t, spacing_tensor=spacing)
        assert (steered - base).abs().max() > 1e-3
        torch.testing.assert_close(network(mask, x, t, conditioning_scale=0.0, spacing_tensor=spacing), base)


def test_only_the_control_is_trained():
    network = controlled()
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"controlnet"}


@pytest.mark.parametrize("value", [0, 1, 2, 120, 132, 200, 255])
def test_label_bits_are_little_endian(value):
    import numpy as np

    bits = label_bits(torch.full((1, 1, 2, 2, 2), float(value)))
    expected = np.unpackbits(np.uint8(value), bitorder="little")
    assert bits.shape == (1, 8, 2, 2, 2) and bits[0, :, 0, 0, 0].tolist() == expected.tolist()
