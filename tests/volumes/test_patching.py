"""What stored voxels mean, against nibabel's own reading; tests/diffusion/test_editing.py writes them back."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.volumes.patching import read_stored


@pytest.mark.parametrize(
    ("kind", "slope", "intercept", "meant"),
    [
        ("int16", 1, 0, "int16"),
        (">i2", 1, 0, "int16"),
        ("uint16", 1, -1024, "int16"),
        ("int32", 1, 0, "int16"),
        ("float32", 1, 0, "float32"),
        ("float64", 1, 0, "float64"),
        ("int16", 0.5, 0, "float32"),
        ("int16", 0.1, 3, "float64"),
        ("int32", 1, 100000, "float32"),
    ],
)
def test_meant_is_exact_in_the_smallest_type(tmp_path, kind, slope, intercept, meant):
    values = np.arange(24).reshape(2, 3, 4).astype(kind) + (np.array(0.1, kind) if "float" in kind else 0)
    image = nib.Nifti1Image(values.astype(kind), np.diag([2.0, 2.0, 3.0, 1.0]))
    image.header.set_data_dtype(kind)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, tmp_path / "x.nii.gz")
    found = read_stored(tmp_path / "x.nii.gz", "ct").meant()
    assert found.dtype == np.dtype(meant) and found.dtype.isnative
    np.testing.assert_array_equal(found, nib.load(tmp_path / "x.nii.gz").get_fdata())
