from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.masks import edits
from maisi_tools.masks.edits import (
    augment_lesion,
    edit_file,
    fit_field_of_view,
    flip_sides,
    insert_lesion,
    remove_lesion,
    resize_organ,
    swap_sides,
    twins,
    volumes_ml,
)
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import BODY, HOSTS, VOCABULARY, hosts_of, label_id

SIZE, SPACING = (48, 36, 52), (7.5, 7.5, 8.5)
VOXEL_MM3 = float(np.prod(SPACING))
LESIONS = ("hepatic tumor", "lung tumor", "pancreatic tumor", "bone lesion", "left kidney cyst")
TUMOR = label_id("hepatic tumor")
SEEDS = range(40)


@pytest.fixture(scope="module")
def torsos():
    return [make_phantom("torso", SIZE, SPACING, seed) for seed in range(3)]


def drawn(torsos, seed):
    """A phantom, a lesion and a generator for one of the seeded edits."""
    return torsos[seed % len(torsos)], label_id(LESIONS[seed % len(LESIONS)]), np.random.default_rng(seed)


def counts(labels):
    return np.bincount(labels.ravel(), minlength=BODY + 1)


# --- 200 seeded edits: five kinds, 40 of each -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_insert_then_remove(torsos, seed):
    labels, lesion, rng = drawn(torsos, seed)
    diameter = 16 if lesion == label_id("pancreatic tumor") else 24
    edited = insert_lesion(labels, SPACING, lesion, diameter, rng)
    new = edited == lesion
    assert new.sum() == round(np.pi / 6 * diameter**3 / VOXEL_MM3)
    assert set(np.unique(labels[new])) <= set(hosts_of(lesion)) and len(np.unique(labels[new])) == 1
    assert ndimage.label(new, np.ones((3, 3, 3)))[1] == 1
    assert np.array_equal(edited[~new], labels[~new])
    assert np.isin(remove_lesion(edited, SPACING, lesion)[new], hosts_of(lesion)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_augment(torsos, seed):
    labels, lesion, rng = drawn(torsos, seed)
    labels = insert_lesion(labels, SPACING, lesion, 18 if lesion == label_id("pancreatic tumor") else 30, rng)
    zoom = float(rng.uniform(0.85, 1.2))
    edited = augment_lesion(labels, SPACING, lesion, rng, zoom, shift_mm=10, elastic_mm=3)
    before, after = labels == lesion, edited == lesion
    # Parts that only an organ's shape cuts off are zoomed for themselves: half a voxel of rounding for each.
    parts = ndimage.label(before, np.ones((3, 3, 3)))[1]
    assert abs(after.sum() - zoom**3 * before.sum()) <= 0.5 * parts
    organs = remove_lesion(labels, SPACING, lesion)
    assert set(np.unique(organs[after])) <= set(np.unique(organs[before])) <= set(hosts_of(lesion))
    rest = ~(before | after)
    assert np.array_equal(edited[rest], labels[rest]) and set(np.unique(edited)) <= {0, *VOCABULARY}


@pytest.mark.parametrize("seed", SEEDS)
def test_resize(torsos, seed):
    labels, _, rng = drawn(torsos, seed)
    organ = label_id(("liver", "spleen", "stomach", "left kidney", "right lung lower lobe")[seed % 5])
    factor = float(rng.uniform(0.7, 1.4))
    edited = resize_organ(labels, SPACING, organ, factor)
    before, after = counts(labels), counts(edited)
    assert abs(after[organ] / before[organ] - factor) <= 0.5 / before[organ] + 1e-9
    assert np.array_equal(edited == 0, labels == 0)  # the skin stays
    changed = edited != labels
    assert set(np.unique(edited)) == set(np.unique(labels))
    groups = {VOCABULARY[int(id)].group for id in np.unique(labels[changed]) if id != organ}
    assert groups <= set(edits.YIELDING)
    # All that was added lies nearer to the organ than what was left out.
    if factor > 1:
        distance = ndimage.distance_transform_edt(labels != organ, sampling=SPACING)
        left = np.isin(edited, [id for group in edits.YIELDING for id in edits.labels_in_group(group)])
        assert distance[changed].max() <= distance[left].min() + 1e-6 or organ in np.unique(edited[left])


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.3, 3.0])
def test_resizing_in_a_box_is_that_in_the_whole(torsos, factor, monkeypatch):
    """But for which voxel is taken of several that are equally far."""
    labels, _, _ = drawn(torsos, 0)
    organ = label_id("spleen")
    boxed = resize_organ(labels, SPACING, organ, factor)
    whole = (slice(None),) * 3
    monkeypatch.setattr(edits, "_boxes", lambda inside, mm: iter([(whole, np.inf)]))
    full = resize_organ(labels, SPACING, organ, factor)
    depth = edits._signed_distance(labels == organ, np.array(SPACING))
    assert np.allclose(np.sort(depth[boxed == organ]), np.sort(depth[full == organ]))
    assert np.array_equal(boxed, full) or factor > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_flip(torsos, seed):
    labels, _, rng = drawn(torsos, seed)
    labels = np.roll(labels, int(rng.integers(-4, 5)), axis=0)
    edited = flip_sides(labels)
    before, after = counts(labels), counts(edited)
    middle, upper = label_id("right lung middle lobe"), label_id("right lung upper lobe")
    for label in VOCABULARY.values():
        if label.id in (middle, upper):
            continue
        name = label.name.replace("left", "*").replace("right", "left").replace("*", "right")
        if label.name != "left atrial appendage":
            assert after[label_id(name)] == before[label.id], label.name
    assert after[label_id("left lung upper lobe")] == before[middle] + before[upper] and after[middle] == 0
    liver, cord = (np.argwhere(edited == label_id(name)).mean(axis=0)[0] for name in ("liver", "spinal cord"))
    assert liver < cord  # it lies on the right, at high x, in the phantom


