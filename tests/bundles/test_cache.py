"""encode.json as a cache: what is up to date stays untouched, what changed is made again, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_tools.training.controlnet import FitMaskd
from maisi_tools.training.latents import find_latents
from maisi_tools.volumes.reading import read_volume
from maisi_tools.weights import encoder_fingerprint

VIEWS = [{"name": ""}, {"name": "flip", "flip": True}]


@pytest.fixture
def cases(tmp_path, phantom_ct, phantom_labels) -> Path:
    """Two small CTs with masks, and a datalist with one to train and one to validate on; what is to test stays out."""
    folder = tmp_path / "cases"
    folder.mkdir()
    for i, name in enumerate(("p1", "p2")):
        crop = (slice(8 + i, 36 + i), slice(8, 28), slice(8, 32))
        affine = np.diag([5.0, 5.0, 3.4, 1.0])
        nib.save(nib.Nifti1Image(phantom_ct[crop], affine), folder / f"{name}_ct.nii.gz")
        nib.save(nib.Nifti1Image(phantom_labels[crop], affine), folder / f"{name}_ct_mask.nii.gz")
    items = [{"image": f"{name}_ct.nii.gz", "region": ["head"]} for name in ("p1", "p2")]
    sections = {"training": items[:1], "validation": items[1:], "testing": [{"image": "not_there_ct.nii.gz"}]}
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


@pytest.fixture
def encode(run_bundle, cases, tmp_path):
    """``encode(key=value)`` runs the config; returns the stems of the latents that were written in this run."""
    out = tmp_path / "latents"

    def encode(**overrides) -> list[str]:
        given = {"input": str(cases / "datalist.json"), "output_dir": str(out), "multiple": 4, "views": VIEWS}
        given |= overrides
        before = times(Path(given["output_dir"]))
        run_bundle("maisi_vae", "encode.json", **given)
        after = times(Path(given["output_dir"]))
        return sorted(
            name.removesuffix("_latent.nii.gz")
            for name in after
            if name.endswith("_latent.nii.gz") and after[name] != before.get(name)
        )

    return encode


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


ALL = ["p1_ct", "p1_ct_flip", "p2_ct", "p2_ct_flip"]


def test_what_changed_is_encoded_again_and_nothing_else(encode, cases, bundles, tmp_path, cause):
    out = tmp_path / "latents"
    assert encode() == ALL
    first = times(out)
    assert encode() == [] and times(out) == first  # not even the sidecars are touched

    # an input
    image = nib.load(cases / "p2_ct.nii.gz")
    hu = np.asarray(image.dataobj).copy()
    hu[3, 3, 3] += 1
    nib.save(nib.Nifti1Image(hu, image.affine), cases / "p2_ct.nii.gz")
    assert encode() == ["p2_ct", "p2_ct_flip"]

    # a view; another one beside it
    assert encode(views=[VIEWS[0], {"name": "flip", "flip": True, "spacing": [6, 6, 4]}]) == [
        "p1_ct_flip",
        "p2_ct_flip",
    ]
    assert encode(views=[VIEWS[0], {"name": "coarse", "spacing": [8, 8, 5]}]) == ["p1_ct_coarse", "p2_ct_coarse"]

    # the seed matters where something is drawn, and only there
    drawn = [VIEWS[0], {"name": "drawn", "shift_hu": 10}]
    assert encode(views=drawn) == ["p1_ct_drawn", "p2_ct_drawn"]
    assert encode(views=drawn, seed=1) == ["p1_ct_drawn", "p2_ct_drawn"]

    # padding; the HU window is one for all
    settings = {"views": VIEWS[:1], "multiple": 8}
    assert encode(**settings) == ["p1_ct", "p2_ct"]
    window = {"a_min": -900, "a_max": 1000, "b_min": 0, "b_max": 1, "clip": True}
    with pytest.raises(Exception) as raised:
        encode(**settings, scale={"_target_": "ScaleIntensityRanged", "keys": "image", **window})
    assert "scale makes -900 to 1000 HU 0 to 1; allowed is -1000 to 1000 HU to 0 to 1" in str(cause(raised.value))

    # another decoder leaves latents valid, another encoder does not
    weights = torch.load(bundles / "maisi_vae" / "models" / "model.pt", weights_only=True)
    for part, expected in (("decoder", []), ("encoder", ["p1_ct", "p2_ct"])):
        name = next(key for key in weights["model"] if key.startswith(part))
        weights["model"][name] += 0.125
        torch.save(weights, tmp_path / "vae.pt")
        assert encode(**settings, ckpt_path=str(tmp_path / "vae.pt")) == expected
    sidecar = json.loads((out / "p1_ct_latent.json").read_text())
    assert sidecar["autoencoder"] == encoder_fingerprint(tmp_path / "vae.pt")


def test_conditions_alone_do_not_encode(encode, cases, tmp_path):
    encode(views=VIEWS[:1])
    items = [{"image": str(cases / "p1_ct.nii.gz"), "region": ["head", "chest"]}]
    (cases / "datalist.json").write_text(json.dumps(items))
    assert encode(views=VIEWS[:1], modality="ct_contrast") == []
    one, two = (json.loads((tmp_path / "latents" / f"{name}_ct_latent.json").read_text()) for name in ("p1", "p2"))
    assert (one["region"], one["modality"]) == (["head", "chest"], "ct_contrast")
    assert (two["region"], two["modality"]) == (["head"], "ct")  # not in this run's input
    (cases / "datalist.json").write_text(json.dumps([{"image": items[0]["image"]}]))
    assert encode(views=VIEWS[:1]) == []
    again = json.loads((tmp_path / "latents" / "p1_ct_latent.json").read_text())
    assert (again["region"], again["modality"]) == (["head", "chest"], "ct")  # a list that says no region takes none


@pytest.mark.parametrize("moment", ["sidecar", "volume"])
def test_a_run_that_was_interrupted_goes_on(encode, tmp_path, monkeypatch, moment):
    """Stopped while an outdated latent is replaced: no old voxels under a new sidecar."""
    from maisi_tools.volumes import writing

    encode(views=VIEWS[:1])
    name = {"sidecar": "write_sidecar", "volume": "write_volume"}[moment]
    original, calls = getattr(writing, name), []

    def stop_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(writing, name, stop_at_the_second)
    with pytest.raises(BaseException) as stopped:
        encode(views=VIEWS[:1], multiple=8)
    assert isinstance(stopped.value, KeyboardInterrupt) or "KeyboardInterrupt" in repr(stopped.value.__cause__)
    monkeypatch.undo()
    left = sorted(path.name for path in (tmp_path / "latents").glob("*_latent.nii.gz"))
    assert left == ["p2_ct_latent.nii.gz"]  # validation comes first
    assert encode(views=VIEWS[:1], multiple=8) == ["p1_ct"]


def test_sigma_beside_the_mean(encode, run_bundle, tmp_path, cases):
    encode(views=VIEWS)
    plain = read_volume(tmp_path / "latents" / "p1_ct_flip_latent.nii.gz", "latent")
    assert encode(views=VIEWS, sigma=True) == ALL
    (item,) = [i for i in find_latents(tmp_path / "latents")["training"] if "p1_ct_flip" in i["latent"]]
    np.testing.assert_allclose(read_volume(item["latent"], "latent").numpy(), plain.numpy(), atol=1e-4)
    sigma = nib.load(item["sigma"])
    assert sigma.shape == nib.load(item["latent"]).shape and np.allclose(sigma.affine, plain.affine)
    assert (np.asarray(sigma.dataobj) > 0).all()


def test_a_mirrored_view_is_the_latent_of_the_mirrored_volume(encode, cases, run_bundle, tmp_path):
    encode()
    image = nib.load(cases / "p1_ct.nii.gz")
    mirrored = tmp_path / "mirrored_ct.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), mirrored)
    run_bundle("maisi_vae", "encode.json", input=str(mirrored), output_dir=str(tmp_path / "m"), multiple=4)
    flip = read_volume(tmp_path / "latents" / "p1_ct_flip_latent.nii.gz", "latent")
    np.testing.assert_allclose(
        flip.numpy(), read_volume(tmp_path / "m" / "mirrored_ct_latent.nii.gz", "latent").numpy(), atol=1e-4
    )
    # its mask is the case's, mirrored too
    lists = find_latents(tmp_path / "latents", ["p2"], cases)
    assert len(lists["training"]) == 2 and len(lists["validation"]) == 2
    for item in lists["training"]:
        fitted = FitMaskd("mask", "latent")(
            {"latent": read_volume(item["latent"], "latent"), "mask": read_volume(item["mask"], "mask")}
        )
        body = fitted["mask"][0].numpy() > 0
        expected = np.asarray(nib.load(cases / "p1_ct_mask.nii.gz").dataobj) > 0
        assert np.array_equal(body, expected[::-1] if "flip" in item["latent"] else expected)
    # and decoding brings the patient back as he was
    run_bundle(
        "maisi_vae",
        "decode.json",
        input=str(tmp_path / "latents" / "p1_ct_flip_latent.nii.gz"),
        output_dir=str(tmp_path / "decoded"),
    )
    decoded = nib.load(tmp_path / "decoded" / "p1_ct_flip_latent_ct.nii.gz")
    assert nib.aff2axcodes(decoded.affine) == ("R", "A", "S") and np.allclose(decoded.affine, image.affine, atol=1e-4)
    agreement = np.corrcoef(np.asarray(decoded.dataobj).ravel(), np.asarray(image.dataobj).ravel())[0, 1]
    other = np.corrcoef(np.asarray(decoded.dataobj)[::-1].ravel(), np.asarray(image.dataobj).ravel())[0, 1]
    assert agreement > 0.6 and agreement > other + 0.05


def test_two_ranks_write_what_one_process_does(run_on_two_ranks, encode, cases, tmp_path):
    encode()
    one = tmp_path / "latents"
    given = {"input": cases / "datalist.json", "output_dir": tmp_path / "two", "views": VIEWS, "multiple": 4}
    run_on_two_ranks("maisi_vae", ["encode.json", "multi_gpu_encode.json"], **given)
    assert set(times(one)) == set(times(tmp_path / "two"))
    for path in one.glob("*"):
        other = tmp_path / "two" / path.name
        if path.suffix == ".json":
            assert path.read_text() == other.read_text()
        else:
            np.testing.assert_allclose(nib.load(path).get_fdata(), nib.load(other).get_fdata(), atol=1e-4)
    # and a folder that several ranks filled is up to date for one process
    assert encode(output_dir=str(tmp_path / "two")) == []
    assert len(times(tmp_path / "two")) == 2 * len(ALL)
