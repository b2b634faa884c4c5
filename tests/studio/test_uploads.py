"""Files that clients send: read once, under a name of the studio's own."""

from __future__ import annotations

import json
import logging
import threading
import zipfile

import nibabel as nib
import nrrd
import numpy as np
import pytest

from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import LABEL_MAPS, read_label_map
from maisi_tools.studio import uploads
from maisi_tools.studio.results import raw
from maisi_tools.studio.uploads import checked_labels, describe_upload, readings, suffix_of

AFFINE = np.diag([-4.0, 4.0, 2.5, 1.0])


@pytest.fixture
def described(tmp_path):
    """``described(file, kind)`` is what the studio says of an upload of this file."""

    def described(write, file, kind="mask"):
        folder = tmp_path / "0123"
        folder.mkdir()
        write(folder / file)
        return describe_upload(folder, file, "theirs", kind)

    return described


def blocks(*values):
    labels = np.zeros((20, 10, 6), np.int16)
    for number, value in enumerate(values):
        labels[number % 20, number // 20] = value
    return labels


def nifti(array):
    return lambda path: nib.save(nib.Nifti1Image(array, AFFINE), path)


def zipped(entries):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in entries.items():
                archive.writestr(name, nib.Nifti1Image(array, AFFINE).to_bytes())

    return write


def test_a_mask_is_described(described, tmp_path):
    known = described(nifti(blocks(5, 7, 7)), "mask.nii.gz")
    assert (known["size"], known["spacing"], known["label_map"]) == ([20, 10, 6], [4.0, 4.0, 2.5], None)
    assert [(entry["value"], entry["voxels"]) for entry in known["labels"]] == [(5, 6), (7, 12)]
    assert (tmp_path / "0123" / "upload.json").is_file()


def test_labels_that_no_label_map_takes_are_refused(tmp_path):
    for number, (label, words) in enumerate([(65535, None), (65536, "65536"), (2**24, "16777216")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        nifti(blocks(1, 0).astype(np.int32) + np.where(blocks(0, 1), label, 0).astype(np.int32))(folder / "mask.nii.gz")
        if words is None:
            assert describe_upload(folder, "mask.nii.gz", "theirs", "mask")["labels"][-1]["value"] == label
            continue
        with pytest.raises(InputError, match=f"the mask has the label {words}; allowed are 0 to 65535: renumber it"):
            describe_upload(folder, "mask.nii.gz", "theirs", "mask")


def test_forty_unknown_labels_are_all_listed(described):
    known = described(nifti(blocks(*range(301, 341))), "mask.nii.gz")
    found = readings(known, LABEL_MAPS["maisi"])
    assert len(found) == 40 and {entry["meaning"] for entry in found} == {None}


def test_readings_are_names_of_the_vocabulary(described):
    known = described(nifti(blocks(1, 6, 9)), "mask.nii.gz")
    assert [entry["meaning"] for entry in readings(known, LABEL_MAPS["openkbp"])] == [
        "brainstem",
        "left parotid gland",
        None,
    ]


def test_a_folder_of_one_file_a_class_becomes_one_mask(described, tmp_path):
    liver, spleen = blocks(1, 0), blocks(0, 1)
    known = described(zipped({"seg/liver.nii": liver, "seg/spleen.nii": spleen, "readme.txt": liver}), "mask.zip")
    assert (known["file"], known["label_map"]) == ("mask.nii.gz", "totalsegmentator")
    names = LABEL_MAPS["totalsegmentator"]
    assert [entry["value"] for entry in known["labels"]] == [names.label_of("spleen"), names.label_of("liver")]
    assert {path.name for path in (tmp_path / "0123").iterdir()} == {"mask.nii.gz", "mask.zip", "upload.json"}


def segmentation(path):
    """A segmentation of 3D Slicer: the liver, and what the vocabulary does not have."""
    header = {"space": "right-anterior-superior", "space directions": AFFINE[:3, :3], "space origin": [0, 0, 0]}
    for number, name in enumerate(("liver", "GTV primary")):
        header |= {f"Segment{number}_Name": name, f"Segment{number}_LabelValue": str(number + 1)}
        header |= {f"Segment{number}_ID": name, f"Segment{number}_Layer": "0"}
    nrrd.write(str(path), blocks(1, 2), header)


def test_what_is_left_out_of_a_mask_is_noted_by_the_users_name_of_it(described, tmp_path):
    known = described(segmentation, "mask.seg.nrrd")
    (note,) = known["notes"]
    assert note.startswith("theirs: what is left out") and "GTV primary (6 voxels)" in note
    assert json.loads((tmp_path / "0123" / "upload.json").read_text())["notes"] == [note]


def test_what_another_thread_warns_of_is_no_note(described):
    def warn(*_):
        warned = threading.Thread(target=logging.getLogger("maisi_tools.other").warning, args=("of another file",))
        warned.start()
        warned.join()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(uploads, "check_voxels", warn)
        assert described(nifti(blocks(1)), "mask.nii.gz")["notes"] == []


def test_files_of_a_zip_are_called_by_the_users_name_of_it(described):
    overlap = described(zipped({"liver.nii": blocks(1), "spleen.nii": blocks(1)}), "mask.zip")["notes"]
    assert overlap == ["theirs: classes overlap, and the smaller one stays: spleen and liver (6 voxels)"]


def test_an_error_calls_files_by_the_users_name(described):
    with pytest.raises(InputError, match="^theirs/liver.nii has the labels"):
        described(zipped({"liver.nii": blocks(1, 2)}), "mask.zip")


def test_a_zip_leaves_nothing_outside(described, tmp_path):
    known = described(zipped({"../../liver.nii": blocks(1), "/tmp/spleen.nii": blocks(0, 1)}), "mask.zip")
    assert len(known["labels"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"0123"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({}, "holds no volume"),
        ({"a.nii": blocks(1), "b.nii": blocks(1)}, "no files named like classes"),
        ({"a/liver.nii": blocks(1), "b/liver.nii": blocks(1)}, "cannot be read"),
    ],
)
def test_zips_that_are_no_mask(described, entries, words):
    with pytest.raises(InputError, match=words):
        described(zipped(entries), "mask.zip")


@pytest.mark.parametrize(
    ("array", "kind", "words"),
    [
        (blocks(-3), "mask", "negative"),
        (blocks(1).astype(np.float32) / 2, "mask", "no whole number"),
        (np.arange(1200, dtype=np.int16).reshape(20, 10, 6), "mask", "1199 different values"),
        (np.zeros((5, 5), np.int16), "mask", "2D image"),
        (blocks(1), "ct", "8-bit|normalisation"),
    ],
)
def test_what_is_no_mask_or_ct_is_refused(described, array, kind, words):
    with pytest.raises(InputError, match=words):
        described(nifti(array), "x.nii.gz", kind)


@pytest.mark.parametrize("file", ["x.nii.gz", "x.nrrd", "x.zip"])
def test_what_claims_more_voxels_than_are_read_is_refused_by_its_header(described, monkeypatch, file):
    monkeypatch.setenv("MAISI_MAX_VOXELS", "1199")
    write = {
        "x.nii.gz": nifti(blocks(1)),
        "x.nrrd": lambda path: nrrd.write(str(path), blocks(1)),
        "x.zip": zipped({"liver.nii": blocks(1)}),
    }[file]
    with pytest.raises(InputError, match="20 x 10 x 6 voxels; allowed are 1199: .*MAISI_MAX_VOXELS"):
        described(write, file)


def test_a_volume_for_the_page_has_no_more_voxels_either(tmp_path, monkeypatch):
    nifti(blocks(1))(tmp_path / "mask.nii.gz")
    assert raw(tmp_path / "mask.nii.gz", "mask")[0]["size"] == [20, 10, 6]
    monkeypatch.setenv("MAISI_MAX_VOXELS", "1199")
    with pytest.raises(InputError, match="MAISI_MAX_VOXELS"):
        raw(tmp_path / "mask.nii.gz", "mask")


@pytest.mark.parametrize("kind", ["mask", "ct"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, "long"])
def test_damaged_zips_are_refused(described, method, kind):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if method == "long" else method) as archive:
            name = "x" * 300 if method == "long" else "liver"
            archive.writestr(f"{name}.nii", np.arange(3000).tobytes())
            size = archive.infolist()[0].compress_size
        if method != "long":
            content, begin = bytearray(path.read_bytes()), 30 + len("liver.nii") + 4
            content[begin : begin + size - 4] = b"\xff" * (size - 4)
            path.write_bytes(content)

    words = "no DICOM" if (method, kind) == ("long", "ct") else "allowed is an intact zip file"
    with pytest.raises(InputError, match=words):
        described(write, "x.zip", kind)


def test_a_ct_comes_as_a_zip_of_its_series(described, files, tmp_path):
    study = pytest.importorskip("maisi_tools.dicom.study", reason="needs the extra 'dicom'")
    image = nib.load(files["ct"])
    series = study.write_study(tmp_path / "study", np.asarray(image.dataobj), image.affine)

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for file in series:
                archive.write(file, file.name)

    known = described(write, "scan.zip", "ct")
    assert (known["size"], known["spacing"], known["file"]) == ([48, 48, 48], [5.0, 5.0, 3.4], "scan.zip")
    assert "labels" not in known


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.nii", ".nii"),
        ("../A.NII.GZ", ".nii.gz"),
        ("x.seg.nrrd", ".seg.nrrd"),
        ("a.nii.zip", ".zip"),
        ("a\0.nrrd", ".nrrd"),
    ],
)
def test_of_a_name_the_suffix_alone_counts(name, suffix):
    assert suffix_of(name, "mask") == suffix


