from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.masks.body import (
    AddBodyd,
    add_body,
    body_envelope,
    envelope_of_labels,
    envelope_of_organs,
    label_from_ct,
    labels_of_more,
    tissues,
    without_couch,
)
from maisi_tools.masks.label_maps import apply_label_map, read_label_map
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.masks.vocabulary import BODY, labels_in_group
from thorough import examples

SPACING = (4.0, 4.0, 2.5)
SIZE = (64, 48, 40)


def grid(size=SIZE, spacing=SPACING) -> list[np.ndarray]:
    """Coordinates in mm, the origin in the middle."""
    return np.ix_(*((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(size, spacing, strict=True)))


def cylinder(radius_x, radius_y, x0=0.0, y0=0.0, size=SIZE, spacing=SPACING) -> np.ndarray:
    x, y, z = grid(size, spacing)
    return np.broadcast_to(((x - x0) / radius_x) ** 2 + ((y - y0) / radius_y) ** 2 <= 1, size).copy()


@pytest.fixture
def chest():
    """A CT of an elliptic trunk with two lungs, a trachea and a spine on a table, and the parts it is made of."""
    parts = {
        "trunk": cylinder(100, 70),
        "left lung": cylinder(30, 45, -50, 0),
        "right lung": cylinder(30, 45, 50, 0),
        "trachea": cylinder(10, 10, 0, 15),
        "spine": cylinder(16, 14, 0, -45),
    }
    x, y, z = grid()
    parts["table"] = np.broadcast_to((np.abs(y + 84) <= 4) & (np.abs(x) < 120), SIZE).copy()
    rng = np.random.default_rng(0)
    ct = np.full(SIZE, -1000.0)
    for name, hu in [("table", 0), ("trunk", 30), ("left lung", -850), ("right lung", -850), ("trachea", -1000)]:
        ct[parts[name]] = hu
    ct[parts["spine"]] = 500
    return ct + rng.normal(0, 15, SIZE), parts


def test_envelope_of_a_ct_is_the_filled_trunk(chest):
    ct, parts = chest
    assert np.array_equal(body_envelope(ct, SPACING), parts["trunk"])


def test_envelope_at_a_fine_resolution():
    size, spacing = (64, 60, 20), (1.0, 1.1, 1.0)
    trunk = cylinder(24, 22, size=size, spacing=spacing)
    ct = np.where(trunk, 40.0, -1000.0)
    ct[cylinder(5, 5, size=size, spacing=spacing)] = -1000
    assert np.array_equal(body_envelope(ct, spacing), trunk)


def test_envelope_ends_where_the_ct_was_not_reconstructed(chest):
    """As in OpenKBP: a slab of the body, and below it a strip around the cord."""
    ct, parts = chest
    strip = cylinder(20, 20, 0, -45)
    strip[:, :, 15:] = False
    cut = np.where(strip, ct, -1000.0)
    cut[:, :, 15:] = ct[:, :, 15:]
    envelope = body_envelope(cut, SPACING)
    assert np.array_equal(envelope[:, :, 15:], parts["trunk"][:, :, 15:])
    assert np.array_equal(envelope[:, :, :15], strip[:, :, :15])


def test_arms_belong_to_the_body_and_specks_do_not(chest):
    ct, parts = chest
    arm, speck = cylinder(18, 18, 120, 0), cylinder(9, 9, -120, 80)
    ct[arm | speck] = 30
    assert np.array_equal(body_envelope(ct, SPACING), parts["trunk"] | arm)


def test_envelope_of_air_is_empty():
    assert not body_envelope(np.full((8, 8, 8), -1000.0), SPACING).any()
    assert body_envelope(np.full((8, 8, 8), 40.0), SPACING).all()


@given(
    st.tuples(*[st.integers(1, 20)] * 3),
    st.tuples(*[st.floats(0.4, 8)] * 3),
    st.floats(0, 30),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=examples(12), deadline=None)
def test_envelope_of_labels_holds_every_label(size, spacing, margin, seed):
    labels = (np.random.default_rng(seed).random(size) < 0.05) * 7
    envelope = envelope_of_labels(labels, spacing, margin)
    assert envelope.dtype == bool and envelope.shape == size
    assert envelope[labels > 0].all()
    assert envelope.any() == labels.any()


def test_envelope_of_labels_bridges_organs_and_adds_the_margin():
    labels = np.zeros((60, 60, 9), np.uint8)
    labels[15, 30], labels[45, 30] = 5, 14
    envelope = envelope_of_labels(labels, (2.0, 2.0, 2.0), margin_mm=8)
    assert envelope[15:46, 30].all()  # 60 mm apart: closed
    assert envelope[12, 30, 4] and not envelope[9, 30, 4]  # 6 and 12 mm outside, on a grid of 2 mm
    assert not envelope[:, 0].any() and not envelope[:, -1].any()


@pytest.mark.parametrize(
    ("kind", "data_set", "size", "spacing"),
    [("head_neck", "openkbp", (64, 44, 56), (6.0, 6.0, 5.0)), ("torso", "btcv", (52, 40, 44), (8.0, 8.0, 9.0))],
)
@pytest.mark.parametrize("seed", [3, 4])
def test_body_around_few_organs(kind, data_set, size, spacing, seed):
    """Dice with the skin of another phantom, of which only a data set's organs are known."""

    def dice(envelope):
        return 2 * (envelope & body).sum() / (envelope.sum() + body.sum())

    labels = make_phantom(kind, size, spacing, seed)
    body = labels > 0
    organs = np.where(np.isin(labels, list(read_label_map(data_set).values())), labels, 0).astype(np.uint8)
    organs[organs == 120] = 0  # of the skull, OpenKBP has the mandible only
    fitted = add_body(organs, spacing) > 0
    assert fitted[organs > 0].all()
    assert dice(fitted) > 0.85 and dice(fitted) > dice(envelope_of_labels(organs, spacing)) + 0.05


def test_organs_that_tell_no_body():
    labels = make_phantom("torso", (52, 40, 44), (8.0, 8.0, 9.0), 3)
    organs = np.where(np.isin(labels, (1, 3, 5, 14)), labels, 0)
    spacing = (8.0, 8.0, 9.0)
    assert envelope_of_organs(organs, spacing) is not None
    assert envelope_of_organs(np.where(organs < 5, organs, 0), spacing) is None  # two are too few
    assert envelope_of_organs(np.where(labels == 80, 80, organs), spacing) is None  # a rib tells better
    liver = np.argwhere(organs == 1)
    cut = organs[liver[:, 0].min() + 1 : liver[:, 0].max()]  # the liver is cut, one kidney and the spleen, too
    assert envelope_of_organs(cut, spacing) is None


# --- a couch that runs into the body ----------------------------------------------------------------------------------

BED_SIZE, BED_SPACING = (80, 72, 40), (5.0, 5.0, 4.0)


def on_a_couch(shell_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """A trunk with lungs, its back flat on a hollow couch of 300 x 60 mm, and the trunk alone."""
    x, y, _ = grid(BED_SIZE, BED_SPACING)
    top = 40 - 80 + 15.0
    trunk = cylinder(130, 80, 0, 40, BED_SIZE, BED_SPACING) & (y > top)
    depth = np.minimum(np.minimum(top - y, y - (top - 60)), 150 - np.abs(x))
    couch = np.broadcast_to(depth > 0, BED_SIZE) & ~trunk
    ct = np.full(BED_SIZE, -1000.0)
    ct[couch] = np.broadcast_to(np.where(depth <= shell_mm, -50.0, -950.0), BED_SIZE)[couch]
    ct[trunk] = 30
    ct[cylinder(35, 50, -60, 45, BED_SIZE, BED_SPACING) | cylinder(35, 50, 60, 45, BED_SIZE, BED_SPACING)] = -870
    return ct + np.random.default_rng(0).normal(0, 10, BED_SIZE), trunk


@pytest.mark.parametrize("shell_mm", [5, 10, 20])
@pytest.mark.parametrize("turned", [False, True])
def test_a_hollow_couch_goes_whatever_its_shell(shell_mm, turned):
    """The plain envelope has the couch, and without it at most the rounding of the grid is missing or left."""
    ct, trunk = on_a_couch(shell_mm)
    if turned:  # prone, with the couch in front
        ct, trunk = ct[:, ::-1], trunk[:, ::-1]
    plain = body_envelope(ct, BED_SPACING)
    assert plain.sum() > 1.15 * trunk.sum()
    found = without_couch(plain, ct, BED_SPACING)
    too_much, too_little = np.count_nonzero(found & ~trunk), np.count_nonzero(trunk & ~found)
    assert max(too_much, too_little) < 0.02 * np.count_nonzero(trunk)


def test_lungs_and_labelled_air_are_no_couch():
    """Without labels, a body with large lungs stays as it is; what a label claims is known not to be a couch."""
    ct, trunk = on_a_couch(10)
    ct[~trunk] = -1000
    envelope = body_envelope(ct, BED_SPACING)
    lungs = envelope & (ct < -800)
    assert lungs.sum() > 0.1 * envelope.sum()
    assert without_couch(envelope, ct, BED_SPACING) is envelope
    ct, _ = on_a_couch(10)
    plain = body_envelope(ct, BED_SPACING)
    assert without_couch(plain, ct, BED_SPACING, (ct < -700).astype(np.uint8)) is plain


def test_couch_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"the CT has the shape \(4, 4, 4\), its mask \(4, 4, 5\)"):
        without_couch(np.zeros((4, 4, 5), bool), np.zeros((4, 4, 4)), SPACING)
    assert not without_couch(np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4)), SPACING).any()


