from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maisi_tools.errors import InputError
from maisi_tools.training.latents import find_latents, latents_to_encode, made_by
from maisi_tools.weights import encoder_fingerprint, save_weights


def add(folder: Path, *stems: str, **sidecar) -> None:
    for stem in stems:
        (folder / f"{stem}_latent.nii.gz").touch()
        (folder / f"{stem}_latent.json").write_text(json.dumps(sidecar))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    add(tmp_path, "pt_10_ct", "pt_1_ct", "pt_1_ct_flip", "pt_2", "pt_1")
    (tmp_path / "pt_1_ct.nii.gz").touch()
    return tmp_path


def stems(items: list[dict[str, str]]) -> list[str]:
    return [Path(item["latent"]).name.removesuffix("_latent.nii.gz") for item in items]


def test_a_case_is_kept_out_with_all_its_latents_and_no_other(cache):
    lists = find_latents(cache, held_out=["pt_1"])
    assert stems(lists["training"]) == ["pt_10_ct", "pt_2"]
    assert stems(lists["validation"]) == ["pt_1_ct_flip", "pt_1_ct", "pt_1"]
    assert all(set(item) == {"latent"} and Path(item["latent"]).is_file() for item in lists["training"])


def test_without_kept_out_cases_all_are_trained_on_and_it_is_said(cache, caplog):
    (cache / ".123-pt_3_latent.nii.gz").touch()  # what a killed process was writing
    lists = find_latents(str(cache))
    assert "no case is held out" in caplog.text
    assert len(lists["training"]) == 5 and lists["validation"] == []


def test_latents_that_say_nothing_of_regions_are_said(cache, caplog):
    find_latents(cache, held_out=["pt_1"])
    assert "no latent in" in caplog.text and "cases.json of `maisi complete_masks`" in caplog.text
    caplog.clear()
    for sidecar in cache.glob("*.json"):
        if "pt_10" not in sidecar.name:
            sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "region": ["head"]}))
    find_latents(cache, held_out=["pt_1"])
    assert "not every latent (pt_10_ct) in" in caplog.text
    caplog.clear()
    sidecar = next(path for path in cache.glob("pt_10*.json"))
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "region": ["head"]}))
    find_latents(cache, held_out=["pt_1"])
    assert not caplog.text


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


def test_latents_without_a_mask_are_told_of_and_all_that_are_held_out_need_one(cache, tmp_path, caplog):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "pt_2_mask.nii.gz").touch()
    find_latents(cache, ["pt_2"], masks)
    assert (
        "left out 4 latents without a mask *_mask.nii.gz in" in caplog.text and "pt_10_ct, pt_1_ct_flip" in caplog.text
    )
    with pytest.raises(InputError, match=r"none of the held-out cases has a mask .*pt_1_ct.*; make their masks with"):
        find_latents(cache, ["pt_1"], masks)


