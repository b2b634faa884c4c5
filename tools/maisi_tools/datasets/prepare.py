"""Checks a data set before anything is trained on it, and splits it by patient."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Orientation

from maisi_tools.datasets.datalist import belongs
from maisi_tools.datasets.layouts import Case, find_cases
from maisi_tools.datasets.workers import in_order
from maisi_tools.diffusion.conditions import MODALITIES, is_mr
from maisi_tools.errors import InputError
from maisi_tools.files import check_own_json
from maisi_tools.masks.class_folder import read_numbers
from maisi_tools.masks.label_maps import LabelMap, apply_label_map, read_label_map
from maisi_tools.masks.vocabulary import VOCABULARY, label_id
from maisi_tools.volumes.grid import grid_difference
from maisi_tools.volumes.inputs import stem_of
from maisi_tools.volumes.reading import read_volume

LISTS = ("training", "validation", "held_out")
"""What a datalist has."""

REPORTED = {"volumes", "usable", "refused"}
"""What a report has, of any version."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What reading one case showed.

    Attributes:
        case: what was read.
        refused: why it cannot be used; None where it can.
        size: voxels along the file's axes.
        spacing: mm along them.
        labels: the mask's own label numbers, without 0; None without a mask.
    """

    case: Case
    refused: str | None = None
    size: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    labels: tuple[int, ...] | None = None


def survey(
    sources: Sequence[str], label_map: str | Path = "maisi", workers: int = 0
) -> tuple[list[Finding], dict[int, str]]:
    """Read every volume of the data sets, and its mask.

    Args:
        sources: see :func:`maisi_tools.datasets.layouts.find_cases`. A file that is in several counts once.
        label_map: how the masks' labels are to be read; a mask with others is refused, with its case.
        workers: processes that read.

    Returns:
        One finding a case, and what the data sets themselves call their labels.

    Raises:
        InputError: a source or a label map that is none. What is wrong with a single case is in its finding.
    """
    mapping = read_label_map(label_map)
    cases: dict[Path, Case] = {}
    label_names: dict[int, str] = {}
    for source in sources:
        found, names = find_cases(source)
        label_names |= names
        for case in found:
            cases.setdefault(case.image.resolve(), case)
    findings = []
    outputs: dict[str, Path] = {}
    read = in_order(functools.partial(_read, mapping=mapping), list(cases.values()), workers, "reading", "volume")
    for finding in read:
        image = finding.case.image
        if finding.refused is None and (other := outputs.setdefault(stem_of(image), image)) != image:
            finding = dataclasses.replace(finding, refused=f"has the same name as {other}; rename one")
        findings.append(finding)
    return findings, label_names


def split(
    cases: Sequence[Case],
    validation: float | None = None,
    held_out: Collection[str] = (),
    patient_pattern: str | None = None,
    seed: int = 0,
    usable: Sequence[bool] | None = None,
) -> list[tuple[str, str]]:
    """The patient and the section ("training" or "validation") of each case; no patient is in both.

    Args:
        cases: all of them, those that cannot be used included: their names may be held out, too.
        validation: share of the patients to hold out, rounded up. Who it is depends on the seed and the names of all
            patients: as some are added a few others change sides, where `held_out` keeps who is held out.
        held_out: names of patients, cases or their files (without suffix) whose patients are held out, such as an
            earlier datalist has them.
        patient_pattern: regular expression that finds the patient in a case's name, as its first group or, without
            one, as the whole match. By default a patient is who the data set says, or else the case's name.
        seed: of the choice.
        usable: whether each case can be used, which the share is of; by default all that are not refused.

    Where neither ``validation`` nor ``held_out`` is given, the data sets' own split holds.

    Raises:
        InputError: both ways to hold out are given; a share outside 0 to 1, or one that leaves no patient to train on;
            a name that is not there; a pattern that is none, or does not match a name; or the data set's own split has
            a patient on both sides.
    """
    patients = [_patient(case, None if case.refused else patient_pattern) for case in cases]
    everyone = {patient for case, patient in zip(cases, patients, strict=True) if not case.refused}
    if validation is not None and held_out:
        raise InputError("validation and held_out both say who is held out; give one of them")
    if validation is not None:
        if isinstance(validation, bool) or not isinstance(validation, (int, float)) or not 0 <= validation < 1:
            raise InputError(f"validation is {validation!r}; allowed is the share of patients to hold out, such as 0.1")
        if usable is not None:
            everyone &= {patient for patient, can_be in zip(patients, usable, strict=True) if can_be}
        count = int(np.ceil(validation * len(everyone)))
        if everyone and count >= len(everyone):  # of none, the report says why
            unusable = 0 if usable is None else len(usable) - sum(usable)
            refused = f" ({unusable} volumes are refused: leave --validation out to see why)" if unusable else ""
            raise InputError(
                f"validation {validation} of {len(everyone)} patients leaves none to train on; give a smaller share"
                f"{refused}"
            )
        # By a hash of the name, so that patients who are added later move few of the others.
        chosen = set(sorted(everyone, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:count])
    elif held_out:
        names = {name for case in cases for name in (case.name, stem_of(case.image))}
        if unknown := sorted(set(held_out) - names - everyone):
            raise InputError(
                f"held-out cases {', '.join(unknown)} are not in the data; a case is named by its file without _ct and "
                "suffix"
            )
        chosen = {
            patient
            for case, patient in zip(cases, patients, strict=True)
            if not {patient, case.name, stem_of(case.image)}.isdisjoint(held_out)
        }
    else:
        sections = {
            section: {p for case, p in zip(cases, patients, strict=True) if (case.section or "training") == section}
            for section in ("training", "validation")
        }
        if both := sorted(sections["training"] & sections["validation"]):
            raise InputError(
                f"the data's own split has patients on both sides: {', '.join(both[:10])}; split it anew with "
                "--validation or --held_out"
            )
        chosen = sections["validation"]
    return [(patient, "validation" if patient in chosen else "training") for patient in patients]


def make_datalist(findings: Sequence[Finding], placed: Sequence[tuple[str, str]]) -> dict[str, list]:
    """The usable cases as a MONAI datalist; "held_out" lists the validation cases by what their latents are called.

    These are named after the file, so a name that the file's does not begin with is of no use to the other stages, nor
    is one that a training file's begins with, too: its latents would be kept out with the case's own. Then the file's
    stem stands for the case.

    Args:
        findings: see :func:`survey`.
        placed: patient and section of each, see :func:`split`.

    Raises:
        InputError: a training file's name begins with that of a held-out file and an underscore.
    """
    trained = [
        stem_of(finding.case.image)
        for finding, (_, section) in zip(findings, placed, strict=True)
        if finding.refused is None and section == "training"
    ]
    lists: dict[str, list] = {name: [] for name in LISTS}
    for finding, (patient, section) in zip(findings, placed, strict=True):
        if finding.refused is not None:
            continue
        case = finding.case
        item: dict[str, Any] = {"name": case.name, "patient": patient, "image": str(case.image)}
        if case.label is not None:
            item["label"] = str(case.label)
        if case.region:
            item["region"] = list(case.region)
        if case.modality != "ct":
            item["modality"] = case.modality
        lists[section].append(item)
        if section == "validation":
            lists["held_out"].append(_latents_name(case, trained))
    return lists


def _latents_name(case: Case, trained: Sequence[str]) -> str:
    """By what a held-out case's latents are told from those of the training files, whose stems are given."""
    stem = stem_of(case.image)
    for name in (case.name, stem):
        if belongs(stem, name) and not any(belongs(other, name) for other in trained):
            return name
    taken = next(other for other in trained if belongs(other, stem))
    raise InputError(
        f"{case.image} is held out and {taken} is not, though its name begins alike, so that stages 2 and 3 would keep "
        f"both out; allowed are files to train on whose names do not begin with {stem}_: rename one of the two, or "
        "hold both out"
    )


