"""What MONAI, the model zoo and MONAI Label expect of a bundle's files."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out

import config_lines
from maisi_tools.diffusion.conditions import check_conditions
from maisi_tools.files import write_json
from maisi_tools.masks.intensity import hu_ranges
from maisi_tools.masks.vocabulary import display_name
from maisi_tools.settings import is_expression
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.volumes.inputs import OURS
from maisi_tools.volumes.latents import SIDECAR
from maisi_tools.weights import read_factor, save_weights

LINES, REPEATED, LONGEST = 2582, 0.471, 175

BUNDLES = ("maisi_vae", "maisi_ldm", "maisi_controlnet")
KEYS = (
    *("bundle_root", "dataset_dir", "input", "output_dir", "seed", "device", "network_def", "network"),
    *("preprocessing", "inferer", "postprocessing", "dataset", "dataloader", "evaluator"),
)


def parser_of(bundles, bundle, *configs) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(bundles / bundle / "configs" / name) for name in configs])
    parser.read_meta(str(bundles / bundle / "configs" / "metadata.json"))
    parser["bundle_root"] = str(bundles / bundle)
    parser["device"] = "$torch.device('cpu')"
    return parser


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("n", [2, 3])
def test_verify_net_in_out(bundles, bundle, n):
    configs = bundles / bundle / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        n=n,
    )


def test_hu_ranges_of_the_small_weights_are_of_what_they_know_and_the_vocabulary_does_not(bundles):
    """The two tables together check every label that the weights draw; typical values lie inside."""
    config = json.loads((bundles / "maisi_controlnet" / "configs" / "inference.json").read_text())
    kept = set(config["keep_labels"])
    own = hu_ranges(config["hu_ranges"])
    published = hu_ranges()
    added = {label: limits for label, limits in own.items() if published.get(label) != limits}
    assert added.keys() == kept - published.keys() and kept <= own.keys()
    # Brainstem and cord 35, muscle-like 50, parotid with its fat 0, airway between air and its wall, body 30 HU.
    typical = {2: 35, 121: 35, 11: 30, 16: 20, 18: 0, 20: 0, 132: -850, 200: 30}
    assert added.keys() == typical.keys()
    assert all(low < typical[label] < high for label, (low, high) in added.items())
    assert {display_name(label) for label in added} == config["hu_ranges"].keys()


OF_THE_WEIGHTS = {
    "maisi_vae": {"ckpt_path", "network_def"},
    "maisi_ldm": {
        *("ckpt_path", "network_def", "autoencoder_ckpt_path", "autoencoder_def", "cascade", "condition_scale"),
        *("guided_conditions", "last_step", "presets", "output_size", "spacing", "region", "spacing_range"),
        *("smallest_field_of_view", "trained_regions", "trained_modalities"),
    },
    "maisi_controlnet": {
        *("ckpt_path", "network_def", "autoencoder_ckpt_path", "autoencoder_def", "weights", "unet_file", "network"),
        *("condition_scale", "guided_conditions", "guidance_interval", "guidance_parallel", "last_step", "hu_ranges"),
        *("keep_labels", "merge_labels", "presets", "spacing_range", "smallest_field_of_view", "trained_modalities"),
    },
}
"""What in an inference.json stands for the weights that it names."""

OF_ANY_WEIGHTS = {
    *(
        "bundle_root",
        "dataset_dir",
        "displayable_configs",
        "input",
        "output_dir",
        "label_map",
        "placeholders",
        "preset",
    ),
    *("output_labels", "output_size", "spacing", "region", "modality", "memory_limit", "dtype"),
    *("output_dtype", "save_latents", "progress", "min_dice", "judges", "start", "door", "recorded"),
    *("weights", "guidance_interval", "coarse_size", "drawn"),
}
"""Plain values that stand for none, or that overlays without a cascade leave unread."""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_an_overlay_of_other_weights_resets_what_stands_for_the_small_ones(bundles, bundle):
    """Every plain value of inference.json is of its weights or of any, so that a new one is thought about."""
    folder = bundles / bundle / "configs"
    base = json.loads((folder / "inference.json").read_text())
    plain = {key for key, value in base.items() if not is_expression(value) and "_target_" not in str(value)}
    assert plain - {"imports", "initialize", "run"} <= OF_THE_WEIGHTS[bundle] | OF_ANY_WEIGHTS
    assert OF_THE_WEIGHTS[bundle] <= base.keys() | {"network"}
    seen = 0
    for path in sorted(folder.glob("full*.json")):
        overlay = json.loads(path.read_text())
        if "bundle_root" in overlay or "mask" in path.stem or "ckpt_path" not in overlay:
            continue
        reset = {key.split("#")[0] for key in overlay}
        assert OF_THE_WEIGHTS[bundle] - reset == set(), path.name
        assert overlay.get("hu_ranges", {}) == {}
        seen += 1
    assert seen == {"maisi_vae": 1, "maisi_ldm": 4, "maisi_controlnet": 2}[bundle]


@pytest.mark.parametrize("overlay", ["full_rflow.json", "full_ddpm.json"])
def test_released_weights_are_checked_by_the_vocabularys_ranges(bundles, overlay):
    config = parser_of(bundles, "maisi_controlnet", "inference.json", overlay).get()
    assert hu_ranges(config["hu_ranges"]) == hu_ranges()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_expected_keys(bundles, bundle):
    config = json.loads((bundles / bundle / "configs" / "inference.json").read_text())
    assert [key for key in KEYS if key not in config] == []
    train = json.loads((bundles / bundle / "configs" / "train.json").read_text())
    for key in ("max_epochs", "val_interval", "network_def", "train", "validate"):
        assert key in train
    assert {"trainer", "dataset", "handlers"} <= train["train"].keys() and "data" in train["train"]["dataset"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_monai_finds_the_properties_of_inference(open_bundle, ct_file, mask_file, tmp_path, bundle):
    """By their names, and the optional ones by what refers to them."""
    given = {"maisi_vae": {"input": str(ct_file)}, "maisi_ldm": {}, "maisi_controlnet": {"input": str(mask_file)}}
    workflow = open_bundle(bundle, "inference.json", "infer", output_dir=str(tmp_path / "out"), **given[bundle])
    assert workflow.check_properties() == []


def test_networks_are_defined_alike_everywhere(bundles):
    """A bundle is self-contained, so definitions are repeated; they may not drift apart."""
    kinds = ("autoencoder", "unet", "controlnet", "mask_unet", "ldm unet", "coarse unet")
    definitions: dict[str, list] = {kind: [] for kind in kinds}
    for path in bundles.glob("*/configs/*.json"):
        if path.name.startswith("full"):
            continue
        config = json.loads(path.read_text())
        for key in ("network_def", "autoencoder_def", "coarse_def"):
            definition = config.get(key)
            if not isinstance(definition, dict):
                continue
            kind = definition["_target_"].rsplit(".", 1)[1]
            if kind == "ControlledUNet":
                definitions["unet"].append(definition["unet"])
                definitions["controlnet"].append(definition["controlnet"])
            elif kind == "CoarseUNet":
                names = ("channels", "num_head_channels", "norm_num_groups")
                definitions["coarse unet"].append({name: definition[name] for name in names})
            elif kind == "Autoencoder":
                if definition.get("in_channels", 1) == 1:  # the mask autoencoder's is in one place
                    definitions["autoencoder"].append(definition)
            else:
                definitions["ldm unet" if kind == "DiffusionUNet" else "mask_unet"].append(definition)
    for kind, found in definitions.items():
        assert len(found) >= 2 and all(one == found[0] for one in found), kind


def test_weights_are_small(bundles):
    """A model zoo takes files under 25 MB; the stages stay below 40 MB together, the mask generator below 26."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", "*.pt"], cwd=bundles, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    sizes = {path: (bundles / path).stat().st_size for path in listed if path}
    if not sizes:
        pytest.skip("not a git checkout")
    masks = sum(size for path, size in sizes.items() if "/mask_" in path)
    assert max(sizes.values()) < 25e6 and masks < 26e6 and sum(sizes.values()) - masks < 40e6


