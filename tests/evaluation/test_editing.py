"""What edits are measured by."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

import editing
from editing import AIR, BONE, KINDS, Editor, Scan, _begun, content_of, read_scan, rows_of, seam_ratio, with_sphere
from maisi_tools.errors import InputError
from maisi_tools.files import LOCK, held, write_json
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.vocabulary import BODY, label_id


def test_a_seam_is_what_the_margin_adds_and_not_the_surface_of_what_was_edited():
    weight = np.array([0, 0, 0.3, 0.6, 1, 1, 1, 0.6, 0.3, 0, 0, 0]).reshape(12, 1, 1)
    before = np.arange(12.0).reshape(12, 1, 1)
    changed, body = weight == 1, np.ones(weight.shape, bool)
    after = np.where(changed, before - 900, before)  # air in soft tissue
    assert seam_ratio(before, after, weight, changed, body) == 1
    after[2] += 3  # neighbours in the margin: differences 1, 1, 1, 1 become 4, 2, 1, 1
    assert seam_ratio(before, after, weight, changed, body) == 2
    body[:3] = False
    assert seam_ratio(before, after, weight, changed, body) == 1
    assert np.isnan(seam_ratio(before, after, np.zeros(weight.shape), changed, body))


def test_scans_are_told_apart_and_compared_as_whole_hu(tmp_path):
    """Names may have dots, as DICOM's UIDs; what an edit leaves is what was given, which files hold as whole HU."""
    hu = np.full((8, 8, 8), 40.25)
    hu[0] = -1000
    scans = []
    for name in ("1.2.840.1", "1.2.840.2"):
        for suffix, array in (("", hu), ("_seg", np.where(hu > 0, 6, 0))):
            image = nib.Nifti1Image(array.astype(np.float32), np.eye(4))
            nib.save(image, tmp_path / f"{name}{suffix}.nii.gz")
        case = {"image": str(tmp_path / f"{name}.nii.gz"), "label": str(tmp_path / f"{name}_seg.nii.gz")}
        scans.append(read_scan(case, read_label_map("openkbp")))
    assert [scan.name for scan in scans] == ["1.2.840.1", "1.2.840.2"]
    assert set(np.unique(scans[0].hu)) == {-1000, 40}


def test_labels_of_a_bundle_come_onto_the_scans_grid(tmp_path):
    """A bundle need not undo its resampling: voxels of half the size here."""
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6] = parotid = read_label_map("openkbp")[6]
    fine = MetaTensor(np.repeat(np.where(labels > 0, 6, 0), 2, axis=0)[None], affine=np.diag([0.5, 1, 1, 1]))
    fine.affine[0, 3] = -0.25
    editor = Editor.__new__(Editor)
    editor.folder, editor.label_map, editor.found = tmp_path, read_label_map("openkbp"), {}
    editor.segmenter = lambda path: fine
    editor.segmenter.classes = {"left parotid": 6}
    scan = Scan("a", labels.astype(np.float32), labels, np.eye(4), [])
    assert editor.dices(scan, tmp_path / "a_ct.nii.gz", parotid) == (1, 1)


def test_a_sphere_lies_in_soft_tissue():
    labels = np.zeros((40, 40, 30), np.uint8)
    labels[4:36, 4:36, 2:28] = BODY
    labels[:20] = np.where(labels[:20] > 0, label_id("liver"), 0)
    scan = Scan("a", np.zeros(labels.shape, np.float32), labels, np.diag([2.0, 2.0, 3.0, 1.0]), [])
    new = with_sphere(scan, AIR, np.random.default_rng(0))
    assert (scan.labels[new != labels] == BODY).all()
    assert (new == AIR).sum() * 12 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.1)


@pytest.mark.parametrize("scans", ["ab", "a"])
def test_a_sphere_is_taken_out_once_and_of_its_own_scan(tmp_path, scans):
    """The second scan's sphere is refused: that of the first, taken out before, does not go out in its place."""
    labels = np.full((16, 16, 16), BODY, np.uint8)
    labels[:4], labels[4:6], labels[6:8] = label_id("liver"), AIR, BONE
    refused = len(KINDS) + KINDS.index("bone in")
    edited = []

    class Fake:
        def __call__(self, scan, new, edits, seed):
            if seed == refused:
                raise InputError("no room")
            edited.append((seed, scan.name))
            figures = {"hu": scan.hu, "changed": np.ones(new.shape, bool), "path": tmp_path}
            return figures | {"outside": 0, "seam": 1.0, "seconds": 1.0}

        def dices(self, *given):
            return 1.0, 1.0

    hu = np.zeros(labels.shape)
    of = [Scan(name, hu, labels, np.diag([2.0, 2.0, 2.0, 1.0]), [label_id("liver")]) for name in scans]
    rows = list(rows_of(Fake(), of, 2 * len(KINDS)))
    assert [row["edit"] for row in rows if "refused" in row] == [refused, refused + 1]
    assert rows[refused + 1]["scan"] == scans[-1] and rows[refused + 1]["refused"] == "no sphere went in before"
    assert edited == [(row["edit"], row["scan"]) for row in rows if "refused" not in row]
    # Interrupted before a sphere went out, it goes on with putting it in.
    assert list(rows_of(Fake(), of, 2 * len(KINDS), 3)) == rows[3:]
    write_json(tmp_path / "edits.json", {"given": {"label_map": "maisi"}, "rows": rows[:3]})
    assert _begun(tmp_path / "edits.json", {"label_map": "maisi"}) == rows[:3] and _begun(tmp_path / "no", {}) == []
    with pytest.raises(InputError, match="was begun with other options"):
        _begun(tmp_path / "edits.json", {"label_map": "openkbp"})


