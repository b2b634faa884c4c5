"""The whole VAE-GAN recipe, every loss term included, from train.json on phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from maisi_tools.weights import encoder_fingerprint, read_weights

models = pytest.importorskip("torchvision.models")
pytest.importorskip("lpips")

SMALL = {
    "network_def#num_channels": [8, 16],
    "network_def#num_res_blocks": [1, 1],
    "discriminator_def#channels": 4,
    "min_patch_size": [32, 32, 32],
    "max_patch_size": [32, 32, 32],
    "amp_dtype": "float32",
    "cache_rate": 0.0,
    "max_epochs": 2,
    "val_interval": 1,
    "adversarial_start": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_ct) -> dict:
    """A CT and an MR to train on, a CT to validate on, and a backbone: random, but the same in every test."""
    folder = tmp_path_factory.mktemp("data")
    affine = np.diag([5.0, 5.0, 3.4, 1.0])
    crops = [phantom_ct[i : i + 32, 4:36, 8:40] for i in range(3)]
    crops[1] = (crops[1] + 1000) * 3  # MR: no negative values, no unit
    for name, crop in zip(("ct", "mr", "val"), crops, strict=True):
        nib.save(nib.Nifti1Image(crop.astype(np.int16), affine), folder / f"{name}.nii.gz")
    items = [{"image": str(folder / "ct.nii.gz")}, {"image": str(folder / "mr.nii.gz"), "modality": "mri"}]
    listed = {"training": items, "validation": [{"image": str(folder / "val.nii.gz")}]}
    (folder / "datalist.json").write_text(json.dumps(listed))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.save(models.squeezenet1_1().state_dict(), folder / "backbone.pth")
    return {
        **SMALL,
        "datalist": str(folder / "datalist.json"),
        "perceptual_backbone": str(folder / "backbone.pth"),
    }


@pytest.fixture
def start(open_bundle, data):
    """``start(out, key=value, ...)``: the small recipe, initialised, that writes to ``out``."""

    def start(out: Path, **overrides) -> ConfigWorkflow:
        return open_bundle("maisi_vae", "train.json", **{**data, "ckpt_dir": str(out), **overrides})

    return start


def test_recipe_and_resume(start, assert_same, tmp_path):
    whole = start(tmp_path / "whole")
    trainer = whole.parser.get_parsed_content("train#trainer")
    logs, untrained = [], {}
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: logs.append(engine.state.output["log"]))
    untrained |= {k: v.clone() for k, v in whole.parser.get_parsed_content("network_def").state_dict().items()}
    whole.run()

    terms = {"loss", "l1", "kl", "perceptual", "scale_factor"}
    rates = {"learning_rate_autoencoder", "learning_rate_discriminator"}
    others = {"gradient_norm", "voxels_per_second", "data_share"}
    game = {"adversarial", "discriminator"}  # from the second iteration on
    assert [set(log) for log in logs] == [terms | rates | others] + [terms | rates | others | game] * 3
    for log in logs:
        parts = log["l1"] + 1e-7 * log["kl"] + 0.3 * log["perceptual"] + 0.1 * log.get("adversarial", 0)
        assert log["loss"] == pytest.approx(parts, rel=1e-4)

    metrics = whole.parser.get_parsed_content("validate#evaluator").state.metrics
    assert metrics.keys() == {"psnr_body", "ssim_body", "psnr", "ssim"} and all(np.isfinite(list(metrics.values())))
    assert list((tmp_path / "whole").glob("events.out.tfevents.*"))

    checkpoint = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    average = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)["model"]
    for name, value in checkpoint["ema"].items():
        assert torch.equal(average[name], value.half()), name
    assert any(not torch.equal(value, untrained[name]) for name, value in checkpoint["ema"].items())
    best = torch.load(tmp_path / "whole" / "model_best.pt", weights_only=True)
    assert best["model"].keys() == average.keys() and best["psnr_body"] >= metrics["psnr_body"]

    # interrupted in the middle of the second epoch, then resumed: to the bit what was not interrupted
    broken = start(tmp_path / "broken", checkpoint_minutes=0)

    def interrupt(engine):
        raise KeyboardInterrupt

    broken.parser.get_parsed_content("train#trainer").add_event_handler(Events.ITERATION_COMPLETED(once=3), interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)["trainer"]["iteration"] == 3
    resumed = start(tmp_path / "broken", resume=True)
    resumed.run()
    assert_same(torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True), checkpoint)
    assert "discriminator_optimizer" in checkpoint


def test_two_ranks_with_half_the_batch_equal_one_process(run_on_two_ranks, start, data, tmp_path):
    """With plain gradient descent: Adam makes steps of rounding errors where a gradient is zero.

    Without the perceptual term, which draws its slices from the whole batch.
    """
    descent = {f"{name}#_target_": "torch.optim.SGD" for name in ("optimizer", "discriminator_optimizer")}
    rates = {"learning_rate": 0.01, "discriminator_learning_rate": 0.01, "schedule": "@warm_up", "warm_up_factors": []}
    more = {**descent, **rates, "clip_norm": 100.0, "perceptual_weight": 0, "epoch_length": 2, "val_interval": 2}
    settings = {**data, **more, "adversarial_weight": 1.0, "ckpt_dir": str(tmp_path / "ranks")}
    run_on_two_ranks("maisi_vae", ["train.json", "multi_gpu_train.json"], **settings)
    start(tmp_path / "one", **more, adversarial_weight=1.0, batch_size=2).run()
    ranks, one = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("ranks", "one"))
    assert ranks["trainer"] == one["trainer"] and ranks["data"] == one["data"]
    for part in ("model", "ema", "discriminator"):
        for name, value in one[part].items():
            torch.testing.assert_close(ranks[part][name], value, atol=1e-5, rtol=1e-4)
    moved = max(float((value - one["ema"][name]).abs().max()) for name, value in one["model"].items())
    assert moved > 1e-3  # the tolerance is not met by standing still
    assert (tmp_path / "ranks" / "model.pt").is_file() and (tmp_path / "ranks" / "model_best.pt").is_file()


@pytest.mark.parametrize("schedule", ["@one_cycle", "@warm_up"])
def test_learning_rates(start, tmp_path, schedule):
    overrides = {"schedule": schedule, "max_epochs": 30, "epoch_length": 4, "accumulation_steps": 2}
    parser = start(tmp_path, **overrides, perceptual_weight=0).parser
    rates = {"lr_scheduler": [], "discriminator_lr_scheduler": []}
    for name, seen in rates.items():
        scheduler = parser.get_parsed_content(name)
        for _ in range(59):
            seen.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
    if schedule == "@warm_up":  # two steps an epoch
        assert rates["lr_scheduler"] == pytest.approx([1e-5] * 20 + [1e-4] * 20 + [1e-3] * 19)
        assert rates["discriminator_lr_scheduler"] == pytest.approx([1e-6] * 20 + [1e-5] * 20 + [1e-4] * 19)
    else:
        assert max(rates["lr_scheduler"]) == pytest.approx(1e-3, rel=1e-3)
        assert np.argmax(rates["lr_scheduler"]) == 2  # 5 % of 60 steps


def test_one_cycle_of_any_length(start, tmp_path):
    """At 20 steps a start of exactly 5 % would be one step long, and PyTorch then divides by zero."""
    parser = start(tmp_path, max_epochs=20, epoch_length=1, perceptual_weight=0).parser
    scheduler = parser.get_parsed_content("lr_scheduler")
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(1e-3, rel=0.02) and top in (1, 2)
    assert np.all(np.diff(rates[: top + 1]) > 0) and np.all(np.diff(rates[top:]) < 0)


def test_a_sharpened_decoder_keeps_the_latents(open_bundle, bundles, data, tmp_path):
    patches = {"min_patch_size": [16, 16, 16], "max_patch_size": [28, 24, 24], "amp_dtype": "float32"}
    settings = {"datalist": data["datalist"], "ckpt_dir": str(tmp_path), "cache_rate": 0.0, **patches}
    workflow = open_bundle(
        "maisi_vae", ["train.json", "sharpen_decoder.json"], **settings, max_epochs=1, epoch_length=2
    )
    trainer = workflow.parser.get_parsed_content("train#trainer")
    workflow.run()
    assert trainer.state.iteration == 2 and set(trainer.state.output["log"]) >= {"loss", "l1"}
    assert not {"perceptual", "adversarial", "discriminator"} & set(trainer.state.output["log"])
    shipped = read_weights(bundles / "maisi_vae" / "models" / "model.pt")
    for file, key in (("model.pt", None), ("checkpoint.pt", "model"), ("checkpoint.pt", "ema")):
        trained = read_weights(tmp_path / file, key)
        assert encoder_fingerprint(trained) == encoder_fingerprint(shipped), (file, key)
        assert any(not torch.equal(trained[name], value.to(trained[name])) for name, value in shipped.items())


@pytest.mark.parametrize("layers", ["^endocer", ".", "("])
def test_layers_that_cannot_be_frozen_are_refused(start, tmp_path, cause, layers):
    with pytest.raises(Exception) as raised:
        start(tmp_path, frozen_layers=layers).parser.get_parsed_content("optimizer")
    assert "frozen_layers" in str(cause(raised.value))


def test_a_wrong_patch_size_is_refused_before_anything_is_read(start, tmp_path, cause):
    with pytest.raises(Exception) as raised:
        start(tmp_path, min_patch_size=[16, 16, 16])
    assert "at least 24" in str(cause(raised.value))
