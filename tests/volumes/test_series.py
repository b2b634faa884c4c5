"""DICOM series with everything wrong that exports get wrong: corrected and said, or refused."""

from __future__ import annotations

import copy
import errno
import io
import logging
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from maisi_tools.errors import InputError
from maisi_tools.volumes.dicom_files import DicomFile
from maisi_tools.volumes.inputs import find_inputs, stem_of
from maisi_tools.volumes.reading import check_voxels, read_volume
from maisi_tools.volumes.series import read_slices, slice_affine

from .conftest import ct_values

SHAPE = (8, 6, 5)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("failure", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_disk_that_fails_is_no_fault_of_the_series(write_series, tmp_path, monkeypatch, failure, zipped):
    """The listener tries again what is no InputError; a moment later the same series is read."""
    path = write_series(ct_values(SHAPE))
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "sent"), "zip", path))
    opened, calls = DicomFile._open, []

    def failing(file):
        calls.append(file)
        if len(calls) == SHAPE[2] + 2:  # the headers were read, and the pixels of a slice
            raise OSError(failure, os.strerror(failure))
        return opened(file)

    monkeypatch.setattr(DicomFile, "_open", failing)
    with pytest.raises(OSError) as raised:
        read_volume(path, "ct")
    assert type(raised.value) is type(OSError(failure, "")) and raised.value.errno == failure
    assert len(calls) == SHAPE[2] + 2 and read_volume(path, "ct").shape[1:] == SHAPE


def edit(folder, change):
    """Apply `change(dataset, number)` to the files of a series, in order of position."""
    datasets = sorted(
        ((pydicom.dcmread(file), file) for file in folder.rglob("*.dcm")), key=lambda x: x[0].ImagePositionPatient[2]
    )
    for number, (dataset, file) in enumerate(datasets):
        change(dataset, number)
        dataset.save_as(file)


def test_affine_of_slices_is_the_readers(write_series):
    folder = write_series(ct_values(SHAPE))
    slices = read_slices(folder, pixels=False)
    assert np.allclose(slice_affine(slices), read_volume(folder, "ct").affine, atol=1e-6)
    assert "PixelData" not in slices[0]


def test_zip_reads_as_the_folder(write_series, tmp_path):
    folder = write_series(ct_values(SHAPE))
    path = tmp_path / "export.ZIP"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", "not DICOM")
        for file in folder.iterdir():
            archive.write(file, f"STUDY/SERIES/{file.name}")
    assert find_inputs(path) == [{"image": str(path)}] and stem_of(path) == "export"
    volume, expected = read_volume(path, "ct"), read_volume(folder, "ct")
    assert np.array_equal(volume.numpy(), expected.numpy()) and np.allclose(volume.affine, expected.affine)


def test_zips_that_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="cannot be read .*allowed is an intact zip file"):
        find_inputs(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(InputError, match="holds no DICOM series; allowed as ct"):
        read_volume(path, "ct")


def test_folders_of_an_exported_medium_are_searched(write_series):
    folder = write_series(ct_values(SHAPE), "medium/DICOM/PA0/SE0")
    assert len(read_slices(folder.parents[2], pixels=False)) == SHAPE[2]


def test_slices_of_one_series_in_folders_below_are_read_with_it(write_series, said):
    """A second disc's, and of a folder with slices of its own those of another series are not."""
    hu = ct_values(SHAPE)
    folder = write_series(hu)
    (folder / "disc2").mkdir()
    for file in sorted(folder.glob("*.dcm"))[:2]:
        file.rename(folder / "disc2" / file.name)
    write_series(hu + 1, "series/other")
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)
    assert f"{folder}: 2 files of the same series in folders below it are read with it" in said.text


