"""The masks that stage 3 trains on: a data set's own labels, completed by what the CT's intensities say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Orientation, Spacing
from tqdm import tqdm

from maisi_tools.atomic import replacing
from maisi_tools.errors import InputError
from maisi_tools.masks.body import label_from_ct
from maisi_tools.masks.label_maps import apply_label_map, read_label_map
from maisi_tools.masks.vocabulary import region_of
from maisi_tools.volumes.inputs import check_output_dir, stem_of
from maisi_tools.volumes.orientation import RestoreOrientationd
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import write_volume

CASES = "cases.json"
"""The datalist of CTs and regions that ``maisi_vae``'s encode.json takes as its input."""


def complete_masks(
    items: Sequence[Mapping[str, str]],
    output_dir: str | Path,
    label_map: str | Path,
    spacing: Sequence[float] | None = None,
) -> list[Path]:
    """Write ``<stem of the CT>_mask.nii.gz`` for every case, in the MAISI vocabulary and on the CT's grid.

    A case's own labels stay; body, airway, lung and bone that they leave open are added from the CT
    (:func:`maisi_tools.masks.body.label_from_ct`). A case without a mask gets the latter alone. Masks that are there
    already are skipped, so an interrupted run can be started again. At the end :data:`CASES` lists the CTs with the
    body regions their masks show.

    Args:
        items: cases with ``image`` and, where there is one, ``label``.
        label_map: how the labels are to be read, see :func:`maisi_tools.masks.label_maps.read_label_map`.
        spacing: mm along x, y, z (RAS): the CTs are resampled to it first (linear, own labels by nearest neighbour),
            and the masks lie on that grid. Give what the latents are encoded at: an airway two voxels wide loses half
            of its air in the resampling, and a mask of the original CT would still call all of it airway.

    Raises:
        InputError: a file cannot be read, has a label that the map does not know, or lies on another grid than its CT;
            a spacing that is not three positive numbers.
    """
    folder = check_output_dir(output_dir)
    regrid = {mode: _regrid(spacing, mode) for mode in ("bilinear", "nearest")}
    mapping = read_label_map(label_map)
    to_ras, restore = Orientation(axcodes="RAS", labels=None), RestoreOrientationd("mask", "ct")
    written = []
    for item in tqdm(items, desc="completing masks", unit="case", delay=2):
        path = folder / f"{stem_of(item['image'])}_mask.nii.gz"
        written.append(path)
        if path.exists():
            continue
        ct: Any = to_ras(read_volume(item["image"], "ct"))
        labels = None
        if "label" in item:
            own: Any = to_ras(read_volume(item["label"], "mask"))
            if own.shape != ct.shape or not np.allclose(own.affine, ct.affine, atol=1e-2):
                raise InputError(
                    f"{item['label']} lies on another grid than its CT {item['image']} ({tuple(own.shape[1:])} and "
                    f"{tuple(ct.shape[1:])} voxels); allowed is one grid for both: resample the mask to the CT"
                )
            labels = apply_label_map(np.asarray(regrid["nearest"](own)[0]), mapping)
        ct = regrid["bilinear"](ct)
        if labels is None:
            labels = np.zeros(ct.shape[1:], dtype=np.uint8)
        completed = label_from_ct(np.asarray(ct[0]), labels, [float(mm) for mm in ct.pixdim])
        mask = restore({"mask": torch.from_numpy(completed)[None], "ct": ct})["mask"]
        write_volume(path, np.asarray(mask[0]), mask.affine, "uint8")
    cases = [
        {
            "image": str(Path(item["image"]).resolve()),
            "region": list(region_of(read_volume(path, "mask").unique().tolist())),
        }
        for item, path in zip(items, written, strict=True)
    ]
    with replacing(folder / CASES) as part:
        part.write_text(json.dumps(cases, indent=1) + "\n")
    return written


def _regrid(spacing: Sequence[float] | None, mode: str) -> Callable[[Any], Any]:
    if spacing is None:
        return Compose([])
    mm = np.asarray(spacing, dtype=object)
    if mm.shape != (3,) or not all(isinstance(n, (int, float)) and 0 < n < np.inf for n in mm):
        raise InputError(
            f"spacing is {spacing!r}; allowed are three positive numbers, mm along x, y, z: [2.0, 2.0, 2.5]"
        )
    return Spacing(pixdim=tuple(map(float, mm)), mode=mode)
