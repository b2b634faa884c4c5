"""The three MAISI networks in the form a bundle's ``network_def`` needs.

Each class keeps the parameter names of MONAI's network, so the released checkpoints and ours load into either. Two
things differ. The layers are plain ones: :class:`torch.nn.GroupNorm` instead of MONAI's loop over groups (same result,
about twice as fast), and convolutions without the code that splits them (unless they are to be split), which a CPU runs
by oneDNN whatever their size (:mod:`maisi_tools.convolution`). And ``forward``
runs from one tensor alone and returns one tensor in evaluation mode, which is what MONAI's evaluator,
``monai.bundle verify_net_in_out`` and MONAI Label call.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiConvolution,
    MaisiDecoder,
    MaisiDownsample,
    MaisiEncoder,
    MaisiGroupNorm3D,
)
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.utils import freeze_layers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maisi_tools import refuse_moved
from maisi_tools.convolution import Conv3d
from maisi_tools.errors import InputError
from maisi_tools.masks.bits import label_bits
from maisi_tools.weights import (
    check_shared,
    encoder_fingerprint,
    load_weights,
    read_autoencoder,
    read_factor,
    weight_shapes,
)

__getattr__ = partial(refuse_moved, __name__)


def use_plain_layers(module: nn.Module) -> nn.Module:
    """Replace layers below ``module`` by plain ones with the same parameters and names, in place, and return it.

    ``MaisiGroupNorm3D`` becomes ``nn.GroupNorm``; a ``MaisiConvolution`` that is not split becomes a module that holds
    its convolution under the same name; an ``nn.Conv3d`` becomes a :class:`~maisi_tools.convolution.Conv3d`.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MaisiGroupNorm3D):
                norm = nn.GroupNorm(child.num_groups, child.num_channels, child.eps, child.affine)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
            elif isinstance(child, MaisiConvolution) and child.num_splits <= 1:
                setattr(parent, name, nn.Sequential(OrderedDict(conv=child.conv)))
    for layer in module.modules():
        if type(layer) is nn.Conv3d:
            layer.__class__ = Conv3d
    return module


def checkpoint_blocks(network: nn.Module) -> nn.Module:
    """Let the blocks of the networks below ``network`` recompute their activations in the backward pass.

    Costs one more forward pass and saves the memory of what lies inside a block (activation checkpointing); values
    and gradients stay the same. MONAI's ``use_checkpointing`` covers a ControlNet's mask embedding alone, for which it
    is set too, and recomputes an autoencoder's whole decoder at once, so that all its activations are held after all.

    Raises:
        ValueError: there are no such blocks.
    """
    blocks: list[Any] = []
    for module in network.modules():
        if isinstance(module, (MaisiEncoder, MaisiDecoder)):
            blocks += module.blocks
        elif hasattr(module, "down_blocks"):
            owner: Any = module
            blocks += [*owner.down_blocks, owner.middle_block, *getattr(owner, "up_blocks", [])]
        if isinstance(module, ControlNetMaisi):
            module.use_checkpointing = True
    if not blocks:
        raise ValueError(f"{type(network).__name__} has no blocks to checkpoint")
    for block in blocks:
        block.forward = partial(_recomputed, type(block), block)
    return network


def freeze(network: nn.Module, layers: str) -> nn.Module:
    """Freeze parameters in place with MONAI's ``freeze_layers``, and return the network.

    Args:
        layers: regular expression, searched for in the parameters' names.

    Raises:
        InputError: it is no regular expression, or fits none or all of the names.
    """
    names = [name for name, _ in network.named_parameters()]
    try:
        fitting = sum(re.search(layers, name) is not None for name in names)
    except re.error as error:
        raise InputError(f"frozen_layers is {layers!r}, which is no regular expression: {error}; correct it") from error
    if fitting in (0, len(names)):
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise InputError(
            f"frozen_layers is {layers!r}, which fits {fitting} of {len(names)} parameters; allowed is what fits some, "
            f"but not all; their names begin with {parts}: correct it, or leave it out"
        )
    freeze_layers(network, freeze_vars=layers)
    return network


def _recomputed(kind: type[nn.Module], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(kind.forward, block), *args, use_reentrant=False, **kwargs)


SHARED = (
    *("spatial_dims", "in_channels", "num_channels", "attention_levels", "num_head_channels", "num_res_blocks"),
    *("norm_num_groups", "resblock_updown", "include_fc", "num_class_embeds", "use_flash_attention"),
)
"""Settings that a U-Net and the ControlNet beside it have in common, since residuals are added level by level."""


