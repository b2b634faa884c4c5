"""The bundles with narrow networks and one step, for tests of what is around them: a CT takes a quarter of the time.

The weights are a corner of the shipped ones. What they make is no anatomy, but it is in HU, differs from seed to seed,
and follows its mask where code says so (air around a body, the voxels that an edit leaves).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from maisi_tools.weights import save_weights

NETWORKS = {
    "network_def": "ckpt_path",
    "autoencoder_def": "autoencoder_ckpt_path",
    "coarse_def": "coarse_ckpt_path",
}
"""A config's networks, and where it names their weights."""

WIDE = ("maisi_vae/train.json", "maisi_vae/encode_mask.json")
"""The linear start needs the channels for its components; the other is an overlay for weights of its own."""

OF_MASKS = {
    "prior_components": 2,
    "output_size": [48, 48, 48],
    "spacing": [5.0, 5.0, 3.4],
    "spacing_range": [[5.0, 5.0], [5.0, 5.0], [3.4, 3.4]],
    "displayable_configs::redraws": 0,
}
"""Changes of the mask generator's config."""


def narrow(definition: dict[str, Any]) -> None:
    """Give a network of the small weights 8 channels a level, and 16 at the lowest."""
    if "unet" in definition:
        narrow(definition["unet"])
        definition["controlnet"]["conditioning_embedding_num_channels"] = [8, 8]
        return
    channels = "channels" if "channels" in definition else "num_channels"
    # The lowest level's 16 for all that are as wide: a block has a shortcut of its own only between widths.
    definition[channels] = [16 if width == definition[channels][-1] else 8 for width in definition[channels]]
    definition["norm_num_groups"] = 4
    if definition["_target_"].endswith("CoarseUNet"):
        definition["prior_components"] = 2
    if "num_head_channels" in definition:
        definition["num_head_channels"] = [8 if width else 0 for width in definition["num_head_channels"]]


def make_bundles(bundles: Path, folder: Path) -> Path:
    """Write the bundles with narrow networks and their weights into a folder, and return it."""
    for source in bundles.glob("maisi_*"):
        root = folder / source.name
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("eval", "models", "input"))
        (root / "models").mkdir()
        for path in (root / "configs").glob("*.json"):
            parser = ConfigParser(json.loads(path.read_text()))
            definitions = [name for name in NETWORKS if isinstance(parser.get(name), dict)]
            if not definitions or path.name.startswith("full") or f"{source.name}/{path.name}" in WIDE:
                continue
            for name in definitions:
                narrow(parser[name])
            if "num_inference_steps" in parser.get("displayable_configs", {}):
                parser["displayable_configs::num_inference_steps"] = 1
            for key, value in OF_MASKS.items() if path.name == "mask_inference.json" else ():
                parser[key] = value
            path.write_text(json.dumps(parser.get(), indent=4))
            if path.name.endswith("inference.json"):
                parser["bundle_root"] = str(root)
                for name in definitions:
                    _cut(parser, name, source)
    return folder


def _cut(parser: ConfigParser, name: str, source: Path) -> None:
    """Save a corner of a bundle's weights as those of a network of a config."""
    path = Path(parser.get_parsed_content(NETWORKS[name]))
    shipped = torch.load(source / "models" / path.name, weights_only=True)
    values = shipped.pop("model")
    shipped.pop("autoencoder", None)  # of whose latents they are: not of a cut one's
    state = {
        key: values[key][tuple(slice(n) for n in value.shape)]
        for key, value in parser.get_parsed_content(name).state_dict().items()
    }
    save_weights(path, state, **shipped)
