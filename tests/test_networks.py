"""The bundles' networks compute what MONAI's do, and keep their parameter names."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiConvolution,
    MaisiGroupNorm3D,
)
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

from maisi_tools.errors import InputError
from maisi_tools.masks.bits import label_bits
from maisi_tools.networks import (
    Autoencoder,
    ControlledUNet,
    ControlNet,
    DiffusionUNet,
    agreed_factor,
    checkpoint_blocks,
)
from maisi_tools.weights import encoder_fingerprint, save_weights


def test_plain_layers_change_nothing(tiny_settings):
    torch.manual_seed(0)
    settings = tiny_settings["vae"]
    ours, theirs = Autoencoder(**settings).eval(), AutoencoderKlMaisi(**settings).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    kinds = {type(module) for module in ours.modules()}
    assert MaisiConvolution not in kinds and MaisiGroupNorm3D not in kinds
    x = torch.rand(1, 1, 16, 20, 12) * 3 + 5
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(x)[0])
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)
    reconstruction, mean, sigma = ours.train()(x)
    assert reconstruction.shape == x.shape and mean.shape == sigma.shape == (1, 4, 4, 5, 3)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(ours(x, noise)[0], ours.decode(mean + noise * sigma))


def test_convolutions_that_are_to_be_split_stay(tiny_settings):
    network = Autoencoder(**{**tiny_settings["vae"], "num_splits": 2})
    assert MaisiConvolution in {type(module) for module in network.modules()}
    assert list(network.state_dict()) == list(Autoencoder(**tiny_settings["vae"]).state_dict())


def test_recomputed_blocks_have_the_same_gradients_and_copies_of_their_own(tiny_settings):
    torch.manual_seed(0)
    plain = Autoencoder(**tiny_settings["vae"]).train()
    leaner = checkpoint_blocks(deepcopy(plain))
    kept = {}
    for name, network in (("plain", plain), ("leaner", leaner)):
        seen: dict[int, int] = {}

        def note(x, seen=seen):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        keep = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
        torch.manual_seed(1)
        with keep:
            output = network(torch.linspace(0, 1, 16**3).reshape(1, 1, 16, 16, 16))
        kept[name] = sum(seen.values())
        sum(part.pow(2).mean() for part in output).backward()
    for one, other in zip(plain.parameters(), leaner.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert kept["leaner"] < kept["plain"] / 3
    # an average of the weights is a copy: its blocks run its own weights
    copied = deepcopy(leaner).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(torch.rand(1, 1, 8, 8, 8)).any()
        assert leaner.eval()(torch.rand(1, 1, 8, 8, 8)).any()


def test_unet_with_all_conditions_equals_monais(tiny_settings, tiny_unet):
    ours, theirs = tiny_unet, DiffusionModelUNetMaisi(**tiny_settings["unet"]).eval()
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
        # each of them matters
        for name in given:
            assert not torch.allclose(ours(x, t, **{**given, name: torch.zeros_like(given[name])}), ours(x, t, **given))


def test_untrained_control_changes_nothing_and_trained_control_does(tiny_controlled):
    network = tiny_controlled
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


def test_a_mask_embedded_apart_steers_as_monais_control_net(tiny_settings, tiny_controlled):
    """Apart or not is the same to the bit; MONAI's is so to rounding, since a CPU may choose another kernel for it."""
    network, theirs = tiny_controlled, ControlNetMaisi(**tiny_settings["controlnet"]).eval()
    for parameter in network.controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(network.controlnet.state_dict())
    mask, x, t = torch.randint(0, 256, (2, 1, 16, 16, 16)).float(), torch.randn(2, 4, 4, 4, 4), torch.tensor([5.0, 500])
    given, classes = {"spacing_tensor": torch.rand(2, 3)}, torch.tensor([1, 8])
    with torch.no_grad():
        down, middle = theirs(x, t, label_bits(mask), conditioning_scale=1.3, class_labels=classes)
        expected = network.unet(
            x,
            t,
            class_labels=classes,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
            **given,
        )
        embedding = network.embed(mask)
        apart = network.denoise(x, embedding, t, 1.3, classes, **given)
        assert torch.equal(network(mask, x, t, 1.3, classes, **given), apart)
        torch.testing.assert_close(apart, expected, atol=1e-4, rtol=1e-5)
        assert (network.denoise(x, embedding * 0, t, 1.3, classes, **given) - expected).abs().max() > 0.01


def test_monais_control_net_is_refused_with_what_to_name(tiny_settings, tiny_unet):
    with pytest.raises(InputError, match="ControlNetMaisi; allowed is maisi_tools.networks.ControlNet"):
        ControlledUNet(tiny_unet, ControlNetMaisi(**tiny_settings["controlnet"]))


