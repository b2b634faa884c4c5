"""A scan edited in one place: its files, and every voxel that the edit does not reach, to the last bit."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.data import list_data_collate
from monai.networks.schedulers import RFlowScheduler
from scipy.spatial import cKDTree

from maisi_tools.diffusion import editing
from maisi_tools.diffusion.autoencoder import LatentDecoder, LatentEncoder
from maisi_tools.diffusion.editing import CropEditd, EditedCT, WriteEditd, check_edited, find_scans
from maisi_tools.diffusion.inferers import MaskToCT
from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap
from maisi_tools.masks.vocabulary import BODY, label_id
from maisi_tools.volumes.regions import extended
from thorough import examples

LIVER, TUMOR = label_id("liver"), label_id("hepatic tumor")
MAISI = LABEL_MAPS["maisi"]
VIEW = (20.0, 20.0, 20.0)


def patient(shape=(26, 30, 22)) -> tuple[np.ndarray, np.ndarray]:
    """HU with noise, a couch, metal and padding; labels with a body and a liver. RAS."""
    x, y, z = (np.linspace(-1, 1, n)[tuple(None if d != axis else slice(None) for d in range(3))]
               for axis, n in enumerate(shape))  # fmt: skip
    body = x**2 + y**2 + 0 * z < 0.8
    labels = np.where(body, BODY, 0).astype(np.uint8)
    labels[(x + 0.2) ** 2 + y**2 + z**2 < 0.25] = LIVER
    hu = np.where(body, 40, -1000) + np.random.default_rng(0).normal(0, 12, shape)
    hu[:, -1] = -300
    hu[13:15, 14:16] = 2900
    hu[:2, :2] = -2000
    return np.rint(hu), labels


def oriented(array: np.ndarray, spacing, axes: tuple[int, ...], flips: tuple[bool, ...]):
    """A RAS array as a file in another orientation, with its affine."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-31.5, 12.25, 7.75]
    turn = np.array([[axis, -1 if flip else 1] for axis, flip in zip(np.argsort(axes), flips, strict=True)])
    moved = nib.orientations.apply_orientation(array, turn)
    return np.ascontiguousarray(moved), affine @ nib.orientations.inv_ornt_aff(turn, array.shape)


def stored_as(hu: np.ndarray, kind: str) -> tuple[np.ndarray, float, float]:
    """Stored values with slope and intercept, of the type of which there are many."""
    if kind == "uint16":
        return (hu + 2048).astype(np.uint16), 1.0, -2048.0
    if kind == "int16 scaled":
        return np.rint(hu / 0.25).astype(np.int16), 0.25, 0.0
    return hu.astype(kind) + (0.1 if kind.startswith("float") else 0), 1.0, 0.0


def save(path: Path, values: np.ndarray, affine: np.ndarray, slope=1.0, intercept=0.0) -> Path:
    image = nib.Nifti1Image(values, affine)
    image.header["descrip"] = b"from a scanner"
    image.set_sform(affine, 2)
    if (slope, intercept) != (1.0, 0.0):
        image.header.set_slope_inter(slope, intercept)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


@pytest.fixture
def stage(tiny_controlled, tiny_autoencoder):
    """Stage 3 with the smallest networks, ready to edit."""

    def make(seed: int = 0, **settings) -> EditedCT:
        scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False)
        decoder = LatentDecoder(tiny_autoencoder, 0.8)
        inferer = MaskToCT(decoder, scheduler, 2, seed=seed, multiple=8, condition_scale=1.0, progress=False)
        return EditedCT(inferer, LatentEncoder(tiny_autoencoder, 0.8), [[1.5, 3.0]] * 3, VIEW, **settings)

    return make