def test_copies_of_the_weights_agree(bundles):
    """Each bundle is self-contained, so stage 1 also lies in the other two."""

    def weights(bundle: str, name: str) -> dict:
        return torch.load(bundles / bundle / "models" / name, weights_only=True)

    vae = weights("maisi_vae", "model.pt")["model"]
    for bundle in ("maisi_ldm", "maisi_controlnet"):
        copy = weights(bundle, "autoencoder.pt")["model"]
        assert copy.keys() == vae.keys() and all(torch.equal(copy[name], vae[name]) for name in vae)
        assert read_factor(bundles / bundle / "models" / "model.pt") == 2


@pytest.mark.parametrize("bundle", ["maisi_ldm", "maisi_controlnet"])
@pytest.mark.parametrize(
    ("overlay", "solver", "steps"),
    [(None, "ab2", 10), ("full_rflow.json", "euler", 30), ("full_ddpm.json", "euler", 1000)],
)
def test_each_weights_have_their_solver_and_steps(bundles, bundle, overlay, solver, steps):
    """The overlays do not take the small weights' default; what MONAI Label shows is what runs."""
    parser = parser_of(bundles, bundle, "inference.json", *([overlay] if overlay else []))
    shown = parser.get_parsed_content("displayable_configs")
    by_mask = overlay is None and bundle == "maisi_controlnet"
    wanted = {"solver": solver, "num_inference_steps": steps, "guidance_scale": 2 if by_mask else 0}
    assert {key: shown[key] for key in wanted} == wanted
    wanted["guidance_interval"] = [0.2, 1] if by_mask else [0, 1]
    if bundle == "maisi_controlnet":
        wanted["guidance_parallel"] = 0.2 if by_mask else 1
    assert {key: parser.get_parsed_content(key) for key in wanted} == wanted
    assert (parser.get_parsed_content("guided_conditions") == ["mask"]) == by_mask


