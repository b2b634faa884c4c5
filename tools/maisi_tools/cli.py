"""The `maisi` command: the few things a bundle's config cannot express.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire

from maisi_tools.atomic import write_json
from maisi_tools.errors import InputError, find_input_error

CONTROLNET = "maisi_controlnet"
# The phantom of the demo: a head and neck on a grid that a laptop samples in a minute or two.
KIND = "head_neck"
SIZE = (96, 80, 96)  # voxels
SPACING = (4.0, 4.0, 2.5)  # mm


def demo(output_dir: str = "demo_output", seed: int = 0, bundles: str | None = None) -> None:
    """Draw a phantom mask, generate a CT with its anatomy and make a picture of both.

    Args:
        output_dir: folder to write to.
        seed: of the phantom and of the CT; the same seed gives the same files.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    bundle = _bundles(bundles) / CONTROLNET
    config = bundle / "configs" / "inference.json"
    if not config.is_file():
        raise InputError(f"{config} does not exist; give the folder that holds {CONTROLNET} with --bundles.")
    _check_seed(seed)
    output = Path(str(output_dir))
    output.mkdir(parents=True, exist_ok=True)

    from monai.bundle import run

    from maisi_tools.masks.phantom import write_phantom
    from maisi_tools.report.preview import preview

    start = time.perf_counter()
    phantom = output / "phantom.nii.gz"
    write_phantom(phantom, KIND, SIZE, SPACING, seed)
    options = _inference(bundle) | {"input": str(phantom), "output_dir": str(output), "seed": seed}
    run(**options)
    ct, mask = output / "phantom_ct.nii.gz", output / "phantom_mask.nii.gz"
    picture = preview(ct, mask, output / "preview.png")

    line = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    print(f"CT:      {ct}\nmask:    {mask}\npicture: {picture}")
    print(f"done in {time.perf_counter() - start:.0f} s; by hand, with a mask of your own as --input:")
    print(f"  {shlex.quote(sys.executable)} -m monai.bundle run {line}")


def phantom(
    output: str, kind: str = KIND, size: Sequence[int] = SIZE, spacing: Sequence[float] = SPACING, seed: int = 0
) -> None:
    """Write a procedural anatomy as a label mask.

    Args:
        output: the NIfTI file to write.
        kind: head_neck or torso.
        size: voxels along x, y, z, for example 96,80,96.
        spacing: mm along x, y, z, for example 4,4,2.5.
        seed: of the random shapes; the same seed gives the same file.
    """
    _check_seed(seed)
    size, spacing = _triple("size", size, int), _triple("spacing", spacing, float)

    from maisi_tools.masks.phantom import write_phantom

    write_phantom(Path(str(output)), kind, size, spacing, seed)
    print(output)


def preview(volume: str, mask: str | None = None, output: str = "preview.png", window: Any = (-160, 240)) -> None:
    """Draw three planes of a CT volume, with a mask over it where one is given.

    Args:
        volume: NIfTI file in HU, in any orientation.
        mask: NIfTI file with labels on the same grid.
        output: the PNG file to write.
        window: HU shown as black and as white, for example -160,240.
    """
    from maisi_tools.report.preview import preview as draw

    print(draw(str(volume), None if mask is None else str(mask), str(output), _window(window)))


