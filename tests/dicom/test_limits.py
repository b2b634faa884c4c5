"""DICOM from people who mean harm, or exports that went wrong: refused in words, before time and memory are spent."""

from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from maisi_tools.dicom.structures import fill_polygon
from maisi_tools.dicom.study import read_mask, write_study
from maisi_tools.dicom.uids import is_uid, uid_name
from maisi_tools.errors import InputError
from maisi_tools.volumes.dicom_files import reading
from maisi_tools.volumes.limits import DEFAULTS, limit
from maisi_tools.volumes.series import read_slices

from .conftest import SIZE
from .test_masks import box, structure_file


def test_uids_are_their_names_and_nothing_else_is():
    for uid in ("1.2.840.10008.1.1", "2.25.329800735698586629295641978511506172918", "0.1", "7", "1.02.3"):
        assert is_uid(uid) and uid_name(uid) == uid
    odd = [
        "",
        ".",
        "..",
        "1.",
        ".1",
        "1..2",
        "../1.2",
        "/1.2",
        "1.2/3",
        "1.2\0",
        "1.2\n",
        "1" * 65,
        "a",
        "1.2 ",
        "\udc80",
        "1٢",
    ]
    names = {uid_name(one) for one in odd}
    assert not any(map(is_uid, odd)) and len(names) == len(odd)
    assert all(name.startswith("no-uid-") and len(name) == 39 and name.replace("-", "").isalnum() for name in names)


def test_limits_come_from_the_environment(monkeypatch):
    assert limit("MAISI_MAX_VOXELS") == DEFAULTS["MAISI_MAX_VOXELS"]
    monkeypatch.setenv("MAISI_MAX_VOXELS", "1000")
    assert limit("MAISI_MAX_VOXELS") == 1000
    for wrong in ("-1", "0", "many", "1.5", "\u0661\u0662x"):
        monkeypatch.setenv("MAISI_MAX_VOXELS", wrong)
        with pytest.raises(InputError, match="MAISI_MAX_VOXELS is"):
            limit("MAISI_MAX_VOXELS")


@pytest.fixture
def series(studies, tmp_path):
    """A copy of the CT slices, to be spoilt."""
    folder = tmp_path / "series"
    folder.mkdir()
    for file in (studies / "slices" / "CT").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@contextmanager
