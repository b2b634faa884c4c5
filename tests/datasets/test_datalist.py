from __future__ import annotations

import json

import pytest

from maisi_tools.datasets.datalist import read_datalist
from maisi_tools.errors import InputError


def test_relative_paths_belong_to_the_datalist_or_to_base_dir(tmp_path, monkeypatch):
    path = tmp_path / "lists" / "datalist.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"training": [{"image": "x_ct.nii.gz", "label": "/far/x_seg.nii.gz", "name": "x"}]}))
    item = {"label": "/far/x_seg.nii.gz", "name": "x"}
    assert read_datalist(path, "training") == [{"image": str(tmp_path / "lists" / "x_ct.nii.gz"), **item}]
    assert read_datalist(path, "training", tmp_path) == [{"image": str(tmp_path / "x_ct.nii.gz"), **item}]
    monkeypatch.chdir(tmp_path)  # and these to where one is
    assert read_datalist("lists/datalist.json", "training") == read_datalist(path, "training")
    assert read_datalist(path, "training", ".") == read_datalist(path, "training", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "lists")
    assert read_datalist("link/datalist.json", "training")[0]["image"] == str(tmp_path / "link" / "x_ct.nii.gz")


@pytest.mark.parametrize("content", [{"validation": [{"image": "x"}]}, {"training": []}])
def test_sections_without_entries_are_refused(tmp_path, content):
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no entries under 'training'"):
        read_datalist(tmp_path / "datalist.json", "training")
    assert read_datalist(tmp_path / "datalist.json", "training", required=False) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"training": ["x.nii.gz"]}', '{"training": {"image": "x"}}'])
def test_what_is_no_datalist_is_refused(tmp_path, text):
    (tmp_path / "datalist.json").write_text(text)
    with pytest.raises(InputError, match="maisi prepare"):
        read_datalist(tmp_path / "datalist.json", "training")


@pytest.mark.parametrize("entry", [{"image": ["a.nii", "b.nii"]}, {"image": 3}, {"image": "a.nii", "label": ["b.nii"]}])
def test_an_entry_has_one_file_of_each_kind(tmp_path, entry):
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [entry]}))
    with pytest.raises(InputError, match="one file under 'image' and, where there is a mask, one under 'label'"):
        read_datalist(path, "training")
    path.write_text('{"training": [{"image": "a.nii", "label": null}]}')
    assert read_datalist(path, "training") == [{"image": str(tmp_path / "a.nii")}]


def test_missing_datalist_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="maisi prepare"):
        read_datalist(tmp_path / "none.json", "training")


def test_a_section_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "list.json").write_text('{"training": [{"image": "a.nii.gz"}], "training": [{"image": "b.nii.gz"}]}')
    with pytest.raises(InputError, match="'training' stands there more than once"):
        read_datalist(tmp_path / "list.json", "training")


def test_a_volume_in_both_sections_is_said(tmp_path, caplog):
    lists = {"training": [{"image": "a.nii"}, {"image": "b.nii"}], "validation": [{"image": "b.nii"}]}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    assert len(read_datalist(tmp_path / "list.json", "training")) == 2 and not caplog.text
    read_datalist(tmp_path / "list.json", "validation")
    assert "has 1 volumes under training and validation, such as b.nii; weights are then chosen by" in caplog.text
