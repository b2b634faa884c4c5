from __future__ import annotations

import json
from pathlib import Path

import pytest

from maisi_tools.errors import InputError
from maisi_tools.training.datalist import make_datalist, read_datalist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b_ct", "b_seg", "a_ct", "sub/c_ct", "sub/c_seg", "a_dose", "d_seg"):
        path = tmp_path / "data" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "data"


def test_cases_are_found_and_split(folder):
    lists = make_datalist(folder, validation=["b"])
    assert [item["name"] for item in lists["training"]] == ["a", "c"]
    assert lists["validation"] == [
        {"name": "b", "image": str(folder / "b_ct.nii.gz"), "label": str(folder / "b_seg.nii.gz")}
    ]
    assert "label" not in lists["training"][0]  # a has none
    assert lists["training"][1]["label"] == str(folder / "sub" / "c_seg.nii.gz")


def test_a_written_datalist_is_read_back(folder, tmp_path):
    lists = make_datalist(folder, validation=["b"])
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    for section in ("training", "validation"):
        assert read_datalist(tmp_path / "datalist.json", section) == lists[section]


def test_bad_folders_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="NAME_ct.nii.gz"):
        make_datalist(tmp_path / "empty")
    with pytest.raises(InputError, match="kept-out.*: x, y"):
        make_datalist(folder, validation=["y", "a", "x"])
    (folder / "sub" / "a_ct.nii.gz").touch()
    with pytest.raises(InputError, match="the same name 'a'"):
        make_datalist(folder)


def test_relative_paths_belong_to_the_datalist_or_to_base_dir(tmp_path):
    path = tmp_path / "lists" / "datalist.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"training": [{"image": "x_ct.nii.gz", "label": "/far/x_seg.nii.gz", "name": "x"}]}))
    item = {"label": "/far/x_seg.nii.gz", "name": "x"}
    assert read_datalist(path, "training") == [{"image": str(tmp_path / "lists" / "x_ct.nii.gz"), **item}]
    assert read_datalist(path, "training", tmp_path) == [{"image": str(tmp_path / "x_ct.nii.gz"), **item}]


@pytest.mark.parametrize("content", [{"validation": [{"image": "x"}]}, {"training": []}])
def test_sections_without_entries_are_refused(tmp_path, content):
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no entries under 'training'"):
        read_datalist(tmp_path / "datalist.json", "training")
    assert read_datalist(tmp_path / "datalist.json", "training", required=False) == []


def test_missing_datalist_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="maisi datalist"):
        read_datalist(tmp_path / "none.json", "training")
