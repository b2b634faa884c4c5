"""What the MAISI bundles are made of. Modules that were moved say where they are now."""

from __future__ import annotations

import sys
from typing import Any

MOVED = {
    "atomic": "files",
    "fingerprints": "files",
    "stage_settings": "settings",
    "yaml_fields": "settings",
    "run_settings": "bundles.settings",
    "run_record": "bundles.record",
    "packaging": "bundles.packaging",
    "masks.codes.display_name": "masks.vocabulary.display_name",
    "networks.MaskUNet": "mask_generator.network.MaskUNet",
    "diffusion.footprint": "bundles.footprint",
    "diffusion.inferers.MaskSampler": "mask_generator.sampler.MaskSampler",
    "diffusion.mask_source": "cohort.generator",
    "diffusion.organ_sizes": "mask_generator.sizes",
    "diffusion.shape_prior": "mask_generator.prior",
    "metrics.intensity": "masks.intensity",
    "training.autocast": "autocast",
    "training.datalist": "datasets.datalist",
    "training.mask_autoencoder": "mask_generator.losses",
    "training.mask_diffusion": "mask_generator.training",
    "training.masks": "datasets.complete",
    "training.prepare": "datasets.prepare",
    "training.sources": "datasets.layouts",
    "training.workers": "datasets.workers",
}
"""Import path before version 0.1.0, without the package's name -> where it is now."""


def refuse_moved(module: str, name: str) -> Any:
    """What a module says (its ``__getattr__``) of a name that it does not have.

    Raises:
        InputError: it was moved.
        AttributeError: it never was there.
    """
    path = f"{module}.{name}"
    _Moved.find_spec(path)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Moved:
    """Finder of modules that nobody else finds: those that were moved."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Nothing, or an InputError with the new path."""
        package, _, rest = name.partition(".")
        if package == __name__ and rest in MOVED:
            from maisi_tools.errors import InputError

            raise InputError(f"{name} has moved; write {__name__}.{MOVED[rest]} in its place (CHANGELOG lists all)")


if not any(getattr(finder, "__name__", "") == _Moved.__name__ for finder in sys.meta_path):
    sys.meta_path.append(_Moved)  # type: ignore[arg-type]