@pytest.mark.parametrize("bundle", ["maisi_ldm", "maisi_controlnet"])
def test_edited_displayable_configs_reach_the_inferer(bundles, bundle):
    """MONAI Label shows this dict to its user and writes the edited values back."""
    parser = parser_of(bundles, bundle, "inference.json")
    parser["displayable_configs"]["seed"] = 7
    parser["displayable_configs"]["num_inference_steps"] = 2
    parser["displayable_configs"]["solver"] = "heun"
    parser.parse()
    inferer = parser.get_parsed_content("inferer" if bundle == "maisi_ldm" else "inferer#inferer")
    assert inferer.num_inference_steps == 2 and inferer.solver == "heun"
    assert (inferer.conditions.seed if bundle == "maisi_ldm" else inferer.seed) == 7


@pytest.mark.parametrize(
    ("bundle", "config", "places"),
    [
        ("maisi_vae", ["inference.json", "full.json"], ["inferer#inferer"]),
        ("maisi_vae", ["encode.json"], ["inferer#inferer"]),
        ("maisi_vae", ["decode.json"], ["inferer#inferer"]),
        ("maisi_ldm", ["inference.json", "full_rflow.json"], ["inferer#inferer", "decoder#inferer"]),
        ("maisi_ldm", ["inference.json", "full_ddpm.json"], ["inferer#inferer", "decoder#inferer"]),
        ("maisi_ldm", ["mask_inference.json"], ["decoder#inferer"]),  # its latents are too small for slabs to pay
        ("maisi_controlnet", ["inference.json", "full_rflow.json"], ["mask_to_ct#inferer", "decoder#inferer"]),
        ("maisi_controlnet", ["inference.json", "full_ddpm.json"], ["mask_to_ct#inferer", "decoder#inferer"]),
    ],
)
def test_every_network_is_run_in_slabs_as_the_top_level_keys_say(bundles, bundle, config, places):
    parser = parser_of(bundles, bundle, *config)
    parser["splits" if bundle != "maisi_controlnet" else "displayable_configs#splits"] = 5
    parser["memory_limit"], parser["dtype"] = "3GiB", "bfloat16"
    parser.parse()
    for place in places:
        inferer = parser.get_parsed_content(place)
        assert isinstance(inferer, TSPInferer)
        settings = inferer.settings
        assert (settings.splits, settings.memory_limit, settings.dtype) == (5, "3GiB", torch.bfloat16)


