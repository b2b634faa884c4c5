"""A mask as a DICOM RT Structure Set, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import RTStructureSetStorage
from scipy import ndimage

from maisi_tools.dicom.ct import RAS_TO_LPS, Grid
from maisi_tools.dicom.objects import Study, new_object
from maisi_tools.dicom.painting import Place, Structure
from maisi_tools.dicom.segmentation import label_color
from maisi_tools.errors import InputError
from maisi_tools.masks.codes import CODES, PRIVATE, label_of_name
from maisi_tools.masks.vocabulary import BODY, display_name
from maisi_tools.volumes.limits import check_limit
from maisi_tools.volumes.series import frame_of_reference, slice_affine

logger = logging.getLogger(__name__)

SERIES, SERIES_FROM_SCAN, SERIES_NUMBER = "Structures of synthetic CT", "Structures of CT computed from a scan", 3

PLANE_TOLERANCE = 0.5
"""A contour belongs to the slice it is nearest to, when that is within this share of the slice distance."""

LOW_GAP = 0.25
"""What is usual in an ROI is this quantile of its own distances: a quarter and not the least, because of planes that
were added between two."""

SAME_PLANE = 0.02
"""Heights of contours in one plane differ by no more than this share of the slice distance, or than the rounding of
their coordinates explains: where slices are oblique, that makes heights uneven."""

FLAT = 1e-3
"""A contour whose points differ in height by no more than this share of the slice distance is not tilted."""

EXPLAINED = 0.75
"""Contours are tilted where one tilt of all explains more than this share of their points' variance in height."""

USUAL_GAP, MAX_FILLED_GAP = 1.5, 3.5
"""Distances of two planes, as a multiple of what is usual in the ROI: up to the first nothing is missing, up to the
second (two planes left out) the shape between is interpolated with a word, beyond it there are two parts."""

MAX_CROSSINGS = 1 << 22
"""Of edges with rows, that are held at a time."""

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
    series = SERIES_FROM_SCAN if study.from_scan else SERIES
    ds = new_object(study, RTStructureSetStorage, "RTSTRUCT", series, SERIES_NUMBER, 1, images[0].SOPClassUID)
    ds.OperatorsName = ""
    ds.StructureSetLabel, ds.StructureSetName = "MAISI", series
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


def structures(
    ds: Dataset, slices: Sequence[Dataset], table: Mapping[str, int]
) -> tuple[list[Structure], list[str], list[str]]:
    """The ROIs of an RT Structure Set that the vocabulary has, on the grid of a series.

    A voxel is inside where its centre is inside an odd number of the ROI's contours in its slice, one that is there
    twice counted once. A slice takes the contours of the plane nearest to it, see :data:`PLANE_TOLERANCE`. Slices
    between two planes of contours, as when every second one was drawn, get the shape between theirs, see
    :func:`_drawing`. What cannot be as it was drawn is in the log: contours twice, crossing ones, those outside of the
    series.

    Args:
        ds: the structure set.
        slices: of the referenced series, in order.
        table: the user's ROI names -> label, 0 to drop; looked at before the known names.

    Returns:
        The structures, each with a function that draws it as (columns, rows, slices); the names of the ROIs that
        neither name nor table explains; and those that cannot be drawn, each with the reason: no closed contours, or
        another frame of reference.
    """
    shape = int(slices[0].Columns), int(slices[0].Rows), len(slices)
    affine = slice_affine(slices)
    to_voxels = np.linalg.inv(affine) @ RAS_TO_LPS
    listed: dict[int, Dataset] = {}
    names: dict[int, str] = {}
    for roi in ds.get("StructureSetROISequence") or ():
        number, name = int(roi.ROINumber), str(roi.get("ROIName", ""))
        if names.get(number, name) != name:
            raise InputError(
                f"the structure set has two ROIs of the number {number}, {names[number]} and {name}; allowed is one, "
                "so that contours are of one of them: export it again"
            )
        listed[number], names[number] = roi, name
    frame = frame_of_reference(slices)
    drawn, unknown, undrawn = [], [], []
    found_contours: dict[int, list[Dataset]] = {}
    for item in ds.get("ROIContourSequence") or ():  # of which an ROI may have several
        found_contours.setdefault(int(item.ReferencedROINumber), []).extend(item.get("ContourSequence") or ())
    for number, name in names.items():
        if number not in found_contours and table.get(name) != 0:
            undrawn.append(f"{name or f'ROI {number}'} (without closed contours)")
    for number, all_contours in found_contours.items():
        name = names.get(number, "") or f"ROI {number}"
        label = table[name] if name in table else label_of_name(name)
        contours = [
            contour
            for contour in all_contours
            if str(contour.get("ContourGeometricType")) in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
        ]
        if label == 0:
            continue
        own = listed.get(number, Dataset()).get("ReferencedFrameOfReferenceUID")
        # Of a fused MR or PET, say, whose coordinates are others; unless it names the series' own slices.
        if own and frame and own != frame and not _refers_to(contours, slices):
            undrawn.append(f"{name} (of another frame of reference than the series)")
            continue
        if not contours:
            undrawn.append(f"{name} (without closed contours)")
        elif label is None:
            unknown.append(name)
        else:
            if len(contours) < len(all_contours):
                logger.warning(
                    "the ROI %s has %d contours that are not closed, beside %d closed ones: they are left out",
                    *(name, len(all_contours) - len(contours), len(contours)),
                )
            drawn.append((name, label, _planes(name, contours, to_voxels)))
    usual = [_usual_gap(planes) for _, _, planes in drawn if len(planes) > 2]
    elsewhere = float(np.median(usual)) if usual else 1.0
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    found = [
        Structure(name, label, *_drawing(name, planes, shape, spacing, elsewhere)) for name, label, planes in drawn
    ]
    return found, unknown, undrawn


