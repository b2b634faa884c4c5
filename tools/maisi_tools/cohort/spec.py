"""What a cohort is: a YAML file, checked once, and everything about a sample that follows from its number."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maisi_tools.cohort.layouts import LAYOUTS
from maisi_tools.errors import InputError
from maisi_tools.files import expanded
from maisi_tools.masks.label_maps import LABEL_MAPS
from maisi_tools.masks.library import MaskRequest
from maisi_tools.masks.vocabulary import hosts_of, label_id
from maisi_tools.settings import check_plain, checked_fields, read_yaml

SOURCES = ("phantom", "files", "library", "generator", "real")
FORMATS = ("nifti", "dicom")

SEEDS = "spawned, 53 bits"
"""What :meth:`CohortSpec.random` and :func:`draw_seed` draw; a cohort that was begun with others does not go on."""

USED = {
    "phantom": {"region", "organs", "field_of_view", "spacing"},
    "files": {"path", "label_map", "region", "organs", "field_of_view"},
    "library": {"path", "label_map", "region", "organs", "field_of_view"},
    "generator": {"organ_sizes", "settings"},
    "real": {"path", "label_map"},
}
"""What each source takes. Files are drawn from whatever they show; what of a request one does not fulfil is listed."""

FIXED = (
    *("input", "output_dir", "seed", "dataset_dir", "label_map", "output_labels", "bundle_root", "data"),
    *("mask", "new_mask", "edits"),
)
"""Keys of a bundle's config that the cohort itself sets."""

# Bounds that no cohort needs to cross; what is beyond them is a slip, or would fill the memory.
MOST_SAMPLES = 1_000_000
MOST_RETRIES = 100
SPACING = (0.1, 20.0)  # mm
FIELD_OF_VIEW = (10.0, 2500.0)  # mm
MOST_VOXELS = 512 * 512 * 768  # of a phantom; the largest volume of the paper (arXiv 2409.11169)
DIAMETER = (0.1, 300.0)  # mm, of a lesion
FACTOR = (0.05, 20.0)  # of an organ's volume
ORGAN_ML = (0.001, 200_000.0)


@dataclasses.dataclass(frozen=True)
class Masks:
    """Where the masks come from.

    Args:
        source: one of :data:`SOURCES`.
        path: folder (library), folder, file or glob (files), or a datalist of CTs with image and label (real).
        label_map: how those are read.
        region, organs, field_of_view: see :class:`~maisi_tools.masks.library.MaskRequest`.
        spacing: mm along x, y, z of a phantom.
        organ_sizes: of the generator: organ -> ml, or a range [lowest, highest] that each sample draws from.
        settings: further keys of the generator's ``mask_inference.json``.
    """

    source: str = "phantom"
    path: str | None = None
    label_map: str = "maisi"
    region: Sequence[str] = ()
    organs: Sequence[str] = ()
    field_of_view: Sequence[float] | None = None
    spacing: Sequence[float] = (4.0, 4.0, 2.5)
    organ_sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _allowed("masks.source", self.source, SOURCES)
        if self.source in ("files", "library", "real") and not self.path:
            raise InputError(f"masks.source is {self.source}, but there is no masks.path; add it")
        fields = {
            field.name: field for field in dataclasses.fields(self) if field.name not in ("source", *USED[self.source])
        }
        unset = {name: () if field.default is dataclasses.MISSING else field.default for name, field in fields.items()}
        if unused := [name for name in fields if _plain(getattr(self, name)) != _plain(unset[name])]:
            raise InputError(
                f"masks.source {self.source} takes {', '.join(sorted(USED[self.source]))}, and no use of "
                f"{', '.join(unused)}; leave it out, or give another source"
            )
        for key in ("path", "label_map"):
            if not isinstance(getattr(self, key), (str, type(None))):
                raise InputError(f"masks.{key} is {getattr(self, key)!r}; allowed is text")
        for key in ("region", "organs"):
            _names(f"masks.{key}", getattr(self, key))
        for key in ("organ_sizes", "settings"):
            _mapping(f"masks.{key}", getattr(self, key))
            check_plain(getattr(self, key), f"masks.{key}")
        for name, size in self.organ_sizes.items():
            _range(f"masks.organ_sizes.{name}", size, ORGAN_ML)
        _three("masks.spacing", self.spacing, SPACING)
        if self.field_of_view is not None:
            _three("masks.field_of_view", self.field_of_view, FIELD_OF_VIEW)
            voxels = math.prod(mm / step for mm, step in zip(self.field_of_view, self.spacing, strict=True))
            if self.source == "phantom" and voxels > MOST_VOXELS:
                raise InputError(
                    f"masks.field_of_view {list(self.field_of_view)} at the spacing {list(self.spacing)} has "
                    f"{voxels:.3g} voxels; allowed are {MOST_VOXELS:.3g}: give a larger spacing"
                )
        self.request  # noqa: B018 - checks

    @property
    def request(self) -> MaskRequest:
        """What is asked of the source."""
        return MaskRequest(tuple(self.region), tuple(self.organs), self.field_of_view)


