"""Solvers of rectified flow: what each costs, and how far its CTs are from those of very many steps.

python benchmarks/solvers.py --masks masks --datalist datalist.json --segmentation model.pt --write

`masks` has the completed masks of the datalist's validation cases, as `maisi complete_masks` writes them. The bundle
`maisi_controlnet` makes a CT of each with every solver and number of steps, from the same noise, on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import MetaTensor, list_data_collate
from torch import Tensor

import parts
from maisi_tools.bundles.stage import Stage
from maisi_tools.datasets.datalist import read_datalist
from maisi_tools.errors import InputError
from maisi_tools.masks.label_maps import read_label_map
from maisi_tools.masks.phantom import make_phantom
from maisi_tools.metrics.conditioning import TISSUES, pair_masks, score_generated
from maisi_tools.metrics.segmentation import BundleSegmenter
from maisi_tools.volumes.inputs import find_inputs, stem_of
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.writing import write_sidecar

BUNDLE = parts.ROOT / "bundles" / "maisi_controlnet"
SEGMENTATION = parts.ROOT / "evaluation" / "segmentation" / "configs" / "inference.json"
SPACING = (5.2, 5.2, 3.5)
"""mm, of a phantom."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A solver with a number of steps."""

    solver: str
    steps: int

    @property
    def calls(self) -> int:
        """Of the networks, see :func:`maisi_tools.diffusion.samplers.sample`."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps


RUNS = (
    *(Run("euler", steps) for steps in (10, 15, 20, 30)),
    *(Run("heun", steps) for steps in (5, 8, 10)),
    *(Run("ab2", steps) for steps in (5, 8, 10, 15)),
)
REFERENCE_STEPS, QUICK_REFERENCE_STEPS = 100, 8
"""Of heun: 199 calls. As many Euler steps are no reference: Euler's error falls with the steps alone, so 200 have a
seventh of that of 30, as much as sets the second-order solvers apart."""
QUICK = (Run("euler", 2), Run("euler", 6), Run("heun", 3), Run("ab2", 6))


@dataclasses.dataclass
class Found:
    """What was measured of a run, one entry a mask."""

    mean: list[float] = dataclasses.field(default_factory=list)
    high: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def list_masks(options: argparse.Namespace, folder: Path) -> list[dict[str, str]]:
    """``image`` (mask) and, where a datalist has it, ``label`` (the labels it was completed from)."""
    if options.quick and options.masks is None:
        return [make_case(folder, seed) for seed in range(options.count)]
    if options.datalist:
        items = pair_masks(read_datalist(options.datalist, options.section), options.masks)
    else:
        items = find_inputs(options.masks, "image")
    if len(items) < options.count:
        raise InputError(
            f"{len(items)} masks found; --count asks for {options.count}: give more masks, or a lower --count"
        )
    wanted = {"image", "label"}
    chosen = [{key: path for key, path in item.items() if key in wanted} for item in items[: options.count]]
    if options.segmentation and any("label" not in item for item in chosen):
        raise InputError(
            "--segmentation needs the labels that the masks were completed from, in the network's numbering: add "
            "--datalist with `label` for each case"
        )
    return chosen


def make_case(folder: Path, seed: int) -> dict[str, str]:
    """Write a phantom's mask, and its organs in OpenKBP's numbering."""
    mask = make_phantom("head_neck", size=(32, 32, 32), spacing=SPACING, seed=seed)
    organs = np.zeros_like(mask)
    for number, label in read_label_map("openkbp").items():
        organs[mask == label] = number
    paths = {"image": folder / f"phantom_{seed}.nii.gz", "label": folder / f"phantom_{seed}_organs.nii.gz"}
    for array, path in zip((mask, organs), paths.values(), strict=True):
        nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([*SPACING, 1.0])), path)
    return {key: str(path) for key, path in paths.items()}


def measure(
    items: Sequence[Mapping[str, str]], runs: Sequence[Run], folder: Path, label_map: str
) -> tuple[dict[Run, Found], list[str]]:
    """Make every mask's CT by every run, the first of which is the reference; leave them in ``folder/SOLVER_STEPS``.

    All runs of a mask follow one another, the reference first, so that it is the one that pays for what is
    computed once a size.

    Returns:
        What was measured, and the sizes of the masks.
    """
    progress, sizes = parts.Progress(), []
    stage = Stage(BUNDLE, "inference.json", "cpu", {"progress": False}, label_map=label_map, output_dir=str(folder))
    inferer = stage.inferer.inferer
    found = {run: Found() for run in runs}
    for number, item in enumerate(items, start=1):
        mask = list_data_collate([stage.preprocessing({"image": item["image"]})])["image"]
        body = mask[0, 0].numpy() > 0
        sizes.append("x".join(map(str, body.shape)))
        reference = np.empty(0)
        for run in runs:
            inferer.solver, inferer.num_inference_steps = run.solver, run.steps
            start = time.process_time()
            ct = inferer(mask, stage.network)
            seconds = time.process_time() - start
            hu = in_hu(ct)
            reference = hu if run is runs[0] else reference
            off = np.abs(hu - reference)[body]
            found[run].mean.append(float(off.mean()))
            found[run].high.append(float(np.percentile(off, 95)))
            found[run].seconds.append(seconds)
            write_case(folder / name_of(run), stem_of(item["image"]), hu, mask)
            progress(f"mask {number} of {len(items)}, {run.solver} {run.steps}: {seconds:.1f} s, {off.mean():.2f} HU")
    return found, sizes


def in_hu(ct: Tensor) -> np.ndarray:
    """(1, 1, X, Y, Z) in [0, 1] -> (X, Y, Z) in HU."""
    low, high = HU_RANGE
    return low + (high - low) * ct[0, 0].clamp(0, 1).numpy()


def write_case(folder: Path, stem: str, hu: np.ndarray, mask: MetaTensor) -> None:
    """Write what :func:`score_generated` reads of a case."""
    folder.mkdir(exist_ok=True)
    affine = np.asarray(mask.affine).reshape(-1, 4, 4)[0]
    nib.save(nib.Nifti1Image(hu.round().astype(np.int16), affine), folder / f"{stem}_ct.nii.gz")
    nib.save(nib.Nifti1Image(mask[0, 0].numpy().astype(np.uint8), affine), folder / f"{stem}_mask.nii.gz")
    write_sidecar(folder / f"{stem}_ct.nii.gz", {})


def name_of(run: Run) -> str:
    return f"{run.solver}_{run.steps}"


def anatomy(
    items: Sequence[Mapping[str, str]], runs: Sequence[Run], folder: Path, segmentation: str | None
) -> dict[Run, dict[str, float]]:
    """Mean Dice of each run's CTs by structure, see :func:`maisi_tools.metrics.conditioning.conditioning_table`."""
    segmenter = BundleSegmenter(SEGMENTATION, segmentation) if segmentation else None
    tables = {run: score_generated(items, folder / name_of(run), segmenter) for run in runs}
    return {run: {row["structure"]: row["generated"] for row in table} for run, table in tables.items()}