def test_add_body(chest):
    ct, parts = chest
    labels = np.where(parts["spine"], 40, 0).astype(np.uint8)
    for given_ct in (None, ct):
        completed = add_body(labels, SPACING, given_ct)
        assert completed.dtype == np.uint8
        assert np.array_equal(completed == 40, parts["spine"]) and set(np.unique(completed)) == {0, 40, 200}
    assert np.array_equal(completed > 0, parts["trunk"])
    assert add_body(completed, SPACING) is completed


def test_add_body_transform_reads_the_spacing_from_the_affine(chest):
    ct, parts = chest
    affine = torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([5.0, 6.0, 7.0])
    labels = torch.from_numpy(parts["spine"] * np.uint8(40))[None]
    mask = MetaTensor(labels, affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    item = {"mask": mask, "ct": MetaTensor(torch.from_numpy(ct)[None], affine=affine)}
    done = AddBodyd("mask")(item)["mask"]
    assert done.dtype == torch.uint8 and torch.equal(done.affine, affine)
    assert done.meta["filename_or_obj"] == "a.nii.gz"
    assert np.array_equal(done[0].numpy(), add_body(labels[0].numpy(), SPACING))
    with_ct = AddBodyd("mask", ct_key="ct")(item)["mask"]
    assert np.array_equal(with_ct[0].numpy() > 0, parts["trunk"])


def test_label_from_ct(chest):
    ct, parts = chest
    given_labels = np.zeros(SIZE, np.uint8)
    given_labels[cylinder(6, 6, 0, -45)] = 121
    labels = label_from_ct(ct, given_labels, SPACING)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels == 121, given_labels == 121)
    assert np.array_equal(labels == 120, parts["spine"] & (given_labels == 0))
    assert np.array_equal(labels == 28, parts["left lung"] | parts["right lung"])
    assert np.array_equal(labels == 132, parts["trachea"])
    assert np.array_equal(labels > 0, parts["trunk"])