def weights(bundle: str, bundles: str | None = None) -> None:
    """Download the released full-size weights that a bundle lists in large_files.yml, and verify them.

    What is there already is not fetched again; an interrupted download goes on where it stopped.

    Args:
        bundle: name (maisi_vae, maisi_ldm, maisi_controlnet) or folder of the bundle.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    folder = _bundle(bundle, bundles)

    from maisi_tools.weights import fetch_weights

    for path in fetch_weights(folder):
        print(path)


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
        overlay: a config over inference.json, such as full_rflow.json for the full-size networks.
        device: cpu or cuda, whichever the run will have; it need not be in this machine.
        details: print every pass of every plan, too.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    folder = _bundle(bundle, bundles) / "configs"
    size = _triple("output_size", output_size, int)
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not usable; give cpu or cuda.")
    configs = [folder / "inference.json"] + ([folder / str(overlay)] if overlay is not None else [])
    for config in configs:
        if not config.is_file():
            names = ", ".join(sorted(path.name for path in folder.glob("full*.json")))
            raise InputError(f"{config} does not exist; overlays of this bundle are: {names}.")

    from maisi_tools.diffusion.footprint import footprints
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


def prepare(
    *datasets: str,
    output: str = "datalist.json",
    label_map: str = "maisi",
    validation: float | None = None,
    held_out: Any = None,
    patient_pattern: str | None = None,
    seed: int = 0,
    workers: int = 0,
) -> None:
    """Check data sets, report what they hold, and write the MONAI datalist that training reads.

    Every file is read. What cannot be used is listed with the reason and left out. The report goes beside the
    datalist, too, as NAME_report.json.

    Args:
        datasets: folders with NAME_ct and NAME_seg (or any volumes), MONAI datalists, dataset.json of nnU-Net or MSD.
        output: the JSON file to write; its "held_out" is what --held_out of the other stages takes.
        label_map: how the masks' labels are to be read: a name such as totalsegmentator, or a JSON file.
        validation: share of the patients to hold out of training, such as 0.1.
        held_out: names to hold out instead, as NAME,NAME or as a JSON file (a list, or one under "held_out").
        patient_pattern: regular expression that finds the patient in a name, such as "^(.*)_scan"; by default every
            name is a patient.
        seed: of the choice by --validation.
        workers: processes that read.
    """
    if not datasets:
        raise InputError("no data set was given; name at least one: maisi prepare FOLDER [FOLDER ...] -o datalist.json")
    if not str(output).endswith(".json"):
        raise InputError(f"output {output} is no .json file; give a name such as datalist.json.")
    _check_seed(seed)
    names = _names(held_out)

    from maisi_tools.training import prepare as steps

    findings, label_names = steps.survey([str(dataset) for dataset in datasets], str(label_map), workers)
    placed = steps.split([finding.case for finding in findings], validation, names, patient_pattern, seed)
    report = steps.describe(findings, placed, str(label_map), label_names)
    path = Path(str(output))
    write_json(path.with_name(f"{path.stem}_report.json"), report)
    print(steps.as_text(report))
    if not report["usable"]:
        raise InputError(f"none of the {report['volumes']} volumes can be used; correct what is listed as refused.")
    lists = steps.make_datalist(findings, placed)
    write_json(path, lists)
    print(
        f"{path}: {len(lists['training'])} volumes of {report['patients']['training']} patients to train on, "
        f"{len(lists['validation'])} of {report['patients']['validation']} held out"
    )


def complete_masks(
    datalist: str,
    output_dir: str,
    label_map: str = "maisi",
    spacing: Sequence[float] | None = None,
    workers: int = 0,
) -> None:
    """Write the masks that maisi_controlnet trains on: a data set's own labels, completed from its CTs.

    Body, airway, lung and bone that the labels leave open are added by intensity. What is there and up to date is kept,
    so an interrupted run goes on where it stopped.

    Args:
        datalist: JSON file as `maisi prepare` writes it.
        output_dir: folder for one NAME_ct_mask.nii.gz a case.
        label_map: how the labels are to be read: a name such as totalsegmentator, or a JSON file.
        spacing: mm along x, y, z to resample the CTs to first, such as "[2.0,2.0,2.5]": what their latents have.
        workers: processes that work beside one another.
    """
    from maisi_tools.training.datalist import read_datalist
    from maisi_tools.training.masks import complete_masks as complete

    items = [
        item for section in ("training", "validation") for item in read_datalist(str(datalist), section, required=False)
    ]
    print(f"{output_dir}: {len(complete(items, str(output_dir), str(label_map), spacing, workers))} masks")


def dicom_read(
    path: str, output: str, series: str | None = None, series_uid: str | None = None, names: str | None = None
) -> None:
    """Make a NIfTI file of a DICOM CT series (in HU), Segmentation or RT Structure Set (a mask for maisi_controlnet).

    A series taken with a tilted gantry is resampled to a straight grid.

    Args:
        path: a folder or zip file with a CT series, a SEG or RTSTRUCT file, or a folder with nothing but that file.
        output: the NIfTI file to write; a mask has the ids of MAISI's vocabulary (--label_map maisi).
        series: for a mask, folder or zip file of the CT series it was drawn on; the mask gets its grid.
        series_uid: for a CT, Series Instance UID to take where there are several.
        names: for a mask, a JSON file with your own names of structures, such as {"Leber": "liver", "PTV": 0}.
    """
    target = _nifti_path(output)
    _need_dicom()

    import numpy as np

    from maisi_tools.dicom.study import is_mask, read_mask
    from maisi_tools.volumes.grid import straighten
    from maisi_tools.volumes.reading import read_volume
    from maisi_tools.volumes.writing import write_volume

    mask = is_mask(str(path))
    misplaced = (("series_uid", series_uid),) if mask else (("series", series), ("names", names))
    for option, value in misplaced:
        if value is not None:
            raise InputError(f"--{option} was given and {path} is {'a mask' if mask else 'no mask'}; leave it out.")
    if mask:
        volume = read_mask(str(path), None if series is None else str(series), None if names is None else str(names))
    else:
        volume = read_volume(str(path), "ct", series_uid=None if series_uid is None else str(series_uid))
    volume = straighten(volume, "nearest" if mask else "bilinear", 0 if mask else -1000)
    write_volume(target, volume[0].numpy(), volume.affine.numpy(), np.uint8 if mask else np.int16)
    print(target)


def dicom_write(
    ct: str,
    mask: str | None = None,
    output: str = "dicom",
    source: str | None = None,
    seed: int | None = None,
    conditions: dict | None = None,
    label_map: str = "maisi",
    enhanced: bool = False,
    created: str | None = None,
    from_scan: bool | None = None,
) -> None:
    """Write a generated CT, and its mask as Segmentation and RT Structure Set, as a DICOM study.

    Every object is marked as synthetic. It belongs to a new, invented patient, unless --source is given.

    Args:
        ct: NIfTI file in HU.
        mask: NIfTI file with labels on the same grid.
        output: the folder to write; new or empty.
        source: folder or zip file of a CT series whose patient and study the objects join.
        seed: that the CT was generated with, to be recorded.
        conditions: that the CT was generated with, to be recorded, such as "{'steps': 30}".
        label_map: maisi, totalsegmentator, openkbp or a JSON file: how the mask's labels are to be read.
        enhanced: write one Enhanced CT object instead of a series of slices.
        created: date and time to write, such as 2026-01-31T12:00:00, by default now; the same content and time give the
            same UIDs.
        from_scan: whether the CT was computed from a patient's scan, whose --source is then needed; by default so for
            *_recon.nii.gz, what maisi_vae writes.
    """
    if seed is not None:
        _check_seed(seed)
    if conditions is not None and not isinstance(conditions, dict):
        raise InputError(f"conditions {conditions!r} are not usable; give them as \"{{'steps': 30}}\".")

    _need_dicom()

    import datetime
    import json

    from maisi_tools.dicom.objects import recordable
    from maisi_tools.dicom.study import write_study
    from maisi_tools.masks.class_folder import read_numbers
    from maisi_tools.masks.label_maps import apply_label_map, read_label_map
    from maisi_tools.volumes.grid import grid_difference
    from maisi_tools.volumes.reading import read_volume

    if conditions is not None and json.dumps(recordable(conditions), default=str) != json.dumps(
        conditions, default=str
    ):
        raise InputError(
            f"conditions {conditions!r} may name a file or a person; allowed are numbers, flags and single words, "
            "which go into every object"
        )
    try:
        time = None if created is None else datetime.datetime.fromisoformat(str(created))
    except ValueError:
        raise InputError(f"created {created!r} is not usable; give it as 2026-01-31T12:00:00.") from None
    volume = read_volume(str(ct), "ct")
    labels = None
    if mask is not None:
        mapping = read_label_map(str(label_map))
        drawn = read_numbers(str(mask), mapping)
        if difference := grid_difference(drawn, volume):
            raise InputError(
                f"the mask {mask} is not on the grid of {ct} ({difference}); give the mask written beside the CT."
            )
        labels = apply_label_map(drawn[0].numpy(), mapping)
    files = write_study(
        str(output),
        volume[0].numpy(),
        volume.affine.numpy(),
        labels,
        None if source is None else str(source),
        seed,
        conditions,
        enhanced,
        time,
        from_scan=str(ct).endswith("_recon.nii.gz") if from_scan is None else bool(from_scan),
    )
    print(f"{output}: {len(files)} files")


def compare(
    datalist: str,
    masks_dir: str,
    output_dir: str = "comparison",
    cases: int = 4,
    section: str = "validation",
    reconstructed: str | None = None,
    generated: str | None = None,
    seed: int = 0,
    window: Any = (-160, 240),
    bundles: str | None = None,
) -> None:
    """Make a page: real CT, its reconstruction, and a CT generated from the same mask, for kept-out patients.

    The page and the CTs show patients: keep them out of any repository (git ignores `comparison/`).

    Args:
        datalist: JSON file as `maisi prepare` writes it.
        masks_dir: the masks of its CTs, as `maisi complete_masks` writes them.
        output_dir: folder for comparison.html, and for the CTs that are computed.
        cases: how many of the section to show, from its beginning; 0 for all.
        section: of the datalist.
        reconstructed: folder with NAME_recon.nii.gz from maisi_vae; by default they are computed.
        generated: folder with NAME_mask_ct.nii.gz from maisi_controlnet; by default they are computed.
        seed: of the generated CTs.
        window: HU shown as black and as white, for example -160,240.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    _check_seed(seed)
    if not isinstance(cases, int) or cases < 0:
        raise InputError(f"cases {cases!r} is not usable; give how many to show, 0 for all.")
    window = _window(window)

    from maisi_tools.metrics.conditioning import pair_masks
    from maisi_tools.report.comparison import Comparison, write_comparison
    from maisi_tools.training.datalist import read_datalist
    from maisi_tools.volumes.inputs import check_output_dir, stem_of

    listed = read_datalist(str(datalist), str(section))
    items = pair_masks(listed[: cases or None], str(masks_dir))
    output = check_output_dir(str(output_dir))
    folders = {"maisi_vae": reconstructed, CONTROLNET: generated}
    for given in (reconstructed, generated):
        if given is not None and not Path(str(given)).is_dir():
            raise InputError(f"folder {given} does not exist; give the one with the CTs, or none.")
    runs: tuple[tuple[str, str, dict[str, Any]], ...] = (("maisi_vae", "ct", {}), (CONTROLNET, "image", {"seed": seed}))
    for name, key, own in runs:
        if folders[name] is None:
            from monai.bundle import run

            folders[name] = str(output / name)
            inputs = [item[key] for item in items]
            run(**_inference(_bundle(name, bundles)), input=inputs, output_dir=folders[name], **own)
    pages = []
    for item in items:
        ct, mask = Path(item["ct"]), Path(item["image"])
        volumes = {
            "real": ct,
            "reconstruction": Path(str(folders["maisi_vae"])) / f"{stem_of(ct)}_recon.nii.gz",
            "generated": Path(str(folders[CONTROLNET])) / f"{stem_of(mask)}_ct.nii.gz",
        }
        pages.append(Comparison(stem_of(ct), volumes, mask))
    title = "Real CT, its reconstruction, and a CT generated from the same mask"
    print(write_comparison(pages, output / "comparison.html", title, window))


