"""Which of the series that are there a mask was drawn on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

REFERENCE_TAGS = (
    *("Modality", "FrameOfReferenceUID", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
    *("StructureSetROISequence", "ROIContourSequence"),
)
"""What has to be read of a SEG or RTSTRUCT."""

SERIES_TAGS = ("SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
"""What has to be read of an image."""


@dataclass
class Scan:
    """A series that is there.

    Attributes:
        frame: its Frame of Reference UID; "" where no slice says one.
        instances: SOP Instance UIDs of its slices.
    """

    frame: str = ""
    instances: set[str] = field(default_factory=set)

    def add(self, ds: Dataset) -> None:
        """Count a slice in, of which :data:`SERIES_TAGS` were read."""
        self.frame = self.frame or str(ds.get("FrameOfReferenceUID") or "")
        self.instances.add(str(ds.get("SOPInstanceUID") or ""))


def scans_of(images: Iterable[Dataset]) -> dict[str, Scan]:
    """Series Instance UID -> its slices among images, of which :data:`SERIES_TAGS` were read."""
    found: dict[str, Scan] = {}
    for ds in images:
        found.setdefault(str(ds.get("SeriesInstanceUID")), Scan()).add(ds)
    return found


def drawn_on(ds: Dataset, present: Mapping[str, Scan]) -> tuple[str, bool]:
    """The series that a mask was drawn on, "" for none, and whether the mask names it.

    Of several it is the one that most contours (of a SEG, most references) name slices of, then the one in whose frame
    of reference most ROIs lie, then one that is named, then the one with most slices. A series that is not named counts
    where it is in a frame of reference of the mask.

    Args:
        ds: SEG or RTSTRUCT, of which :data:`REFERENCE_TAGS` were read.
        present: by Series Instance UID.
    """
    slices, names, frames = Counter(_slices(ds)), set(series_named(ds)), frames_of(ds)
    rois = Counter(str(roi.get("ReferencedFrameOfReferenceUID")) for roi in ds.get("StructureSetROISequence") or ())
    best, named = "", False
    fit = (-1, 0, False, 0)
    for uid, scan in present.items():
        references = sum(slices[one] for one in scan.instances)
        is_named = uid in names or references > 0
        own = references, rois[scan.frame], is_named, len(scan.instances)
        if (is_named or (scan.frame and scan.frame in frames)) and own > fit:
            best, named, fit = uid, is_named, own
    return best, named


def series_named(ds: Dataset) -> list[str]:
    """Series Instance UIDs that a mask names."""
    items = [*(ds.get("ReferencedSeriesSequence") or ())]
    for frame in ds.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            items += study.get("RTReferencedSeriesSequence") or ()
    return [str(item.get("SeriesInstanceUID")) for item in items]


def frames_of(ds: Dataset) -> set[str]:
    """Frame of Reference UIDs that a mask lies in."""
    said = [ds, *(ds.get("ReferencedFrameOfReferenceSequence") or ())]
    frames = {str(one.get("FrameOfReferenceUID") or "") for one in said}
    for roi in ds.get("StructureSetROISequence") or ():
        frames.add(str(roi.get("ReferencedFrameOfReferenceUID") or ""))
    return frames - {""}


def _slices(ds: Dataset) -> Iterator[str]:
    """SOP Instance UIDs of what contours were drawn on, once a contour; of a SEG, of the images that it names."""
    for item in ds.get("ROIContourSequence") or ():
        for contour in item.get("ContourSequence") or ():
            for image in contour.get("ContourImageSequence") or ():
                yield str(image.get("ReferencedSOPInstanceUID"))
    for series in ds.get("ReferencedSeriesSequence") or ():
        for image in series.get("ReferencedInstanceSequence") or ():
            yield str(image.get("ReferencedSOPInstanceUID"))
