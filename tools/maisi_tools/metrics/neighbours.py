"""Is a sample a copy of a training volume, or of its mirror image? Its distance, against that of real ones kept out."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import fft, ndimage
from tqdm import tqdm

from maisi_tools.errors import InputError
from maisi_tools.masks.body import SKIN_HU
from maisi_tools.metrics.summary import tabulate
from maisi_tools.volumes.inputs import check_output_dir, short_names, stem_of
from maisi_tools.volumes.nifti import read_nifti_grid
from maisi_tools.volumes.normalise import HU_RANGE
from maisi_tools.volumes.reading import read_ras
from maisi_tools.volumes.stored import read_whole

GRID_MM = 10.0
"""Voxels of the comparison: coarse enough that noise and sharpness, in which a copy differs from its original, hardly
count, and fine enough to tell patients apart. Measured on OpenKBP: 14 kept-out patients are 201 to 379 HU away from the
nearest of 223 others, VAE reconstructions of six of these 62 to 77 HU from their originals, and cut by some centimetres
102 to 132 HU."""

SEARCH_MM = (80.0, 80.0)
"""How far volumes are shifted against each other in plane; along the patient, as far as :data:`OVERLAP` allows."""

OVERLAP = 0.5
"""Share of the smaller body that must lie in the other."""

LOWEST_HU = HU_RANGE[0]
"""Stands for 0 in :class:`CoarseVolume`."""


@dataclass(frozen=True)
class CoarseVolume:
    """A CT on a grid of :data:`GRID_MM`.

    Attributes:
        name: of the case.
        hu: (X, Y, Z), float32, in HU above :data:`LOWEST_HU`, so that air is 0.
        body: voxels denser than :data:`maisi_tools.masks.body.SKIN_HU`.
    """

    name: str
    hu: np.ndarray
    body: np.ndarray


def coarse_volume(ct: np.ndarray, spacing: Sequence[float], name: str = "") -> CoarseVolume:
    """Average a CT (X, Y, Z) in HU, RAS, with `spacing` in mm, to a grid of :data:`GRID_MM`.

    It is cut to the slices with tissue first: some CTs are padded with air above and below.

    Raises:
        InputError: there is no tissue in it, or so little that none is left on that grid.
    """
    slices = np.flatnonzero((ct > SKIN_HU).any(axis=(0, 1)))
    if not slices.size:
        raise InputError(f"{name or 'the CT'} has no voxel above {SKIN_HU:g} HU; give a CT with a patient in it")
    ct = np.clip(ct[..., slices[0] : slices[-1] + 1], *HU_RANGE).astype(np.float32)
    steps = GRID_MM / np.asarray(spacing, dtype=float)
    # A Gaussian as wide as the coarse voxel, so that where a voxel's border falls in the anatomy does not matter.
    smooth = ndimage.gaussian_filter(ct, steps / 2, mode="nearest", truncate=2)
    # Sampled at the middles of the coarse voxels, in voxels of the CT.
    shape = _coarse_shape(ct.shape, spacing)
    hu = ndimage.affine_transform(smooth, steps, (steps - 1) / 2, shape, order=1, mode="nearest") - np.float32(
        LOWEST_HU
    )
    body = hu > SKIN_HU - LOWEST_HU
    if not body.any():
        raise InputError(
            f"{name or 'the CT'} has no tissue above {SKIN_HU:g} HU that is left at {GRID_MM:g} mm; give a CT with a "
            "patient in it"
        )
    return CoarseVolume(name, hu, body)


def nearest_training(queries: Sequence[CoarseVolume], training: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The training volume that is nearest to each query.

    The distance of two volumes is the root mean square difference in HU over what is body in either of them and lies
    in both, at the shift where it is least (whole coarse voxels), or that to the mirror image (left and right) where
    this is nearer: networks are trained with both. All shifts are tried at once by Fourier transforms; the training
    files are read one after another.

    Args:
        queries: the volumes asked about.
        training: CT files.

    Returns:
        For each query ``{"case", "distance_hu", "nearest", "to_second"}``: the last is the distance over that to the
        second nearest, far below 1 for a copy whatever the sharpness (1 where there is one training volume), unless
        the training volumes have a second scan of that patient; the same one under two names counts once. The
        distance is infinite where no shift has the overlap.

    Raises:
        InputError: a file is no CT, or no query is given.
    """
    if not queries or not training:
        raise InputError(f"{len(queries)} volumes against {len(training)} training volumes; give at least one of each")
    sizes = [query.hu.shape for query in queries] + [_file_shape(path) for path in training]
    largest = np.max(sizes, axis=0)
    reach = np.array([*(round(mm / GRID_MM) for mm in SEARCH_MM), largest[2] - 1])
    shape = [fft.next_fast_len(int(n), real=True) for n in largest + reach]
    spectra = [_Spectra.of(query, shape) for query in queries]
    distances = np.full((len(queries), len(training)), np.inf)
    contents = []
    for column, path in enumerate(tqdm(training, desc="comparing", unit="volume", delay=2)):
        other = read_coarse(path)
        contents.append((other.hu.shape, hashlib.sha256(other.hu.tobytes()).digest()))
        for seen in (other, CoarseVolume(other.name, other.hu[::-1], other.body[::-1])):
            theirs = _Spectra.of(seen, shape)
            for row, (query, ours) in enumerate(zip(queries, spectra, strict=True)):
                shift = _best_shift(ours, theirs, reach, shape)
                if shift is not None:
                    distances[row, column] = min(distances[row, column], _distance(query, seen, shift))
    found, names = [], short_names(training)
    for query, to_training in zip(queries, distances, strict=True):
        nearest = int(np.argmin(to_training))
        others = [content != contents[nearest] for content in contents]
        first, second = to_training[nearest], min(to_training[others], default=np.inf)
        found.append(
            {
                "case": query.name,
                "distance_hu": round(float(first), 2),
                "nearest": names[nearest],
                "to_second": round(float(first / second), 4) if 0 < second < np.inf else 1.0,
            }
        )
    return found