@pytest.mark.parametrize(
    ("bundle", "config", "overlay", "expected"),
    [
        # parameter counts of the released networks, computed from MONAI's own classes with the released settings
        ("maisi_vae", "inference.json", "full.json", "AutoencoderKlMaisi"),
        ("maisi_vae", "train.json", "full_train.json", "AutoencoderKlMaisi"),
        ("maisi_ldm", "inference.json", "full_rflow.json", "DiffusionModelUNetMaisi"),
        ("maisi_ldm", "inference.json", "full_rflow_mr.json", "DiffusionModelUNetMaisi"),
        ("maisi_ldm", "inference.json", "full_rflow_mr_brain.json", "DiffusionModelUNetMaisi"),
        ("maisi_ldm", "inference.json", "full_ddpm.json", "DiffusionModelUNetMaisi"),
        ("maisi_ldm", "train.json", "full_rflow_train.json", "DiffusionModelUNetMaisi"),
        ("maisi_controlnet", "inference.json", "full_rflow.json", "ControlNetMaisi"),
        ("maisi_controlnet", "inference.json", "full_ddpm.json", "ControlNetMaisi"),
        ("maisi_controlnet", "train.json", "full_rflow_train.json", "ControlNetMaisi"),
    ],
)
def test_full_size_networks_have_the_released_keys(bundles, bundle, config, overlay, expected):
    """Key for key and shape for shape the networks that the released configurations define (REFERENCE: section 1)."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    levels = {
        "spatial_dims": 3,
        "in_channels": 4,
        "num_channels": [64, 128, 256, 512],
        "attention_levels": [False, False, True, True],
        "num_head_channels": [0, 0, 32, 32],
        "num_res_blocks": 2,
    }
    rflow = {"num_class_embeds": 128, "resblock_updown": True, "include_fc": True} if "rflow" in overlay else {}
    region = {f"include_{end}_region_index_input": not rflow for end in ("top", "bottom")}
    with torch.device("meta"):
        if expected == "AutoencoderKlMaisi":
            released = AutoencoderKlMaisi(
                spatial_dims=3,
                in_channels=1,
                out_channels=1,
                latent_channels=4,
                num_channels=[64, 128, 256],
                num_res_blocks=[2, 2, 2],
                norm_num_groups=32,
                norm_eps=1e-6,
                attention_levels=[False, False, False],
                with_encoder_nonlocal_attn=False,
                with_decoder_nonlocal_attn=False,
                use_checkpointing=False,
                use_convtranspose=False,
                norm_float16=True,
                num_splits=4,
                dim_split=1,
            )
        elif expected == "DiffusionModelUNetMaisi":
            released = DiffusionModelUNetMaisi(**levels, out_channels=4, include_spacing_input=True, **region, **rflow)
        else:
            released = ControlNetMaisi(
                **levels,
                conditioning_embedding_in_channels=8,
                conditioning_embedding_num_channels=[8, 32, 64],
                **rflow,
            )
        network = parser_of(bundles, bundle, config, overlay).get_parsed_content("network_def")
    ours = (network.controlnet if expected == "ControlNetMaisi" else network).state_dict()
    theirs = released.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("bundle", "config"),
    [("maisi_ldm", "inference.json"), ("maisi_ldm", "mask_inference.json"), ("maisi_controlnet", "inference.json")],
)
def test_weights_trained_on_latents_of_another_encoder_are_refused_before_a_ct_is_drawn(
    bundles, bundle, config, cause, tmp_path
):
    parser = parser_of(bundles, bundle, config)
    weights = torch.load(parser.get_parsed_content("ckpt_path"), weights_only=True)
    torch.save({**weights, "autoencoder": "of another"}, tmp_path / "model.pt")
    assert "@factor" in parser["initialize"]
    other = parser_of(bundles, bundle, config)
    other["ckpt_path"] = str(tmp_path / "model.pt")
    with pytest.raises(Exception) as raised:
        other.get_parsed_content("factor")
    assert "trained on latents of an autoencoder with of another" in str(cause(raised.value))


@pytest.mark.parametrize(
    ("bundle", "config", "name", "trained", "given"),
    [
        ("maisi_ldm", "inference.json", "process", "rectified flow, 1000 timesteps", {"scheduler": "@ddpm"}),
        ("maisi_ldm", "inference.json", "condition_scale", 1.0, {"condition_scale": 100.0}),
        ("maisi_ldm", "mask_inference.json", "organs", [[16, 1, 2]], {}),
        ("maisi_ldm", "mask_inference.json", "prior_until", 0.5, {}),
        ("maisi_controlnet", "inference.json", "keep_labels", [2, 26], {}),
        ("maisi_controlnet", "inference.json", "merge_labels", {"bone": 200}, {}),
        ("maisi_controlnet", "full_rflow.json", "process", "ddpm, epsilon", {}),
    ],
)
def test_weights_trained_with_other_settings_are_refused_before_a_ct_is_drawn(
    bundles, bundle, config, name, trained, given, cause, tmp_path
):
    """Of the same shapes: they would draw noise, or a label that they never saw, and nothing would tell.

    The scale factor is what decodes cannot do without, whoever opens the bundle; MONAI Label runs no `initialize`.
    """
    alone = config.endswith("inference.json")
    parser = parser_of(bundles, bundle, *([config] if alone else ["inference.json", config]))
    paths = {"ckpt_path": str(tmp_path / "model.pt")}
    if not alone:  # two files, of which either may be the wrong one
        paths = {"ckpt_path": str(tmp_path / "controlnet.pt"), "unet_ckpt_path": str(tmp_path / "model.pt")}
        save_weights(tmp_path / "controlnet.pt", {"a": torch.ones(1)})
        given = {"network_def": None}  # the full-size one takes seconds to build
    factor = parser.get_parsed_content("autoencoder_def").factor
    save_weights(tmp_path / "model.pt", {"a": torch.ones(1)}, factor=factor, shared={name: trained})
    for key, value in (given | paths).items():
        parser[key] = value
    with pytest.raises(Exception) as raised:
        parser.get_parsed_content("scale_factor")
    assert f"{name} is " in str(cause(raised.value)) and f"trained with {trained!r}" in str(cause(raised.value))


TRAINED_BY = {
    "maisi_ldm/models/model.pt": ("maisi_ldm", "train.json"),
    "maisi_ldm/models/coarse.pt": ("maisi_ldm", "train.json", "train_coarse.json"),
    "maisi_ldm/models/mask_model.pt": ("maisi_ldm", "train.json", "train_mask.json"),
    "maisi_ldm/models/mask_autoencoder.pt": ("maisi_vae", "train.json", "train_mask.json"),
    "maisi_controlnet/models/model.pt": ("maisi_controlnet", "train.json"),
}
"""Shipped weights that another setting makes draw nonsense, and what trains them. CTs' autoencoders share none."""