def _refers_to(contours: Sequence[Dataset], slices: Sequence[Dataset]) -> bool:
    """Whether contours name slices of a series as what they were drawn on."""
    known = {str(one.get("SOPInstanceUID")) for one in slices}
    named = (image for contour in contours for image in contour.get("ContourImageSequence") or ())
    return any(str(image.get("ReferencedSOPInstanceUID")) in known for image in named)


Plane = tuple[float, list[np.ndarray]]
"""Where a plane of contours lies, in slices, and its polygons (N, 2) in voxels."""


def _planes(name: str, contours: Sequence[Dataset], to_voxels: np.ndarray) -> list[Plane]:
    """The planes of an ROI, in order; a plane ends where the next height is further off than rounding explains.

    Raises:
        InputError: a plane that reaches from one slice to the next, or planes too close to be told apart.
    """
    placed = [_points(name, contour) @ to_voxels[:3, :3].T + to_voxels[:3, 3] for contour in contours]
    placed.sort(key=lambda points: float(points[:, 2].mean()))
    heights = levels = np.array([points[:, 2].mean() for points in placed])
    uneven, rounding = max(float(np.ptp(points[:, 2])) for points in placed), 0.0
    if uneven > FLAT:
        rounding = 10.0 ** -_decimals(contours) * float(np.abs(to_voxels[2, :3]).sum())
    if uneven > max(rounding, FLAT):  # tilted: the height of a contour depends on where in its plane it lies
        levels, uneven = _along_their_normal(placed)
    noise = SAME_PLANE if uneven <= SAME_PLANE else min(max(uneven, rounding), PLANE_TOLERANCE / 2)
    order = np.argsort(levels, kind="stable")
    planes, left_out = [], 0
    for part in np.split(order, np.flatnonzero(np.diff(levels[order]) > noise) + 1):
        if np.ptp(np.concatenate([placed[index][:, 2] for index in part])) > PLANE_TOLERANCE:
            raise InputError(
                f"the ROI {name} has contours across the slices of the series; allowed are contours in its slices: "
                "give the series that the structure set was drawn on"
            )
        if np.ptp(levels[part]) > noise:
            raise InputError(
                f"the ROI {name} has planes of contours no more than {noise:.2f} slices apart, which cannot be told "
                "from contours of one plane; allowed are contours in the slices of the series: give the series that "
                "the structure set was drawn on"
            )
        polygons = {_form(placed[index][:, :2]): placed[index][:, :2] for index in part}
        left_out += len(part) - len(polygons)
        # Rounded, so that what is meant to be a slice, or midway between two, is.
        planes.append((round(float(heights[part].mean()), 2), list(polygons.values())))
    if left_out:
        logger.warning("the ROI %s has %d contours twice, which are taken once", name, left_out)
    return sorted(planes, key=lambda plane: plane[0])