@pytest.mark.parametrize("tags", [{"modality": "RTSTRUCT"}, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}])
def test_a_series_is_looked_for_below_what_are_no_slices(write_series, tags):
    """A structure set or a scout at the root, the CT in a folder; of two series in folders none is chosen."""
    hu = ct_values(SHAPE)
    folder = write_series(hu, "export/CT").parent
    write_series(hu[..., :1], "export", uid="1.2.3", **tags)
    for file in folder.glob("*.dcm"):
        ds = pydicom.dcmread(file)
        if ds.Modality == "RTSTRUCT":
            del ds.Rows, ds.ImagePositionPatient, ds.PixelData
        ds.save_as(file)
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)
    write_series(hu, "export/second")
    with pytest.raises(InputError, match="holds 2 DICOM series"):
        read_volume(folder, "ct")


def medium(folder, root):
    """Puts the directory of a medium, as PS3.10 has it, into `root`."""
    ds = pydicom.dcmread(next(folder.iterdir()))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    ds.remove_private_tags()
    for keyword in ("PixelData", "ImagePositionPatient", "SeriesInstanceUID"):
        delattr(ds, keyword)
    ds.save_as(root / "DICOMDIR")


@pytest.mark.parametrize("place", ["DICOM", "DICOM/PA0/SE0"])
def test_a_patients_cd_is_a_series(write_series, tmp_path, place):
    """The DICOMDIR at its root is no slice, and what lies beside it is passed over."""
    folder = write_series(ct_values(SHAPE), f"cd/{place}")
    root = tmp_path / "cd"
    medium(folder, root)
    (root / "README.TXT").write_text("a viewer")
    expected = read_volume(folder, "ct")
    assert np.array_equal(read_volume(root, "ct").numpy(), expected.numpy())
    (item,) = find_inputs(root)
    assert np.array_equal(read_volume(item["image"], "ct").numpy(), expected.numpy())
    assert find_inputs(shutil.make_archive(str(tmp_path / "z"), "zip", root))[0]["image"] == str(tmp_path / "z.zip")
    shutil.rmtree(root / "DICOM")
    with pytest.raises(InputError, match="holds no volume and no DICOM series"):
        find_inputs(root)


def test_the_dose_beside_a_planning_ct_is_passed_over(write_series, said):
    """A series of its own, with a position and pixels; chosen by its UID it is refused by its modality."""
    folder, uid = write_series(ct_values(SHAPE), "plan"), generate_uid()
    expected = read_volume(folder, "ct")
    write_series(ct_values(SHAPE)[..., :1], "plan", modality="RTDOSE", uid=uid)
    assert np.array_equal(read_volume(folder, "ct").numpy(), expected.numpy())
    assert "1 images of RTDOSE are passed over" in said.text
    with pytest.raises(InputError, match="modality RTDOSE; allowed is CT"):
        read_slices(folder, uid)


def test_a_zip_file_is_opened_no_more_often_for_more_slices(write_series, tmp_path, monkeypatch):
    """Opening one reads its table of contents, so that to do so for each slice took the square of their number."""
    opened = zipfile.ZipFile.__init__
    counts = []
    for slices in (4, 8):
        folder = write_series(ct_values((*SHAPE[:2], slices)), f"n{slices}")
        path, calls = Path(shutil.make_archive(str(tmp_path / f"z{slices}"), "zip", folder)), []
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, "__init__", lambda *a, calls=calls, **k: calls.append(1) or opened(*a, **k))
            assert len(read_slices(path)) == slices
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 3


def test_one_of_several_series_is_chosen_by_uid(write_series):
    uids = [generate_uid(), generate_uid()]
    for number, uid in enumerate(uids):
        folder = write_series(ct_values(SHAPE) + number, "mixed", uid=uid)
    assert len(read_slices(folder, uids[1])) == SHAPE[2]
    assert {str(header.SeriesInstanceUID) for header in read_slices(folder, uids[1], pixels=False)} == {uids[1]}
    with pytest.raises(InputError, match=f"does not hold the DICOM series 1.2.3; allowed is one of: .*{uids[0]}"):
        read_slices(folder, "1.2.3")


