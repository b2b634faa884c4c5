"""What the benchmarks share: the networks, one process for each measurement, tables and dated pages."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import monai
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from maisi_tools.autocast import fastest_dtype
from maisi_tools.files import replacing
from maisi_tools.networks import autoencoder_settings
from maisi_tools.tsp.inferer import TSPInferer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DIRECTIONS = ("decode", "encode")
FACTOR = 4
"""Image voxels per latent voxel along each axis."""
SEED = 0
WINDOWS: dict[str, Any] = {"sw_batch_size": 1, "overlap": 0.4, "mode": "gaussian"}
"""How the released script runs the autoencoder in windows: the arguments of its SlidingWindowInferer."""
WINDOW = {"decode": (80, 80, 80), "encode": (192, 192, 192)}
"""The released script's window of the latent; encoding, which it does not do, had this one of the image here before."""


QUARTER = {"num_channels": [16, 32, 64], "num_res_blocks": [1, 2, 2], "norm_num_groups": 8}
"""What makes the released network small. (MONAI's splits cannot do the shipped one's transposed convolutions.)"""


def settings(full: bool = False, **changes: Any) -> dict[str, Any]:
    """Return the autoencoder's constructor arguments from the bundle's configs, the small or the full-size one's."""
    config = ROOT / "bundles" / "maisi_vae" / "configs" / ("full.json" if full else "inference.json")
    found = json.loads(config.read_text())["network_def"]
    found.pop("_target_")
    return autoencoder_settings(**{**found, **changes})


def released_settings(device: str) -> dict[str, Any]:
    """Return the autoencoder's memory settings in the released configs (MONAI model-zoo, maisi_ct_generative).

    A CPU keeps norms in float32: it cannot compute in float16 and bfloat16 at once.
    """
    return {"norm_float16": device == "cuda", "num_splits": 2, "dim_split": 1, "save_mem": True}


def default_dtype(device: str) -> str:
    """Return what is computed in where nothing is said: of a CPU's types all but one can take minutes for seconds."""
    return "float16" if device == "cuda" else fastest_dtype(device)


def autoencoder(arguments: dict[str, Any], device: str = "cpu") -> AutoencoderKlMaisi:
    """Return MONAI's autoencoder with seeded random weights: the same ones for the same widths, however it splits."""
    torch.manual_seed(SEED)
    return AutoencoderKlMaisi(**arguments).to(device).eval()


def volume(direction: str, image_size: Sequence[int], latent_channels: int) -> Tensor:
    """Return a seeded random input: a latent (B, C, d, h, w), or an image (B, 1, D, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    if direction == "decode":
        return torch.randn(1, latent_channels, *(n // FACTOR for n in image_size), generator=generator)
    return torch.rand(1, 1, *image_size, generator=generator)


def call(
    network: AutoencoderKlMaisi,
    direction: str,
    x: Tensor,
    tsp: TSPInferer | None = None,
    windows: SlidingWindowInferer | None = None,
) -> Tensor:
    """Decode a latent, or encode an image to the posterior's mean: by TSP, in windows, or in one go."""
    if windows is not None:  # a window's result is a tensor, so that the means alone are stitched
        whole: Any = windows(x, network.decode if direction == "decode" else lambda window: network.encode(window)[0])
        return whole
    function = network.decode if direction == "decode" else network.encode
    result = tsp(x, function) if tsp is not None else function(x)
    return result if isinstance(result, Tensor) else result[0]


def flop_per_voxel(arguments: dict[str, Any], direction: str) -> float:
    """Return the floating point operations of the unsplit network for each voxel of the image."""
    network = autoencoder(arguments | {"num_splits": 1})
    size = (64, 64, 64)
    x = volume(direction, size, arguments["latent_channels"])
    with torch.no_grad():
        return TSPInferer(splits=1).plan(x, getattr(network, direction)).flop / math.prod(size)


class Failed(RuntimeError):
    """A measurement that did not come to a result; the message is what the table says."""


def in_own_process(
    function: Callable[..., Any], *args: Any, fresh: bool = True, threads: int | None = None, limit: float | None = None
) -> Any:
    """Return ``function(*args)``, computed in a process of its own.

    Args:
        fresh: a new interpreter; False forks this process, which saves the imports (and shares their memory).
        threads: computing threads of the process; None takes all cores.
        limit: seconds after which it is ended.

    Raises:
        Failed: it raised, ran out of memory, was killed, or took longer than ``limit``.
    """
    threads = threads or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn" if fresh else "fork")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(child, threads, function, args))  # type: ignore[attr-defined]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the OpenMP library when a new interpreter loads it
    process.start()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    child.close()
    try:
        if not parent.poll(limit):
            process.kill()
            raise Failed("not run (out of time)")
        done, value = parent.recv()
    except EOFError:  # the kernel ended it, most likely for its memory
        process.join()
        raise Failed(f"killed (exit code {process.exitcode})") from None
    finally:
        process.join()
    if not done:
        raise Failed(value)
    return value


def _answer(pipe: Connection, threads: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        pipe.send((True, function(*args)))
    except (torch.cuda.OutOfMemoryError, MemoryError):
        pipe.send((False, "out of memory"))
    except Failed as error:
        pipe.send((False, str(error)))
    except Exception as error:  # whatever it is belongs into the table, and the next row is still measured
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            pipe.send((False, "out of memory"))
        else:
            pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0][:80]))


