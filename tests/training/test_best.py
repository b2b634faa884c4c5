from __future__ import annotations

from types import SimpleNamespace

import torch

from maisi_tools.training.best import BestWeights
from maisi_tools.weights import load_weights


def validate(handler, network, value):
    """One validation that ends with this value of the key metric; the network's weights tell it apart."""
    torch.nn.init.constant_(network.weight, value)
    handler(SimpleNamespace(state=SimpleNamespace(key_metric_name="psnr_body", metrics={"psnr_body": value})))


def kept(path):
    return load_weights(torch.nn.Linear(2, 1, bias=False), path).weight[0, 0].item()


def test_the_best_of_a_run_is_kept_also_over_an_interruption(tmp_path):
    path, network = tmp_path / "model_best.pt", torch.nn.Linear(2, 1, bias=False)
    first = BestWeights(path, network, resume=False)
    for value, best in ((20.0, 20), (25.0, 25), (24.0, 25), (float("nan"), 25)):
        validate(first, network, value)
        assert kept(path) == best
    resumed = BestWeights(path, network, resume=True)
    for value, best in ((22.0, 25), (26.0, 26)):
        validate(resumed, network, value)
        assert kept(path) == best
    validate(BestWeights(path, network, resume=False), network, 3.0)  # a new run starts anew
    assert kept(path) == 3
    assert torch.load(path, weights_only=True)["psnr_body"] == 3
    validate(BestWeights(path, network, resume=False, extra={"shared": {"classes": [0, 1]}}), network, 4.0)
    assert torch.load(path, weights_only=True)["shared"] == {"classes": [0, 1]}
