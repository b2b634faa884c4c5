"""Cohorts of small samples, through a narrow ControlNet."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.cli import main
from maisi_tools.cohort.layouts import LAYOUTS, label_names
from maisi_tools.cohort.run import LEAST_RETRIES, make_cohort
from maisi_tools.cohort.spec import read_spec
from maisi_tools.cohort.worker import mask_pool, numbered_labels, scans_of
from maisi_tools.errors import InputError
from maisi_tools.files import sha256
from maisi_tools.masks.body import add_body
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.masks.vocabulary import VOCABULARY, label_id

from .conftest import SPEC


def made(write_spec, bundles, folder: Path, engine: str = "process", workers: int = 1, **changes: str) -> Path:
    make_cohort(read_spec(write_spec(**changes)), folder, bundles, engine, workers)
    return folder


@pytest.fixture(scope="module")
def whole(bundles, tmp_path_factory) -> Path:
    """The cohort of SPEC as it is, to be read alone."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "spec.yaml").write_text(SPEC)
    make_cohort(read_spec(folder / "spec.yaml"), folder / "out", bundles)
    return folder / "out"


def rows_of(folder: Path) -> list[dict]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def samples(content: dict[str, bytes]) -> dict[str, bytes]:
    """What has to be the same whatever made it."""
    return {name: value for name, value in content.items() if name.endswith((".gz", ".dcm", ".csv", "dataset.json"))}


def fake_record(folder: Path, spec, index: int) -> dict:
    """The record of a sample as if it had been left out, written."""
    record = {"index": index, "name": spec.sample_name(index), "status": "left out", "error": "a fake"}
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / f"{record['name']}.json").write_text(json.dumps(record))
    return record


@pytest.fixture
def without_samples(monkeypatch) -> None:
    """Cohorts whose samples are all left out at once: what a folder says of itself is all that is looked at."""

    class Idle:
        def __init__(self, spec, folder, *_):
            self.make = lambda index: fake_record(folder, spec, index)

        def close(self):
            pass

    monkeypatch.setattr("maisi_tools.cohort.run.Worker", Idle)


def test_an_nnunet_data_set(whole):
    described = json.loads((whole / "dataset.json").read_text())
    assert described["numTraining"] == 3 and described["labels"]["left parotid gland"] == 4
    assert {"bone", "airway", "lung"} < described["labels"].keys()  # all bones are merged, not the skull alone
    assert sorted(described["labels"].values()) == list(range(11))
    rows = rows_of(whole)
    assert [row["name"] for row in rows] == ["heads_0000", "heads_0001", "heads_0002"]
    assert len({row["ct_sha256"] for row in rows}) == 3 and all(row["status"] == "done" for row in rows)
    for row in rows:
        ct, mask = (nib.load(whole / row[what]) for what in ("ct", "mask"))
        assert ct.shape == mask.shape == tuple(int(n) for n in row["size"].split())
        assert np.array_equal(ct.affine, mask.affine)
        labels = np.asarray(mask.dataobj)
        assert labels.max() <= 10 and (np.asarray(ct.dataobj)[labels == 0] == -1000).all()
        assert sha256(whole / row["ct"]) == row["ct_sha256"]
    assert not (whole / ".scratch").exists()


def test_labels_that_the_specification_keeps_have_their_names(write_spec, bundles, tmp_path):
    """Fewer labels than the weights know: the numbers in the masks and the names in dataset.json are still a pair."""
    ct = "{num_inference_steps: 1, keep_labels: [120, 18, 200], merge_labels: {bone: 120}}"
    folder = made(write_spec, bundles, tmp_path / "out", count="1", ct=ct)
    names = {"background": 0, "bone": 1, "left parotid gland": 2, "body": 3}
    assert json.loads((folder / "dataset.json").read_text())["labels"] == names
    labels = np.asarray(nib.load(folder / rows_of(folder)[0]["mask"]).dataobj)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert (labels == 3).sum() > (labels == 1).sum() > (labels == 2).sum()


def test_a_stopped_run_goes_on_with_the_same_bytes(write_spec, bundles, files_of, whole, tmp_path):
    parts = made(write_spec, bundles, tmp_path / "parts", count="1")
    (parts / ".scratch").mkdir()  # as a killed run leaves it
    first = (parts / "records" / "heads_0000.json").stat().st_mtime_ns
    made(write_spec, bundles, parts)
    assert (parts / "records" / "heads_0000.json").stat().st_mtime_ns == first  # not made again
    assert samples(files_of(parts)) == samples(files_of(whole))
    (parts / "imagesTr" / "heads_0001_0000.nii.gz").unlink()
    assert make_cohort(read_spec(write_spec()), parts, bundles)["made"] == 1
    assert samples(files_of(parts)) == samples(files_of(whole))


def test_two_ranks_make_the_same(torchrun, write_spec, bundles, files_of, whole, tmp_path):
    given = ["--output_dir", tmp_path / "two", "--bundles", bundles]
    done = torchrun("maisi_tools.cli", "cohort", write_spec(), *given)
    assert done.stdout.count("3 of 3 samples") == 1
    assert samples(files_of(tmp_path / "two")) == samples(files_of(whole))
    for path in (tmp_path / "two" / "labelsTr").glob("*"):  # lost; one rank looks for what is, for both
        path.unlink()
    torchrun("maisi_tools.cli", "cohort", write_spec(), *given)
    assert samples(files_of(tmp_path / "two")) == samples(files_of(whole))


