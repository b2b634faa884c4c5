"""What a bundle's run would need on a device: a plan of each of its networks, made without computing or allocating."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from maisi_tools.bundles.stage import Stage
from maisi_tools.errors import InputError
from maisi_tools.networks import Autoencoder, ControlledUNet
from maisi_tools.tsp.errors import MemoryLimitError
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.tsp.plan import Plan
from maisi_tools.tsp.whole import Whole
from maisi_tools.volumes.checks import check_output_size

UNLIMITED = 2**60
"""Bytes: a limit that no plan reaches, in place of what this machine happens to have free."""


@dataclass(frozen=True)
class Footprint:
    """A stage's name ("decoder") and how it is run, or why there is no way under the limit."""

    stage: str
    plan: Plan | Whole | None
    refusal: str = ""


def footprints(
    configs: Sequence[str | Path],
    output_size: Sequence[int],
    splits: int | None = None,
    memory_limit: str | int | None = None,
    device: str = "cpu",
) -> list[Footprint]:
    """Plan every network that a bundle's inference config runs.

    Args:
        configs: the bundle's inference.json, and overlays such as full_rflow.json.
        output_size: voxels of the CT.
        splits, memory_limit: in place of the config's own (:class:`~maisi_tools.tsp.inferer.TSPInferer`); where neither
            has a limit, it plans without one.
        device: "cpu" or "cuda", for which to plan; it need not be there.

    Raises:
        InputError: the size is not legal for the bundle's networks; an overlay of another config, the mask
            generator's, or one for several processes.
        TSPError: splits that are no whole number, or a limit that is no size.
    """
    _check_overlays(configs)
    parser = Stage(Path(configs[0]).parent.parent, [Path(path).absolute() for path in configs], device).parser
    with torch.device("meta"):
        multiple = parser.get_parsed_content("size_multiple" if "size_multiple" in parser.get() else "factor")
    size = check_output_size(output_size, int(multiple))
    own = parser.get_parsed_content("tsp").settings
    limit = own.memory_limit if memory_limit is None else memory_limit
    inferer = TSPInferer(
        own.splits if splits is None else splits,
        own.axis,
        UNLIMITED if limit is None else limit,
        own.offload,
        own.dtype,
        [device] * len(own.devices or [device]),
    )
    found = []
    for stage, network, inputs in _stages(parser, size, device):
        try:
            with torch.no_grad():
                found.append(Footprint(stage, inferer.plan(inputs[0], network, *inputs[1:])))
        except MemoryLimitError as error:
            found.append(Footprint(stage, None, str(error)))
    return found


def _check_overlays(configs: Sequence[str | Path]) -> None:
    """Refuse what does not go over the first of the configs."""
    base, known = Path(configs[0]).name, set[str]()
    for path in configs:
        content = ConfigParser.load_config_file(str(path))
        keys = {key.removeprefix("+") for key in content}
        known |= {key for key in keys if not re.search("#|::", key)}
        if absent := sorted({re.split("#|::", key)[0] for key in keys} - known):
            raise InputError(
                f"{Path(path).name} changes {', '.join(absent)}, which {base} does not have; allowed are overlays of "
                f"{base}, such as full_rflow.json"
            )
        if content.get("tsp#devices") == "ranks":
            raise InputError(
                f"{Path(path).name} spreads a volume over the processes that torchrun starts, and a plan is of one; "
                f"allowed are {base} and its overlays for one process: leave it out, each of N computes 1/N of the rows"
            )
        if "organs" in content:
            raise InputError(
                f"{Path(path).name} is a config of the mask generator, whose masks have one size with its weights; "
                f"allowed are {base} and its overlays: leave it out"
            )
        if "bundle_root" in content and path != configs[0]:
            raise InputError(
                f"{Path(path).name} is a config by itself, which goes over no other; allowed are overlays of {base}, "
                "such as full_rflow.json: leave it out"
            )


def _stages(
    parser: ConfigParser, size: Sequence[int], device: str
) -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def").eval()
        for module in network.modules():
            if hasattr(module, "use_flash_attention"):  # the config asked this machine, not the one planned for
                module.use_flash_attention = device == "cuda"
        image, timestep = torch.empty(1, 1, *size), torch.empty(1)
        autoencoder = (
            network if isinstance(network, Autoencoder) else parser.get_parsed_content("autoencoder_def").eval()
        )
        latent = torch.empty(1, autoencoder.latent_channels, *(n // autoencoder.factor for n in size))
        if network is autoencoder:
            yield "encoder", lambda x: autoencoder.encode(x)[0], (image,)
        elif isinstance(network, ControlledUNet):
            embedding = network.embed(image)
            yield "mask embedding, once", network.embed, (image,)
            yield "U-Net and ControlNet, each step", network.denoise, (latent, embedding, timestep)
        else:
            seen = torch.empty(1, network.in_channels, *latent.shape[2:])  # a coarse CT beside the latent, with some
            yield "U-Net, each step", network, (seen, timestep)
        yield "decoder", autoencoder.decode, (latent,)
