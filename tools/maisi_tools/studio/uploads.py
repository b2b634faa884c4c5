"""Files that come over HTTP: a mask or a CT, stored under a name of the studio's own, read once, described."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Orientation

from maisi_tools.errors import InputError
from maisi_tools.files import write_json
from maisi_tools.masks.class_folder import is_class_folder, read_numbers
from maisi_tools.masks.label_maps import LABEL_MAPS, LARGEST_LABEL, LabelMap
from maisi_tools.masks.slicer import is_segmentation
from maisi_tools.masks.vocabulary import VOCABULARY, display_name, label_id
from maisi_tools.report.preview import page_colour
from maisi_tools.studio.notes import Notes
from maisi_tools.volumes.inputs import SUFFIXES, is_volume, unzipping, zipped_dicom
from maisi_tools.volumes.limits import check_limit
from maisi_tools.volumes.reading import check_voxels, read_volume
from maisi_tools.volumes.writing import write_volume

KINDS = ("mask", "ct")

LABELS = 1000
"""More different values than this, and it is no mask."""

DIGITS = 10
"""Of a label as text, with zeros before it."""


def suffix_of(name: str, kind: str) -> str:
    """What the stored file ends with: all that an upload's name decides.

    Raises:
        InputError: another kind than :data:`KINDS`, or a file that is none of those that are read.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    suffixes = [*SUFFIXES, ".zip"]
    found = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
    if found is None:
        raise InputError(
            f"the file is called {name!r}; allowed are {', '.join(SUFFIXES)}, and .zip of a DICOM series (a CT) or of "
            "one file a class (a mask)"
        )
    return found


def describe_upload(folder: Path, file: str, name: str, kind: str) -> dict[str, Any]:
    """Read what was uploaded, and write beside it what it is.

    Args:
        folder: of the upload; its name is the upload's id.
        file: in it.
        name: that the client gave, a label.
        kind: one of :data:`KINDS`.

    Returns:
        ``id``, ``name``, ``kind``, ``size`` and ``spacing`` (RAS), ``notes``, what was warned of while it was read, and
        of a mask its ``labels`` with a ``label_map`` that is likely theirs, or None. ``file`` is what the studio works
        with.

    Raises:
        InputError: it cannot be read; it is called `name`.
    """
    path = folder / file
    with tempfile.TemporaryDirectory(prefix="maisi-") as scratch:
        # Of this thread: others of the server read and plan at the same time.
        notes = Notes({path: name[:200], scratch: name[:200]}, threading.get_ident())
        try:
            with notes:
                check_voxels(path)
                volume: Any
                volume, proposed = (read_volume(path, "ct"), None) if kind == "ct" else _read_mask(path, Path(scratch))
        except InputError as error:
            raise InputError(notes.words(str(error))) from None
    if proposed is not None:  # a class folder, or a segmentation of 3D Slicer: from here on a mask like any other
        file = "mask.nii.gz"
        write_volume(folder / file, volume[0].numpy(), volume.affine.numpy(), np.uint16)
    turned: Any = Orientation(axcodes="RAS", labels=None)(volume)
    known: dict[str, Any] = {
        "id": folder.name,
        "name": name[:200],
        "kind": kind,
        "file": file,
        "size": list(turned.shape[1:]),
        "spacing": [round(float(mm), 6) for mm in turned.pixdim],
        "notes": notes.found,
    }
    if kind == "mask":
        known |= {"labels": _labels_of(volume[0].numpy()), "label_map": proposed}
    write_json(folder / "upload.json", known)
    return known


def readings(upload: dict[str, Any], label_map: LabelMap) -> list[dict[str, Any]]:
    """The labels of an upload: ``value``, ``voxels``, ``meaning``, and whether the label map has it (``known``).

    The meaning of one that it lacks or drops is None.
    """
    known = {*label_map, *label_map.classes}
    return [
        {
            "value": entry["value"],
            "voxels": entry["voxels"],
            "meaning": display_name(label) if (label := label_map.get(entry["value"], 0)) else None,
            "known": entry["value"] in known,
        }
        for entry in upload["labels"]
    ]


