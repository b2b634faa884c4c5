"""Stage 2 in two networks: one draws the field of view on few voxels, the U-Net the latent beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.weights import read_autoencoder

SIZE = [16, 16, 16]
MM = [[0, 640], [190, 500], [140, 390]]  # of another field of view than the configs'

NARROW = {
    "channels": [8, 8, 16],
    "num_head_channels": [0, 0, 8],
    "norm_num_groups": 4,
    "prior_components": 2,
}


NARROW_UNET = {
    "network_def#num_channels": [8, 8, 16],
    "network_def#num_head_channels": [0, 0, 8],
    "network_def#norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def trained(run_bundle, phantom_ct, bundles, tmp_path_factory):
    """Latents and coarse CTs of three phantoms, and tiny networks of both kinds trained on them for a few steps."""
    out = tmp_path_factory.mktemp("cascade")
    for shift, name in enumerate(("p1", "p2", "p3")):
        image = nib.Nifti1Image(phantom_ct[shift : shift + 40], np.diag([5.0, 5.0, 3.4, 1.0]))
        nib.save(image, out / f"{name}_ct.nii.gz")
    cases = [{"image": str(path), "region": ["head"]} for path in sorted(out.glob("*_ct.nii.gz"))]
    (out / "cases.json").write_text(json.dumps(cases))
    latents = out / "latents"
    run_bundle("maisi_vae", "encode.json", input=str(out / "cases.json"), output_dir=str(latents), coarse_size=SIZE)
    run_bundle("maisi_ldm", ["train.json", "train_coarse.json"], **coarse_training(out))
    run_bundle("maisi_ldm", "train.json", ckpt_dir=str(out / "ldm"), cascade=True, **NARROW_UNET, **common(out))
    return out


def common(out: Path) -> dict[str, Any]:
    return {"dataset_dir": str(out / "latents"), "held_out": ["p3"], "tensorboard": False, "max_epochs": 1}


def coarse_training(out: Path) -> dict[str, Any]:
    narrow = {f"network_def#{key}": value for key, value in NARROW.items() if key != "prior_components"}
    return {"ckpt_dir": str(out / "coarse"), "prior_components": 2, **narrow, **common(out)}


@pytest.fixture
def draw(run_bundle, trained, tmp_path):
    """``draw("name", key=value)`` draws a CT with the trained networks, and returns its voxels."""

    def draw(name: str, **more) -> np.ndarray:
        settings = {
            "output_size": [48, 48, 48],
            "spacing": [4.0, 4.0, 3.0],
            "region": ["head"],
            "num_inference_steps": 2,
            "progress": False,
            "ckpt_path": str(trained / "ldm" / "model.pt"),
            **NARROW_UNET,
            "coarse_ckpt_path": str(trained / "coarse" / "model.pt"),
            "coarse_size": SIZE,
            **{f"coarse_def#{key}": value for key, value in NARROW.items()},
        }
        run_bundle("maisi_ldm", "inference.json", output_dir=str(tmp_path / name), **settings | more)
        return np.asarray(nib.load(tmp_path / name / "sample_seed0.nii.gz").dataobj).astype(int)

    return draw


def test_of_the_two_networks_the_unet_alone_knows_the_encoder(trained):
    """A coarse network sees no latents, so that it may be trained on with those of any."""
    made_by = json.loads((trained / "latents" / "p1_ct_latent.json").read_text())["autoencoder"]
    assert [read_autoencoder(trained / name / "model.pt") for name in ("ldm", "coarse")] == [made_by, None]


def test_encoding_writes_the_coarse_ct_beside_the_latent(trained):
    for name in ("p1", "p2", "p3"):
        coarse = nib.load(trained / "latents" / f"{name}_ct_coarse.nii.gz")
        assert coarse.shape == tuple(SIZE)
        ct = nib.load(trained / f"{name}_ct.nii.gz")
        wanted = np.asarray(ct.dataobj, dtype=float).clip(-1000, 1000).mean() / 2000 + 0.5
        assert np.asarray(coarse.dataobj).mean() == pytest.approx(wanted, abs=0.02)
        lengths = [n * mm for n, mm in zip(ct.shape, ct.header.get_zooms(), strict=True)]
        found = [n * mm for n, mm in zip(coarse.shape, coarse.header.get_zooms(), strict=True)]
        np.testing.assert_allclose(found, lengths, rtol=1e-5)


def test_its_prior_is_that_of_the_training_cases(trained):
    state = torch.load(trained / "coarse" / "model.pt", weights_only=True)["model"]
    assert state["prior.mean"].abs().sum() > 0
    assert state["prior.directions"][0].abs().sum() > 0 and not state["prior.directions"][1].any()  # of two cases


@pytest.mark.parametrize("changed", [{"coarse_dropout": 0.1}, {"field_of_view#mm": MM}])
def test_its_training_goes_on_with_the_same_settings_alone(cause, run_bundle, trained, changed):
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_ldm", ["train.json", "train_coarse.json"], **coarse_training(trained), resume=True, **changed)
    name = next(iter(changed)).split("#")[0]
    words = "do not fit these settings: field_of_view is " if name == "field_of_view" else f"was written with {name} "
    assert words in str(cause(raised.value))


def test_a_training_on_other_fields_of_view_says_so(open_bundle, trained, tmp_path, caplog):
    given = {**coarse_training(trained), "ckpt_dir": str(tmp_path)}
    narrow = {"field_of_view#mm": [[300, 640], [190, 500], [140, 390]]}
    open_bundle("maisi_ldm", ["train.json", "train_coarse.json"], **given)
    assert "fields of view" not in caplog.text
    open_bundle("maisi_ldm", ["train.json", "train_coarse.json"], **given, **narrow)
    assert "2 of 2 fields of view lie beyond field_of_view" in caplog.text and "[[200, " in caplog.text


def test_a_sample_follows_its_coarse_ct(draw, tmp_path):
    first, again = draw("a"), draw("b")
    np.testing.assert_array_equal(first, again)
    assert first.min() >= -1000 and first.max() <= 1000
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())
    assert list(recorded["weights"]) == ["ldm/model.pt", "autoencoder.pt", "coarse/model.pt"]
    other = {"_target_": "maisi_tools.diffusion.schedulers.rectified_flow", "base_img_size_numel": 4096}
    assert (draw("c", **{"coarse#scheduler": other}) != first).any()


def test_without_a_cascade_its_weights_are_not_looked_for(cause, draw, run_bundle, trained, tmp_path):
    run_bundle(
        "maisi_ldm",
        "train.json",
        dataset_dir=str(trained / "latents"),
        ckpt_dir=str(tmp_path / "alone"),
        max_epochs=1,
        tensorboard=False,
        **NARROW_UNET,
    )
    alone = {"ckpt_path": str(tmp_path / "alone" / "model.pt"), "coarse_ckpt_path": str(tmp_path / "nothing.pt")}
    assert draw("alone", cascade=False, **alone).shape == (48, 48, 48)
    assert list(json.loads((tmp_path / "alone" / "run.json").read_text())["weights"]) == ["model.pt", "autoencoder.pt"]
    with pytest.raises(Exception) as raised:
        draw("other", ckpt_path=alone["ckpt_path"])
    assert "give --cascade False" in str(cause(raised.value))


def test_a_coarse_ct_is_drawn_as_its_network_was_trained(cause, draw):
    for name, other in (("process", {"coarse#scheduler": "@ddpm"}), ("field_of_view", {"coarse#field_of_view#mm": MM})):
        with pytest.raises(Exception) as raised:
            draw(name, **other)
        assert f"coarse/model.pt do not fit these settings: {name} is " in str(cause(raised.value))


def test_a_coarse_ct_that_is_gone_is_made_again(cause, run_bundle, trained, tmp_path):
    encode = {"input": str(trained / "cases.json"), "output_dir": str(tmp_path / "latents")}
    run_bundle("maisi_vae", "encode.json", **encode, coarse_size=SIZE)
    gone = tmp_path / "latents" / "p2_ct_coarse.nii.gz"
    train = {"dataset_dir": str(tmp_path / "latents"), "ckpt_dir": str(tmp_path), "cascade": True}
    gone.unlink()
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_ldm", "train.json", **train)
    assert "p2_ct_latent.nii.gz has no coarse CT beside it" in str(cause(raised.value))
    kept = (tmp_path / "latents" / "p1_ct_coarse.nii.gz").stat().st_mtime_ns
    run_bundle("maisi_vae", "encode.json", **encode, coarse_size=SIZE)
    assert gone.is_file() and (tmp_path / "latents" / "p1_ct_coarse.nii.gz").stat().st_mtime_ns == kept
    run_bundle("maisi_vae", "encode.json", **{**encode, "input": str(trained / "p1_ct.nii.gz")}, coarse_size=[8, 8, 8])
    with pytest.raises(Exception) as raised:
        run_bundle("maisi_ldm", "train.json", **train)
    assert "coarse CTs of several sizes" in str(cause(raised.value))


def test_latents_without_coarse_cts_are_refused_for_training(cause, run_bundle, trained, tmp_path):
    run_bundle("maisi_vae", "encode.json", input=str(trained / "cases.json"), output_dir=str(tmp_path / "latents"))
    with pytest.raises(Exception) as raised:
        run_bundle(
            "maisi_ldm", "train.json", dataset_dir=str(tmp_path / "latents"), ckpt_dir=str(tmp_path), cascade=True
        )
    assert "has no coarse CT" in str(cause(raised.value)) and "--coarse_size" in str(cause(raised.value))