def report(run_dir: str, output: str | None = None, max_cases: int = 20) -> None:
    """Write one HTML page about a bundle's output folder: volumes to look through, organs, tables, parameters.

    It is one file that needs no network. A page made of patients' CTs shows patients.

    Args:
        run_dir: the output_dir of a run.
        output: the .html file, by default report.html in that folder.
        max_cases: how many CTs to show.
    """
    from maisi_tools.report.run_report import write_report

    path = write_report(str(run_dir), None if output is None else str(output), max_cases)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def edit(
    mask: str,
    output: str,
    label_map: str = "maisi",
    remove: Any = (),
    resize: Any = None,
    insert: Any = None,
    augment: Any = None,
    shift: float = 0.0,
    elastic: float = 0.0,
    flip: bool = False,
    spacing: Sequence[float] | None = None,
    size: Sequence[int] | None = None,
    keep: Any = (),
    seed: int = 0,
) -> None:
    """Edit a mask, in the order of the options, and write it in MAISI's vocabulary.

    Args:
        mask: a mask file, or a folder of one file a class.
        output: the NIfTI file to write.
        label_map: how the labels are to be read: a name such as totalsegmentator, or a JSON file.
        remove: lesions, for example "hepatic tumor,lung tumor".
        resize: organ -> factor of its volume, for example "{liver: 1.2}".
        insert: lesion -> its diameter in mm, for example "{hepatic tumor: 25}".
        augment: lesion -> factor of its diameter, for example "{hepatic tumor: 1.1}".
        shift: mm by which augmented lesions are moved.
        elastic: mm by which augmented lesions are deformed.
        flip: exchange left and right.
        spacing: mm along x, y, z of a new grid, for example 2,2,2.5.
        size: voxels along x, y, z of a new grid.
        keep: organs that must survive on the new grid, for example liver,spleen; it is laid about them.
        seed: of all that is drawn; the same seed gives the same file.
    """
    _check_seed(seed)
    new_spacing = None if spacing is None else _triple("spacing", spacing, float)
    new_size = None if size is None else _triple("size", size, int)
    factors, diameters, zooms = _amounts("resize", resize), _amounts("insert", insert), _amounts("augment", augment)

    from maisi_tools.masks.edits import edit_file
    from maisi_tools.masks.label_maps import read_label_map

    changes = edit_file(
        str(mask),
        str(output),
        read_label_map(str(label_map)),
        remove=_listed(remove),
        resize=factors,
        insert=diameters,
        augment=zooms,
        shift_mm=shift,
        elastic_mm=elastic,
        flip=bool(flip),
        spacing=new_spacing,
        size=new_size,
        organs=_listed(keep),
        seed=seed,
    )
    for name, (before, after) in changes.items():
        print(f"{name:<36}{before:>10.1f} ml -> {after:>8.1f} ml")
    print(output)