def test_a_view_takes_its_own_mask_or_its_cases(tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    add(tmp_path, "pt_1_ct", view="")
    add(tmp_path, "pt_1_ct_flip", view="flip")
    add(tmp_path, "pt_1_ct_fine", view="fine")
    add(tmp_path, "pt_1_ct_2", view="")  # another case, whose name begins alike
    for stem in ("pt_1_ct", "pt_1_ct_fine"):
        (masks / f"{stem}_mask.nii.gz").touch()
    found = find_latents(tmp_path, masks_dir=masks)["training"]
    assert {stem: Path(item["mask"]).name for stem, item in zip(stems(found), found, strict=True)} == {
        "pt_1_ct": "pt_1_ct_mask.nii.gz",
        "pt_1_ct_flip": "pt_1_ct_mask.nii.gz",
        "pt_1_ct_fine": "pt_1_ct_fine_mask.nii.gz",
    }


def test_a_mask_of_another_ct_than_its_latents_is_refused(tmp_path):
    """By content, wherever the mask lies; one view of an older CT is enough. What does not say its CT passes."""
    masks = tmp_path / "moved"
    masks.mkdir()
    for name, ct in {"a": "new", "b": "new", "c": "old", "d": "old", "e_fine": "resampled", "f": "old"}.items():
        (masks / f"{name}_mask.nii.gz").touch()
        (masks / f"{name}_mask.json").write_text(json.dumps({"labels": [200], "sources": [ct, "labels"]}))
    (masks / "c_mask.json").unlink()  # the user's own
    (masks / "f_mask.json").write_text('{"labels": [200]}')  # of an edit
    add(tmp_path, "a", "b", "c", "f", view="", source="new")
    add(tmp_path, "b_flip", view="flip", source="new")
    add(tmp_path, "d", view="")  # as an earlier version wrote it
    add(tmp_path, "e_fine", view="fine", source="new")  # with a mask of its own
    assert len(find_latents(tmp_path, masks_dir=masks)["training"]) == 7
    for names, wanted in ((("b_flip",), "1 masks .*moved/b_mask.nii.gz;"), (("a", "b"), "2 masks .*a_mask.*b_mask")):
        for name in names:
            add(tmp_path, name, view="flip" if "flip" in name else "", source="old")
        with pytest.raises(InputError, match=f"{wanted}.* run `maisi complete_masks` again"):
            find_latents(tmp_path, masks_dir=masks)
    find_latents(tmp_path)  # stage 2 reads no masks


def test_an_empty_or_missing_folder_says_how_to_fill_it(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"configs/encode\.json of the maisi_vae bundle"):
            find_latents(folder)


def test_misspelt_held_out_name_is_refused(tmp_path):
    add(tmp_path, "pt_50_ct")
    with pytest.raises(InputError, match="pt_5O have no latent"):
        find_latents(tmp_path, ["pt_5O"])
    for wrong in ("pt_50", 3):
        with pytest.raises(InputError, match=f"held_out is {wrong!r}; give a list of names"):
            find_latents(tmp_path, wrong)


def test_held_out_names_from_a_file(tmp_path):
    add(tmp_path, "pt_50_ct", "pt_5_ct")
    (tmp_path / "held_out.json").write_text('{"held_out": ["pt_5"]}')
    lists = find_latents(tmp_path, str(tmp_path / "held_out.json"))
    assert [Path(item["latent"]).name for item in lists["validation"]] == ["pt_5_ct_latent.nii.gz"]
    assert len(lists["training"]) == 1
    (tmp_path / "held_out.json").write_text('{"held_out": "pt_5"}')
    with pytest.raises(InputError, match="has 'pt_5' under 'held_out'; allowed is a list"):
        find_latents(tmp_path, str(tmp_path / "held_out.json"))


def test_names_that_are_numbers_are_names(tmp_path):
    add(tmp_path, "3_ct", "4_ct")
    (tmp_path / "held_out.json").write_text('{"held_out": [3]}')
    for held_out in ([3], (3,), ["3"], str(tmp_path / "held_out.json")):
        assert stems(find_latents(tmp_path, held_out)["validation"]) == ["3_ct"]


def test_sigma_is_found_where_the_latent_was_made_with_it(tmp_path):
    add(tmp_path, "a", settings='{"sigma": true}')
    add(tmp_path, "b", settings='{"sigma": false}')
    found = find_latents(tmp_path)["training"]
    assert [item.get("sigma") for item in found] == [str(tmp_path / "a_sigma.nii.gz"), None]


@pytest.mark.parametrize("settings", [3, "x", "[]", ["a"], {"sigma": True}])
def test_settings_that_are_none_are_refused(tmp_path, settings):
    add(tmp_path, "a", settings=settings)
    with pytest.raises(InputError, match=r"a_latent\.nii\.gz has settings that are no JSON object"):
        find_latents(tmp_path)


def test_a_latent_without_a_sidecar_is_refused(cache):
    (cache / "pt_2_latent.json").unlink()
    with pytest.raises(InputError, match=r"pt_2_latent\.nii\.gz has no sidecar"):
        find_latents(cache)


def test_latents_of_different_autoencoders_are_refused(tmp_path):
    add(tmp_path, "a", "b", autoencoder="11")
    add(tmp_path, "c", autoencoder="22")
    with pytest.raises(InputError, match=r"2 of 11 \(a\), 1 of 22 \(c\); allowed is one: encode them again"):
        find_latents(tmp_path)
    add(tmp_path, "c")  # made before latents said where they come from
    with pytest.raises(InputError, match=r"1 of unknown weights \(c\)"):
        find_latents(tmp_path)


def test_latents_are_checked_against_the_autoencoder(tmp_path, tiny_autoencoder):
    add(tmp_path, "a", autoencoder=encoder_fingerprint(tiny_autoencoder))
    torch.save({"model": tiny_autoencoder.state_dict()}, tmp_path / "vae.pt")
    assert stems(find_latents(tmp_path, autoencoder=tmp_path / "vae.pt")["training"]) == ["a"]
    with torch.no_grad():
        next(tiny_autoencoder.encoder.parameters()).add_(0.1)
    torch.save({"model": tiny_autoencoder.state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(InputError, match=r"not from .*vae\.pt .*; encode them again"):
        find_latents(tmp_path, autoencoder=tmp_path / "vae.pt")


def test_the_encoder_alone_counts(tiny_autoencoder, tmp_path):
    before = encoder_fingerprint(tiny_autoencoder)
    with torch.no_grad():
        for name, value in tiny_autoencoder.named_parameters():
            if name.startswith(("decoder", "post_quant")):
                value.add_(0.1)
    assert encoder_fingerprint(tiny_autoencoder) == before
    with torch.no_grad():
        tiny_autoencoder.quant_conv_mu.conv.bias.add_(0.1)
    assert encoder_fingerprint(tiny_autoencoder.state_dict()) != before
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="holds no encoder"):
        encoder_fingerprint(tmp_path / "x.pt")


@pytest.fixture
def volumes(tmp_path) -> list[dict]:
    for name in "abc":
        (tmp_path / f"{name}_ct.nii.gz").write_text(name)
    return [{"image": str(tmp_path / f"{name}_ct.nii.gz"), "region": ["head"]} for name in "abc"]


def jobs(volumes, tmp_path, tiny_autoencoder, **changes) -> list[dict]:
    given = {"views": [{}, {"name": "flip", "flip": True}], "settings": {"multiple": 4}, "modality": "ct", **changes}
    return latents_to_encode(volumes, tmp_path / "out", tiny_autoencoder, **given)


def test_ranks_share_the_views_of_all_cases(volumes, tmp_path, tiny_autoencoder):
    everything = jobs(volumes, tmp_path, tiny_autoencoder)
    assert [job["stem"] for job in everything] == [f"{name}_ct{view}" for name in "abc" for view in ("", "_flip")]
    shares = [jobs(volumes, tmp_path, tiny_autoencoder, rank=rank, ranks=4) for rank in range(4)]
    assert sorted(job["stem"] for share in shares for job in share) == sorted(job["stem"] for job in everything)
    assert [len(share) for share in shares] == [2, 2, 1, 1]


def test_latents_of_what_is_given_no_more_are_said(volumes, tmp_path, tiny_autoencoder, caplog):
    """A case that was taken out of the list, or a view, would be trained on all the same."""
    caplog.set_level("WARNING", "maisi_tools")  # another test may have asked for more
    (tmp_path / "out").mkdir()
    add(tmp_path / "out", "a_ct", "b_ct_flip", "gone_ct", scale_factor=1)
    jobs(volumes, tmp_path, tiny_autoencoder, rank=1, ranks=2)
    assert not caplog.text
    jobs(volumes, tmp_path, tiny_autoencoder, views=[{}])
    assert "has 2 latents of no volume and view that are given now" in caplog.text
    assert "see them, too: b_ct_flip, gone_ct; delete them" in caplog.text


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0), ("0", 1)])
def test_ranks_that_are_none_are_refused(volumes, tmp_path, tiny_autoencoder, rank, ranks):
    with pytest.raises(InputError, match="0 <= rank < ranks"):
        jobs(volumes, tmp_path, tiny_autoencoder, rank=rank, ranks=ranks)


