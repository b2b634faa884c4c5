"""A folder, zip file or file with one CT or MR series in DICOM, read by MONAI and checked where MONAI only warns."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import PydicomReader
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.volumes.checks import LEAST_HU
from maisi_tools.volumes.dicom_files import DicomFile, list_below, list_dicom, reading
from maisi_tools.volumes.limits import check_limit

logger = logging.getLogger(__name__)

MAX_GAP_DEVIATION = 0.01
"""Largest deviation of one slice distance from the median one, as a share of it."""

MAX_GAP_ROUNDING_MM = 0.02
"""Deviation in mm that is always accepted: many scanners write positions with two decimals."""

MAX_DRIFT = 0.1
"""Largest distance of a slice's position from the line through the first and the last one, as a share of a pixel."""

MIN_TILT_DEGREES = 0.1
"""Gantry tilt that is mentioned; less comes from rounded direction cosines."""

MAX_TILT_DEGREES = 45.0
"""Gantries tilt by up to 30 degrees."""

MAX_EXTENT_MM = 10_000.0
"""Of a volume; a table reaches two metres."""

THINNEST_HU, MAX_THINNER_SHARE = -1300.0, 0.1
"""Air is -1000 HU, and noise and filters hardly reach below -1300; values below it beyond this share are no HU."""

PADDED_HU = -1000.0
"""Air, which the scanner's padding outside of its field of view becomes; what is air already, that is between this and
:data:`LEAST_HU`, stays."""

GEOMETRY_TAGS = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")
RESCALE_TAGS = ("RescaleSlope", "RescaleIntercept", "RescaleType")
ACQUISITION_TAGS = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "StackID"),
    *("NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase"),
    *("ConvolutionKernel", "FilterType", "KVP", "ReconstructionDiameter"),
)
"""What tells two scans, phases or reconstructions of CT apart that share a Series Instance UID."""

MR_TAGS = (
    *("TemporalPositionIdentifier", "StackID", "EchoNumbers", "EchoTime", "EffectiveEchoTime"),
    *("InversionTime", "DiffusionBValue"),
)
"""The same of MR, whose acquisitions may take turns slice by slice."""

ONE_OF_EACH = ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName")
"""What the slices of one series share; results are written for the patient and the place that the first one names."""