@pytest.mark.parametrize("seed", SEEDS)
def test_field_of_view(torsos, seed):
    labels, _, rng = drawn(torsos, seed)
    mask = MetaTensor(torch.from_numpy(labels)[None], affine=torch.diag(torch.tensor([*SPACING, 1.0])))
    organ = label_id(("liver", "spleen", "right kidney", "heart", "left lung lower lobe")[seed % 5])
    spacing = [float(mm) for mm in rng.uniform(3.5, 5.0, 3)]
    fitted = fit_field_of_view(mask, spacing, (64, 60, 56), [organ])
    assert fitted.shape == (1, 64, 60, 56) and np.allclose(fitted.pixdim, spacing, rtol=0.03)
    got, asked = (volumes_ml(m.numpy()[0], m.pixdim.tolist())[organ] for m in (fitted, mask))
    assert 0.9 < got / asked < 1.1
    assert set(np.unique(fitted)) <= set(np.unique(labels))
    # Where the organ lies in the world stays: its centre in mm, by the affine, within a voxel.
    world = [
        m.affine.numpy()[:3, :3] @ np.argwhere(m.numpy()[0] == organ).mean(axis=0) + m.affine.numpy()[:3, 3]
        for m in (fitted, mask)
    ]
    assert np.allclose(*world, atol=max(SPACING))


# --- what the edits do exactly ----------------------------------------------------------------------------------------


def block():
    """A liver cube with a tumor in it, in a body, with a rib that touches it and a kidney beside it."""
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[2:28, 2:28, 2:28] = BODY
    labels[8:20, 8:20, 8:20] = label_id("liver")
    labels[12:16, 12:16, 17:20] = TUMOR
    labels[20:22, 8:20, 8:20] = label_id("right rib 9")
    labels[8:20, 20:25, 8:20] = label_id("right kidney")
    return labels


