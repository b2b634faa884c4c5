"""Finds the training volumes of a folder and splits them by patient."""

from __future__ import annotations

import json
from pathlib import Path

from monai.data import load_decathlon_datalist

from maisi_tools.errors import InputError


def read_datalist(
    datalist: str | Path, section: str, base_dir: str | Path | None = None, required: bool = True
) -> list[dict]:
    """Read one section ("training", "validation") of a MONAI (Decathlon) datalist.

    Args:
        datalist: JSON file with a list of dicts under ``section``; relative paths are relative to ``base_dir``, or to
            the datalist's own folder when ``base_dir`` is None.
        required: whether a missing or empty section is an error.

    Raises:
        InputError: no such file, or the section is missing or empty.
    """
    path = Path(datalist)
    if not path.is_file():
        raise InputError(
            f"datalist {path} does not exist; make one with `maisi datalist FOLDER -o datalist.json`, "
            "or give a MONAI datalist with --datalist"
        )
    items: list[dict] = []
    if json.loads(path.read_text()).get(section):
        items = load_decathlon_datalist(str(path), is_segmentation=True, data_list_key=section, base_dir=base_dir)
    if required and not items:
        raise InputError(f"datalist {path} has no entries under {section!r}; it needs at least one")
    return items


def make_datalist(folder: str | Path, validation: list[str] | None = None) -> dict[str, list[dict]]:
    """List every CT below ``folder``, with its mask where there is one, split by patient.

    Recognised are ``NAME_ct.nii.gz`` with an optional ``NAME_seg.nii.gz`` beside it.

    Args:
        validation: names (``NAME``) to keep out of training.

    Raises:
        InputError: no CT found, a kept-out name does not exist, or two CTs have one name.
    """
    root = Path(folder)
    cts = sorted(root.rglob("*_ct.nii.gz"))
    if not cts:
        raise InputError(f"no *_ct.nii.gz below {root}; volumes must be named NAME_ct.nii.gz")
    names: dict[str, Path] = {}
    for ct in cts:
        name = ct.name.removesuffix("_ct.nii.gz")
        if name in names:
            raise InputError(f"{names[name]} and {ct} have the same name {name!r}; rename one, names tell cases apart")
        names[name] = ct
    kept_out = set(validation or [])
    if missing := sorted(kept_out - set(names)):
        raise InputError(f"kept-out cases not found below {root}: {', '.join(missing)}")
    lists: dict[str, list[dict]] = {"training": [], "validation": []}
    for name, ct in names.items():
        item = {"name": name, "image": str(ct.resolve())}
        mask = ct.with_name(f"{name}_seg.nii.gz")
        if mask.exists():
            item["label"] = str(mask.resolve())
        lists["validation" if name in kept_out else "training"].append(item)
    return lists