def _along_their_normal(placed: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """How high contours, points (N, 3) in voxels, lie along the normal that all share, and how uneven they are then.

    Where no common tilt explains most of their unevenness, their heights are those across the slices.
    """
    centred = np.concatenate([points - points.mean(axis=0) for points in placed])
    tilt = np.linalg.lstsq(centred[:, :2], centred[:, 2], rcond=None)[0]
    left = centred[:, 2] - centred[:, :2] @ tilt
    if left @ left > (1 - EXPLAINED) * (centred[:, 2] @ centred[:, 2]):
        tilt[:] = 0
    straight = [points[:, 2] - points[:, :2] @ tilt for points in placed]
    return np.array([one.mean() for one in straight]), max(float(np.ptp(one)) for one in straight)


def _decimals(contours: Sequence[Dataset]) -> int:
    """How many digits the coordinates of contours have after the point, at most."""
    values = (value if isinstance(value, bytes) else str(value).encode() for c in contours for value in _stored(c))
    return max((len(value.strip().partition(b".")[2]) for value in values), default=0)


def _form(polygon: np.ndarray) -> bytes:
    """What two polygons share that are one, wherever they begin and whichever way they run."""
    points = np.round(polygon, 2) + 0.0  # no -0
    return points[np.lexsort(points.T)].tobytes()


def _usual_gap(planes: Sequence[Plane]) -> float:
    """How far apart planes are, in slices, where the ROI goes on: a low gap, since a high one may part two lesions."""
    return float(np.quantile(np.diff([height for height, _ in planes]), LOW_GAP, method="lower"))


def _stored(contour: Dataset) -> list:
    """The coordinates of a contour as stored: pydicom would make an object of each, of a hundred times its size."""
    element = contour.get_item(CONTOUR_DATA) if CONTOUR_DATA in contour else None
    stored = b"" if element is None else element.value
    return stored.split(b"\\") if isinstance(stored, bytes) else list(stored or ())


def _points(name: str, contour: Dataset) -> np.ndarray:
    """The points of a contour (N, 3), in mm."""
    values = _stored(contour)
    count = len(values) // 3
    check_limit("MAISI_MAX_CONTOUR_POINTS", count, f"the ROI {name} has a contour of {count} points")
    try:
        points = np.array([float(value) for value in values]).reshape(-1, 3)
    except ValueError as error:
        raise InputError(
            f"the ROI {name} has a contour that is no list of points ({error}); export it again"
        ) from error
    if not len(points) or not np.isfinite(points).all():
        raise InputError(
            f"the ROI {name} has a contour without points, or with some that are no numbers; export it again"
        )
    return points


def _drawing(
    name: str, planes: list[Plane], shape: tuple[int, int, int], spacing: np.ndarray, elsewhere: float
) -> tuple[Callable[[], np.ndarray], Place]:
    """A function that draws an ROI, and the part of the grid it draws.

    Between two planes the shape is that of the signed distances to their outlines, weighted by how near the planes are
    (shape-based interpolation: S. P. Raya and J. K. Udupa, IEEE TMI 9(1), 1990). That is done where the planes are as
    far apart as the ROI's planes usually are; up to :data:`MAX_FILLED_GAP` times as far it is done and said; beyond,
    they are taken for those of two parts, and that is said.

    Args:
        name: of the ROI, for the log.
        planes: in order.
        shape: of the grid.
        spacing: of the grid, in mm.
        elsewhere: distance of planes, in slices, in the other ROIs: that of an ROI with fewer than three.
    """
    heights = np.array([height for height, _ in planes])
    at = [int(np.ceil(height - 0.5)) for height in heights]  # a plane midway goes down, so that none meet
    content: dict[int, tuple[int, int, float]] = {}  # slice -> the planes it lies between, and the upper one's share
    for index in sorted(range(len(planes)), key=lambda i: -abs(heights[i] - at[i])):  # the nearest one is written last
        content[at[index]] = index, index, 0.0
    own = max(_usual_gap(planes) if len(planes) > 2 else elsewhere, 1.0)
    for lower, gap in enumerate(np.diff(heights)):
        missing = range(at[lower] + 1, at[lower + 1])
        if not missing:
            continue
        if gap > USUAL_GAP * own:
            logger.warning(
                "the ROI %s has no contours over %.1f mm (slices %d to %d of the series), where its planes are %.1f mm "
                "apart: %s",
                *(name, gap * spacing[2], missing[0] + 1, missing[-1] + 1, own * spacing[2]),
                "they are interpolated" if gap <= MAX_FILLED_GAP * own else "taken for two parts, with nothing between",
            )
        if gap <= MAX_FILLED_GAP * own:
            content |= {k: (lower, lower + 1, (k - heights[lower]) / gap) for k in missing}
    content = {k: source for k, source in content.items() if 0 <= k < shape[2]}
    if outside := sum(not 0 <= k < shape[2] for k in at):
        logger.warning(
            "the ROI %s: %d of %d planes of contours lie above or below the series", name, outside, len(planes)
        )

    corners = np.concatenate([polygon for _, polygons in planes for polygon in polygons])
    low = np.clip(np.floor(corners.min(axis=0)), 0, shape[:2]).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, low, shape[:2]).astype(int)
    first, last = min(content, default=0), max(content, default=-1)
    place = slice(low[0], high[0]), slice(low[1], high[1]), slice(first, last + 1)
    # Contours run half a voxel about the voxels' centres, those of the outermost voxels, too.
    beyond = max(0.0, *(-0.5 - corners.min(axis=0)), *(corners.max(axis=0) - (np.array(shape[:2]) - 0.5)))
    if beyond > 0.5:
        logger.warning("the ROI %s reaches up to %.0f voxels beyond the slices' edges, where it is cut", name, beyond)
    size = int(high[0] - low[0]), int(high[1] - low[1])

    crossing: set[int] = set()  # planes

    def filled(index: int) -> np.ndarray:
        inside = np.zeros(size, bool)
        areas: list[_Area] = []
        for polygon in planes[index][1]:
            inside ^= (part := fill_polygon(polygon - low, size))
            area = _area(part, polygon - low)
            if any(_cross(area, other) for other in areas):
                crossing.add(index)
            areas.append(area)
        return inside

    def draw() -> np.ndarray:
        volume, known = np.zeros((*size, last + 1 - first), bool), bool(crossing)
        for k, (lower, upper, share) in content.items():
            inside = filled(lower)
            if upper != lower:
                inside = _between(inside, filled(upper), share, spacing[:2])
            volume[:, :, k - first] = inside
        if crossing and not known:
            logger.warning(
                "the ROI %s has contours that cross each other in %d planes, first in slice %d of the series: what "
                "both hold is taken for a hole",
                *(name, len(crossing), at[min(crossing)] + 1),
            )
        return volume

    return draw, place