def check_ours(path: Path, report: Path) -> None:
    """Refuse to write over a datalist or a report that no earlier run wrote.

    Raises:
        InputError: there is one.
    """
    for file, is_ours in (
        (path, lambda found: found.keys() == set(LISTS)),
        (report, lambda found: found.keys() >= REPORTED),
    ):
        check_own_json(file, is_ours, "`maisi prepare`", "--output")


def describe(
    findings: Sequence[Finding],
    placed: Sequence[tuple[str, str]],
    label_map: str | Path,
    label_names: Mapping[int, str],
) -> dict[str, Any]:
    """What was found, as JSON values; :func:`as_text` shows it."""
    usable = [finding for finding in findings if finding.refused is None]
    mapping = read_label_map(label_map)
    counts = Counter(label for finding in usable for label in finding.labels or ())
    patients = {
        section: len(
            {
                patient
                for finding, (patient, where) in zip(findings, placed, strict=True)
                if where == section and finding.refused is None
            }
        )
        for section in ("training", "validation")
    }
    return {
        "volumes": len(findings),
        "usable": len(usable),
        "refused": {str(finding.case.image): finding.refused for finding in findings if finding.refused is not None},
        "patients": patients,
        "modalities": dict(Counter(finding.case.modality for finding in usable)),
        "spacing_mm": _range([finding.spacing for finding in usable]),
        "size": _range([finding.size for finding in usable]),
        "masks": sum(finding.labels is not None for finding in usable),
        "label_map": str(label_map),
        "labels": [
            {
                "label": label,
                "cases": counts[label],
                "read_as": _meaning(mapping, label),
                **({"called": label_names[label]} if label in label_names else {}),
            }
            for label in sorted(counts)
        ],
        "warnings": _warnings(usable, counts, mapping, label_names),
    }


