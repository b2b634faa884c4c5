"""The mask generator's whole path on phantoms: autoencoder, latents, diffusion, masks, and a CT from one of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.cohort.generator import GeneratorSource
from maisi_tools.masks.edits import volumes_ml
from maisi_tools.masks.library import MaskRequest
from maisi_tools.masks.pieces import count_pieces
from maisi_tools.masks.vocabulary import VOCABULARY

AUTOENCODER = {"network_def#num_channels": [8, 8, 16], "network_def#norm_num_groups": 4}
UNET = {
    "network_def#channels": [8, 8, 16],
    "network_def#num_head_channels": [0, 0, 8],
    "network_def#norm_num_groups": 4,
}
TRAIN = {"max_epochs": 2, "val_interval": 2, "cache_rate": 0.0, "amp_dtype": "float32", "tensorboard": False}
GRID = {"output_size": [32, 32, 32], "spacing": [5.0, 5.0, 5.0], "num_inference_steps": 2, "progress": False}
GRID["spacing_range"] = [[5, 5], [5, 5], [5, 5]]


@pytest.fixture(scope="module")
def masks(tmp_path_factory, phantom_labels) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    for i, name in enumerate(("p1", "p2", "p3")):
        crop = phantom_labels[i + 4 : i + 36, 6:38, 4:44]
        nib.save(nib.Nifti1Image(crop, np.diag([5.0, 5.0, 3.4, 1.0])), folder / f"{name}_mask.nii.gz")
    return folder


@pytest.fixture(scope="module")
def trained(masks, run_bundle, tmp_path_factory) -> Path:
    """A tiny autoencoder and a tiny generator, trained for a few steps through their configs."""
    out = tmp_path_factory.mktemp("trained")
    items = [{"image": str(path)} for path in sorted(masks.glob("*.nii.gz"))]
    (out / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}))
    patches = {"min_patch_size": [16, 16, 16], "max_patch_size": [24, 24, 24]}
    run_bundle(
        *("maisi_vae", ["train.json", "train_mask.json"]),
        **{**TRAIN, **AUTOENCODER, **patches, "datalist": str(out / "datalist.json"), "ckpt_dir": str(out / "vae")},
    )
    autoencoder = str(out / "vae" / "model.pt")
    run_bundle(
        *("maisi_vae", ["encode.json", "encode_mask.json"]),
        **{**AUTOENCODER, "input": str(masks), "output_dir": str(out / "latents"), "ckpt_path": autoencoder},
        canvas=[32, 32, 32],
        spacing=[5.0, 5.0, 5.0],
    )
    run_bundle(
        *("maisi_ldm", ["train.json", "train_mask.json"]),
        **{**TRAIN, **UNET, "dataset_dir": str(out / "latents"), "held_out": ["p3"]},
        autoencoder_ckpt_path=autoencoder,
        ckpt_dir=str(out / "ldm"),
    )
    return out


@pytest.fixture(scope="module")
def generate(trained, run_bundle):
    def run(output_dir, **overrides):
        weights = {
            "ckpt_path": str(trained / "ldm" / "model.pt"),
            "autoencoder_ckpt_path": str(trained / "vae" / "model.pt"),
            **{key.replace("network_def", "autoencoder_def"): value for key, value in AUTOENCODER.items()},
        }
        settings = {**UNET, **weights, **GRID, "output_dir": str(output_dir), **overrides}
        run_bundle("maisi_ldm", "mask_inference.json", **settings)
        return sorted(Path(output_dir).glob("*_mask.nii.gz"))

    return run


@pytest.fixture(scope="module")
def organs(bundles) -> dict:
    return json.loads((bundles / "maisi_ldm" / "configs" / "mask_inference.json").read_text())["organs"]


def test_every_view_of_every_mask_is_encoded(trained):
    stems = {path.name.removesuffix("_latent.nii.gz") for path in (trained / "latents").glob("*.nii.gz")}
    assert stems == {f"{name}_mask{view}" for name in ("p1", "p2", "p3") for view in ("", "_flip")}


def test_latents_are_of_the_whole_body_on_the_canvas_with_its_volumes(trained, masks):
    """Crops and air around the body do not count; what the canvas holds of each label is in the sidecar."""
    for name in ("p1", "p2"):
        mask = np.asarray(nib.load(masks / f"{name}_mask.nii.gz").dataobj)
        body = volumes_ml(np.where(mask > 0, 200, 0).astype(np.uint8), (5.0, 5.0, 3.4))[200]
        sidecars = [
            json.loads((trained / "latents" / f"{name}_mask{view}_latent.json").read_text()) for view in ("", "_flip")
        ]
        for sidecar in sidecars:
            assert sidecar["size"] == [32, 32, 32] and sidecar["spacing"] == [5.0, 5.0, 5.0]
        plain, flip = (sidecar["label_ml"] for sidecar in sidecars)
        assert sum(plain.values()) == pytest.approx(body, rel=0.15)
        assert plain["18"] == pytest.approx(flip["20"]) and plain["20"] == pytest.approx(flip["18"])


def test_masks_are_labels_on_the_grid_that_was_asked_for(generate, tmp_path):
    (path,) = generate(tmp_path, seed=3)
    image = nib.load(path)
    labels = np.asarray(image.dataobj)
    assert labels.shape == (32, 32, 32) and labels.dtype == np.uint8
    assert image.header.get_zooms() == (5.0, 5.0, 5.0)
    assert set(np.unique(labels)) <= {0, *VOCABULARY}
    sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    volumes = volumes_ml(labels, (5.0, 5.0, 5.0))
    assert sidecar["seed"] == 3
    assert sidecar["organ_ml"]["body"] == pytest.approx(volumes.get(200, 0.0), abs=0.06)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seeds"] == [3]


def test_same_seed_same_bytes_other_seed_another_mask(generate, tmp_path):
    def mask(name, **overrides):
        return generate(tmp_path / name, **overrides)[0].read_bytes()

    first = mask("a", seed=1)
    assert first == mask("b", seed=1)
    assert first != mask("c", seed=2)


def test_draws_go_on_until_the_sizes_are_near_and_the_nearest_is_kept(generate, organs, tmp_path, caplog):
    """A tiny network cannot be near, so all draws are made; more of them never come out farther.

    All sizes are asked for: of others the prior tells what goes with them, and a draw has to be near those, too.
    """
    asked = {name: sum(organ["range"]) / 2 for name, organ in organs.items()}

    def far(path: Path) -> float:
        got = volumes_ml(np.asarray(nib.load(path).dataobj), (5.0, 5.0, 5.0))
        pairs = ((got.get(organs[name]["label"], 0.0), ml) for name, ml in asked.items())
        return sum(abs(math.log(max(ml, 0.125) / wanted)) for ml, wanted in pairs)  # 0.125: a voxel

    plain = {"seed": 2, "organ_sizes": asked, "max_resize": 1}
    kept = [generate(tmp_path / str(n), redraws=n, **plain)[0] for n in range(4)]
    assert far(kept[0]) >= far(kept[1]) >= far(kept[2]) >= far(kept[3])
    assert "seed 2: not of the size that is asked for" in caplog.text and "body" in caplog.text


def test_the_shipped_weights_draw_heads_of_the_size_that_is_asked_for(bundles, organs):
    """A few steps through the shipped weights: the body follows its size where all sizes are given."""
    volumes = []
    for share in (0.2, 0.7):
        sizes = {name: low + share * (high - low) for name, low, high in ((n, *o["range"]) for n, o in organs.items())}
        source = GeneratorSource(
            bundles / "maisi_ldm", sizes, {"num_inference_steps": 6, "redraws": 0, "max_resize": 1}
        )
        labels = source.masks(MaskRequest(), 1)[0].mask[0].numpy().astype(np.uint8)
        volumes.append(volumes_ml(labels, (4.0, 4.0, 3.0)))
        assert labels.shape == (144, 80, 128) and {120, 200} <= volumes[-1].keys(), volumes
        assert count_pieces(labels, 121) <= 1
    assert volumes[1][200] > 1.1 * volumes[0][200], volumes


@pytest.mark.parametrize("ml", [15, 40])
def test_the_shipped_weights_draw_one_organ_of_the_size_that_is_asked_for(bundles, organs, ml):
    """With whatever else belongs into a head."""
    source = GeneratorSource(bundles / "maisi_ldm", {"left parotid": ml}, {"num_inference_steps": 6, "redraws": 0})
    labels = source.masks(MaskRequest(), 1, seed=1)[0].mask[0].numpy().astype(np.uint8)
    volumes = volumes_ml(labels, (4.0, 4.0, 3.0))
    assert volumes[18] == pytest.approx(ml, rel=0.1)
    assert {int(organ["label"]) for organ in organs.values()} <= volumes.keys()
    assert count_pieces(labels, 18) == count_pieces(labels, 121) == 1
    sides = [np.argwhere(labels == label)[:, 0].mean() for label in (18, 20)]
    assert sides[0] < sides[1]  # RAS: x grows to the right


def test_a_source_of_masks(generate, bundles, trained, tmp_path):
    """The same mask as the config writes, as an object."""
    weights = {
        "ckpt_path": str(trained / "ldm" / "model.pt"),
        "autoencoder_ckpt_path": str(trained / "vae" / "model.pt"),
    }
    tiny = {**UNET, **{key.replace("network_def", "autoencoder_def"): value for key, value in AUTOENCODER.items()}}
    source = GeneratorSource(bundles / "maisi_ldm", {"left parotid": 20}, GRID, **tiny, **weights)
    first, second = source.masks(MaskRequest(organs=("liver",)), 2, seed=4)
    (path,) = generate(tmp_path, seed=5, organ_sizes={"left parotid": 20})
    assert np.array_equal(second.mask[0].numpy(), np.asarray(nib.load(path).dataobj))
    assert first.origin == 'generator seed 4 {"left parotid": 20}' and "liver" in first.misfits[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"organ_sizes": {"liver": 3}}, ["liver", "left parotid"]),
        ({"organ_sizes": {"left parotid": 900}}, ["900", "10 to 53 ml"]),
        ({"output_size": [30, 32, 32]}, ["30"]),
        ({"output_size": [48, 32, 32]}, ["output_size is [48, 32, 32]; allowed is [32, 32, 32]"]),
        ({"spacing": [1, 5, 5]}, ["spacing is 1 x 5 x 5 mm, outside along x; allowed is x 5..5"]),
        ({"redraws": -1}, ["-1"]),
        ({"max_resize": 0.5}, ["max_resize", "0.5"]),
    ],
)
def test_bad_requests_are_refused(generate, cause, tmp_path, override, words):
    with pytest.raises(Exception) as raised:
        generate(tmp_path, **override)
    assert all(word in str(cause(raised.value)) for word in words)
    assert not list(tmp_path.glob("*.nii.gz"))


def test_what_does_not_fit_own_masks_is_refused_before_a_training(open_bundle, cause, trained, masks, tmp_path):
    weights, out = str(trained / "vae" / "model.pt"), str(tmp_path / "out")
    encode = {**AUTOENCODER, "input": str(masks), "output_dir": out, "ckpt_path": weights, "spacing": [5.0, 5.0, 5.0]}
    learn = {"dataset_dir": str(trained / "latents"), "ckpt_dir": out, "autoencoder_ckpt_path": weights}
    liver = {"liver": {"label": 1, "range": [1, 2000]}}
    cases = (
        (
            "maisi_vae",
            "train",
            {"ckpt_dir": out, "keep_labels": [1, 200]},
            "allowed are 3, one for each of the classes",
        ),
        ("maisi_vae", "encode", {**encode, "canvas": [16, 32, 32]}, "give --canvas '[32, 32, 32]'"),
        ("maisi_ldm", "train", {**learn, "organs": liver}, "organs has liver (1), which none of the 6 training masks"),
    )
    for bundle, name, given, words in cases:
        with pytest.raises(Exception) as raised:
            open_bundle(bundle, [f"{name}.json", f"{name}_mask.json"], **given)
        assert words in str(cause(raised.value))


def test_validation_is_on_the_autoencoders_classes(trained):
    assert 0 <= torch.load(trained / "vae" / "model_best.pt", weights_only=True)["dice"] <= 1


def test_weights_are_used_with_the_labels_and_sizes_of_their_training(
    generate, run_bundle, trained, masks, organs, cause, tmp_path
):
    """In their order: of two classes exchanged, left would be drawn as right."""
    for name in ("model.pt", "model_best.pt", "checkpoint.pt"):
        assert name == "checkpoint.pt" or torch.load(trained / "vae" / name, weights_only=True)["shared"]
    swapped = [2, 11, 16, 20, 18, 28, 120, 121, 132, 200]
    files = {"ckpt_path": str(trained / "vae" / "model.pt")}
    encode = {**AUTOENCODER, **files, "input": str(masks), "output_dir": str(tmp_path / "latents")}
    patches = {"min_patch_size": [16, 16, 16], "max_patch_size": [24, 24, 24]}
    resume = {**TRAIN, **AUTOENCODER, **patches, "datalist": str(trained / "datalist.json"), "resume": True}
    learn = {**TRAIN, **UNET, "dataset_dir": str(trained / "latents"), "held_out": ["p3"], "ckpt_dir": str(tmp_path)}
    learn["autoencoder_ckpt_path"] = files["ckpt_path"]
    begun = {"init_ckpt": str(trained / "ldm" / "model.pt")}
    wide = {"organs#larynx#range": [2, 630]}
    cases = (
        ("classes", lambda: generate(tmp_path, classes=[0, *swapped])),
        ("organs", lambda: generate(tmp_path, organs=dict(reversed(organs.items())))),
        (
            "classes",
            lambda: run_bundle("maisi_vae", ["encode.json", "encode_mask.json"], **encode, keep_labels=swapped),
        ),
        ("organs", lambda: run_bundle("maisi_ldm", ["train.json", "train_mask.json"], **learn, **begun, **wide)),
        (
            "shared",
            lambda: run_bundle(
                "maisi_vae",
                ["train.json", "train_mask.json"],
                **resume,
                ckpt_dir=str(trained / "vae"),
                keep_labels=swapped,
            ),
        ),
    )
    for name, run in cases:
        with pytest.raises(Exception) as raised:
            run()
        words = f"was written with {name} " if name == "shared" else f"do not fit these settings: {name} is "
        assert words in str(cause(raised.value))
