from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import read_mask
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.library import INDEX, MaskRequest, describe, index_library, read_index, search
from maisi_tools.masks.sources import FileSource, PhantomSource
from maisi_tools.masks.vocabulary import label_id

MAISI = read_label_map("maisi")


def save(path, labels, size=(10, 10, 10), affine=None):
    """A mask in which every label has one slab of 10 x 10 voxels, 2 x 2 x 3 mm each."""
    values = np.zeros(size, np.uint8)
    for place, name in enumerate(labels):
        values[..., place] = label_id(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2, 3, 1]) if affine is None else affine), path)
    return path


@pytest.fixture
def library(tmp_path):
    save(tmp_path / "a.nii.gz", ["liver", "spleen", "pancreas"])
    save(tmp_path / "deep" / "b.nii.gz", ["liver", "femur_left"], size=(10, 10, 30))
    save(
        tmp_path / "c.nii.gz", ["brain"], affine=np.array([[0, 0, -3.0, 0], [-2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    )
    return tmp_path


def test_entries_say_what_a_mask_shows(library):
    report = index_library(library, MAISI)
    assert (report.total, report.new, report.gone, report.skipped) == (3, 3, 0, {})
    entries = {path.name: entry for path, entry in read_index(library, MAISI).items()}
    assert entries["a.nii.gz"].volumes_ml == {"liver": 1.2, "spleen": 1.2, "pancreas": 1.2}  # 100 voxels of 12 mm3
    assert entries["a.nii.gz"].region == ["abdomen"] and entries["b.nii.gz"].region == ["abdomen", "lower"]
    assert (entries["a.nii.gz"].size, entries["a.nii.gz"].spacing) == ([10, 10, 10], [2, 2, 3])
    assert entries["c.nii.gz"].spacing == [3, 2, 2]  # along RAS axes, whatever the file's
    assert describe(read_mask(library / "a.nii.gz", MAISI)).volumes_ml == entries["a.nii.gz"].volumes_ml


def test_second_run_reads_only_what_changed(library):
    index_library(library, MAISI)
    assert index_library(library, MAISI).new == 0
    save(library / "a.nii.gz", ["colon"])
    save(library / "d.nii.gz", ["heart"])
    (library / "c.nii.gz").unlink()
    report = index_library(library, MAISI)
    assert (report.total, report.new, report.gone) == (3, 2, 1)
    assert {path.name for path in read_index(library, MAISI)} == {"a.nii.gz", "b.nii.gz", "d.nii.gz"}


def test_stale_entries_are_noticed(library, caplog):
    index_library(library, MAISI)
    (library / "c.nii.gz").unlink()
    save(library / "a.nii.gz", ["colon", "heart"])
    assert [path.name for path in read_index(library, MAISI)] == ["b.nii.gz"]
    assert "2 masks of" in caplog.text and "maisi index" in caplog.text
    os.utime(library / "deep" / "b.nii.gz", ns=(1, 1))
    with pytest.raises(InputError, match="every mask of the index"):
        read_index(library, MAISI)


def test_damaged_or_other_index_is_made_anew(library):
    with pytest.raises(InputError, match="has no index.*maisi index"):
        read_index(library, MAISI)
    (library / INDEX).write_text("{")
    assert index_library(library, MAISI).new == 3
    content = json.loads((library / INDEX).read_text())
    (library / INDEX).write_text(json.dumps({**content, "version": 0}))
    assert index_library(library, MAISI).new == 3
    with pytest.raises(InputError, match="no index for the label map btcv"):
        read_index(library, read_label_map("btcv"))
    names = library / "names.json"
    for content in ({str(id): id for id in MAISI}, {str(id): 200 for id in MAISI}):  # a JSON that changes its mind
        names.write_text(json.dumps(content))
        assert index_library(library, read_label_map(names)).new == 3


def test_masks_that_cannot_be_read_are_skipped(library):
    (library / "bad.nii.gz").write_bytes(b"nothing")
    report = index_library(library, MAISI)
    assert (
        report.total == 3
        and list(report.skipped) == ["bad.nii.gz"]
        and "cannot be read" in report.skipped["bad.nii.gz"]
    )
    with pytest.raises(InputError, match="holds no mask"):
        (library / "empty").mkdir()
        index_library(library / "empty", MAISI)


def test_class_folders_are_one_mask(tmp_path):
    label_map = read_label_map("totalsegmentator")
    for place, name in enumerate(("liver", "spleen")):
        values = np.zeros((10, 10, 10), np.uint8)
        values[..., place] = 1
        (tmp_path / "case1").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "case1" / f"{name}.nii.gz")
    assert index_library(tmp_path, label_map).total == 1
    assert index_library(tmp_path, label_map).new == 0
    ((place, entry),) = read_index(tmp_path, label_map).items()
    assert place == tmp_path / "case1" and entry.volumes_ml == {"liver": 0.1, "spleen": 0.1}


def test_class_folders_of_another_map_are_skipped_with_the_map_to_give(library):
    """Each file had been one mask of the liver."""
    for name in ("liver", "hip_left", "clavicula_left"):
        (library / "case1").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), library / "case1" / f"{name}.nii.gz")
    report = index_library(library, read_label_map("maisi"))
    assert list(report.skipped) == ["case1"] and report.total == 3
    assert report.skipped["case1"].endswith("give --label_map totalsegmentator")