def as_text(report: Mapping[str, Any], most: int = 20) -> str:
    """The report for the terminal; of refused files the first ``most``."""
    lines = [f"{report['usable']} of {report['volumes']} volumes can be used"]
    for name, values in (("spacing", report["spacing_mm"]), ("size", report["size"])):
        unit = "mm" if name == "spacing" else "voxels"
        for axis, (low, middle, high) in values.items():
            lines.append(f"{name} {axis}: {low:g} to {high:g} {unit}, median {middle:g}")
    lines += [f"modality {name}: {count}" for name, count in report["modalities"].items()]
    lines.append(f"with a mask: {report['masks']}, labels read as {report['label_map']}")
    for entry in report["labels"]:
        called = f" (called {entry['called']})" if "called" in entry else ""
        lines.append(f"  {entry['label']} = {entry['read_as']}{called}: in {entry['cases']}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    refused = list(report["refused"].items())
    lines += [f"refused: {file}: {reason}" for file, reason in refused[:most]]
    lines += [f"refused: {len(refused) - most} more, see the report"] if len(refused) > most else []
    return "\n".join(lines)


def _read(case: Case, mapping: LabelMap) -> Finding:
    """Read a case the way the training will."""
    if case.refused is not None:
        return Finding(case, refused=case.refused)
    known = [name for name in MODALITIES if name != "unknown"]
    if case.modality not in known:
        reason = f"has the modality {case.modality!r}; allowed are {', '.join(known)}: correct it, or leave it out"
        return Finding(case, refused=reason)
    mr = is_mr(case.modality)
    try:
        image = read_volume(case.image, "ct", intensity_check=not mr, modalities=("MR",) if mr else None)
        size, spacing = tuple(image.shape[1:]), tuple(round(float(mm), 4) for mm in image.pixdim)
        labels = None
        if case.label is not None:
            mask = read_numbers(case.label, mapping)
            # In one orientation, in which all that use them compare them.
            turned: list[Any] = [Orientation(axcodes="RAS", labels=None)(volume) for volume in (mask, image)]
            if difference := grid_difference(*turned):
                raise InputError(
                    f"the mask {case.label} lies on another grid than the volume (in RAS: {difference}); resample it "
                    "to the volume"
                )
            apply_label_map(mask[0].numpy(), mapping)
            labels = tuple(int(label) for label in mask.unique() if label)
    except (InputError, OSError) as error:
        return Finding(case, refused=str(error))
    return Finding(case, None, size, spacing, labels)


def _patient(case: Case, pattern: str | None) -> str:
    name = case.name
    if pattern is None:
        return case.patient or name
    try:
        match = re.search(str(pattern), name)
    except re.error as error:
        raise InputError(f"patient_pattern {pattern!r} is no regular expression: {error}") from error
    found = match and (match[1] if match.re.groups else match[0])
    if not found:
        raise InputError(f"patient_pattern {pattern!r} finds no patient in {name!r}; it must match every case's name")
    return found


def _range(values: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """axis -> [smallest, median, largest]."""
    if not values:
        return {}
    array = np.asarray(values, dtype=float)
    lows, middles, highs = array.min(0), np.median(array, 0), array.max(0)
    return {axis: [float(lows[i]), float(middles[i]), float(highs[i])] for i, axis in enumerate("xyz")}


def _meaning(mapping: Mapping[int, int], label: int) -> str:
    """What a label is read as; a class that the vocabulary lacks lies inside the body, which is added."""
    if label not in mapping:
        return "no counterpart: body"
    return VOCABULARY[mapping[label]].name if mapping[label] else "background"


def _warnings(
    usable: Sequence[Finding], counts: Mapping[int, int], mapping: Mapping[int, int], names: Mapping[int, str]
) -> list[str]:
    warnings = []
    for label in sorted(set(counts) & set(names)):
        read_as = _meaning(mapping, label)
        try:
            same = label_id(names[label]) == mapping.get(label)
        except InputError:
            same = False
        if not same:
            warnings.append(
                f"label {label} is called {names[label]!r} by the data set and would be read as {read_as!r}: if that "
                "is not meant, give a --label_map"
            )
    if others := sorted({finding.case.modality for finding in usable if is_mr(finding.case.modality)}):
        warnings.append(f"modality {', '.join(others)} is in the list: these bundles' small weights know CT alone")
    return warnings
