"""Of several series the one that a mask was drawn on, by what its ROIs say and not by what is listed first."""

from __future__ import annotations

import pydicom
import pytest
from pydicom.dataset import Dataset

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

from maisi_tools.dicom.references import Scan, drawn_on, frames_of, scans_of
from maisi_tools.dicom.study import read_mask
from maisi_tools.service.receive import needed_series

from .conftest import SIZE
from .test_masks import box, structure_file


def item(**values):
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def structure_set(series, rois):
    """Of (series, frame of reference) it names, and (frame, slices its contours name) of ROIs."""
    ds = item(Modality="RTSTRUCT")
    ds.ReferencedFrameOfReferenceSequence = [
        item(
            FrameOfReferenceUID=frame,
            RTReferencedStudySequence=[item(RTReferencedSeriesSequence=[item(SeriesInstanceUID=uid)])],
        )
        for uid, frame in series
    ]
    ds.StructureSetROISequence = [item(ReferencedFrameOfReferenceUID=frame) for frame, _ in rois]
    ds.ROIContourSequence = [
        item(ContourSequence=[item(ContourImageSequence=[item(ReferencedSOPInstanceUID=one)]) for one in slices])
        for _, slices in rois
    ]
    return ds


PRESENT = {
    "9.1": Scan("5.1", {"1.1", "1.2"}),
    "9.2": Scan("5.2", {"2.1", "2.2", "2.3"}),
    "9.3": Scan("5.2", {"3.1", "3.2", "3.3", "3.4"}),
    "9.4": Scan("5.2", {f"4.{n}" for n in range(9)}),
}
NAMED = [("9.1", "5.1"), ("9.2", "5.2"), ("9.3", "5.2")]


@pytest.mark.parametrize(
    ("series", "rois", "expected"),
    [
        (NAMED, [("5.1", ["1.1"]), ("5.2", ["2.1"]), ("5.2", ["2.2"])], ("9.2", True)),  # most contours
        (NAMED, [("5.2", ["1.1", "1.1", "1.2"]), ("5.2", ["2.1"])], ("9.1", True)),
        (NAMED, [("5.1", []), ("5.1", []), ("5.2", [])], ("9.1", True)),  # most ROIs
        (NAMED, [("5.2", [])], ("9.3", True)),  # of one frame, most slices among those that are named
        ([], [("5.2", ["2.1"])], ("9.2", True)),  # by its slices alone
        ([("9.7", "5.2")], [("5.2", [])], ("9.4", False)),  # one that is not there
        ([("9.7", "5.7")], [("5.7", ["7.1"])], ("", False)),
        ([], [], ("", False)),
    ],
)
def test_the_series_that_the_rois_say(series, rois, expected):
    for present in (PRESENT, dict(reversed(PRESENT.items()))):
        assert drawn_on(structure_set(series, rois), present) == expected


def test_a_segmentation_was_drawn_on_the_series_of_most_references():
    def named(uid, *slices):
        images = [item(ReferencedSOPInstanceUID=one) for one in slices]
        return item(SeriesInstanceUID=uid, ReferencedInstanceSequence=images)

    ds = item(Modality="SEG", FrameOfReferenceUID="5.2")
    ds.ReferencedSeriesSequence = [named("9.3", "3.1"), named("9.2", "2.1", "2.2")]
    assert drawn_on(ds, PRESENT) == ("9.2", True) and frames_of(ds) == {"5.2"}
    assert drawn_on(item(FrameOfReferenceUID="5.1"), PRESENT) == ("9.1", False)


def test_a_slice_without_frame_of_reference_takes_that_of_the_others():
    heads = [item(SeriesInstanceUID="9", SOPInstanceUID=str(n), FrameOfReferenceUID="5" if n else "") for n in (0, 1)]
    assert scans_of(heads) == {"9": Scan("5", {"0", "1"})}


def test_command_and_listener_take_the_same_series(slices, tmp_path):
    """A short series of the same place is named first: half of the organ would lie outside of it."""
    path = structure_file(tmp_path / "rt.dcm", slices, {"Liver": [(k, box(3.5, 15.5)) for k in range(4, 14)]})
    ds = structure_set([("9.1", slices[0].FrameOfReferenceUID), ("9.2", slices[0].FrameOfReferenceUID)], [])
    heads, folder = [], tmp_path / "ct"
    folder.mkdir()
    for uid, some in (("9.1", slices[:8]), ("9.2", slices)):
        for number, one in enumerate(some):
            one.SeriesInstanceUID, one.SOPInstanceUID = uid, f"{uid}.{number}"
            one.save_as(folder / f"{uid}.{number}.dcm")
            heads.append(
                item(**{k: one.get(k) for k in ("SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")})
            )
    rt = pydicom.dcmread(path)
    rt.ReferencedFrameOfReferenceSequence = ds.ReferencedFrameOfReferenceSequence
    rt.save_as(path)
    found = read_mask(path, folder)
    assert found.shape[1:] == SIZE and int(found.sum()) == 144 * 10
    assert needed_series(path, scans_of(heads)) == "9.2"
