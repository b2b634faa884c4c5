"""How the labels of a file are read: from its numbering to MAISI's vocabulary, and back."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from maisi_tools.errors import InputError
from maisi_tools.files import expanded, read_json
from maisi_tools.masks.data_sets import DATA_SETS
from maisi_tools.masks.vocabulary import ALLOWED, PLACEHOLDER_NAMES, VOCABULARY, display_name, label_id, labels_in_group
from maisi_tools.volumes.checks import whole_labels

logger = logging.getLogger(__name__)

LARGEST_LABEL = 65535
"""Labels above it are no plausible class numbers, and the lookup table of a mask is that long."""

AUTO = "auto"
"""In place of a placeholder id: the next free one."""

_PLACEHOLDER = re.compile(r"placeholder(?: (\d+))?(?:: *(.+))?", re.IGNORECASE)
"""What a JSON says for a new class: "placeholder", "placeholder 18", either followed by ": " and the class's name."""


@dataclass(frozen=True, eq=False)
class LabelMap(Mapping[int, int]):
    """A numbering of labels: label in the file -> id in the vocabulary (0 for what is to be dropped).

    Attributes:
        name: what it was read from: a name in :data:`LABEL_MAPS`, or the path of a JSON.
        ids: label in the file -> id.
        classes: label in the file -> its name there; those that ``ids`` lacks have no counterpart in the vocabulary.
        placeholders: those of ``ids`` that were assigned on request.
    """

    name: str
    ids: Mapping[int, int]
    classes: Mapping[int, str] = field(default_factory=dict)
    placeholders: Mapping[int, int] = field(default_factory=dict)

    def __getitem__(self, label: int) -> int:
        return self.ids[label]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def with_placeholders(self, request: str | Mapping[str | int, str | int] | None) -> LabelMap:
        """The same map with placeholder ids of the vocabulary for classes that have no counterpart there.

        Args:
            request: "auto" for one id for each such class, in the order of their numbers; or class (its name or its
                label in the file) -> placeholder id or "auto". Automatic ones are :data:`FREE`: not those of OpenKBP's
                structures, as which the small weights would draw them.

        Raises:
            InputError: no such class, no placeholder id, one that is taken, or none free; or a placeholder with the
                name of another class.
        """
        if request is None:
            return self
        if request == AUTO:
            request = {label: AUTO for label in sorted(self.classes.keys() - self.ids.keys())}
        if not isinstance(request, Mapping):
            raise InputError(f"placeholders is {request!r}; allowed are auto, or class -> id: {{'face': 129}}")
        wanted = {self._new_class(key): id for key, id in request.items()}
        taken = set(self.ids.values()) | {int(id) for id in wanted.values() if _is_number(id)}
        free = [id for id in FREE if id not in taken]
        assigned: dict[int, int] = {}
        for label, id in wanted.items():
            if id == AUTO:
                if not free:
                    raise InputError(
                        f"there are more new classes than free placeholder ids, which are {_text(FREE)}; drop some (0) "
                        "or, for weights other than the small ones, name the ids of what these know: "
                        + ", ".join(f"placeholder {id} ({name})" for id, name in PLACEHOLDER_NAMES.items())
                    )
                assigned[label] = free.pop(0)
                continue
            if not _is_number(id) or int(id) not in _PLACEHOLDERS:
                raise InputError(f"placeholders gives label {label} the id {id!r}; allowed are {_text(_PLACEHOLDERS)}")
            if int(id) in self.ids.values() or int(id) in assigned.values():
                raise InputError(f"placeholder id {int(id)} is taken by another class of {self.name}; give a free one")
            assigned[label] = int(id)
        extended = LabelMap(
            self.name,
            {**self.ids, **assigned},
            {**{label: f"label {label}" for label in assigned}, **self.classes},
            {**self.placeholders, **assigned},
        )
        extended._check_names()
        return extended

    def shown_to(self, keep_labels: Sequence[int] | None) -> LabelMap:
        """The same map; classes at ids that the weights (`keep_labels`) may know as something else are named."""
        others = {
            id: name
            for id, name in self.own_names.items()
            if id in (keep_labels or ()) and _plain(name) != PLACEHOLDER_NAMES.get(id, _plain(name))
        }
        if others:
            given = ", ".join(f"{id} is {name} here, {PLACEHOLDER_NAMES[id]} there" for id, name in others.items())
            logger.warning(
                "%s has ids by which the small weights know something else, and draw it: %s; free are %s: leave the "
                "id out, unless your weights learned these classes by it",
                self.name,
                given,
                _text(FREE),
            )
        return self

    @property
    def own_names(self) -> dict[int, str]:
        """Placeholder id -> the name of the class that has it in the file."""
        return {id: self.classes[label] for label, id in self.placeholders.items()}

    def display_name(self, id: int) -> str:
        """What a reader sees of an id: the name of the file's own class, or :func:`vocabulary.display_name`."""
        return self.own_names.get(id) or display_name(id)

    def label_of(self, name: str) -> int | None:
        """The label in the file of a class, by its name there (in any case, "_" for " "), else None."""
        wanted = _plain(name)
        return next((label for label, known in self.classes.items() if _plain(known) == wanted), None)

    def record(self, numbering: str) -> dict[str, Any]:
        """What a sidecar keeps of a mask's numbering, one of :data:`NUMBERINGS`; see :func:`recorded_label_map`."""
        placeholders = {name: id for id, name in self.own_names.items()}
        return {"numbering": numbering, "label_map": self.name, "placeholders": placeholders}

    @property
    def inverse(self) -> dict[int, int]:
        """Id in the vocabulary -> label in the file, the lowest where several share the id."""
        return {id: label for label, id in sorted(self.ids.items(), reverse=True) if id}

    @property
    def merged(self) -> dict[int, list[int]]:
        """Ids that several labels of the file share -> these labels."""
        sources: dict[int, list[int]] = {}
        for label, id in sorted(self.ids.items()):
            sources.setdefault(id, []).append(label)
        return {id: labels for id, labels in sources.items() if id and len(labels) > 1}

    def _check_names(self) -> None:
        """Refuse a placeholder whose name is another class's too: of what is listed by names, one would be lost."""
        for label in self.placeholders:
            name = self.classes[label]
            for other, known in {**self.classes, 0: "background"}.items():
                id = self.ids.get(other)
                names = {_plain(known), _plain(self.display_name(id)) if id else ""}
                if other != label and (other == 0 or id != 0) and _plain(name) in names:
                    raise InputError(
                        f"the placeholder of label {label} is called {name!r}, which is what label {other} is, too; "
                        "allowed are placeholders with names of their own: give one of the two another name, or "
                        "another meaning"
                    )

    def _new_class(self, key: str | int) -> int:
        """The label of a class that a placeholder is asked for."""
        label = int(key) if _is_number(key) else self.label_of(str(key))
        if label is None or not 0 < label <= LARGEST_LABEL:
            without = ", ".join(name for label, name in self.classes.items() if label not in self.ids) or "none"
            raise InputError(
                f"placeholders names the class {key!r}, which {self.name} does not have; allowed are labels of the "
                f"file, and the classes without counterpart: {without}"
            )
        if label in self.ids:
            raise InputError(
                f"placeholders names the class {key!r}, which {self.name} reads as "
                f"{self.ids[label]}; allowed are classes that have no counterpart in the vocabulary"
            )
        return label