def test_an_item_has_its_own_modality_but_is_a_ct(volumes, tmp_path, tiny_autoencoder):
    volumes[1]["modality"] = "CT_contrast"
    everything = jobs(volumes, tmp_path, tiny_autoencoder, views=[{}])
    assert [job["modality"] for job in everything] == ["ct", "ct_contrast", "ct"]
    for wrong in ("mri", "ct_foo"):
        volumes[1]["modality"] = wrong
        with pytest.raises(InputError, match=rf"b_ct\.nii\.gz has the modality '{wrong}'"):
            jobs(volumes, tmp_path, tiny_autoencoder)


@pytest.mark.parametrize(
    ("modality", "window", "words"),
    [
        ("foo", None, "modality is 'foo'; allowed are unknown, ct"),
        ("mri", [-1000, 1000, 0, 1], "modality is 'mri'; without mr.json HU are scaled"),
        (8, [-1000, 1000, 0, 1], "modality is 8; without mr.json HU are scaled"),
        ("ct", [0.0, 99.5], "modality is 'ct'; mr.json scales MR"),
    ],
)
def test_a_modality_that_the_window_is_not_for_is_refused_and_no_sidecar_changes(
    volumes, tmp_path, tiny_autoencoder, modality, window, words
):
    settings = {"multiple": 4} | ({} if window is None else {"window": window})
    stale = tmp_path / "out" / "a_ct_latent.json"
    stale.parent.mkdir()
    stale.write_text('{"scale_factor": 1}')
    with pytest.raises(InputError, match=words):
        jobs(volumes, tmp_path, tiny_autoencoder, settings=settings, modality=modality)
    assert stale.read_text() == '{"scale_factor": 1}'
    (job, *_) = jobs(volumes, tmp_path, tiny_autoencoder, settings={"window": [0, 99.5]}, modality="mri_t1")
    assert job["modality"] == "mri_t1"


