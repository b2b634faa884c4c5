"""The bundles with narrow networks, for tests of what is around them: a CT takes a quarter of the time.

Configs, documents and everything else are the bundles' own; the weights are a corner of the shipped ones. What they
make is no anatomy, but it is in HU, differs from seed to seed, and follows its mask where code says so (air around a
body, the voxels that an edit leaves).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from maisi_tools.weights import save_weights

NETWORKS = {"network_def": "model.pt", "autoencoder_def": "autoencoder.pt"}


def narrow(definition: dict[str, Any]) -> None:
    """Give a network of the small weights 8 channels a level, and 16 at the lowest."""
    if "unet" in definition:
        narrow(definition["unet"])
        definition["controlnet"]["conditioning_embedding_num_channels"] = [8, 8]
        return
    definition["num_channels"] = [8] * (len(definition["num_channels"]) - 1) + [16]
    definition["norm_num_groups"] = 4
    if "num_head_channels" in definition:
        definition["num_head_channels"] = [8 if width else 0 for width in definition["num_head_channels"]]


def make_bundles(bundles: Path, folder: Path) -> Path:
    """Write the bundles with narrow networks and their weights into a folder, and return it.

    The mask generator, which is in no config that runs often, stays as it is.
    """
    for source in bundles.glob("maisi_*"):
        root = folder / source.name
        shutil.copytree(source, root, ignore=shutil.ignore_patterns("eval", "models", "input"))
        (root / "models").mkdir()
        for path in (root / "configs").glob("*.json"):
            if (source.name, path.name) == ("maisi_vae", "train.json"):
                continue  # the linear start needs the channels for its components
            content = json.loads(path.read_text())
            found = [content[name] for name in NETWORKS if "num_channels" in str(content.get(name))]
            for definition in found:
                narrow(definition)
            if found:
                path.write_text(json.dumps(content, indent=4))
        definitions = json.loads((root / "configs" / "inference.json").read_text())
        wide = {path.name: path for path in (source / "models").glob("*.pt")}
        for name in NETWORKS.keys() & definitions.keys():
            _cut(definitions[name], wide.pop(NETWORKS[name]), root / "models" / NETWORKS[name])
        for path in wide.values():
            (root / "models" / path.name).symlink_to(path)
    return folder


def _cut(definition: dict[str, Any], wide: Path, path: Path) -> None:
    """Save the first channels of a file's weights as those of a network."""
    shipped = torch.load(wide, weights_only=True)
    values = shipped.pop("model")
    network = ConfigParser({"network": definition}).get_parsed_content("network")
    state = {name: values[name][tuple(slice(n) for n in value.shape)] for name, value in network.state_dict().items()}
    save_weights(path, state, **shipped)
