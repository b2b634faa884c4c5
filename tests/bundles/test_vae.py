"""Stage 1: reconstruction, encoding and decoding through the configs."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest


def test_inference_keeps_geometry_and_reports_metrics(run_bundle, save, phantom_ct, tmp_path):
    # odd size, left-posterior-superior and oblique: nothing about the file may change but the intensities
    odd = phantom_ct[1:, :-3, 2:]
    affine = np.array([[-4.9, 0.3, 0, 90], [0.3, -4.9, 0, 80.5], [0, 0, 3.4, -70.25], [0, 0, 0, 1]])
    path = save(odd, "odd.nii.gz", affine)
    run_bundle("maisi_vae", "inference.json", input=str(path), output_dir=str(tmp_path / "out"))

    result = nib.load(tmp_path / "out" / "odd_recon.nii.gz")
    assert result.shape == odd.shape
    np.testing.assert_array_equal(result.affine, nib.load(path).affine)
    hu = np.asarray(result.dataobj)
    metrics = json.loads((tmp_path / "out" / "odd_recon.json").read_text())["metrics"]
    mse = np.mean((hu.astype(float) - odd) ** 2)
    assert metrics["psnr"] == pytest.approx(10 * np.log10(2000**2 / mse), abs=0.02)  # HU are rounded in the file
    assert metrics["psnr"] > 15, "the shipped weights should reconstruct a phantom recognisably"
    assert 0 < metrics["ssim"] <= 1 and "psnr_body" in metrics and "ssim_body" in metrics


def test_encode_then_decode_equals_inference(run_bundle, save, phantom_ct, tmp_path):
    path = save(phantom_ct[:, ::-1][:45], "case.nii.gz", np.diag([5.0, -5.0, 3.4, 1.0]))
    run_bundle("maisi_vae", "inference.json", input=str(path), output_dir=str(tmp_path / "whole"))
    run_bundle("maisi_vae", "encode.json", input=str(path), output_dir=str(tmp_path / "latents"), multiple=2)
    latent = nib.load(tmp_path / "latents" / "case_latent.nii.gz")
    assert latent.shape == (23, 24, 24, 4)
    sidecar = json.loads((tmp_path / "latents" / "case_latent.json").read_text())
    assert sidecar["size"] == [45, 48, 48] and sidecar["scale_factor"] == 1

    latent_file = str(tmp_path / "latents" / "case_latent.nii.gz")
    run_bundle("maisi_vae", "decode.json", input=latent_file, output_dir=str(tmp_path / "decoded"))
    whole = nib.load(tmp_path / "whole" / "case_recon.nii.gz")
    decoded = nib.load(tmp_path / "decoded" / "case_latent_ct.nii.gz")
    np.testing.assert_array_equal(np.asarray(decoded.dataobj), np.asarray(whole.dataobj))
    np.testing.assert_allclose(decoded.affine, whole.affine, atol=1e-5)
    assert json.loads((tmp_path / "decoded" / "case_latent_ct.json").read_text()) == {"from_scan": True}


def test_encode_can_resample_and_pad(run_bundle, ct_file, tmp_path):
    run_bundle(
        "maisi_vae", "encode.json", input=str(ct_file), output_dir=str(tmp_path), multiple=16, spacing=[6.0, 6.0, 4.0]
    )
    sidecar = json.loads((tmp_path / "head_ct_latent.json").read_text())
    assert sidecar["spacing"] == [6.0, 6.0, 4.0]
    assert all(n % 4 == 0 for n in nib.load(tmp_path / "head_ct_latent.nii.gz").shape[:3])


def test_folder_of_volumes(run_bundle, save, phantom_ct, tmp_path):
    for name in ("b.nii.gz", "a.nii.gz"):
        save(phantom_ct[:32, :32, :32], name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier_recon.json").write_text('{"metrics": {"psnr": 0}}')  # is no case of this run
    run_bundle(
        "maisi_vae", ["inference.json", "evaluate.json"], input=str(tmp_path / "in"), output_dir=str(tmp_path / "out")
    )
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a_recon.nii.gz", "b_recon.nii.gz"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["psnr"]["cases"] == 2


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.random.default_rng(0).random((16, 16, 16)).astype(np.float32), "Hounsfield"),
        (np.full((16, 16, 16), np.nan, dtype=np.float32), "has 4096 NaN and 0 infinite voxels of 4096"),
        (np.zeros((16, 16), dtype=np.int16), "is a 2D image of shape (16, 16)"),
    ],
)
def test_bad_volume_is_refused_before_computing(cause, run_bundle, save, tmp_path, array, words):
    path = save(array, "bad.nii.gz")
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_vae", "inference.json", input=str(path), output_dir=str(tmp_path / "out"))
    message = str(cause(raised.value))
    assert "bad.nii.gz" in message and words in message
    assert not list((tmp_path / "out").glob("*"))


def test_bad_among_good_stops_before_anything_is_written(cause, run_bundle, save, phantom_ct, tmp_path):
    save(phantom_ct, "a_good.nii.gz")
    save(np.zeros((16, 16), dtype=np.int16), "b_bad.nii.gz")
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_vae", "inference.json", input=str(tmp_path / "in"), output_dir=str(tmp_path / "out"))
    assert "b_bad" in str(cause(raised.value))
    assert not list((tmp_path / "out").glob("*"))