def test_shipped_weights_record_the_settings_of_their_training(bundles):
    shipped = {path.relative_to(bundles).as_posix() for path in bundles.glob("*/models/*.pt")}
    others = {"maisi_vae/models/model.pt", *(f"{bundle}/models/autoencoder.pt" for bundle in BUNDLES[1:])}
    assert shipped == TRAINED_BY.keys() | others
    for file, configs in TRAINED_BY.items():
        recorded = torch.load(bundles / file, weights_only=True)["shared"]
        assert recorded and recorded == parser_of(bundles, *configs).get_parsed_content("shared"), file


SWAPPED = [2, 11, 16, 20, 18, 28, 120, 121, 132, 200]  # the parotids
MERGED = {"bone": 200, "airway": 132, "lung": 28}
MM = [[0, 640], [190, 500], [140, 390]]


@pytest.mark.parametrize(
    ("bundle", "configs", "checked", "others"),
    [
        (
            *("maisi_ldm", ["inference.json"], "scale_factor"),
            {"process": ("scheduler", "@ddpm"), "condition_scale": ("condition_scale", 100.0)},
        ),
        (
            *("maisi_ldm", ["inference.json"], "check_cascade"),
            {
                "process": ("coarse#scheduler", "@ddpm"),
                "field_of_view": ("coarse#field_of_view#mm", MM),
                "prior_until": ("coarse_def#prior_until", 0.5),
            },
        ),
        (
            *("maisi_ldm", ["mask_inference.json"], "scale_factor"),
            {
                "process": ("scheduler", {"_target_": "maisi_tools.diffusion.schedulers.ddim"}),
                "organs": ("organs#left parotid#range", [0, 500]),
                "prior_until": ("prior_until", 0.5),
                "classes": ("classes", [0, *SWAPPED]),
            },
        ),
        (
            *("maisi_vae", ["encode.json", "encode_mask.json"], "check_shared"),
            {"classes": ("keep_labels", SWAPPED), "merge_labels": ("merge_labels", MERGED)},
        ),
        (
            *("maisi_ldm", ["train.json"], "made_by"),
            {"process": ("scheduler", "@ddpm"), "condition_scale": ("condition_scale", 100.0)},
        ),
        (
            *("maisi_ldm", ["train.json", "train_coarse.json"], "made_by"),
            {"field_of_view": ("field_of_view#mm", MM), "prior_until": ("prior_until", 0.5)},
        ),
        (
            *("maisi_ldm", ["train.json", "train_mask.json"], "made_by"),
            {"organs": ("organs#larynx#range", [1, 2]), "prior_until": ("prior_until", 0.5)},
        ),
    ],
)
def test_shipped_weights_are_used_with_the_settings_of_their_training_alone(
    bundles, bundle, configs, checked, others, cause, tmp_path
):
    def check(given):
        parser = parser_of(bundles, bundle, *configs)
        if checked == "made_by":
            name = {"train_coarse.json": "coarse", "train_mask.json": "mask_model"}.get(configs[-1], "model")
            parser["init_ckpt"] = str(bundles / bundle / "models" / f"{name}.pt")
            write_json(tmp_path / "x_latent.json", {"factor": read_factor(parser["init_ckpt"])})
            parser["latents"] = {"training": [{"latent": str(tmp_path / "x_latent.nii.gz")}]}
        for key, value in given.items():
            parser[key] = value
        steps = {str(step).strip("$").split("(")[0]: place for place, step in enumerate(parser["initialize"])}
        parser.get_parsed_content(f"initialize#{steps[checked]}" if checked in steps else checked)
        return parser.get_parsed_content("coarse_shared" if checked == "check_cascade" else "shared")

    fits = check({})
    for name, (key, value) in others.items():
        with pytest.raises(Exception) as raised:
            check({key: value})
        words = str(cause(raised.value))
        assert f" do not fit these settings: {name} is " in words and f"trained with {fits[name]!r}" in words, words


