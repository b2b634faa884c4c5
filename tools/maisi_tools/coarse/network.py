"""The network that draws coarse CTs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maisi_tools.coarse.grid import CELL
from maisi_tools.errors import InputError
from maisi_tools.mask_generator.network import MaskUNet
from maisi_tools.networks import sees_coarse
from maisi_tools.volumes.checks import check_output_size
from maisi_tools.weights import check_shared


def check_cascade(
    cascade: bool, ckpt_path: str | Path, coarse_ckpt_path: str | Path, shared: Mapping[str, Any]
) -> None:
    """Refuse weights of a U-Net alone where a cascade is wanted, or the reverse, before either is built.

    Args:
        cascade: whether the U-Net sees a coarse CT, as a fifth channel.
        ckpt_path: its weights.
        coarse_ckpt_path: weights of the network that draws the coarse CT; not read without a cascade.
        shared: settings that these must have been trained with, see :func:`maisi_tools.weights.check_shared`.

    Raises:
        InputError: they do not see it, or do, or what draws it was trained with other settings.
    """
    if bool(cascade) != (seen := sees_coarse(ckpt_path)):
        kind = "a U-Net that sees a coarse CT" if seen else "a U-Net alone"
        raise InputError(f"{ckpt_path} is {kind}, and cascade is {cascade}; give --cascade {seen}")
    if cascade:
        check_shared(coarse_ckpt_path, shared)


class CoarseUNet(MaskUNet):
    """Noisy cells of a coarse CT (B, 8, d, h, w) -> velocity; what it is told is the field of view, as four numbers.

    It is built as the mask generator is, with a Gaussian of the training cases for what is nearly all noise.

    Args:
        size: voxels of a coarse CT along x, y, z.
        prior_components: see :class:`~maisi_tools.mask_generator.network.MaskUNet`.
        kwargs: likewise.
    """

    def __init__(self, *, size: Sequence[int], prior_components: int = 24, **kwargs: Any) -> None:
        super().__init__(
            **{
                "cross_attention_dim": 4,
                "in_channels": CELL**3,
                "out_channels": CELL**3,
                "attention_levels": [False, False, True],
                "num_res_blocks": 1,
                "embed_sizes": True,
                "latent_size": [n // CELL for n in check_output_size(size, CELL, "coarse_size")],
                "prior_components": prior_components,
                **kwargs,
            }
        )
