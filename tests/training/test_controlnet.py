from __future__ import annotations

import contextlib
import json
from copy import deepcopy

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from maisi_tools.errors import InputError, find_input_error
from maisi_tools.networks import file_of_unet, load_controlled
from maisi_tools.training.controlnet import FitMaskd, check_labels, check_network, start_from_unet, train_parts
from maisi_tools.training.patches import RandLatentCropd
from maisi_tools.volumes.grid import latent_affine


def item(mask_size, latent_size, sidecar_size=None, image_affine=None, mask_affine=None):
    mask = torch.randint(1, 200, (1, *mask_size), dtype=torch.uint8)
    mask[0, 0, 0, 0] = 200  # body
    affine = latent_affine(np.eye(4) if image_affine is None else image_affine, 4)
    return {
        "mask": MetaTensor(mask, affine=mask_affine, meta={"filename_or_obj": "case_mask.nii.gz"}),
        "latent": MetaTensor(
            torch.zeros(4, *latent_size),
            affine=torch.as_tensor(affine),
            meta={"sidecar": {"size": list(sidecar_size or mask_size), "factor": 4}},
        ),
    }


@pytest.mark.parametrize(
    ("mask_size", "latent_size"),
    [((10, 12, 7), (3, 3, 2)), ((10, 12, 7), (4, 4, 4)), ((8, 4, 12), (2, 1, 3)), ((1, 1, 1), (1, 2, 3))],
)
def test_mask_is_padded_by_its_edge_at_the_end(mask_size, latent_size):
    data = item(mask_size, latent_size)
    fitted = FitMaskd("mask", "latent")(data)["mask"]
    widths = [(0, 4 * have - want) for have, want in zip(latent_size, mask_size, strict=True)]
    assert np.array_equal(fitted.numpy(), np.pad(data["mask"].numpy(), [(0, 0), *widths], mode="edge"))


def test_mask_follows_a_ct_that_was_resampled_and_cropped():
    image_affine = np.diag([0.5, 1.0, 1.0, 1.0])
    image_affine[:3, 3] = [3.0 - 0.25, 2.0, 1.0]  # twice the resolution along x, from voxel (3, 2, 1) of the mask on
    data = item((10, 12, 7), (3, 2, 1), sidecar_size=(10, 8, 4), image_affine=image_affine)
    fitted = FitMaskd("mask", "latent")(data)["mask"]
    wanted = data["mask"].numpy()[:, 3:8, 2:10, 1:5].repeat(2, axis=1)
    assert np.array_equal(fitted.numpy(), np.pad(wanted, [(0, 0), (0, 2), (0, 0), (0, 0)], mode="edge"))


def test_a_mirrored_mask_has_its_own_placeholders_exchanged(tmp_path):
    """Those that its JSON names, as `maisi complete_masks` writes it; OpenKBP's 18 and 20 where there is none."""
    data = item(
        (4, 4, 4),
        (1, 1, 1),
        image_affine=np.diag([-1.0, 1, 1, 1]),
        mask_affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])),
    )
    data["mask"].meta["filename_or_obj"] = str(tmp_path / "a_mask.nii.gz")
    data["mask"][0, :, 0, 0] = torch.tensor([129, 130, 18, 20])
    data["mask"][0, 0, 1, 1] = 200
    assert FitMaskd("mask", "latent")(data)["mask"][0, :, 0, 0].tolist() == [129, 130, 20, 18]
    (tmp_path / "a_mask.json").write_text('{"twins": [[129, 130], [130, 129]]}')
    assert FitMaskd("mask", "latent")(data)["mask"][0, :, 0, 0].tolist() == [130, 129, 18, 20]


def test_a_mask_without_body_is_refused():
    """Drawing adds it, so that weights would be shown what they never saw."""
    data = item((8, 4, 12), (2, 1, 3))
    data["mask"][data["mask"] == 200] = 0
    with pytest.raises(InputError, match=r"case_mask.nii.gz has no body \(200\).*`maisi complete_masks`"):
        FitMaskd("mask", "latent")(data)


