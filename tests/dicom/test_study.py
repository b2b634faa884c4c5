"""Studies in DICOM: read back by us and by programs not ours, marked as synthetic, free of a source patient."""

from __future__ import annotations

import datetime
import json
import pydoc
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from maisi_tools.dicom.ct import to_lps
from maisi_tools.dicom.objects import SYNTHETIC_DATA
from maisi_tools.dicom.study import check_studies, is_of_scan, read_mask, write_study
from maisi_tools.errors import InputError, find_input_error
from maisi_tools.volumes.grid import straighten
from maisi_tools.volumes.reading import read_volume

from .conftest import CREATED, SIZE, SPACING, oblique_affine

FORMS = ("slices", "enhanced")


def objects(folder):
    return [pydicom.dcmread(file) for file in sorted(folder.rglob("*.dcm"))]


def walk(dataset):
    """Every element of a dataset, those in sequences included."""
    for element in dataset:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from walk(item)


def expected(array):
    """The volume turned to LPS, and its affine to RAS."""
    turned, grid = to_lps(array, oblique_affine())
    return turned, np.diag([-1, -1, 1, 1]) @ grid.affine


# --- read back --------------------------------------------------------------------------------------------------------


def test_turning_keeps_every_voxel_in_its_place(hu):
    turned, affine = expected(hu)
    rng = np.random.default_rng(1)
    for _ in range(20):
        voxel = rng.integers(0, SIZE)
        place = oblique_affine() @ [*voxel, 1]
        found = np.rint(np.linalg.inv(affine) @ place).astype(int)[:3]
        assert np.allclose(affine @ [*found, 1], place) and turned[tuple(found)] == hu[tuple(voxel)]


@pytest.mark.parametrize("form", FORMS)
def test_ct_comes_back_to_the_bit(studies, hu, form):
    turned, affine = expected(hu)
    volume = read_volume(studies / form / "CT", "ct")
    assert np.array_equal(volume[0].numpy(), turned)
    assert np.allclose(volume.affine, affine, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["SEG.dcm", "RTSTRUCT.dcm"])
def test_masks_come_back_to_the_voxel(studies, mask, form, name):
    turned, affine = expected(mask)
    found = read_mask(studies / form / name, studies / form / "CT")
    assert found.shape == (1, *turned.shape) and np.array_equal(found[0].numpy(), turned)
    assert np.allclose(found.affine, affine, atol=1e-6)


def test_segmentation_without_its_series_has_its_own_grid(studies, mask):
    turned, affine = expected(mask)
    found = read_mask(studies / "slices" / "SEG.dcm")
    assert np.allclose(found.affine, affine, atol=1e-4)
    assert np.array_equal(found[0].numpy(), turned)


def test_plain_pydicom_reads_hu_and_geometry(studies, hu):
    turned, affine = expected(hu)
    for number, ds in enumerate(objects(studies / "slices" / "CT")):
        values = ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept
        assert np.array_equal(values.T, turned[:, :, number])
        lps = np.diag([-1, -1, 1]) @ affine[:3] @ [0, 0, number, 1]
        assert np.allclose(ds.ImagePositionPatient, lps, atol=1e-6)
        row, column = np.reshape(ds.ImageOrientationPatient, (2, 3))
        assert np.allclose(np.cross(row, column) * ds.SliceThickness, np.diag([-1, -1, 1]) @ affine[:3, 2], atol=1e-6)
        assert np.allclose(ds.PixelSpacing, [SPACING[1], SPACING[0]]) and ds.SpacingBetweenSlices == SPACING[2]


@pytest.mark.parametrize("form", FORMS)
def test_simpleitk_reads_hu_and_geometry(studies, hu, form):
    sitk = pytest.importorskip("SimpleITK")
    turned, affine = expected(hu)
    folder = studies / form / "CT"
    reader = sitk.ImageSeriesReader()
    files = reader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(files if form == "slices" else str(folder / "CT.dcm"))
    assert np.array_equal(sitk.GetArrayFromImage(image).T, turned)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    assert np.allclose(image.GetOrigin(), lps[:3, 3], atol=1e-4)
    assert np.allclose(image.GetSpacing(), SPACING, atol=1e-4)
    assert np.allclose(np.reshape(image.GetDirection(), (3, 3)) * SPACING, lps[:3, :3], atol=1e-4)


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="needs dcm2niix (Debian package dcm2niix)")
@pytest.mark.parametrize("form", FORMS)
def test_dcm2niix_reads_hu_and_geometry(studies, hu, form, tmp_path):
    command = ["dcm2niix", "-z", "n", "-b", "n", "-f", "ct", "-o", str(tmp_path), str(studies / form / "CT")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    image = nib.load(tmp_path / "ct.nii")
    turned, affine = expected(hu)
    # It turns the rows around; the voxels stay in their places.
    flip = np.diag([1.0, -1.0, 1.0, 1.0])
    flip[1, 3] = SIZE[1] - 1
    assert np.array_equal(np.asanyarray(image.dataobj)[:, ::-1], turned)
    assert np.allclose(image.affine, affine @ flip, atol=1e-2)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian package dicom3tools)")