@pytest.mark.parametrize(
    ("overlay", "files", "size", "spacing", "guidance"),
    [
        ("full_rflow.json", ["diff_unet_3d_rflow-ct.pt", "autoencoder_v1.pt"], [512, 512, 128], [0.78, 0.78, 2.98], 0),
        ("full_rflow_mr.json", ["diff_unet_3d_rflow-mr.pt", "autoencoder_v2.pt"], [128, 256, 256], [1.25, 1, 1], 15),
        (
            "full_rflow_mr_brain.json",
            ["diff_unet_3d_rflow-mr-brain_v1.pt", "autoencoder_v1.pt"],
            [256, 256, 128],
            [0.94, 0.94, 1.36],
            2,
        ),
    ],
)
def test_released_generators_have_their_files_and_defaults(bundles, overlay, files, size, spacing, guidance):
    """As REFERENCE section 6 lists them; the autoencoder has the keys of the released one, and conditions pass."""
    parser = parser_of(bundles, "maisi_ldm", "inference.json", overlay)
    assert [path.rsplit("/", 1)[1] for path in parser.get_parsed_content("weights")] == files
    conditions = parser.get_parsed_content("conditions")
    assert (list(conditions.size), list(conditions.spacing)) == (size, spacing)
    assert parser.get_parsed_content("guidance_scale") == guidance
    limits = [
        parser[key] for key in ("spacing_range", "smallest_field_of_view", "trained_regions", "trained_modalities")
    ]
    check_conditions(conditions, parser.get_parsed_content("size_multiple"), *limits)
    ct = parser_of(bundles, "maisi_vae", "inference.json", "full.json")
    with torch.device("meta"):
        ours, theirs = parser.get_parsed_content("autoencoder_def"), ct.get_parsed_content("network_def")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_full_size_mask_networks_have_the_released_keys(bundles):
    """Those of ``mask_generation_autoencoder_def`` and ``mask_generation_diffusion_def`` of the release."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import DiffusionModelUNet

    parser = parser_of(bundles, "maisi_ldm", "mask_inference.json", "full_mask.json")
    parser["classes"] = list(range(125))  # the release's file is not here
    with torch.device("meta"):
        autoencoder = AutoencoderKlMaisi(
            spatial_dims=3,
            in_channels=8,
            out_channels=125,
            latent_channels=4,
            num_channels=[32, 64, 128],
            num_res_blocks=[1, 2, 2],
            norm_num_groups=32,
            norm_eps=1e-6,
            attention_levels=[False, False, False],
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            use_checkpointing=True,
            use_convtranspose=True,
            norm_float16=True,
            num_splits=8,
            dim_split=1,
        )
        unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=4,
            out_channels=4,
            channels=[64, 128, 256, 512],
            attention_levels=[False, False, True, True],
            num_head_channels=[0, 0, 32, 32],
            num_res_blocks=2,
            with_conditioning=True,
            upcast_attention=True,
            cross_attention_dim=10,
        )
        for name, released in (("autoencoder_def", autoencoder), ("network_def", unet)):
            ours = parser.get_parsed_content(name).state_dict()
            assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in released.state_dict().items()}


def test_what_the_configs_write_is_told_from_other_programs_files(bundles):
    """Of the ControlNet's mask, the JSON beside its CT tells."""
    evaluation = bundles.parent / "evaluation" / "segmentation" / "configs"
    seen = []
    for path in sorted([*bundles.glob("*/configs/*.json"), *evaluation.glob("*.json")]):
        after = json.loads(path.read_text()).get("postprocessing")
        for part in after["transforms"] if isinstance(after, dict) else ():
            if isinstance(part, dict) and part.get("sidecar") and part["_target_"].endswith("WriteVolumed"):
                keys = {*SIDECAR} if "SIDECAR" in part["sidecar"] else {*part["sidecar"]}
                assert keys & OURS or keys == {"labels"}, (path, part)
                seen.append(path.parts[-3])
    assert {*seen} == {"maisi_vae", "maisi_ldm", "maisi_controlnet", "segmentation"} and len(seen) >= 8


