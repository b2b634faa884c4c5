"""What the sampling benchmarks share: the set-ups, and a mask made a CT by MONAI's own classes or by the bundle.

MONAI's way is the loop of the released scripts (MONAI tutorials, maisi: ``ldm_conditional_sample_one_image``): the mask
is embedded at every step, then the autoencoder decodes the latent whole or in windows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

import parts
from maisi_tools.diffusion.conditions import Conditions, batch_tensors
from maisi_tools.masks.bits import label_bits
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import merge_labels, region_of
from maisi_tools.networks import SHARED, autoencoder_settings, controlnet_settings, unet_settings
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.weights import read_weights, save_weights

CONFIGS = parts.ROOT / "bundles" / "maisi_controlnet" / "configs"
RELEASED_STEPS = 30
"""Euler steps of the released scripts for rectified flow."""
PARTS: dict[str, dict[str, Any]] = {
    "autoencoder_def": {},
    "network_def#unet": {"_target_": "maisi_tools.networks.DiffusionUNet"},
    "network_def#controlnet": {},
}
"""A config's autoencoder, U-Net and ControlNet, and what stands for one that it leaves to the classes."""
SCALE_FACTOR = 1.0
"""Of the random weights, whose autoencoder knows no latents."""

FIELD_OF_VIEW = (384.0, 384.0, 320.0)
"""mm along x, y, z of the masks for the released networks; a chest and abdomen."""

Way = Callable[[MetaTensor], Tensor]
"""``way(mask (1, 1, D, H, W)) -> CT`` of the same size in [0, 1], not clipped."""


@dataclass(frozen=True)
class SetUp:
    """Networks, and the mask they get.

    Attributes:
        configs: the bundle's inference.json and what overlays it.
        size: voxels of the mask along x, y, z.
        spacing: its voxels in mm.
        phantom: the phantom's kind.
    """

    name: str
    configs: tuple[Path, ...]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    phantom: str

    def __str__(self) -> str:
        return f"{self.name}, mask {'x'.join(map(str, self.size))}"

    def mask(self, device: str = "cpu") -> MetaTensor:
        """Return the phantom mask (1, 1, D, H, W)."""
        labels = make_phantom(self.phantom, size=self.size, spacing=self.spacing)
        affine = torch.diag(torch.tensor([*self.spacing, 1.0], dtype=torch.float64))
        return MetaTensor(torch.from_numpy(labels.astype(np.float32))[None, None].to(device), affine=affine)

    def open(self, device: str = "cpu", **changes: Any) -> ConfigParser:
        """Return the configs with ``changes`` to their keys, for ``device``."""
        parser = ConfigParser()
        parser.read_config([str(path) for path in self.configs])
        parser["bundle_root"] = str(CONFIGS.parent)
        parser["device"] = f"$torch.device({device!r})"
        parser["progress"] = False
        for key, value in changes.items():
            parser[key] = value
        return parser


def shipped(size: tuple[int, int, int] = (112, 80, 112)) -> SetUp:
    """The small networks with the weights that the bundle ships."""
    return SetUp("shipped small weights", (CONFIGS / "inference.json",), size, (4.0, 4.0, 3.0), "head_neck")


def released(folder: Path, size: tuple[int, int, int], narrower: int = 1) -> SetUp:
    """The released networks, their channels divided by ``narrower``, with seeded random weights, written to ``folder``.

    The layers that MONAI starts at zero are random like the others: the ControlNet would change nothing.
    """
    configs = (CONFIGS / "inference.json", CONFIGS / "full_rflow.json")
    overlay = folder / "overlay.json"
    name = {1: "released networks", 2: "half-width released networks"}.get(narrower, f"released networks / {narrower}")
    spacing = (FIELD_OF_VIEW[0] / size[0], FIELD_OF_VIEW[1] / size[1], FIELD_OF_VIEW[2] / size[2])
    setup = SetUp(f"{name}, random weights", (*configs, overlay), size, spacing, "torso")
    changes = _narrower(configs, narrower)
    files = {key: str(folder / f"{key}.pt") for key in ("ckpt_path", "unet_ckpt_path", "autoencoder_ckpt_path")}
    overlay.write_text(json.dumps(changes | files))
    torch.manual_seed(parts.SEED)
    for path, network in zip(files.values(), reversed(_networks(setup.open())), strict=True):
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.kaiming_uniform_(parameter, a=5**0.5)  # as convolutions start that are not zeroed
        save_weights(path, network.state_dict(), scale_factor=SCALE_FACTOR)
    return setup