@pytest.mark.parametrize(("size", "shift"), [((10, 12, 5), 0), ((7, 12, 10), 0), ((10, 12, 7), 4), ((10, 12, 7), -4)])
def test_mask_of_another_volume_is_refused(size, shift):
    moved = np.eye(4)
    moved[1, 3] = shift
    with pytest.raises(InputError, match=r"case_mask\.nii\.gz .* does not cover .*\(10, 12, 7\).*; encode the CT"):
        FitMaskd("mask", "latent")(item(size, (3, 3, 2), sidecar_size=(10, 12, 7), mask_affine=torch.as_tensor(moved)))


@pytest.fixture
def unet_file(tiny_unet, tmp_path):
    """A checkpoint with other weights than `tiny_controlled` has, and a U-Net of these weights."""
    unet = deepcopy(tiny_unet)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"unet_state_dict": unet.state_dict(), "scale_factor": 1.0}, tmp_path / "unet.pt")
    return tmp_path / "unet.pt", unet


def test_first_output_is_that_of_the_unet(tiny_controlled, unet_file):
    path, unet = unet_file
    network = start_from_unet(tiny_controlled, path)
    assert network is tiny_controlled
    x, t, mask = torch.randn(2, 4, 4, 4, 4), torch.tensor([3.0, 900.0]), torch.randint(0, 256, (2, 1, 16, 16, 16))
    given = {"spacing_tensor": torch.rand(2, 3), "class_labels": torch.tensor([1, 8])}
    with torch.no_grad():
        expected = unet(x, t, **given)
        assert expected.std() > 0.1
        torch.testing.assert_close(network(mask, x, t, **given), expected)


def test_controlnet_starts_as_the_encoder_half(tiny_controlled, unet_file):
    path, unet = unet_file
    initial = {name: value.clone() for name, value in tiny_controlled.controlnet.state_dict().items()}
    control, source = start_from_unet(tiny_controlled, path).controlnet.state_dict(), unet.state_dict()
    copied = {name for name in control if name in source and source[name].shape == control[name].shape}
    assert all(torch.equal(control[name], source[name]) for name in copied)
    for part in ("conv_in", "time_embed.0", "class_embedding", "down_blocks.1.attentions", "middle_block.attention"):
        assert any(name.startswith(part) for name in copied), part
    kept = set(control) - copied
    assert all(torch.equal(control[name], initial[name]) for name in kept)
    # Only what the U-Net does not have: the mask's embedding, zero convolutions, projections of a wider embedding.
    assert all(name.startswith("controlnet_") or "time_emb_proj" in name for name in kept)


def test_a_file_of_both_lends_its_unet_alone(tiny_controlled, unet_file, tmp_path):
    alone, _ = unet_file
    start = {name: value.clone() for name, value in tiny_controlled.state_dict().items()}
    wanted = {name: value.clone() for name, value in start_from_unet(tiny_controlled, alone).state_dict().items()}
    changed = {name: value + 1 if name.startswith("controlnet.") else value for name, value in wanted.items()}
    tiny_controlled.load_state_dict(start)
    torch.save(changed, tmp_path / "both.pt")
    found = start_from_unet(tiny_controlled, tmp_path / "both.pt").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_file_of_both_is_loaded_for_both(tiny_controlled, unet_file, tmp_path):
    """What a training left, in the place of a released ControlNet's file."""
    alone, unet = unet_file
    both = {name: value + 1 for name, value in tiny_controlled.state_dict().items()}
    torch.save({"model": both}, tmp_path / "both.pt")
    control = {
        name.removeprefix("controlnet."): value for name, value in both.items() if name.startswith("controlnet.")
    }
    torch.save({"model": control}, tmp_path / "control.pt")
    for file, wanted in (("both.pt", both["unet.conv_in.conv.weight"]), ("control.pt", unet.conv_in.conv.weight)):
        found = load_controlled(tiny_controlled, tmp_path / file, alone).state_dict()
        assert torch.equal(found["unet.conv_in.conv.weight"], wanted)
        assert all(torch.equal(found[f"controlnet.{name}"], value) for name, value in control.items())
        of_unet = file_of_unet(tmp_path / file, alone)  # whose scale factor is that of the latents
        assert of_unet == (tmp_path / file if file == "both.pt" else alone)


