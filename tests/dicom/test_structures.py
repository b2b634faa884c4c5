"""ROIs as documented: the body is the whole outline."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

from maisi_tools.dicom.structures import fill_polygon, structures
from maisi_tools.dicom.study import read_mask
from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import BODY
from maisi_tools.volumes.series import read_slices, slice_affine

from .test_masks import box, structure_file


@pytest.fixture
def written(studies):
    """The structure set, and the slices it was drawn on."""
    return pydicom.dcmread(studies / "slices" / "RTSTRUCT.dcm"), read_slices(studies / "slices" / "CT")


def test_the_roi_of_the_body_is_the_whole_outline(written, mask):
    """Other organs included: its area, slice by slice, by the contours' own points (shoelace), not by our reader."""
    ds, slices = written
    numbers = {roi.ROIName: roi.ROINumber for roi in ds.StructureSetROISequence}
    (body,) = [item for item in ds.ROIContourSequence if item.ReferencedROINumber == numbers["body"]]
    (kind,) = [o for o in ds.RTROIObservationsSequence if o.ReferencedROINumber == numbers["body"]]
    assert kind.RTROIInterpretedType == "EXTERNAL"
    order = {str(one.SOPInstanceUID): number for number, one in enumerate(slices)}
    to_voxels = np.linalg.inv(slice_affine(slices)) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    filled = np.zeros((int(slices[0].Columns), int(slices[0].Rows), len(slices)), dtype=bool)
    for contour in body.ContourSequence:
        points = np.asarray(contour.ContourData, dtype=float).reshape(-1, 3) @ to_voxels[:3, :3].T + to_voxels[:3, 3]
        number = order[str(contour.ContourImageSequence[0].ReferencedSOPInstanceUID)]
        assert np.abs(points[:, 2] - number).max() < 1e-3
        filled[:, :, number] ^= fill_polygon(points[:, :2], filled.shape[:2])
    assert np.count_nonzero(filled) == np.count_nonzero(mask) > np.count_nonzero(mask == BODY)


def test_an_roi_of_another_frame_of_reference_is_left_out(written, studies, tmp_path, caplog):
    ds, slices = written
    first = ds.StructureSetROISequence[0]
    before = {one.name for one in structures(ds, slices, {})[0]}
    first.ReferencedFrameOfReferenceUID = "1.2.3.4"
    assert {one.name for one in structures(ds, slices, {})[0]} == before  # it names the series' slices all the same
    for item in ds.ROIContourSequence:
        for contour in item.ContourSequence:
            del contour.ContourImageSequence
    after = {one.name for one in structures(ds, slices, {})[0]}
    assert before - after == {str(first.ROIName)}
    assert structures(ds, slices, {})[2] == [f"{first.ROIName} (of another frame of reference than the series)"]
    for roi in ds.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = "1.2.3.4"
    ds.save_as(tmp_path / "rt.dcm")
    with pytest.raises(
        InputError,
        match="no structure that can be drawn .*another frame.* as --series FOLDER, to the listener in the same study",
    ):
        read_mask(tmp_path / "rt.dcm", studies / "slices" / "CT")


def test_contours_of_one_roi_in_two_items_are_joined(slices, studies, tmp_path):
    """The second has the hole."""
    rings = {"Liver": [(4, box(2.6, 9.4))], "Hole": [(4, box(4.6, 6.4))]}
    ds = pydicom.dcmread(structure_file(tmp_path / "rt.dcm", slices, rings))
    del ds.StructureSetROISequence[1]
    ds.ROIContourSequence[1].ReferencedROINumber = 1
    ds.save_as(tmp_path / "rt.dcm")
    mask = read_mask(tmp_path / "rt.dcm", studies / "slices" / "CT")[0].numpy()
    assert np.count_nonzero(mask == 1) == np.count_nonzero(mask) == 7 * 7 - 2 * 2


def test_two_rois_of_one_number_are_refused(slices, studies, tmp_path):
    """Unless they are one, twice."""
    two = {"Liver": [(4, box(2.6, 9.4))], "Spleen": [(4, box(14.6, 16.4))]}
    ds = pydicom.dcmread(structure_file(tmp_path / "rt.dcm", slices, two))
    ds.StructureSetROISequence[1].ROINumber = ds.ROIContourSequence[1].ReferencedROINumber = 1
    with pytest.raises(InputError, match="two ROIs of the number 1, Liver and Spleen; allowed is one"):
        structures(ds, slices, {})
    ds.StructureSetROISequence[1].ROIName = "Liver"
    assert [one.name for one in structures(ds, slices, {})[0]] == ["Liver"]


def test_contours_that_are_not_closed_are_said(slices, studies, tmp_path, caplog):
    drawn = {"Liver": [(k, box(2.6, 9.4)) for k in range(3, 9)], "Spleen": [(4, box(14.6, 16.4))]}
    ds = pydicom.dcmread(structure_file(tmp_path / "rt.dcm", slices, drawn))
    for contour in ds.ROIContourSequence[0].ContourSequence[4:]:
        contour.ContourGeometricType = "OPEN_PLANAR"
    assert [one.name for one in structures(ds, slices, {})[0]] == ["Liver", "Spleen"]
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the ROI Liver has 2 contours that are not closed, beside 4 closed ones: they are left out"]


def tilted(slope, gap=0.2):
    """A ring of an outer contour and a hole beside its middle, at whose planes heights grow with the column."""
    rings = (box(4.5, 28.5), box(6.5, 12.5))
    planes = np.arange(3, 12, gap)
    return {"Liver": [(z + slope * (np.array(ring)[:, 0] - 16.5), ring) for z in planes for ring in rings]}


@pytest.mark.parametrize("slope", [0, 0.0005, 0.004, 0.02])
def test_contours_at_a_small_angle_to_the_slices_are_drawn(slices, studies, tmp_path, slope):
    """Planes closer to one another than one contour is high are not one plane, and a hole stays in its plane."""
    path = structure_file(tmp_path / "rt.dcm", slices, tilted(slope))
    found = read_mask(path, studies / "slices" / "CT")[0].numpy()
    areas = np.count_nonzero(found, axis=(0, 1))
    assert areas[4:12].tolist() == [24**2 - 6**2] * 8 and set(areas[:3]) | set(areas[13:]) == {0}


@pytest.mark.parametrize(
    ("rois", "message"),
    [
        (tilted(0.03), "the ROI Liver has contours across the slices"),
        # Two parts of one plane, each nearly level, from one slice to the next.
        (
            {"Liver": [(5 + 0.02 * (np.array(ring)[:, 0] - 16), ring) for ring in (box(1.5, 5.5), box(28.5, 32.5))]},
            "the ROI Liver has contours across the slices",
        ),
        ({"Liver": [(3 + n / 100, box(4.5, 9.5)) for n in range(9)]}, "planes of contours no more than 0.02 slices"),
    ],
)
def test_contours_that_fit_no_slice_or_no_plane_are_refused(slices, studies, tmp_path, rois, message):
    path = structure_file(tmp_path / "rt.dcm", slices, rois)
    with pytest.raises(InputError, match=f"{message}.*give the series that the structure set was drawn on"):
        read_mask(path, studies / "slices" / "CT")
