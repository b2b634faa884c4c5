"""Where masks come from: files, the procedural generator, the learned one. One interface for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from monai.data import MetaTensor

from maisi_tools.errors import InputError
from maisi_tools.masks.class_folder import read_mask
from maisi_tools.masks.label_maps import LABEL_MAPS, LabelMap
from maisi_tools.masks.library import MaskRequest, describe
from maisi_tools.masks.phantom import make_phantom


@dataclass(frozen=True)
class SourcedMask:
    """A mask that a source gave.

    Attributes:
        mask: (1, X, Y, Z), uint8, in the vocabulary, RAS, with its affine.
        origin: where it comes from: a path, or what generates it again.
        misfits: what of the request it does not fulfil, in words; empty where it fits.
    """

    mask: MetaTensor
    origin: str
    misfits: tuple[str, ...]


class MaskSource(Protocol):
    """What gives masks for a request; the learned one is :class:`maisi_tools.cohort.generator.GeneratorSource`."""

    def masks(self, request: MaskRequest, count: int, seed: int = 0) -> list[SourcedMask]:
        """`count` masks, best match first; the same seed gives the same ones.

        Raises:
            InputError: the source has fewer masks.
        """
        ...


class FileSource:
    """Masks from files or class folders, those first that fit best.

    Args:
        paths: of the masks.
        label_map: how their labels are read.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], label_map: LabelMap = LABEL_MAPS["maisi"]) -> None:
        self.paths, self.label_map = [Path(path) for path in paths], label_map

    def masks(self, request: MaskRequest, count: int, seed: int = 0) -> list[SourcedMask]:
        """See :class:`MaskSource`; nothing is drawn here, so the seed changes nothing."""
        _check_count(count, len(self.paths))
        found = []
        for path in self.paths:
            mask = read_mask(path, self.label_map)
            found.append(SourcedMask(mask, str(path), tuple(describe(mask).misfits(request))))
        return sorted(found, key=lambda one: len(one.misfits))[:count]


class PhantomSource:
    """Masks drawn by the procedural generator (:mod:`maisi_tools.masks.phantom`).

    Args:
        spacing: mm along x, y, z.
        field_of_view: mm along x, y, z where the request names none.
    """

    def __init__(
        self, spacing: Sequence[float] = (4.0, 4.0, 2.5), field_of_view: Sequence[float] = (384.0, 320.0, 240.0)
    ) -> None:
        self.spacing, self.field_of_view = tuple(float(mm) for mm in spacing), field_of_view

    def masks(self, request: MaskRequest, count: int, seed: int = 0) -> list[SourcedMask]:
        """See :class:`MaskSource`; mask N has the seed `seed` + N."""
        kind = "head_neck" if "head" in request.region else "torso"
        view = self.field_of_view if request.field_of_view is None else request.field_of_view
        size = tuple(int(np.ceil(mm / step - 1e-6)) for mm, step in zip(view, self.spacing, strict=True))
        affine = torch.diag(torch.tensor([*self.spacing, 1.0], dtype=torch.float64))
        found = []
        for one in range(seed, seed + count):
            labels = torch.from_numpy(make_phantom(kind, size, self.spacing, one))[None]
            mask = MetaTensor(labels, affine=affine)
            found.append(SourcedMask(mask, f"phantom {kind} seed {one}", tuple(describe(mask).misfits(request))))
        return found


def _check_count(count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise InputError(f"{count} masks were asked for; allowed are 1 to {available}, as many as the source has")