def run(item, out: Path, stage: EditedCT, network, label_map: LabelMap = MAISI, **settings) -> dict:
    edits = settings.pop("edits", None)
    crop = CropEditd("image", label_map, edits, VIEW, **settings)(item)
    batch = list_data_collate([crop])
    pred = stage(batch["image"], network)
    return WriteEditd("pred", "image", out, label_map)({**crop, "pred": pred[0]})


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spacing=st.tuples(*[st.sampled_from([0.8, 1.0, 2.0, 3.7])] * 3),
    axes=st.sampled_from(list(itertools.permutations(range(3)))),
    flips=st.tuples(*[st.booleans()] * 3),
    kind=st.sampled_from(["int16", "uint16", "int16 scaled", "int32", "float32", "float64"]),
    voxels=st.sampled_from([0.0, 1.5, 2.5, 4.0]),
)
def test_every_voxel_that_is_not_reached_has_its_bits(
    stage, tiny_controlled, tmp_path_factory, spacing, axes, flips, kind, voxels
):
    out, margin = tmp_path_factory.mktemp("edit"), voxels * min(spacing)
    hu, labels = patient()
    new = labels.copy()
    new[8:11, 13:18, 9:13] = TUMOR
    values, slope, intercept = stored_as(hu, kind)
    turned, affine = oriented(values, spacing, axes, flips)
    ct = save(out / "in" / "case.nii.gz", turned, affine, slope, intercept)
    # The masks in an orientation of their own.
    mask, new_mask = (
        save(out / "in" / f"{name}.nii.gz", *oriented(array, spacing, (1, 0, 2), (True, False, False)))
        for name, array in (("mask", labels), ("new", new))
    )
    item = {"image": str(ct), "mask": str(mask), "new_mask": str(new_mask)}
    run(item, out, stage(), tiny_controlled, margin_mm=margin)

    before, after = (nib.load(path) for path in (ct, out / "case_ct.nii.gz"))
    weight = np.asarray(nib.load(out / "case_weight.nii.gz").dataobj)
    assert after.header.binaryblock == before.header.binaryblock
    raw, edited = (image.dataobj.get_unscaled() for image in (before, after))
    assert edited.dtype == raw.dtype
    np.testing.assert_array_equal(bits(edited)[weight == 0], bits(raw)[weight == 0])
    assert (bits(edited)[weight == 1] != bits(raw)[weight == 1]).mean() > 0.5
    assert edited.min() >= raw.min() and edited.max() <= raw.max()

    # Where the weight is: by the distance of each voxel from the nearest changed one, inside the body.
    to_file = lambda array: oriented(array, spacing, axes, flips)[0]  # noqa: E731
    changed, body = to_file(new != labels), to_file(labels > 0)
    step = np.linalg.norm(affine[:3, :3], axis=0)
    places = np.argwhere(np.ones_like(changed)) * step
    far = cKDTree(np.argwhere(changed) * step).query(places)[0].reshape(changed.shape)
    expected = np.where(far < margin, (1 + np.cos(np.pi * far / max(margin, 1e-9))) / 2, 0) * body
    expected[changed] = 1
    np.testing.assert_allclose(weight, expected, atol=1e-5)
    np.testing.assert_allclose(nib.load(out / "case_weight.nii.gz").affine, affine, atol=1e-6)
    written = nib.load(out / "case_mask.nii.gz")
    assert written.header.binaryblock == nib.load(mask).header.binaryblock
    np.testing.assert_array_equal(written.dataobj, nib.load(new_mask).dataobj)


def test_a_region_is_drawn_as_its_formula_says(stage, tiny_controlled, tiny_autoencoder, tmp_path):
    """One window of the whole volume on the weights' own grid, against Euler steps written out."""
    hu, labels = patient((24, 24, 16))
    new = labels.copy()
    new[8:12, 10:14, 6:10] = TUMOR
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    item = {
        "image": str(save(tmp_path / "ct.nii.gz", hu.astype(np.int16), affine)),
        "mask": str(save(tmp_path / "mask.nii.gz", labels, affine)),
        "new_mask": str(save(tmp_path / "new.nii.gz", new, affine)),
    }
    crop = CropEditd("image", MAISI, None, (48.0, 48.0, 48.0), margin_mm=4.0)(item)
    given_hu, shown, weight = crop["image"].as_tensor()
    np.testing.assert_array_equal(given_hu, hu)
    np.testing.assert_array_equal(shown, new)
    editor = stage(seed=5)
    editor.field_of_view = [48.0] * 3
    result = editor(crop["image"][None], tiny_controlled)[0, 0]

    scan = ((torch.as_tensor(hu).float() + 1000) / 2000).clamp(0, 1)[None, None]
    region = torch.nn.functional.max_pool3d((weight > 0).float()[None, None], 4) > 0
    given = {"spacing_tensor": torch.tensor([[2.0, 2, 2]]), "class_labels": torch.tensor([1])}
    given["top_region_index_tensor"] = torch.tensor([[0.0, 0, 1, 0]])  # the liver shows the abdomen
    with torch.no_grad():
        known = tiny_autoencoder.encode(scan)[0] * 0.8
        noise = torch.randn(4, 6, 6, 4, generator=torch.Generator().manual_seed(5))[None]
        latent = noise
        for time in (1000.0, 500.0):
            velocity = tiny_controlled(torch.as_tensor(new)[None, None].float(), latent, torch.tensor([time]), **given)
            latent = latent + torch.where(region, velocity, known - noise) / 2
        drawn = tiny_autoencoder.decode(torch.where(region, latent, known) / 0.8)[0, 0]
    reached, scan = (weight > 0).numpy(), scan[0, 0]
    error = extended((scan - drawn).numpy(), ~reached & (new > 0), (2.0, 2.0, 2.0))
    corrected = (drawn + torch.from_numpy(error)).clamp(0, 1) * 2000 - 1000
    corrected[torch.as_tensor(new) == 0] = -1000
    expected = weight * corrected + (1 - weight) * torch.as_tensor(hu).float()
    torch.testing.assert_close(result, expected, atol=0.05, rtol=1e-4)
    assert torch.equal(result[weight == 0], torch.as_tensor(hu).float()[weight == 0])


