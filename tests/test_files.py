from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch

from maisi_tools.errors import InputError
from maisi_tools.files import (
    canonical_json,
    expanded,
    fingerprint_file,
    fingerprint_tensors,
    json_mapping,
    read_json,
    replacing,
    write_csv,
)


def test_the_file_appears_at_the_end_with_its_suffixes(tmp_path):
    target = tmp_path / "new" / "x.nii.gz"
    with replacing(target) as part:
        part.write_text("whole")
        assert part.name.endswith("x.nii.gz") and not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["x.nii.gz"]
    assert target.read_text() == "whole"


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(KeyError), replacing(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "before")]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with replacing("~/new/x") as part:
        part.write_text("whole")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["home/new/x"]
    assert expanded("a/~b") == Path("a/~b")
    with pytest.raises(InputError, match="~nobody-here/x begins with the name of no user"):
        expanded("~nobody-here/x")


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_table_has_the_columns_of_all_rows_or_those_asked_for(tmp_path):
    rows = [{"case": "a", "dice": 0.5}, {"case": "b, with a comma", "hd95": 2}]
    write_csv(tmp_path / "new" / "all.csv", (row for row in rows))
    with open(tmp_path / "new" / "all.csv", newline="") as file:
        assert list(csv.reader(file)) == [["case", "dice", "hd95"], ["a", "0.5", ""], ["b, with a comma", "", "2"]]
    write_csv(tmp_path / "none.csv", [], ["case", "dice"])
    assert (tmp_path / "none.csv").read_bytes() == b"case,dice\r\n"
    with pytest.raises(ValueError, match="hd95"):
        write_csv(tmp_path / "none.csv", rows, ["case", "dice"])
    assert (tmp_path / "none.csv").read_bytes() == b"case,dice\r\n"  # what was there stays


def test_a_file_is_known_by_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    assert fingerprint_file(tmp_path / "a") == fingerprint_file(str(tmp_path / "b"))
    assert fingerprint_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:32]
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint_file(tmp_path / "a") != fingerprint_file(tmp_path / "b")


def test_a_folder_with_a_folder_in_it_has_a_fingerprint(tmp_path):
    """A series with thumbnails beside its slices, or with its slices further down: any file of it counts."""
    series = tmp_path / "series"
    (series / "deep").mkdir(parents=True)
    (series / "1.dcm").write_bytes(b"one")
    flat = fingerprint_file(series)
    assert flat == hashlib.sha256(b"1.dcm\0one").hexdigest()[:32]
    (series / "deep" / "2.dcm").write_bytes(b"two")
    assert fingerprint_file(series) == hashlib.sha256(b"1.dcm\0one" + b"deep/2.dcm\0two").hexdigest()[:32] != flat


def test_a_folder_is_known_by_the_names_and_bytes_in_it(tmp_path):
    for folder, files in {"a": "xy", "b": "yx", "c": "xz"}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("same")
    a, b, c = (fingerprint_file(tmp_path / name) for name in "abc")
    assert a == b != c


def test_weights_stored_as_fp16_are_those_they_are_loaded_into():
    half = {"a": torch.randn(3, 4).half(), "n": torch.tensor(3), "e": torch.zeros(0)}
    loaded = {"n": half["n"], "e": half["e"], "a": half["a"].float()}
    assert fingerprint_tensors(half) == fingerprint_tensors(loaded)
    for changed in (
        {**loaded, "a": loaded["a"] + 1e-6},
        {**loaded, "a": loaded["a"].reshape(4, 3)},
        {**loaded, "b": loaded["a"]},
        {"n": loaded["n"], "e": loaded["e"], "A": loaded["a"]},
    ):
        assert fingerprint_tensors(changed) != fingerprint_tensors(loaded)


@pytest.mark.parametrize("other", [{"b": [2.0, 2, 1.5], "a": True, "c": None}, {"a": True, "b": (2, 2.0, 1.5)}])
def test_settings_that_mean_the_same_are_the_same(other):
    assert canonical_json({"a": True, "b": [2, 2, 1.5]}) == canonical_json(other)
    assert canonical_json({"a": 1, "b": [2, 2, 1.5]}) != canonical_json(other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"strength": 0.5, "strength": 0.7}', "'strength' stands there more than once"),
        ("strength=1", "is no JSON"),
        ("[1]", "give a mapping of keys"),
    ],
)
def test_an_options_text_that_is_no_mapping_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        json_mapping(text, "settings")
    assert json_mapping('{"strength": {"a": 1}, "b": {"a": 2}}', "settings") == {"strength": {"a": 1}, "b": {"a": 2}}


def test_json_as_windows_writes_it(tmp_path):
    path = tmp_path / "labels.json"
    path.write_bytes('\ufeff{"Läsion": 1}'.encode())
    assert read_json(path) == {"Läsion": 1}
    path.write_bytes('{"Läsion": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match="utf-8"):
        read_json(path)


def test_users_paths_are_expanded_by_one_function(repo_root):
    """Path's own ends in a traceback where `~name` is no user."""
    found = [path for path in (repo_root / "tools").rglob("*.py") if ".expanduser(" in path.read_text()]
    assert found == [repo_root / "tools" / "maisi_tools" / "files.py"]
