"""Training masks of small CTs with known tissues."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Spacing

from maisi_tools.cli import main
from maisi_tools.datasets.complete import complete_masks, twins_of
from maisi_tools.errors import InputError
from maisi_tools.masks.body import AIR_HU
from maisi_tools.masks.vocabulary import BODY, label_id
from maisi_tools.volumes.reading import read_volume

AFFINE = np.array([[3.0, 0, 0, -50], [0, 3, 0, 20], [0, 0, 4, 5], [0, 0, 0, 1]])
BOX = (slice(6, 34), slice(8, 32), slice(None))
ORGAN, BONE = (slice(12, 16), slice(12, 16), slice(5, 9)), (slice(22, 27), slice(18, 24), slice(4, 12))


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, str]]:
    """Two cases of a block of water with a bone in it; the first has labels: 7 marks an organ."""
    hu = np.full((40, 40, 16), -1000, dtype=np.int16)
    hu[BOX] = 0
    hu[BONE] = 900
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[ORGAN] = 7
    for name in ("p1_ct", "p2_ct"):
        nib.save(nib.Nifti1Image(hu, AFFINE), tmp_path / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "p1_seg.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"7": "liver"}))
    return [
        {"image": str(tmp_path / "p1_ct.nii.gz"), "label": str(tmp_path / "p1_seg.nii.gz")},
        {"image": str(tmp_path / "p2_ct.nii.gz")},
    ]


def test_own_labels_stay_and_the_ct_tells_the_rest(cases, tmp_path):
    paths = complete_masks(cases, tmp_path / "out", tmp_path / "map.json")
    assert [path.name for path in paths] == ["p1_ct_mask.nii.gz", "p2_ct_mask.nii.gz"]
    expected = np.zeros((40, 40, 16), dtype=np.uint8)
    expected[BOX] = BODY
    expected[BONE] = label_id("skull")
    without = expected.copy()
    expected[ORGAN] = label_id("liver")
    for path, wanted in zip(paths, (expected, without), strict=True):
        image = nib.load(path)
        assert image.get_data_dtype() == np.uint8 and np.allclose(image.affine, AFFINE)
        assert np.array_equal(np.asarray(image.dataobj), wanted)


def test_masks_that_are_there_are_not_made_again(cases, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lung = np.full((2, 2, 2), label_id("left lung upper lobe"), dtype=np.uint8)
    nib.save(nib.Nifti1Image(lung, AFFINE), out / "p1_ct_mask.nii.gz")
    paths = complete_masks(cases, out, tmp_path / "map.json")
    assert nib.load(paths[0]).shape == (2, 2, 2) and nib.load(paths[1]).shape == (40, 40, 16)
    before = paths[1].read_bytes(), paths[1].stat().st_mtime_ns
    assert complete_masks(cases, out, tmp_path / "map.json") == paths
    assert (paths[1].read_bytes(), paths[1].stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "content",
    [
        '[{"image": "ct.nii.gz", "label": "seg.nii.gz"}]',
        *('{"training": []}', '["a.nii.gz"]', "no JSON", "3", '[{"image": "a.nii.gz", "region": [], "patient": "x"}]'),
    ],
)
def test_the_users_own_list_of_cases_is_not_written_over(cases, tmp_path, content):
    own = tmp_path / "out" / "cases.json"
    own.parent.mkdir()
    own.write_text(content)
    with pytest.raises(InputError, match=r"cases\.json would be written over, and no `maisi complete_masks` wrote it"):
        complete_masks(cases, own.parent, tmp_path / "map.json")
    assert own.read_text() == content and [path.name for path in own.parent.iterdir()] == ["cases.json"]
    own.unlink()
    complete_masks([{**cases[1], "modality": "ct"}], own.parent, tmp_path / "map.json")
    complete_masks(cases, own.parent, tmp_path / "map.json")  # over a list of ours
    assert len(json.loads(own.read_text())) == 2


def test_a_list_without_cases_is_refused_and_nothing_written(tmp_path, capsys):
    (tmp_path / "list.json").write_text(json.dumps({"testing": [{"image": "a.nii.gz"}]}))
    assert main(["complete_masks", str(tmp_path / "list.json"), str(tmp_path / "out")]) != 0
    assert "list.json has no case under training or validation" in capsys.readouterr().err
    with pytest.raises(InputError, match="no case is given"):
        complete_masks([], tmp_path / "out", "maisi")
    assert not (tmp_path / "out").exists()


def test_links_keep_the_names_that_they_have(cases, tmp_path):
    """The list for encoding names CTs as the user does: those behind links may all be called the same."""
    items = []
    for name in ("p1_ct", "p2_ct"):
        stored = tmp_path / "store" / name / "ct.nii.gz"
        stored.parent.mkdir(parents=True)
        (tmp_path / f"{name}.nii.gz").rename(stored)
        (tmp_path / f"{name}.nii.gz").symlink_to(stored)
        items.append({"image": str(tmp_path / f"{name}.nii.gz")})
    complete_masks(items, tmp_path / "out", "maisi")
    listed = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert [entry["image"] for entry in listed] == [item["image"] for item in items]


def test_a_masks_json_says_which_of_its_placeholders_are_left_and_right(cases, tmp_path):
    """Also of a mask of an earlier version, which stays; a map without placeholders leaves it to OpenKBP's."""
    sided = {"7": "placeholder 129: left breast", "8": "placeholder 130: right breast", "9": "placeholder 18: tumour"}
    out = tmp_path / "out"
    for classes, pairs, swapped in (
        ({"7": "placeholder: left breast"}, [], [2, 18, 20, 129, 130]),
        (sided, [[129, 130], [130, 129]], [2, 18, 20, 130, 129]),
        ({"7": 129}, None, [2, 20, 18, 129, 130]),
    ):
        (tmp_path / "map.json").write_text(json.dumps(classes))
        paths = complete_masks(cases, out, tmp_path / "map.json")
        said = [json.loads(path.with_name(f"{path.name[:-7]}.json").read_text()) for path in paths]
        assert [one.get("twins") for one in said] == [pairs, pairs]
        table = twins_of(read_volume(paths[0], "mask"))
        assert [table.get(id, id) for id in (2, 18, 20, 129, 130)] == swapped
        assert table[label_id("left kidney")] == label_id("right kidney")

    (tmp_path / "map.json").write_text(json.dumps(sided))
    path = complete_masks(cases, out, tmp_path / "map.json")[0]
    beside, voxels = path.with_name("p1_ct_mask.json"), path.stat().st_mtime_ns
    whole = json.loads(beside.read_text())
    beside.write_text(json.dumps({name: value for name, value in whole.items() if name != "twins"}))
    complete_masks(cases, out, tmp_path / "map.json")
    assert json.loads(beside.read_text()) == whole and path.stat().st_mtime_ns == voxels
    for wrong in (3, [[1]], [[129, "x"]], [[129, 300]], {"129": 130}):
        beside.write_text(json.dumps({**whole, "twins": wrong}))
        with pytest.raises(InputError, match=r"p1_ct_mask\.json has twins .* allowed are pairs of ids"):
            twins_of(read_volume(path, "mask"))