@pytest.mark.parametrize("name", ["a", "", ".nii/../x", "a.nii.gz.exe", "a.dcm"])
def test_other_files_are_refused(name):
    with pytest.raises(InputError, match="allowed are .nii.gz"):
        suffix_of(name, "mask")


def test_a_saved_label_map_is_one_that_is_read(tmp_path):
    path = tmp_path / "ours.json"
    path.write_text(
        json.dumps(
            checked_labels(
                {"007": "Left parotid gland", "11": "placeholder 18", "8": None, "9": "kidney_left", "10": "brain"}
            )
        )
    )
    assert dict(read_label_map(path)) == {7: 18, 11: 18, 8: 0, 9: 14, 10: 22}


@pytest.mark.parametrize(
    "labels",
    [
        None,
        {},
        [],
        {"a": "liver"},
        {"0": "liver"},
        {"-1": "liver"},
        {"70000": "liver"},
        {"655351": "liver"},
        {"0000712345": "liver"},
        {"7" * 5000: "liver"},
        {"0" * 5000 + "7": "liver"},
        {"7": "liver", "07": "spleen"},
        {"1": 5},
        {"1": "x"},
        {"²": "liver"},
    ],
)
def test_what_is_no_label_map_is_refused(labels):
    with pytest.raises(InputError):
        checked_labels(labels)
