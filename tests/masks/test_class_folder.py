from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import ReadMaskd, is_class_folder, read_class_folder
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.volumes.inputs import find_inputs

AFFINE = np.array([[-2.0, 0, 0, 9], [0, 3, 0, 8], [0, 0, 4, 7], [0, 0, 0, 1]])


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