def test_a_scan_drawn_anew_from_its_own_latent_comes_back(stage, tiny_controlled, tiny_autoencoder, tmp_path):
    """With a decoder that is the encoder's inverse but for an offset, the correction takes the offset away."""
    _, labels = patient((24, 24, 16))
    labels[labels == 0] = BODY
    affine = np.diag([2.0, 2.0, 2.0, 1.0])

    class Pooled(torch.nn.Module):
        def encode(self, x):
            coarse = torch.nn.functional.avg_pool3d(x, 4).repeat(1, 4, 1, 1, 1)
            return coarse, torch.ones_like(coarse)

        def decode(self, z):
            return torch.nn.functional.interpolate(z[:, :1], scale_factor=4, mode="trilinear") + 0.1

        factor = 4

    hu = np.full(labels.shape, 40, np.int16)
    hu[0, 0, 0] = -1000
    item = {
        "image": str(save(tmp_path / "ct.nii.gz", hu, affine)),
        "mask": str(save(tmp_path / "mask.nii.gz", labels, affine)),
    }
    crop = CropEditd("image", MAISI, {"redraw": "liver"}, (48.0,) * 3, margin_mm=4.0)(item)
    editor = stage()
    editor.field_of_view = [48.0] * 3
    pooled = Pooled()
    editor.encoder, editor.inferer.decoder = LatentEncoder(pooled), LatentDecoder(pooled)
    truth = editor.encoder((crop["image"][None, :1].as_tensor() + 1000) / 2000)

    def denoiser(self, labels, spacing, network):
        found, conditions = real(labels, spacing, network)
        return (lambda x, t: (truth - x) / (t / 1000).reshape(-1, 1, 1, 1, 1)), conditions

    real = editor.inferer.denoiser
    editor.inferer.denoiser = denoiser.__get__(editor.inferer)
    result = editor(crop["image"][None], tiny_controlled)[0, 0]
    inside = crop["image"][2].as_tensor() > 0
    assert (result[inside] - 40).abs().max() < 2  # 200 HU without the correction


def test_edits_in_any_numbering_and_the_record_of_them(stage, tiny_controlled, tmp_path):
    """A mask of one's own numbers keeps them; a lesion that they lack gets the next; several edits, one call."""
    hu, labels = patient()
    ours = np.select([labels == LIVER, labels == BODY], [5, 0]).astype(np.uint8)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    label_map = LabelMap("ours", {5: LIVER, 9: label_id("spleen")}, {5: "liver", 9: "spleen"})
    item = {
        "image": str(save(tmp_path / "in" / "case.nii.gz", hu.astype(np.int16), affine)),
        "mask": str(save(tmp_path / "in" / "mask.nii.gz", ours, affine)),
    }
    edits = [{"insert": {"hepatic tumor": [6, 5]}, "seed": 3}, {"redraw": "liver"}]
    run(item, tmp_path, stage(), tiny_controlled, label_map, edits=edits, margin_mm=2.0)
    mask = np.asarray(nib.load(tmp_path / "case_mask.nii.gz").dataobj)
    assert set(np.unique(mask)) == {0, 5, 10} and ((mask == ours) | (mask == 10)).all()
    record = json.loads((tmp_path / "case_ct.json").read_text())
    assert record["added_labels"] == {"hepatic tumor": 10} and record["edits"] == edits
    voxels = np.count_nonzero(mask == 10)
    assert record["ml"]["hepatic tumor"] == [0, pytest.approx(voxels * 8 / 1000)]
    assert voxels == round(np.pi / 6 * 6**3 / 8) + round(np.pi / 6 * 5**3 / 8)
    edited = np.asarray(nib.load(tmp_path / "case_ct.nii.gz").dataobj)
    for name, number in (("liver", 5), ("hepatic tumor", 10)):
        assert record["hu"][name]["before"] == pytest.approx(hu[mask == number].mean(), abs=0.06)
        assert record["hu"][name]["after"] == pytest.approx(edited[mask == number].mean(), abs=0.06)
    weight = np.asarray(nib.load(tmp_path / "case_weight.nii.gz").dataobj)
    reached = np.argwhere(weight > 0)
    assert record["region"]["box_ras_mm"] == [(reached.min(0) * 2.0).tolist(), (reached.max(0) * 2.0).tolist()]


