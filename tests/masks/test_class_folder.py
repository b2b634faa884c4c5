from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import (
    ReadMaskd,
    find_masks,
    is_class_folder,
    read_class_folder,
    read_numbers,
)
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.volumes.inputs import find_inputs

AFFINE = np.array([[-2.0, 0, 0, 9], [0, 3, 0, 8], [0, 0, 4, 7], [0, 0, 0, 1]])


def write_classes(folder, names):
    """A file a class, with the value 1 in one row of it."""
    folder.mkdir()
    for place, name in enumerate(names):
        values = np.zeros((len(names) + 1, 3, 2), np.uint8)
        values[place] = 1
        nib.save(nib.Nifti1Image(values, AFFINE), folder / f"{name}.nii.gz")
    return folder


def as_file(label_map, folder):
    """The name of a label map, or the file of a user's own."""
    if isinstance(label_map, str):
        return label_map
    path = folder / "map.json"
    path.write_text(json.dumps(label_map))
    return path


@pytest.fixture
def folder(tmp_path):
    """Six voxels a class along x, and an empty class, as TotalSegmentator leaves one."""
    folder = tmp_path / "case7"
    folder.mkdir()
    for place, name in enumerate(("liver", "kidney_left", "heart_myocardium", "face", "spleen")):
        values = np.zeros((4, 3, 2), np.uint8)
        if name != "spleen":
            values[place] = 1
        nib.save(nib.Nifti1Image(values, AFFINE), folder / f"{name}.nii.gz")
    (folder / "statistics.json").write_text("{}")
    return folder


def test_folder_is_one_mask(folder):
    label_map = read_label_map("totalsegmentator_v1")
    mask = read_class_folder(folder, label_map)
    assert mask.shape == (1, 4, 3, 2) and np.allclose(mask.affine, AFFINE)
    assert mask[0, :, 0, 0].tolist() == [5, 3, 44, 93] and mask.meta["filename_or_obj"] == str(folder)
    assert mask.equal(ReadMaskd("mask", label_map)({"mask": str(folder)})["mask"])


def test_inputs_of_a_run(folder, tmp_path):
    """A class folder is one input, alone, in a folder, by a glob or in a list; other folders hold one mask a file."""
    label_map = read_label_map("totalsegmentator_v1")

    def found(given):
        return [item["image"] for item in find_inputs(given, "image", lambda path: is_class_folder(path, label_map))]

    other = folder / "liver.nii.gz"
    for given in (str(folder), str(tmp_path), str(tmp_path / "case*"), [{"image": str(folder)}]):
        assert found(given) == [str(folder)]
    assert found([str(folder), str(other)]) == [str(folder), str(other)]
    assert not is_class_folder(folder, read_label_map("btcv"))
    assert len(find_inputs(str(folder))) == 5
    single = ReadMaskd("mask", label_map)({"mask": str(other)})["mask"]
    assert single.shape == (1, 4, 3, 2) and single.sum() == 6


@pytest.mark.parametrize(
    ("label_map", "said"),
    [
        ("maisi", "kidney_left.nii.gz is no class of maisi; .*: give --label_map totalsegmentator$"),
        (
            {"1": "liver"},
            "aorta.nii.gz, clavicula_left.nii.gz, .*: give --label_map totalsegmentator$",
        ),
        (
            {"1": "liver", "2": "aorta"},
            "clavicula_left.nii.gz, .*: give --label_map totalsegmentator$",
        ),
        ("btcv", "clavicula_left.nii.gz, .*: give --label_map totalsegmentator$"),
    ],
)
@pytest.mark.parametrize("names", [("aorta", "clavicula_left", "hip_left", "kidney_left", "liver")])
def test_a_class_folder_of_another_map_is_not_many_masks(names, label_map, said, tmp_path):
    """Each file by itself has the label 1, the liver of most maps."""
    folder = write_classes(tmp_path / "case", names)
    known = read_label_map(as_file(label_map, tmp_path))
    with pytest.raises(InputError, match=said):
        find_masks(str(folder), known)
    with pytest.raises(InputError, match=said):
        find_masks(str(tmp_path), known)
    right = read_label_map("totalsegmentator")
    assert find_masks(str(folder), right) == [{"image": str(folder)}]
    assert read_class_folder(folder, right).unique().tolist() == [0, *sorted(map(right.label_of, names))]