FRAME_TAGS = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
SCANNED_TAGS = (
    *GEOMETRY_TAGS,
    *RESCALE_TAGS,
    *FRAME_TAGS,
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"),
    *("ImagePositionPatient", "ImageType", "Modality", "SeriesDescription", "PixelRepresentation"),
    *("LossyImageCompression", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel"),
    *ACQUISITION_TAGS,
    *MR_TAGS,
    *ONE_OF_EACH,
)

FRAME_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence"),
    *("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "CardiacSynchronizationSequence"),
    *("RespiratorySynchronizationSequence", "CTReconstructionSequence", "CTXRayDetailsSequence"),
    *("MREchoSequence", "MRModifierSequence", "MRDiffusionSequence"),
)
"""Functional groups of an Enhanced CT or MR (DICOM PS3.3 section C.7.6.16) whose elements a slice has itself."""


class SeriesReader(PydicomReader):
    """MONAI's PydicomReader for a folder or a zip file that holds exactly one complete series, or one Enhanced file.

    Slices, or the frames of an Enhanced CT or MR, are put in the order of their position, whatever their numbers say;
    files that are not image slices (reports, structure sets, DICOMDIR) are passed over. Rescale slope and intercept
    are applied, which gives HU of a CT, and its declared padding becomes air (:data:`PADDED_HU`); the affine is in RAS
    and mm; that of a tilted gantry is sheared.

    Args:
        series: Series Instance UID to take where there are several.
        modalities: that are allowed, of "CT" and "MR".
    """

    def __init__(self, series: str | None = None, modalities: Sequence[str] = ("CT",)) -> None:
        super().__init__()
        self.series, self.modalities = series, modalities

    def read(self, data: Any, **kwargs: Any) -> list:
        """Read the datasets of the folder or zip file `data`, in order of position.

        Raises:
            InputError: it is not one complete series of an allowed modality.
        """
        path = data if isinstance(data, (str, Path)) else data[0]
        slices = read_slices(path, self.series, modalities=self.modalities)
        self.is_ct = modality_of(slices) == "CT"
        for number, dataset in enumerate(slices, start=1):
            dataset.InstanceNumber = number  # the reader stacks by InstanceNumber
        self.has_series = True
        self.filenames: list[Any] = [[f"slice {number}" for number in range(1, len(slices) + 1)]]
        self.path = path
        return slices

    def get_data(self, data: Any) -> tuple[np.ndarray, dict]:
        """Values (X, Y, Z), HU of a CT, and the metadata.

        Raises:
            InputError: much of a CT lies below air, as when the intercept was in the stored values already.
        """
        self.padded = 0
        values, meta = super().get_data(data)
        if not self.is_ct:
            return values, meta
        if self.padded:
            logger.warning(
                "%s: %d voxels outside of the scanner's field of view (Pixel Padding Value) are set to %g HU",
                *(self.path, self.padded, PADDED_HU),
            )
        # The lowest value may be the scanner's padding outside of its field of view.
        thinner = np.count_nonzero((values < THINNEST_HU) & (values > values.min())) / values.size
        if thinner > MAX_THINNER_SHARE:
            raise InputError(
                f"{self.path} has {thinner:.0%} of its voxels below {THINNEST_HU:g} HU, where nothing is; allowed is a "
                "CT in Hounsfield units (air near -1000): set the rescale intercept to 0, the values have it already"
            )
        return values, meta

    def _get_array_data(self, img: Any, filename: Any) -> np.ndarray:
        """Values (rows, columns) of a slice."""
        values = super()._get_array_data(img, filename)
        if self.is_ct and img.get("PixelPaddingValue") is not None:
            outside = _padding(img) & ~((values >= LEAST_HU) & (values <= PADDED_HU))
            values[outside] = PADDED_HU
            self.padded += int(np.count_nonzero(outside))
        return values


def read_slices(
    path: str | os.PathLike,
    series: str | None = None,
    pixels: bool = True,
    tags: Sequence[str] = (),
    modalities: Sequence[str] = ("CT",),
) -> list[Dataset]:
    """The slices of the one series in a folder or zip file, ordered along the slice normal.

    Args:
        path: folder (searched deeper as :func:`series_files` says), zip file, or the one file of it.
        series: Series Instance UID to take where there are several.
        pixels: with their pixel data, decompressed; else only the headers (:data:`SCANNED_TAGS`).
        tags: further keywords to read of headers.
        modalities: that are allowed, of "CT" and "MR".

    Returns:
        One dataset a slice; each frame of an Enhanced CT or MR becomes one, too.

    Raises:
        InputError: see :func:`slice_order`; no usable rescale to HU; or a compression that cannot be undone here.
    """
    path = Path(path)
    files = series_files(path)
    headers, origin, whole = [], [], []
    for number, file in enumerate(files):
        whole.append(file.read(stop_before_pixels=True, specific_tags=[*SCANNED_TAGS, *tags]))
        with reading(file.name):
            frames = _frames(whole[-1])
        headers += frames
        origin += [(number, frame) for frame in range(len(frames))]
    with reading(path):
        order = slice_order(path, headers, series, modalities)
        _check_rescale(path, [headers[index] for index in order])
    for number in sorted({origin[index][0] for index in order}):
        files[number].check_claim(whole[number])
    first = headers[order[0]]
    voxels = int(first.Rows) * int(first.Columns) * len(order)
    check_limit("MAISI_MAX_VOXELS", voxels, f"{path} has {first.Columns} x {first.Rows} x {len(order)} voxels")
    if any(headers[index].get("LossyImageCompression") == "01" for index in order):
        logger.warning("%s was compressed with loss; its values are not quite those of the scanner", path)
    if not pixels:
        return [headers[index] for index in order]
    loaded: dict[int, list[Dataset]] = {}
    for number in sorted({origin[index][0] for index in order}):
        with reading(files[number].name):
            loaded[number] = _frames(_decompressed(path, files[number].read()))
    return [loaded[origin[index][0]][origin[index][1]] for index in order]


def series_files(path: Path) -> list[DicomFile]:
    """The DICOM files of a folder, zip file or file among which its series is looked for.

    Files in the folder's own folders count, too, where it has no slices itself, as where a structure set lies beside
    the folder of its CT, and where they are of the same series, which is said.
    """
    files = list_dicom(path)
    below = list_below(path) if any(file.path.parent == path for file in files) else []
    if not below:
        return files
    tags = ["SeriesInstanceUID", "Modality", "Rows", "ImageType"]
    heads = [file.read(stop_before_pixels=True, specific_tags=tags) for file in files]
    series = {
        head.get("SeriesInstanceUID")
        for head in heads
        if "Rows" in head and modality_of([head]) in ("CT", "MR") and "LOCALIZER" not in (head.get("ImageType") or ())
    }
    if not series:
        return [*files, *below]
    own = [
        file
        for file in below
        if file.read(stop_before_pixels=True, specific_tags=tags[:1]).get("SeriesInstanceUID") in series
    ]
    if own:
        logger.warning("%s: %d files of the same series in folders below it are read with it", path, len(own))
    return [*files, *own]


def modality_of(slices: Sequence[Any]) -> str:
    """Of a series, "CT" where it does not say."""
    return str(slices[0].get("Modality", "CT"))


def slice_order(
    path: Path, headers: Sequence[Any], series: str | None = None, modalities: Sequence[str] = ("CT",)
) -> list[int]:
    """Indices of the image slices among `headers` (pydicom datasets), sorted along the slice normal.

    Localizers and second copies of a slice (same SOP Instance UID) are left out, with a warning in the log.

    Raises:
        InputError: no image slices, several series and none chosen, another modality than CT, slices of several
            patients, studies or frames of reference, slices of unlike geometry, fewer than two slices, two slices in
            one place, slice distances that differ (a missing slice), or slices that are not stacked along a line.
    """
    found = [index for index, header in enumerate(headers) if "ImagePositionPatient" in header and "Rows" in header]
    if not found:
        raise InputError(
            f"{path} holds {len(headers)} DICOM files and no image slice with a position; allowed is one series of "
            f"{' or '.join(modalities)}, as one file per slice or Enhanced: choose the folder of the images"
        )
    found = _without_copies(path, headers, _without_localizers(path, headers, found))
    if series is None:
        found = _of_modality(path, headers, found, modalities)
    found = _one_series(path, headers, found, series)
    modality = modality_of([headers[index] for index in found])
    if modality not in modalities:
        raise InputError(
            f"{path} holds a DICOM series of modality {modality}; allowed is {' or '.join(modalities)}: choose another "
            "series"
        )
    _check_one_patient(path, [headers[index] for index in found])
    for tag in GEOMETRY_TAGS:
        values = [headers[index].get(tag) for index in found]
        if any(value is None for value in values) or not all(
            np.allclose(np.asarray(value, float), np.asarray(values[0], float), atol=1e-4) for value in values
        ):
            listing = ", ".join(sorted({str(value) for value in values})[:3])
            raise InputError(
                f"{path} holds slices whose {tag} is {listing}; allowed is one value for the whole series: take "
                "reformats and secondary captures out of the folder"
            )
    if len(found) < 2:
        raise InputError(
            f"{path} holds one DICOM slice; allowed is a series of at least two: give the whole series (its folder)"
        )
    row, column = np.asarray(headers[found[0]].ImageOrientationPatient, dtype=float).reshape(2, 3)
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise InputError(
            f"{path} has the image orientation {row.tolist()}, {column.tolist()}; allowed are two directions of length "
            "one at a right angle: export the series again"
        )
    normal = np.cross(row, column)
    positions = np.array([headers[index].ImagePositionPatient for index in found], dtype=float)
    if not np.isfinite(positions).all():
        raise InputError(f"{path} holds slices whose position is not finite; allowed are positions in mm")
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    spacing = np.asarray(headers[found[0]].PixelSpacing, dtype=float)
    size = spacing.max() * max(int(headers[found[0]].Rows), int(headers[found[0]].Columns))
    length = float(np.linalg.norm(positions[-1] - positions[0]))
    if not (np.isfinite(spacing).all() and spacing.min() > 0 and max(size, length) < MAX_EXTENT_MM):
        raise InputError(
            f"{path} has pixels of {spacing.tolist()} mm and is {size:g} x {length:g} mm large; allowed are pixels "
            f"larger than 0 and less than {MAX_EXTENT_MM:g} mm in all: export the series again"
        )
    _check_one_acquisition(path, [headers[found[index]] for index in order], positions @ normal)
    _check_gaps(path, positions @ normal)
    _check_line(path, positions, normal, min(float(mm) for mm in headers[found[0]].PixelSpacing))
    return [found[index] for index in order]


def slice_affine(slices: Sequence[Dataset]) -> np.ndarray:
    """Affine (4, 4) from voxels (column, row, slice) to RAS in mm of ordered slices; what the reader gives, too."""
    first, last = slices[0], slices[-1]
    row, column = np.asarray(first.ImageOrientationPatient, dtype=float).reshape(2, 3)
    origin = np.asarray(first.ImagePositionPatient, dtype=float)
    affine = np.eye(4)
    affine[:3, 0] = row * float(first.PixelSpacing[1])
    affine[:3, 1] = column * float(first.PixelSpacing[0])
    affine[:3, 2] = (np.asarray(last.ImagePositionPatient, dtype=float) - origin) / (len(slices) - 1)
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def first_with(slices: Sequence[Dataset], keyword: str) -> Dataset | None:
    """The first slice that has a value of a keyword, which is not decoded here; None where none has."""
    for one in slices:
        value = element.value if (element := one.get_item(keyword)) is not None else None
        if value.strip(b" \0^") if isinstance(value, bytes) else value:
            return one
    return None


def frame_of_reference(slices: Sequence[Dataset]) -> str:
    """The Frame of Reference UID of a series; "" where no slice says one."""
    one = first_with(slices, "FrameOfReferenceUID")
    return "" if one is None else str(one.FrameOfReferenceUID)


def _frames(dataset: Dataset) -> list[Dataset]:
    """The frames of an Enhanced CT or MR, each as the dataset of a slice; another dataset is its own only frame."""
    if "PerFrameFunctionalGroupsSequence" not in dataset or dataset.get("Modality") not in ("CT", "MR"):
        return [dataset]
    shared = dataset.SharedFunctionalGroupsSequence[0] if dataset.get("SharedFunctionalGroupsSequence") else Dataset()
    frames = []
    for number, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        frame = Dataset()
        for tag, element in dataset.items():  # texts as they are stored
            if keyword_for_tag(tag) not in (*FRAME_TAGS, "PixelData"):
                frame[tag] = copy.copy(element)
        for group in (shared, own):
            for sequence in FRAME_GROUPS:
                for item in group.get(sequence) or ():
                    frame.update(copy.deepcopy(item))
        for item in own.get("FrameContentSequence") or ():
            for theirs, ours in (
                ("FrameAcquisitionNumber", "AcquisitionNumber"),
                ("TemporalPositionIndex", "TemporalPositionIdentifier"),
                ("StackID", "StackID"),
            ):
                if item.get(theirs) is not None:
                    setattr(frame, ours, item.get(theirs))
        frame.InstanceNumber = number + 1  # all frames have one UID; this tells them apart
        if "FrameType" in frame:
            frame.ImageType = frame.FrameType
        if "PixelData" in dataset:
            size = dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8
            frame.PixelData = dataset.PixelData[number * size : (number + 1) * size]
            frame.file_meta = dataset.file_meta
        frames.append(frame)
    return frames


def _padding(dataset: Dataset) -> np.ndarray:
    """Which pixels (rows, columns) have a slice's padding value and hang together with its edge.

    Within the body a pixel may have that value, too, as metal has the largest of 12 bits.
    """
    bits, ends = int(dataset.BitsStored), []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        # Scanners write it with more bits than they store, or with another sign: 63536 is -2000.
        value = int(dataset.get(keyword, dataset.PixelPaddingValue)) % (1 << bits)
        ends.append(value - (1 << bits) if dataset.PixelRepresentation and value >> (bits - 1) else value)
    stored = dataset.pixel_array
    padding = (stored >= min(ends)) & (stored <= max(ends))
    edge = np.ones_like(padding)
    edge[1:-1, 1:-1] = False
    return ndimage.binary_propagation(padding & edge, mask=padding)


def _decompressed(path: Path, dataset: Any) -> Dataset:
    """The dataset with plain pixel data.

    Raises:
        InputError: there is no decoder for its compression, or the data is damaged.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.is_deflated:
        return dataset
    uid = dataset.get("SOPInstanceUID")
    try:
        dataset.decompress()
    except Exception as error:  # every decoder has its own
        raise InputError(
            f"{path} is compressed as {syntax.name} and cannot be decompressed ({error}); allowed is what pydicom and "
            "its decoders read: install the extra 'dicom' of maisi-bundles, or decompress the series with dcmdjpeg"
        ) from error
    if uid is not None:
        dataset.SOPInstanceUID = uid  # pydicom 3 gives a decompressed dataset a new one
    return dataset


def _without_localizers(path: Path, headers: Sequence[Any], found: list[int]) -> list[int]:
    slices = [index for index in found if "LOCALIZER" not in (headers[index].get("ImageType") or ())]
    if slices and len(slices) < len(found):
        logger.warning("%s: %d localizer images are passed over", path, len(found) - len(slices))
    return slices or found


def _of_modality(path: Path, headers: Sequence[Any], found: list[int], modalities: Sequence[str]) -> list[int]:
    """Without images of other modalities, as the dose (RTDOSE) beside a planning CT; all where there are no others."""
    slices = [index for index in found if modality_of([headers[index]]) in modalities]
    if slices and len(slices) < len(found):
        others = sorted({modality_of([headers[index]]) for index in found} - set(modalities))
        logger.warning("%s: %d images of %s are passed over", path, len(found) - len(slices), ", ".join(others))
    return slices or found


def _without_copies(path: Path, headers: Sequence[Any], found: list[int]) -> list[int]:
    def identity(index: int) -> tuple[str, ...]:
        header = headers[index]
        frame = header.get("InstanceNumber", "")  # of frames alone, see _frames; that of slices is not read
        return str(header.get("SOPInstanceUID") or index), str(frame), str(header.ImagePositionPatient)

    slices = sorted({identity(index): index for index in reversed(found)}.values())
    if len(slices) < len(found):
        logger.warning(
            "%s: %d copies of slices (same SOP Instance UID) are passed over", path, len(found) - len(slices)
        )
    return slices


def _one_series(path: Path, headers: Sequence[Any], found: list[int], chosen: str | None) -> list[int]:
    series: dict[str, list[int]] = {}
    for index in found:
        series.setdefault(str(headers[index].get("SeriesInstanceUID", "without UID")), []).append(index)
    if chosen in series:
        return series[chosen]
    if len(series) == 1 and chosen is None:
        return found
    listing = "; ".join(
        f"{uid} ({headers[members[0]].get('SeriesDescription', 'no description')}, {len(members)} slices)"
        for uid, members in series.items()
    )
    if chosen is not None:
        raise InputError(f"{path} does not hold the DICOM series {chosen}; allowed is one of: {listing}")
    raise InputError(
        f"{path} holds {len(series)} DICOM series: {listing}; allowed is one: put each into a folder of its own, or "
        "choose one by its UID with maisi dicom_read --series_uid UID"
    )


def _check_one_patient(path: Path, slices: Sequence[Any]) -> None:
    """Refuse slices of several patients, studies or frames of reference; where some slices do not say, they agree.

    Patients are counted, not named: messages go to logs.
    """
    copies = [Dataset(dict(header.items())) for header in slices]  # so that theirs stay as stored
    for tag in ONE_OF_EACH:
        said = (str(header.get(tag) or "").strip(" ^").casefold() for header in copies)
        counts = Counter(value for value in said if value)
        if len(counts) > 1:
            found = [f"{value} ({n} slices)" if tag.endswith("UID") else f"{n} slices" for value, n in counts.items()]
            raise InputError(
                f"{path} holds a series with {len(counts)} values of {tag}: {', '.join(found[:3])}"
                f"{', ...' if len(found) > 3 else ''}; allowed is one patient, study and frame of reference: put the "
                "slices of each into a folder of their own, or export the series again"
            )


def _check_rescale(path: Path, slices: Sequence[Any]) -> None:
    """Refuse slices of a CT whose stored values have no usable way to HU; an MR has no unit, and needs no rescale."""
    is_ct = modality_of(slices) == "CT"
    for header in slices:
        stored, high = header.get("BitsStored"), header.get("HighBit")
        if stored is not None and high is not None and high != stored - 1:
            raise InputError(
                f"{path} holds slices with {stored} bits stored, the highest of which is bit {high}; allowed is bit "
                f"{stored - 1}, as DICOM PS3.5 has it: export the series again"
            )
        slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
        if not is_ct and slope is None and intercept is None:
            continue
        kind = str(header.get("RescaleType") or "HU").upper()
        if is_ct and kind not in ("HU", "US"):  # US is "unspecified"; the values then decide
            raise InputError(
                f"{path} has values of the Rescale Type {kind}; allowed is HU: choose the series in Hounsfield units"
            )
        if slope is None and intercept is None and header.get("PixelRepresentation") == 1:
            continue
        if slope is None or intercept is None or not (np.isfinite([slope, intercept]).all() and slope > 0):
            aim = " that lead to HU" if is_ct else ""
            raise InputError(
                f"{path} holds slices with the rescale slope {slope} and the intercept {intercept}; allowed are a "
                f"positive slope and an intercept{aim}: export the series again from the scanner or PACS"
            )
    if is_ct and slices[0].get("RescaleSlope") is None:
        logger.warning("%s has no rescale slope and intercept; its signed values are taken for HU", path)


def _check_one_acquisition(path: Path, slices: Sequence[Any], positions: np.ndarray) -> None:
    """Refuse sorted slices (positions in mm) of several acquisitions whose ranges overlap: they would be interleaved.

    Acquisitions that follow one another along the patient, down to one a slice, are one volume.
    """
    for tag in ACQUISITION_TAGS if modality_of(slices) == "CT" else MR_TAGS:
        ranges: dict[str, list[float]] = {}
        for header, position in zip(slices, positions, strict=True):
            if tag in header and header.get(tag) not in (None, ""):
                ranges.setdefault(str(header.get(tag)), []).append(float(position))
        following = sorted(ranges.items(), key=lambda entry: entry[1])
        for (value, before), (other, after) in zip(following[:-1], following[1:], strict=True):
            if max(before) > min(after):
                raise InputError(
                    f"{path} holds slices of {tag} {value} ({min(before):.2f} to {max(before):.2f} mm) among those of "
                    f"{tag} {other} ({min(after):.2f} to {max(after):.2f} mm); allowed is one acquisition: put each "
                    "into a folder of its own"
                )


def _check_gaps(path: Path, positions: np.ndarray) -> None:
    """Refuse sorted slice positions (mm) whose distances differ."""
    gaps = np.diff(positions)
    spacing = float(np.median(gaps))
    worst = int(np.argmax(np.abs(gaps - spacing)))
    if gaps.min() <= MAX_GAP_ROUNDING_MM / 2:
        at = positions[int(np.argmin(gaps))]
        raise InputError(
            f"{path} holds two DICOM slices at the position {at:.2f} mm; allowed is one slice per position: "
            "take the copies (or the second phase) out of the folder"
        )
    if abs(gaps[worst] - spacing) > max(MAX_GAP_DEVIATION * spacing, MAX_GAP_ROUNDING_MM):
        raise InputError(
            f"{path} has a gap of {gaps[worst]:.2f} mm between the DICOM slices at {positions[worst]:.2f} and "
            f"{positions[worst + 1]:.2f} mm, the others are {spacing:.2f} mm apart; allowed are equal distances (within"
            f" {MAX_GAP_DEVIATION:.0%}): add the missing slice, or resample the series and give it as NIfTI"
        )


def _check_line(path: Path, positions: np.ndarray, normal: np.ndarray, pixel: float) -> None:
    """Refuse slices (positions (N, 3) in mm, in order) that do not lie along a line; mention a tilted gantry."""
    step = positions[-1] - positions[0]
    along = ((positions - positions[0]) @ normal) / (step @ normal)
    drift = np.linalg.norm(positions - positions[0] - along[:, None] * step, axis=1)
    if drift.max() > max(MAX_DRIFT * pixel, MAX_GAP_ROUNDING_MM):
        raise InputError(
            f"{path} holds slices shifted sideways by up to {drift.max():.2f} mm from the line of the others; allowed "
            "is one straight stack: export the series again, or resample it and give it as NIfTI"
        )
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > MAX_TILT_DEGREES:
        raise InputError(
            f"{path} has slices that are tilted by {tilt:.0f} degrees against their stack; allowed are up to "
            f"{MAX_TILT_DEGREES:g}, more than gantries do: export the series again"
        )
    if tilt > MIN_TILT_DEGREES:
        logger.warning(
            "%s was taken with a gantry tilt of %.1f degrees; its affine is sheared (maisi dicom_read straightens it)",
            path,
            tilt,
        )
