"""From a CT to its described latent and back to the CT's own grid."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from maisi_tools.errors import InputError
from maisi_tools.volumes.grid import pad_to_multiple
from maisi_tools.volumes.latents import SIDECAR, DescribeLatentd, RestoreGeometryd, UnscaleLatentd

from .test_orientation import AFFINES, as_read


def described(
    name: str, shape=(10, 13, 8), multiple: int = 4, factor: int = 4, **extra
) -> tuple[dict, MetaTensor, torch.Tensor]:
    """The item after encoding, the CT as in the file, and the padded RAS volume that a perfect decoder would give."""
    volume = as_read(AFFINES[name], shape)
    image = Orientation("RAS", labels=None)(volume)
    padded = pad_to_multiple(image.as_tensor()[None], multiple)[0][0]
    latent = torch.randn(4, *(n // factor for n in padded.shape[1:]))
    return DescribeLatentd("latent", "image", factor)({"image": image, "latent": latent, **extra}), volume, padded


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize(("multiple", "factor"), [(4, 4), (16, 4), (2, 2), (8, 2), (8, 8)])
def test_geometry_round_trip(name, multiple, factor):
    item, volume, padded = described(name, multiple=multiple, factor=factor)
    sidecar = json.loads(json.dumps({key: item[key] for key in SIDECAR}))  # as written and read again
    latent = MetaTensor(item["latent"].as_tensor(), affine=item["latent"].affine)
    latent.meta.update({"sidecar": sidecar, "filename_or_obj": "case_latent.nii.gz"})
    restored = RestoreGeometryd("pred", "latent")({"latent": latent, "pred": padded})["pred"]
    assert np.array_equal(restored.numpy(), volume.numpy())
    np.testing.assert_allclose(restored.affine.numpy(), AFFINES[name], atol=1e-9)
    assert restored.meta["filename_or_obj"] == "case_latent.nii.gz"


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("factor", [2, 4])
def test_latent_lies_where_its_voxels_do(name, factor):
    item, _, _ = described(name, factor=factor)
    image, latent = item["image"], item["latent"]
    for voxel in ((0, 0, 0), (2, 1, 1)):
        block = np.array(
            [[factor * v + i for v, i in zip(voxel, inner, strict=True)] for inner in np.ndindex(*[factor] * 3)]
        )
        centre = (image.affine.numpy() @ np.c_[block, np.ones(factor**3)].T).mean(1)
        np.testing.assert_allclose(latent.affine.numpy() @ [*voxel, 1], centre, atol=1e-9)


def test_sidecar_describes_the_image_in_ras():
    item, volume, _ = described("PIR", region=["head"])
    assert item["orientation"] == "PIR"
    # P, I and R are the file's axes, so R, A and S are its third, first and second.
    assert item["size"] == [volume.shape[3], volume.shape[1], volume.shape[2]] == [8, 10, 13]
    np.testing.assert_allclose(item["spacing"], [10 / 3, 0.7, 0.9], atol=1e-6)
    assert (item["region"], item["modality"], item["scale_factor"]) == (["head"], "ct", 1.0)
    assert item["latent"].meta["filename_or_obj"] == "in/case.nii.gz" and item["intensity"] == [-1000, 1000]
    assert described("PIR")[0]["region"] == described("PIR", region=None)[0]["region"] == []


def test_a_sidecar_without_orientation_is_written_in_ras():
    item, _, padded = described("LPS")
    item["latent"].meta["sidecar"] = {"size": item["size"], "factor": 4}
    restored = RestoreGeometryd("pred", "latent")({"latent": item["latent"], "pred": padded})["pred"]
    assert np.array_equal(restored.numpy(), item["image"].numpy())
    np.testing.assert_allclose(restored.affine.numpy(), item["image"].affine.numpy(), atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_unscaling_divides_and_keeps_the_rest(scale):
    sidecar = {"scale_factor": scale, "factor": 4}
    latent = MetaTensor(torch.randn(4, 2, 3, 2), affine=torch.as_tensor(AFFINES["LPS"]), meta={"sidecar": sidecar})
    data = UnscaleLatentd("latent", 4)({"latent": latent, "name": "x"})
    assert np.array_equal(data["latent"].numpy(), latent.numpy() / 0.5) and data["name"] == "x"
    assert (
        torch.equal(data["latent"].affine, latent.affine) and data["latent"].meta["sidecar"] == latent.meta["sidecar"]
    )


def test_a_latent_of_another_factor_is_not_decoded():
    meta = {"sidecar": {"scale_factor": 1.0, "factor": 4}, "filename_or_obj": "old_latent.nii.gz"}
    latent = MetaTensor(torch.zeros(4, 2, 3, 2), meta=meta)
    with pytest.raises(InputError, match=r"old_latent\.nii\.gz has factor 4, the autoencoder that is to decode it 2"):
        UnscaleLatentd("latent", 2)({"latent": latent})


def test_a_latent_of_another_encoder_is_not_decoded():
    made = {"scale_factor": 1.0, "factor": 2}
    encoders = {"ours": {"autoencoder": "aa"}, "theirs": {"autoencoder": "bb"}, "drawn": {}}
    latents = {
        name: MetaTensor(torch.zeros(4, 2, 3, 2), meta={"sidecar": made | encoder, "filename_or_obj": name})
        for name, encoder in encoders.items()
    }
    see = UnscaleLatentd("latent", 2, encoder="aa")
    assert see({"latent": latents["ours"]}) and see({"latent": latents["drawn"]})
    with pytest.raises(
        InputError, match="latent theirs comes from an autoencoder with bb, and that which is to decode it"
    ):
        see({"latent": latents["theirs"]})
    assert UnscaleLatentd("latent", 2)({"latent": latents["theirs"]})
