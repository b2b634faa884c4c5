"""Puts single-line faults into the package and says which of them the mirrored tests let through. No part of the suite.

    nice python tests/mutants.py                # all; a fault a line, "killed" or "SURVIVED"
    nice python tests/mutants.py masks/ body    # those whose file or lines hold one of these words
    nice python tests/mutants.py --list         # runs nothing

Each fault gets a copy of the package and a process of its own, forked from one that has imported MONAI already. A line
that the code no longer has is "stale": correct it here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
"""A test run that takes longer is ended; the fault counts as killed."""


class Mutant(NamedTuple):
    """A fault: in a file of the package, `line` becomes `fault`; the tests are those of the file unless named."""

    file: str
    line: str
    fault: str
    tests: tuple[str, ...] = ()

    @property
    def run(self) -> list[str]:
        """The tests that mirror the file, relative to the repository."""
        path = Path(self.file)
        return [f"tests/{one}" for one in self.tests] or [f"tests/{path.parent}/test_{path.stem}.py"]


SAMPLERS, INFERERS = ("diffusion/test_samplers.py",), ("diffusion/test_inferers.py",)
CODES = ("masks/test_codes.py",)

MUTANTS = [
    # what is read
    Mutant("volumes/checks.py", "if low >= -1 and high <= 1:", "if low > -1 and high <= 1:"),
    Mutant("volumes/checks.py", "if low >= 0 and high <= 255:", "if low >= 0 and high <= 254:"),
    Mutant("volumes/checks.py", "<= value <= high * (1 + 1e-4)", "<= value <= high * (1 + 1e-2)"),
    Mutant("volumes/checks.py", "slack = 0.1 * step", "slack = 1.1 * step"),
    Mutant(
        "volumes/checks.py", "if not 0 < number < math.inf:", "if not 0 <= number < math.inf:", ("test_weights.py",)
    ),
    Mutant("volumes/grid.py", "matrix[:3, 3] = (factors - 1) / 2", "matrix[:3, 3] = factors / 2"),
    Mutant(
        "volumes/grid.py",
        'ResizeWithPadOrCrop(size, mode="constant", value=0)',
        'ResizeWithPadOrCrop(size, mode="edge")',
    ),
    Mutant("volumes/grid.py", "(ratio / 2 - 0.5)", "(ratio / 2)"),
    Mutant("volumes/grid.py", "if shift < 0.1 * min(spacing[:2]):", "if shift < 1.0 * min(spacing[:2]):"),
    Mutant("volumes/normalise.py", "MR_PERCENTILES = (0.0, 99.5)", "MR_PERCENTILES = (0.0, 100.0)"),
    Mutant("volumes/series.py", "MAX_GAP_DEVIATION = 0.01", "MAX_GAP_DEVIATION = 0.12", ("volumes/test_series.py",)),
    Mutant("volumes/series.py", "THINNEST_HU, MAX_THINNER_SHARE = -1300.0", "THINNEST_HU, MAX_THINNER_SHARE = -2500.0"),
    Mutant("volumes/series.py", "& (values > values.min())", "& (values >= values.min())"),
    Mutant("volumes/series.py", ".all() and slope > 0)", ".all() and slope != 0)"),
    Mutant("volumes/latents.py", '"scale_factor": 1.0,', '"scale_factor": 2.0,'),
    Mutant("volumes/writing.py", "np.clip(np.rint(exact)", "np.clip(np.floor(exact)"),
    Mutant(
        "weights.py", "have if response.status == 206 and continues else 0", "have if response.status == 206 else 0"
    ),
    Mutant("weights.py", "if given.shape != value.shape", "if given.numel() != value.numel()"),
    Mutant("files.py", "value = value.float() if value.is_floating_point() else value", "value = value"),
    # networks and diffusion
    Mutant("networks.py", "mean + noise * sigma", "mean + noise * sigma**2"),
    Mutant("networks.py", "x.new_zeros(batch, width) if given is None", "x.new_ones(batch, width) if given is None"),
    Mutant("networks.py", "samples = [one + more", "samples = [one - more"),
    Mutant(
        "diffusion/conditions.py", "bottom[REGIONS.index(self.region[-1])]", "bottom[REGIONS.index(self.region[0])]"
    ),
    Mutant("diffusion/conditions.py", "torch.tensor(self.spacing) * scale", "torch.tensor(self.spacing)"),
    Mutant("diffusion/conditions.py", '"mri": 8,', '"mri": 9,'),
    Mutant(
        "diffusion/conditions.py", "torch.zeros_like(value) if name in names", "torch.ones_like(value) if name in names"
    ),
    Mutant("diffusion/noise.py", "-spacing * (size - 1) / 2", "-spacing * size / 2"),
    Mutant("diffusion/noise.py", "STRIDE = 1_000_003", "STRIDE = 1"),
    Mutant("diffusion/samplers.py", "(length / before[1] / 2)", "(length / before[1])"),
    Mutant("diffusion/samplers.py", "math.prod(noise.shape[2:])", "math.prod(noise.shape[1:])"),
    Mutant(
        "diffusion/samplers.py",
        "    torch.randn(noise.shape, generator=generator, device=noise.device)\n",
        "",
        SAMPLERS + INFERERS,
    ),
    Mutant("diffusion/samplers.py", "change - (1 - parallel) * along", "change - along", SAMPLERS),
    Mutant(
        "diffusion/samplers.py", "/ scheduler.num_train_timesteps <= high", "/ scheduler.num_train_timesteps < high"
    ),
    Mutant(
        "diffusion/samplers.py",
        "next_alpha = scheduler.final_alpha_cumprod if",
        "next_alpha = scheduler.alphas_cumprod[0] if",
    ),
    Mutant("diffusion/inferers.py", 'self.multiple, "replicate")', 'self.multiple, "constant")'),
    Mutant("diffusion/inferers.py", "other, t, self.control_scale, **without)", "other, t, 0.0, **without)"),
    Mutant("diffusion/inferers.py", "embedding, t, self.control_scale, **tensors)", "embedding, t, 1.0, **tensors)"),
    Mutant("diffusion/inferers.py", "region_of(condition.unique()", "region_of(padded.unique()"),
    Mutant("diffusion/inferers.py", "torch.where(labels == 0, torch.zeros_like(ct), ct)", "ct"),
    Mutant("diffusion/redraws.py", "len(listed) < kept[2]", "len(listed) <= kept[2]"),
    Mutant("mask_generator/sizes.py", "LEEWAY = 0.75", "LEEWAY = 0.5"),
    # slabs
    Mutant("tsp/plan.py", "work = held + size if node.cost else 0", "work = 0"),
    Mutant("tsp/plan.py", "work = held + size if node.cost else 0", "work = size if node.cost else 0"),
    Mutant("tsp/plan.py", "now += (b - a) * node.row_bytes", "now += 0"),
    Mutant("tsp/plan.py", "if (node, rows) not in gone and node in alive:", "if node in alive:"),
    Mutant("tsp/plan.py", "+ step.work * in_flight", "+ step.work"),
    Mutant("tsp/plan.py", 'flights = 1 if device_type == "cpu" else 2', "flights = 1"),
    Mutant("tsp/plan.py", "alive[node] -= (rows[1] - rows[0]) * node.row_bytes", "pass"),
    Mutant("tsp/plan.py", "max(a, fetched.get(node, 0))", "a"),
    Mutant("tsp/plan.py", "self.flop += (b - a) * node.row_flop", "self.flop += node.row_flop"),
    Mutant("tsp/ranks.py", "dist.ReduceOp.MIN", "dist.ReduceOp.MAX"),
    Mutant("tsp/rules/attention.py", 'or given["is_causal"]', "", ("tsp/test_rules.py",)),
    Mutant("tsp/rules/attention.py", 'scale=given["scale"]', "scale=None", ("tsp/test_rules.py",)),
    Mutant("tsp/rules/windows.py", 'not given["count_include_pad"] or', "", ("tsp/test_rules.py",)),
    Mutant(
        "tsp/rules/windows.py",
        'or given["divisor_override"] is not None',
        'and given["divisor_override"] is not None',
        ("tsp/test_rules.py",),
    ),
    Mutant("tsp/rules/norms.py", 'or given["training"] or given["running_mean"] is None', "", ("tsp/test_rules.py",)),
    # training
    Mutant("training/diffusion.py", "(chance[3] >= self.mask_dropout)", "(chance[0] >= self.mask_dropout)"),
    Mutant("training/diffusion.py", "(chance[4] >= self.control_dropout)", "(chance[3] >= self.control_dropout)"),
    Mutant(
        "training/diffusion.py",
        "torch.where(chance[2] < self.modality_dropout",
        "torch.where(chance[1] < self.modality_dropout",
    ),
    Mutant("training/diffusion.py", "torch.where(labels >= 9, 8, labels)", "torch.where(labels > 9, 8, labels)"),
    Mutant("training/diffusion.py", 'size=latent.shape[2:], mode="area"', 'size=latent.shape[2:], mode="nearest"'),
    Mutant("training/diffusion.py", "1 / (snr + 1)", "1 / snr"),
    Mutant("training/diffusion.py", "share == 1", "share > 0"),
    Mutant("training/diffusion.py", "own - mean) ** 2 * count * n / (count + n)", "own - mean) ** 2 * n"),
    Mutant(
        "training/loaders.py",
        "seed_of(self.seed, STEP, engine.state.iteration, self.stream.rank)",
        "seed_of(self.seed, STEP, engine.state.iteration)",
    ),
    Mutant("training/loaders.py", "seed_of(self.seed, ORDER, epoch)", "seed_of(self.seed, ORDER)"),
    Mutant("training/losses.py", "(target >= lowest) & (target <= highest)", "(target > lowest) & (target < highest)"),
    Mutant("training/losses.py", "variance = sigma.pow(2)", "variance = sigma"),
    Mutant("training/losses.py", "max_pool3d(region, 3, stride=1, padding=1)", "max_pool3d(region, 1, stride=1)"),
    Mutant("training/losses.py", "inside.clamp_max(limit)", "inside"),
    Mutant(
        "training/steps.py", "_foreach_lerp_(means, trained, momentum)", "_foreach_lerp_(means, trained, 1 - momentum)"
    ),
    Mutant("training/steps.py", "max(self.momentum, 9 / (step + 10))", "self.momentum"),
    Mutant("training/steps.py", "-(-iterations // accumulation_steps)", "(iterations // accumulation_steps)"),
    Mutant(
        "training/budget.py",
        "min(time.perf_counter() - self.asked, self.longest_step)",
        "(time.perf_counter() - self.asked)",
    ),
    Mutant("training/views.py", "drawn.uniform(-self.shift_hu, self.shift_hu)", "drawn.uniform(0, self.shift_hu)"),
    Mutant("training/controlnet.py", "np.linalg.det(affine[:3, :3]) < 0", "np.linalg.det(affine[:3, :3]) > 0"),
    Mutant(
        "training/controlnet.py",
        'pad(image.as_tensor()[None], widths, mode="replicate")',
        "pad(image.as_tensor()[None], widths)",
    ),
    # masks
    Mutant("masks/body.py", "SKIN_HU = -300.0", "SKIN_HU = -450.0"),
    Mutant("masks/body.py", "MARGIN_MM = 20.0", "MARGIN_MM = 14.0"),
    Mutant("masks/body.py", "CLOSING_MM = 60.0", "CLOSING_MM = 40.0"),
    Mutant("masks/body.py", "AIR_HU = -400.0", "AIR_HU = -250.0"),
    Mutant("masks/body.py", "BONE_HU = 250.0", "BONE_HU = 350.0"),
    Mutant("masks/body.py", "LUNG_HU = (-950.0, -500.0)", "LUNG_HU = (-950.0, -600.0)"),
    Mutant("masks/body.py", "SMALLEST_PART = 0.05", "SMALLEST_PART = 0.2"),
    Mutant(
        "masks/edits.py",
        "shift_mm * direction / np.linalg.norm(direction) / mm",
        "shift_mm * direction / np.linalg.norm(direction)",
    ),
    Mutant("masks/edits.py", "np.count_nonzero(inside) * zoom**3", "np.count_nonzero(inside) * zoom**2"),
    Mutant("masks/edits.py", "LARGEST_SHARE = 0.5", "LARGEST_SHARE = 0.6"),
    Mutant("masks/label_maps.py", "if max([*inverse.values(), 0]) < 256", "if max([*inverse.values(), 0]) < 257"),
    Mutant("masks/label_maps.py", "LARGEST_LABEL = 65535", "LARGEST_LABEL = 65534"),
    Mutant("masks/vocabulary.py", '"spleen": (-43.0, 184.0)', '"spleen": (-43.0, 148.0)'),
    Mutant("masks/vocabulary.py", '"brain": (-305.0, 370.0)', '"brain": (-35.0, 370.0)'),
    Mutant(
        "masks/vocabulary.py",
        '(7, "inferior vena cava", "vessel", "inferior_vena_cava")',
        '(7, "inferior vena cava", "vessel", "superior_vena_cava_")',
    ),
    Mutant("masks/snomed.csv", "10,91723000,28231008,Gallbladder", "10,91723000,28273000,Gallbladder", CODES),
    Mutant("masks/snomed.csv", "15,91723000,89837001,", "15,91723000,89837002,", CODES),
    Mutant("masks/snomed.csv", "13,91723000,38848004,Duodenum", "13,91723000,38848004,Jejunum", CODES),
    Mutant("masks/roi_names.json", '"svc": "superior vena cava"', '"svc": "inferior vena cava"', CODES),
    Mutant("masks/roi_names.json", '"thyroid": "thyroid gland"', '"thyroid": "trachea"', CODES),
    # DICOM
    Mutant("dicom/ct.py", "WINDOW = (40, 400)", "WINDOW = (400, 40)"),
    Mutant("dicom/segmentation.py", "0].T >= 0.5", "0].T > 0.5"),
    Mutant("dicom/structures.py", "mask > 0 if label == BODY else mask == label", "mask == label"),
    # figures
    Mutant("masks/intensity.py", "values.size >= LEAST_VOXELS", "values.size > LEAST_VOXELS"),
    Mutant("masks/intensity.py", "not low <= (median", "not low < (median"),
    Mutant("metrics/overlap.py", "ignore_empty=True", "ignore_empty=False"),
    Mutant("metrics/summary.py", "statistics.stdev(values) if", "statistics.pstdev(values) if"),
    Mutant("metrics/reconstruction.py", "WINDOW, SIGMA = 11, 1.5", "WINDOW, SIGMA = 11, 1.4"),
    Mutant("metrics/reconstruction.py", "K1, K2 = 0.01, 0.03", "K1, K2 = 0.01, 0.01"),
    Mutant("metrics/neighbours.py", "OVERLAP = 0.5", "OVERLAP = 0.3"),
    Mutant("metrics/stratify.py", "sum(number >= edge for edge in edges)", "sum(number > edge for edge in edges)"),
    Mutant("report/preview.py", "return data[::-1, :, z].T", "return data[:, :, z].T"),
    # around it
    Mutant("cohort/spec.py", "default_rng([self.seed, index])", "default_rng([self.seed + index])"),
    Mutant("settings.py", '_ACTIVE = ("$", "@", "%")', '_ACTIVE = ("$", "@")'),
    Mutant("settings.py", 'name.startswith("_") or', "False or"),
    Mutant("service/jobs.py", "self._due.get(row[0], 0.0) <= now", "self._due.get(row[0], 0.0) >= now"),
]


def judged(mutant: Mutant) -> str:
    """ "killed", "SURVIVED", or "stale"."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "tools" / "maisi_tools"
        shutil.copytree(ROOT / "tools" / "maisi_tools", package, ignore=shutil.ignore_patterns("__pycache__"))
        file = package / mutant.file
        text = file.read_text()
        if text.count(mutant.line) != 1:
            return "stale"
        file.write_text(text.replace(mutant.line, mutant.fault))
        child = os.fork()
        if not child:
            os._exit(_test(mutant.run, package.parent))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return {0: "SURVIVED", 5: "stale"}.get(os.waitstatus_to_exitcode(status), "killed")
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "killed"