def test_same_seed_same_edit():
    a, b, c = (insert_lesion(block(), (2, 2, 2), TUMOR, 12, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and (a != c).any()
    a, b, c = (augment_lesion(block(), (2, 2, 2), TUMOR, np.random.default_rng(seed), 1.1, 4, 2) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and (a != c).any()


def test_augment_without_a_change_changes_nothing():
    assert np.array_equal(augment_lesion(block(), (2, 2, 3), TUMOR, np.random.default_rng(0)), block())


def test_remove_gives_the_tumor_back_to_its_organ():
    removed = remove_lesion(block(), (1, 1, 1), TUMOR)
    assert np.array_equal(removed == 1, np.isin(block(), (1, TUMOR))) and not (removed == TUMOR).any()
    only = np.where(block() == 1, BODY, block())  # all of the organ that was segmented is the tumor
    assert (remove_lesion(only, (1, 1, 1), TUMOR)[block() == TUMOR] == 1).all()


def test_bone_lesion_goes_to_the_nearest_bone():
    labels = np.full((9, 5, 5), BODY, np.uint8)
    labels[:3], labels[5:], labels[3:5] = label_id("left hip"), label_id("sacrum"), label_id("bone lesion")
    removed = remove_lesion(labels, (1, 1, 1), label_id("bone lesion"))
    hip, sacrum = label_id("left hip"), label_id("sacrum")
    assert removed[:, 2, 2].tolist() == [hip] * 4 + [sacrum] * 5


def test_resize_counts_the_tumor_as_part_of_the_organ_and_leaves_bone_and_other_organs():
    labels = block()
    whole = np.isin(labels, (1, TUMOR)).sum()
    for factor in (0.6, 0.9, 1.25, 1.6):
        edited = resize_organ(labels, (2, 2, 2), 1, factor)
        assert abs(np.isin(edited, (1, TUMOR)).sum() - factor * whole) <= 0.5
        for stays in ("right rib 9", "right kidney"):
            assert np.array_equal(edited == label_id(stays), labels == label_id(stays))
    assert np.array_equal(resize_organ(labels, (2, 2, 2), 1, 1.0), labels)
    # The tumor lies at the upper surface: it is cut as far as the organ shrinks, and not moved.
    assert (resize_organ(labels, (2, 2, 2), 1, 0.6) == TUMOR)[labels != TUMOR].sum() == 0


def test_an_organ_that_the_volume_cuts_stays_at_its_border():
    """A straight cord gets thinner, not shorter. What fills the volume has no surface but its border."""
    x, y = np.ogrid[:40, :40]
    labels = np.full((40, 40, 30), BODY, np.uint8)
    cord = label_id("spinal cord")
    labels[(x - 20) ** 2 + (y - 20) ** 2 <= 6**2] = cord
    for factor in (0.9, 0.5):
        resized = resize_organ(labels, (2, 2, 2.5), cord, factor) == cord
        assert abs(resized.sum() - factor * (labels == cord).sum()) <= 0.5
        in_slices = resized.sum(axis=(0, 1))
        assert in_slices.max() - in_slices.min() <= 8, "but for which of several equal voxels is taken"
    whole = np.full((8, 8, 8), 1, np.uint8)
    whole[0, 0, 0] = BODY
    assert (resize_organ(whole, (2, 2, 2), 1, 256 / 511) == 1).sum() == 256


def test_flip_swaps_parotids_and_custom_placeholders(tmp_path):
    labels = np.zeros((4, 1, 1), np.uint8)
    labels[:, 0, 0] = [18, 2, 0, 20]
    assert flip_sides(labels)[:, 0, 0].tolist() == [18, 0, 2, 20]

    assert twins()[18] == 20 and twins()[20] == 18 and 16 not in twins()
    path = tmp_path / "map.json"
    path.write_text('{"1": "placeholder 129: left eye", "2": "placeholder 130: right eye", "3": "liver"}')
    assert twins(read_label_map(path))[129] == 130 and 18 not in twins(read_label_map(path))
    path.write_text('{"1": 18, "2": 20, "3": "placeholder 129: face"}')
    assert twins(read_label_map(path))[18] == 20 and 129 not in twins(read_label_map(path))
    path.write_text('{"1": "liver"}')  # says nothing of placeholders: they are OpenKBP's
    assert flip_sides(labels, read_label_map(path))[:, 0, 0].tolist() == [18, 0, 2, 20]
    path.write_text('{"1": "placeholder 18: pituitary", "2": "placeholder 20: oral cavity"}')
    assert flip_sides(labels, read_label_map(path))[:, 0, 0].tolist() == [20, 0, 2, 18]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Parotid_L", "Parotid_R"),
        ("ParotidLeft", "ParotidRight"),
        ("Lt Parotid", "Rt Parotid"),
        ("Brachial plexus (L)", "Brachial plexus (R)"),
        ("Glnd_Submand_L", "Glnd_Submand_R"),
        ("left eye", "Eye_R"),
    ],
)
def test_flip_swaps_placeholders_of_whatever_clinical_names(left, right, tmp_path, caplog):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"7": f"placeholder: {left}", "8": f"placeholder: {right}", "9": "left kidney"}))
    labels = np.array([21, 14, 0, 129], np.uint8).reshape(4, 1, 1)
    assert flip_sides(labels, read_label_map(path))[:, 0, 0].tolist() == [21, 0, 5, 129] and not caplog.text