def index(folder: str, label_map: str = "maisi") -> None:
    """Look through a folder of masks once, for `maisi find`; a second run reads only what is new or has changed.

    Args:
        folder: the library; the index is written into it.
        label_map: how the labels are to be read: a name such as totalsegmentator, or a JSON file.
    """
    from maisi_tools.masks.label_maps import read_label_map
    from maisi_tools.masks.library import index_library

    report = index_library(str(folder), read_label_map(str(label_map)))
    for name, reason in report.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{folder}: {report.total} masks, {report.new} read, {report.gone} gone, {len(report.skipped)} skipped")


def find(
    folder: str,
    region: Any = (),
    organs: Any = (),
    field_of_view: Sequence[float] | None = None,
    count: int = 5,
    label_map: str = "maisi",
) -> None:
    """List the masks of an indexed folder that fit best, each with what does not fit.

    Args:
        folder: the library, see `maisi index`.
        region: head, chest, abdomen or lower, or several: chest,abdomen.
        organs: what must be in the mask, for example liver,spleen.
        field_of_view: least extent in mm along x, y, z, for example 300,300,200.
        count: how many to list.
        label_map: the one that the index was made with.
    """
    if not isinstance(count, int) or count < 1:
        raise InputError(f"count {count!r} is not usable; give a whole number from 1 up.")
    view = None if field_of_view is None else _triple("field_of_view", field_of_view, float)

    from maisi_tools.masks.label_maps import read_label_map
    from maisi_tools.masks.library import MaskRequest, read_index, search

    request = MaskRequest(_listed(region), _listed(organs), view)
    for path, misfits in search(read_index(str(folder), read_label_map(str(label_map))), request)[:count]:
        print(f"{path}: {'; '.join(misfits) or 'fits'}")