@pytest.mark.parametrize(
    ("codes", "unit", "step"), [((0, 0), "mm", 2.0), ((0, 0), "meter", 0.002), ((1, 1), "meter", 0.002),
                                ((0, 1), "micron", 2000.0), ((1, 0), "mm", 2.0)]
)  # fmt: skip
def test_an_edit_lands_where_the_door_saw_it_whatever_the_header_says(
    stage, tiny_controlled, tmp_path, codes, unit, step
):
    """Neither form (the axes are then those of the array, whatever nibabel takes), and units other than mm."""
    hu, labels = patient()
    new = labels.copy()
    new[4:7, 13:18, 9:13] = TUMOR  # not in the middle

    def written(name: str, array: np.ndarray) -> str:
        image = nib.Nifti1Image(array, None)
        affine = np.diag([step, step, step, 1.0])
        image.header.set_zooms((step,) * 3)
        image.header.set_qform(affine, codes[0])
        image.header.set_sform(affine, codes[1])
        image.header.set_xyzt_units(unit)
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, None, image.header), tmp_path / "in" / name)
        assert [int(nib.load(tmp_path / "in" / name).header[f"{form}_code"]) for form in ("qform", "sform")] == [*codes]
        return str(tmp_path / "in" / name)

    files = {"image": hu.astype(np.int16), "mask": labels, "new_mask": new}
    item = {key: written(f"{key}.nii.gz", array) for key, array in files.items()}
    run(item, tmp_path, stage(), tiny_controlled, margin_mm=0.0)
    changed = new != labels
    ct, mask, weight = (nib.load(tmp_path / f"image_{what}.nii.gz") for what in ("ct", "mask", "weight"))
    np.testing.assert_array_equal(np.asarray(mask.dataobj), new)
    np.testing.assert_array_equal(np.asarray(weight.dataobj) > 0, changed)
    np.testing.assert_array_equal(np.asarray(ct.dataobj)[~changed], hu[~changed])
    assert (np.asarray(ct.dataobj) != hu)[changed].mean() > 0.5
    assert ct.header.binaryblock == nib.load(item["image"]).header.binaryblock
    np.testing.assert_allclose(weight.affine, np.diag([2.0, 2.0, 2.0, 1.0]), atol=1e-4)
    box = json.loads((tmp_path / "image_ct.json").read_text())["region"]["box_ras_mm"]
    np.testing.assert_allclose(box, [[8, 26, 18], [12, 34, 24]], atol=0.01)


def test_far_edits_are_drawn_one_by_one_and_a_seed_gives_the_same(stage, tiny_controlled, tmp_path):
    """Each window alone, as if the other were not there: two edits are the two single ones."""
    hu, labels = patient((120, 30, 22))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    one, other = labels.copy(), labels.copy()
    one[20:23, 12:15, 10:13] = LIVER
    other[100:103, 12:15, 10:13] = LIVER
    both = np.where(one != labels, one, other)
    ct = save(tmp_path / "in" / "ct.nii.gz", hu.astype(np.int16), affine)
    mask = save(tmp_path / "in" / "mask.nii.gz", labels, affine)
    made = {}
    for name, new, seed in (("one", one, 0), ("both", both, 0), ("again", both, 0), ("else", both, 1)):
        path = save(tmp_path / "in" / f"{name}.nii.gz", new, affine)
        item = {"image": str(ct), "mask": str(mask), "new_mask": str(path)}
        run(item, tmp_path / name, stage(seed), tiny_controlled)
        made[name] = np.asarray(nib.load(tmp_path / name / "ct_ct.nii.gz").dataobj)
    np.testing.assert_array_equal(made["both"], made["again"])
    np.testing.assert_array_equal(made["both"][:60], made["one"][:60])
    assert (made["both"][60:] != made["one"][60:]).any() and (made["both"] != made["else"]).any()
    assert (made["both"] != hu)[40:80].sum() == 0


