"""Which files an "input" names, in which order, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.data import list_data_collate

from maisi_tools.errors import InputError
from maisi_tools.volumes.inputs import (
    BLOCK,
    NO_CT,
    TRAINED,
    check_output_dir,
    find_cts,
    find_inputs,
    fingerprint_input,
    glimpse_input,
    short_names,
    stem_of,
)

from .conftest import SHAPE, ct_values


@pytest.fixture
def folder(tmp_path):
    """Files are looked at by name alone, so they may be empty."""
    for name in ("b.nii.gz", "a.nii", "c.nrrd", "a.json", "notes.txt", "._b.nii.gz", "sub/d.nii.gz"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def names(items, key="image"):
    assert all(isinstance(item[key], str) for item in items)
    return [Path(item[key]).name for item in items]


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("x/case.nii.gz", "case"),
        ("case.nii", "case"),
        ("case.v1.NII.GZ", "case.v1"),
        ("case.seg.nrrd", "case"),
        ("sample_1.5", "sample_1.5"),
        ("x/study/", "study"),
    ],
)
def test_stem(path, stem):
    assert stem_of(path) == stem


def test_stem_of_a_folder_that_is_named_like_a_file(tmp_path):
    (tmp_path / "ct.nii").mkdir()
    assert stem_of(tmp_path / "ct.nii") == "ct.nii"


def test_stem_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "study" / "series").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "study" / "series")
    assert (stem_of("."), stem_of(".."), stem_of("../../study")) == ("series", "study", "study")


def test_what_is_null_in_a_datalist_is_left_out(folder):
    """MONAI's collation could not carry it, and would say so after the door."""
    entry = {
        "image": str(folder / "b.nii.gz"),
        "age": None,
        "of": {"site": None, "dose": 2},
        "none": {"a": {"b": None}},
        "fold": 0,
    }
    (item,) = find_inputs([entry])
    assert item == {"image": entry["image"], "of": {"dose": 2}, "fold": 0}
    list_data_collate([item])


def test_sections_that_are_left_out_are_said(folder, caplog):
    path = folder / "split.json"
    path.write_text(json.dumps({"training": ["a.nii"], "validation": ["b.nii.gz"]}))
    with caplog.at_level("INFO"):
        assert names(find_inputs(path)) == ["b.nii.gz"]
    assert "'validation' taken, 1 of 'training' left out" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        assert len(find_inputs(path, sections=("training", "validation"))) == 2
    assert not caplog.text
    assert names(find_inputs(path, sections=TRAINED)) == ["a.nii"]
    assert "'training' taken, 1 of 'validation' left out" in caplog.text
    path.write_text(json.dumps({"validation": ["b.nii.gz"], "testing": ["c.nrrd"]}))
    with pytest.raises(InputError, match="under 'testing' and 'validation' alone.*allowed are those under 'training'"):
        find_inputs(path, sections=TRAINED)


def test_what_is_kept_for_testing_is_not_encoded_to_be_trained_on(folder, caplog):
    path = folder / "split.json"
    path.write_text(json.dumps({"training": ["a.nii"], "validation": ["b.nii.gz"], "testing": ["c.nrrd"]}))
    with caplog.at_level("INFO"):
        assert names(find_inputs(path, sections=("validation", "training"))) == ["b.nii.gz", "a.nii"]
    assert "'validation' and 'training' taken, 1 of 'testing' left out" in caplog.text
    path.write_text(json.dumps({"testing": ["c.nrrd"]}))
    with pytest.raises(InputError, match="cases under 'testing' alone"):
        find_inputs(path, sections=("validation", "training"))


def test_results_beside_a_series_do_not_change_its_fingerprint(write_series, tmp_path):
    series = write_series(ct_values(SHAPE))
    before = fingerprint_input(series)
    (series / "latents").mkdir()
    (series / "latents" / "x_latent.json").write_text("{}")
    assert fingerprint_input(series) == before
    first = sorted(series.iterdir())[0]
    first.write_bytes(first.read_bytes() + b"\0\0")
    assert fingerprint_input(series) != before


