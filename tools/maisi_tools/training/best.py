"""The weights that did best in validation, kept beside the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from maisi_tools.weights import save_weights


class BestWeights:
    """Evaluator's handler: writes the network whenever the key metric is higher than ever before.

    The file is one of weights, as ``model.pt``, with the metric under its name beside them. MONAI's CheckpointSaver
    forgets the metric when a run is resumed, and may then replace the best weights by worse ones.

    Args:
        path: file to write.
        network: whose weights; the one that is validated.
        resume: whether the file of an earlier part of this run, if there is one, has to be outdone.
        extra: entries of the file beside the weights and the metric.
    """

    def __init__(
        self, path: str | Path, network: nn.Module, resume: bool, extra: Mapping[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self.network = network
        self.resume = resume
        self.extra = dict(extra or {})
        self.best: float | None = None

    def attach(self, engine: Engine) -> None:
        """Compare at the end of each validation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        name = str(engine.state.key_metric_name)  # type: ignore[attr-defined]
        value = float(engine.state.metrics[name])
        if self.best is None:
            earlier = self.resume and self.path.is_file()
            self.best = torch.load(self.path, weights_only=True)[name] if earlier else float("-inf")
        if value > self.best:
            self.best = value
            save_weights(self.path, self.network.state_dict(), **self.extra, **{name: value})