def realism(
    reference: Any,
    generated: Any,
    output_dir: str = "realism",
    network: str = "resnet18",
    weights: str | None = None,
    spacing: float = 3.0,
    size: int = 128,
    pairs: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Measure how like real CTs generated ones are, and how varied: FID in three planes, MMD, MS-SSIM.

    `torchrun -m maisi_tools.cli realism` shares the volumes among its ranks.

    Args:
        reference: the real CTs: a folder, a glob, or a datalist.
        generated: the same of the generated ones.
        output_dir: folder for realism.json, and for features, which a second run takes from there.
        network: that gives the features: resnet18 or resnet50.
        weights: of that network, such as RadImageNet's; by default it is random, with a fixed seed.
        spacing: mm that the volumes are resampled to.
        size: voxels a side that they are cropped or padded to.
        pairs: of volumes in each set that MS-SSIM is averaged over; 0 for none.
        seed: draws the pairs.
        device: cpu or cuda.
    """
    _check_seed(seed)

    import ignite.distributed as idist

    from maisi_tools.metrics.realism import SliceNetwork, measure_realism
    from maisi_tools.run_settings import check_device
    from maisi_tools.volumes.inputs import find_inputs

    check_device(device)
    real, made = ([item["image"] for item in find_inputs(files)] for files in (reference, generated))
    features = SliceNetwork(str(network), None if weights is None else str(weights))
    with _process_group():
        found = measure_realism(
            real, made, str(output_dir), features, float(spacing), int(size), int(pairs), seed, device
        )
        if idist.get_rank() > 0:
            return
    for name, value in found["figures"].items():
        print(f"{name:<40}{value:>14.6f}")


def stratify(
    metrics: str, cases: str, by: Any, output: str = "stratified.csv", edges: Any = None, case_column: str = "case"
) -> None:
    """Group the figures of an evaluation by columns of a case table, such as sex, age or scanner.

    Args:
        metrics: metrics.csv of a bundle's evaluation.
        cases: CSV file with a row a case.
        by: columns of it: sex,scanner.
        output: CSV file to write.
        edges: bounds of groups of a column with numbers: "{'age': [40,60]}".
        case_column: column of `cases` that holds the names.
    """
    from maisi_tools.metrics.stratify import COLUMNS
    from maisi_tools.metrics.stratify import stratify as group

    columns = [str(name) for name in (by if isinstance(by, (tuple, list)) else str(by).split(","))]
    if edges is not None and not isinstance(edges, dict):
        raise InputError(f"edges is {edges!r}; allowed is column -> bounds: \"{{'age': [40,60]}}\"")
    rows = group(str(metrics), str(cases), columns, str(output), edges, str(case_column))
    widths = [max(len(str(row[name])) for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]) for name in COLUMNS]
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(f"{row[name]!s:<{width}}" for name, width in zip(COLUMNS, widths, strict=True)).rstrip())
    print(output)


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
    from maisi_tools.run_settings import check_device

    for name, value in (("workers", workers), ("threads", threads)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; allowed is a whole number, at least 1")
    wanted = read_spec(str(spec))
    if wanted.format == "dicom":
        _need_dicom()
    if engine == "process":  # Ray's workers may be on other machines
        check_device(device)
    with _process_group():
        if device == "cuda" and torch.distributed.is_torchelastic_launched():
            device = f"cuda:{idist.get_local_rank()}"
        found = make_cohort(
            wanted,
            str(output_dir),
            _bundles(bundles),
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
        cts: files (NIfTI, NRRD), folders or zip files of one DICOM series, folders of these, or datalists.
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
    _check_seed(seed)
    if settings is not None and not isinstance(settings, dict):
        raise InputError(f"settings {settings!r} is not usable; give keys and values: \"{{'solver': 'heun'}}\".")

    from maisi_tools.cohort.twins import make_twins
    from maisi_tools.run_settings import check_device

    check_device(device)
    found = make_twins(
        [str(ct) for ct in cts],
        str(output_dir),
        segmenter,
        _bundle(CONTROLNET, bundles),
        label_map,
        _listed(overlay or ()),
        seed,
        settings,
        bool(keep_patient),
        device,
    )
    print(f"{output_dir}: {len(found['made'])} twins made, {len(found['there'])} were there")
    if found["failed"]:
        raise InputError(
            f"{len(found['failed'])} of them failed: {', '.join(found['failed'][:5])}; see their _twin.json"
        )


def listen(settings: str) -> None:
    """Run beside a PACS: what comes in goes through a chain of bundles, and results are stored back (docs/hospital.md).

    Args:
        settings: YAML file.
    """
    _need_dicom()
    if importlib.util.find_spec("pynetdicom") is None:
        raise InputError("this command needs the extra 'dicom'; install it with: pip install 'maisi-bundles[dicom]'.")

    import logging
    import os
    import signal

    from maisi_tools.service.listener import Listener
    from maisi_tools.service.settings import read_settings

    wanted = read_settings(str(settings))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # tracebacks of what callers do; we say it in a line
    os.umask(0o077)
    listener = Listener(wanted)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: listener.stop())
    listener.run()


def jobs(settings: str, revive: str | None = None) -> None:
    """List the jobs of `maisi listen`, or let a dead letter be tried again.

    Args:
        settings: its YAML file.
        revive: key of a dead job.
    """
    from maisi_tools.service.jobs import JobQueue
    from maisi_tools.service.settings import read_settings

    path = Path(read_settings(str(settings)).spool) / "queue.sqlite"
    if not path.is_file():
        raise InputError(f"{path} does not exist; start `maisi listen {settings}` first")
    queue = JobQueue(path, recover=False)
    if revive is not None and not queue.revive(str(revive)):
        raise InputError(f"there is no dead job {revive}; `maisi jobs {settings}` lists them")
    for state, job in queue.listed():
        print(f"{state:10} {job.kind:9} {job.received} {job.attempts} {job.key} {job.error}")


def package(*names: str, output_dir: str = "dist", bundles: str | None = None) -> None:
    """Write bundles as NAME_vVERSION.zip, each with the parts of maisi_tools it needs, for `monai.bundle download`.

    Args:
        names: of bundles, or their folders; by default all.
        output_dir: folder for the zip files.
        bundles: folder with the bundles; by default the one of the checkout you are in.
    """
    from maisi_tools.fingerprints import sha256
    from maisi_tools.packaging import package_bundle

    chosen = names or sorted(config.parent.name for config in _bundles(bundles).glob("*/configs"))
    for folder in [_bundle(name, bundles) for name in chosen]:
        path = package_bundle(folder, str(output_dir))
        print(f"{sha256(path)}  {path}")


GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "make": (demo, cohort, twin, plan, weights, package),
    "masks": (phantom, edit, index, find),
    "data": (prepare, complete_masks),
    "quality": (preview, report, compare, realism, stratify),
    "DICOM": (dicom_read, dicom_write),
    "service": (listen, jobs),
}
"""The commands, as the help shows them."""

COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; wrong input ends with `error: ...` on stderr and status 2 instead of a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = {command.__name__: _planned(command) for command in COMMANDS}
    if arguments[0] in ("--help", "-h"):
        print(_help())
        return 0
    if arguments[0].replace("-", "_") not in commands:
        print(f"error: {_unknown(arguments[0])}", file=sys.stderr)
        return 2
    plan = fire.Fire(commands, arguments, name="maisi", serialize=lambda _: None)
    try:
        plan.execute()
    except Exception as error:
        message = find_input_error(error)
        if message is None and not isinstance(error, OSError) and not _ours(error):
            raise
        print(f"error: {message or error}", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    """The commands in their groups, each with the first line of what it says of itself."""
    width = max(len(command.__name__) for command in COMMANDS)
    lines = ["maisi COMMAND [--option value ...]", "maisi COMMAND --help lists the options of a command."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        for command in commands:
            lines.append(f"  {command.__name__:<{width}}  {inspect.cleandoc(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)


def _unknown(given: str) -> str:
    """What to say of a command that there is not."""
    names = [command.__name__ for command in COMMANDS]
    nearest = difflib.get_close_matches(given.replace("-", "_").lower(), names, n=1)
    meant = f"did you mean {nearest[0]}? All of them: " if nearest else "choose among: "
    return f"{given!r} is no command; {meant}{', '.join(names)}."


class _Plan:
    """A command with its arguments, for after Fire has parsed the whole line.

    Fire calls a function first and complains about what is left of the line afterwards; with the call put off, a
    misspelt option is refused before minutes of computing.
    """

    def __init__(self, execute: Callable[[], None]) -> None:
        self.execute = execute

    def __dir__(self) -> list[str]:
        return []  # nothing that Fire could take the rest of the line for


def _planned(command: Callable[..., None]) -> Callable[..., _Plan]:
    """The command for Fire, with the call put off; what is annotated as text stays as it was typed.

    Fire would make numbers of the folders 2027, 1_000 and 1e5.
    """

    @functools.wraps(command)
    def plan(*args: Any, **kwargs: Any) -> _Plan:
        return _Plan(functools.partial(command, *args, **kwargs))

    parsers: dict[str, Callable[[str], Any]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            plan = fire.decorators.SetParseFn(_text)(plan)
        else:
            parsers[name] = _text if parameter.annotation in ("str", "str | None") else fire.parser.DefaultParseValue
        if name in _TEXT_OR_LISTS:
            parsers[name] = _text_or_list
    return fire.decorators.SetParseFns(**parsers)(plan)


_TEXT_OR_LISTS = ("reference", "generated", "held_out", "overlay")
"""Options that take a path or name, or several."""


def _text(given: str) -> str | None:
    """An argument as it was typed, without the quotes that keep Fire from parsing it; None where it is none."""
    value = fire.parser.DefaultParseValue(given)
    return value if isinstance(value, str) or value is None else given


def _text_or_list(given: str) -> Any:
    value = fire.parser.DefaultParseValue(given)
    return value if isinstance(value, (str, list, tuple, dict)) or value is None else given


def _ours(error: Exception) -> bool:
    """Whether it is a ValueError raised by this package, which says what is wrong with the input."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and Path(__file__).parent in raised_in.parents


def _bundles(given: str | None) -> Path:
    if given is not None:
        if not Path(str(given)).is_dir():
            raise InputError(f"bundles folder {given} does not exist; give the folder that holds {CONTROLNET}.")
        return Path(str(given))
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "bundles" / CONTROLNET).is_dir():
            return folder / "bundles"
    raise InputError(
        f"there is no bundles/{CONTROLNET} in {here} or above it; change into the checkout of MAISI Bundles, or give "
        "its bundles folder with --bundles DIR."
    )