def test_dciodvfy_finds_no_error(studies):
    for form, name in [(form, name) for form in FORMS for name in ("CT", "SEG.dcm", "RTSTRUCT.dcm")]:
        path = studies / form / name
        path = next(path.iterdir()) if path.is_dir() else path
        done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
        found = [line for line in done.stderr.splitlines() if line.startswith("Error")]
        # Its dictionary may be older than Synthetic Data (2022).
        assert [line for line in found if "(0x0008,0x001c)" not in line] == [], path


# --- what the objects say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_object_says_that_it_is_synthetic_and_what_made_it(studies, form):
    found = objects(studies / form)
    assert len({ds.StudyInstanceUID for ds in found}) == len({ds.PatientID for ds in found}) == 1
    assert len({ds.FrameOfReferenceUID for ds in found}) == 1
    assert len({ds.SOPInstanceUID for ds in found}) == len(found) and len({ds.SeriesInstanceUID for ds in found}) == 3
    for ds in found:
        assert ds[SYNTHETIC_DATA].value == "YES"
        assert "ynthetic" in ds.SeriesDescription and ds.PatientID.startswith("SYN-")
        assert ds.Manufacturer == "MAISI Bundles" and ds.SoftwareVersions
        text = ds.ContributingEquipmentSequence[0].ContributionDescription
        recorded = json.loads(text[text.index("{") :])
        assert recorded == {"seed": 7, "num_inference_steps": 10, "spacing": [6.5, 7.0, 5.0]}
    image = next(ds for ds in found if ds.Modality == "CT")
    assert image.ImageType[0] == "DERIVED" and ("SYNTHETIC" in image.ImageType or form == "enhanced")


