"""Commands that make CTs, and what they need.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from maisi_tools.cli.options import (
    CONTROLNET,
    KIND,
    SIZE,
    SPACING,
    bundle_folder,
    bundles_folder,
    check_seed,
    listed,
    need_dicom,
    process_group,
    triple,
)
from maisi_tools.errors import InputError


def demo(output_dir: str = "demo_output", seed: int = 0, bundles: str | None = None) -> None:
    """Draw a phantom mask, generate a CT with its anatomy and make a picture of both.

    Args:
        output_dir: folder to write to.
        seed: of the phantom and of the CT; the same seed gives the same files.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    bundle = bundles_folder(bundles) / CONTROLNET
    config = bundle / "configs" / "inference.json"
    if not config.is_file():
        raise InputError(f"{config} does not exist; give the folder that holds {CONTROLNET} with --bundles.")
    check_seed(seed)
    output = Path(str(output_dir))
    output.mkdir(parents=True, exist_ok=True)

    from maisi_tools.bundles.stage import Stage
    from maisi_tools.masks.phantom import write_phantom
    from maisi_tools.report.preview import preview

    start = time.perf_counter()
    phantom = output / "input" / "phantom.nii.gz"  # apart, for what lies in `output` was made of it
    phantom.parent.mkdir(exist_ok=True)
    write_phantom(phantom, KIND, SIZE, SPACING, seed)
    options: dict[str, Any] = {"input": str(phantom), "output_dir": str(output), "seed": seed}
    Stage(bundle, logs=True, **options).run()
    ct, mask = output / "phantom_ct.nii.gz", output / "phantom_mask.nii.gz"
    picture = preview(ct, mask, output / "preview.png")

    line = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in (by_hand(bundle) | options).items())
    print(f"CT:      {ct}\nmask:    {mask}\npicture: {picture}")
    print(f"done in {time.perf_counter() - start:.0f} s; by hand, with a mask of your own as --input:")
    print(f"  {shlex.quote(sys.executable)} -m monai.bundle run {line}")