def autoencoder_settings(**given: Any) -> dict[str, Any]:
    """All arguments of MONAI's autoencoder; those that are not given are the released CT autoencoder's."""
    settings = {
        **{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "norm_eps": 1e-6},
        **{"num_channels": [64, 128, 256], "num_res_blocks": [2, 2, 2], "norm_num_groups": 32},
        **{"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False},
        **{"use_checkpointing": False, "use_convtranspose": False, "norm_float16": False},
        **{"num_splits": 1, "dim_split": 1, "save_mem": False},
        **given,
    }
    return {"attention_levels": [False] * len(settings["num_channels"]), **settings}


def unet_settings(**given: Any) -> dict[str, Any]:
    """The same for MONAI's U-Net on latents, with those of the released U-Nets of rectified flow."""
    return {
        **{"spatial_dims": 3, "in_channels": 4, "out_channels": 4},
        **{"num_channels": [64, 128, 256, 512], "attention_levels": [False, False, True, True]},
        **{"num_head_channels": [0, 0, 32, 32], "num_res_blocks": 2, "norm_num_groups": 32, "resblock_updown": True},
        **{"include_fc": True, "include_spacing_input": True, "num_class_embeds": 128},
        "use_flash_attention": torch.cuda.is_available(),
        **given,
    }


def controlnet_settings(**given: Any) -> dict[str, Any]:
    """The same for MONAI's ControlNet beside such a U-Net."""
    of_unet = {name: value for name, value in unet_settings().items() if name in SHARED}
    own = {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [8, 32, 64]}
    return {**of_unet, **own, "use_checkpointing": False, **given}


class Autoencoder(AutoencoderKlMaisi):
    """MAISI's KL-autoencoder (paper section 3.1): CT (B, 1, D, H, W) in [0, 1] <-> latent (B, 4, d, h, w).

    In training mode ``forward`` returns ``(reconstruction, mean, sigma)`` with the latent drawn from the posterior, by
    ``noise`` (B, 4, d, h, w) from a unit normal where it is given; in evaluation mode it returns the
    reconstruction from the posterior's mean, so the result does not depend on chance.

    Args:
        kwargs: of MONAI's network; what is left out is as in the released one for CT: levels of 64, 128 and 256
            channels, one channel in and out, four in the latent, no attention, nothing split.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**autoencoder_settings(**kwargs))
        use_plain_layers(self)

    @property
    def factor(self) -> int:
        """Voxels of the image along an axis for each of the latent: 2 to the power of the levels less one."""
        return 2 ** sum(isinstance(module, MaisiDownsample) for module in self.encoder.modules())

    def forward(  # type: ignore[override]
        self, x: Tensor, noise: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        mean, sigma = self.encode(x)
        if not self.training:
            return self.decode(mean)
        latent = self.sampling(mean, sigma) if noise is None else mean + noise * sigma
        return self.decode(latent), mean, sigma


class DiffusionUNet(DiffusionModelUNetMaisi):
    """MAISI's latent U-Net: noisy latent (B, 4, d, h, w) -> velocity or noise of the same shape.

    A condition that is left out enters as its null value (zeros), the value it is replaced with when conditions are
    dropped in training; conditions this network was not built for are ignored, so that one set of conditions serves
    the networks of both MAISI versions (v1 has region inputs, v2 a modality class).

    Args:
        kwargs: of MONAI's network; what is left out is as in the released ones of rectified flow: levels of 64 to 512
            channels, a spacing and a class of modality as conditions; and flash attention where there is a GPU.

    Attributes:
        levels: of these arguments those that a :class:`ControlNet` beside it shares.
    """

    def __init__(self, **kwargs: Any) -> None:
        settings = unet_settings(**kwargs)
        super().__init__(**settings)
        self.levels = {name: value for name, value in settings.items() if name in SHARED}
        use_plain_layers(self)

    @property
    def latent_multiple(self) -> int:
        """What a latent's size must be a multiple of: 2 to the power of the levels less one."""
        return int(2 ** (len(self.levels["num_channels"]) - 1))

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        top_region_index_tensor: Tensor | None = None,
        bottom_region_index_tensor: Tensor | None = None,
        spacing_tensor: Tensor | None = None,
        class_labels: Tensor | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
    ) -> Tensor:
        batch = x.shape[0]

        def value(given: Tensor | None, used: bool, width: int) -> Tensor | None:
            if not used:
                return None
            return x.new_zeros(batch, width) if given is None else given.to(x)

        if self.num_class_embeds is None:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(batch, dtype=torch.long, device=x.device)
        return super().forward(
            x,
            x.new_zeros(batch) if timesteps is None else timesteps,
            class_labels=class_labels,
            down_block_additional_residuals=down_block_additional_residuals,  # type: ignore[arg-type]
            mid_block_additional_residual=mid_block_additional_residual,
            top_region_index_tensor=value(top_region_index_tensor, self.include_top_region_index_input, 4),
            bottom_region_index_tensor=value(bottom_region_index_tensor, self.include_bottom_region_index_input, 4),
            spacing_tensor=value(spacing_tensor, self.include_spacing_input, 3),
        )

    def _apply_down_blocks(
        self, h: Tensor, emb: Tensor, context: Tensor | None, down_block_additional_residuals: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """As MONAI's, whose additions in place would keep a U-Net that is trained with its ControlNet from learning.

        The middle block sees the last residual, too: there, in place, it is added to what goes on to it.
        """
        h, samples = super()._apply_down_blocks(h, emb, context, None)
        if down_block_additional_residuals is None:
            return h, samples
        samples = [one + more for one, more in zip(samples, down_block_additional_residuals, strict=True)]
        return samples[-1], samples


class ControlNet(ControlNetMaisi):
    """MAISI's ControlNet, whose mask embedding can be computed apart, once for all steps of a sampler.

    Args:
        kwargs: of MONAI's network; what is left out is as in the released ones: eight bit planes of a mask, an
            embedding for a factor of 4, and the levels of :class:`DiffusionUNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**controlnet_settings(**kwargs))

    @property
    def factor(self) -> int:
        """Voxels of the mask along an axis for each of the latent: the embedding halves it from level to level."""
        return 2 ** sum(2 in getattr(layer, "stride", ()) for layer in self.controlnet_cond_embedding.modules())

    def embed(self, bits: Tensor) -> Tensor:
        """Bit planes (B, 8, D, H, W) -> what is added behind the first convolution, (B, C, d, h, w)."""
        if type(bits) is not Tensor or bits.device.type != "cpu":
            return self._embedded(bits)
        # Few channels at the image's size: a CPU is up to five times faster with the channels last.
        return self._embedded(bits.contiguous(memory_format=torch.channels_last_3d)).contiguous()

    def _embedded(self, bits: Tensor) -> Tensor:
        if self.use_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.controlnet_cond_embedding, bits, use_reentrant=False)
        return self.controlnet_cond_embedding(bits)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        embedding: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Noisy latent (B, 4, d, h, w) and the embedding of a mask -> residuals of the U-Net's levels and middle."""
        emb = self._prepare_time_and_class_embedding(x, timesteps, class_labels)
        h = self._apply_initial_convolution(x) + embedding
        residuals, h = self._apply_down_blocks(emb, None, h)
        h = self._apply_mid_block(emb, None, h)
        residuals, middle = self._apply_controlnet_blocks(h, residuals)
        return [residual * conditioning_scale for residual in residuals], middle * conditioning_scale


class ControlledUNet(nn.Module):
    """A frozen :class:`DiffusionUNet` steered by a ControlNet that reads a label mask (paper section 3.3).

    ``forward(mask)`` takes label values (B, 1, D, H, W); ``latent`` (B, 4, D/factor, ...) is the noisy latent, zeros
    when left out. The mask enters the ControlNet as the 8 bits of its label values. A sampler computes :meth:`embed`
    once and calls :meth:`denoise` at each step.

    Args:
        unet: generates; the released one if it is left out.
        controlnet: steers; or only its settings, of which those that are left out are the U-Net's.

    Raises:
        InputError: `controlnet` is MONAI's class, which embeds the mask at each step.
    """

    def __init__(
        self, unet: DiffusionUNet | None = None, controlnet: ControlNet | Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        super().__init__()
        unet = DiffusionUNet() if unet is None else unet
        if isinstance(controlnet, Mapping):
            controlnet = ControlNet(**{**unet.levels, **controlnet})
        if not isinstance(controlnet, ControlNet):
            raise InputError(
                f"controlnet is a {type(controlnet).__name__}; allowed is maisi_tools.networks.ControlNet, which has "
                "the same arguments and weights: name it as the config's `_target_`"
            )
        self.unet = unet.requires_grad_(False)
        self.controlnet = controlnet
        use_plain_layers(self)

    def forward(
        self,
        mask: Tensor,
        latent: Tensor | None = None,
        timesteps: Tensor | None = None,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        if latent is None:
            latent = mask.new_zeros(
                len(mask), self.unet.in_channels, *(n // self.factor for n in mask.shape[2:]), dtype=torch.float32
            )
        embedding = self.embed(mask, latent.dtype)
        return self.denoise(latent, embedding, timesteps, conditioning_scale, class_labels, **conditions)

    @property
    def factor(self) -> int:
        """Voxels of the mask along an axis for each of the latent."""
        return self.controlnet.factor

    @property
    def latent_multiple(self) -> int:
        """As the U-Net's."""
        return self.unet.latent_multiple

    def embed(self, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Label values (B, 1, D, H, W) -> (B, C, D/factor, ...), which no step, latent or condition changes."""
        return self.controlnet.embed(label_bits(mask).to(dtype))

    def denoise(
        self,
        latent: Tensor,
        embedding: Tensor,
        timesteps: Tensor | None = None,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """Velocity or noise of the noisy latent (B, 4, d, h, w), for a mask's embedding."""
        batch = len(latent)
        if timesteps is None:
            timesteps = latent.new_zeros(batch)
        if class_labels is None:
            class_labels = torch.zeros(batch, dtype=torch.long, device=latent.device)
        down, mid = self.controlnet(
            latent,
            timesteps,
            embedding,
            conditioning_scale=conditioning_scale,
            class_labels=class_labels if self.controlnet.num_class_embeds is not None else None,
        )
        return self.unet(
            latent,
            timesteps,
            class_labels=class_labels,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=mid,
            **conditions,
        )


def load_controlled(network: ControlledUNet, controlnet_path: str | Path, unet_path: str | Path) -> ControlledUNet:
    """Load a :class:`ControlledUNet` from the two files in which its parts are released.

    A file of both, as a training leaves it, in the place of the ControlNet's is taken for both.
    """
    if file_of_unet(controlnet_path, unet_path) == controlnet_path:
        load_weights(network, controlnet_path)
        return network
    load_weights(network.unet, unet_path)
    load_weights(network.controlnet, controlnet_path)
    return network


def file_of_unet(controlnet_path: str | Path, unet_path: str | Path | None) -> str | Path | None:
    """The file that has the U-Net beside a ControlNet: a training leaves both in one, which the first then is.

    Raises:
        InputError: the first file is missing or no checkpoint.
    """
    return controlnet_path if has_both(controlnet_path) else unet_path


def has_both(path: str | Path) -> bool:
    """Whether weights are of a U-Net and a ControlNet, as a training leaves them.

    Raises:
        InputError: the file is missing or no checkpoint.
    """
    return any(name.startswith("unet.") for name in weight_shapes(path))


def sees_coarse(path: str | Path) -> bool:
    """Whether weights are of a U-Net that sees a coarse CT, as a channel beside the noisy latent.

    Raises:
        InputError: the file is missing or no checkpoint.
    """
    first = weight_shapes(path).get("conv_in.conv.weight")
    return first is not None and first[1] == 5


def agreed_factor(
    autoencoder: Autoencoder,
    autoencoder_path: str | Path,
    checkpoints: str | Path | Sequence[str | Path] = (),
    network: ControlledUNet | None = None,
    shared: Mapping[str, Any] | None = None,
) -> int:
    """The factor of an autoencoder, once the weights and the network beside it are found to be made for it.

    Args:
        autoencoder: that encodes or decodes.
        autoencoder_path: its weights.
        checkpoints: weights of a U-Net or ControlNet that generate for it, which record their factor.
        network: whose mask embedding has a factor of its own.
        shared: settings of the training of all these weights, see :func:`maisi_tools.weights.check_shared`.

    Raises:
        InputError: they do not have the same factor, weights were trained on latents of another encoder or with other
            settings, or a file is missing or no checkpoint.
    """
    paths = list(dict.fromkeys([checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints))
    found = {"the autoencoder": autoencoder.factor}
    found |= {f"weights {path}": read_factor(path) for path in paths}
    if network is not None:
        found["the ControlNet's mask embedding"] = network.factor
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {factor}" for name, factor in found.items())
        raise InputError(
            f"factors differ (image voxels per latent voxel): {listed}; allowed is one for all. Give weights that were "
            "trained on latents of this autoencoder, or its own autoencoder with them; a mask embedding of n numbers "
            "of channels (conditioning_embedding_num_channels) has the factor 2 to the power of n - 1"
        )
    recorded = {path: wanted for path in paths if (wanted := read_autoencoder(path)) is not None}
    encoder = encoder_fingerprint(autoencoder_path) if recorded else None
    for path, wanted in recorded.items():
        if wanted != encoder:
            raise InputError(
                f"weights {path} were trained on latents of an autoencoder with {wanted}, and {autoencoder_path} has "
                f"{encoder}; allowed is one for both: give the autoencoder they were trained with "
                "(autoencoder_ckpt_path), or weights that were trained on latents of this one"
            )
    for path in (*paths, autoencoder_path):
        check_shared(path, shared or {})
    return autoencoder.factor