def test_nrrd_comes_back_as_nifti_of_its_type(stage, tiny_controlled, tmp_path):
    hu, labels = patient()
    header = {"space": "left-posterior-superior", "space directions": np.diag([-2.0, 2, 2]), "space origin": [9, 8, 7]}
    folder = tmp_path / "in"
    folder.mkdir()
    nrrd.write(str(folder / "ct.nrrd"), hu.astype(np.int32), header)
    nrrd.write(str(folder / "mask.nrrd"), labels, header)
    item = {"image": str(folder / "ct.nrrd"), "mask": str(folder / "mask.nrrd")}
    run(item, tmp_path, stage(), tiny_controlled, edits={"redraw": "liver"})
    ct, weight = (nib.load(tmp_path / f"ct_{what}.nii.gz") for what in ("ct", "weight"))
    assert ct.get_data_dtype() == np.int32
    np.testing.assert_allclose(ct.affine, [[2, 0, 0, -9], [0, -2, 0, -8], [0, 0, 2, 7], [0, 0, 0, 1]])
    still = np.asarray(weight.dataobj) == 0
    np.testing.assert_array_equal(np.asarray(ct.dataobj)[still], hu[still])
    assert (np.asarray(ct.dataobj)[~still] != hu[~still]).any()


def write_segments(path: Path, layers: np.ndarray, segments: list[tuple[str, int, int]]) -> str:
    """A segmentation as 3D Slicer saves it: (layer, X, Y, Z), and the name, value and layer of each segment."""
    header = {
        "space": "left-posterior-superior",
        "kinds": ["list", "domain", "domain", "domain"],
        "space directions": [[np.nan] * 3, [-2.0, 0, 0], [0, -2.0, 0], [0, 0, 2.0]],
        "space origin": [0.0, 0, 0],
    }
    for number, (name, value, layer) in enumerate(segments):
        keys = {"ID": f"Segment_{number}", "Name": name, "LabelValue": value, "Layer": layer, "Tags": ""}
        header |= {f"Segment{number}_{key}": str(entry) for key, entry in keys.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), layers, header)
    return str(path)


def test_a_segmentation_of_slicer_gets_the_numbering_of_the_label_map(stage, tiny_controlled, tmp_path):
    """Slicer deals out values as they come, in layers where segments overlap: they are no numbering to keep."""
    hu, labels = patient()
    liver = labels == LIVER
    spleen = np.zeros_like(liver)
    spleen[20:23, 13:17, 9:13] = True
    layers = np.stack([np.where(spleen, LIVER, 0), liver]).astype(np.uint8)  # the spleen has the liver's number
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    item = {
        "image": str(save(tmp_path / "in" / "case.nii.gz", hu.astype(np.int16), affine)),
        "mask": write_segments(tmp_path / "in" / "m.seg.nrrd", layers, [("spleen", LIVER, 0), ("liver", 1, 1)]),
    }
    run(item, tmp_path, stage(), tiny_controlled, edits={"insert": {"hepatic tumor": 6}, "seed": 3}, margin_mm=2.0)
    image = nib.load(tmp_path / "case_mask.nii.gz")
    mask, tumor = np.asarray(image.dataobj), np.asarray(image.dataobj) == TUMOR
    np.testing.assert_allclose(image.affine, affine)
    assert tumor.sum() == round(np.pi / 6 * 6**3 / 8) and (liver | ~tumor).all()
    np.testing.assert_array_equal(mask[~tumor], np.select([spleen, liver], [label_id("spleen"), LIVER])[~tumor])


@pytest.mark.parametrize(
    ("change", "edits", "words"),
    [
        (
            {"size": 1},
            {"redraw": "liver"},
            ["another grid", "25 x 30 x 22 voxels of [2.0, 2.0, 2.0] mm and 26 x 30 x 22 voxels of"],
        ),
        ({"spacing": (2.0, 2.0, 2.5)}, {"redraw": "liver"}, ["spacing [2.0, 2.0, 2.5] and [2.0, 2.0, 2.0] mm"]),
        ({"origin": 3.0}, {"redraw": "liver"}, ["origin [3.0, 0.0, 0.0] and [0.0, 0.0, 0.0] mm"]),
        ({"turned": 0.02}, {"redraw": "liver"}, ["axes [[1.0, 0.02, 0.0]"]),
        ({}, {"insert": {"pancreatic tumor": 5}}, ["grows in pancreas", "none"]),
        ({}, {"insert": {"lung tumor": 5}}, ["grows in left lung upper lobe or", "none of them"]),
        ({}, {"remove": "hepatic tumor"}, ["hepatic tumor is not in the mask"]),
        ({}, {"resize": {"liver": 1.0}}, ["change no voxel", "redraw"]),
        ({}, {"redraw": "body"}, ["of the body", "allowed is 50%", "inference.json"]),
        ({}, None, ["edits are None", "insert"]),
        ({}, [], ["edits are []"]),
        ({}, {"seed": 1}, ["edits are"]),
        ({}, {"redraw": "liver", "margin": 3}, ["has margin", "shift_mm"]),
        ({}, {"redraw": "liver", "seed": -1}, ["seed of an edit is -1"]),
        ({}, {"insert": "hepatic tumor"}, ["insert is 'hepatic tumor'", "name -> number"]),
        ({}, {"redraw": {"liver": 1}}, ["redraw is"]),
        ({"air": True}, {"redraw": "liver"}, ["no body around"]),
    ],
)
def test_edits_that_cannot_be_made_are_refused(tmp_path, change, edits, words):
    hu, labels = patient()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    own = np.diag([*change.get("spacing", (2.0, 2.0, 2.0)), 1.0])
    own[0, 3] = change.get("origin", 0.0)
    cosine, sine = np.cos(change.get("turned", 0.0)), np.sin(change.get("turned", 0.0))
    own[:3, :3] = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ own[:3, :3]
    if change.get("air"):
        hu = np.where(hu == 2900, 0, -1000)[:, ::-1]  # a rod
        labels = np.where(labels == LIVER, LIVER, 0).astype(np.uint8)
    item = {
        "image": str(save(tmp_path / "ct.nii.gz", hu.astype(np.int16), affine)),
        "mask": str(save(tmp_path / "mask.nii.gz", labels[change.get("size", 0) :], own)),
    }
    with pytest.raises(InputError) as raised:
        CropEditd("image", MAISI, edits, VIEW)(item)
    for word in words:
        assert word in str(raised.value)


