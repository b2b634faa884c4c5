"""Commands that read and write DICOM.

Imports stay inside the commands, so that `maisi --help` does not wait for torch and MONAI.
"""

from __future__ import annotations

from maisi_tools.cli.options import check_seed, need_dicom, nifti_path
from maisi_tools.errors import InputError


def dicom_read(
    path: str, output: str, series: str | None = None, series_uid: str | None = None, names: str | None = None
) -> None:
    """Make a NIfTI file of a DICOM CT series (in HU), Segmentation or RT Structure Set (a mask for maisi_controlnet).

    A series taken with a tilted gantry is resampled to a straight grid.

    Args:
        path: a folder or zip file with a CT series, an Enhanced CT, a SEG or RTSTRUCT file, or a folder or zip file
            with nothing but that file.
        output: the NIfTI file to write; a mask has the ids of MAISI's vocabulary (--label_map maisi).
        series: for a mask, folder or zip file of the CT series it was drawn on; the mask gets its grid.
        series_uid: Series Instance UID to take where there are several CT series.
        names: for a mask, a JSON file with your own names of structures, such as {"Leber": "liver", "PTV": 0}.
    """
    target = nifti_path(output)
    need_dicom()

    import numpy as np

    from maisi_tools.dicom.study import is_mask, read_mask
    from maisi_tools.volumes.grid import straighten
    from maisi_tools.volumes.reading import read_volume
    from maisi_tools.volumes.writing import write_volume

    mask = is_mask(str(path))
    for option, value in () if mask else (("series", series), ("names", names)):
        if value is not None:
            raise InputError(f"--{option} was given and {path} is no mask; leave it out.")
    if mask and series_uid is not None and series is None:
        raise InputError(f"--series_uid was given and {path} is a mask; give the folder of its CT series with --series")
    series, names, series_uid = (None if value is None else str(value) for value in (series, names, series_uid))
    if mask:
        volume = read_mask(str(path), series, names, series_uid)
    else:
        volume = read_volume(str(path), "ct", series_uid=series_uid)
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
        created: date and time to write, such as 2026-01-31T12:00:00, by default now; the same content, seed,
            conditions and time give the same UIDs.
        from_scan: whether the CT was computed from a patient's scan, whose --source is then needed; by default as the
            JSON beside it says, and so for *_recon.nii.gz and *_latent_ct.nii.gz, edited scans, and DICOM.
    """
    if seed is not None:
        check_seed(seed)
    if conditions is not None and not isinstance(conditions, dict):
        raise InputError(f"conditions {conditions!r} are not usable; give them as \"{{'steps': 30}}\".")

    need_dicom()

    import datetime
    import json

    from maisi_tools.dicom.objects import recordable
    from maisi_tools.dicom.study import edited_region, is_of_scan, write_study
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
    region = edited_region(str(ct))
    scan = is_of_scan(str(ct)) if from_scan is None else from_scan
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
        from_scan=scan,
        region=region if scan else (),
    )
    print(f"{output}: {len(files)} files")
