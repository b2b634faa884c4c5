"""A folder of masks that is looked through once, and then searched by what the masks show."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm

from maisi_tools.errors import InputError
from maisi_tools.files import expanded, write_json
from maisi_tools.masks.class_folder import is_one_mask, read_mask
from maisi_tools.masks.edits import volumes_ml
from maisi_tools.masks.label_maps import LabelMap
from maisi_tools.masks.vocabulary import REGIONS, VOCABULARY, display_name, label_id, region_of
from maisi_tools.volumes.inputs import SUFFIXES, is_volume

logger = logging.getLogger(__name__)

INDEX = "mask_index.json"
"""Name of the index in a library's folder."""

VERSION = 1
"""Of the index's layout; an index of another version is made anew."""

_SAVED_EVERY = 50  # masks: what an interrupted run may have to look through again


@dataclass(frozen=True)
class MaskRequest:
    """What a mask should show.

    Attributes:
        region: body regions, of :data:`~maisi_tools.masks.vocabulary.REGIONS`; all of them.
        organs: names of the vocabulary; all of them.
        field_of_view: least extent in mm along x, y, z (RAS), None for any.

    Raises:
        InputError: an unknown region or organ, or a field of view that is not three positive numbers.
    """

    region: Sequence[str] = ()
    organs: Sequence[str] = ()
    field_of_view: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.region if name not in REGIONS]:
            raise InputError(f"region {', '.join(map(str, unknown))} is unknown; allowed are {', '.join(REGIONS)}")
        for organ in self.organs:
            label_id(organ)
        view = self.field_of_view
        if view is not None and (len(view) != 3 or not all(np.isfinite(mm) and mm > 0 for mm in view)):
            raise InputError(f"field_of_view is {view!r}; allowed are three positive numbers, mm along x, y, z")


@dataclass(frozen=True)
class MaskEntry:
    """One mask of an index.

    Attributes:
        size: voxels along x, y, z (RAS).
        spacing: mm along x, y, z (RAS).
        region: body regions in view, from top to bottom.
        volumes_ml: structure -> its volume in ml.
        modified: time stamp of the file in ns, the latest one of a class folder.
        bytes: size of the file or files.
        files: names in a class folder, which say what the masks are; empty for a file.
    """

    size: Sequence[int]
    spacing: Sequence[float]
    region: Sequence[str]
    volumes_ml: dict[str, float]
    modified: int
    bytes: int
    files: Sequence[str]

    @property
    def stamp(self) -> tuple[int, int, list[str]]:
        """What changes with the file or files."""
        return self.modified, self.bytes, list(self.files)

    def misfits(self, request: MaskRequest) -> list[str]:
        """What of a request the mask does not fulfil, in words; empty where it fits."""
        found = [f"shows no {region}" for region in request.region if region not in self.region]
        wanted_ids = map(label_id, request.organs)
        found += [f"has no {display_name(id)}" for id in wanted_ids if VOCABULARY[id].name not in self.volumes_ml]
        if request.field_of_view is not None:
            for axis, n, mm, wanted in zip("xyz", self.size, self.spacing, request.field_of_view, strict=True):
                if n * mm < wanted * (1 - 1e-4):  # spacings are rounded in NIfTI headers
                    found.append(f"is {n * mm:.0f} mm long along {axis} instead of {wanted:.0f}")
        return found


@dataclass
class IndexReport:
    """What :func:`index_library` did: numbers of masks, and the files it could not read with the reason."""

    total: int = 0
    new: int = 0
    gone: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def describe(mask: MetaTensor, modified: int = 0, bytes: int = 0, files: Sequence[str] = ()) -> MaskEntry:
    """The entry of a mask (1, X, Y, Z), RAS, in the vocabulary."""
    labels, spacing = mask.as_tensor()[0].cpu().numpy(), [float(mm) for mm in mask.pixdim]
    found = volumes_ml(labels, spacing)
    volumes = {VOCABULARY[id].name: round(ml, 3) for id, ml in found.items()}
    size = [int(n) for n in labels.shape]
    return MaskEntry(size, [round(mm, 5) for mm in spacing], list(region_of(found)), volumes, modified, bytes, files)