def peak_below(allowed: float):
    """Assert that what is in it takes no more memory than so many bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < allowed
    finally:
        tracemalloc.stop()


def spoil(folder, change):
    for file in sorted(folder.iterdir()):
        ds = pydicom.dcmread(file)
        change(ds)
        ds.save_as(file)


def test_headers_of_large_slices_without_pixels_are_refused_at_once(series, studies):
    def enlarge(ds):
        ds.Rows = ds.Columns = 4000
        ds.PixelSpacing = [0.5, 0.5]
        ds.PixelData = b""

    spoil(series, enlarge)
    start = time.monotonic()
    for name in ("RTSTRUCT.dcm", "SEG.dcm"):
        with pytest.raises(InputError, match="claims 4000 x 4000 pixels in 1 frames, which its .* bytes cannot hold"):
            read_mask(studies / "slices" / name, series)
    assert time.monotonic() - start < 5


def test_a_segmentation_that_claims_more_than_it_holds_is_refused(studies, tmp_path):
    for change, message in [({"Rows": 60000}, "cannot hold"), ({"NumberOfFrames": 2**31 - 1}, "cannot hold")]:
        ds = pydicom.dcmread(studies / "slices" / "SEG.dcm")
        for keyword, value in change.items():
            setattr(ds, keyword, value)
        ds.save_as(tmp_path / "seg.dcm")
        with pytest.raises(InputError, match=message):
            read_mask(tmp_path / "seg.dcm")


def test_what_is_drawn_does_not_grow_with_the_slices(studies, series, slices, tmp_path):
    """Slices of 4000 x 4000 with their pixels: an ROI of 200 x 200 voxels is drawn in so many."""

    def enlarge(ds):
        ds.Rows = ds.Columns = 4000
        ds.PixelSpacing = [float(mm) / 10 for mm in ds.PixelSpacing]
        ds.PixelData = bytes(2 * 4000 * 4000)

    keep = sorted(series.iterdir())[:4]
    for file in sorted(series.iterdir())[4:]:
        file.unlink()
    spoil(series, enlarge)
    path = structure_file(tmp_path / "rt.dcm", slices, {"Liver": [(k, box(1.55, 21.55)) for k in range(4)]})
    with peak_below(1.5 * 4000 * 4000 * len(keep)):
        mask = read_mask(path, series)[0].numpy()
    assert mask.shape == (4000, 4000, len(keep)) and np.count_nonzero(mask) == 4 * 200 * 200


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_file_is_not_unpacked_for_its_headers(series, tmp_path, monkeypatch):
    """A private element of 100 MB of zeros behind the pixels, 100 kB packed."""
    members = {}
    for file in sorted(series.iterdir()):
        ds = pydicom.dcmread(file)
        ds.DataSetTrailingPadding = bytes(20_000_000)
        buffer = io.BytesIO()
        ds.save_as(buffer)
        members[file.name] = buffer.getvalue()
    path = zipped(tmp_path / "s.zip", members)
    expected = [ds.SOPInstanceUID for ds in read_slices(series, pixels=False)]
    members.clear()
    with peak_below(5_000_000):
        assert [ds.SOPInstanceUID for ds in read_slices(path, pixels=False)] == expected
    for name, allowed, message in [
        ("MAISI_MAX_FILE_BYTES", 10_000_000, r"0001\.dcm in .*s\.zip has \d+ bytes; allowed are 10000000"),
        ("MAISI_MAX_ZIP_BYTES", 10_000_000, r"s\.zip holds \d+ bytes, unpacked"),
        ("MAISI_MAX_ZIP_MEMBERS", SIZE[2] - 1, rf"s\.zip holds {SIZE[2]} files"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setenv(name, str(allowed))
            read_slices(path)


def test_deflated_objects_are_read_and_bounded(series, slices, tmp_path, monkeypatch):
    def deflate(ds):
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    expected = [ds.PixelData for ds in read_slices(series)]
    spoil(series, deflate)
    assert [ds.PixelData for ds in read_slices(series)] == expected
    file = sorted(series.iterdir())[0]
    content = file.read_bytes()
    ds = pydicom.dcmread(file)
    start = len(content) - len(_deflated(ds))
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    file.write_bytes(content[:start] + bomb)
    assert len(bomb) < 200_000
    monkeypatch.setenv("MAISI_MAX_FILE_BYTES", "50000000")
    with peak_below(20_000_000), pytest.raises(InputError, match="bytes and more, inflated; allowed are 50000000"):
        read_slices(series)


def _deflated(ds) -> bytes:
    """The deflated part of the file of a dataset, as pydicom writes it."""
    buffer = io.BytesIO()
    ds.save_as(buffer)
    content = buffer.getvalue()
    meta = 132 + 12 + ds.file_meta.FileMetaInformationGroupLength
    return content[meta:]


def test_a_contour_of_many_long_edges_takes_little_memory(monkeypatch, slices, studies, tmp_path):
    points = np.tile([[1.0, -5.0], [30.0, 60.0]], (50_000, 1)) + np.linspace(0, 1, 100_000)[:, None]
    with peak_below(400_000_000):  # 2 GB, all edges at once
        fill_polygon(points, (40, 500))
    path = structure_file(tmp_path / "rt.dcm", slices, {"Liver": [(4, box(1, 5) * 30)]})
    monkeypatch.setenv("MAISI_MAX_CONTOUR_POINTS", "100")
    with pytest.raises(InputError, match="the ROI Liver has a contour of 120 points; allowed are 100"):
        read_mask(path, studies / "slices" / "CT")


@pytest.mark.parametrize("data", ["1\\2", "1\\2\\x", "1\\2\\nan", "1\\2\\inf", ""])
def test_contours_that_are_no_points_are_refused_by_name(slices, studies, tmp_path, data):
    path = structure_file(tmp_path / "rt.dcm", slices, {"Liver": [(4, box(1, 5))]})
    ds = pydicom.dcmread(path)
    contour = ds.ROIContourSequence[0].ContourSequence[0]
    contour["ContourData"]._value = data
    ds.save_as(path)
    with pytest.raises(InputError, match="the ROI Liver has a contour"):
        read_mask(path, studies / "slices" / "CT")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PixelSpacing": [0.0, 0.0]}, "pixels of"),
        ({"PixelSpacing": [-1.0, 1.0]}, "pixels of"),
        ({"PixelSpacing": [1e9, 1e9]}, "pixels of"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "cannot be read as DICOM|orientation"),
        ({"PixelSpacing": None}, "PixelSpacing"),
    ],
)
def test_nonsense_in_headers_is_refused_in_words(series, studies, change, message):
    def spoilt(ds):
        for keyword, value in change.items():
            setattr(ds, keyword, value)

    spoil(series, spoilt)
    for name in ("RTSTRUCT.dcm", "SEG.dcm"):
        with pytest.raises(InputError, match=message):
            read_mask(studies / "slices" / name, series)


def test_a_stack_tilted_beyond_any_gantry_is_refused(series):
    step = [0.0]

    def tilt(ds):
        x, y, z = map(float, ds.ImagePositionPatient)
        ds.ImagePositionPatient = [x, y + step[0], z]
        step[0] += 20.0

    spoil(series, tilt)
    with pytest.raises(InputError, match=r"tilted by 8. degrees .* up to 45"):
        read_slices(series)


def test_a_volume_beyond_the_limit_is_refused(series, studies, monkeypatch):
    monkeypatch.setenv("MAISI_MAX_VOXELS", str(np.prod(SIZE) - 1))
    with pytest.raises(InputError, match=rf"series has {SIZE[0]} x {SIZE[1]} x {SIZE[2]} voxels; allowed are"):
        read_slices(series)
    with pytest.raises(InputError, match=r"its frames span \d+ slices; allowed are"):
        read_mask(studies / "slices" / "SEG.dcm")
    monkeypatch.setenv("MAISI_MAX_VOXELS", str(np.prod(SIZE)))  # the frames of all segments are many times as many
    read_mask(studies / "slices" / "SEG.dcm", series)


def test_what_is_wrong_with_an_object_is_told_from_what_is_wrong_with_the_disk():
    for error in (OSError("No tag to read at file position 1162"), NotImplementedError("VR"), EOFError(), KeyError(1)):
        with pytest.raises(InputError, match="x cannot be read as DICOM"), reading("x"):
            raise error
    for error in (OSError(5, "Input/output error"), MemoryError()):
        with pytest.raises(type(error)), reading("x"):
            raise error


def test_a_source_whose_elements_cannot_be_read_is_refused(series, tmp_path):
    """Elements are read when they are asked for, which is when the patient is taken over."""
    for file in series.iterdir():
        content = file.read_bytes()
        assert content.count(b"\x20\0\x52\0UI") == 1
        file.write_bytes(content.replace(b"\x20\0\x52\0UI", b"\x20\0\x52\0U\xb2"))
    with pytest.raises(InputError, match="cannot be read as DICOM"):
        write_study(tmp_path / "out", np.zeros((4, 4, 4)), np.eye(4), source=series)
    assert not (tmp_path / "out").exists()
