"""Fractional segments, as documented: they count from one half on."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

from pydicom.sr.codedict import codes

from maisi_tools.dicom.segmentation import segments
from maisi_tools.dicom.study import read_mask
from maisi_tools.errors import InputError

from .conftest import foreign_segmentation


def test_a_voxel_is_inside_from_one_half_on(studies, tmp_path):
    """Every share from 0 to 1 in hundredths, one a voxel."""
    slices = [pydicom.dcmread(file) for file in sorted((studies / "slices" / "CT").iterdir())]
    shares = np.zeros((len(slices), int(slices[0].Rows), int(slices[0].Columns)))
    shares[4, 10, :40] = np.arange(40) / 100
    shares[5, 10, :40] = np.arange(40, 80) / 100
    shares[6, 10, :21] = np.arange(80, 101) / 100
    options = {"segmentation_type": "FRACTIONAL", "max_fractional_value": 100}
    ds = foreign_segmentation(slices, [("x", codes.SCT.Liver, shares)], **options)
    ds.save_as(tmp_path / "seg.dcm")
    found = read_mask(tmp_path / "seg.dcm", studies / "slices" / "CT")[0].numpy()
    assert np.array_equal(found.T > 0, shares >= 0.5)
    assert np.count_nonzero(found) == 51
    ((structure,), _, _, unknown) = segments(pydicom.dcmread(tmp_path / "seg.dcm"), {})
    assert (structure.name, structure.label, unknown) == ("x", 1, [])


def test_a_segmentation_of_surfaces_is_refused_by_its_type(studies, tmp_path):
    ds = pydicom.dcmread(studies / "slices" / "SEG.dcm")
    del ds.SegmentationType
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.5"
    ds.save_as(tmp_path / "seg.dcm")
    with pytest.raises(InputError, match="is of the type SURFACE; allowed are BINARY, FRACTIONAL, LABELMAP"):
        read_mask(tmp_path / "seg.dcm")


@pytest.mark.parametrize("numbers", [[5, 15], [4, 6, 8], [5, 10, 17]])
def test_frames_with_gaps_between_them_are_the_slices_that_were_drawn_or_refused(studies, tmp_path, numbers):
    """Whether the file says how far apart slices are or not; if not, and no series has them, none is guessed."""
    slices = [pydicom.dcmread(file) for file in sorted((studies / "slices" / "CT").iterdir())]
    shares = np.zeros((len(slices), int(slices[0].Rows), int(slices[0].Columns)))
    shares[numbers, 10:14, 8:12] = 1
    ds = foreign_segmentation(slices, [("x", codes.SCT.Liver, shares)], segmentation_type="BINARY")
    for said in (True, False):
        if not said:
            for group in (ds.SharedFunctionalGroupsSequence[0], *ds.PerFrameFunctionalGroupsSequence):
                for measures in group.get("PixelMeasuresSequence") or ():
                    if "SpacingBetweenSlices" in measures:
                        del measures.SpacingBetweenSlices
        ds.save_as(tmp_path / "seg.dcm")
        found = read_mask(tmp_path / "seg.dcm", studies / "slices" / "CT")[0].numpy()
        assert np.array_equal(found.T > 0, shares > 0)
    half = tmp_path / "half"
    half.mkdir()
    for one in slices[: numbers[-1]]:
        one.save_as(half / f"{one.InstanceNumber}.dcm")
    for series in (None, half):
        with pytest.raises(InputError, match="mm apart and 5 mm thick|form no regular volume"):
            read_mask(tmp_path / "seg.dcm", series)
