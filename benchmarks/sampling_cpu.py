"""From mask to CT on the CPU: MONAI's classes in the released scripts' loop, and the bundle. See README.md.

python benchmarks/sampling_cpu.py --write     # the shipped weights, and the released networks at half width
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

import mask_to_ct
import parts
from maisi_tools.autocast import fastest_dtype
from maisi_tools.bundles.footprint import footprints
from mask_to_ct import SetUp

LIMIT_OF_PEAK = 0.5
"""The memory limit, as a part of what the bundle plans for itself without one."""


@dataclass(frozen=True)
class Variant:
    """One way from mask to CT, and what is wanted of it.

    Attributes:
        steps: of the solver; MONAI's classes take those of Euler.
        solver: of the bundle; None runs MONAI's classes.
        windows: MONAI's decoder runs in windows.
        limited: the bundle runs under a memory limit.
        guided: the bundle's guidance is on; MONAI's classes have none.
        dtype: that the bundle computes in; None for that of the weights.
        once: it takes far longer than the others, so it is measured in the first round alone.
        time: the part of MONAI's time that it may take.
        apart: HU that no voxel may be further from MONAI's.
    """

    name: str
    steps: int
    solver: str | None = None
    windows: bool = False
    limited: bool = False
    guided: bool = False
    dtype: str | None = None
    once: bool = False
    time: float | None = None
    apart: float | None = None


class Figures(NamedTuple):
    """What a run gives: seconds from mask to CT and for loading, bytes above import, HU to MONAI's CT."""

    seconds: float
    loading: float
    peak: float
    greatest: float
    mean: float


