"""From mask to CT on a GPU, full-size networks with random weights, end to end. See README.md.

python benchmarks/sampling_cuda.py --out "$OUT"                          # 512x512x128, within --budget seconds
python benchmarks/sampling_cuda.py --quick --device cpu                  # the same code without a GPU
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor

import mask_to_ct
import parts
from maisi_tools.files import replacing
from mask_to_ct import SetUp


@dataclass(frozen=True)
class Variant:
    """One way from mask to CT.

    Attributes:
        steps: of the solver; MONAI's classes take those of Euler.
        solver: of the bundle; None runs MONAI's classes.
        limit: the bundle's memory limit; None is all that is free.
    """

    name: str
    steps: int
    solver: str | None = None
    limit: str | None = None


@dataclass
class Row:
    """One measurement: seconds from mask to CT and for loading, the device's peaks in bytes, HU to the first row's."""

    variant: str
    note: str = "not run"
    seconds: float | None = None
    loading: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    greatest: float | None = None
    mean: float | None = None


def variants(shorter: int) -> list[Variant]:
    """Return the ways to compare; ``shorter`` divides the steps."""
    euler = mask_to_ct.RELEASED_STEPS // shorter
    solver, few = mask_to_ct.solver_of(mask_to_ct.shipped())
    few = -(-few // shorter)
    return [
        Variant(f"bundle, euler {euler}", euler, "euler"),
        Variant(f"bundle, small weights' default: {solver} {few}", few, solver),
        Variant(f"bundle, euler {euler}, 8GiB", euler, "euler", "8GiB"),
        Variant(f"MONAI, euler {euler}, windows", euler),
    ]


def measure(setup: SetUp, variant: Variant, device: str, dtype: str, reference: str) -> Row:
    """Load a variant's networks, run them on a small mask, then on the set-up's; the first one's CT is kept."""
    logging.getLogger("maisi_tools").setLevel(logging.ERROR)  # random weights draw organs that cannot be
    memory = parts.PeakMemory()
    start = time.perf_counter()
    if variant.solver is None:
        released = parts.released_settings(device)
        way = mask_to_ct.monais(
            setup, device, variant.steps, getattr(torch, dtype), lambda latent: _windows(latent, device), **released
        )
    else:
        settings: dict[str, Any] = {"solver": variant.solver, "num_inference_steps": variant.steps}
        way = mask_to_ct.ours(setup, device, dtype=dtype, memory_limit=variant.limit, **settings)
    parts.synchronize(device)
    loading = time.perf_counter() - start
    mask = setup.mask(device)
    way(MetaTensor(mask.as_tensor()[..., :32, :32, :32], affine=mask.affine))
    parts.reset_peaks(device)
    start = time.perf_counter()
    ct = way(mask)
    parts.synchronize(device)
    seconds = time.perf_counter() - start
    allocated, reserved = parts.peaks(device, memory)
    sample = ct[..., ::2, ::2, ::2].float().cpu()
    if not Path(reference).exists():
        np.save(reference, sample.numpy())
    apart = mask_to_ct.difference(sample, torch.from_numpy(np.load(reference)))
    return Row(variant.name, "", seconds, loading, allocated, reserved, *apart)


def _windows(latent: Tensor, device: str) -> SlidingWindowInferer:
    """The windows of the released script, computed on the device and joined in the host's memory."""
    roi = [min(n, most) for n, most in zip(latent.shape[2:], parts.WINDOW["decode"], strict=True)]
    return SlidingWindowInferer(roi, **parts.WINDOWS, sw_device=device, device="cpu")


def run(options: argparse.Namespace) -> list[Row]:
    """Measure; the rows so far are written after each one."""
    end = time.monotonic() + options.budget
    progress = parts.Progress()
    chosen = variants(10 if options.quick else 1)
    rows = [Row(variant.name) for variant in chosen]
    size, narrower = ((32, 32, 32), 8) if options.quick else ((512, 512, 128), 1)
    with tempfile.TemporaryDirectory() as folder:
        setup = parts.in_own_process(mask_to_ct.released, Path(folder), size, narrower, fresh=False)
        reference = str(Path(folder) / "reference.npy")
        for number, variant in enumerate(chosen):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                # Forked, which saves seconds of imports; CUDA is only ever used in the forks.
                given = (setup, variant, options.device, options.dtype, reference)
                rows[number] = parts.in_own_process(measure, *given, fresh=False, threads=options.threads, limit=left)
                progress(f"{number + 1}/{len(rows)}: {variant.name}: {rows[number].seconds:.2f} s")
            except parts.Failed as error:
                rows[number].note = str(error)
                progress(f"{number + 1}/{len(rows)}: {variant.name}: {error}")
            if options.out:
                with replacing(options.out / "sampling-cuda.json") as part:
                    part.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def as_table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        if row.seconds is None:
            cells.append([row.variant, row.note, *[""] * 5])
            continue
        figures = (row.seconds, row.loading, *((n or 0) / 2**30 for n in (row.allocated, row.reserved)))
        cells.append([row.variant, *(f"{n:.2f}" for n in figures), f"{row.greatest:.2g}", f"{row.mean:.2g}"])
    head = ["variant", "seconds", "loading, s", "allocated, GiB", "reserved, GiB"]
    return parts.table([*head, "greatest difference, HU", "mean difference, HU"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default float16; on a CPU its fastest"
    )
    parser.add_argument("--threads", type=int, help="computing threads of the CPU (default: all cores)")
    parser.add_argument("--budget", type=float, default=180, help="seconds after which rows are not run (default 180)")
    parser.add_argument("--quick", action="store_true", help="a tiny mask and networks: shows that everything works")
    parser.add_argument(
        "--out", type=Path, help="folder for sampling-cuda.json and sampling-cuda.md (default: no files)"
    )
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    options.dtype = options.dtype or parts.default_dtype(options.device)
    about = parts.circumstances(options.threads)
    try:
        device = parts.in_own_process(parts.device_name, options.device, fresh=False)
    except parts.Failed as error:
        print(f"skipped: {error}")
        return
    rows = run(options)
    size = "tiny networks" if options.quick else "released networks, mask 512x512x128"
    lines = [f"- device: {device}", f"- {size}; random weights; {options.dtype}", "", as_table(rows)]
    page = ["# From mask to CT on a GPU", "", *about, *lines]
    print("\n".join(page))
    if options.out:
        with replacing(options.out / "sampling-cuda.md") as part:
            part.write_text("\n".join(page) + "\n")
    if options.write:
        print(f"written: {parts.write_page('sampling-cuda', page)}")


if __name__ == "__main__":
    main()