def cohort(
    spec: str,
    output_dir: str = "cohort",
    engine: str = "process",
    workers: int = 1,
    device: str = "cpu",
    gpus: float = 0.0,
    threads: int = 1,
    address: str | None = None,
    bundles: str | None = None,
    judge: str | None = None,
    judge_label_map: str | None = None,
) -> None:
    """Generate many CT + mask pairs from a specification (docs/how-to/cohorts.md); started again, it goes on.

    `torchrun --nproc_per_node=N -m maisi_tools.cli cohort SPEC` shares the samples among N processes.

    Args:
        spec: YAML file.
        output_dir: folder of the cohort.
        engine: process, or ray (extra 'ray').
        workers: Ray actors.
        device: cpu or cuda.
        gpus: GPUs, or the fraction of one, for each Ray actor.
        threads: of each worker on the CPU; another number may change the last bits of the files.
        address: of a running Ray cluster, by default one on this machine.
        bundles: folder with the bundles; by default the one of the checkout you are in.
        judge: segmenter, as of `maisi twin`; a sample whose organs it does not find (`min_dice`) is left out.
        judge_label_map: how its labels are to be read.
    """
    import ignite.distributed as idist
    import torch.distributed

    from maisi_tools.cohort.run import MANIFEST, make_cohort
    from maisi_tools.cohort.spec import read_spec
    from maisi_tools.settings import check_device

    for name, value in (("workers", workers), ("threads", threads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed is a whole number, at least 1")
    of_ray = (("workers", workers, 1), ("gpus", gpus, 0), ("address", address, None))
    given = [f"--{name} {value}" for name, value, left_out in of_ray if value != left_out]
    if engine == "process" and given:
        raise InputError(
            f"{', '.join(given)} would be without effect: the engine is {engine}; give --engine ray, or leave it out "
            "(several processes: torchrun)"
        )
    wanted = read_spec(str(spec))
    if wanted.format == "dicom":
        need_dicom()
    if engine == "process":  # Ray's workers may be on other machines
        check_device(device)
    with process_group():
        if device == "cuda" and torch.distributed.is_torchelastic_launched():
            device = f"cuda:{idist.get_local_rank()}"
        found = make_cohort(
            wanted,
            str(output_dir),
            bundles_folder(bundles),
            engine,
            workers,
            device,
            float(gpus),
            threads,
            address,
            judge,
            judge_label_map,
        )
    if found:
        print(f"{output_dir}: {found['done']} of {wanted.count} samples, {found['made']} handled in this run")
        if found["left_out"]:
            print(f"{len(found['left_out'])} samples left out, whose CTs do not show their masks; see the manifest")
        print(Path(str(output_dir)) / MANIFEST)
        if found["failed"]:
            raise InputError(
                f"{len(found['failed'])} samples failed: {', '.join(found['failed'][:5])}; see the manifest"
            )


def twin(
    *cts: str,
    segmenter: str = "thresholds",
    output_dir: str = "twins",
    label_map: str | None = None,
    overlay: Any = None,
    seed: int = 0,
    settings: Any = None,
    keep_patient: bool = True,
    device: str = "cpu",
    bundles: str | None = None,
) -> None:
    """Make a labelled synthetic CT with the anatomy of each real one (docs/how-to/twins.md); started again, it goes on.

    Args:
        cts: files (NIfTI, NRRD), folders or zip files of one DICOM series, folders of these, or datalists, of
            which "training" is taken.
        segmenter: thresholds, totalsegmentator (where it is installed), or the folder of a MONAI segmentation bundle.
        output_dir: folder for NAME_ct, NAME_mask and NAME_twin.json, and of a DICOM series the study NAME_dicom.
        label_map: how a bundle's labels are to be read; by default by the names of its classes.
        overlay: a config over inference.json, such as full_rflow.json for the released weights.
        seed: of every CT.
        settings: further keys of maisi_controlnet's inference.json, such as "{'spacing': [3,3,3]}".
        keep_patient: whether a study joins that of its series; else it has a new, invented patient.
        device: cpu or cuda.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    if not cts:
        raise InputError("no CT was given; name at least one: maisi twin CT [CT ...] --segmenter NAME_OR_BUNDLE")
    check_seed(seed)
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"settings {settings!r} is not usable; give keys and values: \"{{'solver': 'heun'}}\".")

    from maisi_tools.cohort.twins import make_twins
    from maisi_tools.settings import check_device

    check_device(device)
    found = make_twins(
        [str(ct) for ct in cts],
        str(output_dir),
        segmenter,
        bundle_folder(CONTROLNET, bundles),
        label_map,
        listed(overlay or ()),
        seed,
        settings,
        keep_patient,
        device,
    )
    print(f"{output_dir}: {len(found['made'])} twins made, {len(found['there'])} were there")
    if found["failed"]:
        raise InputError(
            f"{len(found['failed'])} of them failed: {', '.join(found['failed'][:5])}; see their _twin.json"
        )


def plan(
    bundle: str,
    output_size: Any,
    memory_limit: Any = None,
    splits: Any = None,
    overlay: Any = None,
    device: str = "cpu",
    details: bool = False,
    bundles: str | None = None,
) -> None:
    """Print what a bundle's run would need on a device, without computing: peak memory, FLOP, transfers.

    Args:
        bundle: name (maisi_vae, maisi_ldm, maisi_controlnet) or folder of the bundle.
        output_size: voxels of the CT along x, y, z, for example 512,512,768.
        memory_limit: what the run may take on the device, for example 16GiB; by default as much as the fastest plan.
        splits: slabs for each step of a network; by default as many as are best.
        overlay: a config over inference.json, such as full_rflow.json for the full-size networks, or several.
        device: cpu or cuda, whichever the run will have; it need not be in this machine.
        details: print every pass of every plan, too.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    folder = bundle_folder(bundle, bundles) / "configs"
    size = triple("output_size", output_size, int)
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not usable; give cpu or cuda.")
    configs = [folder / "inference.json", *(folder / name for name in listed(overlay or ()))]
    for config in configs:
        if not config.is_file():
            overlays = [path.name for path in folder.glob("full*.json") if not re.search("train|mask", path.name)]
            names = ", ".join(sorted(overlays))
            raise InputError(f"{config} does not exist; overlays of this bundle are: {names}.")

    from maisi_tools.bundles.footprint import footprints
    from maisi_tools.tsp.plan import format_bytes

    found = footprints(configs, size, splits, memory_limit, device)
    print(f"{'network':<32}{'peak':>12}{'GFLOP':>14}{'moved off':>12}{'read back':>12}")
    for footprint in found:
        made = footprint.plan
        if made is None:
            print(f"{footprint.stage:<32}{footprint.refusal}")
            continue
        moved = "".join(f"{format_bytes(count) if count else '-':>12}" for count in made.moved)
        print(f"{footprint.stage:<32}{format_bytes(made.peak):>12}{made.flop / 1e9:>14,.0f}{moved}")
        if details:
            print(f"{made}\n")
    if any(footprint.plan is None for footprint in found):
        raise InputError(
            f"a memory limit of {memory_limit} is too small for a CT of {size[0]} x {size[1]} x {size[2]}."
        )


def weights(bundle: str, bundles: str | None = None) -> None:
    """Download the released full-size weights that a bundle lists in large_files.yml, and verify them.

    What is there already is not fetched again; an interrupted download goes on where it stopped.

    Args:
        bundle: name (maisi_vae, maisi_ldm, maisi_controlnet) or folder of the bundle.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    folder = bundle_folder(bundle, bundles)

    from maisi_tools.weights import fetch_weights

    for path in fetch_weights(folder):
        print(path)


def package(
    *names: str,
    output_dir: str = "dist",
    bundles: str | None = None,
    layout: str = "zip",
    org: str | None = None,
    pages: str | None = None,
    overlay: str | None = None,
    name: str | None = None,
) -> None:
    """Write bundles as downloads for `monai.bundle download`, each with the parts of maisi_tools it needs, and hashes.

    The layout zip makes NAME_vVERSION.zip; hub makes the folder NAME, a repository of the Hugging Face Hub with a
    model card. Each line printed is the SHA-256 and the path of a file, as `sha256sum -c` reads them.

    Args:
        names: of bundles, or their folders; by default all.
        output_dir: folder for the zip files or the folders.
        bundles: folder with the bundles; by default the one of the checkout you are in.
        layout: zip or hub.
        org: for hub, the account there that the repositories will be of.
        pages: for hub, the address of this repository's files, for the cards' links, such as .../blob/v0.1.0.
        overlay: for zip, configs of one bundle, such as edit.json,monailabel_edit.json, merged into its inference.json.
        name: of the bundle that this makes.
    """
    if layout not in ("zip", "hub"):
        raise InputError(f"layout {layout!r} is not known; give zip or hub.")
    if layout == "hub" and org is None:
        raise InputError("the layout hub needs the account's name on the Hub; give it with --org NAME.")
    if layout == "zip" and (org, pages) != (None, None):
        raise InputError("--org and --pages are for cards on the Hub; give them with --layout hub, or leave them out.")
    if (overlay, name) != (None, None) and (layout == "hub" or len(names) != 1):
        raise InputError(
            f"--overlay and --name are given with {len(names)} bundles and the layout {layout}; give the one bundle "
            "that they are of, as zip."
        )

    from maisi_tools.bundles.hub import hub_folder
    from maisi_tools.bundles.packaging import package_bundle
    from maisi_tools.files import sha256

    chosen = names or sorted(config.parent.name for config in bundles_folder(bundles).glob("*/configs"))
    own = (listed(overlay or ()), None if name is None else str(name))
    for folder in [bundle_folder(one, bundles) for one in chosen]:
        if org is None:
            written = [package_bundle(folder, output_dir, *own)]
        else:
            made = hub_folder(folder, output_dir, org, pages)
            written = sorted(path for path in made.rglob("*") if path.is_file())
        for path in written:
            print(f"{sha256(path)}  {path}")


def by_hand(bundle: Path) -> dict[str, Any]:
    """Options of `monai.bundle run` for a bundle's inference.json."""
    configs = bundle / "configs"
    return {
        "config_file": str(configs / "inference.json"),
        "meta_file": str(configs / "metadata.json"),
        "logging_file": str(configs / "logging.conf"),
        "bundle_root": str(bundle),
    }
