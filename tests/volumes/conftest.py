"""Small files of every kind that the door meets, made from closed forms."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (10, 12, 14)
OBLIQUE = np.array([[-0.8, 0.3, 0.0, 12.5], [0.25, 0.9, -0.4, -30.0], [0.1, 0.35, 2.2, 7.25], [0, 0, 0, 1]])


def ct_values(shape=SHAPE):
    """A different value in nearly each voxel, from -1000 HU on, so that a swapped or flipped axis is noticed."""
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % 2500 - 1000).astype(np.int16)


@pytest.fixture
def write_nifti(tmp_path):
    """Writes an array to tmp_path/name with nibabel and returns the path."""

    def write(array, name="case.nii.gz", affine=OBLIQUE):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)
        return path

    return write


@pytest.fixture
def write_series(tmp_path):
    """Writes a CT series of stored = HU + 1024 (slope 1, intercept -1024), slices shuffled, and returns its folder.

    `hu` is (columns, rows, slices), that is x towards the left, y towards the back, z upwards.
    """

    def write(hu, name="series", spacing=(0.7, 0.9), step=10 / 3, skip=(), modality="CT", uid=None, shift=0.0, **tags):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        uid = uid or generate_uid()
        for k in range(hu.shape[2]):
            if k in skip:
                continue
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False)
            ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
            ds.SeriesInstanceUID, ds.SeriesDescription, ds.Modality = uid, f"axial {name}", modality
            ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.826.1", "1.2.826.2"
            ds.InstanceNumber = (7 * k) % hu.shape[2] + 1  # not in the order of the positions
            ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            ds.ImagePositionPatient = [-10.0, 20.0, round(5.0 + step * k + (shift if k >= 3 else 0.0), 4)]
            ds.PixelSpacing = [spacing[1], spacing[0]]  # DICOM: distance of rows, then of columns
            ds.Rows, ds.Columns = hu.shape[1], hu.shape[0]
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
            ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
            ds.PixelData = (hu[:, :, k].T.astype(np.int32) + 1024).astype(np.uint16).tobytes()
            for tag, value in tags.items():
                setattr(ds, tag, value)
            ds.save_as(folder / f"{uid[-4:]}_{(5 * k) % 17:03d}_{k}.dcm")
        return folder

    return write
