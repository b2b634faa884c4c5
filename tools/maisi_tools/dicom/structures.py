"""A mask as a DICOM RT Structure Set, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import RTStructureSetStorage

from maisi_tools.dicom.ct import RAS_TO_LPS, Grid
from maisi_tools.dicom.objects import Study, new_object
from maisi_tools.dicom.painting import Structure
from maisi_tools.dicom.segmentation import label_color
from maisi_tools.errors import InputError
from maisi_tools.masks.codes import CODES, PRIVATE, display_name, label_of_name
from maisi_tools.masks.vocabulary import BODY
from maisi_tools.volumes.series import slice_affine

SERIES, SERIES_NUMBER = "Structures of synthetic CT", 3

PLANE_TOLERANCE = 0.5
"""A contour belongs to the slice it is nearest to, when that is within this share of the slice distance."""

CONTOUR_DATA = 0x30060050

DECIMALS = 4
"""Of contour points in mm: a thousandth of a pixel."""


def structure_set(mask: np.ndarray, grid: Grid, images: Sequence[Dataset], study: Study) -> Dataset:
    """The labels of a mask as the ROIs of an RT Structure Set.

    Contours run midway between the centres of voxels inside and outside, so that the centres inside of a contour are
    the voxels of the label. Holes are cut in by a seam ("keyhole"), so each contour is a closed polygon of its own and
    means the same to readers that unite contours and to those that combine them by XOR. The body's ROI is the whole
    outline, other labels included, as planning systems expect of an EXTERNAL.

    Args:
        mask: (columns, rows, slices), uint8 in MAISI's vocabulary.
        grid: of the mask.
        images: the slices it belongs to, in order, or one Enhanced CT.
        study: it is written into.

    Raises:
        InputError: a mask without labels.
    """
    labels = [int(label) for label in np.unique(mask) if label]
    if not labels:
        raise InputError("the mask is empty; allowed is a mask with at least one label: leave it out")
    ds = new_object(study, RTStructureSetStorage, "RTSTRUCT", SERIES, SERIES_NUMBER, 1)
    ds.OperatorsName = ""
    ds.StructureSetLabel, ds.StructureSetName = "MAISI", "Mask of a synthetic CT"
    ds.StructureSetDate, ds.StructureSetTime = ds.InstanceCreationDate, ds.InstanceCreationTime
    ds.StructureSetDescription = study.description
    ds.FrameOfReferenceUID = study.attributes["FrameOfReferenceUID"]
    ds.PositionReferenceIndicator = study.attributes["PositionReferenceIndicator"]
    ds.ApprovalStatus = "UNAPPROVED"
    ds.ReferencedFrameOfReferenceSequence = [_referenced(images, study)]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    for number, label in enumerate(labels, start=1):
        inside = mask > 0 if label == BODY else mask == label
        roi, contour, observation = Dataset(), Dataset(), Dataset()
        roi.ROINumber = contour.ReferencedROINumber = number
        roi.ReferencedFrameOfReferenceUID = ds.FrameOfReferenceUID
        roi.ROIName, roi.ROIGenerationAlgorithm = display_name(label), "AUTOMATIC"
        contour.ROIDisplayColor = list(label_color(label))
        contour.ContourSequence = _contours(inside, grid, images)
        observation.ObservationNumber = observation.ReferencedROINumber = number
        observation.RTROIInterpretedType = "EXTERNAL" if label == BODY else "ORGAN"
        observation.ROIInterpreter = ""
        observation.RTROIIdentificationCodeSequence = [_identification(label)]
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(contour)
        ds.RTROIObservationsSequence.append(observation)
    return ds


def structures(ds: Dataset, slices: Sequence[Dataset], table: Mapping[str, int]) -> tuple[list[Structure], list[str]]:
    """The ROIs of an RT Structure Set that the vocabulary has, on the grid of a series.

    A voxel is inside where its centre is inside an odd number of the ROI's contours in its slice. A slice takes the
    contours of the plane nearest to it, see :data:`PLANE_TOLERANCE`.

    Args:
        ds: the structure set.
        slices: of the referenced series, in order.
        table: the user's ROI names -> label, 0 to drop; looked at before the known names.

    Returns:
        The structures, each with a function that draws it as (columns, rows, slices); and the names of the ROIs that
        neither name nor table explains or that have no closed contours.
    """
    shape = int(slices[0].Columns), int(slices[0].Rows), len(slices)
    to_voxels = np.linalg.inv(slice_affine(slices)) @ RAS_TO_LPS
    names = {int(roi.ROINumber): str(roi.get("ROIName", "")) for roi in ds.get("StructureSetROISequence") or ()}
    found, unknown = [], []
    for item in ds.get("ROIContourSequence") or ():
        name = names.get(int(item.ReferencedROINumber), "")
        label = table[name] if name in table else label_of_name(name)
        polygons = [
            np.asarray(contour.ContourData, dtype=float).reshape(-1, 3) @ to_voxels[:3, :3].T + to_voxels[:3, 3]
            for contour in item.get("ContourSequence") or ()
            if str(contour.ContourGeometricType) in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
        ]
        if label is None or (label and not polygons):
            unknown.append(name or f"ROI {item.ReferencedROINumber}")
        elif label:
            found.append(Structure(name, label, _drawing(name, polygons, shape)))
    return found, unknown


def _drawing(name: str, polygons: list[np.ndarray], shape: tuple[int, int, int]) -> Callable[[], np.ndarray]:
    planes: dict[int, dict[float, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for polygon in polygons:
        height = polygon[:, 2]
        if np.ptp(height) > PLANE_TOLERANCE:
            raise InputError(
                f"the ROI {name} has contours across the slices of the series; allowed are contours in its slices: "
                "give the series that the structure set was drawn on"
            )
        k = int(np.rint(height.mean()))
        if 0 <= k < shape[2]:
            planes[k][round(abs(float(height.mean()) - k), 2)].append(polygon[:, :2])

    def draw() -> np.ndarray:
        volume = np.zeros(shape, bool)
        for k, by_distance in planes.items():
            for polygon in by_distance[min(by_distance)]:
                volume[:, :, k] ^= fill_polygon(polygon, shape[:2])
        return volume

    return draw


def fill_polygon(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The voxels whose centre is inside a closed polygon, by the even-odd rule.

    Args:
        polygon: (N, 2) corners, in voxels; the centre of voxel (i, j) is at (i, j).
        shape: (X, Y) of the result.

    Returns:
        Boolean (X, Y).
    """
    start, end = polygon, np.roll(polygon, -1, axis=0)
    # The ends of an edge in one order, so that the two edges of a seam cross a row in exactly the same place.
    swap = (start[:, 1] > end[:, 1]) | ((start[:, 1] == end[:, 1]) & (start[:, 0] > end[:, 0]))
    low, high = np.where(swap[:, None], end, start), np.where(swap[:, None], start, end)
    crossings = np.zeros((shape[0] + 1, shape[1]), dtype=np.int32)
    first = np.clip(np.ceil(low[:, 1]), 0, shape[1]).astype(int)
    last = np.clip(np.ceil(high[:, 1]), 0, shape[1]).astype(int)  # an edge counts at its lower end, not at its upper
    counts = last - first
    edge = np.repeat(np.arange(len(polygon)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
    share = (row - low[edge, 1]) / (high[edge, 1] - low[edge, 1])
    x = low[edge, 0] + share * (high[edge, 0] - low[edge, 0])
    np.add.at(crossings, (np.clip(np.ceil(x), 0, shape[0]).astype(int), row), 1)
    return (np.cumsum(crossings, axis=0)[:-1] % 2).astype(bool)


def outline(inside: np.ndarray) -> list[np.ndarray]:
    """Closed polygons (N, 2), in voxels, whose insides are the voxels of a boolean (X, Y); holes cut in by seams."""
    framed = np.pad(inside, 1).astype(float)
    filled = contour_generator(z=framed.T, fill_type=FillType.OuterOffset).filled(0.5, 2.0)
    polygons = []
    for points, offsets in zip(*filled, strict=True):
        rings = [points[start:stop] - 1 for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        outer, *holes = (_corners(ring[:-1]) for ring in rings)
        polygons.append(_cut_in(outer, holes))
    return polygons


def _corners(ring: np.ndarray) -> np.ndarray:
    """A closed ring without the points on straight stretches."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return ring[np.abs(turns) > 1e-9]


def _cut_in(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One polygon of an outer ring and its holes: each joined by a seam, walked there and back, where it is nearest."""
    while holes:
        nearest = []
        for number, hole in enumerate(holes):
            distances = ((outer[:, None] - hole[None]) ** 2).sum(axis=2)
            at, start = divmod(int(np.argmin(distances)), len(hole))
            nearest.append((float(distances[at, start]), number, at, start))
        _, nearest_hole, at, start = min(nearest)
        hole = np.roll(holes.pop(nearest_hole), -start, axis=0)
        outer = np.concatenate([outer[: at + 1], hole, hole[:1], outer[at:]])
    return outer


def _contours(inside: np.ndarray, grid: Grid, images: Sequence[Dataset]) -> list[Dataset]:
    contours = []
    for k in np.flatnonzero(inside.any(axis=(0, 1))):
        for polygon in outline(inside[:, :, k]):
            points = np.column_stack([polygon, np.full(len(polygon), k), np.ones(len(polygon))]) @ grid.affine[:3].T
            contour = Dataset()
            contour.ContourImageSequence = [_reference(images, int(k))]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(points)
            text = "\\".join(f"{value:.{DECIMALS}f}" for value in points.ravel()).encode()
            text += b" " * (len(text) % 2)
            # As it is stored: pydicom would take most of the time to turn the numbers into objects of its own.
            contour[CONTOUR_DATA] = RawDataElement(Tag(CONTOUR_DATA), "DS", len(text), text, 0, False, True)
            contours.append(contour)
    return contours


def _reference(images: Sequence[Dataset], number: int) -> Dataset:
    image = images[0] if len(images) == 1 else images[number]
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    if len(images) == 1:
        item.ReferencedFrameNumber = number + 1
    return item


def _referenced(images: Sequence[Dataset], study: Study) -> Dataset:
    frame, referenced_study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = images[0].SeriesInstanceUID
    series.ContourImageSequence = []
    for image in images:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        series.ContourImageSequence.append(item)
    referenced_study.ReferencedSOPClassUID = (
        "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired; as is usual
    )
    referenced_study.ReferencedSOPInstanceUID = study.attributes["StudyInstanceUID"]
    referenced_study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = study.attributes["FrameOfReferenceUID"]
    frame.RTReferencedStudySequence = [referenced_study]
    return frame


def _identification(label: int) -> Any:
    code = CODES[label]
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.code, code.scheme
    item.CodeMeaning = code.meaning
    if code.scheme == PRIVATE:
        item.CodingSchemeVersion = "1"
    return item
