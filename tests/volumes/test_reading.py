"""Volumes of each format read with their values and geometry; every damaged or wrong file is refused with advice."""

from __future__ import annotations

import errno
import gzip
import json
import struct
import tracemalloc
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from pydicom.dataset import Dataset as Header
from pydicom.uid import generate_uid

from maisi_tools.errors import InputError
from maisi_tools.volumes.reading import ReadVolumed, read_sidecar, read_volume
from maisi_tools.volumes.series import slice_order
from maisi_tools.volumes.stored import last_axis_fastest, read_whole

from .conftest import OBLIQUE, SHAPE, ct_values

FLIPPED = np.array([[0, -1.5, 0, 40], [0, 0, 2, -10], [-1, 0, 0, 5], [0, 0, 0, 1.0]])


def refused(path, *parts, kind="ct"):
    """Reading is refused by one message that holds all the parts."""
    with pytest.raises(InputError) as error:
        read_volume(path, kind)
    for part in (*parts, "allowed"):
        assert part in str(error.value), f"{part!r} is not in {error.value}"


@pytest.mark.parametrize("affine", [OBLIQUE, FLIPPED, np.diag([-0.7, -0.7, 2.5, 1])])
@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii"])
def test_nifti_keeps_values_and_affine(write_nifti, affine, name):
    path = write_nifti(ct_values(), name, affine)
    volume = ReadVolumed("image", kind="ct")({"image": str(path), "other": 1})["image"]
    assert isinstance(volume, MetaTensor) and volume.shape == (1, *SHAPE) and volume.dtype.is_floating_point
    assert np.array_equal(volume[0].numpy(), ct_values())
    assert np.allclose(volume.affine, affine, atol=1e-6)
    assert volume.meta["filename_or_obj"] == str(path)


def test_scaled_and_big_endian_nifti(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(ct_values(), OBLIQUE, header)
    image.header.set_slope_inter(0.5, -1000)  # the constructor drops it; the values stay those stored
    nib.save(image, tmp_path / "x.nii")
    assert np.array_equal(read_volume(tmp_path / "x.nii", "ct")[0].numpy(), ct_values() * 0.5 - 1000)


def test_trailing_axes_of_one_voxel_are_dropped(write_nifti):
    assert read_volume(write_nifti(ct_values()[..., None, None]), "ct").shape == (1, *SHAPE)


def test_nrrd_reads_lps_as_ras(tmp_path):
    lps = np.diag([-1, -1, 1, 1]) @ OBLIQUE
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(tmp_path / "x.nrrd"), ct_values().astype(np.float32) + 0.5, header)
    volume = read_volume(tmp_path / "x.nrrd", "ct")
    assert np.array_equal(volume[0].numpy(), ct_values() + 0.5)
    assert np.allclose(volume.affine, OBLIQUE)


def test_every_format_goes_through_a_data_loader(write_nifti, write_series, tmp_path):
    nrrd_path = tmp_path / "x.nrrd"
    header = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [1, 2, 3], "a:=b": "c"}
    nrrd.write(str(nrrd_path), ct_values(), header)
    paths = [nrrd_path, write_nifti(ct_values()), write_series(ct_values((6, 5, 4)))]
    data = Dataset([{"image": str(path)} for path in paths], transform=ReadVolumed("image", kind="ct"))
    for path, batch in zip(paths, DataLoader(data, batch_size=1), strict=True):
        item = decollate_batch(batch)[0]["image"]
        assert item.meta["filename_or_obj"] == str(path)
        assert np.array_equal(item.affine, read_volume(path, "ct").affine)