def test_what_a_judge_does_not_see_is_left_out(write_spec, bundles, bundle, tmp_path):
    """The judge sees bone by threshold. What its Dice was stands in the manifest; a stricter limit leaves all out."""
    ct = "{num_inference_steps: 1, min_dice: {skull: %s}}"
    loose, strict = tmp_path / "loose", tmp_path / "strict"
    found = make_cohort(read_spec(write_spec(count="2", ct=ct % 0.01)), loose, bundles, judge=str(bundle))
    dices = [float(row["judge_skull"]) for row in rows_of(loose)]
    assert (found["done"], found["left_out"]) == (2, []) and all(0.01 < dice < 1 for dice in dices)
    spec = read_spec(write_spec(count="2", ct=ct % 1.0))
    found = make_cohort(spec, strict, bundles, judge=str(bundle))
    assert (found["done"], found["left_out"], found["made"]) == (0, ["heads_0000", "heads_0001"], 2)
    assert [(row["status"], row["error"]) for row in rows_of(strict)] == [
        ("left out", "the CT does not show skull")
    ] * 2
    assert not list((strict / "imagesTr").glob("*")) and json.loads((strict / "dataset.json").read_text())
    assert make_cohort(spec, strict, bundles, judge=str(bundle))["made"] == 0
    with pytest.raises(InputError, match="made with other judge"):
        make_cohort(spec, strict, bundles, judge=str(shutil.copytree(bundle, tmp_path / "other")))
    with pytest.raises(InputError, match="min_dice is .*, but there is no judge"):
        make_cohort(spec, strict, bundles)


def test_samples_of_one_mask_differ(write_spec, bundles, tmp_path):
    """Each has the seed that follows from its number."""
    mask = tmp_path / "mask.nii.gz"
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5.0, 3.4, 1.0])), mask)
    masks = f"{{source: files, path: {mask}, label_map: maisi}}"
    rows = rows_of(made(write_spec, bundles, tmp_path / "out", masks=masks, count="2", flip="0"))
    assert len({row["seed"] for row in rows}) == len({row["ct_sha256"] for row in rows}) == 2
    assert rows[0]["mask_sha256"] == rows[1]["mask_sha256"]


def test_classes_of_ones_own_keep_their_sides_and_names(write_spec, bundles, tmp_path):
    """Placeholders are what the label map says, in a mirrored body too, and not OpenKBP's structures."""
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    ours = np.select([labels == 18, labels == 20, labels == 2, labels > 0], [1, 2, 3, 9]).astype(np.uint8)
    nib.save(nib.Nifti1Image(ours, np.diag([5.0, 5.0, 3.4, 1.0])), tmp_path / "mask.nii.gz")
    classes = {"1": "placeholder: left eye", "2": "placeholder: right eye", "3": "placeholder 18: chiasm", "9": "body"}
    (tmp_path / "map.json").write_text(json.dumps(classes))
    masks = f"{{source: files, path: {tmp_path / 'mask.nii.gz'}, label_map: {tmp_path / 'map.json'}}}"
    given = {"masks": masks, "count": "1", "flip": "1", "layout": "msd"}
    folder = made(write_spec, bundles, tmp_path / "out", **given)
    (row,) = rows_of(folder)
    mask = nib.load(folder / row["mask"])
    values = np.asarray(mask.dataobj)
    ids = {21: ours == 2, 129: ours == 1, 18: ours == 3}  # right eyes become left ones, in their mirrored place
    for id, was in ids.items():
        np.testing.assert_array_equal(values == id, was[::-1], err_msg=str(id))
    named = {"0": "background", "18": "chiasm", "21": "left eye", "129": "right eye", "200": "body"}
    assert json.loads((folder / "dataset.json").read_text())["labels"] == named


@pytest.mark.usefixtures("without_samples")
@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("bone", "nnunet", "would be called bone;"),  # as a group of labels that the weights were trained with
        ("right parotid gland", "nnunet", "would be called right parotid gland;"),  # as what they know at 20
        ("bone", "msd", None),  # which tells labels apart by their numbers
        ("chiasm", "nnunet", None),
    ],
)
def test_names_of_an_nnunet_data_set_are_told_apart(write_spec, bundles, tmp_path, name, layout, said):
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    nib.save(nib.Nifti1Image((labels > 0).astype(np.uint8), np.diag([5.0, 5.0, 3.4, 1.0])), tmp_path / "mask.nii.gz")
    (tmp_path / "map.json").write_text(json.dumps({"1": "body", "2": f"placeholder 18: {name}"}))
    masks = f"{{source: files, path: {tmp_path / 'mask.nii.gz'}, label_map: {tmp_path / 'map.json'}}}"
    spec, folder = read_spec(write_spec(masks=masks, layout=layout)), tmp_path / "out"
    if said:
        with pytest.raises(InputError, match=said):
            make_cohort(spec, folder, bundles)
        assert not folder.exists()
        return
    make_cohort(spec, folder, bundles)
    if layout == "nnunet":
        named = json.loads((folder / "dataset.json").read_text())["labels"]
        assert sorted(named.values()) == list(range(11)) and name in named


def test_what_samples_depend_on_stays_as_it_was(write_spec, bundles, tmp_path):
    """The masks that are drawn from, what their labels mean, the config; weights that it never loads may come."""
    bundles = shutil.copytree(bundles, tmp_path / "bundles")
    masks, table = tmp_path / "masks", tmp_path / "map.json"
    masks.mkdir()
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    nib.save(nib.Nifti1Image((labels > 0).astype(np.uint8), np.diag([5.0, 5.0, 3.4, 1.0])), masks / "a.nii.gz")
    table.write_text('{"1": "body"}')
    given = {"masks": f"{{source: files, path: {masks}, label_map: {table}}}", "flip": "0"}

    def go_on(count: int) -> None:
        make_cohort(read_spec(write_spec(**given, count=str(count))), tmp_path / "out", bundles)

    go_on(1)
    (bundles / "maisi_controlnet" / "models" / "released.pt").write_bytes(b"of full_rflow.json")
    go_on(2)
    table.write_text('{"1": "liver"}')
    with pytest.raises(InputError, match="made with other label_map;"):
        go_on(3)
    table.write_text('{"1": "body"}')
    shutil.copy(masks / "a.nii.gz", masks / "b.nii.gz")
    with pytest.raises(InputError, match="made with other masks;"):
        go_on(3)
    (masks / "b.nii.gz").unlink()
    content = (masks / "a.nii.gz").read_bytes()
    nib.save(nib.Nifti1Image((labels > 100).astype(np.uint8), np.diag([5.0, 5.0, 3.4, 1.0])), masks / "a.nii.gz")
    with pytest.raises(InputError, match="made with other masks;"):
        go_on(3)
    (masks / "a.nii.gz").write_bytes(content)
    config = bundles / "maisi_controlnet" / "configs" / "inference.json"
    config.write_text(config.read_text().replace('"guidance_scale": 2.0', '"guidance_scale": 1.5'))
    with pytest.raises(InputError, match="made with other config;"):
        go_on(3)