def test_label_from_ct_leaves_small_dense_spots(chest):
    ct, _ = chest
    ct[32, 40, 20] = 900  # 0.04 ml
    assert label_from_ct(ct, np.zeros(SIZE), SPACING)[32, 40, 20] == 200


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.4, 1.4, 2.5), (4.0, 3.5, 4.0)])
def test_tissues_lie_where_they_are_and_labels_stay(spacing):
    """An airway and a bone in a body, beside a lung that is labelled; blocks of 3, 2 and 1 voxels."""
    mm = np.array(spacing)
    x, y, z = (np.arange(int(n / step)) * step for n, step in zip((110, 90, 66), spacing, strict=True))

    def ball(at, radius):
        return np.hypot(np.hypot(x[:, None, None] - at[0], y[:, None] - at[1]), z - at[2]) <= radius

    air, bone, lung = (ball(at, radius) for at, radius in (((40, 45, 33), 9), ((64, 45, 33), 9), ((40, 20, 33), 11)))
    body = np.hypot((x[:, None, None] - 55) / 50, (y[:, None] - 45) / 40) + 0 * z <= 1
    hu = np.select([air, bone, lung, body], [-960.0, 900.0, -800.0, 40.0], -1000.0).astype(np.float32)
    labels = np.where(lung, 28, 0).astype(np.uint8)
    for inside in (None, body):
        found = tissues(hu, labels, spacing, inside)
        for label, true in ((132, air), (120, bone)):
            shift = (np.argwhere(found == label).mean(0) - np.argwhere(true).mean(0)) * mm
            assert np.abs(shift).max() < 0.2
            assert 2 * ((found == label) & true).sum() / ((found == label).sum() + true.sum()) > 0.8
        assert np.array_equal(found == 28, lung)
        assert ((found > 0) == body).mean() > 0.97
    assert np.array_equal(found > 0, body)  # where it is given
    if min(spacing) > 3:
        assert np.array_equal(found, label_from_ct(hu, labels, spacing, body))


