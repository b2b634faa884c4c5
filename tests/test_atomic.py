from __future__ import annotations

import pytest

from maisi_tools.atomic import replacing


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


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
