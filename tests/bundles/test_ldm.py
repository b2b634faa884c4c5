"""Stage 2: samples are reproducible, and stages chained through files equal the one run."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch

FAST = {
    "output_size": [32, 32, 32],
    "spacing": [4.0, 4.0, 3.0],
    "region": ["head"],
    "num_inference_steps": 2,
    "coarse#num_inference_steps": 2,
    "progress": False,
}


def test_same_seed_same_bytes_other_seed_other_volume(run_bundle, tmp_path):
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path / "a"), num_samples=3, seed=5, **FAST)
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path / "b"), num_samples=1, seed=6, **FAST)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["seeds"] == [5, 6, 7]
    volumes = {p.name: np.asarray(nib.load(p).dataobj) for p in (tmp_path / "a").glob("*.nii.gz")}
    assert sorted(volumes) == [f"sample_seed{seed}.nii.gz" for seed in (5, 6, 7)]
    again = np.asarray(nib.load(tmp_path / "b" / "sample_seed6.nii.gz").dataobj)
    np.testing.assert_array_equal(volumes["sample_seed6.nii.gz"], again)
    assert np.abs(volumes["sample_seed5.nii.gz"].astype(int) - volumes["sample_seed6.nii.gz"]).mean() > 5
    image = nib.load(tmp_path / "b" / "sample_seed6.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), FAST["spacing"])
    np.testing.assert_allclose(image.affine @ [15.5, 15.5, 15.5, 1], [0, 0, 0, 1], atol=1e-4)
    assert again.min() >= -1000 and again.max() <= 1000


def test_saved_latent_decodes_to_the_sample(run_bundle, tmp_path):
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path), seed=1, save_latents=True, **FAST)
    sidecar = json.loads((tmp_path / "sample_seed1_latent.json").read_text())
    assert sidecar["seed"] == 1 and sidecar["region"] == ["head"] and sidecar["scale_factor"] != 1
    given = {"input": str(tmp_path), "output_dir": str(tmp_path / "decoded")}  # the CT beside it is passed over
    run_bundle("maisi_vae", "decode.json", **given)
    decoded = nib.load(tmp_path / "decoded" / "sample_seed1_latent_ct.nii.gz")
    sampled = nib.load(tmp_path / "sample_seed1.nii.gz")
    np.testing.assert_array_equal(np.asarray(decoded.dataobj), np.asarray(sampled.dataobj))
    np.testing.assert_allclose(decoded.affine, sampled.affine, atol=1e-5)
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path), seed=1, **{**FAST, "region": []})
    assert not list(tmp_path.glob("*_latent.*"))  # it was the earlier sample's


@pytest.mark.parametrize(
    ("config", "file"), [("inference.json", "own.nii.gz"), ("mask_inference.json", "own_mask.nii.gz")]
)
def test_a_sample_takes_no_name_of_a_file_that_no_run_wrote(cause, run_bundle, tmp_path, config, file):
    for name in (file, "own_latent.nii.gz"):
        (tmp_path / name).write_bytes(b"the user's")
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_ldm", config, output_dir=str(tmp_path), input=[{"seed": 0, "name": "own"}])
    assert f"{file} would be written over, and no earlier run wrote it" in str(cause(raised.value))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"the user's"}


def test_a_latent_of_another_factor_is_not_decoded(cause, run_bundle, save, tmp_path):
    latent = save(np.zeros((8, 8, 8, 4), dtype=np.float32), "other_latent.nii.gz")
    described = {"size": [32, 32, 32], "spacing": [1.25, 1.25, 0.85], "factor": 4, "scale_factor": 1.0}
    latent.with_name("other_latent.json").write_text(json.dumps(described))
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_vae", "decode.json", input=str(latent), output_dir=str(tmp_path / "decoded"))
    assert "has factor 4, the autoencoder that is to decode it 2" in str(cause(raised.value))


def test_guidance_changes_the_sample_and_one_does_not(run_bundle, tmp_path):
    volumes = {}
    for scale in (0.0, 1.0, 3.0):
        run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path / str(scale)), guidance_scale=scale, **FAST)
        volumes[scale] = np.asarray(nib.load(tmp_path / str(scale) / "sample_seed0.nii.gz").dataobj).astype(int)
    assert np.abs(volumes[0.0] - volumes[1.0]).max() <= 1  # rounding of u + (c - u)
    assert np.abs(volumes[0.0] - volumes[3.0]).max() > 1


def test_guidance_outside_its_interval_is_none(run_bundle, tmp_path):
    """Three steps are shown the timesteps 1000, 666.5 and 333.25; an interval between them guides none."""
    volumes, three = [], FAST | {"num_inference_steps": 3}
    for number, settings in enumerate(({}, {"guidance_interval": [0.7, 0.9]}, {"guidance_interval": [0.6, 0.7]})):
        scale = 3.0 if settings else 0.0
        out = tmp_path / str(number)
        run_bundle("maisi_ldm", "inference.json", output_dir=str(out), guidance_scale=scale, **settings, **three)
        volumes.append(np.asarray(nib.load(out / "sample_seed0.nii.gz").dataobj))
        recorded = json.loads((out / "run.json").read_text())["settings"]
        assert recorded["guidance_interval"] == settings.get("guidance_interval", [0.0, 1.0])
        assert recorded["solver"] == "ab2"
    np.testing.assert_array_equal(volumes[0], volumes[1])
    assert (volumes[0] != volumes[2]).any()


def test_samples_from_a_list(run_bundle, tmp_path):
    spec = tmp_path / "samples.json"
    spec.write_text(json.dumps([{"seed": 3, "name": "first"}, {"seed": 4}]))
    run_bundle("maisi_ldm", "inference.json", input=str(spec), output_dir=str(tmp_path / "out"), **FAST)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["first.nii.gz", "sample_seed4.nii.gz"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"output_size": [100, 32, 32]}, ["100", "96", "104"]),
        ({"spacing": [0.1, 4.0, 3.0]}, ["0.1", "2.5"]),
        ({"spacing": [4.0, 4.0, 0.0]}, ["0.0"]),
        ({"region": ["abdomen"]}, ["abdomen", "head"]),
        ({"region": ["foot"]}, ["foot", "head"]),
        ({"modality": "pet"}, ["pet", "ct"]),
        ({"num_inference_steps": 0}, ["0", "1000"]),
        ({"solver": "dopri5"}, ["dopri5", "euler, heun, ab2"]),
        ({"guidance_interval": [0.5, 1.5]}, ["[0.5, 1.5]", "0 to 1"]),
        ({"num_samples": 0}, ["0"]),
    ],
)
def test_bad_conditions_are_refused(cause, run_bundle, tmp_path, override, words):
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path / "out"), **{**FAST, **override})
    message = str(cause(raised.value))
    assert all(word in message for word in words), message
    assert not list((tmp_path / "out").glob("*"))


def test_ddpm_needs_all_its_steps_and_ddim_does_not(bundles, cause, run_bundle, tmp_path):
    weights = torch.load(bundles / "maisi_ldm" / "models" / "model.pt", weights_only=True)
    weights.pop("shared")  # it would say that these are of rectified flow
    torch.save(weights, tmp_path / "model.pt")
    fast = {**FAST, "ckpt_path": str(tmp_path / "model.pt")}
    ddpm = {"_target_": "monai.networks.schedulers.DDPMScheduler", "num_train_timesteps": 1000}
    its_own = {"solver": "euler", "last_step": 0}
    for settings, words in (({}, ["'ab2'", "0.3", "--solver euler --last_step 0"]), (its_own, ["1000"])):
        with pytest.raises(Exception) as raised:
            run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path), scheduler=ddpm, **settings, **fast)
        assert all(word in str(cause(raised.value)) for word in words)
    ddim = {**ddpm, "_target_": "monai.networks.schedulers.DDIMScheduler"}
    run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path), scheduler=ddim, **its_own, **fast)
    assert (tmp_path / "sample_seed0.nii.gz").exists()