def probe(background: float, hu: float, x: float = 0.0) -> np.ndarray:
    """A trunk of one HU with a rod of another in it, from top to bottom, without noise."""
    ct = np.where(cylinder(100, 70), background, -1000.0)
    ct[cylinder(16, 16, x)] = hu
    return ct


@pytest.mark.parametrize(
    ("hu", "label"),
    [(-450, 132), (-401, 132), (-399, 200), (-300, 200), (249, 200), (251, 120), (300, 120), (900, 120)],
)
def test_thresholds_of_air_and_bone(hu, label):
    """Below -400 HU is air, above 250 HU bone, as documented; a rod of air is no lung (its mean HU is that of air)."""
    labels = label_from_ct(probe(40, hu if hu > -400 else -1000), np.zeros(SIZE), SPACING)
    rod = cylinder(16, 16)
    if hu > -400:
        assert (labels[rod] == label).all()
    ct = probe(40, -1000)
    ct[32, 24, :] = hu  # a line of it in the air, or in the rod
    ct = ct if hu < -300 else probe(40, hu)
    assert (label_from_ct(ct, np.zeros(SIZE), SPACING)[32, 24] == label).all()


@pytest.mark.parametrize(("hu", "is_lung"), [(-930, True), (-700, True), (-510, True), (-490, False), (-970, False)])
def test_lung_is_told_by_its_mean_hu(hu, is_lung):
    lung = cylinder(30, 45, -50)
    ct = np.where(cylinder(100, 70), 40.0, -1000.0)
    ct[lung] = hu
    labels = label_from_ct(ct, np.zeros(SIZE), SPACING)
    assert (labels[lung] == (28 if is_lung else 132)).all()


@pytest.mark.parametrize(("hu", "is_tissue"), [(-290, True), (-310, False)])
def test_threshold_of_the_skin(hu, is_tissue):
    ct = np.where(cylinder(100, 70), float(hu), -1000.0)
    assert body_envelope(ct, SPACING).any() == is_tissue


