"""The coarse CT: its boxes, its place beside a latent, and what its network is told."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from maisi_tools.coarse.grid import Coarsend
from maisi_tools.coarse.network import check_cascade
from maisi_tools.coarse.sampler import CoarseSampler, FieldOfView
from maisi_tools.coarse.training import CoarseCellsd, ReadCoarsed, check_fields_of_view, tissue_scale_factor
from maisi_tools.diffusion.conditions import Conditions
from maisi_tools.diffusion.schedulers import rectified_flow
from maisi_tools.errors import InputError
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.weights import save_weights

FIELD = FieldOfView([[100, 300], [100, 300], [100, 500]])


def volume(shape, spacing=(2.0, 3.0, 4.0), start=(-10.0, 5.0, 7.0), seed=0) -> MetaTensor:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor(start, dtype=torch.float64)
    values = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed))
    return MetaTensor(values, affine=affine, meta={"filename_or_obj": "p1_ct.nii.gz"})


def test_a_coarse_voxel_is_the_mean_of_its_box_and_lies_in_its_middle():
    image = volume((12, 8, 20))
    coarse = Coarsend("image", [4, 4, 10])({"image": image})["coarse"]
    wanted = image.as_tensor().reshape(1, 4, 3, 4, 2, 10, 2).mean((2, 4, 6))
    torch.testing.assert_close(coarse.as_tensor(), wanted)
    assert coarse.pixdim.tolist() == [6.0, 6.0, 8.0]
    middle = image.affine @ torch.tensor([1.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(coarse.affine[:, 3], middle)
    assert Coarsend("image", None)({"image": image}).keys() == {"image"}


def test_a_mirrored_volume_has_the_mirrored_coarse_one():
    image = volume((9, 7, 11))
    turned = Coarsend("image", [4, 2, 6])({"image": image.flip(1)})["coarse"]
    torch.testing.assert_close(
        turned.as_tensor(), Coarsend("image", [4, 2, 6])({"image": image})["coarse"].as_tensor().flip(1)
    )


@pytest.mark.parametrize("size", [[48, 32], [48, 31, 48], [48, 0, 48], "48", [48.0, 32, 48], 48])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="coarse_size is .* allowed are (three positive whole numbers|multiples of 2)"):
        Coarsend("image", size)


def test_on_a_latents_grid_it_lies_where_the_volume_does(tmp_path):
    """A ramp in mm, whatever the padding of the latent: inside the volume the ramp, beyond it its last value."""
    shape, factor = (24, 16, 20), 2
    image = volume(shape, spacing=(2.0, 2.0, 2.0), start=(0.0, 0.0, 0.0))
    ramp = torch.arange(shape[0], dtype=torch.float32).reshape(1, -1, 1, 1).expand(1, *shape) / shape[0]
    coarse = Coarsend("image", [12, 8, 10])({"image": MetaTensor(ramp, affine=image.affine, meta=image.meta)})["coarse"]
    path = tmp_path / "p1_coarse.nii.gz"
    nib.save(nib.Nifti1Image(coarse.as_tensor()[0].numpy(), coarse.affine.numpy()), path)
    affine = torch.diag(torch.tensor([4.0, 4.0, 4.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = 1.0  # the middle of the first two voxels
    latent = MetaTensor(torch.zeros(4, 16, 8, 12), affine=affine)  # padded to 32 and 24 voxels
    found = ReadCoarsed("coarse", "latent")({"coarse": str(path), "latent": latent})["coarse"]
    assert found.shape == (1, 16, 8, 12)
    middles = (torch.arange(12) * factor + 0.5) / shape[0]
    torch.testing.assert_close(found.as_tensor()[0, :12, 4, 4], middles, atol=1e-5, rtol=0)
    assert torch.allclose(found.as_tensor()[0, 12:, 4, 4], middles[-1])
    assert ReadCoarsed("coarse", "latent")({"latent": latent}).keys() == {"latent"}


def test_the_network_is_told_the_field_of_view_in_mm_and_the_chest():
    assert FIELD.vector((100, 50, 100), (2, 4, 3), ("head", "chest")).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert FIELD.vector((50, 100, 10), (4, 2, 30), ("head",)).tolist() == [0.5, 0.5, 0.5, 0.0]
    assert FIELD.vector((1, 900, 100), (1, 1, 1), ()).tolist() == [0.0, 1.0, 0.0, UNKNOWN]


def test_a_field_of_view_beyond_the_known_is_said(caplog):
    FIELD.warn_beyond((100, 50, 100), (2, 4, 3))
    FIELD.warn_beyond((97, 73, 100), (100 / 97, 300 / 73, 3))  # rounded, 1e-14 below 100 and 6e-14 above 300
    assert not caplog.records
    FIELD.warn_beyond((200, 50, 100), (2, 4, 3))
    assert "400 x 200 x 300 mm is beyond" in caplog.text and "100 to 300 x" in caplog.text


def test_a_training_says_that_its_fields_of_view_are_others(tmp_path, caplog):
    """Of ten one may be: what is far from all others is no reason for another range."""

    def cases(*lengths: float) -> list[dict[str, str]]:
        for number, mm in enumerate(lengths):
            image = nib.Nifti1Image(np.full((4, 4, 4), 0.5, np.float32), np.diag([50.0, 30.0, mm / 4, 1.0]))
            nib.save(image, tmp_path / f"p{number}_coarse.nii.gz")
        return [{"coarse": str(tmp_path / f"p{number}_coarse.nii.gz")} for number in range(len(lengths))]

    check_fields_of_view(cases(*[400] * 9, 900), FIELD)
    check_fields_of_view([], FIELD)
    assert not caplog.records
    check_fields_of_view(cases(*[400] * 8, 650.5, 900), FIELD)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "2 of 10 fields of view lie beyond field_of_view, [[100, 300], [100, 300], [100, 500]] mm, and count as its "
        "end; the data have [[200, 201], [120, 121], [400, 900]]: give that"
    )


def test_cells_hold_all_of_a_coarse_ct():
    coarse = volume((8, 6, 4))
    latent = MetaTensor(torch.zeros(4, 2, 2, 2), meta={"sidecar": {"region": ["head"]}})
    found = CoarseCellsd(["coarse", "latent"], FIELD)({"coarse": coarse, "latent": latent})
    assert found["latent"].shape == (8, 4, 3, 2)
    assert sorted(found["latent"].flatten().tolist()) == sorted(coarse.as_tensor().flatten().tolist())
    assert found["organ_sizes"].tolist() == FIELD.vector((8, 6, 4), (2, 3, 4), ("head",)).tolist()


def test_the_scale_is_that_of_tissue():
    latent = torch.randn(4, 10, 10, 10, generator=torch.Generator().manual_seed(0))
    coarse = torch.zeros(1, 10, 10, 10)
    coarse[:, :5] = 0.5
    latent[:, 5:] = 100.0
    assert tissue_scale_factor([{"latent": latent, "coarse": coarse}]) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(InputError, match="in a body"):
        tissue_scale_factor([{"latent": latent, "coarse": torch.zeros_like(coarse)}])


@pytest.mark.parametrize(("channels", "cascade"), [(4, False), (5, True)])
def test_weights_of_the_other_kind_are_refused_with_what_to_give(tmp_path, channels, cascade):
    save_weights(tmp_path / "model.pt", {"conv_in.conv.weight": torch.zeros(8, channels, 3, 3, 3)})
    save_weights(tmp_path / "coarse.pt", {"a": torch.zeros(1)})
    check_cascade(cascade, tmp_path / "model.pt", tmp_path / "coarse.pt", {})
    with pytest.raises(InputError, match=f"cascade is {not cascade}; give --cascade {cascade}"):
        check_cascade(not cascade, tmp_path / "model.pt", tmp_path / "coarse.pt", {})


class Towards(nn.Module):
    """The true velocity of one coarse CT, whatever the noise: a sampler must arrive at it."""

    def __init__(self, cells: torch.Tensor) -> None:
        super().__init__()
        self.cells = nn.Parameter(cells)
        self.told: list[list[float]] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, organ_sizes: torch.Tensor) -> torch.Tensor:
        self.told.append(organ_sizes[0].tolist())
        return (self.cells - x) / (timesteps.float() / 1000).reshape(-1, 1, 1, 1, 1)


def test_a_draw_arrives_at_the_coarse_ct():
    coarse = volume((8, 4, 6), seed=3)
    latent = MetaTensor(torch.zeros(4, 2, 2, 2), meta={"sidecar": {}})
    cells = CoarseCellsd(["coarse", "latent"], FIELD)({"coarse": coarse, "latent": latent})["latent"]
    network = Towards(cells[None] * 3)
    draw = CoarseSampler(network, rectified_flow(8), 4, [8, 4, 6], FIELD, scale_factor=3.0, progress=False)
    conditions = Conditions(size=(100, 50, 100), spacing=(2.0, 4.0, 3.0), region=("head", "chest"))
    found = draw(conditions, 5)
    torch.testing.assert_close(found[0], coarse.as_tensor(), atol=1e-5, rtol=0)
    assert network.told == [[0.5, 0.5, 0.5, 1.0]] * 4
    with pytest.raises(InputError, match="solver is 'dopri5'"):
        CoarseSampler(network, rectified_flow(8), 4, [8, 4, 6], FIELD, 3.0, solver="dopri5")


def test_the_same_seed_draws_the_same_and_values_stay_within_the_window():
    network = Towards(torch.full((1, 8, 2, 2, 2), np.inf))
    network.forward = lambda x, timesteps, organ_sizes: 10 * x  # leaves [0, 1] by far
    draw = CoarseSampler(network, rectified_flow(8), 2, [4, 4, 4], FIELD, 1.0, progress=False)
    conditions = Conditions(size=(100, 50, 100), spacing=(2.0, 4.0, 3.0))
    first, again, other = (draw(conditions, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() == 0 and first.max() == 1


@pytest.mark.parametrize(
    "mm", [[[300, 300]] * 3, [[300, 100]] * 3, [[100, 300]] * 2, [[100, float("inf")]] * 3, [1, 2, 3], None]
)
def test_a_field_of_view_that_is_none_is_refused(mm):
    with pytest.raises(InputError, match=r"field_of_view is .*; allowed are three of \[lowest, highest\] mm"):
        FieldOfView(mm)
