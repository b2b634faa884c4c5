"""The learned mask generator as a source of masks, beside those of :mod:`maisi_tools.masks.sources`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from maisi_tools.bundles.stage import Stage, config_files
from maisi_tools.masks.library import MaskRequest
from maisi_tools.masks.sources import FileSource, SourcedMask
from maisi_tools.settings import check_plain, check_stage_settings

CONFIG = "mask_inference.json"

OWN_KEYS = ("bundle_root", "input", "dataset_dir", "output_dir", "organ_sizes", "seed", "num_samples", "device", "data")
"""Keys of the config that the source sets itself."""


class GeneratorSource:
    """Masks from ``mask_inference.json`` of the maisi_ldm bundle, whose networks stay in memory.

    Args:
        bundle: its folder.
        organ_sizes: organ -> ml, see :class:`~maisi_tools.mask_generator.sizes.OrganSizes`.
        settings: further keys of the config, with values that may come from a file.
        device: for the networks.
        own: further keys, with values of the caller's own.

    Raises:
        InputError: see :func:`~maisi_tools.settings.check_stage_settings`; or the config refuses a value.
    """

    def __init__(
        self,
        bundle: str | os.PathLike,
        organ_sizes: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "cpu",
        **own: Any,
    ) -> None:
        (config,) = config_files(bundle, CONFIG)
        given = check_stage_settings(
            ConfigParser.load_config_file(config), settings or {}, "settings of the mask generator", OWN_KEYS
        )
        self.folder = tempfile.TemporaryDirectory()
        own = {"progress": False, **given, **own, "output_dir": self.folder.name}
        self.stage = Stage(bundle, CONFIG, device, **own)
        self.stage.workflow.initialize()  # checks what it was given
        self.organ_sizes = dict(organ_sizes or {})

    @property
    def organ_sizes(self) -> dict[str, float]:
        """Organ -> ml that the next masks are asked for."""
        return self._organ_sizes

    @organ_sizes.setter
    def organ_sizes(self, sizes: Mapping[str, float]) -> None:
        check_plain(sizes, "organ_sizes")
        self.stage.load()  # before the parser forgets what it has built
        self.stage.parser["organ_sizes"] = dict(sizes)
        self.stage.inferer.asked = self.stage.parser.get_parsed_content("asked")
        self._organ_sizes = dict(sizes)

    def masks(self, request: MaskRequest, count: int, seed: int = 0) -> list[SourcedMask]:
        """See :class:`~maisi_tools.masks.sources.MaskSource`; mask N has the seed `seed` + N.

        The request only says what a mask lacks (``misfits``): the generator is asked for sizes, not for regions.
        """
        found = []
        for one in range(seed, seed + count):
            self.stage({"name": f"seed{one}", "seed": one}, one)
            path = Path(self.folder.name) / f"seed{one}_mask.nii.gz"
            (drawn,) = FileSource([path]).masks(request, 1)
            path.unlink()
            sizes = f" {json.dumps(self.organ_sizes)}" if self.organ_sizes else ""
            found.append(SourcedMask(drawn.mask, f"generator seed {one}{sizes}", drawn.misfits))
        return found