class PeakMemory:
    """The peak of this process's resident memory above what is resident at the start, in bytes.

    The kernel's high-water mark (VmHWM) is reset, so that neither the imports' nor a parent's peak counts. Where
    that is not allowed, the mark may hold an earlier peak, which :func:`check_memory_reading` finds out.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self.start = self._status("VmRSS")

    def above_start(self) -> int:
        return self._status("VmHWM") - self.start

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise Failed(f"this system's /proc/self/status has no {field}")


def synchronize(device: str) -> None:
    """Wait for what the device still computes."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peaks(device: str) -> None:
    """Let the device's peaks begin here."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str, memory: PeakMemory) -> tuple[int, int]:
    """Return the most bytes that tensors held and that torch held; on a CPU twice the process's peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return (memory.above_start(),) * 2


def device_name(device: str) -> str:
    """Return the device's name.

    Raises:
        Failed: CUDA is asked for, and there is none.
    """
    if device != "cuda":
        return "CPU"
    if not torch.cuda.is_available():
        raise Failed("there is no CUDA device here; --device cpu runs the same code without one")
    return torch.cuda.get_device_name()


def allocate_and_free(size: int) -> int:
    """Return the peak that is read when ``size`` bytes were used and given back before."""
    earlier = torch.ones(2 * size, dtype=torch.uint8)  # a higher peak from before, which must not count
    del earlier
    memory = PeakMemory()
    block = torch.ones(size, dtype=torch.uint8)
    del block
    return memory.above_start()


def check_memory_reading(fresh: bool = True, size: int = 256 * 2**20) -> str:
    """Return a line that says how a known allocation was read.

    Raises:
        Failed: it was read wrong by more than 5 %.
    """
    read = in_own_process(allocate_and_free, size, fresh=fresh, threads=1)
    line = (
        f"an allocation of {size / 1e6:.0f} MB, after one of {2 * size / 1e6:.0f} MB, was read as {read / 1e6:.0f} MB"
    )
    if abs(read - size) > 0.05 * size:
        raise Failed(f"peak memory cannot be measured here: {line}")
    return line


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


class Variant(Protocol):
    """One of the ways that a benchmark compares; ``once``: it takes far longer, so the first round alone has it."""

    @property
    def name(self) -> str: ...

    @property
    def once(self) -> bool: ...


AnyVariant = TypeVar("AnyVariant", bound=Variant)


def in_turns(
    variants: Sequence[AnyVariant],
    rounds: int,
    measure: Callable[[AnyVariant], tuple[float, ...]],
    told: Callable[[str, tuple[float, ...] | str], None],
) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Measure the variants in turn in every round, so that a drift of the machine hits all alike.

    Args:
        told: gets what was measured, or why it was not, beside the round and the variant's name.

    Returns:
        The medians of each figure by the variant's name, and for those that failed the reason.
    """
    found: dict[str, list[tuple[float, ...]]] = {variant.name: [] for variant in variants}
    failed: dict[str, str] = {}
    for number, variant in itertools.product(range(rounds), variants):
        if variant.name in failed or (variant.once and number):
            continue
        said = f"round {number + 1}/{rounds}, {variant.name}"
        try:
            got = measure(variant)
        except Failed as error:
            failed[variant.name] = str(error)
            told(said, str(error))
            continue
        found[variant.name].append(got)
        told(said, got)
    medians = {
        name: tuple(map(median, zip(*figures, strict=True)))
        for name, figures in found.items()
        if figures and name not in failed
    }
    return medians, failed


def rounds_line(variants: Sequence[Variant], rounds: int) -> str:
    """Return the page's line about the rounds."""
    once = [variant.name for variant in variants if variant.once and rounds > 1]
    return f"- rounds: {rounds}; the variants in turn in each round, each in a new process; medians" + (
        f"; {', '.join(once)}: in the first round only" if once else ""
    )


def chosen(variants: Sequence[AnyVariant], only: str | None) -> list[AnyVariant]:
    """Return the variants whose name has one of the parts of ``only``, which ';' separates; all where it is None."""
    found = [v for v in variants if only is None or any(part in v.name for part in only.split(";"))]
    if not found:
        raise SystemExit(f"--only {only!r} names no variant; there are: {'; '.join(v.name for v in variants)}")
    return found


def wanted(figure: float, most: float | None) -> str:
    """Return a cell that says what was set as the goal and whether the figure meets it."""
    return "" if most is None else f"<= {most}: {'yes' if figure <= most else 'NO'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table, its columns lined up for reading as plain text; all but the first right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def circumstances(threads: int | None = None) -> list[str]:
    """Return what a page of results begins with: date, machine, versions, commit and command, as a markdown list."""
    model = next(
        (line.split(":")[1].strip() for line in _output("lscpu").splitlines() if line.startswith("Model name")),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return [
        f"- date: {datetime.date.today().isoformat()}",
        f"- CPU: {model}, {cores} cores, {threads or cores} threads; load of the machine at the start {load:.1f}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai.__version__}",
        f"- commit: {commit(ROOT)}",
        f"- command: `{shlex.join(['python', os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])}`",
    ]


def commit(checkout: Path) -> str:
    """Return a checkout's short commit, and whether what is measured was changed since."""
    found = _output("git", "-C", str(checkout), "rev-parse", "--short", "HEAD").strip() or "unknown"
    changed = _output("git", "-C", str(checkout), "status", "--porcelain", "--", "tools", "benchmarks", "bundles")
    changed = "\n".join(line for line in changed.splitlines() if "benchmarks/results/" not in line)
    return f"{found}{', with changes' if changed else ''}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def write_page(name: str, lines: Sequence[str]) -> Path:
    """Write ``results/<date>-<name>.md``; return its path."""
    path = RESULTS / f"{datetime.date.today().isoformat()}-{name}.md"
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n")
    return path


class Progress:
    """One line on stderr for each measurement, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.0f} s] {text}", file=sys.stderr, flush=True)