def test_two_latents_of_one_name_are_refused(volumes, tmp_path, tiny_autoencoder):
    volumes.append({"image": str(tmp_path / "a_ct_flip.nii.gz")})
    with pytest.raises(InputError, match=r"would both be a_ct_flip_latent\.nii\.gz"):
        jobs(volumes, tmp_path, tiny_autoencoder)


def test_latents_and_weights_of_several_factors_are_refused_with_all_values(tmp_path):
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    for folder, factor in ((fine, 2), (coarse, None)):
        folder.mkdir()
        add(folder, "pt_1_ct", "pt_2", **({} if factor is None else {"factor": factor}))
        save_weights(folder / "model.pt", {"a": torch.ones(1)}, **({} if factor is None else {"factor": factor}))
    assert made_by(find_latents(fine), None, fine / "model.pt") == {"factor": 2}
    assert made_by(find_latents(coarse, ["pt_2"]), coarse / "model.pt", None) == {"factor": 4}
    with pytest.raises(InputError, match=r"latent .*fine.* 2, weights .*coarse.*model\.pt 4; allowed is one for all"):
        made_by(find_latents(fine), coarse / "model.pt")
    both = {"training": [*find_latents(fine)["training"], *find_latents(coarse)["training"]], "validation": []}
    with pytest.raises(InputError, match="latent .* 2, latent .* 4"):
        made_by(both)


def test_weights_for_latents_of_another_encoder_are_refused_and_those_that_do_not_say_pass(tmp_path):
    add(tmp_path, "pt_1", factor=2, autoencoder="11")
    for name, said in (("same", {"autoencoder": "11"}), ("silent", {}), ("other", {"autoencoder": "22"})):
        save_weights(tmp_path / f"{name}.pt", {"a": torch.ones(1)}, factor=2, **said)
    latents = find_latents(tmp_path)
    for name in ("same", "silent"):
        assert made_by(latents, tmp_path / f"{name}.pt") == {"factor": 2, "autoencoder": "11"}
    with pytest.raises(
        InputError, match=r"other\.pt were trained on latents of an autoencoder with 22, and .* with 11"
    ):
        made_by(latents, None, tmp_path / "other.pt")
    add(tmp_path, "pt_1", factor=2)  # latents of an earlier version
    assert made_by(find_latents(tmp_path), tmp_path / "other.pt") == {"factor": 2}


def test_weights_record_the_settings_of_their_training_and_go_on_with_them_alone(tmp_path):
    add(tmp_path, "pt_1", factor=2)
    latents, start = find_latents(tmp_path), tmp_path / "start.pt"
    shared = {"process": "rectified flow", "condition_scale": 1.0, "keep_labels": [1], "merge_labels": {}}
    assert made_by(latents, shared=shared) == {"factor": 2, "shared": shared}
    save_weights(start, {"a": torch.ones(1)}, **made_by(latents, shared=shared))
    further = shared | {"keep_labels": [1, 26], "merge_labels": {"bone": 120}}  # labels may be added
    assert made_by(latents, None, start, shared=further)["shared"] == further
    for name, other in (("condition_scale", 100.0), ("process", "ddpm")):
        with pytest.raises(InputError, match=rf"start\.pt do not fit .*: {name} is {other!r}, they .* with"):
            made_by(latents, start, shared=shared | {name: other})


