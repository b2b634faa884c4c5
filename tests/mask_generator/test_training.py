"""Batches and loss of the mask autoencoder and the mask generator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch.nn.functional import one_hot

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.losses import MaskAutoencoderLoss, MaskBatch, class_of_label
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.mask_generator.training import (
    MaskDiffusionBatch,
    OrganSizesd,
    ToCanvasd,
    check_organs,
    size_directions,
)
from maisi_tools.masks.bits import LabelBitsd
from maisi_tools.training.losses import SizeVelocityLoss

CPU = torch.device("cpu")


def test_bits_go_in_and_classes_are_wanted():
    labels = torch.tensor([0, 18, 200, 120]).reshape(1, 1, 4, 1, 1).repeat(1, 1, 1, 4, 4)
    batch = {"image": labels.to(torch.uint8), "draw": torch.tensor([5])}
    bits, target, _, keywords = MaskBatch(0, [0, 18, 120, 200], 4)(batch, CPU)
    assert target[0, 0, :, 0, 0].tolist() == [0, 1, 3, 2] and target.dtype == torch.int64
    values = (bits * 2 ** torch.arange(8).reshape(1, 8, 1, 1, 1)).sum(1, keepdim=True)
    assert torch.equal(values, labels.float())
    assert keywords["noise"].shape == (1, 4, 1, 1, 1)
    again = MaskBatch(0, [0, 18, 120, 200], 4)({**batch, "draw": torch.tensor([5])}, CPU)[3]["noise"]
    assert torch.equal(again, keywords["noise"])


def test_labels_without_a_class_are_refused():
    with pytest.raises(InputError, match="132"):
        MaskBatch(0, [0, 18], 4)({"image": torch.full((1, 1, 2, 2, 2), 132)}, CPU)


@pytest.mark.parametrize("classes", [[], [1, 2], [0, 1, 1], [0, 199]])
def test_wrong_classes_are_refused(classes):
    with pytest.raises(InputError, match="leading 0"):
        class_of_label(classes)


def test_weights_of_other_classes_are_refused():
    """The shipped ones with labels of one's own; torch said it at the first step, and of tensors."""
    shipped = [1, 4, 8, 4, 4, 4, 2, 3, 8, 8, 1]
    words = (
        r"class_weights has 11 numbers; allowed are 4, .* order: background, liver \(1\), skull \(120\), body \(200\)$"
    )
    with pytest.raises(InputError, match=words):
        MaskAutoencoderLoss(0.01, shipped, [0, 1, 120, 200])
    with pytest.raises(InputError, match="leading 0"):
        MaskAutoencoderLoss(0.01, [1, 2], [0, 199])