@pytest.mark.parametrize("change", ["ct", "label", "label_map", "spacing"])
def test_what_a_mask_was_made_from_decides_whether_it_is_made_again(cases, tmp_path, change):
    out, label_map, spacing = tmp_path / "out", tmp_path / "map.json", None
    paths = complete_masks(cases, out, label_map)
    before = [path.stat().st_mtime_ns for path in paths]
    if change in ("ct", "label"):
        path = Path(cases[0]["image" if change == "ct" else "label"])
        image = nib.load(path)
        array = np.asarray(image.dataobj).copy()
        array[14, 14, 7] = 50 if change == "ct" else 0
        nib.save(nib.Nifti1Image(array, image.affine), path)
    elif change == "label_map":
        label_map.write_text(json.dumps({"7": "spleen"}))
    else:
        spacing = [6, 6, 4]
    complete_masks(cases, out, label_map, spacing)
    changed = [path.stat().st_mtime_ns != old for path, old in zip(paths, before, strict=True)]
    assert changed == [True, change == "spacing"]  # the second case has no label


def test_a_worker_process_writes_what_this_one_does(cases, tmp_path):
    one = complete_masks(cases, tmp_path / "one", tmp_path / "map.json")
    two = complete_masks(cases, tmp_path / "two", tmp_path / "map.json", workers=1)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert (tmp_path / "one" / "cases.json").read_bytes() == (tmp_path / "two" / "cases.json").read_bytes()


def test_a_given_region_holds_and_names_are_unique(cases, tmp_path):
    cases[1]["region"] = ["lower"]
    complete_masks(cases, tmp_path / "out", tmp_path / "map.json")
    assert [case["region"] for case in json.loads((tmp_path / "out" / "cases.json").read_text())] == [
        ["abdomen"],
        ["lower"],
    ]
    with pytest.raises(InputError, match="several CTs have the name p1_ct"):
        complete_masks([cases[0], {"image": "elsewhere/p1_ct.nii"}], tmp_path / "out", tmp_path / "map.json")


