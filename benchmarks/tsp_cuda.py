"""Tensor splitting parallelism against MONAI's own ways, on a GPU: seconds, device memory, use of it. See README.md.

python benchmarks/tsp_cuda.py --out "$OUT"                                   # everything, within --budget seconds
python benchmarks/tsp_cuda.py --device cpu --sizes 32x32x32 --channels small    # the same code without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

import parts
from maisi_tools.files import replacing
from maisi_tools.tsp.inferer import TSPInferer

SIZES = "256x256x256,512x512x128,512x512x512,512x512x768"


@dataclass(frozen=True)
class Variant:
    """One way to run the network.

    Attributes:
        changes: to the released network's memory settings; None for a network without any.
        limit: TSP's memory limit; None is all that is free.
        largest: it is measured at the largest size only, unless it is asked for by name.
    """

    name: str
    kind: str
    changes: dict[str, Any] | None = None
    limit: str | None = None
    largest: bool = False


VARIANTS = (
    Variant("TSP", "tsp"),
    Variant("TSP 16GiB", "tsp", limit="16GiB", largest=True),
    Variant("TSP 8GiB", "tsp", limit="8GiB", largest=True),
    Variant("MONAI, 2 splits", "whole", {}),
    Variant("MONAI, 8 splits", "whole", {"num_splits": 8}),
    Variant("windows", "windows", {}),
)


@dataclass
class Row:
    """One measurement; bytes are the device's peaks, ``share`` is the part of the measured matmul peak."""

    direction: str
    size: str
    variant: str
    note: str = ""
    seconds: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    share: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    direction: str
    size: tuple[int, int, int]
    smallest: tuple[int, int, int]
    variant: Variant
    arguments: dict[str, Any]
    device: str
    dtype: str
    repeats: int
    reference: str


@contextlib.contextmanager
def _precision(task: Task) -> Iterator[None]:
    """Autocast for MONAI's ways, as the released script has it; TSP computes in its own ``dtype``."""
    if task.variant.kind == "tsp":
        yield
        return
    with torch.autocast(task.device, getattr(torch, task.dtype), enabled=task.dtype != "float32"):
        yield


def measure(task: Task) -> tuple[float, int, int, float]:
    """Return seconds (median), bytes allocated and reserved at most, and the difference to the reference's result.

    The result of the first variant at a size is the reference: every fourth voxel along each axis is compared.
    """
    arguments = task.arguments
    if task.variant.changes is not None:
        arguments = arguments | parts.released_settings(task.device) | task.variant.changes
    network = parts.autoencoder(arguments, task.device)

    def once(size: Sequence[int]) -> tuple[float, Tensor]:
        x = parts.volume(task.direction, size, task.arguments["latent_channels"]).to(task.device)
        tsp = TSPInferer(memory_limit=task.variant.limit, dtype=task.dtype) if task.variant.kind == "tsp" else None
        # As the released script has it: windows are computed on the GPU and joined in the host's memory, and a volume
        # is not padded where it is smaller than a window.
        roi = [min(n, most) for n, most in zip(x.shape[2:], parts.WINDOW[task.direction], strict=True)]
        windows = SlidingWindowInferer(roi, **parts.WINDOWS, sw_device=task.device, device="cpu")
        parts.synchronize(task.device)
        start = time.perf_counter()
        result = parts.call(network, task.direction, x, tsp, windows if task.variant.kind == "windows" else None)
        parts.synchronize(task.device)
        return time.perf_counter() - start, result

    with torch.inference_mode(), _precision(task):
        once(task.smallest)
        parts.reset_peaks(task.device)
        memory = parts.PeakMemory()
        seconds = []
        for _ in range(task.repeats):
            result: Tensor | None = None  # so that a run's peak does not hold the result before
            took, result = once(task.size)
            seconds.append(took)
    assert result is not None
    sample = result[..., ::4, ::4, ::4].float().cpu().numpy()
    if not Path(task.reference).exists():
        np.save(task.reference, sample)
    return (
        statistics.median(seconds),
        *parts.peaks(task.device, memory),
        float(np.abs(sample - np.load(task.reference)).max()),
    )


def matmul_peak(device: str, dtype: str) -> tuple[str, float]:
    """Return the device's name and the FLOP/s of a large matrix product, the best of ten; raises without CUDA."""
    name = parts.device_name(device)
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(12):
        parts.synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        parts.synchronize(device)
        best = min(best, (time.perf_counter() - start) / 5)
    return name, 2 * n**3 / best


