"""What is written reads back bit for bit, and a failure leaves no file behind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import CheckStoredd, WriteVolumed, write_shard, write_sidecar, write_volume

from .conftest import OBLIQUE, SHAPE, ct_values

ROTATED = np.array([[0, -1.5, 0, 40], [0, 0, 2, -10], [-0.7, 0, 0, 5], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("affine", [OBLIQUE, ROTATED, np.diag([-0.7, -0.7, 2.5, 1]), np.diag([1, -1, -3, 1.0])])
def test_affine_survives_reading_and_writing_bit_for_bit(write_nifti, tmp_path, affine):
    first = write_nifti(ct_values(), "first.nii.gz", affine)
    volume = read_volume(first, "ct")
    second = write_volume(tmp_path / "second.nii.gz", volume[0].numpy(), volume.affine)
    assert np.array_equal(nib.load(second).affine, nib.load(first).affine)
    assert np.array_equal(np.asarray(nib.load(second).dataobj), ct_values())


def test_header_of_a_plain_and_of_a_sheared_grid(tmp_path):
    header = nib.load(write_volume(tmp_path / "a.nii.gz", ct_values(), ROTATED)).header
    assert header.get_xyzt_units()[0] == "mm" and header.get_data_dtype() == np.int16
    assert np.allclose(header.get_qform(), ROTATED, atol=1e-5) and np.allclose(header.get_sform(), ROTATED, atol=1e-6)
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert np.allclose(header.get_zooms(), (0.7, 1.5, 2))
    sheared = nib.load(write_volume(tmp_path / "b.nii.gz", ct_values(), OBLIQUE)).header
    assert (int(sheared["qform_code"]), int(sheared["sform_code"])) == (0, 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int32, np.uint32, np.float64])
def test_every_type_of_an_nrrd_can_be_written(tmp_path, kind):
    """nibabel refuses 64-bit integers whose type it is not told: an edit of such a file died at its end."""
    values = np.arange(8).reshape(2, 2, 2).astype(kind) * 2**20
    stored = nib.load(write_volume(tmp_path / "a.nii.gz", values, np.eye(4), kind))
    assert stored.get_data_dtype() == kind and np.array_equal(np.asarray(stored.dataobj), values)


def test_integers_are_rounded_and_clipped(tmp_path):
    values = np.array([-1000.5, -999.6, 0.4, 1.5, 40000, -40000, 30.51, -0.2], dtype=np.float32).reshape(2, 2, 2)
    stored = np.asarray(nib.load(write_volume(tmp_path / "a.nii.gz", values, np.eye(4))).dataobj)
    assert stored.ravel().tolist() == [-1000, -1000, 0, 2, 32767, -32768, 31, 0]
    wide = np.array([-3, 300], dtype=np.int16).reshape(1, 1, 2)
    stored = np.asarray(nib.load(write_volume(tmp_path / "b.nii.gz", wide, np.eye(4), np.uint8)).dataobj)
    assert stored.ravel().tolist() == [0, 255]
    for kind, limit in ((np.int16, 250), (np.int8, 127), (np.int32, 250)):
        small = np.array([0, 250], dtype=np.uint8).reshape(1, 1, 2)
        stored = np.asarray(nib.load(write_volume(tmp_path / "b.nii.gz", small, np.eye(4), kind)).dataobj)
        assert stored.dtype == kind and stored.ravel().tolist() == [0, limit]
    huge = np.array([-1e12, 1e12]).reshape(1, 1, 2)
    stored = np.asarray(nib.load(write_volume(tmp_path / "b.nii.gz", huge, np.eye(4), np.int32)).dataobj)
    assert stored.ravel().tolist() == [-(2**31), 2**31 - 1]
    exact = nib.load(write_volume(tmp_path / "c.nii.gz", values, np.eye(4), np.float32))
    assert np.array_equal(np.asarray(exact.dataobj), values)


def test_same_arguments_same_bytes(tmp_path):
    files = [write_volume(tmp_path / name, ct_values(), OBLIQUE) for name in ("a.nii.gz", "another_name.nii.gz")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(2, 3\); allowed is \(X, Y, Z\)"):
        write_volume(tmp_path / "a.nii.gz", np.zeros((2, 3)), np.eye(4))
    with pytest.raises(ValueError, match="not finite cannot be stored as int16"):
        write_volume(tmp_path / "a.nii.gz", np.full((2, 3, 4), np.nan), np.eye(4))
    with pytest.raises(OSError):
        write_volume(Path(__file__) / "a.nii.gz", ct_values(), np.eye(4))
    with pytest.raises(TypeError):
        write_sidecar(tmp_path / "a.nii.gz", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_sidecar_is_strict_json_with_sorted_keys(tmp_path):
    content = {
        "b": torch.tensor([1.5, 2]),
        "a": np.float32(0.5),
        "c": {"n": math.inf, 1: (np.int64(3), math.nan)},
        "d": tmp_path,
    }
    path = write_sidecar(tmp_path / "case.v1.nii.gz", content)
    assert path.name == "case.v1.json"
    assert list(json.loads(path.read_text())) == ["a", "b", "c", "d"]
    expected = {"a": 0.5, "b": [1.5, 2.0], "c": {"1": [3, None], "n": None}, "d": str(tmp_path)}
    assert json.loads(path.read_text()) == expected


def test_transform_writes_ct_latent_and_sidecar(write_nifti, tmp_path, caplog):
    ct = read_volume(write_nifti(ct_values()), "ct")
    latent = MetaTensor(
        torch.randn(4, 3, 4, 5), affine=torch.as_tensor(OBLIQUE), meta={"filename_or_obj": ct.meta["filename_or_obj"]}
    )
    with caplog.at_level(logging.INFO):
        item = WriteVolumed("ct", tmp_path / "out", "_recon")({"ct": ct})
    path = tmp_path / "out" / "case_recon.nii.gz"
    assert item["ct_path"] == str(path) and item["ct"] is ct and f"wrote {path}" in caplog.text
    assert np.array_equal(np.asarray(nib.load(path).dataobj), ct_values())
    assert np.array_equal(nib.load(path).affine, nib.load(tmp_path / "case.nii.gz").affine)
    mm = (np.linalg.norm(OBLIQUE[:3, :3], axis=0) / 4).tolist()
    write = WriteVolumed(
        "z", tmp_path / "out", "_latent", np.float32, sidecar=["scale_factor", "size", "spacing"], stem_key="name"
    )
    item = write(
        {
            "z": latent,
            "scale_factor": torch.tensor(1.25),
            "size": (12, 16, 20),
            "spacing": mm,
            "name": "sample_1.5",
        }
    )
    again = read_volume(item["z_path"], "latent")
    assert item["z_path"].endswith("sample_1.5_latent.nii.gz")
    assert torch.equal(again.as_tensor(), latent.as_tensor())
    assert again.meta["sidecar"] == {"scale_factor": 1.25, "size": [12, 16, 20], "spacing": mm, "factor": 4}
    WriteVolumed("z", tmp_path / "out", sidecar={"modality": "ct"}, dtype=np.float32)({"z": latent.bfloat16()})
    assert json.loads((tmp_path / "out" / "case.json").read_text()) == {"modality": "ct"}
    names = ["case.json", "case.nii.gz", "case_recon.nii.gz", "sample_1.5_latent.json", "sample_1.5_latent.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj).shape == (3, 4, 5, 4)


def test_absent_keys(write_nifti, tmp_path):
    ct = read_volume(write_nifti(ct_values()), "ct")
    written = WriteVolumed(["ct", "latent"], tmp_path / "out", allow_missing_keys=True)({"ct": ct})
    assert set(written) == {"ct", "ct_path"}
    with pytest.raises(KeyError):
        WriteVolumed("latent", tmp_path / "out")({"ct": ct})


def test_what_an_earlier_run_wrote_for_a_key_that_is_absent_now_is_removed(tmp_path):
    write = WriteVolumed(
        "latent", tmp_path, "_latent", stem_key="name", sidecar={"scale_factor": 1}, allow_missing_keys=True
    )
    latent = MetaTensor(torch.zeros(4, 2, 2, 2), affine=torch.eye(4))
    for name in ("one", "two"):
        write({"latent": latent, "name": name})
    write({"name": "one"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two_latent.json", "two_latent.nii.gz"]
    (tmp_path / "two_latent.json").unlink()  # as a file that is the user's own
    write({"name": "two"})
    assert (tmp_path / "two_latent.nii.gz").exists()


@pytest.mark.parametrize("dtype", ["foo", "complex64", "float16", "bool", 3])
def test_a_type_that_nifti_does_not_have_is_refused(tmp_path, dtype):
    with pytest.raises(InputError, match=f"stored voxels is {dtype!r}; allowed are .* int16"):
        WriteVolumed("ct", tmp_path, dtype=dtype)


def test_transform_takes_the_stem_of_a_series(write_series, tmp_path):
    ct = read_volume(write_series(ct_values((6, 5, 4)), "study 1"), "ct")
    assert WriteVolumed("ct", tmp_path / "out")({"ct": ct})["ct_path"] == str(tmp_path / "out" / "study 1.nii.gz")


def test_failed_write_leaves_no_volume(tmp_path):
    bad = MetaTensor(torch.full((1, *SHAPE), torch.nan), meta={"filename_or_obj": "a.nii"})
    with pytest.raises(ValueError, match="not finite"):
        WriteVolumed("ct", tmp_path / "out")({"ct": bad})
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "part", "first", "message"),
    [
        ("ct.nii.gz", (4, 5, 2), 0, r"uncompressed.*name it \.nii"),
        ("ct.nii", (4, 4, 2), 0, "does not fit"),
        ("ct.nii", (4, 5, 2), 5, "does not fit"),
        ("ct.nii", (4, 5, 2), -1, "does not fit"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, name, part, first, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / name, np.zeros(part), first, 2, (4, 5, 6), np.eye(4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "intensity", "fits"),
    [
        ("int16", None, True),  # a CT
        ("float32", [0.0, 1.0], True),
        ("int16", [0.0, 1000.0], True),
        ("uint16", [0.0, 4000.0], True),
        ("int16", [0.0, 1.0], False),
        ("int16", [0.0, 40000.0], False),
        ("uint8", None, False),
        ("uint16", None, False),
    ],
)
def test_a_type_that_cannot_hold_the_values_is_refused(dtype, intensity, fits):
    meta = {"filename_or_obj": "x_latent.nii.gz", "sidecar": {} if intensity is None else {"intensity": intensity}}
    data = {"image": MetaTensor(torch.zeros(1, 2, 2, 2), meta=meta)}
    check = CheckStoredd("image", dtype)
    if fits:
        assert check(data).keys() == data.keys()
    else:
        with pytest.raises(
            InputError, match=f"x_latent.nii.gz has values from .* and output_dtype is {dtype}; allowed"
        ):
            check(data)
