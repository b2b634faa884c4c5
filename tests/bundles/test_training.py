"""Every train.json runs from end to end on phantoms, in one process and under torchrun."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from tensorboard.backend.event_processing import event_accumulator
from torch.utils._pytree import tree_map

from maisi_tools.errors import find_input_error
from maisi_tools.training.diffusion import body_scale_factor
from maisi_tools.weights import load_weights, read_autoencoder, read_scale_factor, save_weights

NAMES = ("p1", "p2", "p3")


@pytest.fixture(scope="module")
def cases(tmp_path_factory, phantom_labels, phantom_ct) -> Path:
    """Three phantom cases (p3 kept out) with their datalist."""
    folder = tmp_path_factory.mktemp("cases")
    affine = np.diag([5.0, 5.0, 3.4, 1.0])
    for i, name in enumerate(NAMES):
        crop = (slice(i, i + 32), slice(4, 36), slice(8, 40))
        nib.save(nib.Nifti1Image(phantom_ct[crop], affine), folder / f"{name}_ct.nii.gz")
        nib.save(nib.Nifti1Image(phantom_labels[crop], affine), folder / f"{name}_ct_mask.nii.gz")
    items = [{"image": str(folder / f"{name}_ct.nii.gz")} for name in NAMES]
    (folder / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}))
    return folder


@pytest.fixture(scope="module")
def latents(cases, run_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    given = {"input": f"{cases}/*_ct.nii.gz", "output_dir": str(folder)}
    run_bundle("maisi_vae", "encode.json", **given, multiple=16, coarse_size=[16, 16, 16])
    return folder


def overrides(stage: str, cases: Path, latents: Path, bundles: Path, out: Path) -> dict:
    common = {"max_epochs": 2, "val_interval": 1, "ckpt_dir": str(out), "cache_rate": 0.0}
    if stage == "maisi_vae":
        # no perceptual loss: its backbone is a download (test_vae_training.py has all terms)
        small = {"max_patch_size": [32, 32, 32], "perceptual_weight": 0, "adversarial_start": 1}
        return {**common, "datalist": str(cases / "datalist.json"), **small}
    held_out = ["p3"]
    if stage == "maisi_ldm":
        return {**common, "dataset_dir": str(latents), "held_out": held_out}
    unet = str(bundles / "maisi_controlnet" / "models" / "model.pt")
    return {
        **common,
        "dataset_dir": str(latents),
        "masks_dir": str(cases),
        "held_out": held_out,
        "unet_ckpt_path": unet,
    }


TINY = {
    "num_channels": [8, 8, 16],
    "attention_levels": [False, False, True],
    "num_head_channels": [0, 0, 8],
    "norm_num_groups": 4,
}


def tiny(stage: str) -> dict:
    """Overrides that make the U-Net and ControlNet so small that a step takes milliseconds, and computed in float32."""
    parts = ("",) if stage == "maisi_ldm" else ("unet#", "controlnet#")
    settings = {f"network_def#{part}{name}": value for part in parts for name, value in TINY.items()}
    if stage == "maisi_controlnet":
        settings["network_def#controlnet#conditioning_embedding_num_channels"] = [8, 8]
    return {**settings, "amp_dtype": "float32", "tensorboard": False}


@pytest.fixture(scope="module")
def tiny_unet_file(latents, bundles, tmp_path_factory) -> Path:
    """Weights of a tiny U-Net as stage 2 saves them, for stage 3 to start from."""
    parser = ConfigParser()
    parser.read_config(str(bundles / "maisi_ldm" / "configs" / "train.json"))
    for key, value in {**tiny("maisi_ldm"), "device": "$torch.device('cpu')"}.items():
        parser[key] = value
    network = parser.get_parsed_content("network_def")
    for parameter in network.parameters():  # MONAI starts the last layers at zero, and the velocity would be zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("unet") / "model.pt"
    save_weights(path, network.state_dict(), scale_factor=1.2, factor=2)
    return path


@pytest.fixture
def tiny_overrides(cases, latents, bundles, tiny_unet_file):
    """``tiny_overrides(stage, out, **more)``: a tiny run of stage 2 or 3 that writes to ``out``."""

    def overrides_of(stage: str, out: Path, **more) -> dict:
        settings = overrides(stage, cases, latents, bundles, out) | tiny(stage)
        if stage == "maisi_controlnet":
            settings["unet_ckpt_path"] = str(tiny_unet_file)
        return settings | more

    return overrides_of


@pytest.mark.parametrize("stage", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_monai_finds_the_properties_of_training(open_bundle, cases, latents, bundles, tmp_path, stage):
    """By their names, and the optional ones by what refers to them."""
    workflow = open_bundle(stage, "train.json", "train", **overrides(stage, cases, latents, bundles, tmp_path / "out"))
    assert workflow.check_properties() == []


def read(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("stage", ["maisi_ldm", "maisi_controlnet"])
def test_resumed_in_mid_epoch_equals_uninterrupted(
    open_bundle, run_bundle, tiny_overrides, assert_same, stage, tmp_path
):
    more = {"checkpoint_minutes": 0, "epoch_length": 4, "val_interval": 9, "contrast_labels": {"200": 0}}
    if stage == "maisi_ldm":
        del more["contrast_labels"]
    run_bundle(stage, "train.json", **tiny_overrides(stage, tmp_path / "whole", **more))
    settings = tiny_overrides(stage, tmp_path / "broken", **more)
    trainer = open_bundle(stage, "train.json", **settings).parser.get_parsed_content("train#trainer")

    @trainer.on(Events.ITERATION_COMPLETED(once=7))  # in the 2nd epoch, between two optimizer steps
    def interrupt():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer.run()
    assert read(tmp_path / "broken")["trainer"]["iteration"] == 6
    run_bundle(stage, "train.json", **settings, resume=True)
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "broken")
    assert whole["trainer"]["iteration"] == 8
    assert_same(whole, resumed)
    assert (tmp_path / "whole" / "model.pt").is_file() and (tmp_path / "broken" / "model.pt").is_file()


def test_ddpm_with_all_options_is_logged(run_bundle, tiny_overrides, tmp_path):
    """DDPM, min-SNR, recomputed activations; what TensorBoard shows of it."""
    options = {"scheduler": "@ddpm", "min_snr_gamma": 5, "use_checkpointing": True, "tensorboard": True}
    run_bundle("maisi_ldm", "train.json", **tiny_overrides("maisi_ldm", tmp_path, **options))
    accumulated = event_accumulator.EventAccumulator(str(tmp_path))
    logged = accumulated.Reload().Tags()["scalars"]
    assert {"loss", "learning_rate", "gradient_norm", "voxels_per_second", "data_share", "L1"} <= set(logged)
    rates = [event.value for event in accumulated.Scalars("learning_rate")]
    np.testing.assert_allclose(rates, [4e-4, 4e-4, 1e-4, 1e-4], rtol=1e-5)  # 2 optimizer steps, polynomial of power 2
    errors = [event.value for event in accumulated.Scalars("L1")]
    assert len(errors) == 2
    configs, settings = ["train.json", "evaluate.json"], tiny_overrides("maisi_ldm", tmp_path, **options)
    evaluation = run_bundle("maisi_ldm", configs, **settings, ckpt_path=str(tmp_path / "model.pt"))
    evaluator = evaluation.parser.get_parsed_content("validate#evaluator")
    assert evaluator.state.metrics["L1"] == pytest.approx(errors[-1], rel=1e-2)  # model.pt is float16
    with pytest.raises(RuntimeError) as error:  # once more, without saying that it goes on
        run_bundle("maisi_ldm", "train.json", **settings)
    assert "--resume True" in str(find_input_error(error.value))


def test_a_cascades_unet_is_none_to_start_a_controlnet_from(bundles, open_bundle, tiny_overrides, tmp_path):
    settings = tiny_overrides("maisi_controlnet", tmp_path)
    settings["unet_ckpt_path"] = str(bundles / "maisi_ldm" / "models" / "model.pt")
    with pytest.raises(Exception) as raised:
        open_bundle("maisi_controlnet", "train.json", **settings).parser.get_parsed_content("train#trainer")
    assert "is a U-Net that sees a coarse CT; allowed is a U-Net alone" in str(find_input_error(raised.value))


def test_first_step_of_the_controlnet_starts_from_the_unet(open_bundle, tiny_overrides, tiny_unet_file, tmp_path):
    """Zero convolutions: before the first step the output is the U-Net's, exactly."""
    settings = tiny_overrides("maisi_controlnet", tmp_path)
    network = open_bundle("maisi_controlnet", "train.json", **settings).parser.get_parsed_content("network")
    unet = load_weights(copy.deepcopy(network.unet), tiny_unet_file)
    x, t, mask = torch.randn(2, 4, 4, 4, 4), torch.tensor([3.0, 900.0]), torch.randint(0, 256, (2, 1, 8, 8, 8))
    given = {"spacing_tensor": torch.rand(2, 3), "class_labels": torch.tensor([1, 8])}
    with torch.no_grad():
        plain, controlled = unet(x, t, **given), network(mask, x, t, **given)
    assert plain.std() > 0.01 and torch.equal(plain, controlled)
    assert not any(parameter.requires_grad for parameter in network.unet.parameters())


