"""Starts an autoencoder as the best linear code of the training data, instead of at noise.

A network with usual initial weights spends its first hours on learning what linear algebra gives at once. Here the
weights of MAISI's architecture, as it is, are set so that the network *is* a linear code before its first step: the
principal components of blocks of body voxels. The idea is that of DC-AE's shortcuts around the sampling layers
(arXiv 2410.10733), used as an initialisation. What is non-linear starts as nothing and is learned from there.

- Residual blocks start as the identity: their second convolution is zero. Where the number of channels changes, their
  1x1 shortcut routes the channels that carry the code.
- A downsampling convolution sees the whole 2x2x2 block of the values below it, so its first channels are these eight
  times as many values, or their leading principal components where channels are fewer.
- A group norm stands before the last convolution of either half and would lose the values' size. Each of its groups
  therefore gets three constant channels (2, -2 and 0) beside its data, which fix its statistics but for a per mille,
  and the last convolution takes the difference from the channel that is 0, times the measured standard deviation.
- The encoder's last convolution gives the leading components of blocks that touch the body, each scaled to variance 1
  over blocks that lie in it: the step from air to skin would make soft tissue small. So latents come out white inside
  the body, and the scale factor of the stages behind is 1.
- The decoder's upsampling convolutions are transposed and paint a block with the components. One that interpolates
  cannot put different values into neighbouring voxels.

All other weights keep the values they were drawn with, so that there is something to learn from.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import MaisiDownsample, MaisiResBlock, MaisiUpsample
from torch import Tensor, nn

from maisi_tools.errors import InputError
from maisi_tools.networks import Autoencoder

BODY = 0.05
"""A voxel counts as body above this in [0, 1]: -900 HU of a CT."""
CONSTANTS = (2.0, -2.0, 0.0)
"""Values of the channels that fix a group's statistics."""
REST = 0.2
"""Size to which the decoder's last norm brings the channels that do not carry the image yet; of a body's HU, in [0, 1],
the deviation is about that. At size 1 their many weights, which Adam moves together, shake the image at every step."""
BLOCKS_PER_IMAGE = 5000
"""Drawn from each image; for 8 numbers a block this is plenty."""
MEASURED_IMAGES = 12
"""Whole images on which the group norms' statistics are measured."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LinearCode:
    """A linear code: ``components levels[-1] ... levels[0] (image - mean) / deviations``, block by block.

    Attributes:
        mean: of the voxels of blocks that lie in the body, the same for all places of a block, because a network has
            one bias for them.
        levels: for each level a matrix (values here, 8 * values below) with orthonormal rows, finest first, from 2x2x2
            blocks of the values below to the values here; its transpose leads back. A block's values are ordered by
            position (depth, height, width; the last one fastest), then by channel.
        components: (latent channels, values of the last level), orthonormal rows, in the order of their variance.
        deviations: (latent channels), standard deviations of the components over blocks that lie in the body.
    """

    mean: float
    levels: tuple[np.ndarray, ...]
    components: np.ndarray
    deviations: np.ndarray

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Latent (C, d, h, w) of an image (D, H, W) in [0, 1] whose sizes are multiples of the factor."""
        values = image[None].astype(np.float64) - self.mean
        for level in self.levels:
            c, d, h, w = values.shape
            split = values.reshape(c, d // 2, 2, h // 2, 2, w // 2, 2).transpose(2, 4, 6, 0, 1, 3, 5)
            values = np.tensordot(level, split.reshape(8 * c, d // 2, h // 2, w // 2), 1)
        return np.tensordot(self.components / self.deviations[:, None], values, 1)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Image (D, H, W) of a latent (C, d, h, w)."""
        values = np.tensordot((self.components * self.deviations[:, None]).T, latent.astype(np.float64), 1)
        for level in reversed(self.levels):
            blocks = np.tensordot(level.T, values, 1)
            channels, (d, h, w) = len(blocks) // 8, blocks.shape[1:]
            values = blocks.reshape(2, 2, 2, channels, d, h, w).transpose(3, 4, 0, 5, 1, 6, 2)
            values = values.reshape(channels, 2 * d, 2 * h, 2 * w)
        return values[0] + self.mean


def start_linear(network: Autoencoder, images: Iterable[Any], seed: int = 0) -> Autoencoder:
    """Set the weights of an autoencoder, in place, so that it is the linear code of ``images``, and return it.

    Args:
        network: with transposed convolutions, without attention, and with at least four channels in a norm's group.
        images: (1, D, H, W) in [0, 1], of the training data. Cropped at their end to multiples of the factor.
        seed: of the choice of blocks.

    Raises:
        InputError: a network that cannot start so, or images without a block of body.
    """
    _check(network)
    kept = [_cropped(image, 2 ** (len(_widths(network)) - 1)) for image in images]
    code = fit_linear_code(levels_of(network), network.latent_channels, kept, seed)
    measured = kept[:: max(1, len(kept) // MEASURED_IMAGES)][:MEASURED_IMAGES]
    write_code(network, code, [torch.as_tensor(image, dtype=torch.float32)[None, None] for image in measured])
    log.info(
        "linear start: %d images, deviations of the components %s", len(kept), np.round(code.deviations, 4).tolist()
    )
    return network


def fit_linear_code(sizes: Sequence[int], latent_channels: int, images: Sequence[np.ndarray], seed: int) -> LinearCode:
    """Principal components of the images' blocks that touch the body, level by level.

    Args:
        sizes: how many values each level keeps, finest first; at most eight times the level's before.
        latent_channels: how many components the code has.
        images: (D, H, W) in [0, 1], sizes multiples of 2 to the power of the levels.
        seed: of the choice of :data:`BLOCKS_PER_IMAGE` blocks of each image.

    Raises:
        InputError: no image has a block of which all voxels are body.
    """
    factor = 2 ** len(sizes)
    draw = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    for image in images:
        d, h, w = (n // factor for n in image.shape)
        cells = image.reshape(d, factor, h, factor, w, factor).transpose(0, 2, 4, 1, 3, 5).reshape(-1, *[factor] * 3)
        cells = cells[(cells > BODY).any((1, 2, 3))]
        found.append(cells[draw.permutation(len(cells))[:BLOCKS_PER_IMAGE]])
        inside.append(np.asarray((found[-1] > BODY).all((1, 2, 3))))
    if sum(map(np.sum, inside)) <= latent_channels:
        raise InputError(
            f"none of {len(found)} training images has blocks of {factor} voxels a side that lie in the body (above "
            "-900 HU), from which a linear start takes its components; give CTs of patients, or init null"
        )
    values = np.concatenate(found).astype(np.float64)[:, None]  # (blocks, channels, D, H, W)
    body = np.concatenate(inside)
    mean = float(values[body].mean())
    values -= mean
    levels = []
    for size in sizes:
        n, channels, d, h, w = values.shape
        split = values.reshape(n, channels, d // 2, 2, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 6, 3, 5, 7, 1)
        blocks = split.reshape(-1, 8 * channels)
        level = np.eye(size) if size == 8 * channels else _components(blocks, size)
        values = (blocks @ level.T).reshape(n, d // 2, h // 2, w // 2, size).transpose(0, 4, 1, 2, 3)
        levels.append(level)
    last = values.reshape(len(values), -1)
    components = _components(last, latent_channels)
    deviations = (last[body] @ components.T).std(0)
    return LinearCode(mean, tuple(levels), components, deviations)


def check_init(init: str | None, init_ckpt: str | Path | None = None) -> None:
    """Refuse a start that is none of :func:`start`'s, or one beside weights to start from.

    Raises:
        InputError: with what is allowed.
    """
    if init not in (None, "linear"):
        raise InputError(f"init is {init!r}; allowed are null (weights as drawn) and 'linear' (the best linear code)")
    if init is not None and init_ckpt is not None:
        raise InputError(f"init is {init!r} and init_ckpt {init_ckpt}; allowed is one start: leave out either")


def start(init: str | None, network: Autoencoder, images: Iterable[Any], seed: int = 0) -> Autoencoder:
    """The network as ``init`` says: None as its weights were drawn, "linear" by :func:`start_linear`.

    Raises:
        InputError: another ``init``.
    """
    check_init(init)
    return network if init is None else start_linear(network, images, seed)


@torch.no_grad()
def write_code(network: Autoencoder, code: LinearCode, images: Sequence[Tensor]) -> None:
    """Set the weights of an autoencoder, in place, so that it computes a linear code.

    Args:
        network: see :func:`start_linear`.
        code: with the values a level that the network has room for.
        images: (1, 1, D, H, W), on which the statistics of the two last group norms are measured.
    """
    encoder, decoder = _blocks(network.encoder), _blocks(network.decoder)
    for block in [*encoder, *decoder]:
        if isinstance(block, MaisiResBlock):
            _zero(_conv(block.conv2))
    _route(_conv(encoder[0]), 1)
    _write_encoder(encoder, code)
    _write_decoder(decoder, code)
    for conv in (network.quant_conv_mu, network.post_quant_conv):
        _zero(_conv(conv))
        _route(_conv(conv), network.latent_channels)
    _zero(_conv(network.quant_conv_log_sigma))
    _conv(network.quant_conv_log_sigma).bias.fill_(-6.0)

    was_training = network.training
    network.eval()
    places = _places(encoder[-2], code.components.shape[1])
    _write_last(encoder[-2], _conv(encoder[-1]), places, code.components / code.deviations[:, None])
    _measure_norm(encoder[-2], places, lambda: [network.encoder(image) for image in images])
    _write_last(decoder[-2], _conv(decoder[-1]), [0], np.ones((1, 1)))
    _measure_norm(decoder[-2], [0], lambda: [network.decode(network.encode(image)[0]) for image in images])
    decoder[-2].weight[decoder[-2].num_channels // decoder[-2].num_groups :] = REST
    network.train(was_training)


def _write_encoder(blocks: list[Any], code: LinearCode) -> None:
    downs = [at for at, block in enumerate(blocks) if isinstance(block, MaisiDownsample)]
    for number, (at, level) in enumerate(zip(downs, code.levels, strict=True)):
        conv = _conv(blocks[at].conv)
        size, below = len(level), level.shape[1] // 8
        _clear(conv, range(size))
        taps = level.reshape(size, 2, 2, 2, below).transpose(0, 4, 1, 2, 3)
        conv.weight[:size, :below, :2, :2, :2] = torch.as_tensor(taps).to(conv.weight)
        if number == 0:
            conv.bias[:size] = torch.as_tensor(-code.mean * level.sum(1)).to(conv.bias)
        last = at == downs[-1]
        places = _places(blocks[-2], size) if last else list(range(size))
        shortcut = _shortcut(blocks[at + 1])
        if shortcut is not None:
            _clear(shortcut, range(shortcut.out_channels) if last else places)
            for source, place in enumerate(places):
                shortcut.weight[place, source] = 1
        elif last:
            weight, bias = conv.weight[:size].clone(), conv.bias[:size].clone()
            _clear(conv, range(conv.out_channels))
            conv.weight[places], conv.bias[places] = weight, bias
        if last:
            _set_constants(conv if shortcut is None else shortcut, blocks[-2])


def _write_decoder(blocks: list[Any], code: LinearCode) -> None:
    _route(_conv(blocks[0]), len(code.components))
    ups = [at for at, block in enumerate(blocks) if isinstance(block, MaisiUpsample)]
    back = (code.components * code.deviations[:, None]).T  # (values of the last level, latent channels)
    norm = blocks[-2]
    for at, level in zip(ups, reversed(code.levels), strict=True):
        conv = _conv(blocks[at].conv)
        below = level.shape[1] // 8
        last = at == ups[-1]
        matrix = level.T @ back  # (8 * values below, values that come in)
        taps = matrix.reshape(2, 2, 2, below, -1).transpose(4, 3, 0, 1, 2)
        shortcut = _shortcut(blocks[at + 1])
        cleared = range(norm.num_channels // norm.num_groups if last else below)
        conv.weight[:, : len(cleared) if shortcut is None else below] = 0
        conv.bias[: len(cleared) if shortcut is None else below] = 0
        conv.weight[: matrix.shape[1], :below, 1:, 1:, 1:] = torch.as_tensor(taps.copy()).to(conv.weight)
        if last:
            conv.bias[0] = code.mean
        if shortcut is not None:
            _clear(shortcut, cleared)
            for place in range(below):
                shortcut.weight[place, place] = 1
        if last:
            _set_constants(conv if shortcut is None else shortcut, norm, groups=1)
        back = np.eye(below)


def _write_last(norm: nn.GroupNorm, conv: Any, places: Sequence[int], matrix: np.ndarray) -> None:
    """The convolution behind a norm: ``matrix (data - the group's zero channel)``."""
    group = norm.num_channels // norm.num_groups
    free = [c for c in range(norm.num_channels) if c % group < group - len(CONSTANTS) and c not in places]
    used = {place // group for place in places}
    learned = conv.weight.clone()
    conv.weight.zero_()
    for channel in free:
        if channel // group in used:  # zero so far, and so without effect; the weights let gradients through
            conv.weight[:, channel] = learned[:, channel]
    middle = conv.weight[:, :, 1, 1, 1]
    for column, place in enumerate(places):
        taken = torch.as_tensor(matrix[:, column]).to(middle)
        middle[:, place] += taken
        middle[:, (place // group + 1) * group - 1] -= taken
    conv.bias.zero_()


def _measure_norm(norm: nn.GroupNorm, places: Sequence[int], run: Callable[[], object]) -> None:
    """Let a norm give back what comes in, given the mean and deviation that its groups have over ``run``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        grouped = inputs[0].double().reshape(norm.num_groups, -1)
        seen.append((grouped.mean(1), grouped.var(1, correction=0)))

    hook = norm.register_forward_pre_hook(look)
    try:
        run()
    finally:
        hook.remove()
    mean = torch.stack([each[0] for each in seen]).mean(0)
    deviation = torch.stack([each[1] for each in seen]).add(norm.eps).sqrt().mean(0)
    group = norm.num_channels // norm.num_groups
    for index in {place // group for place in places}:
        channels = slice(index * group, (index + 1) * group)
        norm.weight[channels] = deviation[index].to(norm.weight)
        norm.bias[channels] = mean[index].to(norm.bias)
        # The constants are done with. Left alone, their many weights behind the norm would act as one bias that learns
        # a hundred times as fast as all else, and throw the network off its start.
        done = slice((index + 1) * group - len(CONSTANTS), (index + 1) * group - 1)
        norm.weight[done] = 0
        norm.bias[done] = 0


def _places(norm: nn.GroupNorm, size: int) -> list[int]:
    """Channels of ``size`` values before a norm, spread over its groups; a group's last three are the constants."""
    group = norm.num_channels // norm.num_groups
    return [(i % norm.num_groups) * group + i // norm.num_groups for i in range(size)]


def _set_constants(conv: Any, norm: nn.GroupNorm, groups: int | None = None) -> None:
    """Let the last channels of the norm's groups be constant, by the bias of the convolution that makes them."""
    group = norm.num_channels // norm.num_groups
    for index in range(norm.num_groups if groups is None else groups):
        conv.bias[(index + 1) * group - len(CONSTANTS) : (index + 1) * group] = torch.tensor(CONSTANTS)


def _clear(conv: Any, outputs: Sequence[int]) -> None:
    """Set some outputs of a convolution to zero."""
    conv.weight[list(outputs)] = 0
    conv.bias[list(outputs)] = 0


def _route(conv: Any, count: int) -> None:
    """Let the first ``count`` outputs of a convolution be its first inputs."""
    conv.weight[:count] = 0
    conv.bias[:count] = 0
    middle = conv.weight.shape[2] // 2
    for channel in range(count):
        conv.weight[channel, channel, middle, middle, middle] = 1


def _zero(conv: Any) -> None:
    conv.weight.zero_()
    conv.bias.zero_()


def _blocks(half: Any) -> list[Any]:
    """Of an encoder or decoder, in the order they run."""
    return list(half.blocks)


def _conv(module: nn.Module) -> Any:
    """The one convolution inside MONAI's wrappers."""
    return next(each for each in module.modules() if isinstance(each, (nn.Conv3d, nn.ConvTranspose3d)))


def _shortcut(block: nn.Module) -> Any | None:
    if isinstance(block, MaisiResBlock) and block.in_channels != block.out_channels:
        return _conv(block.nin_shortcut)
    return None


def _components(values: np.ndarray, count: int) -> np.ndarray:
    """The leading principal components (count, numbers), the largest number of each positive."""
    _, vectors = np.linalg.eigh(values.T @ values)
    leading = vectors[:, ::-1][:, :count].T
    signs = np.sign(leading[np.arange(count), np.abs(leading).argmax(1)])
    return leading * signs[:, None]


def _cropped(image: Any, factor: int) -> np.ndarray:
    array = np.asarray(image, dtype=np.float32)[0]
    return array[tuple(slice(n // factor * factor) for n in array.shape)]


def _widths(network: Autoencoder) -> list[int]:
    """Channels of each level of an encoder, finest first."""
    blocks = _blocks(network.encoder)
    downs = [_conv(block.conv) for block in blocks if isinstance(block, MaisiDownsample)]
    return [*(conv.in_channels for conv in downs), blocks[-2].num_channels]


def levels_of(network: Autoencoder) -> list[int]:
    """How many values each level behind the image can keep."""
    widths, norm = _widths(network), _blocks(network.encoder)[-2]
    sizes = [1]
    for level in range(1, len(widths)):
        room = min(widths[level - 1], widths[level], *widths[level + 1 : level + 2])
        if level == len(widths) - 1:
            room = min(room, norm.num_channels - len(CONSTANTS) * norm.num_groups)
        sizes.append(min(8 * sizes[-1], room))
    return sizes[1:]


def _check(network: Autoencoder) -> None:
    """Raises InputError: see :func:`start_linear`."""
    faults = list(_faults(network))
    if faults:
        listed = ", and ".join(faults)
        raise InputError(f"an autoencoder with {listed} cannot start as a linear code; change it, or leave out init")


def _faults(network: Autoencoder) -> Iterator[str]:
    blocks = [*_blocks(network.encoder), *_blocks(network.decoder)]
    ups = [block for block in blocks if isinstance(block, MaisiUpsample)]
    if not ups:
        yield "one level (factor 1)"
    if any(not block.use_convtranspose for block in ups):
        yield "use_convtranspose false (it has to be true)"
    known = (nn.Sequential, MaisiDownsample, MaisiUpsample, MaisiResBlock, nn.GroupNorm)
    if any(not isinstance(block, known) for block in blocks):
        yield "attention (attention_levels and with_*_nonlocal_attn have to be false)"
    norms = [block for block in blocks if isinstance(block, nn.GroupNorm)]
    sizes = [norm.num_channels // norm.num_groups for norm in norms]
    if min(sizes) < len(CONSTANTS) + 1:
        yield f"{min(sizes)} channels in a norm's group (at least 4 are needed: give fewer norm_num_groups)"
    elif ups and levels_of(network)[-1] < network.latent_channels:
        yield f"{network.latent_channels} latent channels but room for {levels_of(network)[-1]} (more num_channels)"
