"""Whether a segmentation network sees in a CT what its mask says, so that a CT can be drawn again or left out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from maisi_tools.errors import InputError
from maisi_tools.masks.body import labels_of_more
from maisi_tools.masks.vocabulary import display_name, label_of
from maisi_tools.metrics.overlap import dice
from maisi_tools.metrics.segmentation import BundleSegmenter
from maisi_tools.metrics.segmenters import Segmenter, open_segmenter
from maisi_tools.volumes.checks import check_ct_intensities, check_finite
from maisi_tools.volumes.writing import write_volume

logger = logging.getLogger(__name__)


class Judge:
    """Whether a segmentation network finds a mask's organs in a CT that was made from it.

    Args:
        segmenter: see :func:`~maisi_tools.metrics.segmenters.open_segmenter`.
        min_dice: an organ with a lower Dice is not shown: a number for all, or organ -> number for these
            alone. A number leaves out, too, what a mask may have all of under one label, of which a segmenter knows a
            part: see :func:`~maisi_tools.masks.body.labels_of_more`.

    Raises:
        InputError: no such organ, one that the segmenter does not know, or a number outside 0 to 1.
    """

    def __init__(self, segmenter: Segmenter, min_dice: float | Mapping[str, float] = 0.5) -> None:
        if segmenter.segment is None:
            raise InputError(f"{segmenter.name} finds no organs of its own; give a segmentation bundle's folder")
        self.segmenter = segmenter
        known = sorted(set(segmenter.label_map.values()) - {0})
        self.named = isinstance(min_dice, Mapping)
        soft = [label for label in known if label not in labels_of_more()]
        wanted = min_dice if isinstance(min_dice, Mapping) else dict.fromkeys(soft, min_dice)
        self.min_dice = {label_of(name, background=False): value for name, value in wanted.items()}
        if not self.min_dice:
            raise InputError(f"{segmenter.name} segments bones alone; name those to look for: min_dice {{skull: 0.5}}")
        for label, value in self.min_dice.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"min_dice is {value!r}; allowed is a number from 0 to 1")
            if label not in known:
                raise InputError(
                    f"min_dice names {display_name(label)}, which {segmenter.name} does not segment; allowed are "
                    f"{', '.join(map(display_name, known)) or 'no organs'}"
                )

    def __call__(self, hu: np.ndarray, mask: Tensor) -> dict[str, Any]:
        """``dice`` of each organ by its name, and the names that are ``not_shown``; all where the CT is none.

        Args:
            hu: CT (X, Y, Z).
            mask: (1, X, Y, Z), in the vocabulary, with the affine of both.
        """
        affine = mask.affine.cpu() if isinstance(mask, MetaTensor) else torch.eye(4)
        labels = np.asarray(mask[0].cpu()).round().astype(int)
        found = self._found(hu, affine)
        there = set(np.unique(labels).tolist())
        there -= set() if self.named else labels_of_more(there)
        present = [label for label in self.min_dice if label in there]
        dices = {label: round(dice(found == label, labels == label), 4) for label in present}
        return {
            "dice": {display_name(label): value for label, value in dices.items()},
            "not_shown": [display_name(label) for label, value in dices.items() if value < self.min_dice[label]],
        }

    def _found(self, hu: np.ndarray, affine: Tensor) -> np.ndarray:
        """Labels of a CT; nothing in a draw that nobody would take for one, such as of one value or of NaN."""
        try:
            check_finite(hu, "the draw")
            check_ct_intensities(hu.astype(np.int16), "the draw")
        except InputError as error:
            logger.warning("the judge sees nothing: %s", error)
            return np.zeros(hu.shape, np.uint8)
        with tempfile.TemporaryDirectory(prefix="maisi-") as scratch:
            path = write_volume(Path(scratch) / "ct.nii.gz", hu, affine.numpy(), np.int16)
            return self.segmenter(path, MetaTensor(hu[None], affine=affine), may_be_empty=True)


def open_judge(
    segmenter: str | None, label_map: str | None, min_dice: Any, device: str | torch.device = "cpu"
) -> Judge | None:
    """What ``judge`` of the config means: a :class:`Judge` by the segmenter of that name, or None.

    Args:
        segmenter, label_map: see :func:`~maisi_tools.metrics.segmenters.open_segmenter`.
        min_dice: see :class:`Judge`; None for its default.

    Raises:
        InputError: see there and :class:`Judge`; or there is no segmenter for the other two.
    """
    if segmenter is None:
        for name, value in (("judge_label_map", label_map), ("min_dice", min_dice)):
            if value is not None:
                raise InputError(f"{name} is {value!r}, but there is no judge to use it: give judge, or leave it out")
        return None
    opened = open_segmenter(segmenter, label_map, str(device))
    return Judge(opened) if min_dice is None else Judge(opened, min_dice)


def weights_of(networks: Iterable[Any]) -> list[Path]:
    """The weights' files of the networks that judge or measure a run, for its record.

    Args:
        networks: :class:`Judge`, :class:`~maisi_tools.metrics.segmentation.BundleSegmenter`, or None; those whose
            weights are no file of a bundle have none.
    """
    segmenters = [one.segmenter.segment if isinstance(one, Judge) else one for one in networks]
    return [one.weights for one in segmenters if isinstance(one, BundleSegmenter)]