def test_two_classes_of_the_users_map_make_a_class_folder(tmp_path):
    folder = write_classes(tmp_path / "case", ("nose", "ear", "toe", "thumb"))
    known = read_label_map(as_file({"1": "placeholder: nose", "2": "placeholder: ear"}, tmp_path))
    with pytest.raises(InputError, match="thumb.nii.gz, toe.nii.gz is no class of .*: rename or remove it"):
        find_masks(str(folder), known)
    one = read_label_map(as_file({"1": "placeholder: nose"}, tmp_path))  # a patient may be called so
    assert len(find_masks(str(folder), one)) == len(find_masks(str(folder), read_label_map("maisi"))) == 4


@pytest.mark.parametrize(
    ("name", "label_map", "read_as"),
    [
        ("esophagus", "totalsegmentator", "1, is spleen in totalsegmentator"),
        ("kidney_left", "maisi", "1, is liver in maisi"),
        ("liver", {"1": "spleen", "2": "liver"}, "1, is spleen in "),
        ("spleen", "totalsegmentator", None),
        ("liver", {"1": "liver"}, None),
        ("pt_1", "maisi", None),
    ],
)
def test_a_file_of_one_class_is_not_read_as_another_without_a_word(name, label_map, read_as, tmp_path, caplog):
    folder = write_classes(tmp_path / "case", (name,))
    mask = read_numbers(folder / f"{name}.nii.gz", read_label_map(as_file(label_map, tmp_path)))
    assert mask.unique().tolist() == [0, 1]
    assert (
        (f"{name}.nii.gz is named like a class, and its only label, {read_as}" in caplog.text)
        if read_as
        else (not caplog.text)
    )


def test_overlap_is_told(folder, caplog):
    values = np.zeros((4, 3, 2), np.uint8)
    values[1, 0] = 255
    nib.save(nib.Nifti1Image(values, AFFINE), folder / "aorta.nii.gz")
    mask = read_class_folder(folder, read_label_map("totalsegmentator_v1"))
    assert (mask == 7).sum() == 2 and (mask == 3).sum() == 4
    assert "classes overlap, and the smaller one stays: kidney_left and aorta (2 voxels)" in caplog.text


@pytest.mark.parametrize(("organ", "lesion"), [("left lung upper lobe", "lung tumor"), ("liver", "hepatic tumor")])
def test_a_tumor_stays_in_an_organ_that_includes_it(tmp_path, organ, lesion, caplog):
    """Whichever has the lower id, and with a third class that is smaller than both or larger."""
    maisi = read_label_map("maisi")
    inside = {organ: slice(0, 8), lesion: slice(2, 5), "body": slice(0, 9), "bone lesion": slice(4, 6)}
    for name, part in inside.items():
        values = np.zeros((10, 3, 2), np.uint8)
        values[part] = 1
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{name.replace(' ', '_')}.nii.gz")
    wanted = np.zeros(10)
    for name in sorted(inside, key=lambda name: inside[name].start - inside[name].stop):  # the largest first
        wanted[inside[name]] = maisi.label_of(name)
    assert read_class_folder(tmp_path, maisi)[0, :, 0, 0].tolist() == wanted.tolist()
    assert organ in caplog.text and lesion in caplog.text


@pytest.mark.parametrize(
    ("name", "values", "affine", "said"),
    [
        ("nose.nii.gz", np.ones((4, 3, 2)), AFFINE, "nose.nii.gz is no class of totalsegmentator_v1"),
        ("aorta.nii.gz", np.arange(24).reshape(4, 3, 2), AFFINE, "aorta.nii.gz has the labels .1, 2, 3"),
        ("aorta.nii.gz", np.ones((4, 3, 3)), AFFINE, "different grids"),
        ("aorta.nii.gz", np.ones((4, 3, 2)), np.diag([2.0, 3, 4, 1]), "different grids"),
        ("liver.nii", np.ones((4, 3, 2)), AFFINE, "one class twice"),
    ],
)
def test_bad_folders(folder, name, values, affine, said):
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), folder / name)
    with pytest.raises(InputError, match=said):
        read_class_folder(folder, read_label_map("totalsegmentator_v1"))


def test_folder_without_volumes(tmp_path):
    label_map = read_label_map("totalsegmentator")
    assert not is_class_folder(tmp_path, label_map) and not is_class_folder(tmp_path / "nowhere", label_map)
    with pytest.raises(InputError, match="it holds no volume"):
        read_class_folder(tmp_path, label_map)