def test_flip_names_a_class_without_its_other_side(tmp_path, caplog):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"7": "placeholder: Eye_L", "8": "placeholder: Parotid_R", "9": "placeholder: Lens_LR"}))
    labels = np.array([21, 14, 0, 129], np.uint8).reshape(4, 1, 1)
    assert flip_sides(labels, read_label_map(path))[:, 0, 0].tolist() == [129, 0, 5, 21]
    assert "map.json has no class for the other side of Eye_L, Parotid_R: where left and right" in caplog.text


def test_sides_of_arrays_and_tensors():
    mask = np.array([[0, 1, 5, 14], [18, 20, 200, 31]], dtype=np.uint8)
    swapped = swap_sides(mask)
    assert swapped.dtype == np.uint8 and swapped.tolist() == [[0, 1, 14, 5], [20, 18, 200, 28]]
    values = swap_sides(torch.tensor([18.0, 87.0]))
    assert values.dtype == torch.float32 and values.tolist() == [20, 88]
    both = twins()
    assert all(both[both[id]] == id for id in both if id not in (28, 30, 31))


def test_field_of_view_names_what_would_be_cut():
    mask = MetaTensor(torch.from_numpy(block())[None])
    with pytest.raises(InputError, match="keeps of liver 66%, right kidney 0% only; allowed is at least 90%"):
        fit_field_of_view(mask, size=(30, 8, 30), organs=[1, label_id("right kidney")])
    with pytest.raises(InputError, match="spleen is not in the mask; allowed are liver"):
        fit_field_of_view(mask, size=(30, 8, 30), organs=[3])
    kept = fit_field_of_view(mask, size=(16, 16, 40), organs=[label_id("right kidney")])
    assert kept.shape == (1, 16, 16, 40) and (kept == label_id("right kidney")).sum() == 12 * 5 * 12


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m, rng: remove_lesion(m, (1, 1, 1), 1), "liver. is no lesion"),
        (lambda m, rng: remove_lesion(m, (1, 1, 1), 23), "lung tumor is not in the mask; allowed are liver"),
        (lambda m, rng: remove_lesion(np.where(m == TUMOR, 23, m), (1, 1, 1), 23), "none of the organs"),
        (lambda m, rng: insert_lesion(m, (1, 1, 1), TUMOR, 40, rng), "up to 11.7 mm"),
        (lambda m, rng: insert_lesion(m, (1, 1, 1), TUMOR, 0.5, rng), "smaller than a voxel"),
        (lambda m, rng: insert_lesion(m, (1, 1, 1), TUMOR, -3, rng), "diameter is -3"),
        (lambda m, rng: insert_lesion(m, (1, 1, 1), TUMOR, 5, rng, host=5), "does not grow in right kidney.*liver"),
        (lambda m, rng: augment_lesion(m, (1, 1, 1), TUMOR, rng, zoom=4), "does not fit into liver"),
        (lambda m, rng: augment_lesion(m, (1, 1, 1), TUMOR, rng, shift_mm=-1), "shift is -1"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), 1, 50), "no room to grow.*up to"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), 1, 0), "factor is 0"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), 1, 0.01), "hepatic tumor would vanish"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), TUMOR, 2), "resized by augmentation"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), BODY, 2), "no organ"),
        (lambda m, rng: resize_organ(m, (1, 1, 1), 3, 2), "spleen is not in the mask"),
        (lambda m, rng: resize_organ(np.where(m == BODY, 0, m), (1, 1, 1), 1, 0.8), "no body.*leaves room.*add_body"),
        (lambda m, rng: resize_organ(np.where(m == BODY, 28, m), (1, 1, 1), 1, 1.2), "no body"),  # nor lung alone
        (lambda m, rng: flip_sides(np.where(m == 1, 150, m)), r"labels \[150\]"),
        (lambda m, rng: resize_organ(m, (1, 1), 1, 2), "three axes"),
    ],
)
def test_wrong_input(edit, said):
    with pytest.raises(InputError, match=said):
        edit(block(), np.random.default_rng(0))


def test_every_lesion_has_a_name_in_the_vocabulary():
    assert all(label_id(name) and hosts_of(label_id(name)) for name in HOSTS)


def test_lesions_that_are_moved_onto_each_other_stay_in_their_organ():
    labels = np.full((24, 12, 12), label_id("liver"), np.uint8)
    labels[2:5, 4:7, 4:7] = labels[8:11, 4:7, 4:7] = TUMOR
    for seed in range(10):
        edited = augment_lesion(labels, SPACING, TUMOR, np.random.default_rng(seed), zoom=1.2, shift_mm=45)
        assert (edited == TUMOR).sum() == 2 * round(27 * 1.2**3)


