"""Makes the small weights from a folder of CTs: `python recipes/small/run.py DATA --out RUNS`.

Stages, each by the bundle's own train.json or encode.json with an overlay that lies beside this file:

    prepare      data sets -> datalist; the patients of docs/held_out.json stay out of it
    masks        CTs and their labels -> completed masks, in the MAISI vocabulary
    autoencoder  CTs -> autoencoder at factor 2, from a linear start
    latents      CTs -> latents
    controlnet   latents and masks -> U-Net and ControlNet, trained together

A stage that is done is passed over, one that was cut off goes on. After the autoencoder and at any later moment the
weights are those of `RUNS/autoencoder/model.pt` and `RUNS/controlnet/{model,unet}.pt`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maisi_tools.atomic import write_json
from maisi_tools.errors import InputError, report_input_errors

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEAST_MINUTES = 5.0
"""Of a stage with a time budget: what is shorter does not see the data once."""


def run_maisi(*arguments: object) -> None:
    """Run the `maisi` command."""
    subprocess.run([sys.executable, "-m", "maisi_tools.cli", *map(str, arguments)], check=True)


def run_bundle(bundle: str, config: str, overlays: list[Path], settings: Mapping[str, Any]) -> None:
    """Run a config of a bundle with overlays on top."""
    root = ROOT / "bundles" / bundle
    files = [str(root / "configs" / config), *map(str, overlays)]
    given = [text for key, value in settings.items() for text in (f"--{key}", _as_text(value))]
    command = ["-m", "monai.bundle", "run", "--config_file", repr(files), "--bundle_root", str(root), *given]
    subprocess.run([sys.executable, *command], check=True, cwd=root)


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def prepare(data: Path, out: Path, split: Mapping[str, list[str]]) -> None:
    """Write `datalist.json`: patients to train on and to validate with, and none of those that are kept out."""
    write_json(out / "validation.json", {"held_out": split["validation"]})
    everyone = out / "everyone.json"
    run_maisi("prepare", data, "--output", everyone, "--label_map", "openkbp", "--held_out", out / "validation.json")
    kept_out = set(split["held_out"])
    lists = json.loads(everyone.read_text())
    for section in ("training", "validation"):
        lists[section] = [item for item in lists[section] if _patient(item) not in kept_out]
    if len(lists["training"]) < 2 or not lists["validation"]:
        raise InputError(
            f"{data} has {len(lists['training'])} patients to train on and {len(lists['validation'])} to validate "
            "with; allowed are at least 2 and 1: give more data, or another --split"
        )
    write_json(out / "datalist.json", lists)


def _patient(item: Mapping[str, Any]) -> str:
    return Path(item["image"]).name.split("_ct.")[0]


def main(arguments: list[str] | None = None) -> None:
    """Make all stages, see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of NAME_ct.nii.gz and NAME_seg.nii.gz, such as OpenKBP's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, for each stage that trains")
    parser.add_argument("--split", type=Path, default=ROOT / "docs" / "held_out.json")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and a few steps, to see that all of it runs"
    )
    given = parser.parse_args(arguments)
    if not (given.minutes >= LEAST_MINUTES or given.quick):
        raise InputError(f"--minutes is {given.minutes:g}; allowed are {LEAST_MINUTES:g} and more, which see all data")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    split = json.loads(given.split.read_text())
    quick = json.loads((HERE / "quick.json").read_text()) if given.quick else {}

    if not (out / "datalist.json").is_file():
        prepare(given.data.resolve(), out, split)
    masks = out / "masks"
    run_maisi("complete_masks", out / "datalist.json", "--output_dir", masks, "--label_map", "openkbp")
    autoencoder = out / "autoencoder" / "model.pt"
    if not autoencoder.is_file():
        settings = {
            "datalist": out / "datalist.json",
            "ckpt_dir": autoencoder.parent,
            "resume": True,
            "minutes": given.minutes,
        }
        run_bundle("maisi_vae", "train.json", [HERE / "autoencoder.json"], settings | quick.get("autoencoder", {}))
    latents = out / "latents"
    settings = {"input": masks / "cases.json", "output_dir": latents, "ckpt_path": autoencoder}
    run_bundle("maisi_vae", "encode.json", [HERE / "encode.json"], settings | quick.get("latents", {}))
    controlnet = out / "controlnet" / "model.pt"
    if not controlnet.is_file():
        settings = {
            "dataset_dir": latents,
            "held_out": out / "validation.json",
            "masks_dir": masks,
            "autoencoder_ckpt_path": autoencoder,
            "ckpt_dir": controlnet.parent,
            "resume": True,
            "minutes": given.minutes,
        }
        run_bundle("maisi_controlnet", "train.json", [HERE / "controlnet.json"], settings | quick.get("controlnet", {}))


if __name__ == "__main__":
    report_input_errors()
    main()