def _of_data_set(name: str) -> LabelMap:
    rows = DATA_SETS[name]
    ids = {label: label_id(meaning) for label, _, meaning in rows if meaning is not None}
    return LabelMap(name, ids, {label: known for label, known, _ in rows})


LABEL_MAPS: dict[str, LabelMap] = {
    "maisi": LabelMap("maisi", {id: id for id in VOCABULARY}, {id: label.name for id, label in VOCABULARY.items()}),
    **{name: _of_data_set(name) for name in DATA_SETS},
}
"""The label maps that have a name."""

_PLACEHOLDERS = labels_in_group("placeholder")
FREE = tuple(id for id in _PLACEHOLDERS if id not in PLACEHOLDER_NAMES)
"""The placeholder ids that stand for nothing yet."""

JSON_HELP = (
    f"name one of {', '.join(LABEL_MAPS)}, "
    'or give a JSON file such as {"1": "liver", "2": 200, "3": "placeholder"}: label in the file -> name or id in '
    "MAISI's vocabulary or name in TotalSegmentator, 0 to drop a label, placeholder for a class that MAISI lacks"
)


def read_label_map(
    label_map: str | os.PathLike, placeholders: str | Mapping[str | int, str | int] | None = None
) -> LabelMap:
    """How to read a file's labels.

    Args:
        label_map: a name in :data:`LABEL_MAPS`, or the path of a JSON object. Its entries are file label -> name or id
            (``{"5": "liver"}``, names of the vocabulary or of TotalSegmentator), or name -> file label
            (``{"liver": 5}``). ``{"6": "placeholder"}`` gives a new class the next free placeholder id,
            ``{"6": "placeholder 18: left parotid gland"}`` this one, and the class a name.
        placeholders: see :meth:`LabelMap.with_placeholders`.

    Raises:
        InputError: neither a name nor a file, or a JSON that is no label map; the message names the entry. See
            :meth:`LabelMap.with_placeholders`, too.
    """
    if str(label_map) in LABEL_MAPS:
        return LABEL_MAPS[str(label_map)].with_placeholders(placeholders)
    if not isinstance(label_map, (str, os.PathLike)) or not (path := expanded(label_map)).is_file():
        raise InputError(f"label_map {str(label_map)!r} is neither a known name nor a file; {JSON_HELP}")
    try:
        entries = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"label map {path} cannot be read as JSON ({error}); {JSON_HELP}") from error
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"label map {path} holds {_shown(entries)} instead of an object with entries; {JSON_HELP}")

    ids: dict[int, int] = {}
    classes: dict[int, str] = {}
    new: dict[str | int, str | int] = {}
    for key, value in entries.items():
        number, meaning = (key, value) if _is_number(key) else (value, key)
        if not _is_number(number) or not 0 <= int(number) <= LARGEST_LABEL:
            raise InputError(f"label map {path}: the entry {_shown({key: value})} names no label number; {JSON_HELP}")
        label = int(number)
        if label in new or label in ids and ids[label] != label_target(path, meaning):
            raise InputError(f"label map {path} gives label {label} two meanings; keep one entry for it")
        if isinstance(meaning, str) and (asked := _PLACEHOLDER.fullmatch(meaning.strip())):
            new[label] = asked[1] or AUTO
            classes[label] = asked[2] or f"label {label}"
            continue
        ids[label] = label_target(path, meaning)
        if label == 0 and ids[label]:
            raise InputError(f"label map {path} gives 0 a meaning, {_shown(meaning)}; 0 is always the background")
        classes[label] = display_name(ids[label]) if _is_number(meaning) and ids[label] else str(meaning).strip()
    try:
        return LabelMap(str(path), ids, classes).with_placeholders(new).with_placeholders(placeholders)
    except InputError as error:
        raise InputError(f"label map {path}: {error}") from None


