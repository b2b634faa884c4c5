"""Steps a second, voxels a second and the share of a step spent waiting for data, for the training of each stage.

python benchmarks/training.py --write         # the bundles' own train.json on phantoms; minutes on two cores

The shipped small networks train on phantom volumes made on the fly; nothing of it is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from torchvision.models import squeezenet1_1

import parts
from maisi_tools.masks.phantom import flat_ct, make_phantom

SPACING = (4.0, 4.0, 3.0)
"""mm; a head and neck fills about 96 voxels along each axis."""
CASES = 2
WARM_UP = 2
"""Steps that are not counted: the first ones allocate memory and choose algorithms."""
STAGES = {"maisi_vae": "VAE", "maisi_ldm": "LDM", "maisi_controlnet": "ControlNet"}


def make_cases(folder: Path, size: Sequence[int]) -> None:
    """Write phantom CTs with flat tissues, their masks, and a datalist of them."""
    affine = np.diag([*SPACING, 1.0])
    items = []
    for seed in range(CASES):
        labels = make_phantom("head_neck", size=tuple(size), spacing=SPACING, seed=seed)
        ct = folder / f"p{seed}_ct.nii.gz"
        nib.save(nib.Nifti1Image(flat_ct(labels), affine), ct)
        nib.save(nib.Nifti1Image(labels, affine), folder / f"p{seed}_ct_mask.nii.gz")
        items.append({"image": str(ct)})
    (folder / "datalist.json").write_text(json.dumps({"training": items, "validation": items[:1]}))


def open_bundle(bundle: str, config: str, **overrides: Any) -> ConfigWorkflow:
    root = parts.ROOT / "bundles" / bundle
    workflow = ConfigWorkflow(
        config_file=str(root / "configs" / config),
        meta_file=str(root / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(root),
        **overrides,
    )
    workflow.initialize()
    return workflow


class Clock:
    """Times an engine's steps: from asking for a batch to the end of its iteration, and the wait for the batch."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.device = device
        self.steps: list[tuple[float, float, int]] = []
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._get)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._done)

    def _ask(self) -> None:
        self.asked = time.perf_counter()

    def _get(self) -> None:
        self.got = time.perf_counter()

    def _done(self, engine: Engine) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        image = (engine.state.output or {})["image"]  # type: ignore[index, call-overload]
        scale = parts.FACTOR**3 if image.shape[1] > 1 else 1  # a latent has four channels, an image or mask has one
        voxels = len(image) * image[0, 0].numel() * scale
        self.steps.append((time.perf_counter() - self.asked, self.got - self.asked, voxels))


def measure(bundle: str, folder: str, size: Sequence[int], steps: int, device: str) -> tuple[float, float, float, int]:
    """Train a stage; return steps a second, image voxels a second, data-loading share, and voxels of a step."""
    data = Path(folder)
    # One epoch, and no validation: its interval is longer than the run.
    overrides: dict[str, Any] = {
        "max_epochs": 1,
        "epoch_length": WARM_UP + steps,
        "val_interval": 2,
        "ckpt_dir": str(data / bundle),
        "device": f"$torch.device({device!r})",
        "tensorboard": False,
    }
    if bundle == "maisi_vae":
        torch.save(squeezenet1_1().state_dict(), data / "backbone.pth")  # random weights cost what trained ones do
        overrides |= {
            "datalist": str(data / "datalist.json"),
            "max_patch_size": list(size),
            "perceptual_backbone": str(data / "backbone.pth"),
            "adversarial_start": 0,
        }
    else:
        overrides["dataset_dir"] = str(data / "latents")
    if bundle == "maisi_controlnet":
        overrides["masks_dir"] = folder
    workflow = open_bundle(bundle, "train.json", **overrides)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    clock = Clock(trainer, torch.device(device))
    trainer.run()
    seconds, waits, voxels = (sum(column) for column in zip(*clock.steps[WARM_UP:], strict=True))
    counted = len(clock.steps) - WARM_UP
    return counted / seconds, voxels / seconds, waits / seconds, int(voxels / counted)


def encode(folder: str, device: str) -> None:
    """Write the latents that the later stages train on."""
    overrides = {"input": f"{folder}/*_ct.nii.gz", "output_dir": f"{folder}/latents", "multiple": 16}
    workflow = open_bundle("maisi_vae", "encode.json", **overrides, device=f"$torch.device({device!r})")
    workflow.run()


def compare(options: argparse.Namespace) -> list[str]:
    """Measure every stage; return the page's lines."""
    progress = parts.Progress()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_cases(Path(folder), options.size)
        run = {"fresh": False, "threads": options.threads}
        parts.in_own_process(encode, folder, options.device, **run)
        for bundle, name in STAGES.items():
            try:
                got = parts.in_own_process(measure, bundle, folder, options.size, options.steps, options.device, **run)
            except parts.Failed as error:
                rows.append([name, str(error), "", "", ""])
                progress(f"{name}: {error}")
                continue
            rows.append([name, f"{got[0]:.3g}", f"{got[1]:.3g}", f"{100 * got[2]:.1f} %", f"{got[3]:,}"])
            progress(f"{name}: {got[0]:.3g} steps/s")
    head = ["stage", "steps/s", "image voxels/s", "waiting for data", "image voxels a step"]
    size = "x".join(map(str, options.size))
    lines = [f"- data: {CASES} phantoms of {size} voxels, {'x'.join(map(str, SPACING))} mm; device {options.device}"]
    return [*lines, f"- {options.steps} steps after {WARM_UP}", "", parts.table(head, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="counted steps of each stage (default 20)")
    parser.add_argument("--size", type=int, nargs=3, help="voxels of a phantom (default 96 96 96)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="computing threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="small phantoms, two steps: shows that everything works")
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.quick else 20)
    options.size = options.size or ([32] * 3 if options.quick else [96] * 3)
    logging.getLogger("monai").setLevel(logging.WARNING)
    about = parts.circumstances(options.threads)
    try:
        lines = compare(options)
    except parts.Failed as error:
        raise SystemExit(str(error)) from None
    page = ["# Training, steps a second", "", *about, *lines]
    print("\n".join(page))
    if options.write:
        print(f"written: {parts.write_page('training', page)}")


if __name__ == "__main__":
    main()
