"""A mask as a DICOM Segmentation, and back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.colors import hsv_to_rgb
from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.coding import Code
from pydicom.uid import SegmentationStorage

from maisi_tools.dicom.ct import RAS_TO_LPS
from maisi_tools.dicom.objects import (
    MANUFACTURER,
    MODEL,
    PATIENT_TAGS,
    SERIAL_NUMBER,
    STUDY_TAGS,
    Study,
    finish,
    software_version,
)
from maisi_tools.dicom.painting import WITH_ITS_SERIES, Structure
from maisi_tools.errors import InputError
from maisi_tools.masks.codes import (
    CATEGORIES,
    CODES,
    PRIVATE,
    SIDES,
    SNOMED,
    label_of_structure,
    side_of_codes,
)
from maisi_tools.masks.vocabulary import VOCABULARY, display_name
from maisi_tools.volumes.checks import AGREES
from maisi_tools.volumes.limits import check_limit
from maisi_tools.volumes.series import MAX_EXTENT_MM, slice_affine

try:
    import highdicom as hd
    from highdicom.color import CIELabColor
    from highdicom.seg import Segmentation, SegmentDescription
except ModuleNotFoundError as error:  # a config names what is here by its path, so there is no door before it
    raise InputError(
        "DICOM studies need the extra 'dicom'; install it with: pip install 'maisi-bundles[dicom]'"
    ) from error

SERIES, SERIES_FROM_SCAN, SERIES_NUMBER = "Mask of synthetic CT", "Mask of CT computed from a scan", 2

KINDS = ("BINARY", "FRACTIONAL", "LABELMAP")
"""Segmentation Types that are read."""

SNOMED_RT = ("SRT", "SNM3", "99SDM")
"""Schemes of the codes that SNOMED CT replaced (DICOM PS3.16 section 8.1)."""

SNOMED_OF_RT: Mapping[str, str] = mapping["SRT"]


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
    series = SERIES_FROM_SCAN if study.from_scan else SERIES
    kind = SegmentationStorage, images[0].SOPClassUID, series
    numbers = np.zeros(256, np.uint8)
    numbers[labels] = np.arange(1, len(labels) + 1)
    ds = Segmentation(
        source_images=[_nameless(image) for image in images],
        pixel_array=numbers[np.ascontiguousarray(mask.T)],
        segmentation_type="BINARY",
        segment_descriptions=[_description(number, label) for number, label in enumerate(labels, start=1)],
        series_instance_uid=study.uid(*kind),
        series_number=SERIES_NUMBER,
        sop_instance_uid=study.uid(*kind, 1),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL,
        software_versions=software_version(),
        device_serial_number=SERIAL_NUMBER,
        content_label="MAISI",
        content_description=series,
        content_creator_name=f"{MODEL}^",  # a name of one part, as PN wants it
    )
    ds.SeriesDescription = series
    organization = study.uid(*kind, "dimensions")
    for item in (*ds.DimensionOrganizationSequence, *ds.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    return finish(ds, study)


def _nameless(image: Dataset) -> Dataset:
    """An image's header with nothing of patient and study that highdicom would refuse to copy: :func:`finish` sets it.

    Clinics have birth dates such as 19700000, times with colons and character sets by ISO 2022 escapes.
    """
    plain = Dataset(dict(image.items()))  # its elements are the image's own until they are set
    plain.file_meta = image.file_meta
    for keyword in (*PATIENT_TAGS, *STUDY_TAGS):
        if keyword in plain and keyword != "StudyInstanceUID":
            delattr(plain, keyword)  # setting it would decode what is there
            setattr(plain, keyword, "")
    plain.SpecificCharacterSet = "ISO_IR 192"
    return plain


def segments(
    ds: Dataset, table: Mapping[str, int], slices: Sequence[Dataset] | None = None
) -> tuple[list[Structure], np.ndarray, tuple[int, int, int], list[str]]:
    """The segments of a DICOM Segmentation that the vocabulary has.

    Args:
        ds: the Segmentation; BINARY, LABELMAP, or FRACTIONAL (from one half on).
        table: the user's names -> label, 0 to drop; looked at before codes and known names.
        slices: of the series it was drawn on, in order, on which its frames are placed. Frames that lie on none of
            them have to form a volume of right angles, as they have to without a series.

    Returns:
        The structures, each with a function that draws it as (columns, rows, slices); the affine (4, 4) from these to
        RAS in mm; their shape; and the segments that no code, name or table explains.

    Raises:
        InputError: frames that are not equally spaced, or are farther apart than they are thick without a word of the
            file on how far, and not slices of the series either; or more than the limits allow.
    """
    if (kind := ds.get("SegmentationType") or "SURFACE") not in KINDS:
        raise InputError(f"the segmentation is of the type {kind}; allowed are {', '.join(KINDS)}: export it as one")
    segmentation = Segmentation.from_dataset(ds, copy=False)
    geometry = segmentation.get_volume_geometry()
    drawing: Callable[[int], Callable[[], np.ndarray]]
    if geometry is None and slices is None:
        raise InputError(
            "the segmentation's frames form no regular volume; allowed are equally spaced frames, or those on the "
            f"slices of a series: {WITH_ITS_SERIES}"
        )
    places: list[int] | None = None
    if slices is not None:
        shape, affine = (int(slices[0].Columns), int(slices[0].Rows), len(slices)), slice_affine(slices)
        # Of frames with gaps between them the distance of slices is a guess, so they are placed one by one if they can.
        with contextlib.nullcontext() if geometry is None else contextlib.suppress(InputError, AttributeError):
            places = _places(ds, shape, affine)
    if places is None and geometry is not None:
        _check_distance(ds, geometry.spacing[0])
    if places is not None:
        drawing = functools.partial(_drawing_of_frames, segmentation, _frames_of(segmentation, places), shape)
    else:
        assert geometry is not None
        count, rows, columns = (int(size) for size in geometry.spatial_shape)
        claim = f"the segmentation has {columns} x {rows} pixels and its frames span {count} slices"
        check_limit("MAISI_MAX_VOXELS", count * rows * columns, claim)
        extent = max(size * mm for size, mm in zip(geometry.spatial_shape, geometry.spacing, strict=True))
        if not 0 < extent < MAX_EXTENT_MM:
            raise InputError(f"{claim}, {extent:g} mm; allowed are up to {MAX_EXTENT_MM:g} mm: export it again")
        # highdicom's axes are slice, row, column, its slices in the order opposite to that of the normal.
        turn = np.array([[0, 0, -1, count - 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
        shape, affine = (columns, rows, count), RAS_TO_LPS @ geometry.affine @ turn
        drawing = functools.partial(_drawing, segmentation)

    structures, unknown = [], []
    for item in ds.SegmentSequence:
        number, name = int(item.SegmentNumber), str(item.get("SegmentLabel", ""))
        label = _label_of(item, name, table)
        if label is None:
            unknown.append(name or f"segment {number}")
        elif label:
            structures.append(Structure(name, label, drawing(number)))
    return structures, affine, shape, unknown


def _places(ds: Dataset, shape: tuple[int, int, int], affine: np.ndarray) -> list[int]:
    """The slice of a series, of this shape and affine, that each frame lies on, by its position and axes.

    Raises:
        InputError: a frame that lies on none.
    """
    columns, rows, count = shape
    to_voxels, places = np.linalg.inv(affine) @ RAS_TO_LPS, []
    for own in ds.PerFrameFunctionalGroupsSequence:
        position, orientation, measures = (
            _group(ds, own, keyword)
            for keyword in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        row, column = np.reshape(np.asarray(orientation.ImageOrientationPatient, dtype=float), (2, 3))
        frame = np.eye(4)
        frame[:3, 0], frame[:3, 1] = row * float(measures.PixelSpacing[1]), column * float(measures.PixelSpacing[0])
        frame[:3, 3] = np.asarray(position.ImagePositionPatient, dtype=float)
        corners = np.array([[0, 0, 0, 1], [columns - 1, 0, 0, 1], [0, rows - 1, 0, 1]]).T
        found = (to_voxels @ frame @ corners)[:3]
        place = int(np.rint(found[2, 0]))
        on_slice = np.abs(found - [*corners[:2], [place] * 3]).max() < AGREES
        if (int(ds.Columns), int(ds.Rows)) != (columns, rows) or not on_slice or not 0 <= place < count:
            raise InputError(
                "the segmentation's frames form no regular volume, and one lies on no slice of the series; allowed are "
                "equally spaced frames, or those on its slices: give the series it was drawn on"
            )
        places.append(place)
    return places


def _check_distance(ds: Dataset, found: float) -> None:
    """Refuse frames with what may be gaps between them: a slice may have no frame where nothing was drawn in it.

    Raises:
        InputError: they are farther apart than thick, in mm, and nothing says that slices are so far apart.
    """
    measures = [_group(ds, own, "PixelMeasuresSequence") for own in ds.get("PerFrameFunctionalGroupsSequence") or ()]
    thick = [float(one.SliceThickness) for one in measures if one.get("SliceThickness")]
    if not any("SpacingBetweenSlices" in one for one in measures) and thick and found > 1.01 * max(thick):
        raise InputError(
            f"the segmentation's frames are {found:g} mm apart and {max(thick):g} mm thick, and it says nothing of "
            f"slices between them; allowed are frames on the slices of a series, all of it: {WITH_ITS_SERIES}"
        )


def _group(ds: Dataset, own: Dataset, keyword: str) -> Dataset:
    """A functional group of a frame, its own or the one that all frames share."""
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return (own.get(keyword) or shared.get(keyword) or [Dataset()])[0]


Frames = Mapping[int, Sequence[tuple[int, int]]]
"""Segment -> its frames, each by its number, from 1 on, and the slice that it lies on."""


def _frames_of(segmentation: Segmentation, places: Sequence[int]) -> Frames:
    """The frames of each segment; of a label map, which has all of them in each frame, under 0."""
    found: dict[int, list[tuple[int, int]]] = {}
    groups = segmentation.PerFrameFunctionalGroupsSequence
    for index, (own, place) in enumerate(zip(groups, places, strict=True), start=1):
        of_all = str(segmentation.SegmentationType) == "LABELMAP"
        number = 0 if of_all else _group(segmentation, own, "SegmentIdentificationSequence").ReferencedSegmentNumber
        found.setdefault(int(number), []).append((index, place))
    return found


def _drawing_of_frames(
    segmentation: Segmentation, frames: Frames, shape: tuple[int, int, int], number: int
) -> Callable[[], np.ndarray]:
    kind = str(segmentation.SegmentationType)
    half = float(segmentation.get("MaximumFractionalValue", 1)) / 2 if kind == "FRACTIONAL" else 0.5

    def draw() -> np.ndarray:
        volume = np.zeros(shape, bool)
        for index, place in frames.get(0 if kind == "LABELMAP" else number, ()):
            stored = segmentation.get_stored_frame(index).T
            volume[:, :, place] |= stored == number if kind == "LABELMAP" else stored >= half
        return volume

    return draw


def _drawing(segmentation: Segmentation, number: int) -> Callable[[], np.ndarray]:
    def draw() -> np.ndarray:
        volume = segmentation.get_volume(segment_numbers=[number], combine_segments=False)
        return volume.array[::-1, :, :, 0].T >= 0.5

    return draw


def _label_of(item: Dataset, name: str, table: Mapping[str, int]) -> int | None:
    if name in table:
        return table[name]
    kinds = item.get("SegmentedPropertyTypeCodeSequence") or [Dataset()]
    regions = item.get("AnatomicRegionSequence") or [Dataset()]
    scheme, value = _coded(kinds[0])
    if scheme == PRIVATE and value.isdecimal() and int(value) in VOCABULARY:
        return int(value)
    side = _side(kinds[0], "SegmentedPropertyTypeModifierCodeSequence") or _side(
        regions[0], "AnatomicRegionModifierSequence"
    )
    category = (item.get("SegmentedPropertyCategoryCodeSequence") or [Dataset()])[0]
    value, region, category = (
        code if scheme == SNOMED else "" for scheme, code in map(_coded, (kinds[0], regions[0], category))
    )
    return label_of_structure(name, value, side, region, category)


def _coded(item: Dataset) -> tuple[str, str]:
    """Scheme and value of a code; one of SNOMED RT (T-62000), as older programs write it, as that of SNOMED CT.

    Table: DICOM PS3.16 annex O, as pydicom carries it.
    """
    scheme = str(item.get("CodingSchemeDesignator", ""))
    value = str(item.get("CodeValue") or item.get("LongCodeValue") or "")
    if scheme in SNOMED_RT:
        return (SNOMED, SNOMED_OF_RT[value]) if value in SNOMED_OF_RT else (scheme, value)
    return scheme, value


def _side(item: Dataset, keyword: str) -> str:
    return side_of_codes(_coded(modifier)[1] for modifier in item.get(keyword) or ())


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