def test_an_organ_is_compared_by_its_number_in_the_data_set(tmp_path):
    """Bone is not: a completed mask has all of it under one label, and the data set the mandible alone."""
    label_map = read_label_map("openkbp")
    parotid = label_map[6]
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:6, 2:6, 2:6], labels[7] = parotid, BONE
    found = {"edited": np.where(labels == parotid, 6, 0), "in": np.zeros(labels.shape)}
    found["edited"][2] = 0

    class Segmenter:
        classes = {"mandible": 5, "left parotid": 6}

        def __call__(self, path):
            return torch.from_numpy(found["in" if path.parent.name == "in" else "edited"])[None]

    editor = Editor.__new__(Editor)
    editor.folder, editor.segmenter, editor.label_map, editor.found = tmp_path, Segmenter(), label_map, {}
    scan = Scan("a", labels.astype(np.float32), labels, np.eye(4), [])
    dices = editor.dices(scan, tmp_path / "out" / "a_ct.nii.gz", parotid)
    assert dices == pytest.approx((2 * 48 / (48 + 64), 0))
    assert np.isnan(editor.dices(scan, tmp_path / "out" / "a_ct.nii.gz", BONE)).all()


@pytest.fixture
def scan(tmp_path):
    """A CT of 40 HU with a left parotid gland, and its labels as OpenKBP numbers them."""
    hu, labels = np.full((16, 16, 16), 40.0), np.zeros((16, 16, 16))
    hu[0], labels[4:12, 4:12, 4:12] = -1000, 6
    case = {"image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "a_seg.nii.gz")}
    for key, array in (("image", hu), ("label", labels)):
        nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), case[key])
    return case


def test_what_lay_in_the_output_folder_stays(scan, tmp_path, monkeypatch):
    """The files of the edits alone go."""

    class Fake:
        stage = SimpleNamespace(parser=SimpleNamespace(get_parsed_content=lambda name: []))

        def __init__(self, folder, *given):
            self.folder = folder

        def __call__(self, scan, new, edits, seed):
            (self.folder / "in").mkdir(exist_ok=True)
            (self.folder / "in" / "made.nii.gz").touch()
            figures = {"hu": scan.hu, "changed": np.ones(new.shape, bool), "path": self.folder}
            return figures | {"outside": 0, "seam": 1.0, "seconds": 1.0}

        def dices(self, *given):
            return 0.5, 0.75

    (tmp_path / "list.json").write_text(json.dumps({"validation": [scan]}))
    out = tmp_path / "study"
    for name in ("in", "out"):
        (out / name).mkdir(parents=True)
        (out / name / "of_the_user.txt").touch()
    before = {path for path in out.rglob("*")}
    monkeypatch.setattr(editing, "Editor", Fake)
    command = ["editing.py", "--datalist", str(tmp_path / "list.json"), "--output_dir", str(out), "--count", "1"]
    monkeypatch.setattr(sys, "argv", command)
    for name in ("edits.json", "edits.csv", "table.md"):
        (out / name).write_text("[]")
        with pytest.raises(InputError, match=f"{name} would be written over, and no evaluation/editing.py wrote it"):
            editing.main()
        (out / name).unlink()
    editing.main()
    assert set(out.rglob("*")) - before == {out / name for name in ("edits.json", "edits.csv", "table.md", LOCK)}
    assert before <= set(out.rglob("*"))
    (row,) = json.loads((out / "edits.json").read_text())["rows"]
    assert (row["organ"], row["dice"], row["dice_untouched"]) == ("left parotid gland", 0.5, 0.75)
    with held(out, "never said"), pytest.raises(InputError, match=f"another run edits in {out}; wait for its end"):
        editing.main()
    # Another CT under the same name is another run.
    image = nib.load(scan["image"])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), scan["image"])
    with pytest.raises(InputError, match="was begun with other options or files"):
        editing.main()


def test_scans_of_one_name_or_without_labels_are_refused(scan, tmp_path, monkeypatch):
    """The figures of the first would be taken for the second's. Nothing is written."""
    (tmp_path / "other").mkdir()
    other = {key: shutil.copy(path, tmp_path / "other") for key, path in scan.items()}
    (tmp_path / "list.json").write_text(json.dumps({"validation": [scan, other]}))
    command = ["editing.py", "--datalist", str(tmp_path / "list.json"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(InputError, match="have the same stem 'a'"):
        editing.main()
    (tmp_path / "list.json").write_text(json.dumps({"validation": [scan, {"image": other["image"]}]}))
    with pytest.raises(InputError, match="has no label of .*other/a.nii.gz"):
        editing.main()
    assert not (tmp_path / "out").exists()


def test_a_row_follows_from_the_content_of_all_files(scan, tmp_path):
    config = tmp_path / "inference.json"
    network = torch.nn.Linear(2, 2)
    segmenter = SimpleNamespace(network=network, classes={"left parotid": 6})

    def content(label_map="openkbp"):
        return content_of([config], [scan], read_label_map(label_map), segmenter, str(config))

    config.write_text("{}")
    first = content()
    assert content() == first
    seen = [first, content("maisi")]
    with torch.no_grad():
        network.weight += 1
    seen.append(content())
    config.write_text('{"spacing": 2}')
    seen.append(content())
    segmenter.classes = {"right parotid": 6}
    seen.append(content())
    for path in scan.values():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), path)
        seen.append(content())
    assert len({json.dumps(one, sort_keys=True) for one in seen}) == len(seen) == 7
