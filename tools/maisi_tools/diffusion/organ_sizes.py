"""The condition of the mask generator: how large each of a few organs is (paper section 3.3, "anatomy size")."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.errors import InputError
from maisi_tools.masks.edits import volumes_ml
from maisi_tools.masks.vocabulary import VOCABULARY

UNKNOWN = -1.0
"""Stands for a size that is not given, as in the MAISI release: the organ may have any size, or be absent."""


@dataclass(frozen=True)
class OrganSizes:
    """The organs whose sizes particular weights know, in the order of the network's input.

    Args:
        organs: name -> ``{"label": id in the vocabulary, "range": [lowest, highest]}``, in ml. The range is that of the
            training masks; sizes enter the network as 0 at its lower end and 1 at its upper one.

    Raises:
        InputError: an unknown label, or a range that is none.
    """

    organs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, organ in self.organs.items():
            low, high = organ["range"]
            if organ["label"] not in VOCABULARY or not (math.isfinite(high) and 0 <= low < high):
                raise InputError(
                    f"organ {name!r} has {dict(organ)}; allowed are a label of the vocabulary and a range [lowest, "
                    "highest] in ml"
                )

    def vector(self, asked: Mapping[str, float] | None) -> Tensor:
        """The network's input (number of organs,) for sizes in ml; organs that are not asked for are :data:`UNKNOWN`.

        Raises:
            InputError: an organ these weights do not know, or a size outside its range.
        """
        asked = asked or {}
        if not isinstance(asked, Mapping):
            raise InputError(f"organ_sizes is {asked!r}; allowed is organ -> ml: {self._example()}")
        given = {str(name).strip().casefold(): value for name, value in asked.items()}
        known = {name.casefold(): name for name in self.organs}
        if unknown := sorted(given.keys() - known.keys()):
            raise InputError(f"organ_sizes has {', '.join(unknown)}; these weights know {', '.join(self.organs)}")
        values = []
        for key, name in known.items():
            low, high = self.organs[name]["range"]
            if key not in given:
                values.append(UNKNOWN)
                continue
            size = given[key]
            if not isinstance(size, (int, float)) or isinstance(size, bool) or not low <= size <= high:
                raise InputError(f"organ_sizes has {name}: {size!r}; allowed are {low:g} to {high:g} ml")
            values.append((size - low) / (high - low))
        return torch.tensor(values)

    def of_volumes(self, volumes: Mapping[int, float]) -> Tensor:
        """The network's input for a mask whose labels have these `volumes` in ml; absent ones are :data:`UNKNOWN`.

        Sizes beyond the range, of rare patients, count as its end.
        """
        values = []
        for organ in self.organs.values():
            low, high = organ["range"]
            size = volumes.get(int(organ["label"]), 0.0)
            values.append(min(max((size - low) / (high - low), 0.0), 1.0) if size > 0 else UNKNOWN)
        return torch.tensor(values)

    def named(self, volumes: Mapping[int, float]) -> dict[str, float]:
        """Organ -> ml, to a tenth; 0 for one that the mask does not have."""
        return {name: round(volumes.get(int(organ["label"]), 0.0), 1) for name, organ in self.organs.items()}

    def _example(self) -> str:
        name, organ = next(iter(self.organs.items()))
        return str({name: organ["range"][1]})


class MeasureOrgansd(MapTransform):
    """Adds ``organ_ml``, organ -> volume in ml, of a mask ``MetaTensor`` (1, D, H, W).

    Args:
        keys: key of the mask.
        organs: see :class:`OrganSizes`.
    """

    def __init__(self, keys: str, organs: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(keys)
        self.sizes = OrganSizes(organs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, "organ_ml": self.sizes.named(_volumes_of(data[self.keys[0]]))}


class MeasureLabelsd(MapTransform):
    """Adds ``label_ml``, label (as text, for JSON) -> volume in ml, of a mask ``MetaTensor`` (1, D, H, W).

    Args:
        keys: key of the mask.
        labels: those measured; 0 for one that the mask does not have.
    """

    def __init__(self, keys: str, labels: Sequence[int]) -> None:
        super().__init__(keys)
        self.labels = [int(label) for label in labels]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        volumes = _volumes_of(data[self.keys[0]])
        return {**data, "label_ml": {str(label): volumes.get(label, 0.0) for label in self.labels}}


def _volumes_of(mask: Any) -> dict[int, float]:
    return volumes_ml(np.asarray(mask)[0].astype(np.uint8), [float(mm) for mm in mask.pixdim])


def labels_of_channels(classes: Sequence[int] | str) -> list[int]:
    """The label that each output channel of the mask autoencoder stands for.

    Args:
        classes: the labels, or the path of the release's ``label_dict_124_to_132.json``: name -> [channel, label].

    Raises:
        InputError: no such file, or its channels have gaps.
    """
    if not isinstance(classes, str):
        return [int(label) for label in classes]
    path = Path(classes)
    try:
        pairs = {int(channel): int(label) for channel, label in json.loads(path.read_text()).values()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"classes file {path} cannot be read as JSON with name -> [channel, label] ({error}); give the "
            "label_dict_124_to_132.json of the MAISI release"
        ) from error
    pairs[0] = 0
    if sorted(pairs) != list(range(len(pairs))):
        raise InputError(f"classes file {path} has channels with gaps; allowed is one entry for each channel")
    return [pairs[channel] for channel in range(len(pairs))]
