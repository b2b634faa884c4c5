"""An autoencoder that starts linear is the principal components of its training data, before any step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from maisi_tools.errors import InputError
from maisi_tools.networks import Autoencoder
from maisi_tools.training.linear_start import (
    BODY,
    _cropped,
    check_init,
    fit_linear_code,
    levels_of,
    start,
    start_linear,
)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Bodies (1, D, H, W) of smooth texture with air around, in [0, 1]; one size is odd."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[-1:1:40j, -1:1:33j, -1:1:40j]
    body = x**2 + y**2 + z**2 < 0.8
    texture = [gaussian_filter(rng.normal(size=body.shape), 1.5) for _ in range(3)]
    return [np.where(body, 0.5 + 0.8 * each, 0).clip(0, 1).astype(np.float32)[None] for each in texture]


def autoencoder(settings: dict, channels: list[int], blocks: list[int], groups: int = 4, **changes) -> Autoencoder:
    torch.manual_seed(0)
    levels = {
        "num_channels": channels,
        "num_res_blocks": blocks,
        "attention_levels": [False] * len(channels),
        "norm_num_groups": groups,
        "use_convtranspose": True,
    }
    return Autoencoder(**settings["vae"] | levels | changes)


def principal_components(images: list[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean inside the body, and leading components about it of the 2x2x2 blocks that touch the body, by an SVD."""
    blocks = []
    for image in images:
        cells = np.lib.stride_tricks.sliding_window_view(_cropped(image, 2), (2, 2, 2))[::2, ::2, ::2].reshape(-1, 8)
        blocks.append(cells[(cells > BODY).any(1)])
    values = np.concatenate(blocks).astype(np.float64)
    mean = values[(values > BODY).all(1)].mean()
    return mean, np.linalg.svd(values - mean, full_matrices=False)[2][:count]


SHAPES = [([16, 32], [1, 2], 4), ([16, 16], [1, 1], 4), ([8, 12, 16], [1, 1, 1], 2), ([16, 32, 64, 64], [1] * 4, 4)]


@pytest.mark.parametrize(("channels", "blocks", "groups"), SHAPES)
def test_the_network_is_its_linear_code(tiny_settings, images, channels, blocks, groups):
    """On one image, whose group statistics are those measured, to rounding."""
    network = autoencoder(tiny_settings, channels, blocks, groups)
    start_linear(network, images[:1])
    network.eval()
    image = _cropped(images[0], network.factor)
    code = fit_linear_code(levels_of(network), 4, [image], seed=0)
    with torch.no_grad():
        latent, sigma = network.encode(torch.as_tensor(image)[None, None])
        decoded = network.decode(latent)
    np.testing.assert_allclose(latent[0].numpy(), code.encode(image), atol=2e-4)
    np.testing.assert_allclose(decoded[0, 0].numpy(), code.decode(code.encode(image)), atol=2e-4)
    torch.testing.assert_close(sigma, torch.full_like(sigma, float(np.exp(-3))))


def test_two_levels_are_the_principal_components(tiny_settings, images):
    network = autoencoder(tiny_settings, [16, 32], [1, 2])
    start_linear(network, images)
    network.eval()
    mean, components = principal_components(images, 4)
    for image in images:
        image = _cropped(image, 2)
        d, h, w = (n // 2 for n in image.shape)
        cells = image.reshape(d, 2, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 8)
        kept = (cells - mean) @ components.T @ components + mean
        expected = kept.reshape(d, h, w, 2, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(image.shape)
        with torch.no_grad():
            got = network(torch.as_tensor(image)[None, None])[0, 0].numpy()
        body = image > BODY
        error = np.sqrt(np.mean((got - image)[body] ** 2)), np.sqrt(np.mean((expected - image)[body] ** 2))
        assert error[0] == pytest.approx(error[1], rel=0.01)


def test_latents_are_white_inside_the_body(tiny_settings, images):
    network = autoencoder(tiny_settings, [16, 32], [1, 1])
    start_linear(network, images)
    inside = []
    for image in images:
        image = _cropped(image, 2)
        d, h, w = (n // 2 for n in image.shape)
        cells = image.reshape(d, 2, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(d, h, w, 8)
        with torch.no_grad():
            latent = network.eval().encode(torch.as_tensor(image)[None, None])[0][0]
        inside.append(latent[:, torch.as_tensor((cells > BODY).all(-1))])
    np.testing.assert_allclose(torch.cat(inside, 1).std(1).numpy(), 1, atol=0.03)


def test_every_weight_can_learn(tiny_settings, images):
    """After a step off the start, no convolution is without a gradient: nothing is stuck at zero."""
    network = autoencoder(tiny_settings, [16, 32], [1, 2])
    start_linear(network, images[:1])
    network.train()
    image = torch.as_tensor(_cropped(images[0], 2))[None, None]
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        reconstruction, mean, sigma = network(image)
        ((reconstruction - image).square().mean() + 1e-4 * (mean.square() + sigma).mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    still = [name for name, p in network.named_parameters() if p.ndim == 5 and not p.grad.any()]
    assert still == []


def test_one_start_is_given():
    check_init(None, "model.pt")
    check_init("linear")
    with pytest.raises(InputError, match="init is 'nonsense'; allowed are null"):
        check_init("nonsense", "model.pt")
    with pytest.raises(InputError, match="init is 'linear' and init_ckpt model.pt; allowed is one start"):
        check_init("linear", "model.pt")


def test_start_is_chosen_by_name(tiny_settings, images):
    network = autoencoder(tiny_settings, [16, 32], [1, 1])
    drawn = {name: value.clone() for name, value in network.state_dict().items()}
    assert start(None, network, images) is network
    assert all(torch.equal(value, drawn[name]) for name, value in network.state_dict().items())
    start("linear", network, images)
    assert not all(torch.equal(value, drawn[name]) for name, value in network.state_dict().items())
    with pytest.raises(InputError, match="init is 'pca'; allowed are null .* and 'linear'"):
        start("pca", network, images)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_convtranspose": False}, "use_convtranspose false"),
        ({"attention_levels": [False, True]}, "attention"),
        ({"with_encoder_nonlocal_attn": True}, "attention"),
        ({"norm_num_groups": 8}, "2 channels in a norm's group .at least 4"),
        ({"latent_channels": 9}, "9 latent channels but room for 8"),
    ],
)
def test_networks_that_cannot_are_refused(tiny_settings, images, changes, said):
    network = autoencoder(tiny_settings, [16, 32], [1, 1], **changes)
    with pytest.raises(
        InputError, match=f"with .*{said}.* cannot start as a linear code; change it, or leave out init"
    ):
        start_linear(network, images)


def test_images_without_a_body_are_refused(tiny_settings):
    with pytest.raises(
        InputError, match="none of 2 training images has blocks of 2 voxels a side that lie in the body"
    ):
        start_linear(autoencoder(tiny_settings, [16, 32], [1, 1]), [np.zeros((1, 8, 8, 8), np.float32)] * 2)