def test_the_masks_of_generator_and_controlnet_have_the_same_labels(bundles):
    """What the generator draws, the ControlNet knows."""
    inference = json.loads((bundles / "maisi_ldm" / "configs" / "mask_inference.json").read_text())
    controlnet = json.loads((bundles / "maisi_controlnet" / "configs" / "train.json").read_text())
    for name in ("train_mask.json", "encode_mask.json"):
        overlay = json.loads((bundles / "maisi_vae" / "configs" / name).read_text())
        assert [0, *overlay["keep_labels"]] == inference["classes"]
        assert overlay["keep_labels"] == controlnet["keep_labels"]
        assert overlay["merge_labels"] == controlnet["merge_labels"]


def test_the_generator_is_asked_as_it_was_trained(bundles):
    """The same organs in the same order, canvas, spacing, and the same way from noise."""
    training = parser_of(bundles, "maisi_ldm", "train.json", "train_mask.json")
    inference = parser_of(bundles, "maisi_ldm", "mask_inference.json")
    encoding = parser_of(bundles, "maisi_vae", "encode.json", "encode_mask.json")
    for key in ("organs", "prior_components", "prior_until"):
        assert training[key] == inference[key]
    assert training["scheduler"] == {**inference["scheduler"], "sample_method": "@timestep_sampling"}
    assert (encoding["canvas"], encoding["spacing"]) == (inference["output_size"], inference["spacing"])