@pytest.mark.parametrize(("share", "kept"), [(0.04, False), (0.07, True)])
def test_separate_parts_belong_to_the_body_from_a_twentieth_on(share, kept):
    """An arm, and what is smaller; shares are of what the opening leaves, 6 mm less all around."""
    ct = np.where(cylinder(80, 70, -30), 40.0, -1000.0)
    radius = 6 + np.sqrt(share * 74 * 64)
    arm = cylinder(radius, radius, 118 - radius, 60)
    ct[arm] = 40
    assert body_envelope(ct, SPACING)[arm].any() == kept


def test_the_margin_around_labels_is_20_mm_and_gaps_of_50_mm_are_closed():
    labels = np.zeros((120, 90, 5), np.uint8)
    labels[40, 45], labels[65, 45] = 5, 14  # 50 mm apart, on a grid of 2 mm
    body = envelope_of_labels(labels, (2.0, 2.0, 2.0))
    reach = np.flatnonzero(body[:, 45, 2])
    assert body[40:66, 45].all()
    assert (40 - reach[0]) * 2 == pytest.approx(20, abs=2) and (reach[-1] - 65) * 2 == pytest.approx(20, abs=2)
    labels[65], labels[110, 45] = 0, 14  # 140 mm apart
    assert not envelope_of_labels(labels, (2.0, 2.0, 2.0))[75, 45].any()


def test_bad_input():
    with pytest.raises(InputError, match=r"shape \(4, 4\)"):
        body_envelope(np.zeros((4, 4)), SPACING)
    with pytest.raises(InputError, match="positive spacings"):
        envelope_of_labels(np.ones((4, 4, 4)), (1, 0, 1))
    for function in (label_from_ct, lambda ct, labels, spacing: add_body(labels, spacing, ct)):
        with pytest.raises(InputError, match=r"the CT has the shape \(4, 4, 4\), its mask \(4, 4, 5\)"):
            function(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), SPACING)


def test_real_patient(repo_root):
    import nibabel as nib

    folder = repo_root.parent / "shared" / "data" / "openkbp"
    if not (folder / "pt_100_ct.nii.gz").is_file():
        pytest.skip("needs the CTs of OpenKBP, which are not part of the repository")
    image = nib.load(folder / "pt_100_ct.nii.gz")
    ct, spacing = np.asarray(image.dataobj).astype(float), image.header.get_zooms()
    organs = apply_label_map(np.asarray(nib.load(folder / "pt_100_seg.nii.gz").dataobj), read_label_map("openkbp"))
    labels = label_from_ct(ct, organs, spacing)
    assert np.array_equal(labels[organs > 0], organs[organs > 0])
    assert ct[labels == 120].mean() > 250 and ct[labels == 132].mean() < -600 and -100 < ct[labels == 200].mean() < 100
    litres = np.count_nonzero(labels == 28) * np.prod(spacing) / 1e6
    assert 0.5 < litres < 2  # the upper third of two lungs


def test_what_a_mask_may_have_more_of():
    """A completed mask has the found bone and lung under one label each; several lobes, or others, are themselves."""
    size, spacing = (60, 60, 40), (4.0, 4.0, 4.0)
    ct = np.full(size, -1000.0)
    ct[5:55, 5:55] = 30.0
    ct[10:25, 20:40, 10:30], ct[28:32, 45:50, 5:35] = -800.0, 700.0
    found = set(np.unique(label_from_ct(ct, np.zeros(size, np.uint8), spacing)).tolist())
    assert found == {0, BODY, 28, 120}
    bones = set(labels_in_group("bone"))
    assert labels_of_more(found) == bones | {28} and {120, 33} <= bones
    assert labels_of_more({28, 31}) == labels_of_more({30, 1}) == labels_of_more() == bones
