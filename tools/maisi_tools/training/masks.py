"""The masks that stage 3 trains on: a data set's own labels, completed by what the CT's intensities say."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maisi_tools.masks.body import label_from_ct
from maisi_tools.masks.label_maps import apply_label_map, read_label_map
from maisi_tools.volumes.inputs import check_output_dir, stem_of
from maisi_tools.volumes.reading import read_volume
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)


def complete_masks(items: Sequence[Mapping[str, str]], output_dir: str | Path, label_map: str | Path) -> list[Path]:
    """Write ``<stem of the CT>_mask.nii.gz`` for every case, in the MAISI vocabulary and on the CT's grid.

    A case's own labels stay; body, airway, lung and bone that they leave open are added from the CT
    (:func:`maisi_tools.masks.body.label_from_ct`). A case without a mask gets the latter alone. Masks that are there
    already are skipped, so an interrupted run can be started again.

    Args:
        items: cases with ``image`` and, where there is one, ``label``.
        label_map: how the labels are to be read, see :func:`maisi_tools.masks.label_maps.read_label_map`.

    Raises:
        InputError: a file cannot be read, or has a label that the map does not know.
        ValueError: a mask has another shape than its CT.
    """
    folder = check_output_dir(output_dir)
    mapping = read_label_map(label_map)
    written = []
    for item in tqdm(items, desc="completing masks", unit="case", delay=2):
        path = folder / f"{stem_of(item['image'])}_mask.nii.gz"
        written.append(path)
        if path.exists():
            continue
        ct = read_volume(item["image"], "ct")
        hu, affine = np.asarray(ct[0]), np.asarray(ct.affine)
        labels = np.zeros(hu.shape, dtype=np.uint8)
        if "label" in item:
            own = np.asarray(read_volume(item["label"], "mask")[0])
            if own.shape != hu.shape:
                raise ValueError(f"{item['label']} has {own.shape} voxels, its CT {hu.shape}; they must be on one grid")
            labels = apply_label_map(own, mapping)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        write_volume(path, label_from_ct(hu, labels, spacing), affine, "uint8")
    return written