def test_cases_are_listed_with_their_regions(cases, tmp_path, caplog):
    """What encode.json reads: p1 has a liver and bone, p2 bone alone, which "skull" stands for and tells nothing."""
    cases[0]["modality"] = "ct_contrast"
    complete_masks(cases, tmp_path, tmp_path / "map.json")
    assert "nothing tells the body region of 1 of 2 CTs, such as " in caplog.text and "p2_ct.nii.gz" in caplog.text
    listed = json.loads((tmp_path / "cases.json").read_text())
    assert [Path(case["image"]).name for case in listed] == ["p1_ct.nii.gz", "p2_ct.nii.gz"]
    assert [case["region"] for case in listed] == [["abdomen"], []]
    assert listed[0]["modality"] == "ct_contrast" and "modality" not in listed[1]


@pytest.mark.parametrize(
    ("named", "region"), [("heart", []), ("skull", ["head"]), ("brainstem", ["head"]), ("placeholder 2: node", [])]
)
def test_bone_that_was_found_tells_no_region_and_an_own_one_does(cases, tmp_path, named, region):
    (tmp_path / "map.json").write_text(json.dumps({"7": named}))
    for _ in range(2):  # as well from what the first run wrote
        complete_masks(cases[:1], tmp_path / "out", tmp_path / "map.json")
        assert [case["region"] for case in json.loads((tmp_path / "out" / "cases.json").read_text())] == [region]


def test_a_run_that_stopped_goes_on(cases, tmp_path):
    """A bad case leaves what was made before it and nothing of itself; once it is mended, the rest is made."""
    bad = Path(cases[0]["label"])
    good = bad.read_bytes()
    bad.write_bytes(b"no NIfTI")
    order = cases[::-1]
    with pytest.raises(InputError, match="p1_seg"):
        complete_masks(order, tmp_path / "out", tmp_path / "map.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p2_ct_mask.json", "p2_ct_mask.nii.gz"]
    bad.write_bytes(good)
    assert all(path.is_file() for path in complete_masks(order, tmp_path / "out", tmp_path / "map.json"))


def test_no_label_is_written_over(cases, tmp_path):
    """A mask that was completed here is made anew where it has to be; one of the user's own stays as it is."""
    made, _ = complete_masks(cases, tmp_path / "out", tmp_path / "map.json")
    again = [cases[0] | {"label": str(made)}]
    with pytest.raises(InputError, match="p1_ct_mask.nii.gz would be written over"):
        complete_masks(again, tmp_path / "out", tmp_path / "map.json")
    before = made.read_bytes()
    made.with_name("p1_ct_mask.json").write_text('{"ConversionSoftware": "dcm2niix"}')
    assert complete_masks(again, tmp_path / "out", tmp_path / "map.json") == [made] and made.read_bytes() == before
    made.with_name("p1_ct_mask.json").unlink()
    assert complete_masks(again, tmp_path / "out", tmp_path / "map.json") == [made] and made.read_bytes() == before


def test_mask_on_another_grid_is_refused(cases, tmp_path):
    shifted = AFFINE.copy()
    shifted[0, 3] += 5
    for size, affine in ((15, AFFINE), (16, shifted)):
        nib.save(nib.Nifti1Image(np.ones((40, 40, size), dtype=np.uint8), affine), cases[0]["label"])
        with pytest.raises(InputError, match="lies on another grid than its CT"):
            complete_masks(cases, tmp_path / "out", tmp_path / "map.json")
        assert list((tmp_path / "out").iterdir()) == []


def test_axes_of_the_file_do_not_matter(cases, tmp_path):
    """The same case stored with its axes permuted and flipped gets the same labels at the same places."""
    complete_masks(cases[:1], tmp_path / "ras", tmp_path / "map.json")
    turned = {}
    for key, path in cases[0].items():
        image = nib.load(path)
        orientation = nib.orientations.axcodes2ornt("PIR")
        turned[key] = str(tmp_path / Path(path).name)
        nib.save(
            image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), orientation)),
            turned[key],
        )
    complete_masks([turned], tmp_path / "pir", tmp_path / "map.json")
    (expected,) = (tmp_path / "ras").glob("*.nii.gz")
    (result,) = (tmp_path / "pir").glob("*.nii.gz")
    back = nib.as_closest_canonical(nib.load(result))
    np.testing.assert_array_equal(
        np.asarray(back.dataobj), np.asarray(nib.as_closest_canonical(nib.load(expected)).dataobj)
    )


def test_unknown_label_is_refused(cases, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"8": "liver"}))
    with pytest.raises(InputError, match=r"p1_seg\.nii\.gz: .*does not know: 7"):
        complete_masks(cases, tmp_path / "out", tmp_path / "map.json")