def test_only_the_control_is_trained(tiny_controlled):
    network = tiny_controlled
    trained = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {"controlnet"}


@pytest.mark.parametrize("value", [0, 1, 2, 120, 132, 200, 255])
def test_label_bits_are_little_endian(value):
    import numpy as np

    bits = label_bits(torch.full((1, 1, 2, 2, 2), float(value)))
    expected = np.unpackbits(np.uint8(value), bitorder="little")
    assert bits.shape == (1, 8, 2, 2, 2) and bits[0, :, 0, 0, 0].tolist() == expected.tolist()


def test_recomputed_activations_give_the_same_gradients_and_copies_are_their_own(tiny_controlled):
    plain, recomputed = tiny_controlled, checkpoint_blocks(deepcopy(tiny_controlled))
    copied = deepcopy(recomputed)
    x, t, mask = torch.randn(1, 4, 4, 4, 4), torch.tensor([500.0]), torch.randint(0, 256, (1, 1, 16, 16, 16)).float()
    calls: list[torch.nn.Module] = []
    for network in (plain, recomputed, copied):
        network.controlnet.down_blocks[0].resnets[0].register_forward_hook(lambda module, *_: calls.append(module))
        network(mask, x, t, spacing_tensor=torch.ones(1, 3)).pow(2).sum().backward()
    first = [network.controlnet.down_blocks[0].resnets[0] for network in (plain, recomputed, copied)]
    assert [calls.count(module) for module in first] == [1, 2, 2]  # forward, and again on the way back
    for name, parameter in plain.controlnet.named_parameters():
        for other in (recomputed, copied):
            torch.testing.assert_close(other.controlnet.get_parameter(name).grad, parameter.grad)
    with pytest.raises(ValueError, match="no blocks"):
        checkpoint_blocks(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("levels", "embedding"), [(1, [8]), (2, [8, 8]), (3, [8, 16, 8]), (4, [8, 8, 8, 8])])
