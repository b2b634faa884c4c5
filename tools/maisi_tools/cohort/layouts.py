"""How a cohort lies on disk: the folders of nnU-Net, the Medical Segmentation Decathlon, BIDS, or one a sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maisi_tools.errors import InputError
from maisi_tools.files import write_json
from maisi_tools.masks.vocabulary import VOCABULARY, display_name, merge_labels


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where files go.

    Attributes:
        ct, mask: path of a sample's file, relative to the cohort's folder, with {name}.
        consecutive: whether labels are numbered 1, 2, ... as nnU-Net asks for, see
            :func:`~maisi_tools.cohort.worker.numbered_labels`; otherwise masks keep MAISI's vocabulary.
        describe: writes the file that names the data set, given its folder, name, sample names and labels
            (number -> name).
    """

    ct: str
    mask: str
    consecutive: bool
    describe: Callable[[Path, str, Sequence[str], dict[int, str]], None]


def consecutive_labels(labels: np.ndarray, keep: Sequence[int], merge: dict[str, int]) -> np.ndarray:
    """Labels of the vocabulary -> 1, 2, ... in the order of `keep`; the others are merged first."""
    table = np.zeros(256, dtype=np.uint8)
    table[list(keep)] = np.arange(1, len(keep) + 1)
    labels = np.ascontiguousarray(labels)  # torch takes no array that was turned around
    return table[np.asarray(merge_labels(labels, keep, merge)).astype(int)]


def label_names(
    layout: Layout, keep: Sequence[int], merge: dict[str, int], seen: Iterable[int], own: Mapping[int, str]
) -> dict[int, str]:
    """Number in the masks -> name: all of `keep` where they are consecutive, else the labels `seen`.

    A label that a group is merged into has the group's name: it stands for all bones, not for the skull. Placeholders
    have those of the label map that the masks were read with, `own`.

    Raises:
        InputError: two consecutive labels of one name, which nnU-Net tells apart by it.
    """
    if layout.consecutive:
        groups = {label: group for group, label in merge.items()}
        names = {number: groups.get(label) or _name(label, own) for number, label in enumerate(keep, start=1)}
        if twice := sorted(name for name, count in Counter(names.values()).items() if count > 1):
            raise InputError(
                f"several labels of the data set would be called {', '.join(twice)}; allowed is a name for each: give "
                "the placeholders of the label map other names"
            )
        return names
    return {label: _name(label, own) for label in sorted(seen) if label in VOCABULARY}


def _name(label: int, own: Mapping[int, str]) -> str:
    return own.get(label) or display_name(label)


def _nnunet(folder: Path, name: str, samples: Sequence[str], labels: dict[int, str]) -> None:
    content: dict[str, Any] = {
        "name": name,
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{text: number for number, text in labels.items()}},
        "numTraining": len(samples),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", content)


def _msd(folder: Path, name: str, samples: Sequence[str], labels: dict[int, str]) -> None:
    content = {
        "name": name,
        "description": "synthetic CT and masks",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(number): text for number, text in labels.items()}},
        "numTraining": len(samples),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{one}.nii.gz", "label": f"./labelsTr/{one}.nii.gz"} for one in samples],
        "test": [],
    }
    write_json(folder / "dataset.json", content)


def _bids(folder: Path, name: str, samples: Sequence[str], labels: dict[int, str]) -> None:
    described = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": "raw", "GeneratedBy": [{"Name": "maisi_tools"}]}
    write_json(folder / "dataset_description.json", described)
    write_json(folder / "derivatives" / "masks" / "dataset_description.json", described | {"DatasetType": "derivative"})
    table = "index\tname\n" + "".join(f"{number}\t{text}\n" for number, text in labels.items())
    (folder / "derivatives" / "masks" / "desc-mask_dseg.tsv").write_text(table)
    (folder / "participants.tsv").write_text("participant_id\n" + "".join(f"sub-{_plain(one)}\n" for one in samples))


def _folders(folder: Path, name: str, samples: Sequence[str], labels: dict[int, str]) -> None:
    write_json(folder / "labels.json", {str(number): text for number, text in labels.items()})


def _plain(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


LAYOUTS = {
    "nnunet": Layout("imagesTr/{name}_0000.nii.gz", "labelsTr/{name}.nii.gz", True, _nnunet),
    "msd": Layout("imagesTr/{name}.nii.gz", "labelsTr/{name}.nii.gz", False, _msd),
    "bids": Layout(
        "sub-{plain}/ct/sub-{plain}_ct.nii.gz",
        "derivatives/masks/sub-{plain}/ct/sub-{plain}_desc-mask_dseg.nii.gz",
        False,
        _bids,
    ),
    "folders": Layout("{name}/ct.nii.gz", "{name}/mask.nii.gz", False, _folders),
}
"""Layouts by name; "folders" has a folder a sample, which is what DICOM studies take."""


def place(pattern: str, name: str) -> str:
    """The path of a sample's file."""
    return pattern.format(name=name, plain=_plain(name))
