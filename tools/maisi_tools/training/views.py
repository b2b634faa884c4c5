"""Views: the ways in which one volume enters the latent cache, such as resampled, mirrored or turned."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, Flip, MapTransform, Spacing, SpatialResample
from scipy.spatial.transform import Rotation

from maisi_tools.datasets.complete import twins_of
from maisi_tools.errors import InputError
from maisi_tools.masks.edits import swap_sides
from maisi_tools.volumes.checks import check_shape

NAME_HELP = "letters, digits and hyphens, because it stands in the latent's file name"


@dataclasses.dataclass(frozen=True)
class View:
    """One way to see a volume (1, X, Y, Z), RAS, in HU.

    Args:
        name: what the latent's file name has after that of the volume; empty for the plain one.
        spacing: mm along x, y, z to resample to; an axis may also be a range [lowest, highest] to draw from (axes of
            one range get one value). None keeps the volume's.
        flip: mirror left and right.
        rotate: largest angle in degrees, drawn for each of the three axes; the grid turns about its centre.
        shift_hu: largest offset of all intensities in HU.

    What is drawn depends on the seed, the volume's name and the view's alone. A view only changes the grid on which the
    volume is seen, so the affine tells where its voxels lie in the patient, and a mask can follow
    (:class:`maisi_tools.training.controlnet.FitMaskd`); a mirrored grid is left-handed.

    Raises:
        InputError: a value that is none of these.
    """

    name: str = ""
    spacing: Sequence[float | Sequence[float]] | None = None
    flip: bool = False
    rotate: float = 0.0
    shift_hu: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "a").isalnum() and self.name:
            raise InputError(f"a view's name is {self.name!r}; allowed are {NAME_HELP}: correct views")
        if self.spacing is not None and not _is_spacing(self.spacing):
            raise InputError(
                f"view {self.name!r} has the spacing {self.spacing!r}; allowed are three positive numbers, mm along x, "
                "y, z, each of which may be a range: [2.0, 2.0, [2.0, 3.0]]"
            )
        if not isinstance(self.flip, bool):
            raise InputError(f"view {self.name!r} has flip {self.flip!r}; allowed are true and false")
        for field, most in (("rotate", 180), ("shift_hu", math.inf)):
            value = getattr(self, field)
            if not _is_number(value) or not 0 <= value <= most:
                raise InputError(f"view {self.name!r} has {field} {value!r}; allowed is a number from 0 to {most:g}")

    @property
    def is_drawn(self) -> bool:
        """Whether anything of it depends on chance."""
        ranges = any(not _is_number(mm) for mm in self.spacing or ())
        return ranges or self.rotate > 0 or self.shift_hu > 0

    def settings(self, seed: int) -> dict[str, Any]:
        """What the seen volume depends on; values that do nothing are left out."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if value}
        return fields | ({"seed": seed} if self.is_drawn else {})

    def see(self, volume: Any, seed: int, stem: str, mode: str = "bilinear") -> Any:
        """The volume as this view shows it.

        Args:
            volume: ``MetaTensor`` (1, X, Y, Z), RAS.
            seed: of what is drawn.
            stem: the volume's name.
            mode: of interpolation; "nearest" for a mask.
        """
        drawn = np.random.default_rng(list(hashlib.sha256(f"{seed} {stem} {self.name}".encode()).digest()))
        steps: list[Any] = []
        if self.spacing is not None:
            ranges = [(mm, mm) if _is_number(mm) else tuple(mm) for mm in self.spacing]  # type: ignore[arg-type]
            values = {limits: float(drawn.uniform(*limits)) for limits in dict.fromkeys(ranges)}
            steps.append(Spacing(pixdim=[values[limits] for limits in ranges], mode=mode))
        if self.flip:
            steps.append(Flip(spatial_axis=0))
        if self.rotate:
            angles = drawn.uniform(-self.rotate, self.rotate, 3)
            grid = volume.clone()
            for step in steps:  # the grid alone: the voxels are interpolated once
                grid = step(grid, lazy=True)
            affine, size = _turned(grid.peek_pending_affine(), grid.peek_pending_shape(), angles)
            # The border goes on outside the volume, as FitMaskd lets the mask do.
            resample = SpatialResample(mode, "border", align_corners=False)
            steps = [functools.partial(resample, dst_affine=affine, spatial_size=size)]
        seen: Any = Compose(steps)(volume)
        return seen + drawn.uniform(-self.shift_hu, self.shift_hu) if self.shift_hu else seen


