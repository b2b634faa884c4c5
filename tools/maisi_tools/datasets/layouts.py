"""The volumes of a data set, in whichever form it comes: a folder, a MONAI datalist, an nnU-Net or MSD dataset.json."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maisi_tools.datasets.datalist import files_of_entry
from maisi_tools.diffusion.conditions import MODALITIES
from maisi_tools.errors import InputError
from maisi_tools.files import expanded, read_json
from maisi_tools.masks.vocabulary import checked_regions
from maisi_tools.volumes.inputs import SUFFIXES, is_dicom, is_volume, stem_of

logger = logging.getLogger(__name__)

CT_SUFFIX, MASK_SUFFIX = "_ct", "_seg"
"""``NAME_ct`` with ``NAME_seg`` beside it: how this project's folders name a volume and its mask."""

SECTIONS = ("training", "validation")
"""Sections of a datalist that are taken; "testing" is neither trained on nor validated on."""

MODALITY_NAMES = {"cta": "ct"} | dict.fromkeys(
    ("mr", "t1", "t2", "flair", "t1w", "t2w", "t1ce", "t1gd", "adc", "dwi"), "mri"
)
"""What data sets call their channels, beside the names that the networks know -> the one of these."""

ALLOWED = (
    "a folder with volumes, a MONAI datalist (JSON with a list under training or validation), or the dataset.json of "
    "nnU-Net or the Medical Segmentation Decathlon, or its folder"
)


@dataclass(frozen=True)
class Case:
    """One volume of a data set, not yet read.

    Attributes:
        name: tells cases apart, and patients, where neither `patient` nor a pattern says otherwise.
        image: the volume's file.
        label: its mask's, where it has one.
        modality: of :data:`~maisi_tools.diffusion.conditions.MODALITIES`, or else what the data set calls it.
        section: "training" or "validation" where the data set says so.
        region: body regions where the data set says so.
        patient: whose it is, where the data set says so.
        refused: why it cannot be used, where its name says so already.
    """

    name: str
    image: Path
    label: Path | None = None
    modality: str = "ct"
    section: str | None = None
    region: tuple[str, ...] = ()
    patient: str | None = None
    refused: str | None = None


def find_cases(source: str | os.PathLike) -> tuple[list[Case], dict[int, str]]:
    """The cases of one data set, sorted by name, and what its dataset.json calls its labels.

    Raises:
        InputError: it is none of what is allowed, or there is no volume in it. Files that are named but not there are
            no error here; reading them is.
    """
    path = expanded(source)
    if path.is_dir():
        described = path / "dataset.json"
        return _of_dataset(described) if described.is_file() else (_of_folder(path), {})
    if path.suffix.lower() != ".json" or not path.is_file():
        raise InputError(f"data set {path} is neither a folder nor a JSON file; allowed is {ALLOWED}")
    content = _read_json(path)
    if isinstance(content, Mapping) and ("numTraining" in content or "file_ending" in content):
        return _of_dataset(path)
    return _of_datalist(path, content), {}