def test_loss_against_numpy():
    logits = torch.randn(2, 3, 4, 4, 4)
    target = torch.randint(0, 3, (2, 1, 4, 4, 4))
    mean, sigma = torch.randn(2, 4, 1, 1, 1), torch.rand(2, 4, 1, 1, 1) + 0.1
    loss = MaskAutoencoderLoss(0.01, [1, 2, 5], [0, 18, 200])
    value = loss((logits, mean, sigma), target)
    p = (logits + torch.tensor([1, 2, 5.0]).log().reshape(1, 3, 1, 1, 1)).softmax(1).double().numpy()
    wanted = one_hot(target[:, 0], 3).movedim(-1, 1).double().numpy()
    weight = np.array([1, 2, 5.0])[target[:, 0].numpy()]
    axes = (2, 3, 4)
    entropy = ((-np.log((p * wanted).sum(1)) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()
    dice = 1 - (2 * (p * wanted).sum(axes) + 1e-5) / (p.sum(axes) + wanted.sum(axes) + 1e-5)
    m, s = mean.double().numpy(), sigma.double().numpy()
    kl = (0.5 * (m**2 + s**2 - np.log(s**2) - 1)).sum() / 2
    assert value.item() == pytest.approx(entropy + dice[:, 1:].mean() + 0.01 * kl, rel=1e-5)
    assert set(loss.terms) == {"cross_entropy", "dice", "kl", "scale_factor"}


def test_the_mean_of_two_ranks_losses_is_that_of_their_batch():
    """Each with an image of its own, of which one has much more of a class that weighs more."""
    target = torch.zeros(2, 1, 4, 4, 4, dtype=torch.long)
    target[1, 0, :3] = 1
    parts = torch.randn(2, 2, 4, 4, 4), torch.randn(2, 4, 1, 1, 1), torch.rand(2, 4, 1, 1, 1) + 0.1
    loss = MaskAutoencoderLoss(0.01, [1, 8], [0, 200])
    ranks = [loss(tuple(part[i : i + 1] for part in parts), target[i : i + 1]) for i in range(2)]
    assert loss(parts, target).item() == pytest.approx(sum(ranks).item() / 2, rel=1e-5)


def test_weights_of_classes_do_not_make_them_larger():
    """The best logits for a mixture of voxels are those of their frequencies, whatever the weights."""
    target = torch.zeros(1, 1, 10, 10, 10, dtype=torch.long)
    target[0, 0, :2] = 1
    loss = MaskAutoencoderLoss(0.0, [1, 8], [0, 200])
    posterior = torch.zeros(1, 4, 1, 1, 1), torch.ones(1, 4, 1, 1, 1)
    shift = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=50)

    def step():
        optimizer.zero_grad()
        logits = torch.stack([torch.zeros(10, 10, 10), shift.expand(10, 10, 10)])[None]
        loss((logits, *posterior), target)
        value = loss.cross_entropy(logits + loss.adjustment, target[:, 0])
        value.backward()
        return value

    optimizer.step(step)
    assert shift.sigmoid().item() == pytest.approx(0.2, abs=0.01)


def test_label_bits_keep_the_grid():
    mask = MetaTensor(torch.full((1, 2, 2, 2), 5.0), affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    bits = LabelBitsd("image")({"image": mask})["image"]
    assert bits.shape == (8, 2, 2, 2) and torch.equal(bits.affine, mask.affine)
    assert bits[:, 0, 0, 0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]


def test_sizes_come_from_the_latents_sidecar():
    latent = MetaTensor(torch.zeros(4, 1, 1, 1), meta={"sidecar": {"label_ml": {"18": 20.0, "20": 3.0, "200": 0.0}}})
    organs = {"left parotid": {"label": 18, "range": [10, 30]}, "body": {"label": 200, "range": [1, 2]}}
    data = OrganSizesd("latent", organs)({"latent": latent})
    assert data["organ_sizes"].tolist() == pytest.approx([0.5, UNKNOWN])


def test_a_latent_of_a_ct_is_refused():
    latent = MetaTensor(torch.zeros(4, 1, 1, 1), meta={"sidecar": {}, "filename_or_obj": "p1_latent.nii.gz"})
    with pytest.raises(InputError, match=r"p1_latent.*encode_mask\.json"):
        OrganSizesd("latent", {})({"latent": latent})


def mask_of(body: tuple[slice, ...], lung: tuple[slice, ...]) -> MetaTensor:
    labels = torch.zeros(1, 40, 30, 50)
    labels[0][body] = 200
    labels[0][lung] = 28
    meta = {"filename_or_obj": "p1_mask.nii.gz"}
    return MetaTensor(labels, affine=torch.diag(torch.tensor([4.0, 4.0, 3.0, 1.0])), meta=meta)


def test_a_canvas_that_would_cut_an_organ_is_refused(caplog):
    """Of the body it may cut: 6 of 217 OpenKBP masks lose up to 0.6 % of it, and no organ."""
    whole = (slice(None),) * 3
    mask = mask_of(whole, (slice(10, 20), slice(10, 20), slice(0, 5)))
    words = (
        r"p1_mask.nii.gz has a body of 40 x 30 x 50 voxels; the canvas of 48 x 32 x 48 would cut left lung upper lobe "
        r"\(28\), .* give --canvas '\[48, 32, 64\]'"
    )
    with pytest.raises(InputError, match=words):
        ToCanvasd("image", [48, 32, 48], 16)({"image": mask})
    assert not caplog.records
    fitted = ToCanvasd("image", [48, 32, 64], 16)({"image": mask})["image"]
    assert fitted.shape == (1, 48, 32, 64) and not caplog.records
    assert torch.equal(fitted[:, 4:44, 1:31, 7:57].as_tensor(), mask.as_tensor())

    inside = mask_of(whole, (slice(10, 20), slice(10, 20), slice(20, 25)))
    fitted = ToCanvasd("image", [48, 32, 48], 16)({"image": inside})["image"]
    assert torch.equal(fitted[:, 4:44, 1:31].as_tensor(), inside[..., 1:49].as_tensor())
    assert "cuts off 4 % of it, and no organ; --canvas '[48, 32, 64]' holds it all" in caplog.text

    with pytest.raises(InputError, match=r"canvas is \[48, 32, 50\]; allowed are multiples of 16"):
        ToCanvasd("image", [48, 32, 50], 16)


def latents_with(folder: Path, **ml: list[float]) -> list[dict[str, str]]:
    """Of each label the volumes in as many masks."""
    cases = [dict(zip(ml, values, strict=True)) for values in zip(*ml.values(), strict=True)]
    for number, case in enumerate(cases):
        sidecar = {"label_ml": {name.removeprefix("l"): value for name, value in case.items()}}
        (folder / f"p{number}_latent.json").write_text(json.dumps(sidecar))
    return [{"latent": str(folder / f"p{number}_latent.nii.gz")} for number in range(len(cases))]


def test_an_organ_that_no_mask_has_is_refused(tmp_path, caplog):
    organs = {"liver": {"label": 1, "range": [1, 2000]}, "body": {"label": 200, "range": [1, 9000]}}
    latents = latents_with(tmp_path, l1=[0.0, 0.0], l3=[0.0, 90.0], l200=[5000.0, 5000.0])
    with pytest.raises(InputError, match=r"liver \(1\), which none of the 2 .*; they have the labels \[3, 200\]: give"):
        check_organs(latents, organs)
    check_organs(latents, organs, "model.pt")  # which knows it, and has no other input
    assert "the weights learn nothing more of it" in caplog.text
    caplog.clear()
    check_organs(latents_with(tmp_path, l1=[0.0, 5.0], l200=[5000.0, 5000.0]), organs)
    check_organs([], organs)
    assert not caplog.records


def test_sizes_beyond_their_range_are_said(tmp_path, caplog):
    """Not the few that the shipped ranges leave out of the OpenKBP masks, 5 %."""
    organs = {"liver": {"label": 1, "range": [10, 60]}, "body": {"label": 200, "range": [1, 9000]}}
    sizes = [20.0] * 18 + [100.3] * 3
    check_organs(latents_with(tmp_path, l1=sizes[:20], l200=[50.0] * 20), organs)
    assert not caplog.records
    check_organs(latents_with(tmp_path, l1=[*sizes, 0.0], l200=[50.0] * 22), organs)
    (record,) = caplog.records
    words = "liver: 3 of 21 sizes lie beyond the range of organs, 10 to 60 ml, and count as its end; 95 % of the data's"
    assert record.getMessage().startswith(words + " lie within [20, 101]: give that")
    caplog.clear()
    check_organs(latents_with(tmp_path, l1=[100.0], l200=[50.0]), organs)
    assert "within [100, 101]" in caplog.text  # of one size no range


def batch_of(count: int) -> dict:
    return {
        "latent": torch.randn(count, 4, 2, 2, 2),
        "organ_sizes": torch.full((count, 10), 0.5),
        "draw": torch.arange(count),
    }


def test_sizes_are_dropped_one_by_one_at_a_rate_of_each_sample():
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, sample_method="uniform")
    batch = batch_of(400)
    sizes = MaskDiffusionBatch(scheduler, 1.0, 0, size_dropout=1.0)(batch, CPU)[3]["organ_sizes"]
    dropped = (sizes == UNKNOWN).float()
    assert set(sizes.unique().tolist()) == {0.5, UNKNOWN}
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.05)
    # A rate for each sample: the number dropped is uniform over 0..10, which one common rate would not give.
    assert dropped.sum(1).std().item() == pytest.approx(10**0.5, rel=0.1)
    kept = MaskDiffusionBatch(scheduler, 1.0, 0)(batch, CPU)[3]["organ_sizes"]
    assert torch.equal(kept, batch["organ_sizes"])
    one = {name: value[7:8] for name, value in batch.items()}
    alone = MaskDiffusionBatch(scheduler, 1.0, 0, size_dropout=1.0)(one, CPU)[3]["organ_sizes"]
    assert torch.equal(alone, sizes[7:8])