def checked_labels(labels: Any) -> dict[str, str | int]:
    """A label map of a client's, as :func:`~maisi_tools.masks.label_maps.read_label_map` reads it.

    Args:
        labels: label of the file, as text -> name of a structure, or None to drop it.

    Raises:
        InputError: something else, or a name that nothing has.
    """
    if not isinstance(labels, dict) or not 1 <= len(labels) <= LABELS:
        raise InputError(
            f"labels is no mapping with 1 to {LABELS} entries; allowed is such as {{'7': 'liver', '8': null}}"
        )
    checked: dict[str, str | int] = {}
    for value, name in labels.items():
        number = int(value) if value.isascii() and value.isdecimal() and len(value) <= DIGITS else 0
        if not 0 < number <= LARGEST_LABEL:
            raise InputError(
                f"labels has {value[:40]!r}; allowed are the numbers in the file, from 1 to {LARGEST_LABEL}"
            )
        if str(number) in checked:
            raise InputError(f"labels has {number} twice; give each number of the file once")
        if name is not None and not isinstance(name, str):
            raise InputError(f"label {value} is {name!r}; allowed is the name of a structure, or null to drop it")
        label = 0 if name is None else label_id(name)
        known = VOCABULARY[label].name if label else ""
        # several labels of a file may be one structure, which its placeholder's name would not allow
        checked[str(number)] = label if not label or known.startswith("placeholder") else known
    return checked


def _labels_of(values: np.ndarray) -> list[dict[str, Any]]:
    found, counts = np.unique(values[values > 0], return_counts=True)
    if len(found) > LABELS:
        raise InputError(f"the mask has {len(found)} different values; allowed are {LABELS} labels: is it a picture?")
    if len(found) and found[-1] > LARGEST_LABEL:
        raise InputError(f"the mask has the label {found[-1]:.0f}; allowed are 0 to {LARGEST_LABEL}: renumber it")
    return [
        {"value": int(value), "voxels": int(count), "colour": page_colour(int(value))}
        for value, count in zip(found, counts, strict=True)
    ]


def _read_mask(path: Path, scratch: Path) -> tuple[Any, str | None]:
    """A mask (1, X, Y, Z) in its own numbering; of one that has names in place of numbers, with the map they are in."""
    if path.suffix == ".zip":
        folder = _unpacked(path, scratch)
        for file in folder.iterdir():
            check_voxels(file)
        for name in ("totalsegmentator", *LABEL_MAPS):
            if is_class_folder(folder, LABEL_MAPS[name]):
                return read_numbers(folder, LABEL_MAPS[name]), name
        raise InputError("the zip file has no files named like classes; allowed is what TotalSegmentator writes")
    if is_segmentation(path):
        return read_numbers(path, LABEL_MAPS["totalsegmentator"]), "totalsegmentator"
    return read_volume(path, "mask"), None


def _unpacked(path: Path, folder: Path) -> Path:
    """The volume files of a zip, flat, in a folder."""
    with unzipping(path) as archive:
        entries = [entry for entry in archive.infolist() if is_volume(Path(Path(entry.filename).name))]
        total = sum(entry.file_size for entry in entries)
        check_limit("MAISI_MAX_ZIP_MEMBERS", len(archive.infolist()), f"{len(archive.infolist())} files are zipped")
        check_limit("MAISI_MAX_ZIP_BYTES", total, f"{total} bytes are zipped")
        if not entries:
            what = "a DICOM series, which is no mask" if zipped_dicom(path) else "no volume"
            raise InputError(f"the zip file holds {what}; allowed is one file a class, such as liver.nii.gz")
        for entry in entries:
            with archive.open(entry) as packed, open(folder / Path(entry.filename).name, "xb") as file:
                shutil.copyfileobj(packed, file)
    return folder
