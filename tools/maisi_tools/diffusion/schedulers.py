"""The noise schedules of MAISI's networks, with the constants that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler
from torch import nn

from maisi_tools.errors import InputError

STEPS = 1000
"""Timesteps of training."""

BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
"""Of the release's DDPM networks (``config_maisi3d-ddpm.json``)."""


def rectified_flow(base_img_size_numel: int, use_timestep_transform: bool = False, **settings: Any) -> RFlowScheduler:
    """Rectified flow with continuous timesteps.

    Args:
        base_img_size_numel: latent voxels for which the timestep transform changes nothing.
        use_timestep_transform: more noise for larger latents.
        settings: others of MONAI's scheduler.

    Raises:
        InputError: ``sample_method``, how training draws timesteps, is none of MONAI's.
    """
    if (method := settings.get("sample_method", "uniform")) not in (allowed := ("uniform", "logit-normal")):
        raise InputError(f"timestep_sampling is {method!r}; allowed are {' and '.join(allowed)}")
    return RFlowScheduler(
        **{"num_train_timesteps": STEPS, "use_discrete_timesteps": False, "sample_method": "uniform", **settings},
        use_timestep_transform=use_timestep_transform,
        base_img_size_numel=base_img_size_numel,
    )


def process_of(scheduler: nn.Module) -> str:
    """Name of the process that a network learns under a scheduler, with what makes it another one.

    DDIM goes the way of a network that was trained with DDPM. A scheduler of one's own has the name of its class.
    """
    if isinstance(scheduler, RFlowScheduler):
        return f"rectified flow, {scheduler.num_train_timesteps} timesteps"
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        betas = scheduler.betas[[0, len(scheduler.betas) // 2, -1]].tolist()
        listed = ", ".join(f"{beta:.3g}" for beta in betas)
        return f"ddpm, {scheduler.prediction_type}, {len(scheduler.betas)} timesteps, betas {listed}"
    return type(scheduler).__name__


def shared_settings(scheduler: nn.Module, **settings: Any) -> dict[str, Any]:
    """Settings that weights record of their training, and that whoever uses them must share; see
    :func:`maisi_tools.weights.check_shared`.

    Args:
        scheduler: whose ``process`` (:func:`process_of`) is one of them.
        settings: the others.

    Returns:
        Their values as a JSON file has them: a checkpoint with anything else could not be read again.
    """
    return _plain({"process": process_of(scheduler), **settings})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def ddpm(**settings: Any) -> DDPMScheduler:
    """DDPM as the release has it; `settings` are others of MONAI's scheduler."""
    return DDPMScheduler(**{"num_train_timesteps": STEPS, **BETAS, "clip_sample": False, **settings})


def ddim(**settings: Any) -> DDIMScheduler:
    """The same for DDIM, which goes in fewer steps."""
    return DDIMScheduler(**{"num_train_timesteps": STEPS, **BETAS, "clip_sample": False, **settings})