def test_noise_beyond_the_latest_is_not_trained_for():
    scheduler = RFlowScheduler(num_train_timesteps=1000, use_discrete_timesteps=False, sample_method="uniform")
    batch = batch_of(300)
    every = MaskDiffusionBatch(scheduler, 1.0, 0)(batch, CPU)[3]["timesteps"]
    early = MaskDiffusionBatch(scheduler, 1.0, 0, latest=0.6)(batch, CPU)[3]["timesteps"]
    assert early.max() <= 600 < every.max() and early.mean().item() == pytest.approx(300, abs=30)
    assert torch.equal(early[every <= 600], every[every <= 600])
    with pytest.raises(InputError, match=r"DDPMScheduler.*prior_components 0"):
        MaskDiffusionBatch(DDPMScheduler(), 1.0, 0, latest=0.6)
    for none in (0, 1.5):
        with pytest.raises(InputError, match=f"prior_until is {none}; allowed is a share of noise above 0"):
            MaskDiffusionBatch(scheduler, 1.0, 0, latest=none)


def samples_of(count: int, sizes: torch.Tensor) -> list[dict]:
    """Latents of noise whose second channel, in one corner, says how large the organ is."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, 4, 4, 4, generator=generator)
    latents[:, 1, :2, :2, :2] += 10 * sizes.reshape(-1, 1, 1, 1)
    return [{"latent": latent, "organ_sizes": size[None]} for latent, size in zip(latents, sizes, strict=True)]


def test_directions_tell_the_sizes_of_other_samples():
    sizes = torch.linspace(0, 1, 40)
    samples = samples_of(40, sizes)
    directions = size_directions(samples[::2], 2.0)
    assert directions.shape == (1, 4, 4, 4, 4)
    told = torch.stack([(one["latent"] * 2.0 * directions[0]).sum() for one in samples[1::2]])
    assert torch.corrcoef(torch.stack([told, sizes[1::2]]))[0, 1] > 0.95
    assert (told[-1] - told[0]).item() == pytest.approx((sizes[-1] - sizes[1]).item(), rel=0.3)


def test_directions_agree_with_ridge_regression():
    samples = samples_of(12, torch.linspace(0, 1, 12))
    x = np.stack([one["latent"].double().flatten().numpy() for one in samples])
    x, y = x - x.mean(0), np.linspace(0, 1, 12) - 0.5
    wanted = np.linalg.solve(x.T @ x / x.shape[1] + 0.1 * np.eye(x.shape[1]), x.T @ y) / x.shape[1]
    got = size_directions(samples, 1.0, ridge=0.1).flatten().double().numpy()
    assert np.allclose(got, wanted, atol=1e-5)


def test_organs_without_sizes_have_no_direction_and_latents_one_shape():
    samples = samples_of(3, torch.tensor([0.1, UNKNOWN, UNKNOWN]))
    assert size_directions(samples, 1.0).abs().max() == 0
    samples[1]["latent"] = torch.zeros(4, 4, 4, 8)
    with pytest.raises(InputError, match=r"shapes.*encode_mask"):
        size_directions(samples, 1.0)


def test_loss_of_sizes_against_numpy():
    prediction, target = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2)
    directions = torch.randn(5, 4, 2, 2, 2)
    loss = SizeVelocityLoss(directions, 0.7)
    apart = (prediction - target).double().numpy().reshape(3, -1)
    sizes = ((apart @ directions.double().numpy().reshape(5, -1).T) ** 2).sum(1).mean()
    assert loss(prediction, target).item() == pytest.approx((apart**2).mean() + 0.7 * sizes, rel=1e-4)
    assert loss.terms["size"].item() == pytest.approx(sizes, rel=1e-4)
    assert loss(target, target) == 0