def test_a_folder_of_an_earlier_version_goes_on(write_spec, bundles, tmp_path):
    """It recorded less, and the weights of all configs."""
    folder = made(write_spec, bundles, tmp_path / "out", count="1")
    earlier, described = (json.loads((folder / "cohort.json").read_text()) for _ in range(2))
    for key in ("config", "numbering"):
        del earlier[key]
    earlier["weights"]["maisi_controlnet/models/released.pt"] = "0"
    earlier["spec"]["masks"] |= {"organ_sizes": {}, "label_map": "openkbp", "settings": {"of no": "use"}}
    (folder / "cohort.json").write_text(json.dumps(earlier))
    assert make_cohort(read_spec(write_spec(count="1")), folder, bundles)["made"] == 0
    earlier["weights"]["maisi_controlnet/models/model.pt"] = "0"
    (folder / "cohort.json").write_text(json.dumps(earlier))
    with pytest.raises(InputError, match="made with other weights;"):
        make_cohort(read_spec(write_spec(count="1")), folder, bundles)
    del described["seeds"]  # which were of 31 bits: further samples would not belong to those that are there
    (folder / "cohort.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="made with other seeds; .*give another folder"):
        make_cohort(read_spec(write_spec(count="1")), folder, bundles)


@pytest.mark.usefixtures("without_samples")
def test_placeholders_keep_the_names_that_samples_were_made_with(write_spec, bundles, tmp_path):
    """Names say which is the other side in a mirrored body. An earlier version recorded the ids alone."""
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    ours = np.select([labels == 18, labels == 20, labels > 0], [1, 2, 9]).astype(np.uint8)
    nib.save(nib.Nifti1Image(ours, np.diag([5.0, 5.0, 3.4, 1.0])), tmp_path / "mask.nii.gz")
    table, folder = tmp_path / "map.json", tmp_path / "out"
    spec = read_spec(write_spec(masks=f"{{source: files, path: {tmp_path / 'mask.nii.gz'}, label_map: {table}}}"))

    def go_on(one: str, two: str) -> None:
        table.write_text(json.dumps({"1": f"placeholder 129: {one}", "2": f"placeholder 130: {two}", "9": "body"}))
        make_cohort(spec, folder, bundles)

    go_on("left eye", "right eye")
    go_on("left eye", "right eye")
    described = json.loads((folder / "cohort.json").read_text())
    assert described["class_names"] == {"129": "left eye", "130": "right eye"}
    for others in (("eye", "lens"), ("right eye", "left eye"), ("left eye", "right lens")):
        with pytest.raises(InputError, match="made with other class_names;"):
            go_on(*others)
    assert json.loads((folder / "cohort.json").read_text()) == described
    del described["class_names"]
    (folder / "cohort.json").write_text(json.dumps(described))
    go_on("eye", "lens")
    with pytest.raises(InputError, match="made with other class_names;"):  # known from now on
        go_on("left eye", "right eye")


@pytest.mark.usefixtures("without_samples")
def test_organs_in_another_order_are_another_cohort(write_spec, bundles, tmp_path):
    """Numbers are drawn for them as they stand."""
    spec = read_spec(write_spec())
    ranges = {"brainstem": [0.8, 0.9], "skull": [1, 2]}

    def go_on(**changes) -> None:
        make_cohort(dataclasses.replace(spec, **changes), tmp_path / "out", bundles)

    go_on(resize=ranges)
    go_on(resize={"brainstem": (0.8, 0.9), "skull": (1.0, 2.0)}, count=4)
    with pytest.raises(InputError, match="made with other order of resize; only count"):
        go_on(resize=dict(reversed(ranges.items())), count=4)
    with pytest.raises(InputError, match="made with other resize;"):
        go_on(resize={"brainstem": 0.8}, count=4)


@pytest.mark.usefixtures("without_samples")
def test_a_cohort_without_a_sample_may_become_another(write_spec, bundles, tmp_path):
    """Weights that refuse its settings, say, stopped the first try before anything was made."""
    folder = tmp_path / "out"
    make_cohort(read_spec(write_spec()), folder, bundles)
    for record in (folder / "records").glob("*.json"):
        record.unlink()
    make_cohort(read_spec(write_spec(flip="0", seed="3")), folder, bundles)
    assert json.loads((folder / "cohort.json").read_text())["spec"]["seed"] == 3
    with pytest.raises(InputError, match="made with other"):
        make_cohort(read_spec(write_spec(flip="0", seed="4")), folder, bundles)


@pytest.mark.usefixtures("without_samples")
def test_a_mask_generator_of_another_config_is_another_one(write_spec, bundles, tmp_path):
    bundles, folder = shutil.copytree(bundles, tmp_path / "bundles"), tmp_path / "out"
    spec = read_spec(write_spec(masks="{source: generator}"))
    make_cohort(spec, folder, bundles)
    config = bundles / "maisi_ldm" / "configs" / "mask_inference.json"
    settings = json.loads(config.read_text())
    reversed_organs = dict(reversed(settings["organs"].items()))
    for other in ({"redraws": 2}, {"single_pieces": []}, {"organs": reversed_organs}):
        config.write_text(json.dumps(settings | other))
        with pytest.raises(InputError, match="made with other generator;"):
            make_cohort(spec, folder, bundles)
    described = json.loads((folder / "cohort.json").read_text())
    del described["generator"]  # as an earlier version
    (folder / "cohort.json").write_text(json.dumps(described))
    make_cohort(spec, folder, bundles)


@pytest.mark.usefixtures("without_samples")
def test_a_judge_of_another_config_is_another_one(write_spec, bundles, bundle, tmp_path):
    """The weights are the same; an earlier version recorded these alone."""
    ct = "{num_inference_steps: 1, min_dice: {skull: 0.5}}"
    spec, folder = read_spec(write_spec(ct=ct)), tmp_path / "out"
    make_cohort(spec, folder, bundles, judge=str(bundle))
    path = bundle / "configs" / "inference.json"
    path.write_text(path.read_text().replace("[15.0, 15.0, 3.4]", "[5.0, 5.0, 3.4]"))
    with pytest.raises(InputError, match="made with other judge;"):
        make_cohort(spec, folder, bundles, judge=str(bundle))
    described = json.loads((folder / "cohort.json").read_text())
    del described["judge"]["config"]
    (folder / "cohort.json").write_text(json.dumps(described))
    make_cohort(spec, folder, bundles, judge=str(bundle))


def test_a_file_names_no_judge(write_spec, bundles, bundle, tmp_path):
    """A segmenter is a bundle, whose config is code."""
    with pytest.raises(InputError, match="ct has judge, which is computed by the config"):
        made(write_spec, bundles, tmp_path / "out", ct=f"{{judge: {bundle}}}")


@pytest.mark.parametrize(
    ("layout", "ct", "mask"),
    [
        ("msd", "imagesTr/heads_0000.nii.gz", "labelsTr/heads_0000.nii.gz"),
        (
            "bids",
            "sub-heads0000/ct/sub-heads0000_ct.nii.gz",
            "derivatives/masks/sub-heads0000/ct/sub-heads0000_desc-mask_dseg.nii.gz",
        ),
        ("folders", "heads_0000/ct.nii.gz", "heads_0000/mask.nii.gz"),
    ],
)
def test_other_layouts_keep_the_vocabulary(write_spec, bundles, tmp_path, layout, ct, mask):
    folder = made(write_spec, bundles, tmp_path / "out", layout=layout, count="1")
    assert (folder / ct).is_file()
    assert 200 in np.unique(np.asarray(nib.load(folder / mask).dataobj))


def test_dicom_studies(write_spec, bundles, files_of, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    folder = made(write_spec, bundles, tmp_path / "out", layout="folders", format="dicom", count="1")
    files = sorted((folder / "heads_0000").rglob("*.dcm"))
    assert {"SEG.dcm", "RTSTRUCT.dcm"} <= {path.name for path in files}
    assert all(pydicom.dcmread(path, stop_before_pixels=True).SyntheticData == "YES" for path in files)
    again = made(write_spec, bundles, tmp_path / "again", layout="folders", format="dicom", count="1")
    assert samples(files_of(folder)) == samples(files_of(again))


def test_a_library_with_tumors_and_organ_sizes(write_spec, bundles, tmp_path):
    """Its masks have no body, as those of TotalSegmentator: a spleen's rim had been all that the CT got of one."""
    library = tmp_path / "library"
    library.mkdir()
    for seed in (0, 1):
        torso = make_phantom("torso", (64, 48, 48), (5.0, 5.0, 3.4), seed)
        organs = np.where(torso == 200, 0, torso).astype(np.uint8)
        nib.save(nib.Nifti1Image(organs, np.diag([5.0, 5.0, 3.4, 1.0])), library / f"t{seed}.nii.gz")
    assert main(["index", str(library)]) == 0
    changes = {
        "masks": "{source: library, path: library, organs: [liver]}",
        "tumors": "[{lesion: hepatic tumor, diameter_mm: [18, 24]}]",
        "resize": "{spleen: [0.7, 0.8]}",
        "layout": "msd",
        "count": "2",
        "flip": "0",
    }
    rows = rows_of(made(write_spec, bundles, tmp_path / "out", **changes))
    assert all("26" in row["labels"].split() and "spleen x 0.7" in row["edits"] for row in rows)
    assert all(row["origin"].startswith(str(library)) for row in rows)
    for row in rows:
        given = np.asarray(nib.load(row["origin"]).dataobj)
        body = (add_body(given, (5.0, 5.0, 3.4)) == 200).sum()
        assert body > 0.2 * given.size
        made_of_it = np.asarray(nib.load(tmp_path / "out" / row["mask"]).dataobj)
        assert 0 <= (made_of_it == 200).sum() - body < (given == 3).sum()


def test_samples_that_fail_are_listed_and_tried_again(write_spec, bundles, tmp_path, capsys):
    spec = write_spec(tumors="[{lesion: lung tumor, diameter_mm: 290}]", count="2", retries="1")
    assert main(["cohort", str(spec), "--output_dir", str(tmp_path / "out"), "--bundles", str(bundles)]) == 2
    assert "2 samples failed: heads_0000, heads_0001" in capsys.readouterr().err
    rows = rows_of(tmp_path / "out")
    assert all(row["status"] == "failed" and row["attempts"] == "2" and "lung tumor" in row["error"] for row in rows)
    assert make_cohort(read_spec(spec), tmp_path / "out", bundles)["made"] == 2


def test_a_folder_of_something_else_is_refused(write_spec, bundles, tmp_path):
    folder = made(write_spec, bundles, tmp_path / "out", count="1")
    with pytest.raises(InputError, match="other seed"):
        make_cohort(read_spec(write_spec(seed="8")), folder, bundles)
    made(write_spec, bundles, folder, count="2")
    with pytest.raises(InputError, match="a cohort of 2 samples, and count is 1; allowed is 2 or more"):
        make_cohort(read_spec(write_spec(count="1")), folder, bundles)
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == len(rows_of(folder)) == 2
    (folder / "records" / "heads_00000.json").touch()
    with pytest.raises(InputError, match="samples named as heads_00000, .*now as heads_0000: give another folder"):
        make_cohort(read_spec(write_spec(count="20000")), folder, bundles)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="other files"):
        make_cohort(read_spec(write_spec()), tmp_path / "mine", bundles)
    with pytest.raises(InputError, match="process, ray"):
        make_cohort(read_spec(write_spec()), tmp_path / "new", bundles, "slurm")


def test_a_cohort_goes_on_from_another_working_directory(write_spec, bundles, tmp_path, monkeypatch):
    """One too whose description has its masks' path as it was seen from there, as earlier versions wrote it."""
    labels = make_phantom("head_neck", (48, 48, 47), (5.0, 5.0, 3.4), seed=1)
    nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5.0, 3.4, 1.0])), tmp_path / "mask.nii.gz")
    spec = write_spec(masks="{source: files, path: mask.nii.gz}", count="1")
    monkeypatch.chdir(tmp_path)
    assert make_cohort(read_spec(spec.name), tmp_path / "out", bundles)["made"] == 1
    description = tmp_path / "out" / "cohort.json"
    assert json.loads(description.read_text())["spec"]["masks"]["path"] == str(tmp_path / "mask.nii.gz")
    description.write_text(description.read_text().replace(str(tmp_path / "mask.nii.gz"), "mask.nii.gz"))
    assert make_cohort(read_spec(spec.name), tmp_path / "out", bundles)["made"] == 0
    monkeypatch.chdir("/")
    assert make_cohort(read_spec(spec), tmp_path / "out", bundles)["made"] == 0


