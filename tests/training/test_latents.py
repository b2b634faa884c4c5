from __future__ import annotations

from pathlib import Path

import pytest

from maisi_tools.errors import InputError
from maisi_tools.training.latents import find_latents


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for stem in ("pt_10_ct", "pt_1_ct", "pt_1_ct_flip", "pt_2", "pt_1"):
        (tmp_path / f"{stem}_latent.nii.gz").touch()
        (tmp_path / f"{stem}_latent.json").touch()
    (tmp_path / "pt_1_ct.nii.gz").touch()
    return tmp_path


def stems(items: list[dict[str, str]]) -> list[str]:
    return [Path(item["latent"]).name.removesuffix("_latent.nii.gz") for item in items]


def test_a_case_is_kept_out_with_all_its_latents_and_no_other(cache):
    lists = find_latents(cache, held_out=["pt_1"])
    assert stems(lists["training"]) == ["pt_10_ct", "pt_2"]
    assert stems(lists["validation"]) == ["pt_1_ct_flip", "pt_1_ct", "pt_1"]
    assert all(set(item) == {"latent"} and Path(item["latent"]).is_file() for item in lists["training"])


def test_without_kept_out_cases_all_are_trained_on(cache):
    lists = find_latents(str(cache))
    assert len(lists["training"]) == 5 and lists["validation"] == []


def test_only_latents_with_a_mask_serve_the_controlnet(cache, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for stem in ("pt_1_ct", "pt_2"):
        (masks / f"{stem}_mask.nii.gz").touch()
    lists = find_latents(cache, ["pt_2"], masks)
    assert stems(lists["training"]) == ["pt_1_ct"] and stems(lists["validation"]) == ["pt_2"]
    assert lists["validation"][0]["mask"] == str(masks / "pt_2_mask.nii.gz")
    with pytest.raises(InputError, match=r"_seg\.nii\.gz in .*masks"):
        find_latents(cache, (), masks, mask_suffix="_seg.nii.gz")


def test_an_empty_or_missing_folder_says_how_to_fill_it(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"configs/encode\.json of the maisi_vae bundle"):
            find_latents(folder)


def test_misspelt_held_out_name_is_refused(tmp_path):
    (tmp_path / "pt_50_ct_latent.nii.gz").touch()
    with pytest.raises(InputError, match="pt_5O have no latent"):
        find_latents(tmp_path, ["pt_5O"])
    with pytest.raises(InputError, match="held_out is 'pt_50'"):
        find_latents(tmp_path, "pt_50")


def test_held_out_names_from_a_file(tmp_path):
    for name in ("pt_50", "pt_5"):
        (tmp_path / f"{name}_ct_latent.nii.gz").touch()
    (tmp_path / "held_out.json").write_text('{"held_out": ["pt_5"]}')
    lists = find_latents(tmp_path, str(tmp_path / "held_out.json"))
    assert [Path(item["latent"]).name for item in lists["validation"]] == ["pt_5_ct_latent.nii.gz"]
    assert len(lists["training"]) == 1