def test_an_organ_of_a_mask_without_body_shrinks_inside_one(tmp_path):
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[8:16, 8:16, 8:16] = label_id("liver")
    path, output = tmp_path / "liver.nii.gz", tmp_path / "edited.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5, 5, 1])), path)
    edit_file(path, output, read_label_map("maisi"), resize={"liver": 0.8})
    edited = np.asarray(nib.load(output).dataobj)
    assert (edited == label_id("liver")).sum() == round(0.8 * 512)
    assert (edited == BODY)[labels == 0].any()  # a body all around, not the organ's rim alone
    wrong = {
        "size is .0, 10, 10.": {"size": (0, 10, 10)},
        "spacing .-1, 2, 2. mm; allowed are": {"spacing": (-1, 2, 2)},
        "shift and elastic move the lesions that augment names, and it names none": {"shift_mm": 5},
    }
    for words, settings in wrong.items():
        with pytest.raises(InputError, match=words):
            edit_file(path, output, read_label_map("maisi"), **settings)


def test_an_organ_with_a_placeholder_is_resized_by_its_name(tmp_path):
    labels = np.full((12, 12, 12), BODY, np.uint8)
    labels[4:8, 4:8, 4:8] = 18
    path, output = tmp_path / "parotid.nii.gz", tmp_path / "edited.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5, 5, 1])), path)
    changes = edit_file(path, output, read_label_map("maisi"), resize={"left parotid gland": 0.5})
    assert (np.asarray(nib.load(output).dataobj) == 18).sum() == 32
    assert changes["left parotid gland"] == (8.0, 4.0)  # 64 and 32 voxels of 0.125 ml


def test_a_field_of_view_keeps_a_placeholder_by_its_name(tmp_path):
    labels = np.full((12, 12, 12), BODY, np.uint8)
    labels[4:8, 4:8, 4:8] = 7
    path, output, names = tmp_path / "mask.nii.gz", tmp_path / "edited.nii.gz", tmp_path / "map.json"
    nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5, 5, 1])), path)
    names.write_text('{"7": "placeholder 129: face", "200": "body"}')
    edit_file(path, output, read_label_map(names), size=(6, 6, 6), organs=["face"])
    assert (np.asarray(nib.load(output).dataobj) == 129).sum() == 64


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (3.0, 1.0, 1.5)])
def test_a_lesion_is_shifted_by_so_many_mm_whatever_the_voxels(spacing):
    mm = np.array(spacing)
    size = tuple(int(n) for n in 60 / mm)
    labels = np.full(size, label_id("liver"), np.uint8)
    places = (np.indices(size).reshape(3, -1).T - (np.array(size) - 1) / 2) * mm
    labels[(np.linalg.norm(places, axis=1) <= 8).reshape(size)] = TUMOR
    for seed in range(4):
        moved = augment_lesion(labels, spacing, TUMOR, np.random.default_rng(seed), shift_mm=12.0)
        before, after = (np.argwhere(one == TUMOR).mean(0) * mm for one in (labels, moved))
        assert np.linalg.norm(after - before) == pytest.approx(12, abs=0.5 * mm.max())


@pytest.mark.parametrize("zoom", [0.8, 1.5])
def test_a_zoom_is_of_the_diameter(zoom):
    labels = np.full((40, 40, 40), label_id("liver"), np.uint8)
    labels[15:25, 15:25, 15:25] = TUMOR
    zoomed = augment_lesion(labels, (1.0, 1.0, 1.0), TUMOR, np.random.default_rng(0), zoom=zoom)
    assert (zoomed == TUMOR).sum() == round(1000 * zoom**3)


def test_a_lesion_fills_half_of_its_organ_at_most():
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[5:25, 5:25, 5:25] = label_id("liver")  # 8000 voxels of 1 mm: half of it is a sphere of 19.69 mm
    grown = insert_lesion(labels, (1.0, 1.0, 1.0), TUMOR, 19.6, np.random.default_rng(0))
    assert (grown == TUMOR).sum() == round(np.pi / 6 * 19.6**3)
    with pytest.raises(InputError, match="up to 19.7 mm .half of the largest"):
        insert_lesion(labels, (1.0, 1.0, 1.0), TUMOR, 19.8, np.random.default_rng(0))