def _bundle(bundle: Any, bundles: str | None) -> Path:
    """The folder of a bundle given by name or by its folder."""
    folder = Path(str(bundle))
    if not (folder / "configs").is_dir():
        root = _bundles(bundles)
        folder = root / str(bundle)
        if not (folder / "configs").is_dir():
            names = ", ".join(sorted(config.parent.name for config in root.glob("*/configs")))
            raise InputError(f"{bundle} is no bundle of {root} and no bundle's folder; choose among: {names}.")
    return folder


def _inference(bundle: Path) -> dict[str, Any]:
    """Options of `monai.bundle run` for a bundle's inference.json."""
    configs = bundle / "configs"
    return {
        "config_file": str(configs / "inference.json"),
        "meta_file": str(configs / "metadata.json"),
        "logging_file": str(configs / "logging.conf"),
        "bundle_root": str(bundle),
    }


def _amounts(option: str, value: Any) -> dict[str, float]:
    """Name -> number, of an option; Fire leaves names with a space in it as text."""
    if value is None:
        return {}
    if isinstance(value, str):
        pairs = [part.rpartition(":") for part in value.strip(" {}").split(",")]
        value = {name.strip(" \"'"): amount for name, _, amount in pairs}
    try:
        return {str(name): float(amount) for name, amount in value.items()}
    except (AttributeError, ValueError, TypeError):
        raise InputError(f'{option} {value!r} is not usable; give a number for each name: "{{liver: 1.2}}".') from None