@pytest.mark.parametrize("overlay", ["full_rflow.json", "full_ddpm.json"])
def test_a_file_of_both_networks_is_recorded_alone(bundles, tmp_path, overlay):
    """What a training left is ControlNet and U-Net; the released U-Net makes nothing then, and may be missing."""
    torch.save({"model": {"unet.a": torch.zeros(1), "controlnet.a": torch.zeros(1)}}, tmp_path / "trained.pt")
    (tmp_path / "decoder.pt").touch()
    parser = parser_of(bundles, "maisi_controlnet", "inference.json", overlay)
    assert len(parser.get_parsed_content("weights")) == 3  # known before any is there, and read
    parser = parser_of(bundles, "maisi_controlnet", "inference.json", overlay)
    given = {"ckpt_path": "trained.pt", "autoencoder_ckpt_path": "decoder.pt", "output_dir": "."}
    parser.update({key: str(tmp_path / name) for key, name in given.items()} | {"recorded": {}})
    found = json.loads(parser.get_parsed_content("record").read_text())
    assert list(found["weights"]) == ["trained.pt", "decoder.pt"]


def test_missing_full_size_weights_say_what_to_do(cause, bundles, tmp_path):

    parser = parser_of(bundles, "maisi_vae", "inference.json", "full.json")
    if (bundles / "maisi_vae" / "models" / "autoencoder_v1.pt").exists():
        pytest.skip("the released weights are here")
    with pytest.raises(Exception) as raised:
        parser.get_parsed_content("network")
    assert "maisi weights maisi_vae" in str(cause(raised.value))


@pytest.mark.parametrize(
    ("bundle", "config", "names"),
    [
        ("maisi_vae", "inference.json", ["a", "a_recon"]),
        ("maisi_vae", "encode.json", ["a", "a_latent"]),
        ("maisi_vae", "decode.json", ["a_latent", "a_latent_ct"]),
        ("maisi_controlnet", "inference.json", ["a", "a_mask"]),
    ],
)
def test_no_stage_writes_over_an_input(open_bundle, cause, save, phantom_ct, bundle, config, names):
    files = [save(phantom_ct, f"{name}.nii.gz") for name in names]
    before = [path.read_bytes() for path in files]
    with pytest.raises(Exception) as error:
        open_bundle(bundle, config, input=[str(path) for path in files], output_dir=str(files[0].parent))
    assert f"{files[1]} would be written over" in str(cause(error.value))
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("elsewhere", [False, True])
def test_command_line_error_is_one_line_and_fails(python, bundles, tmp_path, elsewhere):
    root = bundles / "maisi_vae"
    where = ["--bundle_root", str(root)] if elsewhere else []
    config = str(root / "configs" / "inference.json") if elsewhere else "configs/inference.json"
    run = subprocess.run(
        [python, "-m", "monai.bundle", "run", "--config_file", config, *where]
        + ["--input", str(tmp_path / "nothing.nii.gz"), "--output_dir", str(tmp_path / "out")],
        cwd=tmp_path if elsewhere else root,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith("error: ") and "nothing.nii.gz" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_configs_repeat_no_more_than_they_did():
    """The line may come down, not up: what never varies is a default of our classes, what an overlay adds is a hook."""
    found = config_lines.count()
    assert found["lines"] <= LINES and found["repeated"] <= REPEATED and found["longest"] <= LONGEST, found


def test_what_counts_as_repeated(tmp_path):
    """By hand: of ten leaves, three are there already."""
    configs = tmp_path / "bundle" / "configs"
    configs.mkdir(parents=True)
    first = {"a": {"b": 1, "c": [1, 2]}, "imports": ["$import os", "$import torch"], "words": ["x", "y"]}
    second = {"a#b": 1, "+imports": ["$import os", "$import json"], "steps": [{"k": 1}, {"k": 1}]}
    for name, content in (("one", first), ("two", second), ("metadata", {"a": 1})):
        (configs / f"{name}.json").write_text(json.dumps(content, indent=1))
    found = config_lines.count(tmp_path)
    assert found["leaves"] == 10 and found["repeated"] == pytest.approx(0.3)