NRRD_HEADER = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [1, 2, 3]}


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("LPS", (-1, -1, 1)),
        ("Left-Posterior-Superior", (-1, -1, 1)),
        ("ras", (1, 1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("LAS", (-1, 1, 1)),
        (None, (-1, -1, 1)),
    ],
)
@pytest.mark.parametrize(
    ("units", "mm"), [(None, 1), (["mm"] * 3, 1), (["m"] * 3, 1000), (["cm"] * 3, 10), (["µm"] * 3, 0.001)]
)
def test_nrrd_spaces_and_units(tmp_path, space, signs, units, mm):
    """Every spelling of the format's definition; SimpleITK reads those that it knows to the same place."""
    header = dict(NRRD_HEADER)
    del header["space"]
    if space:
        header["space"] = space
    else:
        header["space dimension"] = 3
    if units:
        header["space units"] = ["um" if unit == "µm" else unit for unit in units]
    path = tmp_path / "x.nrrd"
    nrrd.write(str(path), ct_values(), header)
    if units == ["µm"] * 3:
        path.write_bytes(path.read_bytes().replace(b'"um"', '"µm"'.encode()))
    expected = mm * np.array([signs[0] * 1.0, signs[1] * 2.0, signs[2] * 3.0])
    affine = np.asarray(read_volume(path, "ct").affine)
    assert np.allclose(affine[:3, 3], expected) and np.allclose(affine[:3, :3], mm * np.diag(signs))
    if units in (None, ["mm"] * 3):
        image = sitk.ReadImage(str(path))
        assert np.allclose(np.array([-1, -1, 1]) * image.GetOrigin(), affine[:3, 3])


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "text"])
def test_nrrd_encodings_and_detached_data(tmp_path, encoding):
    path = tmp_path / "x.nrrd"
    nrrd.write(str(path), ct_values(), {**NRRD_HEADER, "encoding": encoding})
    assert np.array_equal(read_volume(path, "ct")[0].numpy(), ct_values())
    nrrd.write(str(tmp_path / "y.nhdr"), ct_values(), {**NRRD_HEADER, "encoding": encoding}, detached_header=True)
    (tmp_path / "y.nhdr").rename(tmp_path / "y.nrrd")
    assert np.array_equal(read_volume(tmp_path / "y.nrrd", "ct")[0].numpy(), ct_values())


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.raw", "sub/../../secret.raw", "LIST", "x%02d.raw 1 3 1"])
def test_nrrd_reads_no_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(ct_values().tobytes(order="F"))
    path = folder / "x.nrrd"
    nrrd.write(str(path), ct_values(), {**NRRD_HEADER, "encoding": "raw"})
    header = path.read_bytes().split(b"\n\n")[0]
    path.write_bytes(header + f"\ndata file: {name}\n\n".encode())
    refused(path, str(path), f"the data file '{name}'", "beside")


def test_nrrd_that_claims_more_or_less_than_it_holds(tmp_path):
    path = tmp_path / "x.nrrd"
    for encoding in ("raw", "gzip", "text"):
        nrrd.write(str(path), ct_values(), {**NRRD_HEADER, "encoding": encoding})
        content = path.read_bytes()
        for sizes in (b"sizes: 2000 2000 1000", b"sizes: 30000 30000 30000"):
            path.write_bytes(content.replace(b"sizes: 10 12 14", sizes))
            tracemalloc.start()
            refused(path, f"{path} says that it has {sizes[7:].decode().replace(' ', ' x ')} voxels")
            assert tracemalloc.get_traced_memory()[1] < 64e6
            tracemalloc.stop()
        path.write_bytes(content.replace(b"sizes: 10 12 14", b"sizes: 10 12 13"))
        refused(path, "10 x 12 x 13 voxels, and holds")
        path.write_bytes(content.replace(b"sizes: 10 12 14", b"sizes: 10 12 -14"))
        refused(path, "the sizes [10, 12, -14]")


def test_nrrd_axis_without_a_direction_is_dropped_where_it_is_one_voxel(tmp_path):
    path = tmp_path / "x.nrrd"
    directions = np.vstack([[np.nan] * 3, np.diag([2.0, 3, 4])])
    nrrd.write(str(path), ct_values()[None], {**NRRD_HEADER, "space directions": directions})
    volume = read_volume(path, "ct")
    assert np.array_equal(volume[0].numpy(), ct_values()) and volume.pixdim.tolist() == [2, 3, 4]
    nrrd.write(str(path), np.stack([ct_values()] * 2), {**NRRD_HEADER, "space directions": directions})
    refused(path, "4D image of shape (10, 12, 14, 2)", "split it")