def test_localizers_and_copies_are_passed_over(write_series, said):
    hu = ct_values(SHAPE)
    folder = write_series(hu)
    write_series(hu[:, :4, :1], "series", uid="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    file = next(folder.glob("*_1.dcm"))
    (folder / "copy.dcm").write_bytes(file.read_bytes())
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)
    assert "1 localizer images are passed over" in said.text and "1 copies of slices" in said.text


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"RescaleSlope": None}, "rescale slope None and the intercept -1024"),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "rescale slope None and the intercept None"),
        ({"RescaleSlope": 0}, "rescale slope 0"),
        ({"RescaleSlope": -1}, "rescale slope -1.0 and the intercept -1024.0; allowed are a positive slope"),
        ({"RescaleType": "OD"}, "Rescale Type OD; allowed is HU"),
        ({"RescaleIntercept": -2048}, "below -1300 HU.*allowed is a CT in Hounsfield"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "right angle"),
        ({"BitsStored": 12, "HighBit": 15}, "12 bits stored, the highest of which is bit 15; allowed is bit 11"),
    ],
)
def test_wrong_headers_are_refused(write_series, tags, message):
    folder = write_series(ct_values(SHAPE), **tags)
    with pytest.raises(InputError, match=message):
        read_volume(folder, "ct")


def test_signed_values_without_rescale_are_hu(write_series, said):
    hu = ct_values(SHAPE)
    folder = write_series(hu, PixelRepresentation=1)

    def change(dataset, number):
        del dataset.RescaleSlope, dataset.RescaleIntercept
        dataset.PixelData = hu[:, :, number].T.astype(np.int16).tobytes()

    edit(folder, change)
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)
    assert "signed values are taken for HU" in said.text


def test_rescale_that_differs_from_slice_to_slice(write_series):
    hu = ct_values(SHAPE) // 2 * 2
    folder = write_series(hu)

    def change(dataset, number):
        if number % 2:
            dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
            dataset.PixelData = ((hu[:, :, number].T.astype(np.int32) + 1000) // 2).astype(np.uint16).tobytes()

    edit(folder, change)
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)


def test_gantry_tilt_is_said_and_a_crooked_stack_refused(write_series, said):
    folder = write_series(ct_values(SHAPE), step=2.0)

    def shift(offset):
        def change(dataset, number):
            dataset.ImagePositionPatient = [-10, 20 + offset(number), dataset.ImagePositionPatient[2]]

        return change

    edit(folder, shift(lambda number: number * 2 * np.tan(np.radians(15))))
    read_volume(folder, "ct")
    assert "gantry tilt of 15.0 degrees" in said.text
    edit(folder, shift(lambda number: 1.0 if number == 2 else 0.0))
    with pytest.raises(InputError, match="shifted sideways by up to 1.00 mm"):
        read_volume(folder, "ct")


def test_compressed_slices(write_series):
    hu = ct_values(SHAPE)
    folder = write_series(hu)
    edit(folder, lambda dataset, _: dataset.compress(RLELossless))
    before = {str(pydicom.dcmread(file).SOPInstanceUID) for file in folder.iterdir()}
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)
    assert {str(dataset.SOPInstanceUID) for dataset in read_slices(folder)} == before


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressions_of_scanners_and_archives(write_series, syntax):
    gdcm = pytest.importorskip("gdcm", reason="needs the extra 'dicom'")
    hu = ct_values(SHAPE)
    folder = write_series(hu)
    for file in folder.iterdir():
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(file))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)


def test_damaged_compression_is_refused(write_series):
    folder = write_series(ct_values(SHAPE))
    edit(folder, lambda dataset, _: dataset.compress(RLELossless))

    def cut(dataset, number):
        dataset.PixelData = dataset.PixelData[:40]

    edit(folder, cut)
    with pytest.raises(InputError, match="compressed as RLE Lossless and cannot be decompressed"):
        read_volume(folder, "ct")


