"""What a request may say, and that none of it becomes a path, an expression or code."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from maisi_tools.errors import InputError
from maisi_tools.masks.vocabulary import VOCABULARY, label_id
from maisi_tools.studio import nvidia
from maisi_tools.studio.catalogue import NAMES
from maisi_tools.studio.recipe import command_of, steps_of
from maisi_tools.studio.requests import check_request, grid_of
from maisi_tools.studio.uploads import checked_labels
from thorough import examples

PHANTOM = {"kind": "phantom"}

SETTINGS = {"seed": 0, "device": "cpu"}


def no_job(id):
    raise InputError(f"there is no job {id!r}")


def some_job(id):
    if id != "one":
        raise InputError(f"there is no job {id!r}")
    return [48, 48, 48], [5.0, 5.0, 3.4]


@pytest.fixture
def check(catalogue):
    return lambda content, jobs=some_job: check_request(content, catalogue, jobs)


def ct(**changes):
    return {"makes": "ct", "source": PHANTOM, **changes}


def mask(**changes):
    return {"makes": "mask", "source": PHANTOM, **changes}


def test_what_a_request_leaves_open_is_filled_in(check, catalogue):
    assert check(ct()) == {
        "makes": "ct",
        "source": {"kind": "phantom", "body": "head_neck", "size": [96, 80, 96], "spacing": [4.0, 4.0, 2.5]},
        "edits": [],
        "settings": {"seed": 0, "device": "cpu", "weights": "small"},
    }
    preset = check(mask(source={"kind": "phantom", "preset": "head_neck_wide"}))
    assert preset["source"]["size"] == [128, 80, 128] and preset["settings"] == {"seed": 0, "device": "cpu"}


def test_what_was_understood_is_understood_again(check):
    edits = [{"insert": {"bone lesion": [20, 12]}}, {"resize": {"Left parotid gland": 2}, "remove": "lung tumor"}]
    source = {"kind": "phantom", "preset": "head_neck"}
    once = check(ct(source=source, edits=edits, settings={"memory_limit": "2GiB", "spacing": [3, 3, 3]}))
    assert check(once) == once and once["source"]["preset"] == "head_neck"


def test_names_in_edits_become_those_of_the_vocabulary(check):
    edits = [{"resize": {"Left Parotid Gland": 1.2, "kidney_left": 2}}, {"remove": "hepatic tumor", "seed": 7}]
    assert check(mask(edits=edits))["edits"] == [
        {"resize": {"placeholder 18": 1.2, "left kidney": 2}},
        {"remove": ["hepatic tumor"], "seed": 7},
    ]
    unflipped = {"flip": False, "remove": ["lung tumor"]}
    assert check(mask(edits=[unflipped]))["edits"] == [unflipped]
    assert {label_id(name) for name in NAMES} == set(NAMES.values()) == VOCABULARY.keys() - {200}


def test_the_grid_of_a_ct_is_told_before_it_is_made(check, catalogue):
    def grid(**changes):
        return grid_of(check(ct(**changes)), catalogue, some_job)

    assert grid() == ([96, 80, 96], [4.0, 4.0, 2.5])
    assert grid(settings={"spacing": [3, 3, 2.5]})[0] == [128, 107, 96]
    assert grid(settings={"preset": "head_neck"}) == ((112, 80, 112), (4.0, 4.0, 2.5))
    assert grid(source={"kind": "job", "id": "one"}) == ([48, 48, 48], [5.0, 5.0, 3.4])
    assert grid(source={"kind": "phantom", "size": [64, 64, 64], "spacing": [8, 5, 3]})[0] == [98, 64, 64]  # 5.2 mm
    assert grid(settings={"output_size": [64, 64, 64]})[0] == [64, 64, 64]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "the request is None; allowed is a mapping"),
        ({}, "the request has no makes, source"),
        (ct(extra=1), "the request has extra"),
        (ct(makes="mri"), "makes is 'mri'; allowed are mask and ct"),
        (ct(makes=["ct"]), "makes is"),
        (ct(source="phantom"), "source is 'phantom'"),
        (ct(source={"kind": "library"}), "allowed is a kind"),
        (ct(source={"kind": ["phantom"]}), "allowed is a kind"),
        (ct(source={"kind": "phantom", "body": "leg"}), "body is 'leg'; allowed are head_neck, torso"),
        (ct(source={"kind": "phantom", "body": ["head_neck"]}), "body is ['head_neck']; allowed are head_neck, torso"),
        (ct(source={"kind": "phantom", "path": "/etc"}), "the source phantom has path"),
        (ct(source={"kind": "phantom", "preset": "chest"}), "preset is 'chest'; allowed are head_neck"),
        (ct(source={"kind": "phantom", "preset": "head_neck", "size": [9, 9, 9]}), "the one or the other"),
        (ct(source={"kind": "phantom", "preset": "head_neck", "size": 5}), "the one or the other"),
        (ct(source={"kind": "phantom", "size": [96, 80]}), "size is"),
        (ct(source={"kind": "phantom", "size": 0}), "size is 0"),
        (ct(source={"kind": "phantom", "size": [96, 80, 9.5]}), "whole number"),
        (ct(source={"kind": "phantom", "size": [4000, 4000, 4000]}), "MAISI_MAX_VOXELS"),
        (ct(source={"kind": "phantom", "spacing": [4, 4, 0]}), "spacing is 0"),
        (ct(source={"kind": "phantom", "spacing": [4, 4, 15]}), "the spacing of the mask"),
        (ct(source={"kind": "generator", "organ_sizes": {"liver": 3}}), "organ_sizes has liver"),
        (ct(source={"kind": "generator", "organ_sizes": {"larynx": 900}}), "allowed are 2 to 63 ml"),
        (ct(source={"kind": "generator", "organ_sizes": {"larynx": True}}), "allowed are 2 to 63 ml"),
        *(
            (ct(source={"kind": "generator", "organ_sizes": odd}), f"organ_sizes is {odd!r}; allowed is organ -> ml")
            for odd in (3, 0, "", [], False)
        ),
        (ct(source={"kind": "job", "id": "two"}), "there is no job 'two'"),
        (ct(source={"kind": "upload", "id": {"a": 1}}), "there is no upload"),
        (mask(source={"kind": "ct", "id": "0", "mask_id": "0"}), "there is no upload '0'"),
        (ct(edits={"flip": True}), "edits is no list"),
        (ct(edits=[{}]), "at least one"),
        (ct(edits=[{"seed": 3}]), "at least one"),
        (ct(edits=[{"insert": {"lung tumor": 20}, "where": "here"}]), "an edit is"),
        (ct(edits=[{"insert": {"liver": 20}}]), "is no lesion"),
        (ct(edits=[{"insert": {"lung tumour": 20}}]), "did you mean lung tumor"),
        (ct(edits=[{"insert": {"lung tumor": 0}}]), "insert of lung tumor is 0"),
        (ct(edits=[{"insert": {"lung tumor": []}}]), "a list of 0"),
        (ct(edits=[{"insert": {"lung tumor": [1, "2"]}}]), "insert of lung tumor is '2'"),
        (ct(edits=[{"resize": {"liver": [1.2]}}]), "resize of liver is"),
        (ct(edits=[{"resize": {"liver": "1.2"}}]), "resize of liver is '1.2'"),
        (ct(edits=[{"redraw": "liver"}]), "for a mask"),
        (ct(edits=[{"flip": 1}]), "flip is 1"),
        (ct(edits=[{"flip": False}]), "which changes nothing; give flip: true, or leave it out"),
        (ct(edits=[{"flip": False, "seed": 3}]), "which changes nothing"),
        (ct(edits=[{"remove": []}]), "remove is"),
        (ct(edits=[{"insert": {"lung tumor": 2}, "seed": -1}]), "seed of an edit is -1"),
        (ct(edits=[{"flip": True}] * 51), "edits is no list of at most 50"),
        (ct(edits=[{"insert": {"bone lesion": 20, "Bone Lesion": 12}}]), "'bone lesion' and 'Bone Lesion', which are"),
        (ct(edits=[{"resize": {"left kidney": 2, "kidney_left": 2}}]), "'left kidney' and 'kidney_left'"),
        (ct(edits=[{"remove": ["lung tumor", "lung tumor"]}]), "give it once"),
        (ct(source={"kind": "generator", "organ_sizes": {"larynx": 20, "Larynx": 30}}), "one organ twice"),
        (ct(edits=[{"flip": True, "shift_mm": 5}]), "the lesions that augment names"),
        (ct(edits=[{"insert": {"lung tumor": 20}, "elastic_mm": 5}]), "the lesions that augment names"),
        (ct(settings=[]), "settings is []"),
        (ct(settings={"sead": 1}), "settings has sead"),
        (ct(settings={"seed": 1.5}), "seed is 1.5"),
        (ct(settings={"seed": 10**30}), "seed is 1000"),
        (ct(settings={"solver": "rk45"}), "solver is 'rk45'; allowed are euler"),
        (ct(settings={"num_inference_steps": 0}), "num_inference_steps is 0"),
        (ct(settings={"guidance_scale": -1}), "guidance_scale is -1"),
        (ct(settings={"memory_limit": "lots"}), "memory_limit is 'lots'"),
        (ct(settings={"memory_limit": 5}), "memory_limit is 5"),
        (ct(settings={"weights": "huge"}), "weights is 'huge'; allowed are small"),
        (ct(settings={"device": "cuda:7"}), "device is 'cuda:7'; allowed are cpu"),
        (ct(settings={"preset": "head_neck", "spacing": [4, 4, 3]}), "a preset sets spacing and size"),
        (ct(settings={"preset": "chest"}), "preset is 'chest'"),
        (ct(settings={"spacing": [1, 1, 1]}), "spacing is"),
        (ct(settings={"spacing": "$[4,4,4]"}), "is not allowed, give the value itself"),
        (ct(settings={"output_size": [65, 64, 64]}), "multiples of 16"),
        (mask(settings={"solver": "heun"}), "settings has solver, which changes nothing"),
        (mask(settings={"weights": "small"}), "settings has weights, which changes nothing"),
    ],
)
def test_wrong_requests_are_refused_in_plain_words(check, content, words):
    with pytest.raises(InputError) as refused:
        check(content)
    assert words in str(refused.value)


def test_a_real_ct_needs_edits_and_no_grid(check, folders):
    for id, kind in (("aa", "ct"), ("bb", "mask")):
        folder = folders.root / "uploads" / id
        folder.mkdir(parents=True)
        known = {"id": id, "kind": kind, "file": "x.nii.gz", "size": [9, 9, 9], "spacing": [4, 4, 3]}
        known |= {"name": f"{kind} of mine.nii.gz", "labels": [{"value": 1, "voxels": 9}]}
        (folder / "upload.json").write_text(json.dumps(known))
    real = {"kind": "ct", "id": "aa", "mask_id": "bb"}
    edits = [{"redraw": "liver"}]
    assert check(ct(source=real, edits=edits))["edits"] == [{"redraw": ["liver"]}]
    for content, words in [
        (ct(source=real), "at least one edit"),
        (mask(source=real, edits=edits), "give makes: ct"),
        (ct(source=real, edits=[{"flip": True}]), "for a real CT"),
        (ct(source=real, edits=edits, settings={"spacing": [4, 4, 3]}), "changes nothing"),
        (ct(source={**real, "id": "bb"}, edits=edits), "of another kind"),
        (ct(source={"kind": "upload", "id": "aa"}), "of another kind"),
        (ct(source={**real, "label_map": "../x"}, edits=edits), "label_map is '../x'"),
    ]:
        with pytest.raises(InputError) as refused:
            check(content)
        assert words in str(refused.value)


def test_uploads_of_which_nothing_can_be_made_are_refused_at_once(check, folders):
    def put(id, kind, **other):
        folder = folders.root / "uploads" / id
        folder.mkdir(parents=True, exist_ok=True)
        known = {"id": id, "kind": kind, "name": f"my {kind}.nii.gz", "file": f"{id}.nii.gz", "size": [9, 8, 7]}
        known |= {"spacing": [4, 4, 3], "labels": [{"value": 1, "voxels": 9}, {"value": 2, "voxels": 3}], **other}
        (folder / "upload.json").write_text(json.dumps(known))

    (folders.root / "label_maps").mkdir()
    (folders.root / "label_maps" / "none.json").write_text('{"1": 0, "2": 0}')
    edits, real = [{"redraw": "liver"}], {"kind": "ct", "id": "aa", "mask_id": "bb"}
    put("aa", "ct")
    put("bb", "mask")
    alone = {"kind": "upload", "id": "bb"}
    for content, words in [
        (ct(source={**real, "label_map": "none"}, edits=edits), "none drops every label that the mask my mask.nii.gz"),
        (mask(source={**alone, "label_map": "none"}), "none drops every label that the mask my mask.nii.gz has"),
    ]:
        with pytest.raises(InputError, match=words):
            check(content)
    for other in ({"size": [9, 8, 6]}, {"spacing": [4, 4, 3.2]}):
        put("bb", "mask", **other)
        with pytest.raises(
            InputError, match="my mask.nii.gz has 9 x 8 x .*the CT my ct.nii.gz has 9 x 8 x 7"
        ) as refused:
            check(ct(source=real, edits=edits))
        assert str(folders.root) not in str(refused.value)
    put("bb", "mask", spacing=[4, 4, 3.000001])
    assert check(ct(source=real, edits=edits))
    put("bb", "mask", labels=[])
    for content in (ct(source=real, edits=edits), ct(source=alone), mask(source=alone)):
        with pytest.raises(InputError, match="the mask my mask.nii.gz is empty"):
            check(content)


# --- nothing of a request becomes code --------------------------------------------------------------------------------

EVIL = ["$__import__('os').system('touch /tmp/evil')", "@network", "%/etc/passwd", "../../etc/passwd", "/etc/passwd"]
EVIL += ["_target_", "_requires_", "a::b", "a#b", "--output_dir", "; rm -rf /", "$(id)", "liver\n", "\u0000", "ʟiver"]

WORDS = st.sampled_from([*EVIL, "liver", "lung tumor", "small", "head_neck", "one", "cpu", "4GiB", "maisi"]) | st.text(
    max_size=8
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
SOURCES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["phantom", "generator", "upload", "job", "ct"]) | WORDS},
    optional={
        key: VALUES for key in ("body", "preset", "size", "spacing", "organ_sizes", "id", "label_map", "mask_id")
    },
)
EDITS = st.lists(
    st.dictionaries(
        st.sampled_from(["insert", "resize", "remove", "flip", "augment", "seed", "_target_"]), VALUES, max_size=2
    ),
    max_size=2,
)
KEYS = ["seed", "solver", "num_inference_steps", "guidance_scale", "spacing", "preset", "memory_limit", "weights"]
REQUESTS = st.fixed_dictionaries(
    {"makes": st.sampled_from(["ct", "mask"]) | VALUES, "source": SOURCES},
    optional={"edits": EDITS | VALUES, "settings": st.dictionaries(st.sampled_from([*KEYS, "device", *EVIL]), VALUES)},
)


def strings(value):
    if isinstance(value, dict):
        return [text for name, entry in value.items() for text in (name, *strings(entry))]
    return (
        [text for entry in value for text in strings(entry)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


@given(content=REQUESTS | VALUES)
@settings(
    max_examples=examples(50),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_passes_is_words_that_are_known(content, catalogue):
    """A request is refused, or each of its texts is one of a known list: none is free."""
    try:
        found = check_request(content, catalogue, some_job)
    except InputError:
        return
    known = {"makes", "mask", "ct", "source", "edits", "settings", "kind", "phantom", "generator", "job", "one", "id"}
    known |= {"body", "head_neck", "torso", "size", "spacing", "organ_sizes", *catalogue.organs.organs, *KEYS, "device"}
    known |= {"insert", "resize", "remove", "augment", "flip", "cpu", "small", "euler", "heun", "ab2", "output_size"}
    known |= {"4GiB"} | {label.name for label in VOCABULARY.values()} | catalogue.weights["small"].presets.keys()
    free = set(strings(found)) - known
    assert all(text.strip().removesuffix("B").removesuffix("b").rstrip("kmgtiKMGTI ").replace(".", "").isdecimal()
               for text in free), free  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_evil_words_reach_neither_path_nor_parser(check, folders, catalogue, text):
    places = [
        ct(source={"kind": "phantom", "body": text}),
        ct(source={"kind": "job", "id": text}),
        ct(source={"kind": "upload", "id": text}),
        ct(source={"kind": "generator", "organ_sizes": {text: 3}}),
        ct(edits=[{"resize": {text: 2}}]),
        ct(edits=[{"remove": text}]),
        *(ct(settings={key: text}) for key in KEYS),
        ct(settings={text: 1}),
    ]
    for content in places:
        if text == "liver\n" and "liver\n" in str(strings(content)) or text == "liver\n":
            continue  # blanks around a name mean nothing
        with pytest.raises(InputError):
            check(content)
    with pytest.raises(InputError):
        folders.upload(text)
    with pytest.raises(InputError):
        folders.label_map(text)
    with pytest.raises(InputError):
        folders.new_label_map(text)
    with pytest.raises(InputError):
        checked_labels({text: "liver"})


def test_a_runs_settings_are_checked_and_its_paths_are_ours(check, folders):
    edits = [{"insert": {"bone lesion": [20, 12]}}, {"resize": {"liver": 1.2}, "remove": "lung tumor"}, {"flip": True}]
    request = check(ct(edits=edits, settings={"num_inference_steps": 3, "spacing": [3, 3, 2.5]}))
    *masks, run = steps_of({"id": "some-job", "request": request}, folders, [])
    assert len(masks) == 4
    assert run.settings == {"seed": 0, "num_inference_steps": 3, "spacing": [3, 3, 2.5]}
    folder = folders.root / "jobs" / "some-job"
    assert run.paths == {"input": str(folder / "input" / "phantom.nii.gz"), "output_dir": str(folder)}


def test_the_shell_takes_the_command_as_it_was_meant(check, folders):
    request = check(
        mask(edits=[{"insert": {"bone lesion": [20, 12]}, "resize": {"skull": 1.1}, "remove": "lung tumor"}])
    )
    command = command_of({"id": "some-job", "request": request}, folders, [])
    drawn, edited = (shlex.split(part) for part in command.split(" && "))
    assert drawn[3:5] == ["phantom", "out/drawn.nii.gz"] and drawn[drawn.index("--size") + 1] == "[96, 80, 96]"
    assert json.loads(edited[edited.index("--insert") + 1]) == {"bone lesion": [20, 12]}
    assert edited[edited.index("--remove") + 1] == "lung tumor"


@pytest.mark.parametrize("source", [PHANTOM, {"kind": "generator"}])
@pytest.mark.parametrize("makes", ["ct", "mask"])
def test_the_command_runs_where_the_job_ran(folders, source, makes):
    settings = {"seed": 0, "device": "cuda:1"}
    given = {**source, "body": "torso", "size": [9, 9, 9], "spacing": [4, 4, 4], "organ_sizes": {}}
    request = {"makes": makes, "source": given, "edits": [], "settings": settings}
    run = shlex.split(command_of({"id": "some-job", "request": request}, folders, []))
    devices = [value for name, value in zip(run, run[1:], strict=False) if name == "--device"]
    assert devices == ["$torch.device('cuda:1')"] * (makes == "ct" or source != PHANTOM)


def test_a_mask_of_a_job_that_was_removed_is_missed_in_plain_words(folders):
    request = {"makes": "mask", "source": {"kind": "job", "id": "one"}, "edits": [], "settings": SETTINGS}
    folder = folders.root / "jobs" / "one"
    for left in (None, folder / ".1-2-phantom_mask.nii.gz"):
        if left:
            folder.mkdir(parents=True)
            left.touch()
        with pytest.raises(InputError, match="job one, whose mask this takes, is no longer there"):
            steps_of({"id": "some-job", "request": request}, folders, [])
    (folder / "phantom_mask.nii.gz").touch()
    (edit,) = steps_of({"id": "some-job", "request": request}, folders, [])
    assert edit.mask == folder / "phantom_mask.nii.gz"


def test_the_catalogue_offers_what_the_configs_have(catalogue, repo_root):
    config = ConfigParser.load_config_file(repo_root / "bundles" / "maisi_ldm" / "configs" / "mask_inference.json")
    organs = catalogue.options()["organs"]
    assert {organ["name"]: [organ["low_ml"], organ["high_ml"]] for organ in organs} == {
        name: organ["range"] for name, organ in config["organs"].items()
    }
    assert np.isfinite([organ["mean_ml"] for organ in organs]).all()
    assert catalogue.weights.keys() == {"small"}  # the released ones are not there


def test_released_weights_are_offered_once_their_files_are_there(folders, tiny_bundles, tmp_path):
    import shutil

    from maisi_tools.studio.catalogue import Catalogue
    from maisi_tools.studio.folders import Folders

    shutil.copytree(tiny_bundles, tmp_path / "bundles")
    models = tmp_path / "bundles" / "maisi_controlnet" / "models"
    for name in ("controlnet_3d_rflow-ct.pt", "diff_unet_3d_rflow-ct.pt", "autoencoder_v1.pt"):
        (models / name).touch()
    weights = Catalogue(Folders(folders.root, tmp_path / "bundles"), ["cpu"]).weights
    assert list(weights) == ["small", "full_rflow"] and weights["full_rflow"].overlays == ("full_rflow.json",)
    assert "chest_abdomen" in weights["full_rflow"].presets and weights["full_rflow"].multiple == 32


# --- NVIDIA's request -------------------------------------------------------------------------------------------------


def run(**changes):
    return {"num_output_samples": 2, "body_region": ["head"], **changes}


def test_nvidias_request_becomes_jobs(catalogue, check):
    body, made = nvidia.read_body(
        run(controllable_anatomy_size=[["Larynx", 0.5], ["lung", 0]], output_size=[112, 80, 112]), catalogue
    )
    first, second = map(check, made)
    assert first["source"]["organ_sizes"] == {"larynx": 32.5, "lung": 180.0}
    assert first["settings"]["preset"] == "head_neck" and body.image_output_ext == ".nii.gz"
    assert second["settings"]["seed"] == first["settings"]["seed"] + 1
    assert "preset" not in check(nvidia.read_body(run(body_region="head"), catalogue)[1][0])["settings"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "the request has no num_output_samples, body_region"),
        (run(num_output_samples=0), "num_output_samples is 0"),
        (run(num_output_samples=21), "from 1 to 20"),
        (run(body_region=["abdomen"]), "body_region is ['abdomen']; allowed are head"),
        (run(body_region=["chest"]), "allowed are head"),
        (run(body_region=[]), "allowed are head"),
        (run(body_region=3), "body_region is 3"),
        (run(anatomy_list=["liver"]), "anatomy_list has liver"),
        (run(anatomy_list=["livver"]), "is no label"),
        (run(output_size=[512, 512, 512], spacing=[1, 1, 1]), "allowed with the small weights are [112, 80, 112]"),
        (run(spacing=[1.0, 1.0, 1.0]), "fetch the released weights"),
        (run(output_size=5), "output_size is 5; allowed are three numbers"),
        (run(spacing=4.0), "spacing is 4.0; allowed are three numbers"),
        (run(spacing={"x": 4}), "spacing is {'x': 4}; allowed are three numbers"),
        (run(controllable_anatomy_size=[["liver", 0.5]]), "controllable_anatomy_size has 'liver'"),
        (run(controllable_anatomy_size=[["larynx", -1]]), "from 0 to 1"),
        (run(controllable_anatomy_size=[["larynx", 0.5]] * 11), "at most 10 pairs"),
        (run(controllable_anatomy_size=[["larynx"]]), "allowed are pairs"),
        (run(controllable_anatomy_size=[["larynx", 0.5], ["Larynx", 0.7]]), "larynx twice"),
        (run(image_output_ext=".dcm"), "image_output_ext is '.dcm'"),
        (run(pre_signed_url="https://evil.example/put"), "pre_signed_url is not supported"),
        (run(local_working_dir="/etc"), "local_working_dir is not supported"),
        (run(model="other"), "the request has model"),
    ],
)
def test_what_nvidias_request_cannot_have_here_is_refused(catalogue, content, words):
    with pytest.raises(InputError) as refused:
        nvidia.read_body(content, catalogue)
    assert words in str(refused.value)