@dataclasses.dataclass(frozen=True)
class Tumor:
    """A lesion that is put into some of the masks.

    Args:
        lesion: its name in the vocabulary, such as "lung tumor".
        diameter_mm: or a range to draw from.
        probability: of a sample to get it.
    """

    lesion: str
    diameter_mm: Any
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.lesion, str):
            raise InputError(f"tumors has the lesion {self.lesion!r}; allowed is a name of the vocabulary")
        hosts_of(label_id(self.lesion))
        _range(f"tumors.{self.lesion}.diameter_mm", self.diameter_mm, DIAMETER)
        _share(f"tumors.{self.lesion}.probability", self.probability)


@dataclasses.dataclass(frozen=True)
class CohortSpec:
    """A cohort.

    Args:
        count: samples.
        name: of the data set, and what the names of its samples begin with.
        seed: of everything that is drawn; sample N depends on it and N alone.
        masks: where masks come from.
        tumors: lesions put in.
        resize: organ -> factor of its volume, or a range to draw from.
        flip: probability of the mirror image.
        ct: keys of the ControlNet bundle's inference config, such as ``solver`` or ``redraws``.
        layout: one of :data:`~maisi_tools.cohort.layouts.LAYOUTS`.
        format: "nifti", or "dicom": a study with CT, Segmentation and RT Structure Set for each sample.
        retries: how often a sample that failed is tried again before it is listed as failed. One whose worker died,
            on Ray, is tried again three times at least: what killed it may have come from outside.
        created: date that DICOM objects carry, ISO 8601.

    Raises:
        InputError: an unknown key, or a value that is not allowed.
    """

    count: int
    name: str = "maisi"
    seed: int = 0
    masks: Masks = dataclasses.field(default_factory=Masks)
    tumors: Sequence[Tumor] = ()
    resize: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flip: float = 0.0
    ct: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layout: str = "nnunet"
    format: str = "nifti"
    retries: int = 2
    created: str = "2000-01-01"

    def __post_init__(self) -> None:
        for key, least, most in (("count", 1, MOST_SAMPLES), ("seed", 0, 2**63 - 1), ("retries", 0, MOST_RETRIES)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise InputError(f"{key} is {value!r}; allowed is a whole number from {least} to {most}")
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}", self.name):
            raise InputError(f"name is {self.name!r}; allowed are up to 64 letters (A to Z), digits and hyphens")
        _allowed("layout", self.layout, tuple(LAYOUTS))
        _allowed("format", self.format, FORMATS)
        if self.format == "dicom" and self.layout != "folders":
            raise InputError(f"format dicom with layout {self.layout}; DICOM studies have the layout folders")
        _share("flip", self.flip)
        for key in ("resize", "ct"):
            _mapping(key, getattr(self, key))
            check_plain(getattr(self, key), key)
        if self.masks.source == "real":
            if self.flip:
                raise InputError(f"flip is {self.flip} with masks.source real; a scan is not mirrored: leave it out")
            if not self.resize and not any(tumor.probability == 1 for tumor in self.tumors):
                raise InputError(
                    "masks.source is real, and a sample may get no edit; allowed is a cohort with resize, or with a "
                    "tumor of probability 1"
                )
        for organ, factor in self.resize.items():
            label_id(organ)
            _range(f"resize.{organ}", factor, FACTOR)
        if fixed := sorted(set(self.ct) & set(FIXED)):
            raise InputError(f"ct has {', '.join(fixed)}, which the cohort sets itself; leave it out")
        try:
            datetime.datetime.fromisoformat(self.created)
        except (TypeError, ValueError):
            raise InputError(f"created is {self.created!r}; allowed is a date such as 2026-01-31") from None

    def sample_name(self, index: int) -> str:
        """Name of sample number `index`; it does not depend on `count`, which may grow."""
        return f"{self.name}_{index:04d}"

    def random(self, index: int) -> np.random.Generator:
        """What is drawn for sample number `index`; of no other seed and number is it the same."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def read_spec(path: str | Path) -> CohortSpec:
    """Read a specification; relative paths in it are relative to the file.

    Raises:
        InputError: no such file, no YAML, or see :class:`CohortSpec`.
    """
    path = expanded(path)
    content = read_yaml(path, "specification", "docs/how-to/cohorts.md")
    content = checked_fields(CohortSpec, content, str(path))
    if content.setdefault("masks", None) is None:
        del content["masks"]
    else:
        masks = checked_fields(Masks, content["masks"], "masks")
        if masks.get("path") is not None:
            # Whole, so that a cohort goes on from another working directory and through a link to its file.
            masks["path"] = str((path.parent / expanded(str(masks["path"]))).resolve())
        if isinstance(table := masks.get("label_map"), str) and table not in LABEL_MAPS:
            files = (folder / expanded(table) for folder in (path.parent, Path()))
            masks["label_map"] = next((str(file.resolve()) for file in files if file.is_file()), table)
        content["masks"] = Masks(**masks)
    tumors = content.get("tumors") or ()
    if not isinstance(tumors, (list, tuple)):
        raise InputError(f"tumors is {tumors!r}; allowed is a list with lesion, diameter_mm and probability")
    content["tumors"] = tuple(Tumor(**checked_fields(Tumor, tumor, "tumors")) for tumor in tumors)
    if isinstance(content.get("created"), (datetime.date, datetime.datetime)):
        content["created"] = content["created"].isoformat()
    return CohortSpec(**content)


def draw(random: np.random.Generator, value: Any) -> float:
    """A number as it is, or one from a range [lowest, highest]."""
    return float(random.uniform(*value)) if isinstance(value, (list, tuple)) else float(value)


def draw_seed(random: np.random.Generator) -> int:
    """Of so many that a million samples have each their own, and none that spreadsheets and browsers would round."""
    return int(random.integers(2**53))


def _plain(value: Any) -> Any:
    """Nothing, or a list, as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else value or ()


def _allowed(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def _share(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; allowed is a number from 0 to 1")


def _range(name: str, value: Any, bounds: tuple[float, float]) -> None:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    good = all(_is_within(one, bounds) for one in numbers)
    if not good or not (isinstance(value, (int, float)) or (len(numbers) == 2 and numbers[0] <= numbers[1])):
        low, high = bounds
        raise InputError(
            f"{name} is {value!r}; allowed is a number from {low:g} to {high:g}, or a range [lowest, highest]"
        )


def _three(name: str, value: Any, bounds: tuple[float, float]) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(_is_within(one, bounds) for one in value):
        low, high = bounds
        raise InputError(f"{name} is {value!r}; allowed are three numbers from {low:g} to {high:g}, mm along x, y, z")


def _is_within(value: Any, bounds: tuple[float, float]) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bounds[0] <= value <= bounds[1]


def _names(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{name} is {value!r}; allowed is a list of names")


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {value!r}; allowed is a mapping")