def recorded_label_map(record: Mapping[str, Any]) -> LabelMap:
    """The map that :meth:`LabelMap.record` was made of, its placeholders with it; or the settings of a run.

    Raises:
        InputError: it is not there any more, or was not so.
    """
    label_map, asked = read_label_map(str(record.get("label_map"))), record.get("placeholders")
    if isinstance(asked, Mapping):  # without those that the JSON itself gives
        own = {label_map.classes[label] for label in label_map.placeholders}
        asked = {name: id for name, id in asked.items() if name not in own}
    return label_map.with_placeholders(asked)


def apply_label_map(mask: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """Translate a mask's labels into the vocabulary.

    Classes that a :class:`LabelMap` knows and the vocabulary lacks become background, with a warning that counts them;
    they lie inside the body, which :mod:`maisi_tools.masks.body` adds.

    Args:
        mask: label values, any shape; 0 is the background, and floating-point numbers may be a little off.
        mapping: label in the file -> id in the vocabulary, see :func:`read_label_map`.

    Returns:
        uint8 array of the same shape.

    Raises:
        InputError: values that are no whole number, labels that `mapping` does not have (all are listed, with their
            numbers of voxels), or a mask without any label.
    """
    values = whole_labels(np.asarray(mask), "the mask")
    classes = mapping.classes if isinstance(mapping, LabelMap) else {}
    table = np.full(max([*mapping, *classes, 0]) + 1, -1, dtype=np.int16)
    table[list(classes)] = 0
    for number, label in mapping.items():
        table[number] = label
    table[0] = 0

    outside = (values < 0) | (values >= len(table))
    numbers = np.where(outside, 0, values).astype(np.int32, copy=False)
    labels = table[numbers]
    labels[outside] = -1
    if (labels < 0).any():
        wrong, counts = np.unique(values[labels < 0], return_counts=True)
        found = ", ".join(f"{int(label)} ({count} voxels)" for label, count in zip(wrong, counts, strict=True))
        raise InputError(
            f"the mask has labels that this label map does not know: {found}; allowed are 0 (background) and "
            f"{_ranges(sorted(mapping))}: {JSON_HELP}"
        )
    unread = sorted(classes.keys() - mapping.keys())
    sizes = np.bincount(numbers[np.isin(numbers, unread)], minlength=len(table)) if unread else np.zeros(len(table))
    without = ", ".join(f"{classes[label]} ({int(sizes[label])} voxels)" for label in unread if sizes[label])
    if not labels.any():
        given = "every voxel is 0" if not values.any() else "the label map drops every label it has"
        given = f"MAISI's vocabulary has no {without}" if without else given
        advice = "give them placeholder ids (placeholders: auto), or " if without else ""
        raise InputError(
            f"the mask is empty: {given}; allowed is a mask with at least one label: {advice}give another file"
        )
    if without:
        logger.warning("the vocabulary has no %s: they count as body (placeholders: auto would keep them)", without)
    return labels.astype(np.uint8)


@dataclass(frozen=True)
class Restored:
    """A mask in a file's numbering, and what could not be said in it.

    Attributes:
        labels: array of the mask's shape, uint8 where that is enough, else uint16.
        without_counterpart: id in the vocabulary -> its number of voxels, which became 0.
        merged: id -> labels of the file that it may have come from; its voxels got the first of them.
    """

    labels: np.ndarray
    without_counterpart: dict[int, int]
    merged: dict[int, list[int]]


def restore_labels(mask: np.ndarray, label_map: LabelMap) -> Restored:
    """Translate a mask in the vocabulary back into a file's numbering: the inverse of :func:`apply_label_map`.

    Args:
        mask: whole numbers of any shape, in the vocabulary.
        label_map: how the file was read, with its placeholders.

    Raises:
        InputError: the mask has a label that is not in the vocabulary.
    """
    values = np.asarray(mask)
    present, counts = np.unique(values, return_counts=True)
    if unknown := [value.item() for value in present if value and value not in VOCABULARY]:
        raise InputError(f"the mask has the labels {unknown}; {ALLOWED}")
    inverse = label_map.inverse
    table = np.zeros(max(VOCABULARY) + 1, dtype=np.uint8 if max([*inverse.values(), 0]) < 256 else np.uint16)
    table[list(inverse)] = list(inverse.values())
    voxels = {int(id): int(count) for id, count in zip(present, counts, strict=True) if id}
    return Restored(
        table[values.astype(np.intp)],
        {id: count for id, count in voxels.items() if id not in inverse},
        {id: labels for id, labels in label_map.merged.items() if id in voxels},
    )


class ReadLabelsd(MapTransform):
    """MONAI dict transform: masks (1, X, Y, Z) in a file's numbering -> uint8 masks in the vocabulary, same affine.

    Args:
        keys: of the masks, `MetaTensor` or array.
        label_map: see :func:`read_label_map`; a bad one is refused here, before the first mask is read.

    Raises:
        InputError: see :func:`apply_label_map`; the message begins with the mask's file.
    """

    def __init__(self, keys: KeysCollection, label_map: LabelMap | str | os.PathLike) -> None:
        super().__init__(keys)
        self.mapping = label_map if isinstance(label_map, LabelMap) else read_label_map(label_map)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        for key in self.key_iterator(items):
            mask = MetaTensor(items[key]) if not isinstance(items[key], MetaTensor) else items[key]
            try:
                labels = apply_label_map(mask.as_tensor().cpu().numpy(), self.mapping)
            except InputError as error:
                raise InputError(f"{mask.meta.get('filename_or_obj', key)}: {error}") from None
            items[key] = MetaTensor(
                torch.from_numpy(labels).to(mask.device), meta=mask.meta, applied_operations=mask.applied_operations
            )
        return items


NUMBERINGS = ("vocabulary", "input")
"""How a mask that was read with a label map is written."""


class RestoreLabelsd(MapTransform):
    """MONAI dict transform: masks (1, X, Y, Z) in the vocabulary -> in the numbering they are to be written in.

    Args:
        keys: of the masks, `MetaTensor`.
        label_map: how they were read.
        numbering: one of :data:`NUMBERINGS`: "vocabulary" leaves them, "input" is :func:`restore_labels`.
        output_key: of the item, gets what the way back needs, for the mask's sidecar: the numbering, the label map and
            its placeholders and, for "input", the structures without counterpart and those that were merged.

    Raises:
        InputError: another numbering.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_map: LabelMap | str | os.PathLike,
        numbering: str = "vocabulary",
        output_key: str = "labels",
    ) -> None:
        super().__init__(keys)
        if numbering not in NUMBERINGS:
            raise InputError(f"output_labels is {numbering!r}; allowed are {' and '.join(NUMBERINGS)}")
        self.mapping = label_map if isinstance(label_map, LabelMap) else read_label_map(label_map)
        self.numbering, self.output_key = numbering, output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        items = dict(data)
        classes = self.mapping.classes
        record = self.mapping.record(self.numbering)
        for key in self.key_iterator(items):
            if self.numbering == "input":
                mask: MetaTensor = items[key]
                restored = restore_labels(mask.as_tensor().cpu().numpy(), self.mapping)
                without = {VOCABULARY[id].name: count for id, count in restored.without_counterpart.items()}
                merged = {
                    VOCABULARY[id].name: [classes.get(label, str(label)) for label in labels]
                    for id, labels in restored.merged.items()
                }
                if without:
                    logger.warning("%s has no label for %s (voxels): they are 0", self.mapping.name, without)
                if merged:
                    logger.warning("%s was read into one: written is the first of %s", self.mapping.name, merged)
                record |= {"without_counterpart": without, "merged": merged}
                labels = torch.from_numpy(restored.labels.astype(np.int32)).to(mask.device)
                items[key] = MetaTensor(labels, meta=mask.meta, applied_operations=mask.applied_operations)
        items[self.output_key] = record
        return items


def label_target(path: Path, meaning: Any) -> int:
    """The id for a name or an id in the JSON file `path`; 0 for "background".

    Raises:
        InputError: there is no such label; the message names the file.
    """
    if _is_number(meaning):
        if int(meaning) == 0 or int(meaning) in VOCABULARY:
            return int(meaning)
        raise InputError(f"label map {path}: {int(meaning)} is not in the vocabulary; {ALLOWED}")
    if not isinstance(meaning, str):
        raise InputError(f"label map {path}: {_shown(meaning)} is neither a name nor an id; {JSON_HELP}")
    try:
        return 0 if meaning.strip().casefold() == "background" else label_id(meaning)
    except InputError as error:
        raise InputError(f"label map {path}: {error} ('placeholder' for a class that MAISI lacks)") from None


def _text(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1..3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
