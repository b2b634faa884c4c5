"""The one way to open a bundle: a stage is loaded once and called for one item after another, or run as a workflow."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import decollate_batch, list_data_collate

from maisi_tools.bundles.settings import check_given, literal


class Stage:
    """A bundle's config with settings of one's own.

    Nothing is built or loaded before it is asked for. The networks then stay in memory.

    Args:
        bundle: its folder.
        config: file name in ``configs`` (or a path), or several, each over the ones before; ``metadata.json`` lies
            beside the first.
        device: "cpu", "cuda", ...; None leaves it to the config.
        settings: keys to set, with values that may come from a file.
        logs: set up logging as the bundle's ``logging.conf`` says.
        own: further keys, with values of the caller's own: MONAI's parser evaluates them.

    Attributes:
        workflow: MONAI's, with the config.

    Raises:
        InputError: see :func:`~maisi_tools.bundles.settings.check_given`.
        FileNotFoundError: there is no such config.
    """

    def __init__(
        self,
        bundle: str | os.PathLike,
        config: str | Path | Sequence[str | Path] = "inference.json",
        device: str | None = None,
        settings: Mapping[str, Any] | None = None,
        logs: bool = False,
        **own: Any,
    ) -> None:
        root = Path(bundle)
        files = config_files(root, config)
        own = {"bundle_root": str(root), **own}
        if not logs:
            logging.getLogger(ConfigWorkflow.__module__).addFilter(_is_news)
        if device is not None:
            own["device"] = f"$torch.device({device!r})"
        given = {}
        if settings:
            given = check_given(files, settings, f"settings of {root.name}", fixed=own)
        self.workflow = ConfigWorkflow(
            config_file=files,
            meta_file=str(Path(files[0]).with_name("metadata.json")),
            logging_file=None if logs else False,
            **literal({**given, **own}),
        )

    @property
    def parser(self) -> ConfigParser:
        """Of the config; what it has built it keeps, until a key is set."""
        return self.workflow.parser

    @cached_property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self.parser.get_parsed_content("device"))

    @cached_property
    def network(self) -> Any:
        """With its weights, on the device."""
        return self.parser.get_parsed_content("network")

    @cached_property
    def preprocessing(self) -> Any:
        """From an item to what the inferer takes."""
        return self.parser.get_parsed_content("preprocessing")

    @cached_property
    def inferer(self) -> Any:
        """How the network is run."""
        return self.parser.get_parsed_content("inferer")

    @cached_property
    def postprocessing(self) -> Any:
        """From what the inferer gives to files."""
        return self.parser.get_parsed_content("postprocessing")

    def load(self) -> None:
        """Build and load now, so that what is wrong with the stage is not taken for a fault of the first item."""
        _ = self.network, self.preprocessing, self.inferer, self.postprocessing

    def __call__(self, item: Mapping[str, Any], seed: int | None = None) -> dict[str, Any]:
        """Run one item, as MONAI Label does; its files go where the config writes them.

        Args:
            item: what the preprocessing takes, such as ``{"image": path}``.
            seed: of what is drawn for it, in place of its own; None leaves that, or else the inferer's.

        Raises:
            TypeError: a seed for an inferer that draws nothing.
        """
        if seed is not None:
            if not hasattr(self.inferer, "seed"):
                raise TypeError(f"{type(self.inferer).__name__} has no seed; leave it out")
            self.inferer.seed = seed
            item = {**item, "seed": seed}  # where the preprocessing draws the noise
        batch = list_data_collate([self.preprocessing(item)])
        pred = self.inferer(batch["image"].to(self.device), self.network)
        return self.postprocessing(decollate_batch({**batch, "pred": pred})[0])

    def run(self) -> None:
        """Run the whole config, as ``python -m monai.bundle run`` does."""
        self.workflow.initialize()
        self.workflow.run()
        self.workflow.finalize()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of MONAI's log is more than that it was told not to log."""
    return not record.getMessage().startswith("Logging file is set to False")


def config_files(bundle: str | os.PathLike, config: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths of a bundle's configs, which are given by their names in ``configs`` or by paths."""
    names = [config] if isinstance(config, (str, Path)) else config
    return [str(Path(bundle) / "configs" / name) for name in names]
