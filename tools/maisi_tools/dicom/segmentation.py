"""A mask as a DICOM Segmentation, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import highdicom as hd
import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from matplotlib.colors import hsv_to_rgb
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from maisi_tools.dicom.ct import RAS_TO_LPS
from maisi_tools.dicom.objects import MANUFACTURER, MODEL, SERIAL_NUMBER, Study, finish, software_version
from maisi_tools.dicom.painting import Structure
from maisi_tools.errors import InputError
from maisi_tools.masks.codes import (
    CATEGORIES,
    CODES,
    PRIVATE,
    SIDES,
    SNOMED,
    display_name,
    label_of_code,
    label_of_name,
)
from maisi_tools.masks.vocabulary import VOCABULARY

SERIES, SERIES_NUMBER = "Mask of synthetic CT", 2

_SIDE_OF_CODE = {code: side for side, (code, _) in SIDES.items()}


def label_color(label: int) -> tuple[int, int, int]:
    """A colour (RGB, 0..255) for a label: hues by the golden ratio, so that neighbouring ids differ."""
    red, green, blue = (int(round(255 * part)) for part in hsv_to_rgb((label * 0.618034 % 1, 0.6, 0.95)))
    return red, green, blue


def segmentation(mask: np.ndarray, images: Sequence[Dataset], study: Study) -> Dataset:
    """The labels of a mask as the segments of one DICOM Segmentation (type BINARY).

    Args:
        mask: (columns, rows, slices), uint8 in MAISI's vocabulary, on the grid of `images`.
        images: the slices it belongs to, in order, or one Enhanced CT; pixel data is not looked at.
        study: it is written into.

    Raises:
        InputError: a mask without labels, or with one that is not in the vocabulary.
    """
    labels = [int(label) for label in np.unique(mask) if label]
    if unknown := [label for label in labels if label not in VOCABULARY]:
        raise InputError(f"the mask has the labels {unknown}; allowed are those of MAISI's vocabulary: read it anew")
    if not labels:
        raise InputError("the mask is empty; allowed is a mask with at least one label: leave it out")
    numbers = np.zeros(256, np.uint8)
    numbers[labels] = np.arange(1, len(labels) + 1)
    ds = Segmentation(
        source_images=list(images),
        pixel_array=numbers[np.ascontiguousarray(mask.T)],
        segmentation_type="BINARY",
        segment_descriptions=[_description(number, label) for number, label in enumerate(labels, start=1)],
        series_instance_uid=study.uid(SERIES),
        series_number=SERIES_NUMBER,
        sop_instance_uid=study.uid(SERIES, 1),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL,
        software_versions=software_version(),
        device_serial_number=SERIAL_NUMBER,
        content_label="MAISI",
        content_description="Mask of a synthetic CT",
        content_creator_name=f"{MODEL}^",  # a name of one part, as PN wants it
    )
    ds.SeriesDescription = SERIES
    organization = study.uid(SERIES, "dimensions")
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    return finish(ds, study)


def segments(ds: Dataset, table: Mapping[str, int]) -> tuple[list[Structure], np.ndarray, list[str]]:
    """The segments of a DICOM Segmentation that the vocabulary has.

    Args:
        ds: the Segmentation; BINARY, LABELMAP, or FRACTIONAL (from one half on).
        table: the user's names -> label, 0 to drop; looked at before codes and known names.

    Returns:
        The structures, each with a function that draws it as (columns, rows, slices); the affine (4, 4) from these to
        RAS in mm; and the segments that no code, name or table explains.
    """
    segmentation = Segmentation.from_dataset(ds, copy=False)
    geometry = segmentation.get_volume_geometry()
    if geometry is None:
        raise InputError("the segmentation's frames form no regular volume; allowed are equally spaced frames")
    structures, unknown = [], []
    for item in ds.SegmentSequence:
        number, name = int(item.SegmentNumber), str(item.get("SegmentLabel", ""))
        label = _label_of(item, name, table)
        if label is None:
            unknown.append(name or f"segment {number}")
        elif label:
            structures.append(Structure(name, label, _drawing(segmentation, number)))
    # highdicom's axes are slice, row, column, its slices in the order opposite to that of the normal.
    turn = np.array([[0, 0, -1, geometry.spatial_shape[0] - 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    affine = RAS_TO_LPS @ geometry.affine @ turn
    return structures, affine, unknown


def _drawing(segmentation: Segmentation, number: int) -> Callable[[], np.ndarray]:
    def draw() -> np.ndarray:
        volume = segmentation.get_volume(segment_numbers=[number], combine_segments=False)
        return volume.array[::-1, :, :, 0].T >= 0.5

    return draw


def _label_of(item: Dataset, name: str, table: Mapping[str, int]) -> int | None:
    if name in table:
        return table[name]
    kind = item.SegmentedPropertyTypeCodeSequence[0]
    value, scheme = str(kind.get("CodeValue", "")), str(kind.get("CodingSchemeDesignator", ""))
    if scheme == PRIVATE and value.isdecimal() and int(value) in VOCABULARY:
        return int(value)
    regions = item.get("AnatomicRegionSequence") or [Dataset()]
    side = _side(kind, "SegmentedPropertyTypeModifierCodeSequence") or _side(
        regions[0], "AnatomicRegionModifierSequence"
    )
    label = label_of_code(value, side, str(regions[0].get("CodeValue", ""))) if scheme == SNOMED else None
    return label_of_name(name) if label is None else label


def _side(item: Dataset, keyword: str) -> str:
    modifiers = item.get(keyword) or ()
    return next((_SIDE_OF_CODE[str(m.CodeValue)] for m in modifiers if str(m.CodeValue) in _SIDE_OF_CODE), "")


def _description(number: int, label: int) -> SegmentDescription:
    code = CODES[label]
    description = SegmentDescription(
        segment_number=number,
        segment_label=display_name(label),
        segmented_property_category=Code(code.category, SNOMED, CATEGORIES[code.category]),
        segmented_property_type=Code(code.code, code.scheme, code.meaning),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MODEL, family=Code("123110", "DCM", "Artificial Intelligence"), version=software_version()
        ),
        anatomic_regions=[Code(code.region, SNOMED, code.region_meaning)] if code.region else None,
        display_color=CIELabColor.from_rgb(*label_color(label)),
    )
    if code.side:
        modifier = Dataset()
        modifier.CodeValue, modifier.CodeMeaning = SIDES[code.side]
        modifier.CodingSchemeDesignator = SNOMED
        if code.region:
            description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [modifier]
        else:
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description