def make_views(views: Sequence[Mapping[str, Any]]) -> list[View]:
    """The views of a config: dicts with the fields of :class:`View`.

    Raises:
        InputError: none, an unknown field, a wrong value, or two views of one name.
    """
    fields = [field.name for field in dataclasses.fields(View)]
    if not isinstance(views, Sequence) or not views or not all(isinstance(view, Mapping) for view in views):
        raise InputError(f"views is {views!r}; allowed is a list of at least one, each with some of {fields}: [{{}}]")
    for view in views:
        if unknown := sorted(set(view) - set(fields)):
            raise InputError(f"a view has the entries {', '.join(unknown)}; allowed are {', '.join(fields)}")
    made = [View(**view) for view in views]
    names = [view.name for view in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"views has two of the name {', '.join(map(repr, twice))}; give each its own")
    return made


class SeeViewd(MapTransform):
    """MONAI dict transform: shows each volume (1, X, Y, Z), RAS, as the item's view has it.

    Args:
        keys: of the volumes.
        views: the views of the config, see :func:`make_views`.
        seed: of what is drawn.

    The item's ``view`` names one of them, its ``case`` the volume.

    Raises:
        InputError: a spacing at which an axis has one voxel.
    """

    def __init__(self, keys: str, views: Sequence[Mapping[str, Any]], seed: int) -> None:
        super().__init__(keys)
        self.views = {view.name: view for view in make_views(views)}
        self.seed = seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        view = self.views[data["view"]]
        seen = {key: view.see(data[key], self.seed, data["case"]) for key in self.key_iterator(data)}
        for volume in seen.values():
            check_shape(volume.shape[1:], "ct", f"{data['case']}, seen at {view.spacing} mm,")
        return {**data, **seen}


class SeeMaskd(SeeViewd):
    """As :class:`SeeViewd`, for masks: nearest labels, and on a mirrored grid left and right structures exchanged
    (:func:`~maisi_tools.datasets.complete.twins_of`).

    Raises:
        InputError: a view that shifts HU.
    """

    def __init__(self, keys: str, views: Sequence[Mapping[str, Any]], seed: int) -> None:
        super().__init__(keys, views, seed)
        if shifted := [name for name, view in self.views.items() if view.shift_hu]:
            raise InputError(f"view {shifted[0]!r} has shift_hu, but a mask has no HU; leave it out")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        view = self.views[data["view"]]
        seen = {key: view.see(data[key], self.seed, data["case"], "nearest") for key in self.key_iterator(data)}
        mirrored = {key: swap_sides(mask, twins_of(data[key])) for key, mask in seen.items() if view.flip}
        return {**data, **seen, **mirrored}


def _turned(affine: Any, size: Sequence[int], degrees: np.ndarray) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A grid turned in the patient (not among its voxels, which may be anisotropic) about its centre; and its size."""
    grid = np.asarray(affine, dtype=float)
    size = tuple(int(n) for n in size)
    centre = np.eye(4)
    centre[:3, 3] = (grid @ [*((n - 1) / 2 for n in size), 1.0])[:3]
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return torch.from_numpy(centre @ turn @ np.linalg.inv(centre) @ grid), size


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_spacing(spacing: Any) -> bool:
    if not isinstance(spacing, (list, tuple)) or len(spacing) != 3:
        return False
    ranges = [(mm, mm) if _is_number(mm) else mm for mm in spacing]
    return all(
        isinstance(mm, (list, tuple)) and len(mm) == 2 and all(map(_is_number, mm)) and 0 < mm[0] <= mm[1]
        for mm in ranges
    )
