"""One grid for each header: by the standard, as nibabel and SimpleITK have it where they agree; nothing is claimed."""

from __future__ import annotations

import gzip
import itertools
import logging
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import from_matvec

from maisi_tools.errors import InputError
from maisi_tools.volumes import stored
from maisi_tools.volumes.grid import distance_in_voxels
from maisi_tools.volumes.patching import read_stored
from maisi_tools.volumes.reading import read_volume

from .conftest import OBLIQUE, SHAPE, ct_values

TURNED = nib.quaternions.angle_axis2mat(0.3, [1, 2, 0.5])
SIZES = np.array([0.9, 1.1, 2.5])
ORIENTATIONS = {
    "RAS": from_matvec(np.diag(SIZES), [12, -30, 7]),
    "LPS": from_matvec(np.diag(SIZES * [-1, -1, 1]), [120, 90, -310.5]),
    "PSL": from_matvec(np.array([[0, 0, -2.5], [-0.9, 0, 0], [0, 1.1, 0]]), [1, 2, 3]),
    "oblique": from_matvec(TURNED * SIZES, [-4, 5, 60]),
    "oblique, left-handed": from_matvec(TURNED * SIZES * [1, 1, -1], [-4, 5, 60]),
}
UNITS = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}


@pytest.fixture
def write(tmp_path):
    """Writes a NIfTI file with the header fields given, as they are; returns its path."""

    def write(name="case.nii.gz", array=None, sform=None, sform_code=0, qform=None, qform_code=0, unit="mm", **fields):
        image = nib.Nifti1Image(ct_values() if array is None else array, None)
        header = image.header
        header.set_xyzt_units(unit)
        # Each as nibabel writes it, the code by itself: get_best_affine would look at both.
        if qform is not None:
            header.set_qform(qform, code=int(qform_code))
        if sform is not None:
            header.set_sform(sform, code=int(sform_code))
        header["qform_code"], header["sform_code"] = qform_code, sform_code
        header["vox_offset"], header["magic"] = 352, b"n+1"
        for field, value in fields.items():
            header[field] = value
        path = tmp_path / name
        content = header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes(order="F")
        with gzip.open(path, "wb") if name.endswith(".gz") else open(path, "wb") as file:
            file.write(content)
        return path

    return write


def of_sitk(path):
    """The affine to RAS in mm that SimpleITK reads, and whether it reads the file at all."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:  # a sform with a shear
        return None
    matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.diag([-1, -1, 1, 1]) @ from_matvec(matrix, image.GetOrigin())


def rounded(affine, digits):
    return affine if digits is None else np.round(affine, digits)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("codes", list(itertools.product((0, 1, 2, 4), repeat=2)), ids=str)
def test_affine_is_that_of_nibabel_and_simpleitk_where_these_agree(write, orientation, codes):
    """Codes, orientations, roundings of the sform, units, and a qform that is another one."""
    sform_code, qform_code = codes
    affine, agreed = ORIENTATIONS[orientation], 0
    shifted = affine + np.array([[0, 0, 0, 4.0], [0, 0, 0, -3.0], [0, 0, 0, 0], [0, 0, 0, 0]])
    for digits, qform, unit in itertools.product((None, 4, 2), (affine, shifted), UNITS):
        sform = rounded(affine, digits)
        path = write("x.nii", None, sform, sform_code, qform, qform_code, unit)
        ours = np.asarray(read_volume(path, "ct").affine)
        to_mm = np.diag([UNITS[unit]] * 3 + [1])
        if sform_code:
            expected = to_mm @ sform
        elif qform_code:
            expected = to_mm @ qform
        else:
            expected = to_mm @ np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1])
        assert distance_in_voxels(ours, expected, SHAPE) < 1e-3
        theirs, sitks = to_mm @ nib.load(path).affine, of_sitk(path)
        if sitks is not None and distance_in_voxels(theirs, sitks, SHAPE) < 0.01:
            agreed += 1
            assert distance_in_voxels(ours, theirs, SHAPE) < 0.01
    if codes != (0, 0):
        assert agreed >= 6  # of 24: else the comparison would be empty


def test_the_issues_header_lies_where_its_sform_says(write):
    """sform alone, qform_code 0 and a spacing that differs from it: MONAI's reader put it 100 mm away, mirrored."""
    affine = from_matvec(np.diag([-4.8828125, -4.8828125, 3]), [120, 90, -310.5])
    for pixdim in ([1, 4.883, 4.883, 3, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]):
        path = write("x.nii.gz", sform=affine, sform_code=1, pixdim=pixdim)
        volume = read_volume(path, "ct")
        assert np.array_equal(volume.affine, affine)
        assert np.array_equal(volume.meta["original_affine"], affine)
        assert np.array_equal(volume[0].numpy(), ct_values())