def _size(text: str) -> tuple[int, int, int]:
    numbers = tuple(int(n) for n in text.split("x"))
    if len(numbers) != 3 or any(n < 1 or n % parts.FACTOR for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give three multiples of {parts.FACTOR}, such as 256x256x256")
    return numbers  # type: ignore[return-value]


def plan_rows(options: argparse.Namespace, sizes: Sequence[tuple[int, int, int]]) -> list[tuple[Row, Variant]]:
    """Return the measurements to make, the smallest sizes first: the budget may end before the largest."""
    named = options.variants.split(";") if options.variants else None
    rows = []
    for size, direction in itertools.product(sizes, options.directions.split(",")):
        for variant in VARIANTS:
            if named is not None and variant.name not in named:
                continue
            if named is None and variant.largest and size != sizes[-1]:
                continue
            rows.append((Row(direction, "x".join(map(str, size)), variant.name), variant))
    return rows


def run(options: argparse.Namespace, note: Callable[[str], None]) -> tuple[list[str], list[Row]]:
    """Measure; return the page's lines and the rows. ``note`` takes lines about the progress."""
    end = time.monotonic() + options.budget
    sizes = sorted(options.sizes, key=lambda size: size[0] * size[1] * size[2])
    name, peak = parts.in_own_process(matmul_peak, options.device, options.dtype, fresh=False)
    arguments = parts.settings(full=True, **({} if options.channels == "full" else parts.QUARTER))
    flop = {
        direction: parts.in_own_process(parts.flop_per_voxel, arguments, direction, fresh=False)
        for direction in options.directions.split(",")
    }
    lines = [
        f"- device: {name}; {options.dtype} matrix product {peak / 1e12:.1f} TFLOP/s",
        f"- network: {', '.join(f'{n / 1e6:.3f} MFLOP an image voxel to {name}' for name, n in flop.items())}",
        "",
    ]
    rows = plan_rows(options, sizes)
    with tempfile.TemporaryDirectory() as folder:
        for number, (row, variant) in enumerate(rows):
            left = end - time.monotonic()
            if left <= 0:
                row.note = "not run"
                continue
            size = _size(row.size)
            reference = str(Path(folder) / f"{row.direction}-{row.size}.npy")
            task = Task(
                row.direction,
                size,
                sizes[0],
                variant,
                arguments,
                options.device,
                options.dtype,
                options.repeats,
                reference,
            )
            try:
                # Forked, which saves seconds of imports; CUDA is only ever used in the forks.
                row.seconds, row.allocated, row.reserved, row.difference = parts.in_own_process(
                    measure, task, fresh=False, threads=options.threads, limit=left
                )
                row.share = flop[row.direction] * size[0] * size[1] * size[2] / row.seconds / peak
                note(f"{number + 1}/{len(rows)}: {row.direction} {row.size} {row.variant}: {row.seconds:.2f} s")
            except parts.Failed as error:
                row.note = str(error)
                note(f"{number + 1}/{len(rows)}: {row.direction} {row.size} {row.variant}: {row.note}")
            if options.out:  # after each row, so that what ends this early leaves what it has
                with replacing(options.out / "tsp-cuda.json") as part:
                    part.write_text(json.dumps([asdict(row) for row, _ in rows], indent=1) + "\n")
    return lines, [row for row, _ in rows]


def as_table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        first = [row.direction, row.size, row.variant]
        if row.seconds is None or row.allocated is None or row.reserved is None:
            cells.append([*first, row.note, "", "", "", ""])
            continue
        cells.append(
            [
                *first,
                f"{row.seconds:.2f}",
                f"{row.allocated / 2**30:.2f}",
                f"{row.reserved / 2**30:.2f}",
                f"{row.share:.3f}",
                f"{row.difference:.1e}",
            ]
        )
    head = ["", "image", "variant", "seconds", "allocated, GiB", "reserved, GiB", "of matmul peak", "difference"]
    return parts.table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help=f"image sizes (default {SIZES})")
    parser.add_argument("--variants", help=f"separated by ';' (default: all): {'; '.join(v.name for v in VARIANTS)}")
    parser.add_argument("--directions", default=",".join(parts.DIRECTIONS), help="decode, encode (default: both)")
    parser.add_argument(
        "--channels",
        choices=("full", "small"),
        default="full",
        help="of the released network, or a quarter",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default float16; on a CPU its fastest"
    )
    parser.add_argument("--threads", type=int, help="computing threads of the CPU (default: all cores)")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many is reported (default 3)")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which rows are not run (default 540)")
    parser.add_argument("--out", type=Path, help="folder for tsp-cuda.json and tsp-cuda.md (default: no files)")
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    try:
        options.sizes = [_size(text) for text in options.sizes.split(",")]
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(f"--sizes: {error}")
    if not set(options.directions.split(",")) <= set(parts.DIRECTIONS):
        parser.error(
            f"--directions: {options.directions!r}; give {' or '.join(parts.DIRECTIONS)}, or both with a comma"
        )
    options.dtype = options.dtype or parts.default_dtype(options.device)
    unknown = set((options.variants or VARIANTS[0].name).split(";")) - {variant.name for variant in VARIANTS}
    if unknown:
        parser.error(f"--variants: {', '.join(sorted(unknown))} is none of {'; '.join(v.name for v in VARIANTS)}")
    about = parts.circumstances(options.threads)
    try:
        lines, rows = run(options, parts.Progress())
    except parts.Failed as error:
        print(f"skipped: {error}")
        return
    page = ["# TSP against MONAI on a GPU", "", *about, *lines, as_table(rows)]
    print("\n".join(page))
    if options.out:
        with replacing(options.out / "tsp-cuda.md") as part:
            part.write_text("\n".join(page) + "\n")
    if options.write:
        print(f"written: {parts.write_page('tsp-cuda', page)}")


if __name__ == "__main__":
    main()
