"""What the slices of a generated CT say, as documented."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest

pytest.importorskip("highdicom", reason="needs the extra 'dicom'")

from maisi_tools.dicom.ct import stored_values
from maisi_tools.errors import InputError


def test_the_first_view_is_of_soft_tissue(studies):
    """Centre 40 and width 400 HU, so black at -160 and white at 240."""
    files = sorted((studies / "slices" / "CT").iterdir())
    assert files
    for file in files:
        ds = pydicom.dcmread(file, stop_before_pixels=True)
        assert (float(ds.WindowCenter), float(ds.WindowWidth)) == (40, 400)
    (window,) = (
        pydicom.dcmread(studies / "enhanced" / "CT" / "CT.dcm").SharedFunctionalGroupsSequence[0].FrameVOILUTSequence
    )
    assert (float(window.WindowCenter), float(window.WindowWidth)) == (40, 400)


@pytest.mark.parametrize("hu", [-32769.0, 32768.0, np.nan, np.inf])
def test_values_that_16_bits_cannot_hold_are_refused(hu):
    assert stored_values(np.array([-32768.0, 0.5, 1.5, 32767.0])).tolist() == [-32768, 0, 2, 32767]
    with pytest.raises(InputError, match="allowed are finite HU that fit 16 bits"):
        stored_values(np.array([0.0, hu]))