def test_a_controlnet_and_its_unet_start_from_nothing(open_bundle, tiny_overrides, tmp_path):
    """As the card says: `unet_ckpt_path` null; latents are scaled by what varies in the body."""
    settings = tiny_overrides("maisi_controlnet", tmp_path) | {"unet_ckpt_path": None, "train_unet": True}
    parser = open_bundle("maisi_controlnet", "train.json", **settings).parser
    scaled = parser.get_parsed_content("scale_factor")
    dataset = parser.get_parsed_content("train#dataset")
    assert scaled == pytest.approx(body_scale_factor(dataset)) and scaled > 0
    assert all(parameter.requires_grad for parameter in parser.get_parsed_content("network").unet.parameters())


@pytest.mark.parametrize(
    ("given", "share"), [({}, 0.0), ({"train_unet": True}, 0.2), ({"train_unet": True, "control_dropout": 0.0}, 0.0)]
)
def test_a_unet_that_learns_with_its_controlnet_also_learns_to_do_without(
    open_bundle, tiny_overrides, given, share, tmp_path
):
    """Else guidance by the mask, the default of drawing, asks it for what it never saw."""
    parser = open_bundle(
        "maisi_controlnet", "train.json", **tiny_overrides("maisi_controlnet", tmp_path, **given)
    ).parser
    assert parser.get_parsed_content("prepare_batch").control_dropout == share
    assert parser.get_parsed_content("compared")["control_dropout"] == share