def test_lossy_compression_is_said(write_series, said):
    read_volume(write_series(ct_values(SHAPE), LossyImageCompression="01"), "ct")
    assert "compressed with loss" in said.text


def in_order(folder):
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda dataset: dataset.ImagePositionPatient[2])


def as_enhanced(slices, path, groups=None):
    """Writes slices as the frames of one Enhanced CT, and returns its folder.

    `groups(number)` are further functional groups of a frame: sequence -> elements.
    """
    multi = copy.deepcopy(slices[0])
    multi.SOPClassUID = multi.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    multi.NumberOfFrames = len(slices)
    multi.PixelData = b"".join(dataset.PixelData for dataset in slices)
    shared, frames = Dataset(), []
    for sequence, tags in {
        "PixelMeasuresSequence": ["PixelSpacing"],
        "PlaneOrientationSequence": ["ImageOrientationPatient"],
        "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept"],
    }.items():
        item = Dataset()
        for tag in tags:
            item[tag] = multi[tag]
            del multi[tag]
        setattr(shared, sequence, Sequence([item]))
    for number, dataset in enumerate(slices):
        frame = Dataset()
        own = {"PlanePositionSequence": {"ImagePositionPatient": dataset.ImagePositionPatient}}
        for sequence, elements in {**own, **(groups(number) if groups else {})}.items():
            item = Dataset()
            for keyword, value in elements.items():
                setattr(item, keyword, value)
            setattr(frame, sequence, Sequence([item]))
        frames.append(frame)
    del multi.ImagePositionPatient
    multi.SharedFunctionalGroupsSequence = Sequence([shared])
    multi.PerFrameFunctionalGroupsSequence = Sequence(frames)
    buffer = io.BytesIO()
    multi.save_as(buffer)
    path.mkdir()
    (path / "one.dcm").write_bytes(buffer.getvalue())
    return path


def test_enhanced_ct_reads_as_its_slices(write_series, tmp_path, said):
    folder = write_series(ct_values(SHAPE))
    enhanced = as_enhanced(in_order(folder), tmp_path / "enhanced")
    (enhanced / "copy.dcm").write_bytes((enhanced / "one.dcm").read_bytes())
    volume, expected = read_volume(enhanced, "ct"), read_volume(folder, "ct")
    assert np.array_equal(volume.numpy(), expected.numpy())
    assert np.allclose(volume.affine, expected.affine)
    assert f"{SHAPE[2]} copies of slices" in said.text


def test_the_one_file_of_an_enhanced_ct_is_an_input(write_series, tmp_path):
    """Named itself; a slice of a series says what it lacks, and a mask is not asked to be one."""
    folder = write_series(ct_values(SHAPE))
    file = as_enhanced(in_order(folder), tmp_path / "enhanced") / "one.dcm"
    bare = shutil.copy(file, tmp_path / "IM0001")
    for path, stem in ((file, "one"), (bare, "IM0001")):
        assert find_inputs(path) == [{"image": str(path)}] and stem_of(path) == stem
        assert np.array_equal(read_volume(path, "ct").numpy(), read_volume(folder, "ct").numpy())
    (datalist := tmp_path / "list.json").write_text('[{"image": "IM0001"}]')
    assert find_inputs(datalist) == [{"image": str(bare)}]
    check_voxels(file)
    with pytest.raises(
        InputError, match="holds one DICOM slice; allowed is a series of at least two: give the whole series"
    ):
        read_volume(find_inputs(next(folder.iterdir()))[0]["image"], "ct")
    with pytest.raises(InputError, match="is a DICOM file; allowed as mask is .*maisi dicom_read"):
        read_volume(file, "mask")


