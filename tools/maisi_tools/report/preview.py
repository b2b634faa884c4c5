"""A picture of a CT volume: three planes, with its mask where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from scipy import ndimage

from maisi_tools.errors import InputError
from maisi_tools.files import replacing
from maisi_tools.settings import is_range
from maisi_tools.volumes.checks import AGREES, check_labels, distance_in_voxels, whole_labels
from maisi_tools.volumes.nifti import read_nifti
from maisi_tools.volumes.stored import read_whole

BODY = 200  # every unlabelled voxel inside the skin, in MAISI's label vocabulary
SKIN_HU = -500  # half-way between air and soft tissue
PLANES = ("axial", "coronal", "sagittal")
# What the left, right, top and bottom edge of each plane show, in radiological display.
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
OVERLAY_OPACITY = 0.5
LARGEST_LABEL = int(np.iinfo(np.int32).max)
ROW_INCHES = (12.0, 6.0)  # width and height within which the three planes lie side by side, at one scale


def preview(
    volume: str | Path,
    mask: str | Path | None = None,
    output: str | Path = "preview.png",
    window: Sequence[float] = (-160, 240),
) -> Path:
    """Draw the axial, coronal and sagittal plane through the centre of the body, or of the labels of `mask`.

    Radiological display: the patient's right is on the left, anterior (axial) and superior are up. With a mask there
    is a second row with every label in its colour, the same in every picture; the body (200) is drawn as a contour.

    Args:
        volume: NIfTI file with HU, (X, Y, Z) in any orientation.
        mask: NIfTI file with labels on the grid of `volume`.
        output: the PNG file to write.
        window: HU shown as black and as white; the default is the usual abdominal soft-tissue window.

    Returns:
        the path of the picture.

    Raises:
        InputError: a file is missing or no 3D NIfTI, the two grids differ, or the window or the output is not usable.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise InputError(f"output {output} is not a .png file; give a name that ends in .png.")
    if not is_range(window):
        raise InputError(f"window {window!r} is not usable; give two values in HU, the lower one first.")
    image = load_image(volume, "volume")
    data = np.asanyarray(image.dataobj)
    labels = None if mask is None else load_labels(mask, image)
    centre = centre_of(data, labels)
    spacing = image.header.get_zooms()[:3]

    extents = {name: extent_of(data.shape, spacing, name) for name in PLANES}  # mm
    widths, heights = ([extents[name][edge] for name in PLANES] for edge in (1, 3))
    scale = min(ROW_INCHES[0] / sum(widths), ROW_INCHES[1] / max(heights))
    rows = 1 if labels is None else 2
    height = rows * (scale * max(heights) + 0.4) + 0.5  # with room for the titles
    figure = Figure(figsize=(ROW_INCHES[0], height), facecolor="black", layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False, width_ratios=widths)
    for row in range(rows):
        for axes, name in zip(panels[row], PLANES, strict=True):
            draw_ct(axes, name, plane(data, name, centre), extents[name], window)
            if labels is not None and row == 1:
                draw_labels(axes, plane(labels, name, centre), extents[name])
    size = " x ".join(str(n) for n in data.shape)
    voxel = " x ".join(f"{s:.2f}" for s in spacing)
    title = f"{Path(volume).name}: {size} voxels of {voxel} mm, window {window[0]:g} to {window[1]:g} HU"
    figure.suptitle(title, color="white", fontsize=11, parse_math=False)  # a $ in a name is a $
    with replacing(output) as part:
        figure.savefig(part, dpi=100, format="png")
    return output


def plane(data: np.ndarray, name: str, centre: Sequence[int]) -> np.ndarray:
    """Cut one plane out of a volume in RAS orientation (X, Y, Z), with rows upwards and columns to the right.

    Args:
        name: one of `PLANES`.
        centre: voxel (x, y, z) the plane goes through.
    """
    x, y, z = centre
    if name == "axial":
        return data[::-1, :, z].T
    if name == "coronal":
        return data[::-1, y, :].T
    return data[x, ::-1, :].T


def label_colour(label: int) -> np.ndarray:
    """Return the RGB colour of a label in [0, 1], shape (3,): hues by the golden ratio, so near ids look different."""
    return hsv_to_rgb((label * 0.618034 % 1.0, (1.0, 0.65)[label % 2], 1.0))


def page_colour(label: int) -> list[int]:
    """:func:`label_colour` as pages have it: RGB, 0 to 255."""
    return [int(round(255 * part)) for part in label_colour(label)]