def test_a_glimpse_sees_another_volume_of_the_same_size(tmp_path):
    """Bodies differ inside alone: corners and edges of both are air, in a file, zipped, and in a series."""
    values = np.full((64, 60, 60), -1000, dtype=np.int16)
    values[20:44, 20:40, 20:40] = 40
    other = values.copy()
    other[20:44, 20:40, 20:40] = 50
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    for name in ("a.nii", "a.nii.gz"):
        seen = []
        for array in (values, other, values):
            nib.save(nib.Nifti1Image(array, affine), tmp_path / name)
            seen.append((glimpse_input(tmp_path / name), fingerprint_input(tmp_path / name)))
        assert seen[0] == seen[2] and seen[0][0] != seen[1][0], name
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "a.nii").rename(tmp_path / "moved" / "b.nii")
    size = moved.stat().st_size
    before = glimpse_input(moved)
    with moved.open("ab") as file:
        file.write(b"\0")
    assert glimpse_input(moved) != before and size > 3 * 32 * BLOCK
    # One voxel of a .gz is enough: its end has the checksum of all.
    values[30, 30, 30] = 41
    before = glimpse_input(tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    assert glimpse_input(tmp_path / "a.nii.gz") != before


def test_a_glimpse_of_a_series_is_of_its_own_slices(write_series):
    series = write_series(ct_values(SHAPE))
    before = glimpse_input(series)
    (series / "latents").mkdir()
    (series / "latents" / "x_latent.json").write_text("{}")
    assert glimpse_input(series) == before
    first = min(file for file in series.iterdir() if file.is_file())
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    assert glimpse_input(series) != before


def test_file_folder_glob_and_list(folder):
    assert names(find_inputs(str(folder / "b.nii.gz"))) == ["b.nii.gz"]
    assert names(find_inputs(folder / "b.nii.gz", key="mask"), "mask") == ["b.nii.gz"]
    assert names(find_inputs(str(folder))) == ["a.nii", "b.nii.gz", "c.nrrd"]
    assert names(find_inputs(str(folder / "*"))) == ["a.nii", "b.nii.gz", "c.nrrd"]
    assert names(find_inputs(str(folder / "**" / "*.nii.gz"))) == ["b.nii.gz", "d.nii.gz"]
    assert names(find_inputs([str(folder / "c.nrrd"), folder / "sub"])) == ["c.nrrd", "d.nii.gz"]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "ct[1].nii.gz").touch()
    assert names(find_inputs(tmp_path / "ct[1].nii.gz")) == ["ct[1].nii.gz"]


def test_of_a_folder_what_is_no_ct_is_left_out_and_said(tmp_path, caplog):
    """CTs of two kinds of runs, whatever they are called; a file that is named itself is taken."""
    files = ("s_0.nii.gz", "x_mask_ct.nii.gz", "s_0_latent.nii.gz", "x_mask_mask.nii.gz", "x_seg.nrrd", "x_weight.nii")
    for name in files:
        (tmp_path / name).touch()
    for given in (tmp_path, tmp_path / "*"):
        caplog.clear()
        assert names(find_cts(given)) == ["s_0.nii.gz", "x_mask_ct.nii.gz"]
        assert "4 volumes that are no CT by their names are left out (s_0_latent.nii.gz, x_" in caplog.text
    assert names(find_cts([tmp_path / "x_seg.nrrd"])) == ["x_seg.nrrd"]
    assert len(find_inputs(tmp_path)) == 6
    with pytest.raises(InputError, match="holds no CT, by their names: x_mask_mask.nii.gz, x_seg.nrrd; allowed"):
        find_inputs(tmp_path / "x_*[kg].n*", skip=NO_CT)


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["a/x.nii.gz", "b/y.nii"], ["x", "y"]),
        (["p1/ct.nii.gz", "p2/ct.nii.gz", "c/z_ct.nii"], ["p1/ct", "p2/ct", "z_ct"]),
        (["a/p1/ct.nii", "b/p1/ct.nii", "b/p2/ct.nii"], ["a/p1/ct", "b/p1/ct", "p2/ct"]),
        (["/ct.nii", "/a/ct.nii"], ["/ct", "a/ct"]),
        (["/a/ct.nii", "/a/ct.nii.gz"], ["/a/ct.nii", "/a/ct.nii.gz"]),
        (["a/ct.nii", "a/ct.nii"], ["ct", "ct"]),
        ([], []),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths, wanted):
    assert short_names(paths) == wanted


def test_of_a_folder_the_preferred_names_alone_where_there_are_any(folder):
    for given in (folder, str(folder / "*")):
        assert names(find_inputs(given, prefer="b.nii.gz")) == ["b.nii.gz"]
        assert names(find_inputs(given, prefer="_latent.nii.gz")) == ["a.nii", "b.nii.gz", "c.nrrd"]
    assert names(find_inputs(folder / "a.nii", prefer="b.nii.gz")) == ["a.nii"]


def test_datalists(folder, monkeypatch):
    listing = folder / "list.json"
    listing.write_text(json.dumps({"training": [{"image": "a.nii"}], "testing": [{"image": "b.nii.gz", "fold": 2}]}))
    assert find_inputs(listing) == [{"image": str(folder / "b.nii.gz"), "fold": 2}]
    listing.write_text(json.dumps([str(folder / "c.nrrd"), "a.nii"]))
    assert names(find_inputs(str(listing))) == ["c.nrrd", "a.nii"]
    monkeypatch.chdir(folder)
    assert find_inputs([{"image": "a.nii", "fold": 1}]) == [{"image": "a.nii", "fold": 1}]


def test_dicom_series_and_folders_of_them(write_series, tmp_path):
    first = write_series(ct_values((6, 5, 4)), "studies/one")
    write_series(ct_values((6, 5, 4)), "studies/two")
    assert find_inputs(first) == [{"image": str(first)}]
    assert names(find_inputs(tmp_path / "studies")) == ["one", "two"]
    (first / "case.nii.gz").touch()
    with pytest.raises(InputError, match=r"DICOM slices and also case\.nii\.gz; allowed is .*folder of its own"):
        find_inputs(first)