def test_unknown_keys_of_the_bundle_are_refused(write_spec, bundles, tmp_path):
    with pytest.raises(InputError, match="step_count.*no key of the config"):
        made(write_spec, bundles, tmp_path / "out", ct="{step_count: 3}")
    with pytest.raises(InputError, match="autoencoder_ckpt_path, which is computed"):
        made(write_spec, bundles, tmp_path / "out", ct="{autoencoder_ckpt_path: mine.pt}")
    with pytest.raises(InputError, match="num_inference_steps is 'ten'; allowed is a number"):
        made(write_spec, bundles, tmp_path / "out", ct="{num_inference_steps: ten}")
    for settings in ("{run_id: x}", "{output_dir: x}", "{network_def: {}}"):
        with pytest.raises(InputError, match=r"masks\.settings has"):
            made(write_spec, bundles, tmp_path / "out", masks=f"{{source: generator, settings: {settings}}}")
    assert not (tmp_path / "out").exists()


HOLDER = """
import os, sys, time
from pathlib import Path
from maisi_tools.files import held
with held(Path(sys.argv[1]), "taken"):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def test_one_folder_has_one_writer(python, write_spec, bundles, tmp_path):
    """A lock that a killed process does not hold."""
    folder = tmp_path / "out"
    other = subprocess.Popen([python, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        holder = int(other.stdout.readline())
        with pytest.raises(InputError, match="another run makes the cohort in .*out"):
            made(write_spec, bundles, folder, count="1")
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        os.kill(holder, signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert [row["status"] for row in rows_of(made(write_spec, bundles, folder, count="1"))] == ["done"]


def test_a_truncated_record_is_made_again(write_spec, bundles, files_of, tmp_path):
    folder = made(write_spec, bundles, tmp_path / "out", count="1")
    before = files_of(folder)
    for left in ("", '{"name": "heads_0000", "sta', "[]", '{"name": "heads_0000", "status": "done"}'):
        (folder / "records" / "heads_0000.json").write_text(left)
        assert make_cohort(read_spec(write_spec(count="1")), folder, bundles)["made"] == 1, left
        assert files_of(folder) == before, left


@pytest.mark.parametrize("left", ["", "{", "[]", '{"spec": 3, "weights": {}}', '{"spec": {}}'])
def test_a_truncated_description_is_refused_by_name(write_spec, bundles, tmp_path, left):
    (tmp_path / "cohort.json").write_text(left)
    with pytest.raises(InputError, match=r"cohort\.json describes no cohort"):
        make_cohort(read_spec(write_spec(count="1")), tmp_path, bundles)


def kill_workers(folder: Path, stop: threading.Event, seconds: tuple[float, float], most: int, killed: list) -> None:
    """Kill a worker that is making samples of the cohort, again and again (its process is in its scratch's name)."""
    chance = random.Random(0)
    while len(killed) < most and not stop.wait(chance.uniform(*seconds)):
        running = [int(path.name.split("-")[0]) for path in (folder / ".scratch").glob("*")]
        alive = [pid for pid in running if Path(f"/proc/{pid}").exists() and pid != os.getpid()]
        if alive:
            killed.append(chance.choice(alive))
            os.kill(killed[-1], signal.SIGKILL)


def with_kills(
    write_spec, bundles, folder: Path, seconds: tuple[float, float], most: int, **changes: str
) -> tuple[int, float]:
    """Make a cohort on Ray, with at most so many kills at intervals of so many seconds; returns kills and seconds."""
    # Ray's workers are nice by default, and get next to nothing on a machine that is busy otherwise.
    os.environ["RAY_worker_niceness"] = "0"
    stop, killed = threading.Event(), []
    killer = threading.Thread(target=kill_workers, args=(folder, stop, seconds, most, killed))
    killer.start()
    start = time.perf_counter()
    try:
        made(write_spec, bundles, folder, "ray", 2, **changes)
    finally:
        stop.set()
        killer.join()
    return len(killed), time.perf_counter() - start


def test_ray_makes_the_same_though_a_worker_is_killed(write_spec, bundles, files_of, tmp_path):
    pytest.importorskip("ray")
    one = made(write_spec, bundles, tmp_path / "one", count="6")
    killed, _ = with_kills(write_spec, bundles, tmp_path / "ray", (1, 1), 1, count="6")
    assert killed == 1
    rows = rows_of(tmp_path / "ray")
    assert [row["status"] for row in rows] == ["done"] * 6
    assert samples(files_of(tmp_path / "ray")) == samples(files_of(one))


def test_a_sample_that_kills_its_worker_is_given_up(write_spec, bundles, tmp_path, monkeypatch):
    """As one for which memory runs out; the others are made."""
    pytest.importorskip("ray")
    folder = tmp_path / "out"

    class Fragile:  # of this function, so that it travels whole
        def __init__(self, spec, *_):
            self.spec = spec

        def make(self, index):
            with open(folder / "tries", "a") as file:
                file.write(str(index))
            return os._exit(1) if index == 1 else fake_record(folder, self.spec, index)

    monkeypatch.setattr("maisi_tools.cohort.run.Worker", Fragile)
    monkeypatch.setattr("maisi_tools.cohort.run.LEAST_RETRIES", 1)
    assert LEAST_RETRIES >= 3  # a worker that is killed from outside says nothing of its sample
    found = make_cohort(read_spec(write_spec(retries="0")), folder, bundles, "ray", 1)
    assert (found["failed"], found["left_out"]) == (["heads_0001"], ["heads_0000", "heads_0002"])
    assert (folder / "tries").read_text() == "0121"  # the other ones first
    (row,) = (row for row in rows_of(folder) if row["status"] == "failed")
    assert row["error"].startswith("its worker died 2 times") and row["attempts"] == "2"


@pytest.mark.cohort
@pytest.mark.timeout(3600)
def test_200_samples_with_workers_killed_at_random(write_spec, bundles, files_of, tmp_path, capsys):
    start = time.perf_counter()
    one = made(write_spec, bundles, tmp_path / "one", count="200")
    alone = time.perf_counter() - start
    killed, seconds = with_kills(write_spec, bundles, tmp_path / "ray", (15, 40), 1000, count="200")
    assert killed > 2
    rows = rows_of(tmp_path / "ray")
    assert len({row["name"] for row in rows}) == 200 and all(row["status"] == "done" for row in rows)
    assert samples(files_of(tmp_path / "ray")) == samples(files_of(one))
    with capsys.disabled():
        print(f"\n200 samples: one process {alone:.0f} s; Ray, 2 actors, {killed} kills, {seconds:.0f} s")


REAL = {
    "masks": "{source: real, path: scans.json, label_map: openkbp}",
    "resize": "{placeholder 18: [0.6, 0.8]}",
    "count": "4",
    "flip": "0",
    "layout": "folders",
}


@functools.cache
def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT in HU and OpenKBP's labels of it."""
    labels = make_phantom("head_neck", (48, 48, 48), (5.0, 5.0, 3.4), seed)
    noise = np.random.default_rng(seed).normal(0, 10, labels.shape)
    hu = (flat_ct(labels) + np.where(labels > 0, noise, 0)).astype(np.int16)
    return hu, sum(number * (labels == label) for number, label in read_label_map("openkbp").items())


def write_scans(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Two scans with OpenKBP's labels, the CTs in an orientation of their own."""
    found, entries = {}, []
    for seed, name in enumerate(("one", "two")):
        hu, ours = drawn(seed)
        files = folder / f"{name}.nii.gz", folder / f"{name}_seg.nii.gz"
        nib.save(nib.Nifti1Image(hu[::-1, ::-1], np.diag([-5.0, -5.0, 3.4, 1.0]) + _moved(5.0 * 47)), files[0])
        nib.save(nib.Nifti1Image(ours.astype(np.uint8), np.diag([5.0, 5.0, 3.4, 1.0])), files[1])
        entries.append({"image": files[0].name, "label": files[1].name})
        found[name] = files
    (folder / "scans.json").write_text(json.dumps(entries))
    return found


def _moved(mm: float) -> np.ndarray:
    affine = np.zeros((4, 4))
    affine[:2, 3] = mm
    return affine


def test_lesions_in_real_scans(write_spec, bundles, tmp_path, files_of):
    """The scans take turns; what is not reached is the scan's; any engine gives the same bytes, and goes on."""
    scans = write_scans(tmp_path)
    folder = made(write_spec, bundles, tmp_path / "out", **REAL)
    rows = rows_of(folder)
    assert [row["origin"] for row in rows] == ["one", "two", "one", "two"]
    assert all(row["status"] == "done" and "placeholder 18 0." in row["edits"] for row in rows), rows
    for row in rows:
        scan, labels = (nib.load(path) for path in scans[row["origin"]])
        ct, mask = (nib.load(folder / row[what]) for what in ("ct", "mask"))
        assert ct.header.binaryblock == scan.header.binaryblock and np.array_equal(mask.affine, ct.affine)
        before, after = (np.asarray(image.dataobj) for image in (scan, ct))
        changed = (before != after).mean()
        assert 0 < changed < 0.1
        parotid = np.asarray(mask.dataobj) == 18
        whole = (np.asarray(labels.dataobj) == 6)[::-1, ::-1]
        assert 0.55 < parotid.sum() / whole.sum() < 0.85 and (whole | ~parotid).all()
    assert len({row["ct_sha256"] for row in rows}) == 4
    again = made(write_spec, bundles, tmp_path / "again", "process", **{**REAL, "count": "2"})
    made(write_spec, bundles, again, "process", **REAL)
    assert samples(files_of(again)) == samples(files_of(folder))


@pytest.mark.usefixtures("without_samples")
def test_scans_are_known_by_their_content(write_spec, bundles, tmp_path):
    """One corrected in a voxel is another one, which an earlier version's record, of its size alone, does not show."""
    write_scans(tmp_path)
    image = nib.load(tmp_path / "one.nii.gz")
    nib.save(image, tmp_path / "one.nii")  # whose size says nothing
    (tmp_path / "scans.json").write_text(json.dumps([{"image": "one.nii", "label": "one_seg.nii.gz"}]))
    spec, folder = read_spec(write_spec(**REAL)), tmp_path / "out"
    make_cohort(spec, folder, bundles)
    make_cohort(spec, folder, bundles)
    values = np.asarray(image.dataobj).copy()
    values[3, 4, 5] -= 7
    nib.save(nib.Nifti1Image(values, image.affine, image.header), tmp_path / "one.nii")
    with pytest.raises(InputError, match="made with other scans;"):
        make_cohort(spec, folder, bundles)
    described = json.loads((folder / "cohort.json").read_text())
    del described["scans"]
    (folder / "cohort.json").write_text(json.dumps(described))
    make_cohort(spec, folder, bundles)
    (folder / "cohort.json").write_text(json.dumps(described))
    nib.save(nib.Nifti1Image(values[:-1], image.affine), tmp_path / "one.nii")
    with pytest.raises(InputError, match="made with other masks;"):
        make_cohort(spec, folder, bundles)


@pytest.mark.parametrize("source", ["real", "files"])
def test_of_a_datalist_the_training_section_is_taken(write_spec, tmp_path, caplog, source):
    """A cohort is there to be trained with, so nothing of it is made of held-out patients."""
    cases = {name: {"image": f"{name}_ct.nii.gz", "label": f"{name}_seg.nii.gz"} for name in ("p1", "p2", "p3")}
    for file in (file for case in cases.values() for file in case.values()):
        (tmp_path / file).touch()
    lists = {"training": [cases["p1"], cases["p3"]], "validation": [cases["p2"]], "held_out": ["p2"]}
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    changes = REAL if source == "real" else {}
    masks = f"{{source: {source}, path: datalist.json, label_map: openkbp}}"
    spec = read_spec(write_spec(**{**changes, "masks": masks}))
    found = [scan["image"] for scan in scans_of(spec)] or mask_pool(spec)
    assert [Path(file).name for file in found] == ["p1_ct.nii.gz", "p3_ct.nii.gz"]
    assert "'training' taken, 1 of 'validation' left out" in caplog.text


def test_scans_with_a_file_for_each_class(write_spec, bundles, tmp_path):
    """As TotalSegmentator writes their labels."""
    write_scans(tmp_path)
    labels, classes = nib.load(tmp_path / "one_seg.nii.gz"), read_label_map("openkbp").classes
    (tmp_path / "one_classes").mkdir()
    for number in np.unique(labels.dataobj)[1:]:
        inside = np.asarray(labels.dataobj) == number
        path = tmp_path / "one_classes" / f"{classes[number]}.nii.gz"
        nib.save(nib.Nifti1Image(inside.astype(np.uint8), labels.affine), path)
    (tmp_path / "scans.json").write_text(json.dumps([{"image": "one.nii.gz", "label": "one_classes"}]))
    (row,) = rows_of(made(write_spec, bundles, tmp_path / "out", **{**REAL, "count": "1"}))
    assert row["status"] == "done" and "18" in row["labels"].split(), row
    with pytest.raises(InputError, match="is no DICOM series"):  # and no word of its labels
        made(write_spec, bundles, tmp_path / "studies", **REAL, format="dicom")


def test_scans_keep_their_labels_in_nnunets_numbering(write_spec, bundles, tmp_path):
    """What the weights do not know is merged only where they drew the whole CT."""
    write_scans(tmp_path)
    folder = made(write_spec, bundles, tmp_path / "out", **{**REAL, "layout": "nnunet", "count": "1"})
    names = json.loads((folder / "dataset.json").read_text())["labels"]
    assert {"brainstem", "spinal cord", "left parotid gland", "skull"} < names.keys()
    assert not {"airway", "body"} & names.keys()  # which no scan labels
    assert sorted(names.values()) == list(range(len(names)))
    labels = np.asarray(nib.load(folder / rows_of(folder)[0]["mask"]).dataobj)
    parotid = nib.as_closest_canonical(nib.load(tmp_path / "one_seg.nii.gz")).get_fdata() == 6
    left = parotid & (labels[::-1, ::-1] != names["left parotid gland"])
    assert 0.2 < left.sum() / parotid.sum() < 0.45 and (labels[::-1, ::-1][left] == 0).all()
    assert (labels == names["left parotid gland"]).sum() > 100 and labels.max() < len(names)
    masks = "{source: real, path: scans.json, label_map: totalsegmentator}"
    lung = "[{lesion: lung tumor, diameter_mm: 20}]"
    spec = read_spec(write_spec(**{**REAL, "masks": masks, "resize": "{}"}, tumors=lung))
    numbered, merged = numbered_labels(spec, {"keep_labels": [120, 200], "merge_labels": {"bone": 120}})
    assert {label_id("lung tumor"), label_id("liver"), label_id("spleen")} < set(numbered) and not merged
    assert 200 not in numbered


def test_weights_that_know_all_labels_have_them_all_numbered(write_spec):
    every, merged = numbered_labels(read_spec(write_spec(layout="nnunet")), {"keep_labels": None, "merge_labels": None})
    names = label_names(LAYOUTS["nnunet"], every, merged, set(), {})
    assert every == sorted(VOCABULARY.keys() - {0}) and not merged
    assert list(names) == list(range(1, len(every) + 1)) and names[1] == "liver"


def test_classes_of_scans_have_their_own_names(write_spec, bundles, tmp_path):
    write_scans(tmp_path)
    classes = {str(label): name for label, name in read_label_map("openkbp").classes.items()}
    classes |= {"1": "placeholder 20: pituitary", "6": "placeholder: left gland", "7": "placeholder: right gland"}
    (tmp_path / "map.json").write_text(json.dumps(classes | {"5": "skull"}))
    masks = f"{{source: real, path: scans.json, label_map: {tmp_path / 'map.json'}}}"
    given = {**REAL, "masks": masks, "resize": "{placeholder 21: 0.7}", "layout": "nnunet", "count": "1"}
    folder = made(write_spec, bundles, tmp_path / "out", **given)
    (row,) = rows_of(folder)
    assert row["status"] == "done" and float(row["hu_body"]), row
    names = json.loads((folder / "dataset.json").read_text())["labels"]
    assert {"pituitary", "left gland", "right gland", "larynx", "skull"} < names.keys()
    assert not [name for name in names if "placeholder" in name or name in ("brainstem", "body")]


@pytest.fixture
def scanned(tmp_path) -> Path:
    """One scan as a CT series of a patient's, with OpenKBP's labels of it as NIfTI; the folder of its slices."""
    pytest.importorskip("highdicom", reason="needs the extra 'dicom'")
    import pydicom

    from maisi_tools.dicom.study import write_study

    ct, labels = write_scans(tmp_path)["one"]
    image = nib.as_closest_canonical(nib.load(ct))
    study = tmp_path / "study"
    for path in write_study(study, np.asarray(image.dataobj), image.affine):
        ds = pydicom.dcmread(path)
        del ds.SyntheticData
        ds.PatientID, ds.ImageType = "1234", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.save_as(path)
    series = study.rename(tmp_path / "hospital") / "CT"
    (tmp_path / "scans.json").write_text(json.dumps([{"image": str(series), "label": labels.name}]))
    return series


def test_scans_that_are_series(write_spec, bundles, tmp_path, scanned):
    """NIfTI or studies out; a study says which box of the patient's scan is synthetic, and differs nowhere else."""
    import pydicom

    spec = {**REAL, "count": "2"}
    folder = made(write_spec, bundles, tmp_path / "nifti", **spec)
    assert [row["status"] for row in rows_of(folder)] == ["done"] * 2
    assert all((folder / row[what]).is_file() for row in rows_of(folder) for what in ("ct", "mask"))

    folder = made(write_spec, bundles, tmp_path / "dicom", **{**spec, "format": "dicom", "count": "1"})
    (row,) = rows_of(folder)
    assert row["status"] == "done", row
    old, new = (
        [pydicom.dcmread(path) for path in sorted(where.glob("*.dcm"))]
        for where in (scanned, folder / row["ct"] / "CT")
    )
    corners = re.search(r"between \((.*?)\) and \((.*?)\), mm", new[0].DerivationDescription).groups()
    low, high = np.sort([[float(mm) for mm in corner.split(",")] for corner in corners], axis=0)
    found = 0
    for was, ds in zip(old, new, strict=True):
        assert (ds.PatientID, ds.StudyInstanceUID) == ("1234", was.StudyInstanceUID)
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL", "PARTLY_SYNTHETIC"]
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == was.SOPInstanceUID
        hu, before = (one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in (ds, was))
        for row_of, column in np.argwhere(hu != before):
            at = np.array(ds.ImagePositionPatient, float) + [column * 5.0, row_of * 5.0, 0]
            assert (at >= low - 0.01).all() and (at <= high + 0.01).all()
            found += 1
    assert found


def test_studies_of_scans_that_are_no_series_are_refused(write_spec, bundles, tmp_path):
    write_scans(tmp_path)
    with pytest.raises(InputError, match=r"one\.nii\.gz in .*scans\.json is no DICOM series"):
        made(write_spec, bundles, tmp_path / "out", **REAL, format="dicom")
    assert not (tmp_path / "out").exists()


def test_the_mask_of_a_scan_without_forms_lies_on_it(write_spec, bundles, tmp_path):
    """Its axes are those of the array, as for the edit; what is cut out lies within the organ that is to shrink."""
    for ct, labels in write_scans(tmp_path).values():
        for path in (ct, labels):
            image = nib.as_closest_canonical(nib.load(path))
            header = image.header.copy()
            header.set_qform(None, 0)
            header.set_sform(None, 0)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), path)
            assert nib.load(path).header["sform_code"] == nib.load(path).header["qform_code"] == 0
    (row,) = rows_of(made(write_spec, bundles, tmp_path / "out", **{**REAL, "count": "1"}))
    assert row["status"] == "done", row
    first = np.asarray(nib.load(tmp_path / "one_seg.nii.gz").dataobj) == 6
    mask = nib.load(tmp_path / "out" / row["mask"])
    parotid = np.asarray(mask.dataobj) == 18
    assert 0.55 < parotid.sum() / first.sum() < 0.85 and (first | ~parotid).all()
    np.testing.assert_allclose(mask.affine, np.diag([5.0, 5.0, 3.4, 1.0]), atol=1e-5)