@pytest.mark.parametrize("angle", [0, 15])
def test_sform_with_a_scale_or_a_shear_is_kept_and_said(write, angle, caplog):
    shear = np.eye(4)
    shear[1, 2] = np.tan(np.radians(angle))
    affine = shear @ np.diag([5.2, 5.2, 3, 1])
    path = write("x.nii", sform=affine, sform_code=1, qform=np.diag([5.0, 5.2, 3, 1]), qform_code=1)
    with caplog.at_level(logging.WARNING):
        volume = read_volume(path, "ct")
    assert np.allclose(volume.affine, affine, atol=1e-6)
    # 0.2 mm a voxel over 9 voxels, in voxels of 5.2 mm; the shear moves y by 3 tan(15) mm a slice over 13 slices.
    apart = max(9 * 0.2 / 5.2, 13 * 3 * np.tan(np.radians(angle)) / 5.2)
    assert f"lie up to {apart:.3g} voxels apart; the sform is used" in caplog.text
    assert "[5.2, 0.0, 0.0, 0.0]" in caplog.text and "[5.0, 0.0, 0.0, 0.0]" in caplog.text
    assert ("15.0 degrees off right angles" in caplog.text) == bool(angle)


def test_small_differences_of_qform_and_sform_are_not_said(write, caplog):
    near = ORIENTATIONS["oblique"] + 0.0004  # below a tenth of a voxel at the far corner
    path = write("x.nii", sform=near, sform_code=1, qform=ORIENTATIONS["oblique"], qform_code=1)
    with caplog.at_level(logging.WARNING):
        read_volume(path, "ct")
    assert "voxels apart" not in caplog.text


def test_without_any_code_the_spacing_is_used_and_said(write, caplog):
    path = write("x.nii", pixdim=[-1, 0.5, 2, 3, 0, 0, 0, 0])
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_volume(path, "ct").affine, np.diag([0.5, 2, 3, 1]))
    assert f"{path} has neither sform nor qform" in caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sform_code": 77}, ["the sform_code 77", "0 to 5"]),
        ({"qform_code": -1}, ["the qform_code -1", "0 to 5"]),
        ({"xyzt_units": 5}, ["the spatial unit 5", "xyzt_units"]),
        ({"qform_code": 1, "quatern_b": 1.0, "quatern_c": 1.0}, ["cannot be read"]),
        ({"qform_code": 1, "qoffset_x": np.nan}, ["qform that is not finite"]),
    ],
)
def test_wrong_codes_are_refused(write, fields, words):
    path = write("x.nii", **{"pixdim": [1, 1, 1, 1, 0, 0, 0, 0], **fields})
    with pytest.raises(InputError) as error:
        read_volume(path, "ct")
    assert all(word in str(error.value) for word in [str(path), "allowed", *words]), error.value