def test_refusals_say_given_allowed_and_what_to_do(folder, tmp_path):
    bad = folder / "bad.json"
    (tmp_path / "empty").mkdir()
    allowed = r"allowed is a volume file \(\.nii\.gz"
    for given, message in [
        (folder / "missing.nii.gz", rf"missing\.nii\.gz does not exist; {allowed}.*correct the path"),
        (folder / "notes.txt", r"notes\.txt is no supported file type; allowed are \.nii\.gz.*convert it"),
        (tmp_path / "empty", rf"empty holds no volume and no DICOM series; {allowed}"),
        (folder / "*.png", rf"matches 0 files and none is a volume; {allowed}"),
        (folder / "*.txt", rf"matches 1 files and none is a volume; {allowed}"),
        (folder / "none.json", rf"none\.json cannot be read.*{allowed}"),
        (None, rf"input is None; {allowed}"),
        ([], r"input \[\] holds no item; give at least one: a volume file"),
        ([[str(folder)]], rf"has an entry \[.*{allowed}"),
        (3, rf"input is 3; {allowed}"),
        ([{"label": "a.nii"}], r"keys \['label'\] and no path under 'image'; allowed are entries.*rename"),
        ([{"image": "gone.nii"}], r"gone\.nii .* does not exist; correct"),
        ([{"image": str(folder / "sub")}], r"sub is a folder without DICOM files; allowed are"),
    ]:
        with pytest.raises(InputError, match=message):
            find_inputs(given)
    for content, message in [
        ("{oops", r"bad\.json is not JSON .*allowed as \.json is a datalist: correct"),
        ('{"images": []}', r"keys \['images'\]; allowed is a list, or a list under one of testing"),
        ("3", r"holds a int; allowed is a list"),
        ("[3]", r"has an entry 3; allowed are paths"),
        ("[]", r"holds no item; give at least one"),
    ]:
        bad.write_text(content)
        with pytest.raises(InputError, match=message):
            find_inputs(bad)


def test_two_inputs_of_one_stem_are_refused(folder):
    (folder / "b.nii").touch()
    with pytest.raises(InputError, match=r"b\.nii and .*b\.nii\.gz have the same stem 'b'.*allowed are.*rename"):
        find_inputs(folder)
    with pytest.raises(InputError, match="same stem 'c'"):
        find_inputs([folder / "c.nrrd", folder / "c.nrrd"])


def test_output_dir_is_made_and_left_empty(tmp_path):
    made = check_output_dir(str(tmp_path / "new" / "out"))
    assert made.is_dir() and os.listdir(made) == []


def test_no_output_is_written_over_an_input(tmp_path):
    """By whatever path it is named; what is no input may be made anew."""
    for name in ("a.nii.gz", "a_ct.nii.gz", "a_mask.nii.gz", "b.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path)
    a, b = str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")
    refused = [
        ([{"image": a}, {"image": str(tmp_path / "a_ct.nii.gz")}], ["_mask", "_ct"]),
        ([{"image": str(tmp_path / "link" / "a_ct.nii.gz")}, {"image": a}], ["_ct"]),
        ([{"fold": 0, "label": None, "image": a}], [""]),
    ]
    for items, suffixes in refused:
        with pytest.raises(InputError, match="would be written over, .* give another output_dir"):
            check_output_dir(tmp_path, items, suffixes)
        assert check_output_dir(tmp_path / "out", items, suffixes) == tmp_path / "out"
    items = [{"image": a, "patient": str(tmp_path)}, {"image": b, "region": "x" * 5000}]
    with pytest.raises(InputError, match=r"a_ct\.nii\.gz would be written over, and no earlier run wrote it"):
        check_output_dir(tmp_path, items, ["_ct", "_mask"])  # a real CT beside its mask, say
    for other in ("{}", "[1]", "{", '{"Modality": "CT", "ConversionSoftware": "dcm2niix", "Sources": []}'):
        (tmp_path / "a_ct.json").write_text(other)
        with pytest.raises(InputError, match="no earlier run wrote it"):
            check_output_dir(tmp_path, items, ["_ct", "_mask"])
    (tmp_path / "a_ct.json").write_text('{"metrics": {}}')  # as a run leaves it, before it writes the volume
    assert check_output_dir(tmp_path, items, ["_ct", "_mask"]) == tmp_path
    assert check_output_dir(tmp_path, [{"latent": a}], ["_ct"], key="latent") == tmp_path


def test_output_dir_below_a_file_or_read_only_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out cannot be written \(.*\); allowed is a folder.*give another"):
        check_output_dir(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot be written"):
        check_output_dir(tmp_path / "file")
    if os.path.isdir("/proc/self"):  # a file system that refuses new files to root as well
        with pytest.raises(InputError, match="cannot be written"):
            check_output_dir("/proc/self")