def variants(shorter: int = 1) -> list[Variant]:
    """Return the ways to compare, the reference first; the small weights' solver and steps come from their config.

    One computes in bfloat16, where the CPU does.

    Args:
        shorter: divides the steps.
    """
    euler = mask_to_ct.RELEASED_STEPS // shorter
    solver, few = mask_to_ct.solver_of(mask_to_ct.shipped())
    few = -(-few // shorter)
    half = fastest_dtype("cpu")
    faster = [Variant(f"bundle, {solver} {few}, {half}", few, solver, dtype=half)] if half != "float32" else []
    return [
        Variant(f"MONAI, euler {euler}", euler),
        Variant(f"MONAI, euler {euler}, windows", euler, windows=True, once=True),
        Variant(f"bundle, as shipped: {solver} {few}, guided", few, solver, guided=True),
        Variant(f"bundle, {solver} {few}", few, solver, time=0.15),
        *faster,
        Variant(f"bundle, euler {euler}", euler, "euler", time=0.40, apart=1.0),
        Variant(f"bundle, euler {euler}, limit", euler, "euler", limited=True),
    ]


def measure(setup: SetUp, variant: Variant, limit: int, reference: str) -> Figures:
    """Load a variant's networks and run them once; the first one's CT becomes the file ``reference``."""
    logging.getLogger("maisi_tools").setLevel(logging.ERROR)  # random weights draw organs that cannot be
    mask = setup.mask()
    memory = parts.PeakMemory()
    start = time.perf_counter()
    if variant.solver is None:
        way = mask_to_ct.monais(setup, steps=variant.steps, windows=_windows if variant.windows else None)
    else:
        settings: dict[str, Any] = {"solver": variant.solver, "num_inference_steps": variant.steps}
        settings |= {"memory_limit": limit if variant.limited else None, "dtype": variant.dtype}
        settings |= {} if variant.guided else {"guidance_scale": 0.0}
        if variant.solver == "euler":  # as MONAI's loop, which makes every step
            settings["last_step"] = 0.0
        way = mask_to_ct.ours(setup, **settings)
    loaded = time.perf_counter()
    ct = way(mask)
    done = time.perf_counter()
    peak = memory.above_start()
    if not Path(reference).exists():
        np.save(reference, ct.numpy())
    apart = mask_to_ct.difference(ct, torch.from_numpy(np.load(reference)))
    return Figures(done - loaded, loaded - start, peak, *apart)


def _windows(latent: Tensor) -> SlidingWindowInferer:
    """Windows of half the latent's edges, as the released script has them otherwise."""
    return SlidingWindowInferer([n // 2 for n in latent.shape[2:]], **parts.WINDOWS)


def choose_limit(setup: SetUp) -> tuple[int, int]:
    """Return the largest peak that a stage plans without a limit, and the least limit above half of it that will do."""

    def peak(limit: int | None) -> int | None:
        plans = [found.plan for found in footprints(setup.configs, setup.size, memory_limit=limit)]
        return None if None in plans else max(plan.peak for plan in plans if plan is not None)

    free = peak(None)
    assert free is not None
    limits = [int(share * free) for share in np.arange(LIMIT_OF_PEAK, 1, 0.05)] + [free]
    return free, limits[bisect_left(limits[:-1], True, key=lambda limit: peak(limit) is not None)]


def compare(options: argparse.Namespace) -> list[str]:
    """Measure all set-ups and variants; return the page's lines."""
    progress = parts.Progress()
    fresh = not options.quick  # a quick run only shows that everything works, so its processes are forked
    reference, *others = variants(10 if options.quick else 1)
    every = [reference, *parts.chosen(others, options.only)]
    lines = [f"- memory reading: {parts.check_memory_reading(fresh)}", parts.rounds_line(every, options.rounds)]
    run = {"fresh": fresh, "threads": options.threads}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.networks.split(",")):
            chosen = [one for one in every if name == "small" or not one.guided]  # as the released ones are shipped
            if options.quick and name != "small":  # each way works with the small weights; here, what has to agree
                chosen = [one for one in chosen if one is reference or one.apart is not None]
            setup = parts.in_own_process(_set_up, name, folder, options.quick, **run)
            limited = any(one.limited for one in chosen)
            planned, limit = parts.in_own_process(choose_limit, setup, **run) if limited else (0, 0)
            file = str(Path(folder) / f"reference{number}.npy")

            def once(variant: Variant, setup: SetUp = setup, limit: int = limit, file: str = file) -> Figures:
                return parts.in_own_process(measure, setup, variant, limit, file, **run)

            def told(what: str, got: tuple[float, ...] | str, setup: SetUp = setup) -> None:
                if not isinstance(got, str):
                    seconds, loading, peak, greatest, mean = got
                    got = f"{seconds:.2f} s (loading {loading:.2f} s), {peak / 1e6:.0f} MB, {greatest:.3g} HU apart"
                progress(f"{setup}, {what}: {got}")

            medians, failed = parts.in_turns(chosen, options.rounds, once, told)
            lines += ["", f"## {str(setup)[0].upper()}{str(setup)[1:]}", "", _table(chosen, medians, failed), ""]
            if limited:
                lines.append(
                    f"The bundle plans for {planned / 1e6:.0f} MB without a limit; the limit is {limit / 1e6:.0f} MB, "
                    "which holds for one network at a time: the weights of the others come on top."
                )
    return lines


def _set_up(name: str, folder: str, quick: bool) -> SetUp:
    if name == "small":
        return mask_to_ct.shipped((32, 32, 32)) if quick else mask_to_ct.shipped()
    return (
        mask_to_ct.released(Path(folder), (32, 32, 32), 8)
        if quick
        else mask_to_ct.released(Path(folder), (128, 128, 64), 2)
    )


def _table(chosen: Sequence[Variant], medians: dict[str, tuple[float, ...]], failed: dict[str, str]) -> str:
    rows = []
    for variant in chosen:
        if variant.name not in medians:
            rows.append([variant.name, failed.get(variant.name, "not run"), *[""] * 8])
            continue
        got = Figures(*medians[variant.name])
        row = [variant.name, f"{got.seconds:.2f}", "", "", f"{got.loading:.2f}", f"{got.peak / 1e6:.0f}", ""]
        if chosen[0].name in medians:
            whole = Figures(*medians[chosen[0].name])
            row[2] = f"{got.seconds / whole.seconds:.2f}"
            row[3] = parts.wanted(got.seconds / whole.seconds, variant.time)
            row[6] = f"{got.peak / whole.peak:.2f}"
        rows.append([*row, f"{got.greatest:.2g}", parts.wanted(got.greatest, variant.apart), f"{got.mean:.2g}"])
    head = ["variant", "seconds", "of MONAI", "wanted", "loading, s", "peak RSS above import, MB", "of MONAI"]
    return parts.table([*head, "greatest difference, HU", "wanted", "mean difference, HU"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="small,half", help="small, half (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is measured (default 3)")
    parser.add_argument("--only", help="parts of the names of variants to measure beside the first, separated by ';'")
    parser.add_argument("--threads", type=int, help="computing threads (default: all cores)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny masks and networks, once: shows that everything works"
    )
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    if not set(options.networks.split(",")) <= {"small", "half"}:
        parser.error(f"--networks: {options.networks!r}; give small or half, or both with a comma")
    if options.quick:
        options.rounds = 1
    about = parts.circumstances(options.threads)
    try:
        lines = compare(options)
    except parts.Failed as error:
        raise SystemExit(str(error)) from None
    page = ["# From mask to CT on the CPU", "", *about, *lines]
    print("\n".join(page))
    if options.write:
        print(f"written: {parts.write_page('sampling-cpu', page)}")


if __name__ == "__main__":
    main()