_Area = tuple[np.ndarray, np.ndarray, int]
"""First voxel and voxels, in its box, of what a polygon holds, and their number."""


def _area(inside: np.ndarray, polygon: np.ndarray) -> _Area:
    start = np.clip(np.floor(polygon.min(axis=0)), 0, inside.shape).astype(int)
    stop = np.clip(np.ceil(polygon.max(axis=0)) + 1, start, inside.shape).astype(int)
    part = inside[start[0] : stop[0], start[1] : stop[1]]
    return start, part, int(np.count_nonzero(part))


def _cross(one: _Area, other: _Area) -> bool:
    """Whether two areas overlap and neither lies in the other."""
    start = np.maximum(one[0], other[0])
    stop = np.minimum(one[0] + one[1].shape, other[0] + other[1].shape)
    if (stop <= start).any():
        return False
    shared = np.logical_and(*(
        part[tuple(slice(a, b) for a, b in zip(start - first, stop - first, strict=True))]
        for first, part, _ in (one, other)
    ))  # fmt: skip
    return 0 < int(np.count_nonzero(shared)) < min(one[2], other[2])


def _between(lower: np.ndarray, upper: np.ndarray, share: float, spacing: np.ndarray) -> np.ndarray:
    """The shape between two, by their signed distances in mm; nothing where one of them is empty."""
    if not lower.any() or not upper.any():
        return np.zeros_like(lower)
    return (1 - share) * _signed_distance(lower, spacing) + share * _signed_distance(upper, spacing) > 0


def _signed_distance(inside: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm to the other side of the outline, positive inside."""
    framed = np.pad(inside, 1)
    edt = ndimage.distance_transform_edt
    return (edt(framed, sampling=spacing) - edt(~framed, sampling=spacing))[1:-1, 1:-1]


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
    step = max(1, MAX_CROSSINGS // max(shape[1], 1))  # edges at a time, each of which may cross all rows
    for start_edge in range(0, len(polygon), step):
        some = slice(start_edge, start_edge + step)
        edge = np.repeat(np.arange(len(polygon))[some], counts[some])
        before = np.repeat(np.cumsum(counts[some]) - counts[some], counts[some])
        row = np.arange(counts[some].sum()) - before + np.repeat(first[some], counts[some])
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
