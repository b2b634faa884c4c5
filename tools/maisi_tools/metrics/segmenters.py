"""Labels of a CT by whoever can segment it: a MONAI bundle, TotalSegmentator, or thresholds alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Orientation, SpatialResample

from maisi_tools.errors import InputError
from maisi_tools.files import canonical_json, expanded, fingerprint_tensors, fingerprint_text
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap, apply_label_map, read_label_map
from maisi_tools.masks.vocabulary import label_id
from maisi_tools.metrics.segmentation import BundleSegmenter
from maisi_tools.volumes.grid import same_grid
from maisi_tools.volumes.reading import as_volume

logger = logging.getLogger(__name__)

THRESHOLDS, TOTALSEGMENTATOR = "thresholds", "totalsegmentator"
"""Segmenters that have a name; every other one is a bundle's folder."""

CONFIGS = ("inference.json", "inference.yaml", "inference.yml")


@dataclass(frozen=True)
class Segmenter:
    """Makes a mask in the vocabulary of a CT.

    Attributes:
        name: as the user gave it.
        segment: CT file (NIfTI, in HU) -> its labels (1, X, Y, Z), with an affine; None finds nothing.
        label_map: of these labels.
        fingerprint: of the network's weights, empty where there are none of ours.
        config: fingerprint of what a bundle's config says, else empty.
    """

    name: str
    segment: Callable[[Path], MetaTensor] | None = None
    label_map: LabelMap = field(default_factory=lambda: LABEL_MAPS["maisi"])
    fingerprint: str = ""
    config: str = ""

    def __call__(self, path: Path, ct: MetaTensor, may_be_empty: bool = False) -> np.ndarray:
        """Labels (X, Y, Z), uint8, of the CT in a file, on its grid.

        Args:
            path: of the CT.
            ct: (1, X, Y, Z), what is in the file, in RAS.
            may_be_empty: whether nothing may be found.

        Raises:
            InputError: labels that the label map does not know, or none at all.
        """
        if self.segment is None:
            return np.zeros(ct.shape[1:], dtype=np.uint8)
        found = labels_on_grid(self.segment(path), ct)
        if may_be_empty and not found.any():
            return np.zeros(ct.shape[1:], dtype=np.uint8)
        try:
            return apply_label_map(found.as_tensor()[0].cpu().numpy(), self.label_map)
        except InputError as error:
            raise InputError(f"segmenter {self.name}: {error}") from None


def labels_on_grid(found: Any, ct: MetaTensor) -> MetaTensor:
    """Labels on the grid of their CT: a segmentation bundle need not undo its own orientation and resampling.

    Args:
        found: (1, X, Y, Z), with an affine.
        ct: (1, X, Y, Z), in RAS.
    """
    found = Orientation(axcodes="RAS", labels=None)(found)
    if same_grid(found, ct):
        return found
    resample: Any = SpatialResample(mode="nearest", padding_mode="zeros", align_corners=False)
    return resample(found.float(), dst_affine=ct.affine, spatial_size=ct.shape[1:])


def open_segmenter(name: str, label_map: str | None = None, device: str = "cpu") -> Segmenter:
    """A segmenter by its name or its bundle.

    Args:
        name: "thresholds" (which leaves all to the completion of the mask by HU), "totalsegmentator", or the folder of
            a MONAI bundle that segments CTs, with its weights in ``models/model.pt``.
        label_map: how a bundle's labels are to be read; None goes by the names of its classes.
        device: for the network.

    Raises:
        InputError: no such segmenter, one that is not installed, or classes that cannot be read.
    """
    if label_map is not None and name in (THRESHOLDS, TOTALSEGMENTATOR):
        raise InputError(f"label_map is {label_map!r}; {name} has its own: leave it out")
    if name == THRESHOLDS:
        return Segmenter(name)
    if name == TOTALSEGMENTATOR:
        return Segmenter(name, _totalsegmentator(device), LABEL_MAPS[TOTALSEGMENTATOR])
    folder = expanded(name)
    configs = [folder / "configs" / one for one in CONFIGS]
    config = next((path for path in configs if path.is_file()), None)
    if config is None:
        raise InputError(
            f"segmenter {name!r} has no {configs[0]}; allowed are {THRESHOLDS}, {TOTALSEGMENTATOR}, and the folder of "
            "a MONAI bundle that segments CTs, such as evaluation/segmentation"
        )
    bundle = BundleSegmenter(config, device=device)
    if label_map is not None:
        read = read_label_map(label_map)
    else:
        read = map_of_classes(name, bundle.classes)
        if unread := [known for known, label in bundle.classes.items() if label not in read]:
            logger.warning(
                "segmenter %s: the classes %s have no name of the vocabulary and are not found; give a label map that "
                "says what they are",
                name,
                ", ".join(unread),
            )
    says = fingerprint_text(canonical_json(ConfigParser.load_config_file(config)))
    return Segmenter(name, bundle, read, fingerprint_tensors(bundle.network.state_dict()), says)


def map_of_classes(name: str, classes: Mapping[str, int]) -> LabelMap:
    """How to read labels whose classes have names of the vocabulary, of TotalSegmentator or of a known data set.

    Args:
        name: of what has them.
        classes: name -> label.

    Raises:
        InputError: not one name is known.
    """
    ids: dict[int, int] = {}
    for known, label in classes.items():
        try:
            ids[label] = label_id(known)
        except InputError:
            numbers = [(one, one.label_of(known)) for one in LABEL_MAPS.values()]
            meanings = {one[number] for one, number in numbers if number is not None and number in one.ids}
            if len(meanings) == 1:
                ids[label] = meanings.pop()
    if not ids:
        raise InputError(
            f"{name} has the classes {', '.join(classes)}, and the vocabulary has none of them; say what they are with "
            "--label_map: a name such as openkbp, or a JSON file"
        )
    return LabelMap(name, ids, {label: known for known, label in classes.items()})


def _totalsegmentator(device: str) -> Callable[[Path], MetaTensor]:
    try:
        from totalsegmentator.python_api import totalsegmentator
    except ImportError as error:
        raise InputError(
            "segmenter totalsegmentator is not installed; install it with: pip install TotalSegmentator"
        ) from error

    def segment(path: Path) -> MetaTensor:
        place = "cpu" if torch.device(device).type == "cpu" else "gpu"
        image = totalsegmentator(nib.load(path), ml=True, task="total", quiet=True, device=place)
        return as_volume(np.asarray(image.dataobj)[None].astype(np.float32), image.affine, path)

    return segment