@pytest.mark.parametrize("bundle", ["maisi_ldm", "maisi_controlnet"])
def test_training_goes_on_with_the_scale_factor_of_the_weights(open_bundle, tiny_overrides, bundle, tmp_path):
    save_weights(tmp_path / "start.pt", {"weight": torch.ones(1)}, scale_factor=2.5, factor=2)
    settings = tiny_overrides(bundle, tmp_path / "out")
    parser = open_bundle(bundle, "train.json", **settings, init_ckpt=str(tmp_path / "start.pt")).parser
    assert parser.get_parsed_content("scale_factor") == 2.5

    key = "init_ckpt" if bundle == "maisi_ldm" else "unet_ckpt_path"
    save_weights(tmp_path / "other.pt", {"weight": torch.ones(1)}, scale_factor=2.5, factor=2, autoencoder="22")
    with pytest.raises(Exception) as raised:
        open_bundle(bundle, "train.json", **settings | {key: str(tmp_path / "other.pt")})
    assert "trained on latents of an autoencoder with 22" in str(find_input_error(raised.value))


@pytest.mark.parametrize("stage", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_train_config(run_bundle, stage, cases, latents, bundles, tmp_path):
    workflow = run_bundle(stage, "train.json", **overrides(stage, cases, latents, bundles, tmp_path / "out"))
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 2 and trainer.state.iteration == 4
    assert np.isfinite(trainer.state.output["loss"].item())
    saved = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert saved["model"].keys() == workflow.parser.get_parsed_content("network_def").state_dict().keys()
    if stage != "maisi_vae":
        assert read_scale_factor(tmp_path / "out" / "model.pt") > 0
        made_by = json.loads((latents / "p1_ct_latent.json").read_text())["autoencoder"]
        for file in ("model.pt", "checkpoint.pt"):
            assert read_autoencoder(tmp_path / "out" / file) == made_by
    # what was saved is what inference loads
    network = run_free_network(stage, bundles, tmp_path / "out" / "model.pt")
    assert not network.training


@pytest.mark.parametrize("amp", ["float32", None], ids=["float32", "as-configured"])
@pytest.mark.parametrize("stage", ["maisi_vae", "maisi_ldm", "maisi_controlnet"])
def test_a_step_on_each_device(open_bundle, cases, latents, bundles, tiny_overrides, tmp_path, stage, amp, device):
    """Gradient descent by the trainer against a backward pass on the CPU, of the same network from the same input."""
    one = {"epoch_length": 1, "max_epochs": 1, "val_interval": 9, "batch_size": 1, "accumulation_steps": 1}
    one |= {"optimizer#_target_": "torch.optim.SGD", "learning_rate": 1.0, "clip_norm": 1e6}
    if stage == "maisi_vae":
        settings = overrides(stage, cases, latents, bundles, tmp_path) | {"adversarial_weight": 0, "tensorboard": False}
        settings["schedule"] = "$lambda optimizer, rate, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)"
    else:
        settings = tiny_overrides(stage, tmp_path)
    settings |= one | {"device": f"$torch.device('{device}')"}
    settings.pop("amp_dtype", None)
    if amp:
        settings["amp_dtype"] = amp
    trainer = open_bundle(stage, "train.json", **settings).parser.get_parsed_content("train#trainer")
    network, seen = trainer.network, []
    plain = copy.deepcopy(network).cpu()
    network.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    trainer.run()
    to_cpu = partial(tree_map, lambda leaf: torch.as_tensor(leaf).cpu() if isinstance(leaf, torch.Tensor) else leaf)
    (args, kwargs), label = to_cpu(seen[0]), to_cpu(trainer.state.output["label"])
    loss = trainer.loss_function(plain(*args, **kwargs), label)
    loss.backward()
    close = 1e-4 if amp else 3e-2
    assert trainer.state.output["loss"].item() == pytest.approx(loss.item(), rel=close)
    steps, wanted = [], []
    start = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter.cpu(), start[name])
        elif start[name].grad is not None:
            steps.append((parameter.detach().cpu() - start[name].detach()).flatten())
            wanted.append(-start[name].grad.flatten())
    steps, wanted = torch.cat(steps), torch.cat(wanted)
    assert wanted.norm() > 0.01
    assert (steps - wanted).norm() <= (1e-3 if amp else 0.1) * wanted.norm()


