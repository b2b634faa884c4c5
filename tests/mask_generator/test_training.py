"""Batches and loss of the mask autoencoder and the mask generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch.nn.functional import one_hot

from maisi_tools.errors import InputError
from maisi_tools.mask_generator.losses import MaskAutoencoderLoss, MaskBatch, class_of_label
from maisi_tools.mask_generator.sizes import UNKNOWN
from maisi_tools.mask_generator.training import MaskDiffusionBatch, OrganSizesd, size_directions
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


def test_loss_against_numpy():
    logits = torch.randn(2, 3, 4, 4, 4)
    target = torch.randint(0, 3, (2, 1, 4, 4, 4))
    mean, sigma = torch.randn(2, 4, 1, 1, 1), torch.rand(2, 4, 1, 1, 1) + 0.1
    loss = MaskAutoencoderLoss(0.01, [1, 2, 5])
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
    loss = MaskAutoencoderLoss(0.01, [1, 8])
    ranks = [loss(tuple(part[i : i + 1] for part in parts), target[i : i + 1]) for i in range(2)]
    assert loss(parts, target).item() == pytest.approx(sum(ranks).item() / 2, rel=1e-5)


def test_weights_of_classes_do_not_make_them_larger():
    """The best logits for a mixture of voxels are those of their frequencies, whatever the weights."""
    target = torch.zeros(1, 1, 10, 10, 10, dtype=torch.long)
    target[0, 0, :2] = 1
    loss = MaskAutoencoderLoss(0.0, [1, 8])
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
