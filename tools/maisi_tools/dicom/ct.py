"""A CT volume as DICOM objects: a series of slices, or one Enhanced CT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage
from pydicom.valuerep import DSfloat

from maisi_tools.dicom.objects import Study, new_object
from maisi_tools.errors import InputError

IMAGE_TYPE = ("DERIVED", "SECONDARY", "AXIAL")
"""Of slices; "SYNTHETIC" is the fourth value of what was not computed from a scan."""

FRAME_TYPE = ("DERIVED", "PRIMARY", "VOLUME", "NONE")
"""Of Enhanced CT, whose values are enumerated: no SECONDARY, and no place for SYNTHETIC."""

SERIES, SERIES_FROM_SCAN, SERIES_NUMBER = "Synthetic CT, derived", "CT computed from a scan", 1
SERIES_EDITED = "Partly synthetic CT, edited scan"
WINDOW = (40, 400)
"""Centre and width in HU of the first view: soft tissue."""

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Grid:
    """Where the voxels of a volume lie, in the terms of DICOM.

    Attributes:
        shape: (columns, rows, slices).
        affine: (4, 4) from (column, row, slice) to LPS in mm.
        row, column: unit vectors along which the column and the row index grow.
        pixel_spacing: mm between rows and between columns.
        slice_spacing: mm between slices along their normal.
    """

    def __init__(self, shape: tuple[int, ...], affine: np.ndarray) -> None:
        self.shape, self.affine = shape, affine
        across, down, step = affine[:3, 0], affine[:3, 1], affine[:3, 2]
        self.pixel_spacing = float(np.linalg.norm(down)), float(np.linalg.norm(across))
        self.row, self.column = across / self.pixel_spacing[1], down / self.pixel_spacing[0]
        self.slice_spacing = float(np.cross(self.row, self.column) @ step)
        if abs(self.row @ self.column) > 1e-3 or self.slice_spacing <= 0:
            raise InputError(
                f"the volume has the axes {np.round(affine[:3, :3].T, 3).tolist()}; allowed in DICOM are rows and "
                "columns at a right angle: resample the volume"
            )

    def position(self, number: int) -> list[DSfloat]:
        """Image Position (Patient) of a slice, counted from 0."""
        return _ds(self.affine[:3, 3] + number * self.affine[:3, 2])

    @property
    def orientation(self) -> list[DSfloat]:
        """Image Orientation (Patient)."""
        return _ds([*self.row, *self.column])


def to_lps(array: np.ndarray, affine: ArrayLike) -> tuple[np.ndarray, Grid]:
    """Turn a volume so that columns run to the patient's left, rows to the back and slices upwards; no resampling.

    Args:
        array: (X, Y, Z), in any orientation.
        affine: (4, 4) from its voxels to RAS in mm.

    Returns:
        (columns, rows, slices) and its grid.

    Raises:
        InputError: axes that DICOM cannot express.
    """
    affine = np.asarray(affine, dtype=float)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
    )
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, Grid(turned.shape, RAS_TO_LPS @ affine @ nib.orientations.inv_ornt_aff(turn, array.shape))


def stored_values(hu: np.ndarray) -> np.ndarray:
    """HU as they are stored: whole int16 numbers, slope 1 and intercept 0.

    Raises:
        InputError: values beyond the range of int16, or not finite.
    """
    limits = np.iinfo(np.int16)
    if not np.isfinite(hu).all() or hu.min() < limits.min or hu.max() > limits.max:
        raise InputError(
            f"the CT has values from {np.nanmin(hu):g} to {np.nanmax(hu):g}; allowed are finite HU that fit 16 bits: "
            "give the volume as the bundles write it"
        )
    return np.rint(hu).astype(np.int16)


def slice_headers(grid: Grid, study: Study) -> list[Dataset]:
    """The slices of a CT series without their pixel data, from the feet to the head."""
    headers = []
    for number in range(grid.shape[2]):
        ds = new_object(study, CTImageStorage, "CT", _series(study), SERIES_NUMBER, number + 1)
        _image(ds, grid, study)
        kind = ["PARTLY_SYNTHETIC"] if study.region else [] if study.from_scan else ["SYNTHETIC"]
        ds.ImageType = [*IMAGE_TYPE, *kind]
        ds.DerivationDescription = study.description
        ds.Laterality = ""  # of the body part, unless that is known to be unpaired
        ds.AcquisitionNumber = None
        ds.KVP = None
        ds.PatientPosition = study.attributes["PatientPosition"]
        ds.ImagePositionPatient, ds.ImageOrientationPatient = grid.position(number), grid.orientation
        ds.PixelSpacing = _ds(grid.pixel_spacing)
        ds.SliceThickness, ds.SpacingBetweenSlices = _ds([grid.slice_spacing, grid.slice_spacing])
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "HU"
        ds.WindowCenter, ds.WindowWidth = WINDOW
        headers.append(ds)
    return headers


def refer_to_sources(headers: Sequence[Dataset], slices: Sequence[Dataset]) -> None:
    """Name, in each slice, the one of the scan in whose place it lies (Source Image Sequence)."""
    places = np.array([ds.ImagePositionPatient for ds in slices], dtype=float)
    for header in headers:
        row, column = np.asarray(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
        along = (places - np.asarray(header.ImagePositionPatient, dtype=float)) @ np.cross(row, column)
        source = slices[int(np.abs(along).argmin())]
        reference, purpose = Dataset(), Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
        purpose.CodeMeaning = "Source image for image processing operation"
        reference.PurposeOfReferenceCodeSequence = [purpose]
        header.SourceImageSequence = [reference]


def with_pixels(headers: list[Dataset], stored: np.ndarray) -> Iterator[Dataset]:
    """Each of the slices with its pixel data, from the stored values (columns, rows, slices)."""
    for number, header in enumerate(headers):
        ds = Dataset(dict(header.items()))  # Dataset(header) would give the header its pixels, too
        ds.file_meta, ds.preamble = header.file_meta, header.preamble
        ds.PixelData = np.ascontiguousarray(stored[:, :, number].T, dtype="<i2").tobytes()
        yield ds


def enhanced_ct(stored: np.ndarray, grid: Grid, study: Study) -> Dataset:
    """The volume as one Enhanced CT object, its frames from the feet to the head."""
    ds = new_object(study, EnhancedCTImageStorage, "CT", _series(study), SERIES_NUMBER, 1)
    _image(ds, grid, study)
    ds.ImageType, ds.ImageComments = list(FRAME_TYPE), study.description
    ds.PatientPosition = study.attributes["PatientPosition"]
    ds.ContentQualification = "RESEARCH"
    ds.PixelPresentation, ds.VolumetricProperties = "MONOCHROME", "VOLUME"
    ds.VolumeBasedCalculationTechnique, ds.PresentationLUTShape = "NONE", "IDENTITY"
    ds.AcquisitionContextSequence = []
    ds.NumberOfFrames = grid.shape[2]
    organization, index = Dataset(), Dataset()
    organization.DimensionOrganizationUID = index.DimensionOrganizationUID = study.uid(_series(study), "dimensions")
    index.DimensionIndexPointer, index.FunctionalGroupPointer = 0x00209057, 0x00209111
    ds.DimensionOrganizationType = "3D"
    ds.DimensionOrganizationSequence, ds.DimensionIndexSequence = [organization], [index]

    measures, orientation, values, kind, window, region, anatomy, event = (Dataset() for _ in range(8))
    measures.PixelSpacing = _ds(grid.pixel_spacing)
    measures.SliceThickness, measures.SpacingBetweenSlices = _ds([grid.slice_spacing, grid.slice_spacing])
    orientation.ImageOrientationPatient = grid.orientation
    values.RescaleIntercept, values.RescaleSlope, values.RescaleType = 0, 1, "HU"
    kind.FrameType = list(FRAME_TYPE)
    kind.PixelPresentation, kind.VolumetricProperties = "MONOCHROME", "VOLUME"
    kind.VolumeBasedCalculationTechnique = "NONE"
    window.WindowCenter, window.WindowWidth = WINDOW
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "38266002", "SCT", "Entire body"
    anatomy.FrameLaterality, anatomy.AnatomicRegionSequence = "U", [region]
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence, shared.CTImageFrameTypeSequence = [values], [kind]
    # Mandatory in Enhanced CT (DICOM PS3.3 table A.38-2), though nothing was irradiated: the event of the making.
    event.IrradiationEventUID = study.uid(_series(study), "event")
    shared.IrradiationEventIdentificationSequence = [event]
    shared.FrameVOILUTSequence, shared.FrameAnatomySequence = [window], [anatomy]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for number in range(grid.shape[2]):
        content, position, frame = Dataset(), Dataset(), Dataset()
        content.StackID, content.InStackPositionNumber = "1", number + 1
        content.DimensionIndexValues = [number + 1]
        position.ImagePositionPatient = grid.position(number)
        frame.FrameContentSequence, frame.PlanePositionSequence = [content], [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.ascontiguousarray(stored.T, dtype="<i2").tobytes()
    return ds


def _series(study: Study) -> str:
    return SERIES_EDITED if study.region else SERIES_FROM_SCAN if study.from_scan else SERIES


def _image(ds: Dataset, grid: Grid, study: Study) -> None:
    """What slices and Enhanced CT share: frame of reference, pixels."""
    ds.FrameOfReferenceUID = study.attributes["FrameOfReferenceUID"]
    ds.PositionReferenceIndicator = study.attributes["PositionReferenceIndicator"]
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.Columns, ds.Rows = grid.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1


def _ds(values: ArrayLike) -> list[DSfloat]:
    """Decimal strings, as exact as their 16 characters allow."""
    return [DSfloat(float(value), auto_format=True) for value in np.asarray(values, dtype=float)]