@pytest.mark.parametrize("with_meta", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_slices_without_preamble_are_read_with_the_others(write_series, tmp_path, zipped, implicit, with_meta):
    """As a dataset was sent over the network, or with its meta information and no prefix before it."""
    hu = ct_values(SHAPE)
    path = write_series(hu)
    (path / "notes.txt").write_bytes(b"\x08\0 no DICOM, of 1.2.840")
    for file in sorted(path.glob("*.dcm"))[::2]:
        dataset, buffer = pydicom.dcmread(file), io.BytesIO()
        if with_meta:
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            pydicom.dcmwrite(buffer, dataset, enforce_file_format=True, overwrite=True)
            file.write_bytes(buffer.getvalue()[132:])
        else:
            bare = Dataset(dataset)
            bare.save_as(buffer, implicit_vr=implicit, little_endian=True)
            file.write_bytes(buffer.getvalue())
        assert file.read_bytes()[:2] in (b"\x02\0", b"\x08\0")
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "sent"), "zip", path))
    assert np.array_equal(read_volume(path, "ct")[0].numpy(), hu)


FAMILIES = [
    ("CT", "FrameContentSequence", "TemporalPositionIndex", "TemporalPositionIdentifier", (1, 2)),
    ("CT", "FrameContentSequence", "StackID", "StackID", ("1", "2")),
    ("CT", "CardiacSynchronizationSequence", *["NominalPercentageOfCardiacPhase"] * 2, (40.0, 70.0)),
    ("CT", "CTReconstructionSequence", *["ConvolutionKernel"] * 2, ("Br40", "Br64")),
    ("CT", "CTXRayDetailsSequence", *["KVP"] * 2, (80.0, 140.0)),
    ("MR", "MRDiffusionSequence", *["DiffusionBValue"] * 2, (0.0, 1000.0)),
    ("MR", "MREchoSequence", *["EffectiveEchoTime"] * 2, (10.0, 90.0)),
]


@pytest.mark.parametrize(("modality", "sequence", "keyword", "tag", "values"), FAMILIES)
def test_two_volumes_in_one_enhanced_object_are_refused(
    write_series, tmp_path, modality, sequence, keyword, tag, values
):
    """Half a slice apart, and in the same places, the second one with more slices."""
    slices = in_order(write_series(ct_values(SHAPE), modality=modality))
    turns = as_enhanced(slices, tmp_path / "turns", lambda number: {sequence: {keyword: values[number % 2]}})
    stacks = as_enhanced(
        slices[:3] + slices, tmp_path / "stacks", lambda number: {sequence: {keyword: values[number >= 3]}}
    )
    for folder in (turns, stacks):
        with pytest.raises(InputError, match=rf"slices of {tag} {values[0]} \(.* among those of {tag} {values[1]} "):
            read_volume(folder, "ct", intensity_check=modality == "CT")


def test_frames_in_one_place_are_no_copies(write_series, tmp_path):
    slices = in_order(write_series(ct_values(SHAPE)))
    with pytest.raises(InputError, match="two DICOM slices at the position 5.00 mm"):
        read_volume(as_enhanced(slices[:3] + slices, tmp_path / "enhanced"), "ct")


@pytest.mark.parametrize("tag", ["StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"])
def test_a_series_of_two_patients_studies_or_frames_of_reference_is_refused(write_series, tag):
    folder = write_series(ct_values(SHAPE))
    edit(folder, lambda dataset, number: setattr(dataset, tag, "1.2.3.5" if number < 2 else "1.2.3.6"))
    with pytest.raises(
        InputError, match=f"a series with 2 values of {tag}: .*2 slices.*, .*3 slices.*; allowed is one"
    ) as e:
        read_volume(folder, "ct")
    assert ("1.2.3.5" in str(e.value)) == tag.endswith("UID")  # names of patients stand in no message


def test_slices_that_say_less_of_the_same_patient_are_one_series(write_series):
    """Anonymised in part, or the name written otherwise."""
    folder = write_series(ct_values(SHAPE))

    def change(dataset, number):
        dataset.PatientName = ("Doe^Jane", "DOE^JANE^^", "")[number % 3]
        if number % 2:
            dataset.PatientID, dataset.StudyInstanceUID = "P1", ""

    edit(folder, change)
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), ct_values(SHAPE))