def run_free_network(stage: str, bundles: Path, weights: Path) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(str(bundles / stage / "configs" / "inference.json"))
    parser["ckpt_path"] = str(weights)
    parser["cascade"] = False  # as train.json trains a U-Net
    parser["device"] = "$torch.device('cpu')"
    return parser.get_parsed_content("network")


@pytest.mark.parametrize("stage", ["maisi_ldm", "maisi_controlnet"])
def test_two_ranks_with_half_the_batch_equal_one_process(
    run_on_two_ranks, open_bundle, run_bundle, tiny_overrides, stage, tmp_path
):
    """The weights, and the validation's figure, for which each rank sees one of the two kept-out cases.

    With plain gradient descent, because Adam makes steps of rounding errors where a gradient is zero.
    """
    more = {"optimizer#_target_": "torch.optim.SGD", "learning_rate": 0.05, "epoch_length": 4, "clip_norm": 100.0}
    more |= {"held_out": ["p2", "p3"], "tensorboard": True}
    settings = tiny_overrides(stage, tmp_path / "ranks", **more, batch_size=1)
    run_on_two_ranks(stage, ["train.json", "multi_gpu_train.json"], **settings)
    run_bundle(stage, "train.json", **tiny_overrides(stage, tmp_path / "one", **more, batch_size=2))
    ranks, one = read(tmp_path / "ranks"), read(tmp_path / "one")
    assert ranks["trainer"] == one["trainer"] and ranks["data"] == one["data"]
    assert ranks["scale_factor"] == pytest.approx(one["scale_factor"])
    start = open_bundle(stage, "train.json", **tiny_overrides(stage, tmp_path / "start", **more)).parser
    before, moved = start.get_parsed_content("network").state_dict(), 0.0
    for name, value in one["model"].items():
        torch.testing.assert_close(ranks["model"][name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ranks["ema"][name], one["ema"][name], atol=1e-5, rtol=1e-4)
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 1e-3  # the tolerance is not met by standing still
    figures = []
    for folder in ("ranks", "one"):
        logged = event_accumulator.EventAccumulator(str(tmp_path / folder)).Reload()
        figures.append([event.value for event in logged.Scalars("L1")])
        assert len(list((tmp_path / folder).glob("events.*"))) == 2  # the trainer's and the evaluator's: rank 0's alone
    assert figures[0] == pytest.approx(figures[1], rel=1e-4) and len(figures[0]) == 2


def test_the_controlnet_trains_on_mr(run_bundle, cases, phantom_labels, tiny_overrides, tmp_path):
    """From an MR's latents, with its contrast as the condition."""
    brightness = np.array([0, *range(255)])[phantom_labels] * 40.0
    affine = nib.load(cases / "p1_ct.nii.gz").affine
    items = []
    for i, name in enumerate(NAMES):
        crop = (slice(i, i + 32), slice(4, 36), slice(8, 40))
        (tmp_path / "mr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(brightness[crop].astype(np.int16), affine), tmp_path / "mr" / f"{name}_ct.nii.gz")
        items.append({"image": str(tmp_path / "mr" / f"{name}_ct.nii.gz"), "modality": "mri_t2"})
    latents = tmp_path / "latents"
    run_bundle("maisi_vae", ["encode.json", "mr.json"], input=items, output_dir=str(latents), multiple=16)
    sidecars = [json.loads(path.read_text()) for path in latents.glob("*_latent.json")]
    assert [one["modality"] for one in sidecars] == ["mri_t2"] * 3
    assert all(one["intensity"][0] == 0 and one["intensity"][1] > 2000 for one in sidecars)
    settings = tiny_overrides("maisi_controlnet", tmp_path / "out", max_epochs=1, dataset_dir=str(latents))
    workflow = run_bundle("maisi_controlnet", "train.json", **settings)
    batch = next(iter(workflow.parser.get_parsed_content("train#dataloader")))
    assert batch["class_labels"].tolist() == [10] * len(batch["class_labels"])
    trained = read(tmp_path / "out")
    assert trained["trainer"]["iteration"] > 0 and (tmp_path / "out" / "model.pt").is_file()