def _narrower(configs: Sequence[Path], by: int) -> dict[str, Any]:
    """Return an overlay that divides all channels, and the groups of norms where there are fewer channels left."""
    parser = ConfigParser()
    parser.read_config([str(path) for path in configs])
    changes: dict[str, Any] = {}
    for part, found in zip(PARTS, _arguments(parser), strict=True):
        channels = [n // by for n in found["num_channels"]]
        changes[part] = {**parser.get(part, PARTS[part]), "num_channels": channels}
        changes[part]["norm_num_groups"] = min(found["norm_num_groups"], *channels)
        if (embedding := found.get("conditioning_embedding_num_channels")) is not None:
            changes[part]["conditioning_embedding_num_channels"] = [n // by for n in embedding]
    return changes


def _arguments(parser: ConfigParser) -> tuple[dict[str, Any], ...]:
    """Return the arguments of a config's autoencoder, U-Net and ControlNet, also those that it does not give."""
    autoencoder, unet, controlnet = (
        {key: value for key, value in parser.get(part, {}).items() if key != "_target_"} for part in PARTS
    )
    settings = unet_settings(**unet)
    shared = {key: value for key, value in settings.items() if key in SHARED}
    return autoencoder_settings(**autoencoder), settings, controlnet_settings(**{**shared, **controlnet})


def _networks(parser: ConfigParser, **arguments: Any) -> tuple[Any, Any, Any]:
    """Return MONAI's own autoencoder, U-Net and ControlNet with the config's arguments, freshly started.

    Args:
        parser: with the config.
        arguments: of the autoencoder, in place of the config's.
    """
    autoencoder, unet, controlnet = _arguments(parser)
    return (
        AutoencoderKlMaisi(**{**autoencoder, **arguments}),
        DiffusionModelUNetMaisi(**unet),
        ControlNetMaisi(**controlnet),
    )


def monais(
    setup: SetUp,
    device: str = "cpu",
    steps: int = RELEASED_STEPS,
    dtype: torch.dtype | None = None,
    windows: Callable[[Tensor], SlidingWindowInferer] | None = None,
    **arguments: Any,
) -> Way:
    """Load MONAI's own classes; return the loop of the released scripts over them.

    One thing differs: the steps are as long as the distance between the timesteps, as ours are.
    ``RFlowScheduler.step`` truncates the next timestep to an integer, so it follows another path.

    Args:
        steps: of Euler.
        dtype: of autocast; None or float32 for none.
        windows: latent -> the inferer that decodes it; None decodes it whole.
        arguments: of the autoencoder, in place of the config's.
    """
    parser = setup.open(device)
    networks = _networks(parser, **arguments)
    for network, state in zip(networks, _states(parser), strict=True):
        network.load_state_dict(state)
        network.to(device).eval()
    autoencoder, unet, controlnet = networks
    scheduler = parser.get_parsed_content("scheduler")
    scale_factor = parser.get_parsed_content("scale_factor")
    control_scale = parser.get_parsed_content("control_scale")

    @torch.no_grad()
    def way(mask: MetaTensor) -> Tensor:
        labels = mask.as_tensor()
        bits, latent, given = _inputs(parser, mask)
        scheduler.set_timesteps(steps, latent.device, latent[0, 0].numel())
        times = [*scheduler.timesteps.float(), torch.zeros((), device=latent.device)]
        with torch.autocast(latent.device.type, dtype, enabled=dtype not in (None, torch.float32)):
            for time, following in pairwise(times):
                down, middle = controlnet(
                    latent, time[None], bits, conditioning_scale=control_scale, class_labels=given["class_labels"]
                )
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                velocity = unet(latent, time[None], **residuals, **given)
                latent = latent + velocity * (time - following) / scheduler.num_train_timesteps
            latent = latent / scale_factor
            ct: Any = autoencoder.decode(latent) if windows is None else windows(latent)(latent, autoencoder.decode)
        return torch.where(labels == 0, 0.0, ct.to(labels.device, torch.float32))

    return way


def _states(parser: ConfigParser) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of autoencoder, U-Net and ControlNet: of the last two from one file, or from one each."""
    autoencoder = read_weights(parser.get_parsed_content("autoencoder_ckpt_path"))
    found = read_weights(parser.get_parsed_content("ckpt_path"))
    if "unet_ckpt_path" in parser:
        return autoencoder, read_weights(parser.get_parsed_content("unet_ckpt_path")), found
    unet, controlnet = (
        {key.removeprefix(part): value for key, value in found.items() if key.startswith(part)}
        for part in ("unet.", "controlnet.")
    )
    return autoencoder, unet, controlnet


def _inputs(parser: ConfigParser, mask: MetaTensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Return what the networks get for a mask: its bit planes, the noise, and the conditions."""
    keep, merge = parser.get_parsed_content("keep_labels"), parser.get_parsed_content("merge_labels")
    labels = mask.as_tensor() if keep is None else merge_labels(mask.as_tensor(), keep, merge)
    conditions = Conditions(
        size=tuple(labels.shape[2:]),  # type: ignore[arg-type]
        spacing=tuple(mask.affine.diagonal()[:3].tolist()),  # type: ignore[arg-type]
        region=region_of(labels.unique().int().tolist()),
        modality=parser.get_parsed_content("modality"),
        seed=parser.get_parsed_content("seed"),
    )
    given: dict[str, Tensor | None] = {}
    given |= batch_tensors([conditions], parser.get_parsed_content("condition_scale"), labels.device)
    autoencoder, unet, _ = _arguments(parser)
    if unet["num_class_embeds"] is None:
        given["class_labels"] = None
    # Not the config's `factor`, which asks the bundle's own classes.
    factor = 2 ** (len(autoencoder["num_channels"]) - 1)
    return label_bits(labels), conditions.noise(factor)[None].to(labels.device), given


def ours(setup: SetUp, device: str = "cpu", **changes: Any) -> Way:
    """Load the bundle's network; return its inferer over it, both as the configs make them with ``changes``."""
    parser = setup.open(device, **changes)
    network = parser.get_parsed_content("network")
    inferer = parser.get_parsed_content("inferer")
    return lambda mask: inferer(mask, network)["ct"]


def solver_of(setup: SetUp) -> tuple[str, int]:
    """Return the solver and the number of steps that a set-up's configs have."""
    parser = setup.open()
    solver = parser.get_parsed_content("solver") if "solver" in parser else "euler"
    return solver, int(parser.get_parsed_content("num_inference_steps"))


def difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the greatest and the mean difference of two CTs (..., D, H, W) in [0, 1], in HU."""
    apart = (one.double() - other.double()).abs() * (HU_RANGE[1] - HU_RANGE[0])
    return float(apart.max()), float(apart.mean())