def index_library(folder: str | os.PathLike, label_map: LabelMap) -> IndexReport:
    """Write the :data:`INDEX` of all masks under a folder; masks that have not changed are not read again.

    Masks are volume files, at any depth, and class folders. One that cannot be read is skipped and reported.

    Raises:
        InputError: no such folder, or it holds no mask.
        OSError: the index cannot be written.
    """
    root = _folder(folder)
    known = _read(root, label_map)
    places = list(_masks(root, label_map, set()))
    if not places:
        raise InputError(f"{root} holds no mask; allowed are {', '.join(SUFFIXES)} files, and folders of one a class")
    report = IndexReport(gone=len(known.keys() - {_key(root, place) for place in places}))
    entries: dict[str, MaskEntry] = {}
    for place in tqdm(places, desc="indexing masks", unit="mask", delay=2):
        key, stamp = _key(root, place), _stamp(place)
        if key in known and known[key].stamp == stamp:
            entries[key] = known[key]
            continue
        try:
            entries[key] = describe(read_mask(place, label_map), *stamp)
        except InputError as error:
            report.skipped[key] = str(error)
            continue
        report.new += 1
        if report.new % _SAVED_EVERY == 0:
            _write(root, label_map, {**known, **entries})
    report.total = len(entries)
    _write(root, label_map, entries)
    return report


def read_index(folder: str | os.PathLike, label_map: LabelMap) -> dict[Path, MaskEntry]:
    """Path of every indexed mask -> its entry; masks that changed or vanished since are left out, with a warning.

    Raises:
        InputError: no folder, no index of this version and label map, or none of its masks is left.
    """
    root = _folder(folder)
    known = {root / key: entry for key, entry in _read(root, label_map).items()}
    if not known:
        raise InputError(f"{root} has no index for the label map {label_map.name}; make one with: maisi index {root}")
    fresh = {place: entry for place, entry in known.items() if place.exists() and _stamp(place) == entry.stamp}
    if not fresh:
        raise InputError(f"every mask of the index of {root} changed or vanished since; run: maisi index {root}")
    if stale := len(known) - len(fresh):
        logger.warning("%d masks of %s changed or vanished since they were indexed: run maisi index again", stale, root)
    return fresh


def search(entries: dict[Path, MaskEntry], request: MaskRequest) -> list[tuple[Path, list[str]]]:
    """All masks, those first that fit the request best, each with what does not fit.

    Fewest misfits come first; among equals the one with the smallest field of view, since it needs least cropping.
    """
    found = [(place, entry.misfits(request), entry) for place, entry in entries.items()]
    found.sort(key=lambda row: (len(row[1]), float(np.prod(np.multiply(row[2].size, row[2].spacing))), str(row[0])))
    return [(place, misfits) for place, misfits, _ in found]


def _folder(folder: str | os.PathLike) -> Path:
    root = expanded(folder)
    if not root.is_dir():
        raise InputError(f"library {root} is no folder; give the folder that holds the masks")
    return root


def _masks(folder: Path, label_map: LabelMap, seen: set[Path]) -> Iterator[Path]:
    """Mask files and class folders below a folder, in a fixed order.

    Folders whose targets were `seen` are passed over, which links may lead to once more, or for ever.
    """
    if (target := folder.resolve()) in seen:
        return
    seen.add(target)
    if is_one_mask(folder, label_map):
        yield folder
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _masks(entry, label_map, seen)
        elif is_volume(entry):
            yield entry


def _stamp(place: Path) -> tuple[int, int, list[str]]:
    """When a mask was changed last (ns), its size in bytes and, of a class folder, the names of the files."""
    folder = place.is_dir()
    files = sorted(file for file in place.iterdir() if file.is_file() and file.name != INDEX) if folder else [place]
    stats = [file.stat() for file in files]
    names = [file.name for file in files] if folder else []
    return max((stat.st_mtime_ns for stat in stats), default=0), sum(stat.st_size for stat in stats), names


def _key(root: Path, place: Path) -> str:
    return place.relative_to(root).as_posix()


def _reading(label_map: LabelMap) -> dict[str, object]:
    """What of a label map an index depends on; a JSON may change under its name."""
    return {"name": label_map.name, "ids": {str(label): id for label, id in sorted(label_map.items())}}


def _read(root: Path, label_map: LabelMap) -> dict[str, MaskEntry]:
    """The entries of a folder's index; none where it is missing, damaged, or of another version or label map."""
    try:
        content = json.loads((root / INDEX).read_text())
        if (content["version"], content["label_map"]) != (VERSION, _reading(label_map)):
            return {}
        return {key: MaskEntry(**entry) for key, entry in content["masks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(root: Path, label_map: LabelMap, entries: dict[str, MaskEntry]) -> None:
    content = {
        "version": VERSION,
        "label_map": _reading(label_map),
        "masks": {key: asdict(entry) for key, entry in sorted(entries.items())},
    }
    write_json(root / INDEX, content)