def _listed(value: Any) -> list[str]:
    """Names given as a list, or as one text with commas."""
    names = value if isinstance(value, (tuple, list)) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _process_group() -> Any:
    """Context of a process group of torchrun's ranks; outside torchrun, of this process alone."""
    import ignite.distributed as idist
    import torch.distributed

    return idist.Parallel(backend="gloo" if torch.distributed.is_torchelastic_launched() else None)


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed {seed!r} is not usable; give a whole number from 0 up.")


def _need_dicom() -> None:
    if importlib.util.find_spec("highdicom") is None:
        raise InputError("this command needs the extra 'dicom'; install it with: pip install 'maisi-bundles[dicom]'.")


def _nifti_path(output: Any) -> Path:
    path = Path(str(output)).expanduser()
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"output {output} is no NIfTI file; name it .nii.gz or .nii.")
    return path


def _window(window: Any) -> Sequence[float]:
    try:
        lowest, highest = window
        if lowest < highest:
            return lowest, highest
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"window {window!r} is not usable; give two values in HU, the lower one first, such as --window=-160,240."
    )


def _triple(name: str, value: Any, kind: type) -> tuple:
    try:
        x, y, z = (kind(part) for part in value)
        if (x, y, z) != tuple(value):  # 96.5 voxels
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{name} {value!r} is not usable; give three numbers, for x, y, z: --{name} A,B,C.") from None
    return x, y, z


def _names(held_out: Any) -> set[str]:
    if held_out is None:
        return set()
    if not str(held_out).endswith(".json"):
        return {str(name) for name in (held_out if isinstance(held_out, (tuple, list)) else (held_out,))}
    path = Path(held_out)
    if not path.is_file():
        raise InputError(f"held-out list {path} does not exist; give a JSON file, or names as NAME,NAME.")
    try:
        listed = json.loads(path.read_text())
        listed = listed["held_out"] if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise TypeError("no list")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is no list of names ({error}); write ["NAME", ...], or that under "held_out".') from (
            error
        )
    return {str(name) for name in listed}


if __name__ == "__main__":
    sys.exit(main())
