"""An edit of a large CT: how long its parts take, and how much memory.

A scan of a phantom is written once; then a lesion of 30 mm is put into its liver by the bundle's edit.json, in a
process of its own. A first row does the same to a scan of a quarter of the slices: what grows with the scan is
reading, checking and writing; what is drawn is a crop of one size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import list_data_collate

import parts
from maisi_tools.bundles.stage import Stage
from maisi_tools.masks.phantom import flat_ct, make_phantom
from maisi_tools.volumes.writing import write_volume

BUNDLE = parts.ROOT / "bundles" / "maisi_controlnet"
SPACING = (0.8, 0.8, 0.8)
COARSE = 4
"""The phantom is drawn on a grid so much coarser; its voxels are repeated."""

DIAMETER_MM = 30.0
LESION = "hepatic tumor"


def write_scan(folder: Path, size: Sequence[int]) -> dict[str, str]:
    """Write a phantom's CT, with noise as an acquired one has, and its mask."""
    coarse = make_phantom("torso", [n // COARSE for n in size], [mm * COARSE for mm in SPACING])
    labels = coarse.repeat(COARSE, 0).repeat(COARSE, 1).repeat(COARSE, 2)
    random, hu = np.random.default_rng(0), flat_ct(labels)
    for plane in range(hu.shape[2]):
        hu[:, :, plane] += np.rint(random.normal(0, 15, hu.shape[:2])).astype(np.int16)
    affine = np.diag([*SPACING, 1.0])
    name = "x".join(map(str, size))
    paths = {"image": folder / f"{name}.nii.gz", "mask": folder / f"{name}_seg.nii.gz"}
    write_volume(paths["image"], hu, affine, np.int16)
    write_volume(paths["mask"], labels, affine, np.uint8)
    return {key: str(path) for key, path in paths.items()}


def measure(item: dict[str, str], folder: Path, diameter: float) -> dict[str, float]:
    """Seconds of the parts, voxels that were drawn, and the process's peak memory in GB."""
    own: dict[str, Any] = {"output_dir": str(folder / "out"), "edits": {"insert": {LESION: diameter}}}
    stage = Stage(BUNDLE, ["inference.json", "edit.json"], "cpu", {"progress": False}, **own)
    with torch.no_grad():  # kernels are chosen, and weights reordered, once
        stage.network(torch.zeros(1, 1, 32, 32, 32))
    memory = parts.PeakMemory()
    start = time.perf_counter()
    cropped = stage.preprocessing(item)
    read = time.perf_counter()
    batch = list_data_collate([cropped])
    pred = stage.inferer(batch["image"], stage.network)
    drawn = time.perf_counter()
    stage.postprocessing({**cropped, "pred": pred[0]})
    written = time.perf_counter()
    return {
        "read": read - start,
        "draw": drawn - read,
        "write": written - drawn,
        "peak": memory.above_start() / 1e9,
        "crop": float(np.prod(cropped["image"].shape[1:])),
    }


def compare(options: argparse.Namespace) -> list[str]:
    """Edit both scans; return the page's lines."""
    size = [64, 64, 128] if options.quick else [512, 512, 900]
    progress, rows = parts.Progress(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for slices in (size[2] // 4 // COARSE * COARSE, size[2]):
            whole = (size[0], size[1], slices)
            item = write_scan(folder, whole)
            own = {"fresh": False, "threads": options.threads}
            diameter = DIAMETER_MM / 3 if options.quick else DIAMETER_MM
            found = parts.in_own_process(measure, item, folder, diameter, **own)
            name = "x".join(map(str, whole))
            progress(f"{name}: {found['draw']:.1f} s drawn, {found['read']:.1f} s read, {found['write']:.1f} s written")
            figures = [f"{found[key]:.1f}" for key in ("read", "draw", "write")]
            rows.append([name, f"{found['crop'] / 1e6:.1f}", *figures, f"{found['peak']:.2f}"])
    head = ["scan", "crop, million voxels", "read, check, edit the mask: s", "draw: s", "write: s", "peak, GB"]
    return [
        "# A lesion put into a large CT",
        "",
        *parts.circumstances(options.threads),
        f"- edit: {LESION} of {DIAMETER_MM:g} mm, small weights, steps and solver as shipped; "
        f"voxels of {' x '.join(f'{mm:g}' for mm in SPACING)} mm",
        "",
        parts.table(head, rows),
        "",
        "Peak: resident memory above what is resident with the networks loaded. Files are compressed (.nii.gz).",
    ]


def main() -> None:
    """Measure, print, and with --write keep the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny scans, whose figures mean nothing")
    parser.add_argument("--write", action="store_true", help="write the page to benchmarks/results")
    options = parser.parse_args()
    lines = compare(options)
    print("\n".join(lines))
    if options.write:
        print(parts.write_page("editing-cpu", lines))


if __name__ == "__main__":
    main()