def test_a_mask_without_labels_is_refused_by_name(cases, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((40, 40, 16), np.uint8), AFFINE), cases[0]["label"])
    with pytest.raises(InputError, match=r"p1_seg\.nii\.gz: the mask is empty"):
        complete_masks(cases, tmp_path / "out", tmp_path / "map.json")


def test_labels_too_small_for_a_spacing_are_said(cases, tmp_path, caplog):
    """Two voxels 3 mm wide between those of a grid of 12 mm; without them the case is as one without labels."""
    (tmp_path / "map.json").write_text(json.dumps({"7": "liver", "8": "spleen"}))
    labels = np.zeros((40, 40, 16), np.uint8)
    labels[14, 14, 7] = 7
    for spleen, lost in ((0, "liver"), (8, "liver, spleen")):
        labels[17, 14, 7] = spleen
        nib.save(nib.Nifti1Image(labels, AFFINE), cases[0]["label"])
        made, other = complete_masks(cases, tmp_path / "out", tmp_path / "map.json", [12, 12, 4])
        np.testing.assert_array_equal(np.asarray(nib.load(made).dataobj), np.asarray(nib.load(other).dataobj))
        assert f"p1_seg.nii.gz: of {lost} nothing is left at [12, 12, 4] mm" in caplog.text


def test_a_spacing_completes_what_is_air_after_resampling(tmp_path):
    """A canal one voxel wide is air at 4 mm; at 2 mm its borders are half tissue, and only its middle is air."""
    hu = np.full((40, 40, 16), -1000, dtype=np.int16)
    hu[BOX] = 0
    hu[20, 20, :] = -1000
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[ORGAN] = 7
    affine = np.diag([4.0, 4, 4, 1])
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "p_ct.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "p_seg.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"7": "liver"}))
    case = {"image": str(tmp_path / "p_ct.nii.gz"), "label": str(tmp_path / "p_seg.nii.gz")}
    (path,) = complete_masks([case], tmp_path / "out", tmp_path / "map.json", [2, 2, 4])
    image = nib.load(path)
    mask = np.asarray(image.dataobj)
    assert np.allclose(image.header.get_zooms(), (2, 2, 4)) and image.shape == (79, 79, 16)
    ct = Spacing((2, 2, 4), mode="bilinear")(read_volume(case["image"], "ct"))
    airway = mask == label_id("airway")
    assert airway.any() and (np.asarray(ct[0])[airway] < AIR_HU).all()
    # In each plane its middle (-1000 HU) and the four sides (-500), not the four corners (-250).
    assert airway.sum() == 5 * hu.shape[2]
    liver = (mask == label_id("liver")).sum() * 2 * 2 * 4 / (labels.astype(bool).sum() * 4**3)
    assert 0.75 < liver < 1.25
    assert json.loads((tmp_path / "out" / "cases.json").read_text())[0]["image"] == case["image"]


def test_a_grid_that_is_the_cts_by_rounding_is_the_cts_after_resampling_too(tmp_path):
    """0.7 and 0.7001 mm are 0.04 voxels apart at most; resampled by itself, each had a size of its own."""
    hu = np.full((256, 8, 8), -1000, dtype=np.int16)
    hu[40:200, 2:6, 2:6] = 0
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[60:90, 3:5, 3:5] = 7
    for values, name, mm in ((hu, "ct", 0.7), (labels, "seg", 0.7001)):
        nib.save(nib.Nifti1Image(values, np.diag([mm, 3, 3, 1])), tmp_path / f"p_{name}.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"7": "liver"}))
    case = {"image": str(tmp_path / "p_ct.nii.gz"), "label": str(tmp_path / "p_seg.nii.gz")}
    (path,) = complete_masks([case], tmp_path / "out", tmp_path / "map.json", [1, 3, 3])
    image = nib.load(path)
    assert image.shape == Spacing((1, 3, 3))(read_volume(case["image"], "ct")).shape[1:]
    assert (np.asarray(image.dataobj) == label_id("liver")).sum() == pytest.approx(30 * 0.7 * 4, rel=0.05)


@pytest.mark.parametrize("spacing", [[2, 2], [2, 0, 2], [2, float("nan"), 2], "fine", [2, 2, "x"], 2])
def test_a_spacing_that_is_none_is_refused_before_any_work(cases, tmp_path, spacing):
    with pytest.raises(InputError, match="three positive numbers"):
        complete_masks(cases, tmp_path / "out", tmp_path / "map.json", spacing)
    assert not list((tmp_path / "out").glob("*"))