@pytest.mark.parametrize(("share", "refused"), [(0.008, False), (0.012, True), (0.1, True), (0.3, True)])
def test_slice_distances_agree_to_a_hundredth(write_series, share, refused):
    """One slice of five lies so far, in shares of the distance (3 mm), from its place."""
    folder = write_series(ct_values(SHAPE), step=3.0)

    def move(dataset, number):
        if number == 2:
            x, y, z = (float(value) for value in dataset.ImagePositionPatient)
            dataset.ImagePositionPatient = [x, y, round(z + 3 * share, 4)]

    edit(folder, move)
    if refused:
        with pytest.raises(InputError, match="gap of .* allowed are equal distances .within 1%"):
            read_volume(folder, "ct")
    else:
        assert read_volume(folder, "ct").shape == (1, *SHAPE)


def with_values(folder, low: float, share: float, padding: float | None):
    """HU of tissue, a share of it at `low` (spread over 10 HU), and a corner of padding."""

    def change(dataset, number):
        values = np.full((dataset.Rows, dataset.Columns), 1024 + 40, np.int16)
        flat = values.reshape(-1)
        count = round(share * flat.size)
        flat[:count] = 1024 + low + np.arange(count) % 10
        if padding is not None:
            flat[-8:] = 1024 + padding  # a sixth of the slice
        dataset.PixelRepresentation, dataset.RescaleSlope, dataset.RescaleIntercept = 1, 1, -1024
        dataset.PixelData = values.astype("<i2").tobytes()

    edit(folder, change)


@pytest.mark.parametrize("padding", [-2000, -3024])
def test_the_scanners_padding_outside_of_its_field_is_no_fault(write_series, padding):
    folder = write_series(ct_values(SHAPE))
    with_values(folder, -1000, 0.5, padding)
    found = read_volume(folder, "ct")
    assert float(found.min()) == padding and (found == padding).sum() == 8 * SHAPE[2]


@pytest.mark.parametrize(
    ("value", "stored", "signed", "bits", "limit"),
    [
        (63536, 63536, 0, 16, None),  # -2000 stored unsigned
        (63536, 63536, 1, 16, None),  # declared unsigned, of signed pixels
        (65535, 65535, 0, 16, None),
        (4095, 4095, 0, 12, None),  # the largest value, which is metal's, too
        (63536, 2096, 0, 12, None),
        (-2000, 63536, 1, 16, None),
        (-32768, 32770, 1, 16, -32700),
    ],
)
def test_declared_padding_is_air(write_series, said, value, stored, signed, bits, limit):
    """Outside of the field of view alone: a pixel within it that has the value stays."""
    hu = ct_values(SHAPE) // 2
    folder = write_series(hu, PixelRepresentation=signed, BitsStored=bits, HighBit=bits - 1)

    def pad(dataset, number):
        pixels = np.frombuffer(dataset.PixelData, "<u2").reshape(SHAPE[1::-1]).copy()
        pixels[:2, :3] = pixels[3, 4] = stored
        dataset.PixelData = pixels.tobytes()
        kind = "SS" if value < 0 else "US"
        dataset.add_new("PixelPaddingValue", kind, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", kind, limit)

    edit(folder, pad)
    inside = pydicom.dcmread(next(folder.iterdir())).pixel_array[3, 4] - 1024.0
    expected = hu.astype(float)
    expected[:3, :2], expected[4, 3] = -1000, inside
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), expected)
    assert f"{6 * SHAPE[2]} voxels outside of the scanner's field of view" in said.text


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_padding_that_is_air_anyway_or_of_an_mr_stays(write_series, said, modality):
    hu = np.maximum(ct_values(SHAPE), -1010)
    hu[:3, :2] = -1024
    folder = write_series(hu, modality=modality, PixelPaddingValue=0)
    assert np.array_equal(read_volume(folder, "ct", intensity_check=modality == "CT")[0].numpy(), hu)
    assert not said.records


