from __future__ import annotations

import torch

from maisi_tools.training.autoencoder import AutoencoderBatch


def test_noise_belongs_to_the_sample_whatever_the_batch():
    prepare, device = AutoencoderBatch(seed=3, factor=4), torch.device("cpu")
    images = torch.rand(3, 1, 32, 32, 24)
    state = torch.get_rng_state()
    image, target, _, given = prepare({"image": images, "draw": torch.tensor([5, 6, 7])}, device)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, images) and torch.equal(target, images)
    noise = given["noise"]
    assert noise.shape == (3, 4, 8, 8, 6) and abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[0], noise[1])
    for i, draw in enumerate((5, 6, 7)):
        alone = prepare({"image": images[i : i + 1], "draw": torch.tensor([draw])}, device)[3]["noise"]
        assert torch.equal(alone[0], noise[i])
    other = AutoencoderBatch(seed=4, factor=4)({"image": images, "draw": torch.tensor([5, 6, 7])}, device)[3]["noise"]
    assert not torch.equal(other, noise)
    fine = AutoencoderBatch(seed=3, factor=2)({"image": images, "draw": torch.tensor([5, 6, 7])}, device)[3]["noise"]
    assert fine.shape == (3, 4, 16, 16, 12)
