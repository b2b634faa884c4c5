"""The mask generator's U-Net, steered by organ sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import zero_module
from torch import Tensor, nn

from maisi_tools.mask_generator.prior import ShapePrior
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.networks import use_plain_layers


class MaskUNet(DiffusionModelUNet):
    """The mask generator's U-Net: noisy latent (B, 4, d, h, w) -> velocity or noise of the same shape.

    ``organ_sizes`` (B, number of organs) is what its cross attention looks at; without it all are
    :data:`~maisi_tools.mask_generator.sizes.UNKNOWN`.

    Args:
        cross_attention_dim: number of organs.
        embed_sizes: let the sizes reach every block, beside the timestep, and not only the levels with attention.
        prior_components: of a :class:`~maisi_tools.mask_generator.prior.ShapePrior`, whose estimate of the latent
            the U-Net sees beside the noisy one; 0 for no prior. The release's networks have neither.
        prior_until: above this share of noise the prior's velocity is taken and the U-Net is not asked. For rectified
            flow, whose timesteps are thousandths of noise.
        latent_size: (d, h, w) of the latents, all on one canvas; needed for a prior.
        kwargs: of MONAI's network; flash attention is on where there is a GPU.
    """

    def __init__(
        self,
        *,
        cross_attention_dim: int,
        in_channels: int = 4,
        embed_sizes: bool = False,
        prior_components: int = 0,
        prior_until: float = 0.9,
        latent_size: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        organs = int(cross_attention_dim)
        super().__init__(
            with_conditioning=True,
            cross_attention_dim=organs,
            num_class_embeds=organs if embed_sizes else None,
            in_channels=in_channels * 2 if prior_components else in_channels,
            **{"spatial_dims": 3, "out_channels": 4, "use_flash_attention": torch.cuda.is_available(), **kwargs},
        )
        use_plain_layers(self)
        self.organs = organs
        if embed_sizes:
            width = self.class_embedding.embedding_dim
            last = zero_module(nn.Linear(width, width))
            self.class_embedding = nn.Sequential(nn.Linear(organs, width), nn.SiLU(), last)  # type: ignore[assignment]
        self.prior = ShapePrior(organs, in_channels, list(latent_size), prior_components) if prior_components else None
        self.prior_until = float(prior_until)

    def fit_prior(self, samples: Iterable[Mapping[str, Any]], scale_factor: float) -> MaskUNet:
        """Fit the prior, if there is one, see :meth:`ShapePrior.fit`, and return the network."""
        if self.prior is not None:
            self.prior.fit(samples, scale_factor)
        return self

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor | None = None, organ_sizes: Tensor | None = None
    ) -> Tensor:
        if organ_sizes is None:
            organ_sizes = x.new_full((len(x), self.organs), UNKNOWN)
        if timesteps is None:
            timesteps = x.new_zeros(len(x))
        if self.prior is None:
            return self._unet(x, timesteps, organ_sizes)
        share = timesteps.float() / 1000
        latent = self.prior(x, share, organ_sizes).to(x)
        late = (share > self.prior_until) & (not self.training)
        if late.all():
            return (latent - x) / share.to(x).reshape(-1, 1, 1, 1, 1)
        velocity = self._unet(torch.cat([x, latent], 1), timesteps, organ_sizes)
        if not late.any():
            return velocity
        late, share = (each.reshape(-1, 1, 1, 1, 1) for each in (late, share.to(x)))
        return torch.where(late, (latent - x) / share, velocity)

    def _unet(self, x: Tensor, timesteps: Tensor, sizes: Tensor) -> Tensor:
        sizes = sizes.to(x)
        return super().forward(
            x, timesteps, context=sizes[:, None], class_labels=None if self.num_class_embeds is None else sizes
        )
