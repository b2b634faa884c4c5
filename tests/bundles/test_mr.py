"""MR through the stages: scaled by its percentiles, encoded, decoded, generated."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

AFFINE = np.array([[-4.9, 0.3, 0, 90], [0.3, -4.9, 0, 80.5], [0, 0, 3.4, -70.25], [0, 0, 0, 1]])
MR = ["mr.json"]
EDIT = ["inference.json", "edit.json"]


@pytest.fixture
def mr(phantom_labels) -> np.ndarray:
    """A T1-like phantom of scanner units from 0 to about 3 million: fat bright, bone and air dark."""
    tissue = np.zeros(256)
    tissue[1:], tissue[200], tissue[120], tissue[132] = 600, 900, 100, 20
    noise = np.random.default_rng(0).rayleigh(20, phantom_labels.shape)
    return ((tissue[phantom_labels] + noise) * 2000).astype(np.float32)[1:, :-3, 2:]


def test_decoding_what_was_encoded_is_the_reconstruction(run_bundle, save, mr, tmp_path):
    path = save(mr, "t1.nii.gz", AFFINE)
    run_bundle("maisi_vae", ["inference.json", *MR], input=str(path), output_dir=str(tmp_path / "whole"))
    latents = {"multiple": 2, "modality": "mri_t1", "output_dir": str(tmp_path / "latents")}
    run_bundle("maisi_vae", ["encode.json", *MR], input=str(path), **latents)
    sidecar = json.loads((tmp_path / "latents" / "t1_latent.json").read_text())
    assert sidecar["modality"] == "mri_t1" and json.loads(sidecar["settings"])["window"] == [0, 99.5]
    low, high = mr.min(), np.percentile(mr, 99.5)
    np.testing.assert_allclose(sidecar["intensity"], [low, high], rtol=1e-6)

    latent = str(tmp_path / "latents" / "t1_latent.nii.gz")
    run_bundle("maisi_vae", ["decode.json", *MR], input=latent, output_dir=str(tmp_path / "decoded"))
    whole = nib.load(tmp_path / "whole" / "t1_recon.nii.gz")
    decoded = nib.load(tmp_path / "decoded" / "t1_latent_ct.nii.gz")
    np.testing.assert_array_equal(np.asarray(decoded.dataobj), np.asarray(whole.dataobj))
    np.testing.assert_allclose(decoded.affine, AFFINE, atol=1e-4)

    values = np.asarray(whole.dataobj).astype(float)
    assert whole.get_data_dtype() == np.float32 and values.min() >= low * (1 - 1e-6)
    metrics = json.loads((tmp_path / "whole" / "t1_recon.json").read_text())["metrics"]
    clipped = [np.clip(volume, low, high) for volume in (mr, values)]
    mse = np.mean((clipped[0] - clipped[1]) ** 2)
    assert set(metrics) == {"psnr", "ssim"} and 0 < metrics["ssim"] <= 1
    assert metrics["psnr"] == pytest.approx(10 * np.log10((high - low) ** 2 / mse), abs=1e-3)


def test_ct_and_mr_do_not_go_into_one_run(cause, run_bundle, save, mr, tmp_path):
    path = str(save(mr, "t1.nii.gz", AFFINE))
    cases = [([config, *MR], "ct", "mr.json scales MR") for config in ("encode.json", "inference.json")]
    cases += [
        (config, "mri", "without mr.json HU are") for config in ("encode.json", "inference.json", "evaluate.json")
    ]
    for configs, modality, words in cases:
        configs = ["inference.json", configs] if configs == "evaluate.json" else configs
        with pytest.raises(Exception) as raised:
            run_bundle("maisi_vae", configs, input=[{"image": path, "modality": modality}], output_dir=str(tmp_path))
        assert words in str(cause(raised.value)) and repr(modality) in str(cause(raised.value))
        if "encode.json" not in configs:  # nor one that the run says of files that say nothing
            with pytest.raises(Exception) as raised:
                run_bundle("maisi_vae", configs, input=path, modality=modality, output_dir=str(tmp_path))
            assert f"modality is {modality!r}; {words}" in str(cause(raised.value))


def test_a_generated_mr_is_clipped_below_alone(bundles, run_bundle, tmp_path):
    """The small weights know no MR; what their network gives is written as an MR would be, as its latent decodes."""
    settings = {"output_size": [32, 32, 32], "spacing": [4, 4, 3], "num_inference_steps": 1, "region": []}
    known = {"modality": "mri_t1", "trained_modalities": ["mri_t1"], "progress": False}
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path), save_latents=True, **settings, **known)
    sidecar = json.loads((tmp_path / "sample_seed0_latent.json").read_text())
    assert sidecar["intensity"] == [0, 1000] and sidecar["modality"] == "mri_t1"
    definition = json.loads((bundles / "maisi_ldm" / "configs" / "inference.json").read_text())["autoencoder_def"]
    decode = {"network_def": definition, "ckpt_path": str(bundles / "maisi_ldm" / "models" / "autoencoder.pt")}
    latent = str(tmp_path / "sample_seed0_latent.nii.gz")
    run_bundle("maisi_vae", "decode.json", input=latent, output_dir=str(tmp_path / "decoded"), **decode)
    sample = np.asarray(nib.load(tmp_path / "sample_seed0.nii.gz").dataobj)
    np.testing.assert_array_equal(nib.load(tmp_path / "decoded" / "sample_seed0_latent_ct.nii.gz").dataobj, sample)
    assert sample.min() == 0 and sample.max() > 100
    assert json.loads((tmp_path / "decoded" / "sample_seed0_latent_ct.json").read_text()) == {"from_scan": False}


def test_a_mask_becomes_an_mr(cause, run_bundle, ct_file, mask_file, tmp_path):
    """Of a ControlNet for MR, which the small weights stand for: no HU, no organs judged by them, no upper end."""
    known = {"modality": "mri_t1", "trained_modalities": ["mri_t1"], "num_inference_steps": 1, "progress": False}
    common = {"input": str(mask_file), **known}
    run_bundle("maisi_controlnet", "inference.json", output_dir=str(tmp_path / "mr"), **common)
    in_hu = {"_target_": "maisi_tools.volumes.normalise.ToHUd", "keys": "pred"}
    as_ct = {"postprocessing#transforms#1": in_hu, "output_dir": str(tmp_path / "ct")}
    run_bundle("maisi_controlnet", "inference.json", **common, **as_ct)
    mr, ct = (np.asarray(nib.load(tmp_path / name / "phantom_ct.nii.gz").dataobj).astype(int) for name in ("mr", "ct"))
    inside = (ct > -1000) & (ct < 1000)
    assert inside.sum() > 1000 and np.abs(2 * mr[inside] - 1000 - ct[inside]).max() <= 2  # both are whole numbers
    assert mr.min() == 0 and mr[ct == -1000].max() == 0 and mr[ct == 1000].min() >= 1000
    sidecar = json.loads((tmp_path / "mr" / "phantom_ct.json").read_text())
    assert {name.split("_")[0] for name in sidecar["metrics"]} == {"mr"} and sidecar["metrics"]["mr_outside"] == 0
    assert sidecar["draws"]["tried"][0]["implausible"] == {}

    judge = {"judge": "$lambda hu, mask: {}", "inferer#judge": "@judge"}
    scan = {"input": str(ct_file), "mask": str(mask_file), "edits": {"redraw": "spinal cord"}}
    for config, further in ((["inference.json"], judge), (["inference.json", "dicom.json"], {}), (EDIT, scan)):
        with pytest.raises(Exception) as raised:
            run_bundle("maisi_controlnet", config, **{**common, **further, "output_dir": str(tmp_path / "no")})
        assert "'mri_t1'" in str(cause(raised.value)) and "allowed is CT" in str(cause(raised.value))
    assert not list(tmp_path.glob("no/*"))
