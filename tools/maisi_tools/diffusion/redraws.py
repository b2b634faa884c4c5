"""Drawing a CT again, with another seed, while organs have HU that they cannot have, or are not to be seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform
from torch import Tensor

from maisi_tools.diffusion.conditions import check_is_ct, is_mr
from maisi_tools.diffusion.inferers import Draw, MaskToCT, SeedOfInferer
from maisi_tools.diffusion.noise import check_redraws, redraw_seeds
from maisi_tools.masks.intensity import hu_ranges, implausible_organs
from maisi_tools.networks import ControlledUNet
from maisi_tools.volumes.normalise import HU_RANGE

logger = logging.getLogger(__name__)


class CheckedCT(SeedOfInferer):
    """Stage 3 with the intensity check of the MAISI release: label mask (B, 1, D, H, W) -> CT of the same size.

    Args:
        inferer: draws a CT.
        redraws: how often at most a CT is drawn again; the release has 2. The draw with the fewest organs that are
            implausible or not shown is kept, the first of them.
        ranges: label -> plausible median HU where it is not that of the vocabulary, see
            :func:`~maisi_tools.masks.intensity.hu_ranges`. An MR has none.
        judge: tells which organs of the mask a CT does not show, see
            :class:`maisi_tools.metrics.judge.Judge`; None does not look.

    Returns:
        ``{"ct": CT in [0, 1], "draws": for each mask JSON with the ``seed`` that was kept and all that were ``tried``,
        each with its ``implausible`` organs and, with a ``judge``, the ``dice`` of all and the names ``not_shown``}``,
        for :class:`SplitCheckedd`.

    Raises:
        InputError: a judge, which looks at CTs, for MR.
    """

    def __init__(
        self,
        inferer: MaskToCT,
        redraws: int = 0,
        ranges: Mapping[str | int, Sequence[float] | None] | None = None,
        judge: Callable[[np.ndarray, Tensor], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.inferer = inferer
        self.redraws = check_redraws(redraws)
        self.ranges = {} if is_mr(inferer.modality) else hu_ranges(ranges)
        self.judge = judge
        if judge is not None:
            check_is_ct(inferer.modality, "a judge")

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, network: ControlledUNet, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        draws = self.inferer.draws(inputs, network)
        drawn = [self._checked(mask, draw) for mask, draw in zip(inputs.split(1), draws, strict=True)]
        return {"ct": torch.cat([ct for ct, _ in drawn]), "draws": [json.dumps(record) for _, record in drawn]}

    def _checked(self, mask: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Any]]:
        labels = np.asarray(mask[0, 0].cpu()).round().astype(int)
        tried: list[dict[str, Any]] = []
        kept: tuple[Tensor, int, int] | None = None
        for number, seed in enumerate(redraw_seeds(self.inferer.seed, self.redraws), start=1):
            ct = draw(seed)
            hu = ct[0, 0].clamp(0, 1).cpu().numpy() * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]
            wrong = implausible_organs(hu, labels, self.ranges)
            shown = self.judge(hu, mask[0]) if self.judge else {}
            tried.append({"seed": seed, "implausible": wrong, **shown})
            listed = [f"{name} has {found['median']:g} HU" for name, found in wrong.items()]
            listed += [f"{name} has a Dice of {shown['dice'][name]:g}" for name in shown.get("not_shown", ())]
            if kept is None or len(listed) < kept[2]:
                kept = ct, seed, len(listed)
            if not listed:
                break
            logger.warning("draw %d of %d, seed %d: %s", number, self.redraws + 1, seed, ", ".join(listed))
        assert kept is not None
        return kept[0], {"seed": kept[1], "tried": tried}


class SplitCheckedd(MapTransform):
    """Splits what :class:`CheckedCT` returns: ``data[key]`` becomes the CT, ``data[output_key]`` how it was drawn."""

    def __init__(self, keys: str, output_key: str = "draws") -> None:
        super().__init__(keys)
        self.output_key = output_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = data[self.keys[0]]
        if not isinstance(output, Mapping):
            return dict(data)
        draws = output["draws"]
        return {
            **data,
            self.keys[0]: output["ct"],
            self.output_key: json.loads(draws if isinstance(draws, str) else draws[0]),
        }