def _of_folder(folder: Path) -> list[Case]:
    """``NAME_ct`` with ``NAME_seg``; where nothing has such a name, all volumes with the masks ``NAME_seg``.

    What else a case has (``NAME_dose``) is passed over; any other volume is a case that is refused, so that it is
    told of. DICOM beside them is named in a warning.
    """
    files = sorted(folder.rglob("*"))
    volumes = [file for file in files if is_volume(file) and file.is_file()]
    images = [file for file in volumes if stem_of(file).endswith(CT_SUFFIX)]
    images = images or [file for file in volumes if not stem_of(file).endswith(MASK_SUFFIX)]
    if any(_is_dicom(file) for file in files if not is_volume(file)):
        advice = (
            f"make each series a volume first: maisi dicom_read SERIES -o NAME{CT_SUFFIX}.nii.gz, and its SEG or "
            f"RTSTRUCT as NAME{MASK_SUFFIX}.nii.gz (--series SERIES)"
        )
        if not images:
            raise InputError(f"no volume ({', '.join(SUFFIXES)}) below {folder}, but DICOM; {advice}")
        logger.warning("%s: DICOM files are passed over; %s", folder, advice)
    if not images:
        raise InputError(f"no volume ({', '.join(SUFFIXES)}) below {folder}; allowed is {ALLOWED}")
    masks = {(file.parent, stem_of(file)): file for file in volumes}
    named = stem_of(images[0]).endswith(CT_SUFFIX)
    cases = []
    for image in images:
        name = stem_of(image).removesuffix(CT_SUFFIX)
        label = masks.get((image.parent, f"{name}{MASK_SUFFIX}"))
        cases.append(Case(name, _absolute(image), _absolute(label) if label else None))
    known = {(case.image.parent, case.name) for case in cases}
    for file in sorted(set(volumes) - set(images)):
        stem, place = stem_of(file), _absolute(file).parent
        if any((place, stem[:at]) in known for at, letter in enumerate(stem) if letter == "_"):
            continue
        if stem.endswith(MASK_SUFFIX):
            own = f"{stem.removesuffix(MASK_SUFFIX)}{CT_SUFFIX * named}"
            reason = f"a mask without its volume; give that the name {own}"
        else:
            reason = f"other volumes here are called NAME{CT_SUFFIX}; rename it so, or move it out of the folder"
        cases.append(Case(stem, _absolute(file), refused=reason))
    return cases


def _is_dicom(file: Path) -> bool:
    try:
        return is_dicom(file)
    except OSError:  # not ours to read
        return False


def _of_datalist(path: Path, content: Any) -> list[Case]:
    sections = content if isinstance(content, Mapping) else {None: content}
    found = {name: sections[name] for name in (*SECTIONS, None) if sections.get(name)}
    if not found or not all(isinstance(entries, list) for entries in found.values()):
        raise InputError(f"{path} has no list of cases under {' or '.join(SECTIONS)}; allowed is {ALLOWED}")
    cases = []
    for section, entries in found.items():
        for entry in entries:
            entry = entry if isinstance(entry, Mapping) else {"image": entry}
            image, label = files_of_entry(path, entry)
            stem = stem_of(image)
            cases.append(_case(path, entry, stem.removesuffix(CT_SUFFIX), image, label, "ct", section))
    return cases


def _case(
    path: Path, entry: Mapping, name: str, image: str | Path, label: str | None, modality: str, section: str | None
) -> Case:
    """The case of a list's entry, which may say its name, modality, region and patient itself."""
    patient = entry.get("patient")
    return Case(
        name=str(entry.get("name") or name),
        image=_from(path, image),
        label=_from(path, label) if label else None,
        modality=_modality(entry.get("modality") or modality),
        section=section,
        region=checked_regions(entry.get("region")),
        patient=None if patient in (None, "") else str(patient),
    )