def test_links_that_lead_back_list_no_mask_twice(library):
    before = index_library(library, read_label_map("maisi")).total
    (library / "loop").symlink_to(library)
    (library / "again").mkdir()
    (library / "again" / "up").symlink_to(library / "again")
    report = index_library(library, read_label_map("maisi"))
    assert (report.total, report.new, report.gone, report.skipped) == (before, 0, 0, {})


@pytest.mark.parametrize(
    ("asked", "first", "misfits"),
    [
        (MaskRequest(organs=["spleen"]), "a.nii.gz", []),
        (MaskRequest(["lower"]), "b.nii.gz", []),
        (MaskRequest(["head"], ["Brain"]), "c.nii.gz", []),
        (MaskRequest(field_of_view=(20, 20, 80)), "b.nii.gz", []),
        (MaskRequest(["abdomen"], ["liver"]), "a.nii.gz", []),  # the smaller one of two
        (MaskRequest(["abdomen", "lower"], ["liver", "spleen"]), "a.nii.gz", ["shows no lower"]),
        (MaskRequest(["chest"], [], (20, 20, 90)), "b.nii.gz", ["shows no chest"]),
        (MaskRequest([], ["spleen", "Larynx"]), "a.nii.gz", ["has no larynx"]),
        (MaskRequest([], ["spleen"], (20, 20, 50)), "a.nii.gz", ["is 30 mm long along z instead of 50"]),
    ],
)
def test_search(library, asked, first, misfits):
    index_library(library, MAISI)
    found = search(read_index(library, MAISI), asked)
    assert (found[0][0].name, found[0][1]) == (first, misfits) and len(found) == 3


def test_wrong_requests():
    with pytest.raises(InputError, match="region foot is unknown; allowed are head, chest, abdomen, lower"):
        MaskRequest(["foot"])
    with pytest.raises(InputError, match="'lever' is no label"):
        MaskRequest(organs=["lever"])
    with pytest.raises(InputError, match="three positive numbers"):
        MaskRequest(field_of_view=(1, 2, -3))


def test_sources_have_one_interface(library):
    request = MaskRequest(["abdomen"], ["liver"], (20, 20, 20))
    sources = [
        FileSource(sorted(library.rglob("*.nii.gz"))),
        PhantomSource((9.0, 9.0, 11.0), (380, 300, 420)),
    ]
    for source in sources:
        got = source.masks(request, 2, seed=4)
        again = source.masks(request, 2, seed=4)
        assert [one.origin for one in got] == [one.origin for one in again] and len({one.origin for one in got}) == 2
        for one in got:
            assert one.mask.ndim == 4 and one.mask.shape[0] == 1 and "uint8" in str(one.mask.dtype)
            if not isinstance(source, PhantomSource):
                assert one.misfits == () and (one.mask == label_id("liver")).any()
    with pytest.raises(InputError, match="4 masks were asked for; allowed are 1 to 3"):
        FileSource(sorted(library.rglob("*.nii.gz"))).masks(request, 4)
    assert FileSource([library / "c.nii.gz"]).masks(request, 1)[0].misfits == ("shows no abdomen", "has no liver")


def test_phantoms_of_a_request():
    source = PhantomSource((10.0, 10.0, 12.0))
    (torso,) = source.masks(MaskRequest(["abdomen"], ["liver"], (400, 300, 480)), 1)
    assert torso.misfits == () and torso.mask.shape == (1, 40, 30, 40) and torso.origin == "phantom torso seed 0"
    (head,) = source.masks(MaskRequest(["head"], ["prostate"], (300, 300, 300)), 1, seed=7)
    assert head.misfits == ("has no prostate",) and head.origin == "phantom head_neck seed 7"


def test_a_renamed_class_is_a_changed_mask(tmp_path):
    file = save(tmp_path / "case" / "kidney_left.nii.gz", ["left kidney"])
    labels = read_label_map("totalsegmentator")
    index_library(tmp_path, labels)
    file.rename(file.with_name("kidney_right.nii.gz"))
    assert index_library(tmp_path, labels).new == 1
    assert list(next(iter(read_index(tmp_path, labels).values())).volumes_ml) == ["right kidney"]
