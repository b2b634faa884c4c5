"""One page that shows real CTs beside their reconstructions and the CTs generated from the same masks."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from maisi_tools.errors import InputError
from maisi_tools.files import replacing
from maisi_tools.report.preview import (
    PLANES,
    centre_of,
    draw_ct,
    draw_labels,
    extent_of,
    load_image,
    load_labels,
    plane,
)
from maisi_tools.volumes.reading import read_ras, sidecar_if_any

COLUMN_INCHES = 3.2

STYLE = "body{background:#000;color:#ddd;font:14px sans-serif;margin:1.5em} img{max-width:100%} p{color:#aaa}"


@dataclass(frozen=True)
class Comparison:
    """What is shown of one case: column title -> CT file, in this order, and the mask they share."""

    name: str
    volumes: Mapping[str, Path]
    mask: Path | None = None


def write_comparison(
    cases: Sequence[Comparison], output: str | Path, title: str, window: Sequence[float] = (-160, 240)
) -> Path:
    """Write one self-contained HTML page: a picture a case, its planes below each other, its CTs side by side.

    All CTs of a case are cut at one place of the patient: the centre of the mask's organs, or of the first CT's body.
    The last column has the mask over the last CT. Figures that a run left in a CT's sidecar stand under the picture.

    Args:
        cases: what to show.
        output: the .html file to write.
        title: of the page.
        window: HU shown as black and as white.

    Raises:
        InputError: no case, a file that is missing or no volume, a mask on another grid than the last CT, or an
            `output` that is no .html file.
    """
    output = Path(output)
    if output.suffix.lower() != ".html":
        raise InputError(f"output {output} is not an .html file; give a name that ends in .html.")
    if not cases:
        raise InputError("there is no case to show; give at least one.")
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for case in cases:
        picture = base64.b64encode(_picture(case, window)).decode()
        parts.append(
            f"<h2>{html.escape(case.name)}</h2>\n"
            f'<img alt="{html.escape(case.name)} in three planes" src="data:image/png;base64,{picture}">\n'
            + "\n".join(f"<p>{line}</p>" for line in _figures(case))
        )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with replacing(output) as part:
        part.write_text(page, encoding="utf-8")
    return output


def _picture(case: Comparison, window: Sequence[float]) -> bytes:
    """The PNG of one case."""
    images = {title: _ct(path, title) for title, path in case.volumes.items()}
    first, last = (images[title] for title in (next(iter(images)), list(images)[-1]))
    labels = None if case.mask is None else load_labels(case.mask, last)
    reference = first if labels is None else last
    centre = centre_of(np.asanyarray(reference.dataobj), labels)
    place = reference.affine @ [*centre, 1]  # mm, the same in every volume of the patient
    columns: list[tuple[str, Any, np.ndarray | None]] = [(title, image, None) for title, image in images.items()]
    if labels is not None:
        columns.append(("mask", last, labels))

    frames = [extent_of(first.shape, first.header.get_zooms()[:3], name) for name in PLANES]
    width = COLUMN_INCHES * len(columns)
    # Rows as high as their planes are at the width of a column, and room for the titles.
    ratios = [frame[3] / frame[1] for frame in frames]
    figure = Figure(figsize=(width, COLUMN_INCHES * sum(ratios) + 0.6), facecolor="black", layout="constrained")
    panels = figure.subplots(len(PLANES), len(columns), squeeze=False, height_ratios=ratios)
    for column, (title, image, overlay) in enumerate(columns):
        data = np.asanyarray(image.dataobj)
        voxel = np.rint((np.linalg.inv(image.affine) @ place)[:3]).astype(int).clip(0, np.array(data.shape) - 1)
        for row, name in enumerate(PLANES):
            extent = extent_of(data.shape, image.header.get_zooms()[:3], name)
            axes = panels[row][column]
            draw_ct(axes, name, plane(data, name, voxel), extent, window)
            if overlay is not None:
                draw_labels(axes, plane(overlay, name, voxel), extent)
            axes.set_title(title if row == 0 else "", color="white", fontsize=11)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=90)
        return buffer.getvalue()


def _ct(path: Path, role: str) -> nib.Nifti1Image:
    """A CT of any kind that the bundles read, turned to RAS."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return load_image(path, role)
    ct: Any = read_ras(path, "ct")
    return nib.Nifti1Image(ct[0].numpy(), ct.affine.numpy())


def _figures(case: Comparison) -> list[str]:
    """A line of figures for each CT whose sidecar has some."""
    lines = []
    for title, path in case.volumes.items():
        metrics = sidecar_if_any(path).get("metrics")
        numbers = (
            {name: value for name, value in metrics.items() if type(value) in (int, float)}
            if isinstance(metrics, dict)
            else {}
        )
        if numbers:
            shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
            lines.append(html.escape(f"{title}: {shown}"))
    return lines
