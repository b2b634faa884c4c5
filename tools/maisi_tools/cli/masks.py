"""Commands that make and find masks.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maisi_tools.cli.options import KIND, SIZE, SPACING, amounts, check_seed, listed, triple
from maisi_tools.errors import InputError


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
    check_seed(seed)
    size, spacing = triple("size", size, int), triple("spacing", spacing, float)

    from maisi_tools.masks.phantom import write_phantom

    write_phantom(Path(str(output)), kind, size, spacing, seed)
    print(output)


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
        insert: lesion -> its diameter in mm, for example "{hepatic tumor: 25}"; several: "{lung tumor: [20, 12]}".
        augment: lesion -> factor of its diameter, for example "{hepatic tumor: 1.1}".
        shift: mm by which augmented lesions are moved.
        elastic: mm by which augmented lesions are deformed.
        flip: exchange left and right.
        spacing: mm along x, y, z of a new grid, for example 2,2,2.5.
        size: voxels along x, y, z of a new grid.
        keep: organs that must survive on the new grid, for example liver,spleen; it is laid about them.
        seed: of all that is drawn; the same seed gives the same file.
    """
    check_seed(seed)
    new_spacing = None if spacing is None else triple("spacing", spacing, float)
    new_size = None if size is None else triple("size", size, int)
    factors, diameters, zooms = amounts("resize", resize), amounts("insert", insert), amounts("augment", augment)

    from maisi_tools.masks.edits import edit_file
    from maisi_tools.masks.label_maps import read_label_map

    changes = edit_file(
        str(mask),
        str(output),
        read_label_map(str(label_map)),
        remove=listed(remove),
        resize=factors,
        insert=diameters,
        augment=zooms,
        shift_mm=shift,
        elastic_mm=elastic,
        flip=flip,
        spacing=new_spacing,
        size=new_size,
        organs=listed(keep),
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
    view = None if field_of_view is None else triple("field_of_view", field_of_view, float)

    from maisi_tools.masks.label_maps import read_label_map
    from maisi_tools.masks.library import MaskRequest, read_index, search

    request = MaskRequest(listed(region), listed(organs), view)
    for path, misfits in search(read_index(str(folder), read_label_map(str(label_map))), request)[:count]:
        print(f"{path}: {'; '.join(misfits) or 'fits'}")