def test_segments_have_snomed_codes_and_rois_point_at_the_slices(studies, mask):
    slices = objects(studies / "slices" / "CT")
    seg, rt = (pydicom.dcmread(studies / "slices" / name) for name in ("SEG.dcm", "RTSTRUCT.dcm"))
    coded = {s.SegmentLabel: s.SegmentedPropertyTypeCodeSequence[0] for s in seg.SegmentSequence}
    assert (coded["liver"].CodeValue, coded["liver"].CodingSchemeDesignator) == ("10200004", "SCT")
    modifier = coded["left kidney"].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (coded["left kidney"].CodeValue, modifier.CodeMeaning) == ("64033007", "Left")
    assert coded["body"].CodingSchemeDesignator == "99MAISI"
    uids = {ds.SOPInstanceUID for ds in slices}
    assert {s.ReferencedSOPInstanceUID for s in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == uids
    position = {ds.SOPInstanceUID: np.array(ds.ImagePositionPatient, float) for ds in slices}
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    for item in rt.ROIContourSequence:
        for contour in item.ContourSequence:
            points = np.reshape(np.array(contour.ContourData, float), (-1, 3))
            assert len(points) == contour.NumberOfContourPoints >= 3
            away = (points - position[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]) @ np.cross(row, column)
            assert np.abs(away).max() < 1e-3
    assert len(rt.StructureSetROISequence) == len(np.unique(mask)) - 1


def test_same_content_and_time_give_the_same_bytes(tmp_path, studies, hu, mask):
    write_study(
        tmp_path / "again",
        hu,
        oblique_affine(),
        mask,
        seed=7,
        conditions={"num_inference_steps": 10, "spacing": [6.5, 7.0, 5.0]},
        created=CREATED,
    )
    first = sorted((studies / "slices").rglob("*.dcm"))
    second = sorted((tmp_path / "again").rglob("*.dcm"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    later = write_study(tmp_path / "later", hu, oblique_affine(), created=CREATED + datetime.timedelta(seconds=1))
    other = write_study(tmp_path / "other", hu + np.int16(1), oblique_affine(), created=CREATED)
    uids = {(ds := pydicom.dcmread(files[0])).SOPInstanceUID for files in (first, later, other)}
    assert len(uids) == 3 and ds.StudyInstanceUID


# --- the source patient -----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, hu):
    """A series of a patient whose every element has a value of its own, private and unknown ones included."""
    write_study(tmp_path / "s", hu, oblique_affine(), created=datetime.datetime(1999, 9, 9, 9, 9, 9))
    folder = tmp_path / "s" / "CT"
    for file in folder.iterdir():
        ds = pydicom.dcmread(file)
        for keyword, vr in {
            **{"PatientName": "PN", "PatientID": "LO", "IssuerOfPatientID": "LO", "OtherPatientNames": "PN"},
            **{"AccessionNumber": "SH", "StudyID": "SH", "StudyDescription": "LO", "SeriesDescription": "LO"},
            **{"ReferringPhysicianName": "PN", "InstitutionName": "LO", "StationName": "SH", "PatientComments": "LT"},
            **{"Manufacturer": "LO", "ManufacturerModelName": "LO", "DeviceSerialNumber": "LO", "ProtocolName": "LO"},
            **{"OperatorsName": "PN", "DerivationDescription": "ST", "ImageComments": "LT", "SoftwareVersions": "LO"},
            **{"RequestingService": "LO", "AdmissionID": "LO", "PerformedProcedureStepDescription": "LO"},
        }.items():
            ds.add_new(keyword, vr, f"SECRET^{len(ds):03d}")
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.99.1", "1.2.99.2", "1.2.99.3"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.99.4.{ds.InstanceNumber}"
        ds.PatientBirthDate, ds.StudyDate, ds.StudyTime, ds.SeriesDate = "19470312", "20190203", "040506", "20190204"
        ds.PatientSex, ds.PatientAge, ds.PatientWeight = "F", "071Y", "61.25"
        block = ds.private_block(0x0029, "SECRET VENDOR", create=True)
        block.add_new(1, "LO", "SECRETprivate")
        item = Dataset()
        item.ReferencedSOPInstanceUID = "1.2.99.5"
        ds.ReferencedImageSequence = [item]
        ds.save_as(file)
    return folder


def test_nothing_of_a_source_patient_is_in_a_generated_study(tmp_path, source, mask):
    """The way of a reconstruction: read the patient's series, write what comes out, with the mask."""
    source_ds = objects(source)[0]
    common = {"SpecificCharacterSet", "Modality", "ImageType", "SOPClassUID", "PatientPosition", "Laterality"}
    told = {
        str(element.value)
        for element in walk(source_ds)
        if element.VR in ("PN", "LO", "SH", "LT", "ST", "UT", "UI", "DA", "TM", "DT", "AS", "CS", "UN")
        and element.keyword not in common
        and str(element.value) not in ("", "NO", "YES", "00", "MONOCHROME2", "HU", "1", "DCM", "109102")
        and element.keyword not in ("ContributionDescription", "CodeMeaning", "PurposeOfReferenceCodeSequence")
    }
    software = {
        "MAISI Bundles",
        "maisi_tools",
        objects(source.parent)[0].ContributingEquipmentSequence[0].SoftwareVersions,
    }
    told -= software
    assert {"19470312", "1.2.99.5", "SECRETprivate", "071Y"} <= told and len(told) > 25
    volume = read_volume(source, "ct")
    labels, _ = to_lps(mask, oblique_affine())
    for enhanced in (False, True):
        folder = tmp_path / f"out{enhanced}"
        write_study(folder, volume[0].numpy(), volume.affine.numpy(), labels, enhanced=enhanced, seed=1)
        for ds in objects(folder):
            for element in (*walk(ds.file_meta), *walk(ds)):
                assert not element.tag.is_private
                if element.VR not in ("OW", "OB", "SQ"):
                    assert str(element.value) not in told, element
                    assert "SECRET" not in str(element.value) and "1.2.99" not in str(element.value), element
        for file in folder.rglob("*"):
            assert file.is_dir() or (b"SECRET" not in file.read_bytes() and b"1.2.99." not in file.read_bytes())


def test_a_study_can_join_its_source(tmp_path, source, hu, mask):
    write_study(tmp_path / "out", hu, oblique_affine(), mask, source=source)
    original = objects(source)[0]
    for ds in objects(tmp_path / "out"):
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"):
            assert ds.get(keyword) == original.get(keyword)
        assert ds.FrameOfReferenceUID == original.FrameOfReferenceUID
        assert ds.SeriesInstanceUID != original.SeriesInstanceUID and ds.Manufacturer == "MAISI Bundles"
        assert ds[SYNTHETIC_DATA].value == "YES" and "SECRETprivate" not in str(ds)
    found = read_mask(tmp_path / "out" / "RTSTRUCT.dcm", source)  # one frame of reference: fits the source, too
    assert np.array_equal(found[0].numpy(), to_lps(mask, oblique_affine())[0])


def test_a_study_joins_a_source_whatever_its_patients_data_look_like(tmp_path, source, hu, mask):
    """What clinics have and highdicom would refuse to copy; all objects have it as it is."""
    strange = {
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"],
        "PatientName": "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce",
        "PatientBirthDate": "19700000",
        "PatientSex": "female",
        "StudyTime": "10:10:10",
    }
    with pydicom.config.disable_value_validation():
        for file in source.iterdir():
            ds = pydicom.dcmread(file)
            for keyword, value in strange.items():
                setattr(ds, keyword, value)
            ds.save_as(file)
    write_study(tmp_path / "out", hu, oblique_affine(), mask, source=source)
    found = objects(tmp_path / "out")
    assert len(found) == SIZE[2] + 2
    for ds in found:
        assert {keyword: ds.get(keyword) for keyword in strange} == strange, ds.Modality
        assert ds.StudyInstanceUID == "1.2.99.1"


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize(
    ("declared", "name"),
    [
        (None, "M\u00fcller^J\u00f6rg".encode()),  # of a character set that the scanner did not say
        (None, "M\u00fcller^J\u00f6rg".encode("latin1")),
        ("ISO_IR 192", "M\u00fcller^J\u00f6rg".encode("latin1")),  # of another than it says
        ("GB18030", "Wang=\u738b^\u5c0f\u4e1c".encode("gb18030")),
    ],
)
def test_a_patients_name_is_taken_over_to_the_byte(tmp_path, hu, mask, enhanced, declared, name):
    write_study(tmp_path / "s", hu[:4, :4, :3], oblique_affine(), enhanced=enhanced)
    for file in (tmp_path / "s").rglob("*.dcm"):
        ds = pydicom.dcmread(file)
        del ds.SpecificCharacterSet
        if declared:
            ds.SpecificCharacterSet = declared
        ds.PatientName = ds.StudyDescription = "N" * len(name)
        ds.save_as(file)
        file.write_bytes(file.read_bytes().replace(b"N" * len(name), name))
    small = mask[:4, :4, :3] * 0 + 1
    write_study(tmp_path / "out", hu[:4, :4, :3], oblique_affine(), small, source=tmp_path / "s")
    found = objects(tmp_path / "out")
    assert len(found) == 5
    for ds in found:
        stored = [ds.get_item(keyword).value.strip() for keyword in ("PatientName", "StudyDescription")]
        assert stored == [name, name] and ds.get("SpecificCharacterSet") == declared, ds.Modality


@pytest.mark.parametrize("declared", ["ISO_IR 192", "ISO_IR 100"])
def test_a_study_joins_a_patient_whom_the_lowest_slice_does_not_name(tmp_path, hu, declared):
    """Nor the frame of reference; whatever character set the slice has of which another value comes."""
    wanted = {"PatientName": "M\u00fcller^J\u00f6rg", "PatientID": "17", "PatientBirthDate": "19470312"}
    wanted |= {"AccessionNumber": "A5", "FrameOfReferenceUID": "1.2.99.3"}
    small, whole = hu[:4, :4, :3], np.ones((4, 4, 3), np.uint8)
    for number, file in enumerate(write_study(tmp_path / "s", small, oblique_affine())):
        ds = pydicom.dcmread(file)
        ds.SpecificCharacterSet, ds.StudyDescription = declared if number else "ISO_IR 192", "Sch\u00e4del"
        for keyword, value in wanted.items():
            setattr(ds, keyword, value if number else "")
        ds.save_as(file)
    series = tmp_path / "s" / "CT"
    files = write_study(tmp_path / "out", small, oblique_affine(), whole, source=series, from_scan=True)
    for ds in map(pydicom.dcmread, files):
        assert {keyword: ds.get(keyword) for keyword in wanted} == wanted and ds.StudyDescription == "Sch\u00e4del"
    assert np.array_equal(read_mask(files[-1], series)[0].numpy(), whole)


@pytest.mark.parametrize(
    ("name", "beside", "wanted"),
    [
        ("x_recon.nii.gz", None, True),
        ("x_latent_ct.nii.gz", None, True),
        ("sample_seed0_latent_ct.nii.gz", {"from_scan": False}, False),
        ("mine.nii.gz", {"from_scan": True}, True),
        ("x_ct.nii.gz", {"region": {"box_ras_mm": [[0, 0, 0], [1, 1, 1]]}}, True),
        ("x_ct.nii.gz", {"seed": 3}, False),
        ("SERIES", None, True),
    ],
)
def test_what_shows_a_patient_is_known_by_what_lies_beside_or_its_name(tmp_path, name, beside, wanted):
    if beside is not None:
        (tmp_path / f"{name.removesuffix('.nii.gz')}.json").write_text(json.dumps(beside))
    assert is_of_scan(tmp_path / name) is wanted


def test_a_reconstruction_joins_no_other_scan(tmp_path, source, hu):
    """Of another patient, whose series lies elsewhere; one that was cropped or resampled lies inside."""
    moved = oblique_affine()
    moved[:3, 3] += 300
    with pytest.raises(InputError, match=r"the CT and the source series reach from .* allowed as source is the scan"):
        write_study(tmp_path / "out", hu, moved, source=source, from_scan=True)
    assert not (tmp_path / "out").exists()
    inner = oblique_affine()
    inner[:3, 3] = (inner @ [1, 1, 1, 1])[:3]
    write_study(tmp_path / "out", hu[1:-1, 1:-1, 1:-1], inner, source=source, from_scan=True)
    write_study(tmp_path / "drawn", hu, moved, source=source)  # of a mask, wherever it lies


@pytest.mark.parametrize("degrees", [3, 20])
def test_a_reconstruction_of_a_tilted_scan_joins_it(tmp_path, hu, degrees):
    """On the straight grid, which reaches beyond the tilted slices."""
    tilted = np.diag([2.0, 2.0, 3.0, 1.0])
    tilted[1, 2] = 3.0 * np.tan(np.radians(degrees))
    write_study(tmp_path / "s", hu, tilted)
    scan = straighten(read_volume(tmp_path / "s" / "CT", "ct"), "bilinear", -1000)
    write_study(tmp_path / "out", scan[0].numpy(), scan.affine.numpy(), source=tmp_path / "s" / "CT", from_scan=True)


def test_objects_of_another_kind_or_another_seed_are_others(tmp_path, hu, mask):
    found = []
    for name, more in (("a", {}), ("b", {"enhanced": True}), ("c", {"seed": 5})):
        write_study(tmp_path / name, hu, oblique_affine(), mask, created=CREATED, **more)
        found.append({(ds.SOPInstanceUID, ds.SeriesInstanceUID) for ds in objects(tmp_path / name)})
    assert not found[0] & found[1] and not found[0] & found[2]
    instances = [uid for uids in found for uid, _ in uids]
    assert len(instances) == len(set(instances))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, hu, mask):
    sheared = oblique_affine()
    sheared[:3, 1] += 0.2 * sheared[:3, 0]
    wrong_label = mask.copy()
    wrong_label[0, 0, 0] = 199
    nan = hu.astype(np.float32)
    nan[0, 0, 0] = np.nan
    for arguments, options, message in [
        ((hu, sheared), {}, "rows and columns at a right angle"),
        ((hu, oblique_affine(), mask[1:]), {}, "both on one grid"),
        ((hu, oblique_affine(), wrong_label), {}, r"labels \[199\]"),
        ((hu, oblique_affine(), mask * 0), {}, "mask is empty"),
        ((nan, oblique_affine()), {}, "allowed are finite HU"),
        ((hu + np.float32(40000), oblique_affine()), {}, "fit 16 bits"),
        ((hu, oblique_affine()), {"conditions": {"x": "y" * 1000}}, "DICOM allows 1024"),
        ((hu, oblique_affine()), {"conditions": {"x": object()}}, "cannot be written as JSON"),
        ((hu, oblique_affine()), {"source": tmp_path}, "no image slice"),
    ]:
        with pytest.raises(InputError, match=message):
            write_study(tmp_path / "out", *arguments, **options)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match="is there already"):
        write_study(tmp_path / "out", hu, oblique_affine())


def test_folders_that_are_there_are_written_into(tmp_path, hu, monkeypatch):
    """A link to an empty folder, the working directory, one that may not be removed (a disk of its own), and again."""
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    for folder in (link, "."):
        monkeypatch.chdir(real)
        files = write_study(folder, hu, oblique_affine(), replace=True)
        assert len(files) == SIZE[2] and all(file.is_file() for file in files)
        assert real.samefile(".") and [entry.name for entry in real.iterdir()] == ["CT"] and link.is_symlink()
    (real / ".part-1").mkdir()  # of a run that was killed
    write_study(link, hu, oblique_affine(), replace=True, enhanced=True)
    assert [entry.name for entry in real.iterdir()] == ["CT.dcm"]
    with pytest.raises(InputError, match="link is there already"):
        write_study(link, hu, oblique_affine())
    assert [entry.name for entry in real.parent.iterdir()] == ["real"]


@pytest.mark.parametrize("other", ["slice", "text", "objects", "structures", "damaged"])
def test_a_study_of_others_is_not_replaced(tmp_path, hu, other):
    """A hospital's export where a run would write its study, or a user's notes in an earlier one: each byte stays."""
    place = tmp_path / "case_dicom"
    write_study(place, hu, oblique_affine())
    check_studies([{"image": str(tmp_path / "case.nii.gz")}], tmp_path)
    ds = pydicom.dcmread(place / "CT" / "0003.dcm")
    ds.Manufacturer = "A scanner's"
    if other == "objects":
        shutil.rmtree(place / "CT")
        (place / "CT").mkdir()
    if other == "text":
        (place / "CT" / "notes.txt").write_text("mine")
    elif other == "damaged":
        (place / "CT" / "0003.dcm").write_bytes(b"DICM")
    else:
        ds.save_as(place / "RTSTRUCT.dcm" if other == "structures" else place / "CT" / "0003.dcm")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for write in (
        lambda: write_study(place, hu, oblique_affine(), replace=True),
        lambda: check_studies([{"image": str(tmp_path / "case.nii.gz")}], tmp_path),
    ):
        with pytest.raises(InputError, match="case_dicom/.* and no earlier run wrote it; allowed is a folder that"):
            write()
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_gantry_tilt_survives_the_way_out_and_in(tmp_path, hu, mask):
    tilted = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    tilted[1, 2] = 1.3
    write_study(tmp_path / "out", hu, tilted, mask)
    for name in ("SEG.dcm", "RTSTRUCT.dcm"):
        found = read_mask(tmp_path / "out" / name, tmp_path / "out" / "CT")
        assert np.array_equal(found[0].numpy(), mask) and np.allclose(found.affine, tilted, atol=1e-6)
    with pytest.raises(InputError, match="no regular volume; .* give the CT series .* --series"):
        read_mask(tmp_path / "out" / "SEG.dcm")
    series = pydicom.dcmread(tmp_path / "out" / "SEG.dcm")
    series.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient[1] += 2
    series.save_as(tmp_path / "moved.dcm")
    with pytest.raises(InputError, match="one lies on no slice of the series"):
        read_mask(tmp_path / "moved.dcm", tmp_path / "out" / "CT")
    volume = read_volume(tmp_path / "out" / "CT", "ct")
    assert np.array_equal(volume[0].numpy(), hu) and np.allclose(volume.affine, tilted, atol=1e-6)


def test_without_highdicom_a_config_says_what_to_install(monkeypatch):
    """MONAI looks a ``_target_`` up by pydoc, whose error has ours behind it."""
    monkeypatch.setitem(sys.modules, "highdicom", None)
    for name in ("segmentation", "structures", "study"):
        monkeypatch.delitem(sys.modules, f"maisi_tools.dicom.{name}", raising=False)
    with pytest.raises(pydoc.ErrorDuringImport) as failed:
        pydoc.locate("maisi_tools.dicom.study.WriteStudyd")
    assert "pip install 'maisi-bundles[dicom]'" in str(find_input_error(failed.value))
