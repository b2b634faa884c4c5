"""The condition of the mask generator: how large each of a few organs is (paper section 3.3, "anatomy size")."""

from __future__ import annotations

import contextlib
import copy
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
from maisi_tools.masks.edits import YIELDING, resize_organ, volumes_ml
from maisi_tools.masks.vocabulary import BODY, VOCABULARY

UNKNOWN = -1.0
"""Stands for a size that is not given, as in the MAISI release: the organ may have any size, or be absent."""

TOLERANCE = 0.1
"""A size is as asked for within this share of it."""

LEEWAY = 0.75
"""So far beyond the range of the training masks, as a share of it, a draw may be asked for to get inside it."""

RARE = 0.1
"""Up to this share of training cases may lie beyond a range without a word: they count as its end. The ranges of
``train_mask.json`` are those of the middle 95 % of the OpenKBP masks."""


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
        asked = {} if asked is None else asked
        if not isinstance(asked, Mapping):
            raise InputError(f"organ_sizes is {asked!r}; allowed is organ -> ml: {self._example()}")
        given = {str(name).strip().casefold(): value for name, value in asked.items()}
        known = {name.casefold(): name for name in self.organs}
        if unknown := sorted(given.keys() - known.keys()):
            raise InputError(f"organ_sizes has {', '.join(unknown)}; these weights know {', '.join(self.organs)}")
        if len(given) < len(asked):
            raise InputError(f"organ_sizes has {', '.join(map(str, asked))}, one organ twice; give each once")
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


def organ_ranges(organs: Mapping[str, Mapping[str, Any]]) -> list[list[float]]:
    """What a network's input of sizes means: the label and the range in ml of each organ, in order.

    Args:
        organs: see :class:`OrganSizes`.
    """
    return [[organ["label"], *organ["range"]] for organ in OrganSizes(organs).organs.values()]


def whole_range(values: Sequence[float]) -> list[int]:
    """[lowest, highest] around these values, whole numbers and not the same."""
    low = math.floor(min(values))
    return [low, max(math.ceil(max(values)), low + 1)]


class AskedSizes:
    """The sizes that masks are asked for: the network's condition, how near a mask comes, and what can be mended.

    Args:
        organs: see :class:`OrganSizes`.
        asked: organ -> ml.
        spacing: of the masks, mm along x, y, z.
        max_resize: an organ is resized by this factor of its volume at most, up or down; with 1 none is.
        in_ml: False where the ranges are not in ml, as with the release's networks: masks are then as they are drawn.

    Attributes:
        vector: (number of organs,), see :meth:`OrganSizes.vector`.
        names: label -> organ, in the order of the vector, as are the `ranges` in ml.
        ml: label -> ml asked for; empty where `in_ml` is False.

    Raises:
        InputError: an organ these weights do not know, a size outside its range, or `max_resize` below 1.
    """

    def __init__(
        self,
        organs: Mapping[str, Mapping[str, Any]],
        asked: Mapping[str, float] | None,
        spacing: Sequence[float],
        max_resize: float = 1.0,
        in_ml: bool = True,
    ) -> None:
        if not isinstance(max_resize, (int, float)) or isinstance(max_resize, bool) or not 1 <= max_resize < math.inf:
            raise InputError(f"max_resize is {max_resize!r}; allowed is a factor of the volume from 1 (no resizing) on")
        self.vector = OrganSizes(organs).vector(asked)
        given = {str(name).strip().casefold(): float(ml) for name, ml in (asked or {}).items()} if in_ml else {}
        self.names = {int(organ["label"]): name for name, organ in organs.items()}
        self.ranges = [tuple(map(float, organ["range"])) for organ in organs.values()]
        self.ml = {label: given[name.casefold()] for label, name in self.names.items() if name.casefold() in given}
        self.spacing = tuple(float(mm) for mm in spacing)
        self.max_resize = float(max_resize)
        self.in_ml = bool(in_ml)

    def completed(self, vector: Tensor) -> AskedSizes:
        """The same with all organs that a fuller `vector` asks for, but for the body, which is not resized."""
        full = copy.copy(self)
        full.vector = vector
        if self.in_ml:
            for label, size, (low, high) in zip(self.names, vector.tolist(), self.ranges, strict=True):
                if label not in self.ml and label != BODY and size != UNKNOWN:
                    full.ml = {**full.ml, label: low + size * (high - low)}
        return full

    def resize(self, labels: np.ndarray) -> np.ndarray:
        """The mask (X, Y, Z) with its organs resized to what is asked for, as far as `max_resize` and room allow.

        The body, which is what the others leave, stays; so do organs that the mask does not have.
        """
        yielding_last = sorted(self.ml, key=lambda label: VOCABULARY[label].group in YIELDING)
        for label in yielding_last if self.max_resize > 1 else []:
            got = volumes_ml(labels, self.spacing).get(label, 0.0)
            if got and label != BODY:
                factor = min(max(self.ml[label] / got, 1 / self.max_resize), self.max_resize)
                with contextlib.suppress(InputError):  # no room or no body: the size it was drawn with
                    labels = resize_organ(labels, self.spacing, label, factor)
        return labels

    def corrected(self, vector: Tensor, labels: np.ndarray) -> Tensor:
        """The condition for another draw from the same noise, after one with `vector` gave the mask (X, Y, Z).

        More is asked for of what came out too small, and less of what came out too large, by as much as it was off.
        """
        volumes = volumes_ml(labels, self.spacing)
        result = vector.clone()
        for i, (label, (low, high)) in enumerate(zip(self.names, self.ranges, strict=True)):
            if label in self.ml:
                result[i] += (self.ml[label] - volumes.get(label, 0.0)) / (high - low)
        return torch.where(vector == UNKNOWN, vector, result.clamp(-LEEWAY, 1 + LEEWAY))

    def misses(self, labels: np.ndarray) -> dict[str, float]:
        """Organ -> its ml in the mask (X, Y, Z), of the organs that are not what is asked for (:data:`TOLERANCE`)."""
        volumes = volumes_ml(labels, self.spacing)
        pairs = {self.names[label]: (volumes.get(label, 0.0), ml) for label, ml in self.ml.items()}
        return {name: round(got, 1) for name, (got, ml) in pairs.items() if abs(got - ml) > TOLERANCE * ml}

    def distance(self, labels: np.ndarray) -> float:
        """Mean over the organs that are asked for of the logarithm of the factor that their volume is off by.

        Half and twice the size are as far off. An organ that the mask does not have counts as one voxel of it.
        """
        volumes, voxel = volumes_ml(labels, self.spacing), math.prod(self.spacing) / 1000
        factors = [max(volumes.get(label, 0.0), voxel) / max(ml, voxel) for label, ml in self.ml.items()]
        return sum(abs(math.log(factor)) for factor in factors) / max(len(factors), 1)


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
