"""Commands that make data sets ready for training.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maisi_tools.cli.options import check_seed, held_out_names
from maisi_tools.errors import InputError


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
        patient_pattern: regular expression that finds the patient in a name, such as "^(.*)_scan"; by default a
            patient is who the datalist says under "patient", or else every name is one.
        seed: of the choice by --validation.
        workers: processes that read.
    """
    if not datasets:
        raise InputError("no data set was given; name at least one: maisi prepare FOLDER [FOLDER ...] -o datalist.json")
    if not str(output).endswith(".json"):
        raise InputError(f"output {output} is no .json file; give a name such as datalist.json.")
    check_seed(seed)
    names = held_out_names(held_out)

    from maisi_tools.datasets import prepare as steps
    from maisi_tools.files import write_json
    from maisi_tools.volumes.inputs import check_targets

    path = Path(str(output))
    report_path = path.with_name(f"{path.stem}_report.json")
    files = [*datasets, *([held_out] if str(held_out).endswith(".json") else [])]
    check_targets([name for name in files if Path(name).is_file()], [path, report_path])
    steps.check_ours(path, report_path)
    findings, label_names = steps.survey([str(dataset) for dataset in datasets], str(label_map), workers)
    cases, usable = [finding.case for finding in findings], [finding.refused is None for finding in findings]
    placed = steps.split(cases, validation, names, patient_pattern, seed, usable)
    report = steps.describe(findings, placed, str(label_map), label_names)
    write_json(report_path, report)
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
    from maisi_tools.datasets.complete import complete_masks as complete
    from maisi_tools.datasets.datalist import read_datalist

    items = [
        item for section in ("training", "validation") for item in read_datalist(str(datalist), section, required=False)
    ]
    if not items:
        raise InputError(
            f"datalist {datalist} has no case under training or validation; make one with `maisi prepare`, or name the "
            "section so"
        )
    print(f"{output_dir}: {len(complete(items, str(output_dir), str(label_map), spacing, workers))} masks")
