"""Fields of view that weights know, by name: size times spacing decides more than all else how real a volume looks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from maisi_tools.errors import InputError

logger = logging.getLogger(__name__)

RARE = 0.005
"""Share of the training data below which a preset is offered with a warning."""

FAR = 1.3
"""A field of view is far from a preset's where it is so many times as long or as short along an axis."""


@dataclass(frozen=True)
class Preset:
    """A field of view.

    Attributes:
        size: voxels along x, y, z.
        spacing: mm along x, y, z.
        region: body regions, from top to bottom; empty where it is for any.
        share: of the weights' training data that it stands for, where that is known.
        modality: that goes with it; None for whichever is asked for.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    region: tuple[str, ...] = ()
    share: float | None = None
    modality: str | None = None

    @property
    def field_of_view(self) -> tuple[float, ...]:
        """Mm along x, y, z."""
        return tuple(n * mm for n, mm in zip(self.size, self.spacing, strict=True))


def _ct(region: str, share: float, size: tuple[int, int, int], *spacing: float) -> tuple[str, Preset]:
    x, y, z = spacing
    return region.replace(" ", "_"), Preset(size, (x, y, z), tuple(region.split()), share)


def _mr(size: tuple[int, int, int], millimetres: tuple[float, float, float], modality: str | None = None) -> Preset:
    x, y, z = (round(mm / n, 4) for mm, n in zip(millimetres, size, strict=True))
    return Preset(size, (x, y, z), (), None, modality)


PRESETS: dict[str, dict[str, Preset]] = {
    # Median size and spacing of the CT training set of NV-Generate-CTMR, with their share of it.
    "ct": dict(
        (
            _ct("chest abdomen", 0.5855, (512, 512, 128), 0.781, 0.781, 2.981),
            _ct("chest", 0.3835, (512, 512, 128), 0.684, 0.684, 2.422),
            _ct("chest abdomen lower", 0.0142, (512, 512, 256), 0.793, 0.793, 1.826),
            _ct("lower", 0.0061, (512, 512, 384), 0.839, 0.839, 0.728),
            _ct("abdomen lower", 0.0037, (512, 512, 384), 0.808, 0.808, 0.729),
            _ct("head chest abdomen", 0.0033, (512, 512, 384), 0.977, 0.977, 2.103),
            _ct("abdomen", 0.0013, (512, 512, 128), 0.723, 0.723, 1.182),
            _ct("head chest abdomen lower", 0.0013, (512, 512, 384), 1.367, 1.367, 4.603),
            _ct("head chest", 0.0010, (512, 512, 128), 0.645, 0.645, 2.219),
            ("any_384mm", Preset((256, 256, 256), (1.5, 1.5, 1.5))),
            ("any_410mm", Preset((512, 512, 128), (0.8, 0.8, 2.5))),
            ("any_512mm", Preset((512, 512, 512), (1.0, 1.0, 1.0))),
        )
    ),
    # Median fields of view of its MR training set; the sizes are ours, near those of the release.
    "mr": {
        "brain_t1": _mr((128, 256, 256), (160, 256, 256), "mri_t1"),
        "brain_t2": _mr((256, 256, 128), (240, 240, 162), "mri_t2"),
        "brain_flair": _mr((128, 256, 256), (200, 250, 250), "mri_flair"),
        "prostate_t2": _mr((256, 256, 128), (170, 170, 90), "mri_t2"),
        "breast_t1": _mr((128, 256, 256), (174, 200, 200), "mri_t1"),
        "abdomen_t1": _mr((256, 256, 256), (380, 309, 288), "mri_t1"),
        "abdomen_t2": _mr((256, 256, 256), (350, 350, 246), "mri_t2"),
    },
    "mr_brain": {
        "axial": _mr((256, 256, 128), (240, 240, 170)),
        "sagittal": _mr((128, 256, 256), (176, 250, 250)),
        "coronal": _mr((256, 128, 256), (240, 200, 240)),
    },
    # About the quartiles of OpenKBP, which is what the small weights know.
    "small": {
        "head_neck": Preset((112, 80, 112), (4.0, 4.0, 2.5), ("head", "chest")),
        "head_neck_narrow": Preset((64, 80, 112), (4.0, 4.0, 2.5), ("head", "chest")),
        "head_neck_wide": Preset((128, 80, 128), (4.5, 4.0, 2.9), ("head", "chest")),
    },
}
"""Weights -> name -> field of view."""


def presets_of(weights: str | None) -> dict[str, Preset]:
    """The presets of a set of weights; None, for weights of one's own, has none.

    Raises:
        InputError: no such weights.
    """
    if weights is None:
        return {}
    if weights not in PRESETS:
        raise InputError(f"presets is {weights!r}; allowed are {', '.join(PRESETS)}, the weights that have presets")
    return PRESETS[weights]


def find_preset(name: str | None, weights: str | None) -> Preset | None:
    """A preset by its name; None for None. The log says what it is; a rare one is a warning.

    Raises:
        InputError: these weights have no such preset.
    """
    known = presets_of(weights)
    if name is None:
        return None
    if name not in known:
        raise InputError(f"preset is {name!r}; allowed for these weights are {', '.join(known) or 'none'}")
    found = known[name]
    if found.share is not None and found.share < RARE:
        logger.warning("%s: so rare in training that the volume may look wrong", describe(name, found))
    else:
        logger.info("%s", describe(name, found))
    return found


def describe(name: str, preset: Preset) -> str:
    """A preset in words."""
    extent = _times(preset.field_of_view)
    text = f"preset {name}, {_times(preset.size)} voxels of {_times(preset.spacing)} mm: {extent} mm"
    return text if preset.share is None else f"{text}, {preset.share:.2%} of the training data"


def warn_far(size: Sequence[int], spacing: Sequence[float], weights: str) -> None:
    """Log a warning where a field of view is far from all that weights know, with the preset that is nearest.

    Args:
        size: voxels along x, y, z.
        spacing: mm along x, y, z.
        weights: see :data:`PRESETS`.

    Raises:
        InputError: no such weights.
    """
    known = presets_of(weights)
    extent = [float(n * mm) for n, mm in zip(size, spacing, strict=True)]

    def distance(name: str) -> float:
        return max(abs(math.log(a / b)) for a, b in zip(extent, known[name].field_of_view, strict=True))

    nearest = min(known, key=distance)
    if distance(nearest) > math.log(FAR):
        logger.warning(
            "field of view %s mm is far from all that these weights know; nearest is %s",
            _times(extent),
            describe(nearest, known[nearest]),
        )


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