def load_image(path: str | Path, role: str) -> nib.Nifti1Image:
    """Read a NIfTI file with one volume (X, Y, Z), turned to RAS.

    Raises:
        InputError: it is missing, damaged or no such volume; the message names it with its `role`.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{role} {path} is a folder; give a NIfTI file, which `maisi dicom_read` makes of a series.")
    if not path.is_file():
        raise InputError(f"{role} {path} does not exist; give a NIfTI file (.nii or .nii.gz).")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(f"{role} {path} cannot be read: its name does not end in .nii or .nii.gz; give a NIfTI file.")
    try:
        values, affine = read_whole(path, lambda: read_nifti(path, "picture"))
    except InputError as error:
        raise InputError(f"{role} {error}") from error
    return nib.as_closest_canonical(nib.Nifti1Image(values, affine))


def load_labels(path: str | Path, image: nib.Nifti1Image) -> np.ndarray:
    """Read a mask on the grid of `image`: (X, Y, Z) in RAS, int32.

    Raises:
        InputError: as :func:`load_image`, or it has another grid or values that are no labels.
    """
    mask = load_image(path, "mask")
    if mask.shape != image.shape:
        raise InputError(
            f"mask {path} has shape {mask.shape} and the volume {image.shape} (in RAS orientation); they must be on "
            "one grid. Resample the mask onto the volume, or give the mask written beside it."
        )
    apart = distance_in_voxels(mask.affine, image.affine, image.shape)
    if apart > AGREES:
        raise InputError(
            f"mask {path} lies up to {apart:.3g} voxels away from the volume; they must be on one grid. Resample the "
            "mask onto the volume, or give the mask written beside it."
        )
    labels = whole_labels(np.asarray(mask.dataobj), f"mask {path}")
    check_labels(labels, f"mask {path}")
    if (largest := labels.max()) > LARGEST_LABEL:
        raise InputError(f"mask {path} has the label {largest:g}; allowed are up to {LARGEST_LABEL}: renumber it.")
    return labels.astype(np.int32)


def centre_of(data: np.ndarray, labels: np.ndarray | None) -> tuple[int, int, int]:
    """Return the voxel at the centre of the organs, else of the body, else of the volume."""
    candidates = [data > SKIN_HU]
    if labels is not None:
        candidates = [(labels > 0) & (labels != BODY), labels > 0, *candidates]
    for inside in candidates:
        if inside.any():
            x, y, z = (int(round(c)) for c in ndimage.center_of_mass(inside))
            return x, y, z
    x, y, z = (n // 2 for n in data.shape)
    return x, y, z


def extent_of(shape: Sequence[int], spacing: Sequence[float], name: str) -> tuple[float, float, float, float]:
    """Where a plane of a volume lies in its picture: left, right, bottom, top in mm."""
    x, y, z = (n * s for n, s in zip(shape, spacing, strict=True))
    width, height = {"axial": (x, y), "coronal": (x, z), "sagittal": (y, z)}[name]
    return 0.0, width, 0.0, height


def draw_ct(
    axes: Axes, name: str, pixels: np.ndarray, extent: tuple[float, float, float, float], window: Sequence[float]
) -> None:
    """Draw the pixels of a plane in a grey window (lowest, highest HU), with the letters of its edges."""
    grey = matplotlib.colormaps["gray"].with_extremes(bad="magenta")  # so that NaN voxels are seen
    axes.imshow(pixels, cmap=grey, vmin=window[0], vmax=window[1], origin="lower", extent=extent)
    axes.set_axis_off()
    axes.set_title(name, color="white", fontsize=10)
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
    aligned = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (across, along) in zip(EDGES[name], places, aligned, strict=True):
        axes.text(x, y, letter, color="yellow", fontsize=9, ha=across, va=along, transform=axes.transAxes)


def draw_labels(axes: Axes, labels: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Draw every label of a plane in its colour, and the body as a contour."""
    overlay = np.zeros((*labels.shape, 4))
    for label in np.unique(labels[(labels != 0) & (labels != BODY)]):
        overlay[labels == label] = (*label_colour(int(label)), OVERLAY_OPACITY)
    axes.imshow(overlay, origin="lower", extent=extent, interpolation="nearest")
    inside = labels != 0
    if BODY in labels and not inside.all() and min(labels.shape) > 1:
        axes.contour(inside, levels=[0.5], origin="lower", extent=extent, colors=["cyan"], linewidths=0.8)