def test_weights_of_another_network_are_refused(tiny_controlled, tmp_path):
    torch.save({"model": {"conv_in.conv.weight": torch.zeros(8, 4, 3, 3, 3)}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="do not fit DiffusionUNet"):
        start_from_unet(tiny_controlled, tmp_path / "other.pt")


def test_labels_that_are_merged_away_are_refused():
    check_labels([1, 26], {}, {}, label_weights={"26": 100}, contrast_labels={"26": 1})
    check_labels(None, {}, {}, label_weights={"26": 100})
    check_labels([26], None, {}, label_weights={"26": 100})
    with pytest.raises(InputError, match=r"contrast_labels has 23, 26, but keep_labels .* allowed are 1, 2: add them"):
        check_labels([1, 2], {}, {}, label_weights={1: 100}, contrast_labels={"26": 1, "23": 28})


def test_labels_may_have_names_and_what_is_none_is_refused():
    check_labels([1, 26], {}, {}, label_weights={"hepatic tumor": 100}, contrast_labels=["26", "Liver"])
    with pytest.raises(InputError, match=r"label_weights has 1, but keep_labels"):
        check_labels([26], {}, {}, label_weights={"liver": 100})
    for keep in ([1, 2], None):
        for wrong in ("lung", "300", 133):
            with pytest.raises(InputError, match=f"^contrast_labels: {wrong!r} is no label; allowed are"):
                check_labels(keep, {}, {}, contrast_labels=[1, wrong])
    with pytest.raises(InputError, match=r"labels \[300, 'liver'\] to keep or to merge into are not in the vocabulary"):
        check_labels([1, 300, "liver"], {}, {})
    with pytest.raises(InputError, match=r"labels \['skull'\] to keep or to merge into"):
        check_labels([1], {"bone": "skull"}, {})


def test_labels_that_become_body_are_named(tmp_path, caplog):
    """Own classes beside a list of the small weights'; what merges into a group's label is not lost."""
    for name, labels in (("a", [0, 1, 26, 92, 120, 200]), ("b", [0, 26, 120, 200])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"labels": labels}))
    masks = [{"mask": str(tmp_path / f"{name}.nii.gz")} for name in ("a", "b", "of the user's own")]
    latents = {"training": masks[:2], "validation": masks[1:]}
    check_labels([120, 200], {"bone": 120}, latents)
    assert "1 (liver, in 1 of 3 masks), 26 (hepatic tumor, in 2 of 3 masks); to have it learn" in caplog.text
    assert "--keep_labels '[1, 26, 120, 200]'" in caplog.text
    caplog.clear()
    check_labels([1, 26, 120, 200], {"bone": 120}, latents)
    check_labels(None, {}, latents)
    assert not caplog.text


def test_what_a_contrast_puts_in_a_labels_place_is_kept_too(repo_root):
    parser = ConfigParser()
    parser.read_config(str(repo_root / "bundles" / "maisi_controlnet" / "configs" / "train.json"))
    place = next(i for i, line in enumerate(parser["initialize"]) if "check_labels" in str(line))
    for keep, lost in (([1, 26, 200], False), ([26, 200], True)):
        parser["keep_labels"], parser["contrast_labels"], parser["latents"] = keep, {"26": 1}, {}
        with pytest.raises(RuntimeError) if lost else contextlib.nullcontext() as refused:
            parser.get_parsed_content(f"initialize#{place}")
        assert not lost or "contrast_labels has 1, but keep" in str(find_input_error(refused.value))


def test_a_contrast_that_the_loss_does_not_make_is_refused(repo_root):
    """At the start, and not where loss and labels go together, as in train.json."""
    plain = {"_target_": "maisi_tools.training.losses.WeightedVelocityLoss", "power": 2}
    for labels, loss, refused in (({}, plain, False), ({"26": 1}, None, False), ({"26": 1}, plain, True)):
        parser = ConfigParser()
        parser.read_config(str(repo_root / "bundles" / "maisi_controlnet" / "configs" / "train.json"))
        place = next(i for i, line in enumerate(parser["initialize"]) if "check_labels" in str(line))
        parser["keep_labels"], parser["contrast_labels"], parser["latents"] = [1, 26, 200], labels, {}
        parser["loss"] = loss or parser["loss"]
        with pytest.raises(RuntimeError) if refused else contextlib.nullcontext() as raised:
            parser.get_parsed_content(f"initialize#{place}")
        said = "contrast_labels is given, and loss is WeightedVelocityLoss, which makes no contrast; allowed is"
        assert not refused or said in str(find_input_error(raised.value))


