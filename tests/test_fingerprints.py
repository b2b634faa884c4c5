from __future__ import annotations

import hashlib

import pytest
import torch

from maisi_tools import fingerprints


def test_a_file_is_known_by_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    assert fingerprints.of_file(tmp_path / "a") == fingerprints.of_file(str(tmp_path / "b"))
    assert fingerprints.of_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:32]
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprints.of_file(tmp_path / "a") != fingerprints.of_file(tmp_path / "b")


def test_a_folder_is_known_by_the_names_and_bytes_in_it(tmp_path):
    for folder, files in {"a": "xy", "b": "yx", "c": "xz"}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("same")
    a, b, c = (fingerprints.of_file(tmp_path / name) for name in "abc")
    assert a == b != c


def test_weights_stored_as_fp16_are_those_they_are_loaded_into():
    half = {"a": torch.randn(3, 4).half(), "n": torch.tensor(3), "e": torch.zeros(0)}
    loaded = {"n": half["n"], "e": half["e"], "a": half["a"].float()}
    assert fingerprints.of_tensors(half) == fingerprints.of_tensors(loaded)
    for changed in (
        {**loaded, "a": loaded["a"] + 1e-6},
        {**loaded, "a": loaded["a"].reshape(4, 3)},
        {**loaded, "b": loaded["a"]},
        {"n": loaded["n"], "e": loaded["e"], "A": loaded["a"]},
    ):
        assert fingerprints.of_tensors(changed) != fingerprints.of_tensors(loaded)


@pytest.mark.parametrize("other", [{"b": [2.0, 2, 1.5], "a": True, "c": None}, {"a": True, "b": (2, 2.0, 1.5)}])
def test_settings_that_mean_the_same_are_the_same(other):
    assert fingerprints.of_settings({"a": True, "b": [2, 2, 1.5]}) == fingerprints.of_settings(other)
    assert fingerprints.of_settings({"a": 1, "b": [2, 2, 1.5]}) != fingerprints.of_settings(other)
