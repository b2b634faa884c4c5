"""What a studio can make, as its page shows it and as requests are checked against it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from maisi_tools.bundles.stage import Stage, config_files
from maisi_tools.diffusion.samplers import SOLVERS, Scheduler
from maisi_tools.mask_generator.sizes import OrganSizes
from maisi_tools.masks.label_maps import LABEL_MAPS
from maisi_tools.masks.phantom import CENTERS
from maisi_tools.masks.vocabulary import BODY, HOSTS, VOCABULARY, display_name
from maisi_tools.studio.folders import Folders
from maisi_tools.volumes.limits import limit
from maisi_tools.volumes.presets import Preset, presets_of
from maisi_tools.weights import read_weights

CONTROLNET, LDM = "maisi_controlnet", "maisi_ldm"
MASK_CONFIG = "mask_inference.json"

SMALL = "small"
"""The weights that are shipped; others are overlays whose files are there."""

SOURCES = ("phantom", "generator", "upload", "job", "ct")
"""Where a mask may come from; "ct" edits a real CT."""

WAITING = 100
"""Jobs that may wait."""

NAMES = {display_name(label): label for label in VOCABULARY if label != BODY}
"""Structures as a reader knows them -> label; a placeholder that stands for nothing is among them by its number."""


@dataclass(frozen=True)
class Weights:
    """A set of weights whose files are there, and what their config says of them.

    Attributes:
        overlays: over inference.json.
        presets: name -> field of view.
        spacing_range: (lowest, highest) mm for x, y, z.
        multiple: what has to divide a size.
        defaults: of ``solver``, ``num_inference_steps`` and ``guidance_scale``.
        scheduler: which steps and solvers are checked with.
    """

    name: str
    note: str
    overlays: tuple[str, ...]
    presets: Mapping[str, Preset]
    spacing_range: Sequence[Sequence[float]]
    multiple: int
    defaults: Mapping[str, Any]
    scheduler: Scheduler


class Catalogue:
    """See the module.

    Args:
        folders: of the studio.
        devices: on which jobs can run.
        upload_bytes: of one upload, at most.
    """

    def __init__(self, folders: Folders, devices: Sequence[str], upload_bytes: int | None = None) -> None:
        self.folders, self.devices = folders, tuple(devices)
        self.upload_bytes = upload_bytes or limit("MAISI_MAX_FILE_BYTES")
        overlays = sorted((folders.bundles / CONTROLNET / "configs").glob("full_*.json"))
        found = [_weights(folders.bundles, [file.name] if file else []) for file in (None, *overlays)]
        self.weights = {one.name: one for one in found if one is not None}
        mask = ConfigParser.load_config_file(config_files(folders.bundles / LDM, MASK_CONFIG)[0])
        self.organs = OrganSizes(mask["organs"])
        self.mask_labels = [int(label) for label in mask["classes"] if label]
        self.mask_defaults = {key: mask["displayable_configs"][key] for key in ("solver", "num_inference_steps")}
        self.mask_grid = tuple(mask["output_size"]), tuple(mask["spacing"])

    @cached_property
    def _means(self) -> list[float]:
        """Of the organs' sizes in the training masks, as shares of their ranges."""
        weights = read_weights(self.folders.bundles / LDM / "models" / "mask_model.pt")
        return weights["prior.size_mean"].tolist()

    def options(self) -> dict[str, Any]:
        """What ``GET /v1/options`` answers."""
        ranges = {name: organ["range"] for name, organ in self.organs.organs.items()}
        return {
            "sources": SOURCES,
            "bodies": list(CENTERS),
            "organs": [
                {"name": name, "low_ml": low, "mean_ml": round(low + mean * (high - low), 1), "high_ml": high}
                for (name, (low, high)), mean in zip(ranges.items(), self._means, strict=True)
            ],
            "structures": [name for name in NAMES if not name.startswith("placeholder")],
            "lesions": [{"name": name, "hosts": hosts} for name, hosts in HOSTS.items()],
            "presets": [
                {"name": name, **asdict(preset), "field_of_view": preset.field_of_view, "weights": weights.name}
                for weights in self.weights.values()
                for name, preset in weights.presets.items()
            ],
            "weights": [{"name": one.name, "note": one.note} for one in self.weights.values()],
            "spacing_ranges": {one.name: one.spacing_range for one in self.weights.values()},
            "label_maps": [*LABEL_MAPS, *self.folders.label_maps()],
            "solvers": SOLVERS,
            "devices": self.devices,
            "defaults": {
                "seed": 0,
                "weights": SMALL,
                "device": self.devices[0],
                # Guidance is left to the config: weights and edits have their own.
                **{key: self.weights[SMALL].defaults[key] for key in ("solver", "num_inference_steps")},
                "mask": self.mask_defaults,
            },
            "limits": {"upload_bytes": self.upload_bytes, "jobs": WAITING},
            "dicom": has_dicom(),
            "vocabulary": [{"id": label, "name": display_name(label)} for label in VOCABULARY],
        }


def has_dicom() -> bool:
    """Whether the extra 'dicom' is there."""
    return importlib.util.find_spec("highdicom") is not None


def _weights(bundles: Path, overlays: Sequence[str]) -> Weights | None:
    """Weights by their overlay; None for one that trains, or whose files are not there."""
    if any(name.endswith("_train.json") for name in overlays):
        return None
    parser = Stage(bundles / CONTROLNET, ["inference.json", *overlays], "cpu").parser
    if not all(Path(path).is_file() for path in parser.get_parsed_content("weights")):
        return None
    with torch.device("meta"):
        multiple = int(parser.get_parsed_content("size_multiple"))
    return Weights(
        name=overlays[0].removesuffix(".json") if overlays else SMALL,
        note=f"the released networks, {overlays[0]}" if overlays else "shipped with the bundles: head and neck",
        overlays=tuple(overlays),
        presets=presets_of(parser.get_parsed_content("presets")),
        spacing_range=parser.get_parsed_content("spacing_range"),
        multiple=multiple,
        defaults={key: parser.get_parsed_content(key) for key in ("solver", "num_inference_steps", "guidance_scale")},
        scheduler=parser.get_parsed_content("scheduler"),
    )