def _test(files: list[str], tools: Path) -> int:
    """Run test files, in a process of its own, with the package that lies in `tools`."""
    import pytest

    os.setpgid(0, 0)
    os.chdir(ROOT)
    sys.path.insert(0, str(tools))
    os.environ["PYTHONPATH"] = str(tools)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", f"pythonpath={tools}"]
    return int(pytest.main([*options, *files]))


def _import_others() -> None:
    """Import what the package and its tests import of others: once, for all that are forked."""
    names = set()
    for file in (*(ROOT / "tools").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    for name in sorted(names):
        if name.split(".")[0] not in ("maisi_tools", "__future__", "ray"):
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    chosen = [
        one for one in MUTANTS if not given.words or any(word in f"{one.file} {one.line}" for word in given.words)
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if not given.list:
        _import_others()
    counts: Counter[str] = Counter()
    for number, mutant in enumerate(chosen, start=1):
        verdict = "" if given.list else judged(mutant)
        counts[verdict] += 1
        print(f"{number:3} {verdict:9} {mutant.file}: {mutant.line.strip()} -> {mutant.fault.strip()}", flush=True)
    print(f"{len(chosen)} faults", *(f"{count} {verdict}" for verdict, count in sorted(counts.items())), sep=", ")


if __name__ == "__main__":
    main()
