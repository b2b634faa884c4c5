"""The VAE's perceptual loss: LPIPS on slices along all three axes, with a backbone from the network or from a file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.losses import PerceptualLoss
from monai.utils import optional_import
from torch import Tensor, nn

from maisi_tools.errors import InputError
from maisi_tools.weights import load_weights

logger = logging.getLogger(__name__)

lpips, has_lpips = optional_import("lpips")
models, has_torchvision = optional_import("torchvision.models")

SMALLEST_SLICE = 32
"""Voxels along the shorter side of the smallest slice that SqueezeNet's pooling layers do not reduce to nothing."""


class SliceLPIPS(PerceptualLoss):
    """MONAI's 2.5D perceptual loss with LPIPS (Zhang et al. 2018, arXiv 1801.03924) on a given SqueezeNet 1.1.

    LPIPS between slices of the two volumes, a drawn share of those along each of the three axes; averaged over an
    axis' slices, summed over the axes. The linear heads are those of the ``lpips`` package.

    Args:
        backbone: ``torchvision.models.squeezenet1_1``; not trained.
        fake_3d_ratio: share of the slices, 0.2 in MAISI.
    """

    def __init__(self, backbone: nn.Module, fake_3d_ratio: float) -> None:
        nn.Module.__init__(self)  # MONAI's own constructor takes no file and would download the backbone
        self.spatial_dims, self.is_fake_3d, self.channel_wise = 3, True, False
        self.fake_3d_ratio = fake_3d_ratio
        with warnings.catch_warnings(action="ignore"):  # lpips calls torchvision in a way that is deprecated
            self.perceptual_function = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        for part in self.perceptual_function.net.children():
            for index, layer in part.named_children():
                layer.load_state_dict(backbone.features[int(index)].state_dict())
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> SliceLPIPS:
        """Stay in evaluation mode: the heads have dropout layers, which are for training the heads."""
        return super().train(False)


def make_perceptual_loss(
    backbone: str | Path | None, fake_3d_ratio: float, device: torch.device | str = "cpu"
) -> SliceLPIPS | None:
    """Build :class:`SliceLPIPS` with SqueezeNet 1.1 trained on ImageNet; None, with a warning, where it cannot be had.

    Args:
        backbone: torchvision's weights file of ``squeezenet1_1``; None takes torchvision's copy in the torch hub cache
            (``$TORCH_HOME``), or fetches it.
        fake_3d_ratio: see :class:`SliceLPIPS`.
        device: where the loss is computed.

    Raises:
        InputError: a file is given, and it is missing or not of this network, or ``lpips`` or ``torchvision`` is not
            installed.
    """
    if not (has_lpips and has_torchvision):
        missing = " and ".join(name for name, has in (("lpips", has_lpips), ("torchvision", has_torchvision)) if not has)
        if backbone is not None:
            raise InputError(f"perceptual_backbone is {backbone}, but {missing} is not installed: {INSTALL}")
        _warn(f"{missing} is not installed", INSTALL)
        return None
    network = models.squeezenet1_1()
    if backbone is not None:
        try:
            load_weights(network, backbone)
        except InputError as error:
            raise InputError(
                f"perceptual_backbone is {backbone}; allowed is the file of torchvision's squeezenet1_1 weights "
                f"({_weights().url}): give its path, or leave the key out to have it fetched. ({error})"
            ) from error
    else:
        try:
            with idist.one_rank_first(local=True):  # one download a machine
                network.load_state_dict(_weights().get_state_dict(progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:  # no network, or a file with another hash
            _warn(f"the backbone cannot be fetched from {_weights().url} ({error})", DOWNLOAD)
            return None
    return SliceLPIPS(network, fake_3d_ratio).to(device)
