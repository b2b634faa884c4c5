from __future__ import annotations

import functools
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import linalg

from maisi_tools.cli import main
from maisi_tools.errors import InputError
from maisi_tools.files import fingerprint_file, fingerprint_text
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.metrics.realism import NETWORKS, Moments, SliceNetwork, frechet_distance, measure_realism, slices_of


@pytest.fixture(scope="module")
def network():
    """A ResNet-18 with an eighth of the channels: of 64 features, a covariance's root takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "resnet18", functools.partial(NETWORKS["resnet18"], widen_factor=1 / 8))
        return SliceNetwork("resnet18")


SPACING, SIZE = 12.0, 32
"""At which the phantoms are looked at, in mm and voxels a side."""

COARSE = (24.0, 16)
"""As these, for the whole ResNet-18."""

GRID = ("--spacing", f"{COARSE[0]:g}", "--size", f"{COARSE[1]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three phantoms each: as they are, with a little noise, with much noise."""
    folder = tmp_path_factory.mktemp("cts")
    random = np.random.default_rng(0)
    phantoms = [flat_ct(make_phantom("head_neck", (48, 40, 48), (8.0, 8.0, 6.0), seed)) for seed in range(3)]
    for name, sigma in (("plain", 0), ("noisy", 40), ("noisier", 160)):
        (folder / name).mkdir()
        for seed, phantom in enumerate(phantoms):
            ct = phantom.astype(float)
            # In the body alone: noise in the air would add slices to the set.
            ct = (ct + (ct > -1000) * random.normal(0, sigma, ct.shape)).clip(-1000, 1500).astype(np.int16)
            nib.save(nib.Nifti1Image(ct, np.diag([8.0, 8.0, 6.0, 1.0])), folder / name / f"{seed}_ct.nii.gz")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where tests that do not look at them keep features."""
    return tmp_path_factory.mktemp("out")


def files(folder, name):
    return sorted((folder / name).glob("*.nii.gz"))


def test_moments_and_distance_agree_with_numpy():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(50, 4)), random.normal(1, 2, size=(60, 4))
    found = [Moments(), Moments()]
    for moments, values in zip(found, (one, other), strict=True):
        for part in np.array_split(values, 7):
            moments.add(torch.from_numpy(part))
        mean, covariance = moments.mean_and_covariance()
        np.testing.assert_allclose(mean, values.mean(0))
        np.testing.assert_allclose(covariance, np.cov(values.T))
    root = linalg.sqrtm(np.cov(one.T) @ np.cov(other.T)).real
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(np.cov(one.T) + np.cov(other.T) - 2 * root)
    assert frechet_distance(*found) == pytest.approx(expected, rel=1e-6)


def test_distance_of_fewer_slices_than_features():
    """The covariances are singular."""
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trace = float(np.trace(np.cov(values.numpy().T)))
    for other, expected in (
        (values, 0),
        (values + 0.5, 40 * 0.25),
        (3 * values, 4 * float(values.mean(0).square().sum()) + 4 * trace),
        (-values, 4 * float(values.mean(0).square().sum())),
    ):
        found = [Moments(), Moments()]
        for moments, features in zip(found, (values, other), strict=True):
            moments.add(features)
        assert frechet_distance(*found) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_set_against_itself_and_against_noise(network, folder, out):
    plain = files(folder, "plain")

    def fid(name):
        found = measure_realism(plain, files(folder, name), out, network, SPACING, SIZE, 0)["figures"]
        return found["fid@resnet18-random0"]

    assert abs(fid("plain")) < 1e-5
    assert 1e-4 < fid("noisy") < fid("noisier")


def test_mmd_agrees_with_numpy_and_names_have_the_network(network, folder, tmp_path):
    sets = [files(folder, name) for name in ("plain", "noisier")]
    found = measure_realism(*sets, tmp_path, network, SPACING, SIZE, 0)
    assert all(name.endswith("@resnet18-random0") for name in found["figures"])
    assert json.loads((tmp_path / "realism.json").read_text()) == found

    def mean_feature(path):
        kept = np.load(next(tmp_path.glob(f"features/{path}.npz")))
        return np.concatenate([kept[plane] for plane in ("sagittal", "coronal", "axial")]).mean(0).astype(float)

    settings = f"resnet18-random0 {SPACING:g} {SIZE}"
    x, y = (
        [mean_feature(fingerprint_text(f"{fingerprint_file(file)} {settings}")) for file in group] for group in sets
    )
    within = sum(a @ b for g in (x, y) for i, a in enumerate(g) for j, b in enumerate(g) if i != j) / 6
    between = sum(a @ b for a in x for b in y) / 9
    assert found["figures"]["mmd@resnet18-random0"] == pytest.approx(within - 2 * between, abs=1e-6, rel=1e-3)


def test_features_are_kept_until_a_file_changes(network, folder, tmp_path):
    calls = []
    handle = network.register_forward_hook(lambda *_: calls.append(1))
    sets = [list(files(folder, "plain")), list(files(folder, "noisy"))]
    measure_realism(*sets, tmp_path, network, SPACING, SIZE, 0)
    first = len(calls)
    measure_realism(*sets, tmp_path, network, SPACING, SIZE, 0)
    assert first and len(calls) == first
    changed = nib.load(sets[1][0])
    nib.save(nib.Nifti1Image(np.asarray(changed.dataobj) + np.int16(1), changed.affine), tmp_path / "0_ct.nii.gz")
    sets[1][0] = tmp_path / "0_ct.nii.gz"
    measure_realism(*sets, tmp_path, network, SPACING, SIZE, 0)
    # One volume of 32 slices a plane at most, 32 a batch.
    assert first < len(calls) <= first + 3
    handle.remove()


def test_two_ranks_find_what_one_process_does(folder, torchrun, tmp_path):
    sets = [files(folder, name) for name in ("plain", "noisy")]
    expected = measure_realism(*sets, tmp_path / "one", SliceNetwork("resnet18"), *COARSE, 0)
    options = [*GRID, "--pairs", "0", "--output_dir", tmp_path / "two"]
    made = shutil.copytree(folder / "noisy", tmp_path / "made")  # as maisi_controlnet writes them: masks lie beside
    shutil.copy(files(folder, "plain")[0], made / "0_mask.nii.gz")
    (tmp_path / "other").mkdir()  # and files of one name in two folders, as samples are named by their seeds
    reference = [
        *files(folder, "plain")[:2],
        shutil.copy(files(folder, "plain")[2], tmp_path / "other" / "0_ct.nii.gz"),
    ]
    (tmp_path / "plain.json").write_text(json.dumps(list(map(str, reference))))
    done = torchrun("maisi_tools.cli", "realism", tmp_path / "plain.json", made, *options)
    assert done.stdout.count("fid_axial@") == 1
    assert json.loads((tmp_path / "two" / "realism.json").read_text()) == expected


def test_slices_lie_across_the_axes_and_air_is_left_out():
    volume = torch.zeros(1, 3, 4, 5)
    volume[0, 1, 2, 3] = 0.5
    found = dict(slices_of(volume))
    assert {plane: tuple(slices.shape) for plane, slices in found.items()} == {
        "sagittal": (1, 1, 4, 5),
        "coronal": (1, 1, 3, 5),
        "axial": (1, 1, 3, 4),
    }
    assert found["axial"][0, 0, 1, 2] == 0.5


def test_equal_volumes_have_the_highest_ms_ssim(network, folder, tmp_path):
    same = tmp_path / "same"
    same.mkdir()
    for i in range(2):
        (same / f"{i}.nii.gz").write_bytes(files(folder, "plain")[0].read_bytes())
    plain = files(folder, "plain")
    found = measure_realism(plain, files(tmp_path, "same"), tmp_path, network, SPACING, 112, 1)["figures"]
    assert found["ms_ssim_generated"] == pytest.approx(1, abs=1e-4)
    assert found["ms_ssim_reference"] < found["ms_ssim_generated"] - 5e-4


def test_weights_have_their_hash_in_the_name(tmp_path):
    network = SliceNetwork("resnet18")
    path = tmp_path / "weights.pt"
    torch.save(network.network.state_dict(), path)
    again = SliceNetwork("resnet18", path)
    assert again.name != network.name and again.name.startswith("resnet18-")
    slices = torch.rand(2, 1, 32, 32)
    assert torch.equal(again(slices), network(slices))


def test_command_and_bad_input(folder, tmp_path, capsys):
    plain, noisy = str(folder / "plain"), str(folder / "noisy")
    options = ["--output_dir", str(tmp_path), *GRID, "--pairs", "0"]
    assert main(["realism", plain, noisy, *options]) == 0
    assert "fid_axial@resnet18-random0" in capsys.readouterr().out
    assert main(["realism", plain, noisy, *options[:-2]]) == 2
    assert "112 voxels" in capsys.readouterr().err
    assert main(["realism", plain, noisy, *options[:-1], "-1"]) == 2
    assert "pairs is -1; allowed are whole numbers from 0 up" in capsys.readouterr().err
    for grid, words in (
        (("--spacing", "0"), "spacing is 0.0; allowed is a number from 0.1 to 100"),
        (("--spacing", "-3"), "spacing is -3.0; allowed"),
        (("--size", "0"), "size is 0; allowed is a whole number from 1 on"),
        (("--size", "-8"), "size is -8; allowed"),
    ):
        assert main(["realism", plain, noisy, *options, *grid]) == 2
        assert words in capsys.readouterr().err
    assert main(["realism", plain, noisy, *options, "--network", "vgg"]) == 2
    assert "resnet18, resnet50" in capsys.readouterr().err
    (tmp_path / "realism.json").write_text('{"figures": 3}')
    assert main(["realism", plain, noisy, *options]) == 2
    assert "realism.json would be written over, and no `maisi realism` wrote it" in capsys.readouterr().err
    (tmp_path / "realism.json").unlink()
    with pytest.raises(InputError, match="at least two"):
        measure_realism(
            files(folder, "plain")[:1], files(folder, "noisy"), tmp_path, SliceNetwork("resnet18"), SPACING, SIZE, 0
        )
