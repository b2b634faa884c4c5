"""Segments CT files with a network that somebody trained: any MONAI bundle with the usual keys in its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImage, SaveImaged

from maisi_tools.bundles.stage import Stage
from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.volumes.writing import WriteVolumed
from maisi_tools.weights import load_weights

KEYS = ("network_def", "preprocessing", "inferer", "postprocessing")
"""What the config must define, as the bundles of MONAI's model zoo do; the CT is ``image``, the result ``pred``."""


class BundleSegmenter:
    """The segmentation network of a bundle, as a function from a CT's file to its labels.

    The bundle's own preprocessing, inferer and postprocessing run, but for the transforms that write files.

    Args:
        config_file: the bundle's inference config (``BUNDLE/configs/inference.json``), ``metadata.json`` beside it.
        ckpt_path: the weights; None for ``models/model.pt`` of the bundle.
        device: where the network runs.

    Attributes:
        classes: name -> label in the results, from the ``channel_def`` of the first output in metadata.json, without
            the background.
        weights: the file that was read.

    Raises:
        InputError: a file is missing, is no config of a segmentation bundle, or the weights do not fit.
    """

    def __init__(
        self, config_file: str | Path, ckpt_path: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> None:
        config = expanded(config_file)
        if not config.is_file():
            raise InputError(
                f"{config} does not exist; a segmentation network is named by its bundle's inference config, "
                "BUNDLE/configs/inference.json, with metadata.json beside it"
            )
        root = config.resolve().parent.parent
        self.classes = read_classes(config.with_name("metadata.json"))
        self.device = torch.device(device)
        stage = Stage(root, config.resolve(), str(self.device))
        if missing := [key for key in KEYS if key not in stage.parser]:
            raise InputError(
                f"{config} has no {', '.join(missing)}; allowed is a segmentation bundle's inference config, with "
                f"{', '.join(KEYS)}"
            )
        self.weights = Path(ckpt_path or root / "models" / "model.pt")
        self.network = load_weights(stage.parser.get_parsed_content("network_def"), self.weights)
        self.network.to(self.device).eval()
        self.preprocessing, self.inferer = stage.preprocessing, stage.inferer
        transforms = Compose(stage.postprocessing).flatten().transforms
        self.postprocessing = Compose([t for t in transforms if not isinstance(t, _WRITERS)])

    def __call__(self, path: str | Path) -> MetaTensor:
        """Labels (1, X, Y, Z) of the CT in a file, with the grid's affine.

        Raises:
            InputError: the bundle's postprocessing does not end in one channel of labels.
        """
        item: dict[str, Any] = dict(self.preprocessing({"image": str(path)}))
        with torch.no_grad():
            item["pred"] = self.inferer(item["image"][None].to(self.device), self.network)[0].cpu()
        labels = self.postprocessing(item)["pred"]
        if labels.ndim != 4 or labels.shape[0] != 1:
            raise InputError(
                f"the segmentation bundle makes a result of shape {tuple(labels.shape)} of {path}; allowed is one "
                "channel of labels: end its postprocessing in AsDiscreted(argmax=True)"
            )
        return labels


_WRITERS = (SaveImage, SaveImaged, WriteVolumed)


def read_classes(metadata: str | Path) -> dict[str, int]:
    """Name -> label of a segmentation bundle's results, without the background, from its metadata.json.

    They are the ``channel_def`` of the first of its outputs.

    Raises:
        InputError: the file is missing, or does not say it.
    """
    path = Path(metadata)
    try:
        outputs = json.loads(path.read_text())["network_data_format"]["outputs"]
        channels = next(iter(outputs.values()))["channel_def"]
        found = {str(name): int(number) for number, name in channels.items() if int(number) != 0}
    except (OSError, KeyError, StopIteration, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not say what the network's labels are ({type(error).__name__}: {error}); allowed is "
            'network_data_format.outputs.pred.channel_def such as {"0": "background", "1": "spleen"}'
        ) from None
    if not found:
        raise InputError(f"{path} lists no class but the background in channel_def; add the network's classes")
    return found