def score_samples(
    samples: Sequence[Mapping[str, str]],
    training: Sequence[Mapping[str, str]],
    kept_out: Sequence[Mapping[str, str]],
    output_dir: str | Path,
) -> dict[str, dict[str, float]]:
    """Distances of samples and of kept-out volumes to the training set, as ``metrics.csv`` and ``summary.json``.

    Args:
        samples: ``{"image": CT file}`` of each sample.
        training: the same of the volumes that the network was trained on.
        kept_out: the same of real volumes of other patients.
        output_dir: where the tables go.

    Returns:
        The summary: ``distance_hu``, ``to_second`` and ``ratio`` (distance over the mean distance of the kept-out
        volumes) of the samples, and the former two as ``kept_out_...``.

    Raises:
        InputError: nothing is kept out, or nothing that can be compared, or as :func:`nearest_training`.
    """
    folder = check_output_dir(output_dir)
    if not kept_out:
        raise InputError("no kept-out volume is given, to compare the samples' distances with; give at least one")
    names = short_names([item["image"] for item in samples])
    names += [f"kept out: {name}" for name in short_names([item["image"] for item in kept_out])]
    queries = [read_coarse(item["image"]) for item in (*samples, *kept_out)]
    found = nearest_training(queries, [item["image"] for item in training])
    number = len(samples)
    comparable = [row["distance_hu"] for row in found[number:] if 0 < row["distance_hu"] < np.inf]
    if not comparable:
        raise InputError(
            "each kept-out volume is a copy of a training volume or overlaps none enough to be compared; give volumes "
            "of other patients and of the same region"
        )
    usual = statistics.fmean(comparable)
    rows = []
    for place, row in enumerate(found):
        figures = {key: value for key, value in row.items() if key != "case"}
        if place < number:
            rows.append({**figures, "ratio": round(row["distance_hu"] / usual, 4)})
        else:
            rows.append({f"kept_out_{key}": value for key, value in figures.items()})
    return tabulate(folder, dict(zip(names, rows, strict=True)))