def test_a_broken_qform_beside_a_sform_is_only_said(write, caplog):
    path = write("x.nii", sform=OBLIQUE, sform_code=1, qform_code=1, quatern_b=1.0, quatern_c=1.0)
    with caplog.at_level(logging.WARNING):
        assert np.allclose(read_volume(path, "ct").affine, OBLIQUE, atol=1e-6)
    assert "no rotation" in caplog.text and "its sform is used" in caplog.text


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("dim", [[3, 2000, 2000, 1000, 1, 1, 1, 1], [3, 30000, 30000, 30000, 1, 1, 1, 1]])
def test_a_header_that_claims_more_than_the_file_holds_costs_no_memory(write, name, dim):
    path = write(name, sform=OBLIQUE, sform_code=1, dim=dim)
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        read_volume(path, "ct")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64e6
    assert f"{path} says that it has {' x '.join(map(str, dim[1:4]))} voxels" in str(error.value)


def test_a_gzip_file_that_was_damaged_inside_is_refused(write):
    path = write("x.nii.gz", sform=OBLIQUE, sform_code=1)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the sum of the content
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read .*CRC"):
        read_volume(path, "ct")


def gzipped(path, content: bytes, at: int | None = None):
    """Written as gzip; with a bit turned at that byte of the file."""
    packed = bytearray(gzip.compress(content))
    if at is not None:
        packed[at] ^= 1
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("read", [read_volume, read_stored])
def test_what_follows_the_voxels_hides_no_damage_and_is_no_fault(write, read, tmp_path):
    """The sum of a gzip file's content is behind all of it."""
    content = gzip.decompress(write("x.nii.gz", sform=OBLIQUE, sform_code=1).read_bytes())
    path, padding = tmp_path / "y.nii.gz", bytes(2**16)
    for at in (None, -8):
        for padded in (content, content + b"\0", content + padding, content + content[352:] * 4):
            gzipped(path, padded, at)
            if at is None:
                found = read(path, "ct")
                assert np.array_equal(found[0] if read is read_volume else found.values, ct_values())
            else:
                with pytest.raises(InputError, match="cannot be read .*CRC"):
                    read(path, "ct")


def test_padding_without_end_is_not_read(write, monkeypatch):
    monkeypatch.setattr(stored, "CHUNK", 4096)
    assert ct_values().nbytes == 3360
    for name in ("x.nii", "x.nii.gz"):
        path = write(name, sform=OBLIQUE, sform_code=1)
        with gzip.open(path, "ab") if name.endswith(".gz") else open(path, "ab") as file:
            file.write(bytes(4096))
        assert np.array_equal(read_volume(path, "ct")[0], ct_values())
        with gzip.open(path, "ab") if name.endswith(".gz") else open(path, "ab") as file:
            file.write(b"\0")
        with pytest.raises(InputError, match=f"{name} says that its voxels take 3360 bytes, .* more than 4096 beyond"):
            read_volume(path, "ct")


def test_a_header_is_not_read_as_voxels(write):
    with pytest.raises(InputError, match="voxels begin at byte 0, inside its header of 348"):
        read_volume(write("x.nii", sform=OBLIQUE, sform_code=1, vox_offset=0), "ct")


def test_time_and_vector_axes_of_one_voxel_leave_three_spacings(write):
    path = write("x.nii", ct_values()[..., None], sform=OBLIQUE, sform_code=1)
    volume = read_volume(path, "ct")
    assert volume.shape == (1, *SHAPE) and volume.affine.shape == (4, 4)
    assert np.allclose(volume.pixdim, np.linalg.norm(OBLIQUE[:3, :3], axis=0))
    assert tuple(volume.meta["spatial_shape"]) == SHAPE


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]], ids=["complex", "colours"])
def test_voxels_that_are_no_numbers_are_refused(tmp_path, dtype):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype), OBLIQUE), tmp_path / "x.nii")
    with pytest.raises(InputError, match="x.nii has voxels of the type (complex64|colours); allowed"):
        read_volume(tmp_path / "x.nii", "ct")
