from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import labels_in_group
from maisi_tools.metrics.neighbours import (
    GRID_MM,
    CoarseVolume,
    coarse_volume,
    nearest_training,
    read_coarse,
    score_samples,
)

SPACING = (5.0, 5.0, 4.0)


def patient(seed: int) -> np.ndarray:
    labels = make_phantom("head_neck", size=(48, 44, 48), spacing=SPACING, seed=seed)
    hu = np.where(labels > 0, 40, -1000)
    for group, value in (("bone", 600), ("airway", -990), ("lung", -800)):
        hu[np.isin(labels, labels_in_group(group))] = value
    return hu.astype(np.int16)


def save(path, hu, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu, np.diag([*spacing, 1.0])), path)
    return str(path)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("training")
    return [save(folder / f"p{seed}_ct.nii.gz", patient(seed)) for seed in range(4)]


def plain_distance(a: CoarseVolume, b: CoarseVolume, shift: tuple[int, int, int]) -> float:
    """The definition, by copying both volumes into one large array."""
    room = [2 * max(n, m) + abs(s) for n, m, s in zip(a.hu.shape, b.hu.shape, shift, strict=True)]
    hu = np.zeros((2, *room))
    seen, body = np.zeros((2, 2, *room), bool)
    for k, (volume, first) in enumerate(((a, (0, 0, 0)), (b, shift))):
        start = [n // 4 + s for n, s in zip(room, first, strict=True)]
        place = tuple(slice(s, s + n) for s, n in zip(start, volume.hu.shape, strict=True))
        hu[k][place], seen[k][place], body[k][place] = volume.hu, True, volume.body
    counted = body.any(axis=0) & seen.all(axis=0)
    if np.count_nonzero(body.all(axis=0)) < 0.5 * min(a.body.sum(), b.body.sum()):
        return np.inf
    return float(np.sqrt(np.mean((hu[0] - hu[1])[counted] ** 2)))


def test_distance_is_the_least_over_all_shifts(training):
    query, other = coarse_volume(patient(7), SPACING, "q"), read_coarse(training[0])
    shifts = np.stack(np.meshgrid(range(-4, 5), range(-4, 5), range(-8, 9)), -1).reshape(-1, 3)
    mirrored = CoarseVolume("", other.hu[::-1], other.body[::-1])
    least = min(plain_distance(query, seen, tuple(shift)) for shift in shifts for seen in (other, mirrored))
    found = nearest_training([query], training[:1])[0]
    assert found["distance_hu"] == pytest.approx(least, abs=0.01)
    assert found["to_second"] == 1 and found["nearest"] == "p0_ct" and found["case"] == "q"


def test_copies_are_near_and_others_are_not(training, tmp_path):
    rng = np.random.default_rng(0)
    original = patient(2)
    exact = coarse_volume(original, SPACING, "exact")
    noisy = original + rng.normal(0, 60, original.shape)
    blurred = ndimage.gaussian_filter(original.astype(float), 0.8)
    cut = coarse_volume(original[4:, :-3, 8:], SPACING, "cut")  # 20 and 32 mm: whole coarse voxels or not
    padded = np.pad(blurred, ((0, 0), (0, 0), (10, 12)), constant_values=-1000)
    # A mirror image is a copy, too: networks are trained with both.
    copied = (noisy, blurred, padded, blurred[::-1])
    queries = [exact, *(coarse_volume(hu, SPACING, "copy") for hu in copied), cut]
    copies = nearest_training(queries, training)
    others = nearest_training([coarse_volume(patient(seed), SPACING) for seed in (12, 13, 14)], training)
    usual = np.mean([row["distance_hu"] for row in others])
    assert copies[0]["distance_hu"] == 0 and copies[0]["to_second"] == 0
    (mirrored,) = nearest_training([CoarseVolume("mirrored", exact.hu[::-1], exact.body[::-1])], training)
    assert mirrored["distance_hu"] == 0 and mirrored["nearest"] == "p2_ct"
    assert [row["nearest"] for row in copies] == ["p2_ct"] * 6
    assert max(row["distance_hu"] for row in copies) < 0.5 * usual
    assert max(row["to_second"] for row in copies) < 0.4 < min(row["to_second"] for row in others)


def test_a_training_volume_that_is_there_twice_counts_once(training, tmp_path):
    twice = [*training, save(tmp_path / "again_ct.nii.gz", patient(2))]
    blurred = ndimage.gaussian_filter(patient(2).astype(float), 0.8)
    queries = [coarse_volume(hu, SPACING, "copy") for hu in (patient(2), blurred)]
    assert nearest_training(queries, twice) == nearest_training(queries, training)
    (found,) = nearest_training(queries[1:], [twice[2], twice[4]])
    assert found["to_second"] == 1  # there is no second one


def test_coarse_voxels_are_averages_at_their_place():
    ramp = np.broadcast_to(np.arange(40.0)[:, None, None] * 10, (40, 40, 40))
    volume = coarse_volume(ramp, (2.0, 2.0, 2.0))
    assert volume.hu.shape == (8, 8, 8)
    middles = (np.arange(8) + 0.5) * GRID_MM / 2 - 0.5  # in voxels of the ramp
    np.testing.assert_allclose(volume.hu[1:-1, 4, 4] - 1000, 10 * middles[1:-1], atol=0.5)


def test_slices_of_padding_are_cut():
    hu = np.full((20, 20, 30), -1000.0)
    hu[4:16, 4:16, 10:20] = 0
    volume = coarse_volume(hu, (5.0, 5.0, 5.0))
    assert volume.hu.shape == (10, 10, 5) and volume.body[2:8, 3:7].all() and not volume.body[:2].any()


def test_table_of_samples_and_kept_out(training, tmp_path):
    kept_out = [{"image": save(tmp_path / f"k{seed}_ct.nii.gz", patient(seed))} for seed in (11, 12)]
    samples = [
        {"image": save(tmp_path / "new.nii.gz", patient(21))},
        {"image": save(tmp_path / "copy.nii.gz", patient(1))},
    ]
    summary = score_samples(samples, [{"image": path} for path in training], kept_out, tmp_path / "out")
    with open(tmp_path / "out" / "metrics.csv") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    usual = np.mean([float(rows[f"kept out: k{seed}_ct"]["kept_out_distance_hu"]) for seed in (11, 12)])
    assert summary["kept_out_distance_hu"]["mean"] == pytest.approx(usual) and summary["ratio"]["cases"] == 2
    assert float(rows["new"]["ratio"]) == pytest.approx(float(rows["new"]["distance_hu"]) / usual, abs=1e-4)
    assert 0.6 < float(rows["new"]["ratio"]) < 1.7
    assert float(rows["copy"]["ratio"]) == 0 and rows["copy"]["nearest"] == "p1_ct"
    assert "nearest" not in summary


def test_volumes_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """A folder a patient, with a ct.nii.gz each."""
    places = ("real/1", "real/2", "kept/3", "kept/4", "made/1", "made/2")
    for seed, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        save(tmp_path / place / "ct.nii.gz", patient(seed))
    shutil.copy(tmp_path / "real" / "2" / "ct.nii.gz", tmp_path / "made" / "1")
    made, real, kept = (
        [{"image": str(path)} for path in sorted(tmp_path.glob(f"{kind}/*/*"))] for kind in ("made", "real", "kept")
    )
    summary = score_samples(made, real, kept, tmp_path / "out")
    with open(tmp_path / "out" / "metrics.csv") as file:
        lines = list(csv.reader(file))
    assert lines[0].count("case") == 1 and len(set(lines[0])) == len(lines[0])
    assert [line[0] for line in lines[1:]] == ["1/ct", "2/ct", "kept out: 3/ct", "kept out: 4/ct"]
    assert lines[1][lines[0].index("nearest")] == "2/ct" and float(lines[1][lines[0].index("ratio")]) == 0
    assert summary["distance_hu"]["cases"] == summary["kept_out_distance_hu"]["cases"] == 2


def test_what_is_refused(training, tmp_path):
    with pytest.raises(InputError, match="no voxel above"):
        coarse_volume(np.full((10, 10, 10), -1000.0), SPACING)
    speck = np.full((40, 40, 40), -1000, np.int16)
    speck[20, 20, 20] = -200
    sample = {"image": save(tmp_path / "speck_ct.nii.gz", speck)}
    with pytest.raises(InputError, match="speck_ct has no tissue above .* HU that is left at 10 mm; give a CT with"):
        score_samples([sample], [{"image": training[0]}], [{"image": training[1]}], tmp_path)
    with pytest.raises(InputError, match="at least one of each"):
        nearest_training([], training)
    with pytest.raises(InputError, match="no kept-out volume"):
        score_samples([{"image": training[0]}], [{"image": training[1]}], [], tmp_path)
    with pytest.raises(InputError, match="gone_ct.nii.gz does not exist"):
        nearest_training([read_coarse(training[0])], [str(tmp_path / "gone_ct.nii.gz")])


def test_kept_out_volumes_that_cannot_be_compared_are_refused(tmp_path):
    """Bodies farther apart in plane than volumes are shifted have no distance, and copies none to compare with."""

    def cube(name: str, at: int, hu: int = 40) -> dict[str, str]:
        ct = np.full((48, 48, 24), -1000, np.int16)
        ct[at : at + 6, at : at + 6, 8:16] = hu
        return {"image": save(tmp_path / f"{name}_ct.nii.gz", ct)}

    training, near, far, copy = [cube("training", 2)], cube("near", 2, 60), cube("far", 40), cube("copy", 2)
    with pytest.raises(InputError, match="copy of a training volume or overlaps none"):
        score_samples([near], training, [far, copy], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    summary = score_samples([near], training, [cube("other", 2, 50), far, copy], tmp_path / "out")
    assert summary["ratio"]["mean"] == pytest.approx(2, rel=0.02)


def test_a_volume_without_body_has_no_distance(training):
    """One that :func:`coarse_volume` did not make: no shift has the overlap."""
    nothing = CoarseVolume("nothing", np.zeros((6, 6, 6), np.float32), np.zeros((6, 6, 6), bool))
    assert nearest_training([nothing], training[:2])[0]["distance_hu"] == np.inf


@pytest.mark.parametrize(("common", "is_copy"), [(6, True), (4, False)])
def test_half_of_the_smaller_body_must_be_common(tmp_path, common, is_copy):
    """Ten slices of tissue, of which the last or first so many are another volume's: a copy from one half on."""
    rng = np.random.default_rng(0)

    def tissue(slices: int) -> np.ndarray:  # constant in each slice, so that smoothing in plane changes nothing
        return np.broadcast_to(rng.choice([-100, 900], slices), (8, 8, slices)).astype(np.int16)

    training = tissue(12)
    query = np.concatenate([training[..., -common:], tissue(10 - common)], axis=2)
    spacing = (GRID_MM,) * 3
    path = save(tmp_path / "t_ct.nii.gz", np.where(training < 0, -101, training), spacing)
    (found,) = nearest_training([coarse_volume(query, spacing, "q")], [path])
    assert (found["distance_hu"] < 200) == is_copy, found