def test_a_label_that_the_map_does_not_know_is_not_another_one(tmp_path):
    """65537 is no 1, as it would be in 16 bits."""
    hu, labels = patient()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    wide = labels.astype(np.int32)
    wide[labels == LIVER] += 65536
    item = {"image": str(save(tmp_path / "ct.nii.gz", hu.astype(np.int16), affine))}
    item["mask"] = str(save(tmp_path / "mask.nii.gz", wide, affine))
    with pytest.raises(InputError, match=f"does not know: {65536 + LIVER}"):
        CropEditd("image", MAISI, {"redraw": "body"}, VIEW)(item)


@pytest.mark.parametrize(("slope", "intercept"), [(1 / 256, 0.0), (5 / 65535, 2.5), (-0.5, 0.0)])
def test_a_new_structure_gets_its_number_in_labels_with_a_slope(tmp_path, slope, intercept):
    """nibabel stores floating-point labels under an integer header so that they fill the type's range."""
    hu, labels = patient()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    ours = np.where(labels == LIVER, 5, 0)
    stored = np.rint((ours - intercept) / slope).clip(-32768, 32767).astype(np.int16)
    item = {
        "image": str(save(tmp_path / "in" / "case.nii.gz", hu.astype(np.int16), affine)),
        "mask": str(save(tmp_path / "in" / "mask.nii.gz", stored, affine, slope, intercept)),
    }
    label_map = LabelMap("ours", {5: LIVER}, {5: "liver"})
    crop = CropEditd("image", label_map, {"insert": {"hepatic tumor": 6}}, VIEW)(item)
    WriteEditd("pred", "image", tmp_path, label_map)({**crop, "pred": crop["image"][:1]})
    image = nib.load(tmp_path / "case_mask.nii.gz")
    tumor = np.zeros(labels.shape, bool)
    start = json.loads(crop["plan"])["start"]
    place = tuple(slice(first, first + n) for first, n in zip(start, crop["edited"].shape[1:], strict=True))
    tumor[place] = crop["edited"][0].numpy() == TUMOR
    assert tumor.sum() == round(np.pi / 6 * 6**3 / 8)
    np.testing.assert_array_equal(image.get_fdata(), np.where(tumor, 6, ours))
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0) and image.get_data_dtype() == np.int16


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_labels_that_are_one_structure_stay_where_it_is_redrawn(tmp_path, kind):
    """As the prostate's two zones do, and what the map drops: only the lesion is written."""
    hu, labels = patient()
    ours = np.where(labels == LIVER, 5, 0).astype(np.uint8)
    ours[10:16, 13:18][labels[10:16, 13:18] == LIVER] = 6
    ours[3:5, 13:18, 9:13] = 7
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    classes = {5: "lobe", 6: "rest", 7: "fat"}
    if kind == "file":
        mask = save(tmp_path / "in" / "mask.nii.gz", ours, affine)
    else:
        mask = tmp_path / "in" / "mask"
        for number, name in classes.items():
            save(mask / f"{name}.nii.gz", (ours == number).astype(np.uint8), affine)
    image = save(tmp_path / "in" / "case.nii.gz", hu.astype(np.int16), affine)
    label_map = LabelMap("ours", {5: LIVER, 6: LIVER}, classes)
    edits = [{"insert": {"hepatic tumor": 6}}, {"redraw": "liver"}]
    crop = CropEditd("image", label_map, edits, VIEW)({"image": str(image), "mask": str(mask)})
    WriteEditd("pred", "image", tmp_path, label_map)({**crop, "pred": crop["image"][:1]})
    written = np.asarray(nib.load(tmp_path / "case_mask.nii.gz").dataobj)
    tumor = written == 8
    assert tumor.sum() == round(np.pi / 6 * 6**3 / 8) and np.isin(ours[tumor], (5, 6)).all()
    np.testing.assert_array_equal(written[~tumor], ours[~tumor])
    assert crop["edited"][1].sum() == np.isin(ours, (5, 6)).sum()