def _of_dataset(path: Path) -> tuple[list[Case], dict[int, str]]:
    """MSD and nnU-Net v1 list their files; nnU-Net v2 names its files by rule, or lists them under "dataset"."""
    content = _read_json(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; allowed is {ALLOWED}")
    channels = _numbered(path, _mapping(content, "channel_names", "modality"))
    # Where a case has several channels, a CT among them is what these bundles can use.
    number, channel = next(
        (item for item in channels.items() if _modality(item[1]) == "ct"), next(iter(channels.items()), (0, "ct"))
    )
    ending = content.get("file_ending")
    pairs: list[tuple[str, str | Path, str | None]]
    if isinstance(content.get("dataset"), Mapping):
        pairs = [_described(path, name, entry, number) for name, entry in content["dataset"].items()]
    elif isinstance(content.get("training"), list):
        return _of_lists(path, content, number, channel), _label_names(content.get("labels"))
    elif isinstance(ending, str):
        images = sorted((path.parent / "imagesTr").glob(f"*_{number:04d}{ending}"))
        names = [image.name.removesuffix(f"_{number:04d}{ending}") for image in images]
        pairs = [
            (name, f"imagesTr/{image.name}", f"labelsTr/{name}{ending}")
            for name, image in zip(names, images, strict=True)
        ]
    else:
        raise InputError(f"{path} has neither a list under 'training' nor a 'file_ending'; allowed is {ALLOWED}")
    if not pairs:
        raise InputError(f"{path} names no training case; allowed is {ALLOWED}: put the files into imagesTr")
    cases = [
        Case(name, _from(path, image), _from(path, label) if label else None, _modality(channel))
        for name, image, label in sorted(pairs, key=lambda pair: pair[0])
    ]
    return cases, _label_names(content.get("labels"))


def _of_lists(path: Path, content: Mapping, number: int, channel: str) -> list[Case]:
    """The cases of MSD's and nnU-Net v1's list, and of a validation list beside it, as MONAI's tutorials have one."""
    if not content["training"]:
        raise InputError(f"{path} names no training case; allowed is {ALLOWED}: put the files into imagesTr")
    cases = []
    for section in SECTIONS:
        entries = content.get(section)
        for entry in entries if isinstance(entries, list) else ():
            name, image, label = _listed(path, entry, number)
            cases.append(_case(path, entry, name, image, label, channel, section))
    return sorted(cases, key=lambda case: case.name)


def _listed(path: Path, entry: Any, number: int) -> tuple[str, str | Path, str | None]:
    """A case of MSD's or nnU-Net v1's list; the latter leaves the channel's number out of the image's name."""
    image, label = files_of_entry(path, entry)
    name = stem_of(image)
    numbered = f"{image[: image.rindex(name)]}{name}_{number:04d}{Path(image).name[len(name) :]}"
    if not _from(path, image).is_file() and _from(path, numbered).is_file():
        image = numbered
    return name, image, label


def _described(path: Path, name: str, entry: Any, number: int) -> tuple[str, str | Path, str | None]:
    images = entry.get("images") if isinstance(entry, Mapping) else None
    if not isinstance(images, list) or len(images) <= number:
        raise InputError(f"{path} gives case {name} no list 'images' with one file a channel; correct 'dataset'")
    return name, *files_of_entry(path, {"image": images[number], "label": entry.get("label")})


def _label_names(labels: Any) -> dict[int, str]:
    """number -> name, from MSD's {"1": "liver"} or nnU-Net v2's {"liver": 1}; what is several numbers is no label."""
    names = {}
    for key, value in labels.items() if isinstance(labels, Mapping) else ():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        if str(number).isdecimal() and int(number) > 0:
            names[int(number)] = str(name)
    return names


def _numbered(path: Path, channels: Mapping) -> dict[int, str]:
    """number -> name, from {"0": "CT"} or the other way round, as nnU-Net has its labels."""
    pairs = [(key, name) if str(key).isdecimal() else (name, key) for key, name in channels.items()]
    if wrong := [name for number, name in pairs if not str(number).isdecimal()]:
        raise InputError(f"{path} gives the channel {wrong[0]!r} no number; allowed is {{'0': 'CT'}}: correct it")
    return {int(number): str(name) for number, name in pairs}


def _modality(name: Any) -> str:
    folded = str(name).casefold()
    return MODALITY_NAMES.get(folded, folded if folded in MODALITIES else str(name))


def _mapping(content: Mapping, *keys: str) -> Mapping:
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), {})


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); allowed is {ALLOWED}") from error


def _from(listing: Path, file: str | Path) -> Path:
    """The file, relative to the JSON file that names it."""
    return _absolute(listing.parent / expanded(file))


def _absolute(path: Path) -> Path:
    """By the user's own names: of links, as data sets are often made of, the targets may all be called the same."""
    return Path(os.path.abspath(path))