def test_the_factor_follows_from_the_networks(tiny_settings, levels, embedding):
    per_level = {"num_channels": [8] * levels, "num_res_blocks": [1] * levels, "attention_levels": [False] * levels}
    autoencoder = Autoencoder(**tiny_settings["vae"] | per_level).eval()
    settings = tiny_settings["controlnet"] | {"conditioning_embedding_num_channels": embedding}
    controlled = ControlledUNet(DiffusionUNet(**tiny_settings["unet"]), ControlNet(**settings)).eval()
    factor = 2 ** (levels - 1)
    assert autoencoder.factor == controlled.factor == factor
    with torch.no_grad():
        latent = autoencoder.encode(torch.zeros(1, 1, 16, 16, 32))[0]
        assert latent.shape[2:] == (16 // factor, 16 // factor, 32 // factor)
        assert controlled(torch.zeros(1, 1, 16, 16, 32)).shape == latent.shape


def test_networks_and_weights_of_several_factors_are_refused_with_all_values(
    tiny_settings, tiny_autoencoder, tiny_controlled, tmp_path
):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    unread = tmp_path / "autoencoder.pt"  # says nothing of itself
    save_weights(unread, {"a": torch.zeros(1)})
    save_weights(old, {"a": torch.zeros(1)})  # before factors were recorded all were 4
    save_weights(new, {"a": torch.zeros(1)}, factor=2)
    assert agreed_factor(tiny_autoencoder, unread) == agreed_factor(tiny_autoencoder, unread, old, tiny_controlled) == 4
    per_level = {"num_channels": [8, 8], "num_res_blocks": [1, 1], "attention_levels": [False, False]}
    fine = Autoencoder(**tiny_settings["vae"] | per_level)
    assert agreed_factor(fine, unread, new) == 2
    with pytest.raises(InputError, match=r"the autoencoder 2, weights .*old\.pt 4; allowed is one for all"):
        agreed_factor(fine, unread, old)
    with pytest.raises(InputError, match="the autoencoder 2, weights .* 2, the ControlNet's mask embedding 4"):
        agreed_factor(fine, unread, [new], tiny_controlled)


def test_weights_for_another_encoder_are_refused_and_another_decoder_is_not(tiny_autoencoder, tmp_path):
    """Of the same factor and channels, it would decode to noise, and nothing else would tell."""
    state = tiny_autoencoder.state_dict()
    own, decoder, other, weights = (tmp_path / f"{name}.pt" for name in ("own", "decoder", "other", "weights"))
    save_weights(own, state)
    save_weights(decoder, {name: value + name.startswith("decoder.") for name, value in state.items()})
    save_weights(other, {name: value + name.startswith("encoder.") for name, value in state.items()})
    save_weights(weights, {"a": torch.zeros(1)}, factor=4, autoencoder=encoder_fingerprint(own))
    assert agreed_factor(tiny_autoencoder, own, weights) == agreed_factor(tiny_autoencoder, decoder, weights) == 4
    with pytest.raises(InputError, match=r"weights\.pt were trained on latents of an autoencoder .*other\.pt has"):
        agreed_factor(tiny_autoencoder, other, weights)


def test_any_of_the_weights_that_were_trained_with_other_settings_is_refused(tiny_autoencoder, tmp_path):
    own, unet, controlnet = (tmp_path / f"{name}.pt" for name in ("autoencoder", "unet", "controlnet"))
    save_weights(own, {"a": torch.zeros(1)}, shared={"classes": [0, 18, 20]})
    save_weights(controlnet, {"a": torch.zeros(1)}, shared={"process": "rectified flow"})
    save_weights(unet, {"a": torch.zeros(1)}, shared={"process": "ddpm, epsilon"})
    flow = {"process": "rectified flow", "keep_labels": [1]}
    assert agreed_factor(tiny_autoencoder, own, controlnet, shared=flow | {"classes": [0, 18, 20]}) == 4
    with pytest.raises(InputError, match=r"autoencoder\.pt do not fit these settings: classes is \[0, 20, 18\], they"):
        agreed_factor(tiny_autoencoder, own, controlnet, shared=flow | {"classes": [0, 20, 18]})
    with pytest.raises(InputError, match=r"unet\.pt do not fit these settings: process is 'rectified flow', they were"):
        agreed_factor(tiny_autoencoder, own, [controlnet, unet], shared=flow)


def test_residuals_are_added_as_monais_network_adds_them(tiny_settings, tiny_unet):
    """Out of place here, in place there: to the skips, and the last of them to what goes on to the middle block."""
    theirs = DiffusionModelUNetMaisi(**tiny_settings["unet"]).eval()
    theirs.load_state_dict(tiny_unet.state_dict())
    x, timesteps = torch.randn(2, 4, 8, 8, 16), torch.tensor([100.0, 700.0])
    given = {
        "class_labels": torch.tensor([1, 2]),
        "top_region_index_tensor": torch.rand(2, 4),
        "spacing_tensor": torch.rand(2, 3),
    }
    shapes: list[torch.Size] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: shapes.extend(one.shape for one in out[1]))
        for block in theirs.down_blocks
    ]
    with torch.no_grad():
        plain = theirs(x, timesteps, **given)
        for hook in hooks:
            hook.remove()
        first = torch.Size((2, tiny_settings["unet"]["num_channels"][0], *x.shape[2:]))
        residuals = tuple(torch.randn(shape) for shape in (first, *shapes))
        middle = torch.randn(shapes[-1])
        more = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
        found = tiny_unet(x, timesteps, **given, **more)
        expected = theirs(
            x,
            timesteps,
            **given,
            down_block_additional_residuals=tuple(one.clone() for one in residuals),
            mid_block_additional_residual=middle.clone(),
        )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1


def test_a_controlnet_takes_what_is_not_given_from_its_unet(tiny_settings):
    settings = {**tiny_settings["unet"], "resblock_updown": True}
    unet = DiffusionUNet(**settings)
    embedding = {"conditioning_embedding_num_channels": [8, 8, 8]}
    network = ControlledUNet(unet, embedding)
    by_hand = ControlNet(**{**tiny_settings["controlnet"], **embedding, "resblock_updown": True})
    shapes = {name: value.shape for name, value in network.controlnet.state_dict().items()}
    assert shapes == {name: value.shape for name, value in by_hand.state_dict().items()}
    other = ControlledUNet(unet, {**embedding, "norm_num_groups": 8}).controlnet
    assert {m.num_groups for m in other.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}


def test_networks_of_what_never_varies_are_those_with_all_of_it(tiny_settings):
    """The shapes of networks built from the arguments that vary are those of MONAI's from all of them."""
    vae = tiny_settings["vae"]
    short = Autoencoder(**{key: vae[key] for key in ("num_channels", "num_res_blocks", "norm_num_groups")})
    assert {k: v.shape for k, v in short.state_dict().items()} == {
        k: v.shape for k, v in AutoencoderKlMaisi(**vae).state_dict().items()
    }
    common = {"spatial_dims", "in_channels", "out_channels"}
    unet = tiny_settings["unet"]
    short_unet = DiffusionUNet(**{key: value for key, value in unet.items() if key not in common})
    assert {k: v.shape for k, v in short_unet.state_dict().items()} == {
        k: v.shape for k, v in DiffusionModelUNetMaisi(**unet).state_dict().items()
    }
