"""The edit of a real CT in MONAI Label: edits as text, the labels that a request means, the whole scan as answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from maisi_tools.errors import InputError
from maisi_tools.volumes.inputs import SUFFIXES, stem_of
from maisi_tools.volumes.patching import read_stored
from maisi_tools.volumes.reading import read_sidecar

SUBMITTED = Path("labels", "final")
"""Where MONAI Label's local datastore puts the labels that its users submit, beside the images."""


def read_edits(given: Any) -> Any:
    """The edits of a request, see :func:`~maisi_tools.masks.edits.apply_edits`.

    Args:
        given: edits; or their text, JSON or YAML, as a form of 3D Slicer or OHIF sends it. None of an empty one.

    Raises:
        InputError: a text that is neither.
    """
    try:
        return yaml.safe_load(given) if isinstance(given, str) else given
    except yaml.YAMLError as error:
        raise InputError(
            f"edits are {given!r}, which is no JSON or YAML ({error}); allowed is such as "
            '{"resize": {"left parotid gland": 0.7}}'
        ) from error


class RequestedMaskd(MapTransform):
    """MONAI dict transform: the path of the labels that a request to MONAI Label means.

    They are the first of what there is of: ``mask`` in the request, a path, from the image's folder; the file that was
    uploaded as ``label``; the label that was submitted for this image, in :data:`SUBMITTED` beside it, the newest.

    Args:
        keys: ``mask``, and further paths that a request may have; empty ones are left out.
        image_key: of the path of the image.

    Raises:
        InputError: there are no labels.
    """

    def __init__(self, keys: KeysCollection, image_key: str) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item, image = dict(data), Path(data[self.image_key])
        for key in self.key_iterator(data):
            if given := item.pop(key):
                item[key] = str(image.parent / str(given))
        if "mask" not in item:
            item["mask"] = str(item.get("label") or _submitted(image))
        return item


def _submitted(image: Path) -> Path:
    folder = image.parent / SUBMITTED
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem_of(image)}{suffix}").is_file()]
    if not found:
        raise InputError(
            f"there are no labels of {image}, and none in {folder}; allowed are the parameter mask, a path from "
            "the image's folder, a file uploaded as label, or a label that was submitted: give one of them"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


class EditedScand(MapTransform):
    """MONAI dict transform: the whole edited scan, as MONAI Label answers with it.

    Args:
        keys: gets HU (1, X, Y, Z) with the axes and the affine of the scan's file, in the first of int16, float32 and
            float64 that holds all of them exactly. ``result`` gets what the sidecar says (edits, volumes, HU).

    The item is what :class:`~maisi_tools.diffusion.editing.WriteEditd` gives.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        path = data["ct_path"]
        scan = read_stored(path, "ct")
        edited = MetaTensor(torch.from_numpy(scan.meant())[None], affine=torch.as_tensor(scan.affine))
        return {**data, **dict.fromkeys(self.keys, edited), "result": read_sidecar(path)}
