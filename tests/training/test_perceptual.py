"""LPIPS with a seeded random backbone: against MONAI's own loss, and every way to get, or not to get, the real one."""

from __future__ import annotations

import logging

import pytest
import torch

from maisi_tools.errors import InputError
from maisi_tools.training.perceptual import make_perceptual_loss

pytest.importorskip("lpips")
models = pytest.importorskip("torchvision.models")

NAME = "squeezenet1_1-b8a52dc0.pth"  # in torch's hub cache


@pytest.fixture
def backbone(tmp_path):
    path = tmp_path / "backbone.pth"
    torch.manual_seed(1)
    torch.save(models.squeezenet1_1().state_dict(), path)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "hub_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_equals_monais_loss_and_a_file_equals_the_cached_copy(backbone, hub):
    from monai.losses import PerceptualLoss

    (hub / NAME).write_bytes(backbone.read_bytes())
    theirs = PerceptualLoss(spatial_dims=3, network_type="squeeze", is_fake_3d=True, fake_3d_ratio=0.2)
    x, y = torch.rand(2, 1, 32, 40, 36), torch.rand(2, 1, 32, 40, 36)
    torch.manual_seed(5)
    expected = theirs(x, y)
    assert expected > 0
    for source in (backbone, None):
        ours = make_perceptual_loss(source, 0.2, "cpu")
        torch.manual_seed(5)  # of the slices drawn
        torch.testing.assert_close(ours(x, y), expected)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours(x, x) == 0
    x.requires_grad_()
    ours(x, y).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_no_backbone_warns_loudly_and_goes_on(hub, caplog):
    with caplog.at_level(logging.WARNING):
        assert make_perceptual_loss(None, 0.2, "cpu") is None
    assert "NO PERCEPTUAL LOSS" in caplog.text and "--perceptual_backbone" in caplog.text


@pytest.mark.parametrize("content", ["missing", "text", "other network"])
def test_a_wrong_file_is_refused(content, tmp_path):
    path = tmp_path / "wrong.pth"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "other network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(InputError, match="squeezenet1_1"):
        make_perceptual_loss(path, 0.2, "cpu")


def test_a_file_without_lpips_is_refused(backbone, monkeypatch):
    monkeypatch.setattr("maisi_tools.training.perceptual.INSTALLED", False)
    with pytest.raises(InputError, match=r"\[train\]"):
        make_perceptual_loss(backbone, 0.2, "cpu")