@pytest.mark.parametrize("has_body", [False, True])
def test_the_room_that_an_organ_leaves_is_body_where_the_mask_has_body(tmp_path, has_body):
    hu, labels = patient()
    given = labels if has_body else np.where(labels == LIVER, LIVER, 0).astype(np.uint8)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    item = {
        "image": str(save(tmp_path / "in" / "case.nii.gz", hu.astype(np.int16), affine)),
        "mask": str(save(tmp_path / "in" / "mask.nii.gz", given, affine)),
    }
    crop = CropEditd("image", MAISI, {"resize": {"liver": 0.6}}, VIEW)(item)
    WriteEditd("pred", "image", tmp_path, MAISI)({**crop, "pred": crop["image"][:1]})
    mask = np.asarray(nib.load(tmp_path / "case_mask.nii.gz").dataobj)
    left = (given == LIVER) & (mask != LIVER)
    assert left.sum() == pytest.approx(0.4 * (given == LIVER).sum(), abs=1)
    np.testing.assert_array_equal(mask, np.where(left, BODY if has_body else 0, given))
    assert "body" in json.loads((tmp_path / "case_ct.json").read_text())["hu"]


def test_masks_of_one_name_belong_to_their_scans(tmp_path):
    entries = [{"image": f"{name}/ct_{name}.nii.gz", "label": f"{name}/labels.nii.gz"} for name in "ab"]
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in (f"ct_{name}", "labels"):
            (tmp_path / name / f"{file}.nii.gz").touch()
    (tmp_path / "list.json").write_text(json.dumps(entries))
    found = find_scans(tmp_path / "list.json", None)
    assert [Path(item["mask"]).parent.name for item in found] == ["a", "b"]


def test_a_series_is_refused_where_nothing_could_write_one(tmp_path, monkeypatch):
    monkeypatch.setattr(editing, "is_series", lambda path: "series" in str(path))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match="needs the extra 'dicom'; install it with: pip install"):
        check_edited([{"image": "series"}], tmp_path)
    check_edited([{"image": "scan.nii.gz"}], tmp_path)


def test_what_no_run_wrote_is_not_written_over(tmp_path):
    """A CT of the user's own whose name an edit would give; one that lies beside a run's JSON is replaced."""
    (tmp_path / "scan_ct.nii.gz").touch()
    with pytest.raises(InputError, match=r"scan_ct.nii.gz would be written over, and no earlier run wrote it"):
        check_edited([{"image": "data/scan.nii.gz"}], tmp_path)
    (tmp_path / "scan_ct.json").write_text('{"added_labels": {}}')
    check_edited([{"image": "data/scan.nii.gz"}], tmp_path)


def test_scans_are_found(tmp_path):
    hu, labels = patient((8, 8, 8))
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", hu.astype(np.int16), np.eye(4))
        save(tmp_path / f"{name}_seg.nii.gz", labels, np.eye(4))
    a, b, a_seg, b_seg = (str(tmp_path / f"{name}.nii.gz") for name in ("a", "b", "a_seg", "b_seg"))
    assert find_scans(a, a_seg) == [{"image": a, "mask": a_seg}]
    assert find_scans(a, a_seg, b_seg) == [{"image": a, "mask": a_seg, "new_mask": b_seg}]
    listed = tmp_path / "list.json"
    entries = [{"image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz", "new_label": "a_seg.nii.gz"} for name in "ab"]
    listed.write_text(json.dumps({"testing": entries}))
    assert find_scans(str(listed), None) == [{"image": a, "mask": a_seg}, {"image": b, "mask": b_seg}]
    for wrong in ((str(listed), a_seg), (a, None), ([a, b], a_seg), (str(listed), None, a_seg)):
        with pytest.raises(InputError, match="allowed is"):
            find_scans(*wrong)
    for modality, refused in (("ct_contrast", False), ("MRI", True)):
        listed.write_text(json.dumps([entry | {"modality": modality} for entry in entries]))
        if refused:
            with pytest.raises(
                InputError, match=r"a\.nii\.gz has the modality 'MRI' in its datalist; .*allowed are ct,"
            ):
                find_scans(str(listed), None)
        else:
            assert len(find_scans(str(listed), None)) == 2