@pytest.mark.parametrize(
    "ct", ["{redraws: 2}", "{spacing: [3, 3, 3]}", "{min_dice: 0.5}", "{output_size: [64, 64, 64]}", "{preset: neck}"]
)
def test_settings_that_an_edit_does_not_use_are_refused(write_spec, bundles, tmp_path, ct):
    """As `monai.bundle run` of inference.json with edit.json does."""
    write_scans(tmp_path)
    with pytest.raises(InputError, match=f"the config has no use for the key {ct[1:].split(':')[0]}"):
        made(write_spec, bundles, tmp_path / "out", **REAL, ct=ct)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"flip": "0.5"}, "not mirrored"),
        ({"resize": "{}"}, "may get no edit"),
        ({"masks": "{source: real}"}, "no masks.path"),
        ({"masks": "{source: real, path: a, region: [head]}"}, "real takes label_map, path, and no use of region;"),
        ({"masks": "{source: phantom, path: a, organ_sizes: {liver: 9}}"}, "and no use of path, organ_sizes;"),
        ({"masks": "{source: files, path: a, settings: {seed: 1}}"}, "and no use of settings;"),
        ({"masks": "{source: library, path: a, spacing: [1, 1, 1]}"}, "and no use of spacing;"),
        ({"masks": "{source: generator, spacing: [4.0, 4.0, 2.5]}", "count": "0"}, "count is 0"),  # as by default
        ({"masks": "{source: generator, label_map: openkbp}"}, "and no use of label_map;"),
        ({"ct": "{edits: {redraw: liver}}"}, "the cohort sets itself"),
    ],
)
def test_specifications_of_real_scans_that_are_refused(write_spec, changes, word):
    with pytest.raises(InputError, match=word):
        read_spec(write_spec(**{**REAL, **changes}))