def test_nrrd_without_a_usable_geometry(tmp_path):
    path = tmp_path / "x.nrrd"
    nrrd.write(str(path), ct_values(), {"spacings": [1, 1, 1]})
    refused(path, "no space directions and no space origin", "export it")
    header = {"space directions": np.eye(3), "space origin": [0, 0, 0]}
    nrrd.write(str(path), ct_values(), {**header, "space": "scanner-xyz"})
    refused(path, "the space 'scanner-xyz'", "left-posterior-superior", "convert")
    nrrd.write(str(path), ct_values(), {**header, "space directions": np.diag([1, 1, 0])})
    refused(path, "the spacing 1 x 1 x 0 mm", "correct the header")


def test_dicom_series_has_hu_and_geometry(write_series):
    hu = ct_values((6, 5, 9))
    folder = write_series(hu)
    (folder / "README.txt").write_text("not DICOM")
    (folder / "sub").mkdir()
    volume = read_volume(folder, "ct")
    assert np.array_equal(volume[0].numpy(), hu)
    # LPS position (-10, 20, 5) is RAS (10, -20, 5); columns run to the left, rows to the back.
    expected = np.array([[-0.7, 0, 0, 10], [0, -0.9, 0, -20], [0, 0, 10 / 3, 5], [0, 0, 0, 1]])
    assert np.allclose(volume.affine, expected, atol=1e-4)
    assert volume.meta["filename_or_obj"] == str(folder)


def test_dicom_series_in_a_folder_with_brackets(write_series):
    assert read_volume(write_series(ct_values((6, 5, 4)), "CT [1]"), "ct").shape == (1, 6, 5, 4)


def test_tilted_gantry_keeps_its_shear(write_series, tmp_path):
    import pydicom

    folder = write_series(ct_values((6, 5, 4)), step=2.0)
    for file in folder.iterdir():
        ds = pydicom.dcmread(file)
        ds.ImagePositionPatient = [-10, 20 + 0.5 * (ds.ImagePositionPatient[2] - 5), ds.ImagePositionPatient[2]]
        ds.save_as(file)
    assert np.allclose(read_volume(folder, "ct").affine[:3, 2], [0, -1, 2], atol=1e-4)


def test_dicom_refusals(write_series, tmp_path):
    hu = ct_values((6, 5, 9))
    refused(write_series(hu, "gap", step=2.5, skip=[4]), "a gap of 5.00 mm", "at 12.50 and 17.50 mm", "2.50 mm apart")
    refused(write_series(hu, "shift", step=2.5, shift=0.05), "a gap of 2.55 mm")
    assert read_volume(write_series(hu, "rounded", step=2.5, shift=0.01), "ct").shape == (1, 6, 5, 9)
    refused(write_series(hu, "one", skip=range(1, 9)), "holds one DICOM slice", "give the whole series")
    refused(write_series(hu, "mr", modality="MR"), "modality MR", "CT")
    refused(write_series(hu, "twice", ImagePositionPatient=[0, 0, 0]), "two DICOM slices at the position 0.00 mm")
    refused(write_series(hu, "noslope", RescaleIntercept=0), "none below 0", "rescale intercept")
    uids = [generate_uid(), generate_uid()]
    for uid in uids:
        folder = write_series(hu, "several", uid=uid)
    refused(folder, *uids, "holds 2 DICOM series", "axial several, 9 slices", "put each into a folder of its own")
    refused(tmp_path, "is a folder and holds no DICOM series")
    truncated = write_series(hu, "truncated")
    file = next(truncated.iterdir())
    file.write_bytes(file.read_bytes()[:-20])
    refused(truncated, "truncated cannot be read", "again")
    refused(write_series(hu, "as_mask"), "is a folder", kind="mask")