def test_latents_that_no_single_setting_decodes_are_refused(tmp_path):
    """CTs of a window of their own, which an earlier version encoded, and masks of several sets of labels."""
    add(tmp_path, "pt_1", settings=json.dumps({"window": [-1000, 1000, 0, 1]}))
    add(tmp_path, "pt_2", settings=json.dumps({"window": [0, 99.5]}))  # of an MR
    assert len(find_latents(tmp_path)["training"]) == 2
    add(tmp_path, "pt_3", settings=json.dumps({"window": [-200, 500, 0, 1]}))
    with pytest.raises(InputError, match=r"pt_3_latent.* makes -200 to 500 HU 0 to 1; allowed is -1000 to 1000 HU"):
        find_latents(tmp_path)
    masks = tmp_path / "masks"
    masks.mkdir()
    add(masks, "m_1", settings=json.dumps({"keep_labels": [18, 20], "merge_labels": {}}))
    add(masks, "m_2", settings=json.dumps({"keep_labels": [18, 20], "merge_labels": {}}))
    assert len(find_latents(masks)["training"]) == 2
    add(masks, "m_3", settings=json.dumps({"keep_labels": [18, 20], "merge_labels": {"bone": 120}}))
    with pytest.raises(InputError, match=r"several keep_labels and merge_labels: .*\(m_1\), .*\(m_3\); allowed is one"):
        find_latents(masks)


def test_a_padding_that_the_factor_does_not_divide_is_refused(volumes, tmp_path, tiny_autoencoder):
    assert tiny_autoencoder.factor == 4
    with pytest.raises(InputError, match="multiple is 6; allowed are multiples of 4"):
        jobs(volumes, tmp_path, tiny_autoencoder, settings={"multiple": 6})
    assert jobs(volumes, tmp_path, tiny_autoencoder, settings={"multiple": None})


def test_what_an_earlier_run_left_among_the_volumes_is_no_volume(volumes, tmp_path, tiny_autoencoder):
    first = jobs(volumes, tmp_path, tiny_autoencoder)
    made = [tmp_path / "out" / f"{name}_latent.nii.gz" for name in ("a_ct", "b_ct_flip")]
    made += [tmp_path / "out" / "a_ct_coarse.nii.gz"]
    made[0].parent.mkdir()
    for path in made:
        path.write_text("4")
    made_from = {"scale_factor": 1, "autoencoder": "x", "source": "y", "settings": '{"coarse_size": [16, 16, 16]}'}
    for stem in ("a_ct", "b_ct_flip"):
        (tmp_path / "out" / f"{stem}_latent.json").write_text(json.dumps(made_from))
    again = jobs([*volumes, *({"image": str(path)} for path in made)], tmp_path, tiny_autoencoder)
    assert [job["stem"] for job in again] == [job["stem"] for job in first]
    (tmp_path / "out" / "a_ct_latent.json").write_text(json.dumps({**made_from, "settings": "{}"}))
    again = jobs([*volumes, {"image": str(made[2])}], tmp_path, tiny_autoencoder)  # somebody's own, of that name
    assert len(again) == len(first) + 2
    (tmp_path / "out" / "a_ct_latent.json").write_text(json.dumps({**made_from, "settings": "damaged"}))
    again = jobs([*volumes, {"image": str(made[2])}], tmp_path, tiny_autoencoder)
    assert len(again) == len(first) + 2


@pytest.mark.parametrize("ending", ["latent", "sigma", "coarse"])
def test_nothing_is_written_over_or_removed_that_no_run_wrote(volumes, tmp_path, tiny_autoencoder, ending):
    """What an encoding without sigma takes for stale may be the patient's own file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"b_ct_{ending}.nii.gz").write_text("the user's")
    with pytest.raises(InputError, match=rf"b_ct_{ending}\.nii\.gz would be written over, and no earlier run wrote it"):
        jobs(volumes, tmp_path, tiny_autoencoder, views=[{}])
    others = [jobs(volumes, tmp_path, tiny_autoencoder, views=[{}], rank=rank, ranks=3) for rank in (0, 2)]
    assert [job["stem"] for (job,) in others] == ["a_ct", "c_ct"]  # a rank may meet what another has begun
    if ending != "latent":  # a run was killed while it wrote b, after a
        add(tmp_path / "out", "a_ct", scale_factor=1)
        assert len(jobs(volumes, tmp_path, tiny_autoencoder, views=[{}])) == 3
