"""The learned mask generator as a source of masks, beside those of :mod:`maisi_tools.masks.sources`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from maisi_tools.masks.library import MaskRequest
from maisi_tools.masks.sources import FileSource, SourcedMask
from maisi_tools.stage_settings import check_plain, check_stage_settings

OWN_KEYS = ("bundle_root", "input", "dataset_dir", "output_dir", "organ_sizes", "seed", "num_samples", "device", "data")
"""Keys of the config that the source sets itself."""


class GeneratorSource:
    """Masks from ``mask_inference.json`` of the maisi_ldm bundle.

    Args:
        bundle: its folder.
        organ_sizes: organ -> ml, see :class:`~maisi_tools.diffusion.organ_sizes.OrganSizes`.
        settings: further keys of the config, with values that may come from a file.
        device: for the networks.
        own: further keys, with values of the caller's own.

    Raises:
        InputError: see :func:`~maisi_tools.stage_settings.check_stage_settings`.
    """

    def __init__(
        self,
        bundle: str | os.PathLike,
        organ_sizes: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "cpu",
        **own: Any,
    ) -> None:
        self.bundle = Path(bundle)
        self.config = self.bundle / "configs" / "mask_inference.json"
        config = ConfigParser.load_config_file(self.config)
        check_plain(organ_sizes or {}, "organ_sizes")
        self.organ_sizes = dict(organ_sizes or {})
        given = check_stage_settings(config, settings or {}, "settings of the mask generator", OWN_KEYS)
        self.settings = {"progress": False, **given, **own, "device": f"$torch.device({device!r})"}

    def masks(self, request: MaskRequest, count: int, seed: int = 0) -> list[SourcedMask]:
        """See :class:`~maisi_tools.masks.sources.MaskSource`; mask N has the seed `seed` + N.

        The request only says what a mask lacks (``misfits``): the generator is asked for sizes, not for regions.

        Raises:
            InputError: sizes that the weights do not know, or a key that the config refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            workflow = ConfigWorkflow(
                config_file=str(self.config),
                meta_file=str(self.bundle / "configs" / "metadata.json"),
                logging_file=False,
                bundle_root=str(self.bundle),
                input=[{"name": f"seed{one}", "seed": one} for one in range(seed, seed + count)],
                output_dir=folder,
                organ_sizes=self.organ_sizes,
                **self.settings,
            )
            workflow.initialize()
            workflow.run()
            workflow.finalize()
            found = []
            for one in range(seed, seed + count):
                (drawn,) = FileSource([Path(folder) / f"seed{one}_mask.nii.gz"]).masks(request, 1)
                sizes = f" {json.dumps(self.organ_sizes)}" if self.organ_sizes else ""
                found.append(SourcedMask(drawn.mask, f"generator seed {one}{sizes}", drawn.misfits))
        return found