def test_dicom_without_positions_or_with_unlike_slices(tmp_path):
    with pytest.raises(InputError, match="2 DICOM files and no image slice.*allowed is one series of CT,"):
        slice_order(tmp_path, [Header(), Header()])
    headers = []
    for k, rows in enumerate((5, 5, 6)):
        header = Header()
        header.Rows, header.Columns, header.PixelSpacing = rows, 5, [1, 1]
        header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, -k], [1, 0, 0, 0, 1, 0]
        headers.append(header)
    with pytest.raises(InputError, match="slices whose Rows is 5, 6; allowed is one value"):
        slice_order(tmp_path, headers)
    assert slice_order(tmp_path, headers[:2]) == [1, 0]
    del headers[0].PixelSpacing, headers[1].PixelSpacing
    with pytest.raises(InputError, match="slices whose PixelSpacing is None; allowed"):
        slice_order(tmp_path, headers[:2])


def test_missing_and_unsupported_files(tmp_path):
    refused(tmp_path / "gone.nii.gz", "gone.nii.gz does not exist", ".nii", "correct the path")
    (tmp_path / "x.mha").touch()
    refused(tmp_path / "x.mha", "unsupported file type", "convert it to NIfTI")
    (tmp_path / "x.nrrd").touch()
    refused(tmp_path / "x.nrrd", "unsupported file type", ".nii or .nii.gz", kind="latent")
    refused(tmp_path / "x.nrrd", "cannot be read")
    (tmp_path / "e.nii.gz").touch()
    refused(tmp_path / "e.nii.gz", "cannot be read")
    with pytest.raises(ValueError, match="kind is 'pet'; allowed are ct, mask, latent"):
        ReadVolumed("image", kind="pet")


def test_text_named_as_nifti(tmp_path):
    (tmp_path / "x.nii.gz").write_text("this is a letter\n" * 100)
    refused(tmp_path / "x.nii.gz", "x.nii.gz cannot be read", "intact NIfTI", "copy or export the file again")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("name", ["case.nii.gz", "case.nii", "case.nrrd"])
def test_truncated_files(write_nifti, tmp_path, keep, name):
    if name.endswith("nrrd"):
        path = tmp_path / name
        nrrd.write(str(path), ct_values(), {"space directions": np.eye(3), "space origin": [0, 0, 0]})
    else:
        path = write_nifti(np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(path, str(path), "copy or export the file again")


@pytest.mark.parametrize("kind", ["ct", "mask"])
def test_2d_and_4d(write_nifti, kind):
    refused(write_nifti(ct_values()[:, :, 0]), "2D image of shape (10, 12)", "3D volume", kind=kind)
    refused(write_nifti(ct_values()[:, :, :1]), "(10, 12, 1)", "3D volume", kind=kind)
    four = np.stack([ct_values()] * 3, axis=-1)
    refused(write_nifti(four), "4D image of shape (10, 12, 14, 3)", "3D volume", "split it", kind=kind)


def test_not_finite_and_not_hounsfield(write_nifti):
    values = ct_values().astype(np.float32)
    values[0, 0, :5], values[1, 1, 1] = np.nan, np.inf
    refused(write_nifti(values), "5 NaN and 1 infinite voxels of 1680", "replace them")
    scaled = write_nifti(np.linspace(0, 1, 1680, dtype=np.float32).reshape(SHAPE))
    refused(scaled, "from 0 to 1, as after normalisation", "Hounsfield")
    assert read_volume(scaled, "ct", intensity_check=False).max() == 1
    refused(write_nifti((ct_values() % 256).astype(np.uint8)), "from 0 to 255, as in an 8-bit picture")
    refused(write_nifti(ct_values() + 1024), "none below 0", "rescale intercept")


@pytest.mark.parametrize("spacing", [0.0, -2.5, float("nan"), float("inf")])
@pytest.mark.parametrize("sform", [0, 1])
@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz"])
def test_spacing_that_is_none(write_nifti, spacing, sform, name):
    path = write_nifti(ct_values(), name)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "rb") as file:
        content = bytearray(file.read())
    # NIfTI-1 header: pixdim[3] is the float at byte 76 + 3 * 4, qform_code and sform_code are the shorts at 252, 254.
    content[88:92] = struct.pack("<f", spacing)
    content[252:256] = struct.pack("<hh", 0, sform)
    with opened(path, "wb") as file:
        file.write(content)
    refused(path, "the spacing", f"x {spacing:g} mm", "positive finite", "set_zooms")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_degenerate_sform(write_nifti, value):
    path = write_nifti(ct_values(), "case.nii")
    content = bytearray(path.read_bytes())
    for row in range(3):  # srow_x, srow_y, srow_z from byte 280, the third of four floats of each
        content[280 + 16 * row + 8 : 280 + 16 * row + 12] = struct.pack("<f", value)
    path.write_bytes(content)
    refused(path, "three independent axes", "correct the header")