def test_a_network_that_the_latents_do_not_fit_is_refused(tiny_controlled, tmp_path):
    """A mask embedding of another factor, and latents that its two levels cannot see whole, before a step is made."""
    plain, cropped = Compose([]), Compose([Compose([RandLatentCropd(["latent", "mask"], 4, [2] * 3, [2] * 3, 2)])])
    lists: dict = {"training": [], "validation": []}
    check_network(tiny_controlled, 4, lists, plain)
    with pytest.raises(InputError, match=r"latents have factor 2 .*, the ControlNet's mask embedding 4; .*: 2 numbers"):
        check_network(tiny_controlled, 2, lists, plain)
    for name, size in (("even", (4, 6, 2)), ("odd", (4, 5, 2))):
        path = tmp_path / f"{name}_latent.nii.gz"
        nib.save(nib.Nifti1Image(np.zeros((*size, 4), np.float32), np.eye(4)), path)
        (tmp_path / f"{name}_latent.json").write_text(json.dumps({"factor": 4, "size": [4 * n for n in size]}))
    even, odd = ([{"latent": str(tmp_path / f"{name}_latent.nii.gz")}] for name in ("even", "odd"))
    words = r"odd_latent.nii.gz has 4 x 5 x 2 cells; .* multiples of 2 .*: encode again with --multiple 8"
    for training, validation, preprocessing in ((odd, even, plain), (even, odd, plain), (even, odd, cropped)):
        with pytest.raises(InputError, match=words):
            check_network(tiny_controlled, 4, {"training": training, "validation": validation}, preprocessing)
    check_network(tiny_controlled, 4, {"training": even, "validation": even}, plain)
    check_network(tiny_controlled, 4, {"training": odd, "validation": even}, cropped)


def test_the_unet_learns_together_with_its_controlnet_or_stays_frozen(tiny_controlled):
    assert start_from_unet(tiny_controlled, None) is tiny_controlled
    mask, latent = torch.randint(0, 256, (1, 1, 16, 16, 16)), torch.randn(1, 4, 4, 4, 4)
    for train_unet in (True, False):
        network = train_parts(tiny_controlled, train_unet, started=True)
        network.zero_grad()
        network(mask, latent, torch.tensor([3.0])).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in network.controlnet.parameters())
        assert all((p.grad is not None) == train_unet for n, p in network.unet.named_parameters() if "conv" in n)
    with pytest.raises(InputError, match="unet_ckpt_path is null and train_unet false"):
        train_parts(tiny_controlled, False, started=False)


def test_gradients_of_a_unet_that_learns_are_those_of_the_sum(tiny_controlled):
    """By finite differences, along a random direction of the U-Net's weights, in double precision."""
    network = train_parts(tiny_controlled.double(), True, started=True)
    for parameter in network.controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    latent, embedding = torch.randn(1, 4, 4, 4, 4).double(), torch.randn(1, 8, 4, 4, 4).double()
    step = {name: torch.randn_like(p) for name, p in network.unet.named_parameters()}

    def value(eps: float) -> torch.Tensor:
        moved = {f"unet.{n}": p + eps * step[n] for n, p in network.unet.named_parameters()}
        call = (latent, embedding, torch.tensor([500.0]).double())
        return torch.func.functional_call(Denoise(network), {f"network.{n}": p for n, p in moved.items()}, call)

    value(0.0).backward()
    slope = sum((p.grad * step[n]).sum() for n, p in network.unet.named_parameters() if p.grad is not None)
    with torch.no_grad():
        expected = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


class Denoise(torch.nn.Module):
    """``denoise`` as a module's forward, squared and averaged."""

    def __init__(self, network) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args):
        return self.network.denoise(*args).square().mean()
