"""What training a ControlNet needs beyond the diffusion batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.utils import copy_model_state
from monai.transforms import Compose, MapTransform, SpatialResample
from torch import nn
from torch.nn.functional import pad

from maisi_tools.datasets.complete import twins_of
from maisi_tools.errors import InputError
from maisi_tools.masks.edits import swap_sides
from maisi_tools.masks.vocabulary import BODY, display_name, label_of, merge_labels
from maisi_tools.networks import ControlledUNet, has_both, sees_coarse
from maisi_tools.training.latents import check_latent_sizes
from maisi_tools.training.losses import RegionContrastiveLoss
from maisi_tools.volumes.grid import image_affine
from maisi_tools.volumes.reading import sidecar_if_any
from maisi_tools.weights import load_weights

logger = logging.getLogger(__name__)


def start_from_unet(network: ControlledUNet, unet_path: str | Path | None) -> ControlledUNet:
    """Load the U-Net, and start the ControlNet as a copy of its encoder half (paper section 3.3).

    What the U-Net does not have, the mask embedding and the zero convolutions, keeps its initial value, so before the
    first step the controlled network equals the U-Net. A file of both has the U-Net taken out of it. Without a file
    (None) all weights stay as they were drawn, for a U-Net that is trained with its ControlNet.

    Raises:
        InputError: the file's U-Net sees a coarse CT (:mod:`maisi_tools.coarse`), or does not fit.
    """
    if unet_path is None:
        return network
    if sees_coarse(unet_path):
        raise InputError(
            f"{unet_path} is a U-Net that sees a coarse CT; allowed is a U-Net alone: train one with train.json of "
            "maisi_ldm with this network_def's channels, or leave unet_ckpt_path as it is"
        )
    if has_both(unet_path):
        drawn = {name: value.clone() for name, value in network.controlnet.state_dict().items()}
        load_weights(network, unet_path)
        network.controlnet.load_state_dict(drawn)
    else:
        load_weights(network.unet, unet_path)
    encoder = {name: value for name, value in network.unet.state_dict().items() if not name.startswith("up_blocks")}
    own = network.controlnet.state_dict()
    # The U-Net's resnets also see region and spacing, so their embedding layers can be wider: those are left out.
    encoder = {name: value for name, value in encoder.items() if name in own and own[name].shape == value.shape}
    copy_model_state(network.controlnet, encoder, inplace=True)
    return network


def train_parts(network: ControlledUNet, train_unet: bool, started: bool) -> ControlledUNet:
    """Let the U-Net learn together with its ControlNet, or stay frozen as the paper has it.

    Together from the first step, both reach in one run what takes two one after another: where time is short, the
    conditioned result is better for it, and with the ControlNet left out now and then
    (:class:`~maisi_tools.training.diffusion.DiffusionBatch`'s ``control_dropout``) the U-Net also serves stage 2.

    Args:
        network: to be trained.
        train_unet: whether the U-Net learns.
        started: whether its weights were loaded.

    Raises:
        InputError: it is to stay frozen with weights as they were drawn.
    """
    if not (train_unet or started):
        raise InputError(
            "unet_ckpt_path is null and train_unet false, so that a frozen U-Net would keep random weights; give the "
            "weights of stage 2 with unet_ckpt_path, or let it learn too with train_unet"
        )
    network.unet.requires_grad_(train_unet)
    return network


def check_labels(
    keep: Sequence[int] | None,
    merge: Mapping[str, int] | None,
    latents: Mapping[str, Sequence[Mapping[str, str]]],
    loss: nn.Module | None = None,
    **asked: Iterable[int | str],
) -> None:
    """Refuse labels that are none, weights and contrasts for those that masks no longer have after merging, and
    contrasts that the loss does not make.

    Which others are lost is said.

    Args:
        keep, merge: of :class:`~maisi_tools.masks.vocabulary.MergeLabelsd`; `keep` None for all labels.
        latents: as :func:`~maisi_tools.training.latents.find_latents` lists them, with their masks. The labels of a
            mask are those that `maisi complete_masks` wrote beside it; others are not looked at.
        loss: of the training; with ``contrast_labels`` among `asked`, the batch is doubled for it.
        asked: config key -> labels, by id or by name (:func:`~maisi_tools.masks.vocabulary.label_of`).

    Raises:
        InputError: a label is none, or not kept; or the loss makes no contrast.
    """
    if loss is not None and asked.get("contrast_labels") and not isinstance(loss, RegionContrastiveLoss):
        raise InputError(
            f"contrast_labels is given, and loss is {type(loss).__name__}, which makes no contrast; allowed is "
            "RegionContrastiveLoss, as train.json has it, or a subclass: give that loss, or leave contrast_labels out"
        )
    merge = merge or {}
    if keep is not None:
        merge_labels(np.zeros(1), keep, merge)  # which refuses what is no id
    for name, labels in asked.items():
        try:
            ids = {label_of(label) for label in labels}
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if keep is not None and (lost := sorted(ids - {0, *keep})):
            raise InputError(
                f"{name} has {', '.join(map(str, lost))}, but keep_labels merges these labels into others; allowed are "
                f"{', '.join(map(str, keep))}: add them to keep_labels"
            )
    if keep is None:
        return
    masks = {item["mask"] for items in latents.values() for item in items}
    counts = Counter(int(label) for mask in masks for label in sidecar_if_any(mask).get("labels", ()))
    as_body = merge_labels(np.array(sorted(counts)), keep, merge) == BODY if counts else ()
    lost = [label for label, gone in zip(sorted(counts), as_body, strict=True) if gone and label != BODY]
    if lost:
        logger.warning(
            "keep_labels leaves out labels of the masks, which the network learns as body: %s; to have it learn them, "
            "add them: --keep_labels '%s'",
            ", ".join(f"{label} ({display_name(label)}, in {counts[label]} of {len(masks)} masks)" for label in lost),
            sorted({*keep, *lost}),
        )


def check_network(
    network: ControlledUNet,
    factor: int,
    latents: Mapping[str, Sequence[Mapping[str, str]]],
    preprocessing: Compose,
) -> None:
    """Refuse a network that the latents do not fit.

    Args:
        network: to be trained.
        factor: of the latents.
        latents, preprocessing: see :func:`~maisi_tools.training.latents.check_latent_sizes`.

    Raises:
        InputError: its mask embedding does not lead to their grid, or its U-Net cannot see them whole.
    """
    check_latent_sizes(latents, network, preprocessing)
    if network.factor != factor:
        raise InputError(
            f"the latents have factor {factor} (image voxels per latent voxel), the ControlNet's mask embedding "
            f"{network.factor}; give conditioning_embedding_num_channels one number for each halving and one more: "
            f"{factor.bit_length()} numbers"
        )


class FitMaskd(MapTransform):
    """Puts a mask (1, D, H, W) on the image grid of its latent (4, d, h, w), padded by its edge as the image was.

    Where the CT was resampled, cropped, turned or mirrored before it was encoded, the mask follows by nearest-label
    resampling. On a mirrored grid (one that is left-handed) the labels of left and right structures are exchanged
    (:func:`~maisi_tools.datasets.complete.twins_of`).

    Args:
        keys: key of the mask, in the vocabulary.
        latent_key: key of the latent, with ``meta["sidecar"]``.

    Raises:
        InputError: the mask does not belong to the latent (it does not cover the image the latent stands for), or has
            no body, which every mask has that is drawn from.
    """

    def __init__(self, keys: str, latent_key: str) -> None:
        super().__init__(keys)
        self.latent_key = latent_key
        self.resample = SpatialResample(mode="nearest", padding_mode="border", align_corners=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask, latent = data[self.keys[0]], data[self.latent_key]
        if not (mask == BODY).any():
            raise InputError(
                f"mask {mask.meta.get('filename_or_obj')} has no body ({BODY}), and drawing adds it to every mask; "
                "complete the masks with `maisi complete_masks`"
            )
        size = [int(n) for n in latent.meta["sidecar"]["size"]]
        factor = latent.meta["sidecar"]["factor"]
        affine = image_affine(latent.affine, factor)
        to_mask = np.linalg.inv(np.asarray(mask.affine, dtype=float)) @ affine
        corners = np.stack([to_mask[:3, 3], (to_mask @ [*(n - 1 for n in size), 1])[:3]])
        if not _is_parallel(to_mask):  # the corners of a turned grid stick out; then its centre must be inside
            corners = corners.mean(0, keepdims=True)
        # Resampling rounds the field of view to whole voxels, so the image may reach a voxel further than the mask.
        if (corners.min(0) < -1).any() or (corners.max(0) > mask.shape[1:]).any():
            raise InputError(
                f"mask {mask.meta.get('filename_or_obj')} with {tuple(mask.shape[1:])} voxels does not cover the "
                f"image of {tuple(size)} voxels that its latent stands for; encode the CT the mask belongs to"
            )
        image: Any = self.resample(mask.float(), dst_affine=torch.as_tensor(affine), spatial_size=size)
        if np.linalg.det(affine[:3, :3]) < 0:
            image = swap_sides(image, twins_of(mask))
        missing = [factor * have - want for have, want in zip(latent.shape[1:], size, strict=True)]
        widths = [width for axis in reversed(missing) for width in (0, axis)]
        padded = pad(image.as_tensor()[None], widths, mode="replicate")[0]
        return {**data, self.keys[0]: padded}


def _is_parallel(to_mask: np.ndarray) -> bool:
    """Whether each axis of one grid runs along an axis of the other, to a tenth of a voxel across 100 of them."""
    axes = np.sort(np.abs(to_mask[:3, :3]), axis=0)
    return bool((axes[1] <= 1e-3 * axes[2]).all())