def test_masks(write_nifti):
    labels = (ct_values() % 200 + 1).astype(np.uint8)
    assert np.array_equal(read_volume(write_nifti(labels), "mask")[0].numpy(), labels)
    refused(write_nifti(labels * np.float32(0.25)), "no whole number", "nearest neighbour", kind="mask")
    refused(write_nifti(labels.astype(np.int16) - 5), "negative voxels: -4, -3, -2, -1", "from 0 on", kind="mask")


def spacing_of(latent: Path, factor: int) -> list[float]:
    """Spacing in mm of the image that a latent with this header stands for."""
    return [float(mm) / factor for mm in np.linalg.norm(nib.load(latent).affine[:3, :3], axis=0)]


def test_latent_with_its_sidecar(write_nifti):
    values = np.random.default_rng(0).normal(size=(3, 4, 5, 4)).astype(np.float32)
    path = write_nifti(values, "case_latent.nii.gz")
    needed = {"scale_factor": 1.25, "size": [12, 16, 18], "spacing": spacing_of(path, 4)}
    sidecar = {**needed, "region": ["head", "chest"], "modality": None}
    with pytest.raises(InputError, match=r"has no sidecar case_latent\.json beside it; a latent needs one: keep"):
        read_volume(path, "latent")
    beside = path.with_name("case_latent.json")
    beside.write_text("{")
    refused(path, "case_latent.json cannot be read as JSON", "keep the .json", kind="latent")
    beside.write_text("[1]")
    refused(path, "holds a list", kind="latent")
    beside.write_text(json.dumps({"size": [12, 16, 18], "spacing": None}))
    refused(path, "has no spacing, scale_factor", kind="latent")
    beside.write_text(json.dumps(sidecar))
    assert read_sidecar(path) == sidecar
    data = Dataset([{"image": str(path)}], transform=ReadVolumed("image", kind="latent"))
    batch = next(iter(DataLoader(data, batch_size=1)))
    assert batch["image"].shape == (1, 4, 3, 4, 5)
    item = decollate_batch(batch)[0]["image"]
    assert np.array_equal(item.numpy(), np.moveaxis(values, -1, 0))
    assert item.meta["sidecar"] == {**needed, "region": ["head", "chest"], "factor": 4}  # of before it was recorded
    assert np.allclose(item.affine, OBLIQUE, atol=1e-6)


