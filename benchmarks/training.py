"""Steps a second, voxels a second and the share of a step spent waiting for data, for the training of each stage.

python benchmarks/training.py --write                     # the bundles' own train.json on phantoms; minutes
python benchmarks/training.py --against CHECKOUT --write  # and another checkout's, in turns, with the ratios

The shipped small networks train on phantom volumes made on the fly; nothing of it is kept. Another checkout, such as a
worktree of an earlier commit, trains with its own package and its own bundles, by ``measure`` of its own script.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
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

    def __init__(self, engine: Engine, device: torch.device, factor: int) -> None:
        self.device, self.factor = device, factor
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
        scale = self.factor**3 if image.shape[1] > 1 else 1  # a latent has four channels, an image or mask has one
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
        # The latents are of the VAE, whatever autoencoder the stage itself is shipped with.
        overrides["autoencoder_ckpt_path"] = str(parts.ROOT / "bundles" / "maisi_vae" / "models" / "model.pt")
    if bundle == "maisi_controlnet":
        overrides["masks_dir"] = folder
    workflow = open_bundle(bundle, "train.json", **overrides)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    sidecars = [json.loads(path.read_text()) for path in (data / "latents").glob("*_latent.json")]
    factor = sidecars[0].get("factor", parts.FACTOR) if sidecars else parts.FACTOR
    clock = Clock(trainer, torch.device(device), factor)
    trainer.run()
    seconds, waits, voxels = (sum(column) for column in zip(*clock.steps[WARM_UP:], strict=True))
    counted = len(clock.steps) - WARM_UP
    return counted / seconds, voxels / seconds, waits / seconds, int(voxels / counted)


def encode(folder: str, device: str) -> None:
    """Write the latents that the later stages train on."""
    overrides = {"input": f"{folder}/*_ct.nii.gz", "output_dir": f"{folder}/latents", "multiple": 16}
    workflow = open_bundle("maisi_vae", "encode.json", **overrides, device=f"$torch.device({device!r})")
    workflow.run()


def in_checkout(checkout: Path, threads: int | None, function: str, *args: Any) -> Any:
    """Return what a function of another checkout's script returns, in an interpreter that sees that checkout alone.

    Raises:
        Failed: it raised.
    """
    code = f"import json, sys, training; print(json.dumps(training.{function}(*json.loads(sys.argv[1]))))"
    folders = [str(checkout / "benchmarks"), str(checkout / "tools")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(folders),
        "OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
    }
    command = [sys.executable, "-c", code, json.dumps(args)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise parts.Failed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:80])
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> list[str]:
    """Measure every stage; return the page's lines."""
    progress = parts.Progress()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_cases(Path(folder), options.size)
        run = {"fresh": False, "threads": options.threads}
        parts.in_own_process(encode, folder, options.device, **run)
        for bundle, name in options.stages.items():
            try:
                got = parts.in_own_process(measure, bundle, folder, options.size, options.steps, options.device, **run)
            except parts.Failed as error:
                rows.append([name, str(error), "", "", ""])
                progress(f"{name}: {error}")
                continue
            rows.append([name, *_cells(got), f"{got[3]:,}"])
            progress(f"{name}: {got[0]:.3g} steps/s")
    head = ["stage", "steps/s", "image voxels/s", "waiting for data", "image voxels a step"]
    return [*_described(options), "", parts.table(head, rows)]


def compare_checkouts(options: argparse.Namespace) -> list[str]:
    """Measure every stage of two checkouts in turns; return the page's lines, medians of the rounds."""
    progress = parts.Progress()
    checkouts = {"this": parts.ROOT, "other": options.against}
    found: dict[tuple[str, str], list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for which, checkout in checkouts.items():
            own = Path(folder) / which
            own.mkdir()
            make_cases(own, options.size)
            in_checkout(checkout, options.threads, "encode", str(own), options.device)
        for k in range(options.rounds):
            for bundle, name in options.stages.items():
                for which in list(checkouts)[:: 1 - 2 * (k % 2)]:  # the first one of a pair is the second of the next
                    args = [bundle, str(Path(folder) / which), options.size, options.steps, options.device]
                    got = in_checkout(checkouts[which], options.threads, "measure", *args)
                    shutil.rmtree(Path(folder) / which / bundle)  # its checkpoints, which a new run would not overwrite
                    found.setdefault((name, which), []).append(got)
                    progress(f"round {k + 1}, {name}, {which} checkout: {got[0]:.3g} steps/s")
    rows = []
    for name in options.stages.values():
        this, other = (
            [parts.median(column) for column in zip(*found[name, which], strict=True)] for which in checkouts
        )
        ratios = [one[0] / two[0] for one, two in zip(found[name, "this"], found[name, "other"], strict=True)]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        rows.append([name, f"{other[0]:.3g}", *_cells(this), f"{parts.median(ratios):.2f}", spread])
    head = ["stage", "steps/s before", "steps/s", "image voxels/s", "waiting for data", "ratio", "of single rounds"]
    commit = parts.commit(options.against)
    about = (
        f"- before: commit {commit}; {options.rounds} rounds, both checkouts in turns, each time a process of its own"
    )
    return [
        *_described(options),
        about,
        "- medians; the ratio is that of a round's steps/s",
        "",
        parts.table(head, rows),
    ]


def _cells(got: Sequence[float]) -> list[str]:
    return [f"{got[0]:.3g}", f"{got[1]:.3g}", f"{100 * got[2]:.1f} %"]


def _described(options: argparse.Namespace) -> list[str]:
    size = "x".join(map(str, options.size))
    lines = [f"- data: {CASES} phantoms of {size} voxels, {'x'.join(map(str, SPACING))} mm; device {options.device}"]
    return [*lines, f"- {options.steps} steps after {WARM_UP}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="counted steps of each stage (default 20)")
    parser.add_argument("--size", type=int, nargs=3, help="voxels of a phantom (default 96 96 96)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="computing threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="small phantoms, two steps: shows that everything works")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3, help="of --against (default 3)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES], help="bundles (default: all)")
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    options.steps = options.steps or (2 if options.quick else 20)
    options.size = options.size or ([32] * 3 if options.quick else [96] * 3)
    options.stages = {bundle: STAGES[bundle] for bundle in options.stages}
    if options.against:
        options.against = options.against.resolve()
        if not (options.against / "benchmarks" / "training.py").is_file():
            parser.error(f"--against is {options.against}; allowed is a checkout with benchmarks/training.py in it")
    logging.getLogger("monai").setLevel(logging.WARNING)
    about = parts.circumstances(options.threads)
    try:
        lines = compare_checkouts(options) if options.against else compare(options)
    except parts.Failed as error:
        raise SystemExit(str(error)) from None
    title = "# Training, steps a second" + (" against another commit" if options.against else "")
    page = [title, "", *about, *lines]
    print("\n".join(page))
    if options.write:
        print(f"written: {parts.write_page('training-against' if options.against else 'training', page)}")


if __name__ == "__main__":
    main()
