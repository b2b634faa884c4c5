"""Tensor splitting parallelism against MONAI's own ways, on the CPU: seconds, peak memory, difference. See README.md.

python benchmarks/tsp_cpu.py --write          # the comparison
python benchmarks/tsp_cpu.py --ones           # the seam check: a constant volume through the encoder
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer

import parts
from maisi_tools.tsp.errors import MemoryLimitError
from maisi_tools.tsp.inferer import TSPInferer
from maisi_tools.tsp.memory import parse_bytes
from maisi_tools.tsp.nodes import Rows
from maisi_tools.tsp.plan import Plan
from maisi_tools.weights import load_weights


@dataclass(frozen=True)
class Case:
    """One network at one size; ``size`` is the image's."""

    name: str
    direction: str
    size: tuple[int, int, int]
    arguments: dict[str, Any]

    def __str__(self) -> str:
        shape = [n // parts.FACTOR if self.direction == "decode" else n for n in self.size]
        given = "latent" if self.direction == "decode" else "image"
        channels = "/".join(map(str, self.arguments["num_channels"]))
        return f"{self.direction}, {self.name} ({channels}), {given} {'x'.join(map(str, shape))}"


@dataclass(frozen=True)
class Variant:
    """One way to run it, and what is wanted of it: the time as a part of MONAI's with one split.

    ``once``: it takes far longer than the others, so it is measured in the first round alone.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    tsp: dict[str, Any] | None = None
    windows: bool = False
    limited: bool = False
    once: bool = False
    time: float | None = None


REFERENCE = "MONAI, 1 split"
VARIANTS = (
    Variant(REFERENCE),
    Variant("MONAI, 4 splits", {"num_splits": 4}),
    Variant("windows", windows=True, once=True),
    Variant("TSP fp32", tsp={}, time=0.70),
    Variant("TSP fp32, 8 slabs", tsp={"splits": 8}),
    Variant("TSP bf16", tsp={"dtype": "bfloat16"}, time=0.45),
    Variant("TSP fp32, limit", tsp={}, limited=True, time=1.0),
)
LIMIT_OF_PEAK = 0.5
"""The memory limit, as a part of what TSP plans for itself without one."""


def cases(quick: bool) -> list[Case]:
    """Return what is measured: decoder and encoder of a half-width and of the released network."""
    full = parts.settings(full=True)
    half = full | {"num_channels": [n // 2 for n in full["num_channels"]]}
    tiny = full | {"num_channels": [8, 8, 16], "num_res_blocks": [1, 1, 1], "norm_num_groups": 4}
    networks = [("tiny", tiny, 12)] if quick else [("half width", half, 32), ("full width", full, 24)]
    return [
        Case(name, direction, (latent * parts.FACTOR,) * 3, arguments)
        for name, arguments, latent in networks
        for direction in parts.DIRECTIONS
    ]


def measure(case: Case, variant: Variant, limit: int | None, reference: str) -> tuple[float, int, float]:
    """Return seconds, peak bytes above import, and the largest difference to the result in the file ``reference``.

    The reference variant writes that file where it is not there yet.
    """
    memory = parts.PeakMemory()
    network = parts.autoencoder(case.arguments | variant.changes)
    x = parts.volume(case.direction, case.size, case.arguments["latent_channels"])
    tsp = None if variant.tsp is None else TSPInferer(**variant.tsp, memory_limit=limit)
    windows = None
    if variant.windows:
        windows = SlidingWindowInferer([n // 2 for n in x.shape[2:]], **parts.WINDOWS)
    with torch.inference_mode():
        start = time.perf_counter()
        result = parts.call(network, case.direction, x, tsp, windows)
        seconds = time.perf_counter() - start
    peak = memory.above_start()
    if variant.name == REFERENCE and not Path(reference).exists():
        np.save(reference, result.numpy())
    difference = float(np.abs(np.load(reference) - result.numpy()).max()) if Path(reference).exists() else float("nan")
    return seconds, peak, difference


def choose_limit(case: Case) -> tuple[int, int]:
    """Return the peak that TSP plans without a limit, and the least limit from half of that on which it can keep."""
    network = parts.autoencoder(case.arguments)
    x = parts.volume(case.direction, case.size, case.arguments["latent_channels"])

    def planned(limit: int) -> int:
        with torch.no_grad():
            return TSPInferer(memory_limit=limit).plan(x, getattr(network, case.direction)).peak

    peak = planned(2**60)
    for share in np.arange(LIMIT_OF_PEAK, 1, 0.05):
        try:
            planned(int(share * peak))
        except MemoryLimitError:
            continue
        return peak, int(share * peak)
    return peak, peak


def compare(options: argparse.Namespace) -> list[str]:
    """Measure all cases and variants; return the page's lines."""
    progress = parts.Progress()
    fresh = not options.quick  # a quick run only shows that everything works, so its processes are forked
    chosen = parts.chosen(VARIANTS, options.only)
    lines = [f"- memory reading: {parts.check_memory_reading(fresh)}", parts.rounds_line(chosen, options.rounds)]
    for case in cases(options.quick):
        planned, limit = parts.in_own_process(choose_limit, case, fresh=fresh, threads=1)
        with tempfile.TemporaryDirectory() as folder:
            measure_one = partial(_measure, case, limit, str(Path(folder) / "reference.npy"), fresh, options.threads)
            medians, failed = parts.in_turns(chosen, options.rounds, measure_one, partial(_tell, progress, case))
        lines += ["", f"## {str(case)[0].upper()}{str(case)[1:]}", "", _table(chosen, medians, failed, limit)]
        lines += ["", f"TSP plans for {planned / 1e6:.0f} MB without a limit; the limit is {limit / 1e6:.0f} MB."]
    return lines


def _measure(
    case: Case, limit: int, reference: str, fresh: bool, threads: int | None, variant: Variant
) -> tuple[float, ...]:
    limited = limit if variant.limited else None
    return parts.in_own_process(measure, case, variant, limited, reference, fresh=fresh, threads=threads)


def _tell(progress: parts.Progress, case: Case, what: str, got: tuple[float, ...] | str) -> None:
    if not isinstance(got, str):
        got = f"{got[0]:.2f} s, {got[1] / 1e6:.0f} MB, difference {got[2]:.1e}"
    progress(f"{case}, {what}: {got}")


def _table(chosen: Sequence[Variant], medians: dict[str, tuple[float, ...]], failed: dict[str, str], limit: int) -> str:
    rows = []
    for variant in chosen:
        if variant.name not in medians:
            rows.append([variant.name, failed.get(variant.name, "not run"), *[""] * 6])
            continue
        seconds, peak, difference = medians[variant.name]
        row = [variant.name, f"{seconds:.2f}", "", "", f"{peak / 1e6:.0f}", "", "", f"{difference:.1e}"]
        if REFERENCE in medians:
            row[2] = f"{seconds / medians[REFERENCE][0]:.2f}"
            row[5] = f"{peak / medians[REFERENCE][1]:.2f}"
            row[3] = parts.wanted(seconds / medians[REFERENCE][0], variant.time)
        if variant.limited:
            row[6] = f"<= {limit / 1e6:.0f} MB: {'yes' if peak <= limit else 'NO'}"
        rows.append(row)
    head = [
        "variant",
        "seconds",
        "of 1 split",
        "wanted",
        "peak RSS above import, MB",
        "of 1 split",
        "wanted",
        "max difference",
    ]
    return parts.table(head, rows)


def reach(arguments: dict[str, Any]) -> int:
    """Return how many image voxels away a voxel can still influence a latent voxel, statistics of norms aside."""
    far = 1  # the first convolution
    deepest = len(arguments["num_channels"]) - 1
    for level, blocks in enumerate(arguments["num_res_blocks"]):
        far += 2 * blocks * 2**level  # two 3x3x3 convolutions a block
        far += 2 * 2**level if level < deepest else 2**level  # downsampling, or the last convolution
    return far


@dataclass(frozen=True)
class Seams:
    """What the seam check found; steps are the largest changes from one row of the latent to the next."""

    seconds: float
    peak: int
    margin: int
    value: float
    at_boundaries: dict[int, float]
    elsewhere: list[float]
    across: float
    plan: str


def measure_ones(size: int, splits: int | None, limit: int, checkpoint: str) -> Seams:
    """Encode a volume of ones under a memory limit and look for steps at the slabs' boundaries."""
    memory = parts.PeakMemory()
    arguments = parts.settings()
    network = load_weights(parts.autoencoder(arguments), checkpoint).eval()
    tsp = TSPInferer(splits, memory_limit=limit, progress=True)
    with torch.inference_mode():
        x = torch.ones(1, 1, size, size, size)
        start = time.perf_counter()
        latent = parts.call(network, "encode", x, tsp)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
    peak = memory.above_start()
    assert tsp.report is not None
    plan = tsp.report.plan
    if not isinstance(plan, Plan):
        raise parts.Failed(f"--size {size} is computed at once, without a seam; give --splits or a larger one")
    axis = next(target.axis for done in plan.passes for target in done.targets if target.axis is not None)
    margin = -(-reach(arguments) // (size // latent.shape[2]))
    inner = latent[0][(slice(None), *(slice(margin, n - margin) for n in latent.shape[2:]))].double()
    if min(inner.shape) < 2:
        raise parts.Failed(f"--size {size} is too small: the border's influence reaches {margin} latent voxels in")
    along = inner.movedim(axis - 1, 0)  # the latent's channels are dimension 0 here
    steps = (along[1:] - along[:-1]).abs().flatten(1).amax(1).tolist()
    boundaries = _boundaries(plan, latent.shape[axis])
    at = {row: steps[row - margin - 1] for row in sorted(boundaries) if 0 <= row - margin - 1 < len(steps)}
    elsewhere = [step for row, step in enumerate(steps, margin + 1) if row not in at]
    spread = inner.flatten(1)
    return Seams(
        seconds,
        peak,
        margin,
        float(inner.abs().max()),
        at,
        elsewhere,
        float((spread.amax(1) - spread.amin(1)).max()),
        str(plan),
    )


def _boundaries(plan: Plan, rows: int) -> set[int]:
    """The latent rows at which a slab of any layer begins; a layer's row is mapped to the latent row it lies in."""
    found: set[int] = set()
    for done in plan.passes:
        for place, target in enumerate(done.targets):
            starts: list[Rows] = [step.rows[place] for step in done.steps if step.rows[place] is not None]  # type: ignore
            found |= {round(first * rows / target.rows) for first, _ in starts if first}
    return found


def seam_check(options: argparse.Namespace) -> list[str]:
    """Run the seam check; return the page's lines."""
    limit = parse_bytes(options.memory_limit)
    checkpoint = str(parts.ROOT / "bundles" / "maisi_vae" / "models" / "model.pt")
    fresh = not options.quick
    lines = [f"- memory reading: {parts.check_memory_reading(fresh)}"]
    found: Seams = parts.in_own_process(
        measure_ones, options.size, options.splits, limit, checkpoint, fresh=fresh, threads=options.threads
    )
    epsilon = float(np.finfo(np.float32).eps) * found.value
    rows = [
        ["volume", f"{options.size}^3 ones, shipped encoder, fp32"],
        ["seconds", f"{found.seconds:.1f}"],
        ["peak RSS above import, MB", f"{found.peak / 1e6:.0f}"],
        ["memory limit, MB", f"{limit / 1e6:.0f}: {'yes' if found.peak <= limit else 'NO'}"],  # type: ignore[operator]
        ["latent rows next to the border left out", str(found.margin)],
        ["slab boundaries looked at", str(len(found.at_boundaries))],
        ["largest step across a boundary", f"{max(found.at_boundaries.values(), default=float('nan')):.1e}"],
        ["largest step elsewhere", f"{max(found.elsewhere, default=float('nan')):.1e}"],
        ["largest minus smallest value of a channel", f"{found.across:.1e}"],
        ["one rounding of the largest value", f"{epsilon:.1e}"],
    ]
    lines += ["", parts.table(["seam check", "value"], rows), ""]
    shown = list(found.at_boundaries.items())
    lines += [parts.table(["boundary at latent row", "step"], [[str(row), f"{step:.1e}"] for row, step in shown]), ""]
    return [*lines, "```", found.plan, "```"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured (default 3)")
    parser.add_argument("--only", help="parts of the names of the variants to measure, separated by ';'")
    parser.add_argument("--threads", type=int, help="computing threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, once: shows that everything works")
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    parser.add_argument("--ones", action="store_true", help="the seam check instead: a constant volume of ones")
    parser.add_argument("--size", type=int, help="edge of the volume of ones (default 512)")
    parser.add_argument("--memory-limit", help="memory limit of the seam check (default 8GiB)")
    parser.add_argument("--splits", type=int, help="slabs of each layer of the seam check (default 32; 0 plans them)")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    options.size = options.size or (96 if options.quick else 512)
    options.memory_limit = options.memory_limit or ("200MiB" if options.quick else "8GiB")
    if options.splits is None:  # planned slabs of the first layers are so thin that one begins in every latent row
        options.splits = 6 if options.quick else 32
    options.splits = options.splits or None
    about = parts.circumstances(options.threads)
    try:
        lines = seam_check(options) if options.ones else compare(options)
    except parts.Failed as error:
        raise SystemExit(str(error)) from None
    title = "TSP, seam check" if options.ones else "TSP against MONAI on the CPU"
    page = [f"# {title}", "", *about, *lines]
    print("\n".join(page))
    if options.write:
        print(f"written: {parts.write_page('tsp-seams' if options.ones else 'tsp-cpu', page)}")


if __name__ == "__main__":
    main()
