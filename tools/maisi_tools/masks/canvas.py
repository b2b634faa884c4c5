"""Painting solids, given in millimetres, into a label volume: the brush of the phantoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation

Point = Sequence[float] | np.ndarray
Inside = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

_STEP_MM = 9.0  # length of the straight pieces a tube's curve is made of
_BENDS = ((0.0, 2.0, 4.0), (2.0, 0.0, 7.0), (3.0, 4.0, 0.0))  # mm: how far axis i is displaced as a wave along axis j


class LabelCanvas:
    """A label volume in which points are given in mm of a template, which every seed bends and scales a little.

    The bending moves each axis by long waves along the other two, so neighbouring solids stay neighbours, and a solid
    that is connected stays connected.

    Args:
        size: voxels along x, y, z (RAS axes: x grows to the patient's right, y to the front, z upwards).
        spacing: mm along x, y, z.
        center: the template's point in the middle of the volume, mm.
        rng: draws bends and sizes; equal states paint equal volumes.

    Attributes:
        labels: uint8 array (X, Y, Z), all 0 at first.
    """

    def __init__(self, size: Sequence[int], spacing: Sequence[float], center: Point, rng: np.random.Generator) -> None:
        self.labels = np.zeros(tuple(size), dtype=np.uint8)
        self.rng = rng
        self._spacing = np.asarray(spacing, dtype=float)
        self._scale = rng.uniform(0.95, 1.08) * rng.uniform(0.98, 1.02, size=3)
        self._amplitude = np.asarray(_BENDS) * rng.uniform(-1, 1, size=(3, 3))
        self._wavelength = rng.uniform(220, 420, size=(3, 3))
        self._phase = rng.uniform(0, 2 * np.pi, size=(3, 3))
        self._axes = [
            (np.arange(n) - (n - 1) / 2) * mm / scale + middle
            for n, mm, scale, middle in zip(size, spacing, self._scale, center, strict=True)
        ]

    @property
    def thinnest_mm(self) -> float:
        """Radius from which on a tube is one connected set of voxels."""
        return 0.55 * float(np.linalg.norm(self._spacing / self._scale))

    def paint(
        self,
        label: int,
        low: Point,
        high: Point,
        inside: Inside,
        over: Sequence[int] | None = None,
        on_background: bool = False,
    ) -> None:
        """Write `label` where `inside` is true.

        Args:
            label: the value to write.
            low: corner of a box around the solid, mm of the template.
            high: the opposite corner.
            inside: gets x, y, z in mm (they broadcast against each other), gives booleans.
            over: labels that may be overwritten; by default all.
            on_background: whether background is overwritten too (for the body alone: nothing else leaves the skin).
        """
        reach = np.abs(self._amplitude).sum(axis=1)
        box = []
        for axis, a, b, margin in zip(self._axes, low, high, reach, strict=True):
            start, stop = np.searchsorted(axis, (a - margin, b + margin))
            if start == stop:
                return
            box.append(slice(int(start), int(stop)))
        view = self.labels[tuple(box)]
        free = np.ones(view.shape, dtype=bool) if on_background else view > 0
        if over is not None:
            free &= np.isin(view, over)
        if free.any():
            view[free & inside(*self._bent(box))] = label

    def ellipsoid(
        self,
        label: int,
        center: Point,
        radii: Point,
        power: float = 2.0,
        turn: Point = (0.0, 0.0, 0.0),
        vary: float = 0.06,
        over: Sequence[int] | None = None,
        on_background: bool = False,
        where: Inside | None = None,
    ) -> None:
        """Paint a superellipsoid: 2 is an ellipsoid, a larger `power` is boxier.

        Args:
            label: the value to write.
            center: mm.
            radii: mm; each is varied at random by the share `vary`.
            power: exponent of the superellipsoid.
            turn: degrees about x, y and z.
            vary: standard deviation of the radii, as a share.
            over: see :meth:`paint`.
            on_background: see :meth:`paint`.
            where: limits the solid further.
        """
        lengths = np.asarray(radii) * (1 + vary * self.rng.normal(size=3).clip(-2, 2))
        matrix = Rotation.from_euler("xyz", turn, degrees=True).inv().as_matrix() if any(turn) else None

        def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
            offset = [x - center[0], y - center[1], z - center[2]]
            if matrix is not None:
                offset = [sum(row[k] * offset[k] for k in range(3)) for row in matrix]
            solid = sum(np.abs(part / length) ** power for part, length in zip(offset, lengths, strict=True)) <= 1
            return solid if where is None else solid & where(x, y, z)

        # No point of a superellipsoid is farther out than the corner of its box.
        reach = lengths if matrix is None else np.full(3, np.linalg.norm(lengths) if power > 2 else lengths.max())
        self.paint(label, center - reach, center + reach, inside, over, on_background)

    def tube(
        self,
        label: int,
        points: Sequence[Point] | np.ndarray,
        radius: float | Sequence[float],
        stretch: Point = (1.0, 1.0, 1.0),
        vary: float = 0.06,
        over: Sequence[int] | None = None,
        on_background: bool = False,
        where: Inside | None = None,
    ) -> None:
        """Paint a tube along a smooth curve through `points` (mm).

        Args:
            label: the value to write.
            points: at least two.
            radius: mm, one or one for each point; never thinner than :attr:`thinnest_mm`.
            stretch: how much wider than `radius` the tube is along x, y, z.
            vary: standard deviation of the radius, as a share.
            over: see :meth:`paint`.
            on_background: see :meth:`paint`.
            where: limits the solid further.
        """
        knots = np.asarray(points, dtype=float)
        wanted = np.broadcast_to(np.asarray(radius, dtype=float), len(knots))
        wanted = wanted * (1 + vary * float(np.clip(self.rng.normal(), -2, 2)))
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
        ticks = np.linspace(0, along[-1], max(2, int(np.ceil(along[-1] / _STEP_MM)) + 1))
        curve = PchipInterpolator(along, knots)(ticks)
        radii = np.maximum(np.interp(ticks, along, wanted), self.thinnest_mm)
        width = np.asarray(stretch, dtype=float)

        for a, b, ra, rb in zip(curve[:-1], curve[1:], radii[:-1], radii[1:], strict=True):
            reach = max(ra, rb) * width
            capsule = _capsule(a / width, b / width, ra, rb, width, where)
            self.paint(label, np.minimum(a, b) - reach, np.maximum(a, b) + reach, capsule, over, on_background)

    def _bent(self, box: Sequence[slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Template coordinates of the voxels in a box, each an array that broadcasts to the box's shape."""
        straight = np.ix_(*(axis[part] for axis, part in zip(self._axes, box, strict=True)))
        bent = []
        for i in range(3):
            coordinate = straight[i]
            for j in range(3):
                if i != j:
                    wave = np.sin(2 * np.pi * straight[j] / self._wavelength[i, j] + self._phase[i, j])
                    coordinate = coordinate + self._amplitude[i, j] * wave
            bent.append(coordinate)
        return bent[0], bent[1], bent[2]


def _capsule(
    start: np.ndarray, stop: np.ndarray, first: float, last: float, width: np.ndarray, where: Inside | None
) -> Inside:
    """Points nearer to a line segment than a radius that grows linearly along it; in coordinates divided by `width`."""
    line = stop - start
    length2 = max(float(line @ line), 1e-6)

    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        offset = (x / width[0] - start[0], y / width[1] - start[1], z / width[2] - start[2])
        share = ((offset[0] * line[0] + offset[1] * line[1] + offset[2] * line[2]) / length2).clip(0, 1)
        distance2 = sum((part - share * step) ** 2 for part, step in zip(offset, line, strict=True))
        solid = distance2 <= (first + share * (last - first)) ** 2
        return solid if where is None else solid & where(x, y, z)

    return inside