@pytest.mark.parametrize("taken", ["ct", "mask", "weight", "dicom"])
@pytest.mark.parametrize("role", ["mask", "new_mask"])
def test_no_input_is_written_over(stage, tiny_controlled, tmp_path, monkeypatch, role, taken):
    """Refused before anything is drawn, by whatever path the input is named; the writer unlinks none either."""
    hu, labels = patient()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    new = labels.copy()
    new[8:11, 13:18, 9:13] = TUMOR
    ct = save(tmp_path / "p1.nii.gz", hu.astype(np.int16), affine)
    names = {"mask": "labels.nii.gz", "new_mask": "new.nii.gz"}
    names[role] = "p1_dicom/m.nii.gz" if taken == "dicom" else f"p1_{taken}.nii.gz"
    files = {key: save(tmp_path / name, {"mask": labels, "new_mask": new}[key], affine) for key, name in names.items()}
    before = {path: path.read_bytes() for path in (ct, *files.values())}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, ".", "link"):
        with pytest.raises(InputError, match=f"p1_{taken}.* is the input .*give another output_dir"):
            find_scans(str(ct), str(files["mask"]), str(files["new_mask"]), output_dir=folder)
    item = {"image": str(ct), **{key: str(path) for key, path in files.items()}}
    with pytest.raises(InputError, match="give another output_dir"):
        run(item, tmp_path, stage(), tiny_controlled)
    assert {path: path.read_bytes() for path in before} == before
    assert find_scans(*item.values(), output_dir=tmp_path / "out") == [item]
    run(item, tmp_path / "out", stage(), tiny_controlled)  # and over what it wrote itself
    run(find_scans(*item.values(), output_dir=tmp_path / "out")[0], tmp_path / "out", stage(), tiny_controlled)


def test_no_input_of_another_scan_or_of_a_class_folder_is_written_over(tmp_path):
    hu, labels = patient((8, 8, 8))
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", hu.astype(np.int16), np.eye(4))
    save(tmp_path / "b_seg.nii.gz", labels, np.eye(4))
    save(tmp_path / "b_mask.nii.gz", labels, np.eye(4))  # the mask of a
    listed = tmp_path / "list.json"
    entries = [{"image": "a.nii.gz", "label": "b_mask.nii.gz"}, {"image": "b.nii.gz", "label": "b_seg.nii.gz"}]
    listed.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"b_mask.nii.gz would be written over, which is the input .*b_mask.nii.gz"):
        find_scans(str(listed), None, output_dir=tmp_path)
    classes = tmp_path / "classes"
    save(classes / "liver.nii.gz", (labels == LIVER).astype(np.uint8), np.eye(4))
    save(classes / "a_mask.nii.gz", labels, np.eye(4))
    with pytest.raises(InputError, match="a_mask.nii.gz would be written over, which is"):
        find_scans(str(tmp_path / "a.nii.gz"), str(classes), output_dir=classes)


def test_a_body_that_one_mask_alone_has_is_no_change(tmp_path):
    """`maisi edit` adds it; and where a mask has none, a label taken away leaves body."""
    hu, labels = patient()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    organ = np.where(labels == LIVER, LIVER, 0).astype(np.uint8)
    smaller = organ.copy()
    smaller[:9] = 0
    paths = {
        name: str(save(tmp_path / f"{name}.nii.gz", array, affine))
        for name, array in (
            ("image", hu.astype(np.int16)),
            ("bare", organ),
            ("bare_new", smaller),
            ("full", labels),
            ("full_new", np.where((labels == LIVER) & (smaller == 0), BODY, labels).astype(np.uint8)),
        )
    }
    seen = []
    for mask, new in (("bare", "bare_new"), ("bare", "full_new"), ("full", "bare_new"), ("full", "full_new")):
        item = {"image": paths["image"], "mask": paths[mask], "new_mask": paths[new]}
        for complete in (False, True):
            crop = CropEditd("image", MAISI, None, (60.0,) * 3, margin_mm=4.0, complete=complete)(item)
            changed = crop["edited"][1].numpy() > 0
            np.testing.assert_array_equal(changed, organ != smaller)
            assert (crop["image"][1].numpy()[changed] == BODY).all()
            seen.append(crop["image"][2].numpy())
    for weight in seen[1:]:
        np.testing.assert_allclose(weight, seen[0], atol=1e-6)