def compare(options: argparse.Namespace) -> list[str]:
    """Measure every run; return the page's lines."""
    reference, others = Run("heun", options.reference), QUICK if options.quick else RUNS
    runs = (reference, *others)
    columns = (*TISSUES, "body", "all structures")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        items = list_masks(options, folder)
        own = {"fresh": False, "threads": options.threads}
        found, sizes = parts.in_own_process(measure, items, runs, folder, options.label_map, **own)
        dices = parts.in_own_process(anatomy, items, runs, folder, options.segmentation, **own)
    rows = []
    for run in (*others, reference):
        got, dice = found[run], dices[run]
        errors = [statistics.fmean(got.mean), max(got.mean), statistics.fmean(got.high)]
        rows.append(
            [
                f"{run.solver} {run.steps}" + (" (reference)" if run is reference else ""),
                str(run.calls),
                *(f"{error:.2f}" for error in errors),
                *(f"{dice[name]:.3f}" if name in dice else "-" for name in columns),
                f"{statistics.median(got.seconds):.2f}",
            ]
        )
    head = [
        "solver, steps",
        "calls",
        "HU error",
        "highest",
        "95th percentile",
        *TISSUES,
        "body",
        "structures",
        "CPU seconds",
    ]
    source = "phantoms" if options.quick and options.masks is None else "masks"
    return [
        f"- {source}: {len(items)}, of {', '.join(dict.fromkeys(sizes))} voxels; one seed",
        f"- segmentation network: {Path(options.segmentation).name if options.segmentation else 'none'}",
        "",
        parts.table(head, rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--masks", help="completed masks: with --datalist their folder; else a folder, glob or JSON list"
    )
    parser.add_argument("--datalist", help="cases with `image` (CT) and `label`, whose masks are measured")
    parser.add_argument("--section", default="validation", help="of the datalist (default validation)")
    parser.add_argument("--count", type=int, help="masks, the first of them (default 10)")
    parser.add_argument("--reference", type=int, help="steps of the reference, by heun (default 100)")
    parser.add_argument("--label_map", default="maisi", help="how the masks are to be read (default maisi)")
    parser.add_argument("--segmentation", help="weights of evaluation/segmentation; without them its column is empty")
    parser.add_argument("--threads", type=int, help="computing threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a phantom, few steps: shows that everything works")
    parser.add_argument("--write", action="store_true", help="write the dated page in benchmarks/results")
    options = parser.parse_args()
    if options.masks is None and not options.quick:
        parser.error("--masks is missing; give completed masks, or --quick for a phantom")
    options.count = options.count or (1 if options.quick else 10)
    options.reference = options.reference or (QUICK_REFERENCE_STEPS if options.quick else REFERENCE_STEPS)
    about = parts.circumstances(options.threads)
    try:
        lines = compare(options)
    except (InputError, parts.Failed) as error:
        raise SystemExit(str(error)) from None
    page = ["# Solvers of rectified flow, small weights", "", *about, *lines]
    print("\n".join(page))
    if options.write:
        print(f"written: {parts.write_page('solvers', page)}")


if __name__ == "__main__":
    main()
