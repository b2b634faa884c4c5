"""What training a ControlNet needs beyond the diffusion batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.networks.utils import copy_model_state
from monai.transforms import MapTransform
from torch.nn.functional import pad

from maisi_tools.errors import InputError
from maisi_tools.networks import ControlledUNet
from maisi_tools.volumes.latents import FACTOR
from maisi_tools.weights import load_weights


def start_from_unet(network: ControlledUNet, unet_path: str | Path) -> ControlledUNet:
    """Load the frozen U-Net, and start the ControlNet as a copy of its encoder half (paper section 3.3).

    What the U-Net does not have, the mask embedding and the zero convolutions, keeps its initial value, so before the
    first step the controlled network equals the U-Net.
    """
    load_weights(network.unet, unet_path)
    encoder = {name: value for name, value in network.unet.state_dict().items() if not name.startswith("up_blocks")}
    own = network.controlnet.state_dict()
    # The U-Net's resnets also see region and spacing, so their embedding layers can be wider: those are left out.
    encoder = {name: value for name, value in encoder.items() if name in own and own[name].shape == value.shape}
    copy_model_state(network.controlnet, encoder, inplace=True)
    return network


class FitMaskd(MapTransform):
    """Pads a mask (1, D, H, W) to the grid of its latent (4, d, h, w), by its edge as the image was padded.

    Raises:
        InputError: the mask does not belong to the latent (its size is not that of the image the latent stands for).
    """

    def __init__(self, keys: str, latent_key: str) -> None:
        super().__init__(keys)
        self.latent_key = latent_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        mask, latent = data[self.keys[0]], data[self.latent_key]
        size = latent.meta["sidecar"]["size"]
        if list(mask.shape[1:]) != list(size):
            raise InputError(
                f"mask {mask.meta.get('filename_or_obj')} has {tuple(mask.shape[1:])} voxels, but its latent stands "
                f"for {tuple(size)}; encode the CT the mask belongs to, without resampling"
            )
        missing = [FACTOR * have - want for have, want in zip(latent.shape[1:], size, strict=True)]
        widths = [width for axis in reversed(missing) for width in (0, axis)]
        padded = pad(mask.as_tensor()[None].float(), widths, mode="replicate")[0]
        return {**data, self.keys[0]: padded}
