"""The bundles in slabs: the same volumes as in one piece, on one device and across ranks."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import find_input_error

FAST = {"num_inference_steps": 2, "progress": False}
SAMPLE = {"output_size": [32, 48, 32], "region": ["head"], "save_latents": True, "coarse#num_inference_steps": 2}
WHOLE = {"tsp": {"_target_": "SimpleInferer"}}


def voxels(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).astype(float)


@pytest.fixture
def jobs(save, phantom_ct, phantom_labels) -> dict[str, dict]:
    """On the phantom's middle, a third of it: the lowest levels have fewer rows than there are slabs."""
    inner = (slice(8, 40),) * 3
    ct, mask = save(phantom_ct[inner], "head_ct.nii.gz"), save(phantom_labels[inner], "phantom.nii.gz")
    return {
        "maisi_vae": {"input": str(ct)},
        "maisi_ldm": SAMPLE | FAST,
        "maisi_controlnet": {"input": str(mask)} | FAST,
    }


@pytest.mark.parametrize("bundle", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_slabs_give_the_volume_of_the_whole(run_bundle, jobs, bundle, tmp_path):
    run_bundle(bundle, "inference.json", output_dir=str(tmp_path / "whole"), **WHOLE, **jobs[bundle])
    run_bundle(bundle, "inference.json", output_dir=str(tmp_path / "slabs"), splits=5, **jobs[bundle])
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.nii.gz"))
    assert names == sorted(path.name for path in (tmp_path / "slabs").glob("*.nii.gz")) and names
    for name in names:
        whole, slabs = voxels(tmp_path / "whole" / name), voxels(tmp_path / "slabs" / name)
        # a CT is stored in whole HU, so a rounding difference can be one step
        assert np.abs(whole - slabs).max() <= (1e-3 if "latent" in name else 1)
        assert np.mean(whole != slabs) < (1 if "latent" in name else 0.01)


def test_encoding_and_decoding_in_slabs(run_bundle, ct_file, tmp_path):
    for name, settings in {"whole": WHOLE, "slabs": {"splits": 7}}.items():
        run_bundle("maisi_vae", "encode.json", input=str(ct_file), output_dir=str(tmp_path / name), **settings)
    latents = [tmp_path / name / "head_ct_latent.nii.gz" for name in ("whole", "slabs")]
    np.testing.assert_allclose(voxels(latents[1]), voxels(latents[0]), atol=1e-3)
    for name, settings in {"whole": WHOLE, "slabs": {"memory_limit": "200MB"}}.items():
        run_bundle("maisi_vae", "decode.json", input=str(latents[0]), output_dir=str(tmp_path / name), **settings)
    cts = [voxels(tmp_path / name / "head_ct_latent_ct.nii.gz") for name in ("whole", "slabs")]
    assert np.abs(cts[0] - cts[1]).max() <= 1


@pytest.mark.parametrize("bundle", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_bfloat16_gives_nearly_the_same_volume(run_bundle, jobs, bundle, tmp_path):
    job = jobs[bundle] if bundle == "maisi_vae" else jobs[bundle] | {"num_inference_steps": 1}
    for name, settings in {"float32": {}, "bfloat16": {"dtype": "bfloat16"}}.items():
        run_bundle(bundle, "inference.json", output_dir=str(tmp_path / name), **settings, **job)
    names = [path.name for path in (tmp_path / "float32").glob("*.nii.gz")]
    (name,) = (name for name in names if "latent" not in name and "mask" not in name)
    exact, near = voxels(tmp_path / "float32" / name), voxels(tmp_path / "bfloat16" / name)
    assert 0 < np.abs(exact - near).mean() < 5  # HU; measured: 1.1 to 1.7


def test_a_memory_limit_that_cannot_be_met_ends_the_run_before_it_computes(run_bundle, ct_file, tmp_path):
    with pytest.raises(RuntimeError) as failure:
        run_bundle("maisi_vae", "inference.json", input=str(ct_file), output_dir=str(tmp_path), memory_limit="2MiB")
    assert "the least that would do is" in str(find_input_error(failure.value))
    assert not list(tmp_path.glob("*_recon*"))


@pytest.mark.parametrize("bundle", ["maisi_vae", "maisi_controlnet"])
def test_two_ranks_write_the_volume_of_one_process(run_on_two_ranks, run_bundle, jobs, bundle, tmp_path):
    run_bundle(bundle, "inference.json", output_dir=str(tmp_path / "one"), **jobs[bundle])
    settings = {key: value for key, value in jobs[bundle].items() if key != "progress"}
    configs = ["inference.json", "multi_gpu_inference.json"]
    run_on_two_ranks(bundle, configs, **settings, output_dir=tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and names
    for name in names:
        if name.endswith(".nii.gz"):
            assert np.abs(voxels(tmp_path / "one" / name) - voxels(tmp_path / "two" / name)).max() <= 1


def test_two_ranks_decode_what_one_process_does(run_on_two_ranks, run_bundle, ct_file, tmp_path):
    run_bundle("maisi_vae", "encode.json", input=str(ct_file), output_dir=str(tmp_path / "latents"))
    latent = tmp_path / "latents" / "head_ct_latent.nii.gz"
    run_bundle("maisi_vae", "decode.json", input=str(latent), output_dir=str(tmp_path / "one"))
    configs = ["decode.json", "multi_gpu_inference.json"]
    run_on_two_ranks("maisi_vae", configs, input=latent, output_dir=tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and "head_ct_latent_ct.nii.gz" in names
    one, two = (voxels(tmp_path / name / "head_ct_latent_ct.nii.gz") for name in ("one", "two"))
    assert one.std() > 100 and np.abs(one - two).max() <= 1