def read_coarse(path: str | Path) -> CoarseVolume:
    """Read a CT file as a :class:`CoarseVolume`.

    Raises:
        InputError: it is no CT, or has no tissue.
    """
    ct = read_ras(path, "ct")
    return coarse_volume(ct.as_tensor()[0].numpy(), [float(mm) for mm in ct.pixdim], stem_of(path))


@dataclass(frozen=True)
class _Spectra:
    """Fourier transforms of a volume's parts, for sums over all shifts at once."""

    hu: np.ndarray
    squares: np.ndarray
    seen: np.ndarray
    body: np.ndarray

    @classmethod
    def of(cls, volume: CoarseVolume, shape: Sequence[int]) -> _Spectra:
        parts = (volume.hu / 1000, (volume.hu / 1000) ** 2, np.ones(volume.hu.shape), volume.body)
        return cls(*(fft.rfftn(part.astype(np.float32), shape) for part in parts))


def _best_shift(a: _Spectra, b: _Spectra, reach: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """The shift s, in voxels, for which b's voxel x lies best on a's voxel x + s; None where none has the overlap."""

    def correlate(spectrum: np.ndarray) -> np.ndarray:
        return fft.irfftn(spectrum, shape)

    squares = correlate(a.squares * b.seen.conj() + a.seen * b.squares.conj() - 2 * a.hu * b.hu.conj())
    common = a.body * b.body.conj()
    both = correlate(common)
    either = correlate(a.body * b.seen.conj() + a.seen * b.body.conj() - common)
    smaller = min(float(s.body[0, 0, 0].real) for s in (a, b))
    # Counts come out of the transforms with a rounding error far below a quarter. One voxel is common at least.
    error = np.where(both >= max(OVERLAP * smaller, 1) - 0.25, squares / np.maximum(either, 1), np.inf)
    for axis, limit in enumerate(reach):
        shifts = np.minimum(np.arange(shape[axis]), shape[axis] - np.arange(shape[axis]))
        error[(slice(None),) * axis + (shifts > limit,)] = np.inf
    if not np.isfinite(error).any():
        return None
    best = np.array(np.unravel_index(np.argmin(error), error.shape))
    return np.where(best > np.asarray(shape) // 2, best - shape, best)


def _distance(a: CoarseVolume, b: CoarseVolume, shift: np.ndarray) -> float:
    """Root mean square difference at one shift, without the Fourier transforms' rounding."""
    ours = tuple(slice(max(0, s), min(n, m + s)) for s, n, m in zip(shift, a.hu.shape, b.hu.shape, strict=True))
    theirs = tuple(slice(part.start - s, part.stop - s) for part, s in zip(ours, shift, strict=True))
    counted = a.body[ours] | b.body[theirs]
    return float(np.sqrt(np.mean((a.hu[ours] - b.hu[theirs])[counted] ** 2, dtype=np.float64)))


def _coarse_shape(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    return tuple(max(1, round(n * mm / GRID_MM)) for n, mm in zip(shape, spacing, strict=True))


def _file_shape(path: str | Path) -> tuple[int, ...]:
    """Coarse shape of a file's volume in RAS; from the header, where it is NIfTI."""
    if not str(path).lower().endswith((".nii", ".nii.gz")) or not Path(path).is_file():
        return read_coarse(path).hu.shape
    shape, affine = read_whole(path, lambda: read_nifti_grid(path, "ct"))
    order = [int(axis) for axis in np.argsort(nib.io_orientation(affine)[:, 0])]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return _coarse_shape([shape[axis] for axis in order], [spacing[axis] for axis in order])