@pytest.mark.parametrize(("low", "share", "refused"), [(-2024, 0.5, True), (-1400, 0.3, True), (-1250, 0.5, False)])
def test_an_intercept_that_was_added_twice(write_series, low, share, refused):
    """Then air lies near -2024; the documented bound is -1300 HU in more than a tenth of the voxels."""
    folder = write_series(ct_values(SHAPE))
    with_values(folder, low, share, -3024)
    if refused:
        with pytest.raises(InputError, match="below -1300 HU, where nothing is.*rescale intercept to 0"):
            read_volume(folder, "ct")
    else:
        assert read_volume(folder, "ct").shape == (1, *SHAPE)


# --- two acquisitions in one series -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "values"),
    [("AcquisitionNumber", (1, 2)), ("TemporalPositionIdentifier", (1, 2)), ("ConvolutionKernel", ("B30f", "B70f"))],
)
def test_acquisitions_half_a_slice_apart_are_not_interleaved(write_series, tag, values):
    folder = write_series(ct_values(SHAPE), step=2.0)
    edit(folder, lambda dataset, number: setattr(dataset, tag, values[number % 2]))
    with pytest.raises(InputError, match=rf"slices of {tag} {values[0]} \(.* among those of {tag} {values[1]}"):
        read_volume(folder, "ct")


@pytest.mark.parametrize("number_of", [lambda number: number + 1, lambda number: number // 5, lambda number: 7])
def test_acquisitions_one_behind_the_other_are_one_volume(write_series, number_of):
    """A number a slice (step and shoot), a number a block, one number."""
    hu = ct_values(SHAPE)
    folder = write_series(hu, step=2.0)
    edit(folder, lambda dataset, number: setattr(dataset, "AcquisitionNumber", number_of(number)))
    assert np.array_equal(read_volume(folder, "ct")[0].numpy(), hu)


def test_an_mr_needs_no_rescale(write_series, said):
    """Where an MR is allowed; its slices may be acquired in turns, which of a CT would be two scans."""
    stored = (np.arange(np.prod(SHAPE)).reshape(SHAPE) * 40) % 30_000

    def as_mr(dataset, number):
        del dataset.RescaleSlope, dataset.RescaleIntercept
        dataset.AcquisitionNumber = 1 + number % 2

    folder = write_series(stored.astype(np.int32) - 1024, modality="MR")
    edit(folder, as_mr)
    volume = read_volume(folder, "ct", intensity_check=False)
    assert np.array_equal(volume.numpy()[0], stored) and not said.records
    with pytest.raises(InputError, match="modality MR; allowed is CT: choose another"):
        read_volume(folder, "ct")
    with pytest.raises(InputError, match="modality CT; allowed is MR: choose another"):
        read_volume(write_series(ct_values(SHAPE), "ct"), "ct", intensity_check=False, modalities=["MR"])


def test_two_echoes_are_two_volumes(write_series):
    folder = write_series(ct_values(SHAPE), modality="MR")
    edit(folder, lambda dataset, number: setattr(dataset, "EchoTime", 10 + 80 * (number % 2)))
    with pytest.raises(InputError, match="slices of EchoTime 10.* among those of EchoTime 90"):
        read_volume(folder, "ct", intensity_check=False)
    with pytest.raises(InputError, match="modality PT; allowed is CT or MR"):
        read_volume(write_series(ct_values(SHAPE), "pet", modality="PT"), "ct", intensity_check=False)


def test_an_mr_with_half_a_rescale_is_refused(write_series):
    folder = write_series(ct_values(SHAPE), modality="MR")
    edit(folder, lambda dataset, number: delattr(dataset, "RescaleIntercept"))
    with pytest.raises(InputError, match="allowed are a positive slope and an intercept: export"):
        read_volume(folder, "ct", intensity_check=False)