def test_a_latent_has_to_cover_the_image_of_its_sidecar(write_nifti):
    path = write_nifti(np.zeros((3, 4, 5, 4), dtype=np.float32), "case_latent.nii.gz")
    sidecar = {"scale_factor": 1.0, "size": [6, 7, 10], "spacing": spacing_of(path, 2), "factor": 2}
    path.with_name("case_latent.json").write_text(json.dumps(sidecar))
    assert read_volume(path, "latent").meta["sidecar"] == sidecar
    path.with_name("case_latent.json").write_text(json.dumps({**sidecar, "size": [6, 9, 10]}))
    refused(path, "(3, 4, 5) voxels", "factor 2 cover (6, 8, 10)", "says (6, 9, 10)", kind="latent")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 0}, "the factor 0"),
        ({"factor": 2.0}, "the factor 2.0"),
        ({"factor": "2"}, "the factor '2'"),
        ({"factor": True}, "the factor True"),
        ({"factor": [2]}, r"the factor \[2\]"),
        ({"scale_factor": 0}, "scale_factor 0; allowed is a finite number above 0"),
        ({"scale_factor": -1.0}, "scale_factor -1.0"),
        ({"scale_factor": "1.0"}, "scale_factor '1.0'"),
        ({"scale_factor": True}, "scale_factor True"),
        ({"scale_factor": [1.0]}, r"scale_factor \[1.0\]"),
        ({"scale_factor": float("nan")}, "scale_factor nan"),
        ({"scale_factor": float("inf")}, "scale_factor inf"),
        ({"size": [6, 7]}, r"the size \[6, 7\]"),
        ({"size": [6, 7, 0]}, r"the size \[6, 7, 0\]"),
        ({"size": [6, 7, -1]}, "three positive whole numbers"),
        ({"size": [6.0, 7, 10]}, "three positive whole numbers"),
        ({"size": "678"}, "the size '678'"),
        ({"size": 6}, "the size 6"),
        ({"size": [6, 7, 9], "factor": 60}, "less by 128 at most"),
        ({"spacing": [1.0, 1.0]}, r"the spacing \[1.0, 1.0\]"),
        ({"spacing": [1.0, 1.0, "2"]}, "own grid"),
        ({"spacing": [-1.0, 1.0, 1.0]}, "own grid"),
        ({"spacing": [9.0, 9.0, 9.0]}, "own grid and the factor 2 give"),
        ({"spacing": {"x": 1}}, "own grid"),
        ({"orientation": "RAX"}, "the orientation 'RAX'; allowed are three letters"),
        ({"orientation": "RLS"}, "the orientation 'RLS'"),
        ({"orientation": "RASA"}, "the orientation 'RASA'"),
        ({"orientation": 3}, "the orientation 3"),
        ({"region": "head"}, "the region 'head'; allowed is a list of names"),
        ({"region": [3]}, r"the region \[3\]"),
    ],
)
def test_a_sidecar_that_cannot_be_is_refused(write_nifti, change, words):
    path = write_nifti(np.zeros((3, 4, 5, 4), dtype=np.float32), "case_latent.nii.gz")
    sidecar = {"scale_factor": 1.0, "size": [6, 7, 10], "spacing": spacing_of(path, 2), "factor": 2}
    path.with_name("case_latent.json").write_text(json.dumps({**sidecar, "orientation": "PIL", "region": []}))
    assert read_volume(path, "latent").meta["sidecar"]["orientation"] == "PIL"
    path.with_name("case_latent.json").write_text(json.dumps({**sidecar, **change}))
    with pytest.raises(InputError, match=words):
        read_volume(path, "latent")


def test_latent_with_the_wrong_channel_count(write_nifti):
    refused(write_nifti(np.zeros((3, 4, 5, 3))), "(3, 4, 5, 3)", "(x, y, z, 4)", "encode config", kind="latent")
    refused(write_nifti(np.zeros((3, 4, 5))), "(3, 4, 5)", "4 channels", kind="latent")
    refused(write_nifti(np.zeros((3, 4, 5, 1))), "4 channels", kind="latent")


def test_a_disk_that_fails_is_told_from_a_damaged_file():
    def failing(error):
        raise error

    for number in (errno.EIO, errno.ESTALE):
        with pytest.raises(OSError) as raised:
            read_whole("a.nii", lambda number=number: failing(OSError(number, "")))
        assert raised.value.errno == number
    for error in (OSError("Not a gzipped file"), OSError(errno.EINVAL, "Invalid argument"), EOFError(), KeyError(1)):
        with pytest.raises(InputError, match="a.nii cannot be read .* allowed is an intact NIfTI or NRRD"):
            read_whole("a.nii", lambda error=error: failing(error))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 4, 5), (1, 3, 4, 5), (0, 2, 3)])
def test_the_order_of_axes_in_memory_changes_no_value(shape):
    array = np.random.default_rng(0).integers(0, 9, shape).astype(np.int16)
    for given in (array, np.asfortranarray(array), array[..., ::-1] if array.ndim else array):
        found = last_axis_fastest(given)
        assert found.flags.c_contiguous and found.dtype == given.dtype
        np.testing.assert_array_equal(found, given)
    assert last_axis_fastest(array) is array or array.ndim < 3
