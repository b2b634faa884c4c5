"""The VAE's perceptual loss: LPIPS on slices along all three axes, with a backbone from the network or from a file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.losses import PerceptualLoss
from monai.utils import optional_import
from torch import nn

from maisi_tools.errors import InputError
from maisi_tools.weights import load_weights

lpips, has_lpips = optional_import("lpips")
models, has_torchvision = optional_import("torchvision.models")
INSTALLED = has_lpips and has_torchvision
INSTALL = "install lpips and torchvision with pip install '.[train]'"

RULE = "!" * 100

logger = logging.getLogger(__name__)


class SliceLPIPS(PerceptualLoss):
    """MONAI's 2.5D perceptual loss with LPIPS (Zhang et al. 2018, arXiv 1801.03924) on a given SqueezeNet 1.1.

    Of two volumes (B, 1, D, H, W) in [0, 1], LPIPS between slices: a drawn share of those along each axis, averaged
    over an axis' slices and summed over the axes. The linear heads are those of the ``lpips`` package.

    Args:
        backbone: ``torchvision.models.squeezenet1_1``; not trained.
        fake_3d_ratio: the share of the slices.
    """

    def __init__(self, backbone: nn.Module, fake_3d_ratio: float) -> None:
        nn.Module.__init__(self)  # MONAI's constructor takes no file and downloads the backbone
        self.spatial_dims, self.is_fake_3d, self.channel_wise = 3, True, False
        self.fake_3d_ratio = fake_3d_ratio
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that is deprecated
            self.perceptual_function = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        # lpips cuts the backbone into parts, whose layers keep their index as name.
        for part in self.perceptual_function.net.children():  # type: ignore[union-attr]
            for index, layer in part.named_children():
                layer.load_state_dict(backbone.features[int(index)].state_dict())  # type: ignore[index, union-attr]
        self.requires_grad_(False)


def make_perceptual_loss(
    backbone: str | Path | None, fake_3d_ratio: float, device: torch.device | str
) -> SliceLPIPS | None:
    """Build :class:`SliceLPIPS` with the SqueezeNet 1.1 that torchvision offers trained on ImageNet.

    Args:
        backbone: file of that network's weights. None takes it from the torch hub cache (``$TORCH_HOME``), or fetches
            it; where that fails, a warning says so and None is returned: training goes on without this term.
        fake_3d_ratio: see :class:`SliceLPIPS`.
        device: where the loss is computed.

    Raises:
        InputError: ``backbone`` is missing or no file of these weights, or lpips or torchvision is not installed.
    """
    if backbone is not None:
        if not INSTALLED:
            raise InputError(f"perceptual_backbone is {backbone}, which lpips reads; {INSTALL}")
        network = models.squeezenet1_1()
        try:
            load_weights(network, backbone)
        except InputError as error:
            raise InputError(
                f"perceptual_backbone is {backbone}; allowed is the weights file of torchvision's squeezenet1_1, as "
                f"{models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url}: correct the path, or leave the key out to have it "
                f"fetched ({error})"
            ) from error
        return SliceLPIPS(network, fake_3d_ratio).to(device)
    state, reason = None, INSTALL
    if INSTALLED:
        with idist.one_rank_first(local=True):  # inside it nothing may raise: the other ranks wait for its end
            try:
                state = models.SqueezeNet1_1_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError) as error:  # not to be reached, or not the file with the listed hash
                reason = str(error)
    if state is None:
        logger.warning(
            "\n%s\nNO PERCEPTUAL LOSS: its backbone, SqueezeNet 1.1 trained on ImageNet, cannot be had (%s).\nTraining "
            "goes on without this term and will give smoother volumes. Give torchvision's file with "
            "--perceptual_backbone,\nor --perceptual_weight 0 to train without it on purpose.\n%s",
            RULE,
            reason,
            RULE,
        )
        return None
    network = models.squeezenet1_1()
    network.load_state_dict(state)
    return SliceLPIPS(network, fake_3d_ratio).to(device)
